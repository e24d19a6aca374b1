"""`labels.{train,dev,test}` of GFSLT-VLP and its descendants: a gzipped pickle of {"<split>/<name>": {name, gloss, text, length, imgs_path}}.

A pickle is a program. This reader resolves no name at all, so one that would call anything is refused before it does.
"""

from __future__ import annotations

import gzip
import pickle
import zlib
from collections.abc import Iterator
from pathlib import Path

from flallm import UserError
from flallm.corpora import Clip, ImageFiles, existing


class _PlainUnpickler(pickle.Unpickler):
    """Dicts, lists, strings and numbers only."""

    def find_class(self, module: str, name: str):
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, and nothing in a label file is ever run")


def read_plain_pickle(path: Path):
    """What a gzipped pickle of plain values holds. Raises UserError for anything else."""
    existing(path, "a gzipped pickle of labels was expected there")
    try:
        with gzip.open(path) as file:
            return _PlainUnpickler(file).load()
    except (pickle.UnpicklingError, OSError, EOFError, zlib.error, ValueError, IndexError, KeyError, AttributeError, TypeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is refused: {error}") from None


def clips(folder: Path, root: Path) -> Iterator[Clip]:
    """The clips of every labels.<split> in `folder`, their images under `root`."""
    files = sorted(p for p in existing(folder, "the folder of labels.train").glob("labels.*") if p.suffix in (".train", ".dev", ".test"))
    if not files:
        raise UserError(f"{folder} holds none of labels.train, labels.dev, labels.test")
    for path in files:
        table = read_plain_pickle(path)
        if not isinstance(table, dict):
            raise UserError(f"{path}: not a dict of clips but a {type(table).__name__}")
        for number, row in enumerate(table.values()):
            try:
                name, text, images, gloss = str(row["name"]), row["text"], tuple(map(str, row["imgs_path"])), row.get("gloss")
            except (TypeError, KeyError, AttributeError) as error:
                raise UserError(f"{path}, clip {number + 1}: not a clip of {{name, text, imgs_path}}: {error}") from None
            if not isinstance(text, str):
                raise UserError(f"{path}, clip {number + 1}: its text is no text")
            existing(root / images[0] if images else root, f"{path} names it; are the images under another --root?")
            key = name.rsplit("/", 1)[-1].replace(".", "_")
            yield Clip(key, path.suffix[1:], text.strip(), ImageFiles(str(root), images), gloss if isinstance(gloss, str) else None)
