"""What stage 2 costs, on this machine: one JSON object a line.

    python tools/bench_llm.py [FIGURE …]

What is compared is measured in turns inside one process, and the medians are divided.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

from flallm import config as cfg
from flallm import engine
from flallm.corpora import synthetic
from flallm.encode import Options
from flallm.features import features
from flallm.loader import Clips, batches
from flallm.model.translator import Translator
from flallm.pretrain import pretrain
from flallm.shards import make_shards
from flallm.text import Text
from flallm.train import take_encoder, train


def figure(name: str, value: float, unit: str, detail: str) -> None:
    print(json.dumps({"figure": name, "value": round(value, 4), "unit": unit, "detail": detail}), flush=True)


def features_vs_video(out: Path) -> None:
    """Clips/s of stage-2 steps, reading included, with the paper's encoder at 224 pixels and the demo's language model."""
    said, sys.stdout = sys.stdout, sys.stderr
    make_shards(synthetic.clips(train=12, dev=1, test=0), out / "shards", Options(), {"name": "synthetic"})
    pretrain([text for _, text in synthetic.sentences("text", 3000)], out / "llm", layers=3, width=192, heads=4, steps=2)
    encoder = {"encoder.stem": 64, "encoder.widths": [64, 128, 256, 512], "encoder.depths": [2, 2, 2, 2], "encoder.channels": 1024}
    settings = {"llm.path": str(out / "llm"), "data.resize": 256, "data.crop": 224, "data.workers": 1, "train.batch": 2, "train.steps": 1, **encoder}
    video = cfg.load("demo", "stage1", settings | {"data.shards": str(out / "shards")})
    ranks = engine.join()
    train(video, out / "stage1", ranks)
    features(out / "stage1", out / "features", ranks, "bf16", 0)
    times: dict[str, list[float]] = {"shards": [], "features": []}
    for _ in range(2):
        for name, seconds in times.items():
            config = cfg.load("demo", "stage2", settings | {"data.shards": str(out / name), "train.batch": 4})
            model, clips = Translator(config, Text(config.llm)), Clips("train", config.data, 0)
            take_encoder(model, config, out / "stage1")
            zero2, groups = engine.start_engine(model.train(), config.train, ranks), [[(0, n) for n in range(m, m + 4)] for m in (0, 4, 8)]
            ends = []
            for batch in batches(clips, model.text, groups, 1):
                engine.train_step(zero2, [batch], ranks)
                ends.append(time.monotonic())
            seconds += [b - a for a, b in pairwise(ends)]  # the first step starts workers and kernels
    sys.stdout = said
    speeds = {name: 4 / statistics.median(seconds) for name, seconds in times.items()}
    detail = f"{speeds['features']:.1f} clips/s from features, {speeds['shards']:.2f} from video, {clips.used.mean():.1f} used frames a clip"
    figure("features_vs_video", speeds["features"] / speeds["shards"], "ratio", detail)


FIGURES = {"features_vs_video": features_vs_video}


def main(names: list[str]) -> None:
    for name in names or FIGURES:
        with tempfile.TemporaryDirectory() as folder:
            FIGURES[name](Path(folder))
    engine.leave()


if __name__ == "__main__":
    main(sys.argv[1:])
