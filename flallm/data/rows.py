"""The rows of any corpus, checked before a clip is encoded: names of splits, repeated rows, keys, splits that no clip is left of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, replace

from flallm.data.clips import Clip, SkippedClip
from flallm.utils import UserError

# The usual names of splits, in small letters. Not eval: some mean dev by it and some test.
SPLITS = {
    "train": "train",
    "training": "train",
    "dev": "dev",
    "development": "dev",
    "val": "dev",
    "valid": "dev",
    "validation": "dev",
    "test": "test",
    "testing": "test",
}
NAMES = "train (or training), dev (or development, val, valid, validation), test (or testing), in small or capital letters"


def split_name(name: str) -> str | None:
    """train, dev or test; None for a name that is none of the usual ones."""
    return SPLITS.get(name.strip().lower())


def checked(rows: Iterable[Clip | SkippedClip]) -> tuple[dict[str, list[Clip]], list[dict]]:
    """({train, dev or test: its clips}, the rows that are left out, as `dataset.json` lists them).

    Rows that are equal are kept once. Raises UserError for an unknown split, for different rows with one key, and for a
    split of which no clip is left.
    """
    clips, left_out = _by_split(rows)
    clashes = []
    for split, members in clips.items():
        clips[split], repeated, clashing = _without_repeated(members)
        left_out += [SkippedClip(clip.key, split, clip.media.source, "is there twice: a row before it is equal") for clip in repeated]
        clashes += [f"{split} {key!r} ({', '.join(sources)})" for key, sources in clashing.items()]
    if clashes:
        raise UserError(f"different rows have one key, give each its own: {'; '.join(clashes)}")
    listed = [asdict(row) for row in left_out]
    lost = [split for split in dict.fromkeys(row.split for row in left_out) if split in SPLITS.values() and split not in clips]
    if lost:
        raise UserError("; ".join(no_clip_left(split, listed) for split in lost))
    if not clips:
        raise UserError("the corpus holds no clip: nothing to make shards of")
    return clips, listed


def _by_split(rows: Iterable[Clip | SkippedClip]) -> tuple[dict[str, list[Clip]], list[SkippedClip]]:
    """Clips and rows that are left out, each with the name of its split that is ours."""
    clips: dict[str, list[Clip]] = {}
    left_out, unknown, names = [], {}, {}  # unknown: in the order of the rows; names: {ours: {theirs}}
    for row in rows:
        split = split_name(row.split)
        if split is None:
            if isinstance(row, Clip):
                unknown[row.split] = None
            else:
                left_out.append(row)  # it may have none
            continue
        names.setdefault(split, {})[row.split.strip().lower()] = None
        row = row if row.split == split else replace(row, split=split)
        if isinstance(row, Clip):
            clips.setdefault(split, []).append(row)
        else:
            left_out.append(row)
    if unknown:
        raise UserError(f"unknown split {', '.join(map(repr, unknown))}: use {NAMES}")
    for split, theirs in names.items():
        if len(theirs) > 1:
            raise UserError(f"the splits {' and '.join(theirs)} would both be {split}: give them one name, or take one out")
    return clips, left_out


def _without_repeated(clips: list[Clip]) -> tuple[list[Clip], list[Clip], dict[str, list[str]]]:
    """(the clips, each once, those that are equal to one before, {key: the sources of different clips that have it})."""
    first: dict[str, Clip] = {}
    repeated, clashing = [], {}
    for clip in clips:
        if clip.key not in first:
            first[clip.key] = clip
        elif clip == first[clip.key]:
            repeated.append(clip)
        else:
            sources = clashing.setdefault(clip.key, [first[clip.key].media.source])
            if clip.media.source not in sources:
                sources.append(clip.media.source)
    return list(first.values()), repeated, clashing


def no_clip_left(split: str, left_out: list[dict]) -> str:
    """What an error says of a split without a clip. left_out: the rows that `dataset.json` lists, those of other splits too."""
    causes = Counter(row["cause"] for row in left_out if row["split"] == split)
    if not causes:
        return f"split {split} has no clip"
    cause, count = causes.most_common(1)[0]
    return f"split {split} has no clip: its {causes.total()} rows are left out, {count} of them for this cause: {' '.join(cause.split())}"
