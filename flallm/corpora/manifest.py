"""Any data set as a table: CSV, TSV or JSON lines with a row a clip.

Columns: `video` (a file, or a folder with an image a frame), `text`, `split`; optional: `key`, `start` and `end` in seconds,
`gloss`, `signer`, `fps` (of a folder of images; 25).
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path

from flallm import UserError
from flallm.corpora import Clip, VideoFile, existing, image_folder

COLUMNS = {"video", "text", "split", "key", "start", "end", "gloss", "signer", "fps"}


def clips(table: Path, root: Path) -> Iterator[Clip]:
    """The rows of `table`; the paths in it are relative to `root`."""
    existing(table, "a table of clips was expected there")
    for number, row in enumerate(_rows(table)):
        where = f"{table}, row {number + 1}"
        if missing := [name for name in ("video", "text", "split") if not isinstance(row.get(name), str)]:
            raise UserError(f"{where}: no {missing[0]}; the columns are {', '.join(row)}")
        if unknown := set(row) - COLUMNS:
            raise UserError(f"{where}: unknown column {sorted(unknown, key=str)[0]!r}; known are {', '.join(sorted(COLUMNS))}")
        path = existing(root / row["video"], f"{where} names it as its video")
        start, end, fps = (_number(row.get(name), f"{where}: {name}") for name in ("start", "end", "fps"))
        media = image_folder(path, fps or 25) if path.is_dir() else VideoFile(str(path), start, end)
        key = str(row.get("key") or f"{row['split']}-{number:07d}").replace(".", "_").replace("/", "_")
        yield Clip(key, row["split"], row["text"].strip(), media, row.get("gloss") or None, row.get("signer") or None)


def _rows(table: Path) -> Iterator[dict]:
    try:
        with open(table, encoding="utf-8-sig", newline="") as file:
            if table.suffix == ".jsonl":
                for line in file:
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise ValueError("a line is no JSON object")
                    yield row
            elif table.suffix in (".csv", ".tsv"):
                yield from csv.DictReader(file, delimiter="\t" if table.suffix == ".tsv" else ",", strict=True)
            else:
                raise UserError(f"{table}: a table ends in .csv, .tsv or .jsonl")
    except (ValueError, csv.Error) as error:
        raise UserError(f"{table} cannot be read: {error}") from None


def _number(value, where: str) -> float | None:
    try:
        return None if value in (None, "") else float(value)
    except (TypeError, ValueError):
        raise UserError(f"{where}: {value!r} is not a number") from None
