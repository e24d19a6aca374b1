"""The rows of any corpus, checked before a clip is encoded.

The checks are about names of splits, repeated rows, keys, and splits without a clip.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace

from flallm.data.clips import Clip, SkippedClip
from flallm.utils import UserError

# The usual names of splits, in lower case. Without eval: some mean dev, some test.
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
NAMES = (
    "train (or training), dev (or development, val, valid, validation), test (or testing), in "
    "small or capital letters"
)


def split_name(name: str) -> str | None:
    """train, dev or test; None for a name that is none of the usual ones."""
    return SPLITS.get(name.strip().lower())


@dataclass
class UniqueClips:
    """The clips of a split without repeated rows."""

    clips: list[Clip] = field(default_factory=list)
    repeated: list[Clip] = field(default_factory=list)  # equal to one of `clips`
    # {key: the sources of the different clips that have it}
    clashing: dict[str, list[str]] = field(default_factory=dict)


def checked(rows: Iterable[Clip | SkippedClip]) -> tuple[dict[str, list[Clip]], list[dict]]:
    """({train, dev or test: its clips}, the rows that are left out, as `dataset.json` lists them).

    Rows that are equal are kept once. Raises UserError for an unknown split, for different rows
    with one key, and for a split without a clip.
    """
    splits, left_out = _by_split(rows)
    clashes = []
    for split, clips in splits.items():
        unique = _unique(clips)
        splits[split] = unique.clips
        for clip in unique.repeated:
            cause = "is there twice: a row before it is equal"
            left_out.append(SkippedClip(clip.key, split, clip.media.source, cause))
        for key, sources in unique.clashing.items():
            clashes.append(f"{split} {key!r} ({', '.join(sources)})")
    if clashes:
        raise UserError(f"different rows have one key, give each its own: {'; '.join(clashes)}")
    listed = [asdict(row) for row in left_out]
    empty = []
    for split in dict.fromkeys(row.split for row in left_out):
        if split in SPLITS.values() and split not in splits:
            empty.append(split)
    if empty:
        raise UserError("; ".join(no_clip_left(split, listed) for split in empty))
    if not splits:
        raise UserError("the corpus holds no clip: nothing to make shards of")
    return splits, listed


def _by_split(
    rows: Iterable[Clip | SkippedClip],
) -> tuple[dict[str, list[Clip]], list[SkippedClip]]:
    """({train, dev or test: its clips}, rows that are left out), with usual names of splits."""
    clips: dict[str, list[Clip]] = {}
    left_out: list[SkippedClip] = []
    # Dicts for sets that keep the order of the rows.
    unknown: dict[str, None] = {}
    spellings: dict[str, dict[str, None]] = {}  # {train, dev or test: its names in the corpus}
    for row in rows:
        split = split_name(row.split)
        if split is None:
            if isinstance(row, Clip):
                unknown[row.split] = None
            else:
                left_out.append(row)  # a row of no split may be left out
            continue
        spellings.setdefault(split, {})[row.split.strip().lower()] = None
        if row.split != split:
            row = replace(row, split=split)
        if isinstance(row, Clip):
            clips.setdefault(split, []).append(row)
        else:
            left_out.append(row)
    if unknown:
        raise UserError(f"unknown split {', '.join(map(repr, unknown))}: use {NAMES}")
    for split, names in spellings.items():
        if len(names) > 1:
            raise UserError(
                f"the splits {' and '.join(names)} would both be {split}: give them one name, or "
                "take one out"
            )
    return clips, left_out


def _unique(clips: list[Clip]) -> UniqueClips:
    unique = UniqueClips()
    first: dict[str, Clip] = {}  # of each key
    for clip in clips:
        if clip.key not in first:
            first[clip.key] = clip
            unique.clips.append(clip)
        elif clip == first[clip.key]:
            unique.repeated.append(clip)
        else:
            sources = unique.clashing.setdefault(clip.key, [first[clip.key].media.source])
            if clip.media.source not in sources:
                sources.append(clip.media.source)
    return unique


def no_clip_left(split: str, left_out: list[dict]) -> str:
    """The error of a split without a clip. left_out: the rows of `dataset.json`, of all splits."""
    causes = Counter(row["cause"] for row in left_out if row["split"] == split)
    if not causes:
        return f"split {split} has no clip"
    cause, count = causes.most_common(1)[0]
    return (
        f"split {split} has no clip: its {causes.total()} rows are left out, {count} of them for "
        f"this cause: {' '.join(cause.split())}"
    )
