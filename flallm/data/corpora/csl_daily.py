"""CSL-Daily from its official tree: everyday sentences in Chinese Sign Language, 512x512 pixels, 30 fps.

`split_1.txt` says which split a name belongs to; its words come from `csl2020ct_v2.pkl`, or where that is absent from
`video_map.txt`. The frames lie in `sentence/frames_512x512/<name>/`, or the videos in `sentence-crop/<name>.mp4`. Text is
the characters without spaces, full-width punctuation and all. The split file has names without a label
(S000005_P0004_T00 in the official release): they are left out.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from flallm.data.clips import MISSING, Clip, SkippedClip, clip, require_any
from flallm.data.corpora.labels import read_plain_pickle, strings
from flallm.data.rows import split_name
from flallm.data.tables import read_table, require_path, safe_join
from flallm.data.video import ImageFiles, VideoFile
from flallm.utils import UserError

MAP = ["index", "name", "length", "gloss", "char", "word", "postag"]
TREE = "is this the folder that holds sentence_label?"


def clips(root: Path) -> Iterator[Clip | SkippedClip]:
    frames, videos = root / "sentence/frames_512x512", root / "sentence-crop"
    if not frames.is_dir():
        require_path(videos, f"neither does {frames}, and one of them holds the pixels; {TREE}")
    return require_any(_rows(root, frames if frames.is_dir() else None, videos), TREE)


def _rows(root: Path, frames: Path | None, videos: Path) -> Iterator[Clip | SkippedClip]:
    file = root / "sentence_label/split_1.txt"
    labels, clashing = {}, {}  # name -> (gloss, text, signer); names with another label than before, in order
    for row in _labels(root / "sentence_label"):
        if isinstance(row, SkippedClip):
            yield row
        elif labels.setdefault(row[0], row[1:]) != row[1:]:
            clashing[row[0]] = None
    if clashing:
        raise UserError(f"{root / 'sentence_label'}: different labels have one name, keep one of each: {', '.join(clashing)}")
    names = set()
    for row in read_table(file, TREE, "|", ["name", "split"]):
        if isinstance(row, SkippedClip):
            yield row
            continue
        name, split = row["name"], row["split"].strip()
        names.add(name)
        path = safe_join(frames, name) if frames else safe_join(videos, f"{name}.mp4")
        if split_name(split) is None:
            yield SkippedClip(name, split, str(file), "its split is none of train, dev, test")
        elif name not in labels:
            yield SkippedClip(name, split, str(file), "is in the split file but has no label")
        elif path is None or not (os.path.isdir(path) if frames else os.path.isfile(path)):
            yield SkippedClip(name, split, str(path or file), MISSING)
        else:
            gloss, text, signer = labels[name]
            yield clip(name, split, text, ImageFiles(str(path), fps=30) if frames else VideoFile(str(path)), gloss, signer)
    for name in sorted(labels.keys() - names):
        yield SkippedClip(name, "", str(file), "has a label but is not in the split file")


def _labels(folder: Path) -> Iterator[tuple[str, str, str, str | None] | SkippedClip]:
    """(name, gloss, text, signer) of every label."""
    pickled, table = folder / "csl2020ct_v2.pkl", folder / "video_map.txt"
    if not pickled.exists():
        for row in read_table(table, f"neither does {pickled}; {TREE}", "|", MAP):
            signer = None if isinstance(row, SkippedClip) else re.search(r"_P0*(\d+)_", row["name"])
            yield row if isinstance(row, SkippedClip) else (row["name"], row["gloss"], "".join(row["char"].split()), signer and signer[1])
        return
    content = read_plain_pickle(pickled)
    if not isinstance(content, dict) or not isinstance(content.get("info"), list):
        raise UserError(f"{pickled}: not a dict with a list `info`")
    for number, row in enumerate(content["info"], 1):
        try:
            name, gloss, char, signer = row["name"], strings(row["label_gloss"]), strings(row["label_char"]), row["signer"]
            yield ("" + name), " ".join(gloss), "".join(char), str(signer) if isinstance(signer, int | str) else None
        except (TypeError, KeyError, ValueError):
            yield SkippedClip(f"clip {number}", "", str(pickled), "is no label of {name, signer, label_gloss, label_char}")
