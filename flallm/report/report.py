"""One HTML file of a run, to be opened without a network: scores, curves, probes, config, and the sentences with their clips.

A run that ended early has a page too: what is missing is named there. All text of the run is data to the page: the template escapes it, and a
content security policy lets no other script run than the page's own.
"""

from __future__ import annotations

import base64
import difflib
import hashlib
import itertools
import json
import math
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import jinja2
import numpy as np
import torch
import yaml
from markupsafe import Markup
from sacrebleu.metrics import CHRF

from flallm import config as cfg
from flallm.data.dataset import ClipDataset
from flallm.data.reader import BadSample, Shards, splits_of
from flallm.distributed.context import precision
from flallm.evaluation import metrics
from flallm.evaluation import sentences as results
from flallm.evaluation.decode import load_run
from flallm.evaluation.probe import training_clips
from flallm.report.charts import charts, draw, finite_number, thin
from flallm.utils import UserError, atomic_write, ensure_dir, visible_files

PACKAGE = Path(__file__).parent
FORMS = ("", "labels", "manifest")  # what shards made of a table of any data set say of it: its name is the recipe's
VIDEO_MIB = 12  # of clips in the page, a third more there as text
LONGEST = 400  # words that are compared one by one


@dataclass
class Sentence:
    key: str
    reference: str
    hypothesis: str
    score: float  # chrF
    missed: list[tuple[str, bool]]  # the reference in parts, and whether the hypothesis lacks them
    wrong: list[tuple[str, bool]]  # the hypothesis in parts, and whether the reference lacks them
    nearest: str = ""  # of the training text
    signer: str = ""
    video: str = ""  # a data: address
    attention: list[tuple[str, str, float]] = field(default_factory=list)  # (word, its frames' weights as a CSS mask, where it peaks, from 0 to 1)


def report(run: Path, split: str, clips: int, shards_folder: str = "") -> Path:
    """Writes report.html of a run folder. clips: how many sentences of the split come with their clip.
    shards_folder: where the run's shards lie now, if not where its config says."""
    config, notes = cfg.flat(cfg.read_run(run, shards_folder)), []
    ensure_dir(run)  # which is there; whether the page can be written is better known now
    sentences = _sentences(run, split, str(config.get("convention", "raw")), notes)
    others = [path.stem for path in visible_files(run / "predictions", "*.jsonl")]
    if not sentences and others:
        raise UserError(f"{run} has no sentences of {split} but of {', '.join(others)}: flallm evaluate {run} --split={split} writes them")
    shards, corpus = _shards(str(config.get("data.shards", "")), split, notes)
    if shards and sentences:
        _add_nearest(sentences, shards)
        _add_clips(sentences, shards, clips, run, notes)
    rows, scores = _jsonl(run / "metrics.jsonl"), _json(run / f"scores/{split}.json")
    leading = scores.get("leading", "bleu4")
    found = {
        "run": run.resolve().name,
        "split": split,
        "config": config,
        "differs": _differs(config),
        "command": _text(run / "command.txt"),
        "environment": cfg.flat(_json(run / "environment.json")),
        "scores": scores,
        "convention": config.get("convention", "raw"),
        "published": _published(str(config.get("name")) if corpus in FORMS else corpus, split, scores),
        "probes": _json(run / f"probes/{split}.json"),
        "charts": charts(rows),
        "time": _time(rows),
        "bad": Counter((str(b.get("key")), str(b.get("cause"))) for b in _jsonl(run / "bad_samples.jsonl")).most_common(),
        "skipped": sorted({row.get("step") for row in _jsonl(run / "skipped.jsonl")} - {None}),
        "tables": [_table(path) for path in _tables(run)],
        "sentences": sentences,
        "notes": notes,
        "labels": metrics.LABELS,
        "leading": leading,
        "leading_note": metrics.leading_note(leading),
        "conventions": metrics.CONVENTIONS,
    }
    page = run / "report.html"
    atomic_write(page, _render(found))
    return page


def _tables(run: Path) -> list[Path]:
    """Those beside the run, and those of the study it is a run of: OUT/runs/NAME/seed0 is one of OUT/table-4.md."""
    folder = run.resolve().parent
    folders = [folder, folder.parent.parent] if folder.parent.name == "runs" else [folder]
    found = {path for folder in folders for pattern in ("table-*.md", "fig*.md") for path in folder.glob(pattern)}
    return sorted(found, key=lambda path: [int(part) if part.isdigit() else part for part in re.split("([0-9]+)", path.stem)])  # 10 comes after 9


def _table(path: Path) -> dict:
    """What `flallm ablate` wrote: {"title", "head", "rows", "note", "picture": a data: address}."""
    lines = _text(path).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    picture = path.with_suffix(".png")
    return {
        "title": next(iter(lines), path.stem).strip("*"),
        "head": cells[0] if cells else [],
        "rows": cells[2:],
        "note": " ".join(line for line in lines[1:] if not line.startswith(("|", "!["))).strip(),
        "picture": f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}" if picture.is_file() else "",
    }


