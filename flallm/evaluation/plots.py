"""Pictures: of `flallm ablate`, and of dev clips for TensorBoard."""

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

LONGEST = 30  # letters of a word beside a picture; a model that has not learnt to end words says longer ones


def table(result: dict, path: Path) -> None:
    """The leading score of each row with its interval, the seeds one by one, and the paper's; and beside it how each seed got there, on dev."""
    leading, dev_leading = result["leading"], result["dev_leading"]
    figure, (axes, curves) = pyplot.subplots(1, 2, figsize=(12, max(3, 0.9 + 0.6 * len(result["rows"]))), layout="constrained")
    for place, row in enumerate(result["rows"].values()):
        score, colour = row[leading], f"C{place}"
        axes.barh(place, score["mean"], 0.6, color=colour, alpha=0.4)
        axes.hlines(place, *score["ci95"], color=colour)
        axes.plot(score["values"], [place] * len(score["values"]), "|", color="black", markersize=10)
        if leading in row["paper"]:
            axes.plot(row["paper"][leading], place, "o", color="black", fillstyle="none")
        for *below, own in row["dev"]:
            for points, style in [(points, ":") for points in below] + [(own, "-")]:
                curves.plot(*zip(*points), style, color=colour, marker=".", linewidth=1)
    axes.set_yticks(range(len(result["rows"])), list(result["rows"]))
    axes.invert_yaxis()
    axes.set_xlabel(f"{metrics.LABELS[leading]}: mean and 95 % interval, | a seed, ○ the paper on PHOENIX14T")
    axes.set_title(result["title"], loc="left", fontsize=10)
    curves.set(xlabel="clips seen; dotted: its stage 1", ylabel=f"{metrics.LABELS[dev_leading]} on dev, greedy", ylim=(0, None))
    curves.xaxis.set_major_formatter(EngFormatter(sep=""))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def dominance(runs: dict[str, list[dict]], path: Path) -> None:
    """Norms of gradient and parameters of the last layers, a column a run, as in Fig. 2 of the paper."""
    figure, axes = pyplot.subplots(2, len(runs), figsize=(5 * len(runs), 6), layout="constrained", squeeze=False, sharey="row")
    for column, (name, rows) in enumerate(runs.items()):
        for row, kind in enumerate(("grad", "param")):
            for part, label in (("encoder", "last layer of the visual encoder"), ("llm", "last layer of the language model")):
                axes[row, column].plot([r["step"] for r in rows], [r[f"{kind}_norm/{part}"] for r in rows], label=label, linewidth=1)
            axes[row, column].set(yscale="log", xlabel="step", ylabel={"grad": "norm of the gradient", "param": "norm of the parameters"}[kind])
        axes[0, column].set_title(name)
    axes[0, 0].legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def attention(words: list[tuple[str, torch.Tensor]]) -> pyplot.Estimate:
    """Where the model looks (time) while it says each word (a row, whose largest weight is black)."""
    rows = torch.stack([weights / weights.max().clamp_min(1e-9) for _, weights in words])
    figure, axes = pyplot.subplots(figsize=(6, 0.6 + 0.25 * len(words)), layout="constrained")
    axes.imshow(rows.numpy(), aspect="auto", cmap="gray_r")
    axes.set_yticks(range(len(words)), [word[:LONGEST].replace("$", r"\$") for word, _ in words])
    axes.set_xticks([])
    axes.set_xlabel("time")
    return figure


def gif(name: str, frames: torch.Tensor, seconds: float = 0.16) -> Summary:
    """A clip (F, H, W, 3), uint8, that moves in TensorBoard's images; seconds: of a frame, T/4 of 25 fps."""
    first, *rest = (Image.fromarray(frame) for frame in frames.numpy())
    file = io.BytesIO()
    first.save(file, "GIF", save_all=True, append_images=rest, duration=int(seconds * 1000), loop=0)
    image = Summary.Image(height=first.height, width=first.width, colorspace=3, encoded_image_string=file.getvalue())
    return Summary(value=[Summary.Value(tag=name, image=image)])
