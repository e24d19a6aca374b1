"""PHOENIX-2014-T from its official tree (release v3): weather forecasts in German Sign Language, 210x260 pixels, 25 fps.

The annotations are `|`-separated without quotes. A row's `video` reads `<name>/1/*.png`, but the frames lie in `<name>/`;
trees that still have the `1/` are read too. Text is lower-case German without a final full stop, and stays so.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from flallm import UserError
from flallm.corpora import Clip, existing, image_folder

HEADER = ["name", "video", "start", "end", "speaker", "orth", "translation"]


def clips(release: Path) -> Iterator[Clip]:
    root = release / "PHOENIX-2014-T" if (release / "PHOENIX-2014-T").is_dir() else release
    for split in ("train", "dev", "test"):
        table = existing(root / f"annotations/manual/PHOENIX-2014-T.{split}.corpus.csv", "is this the folder PHOENIX-2014-T-release-v3?")
        with open(table, encoding="utf-8", newline="") as file:
            rows = csv.DictReader(file, delimiter="|", quoting=csv.QUOTE_NONE)
            if rows.fieldnames != HEADER:
                raise UserError(f"{table}: the header is not {'|'.join(HEADER)}")
            for row in rows:
                folder = root / "features/fullFrame-210x260px" / split / row["name"]
                if (folder / "1").is_dir():
                    folder = folder / "1"
                existing(folder, f"{table} names {row['name']}")
                yield Clip(row["name"].replace(".", "_"), split, row["translation"].strip(), image_folder(folder), row["orth"], row["speaker"])
