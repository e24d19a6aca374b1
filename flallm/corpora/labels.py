"""`labels.{train,dev,test}` of GFSLT-VLP and its descendants: a pickle, gzipped or not, of {"<split>/<name>": {name, gloss, text, length,
imgs_path}}, or in another family a list of such dicts. Images lie under a root; without `imgs_path` they are all of `<root>/<name>/`.

A pickle is a program. This reader resolves no name at all, so one that would call anything is refused before it does.
"""

from __future__ import annotations

import gzip
import io
import os
import pickle
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from flallm import UserError
from flallm.corpora import MISSING, Clip, ImageFiles, LeftOut, clip, existing, found, inside

MAX_BYTES = 1 << 31  # unpacked; the labels of 30,000 clips with a path an image take 0.3 GB


class _PlainUnpickler(pickle._Unpickler):  # the one in Python: the one in C sets aside as much memory as the file says
    """Dicts, lists, strings and numbers only. Tuples become lists: hashing tuples of tuples of tuples … would take for ever."""

    def find_class(self, module: str, name: str):
        raise pickle.UnpicklingError(f"it asks for {f'{module}.{name}'!r:.100}, and nothing in a label file is ever run")

    def _load_short_tuple(self, size: int) -> None:
        self.stack[-size:] = [self.stack[-size:]]

    dispatch = pickle._Unpickler.dispatch | {
        pickle.EMPTY_TUPLE[0]: pickle._Unpickler.load_empty_list,
        pickle.TUPLE1[0]: partial(_load_short_tuple, size=1),
        pickle.TUPLE2[0]: partial(_load_short_tuple, size=2),
        pickle.TUPLE3[0]: partial(_load_short_tuple, size=3),
        pickle.TUPLE[0]: pickle._Unpickler.load_list,
    }
    del dispatch[pickle.BYTEARRAY8[0]]


def read_plain_pickle(path: Path):
    """What a pickle of plain values holds, gzipped or not. Raises UserError for anything else."""
    existing(path, "a pickle of labels was expected there")
    try:
        with open(path, "rb") as file:
            zipped = file.read(2) == b"\x1f\x8b"
        with (gzip.open if zipped else open)(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise ValueError(f"it unpacks to more than {MAX_BYTES >> 30} GiB")
        return _PlainUnpickler(io.BytesIO(data)).load()
    except Exception as error:  # a broken pickle raises nearly anything
        raise UserError(f"{path} is refused: {type(error).__name__}: {error}") from None


def strings(value) -> tuple[str, ...]:
    """A list of strings, or one string's words. Raises TypeError for anything else."""
    value = value.split() if isinstance(value, str) else value
    if not isinstance(value, list) or not all(isinstance(x, str) for x in value):
        raise TypeError("not a list of strings")
    return tuple(value)


def clips(folder: Path, root: Path) -> Iterator[Clip | LeftOut]:
    """The clips of every labels.<split> in `folder`, their images under `root`."""
    files = sorted(p for p in existing(folder, "the folder of labels.train").glob("labels.*") if p.suffix in (".train", ".dev", ".test"))
    if not files:
        raise UserError(f"{folder} holds none of labels.train, labels.dev, labels.test")
    existing(root, "the folder of the images was expected there")
    return found((one for path in files for one in _rows(path, root)), "are the images under another --root?")


def _rows(path: Path, root: Path) -> Iterator[Clip | LeftOut]:
    table, split = read_plain_pickle(path), path.suffix[1:]
    if not isinstance(table, dict | list):
        raise UserError(f"{path}: neither a dict nor a list of clips but a {type(table).__name__}")
    for number, row in enumerate(table.values() if isinstance(table, dict) else table, 1):
        try:
            name, text, gloss = "" + row["name"], "" + row["text"], row.get("gloss")
            gloss = None if gloss is None else " ".join(strings(gloss))
            images = strings(row["imgs_path"]) if "imgs_path" in row else None
        except (TypeError, KeyError, AttributeError):
            yield LeftOut(f"clip {number}", split, str(path), "is no clip of {name, text, gloss, imgs_path}")
            continue
        paths = [inside(root, x) for x in ([name] if images is None else images)]
        key = name.rsplit("/", 1)[-1]
        if not paths:
            yield LeftOut(key, split, str(path), "names no image")
        elif None in paths:
            yield LeftOut(key, split, str(path), "a path in it is empty or leads out of the folder of images")
        elif not os.path.exists(paths[0]):
            yield LeftOut(key, split, str(paths[0]), MISSING)
        else:
            media = ImageFiles(str(paths[0])) if images is None else ImageFiles(str(root), images)
            yield clip(key, split, text, media, gloss)
