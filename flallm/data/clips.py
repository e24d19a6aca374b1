"""What a data set consists of: clips, and rows that give none."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from fractions import Fraction
from typing import Protocol

import av

from flallm.utils import UserError

MISSING = "its video or folder of images does not exist"


class Media(Protocol):
    """The source of a clip's pixels. The process that encodes opens it."""

    source: str  # its name for people

    def frames(self) -> tuple[Fraction, Iterator[tuple[float, av.VideoFrame]]]:
        """(frames per second, (seconds, frame) in display order, upright).

        Seconds never decrease.
        """
        ...


@dataclass(frozen=True)
class Clip:
    """A signed sentence.

    key: unique in its data set and without a dot, because WebDataset cuts keys at the first one.
    """

    key: str
    split: str
    text: str
    media: Media
    gloss: str | None = None
    signer: str | None = None


@dataclass(frozen=True)
class SkippedClip:
    """A row that gives no clip, and why. All of its fields can be printed.

    source: the video, or the place in a table.
    """

    key: str
    split: str
    source: str
    cause: str

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name).encode("utf-8", "backslashreplace").decode()
            object.__setattr__(self, field.name, value)


def clip(
    key: str,
    split: str,
    text: str,
    media: Media,
    gloss: str | None = None,
    signer: str | None = None,
) -> Clip | SkippedClip:
    """The clip of a row, or why it gives none."""
    key, text = re.sub(r"[./\\]", "_", key), text.strip()
    if not key:
        return SkippedClip(key, split, media.source, "has no name")
    if not text:
        return SkippedClip(key, split, media.source, "has no text")
    texts = {"key": key, "text": text, "gloss": gloss or "", "signer": signer or ""}
    for name, value in texts.items():
        if "\0" in value or value.encode("utf-8", "ignore").decode() != value:
            cause = f"its {name} holds a NUL or half a character"
            return SkippedClip(key, split, media.source, cause)
    return Clip(key, split, text, media, gloss or None, signer or None)


def require_any(rows: Iterator[Clip | SkippedClip], hint: str) -> Iterator[Clip | SkippedClip]:
    """Passes rows on. Raises UserError at the end where there is no clip for lack of its video.

    Then the path is wrong, not the data set. hint: what the user can do.
    """
    any_clip, first_missing = False, None
    for row in rows:
        if isinstance(row, Clip):
            any_clip = True
        elif first_missing is None and row.cause == MISSING:
            first_missing = row
        yield row
    if first_missing and not any_clip:
        raise UserError(
            f"{first_missing.source} does not exist, and no other clip has a video either: {hint}"
        )
