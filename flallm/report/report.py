"""One HTML file of a run: scores, curves, probes, config, and the sentences with their clips.

It opens without a network. A run that ended early has a page too, which names what is missing.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from flallm import config as cfg
from flallm.data.reader import Shards
from flallm.evaluation import metrics
from flallm.report import run_files
from flallm.report.charts import charts
from flallm.report.render import render
from flallm.report.sentences import Sentence, add_clips, add_nearest, load_sentences
from flallm.utils import UserError, atomic_write, ensure_dir, visible_files

# Names of shards from tables of any data set: the recipe's name says which data set it is.
ANY_CORPUS = ("", "labels", "manifest")


def report(run: Path, split: str, clips: int, shards_folder: str = "") -> Path:
    """Writes report.html of a run folder and returns its path.

    clips: number of sentences of the split that come with their clip.
    shards_folder: where the run's shards are now, if not where its config says.
    """
    config = cfg.flat(cfg.read_run(run, shards_folder))
    ensure_dir(run)  # fails now, not after the work, if the folder is read-only
    notes: list[str] = []
    sentences = _sentences(run, split, str(config.get("convention", "raw")), notes)
    shards = _shards(str(config.get("data.shards", "")), split, notes)
    corpus = str(shards.corpus.get("name", "")) if shards else ""
    if corpus in ANY_CORPUS:
        corpus = str(config.get("name"))
    if shards and sentences:
        add_nearest(sentences, shards)
        add_clips(sentences, shards, clips, run, notes)
    scores = run_files.read_json(run / f"scores/{split}.json")
    rows = run_files.read_jsonl(run / "metrics.jsonl")
    leading = scores.get("leading", "bleu4")
    content = {
        "run": run.resolve().name,
        "split": split,
        "config": config,
        "recipe_differences": run_files.recipe_differences(config),
        "command": run_files.read_text(run / "command.txt"),
        "environment": cfg.flat(run_files.read_json(run / "environment.json")),
        "scores": scores,
        "convention": config.get("convention", "raw"),
        "leading": leading,
        "leading_note": metrics.leading_note(leading),
        "published": run_files.published_table(corpus, split, scores),
        "probes": run_files.read_json(run / f"probes/{split}.json"),
        "charts": charts(rows),
        "time": run_files.time_by_use(rows),
        "bad_samples": _bad_samples(run),
        "skipped_steps": _skipped_steps(run),
        "tables": run_files.ablation_tables(run),
        "sentences": sentences,
        "notes": notes,
    }
    page = run / "report.html"
    atomic_write(page, render(content))
    return page


def _sentences(run: Path, split: str, convention: str, notes: list[str]) -> list[Sentence]:
    """Raises UserError if the run has sentences, but none of this split."""
    path = run / f"predictions/{split}.jsonl"
    if path.is_file():
        return load_sentences(path, convention)
    command = f"flallm evaluate {run} --split={split}"
    others = [path.stem for path in visible_files(run / "predictions", "*.jsonl")]
    if others:
        raise UserError(
            f"{run} has no sentences of {split} but of {', '.join(others)}: {command} writes them"
        )
    notes.append(f"No sentences yet: {command} writes them.")
    return []


def _shards(folder: str, split: str, notes: list[str]) -> Shards | None:
    try:
        return Shards(folder, split)
    except (UserError, OSError, ImportError) as error:
        notes.append(
            f"Neither clips nor the nearest training sentences: {error}. "
            "If they lie elsewhere now, name their folder with --shards=DIR."
        )
        return None


def _bad_samples(run: Path) -> list[tuple[tuple[str, str], int]]:
    """[((key, cause), times)], the most frequent first."""
    rows = run_files.read_jsonl(run / "bad_samples.jsonl")
    return Counter((str(row.get("key")), str(row.get("cause"))) for row in rows).most_common()


def _skipped_steps(run: Path) -> list[int]:
    rows = run_files.read_jsonl(run / "skipped.jsonl")
    return sorted({row.get("step") for row in rows} - {None})
