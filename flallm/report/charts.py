"""The curves of a run's page: which charts metrics.jsonl gives, and each one as an inline SVG."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator


def _bleu(n: int) -> dict[str, str]:
    return {f"dev_bleu{n}": "right videos", f"dev_bleu{n}_swapped": "swapped videos"}


RATES = {"lr_encoder": "encoder", "lr_adapter": "adapter", "lr_language": "language model"}
KNOWN = {  # title: ({field of metrics.jsonl: label}, unit)
    "Loss": ({"loss": "training"}, ""),
    "BLEU-1 on dev": (_bleu(1), ""),
    "BLEU-2 on dev": (_bleu(2), ""),
    "BLEU-3 on dev": (_bleu(3), ""),
    "BLEU-4 on dev": (_bleu(4), ""),
    "Learning rate": (RATES, ""),
    "Clips a second": ({"clips_per_s": "all ranks"}, ""),
    "Waiting for data": ({"data_wait_share": "share of the time"}, "%"),
}
NOT_DRAWN = {"step", "seconds", "skipped", "dev_seconds"}
SIZE_INCHES = (4.6, 2.3)
LINE_STYLES = (("--accent", "-"), ("--other", (0, (5, 2.5))), ("--third", (0, (1, 1.5))))
FEW_POINTS = 40  # up to here each point is marked: a single one draws no line
# matplotlib knows no CSS variables: it draws in these colours, and the variables replace them.
COLORS = {
    "--accent": "#00000a",
    "--other": "#00000b",
    "--third": "#00000c",
    "--faint": "#00000d",
    "--line": "#00000e",
}
STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # for measuring: the page's style sheet sets its own font
    "font.size": 10,
    "text.color": COLORS["--faint"],
    "xtick.labelcolor": COLORS["--faint"],
    "ytick.labelcolor": COLORS["--faint"],
    "axes.formatter.useoffset": False,
    "axes.grid": True,
    "grid.color": COLORS["--line"],
    "legend.frameon": False,
    "lines.linewidth": 1.5,
    "lines.markersize": 3,
    # Long runs: points that lie within a point (1/72 inch) of the drawn line are left out.
    "path.simplify": True,
    "path.simplify_threshold": 1.0,
    "svg.fonttype": "none",
} | {f"axes.spines.{side}": False for side in ("left", "right", "top", "bottom")}


@dataclass(frozen=True)
class Series:
    label: str  # empty: the chart's title says it
    values: list[float | None]  # one a step; None where that step has none


@dataclass(frozen=True)
class Chart:
    title: str
    unit: str
    steps: list[int]
    series: list[Series]


def charts(rows: list[dict]) -> list[Chart]:
    """Returns the known charts that rows of metrics.jsonl fill, then one for each other field."""
    known = NOT_DRAWN.union(*(fields for fields, _ in KNOWN.values()))
    others = {}
    for row in rows:
        others |= {field: ({field: ""}, "") for field in row if field not in known}
    drawn = [_chart(rows, title, *content) for title, content in (KNOWN | others).items()]
    return [chart for chart in drawn if chart.steps]


def _chart(rows: list[dict], title: str, labels: dict[str, str], unit: str) -> Chart:
    factor = 100 if unit == "%" else 1
    columns = {field: [finite_number(row.get(field)) for row in rows] for field in labels}
    used = [i for i in range(len(rows)) if any(c[i] is not None for c in columns.values())]
    series = []
    for field, label in labels.items():
        values = [columns[field][i] for i in used]
        if any(value is not None for value in values):
            values = [None if value is None else value * factor for value in values]
            series.append(Series(label, values))
    # An encoder that does not train has a learning rate of zero throughout.
    series = [line for line in series if any(line.values)] or series[:1]
    return Chart(title, unit, [rows[i].get("step", 0) for i in used], series)


def finite_number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def draw(chart: Chart) -> Markup:
    """Returns an inline SVG in the page's colours; the same chart gives the same text."""
    # The salt goes into the ids of the SVG, which have to differ from those of the other charts.
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": ascii(chart.title)}):
        figure = Figure(figsize=SIZE_INCHES, layout="constrained")
        axes = figure.add_subplot()
        for series, (variable, dashes) in zip(chart.series, LINE_STYLES):
            points = [(x, y) for x, y in zip(chart.steps, series.values) if y is not None]
            (line,) = axes.plot(*zip(*points), color=COLORS[variable], linestyle=dashes)
            line.set_label(series.label)
            line.set_marker("o" if len(points) <= FEW_POINTS else "")
        axes.tick_params(length=0)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        if any(series.label for series in chart.series):
            figure.legend(loc="outside upper left", ncols=len(chart.series))
        file = io.StringIO()
        no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=no_metadata)
    return Markup(_inline(file.getvalue()))


def _inline(svg: str) -> str:
    """Makes an SVG file fit to stand in HTML."""
    svg = svg[svg.index("<svg") :]  # without the XML declaration
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # each chart has the same ids, and nothing uses them
    for variable, color in COLORS.items():
        svg = svg.replace(color, f"var({variable})")
    return svg


def thin(chart: Chart, rows: int = 24) -> Iterator[list]:
    """Yields some rows of a chart's numbers, evenly spread: the step, then each series' value."""
    count = len(chart.steps)
    for i in sorted(set(np.linspace(0, count - 1, min(rows, count)).round().astype(int).tolist())):
        yield [chart.steps[i], *(series.values[i] for series in chart.series)]
