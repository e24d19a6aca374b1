"""What scoring, decoding and the page of a run cost: one JSON object a line, {"figure", "value", "unit", "detail"}.

python benchmarks/evaluation.py DEMO [FIGURE …]          # DEMO: the folder that make demo wrote
"""

from __future__ import annotations

import json
import random
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from figures import figure

# What is slow to import is imported where it is used, as in flallm/cli.py: every worker that decodes imports this file anew.
from flallm.distributed.context import init_distributed
from flallm.distributed.launch import spawn

SENTENCES = 2500


def score(_: Path) -> None:
    """All conventions with intervals, on sentences of PHOENIX14T's length (two of the embedded corpus in one), every fifth word of the hypotheses wrong."""
    from flallm.data.corpora import synthetic
    from flallm.evaluation import metrics

    texts = [text for _, text in synthetic.sentences("text", 2 * SENTENCES)]
    references = [" ".join(pair) for pair in zip(texts[::2], texts[1::2])]
    words, rng = sorted({word for text in texts for word in text.split()}), random.Random(0)
    hypotheses = [
        " ".join(rng.choice(words) if rng.random() < 0.2 else word for word in text.split())
        for text in references
    ]
    began = time.perf_counter()
    found = metrics.scores(hypotheses, references)
    seconds = time.perf_counter() - began
    length = sum(len(r.split()) for r in references) / len(references)
    figure(
        "score_seconds",
        seconds,
        "s",
        f"{len(found)} conventions ({', '.join(found)}), {metrics.RESAMPLES} resamples, {len(references)} sentences of {length:.1f} words",
    )


def evaluate(demo: Path) -> None:
    """Clips/s of stage 2's test clips, workers' start included: the recipe's batch against clips one by one, in turns; and two ranks against one."""

    with tempfile.TemporaryDirectory() as folder:
        for ranks in (1, 2):
            spawn(_decode, ranks, demo / "stage2", Path(folder) / f"{ranks}.json")
        one, two = (
            json.loads((Path(folder) / f"{ranks}.json").read_text(encoding="utf-8"))
            for ranks in (1, 2)
        )
    batch = one["batch"]
    figure(
        "evaluate_batch_ratio",
        one["many"] / one["single"],
        "ratio",
        f"{one['many']:.1f} clips/s at batch {batch}, {one['single']:.1f} one by one",
    )
    figure(
        "evaluate_two_ranks",
        two["many"] / one["many"],
        "ratio",
        f"{two['many']:.1f} clips/s on two ranks, {one['many']:.1f} on one, batch {batch}, two cores in all",
    )


def _decode(run: Path, out: Path) -> None:
    from flallm.evaluation.decode import decode_split, load_run

    ranks = init_distributed()
    model, config = load_run(run, ranks.device)
    speeds: dict[str, list[float]] = {"many": [], "single": []}
    for turn in range(4):
        for name, decode in (("many", config.decode), ("single", replace(config.decode, batch=1))):
            began = time.monotonic()
            predictions, _ = decode_split(
                model, config, "test", ranks, decode, workers=config.data.workers
            )
            if turn:  # the first warms up
                speeds[name].append(len(predictions) / (time.monotonic() - began))
    if ranks.is_main:
        out.write_text(
            json.dumps(
                {name: statistics.median(found) for name, found in speeds.items()}
                | {"batch": config.decode.batch}
            ),
            encoding="utf-8",
        )


def page(demo: Path) -> None:
    from playwright.sync_api import sync_playwright

    from flallm.report.report import report

    began = time.perf_counter()
    path = report(demo / "stage2", "test", 24)
    seconds = time.perf_counter() - began
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        tab, opened = browser.new_page(), []
        for _ in range(5):
            start = time.perf_counter()
            tab.goto(path.as_uri())
            tab.fill("#search", "water")
            found = tab.locator("#list > li:visible").count()
            opened.append(time.perf_counter() - start)
        sentences = tab.locator("#list > li").count()
    figure("report_mb", path.stat().st_size / 1e6, "MB", f"{sentences} sentences, 24 clips")
    figure("report_build_seconds", seconds, "s", "scores, clips, attention, page")
    figure(
        "report_open_seconds",
        statistics.median(opened),
        "s",
        f"in Chromium, until a search has shown its {found} sentences",
    )


FIGURES = {"score": score, "evaluate": evaluate, "page": page}


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    for name in sys.argv[2:] or FIGURES:
        FIGURES[name](Path(sys.argv[1]))
