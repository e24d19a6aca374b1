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
    """Where the pixels of a clip come from; opened in the process that encodes."""

    source: str  # what to tell a person

    def frames(self) -> tuple[Fraction, Iterator[tuple[float, av.VideoFrame]]]:
        """(frames per second, (seconds, frame) in display order, upright). Seconds never go back."""
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
class SkippedClip:
    """A row that gives no clip, and why; `source` is the video or the place in a table. All of it can be printed."""

    key: str
    split: str
    source: str
    cause: str

    def __post_init__(self):
        for field in fields(self):
            object.__setattr__(self, field.name, getattr(self, field.name).encode("utf-8", "backslashreplace").decode())


def clip(key: str, split: str, text: str, media: Media, gloss: str | None = None, signer: str | None = None) -> Clip | SkippedClip:
    """The clip of a row, or why it is none."""
    key, text = re.sub(r"[./\\]", "_", key), text.strip()
    if not key or not text:
        return SkippedClip(key, split, media.source, "has no text" if key else "has no name")
    for what, value in (("key", key), ("text", text), ("gloss", gloss or ""), ("signer", signer or "")):
        if "\0" in value or value.encode("utf-8", "ignore").decode() != value:
            return SkippedClip(key, split, media.source, f"its {what} holds a NUL or half a character")
    return Clip(key, split, text, media, gloss or None, signer or None)


def require_any(clips: Iterator[Clip | SkippedClip], hint: str) -> Iterator[Clip | SkippedClip]:
    """The same; but where no clip's video exists it is not the data set that is at fault, and that is a UserError."""
    any_clip, first = False, None
    for one in clips:
        any_clip |= isinstance(one, Clip)
        if first is None and isinstance(one, SkippedClip) and one.cause == MISSING:
            first = one
        yield one
    if first and not any_clip:
        raise UserError(f"{first.source} does not exist, and no other clip has a video either: {hint}")