def _render(found: dict) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PACKAGE / "page"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        finalize=_printable,
    )
    environment.filters |= {"duration": _duration, "draw": draw, "thin": thin}
    environment.globals |= {"reachable": metrics.MIN_TOKENIZER_CEILING, "number": _points, "interval": lambda score: f"[{score['ci95'][0]:.2f}, {score['ci95'][1]:.2f}]"}
    script = Markup((PACKAGE / "page/report.js").read_text(encoding="utf-8"))
    style = Markup((PACKAGE / "page/report.css").read_text(encoding="utf-8"))
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("report.html").render(**found, script=script, style=style, allowed=allowed)


def _printable(value):
    """Text without what an HTML file cannot hold: controls, and halves of characters."""
    return re.sub(r"[\0-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]", "\N{REPLACEMENT CHARACTER}", value) if type(value) is str else value


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace").strip() if path.is_file() else ""


def _json(path: Path) -> dict:
    try:
        found = json.loads(_text(path) or "{}")
    except (ValueError, RecursionError):
        found = {}
    return found if isinstance(found, dict) else {}


def _jsonl(path: Path) -> list[dict]:
    """The rows that can be read: a run that was killed may have left half a line."""
    rows = []
    for line in _text(path).split("\n"):  # a sentence may hold what else Unicode calls a line break
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError):
            continue
    return [row for row in rows if isinstance(row, dict)]


def _sentences(run: Path, split: str, convention: str, notes: list[str]) -> list[Sentence]:
    path = run / f"predictions/{split}.jsonl"
    if not path.is_file():
        notes.append(f"No sentences yet: flallm evaluate {run} --split={split} writes them.")
        return []
    chrf, words = CHRF(), metrics.splitter(convention) if convention in metrics.CONVENTIONS else str.split
    said = zip(*results.pairs(path))
    return [Sentence(str(key), r, h, chrf.sentence_score(h, [r]).score, *_differences(words(r), words(h), r, h)) for h, r, key in said]


def _differences(reference: list[str], hypothesis: list[str], r: str, h: str) -> tuple[list, list]:
    """Both texts in parts, each with whether it is missing in the other."""
    if max(len(reference), len(hypothesis)) > LONGEST:
        return [(r, False)], [(h, False)]
    missed, wrong, space = [], [], " " if len(r.split()) > 1 or len(h.split()) > 1 else ""
    for kind, a, b, c, d in difflib.SequenceMatcher(None, reference, hypothesis, autojunk=False).get_opcodes():
        for parts, words in ((missed, reference[a:b]), (wrong, hypothesis[c:d])):
            if words:
                parts += [(space, False)] * bool(parts and space) + [(space.join(words), kind != "equal")]
    return missed, wrong


def _shards(folder: str, split: str, notes: list[str]) -> tuple[Shards | None, str]:
    """(the split's shards, which data set it is), or nothing where they lie elsewhere now."""
    try:
        shards = Shards(folder, split)
        return shards, str(shards.corpus.get("name", ""))
    except (UserError, OSError, ImportError) as error:
        notes.append(f"Neither clips nor the nearest training sentences: {error}. If they lie elsewhere now, name their folder with --shards=DIR.")
        return None, ""


def _add_nearest(sentences: list[Sentence], shards: Shards) -> None:
    texts = list(dict.fromkeys(meta["text"] for meta in training_clips(shards.folder))) if "train" in splits_of(shards.folder) else []
    if not texts:
        return
    nearest = Nearest(texts)
    for s in sentences:
        s.nearest = nearest(s.hypothesis)


class Nearest:
    """The text that has most words and pairs of words in common with another, rare ones counting more."""

    def __init__(self, texts: list[str]):
        self.texts, places = texts, {}
        for n, text in enumerate(texts):
            for term in self._terms(text):
                places.setdefault(term, []).append(n)
        self.places = {term: np.array(found) for term, found in places.items()}
        self.weights = {term: math.log(1 + len(texts) / len(found)) for term, found in self.places.items()}
        self.sizes = np.array([sum(self.weights[term] for term in self._terms(text)) for text in texts])

    @staticmethod
    def _terms(text: str) -> set:
        words = text.lower().split() if " " in text else list(text)
        return {*words, *itertools.pairwise(words)}

    def __call__(self, text: str) -> str:
        terms = [term for term in self._terms(text) if term in self.places]
        if not terms:
            return ""
        weights = np.repeat([self.weights[term] for term in terms], [len(self.places[term]) for term in terms])
        common = np.bincount(np.concatenate([self.places[term] for term in terms]), weights, len(self.texts))
        return self.texts[int(np.argmax(common / (self.sizes + sum(self.weights[term] for term in terms))))]


