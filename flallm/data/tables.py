"""Text files and tables that data sets consist of."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePath

from flallm.data.clips import SkippedClip
from flallm.utils import UserError


def require_path(path: str | Path, what: str) -> Path:
    """The path. Raises UserError where it does not exist. what: what was expected there."""
    if not os.path.exists(path):
        raise UserError(f"{path} does not exist: {what}")
    return Path(path)


def safe_join(root: str | Path, name: str) -> Path | None:
    """`name` under `root`; None where it is empty or leads out of `root`."""
    path = PurePath(name)
    if not path.parts or path.is_absolute() or ".." in path.parts or "\0" in name:
        return None
    return Path(root, path)


def read_text(path: Path, what: str) -> str:
    """The text of a file. Raises UserError where it cannot be read."""
    try:
        return require_path(path, what).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise UserError(f"{path}, line {line}: not UTF-8") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def read_table(
    path: Path, what: str, separator: str, header: list[str], split: str = ""
) -> Iterator[dict[str, str] | SkippedClip]:
    """The rows of a table without quoting, where a `"` is a `"`.

    A row with fewer or more fields than the header is a SkippedClip.
    """
    lines = read_text(path, what).replace("\r\n", "\n").split("\n")
    if lines[0].split(separator) != header:
        raise UserError(f"{path}: the header is not {separator.join(header)!r}")
    for number, line in enumerate(lines[1:], 2):
        row = line.split(separator)
        if len(row) == len(header):
            yield dict(zip(header, row))
        elif line.strip():
            cause = f"has {len(row)} fields, not {len(header)}"
            yield SkippedClip(f"line {number}", split, f"{path}:{number}", cause)
