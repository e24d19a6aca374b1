"""`labels.{train,dev,test}` of GFSLT-VLP and its descendants.

Such a file is a pickle, gzipped or not, of {"<split>/<name>": {name, gloss, text, length,
imgs_path}}, or in another family a list of such dicts. Images lie under a root. Without `imgs_path`
they are all of `<root>/<name>/`. Uni-Sign has a `video_path` in its place. A path may name a video
file or a folder of images, too.

A clip's key is its whole name. PHOENIX14T's names begin with their split ("dev/11August_2010").
Where all names of a file do, the split is left out of the keys, which are then those of the
official tree.

A pickle is a program. This reader resolves no name, so it refuses a pickle that calls anything.
"""

from __future__ import annotations

import gzip
import io
import os
import pickle
from collections.abc import Iterator
from functools import partial
from itertools import chain
from pathlib import Path

from flallm.data.clips import MISSING, Clip, Media, SkippedClip, clip, require_any
from flallm.data.images import ImageFiles, is_image
from flallm.data.rows import split_name
from flallm.data.tables import require_path, safe_join
from flallm.data.video import VideoFile
from flallm.utils import UserError, is_hidden, visible_files

MAX_BYTES = 1 << 31  # unpacked; the labels of 30,000 clips with a path an image take 0.3 GB


# The Python class, because the C class allocates as much memory as the file says.
class _PlainUnpickler(pickle._Unpickler):
    """Reads dicts, lists, strings and numbers only.

    Tuples become lists: hashing tuples of tuples of tuples would take for ever.
    """

    def find_class(self, module: str, name: str):
        asked = repr(f"{module}.{name}")
        raise pickle.UnpicklingError(
            f"it asks for {asked:.100}, and nothing in a label file is ever run"
        )

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
    """The plain values of a pickle, gzipped or not. Raises UserError for anything else."""
    require_path(path, "a pickle of labels was expected there")
    try:
        with open(path, "rb") as file:
            is_gzipped = file.read(2) == b"\x1f\x8b"
        with (gzip.open if is_gzipped else open)(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise ValueError(f"it unpacks to more than {MAX_BYTES >> 30} GiB")
        return _PlainUnpickler(io.BytesIO(data)).load()
    except Exception as error:  # a broken pickle raises nearly anything
        raise UserError(f"{path} is refused: {type(error).__name__}: {error}") from None


def strings(value) -> tuple[str, ...]:
    """A list of strings, or the words of one string. Raises TypeError for anything else."""
    if isinstance(value, str):
        value = value.split()
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise TypeError("not a list of strings")
    return tuple(value)


def clips(folder: Path, root: Path) -> Iterator[Clip | SkippedClip]:
    """The clips of every labels.<split> in `folder`, with their images under `root`."""
    require_path(folder, "the folder of labels.train")
    files = [path for path in visible_files(folder, "labels.*") if split_name(path.suffix[1:])]
    if not files:
        raise UserError(f"{folder} holds none of labels.train, labels.dev, labels.test")
    require_path(root, "the folder of the images was expected there")
    rows = chain.from_iterable(_rows(path, root) for path in files)
    return require_any(rows, "are the images under another --root?")


def _rows(path: Path, root: Path) -> Iterator[Clip | SkippedClip]:
    table, split = read_plain_pickle(path), path.suffix[1:]
    if not isinstance(table, dict | list):
        kind = type(table).__name__
        raise UserError(f"{path}: neither a dict nor a list of clips but a {kind}")
    rows = list(table.values() if isinstance(table, dict) else table)
    prefix = _common_prefix(rows, f"{split}/")
    for number, row in enumerate(rows, 1):
        try:
            name, text, gloss = "" + row["name"], "" + row["text"], row.get("gloss")
            gloss = None if gloss is None else " ".join(strings(gloss))
            names = _media_names(row)
        except (TypeError, KeyError, AttributeError):
            cause = "is no clip of {name, text, gloss, imgs_path or video_path}"
            yield SkippedClip(f"clip {number}", split, str(path), cause)
            continue
        paths = [safe_join(root, media_name) for media_name in names]
        key = name.removeprefix(prefix)
        if not paths:
            yield SkippedClip(key, split, str(path), "names no image")
        elif None in paths:
            cause = "a path in it is empty or leads out of the folder of images"
            yield SkippedClip(key, split, str(path), cause)
        elif not os.path.exists(paths[0]):
            yield SkippedClip(key, split, str(paths[0]), MISSING)
        else:
            yield clip(key, split, text, _media(root, names), gloss)


def _common_prefix(rows: list, prefix: str) -> str:
    """The prefix where all names begin with it, else ""."""
    for row in rows:
        name = row.get("name") if isinstance(row, dict) else None
        if isinstance(name, str) and not name.startswith(prefix):
            return ""
    return prefix


def _media_names(row: dict) -> tuple[str, ...]:
    """The images, the video or the folder that a row names. Raises TypeError for no strings."""
    if "imgs_path" in row:
        names = row["imgs_path"]
    elif "video_path" in row:
        names = row["video_path"]
    else:
        names = row["name"]
    if isinstance(names, str):
        return (names,)
    return tuple(name for name in strings(names) if not is_hidden(os.path.basename(name)))


def _media(root: Path, names: tuple[str, ...]) -> Media:
    """Images, or the folder of images or the video file that a single name is about."""
    path = root / names[0]
    is_folder = path.is_dir()
    if len(names) > 1 or (is_image(names[0]) and not is_folder):
        return ImageFiles(str(root), names)
    return ImageFiles(str(path)) if is_folder else VideoFile(str(path))