def _add_clips(sentences: list[Sentence], shards: Shards, count: int, run: Path, notes: list[str]) -> None:
    """Gives sentences from the best to the worst their clips, as many as fit, and shows where the model looks while it says them."""
    metas = {meta["key"]: (n, meta) for n, meta in enumerate(shards.metas()) if meta}
    for s in sentences:
        s.signer = str(metas.get(s.key, (0, {}))[1].get("signer") or "")
    if shards.features:
        notes.append("No clips are shown: this run reads features.")
        return
    ranked = sorted((s for s in sentences if s.key in metas), key=lambda s: -s.score)
    chosen = [ranked[i] for i in dict.fromkeys(np.linspace(0, len(ranked) - 1, min(count, len(ranked))).round().astype(int).tolist())]
    left, shown = VIDEO_MIB * 2**20, []
    for s in chosen:
        try:
            video, _ = shards.read(metas[s.key][0])
        except BadSample:
            continue
        if len(video) <= left:
            left -= len(video)
            s.video = "data:video/mp4;base64," + base64.b64encode(video).decode()
            shown.append(s)
    if len(shown) < len(chosen):
        notes.append(f"{len(shown)} of {len(chosen)} clips are shown: the others cannot be read or are too large for a page.")
    try:
        _add_attention(shown, [metas[s.key][0] for s in shown], shards, run)
    except UserError as error:
        notes.append(f"Not shown where the model looks: {error}.")


def _add_attention(sentences: list[Sentence], numbers: list[int], shards: Shards, run: Path) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, config = load_run(run, device, shards.folder)
    clips = ClipDataset(shards.split, config.data, config.seed)
    with precision(config.train, device):
        for s, number in zip(sentences, numbers):
            batch = clips.batch(model.text, [(None, number)])
            if batch.keys == [s.key] and s.hypothesis and len(s.hypothesis.split()) <= LONGEST:
                s.attention = [(word, _mask(row), (int(row.argmax()) + 0.5) / len(row)) for word, row in model.attention(batch.to(device), s.hypothesis)]


def _mask(weights: torch.Tensor) -> str:
    """A CSS gradient over time, opaque where the weights are largest."""
    shares = (weights / max(float(weights.max()), 1e-9)).tolist()
    return "linear-gradient(90deg," + ",".join(f"rgb(0 0 0/{share:.2f}) {(i + 0.5) / len(shares):.1%}" for i, share in enumerate(shares)) + ")"


def _differs(config: dict[str, object]) -> dict[str, object] | None:
    """{field: the recipe's value} where the run has another; None where its recipe is not known."""
    name, stage = config.get("name"), config.get("stage")
    if not isinstance(name, str) or not re.fullmatch(r"[\w-]+", name) or stage not in cfg.STAGES or not (PACKAGE / f"recipes/{name}.yaml").is_file():
        return None
    recipe = cfg.flat(yaml.safe_load(cfg.dump(cfg.load(name, stage))))
    return {field: recipe.get(field, "(not there)") for field in recipe | config if recipe.get(field, "(not there)") != config.get(field, "(not there)")}


def _published(corpus: str, split: str, scores: dict) -> dict | None:
    """The table of the data set with the run in it, and how far the two can be compared."""
    table = yaml.safe_load((PACKAGE / "published.yaml").read_text(encoding="utf-8")).get(corpus)
    if not table or table["convention"] not in scores:
        return None
    mine = scores[table["convention"]]
    warnings = []
    if split != table["split"]:
        warnings.append(f"These are scores of {split}, the published ones of {table['split']}.")
    if mine["num_samples"] != table["sentences"]:
        warnings.append(f"{mine['num_samples']} sentences were scored here, {table['sentences']} there.")
    names = [name for name in metrics.LABELS if name in table["systems"][0]]
    run = {"name": "this run", "citation": "", "gloss": False, "mine": True, "ci95": mine["bleu4"]["ci95"]} | {name: mine[name]["value"] for name in names}
    systems = sorted([*table["systems"], run], key=lambda s: -(s["bleu4"] or 0))
    return {"corpus": corpus, **table, "systems": systems, "warnings": warnings, "top": max(max(s["bleu4"] for s in systems), run["ci95"][1]), "names": names}


def _time(rows: list[dict]) -> list[tuple[str, float]]:
    """[(what for, seconds)] of the whole run."""
    dev = sum(finite_number(row.get("dev_seconds")) or 0 for row in rows)
    waiting = training = last = 0.0
    since = 0.0  # seconds on dev since the last line
    for row in rows:
        since += finite_number(row.get("dev_seconds")) or 0
        if (share := finite_number(row.get("data_wait_share"))) is not None and (seconds := finite_number(row.get("seconds"))) is not None:
            spent = max(0.0, seconds - last - since)
            waiting, training, last, since = waiting + share * spent, training + (1 - share) * spent, seconds, 0.0
    return [(what, seconds) for what, seconds in (("training steps", training), ("waiting for data", waiting), ("dev scores", dev)) if seconds]


def _points(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours} h {rest // 60:02} min" if hours else f"{rest // 60} min {rest % 60:02} s" if rest >= 60 else f"{seconds:.0f} s"
