"""Commands that score, compare and explain runs."""

from __future__ import annotations

import json
from pathlib import Path

from flallm.commands.common import group_of_ranks, shards_option
from flallm.commands.parse import Count


def evaluate(run: Path, *, split: str = "test", shards: str = "") -> None:
    """Decodes a split with a run's best checkpoint and scores it.

    Writes predictions/<split>.jsonl and scores/<split>.json.

    Args:
        run: the folder of a run
        split: train, dev or test
        shards: where the run's shards lie now, if not where its config.yaml says
    """
    from flallm.evaluation.decode import evaluate

    with group_of_ranks() as ranks, shards_option(shards):
        scores = evaluate(run, split, ranks, shards)
        if ranks.is_main:
            print(json.dumps(scores, indent=1))


def score(hypotheses: Path, references: Path | None = None, *, convention: str = "all") -> None:
    """Scores sentences with 95 % intervals and prints them as JSON.

    Args:
        hypotheses: a text file with a sentence a line, a predictions.jsonl, or a pickle of another
            code base's results
        references: the same of the references, as a second word too (score HYPOTHESES REFERENCES);
            not needed where the first file holds both
        convention: raw, 13a, csl-daily, zh or lower; all: under the name of each
    """
    from flallm.evaluation import metrics, sentences

    names = list(metrics.CONVENTIONS) if convention == "all" else [convention]
    texts, reference_texts, _ = sentences.pairs(hypotheses, references)
    scores = metrics.scores(texts, reference_texts, names)
    print(json.dumps(scores if convention == "all" else scores[convention], indent=1))


def compare(run_a: Path, run_b: Path, *, split: str = "test") -> None:
    """Two evaluated runs side by side: scores with paired tests, configs, changed sentences.

    Args:
        run_a: the folder of a run
        run_b: the folder of another, scored on the same references
        split: train, dev or test
    """
    from flallm.evaluation.compare import compare

    print(compare(run_a, run_b, split))


def probe(run: Path, *, split: str = "test", shards: str = "") -> None:
    """How much of a run's score comes from seeing the video.

    Decodes a split from corrupted videos too, scores it in parts, and writes probes/<split>.json.

    Args:
        run: the folder of a run
        split: train, dev or test
        shards: where the run's shards lie now, if not where its config.yaml says
    """
    from flallm.evaluation.probe import probe, table

    with group_of_ranks() as ranks, shards_option(shards):
        result = probe(run, split, ranks, shards)
        if ranks.is_main:
            print(table(result))


def report(run: Path, *, split: str = "test", clips: Count = 24, shards: str = "") -> None:
    """Writes report.html of a run, one file for any browser, without network.

    It has scores beside published ones, curves, probes, the config, and sentences with clips.

    Args:
        run: the folder of a run
        split: train, dev or test
        clips: how many sentences come with their clip, evenly spread from the best to the worst
        shards: where the run's shards lie now, if not where its config.yaml says
    """
    from flallm.report.report import report

    with shards_option(shards):
        print(report(run, split, clips, shards))
