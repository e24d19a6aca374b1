"""How2Sign: instruction videos in American Sign Language, 1280x720 pixels, 24 and 30 fps mixed.

`how2sign_realigned_{train,val,test}.csv` are TAB-separated without quotes. The re-aligned times are
cut out of the full `<VIDEO_NAME>.mp4`; each cut starts decoding at a keyframe before it. The
published clips `<SENTENCE_NAME>.mp4` were cut at the original times, which differ. They are for
those who do not have the full videos.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import av

from flallm.data.clips import MISSING, Clip, SkippedClip, clip, require_any
from flallm.data.tables import read_table, require_path
from flallm.data.video import DECODE_ERRORS, VideoFile, open_video, start_of, video_stream
from flallm.utils import UserError, visible_files

HEADER = [
    "VIDEO_ID",
    "VIDEO_NAME",
    "SENTENCE_ID",
    "SENTENCE_NAME",
    "START_REALIGNED",
    "END_REALIGNED",
    "SENTENCE",
]
SPLITS = {"train": "train", "val": "dev", "test": "test"}


def clips(tables: Path, videos: Path, precut: bool) -> Iterator[Clip | SkippedClip]:
    """The rows of the tables in the folder `tables`.

    The full videos, or with `precut` the published clips, lie anywhere under `videos`.
    """
    require_path(videos, "the folder of the videos was expected there")
    files: dict[str, list[str]] = {}
    for path in visible_files(videos, "**/*.mp4"):
        files.setdefault(path.stem, []).append(str(path))
    rows = []
    for name, split in SPLITS.items():
        table = tables / f"how2sign_realigned_{name}.csv"
        rows.append(_precut_rows(table, split, files) if precut else _rows(table, split, files))
    column = "SENTENCE_NAME" if precut else "VIDEO_NAME"
    hint = f"{videos} and what is below it holds no <{column}>.mp4 of the tables"
    return require_any(chain.from_iterable(rows), hint)


def _precut_rows(
    table: Path, split: str, files: dict[str, list[str]]
) -> Iterator[Clip | SkippedClip]:
    for row in _with_path(table, split, files, "SENTENCE_NAME"):
        if isinstance(row, SkippedClip):
            yield row
        else:
            yield clip(row["SENTENCE_NAME"], split, row["SENTENCE"], VideoFile(row["path"]))


def _rows(table: Path, split: str, files: dict[str, list[str]]) -> Iterator[Clip | SkippedClip]:
    lengths: dict[str, float] = {}  # seconds of each video
    num_over = 0
    for row in _with_path(table, split, files, "VIDEO_NAME"):
        if isinstance(row, SkippedClip):
            yield row
            continue
        key, path = row["SENTENCE_NAME"], row["path"]
        if path not in lengths:
            lengths[path] = _length(path)
        try:
            start, end = float(row["START_REALIGNED"]), float(row["END_REALIGNED"])
        except ValueError:
            start = end = math.nan
        if not 0 <= start < end < math.inf:
            times = f"{row['START_REALIGNED']!r} to {row['END_REALIGNED']!r}"
            yield SkippedClip(key, split, path, f"its times are none: {times}")
            continue
        if start >= lengths[path]:
            cause = f"begins at {start:.2f} s, and its video ends at {lengths[path]:.2f} s"
            yield SkippedClip(key, split, path, cause)
            continue
        if end > lengths[path]:
            num_over += 1
            end = None  # the clip ends with its video
        yield clip(key, split, row["SENTENCE"], VideoFile(path, start, end))
    if num_over:
        print(f"{split}: {num_over} sentences end after their video does; they are cut at its end")


def _with_path(
    table: Path, split: str, files: dict[str, list[str]], column: str
) -> Iterator[dict[str, str] | SkippedClip]:
    """The rows of a table with the `path` of the video that `column` names.

    files: {name of a video: its paths}. Raises UserError where there are several.
    """
    what = "the folder of the re-aligned tables was expected first"
    for row in read_table(table, what, "\t", HEADER, split):
        if isinstance(row, SkippedClip):
            yield row
            continue
        paths = files.get(row[column], [])
        if not paths:
            yield SkippedClip(row["SENTENCE_NAME"], split, f"{row[column]}.mp4", MISSING)
            continue
        if len(paths) > 1:
            names = " and ".join(paths)
            raise UserError(f"{names} have one name: keep the one that {table} is about")
        yield {**row, "path": paths[0]}


def _length(path: str) -> float:
    """Seconds from a container's start to the end of its video.

    Infinite where nothing tells; then the encoder raises the error with its cause.
    """
    try:
        with open_video(path) as container:
            stream = video_stream(container)
            if stream.duration:
                end = ((stream.start_time or 0) + stream.duration) * stream.time_base
                return float(end - start_of(container))
            return (container.duration or math.inf) / av.time_base
    except DECODE_ERRORS:
        return math.inf
