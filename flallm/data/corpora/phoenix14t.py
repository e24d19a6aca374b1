"""PHOENIX-2014-T from its official tree (release v3): German weather forecasts, 210x260, 25 fps.

The annotations are `|`-separated without quotes. A row's `video` reads `<name>/1/*.png`, but the
frames lie in `<name>/`; trees that still have the `1/` are read, too. The text is lower-case German
without a final full stop, and stays so.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from flallm.data.clips import MISSING, Clip, SkippedClip, clip, require_any
from flallm.data.images import ImageFiles
from flallm.data.tables import read_table, require_path, safe_join

HEADER = ["name", "video", "start", "end", "speaker", "orth", "translation"]
RELEASE = "is this the folder PHOENIX-2014-T-release-v3?"


def clips(release: Path) -> Iterator[Clip | SkippedClip]:
    root = release / "PHOENIX-2014-T"
    if not root.is_dir():
        root = release
    hint = f"the frames belong into {root}/features/fullFrame-210x260px/<split>"
    return require_any(_rows(root), hint)


def _rows(root: Path) -> Iterator[Clip | SkippedClip]:
    for split in ("train", "dev", "test"):
        frames = require_path(root / "features/fullFrame-210x260px" / split, RELEASE)
        table = root / f"annotations/manual/PHOENIX-2014-T.{split}.corpus.csv"
        for row in read_table(table, RELEASE, "|", HEADER, split):
            if isinstance(row, SkippedClip):
                yield row
                continue
            folder = safe_join(frames, row["name"])
            if folder is None or not os.path.isdir(folder):
                yield SkippedClip(row["name"], split, str(folder or frames), MISSING)
                continue
            if os.path.isdir(folder / "1"):
                folder = folder / "1"
            media = ImageFiles(str(folder))
            yield clip(row["name"], split, row["translation"], media, row["orth"], row["speaker"])
