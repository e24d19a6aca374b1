"""Renders the page of a run from its template, style sheet and script."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

import jinja2
from markupsafe import Markup

from flallm.evaluation import metrics
from flallm.report.charts import draw, thin

PAGE = Path(__file__).parent / "page"
# Control characters, lone surrogates and noncharacters.
INVALID_IN_HTML = re.compile(r"[\0-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")


def render(content: dict) -> str:
    """The HTML of a page. content: the variables of page/report.html; their text is escaped.

    The content security policy lets no script run except the page's own.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PAGE),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        finalize=_valid_in_html,
    )
    environment.filters |= {
        "draw": draw,
        "duration": _duration,
        "interval": _interval,
        "number": _number,
        "percent": _percent,
        "thin": thin,
    }
    script = Markup((PAGE / "report.js").read_text(encoding="utf-8"))
    page = {
        "style": Markup((PAGE / "report.css").read_text(encoding="utf-8")),
        "script": script,
        "script_sha256": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "labels": metrics.LABELS,
        "conventions": metrics.CONVENTIONS,
        "min_tokenizer_ceiling": metrics.MIN_TOKENIZER_CEILING,
    }
    return environment.get_template("report.html").render(content | page)


def _valid_in_html(value):
    """Replaces characters of text that an HTML file cannot hold."""
    if type(value) is not str:  # Markup is a subclass, and the page's own
        return value
    return INVALID_IN_HTML.sub("\N{REPLACEMENT CHARACTER}", value)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _interval(score: dict) -> str:
    low, high = score["ci95"]
    return f"[{low:.2f}, {high:.2f}]"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02} min"
    if minutes:
        return f"{minutes} min {rest:02} s"
    return f"{seconds:.0f} s"
