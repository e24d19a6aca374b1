"""The tables of docs/planning.md, and how well the work of a step is shared out where clips' costs scatter as measured.

python benchmarks/scale.py tables            # markdown
python benchmarks/scale.py efficiency        # one JSON object a line
"""

from __future__ import annotations

import sys
import time

import numpy as np
import torch
from figures import figure

from flallm import config as cfg
from flallm.data.dataset import Batch
from flallm.data.sampler import TEXT_COST, BatchSampler
from flallm.data.transforms import used_frames
from flallm.model.translator import Translator
from flallm.planning.devices import DEVICES
from flallm.planning.estimate import estimate
from flallm.planning.lengths import CORPORA
from flallm.planning.memory import StubTokenizer
from flallm.planning.rows import rows

RANKS = (8, 64, 512)
CLIPS = {"stage1": 8, "stage2": 16}  # a GPU and step
ROWS = [
    "data/steps", "data/balance", "data/padding", "memory/peak", "computation/time", "communication/gradients", "communication/weights", "communication/hidden",
    "communication/exposed", "time/step", "time/run", "reading/decoding cores", "reading/bytes", "checkpoints/size", "checkpoints/holds up",
]  # fmt: skip


def tables() -> None:
    for corpus in ("phoenix14t", "how2sign", "web"):
        for stage, clips in CLIPS.items():
            columns = {}
            for gpu in ("a100-80", "h100-80"):
                for ranks in RANKS:
                    config = cfg.load(
                        "phoenix14t",
                        stage,
                        {"name": corpus, "train.batch": clips * ranks, "data.shards": "-"},
                    )
                    columns[f"{ranks} {gpu}"] = {
                        f"{f.section}/{f.name}": str(f)
                        for f in rows(estimate(config, ranks, DEVICES[gpu]))
                    }
            print(
                f"**{corpus}, {stage}, {clips} clips a GPU**\n\n| | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}"
            )
            for row in ROWS:
                print(
                    f"| {row.replace('/', ': ')} | {' | '.join(figures[row] for figures in columns.values())} |"
                )
            print(flush=True)


def efficiency() -> None:
    """What a micro-batch costs is fitted to its frames by forward and backward passes on one core; the plan is then run with costs that scatter likewise."""
    torch.set_num_threads(1)
    config = cfg.load(
        "phoenix14t",
        "stage1",
        {"encoder.weights": "none", "data.crop": 112, "train.precision": "fp32"},
    )
    model, rng = Translator(config, StubTokenizer(2429)).train(), np.random.default_rng(0)
    frames = np.sort(rng.integers(4, 76, 40))
    seconds = np.array([min(_seconds(model, int(n)) for _ in range(3)) for n in frames])
    b, a = np.polyfit(frames, seconds, 1)
    scatter = (seconds / (a + b * frames))[frames >= 20]
    figure(
        "cost_fit_r2",
        np.corrcoef(frames, seconds)[0, 1] ** 2,
        "ratio",
        f"{a * 1e3:.0f} ms a micro-batch + {b * 1e3:.1f} ms a frame of 112 pixels; scatter {scatter.std():.3f} of it",
    )
    lengths, texts = CORPORA["web"].lengths()
    lengths = used_frames(lengths, 4, 300)
    for ranks in RANKS:
        plan, shares = (
            BatchSampler(lengths, texts, 8 * ranks, 1, ranks, 0, text_cost=TEXT_COST["stage1"]),
            [],
        )
        for step in range(min(100, plan.steps(0))):
            (parts,) = plan.step(0, step)
            work = np.array([a + b * lengths[clips].sum() for clips in parts]) * rng.choice(
                scatter, ranks
            )
            shares.append(work.mean() / work.max())
        figure(
            f"parallel_efficiency_{ranks}",
            np.mean(shares),
            "ratio",
            f"mean over {len(shares)} steps of mean / max work of a rank, 8 clips each of the web corpus' lengths",
        )


def _seconds(model: Translator, frames: int) -> float:
    """Processor time of one clip."""
    labels = torch.full((1, 12), 5)
    video = torch.zeros(frames, 112, 112, 3, dtype=torch.uint8)
    began = time.process_time()
    model(Batch(video, torch.tensor([frames]), labels, [], [], []))[0].backward()
    return time.process_time() - began


if __name__ == "__main__":
    parts = {
        "tables": tables,
        "efficiency": efficiency,
    }  # the first as Markdown, for docs/planning.md
    if len(sys.argv) != 2 or sys.argv[1] not in parts:
        sys.exit(f"one of {', '.join(parts)} is needed")
    parts[sys.argv[1]]()
