"""`labels.{train,dev,test}` of GFSLT-VLP and its descendants: a pickle, gzipped or not, of {"<split>/<name>": {name, gloss, text, length,
imgs_path}}, or in another family a list of such dicts. Images lie under a root; without `imgs_path` they are all of `<root>/<name>/`.
Uni-Sign has a `video_path` in its place. A path of images can name a video file or a folder of images, too.

A clip's key is its whole name. PHOENIX14T's names begin with their split ("dev/11August_2010"): where all names of a file do, the split
is left out of the keys, which are then those of the official tree.

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

from flallm.data.clips import MISSING, Clip, Media, SkippedClip, clip, require_any
from flallm.data.rows import split_name
from flallm.data.tables import require_path, safe_join
from flallm.data.video import ImageFiles, VideoFile, is_image
from flallm.utils import UserError, is_hidden, visible_files

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
    require_path(path, "a pickle of labels was expected there")
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


def clips(folder: Path, root: Path) -> Iterator[Clip | SkippedClip]:
    """The clips of every labels.<split> in `folder`, their images under `root`."""
    files = [path for path in visible_files(require_path(folder, "the folder of labels.train"), "labels.*") if split_name(path.suffix[1:])]
    if not files:
        raise UserError(f"{folder} holds none of labels.train, labels.dev, labels.test")
    require_path(root, "the folder of the images was expected there")
    return require_any((one for path in files for one in _rows(path, root)), "are the images under another --root?")


def _rows(path: Path, root: Path) -> Iterator[Clip | SkippedClip]:
    table, split = read_plain_pickle(path), path.suffix[1:]
    if not isinstance(table, dict | list):
        raise UserError(f"{path}: neither a dict nor a list of clips but a {type(table).__name__}")
    rows = list(table.values() if isinstance(table, dict) else table)
    prefix = _common_prefix(rows, f"{split}/")
    for number, row in enumerate(rows, 1):
        try:
            name, text, gloss = "" + row["name"], "" + row["text"], row.get("gloss")
            gloss = None if gloss is None else " ".join(strings(gloss))
            names = _paths(row)
        except (TypeError, KeyError, AttributeError):
            yield SkippedClip(f"clip {number}", split, str(path), "is no clip of {name, text, gloss, imgs_path or video_path}")
            continue
        paths = [safe_join(root, x) for x in names]
        key = name.removeprefix(prefix)
        if not paths:
            yield SkippedClip(key, split, str(path), "names no image")
        elif None in paths:
            yield SkippedClip(key, split, str(path), "a path in it is empty or leads out of the folder of images")
        elif not os.path.exists(paths[0]):
            yield SkippedClip(key, split, str(paths[0]), MISSING)
        else:
            yield clip(key, split, text, _media(root, names), gloss)


def _common_prefix(rows: list, prefix: str) -> str:
    """The prefix where all names begin with it, else nothing."""
    names = [row["name"] for row in rows if isinstance(row, dict) and isinstance(row.get("name"), str)]
    return prefix if all(name.startswith(prefix) for name in names) else ""


def _paths(row: dict) -> tuple[str, ...]:
    """The images, the video or the folder that a row names. Raises TypeError where it names them by no string."""
    paths = next((row[field] for field in ("imgs_path", "video_path") if field in row), row["name"])
    if isinstance(paths, str):
        return (paths,)
    return tuple(path for path in strings(paths) if not is_hidden(os.path.basename(path)))


def _media(root: Path, names: tuple[str, ...]) -> Media:
    """Images, or what a single path names: a folder of images or a video file."""
    path = root / names[0]
    if len(names) > 1 or (is_image(names[0]) and not path.is_dir()):
        return ImageFiles(str(root), names)
    return ImageFiles(str(path)) if path.is_dir() else VideoFile(str(path))
