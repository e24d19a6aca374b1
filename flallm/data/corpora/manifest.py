"""Any data set as a table: CSV, TSV or JSON lines with a row a clip.

Columns: `video` (a file, or a folder with an image a frame), `text`, `split` (train, dev, test, or another usual name of these); optional: `key`, `start` and `end` in seconds,
`gloss`, `signer`, `fps` (of a folder of images; 25). What is wrong with the table itself is an error, for its owner can mend it.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path

from flallm.data.clips import MISSING, Clip, SkippedClip, clip, require_any
from flallm.data.rows import NAMES, split_name
from flallm.data.tables import read_text
from flallm.data.video import ImageFiles, VideoFile
from flallm.utils import UserError

COLUMNS = {"video", "text", "split", "key", "start", "end", "gloss", "signer", "fps"}


def clips(table: Path, root: Path) -> Iterator[Clip | SkippedClip]:
    """The rows of `table`; the paths in it are absolute or relative to `root`."""
    return require_any(
        (_clip(row, number, f"{table}, row {number + 1}", root) for number, row in enumerate(_rows(table))), f"paths in {table} are relative to {root}"
    )


def _clip(row: dict, number: int, where: str, root: Path) -> Clip | SkippedClip:
    if missing := [name for name in ("video", "text", "split") if not isinstance(row.get(name), str)]:
        raise UserError(f"{where}: no {missing[0]}; the columns are {', '.join(map(repr, row)):.200}")
    if unknown := set(row) - COLUMNS:
        raise UserError(f"{where}: unknown column {sorted(unknown, key=str)[0]!r:.80}; known are {', '.join(sorted(COLUMNS))}")
    split = split_name(row["split"])
    if split is None:
        raise UserError(f"{where}: unknown split {row['split']!r:.80}: use {NAMES}")
    if bad := [name for name in ("key", "gloss", "signer") if not isinstance(row.get(name), str | int | None)]:
        raise UserError(f"{where}: its {bad[0]} is no text")
    key, gloss, signer = (str(row[name]) if row.get(name) not in (None, "") else None for name in ("key", "gloss", "signer"))
    start, end, fps = _number(row, "start", where), _number(row, "end", where), _number(row, "fps", where, 1, 240)
    path = os.path.join(root, row["video"])
    key = key or f"{split}-{number:07d}"
    if not row["video"] or not os.path.exists(path):
        return SkippedClip(key, row["split"], path, MISSING)
    if os.path.isdir(path) and (start, end) != (None, None):
        raise UserError(f"{where}: start and end cut video files, and {path} is a folder of images")
    if end is not None and end <= (start or 0):
        return SkippedClip(key, row["split"], path, f"ends at {end} s, before it starts")
    media = ImageFiles(path, fps=fps or 25) if os.path.isdir(path) else VideoFile(path, start, end)
    return clip(key, row["split"], row["text"], media, gloss, signer)


def _rows(table: Path) -> Iterator[dict]:
    number = 0

    def lines() -> Iterator[str]:
        nonlocal number
        for line in io.StringIO(text, newline=""):
            number += 1
            yield line

    text = read_text(table, "a table of clips was expected there")
    try:
        if table.suffix == ".jsonl":
            for line in filter(str.strip, lines()):
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError("it is no JSON object")
                yield row
        elif table.suffix in (".csv", ".tsv"):
            for row in csv.DictReader(lines(), delimiter="\t" if table.suffix == ".tsv" else ",", strict=True):
                if None in row or None in row.values():
                    raise ValueError("it has more or fewer fields than the first line")
                yield row
        else:
            raise UserError(f"{table}: a table ends in .csv, .tsv or .jsonl")
    except (ValueError, csv.Error, RecursionError) as error:
        raise UserError(f"{table} cannot be read, line {number}: {error}") from None


def _number(row: dict, name: str, where: str, low: float = 0, high: float = 1e9) -> float | None:
    value = row.get(name)
    if value is None or value == "":
        return None
    try:
        if low <= (number := float(value)) <= high:
            return number
    except (TypeError, ValueError, OverflowError):
        pass
    raise UserError(f"{where}: {name}: {value!r:.80} is not a number from {low:g} to {high:g}")
