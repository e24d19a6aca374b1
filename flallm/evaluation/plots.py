"""Pictures of `flallm ablate`, and of dev clips for TensorBoard."""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib
import torch
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary

matplotlib.use("agg")
from matplotlib import pyplot
from matplotlib.ticker import EngFormatter

from flallm.evaluation import metrics

MAX_LETTERS = 30  # of a word in a picture; an untrained model generates longer ones
PARTS = {"encoder": "last layer of the visual encoder", "llm": "last layer of the language model"}
NORMS = {"grad": "norm of the gradient", "param": "norm of the parameters"}


def table(result: dict, path: Path) -> None:
    """Draws the leading score of each row of an ablation, and how each seed reached it on dev.

    A row shows its mean with the interval, each seed, and the paper's score.
    """
    leading, dev_leading = result["leading"], result["dev_leading"]
    rows = result["rows"]
    size = (12, max(3, 0.9 + 0.6 * len(rows)))
    figure, (axes, curves) = pyplot.subplots(1, 2, figsize=size, layout="constrained")
    for y, row in enumerate(rows.values()):
        score, color = row[leading], f"C{y}"
        axes.barh(y, score["mean"], 0.6, color=color, alpha=0.4)
        axes.hlines(y, *score["ci95"], color=color)
        axes.plot(score["values"], [y] * len(score["values"]), "|", color="black", markersize=10)
        if leading in row["paper"]:
            axes.plot(row["paper"][leading], y, "o", color="black", fillstyle="none")
        for *earlier_stages, stage in row["dev"]:
            for points in earlier_stages:
                curves.plot(*zip(*points), ":", color=color, marker=".", linewidth=1)
            curves.plot(*zip(*stage), "-", color=color, marker=".", linewidth=1)
    label = metrics.LABELS[leading]
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()
    axes.set_xlabel(f"{label}: mean and 95 % interval, | a seed, ○ the paper on PHOENIX14T")
    axes.set_title(result["title"], loc="left", fontsize=10)
    curves.set_xlabel("clips seen; dotted: its stage 1")
    curves.set_ylabel(f"{metrics.LABELS[dev_leading]} on dev, greedy")
    curves.set_ylim(0, None)
    curves.xaxis.set_major_formatter(EngFormatter(sep=""))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def dominance(runs: dict[str, list[dict]], path: Path) -> None:
    """Draws the norms of the last layers' gradients and parameters, as Fig. 2 of the paper.

    runs: rows of metrics.jsonl by the run's name. A column shows a run.
    """
    size = (5 * len(runs), 6)
    figure, axes = pyplot.subplots(
        2, len(runs), figsize=size, layout="constrained", squeeze=False, sharey="row"
    )
    for column, (name, rows) in enumerate(runs.items()):
        steps = [row["step"] for row in rows]
        for row_axes, (kind, ylabel) in zip(axes[:, column], NORMS.items()):
            for part, label in PARTS.items():
                norms = [row[f"{kind}_norm/{part}"] for row in rows]
                row_axes.plot(steps, norms, label=label, linewidth=1)
            row_axes.set(yscale="log", xlabel="step", ylabel=ylabel)
        axes[0, column].set_title(name)
    axes[0, 0].legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def attention(words: list[tuple[str, torch.Tensor]]) -> pyplot.Figure:
    """Draws where in the clip the model looks for each word: (word, weight of each frame).

    A word is a row, whose largest weight is black.
    """
    rows = [weights / weights.max().clamp_min(1e-9) for _, weights in words]
    labels = [word[:MAX_LETTERS].replace("$", r"\$") for word, _ in words]
    figure, axes = pyplot.subplots(figsize=(6, 0.6 + 0.25 * len(words)), layout="constrained")
    axes.imshow(torch.stack(rows).numpy(), aspect="auto", cmap="gray_r")
    axes.set_yticks(range(len(words)), labels)
    axes.set_xticks([])
    axes.set_xlabel("time")
    return figure


def gif(name: str, frames: torch.Tensor, seconds: float = 0.16) -> Summary:
    """An animated image of a clip for TensorBoard.

    frames: (F, H, W, 3) uint8. seconds: duration of a frame; 0.16 is a stride of 4 at 25 fps.
    """
    first, *rest = (Image.fromarray(frame) for frame in frames.numpy())
    file = io.BytesIO()
    first.save(file, "GIF", save_all=True, append_images=rest, duration=int(seconds * 1000), loop=0)
    image = Summary.Image(
        height=first.height,
        width=first.width,
        colorspace=3,
        encoded_image_string=file.getvalue(),
    )
    return Summary(value=[Summary.Value(tag=name, image=image)])
