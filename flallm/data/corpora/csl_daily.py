"""CSL-Daily from its official tree: everyday Chinese Sign Language, 512x512 pixels, 30 fps.

`split_1.txt` says which split a name belongs to. Its labels come from `csl2020ct_v2.pkl`, or where
that is absent from `video_map.txt`. The frames lie in `sentence/frames_512x512/<name>/`, or the
videos in `sentence-crop/<name>.mp4`. The text is the characters without spaces, with full-width
punctuation. Names of the split file without a label are left out; the official release has one,
S000005_P0004_T00.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from flallm.data.clips import MISSING, Clip, SkippedClip, clip, require_any
from flallm.data.corpora.labels import read_plain_pickle, strings
from flallm.data.images import ImageFiles
from flallm.data.rows import split_name
from flallm.data.tables import read_table, require_path, safe_join
from flallm.data.video import VideoFile
from flallm.utils import UserError

MAP = ["index", "name", "length", "gloss", "char", "word", "postag"]
TREE = "is this the folder that holds sentence_label?"


class Label(NamedTuple):
    """What the tables say of a name."""

    name: str
    gloss: str
    text: str
    signer: str | None


def clips(root: Path) -> Iterator[Clip | SkippedClip]:
    frames, videos = root / "sentence/frames_512x512", root / "sentence-crop"
    if not frames.is_dir():
        what = f"neither does {frames}, and one of them holds the pixels; {TREE}"
        require_path(videos, what)
        frames = None
    return require_any(_rows(root, frames, videos), TREE)


def _rows(root: Path, frames: Path | None, videos: Path) -> Iterator[Clip | SkippedClip]:
    file = root / "sentence_label/split_1.txt"
    labels: dict[str, Label] = {}
    clashing: dict[str, None] = {}  # names with two different labels, in order
    for label in _labels(root / "sentence_label"):
        if isinstance(label, SkippedClip):
            yield label
        elif labels.setdefault(label.name, label) != label:
            clashing[label.name] = None
    if clashing:
        raise UserError(
            f"{root / 'sentence_label'}: different labels have one name, keep one of each: "
            f"{', '.join(clashing)}"
        )
    names = set()
    for row in read_table(file, TREE, "|", ["name", "split"]):
        if isinstance(row, SkippedClip):
            yield row
            continue
        name, split = row["name"], row["split"].strip()
        names.add(name)
        if split_name(split) is None:
            yield SkippedClip(name, split, str(file), "its split is none of train, dev, test")
            continue
        if name not in labels:
            yield SkippedClip(name, split, str(file), "is in the split file but has no label")
            continue
        path = safe_join(frames, name) if frames else safe_join(videos, f"{name}.mp4")
        exists = os.path.isdir if frames else os.path.isfile
        if path is None or not exists(path):
            yield SkippedClip(name, split, str(path or file), MISSING)
            continue
        media = ImageFiles(str(path), fps=30) if frames else VideoFile(str(path))
        label = labels[name]
        yield clip(name, split, label.text, media, label.gloss, label.signer)
    for name in sorted(labels.keys() - names):
        yield SkippedClip(name, "", str(file), "has a label but is not in the split file")


def _labels(folder: Path) -> Iterator[Label | SkippedClip]:
    """Every label. Raises UserError where the tables hold none."""
    pickled = folder / "csl2020ct_v2.pkl"
    if not pickled.exists():
        yield from _labels_of_map(folder / "video_map.txt", f"neither does {pickled}; {TREE}")
        return
    content = read_plain_pickle(pickled)
    if not isinstance(content, dict) or not isinstance(content.get("info"), list):
        raise UserError(f"{pickled}: not a dict with a list `info`")
    for number, row in enumerate(content["info"], 1):
        try:
            name, signer = "" + row["name"], row["signer"]
            gloss, text = " ".join(strings(row["label_gloss"])), "".join(strings(row["label_char"]))
        except (TypeError, KeyError, ValueError):
            cause = "is no label of {name, signer, label_gloss, label_char}"
            yield SkippedClip(f"clip {number}", "", str(pickled), cause)
            continue
        yield Label(name, gloss, text, str(signer) if isinstance(signer, int | str) else None)


def _labels_of_map(table: Path, what: str) -> Iterator[Label | SkippedClip]:
    for row in read_table(table, what, "|", MAP):
        if isinstance(row, SkippedClip):
            yield row
            continue
        signer = re.search(r"_P0*(\d+)_", row["name"])
        text = "".join(row["char"].split())
        yield Label(row["name"], row["gloss"], text, signer[1] if signer else None)
