"""Clips that lie on disk as one image a frame."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av

from flallm.data.video import TimedFrames, open_video, upright, video_stream
from flallm.utils import is_hidden

IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}


@dataclass(frozen=True)
class ImageFiles:
    """A clip on disk as one image a frame.

    names: the images in `folder`; () for every image in it, in the order of their numbers. Hidden
    files and other files are ignored: some data sets leave profiles there.
    """

    folder: str
    names: tuple[str, ...] = ()
    fps: float = 25

    @property
    def source(self) -> str:
        return str(Path(self.folder, self.names[0]).parent) if self.names else self.folder

    def frames(self) -> tuple[Fraction, TimedFrames]:
        frames = enumerate(upright(self._decode()))
        return Fraction(self.fps), ((i / self.fps, frame) for i, frame in frames)

    def _decode(self) -> Iterator[av.VideoFrame]:
        for name in self.names or image_names(self.folder):
            try:
                with open_video(Path(self.folder, name).read_bytes()) as image:
                    frame = next(image.decode(video_stream(image)), None)
            except (ValueError, av.FFmpegError) as error:
                raise ValueError(f"{name} is no image: {error}") from None
            if frame is None:
                raise ValueError(f"{name} is no image: nothing decodes")
            yield frame


def is_image(name: str) -> bool:
    """Whether a file is an image by its name. A hidden file is none."""
    return Path(name).suffix.lower() in IMAGES and not is_hidden(Path(name).name)


def image_names(folder: str) -> list[str]:
    """The images in a folder, in the order of their numbers."""
    return sorted(filter(is_image, os.listdir(folder)), key=by_number)


def by_number(name: str) -> tuple[list, str]:
    """A sort key by the numbers in a name, then by the name: 01.png comes before 1.png."""
    parts = re.split(r"(\d+)", name)
    return [int(part) if part.isdecimal() else part for part in parts], name
