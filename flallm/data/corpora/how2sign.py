"""How2Sign: instruction videos in American Sign Language, 1280x720 pixels, 24 and 30 fps mixed.

`how2sign_realigned_{train,val,test}.csv` are TAB-separated without quotes. The re-aligned times are cut out of the full
`<VIDEO_NAME>.mp4`; each cut starts decoding at a keyframe before it. The published clips `<SENTENCE_NAME>.mp4` were
cut at the original times, which differ: they are taken where no full videos are given.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import av

from flallm.data.clips import MISSING, Clip, SkippedClip, clip, require_any
from flallm.data.tables import read_table, require_path
from flallm.data.video import DECODE_ERRORS, VideoFile, open_video, start_of, video_stream
from flallm.utils import UserError, visible_files

HEADER = ["VIDEO_ID", "VIDEO_NAME", "SENTENCE_ID", "SENTENCE_NAME", "START_REALIGNED", "END_REALIGNED", "SENTENCE"]
SPLITS = {"train": "train", "val": "dev", "test": "test"}


def clips(tables: Path, videos: Path, precut: bool) -> Iterator[Clip | SkippedClip]:
    """The rows of the tables in the folder `tables`; the full videos, or the clips of `precut`, lie anywhere under `videos`."""
    require_path(videos, "the folder of the videos was expected there")
    files: dict[str, list[str]] = {}
    for path in visible_files(videos, "**/*.mp4"):
        files.setdefault(path.stem, []).append(str(path))
    what = "SENTENCE_NAME" if precut else "VIDEO_NAME"
    rows = (one for name, split in SPLITS.items() for one in _rows(tables / f"how2sign_realigned_{name}.csv", split, files, precut))
    return require_any(rows, f"{videos} and what is below it holds no <{what}>.mp4 of the tables")


def _rows(table: Path, split: str, files: dict[str, list[str]], precut: bool) -> Iterator[Clip | SkippedClip]:
    lengths, over = {}, 0
    for row in read_table(table, "the folder of the re-aligned tables was expected first", "\t", HEADER, split):
        if isinstance(row, SkippedClip):
            yield row
            continue
        key, name = row["SENTENCE_NAME"], row["SENTENCE_NAME" if precut else "VIDEO_NAME"]
        if name not in files:
            yield SkippedClip(key, split, f"{name}.mp4", MISSING)
            continue
        if len(files[name]) > 1:
            raise UserError(f"{' and '.join(files[name])} have one name: keep the one that {table} is about")
        media = VideoFile(files[name][0])
        if not precut:
            try:
                start, end = float(row["START_REALIGNED"]), float(row["END_REALIGNED"])
            except ValueError:
                start = end = math.nan
            if name not in lengths:
                lengths[name] = _length(media.path)
            if not 0 <= start < end < math.inf:
                yield SkippedClip(key, split, media.path, f"its times are none: {row['START_REALIGNED']!r} to {row['END_REALIGNED']!r}")
                continue
            if start >= lengths[name]:
                yield SkippedClip(key, split, media.path, f"begins at {start:.2f} s, and its video ends at {lengths[name]:.2f} s")
                continue
            over += end > lengths[name]
            media = VideoFile(media.path, start, end if end <= lengths[name] else None)  # without an end: cut at the video's
        yield clip(key, split, row["SENTENCE"], media)
    if over:
        print(f"{split}: {over} sentences end after their video does; they are cut at its end")


def _length(path: str) -> float:
    """Seconds from a container's start to the end of its video; infinite where nothing tells, for then the encoder will
    say what is wrong with it."""
    try:
        with open_video(path) as container:
            stream = video_stream(container)
            if stream.duration:
                return float(((stream.start_time or 0) + stream.duration) * stream.time_base - start_of(container))
            return (container.duration or math.inf) / av.time_base
    except DECODE_ERRORS:
        return math.inf
