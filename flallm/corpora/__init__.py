"""One module a data set: what lies on disk -> `Clip`s. Pixels are only touched when a clip is encoded (`shards.py`)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Protocol

import av

from flallm import UserError


class Media(Protocol):
    """Where the pixels of a clip come from; opened in the process that encodes."""

    source: str  # what to tell a person

    def frames(self) -> tuple[Fraction, Iterator[av.VideoFrame]]:
        """(frames per second, the frames in display order)."""
        ...


@dataclass(frozen=True)
class Clip:
    """A signed sentence: `key` is unique in its data set and has no dot (WebDataset cuts keys at the first one)."""

    key: str
    split: str
    text: str
    media: Media
    gloss: str | None = None
    signer: str | None = None


@dataclass(frozen=True)
class VideoFile:
    """A video file, or the part of it from `start` to `end` seconds (a frame belongs to it when it begins in there)."""

    path: str
    start: float | None = None
    end: float | None = None

    @property
    def source(self) -> str:
        return self.path if self.start is None and self.end is None else f"{self.path}#t={self.start or 0:g},{self.end or ''}"

    def frames(self) -> tuple[Fraction, Iterator[av.VideoFrame]]:
        container = av.open(self.path)
        if not container.streams.video:
            raise ValueError("holds no video stream")
        stream = container.streams.video[0]
        stream.thread_count = 1
        rate = stream.average_rate or stream.guessed_rate
        return Fraction(rate or 25), self._decode(container, stream)

    def _decode(self, container, stream) -> Iterator[av.VideoFrame]:
        first = (stream.start_time or 0) * stream.time_base
        if self.start:
            container.seek(int((first + Fraction(self.start)) / stream.time_base), stream=stream)  # the keyframe before it
        with container:
            for frame in container.decode(stream):
                # Half a millisecond of slack: times in tables are rounded, and a cut at 2.000 means the frame at 1.9999.
                time = float(frame.pts * frame.time_base - first) + 5e-4 if frame.pts is not None else math.inf
                if self.end is not None and time >= self.end:
                    return
                if self.start is None or time >= self.start:
                    yield frame


@dataclass(frozen=True)
class ImageFiles:
    """A clip that lies on disk as one image a frame, all in `folder`."""

    folder: str
    names: tuple[str, ...]
    fps: float = 25

    @property
    def source(self) -> str:
        return self.folder

    def frames(self) -> tuple[Fraction, Iterator[av.VideoFrame]]:
        return Fraction(self.fps), self._decode()

    def _decode(self) -> Iterator[av.VideoFrame]:
        for name in self.names:
            with av.open(str(Path(self.folder, name))) as image:
                yield next(image.decode(video=0))


IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}


def image_folder(folder: str | Path, fps: float = 25) -> ImageFiles:
    """Every image of a folder in the order of names; other files (some data sets leave profiles there) are passed over."""
    names = sorted(p.name for p in Path(folder).iterdir() if p.suffix.lower() in IMAGES)
    return ImageFiles(str(folder), tuple(names), fps)


def existing(path: str | Path, what: str) -> Path:
    """The path, or a `UserError` that says what was looked for."""
    if not Path(path).exists():
        raise UserError(f"{path} does not exist: {what}")
    return Path(path)
