"""Text files and tables that data sets consist of."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePath

from flallm.data.clips import SkippedClip
from flallm.utils import UserError


def require_path(path: str | Path, what: str) -> Path:
    """The path, or a `UserError` that says what was looked for."""
    if not os.path.exists(path):
        raise UserError(f"{path} does not exist: {what}")
    return Path(path)


def safe_join(root: str | Path, name: str) -> Path | None:
    """`name` under `root`; None where it is empty or would lead out of there."""
    path = PurePath(name)
    return None if not path.parts or path.is_absolute() or ".." in path.parts or "\0" in name else Path(root, path)


def read_text(path: Path, what: str) -> str:
    """The text of a table. Raises UserError where there is none."""
    try:
        return require_path(path, what).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise UserError(f"{path}, line {line}: not UTF-8") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def read_table(path: Path, what: str, separator: str, header: list[str], split: str = "") -> Iterator[dict[str, str] | SkippedClip]:
    """The rows of a table without quoting, where a `"` is a `"`; a row with fewer or more fields is left out."""
    lines = read_text(path, what).replace("\r\n", "\n").split("\n")
    if lines[0].split(separator) != header:
        raise UserError(f"{path}: the header is not {separator.join(header)!r}")
    for number, line in enumerate(lines[1:], 2):
        row = line.split(separator)
        if len(row) == len(header):
            yield dict(zip(header, row))
        elif line.strip():
            yield SkippedClip(f"line {number}", split, f"{path}:{number}", f"has {len(row)} fields, not {len(header)}")
