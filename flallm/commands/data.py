"""Commands on the data and the language model before training."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from flallm.commands.common import group_of_ranks, shards_option
from flallm.commands.parse import Count, PositiveInt
from flallm.utils import UserError


def shards() -> None:
    """Makes shards from PHOENIX14T, CSL-Daily, How2Sign, a table of videos, or synthetic clips."""
    raise UserError("shards: name a corpus (see flallm shards --help)")


def features(
    run: Path,
    *,
    out: Path,
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16",
    copies: Count = 0,
    shards: str = "",
) -> None:
    """Writes the sign-wise features of a run's encoder as shards.

    Stage 2 reads them by --data.shards in place of video, and so do the commands on its run.

    Args:
        run: the folder of a stage-1 run
        out: the folder to write into
        dtype: bf16, fp16 or fp32
        copies: augmented copies of each training clip; 0: training sees the clips as they are
        shards: where the run's shards lie now, if not where its config.yaml says
    """
    from flallm.inference.features import TIMEOUT, features

    with group_of_ranks(TIMEOUT) as ranks, shards_option(shards):
        features(run, out, ranks, dtype, copies, shards)


def pretrain(text: Path, *, out: Path, steps: PositiveInt = 800) -> None:
    """Pre-trains a small mBART on a text file, where no pre-trained model can be had.

    Args:
        text: a file with a sentence a line
        out: the folder to write, in Hugging Face layout
        steps: of 64 sentences
    """
    from flallm.data.tables import read_text
    from flallm.demo.pretrain import pretrain

    lines = read_text(text, "a sentence a line was expected there").splitlines()
    sentences = [line.strip() for line in lines if line.strip()]
    pretrain(sentences, out, steps=steps)


def trim(llm: str, *, shards: str, out: Path, text: Path | None = None, most: Count = 0) -> None:
    """Writes a pre-trained model without the tokens that the training text does not need.

    `--llm.path=OUT` then names it.

    Args:
        llm: a folder or hub name in Hugging Face layout
        shards: the data set
        out: the folder to write
        text: a file with other text of the language, a sentence a line
        most: this many of the most frequent tokens of `text` stay too, for words that training
            lacks
    """
    from flallm.model.trim import trim

    if bool(text) != bool(most):
        raise UserError(
            "--text and --most belong together: a file, and how many of its tokens to keep"
        )
    if text and not text.is_file():
        raise UserError(f"--text: {text} does not exist")
    print(trim(llm, shards, out, text, most))
