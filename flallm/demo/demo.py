"""`flallm demo`: the whole job on the embedded corpus, by the functions the commands call."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path

import flallm
from flallm import config
from flallm.data.clips import Clip
from flallm.data.corpora import synthetic
from flallm.data.encode import EncodeOptions
from flallm.data.reader import Shards
from flallm.data.shards import make_shards
from flallm.distributed.context import init_distributed
from flallm.distributed.launch import spawn
from flallm.utils import UserError

RANKS = 2
WRITTEN = {
    "shards": "shards",
    "language model": "llm",
    "stage 1": "stage1",
    "stage 2": "stage2",
    "curves": "stage*/tensorboard",
    "page": "stage2/report.html",
}


def demo(out: Path, clips: Iterable[Clip] | None = None, overrides: dict | None = None) -> None:
    """clips, overrides {"a.b": value}: another corpus and recipe than the demo's.

    A language model that lies in `out` already is used as it is.
    """
    for stage in ("stage1", "stage2"):
        if (out / stage).exists():
            raise UserError(
                f"{out / stage} is there already: remove {out} or name another folder with --out"
            )
    with _step("1/5  shards: a synthetic signer, rendered and encoded"):
        options = EncodeOptions(short_side=72, per_shard=250)
        dataset = make_shards(
            clips or synthetic.clips(), out / "shards", options, {"name": "synthetic"}
        )
        splits = dataset["splits"].items()
        print(", ".join(f"{split} {n['clips']} clips" for split, n in splits), flush=True)
    from flallm.report.report import report

    with _step("2/5  language model: a small mBART, pre-trained on text of the same language"):
        if not (out / "llm").exists():
            spawn(_pretrain, 1, out)  # a process of its own, which frees its memory
    ranks = _rank_count()
    with _step(f"3/5  stage 1 and 4/5  stage 2, on {ranks} ranks under ZeRO-2"):
        spawn(_stages, ranks, out, overrides or {})
    with _step("5/5  one clip, and a page to look at"):
        test = Shards(out / "shards", "test")
        video, meta = test.read(len(test) // 2)
        (out / "clip.mp4").write_bytes(video)
        print(f"$ flallm translate {out / 'stage2'} {out / 'clip.mp4'}")
        print(flallm.load(out / "stage2").translate(out / "clip.mp4"))
        print(f"(reference: {meta['text']})")
        report(out / "stage2", "test", 24)
    _summary(out)


def _rank_count() -> int:
    """Two ranks, or one where there is a single GPU: each rank needs one of its own."""
    import torch

    return min(RANKS, torch.cuda.device_count() or RANKS)


@contextmanager
def _step(title: str):
    print(f"\n== {title}", flush=True)
    began = time.monotonic()
    yield
    print(f"   {time.monotonic() - began:.0f} s", flush=True)


def _pretrain(out: Path) -> None:
    from flallm.demo.pretrain import pretrain

    sentences = synthetic.sentences("text", synthetic.DEMO.sentences)
    pretrain([text for _, text in sentences], out / "llm")


def _stages(out: Path, overrides: dict) -> None:
    """What every rank does: both stages, each with its scores on test."""
    from flallm.evaluation.decode import evaluate
    from flallm.evaluation.probe import probe
    from flallm.training.train import train

    ranks = init_distributed()
    fields = {"data.shards": str(out / "shards"), "llm.path": str((out / "llm").resolve())}
    for stage in ("stage1", "stage2"):
        began = time.monotonic()
        resolved = config.load("demo", stage, fields | overrides)
        train(resolved, out / stage, ranks, out / "stage1")
        evaluate(out / stage, "test", ranks)
        if ranks.is_main:
            seconds = f"{time.monotonic() - began:.0f}\n"
            (out / stage / "seconds.txt").write_text(seconds, encoding="utf-8")
    probe(out / "stage2", "test", ranks)


def _summary(out: Path) -> None:
    signature = _print_scores(out)
    text = (out / "stage2/predictions/test.jsonl").read_text(encoding="utf-8")
    predictions = [json.loads(line) for line in text.splitlines()]
    print(
        f"\n{len(predictions)} test sentences by signers that training has not seen "
        f"(raw convention: {signature}). Five of them:"
    )
    longest_first = sorted(predictions, key=lambda p: -len(p["reference"].split()))
    for p in longest_first[:: len(predictions) // 5][:5]:
        print(f"  reference   {p['reference']}\n  hypothesis  {p['hypothesis']}\n")
    print("Written:")
    for name, path in WRITTEN.items():
        print(f"  {name:15} {out / path}")


def _print_scores(out: Path) -> str:
    """A line a stage. Returns the signature of the scores."""
    from flallm.evaluation import metrics

    scores = {
        stage: json.loads((out / stage / "scores/test.json").read_text(encoding="utf-8"))
        for stage in ("stage1", "stage2")
    }
    leading = scores["stage2"]["leading"]
    print(
        f"\n          {metrics.LABELS[leading]} [95 % interval]    "
        "ROUGE-L   swapped videos   training and scoring"
    )
    for stage, values in scores.items():
        bleu, rouge = values["raw"][leading], values["raw"]["rouge_l"]["value"]
        low, high = bleu["ci95"]
        swapped = values[f"swapped_{leading}"]
        seconds = (out / stage / "seconds.txt").read_text(encoding="utf-8").strip()
        print(
            f"{stage}    {bleu['value']:6.2f} [{low:.2f}, {high:.2f}]       "
            f"{rouge:6.2f}    {swapped:6.2f}           {seconds} s"
        )
    return scores["stage2"]["raw"]["signature"]["bleu"]
