"""What the page of a run reads from files: the run's own, ablation tables, published scores."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import yaml

from flallm import config as cfg
from flallm.evaluation import metrics
from flallm.report.charts import finite_number

ABSENT = "(not there)"  # shown for a field that a config lacks


def read_text(path: Path) -> str:
    """The text of a file, empty if there is none."""
    if not path.is_file():
        return ""
    return path.read_text(encoding="utf-8", errors="replace").strip()


def read_json(path: Path) -> dict:
    """The object in a JSON file, empty if there is none or it cannot be read."""
    try:
        content = json.loads(read_text(path) or "{}")
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def read_jsonl(path: Path) -> list[dict]:
    """The rows that can be read: a run that was killed may leave half a line."""
    rows = []
    for line in read_text(path).split("\n"):  # other line breaks of Unicode may be in a string
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError):
            continue
    return [row for row in rows if isinstance(row, dict)]


@dataclass(frozen=True)
class AblationTable:
    """A table that `flallm ablate` wrote."""

    title: str
    head: list[str]
    rows: list[list[str]]
    note: str
    picture: str  # data URL of a PNG, or empty


def ablation_tables(run: Path) -> list[AblationTable]:
    """The tables beside a run, and those of its study: OUT/table-4.md for OUT/runs/NAME/seed0."""
    folder = run.resolve().parent
    folders = [folder]
    if folder.parent.name == "runs":
        folders.append(folder.parent.parent)
    paths: set[Path] = set()
    for folder in folders:
        paths.update(folder.glob("table-*.md"), folder.glob("fig*.md"))
    return [_ablation_table(path) for path in sorted(paths, key=_natural_order)]


def _natural_order(path: Path) -> list[int | str]:
    """Sorts table-10 after table-9."""
    parts = re.split("([0-9]+)", path.stem)
    return [int(part) if part.isdigit() else part for part in parts]


def _ablation_table(path: Path) -> AblationTable:
    lines = read_text(path).splitlines()
    title = lines[0].strip("*") if lines else path.stem
    table_lines = [line for line in lines if line.startswith("|")]
    head, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table_lines] or [[]]
    note = " ".join(line for line in lines[1:] if not line.startswith(("|", "![")))
    picture = path.with_suffix(".png")
    url = ""
    if picture.is_file():
        url = f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"
    return AblationTable(title, head, rows[1:], note.strip(), url)  # rows[0] is |---|


def recipe_differences(config: dict[str, object]) -> dict[str, object] | None:
    """{field: the recipe's value} where the run has another; None if its recipe is unknown."""
    name, stage = config.get("name"), config.get("stage")
    if not isinstance(name, str) or not re.fullmatch(r"[\w-]+", name) or stage not in cfg.STAGES:
        return None
    if not resources.files("flallm").joinpath(f"recipes/{name}.yaml").is_file():
        return None
    recipe = cfg.flat(yaml.safe_load(cfg.dump(cfg.load(name, stage))))
    values = {field: recipe.get(field, ABSENT) for field in recipe | config}
    return {field: v for field, v in values.items() if v != config.get(field, ABSENT)}


def published_table(corpus: str, split: str, scores: dict) -> dict | None:
    """The published table of a data set with the run in it, and what limits the comparison.

    None if the data set has no table or the run no scores under its convention.
    """
    text = (Path(__file__).parent / "published.yaml").read_text(encoding="utf-8")
    table = yaml.safe_load(text).get(corpus)
    if not table or table["convention"] not in scores:
        return None
    run_scores = scores[table["convention"]]
    warnings = []
    if split != table["split"]:
        warnings.append(f"These are scores of {split}, the published ones of {table['split']}.")
    if run_scores["num_samples"] != table["sentences"]:
        warnings.append(
            f"{run_scores['num_samples']} sentences were scored here, {table['sentences']} there."
        )
    names = [name for name in metrics.LABELS if name in table["systems"][0]]
    run = {"name": "this run", "citation": "", "gloss": False, "is_this_run": True}
    run |= {name: run_scores[name]["value"] for name in names}
    systems = sorted([*table["systems"], run], key=lambda system: -(system["bleu4"] or 0))
    top = max(*(system["bleu4"] for system in systems), run_scores["bleu4"]["ci95"][1])
    additions = {"corpus": corpus, "systems": systems, "warnings": warnings}
    return table | additions | {"top": top, "names": names}


def time_by_use(rows: list[dict]) -> list[tuple[str, float]]:
    """[(use, seconds)] of the whole run, from rows of metrics.jsonl."""
    training = waiting = dev = 0.0
    last = dev_since_last = 0.0  # seconds at the last row with a time, and on dev since then
    for row in rows:
        dev_seconds = finite_number(row.get("dev_seconds")) or 0.0
        dev += dev_seconds
        dev_since_last += dev_seconds
        wait_share = finite_number(row.get("data_wait_share"))
        seconds = finite_number(row.get("seconds"))
        if wait_share is None or seconds is None:
            continue
        spent = max(0.0, seconds - last - dev_since_last)
        waiting += wait_share * spent
        training += (1 - wait_share) * spent
        last, dev_since_last = seconds, 0.0
    uses = [("training steps", training), ("waiting for data", waiting), ("dev scores", dev)]
    return [(use, seconds) for use, seconds in uses if seconds]
