"""Lengths of the training clips that a plan is made for: of shards, or as published."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flallm.config import Config
from flallm.data.dataset import ClipDataset
from flallm.data.reader import NoShards
from flallm.data.transforms import used_frames
from flallm.utils import UserError

PERCENTILES = (0, 5, 25, 50, 75, 95, 99, 100)
# Bytes of a source frame of 256 pixels as make_shards encodes rendered signers by default. Noise of
# a camera takes more.
FRAME_BYTES = 700.0


@dataclass(frozen=True)
class Corpus:
    """What is published of a training split.

    frames: of a clip at `PERCENTILES`. characters: of its text, a frame.
    """

    clips: int
    frames: tuple[int, ...]
    characters: float

    def lengths(self) -> tuple[np.ndarray, np.ndarray]:
        """(frames, characters) of as many clips, drawn from a fixed seed."""
        rng = np.random.default_rng(0)
        frames = np.interp(rng.random(self.clips) * 100, PERCENTILES, self.frames)
        frames = frames.round().astype(np.int32)
        characters = frames * self.characters * rng.lognormal(0, 0.25, self.clips)
        return frames, np.maximum(5, characters).astype(np.int32)


CORPORA = {
    # as its annotations have them
    "phoenix14t": Corpus(7096, (16, 43, 83, 112, 144, 208, 259, 475), 0.65),
    # [assumed] around 4 s at 30 fps, 16 characters: 20.6 hours of 18,401 clips
    "csl-daily": Corpus(18401, (30, 60, 90, 115, 150, 220, 290, 500), 0.12),
    # [assumed] 5.8 s a clip
    "web": Corpus(10**7, (10, 35, 70, 115, 185, 340, 550, 1500), 0.5),
    # [assumed] around 8 s at 24 and 30 fps
    "how2sign": Corpus(31165, (15, 40, 95, 160, 260, 500, 760, 2500), 0.5),
}


@dataclass(frozen=True)
class Lengths:
    """The training clips of a recipe.

    Attributes:
        frames: used frames of each clip, (clips,)
        characters: of each text, (clips,)
        source: where they are from, in words
        clip_bytes: mean bytes that are read for a clip
        features: whether the shards hold features in place of video
    """

    frames: np.ndarray
    characters: np.ndarray
    source: str
    clip_bytes: float
    features: bool


def training_lengths(config: Config) -> Lengths:
    """From the recipe's shards, or without shards from the corpus that the recipe is named after.

    Raises UserError where there are neither.
    """
    try:
        clips = ClipDataset("train", config.data, config.seed)
    except NoShards as error:
        if config.name not in CORPORA:
            raise UserError(
                f"{error}. Lengths without shards are known of {', '.join(CORPORA)}"
            ) from None
        return _published_lengths(config)
    return Lengths(
        clips.used,
        clips.shards.index["text_length"],
        f"as in {config.data.shards}",
        sum(clips.shards.shard_bytes) / len(clips.used),
        bool(clips.features),
    )


def _published_lengths(config: Config) -> Lengths:
    frames, characters = CORPORA[config.name].lengths()
    return Lengths(
        used_frames(frames, config.data.stride, config.data.max_frames),
        characters,
        f"lengths of {config.name} as published: there are no shards at {config.data.shards}",
        FRAME_BYTES * frames.mean(),
        features=False,
    )
