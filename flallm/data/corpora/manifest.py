"""Any data set as a table: CSV, TSV or JSON lines with one clip in each row.

Columns: `video` (a file, or a folder with one image for each frame), `text`, `split` (train, dev,
test, or another usual name of these). Optional columns: `key`, `start` and `end` in seconds,
`gloss`, `signer`, `fps` (of a folder of images; 25). A fault of the table itself is an error,
because its owner can mend it.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path

from flallm.data.clips import MISSING, Clip, SkippedClip, clip, require_any
from flallm.data.images import ImageFiles
from flallm.data.rows import NAMES, split_name
from flallm.data.tables import read_text
from flallm.data.video import VideoFile
from flallm.utils import UserError

COLUMNS = {"video", "text", "split", "key", "start", "end", "gloss", "signer", "fps"}


def clips(table: Path, root: Path) -> Iterator[Clip | SkippedClip]:
    """The rows of `table`. Paths in it are absolute or relative to `root`."""
    rows = enumerate(_rows(table))
    clips = (_clip(row, number, f"{table}, row {number + 1}", root) for number, row in rows)
    return require_any(clips, f"paths in {table} are relative to {root}")


def _clip(row: dict, number: int, where: str, root: Path) -> Clip | SkippedClip:
    """The clip of a row. where: the place of the row, for errors."""
    _check_columns(row, where)
    split = split_name(row["split"])
    if split is None:
        raise UserError(f"{where}: unknown split {row['split']!r:.80}: use {NAMES}")
    start, end = _number(row, "start", where), _number(row, "end", where)
    fps = _number(row, "fps", where, 1, 240)
    key = _text(row, "key") or f"{split}-{number:07d}"
    path = os.path.join(root, row["video"])
    is_cut = start is not None or end is not None
    if not row["video"] or not os.path.exists(path):
        return SkippedClip(key, row["split"], path, MISSING)
    if os.path.isdir(path) and is_cut:
        raise UserError(f"{where}: start and end cut video files, and {path} is a folder of images")
    if end is not None and end <= (start or 0):
        return SkippedClip(key, row["split"], path, f"ends at {end} s, before it starts")
    if os.path.isdir(path):
        media = ImageFiles(path, fps=fps or 25)
    else:
        media = VideoFile(path, start, end)
    return clip(key, row["split"], row["text"], media, _text(row, "gloss"), _text(row, "signer"))


def _check_columns(row: dict, where: str) -> None:
    for name in ("video", "text", "split"):
        if not isinstance(row.get(name), str):
            names = ", ".join(map(repr, row))
            raise UserError(f"{where}: no {name}; the columns are {names:.200}")
    unknown = set(row) - COLUMNS
    if unknown:
        name = sorted(unknown, key=str)[0]
        known = ", ".join(sorted(COLUMNS))
        raise UserError(f"{where}: unknown column {name!r:.80}; known are {known}")
    for name in ("key", "gloss", "signer"):
        if not isinstance(row.get(name), str | int | None):
            raise UserError(f"{where}: its {name} is no text")


def _text(row: dict, name: str) -> str | None:
    return None if row.get(name) in (None, "") else str(row[name])


def _number(row: dict, name: str, where: str, low: float = 0, high: float = 1e9) -> float | None:
    value = row.get(name)
    if value is None or value == "":
        return None
    try:
        number = float(value)
        if low <= number <= high:
            return number
    except (TypeError, ValueError, OverflowError):
        pass
    raise UserError(f"{where}: {name}: {value!r:.80} is not a number from {low:g} to {high:g}")


class _Lines:
    """The lines of a text, with the number of the last one read."""

    def __init__(self, text: str):
        self.text, self.number = text, 0

    def __iter__(self) -> Iterator[str]:
        for line in io.StringIO(self.text, newline=""):
            self.number += 1
            yield line


def _rows(table: Path) -> Iterator[dict]:
    """The rows of a table. Raises UserError that names the line for one that cannot be read."""
    lines = _Lines(read_text(table, "a table of clips was expected there"))
    try:
        if table.suffix == ".jsonl":
            yield from _json_rows(lines)
        elif table.suffix == ".csv":
            yield from _csv_rows(lines, ",")
        elif table.suffix == ".tsv":
            yield from _csv_rows(lines, "\t")
        else:
            raise UserError(f"{table}: a table ends in .csv, .tsv or .jsonl")
    except (ValueError, csv.Error, RecursionError) as error:
        raise UserError(f"{table} cannot be read, line {lines.number}: {error}") from None


def _json_rows(lines: _Lines) -> Iterator[dict]:
    for line in lines:
        if not line.strip():
            continue
        row = json.loads(line)
        if not isinstance(row, dict):
            raise ValueError("it is no JSON object")
        yield row


def _csv_rows(lines: _Lines, delimiter: str) -> Iterator[dict]:
    for row in csv.DictReader(lines, delimiter=delimiter, strict=True):
        if None in row or None in row.values():
            raise ValueError("it has more or fewer fields than the first line")
        yield row
