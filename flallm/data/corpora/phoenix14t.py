"""PHOENIX-2014-T from its official tree (release v3): weather forecasts in German Sign Language, 210x260 pixels, 25 fps.

The annotations are `|`-separated without quotes. A row's `video` reads `<name>/1/*.png`, but the frames lie in `<name>/`;
trees that still have the `1/` are read too. Text is lower-case German without a final full stop, and stays so.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from flallm.data.clips import MISSING, Clip, SkippedClip, clip, require_any
from flallm.data.tables import read_table, require_path, safe_join
from flallm.data.video import ImageFiles

HEADER = ["name", "video", "start", "end", "speaker", "orth", "translation"]
RELEASE = "is this the folder PHOENIX-2014-T-release-v3?"


def clips(release: Path) -> Iterator[Clip | SkippedClip]:
    root = release / "PHOENIX-2014-T" if (release / "PHOENIX-2014-T").is_dir() else release
    return require_any(_rows(root), f"the frames belong into {root}/features/fullFrame-210x260px/<split>")


def _rows(root: Path) -> Iterator[Clip | SkippedClip]:
    for split in ("train", "dev", "test"):
        frames = require_path(root / "features/fullFrame-210x260px" / split, RELEASE)
        for row in read_table(root / f"annotations/manual/PHOENIX-2014-T.{split}.corpus.csv", RELEASE, "|", HEADER, split):
            if isinstance(row, SkippedClip):
                yield row
                continue
            folder = safe_join(frames, row["name"])
            if folder is None or not os.path.isdir(folder):
                yield SkippedClip(row["name"], split, str(folder or frames), MISSING)
                continue
            folder = folder / "1" if os.path.isdir(folder / "1") else folder
            yield clip(row["name"], split, row["translation"], ImageFiles(str(folder)), row["orth"], row["speaker"])
