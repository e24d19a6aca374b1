import gzip
import os
import pickle
import struct
from pathlib import Path

import pytest
from videos import images, numbered, numbers, sidecars

from flallm.data.clips import MISSING, Clip
from flallm.data.corpora import labels
from flallm.data.encode import EncodeOptions, encode
from flallm.data.images import ImageFiles
from flallm.utils import UserError


def write_labels(folder: Path, content, pack=gzip.compress) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "labels.train").write_bytes(
        pack(content if isinstance(content, bytes) else pickle.dumps(content))
    )


def test_labels_of_both_families(tmp_path):
    images(tmp_path / "frames/train/a.b")
    paths = [f"train/a.b/images{i:04d}.png" for i in range(2, 6)]
    row = {
        "name": "train/a.b",
        "gloss": "A B",
        "text": " ein text",
        "length": 4,
        "imgs_path": paths,
    }
    write_labels(tmp_path / "labels", {"train/a.b": row})
    (clip,) = labels.clips(tmp_path / "labels", tmp_path / "frames")
    assert (clip.key, clip.split, clip.text, clip.gloss) == ("a_b", "train", "ein text", "A B")
    assert encode(clip, EncodeOptions())[1]["num_frames"] == 4
    write_labels(
        tmp_path / "labels", [{"name": "train/a.b", "gloss": ("A", "B"), "text": "ein text"}], bytes
    )
    (other,) = labels.clips(tmp_path / "labels", tmp_path / "frames")
    assert (other.key, other.gloss, encode(other, EncodeOptions())[1]["num_frames"]) == (
        "a_b",
        "A B",
        5,
    )


def test_the_key_of_a_label_is_its_whole_name_without_a_split_that_all_have(tmp_path):
    for folder in ("signer1/0000", "signer2/0000", "train/0000"):
        images(tmp_path / "frames" / folder)

    def keys(*names: str) -> list[str]:
        write_labels(tmp_path / "labels", [{"name": name, "text": "x"} for name in names])
        return [clip.key for clip in labels.clips(tmp_path / "labels", tmp_path / "frames")]

    assert keys("signer1/0000", "signer2/0000") == ["signer1_0000", "signer2_0000"]
    assert keys("train/0000", "signer2/0000") == ["train_0000", "signer2_0000"]
    assert keys("train/0000") == ["0000"]


def test_labels_name_videos_and_folders_too(tmp_path):
    (tmp_path / "videos/a b").mkdir(parents=True)
    numbered(tmp_path / "videos/a b/0.mp4", 24, 7)
    images(tmp_path / "videos/frames")
    rows = [
        {"video_path": "a b/0.mp4"},
        {"imgs_path": ["a b/0.mp4"]},
        {"imgs_path": "a b/0.mp4"},
        {"imgs_path": ["frames"]},
    ]
    rows += [
        {"imgs_path": "frames/images0001.png"},
        {"name": "a b/0.mp4"},
        {"video_path": "../labels/labels.train"},
        {"video_path": 3},
    ]
    write_labels(
        tmp_path / "labels", [{"name": str(i), "text": "x"} | row for i, row in enumerate(rows)]
    )
    *clips, outside, no_path = labels.clips(tmp_path / "labels", tmp_path / "videos")
    counts = [encode(clip, EncodeOptions())[1]["num_frames"] for clip in clips]
    assert counts == [7, 7, 7, 5, 1, 7] and numbers(clips[0].media) == list(range(7))
    assert "leads out" in outside.cause and no_path.cause.startswith("is no clip of")


def test_labels_of_val_are_not_passed_over(tmp_path):
    images(tmp_path / "frames/a")
    write_labels(tmp_path / "labels", [{"name": "a", "text": "x"}])
    for name in ("labels.val", "labels.train.bak"):
        (tmp_path / "labels" / name).write_bytes((tmp_path / "labels/labels.train").read_bytes())
    assert {clip.split for clip in labels.clips(tmp_path / "labels", tmp_path / "frames")} == {
        "train",
        "val",
    }


def test_labels_that_give_no_clip_are_left_out_with_the_cause(tmp_path):
    images(tmp_path / "frames/a")
    images(tmp_path / "outside")
    good = {"name": "a", "text": "ein text", "imgs_path": ["a/images0001.png"]}
    bad = [
        {**good, **change}
        for change in (
            {"text": " "},
            {"text": "a\0b"},
            {"text": "\ud83d"},
            {"text": None},
            {"imgs_path": []},
            {"imgs_path": ["b/1.png"]},
        )
    ]
    bad += [
        {**good, "imgs_path": [good["imgs_path"][0], path]}
        for path in ("../outside/images0001.png", str(tmp_path / "outside/images0001.png"))
    ]
    write_labels(tmp_path / "labels", [*bad, "no row", good])
    *skipped, clip = labels.clips(tmp_path / "labels", tmp_path / "frames")
    half, row, leads = (
        "its text holds a NUL or half a character",
        "is no clip of {name, text, gloss, imgs_path or video_path}",
        "a path in it is empty or leads out of the folder of images",
    )
    assert [x.cause for x in skipped] == [
        "has no text",
        half,
        half,
        row,
        "names no image",
        MISSING,
        leads,
        leads,
        row,
    ]
    assert isinstance(clip, Clip) and skipped[-1].key == "clip 9"
    with pytest.raises(UserError, match="another --root"):
        list(labels.clips(tmp_path / "labels", tmp_path / "outside"))


def test_hidden_images_and_label_files_are_ignored(tmp_path):
    images(tmp_path / "frames/a")
    sidecars(tmp_path / "frames/a")
    assert len(list(ImageFiles(str(tmp_path / "frames/a")).frames()[1])) == 5
    listed = sorted(os.listdir(tmp_path / "frames/a"))  # as scripts write label files
    assert listed[:2] == [".DS_Store", "._images0001.png"] and len(listed) == 11
    names = [f"a/{name}" for name in listed if name.endswith(".png")]
    rows = [
        {"name": "a", "text": "x", "imgs_path": names},
        {"name": "b", "text": "x", "imgs_path": names[:1]},
    ]
    write_labels(tmp_path / "labels", rows)
    sidecars(tmp_path / "labels")
    clip, skipped = labels.clips(tmp_path / "labels", tmp_path / "frames")
    assert encode(clip, EncodeOptions())[1]["num_frames"] == 5
    assert skipped.cause == "names no image"


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_hostile_pickle_runs_nothing(tmp_path):
    write_labels(tmp_path / "labels", {"train/x": Hostile(tmp_path / "owned")})
    with pytest.raises(UserError, match="nothing in a label file is ever run"):
        list(labels.clips(tmp_path / "labels", tmp_path))
    assert not (tmp_path / "owned").exists()


def test_a_pickle_takes_no_time_or_memory_that_its_size_does_not_explain(tmp_path):
    """Each is below 1 kB, and pickle.load needs gigabytes or years for it."""
    nested = b"\x80\x04)" + b"2\x86" * 60  # () -> ((), ()) -> …, whose hash takes 2^60 steps
    for content, message in (
        (nested[:2] + b"}" + nested[2:] + b"Ns.", "unhashable"),
        (b"\x80\x04Nr\xff\xff\xff\x7f.", "NoneType"),
        (b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b".", "refused"),
    ):
        write_labels(tmp_path / "labels", content)
        with pytest.raises(UserError, match=message):
            list(labels.clips(tmp_path / "labels", tmp_path))
