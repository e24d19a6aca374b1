import gzip
import hashlib
import json
import os
import pickle
import struct
import subprocess
import sys
import zlib
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from flallm.data.clips import MISSING, Clip, SkippedClip
from flallm.data.corpora import csl_daily, how2sign, labels, manifest, phoenix14t, synthetic
from flallm.data.encode import EncodeOptions, encode
from flallm.data.images import ImageFiles
from flallm.data.video import VideoFile
from flallm.utils import UserError


def images(folder: Path, count: int = 5, name: str = "images{:04d}.png") -> None:
    folder.mkdir(parents=True)
    for i in range(count):
        cv2.imwrite(str(folder / name.format(i + 1)), np.full((260, 210, 3), 10 * i, np.uint8))


def test_synthetic_is_what_it_says():
    train, test = (
        list(synthetic.sentences(split, n)) for split, n in (("train", 2400), ("test", 250))
    )
    assert (
        len(synthetic.GLOSSES) >= 60 and len({w for _, text in train for w in text.split()}) >= 120
    )
    assert len(set(map(str, synthetic.lexicon().values()))) == len(synthetic.GLOSSES)
    lengths = [len(glosses) for glosses, _ in train]
    assert min(lengths) == 1 and max(lengths) == 8
    seen = {text for _, text in train}
    assert sum(text in seen for _, text in test) < len(test) / 2
    assert not {tuple(g) for g, _ in train if len(g) > 2} & {tuple(g) for g, _ in test}
    signers = {split: set(numbers) for split, numbers in synthetic.signers().items()}
    assert not signers["train"] & (signers["dev"] | signers["test"])
    a, b = (
        encode(next(synthetic.clips(seed=3, train=1, dev=0, test=0)), EncodeOptions())
        for _ in range(2)
    )
    assert a == b


def test_the_demos_sentences_stay_what_they_are():
    """Scores are compared over versions."""
    digest = hashlib.sha256(
        "".join(
            f"{' '.join(g)}|{t}\n"
            for split in ("train", "dev", "test")
            for g, t in synthetic.sentences(split, 500)
        ).encode()
    )
    assert digest.hexdigest().startswith("0c1ac1df1c2a7a0e")


def test_the_benchmark_corpus_is_what_its_dials_say():
    dials = synthetic.PRESETS["bench"]
    for wrong, said in (
        ({"many": False}, "joined needs many"),
        ({"signers": (8,)}, "signers: three numbers are needed"),
        ({"clips": (8, 0, 1)}, "clips: three"),
    ):
        with pytest.raises(UserError, match=said):
            replace(dials, **wrong)
    train, test, text = (
        list(synthetic.sentences(split, n, dials=dials))
        for split, n in (("train", 4800), ("test", 400), ("text", 4800))
    )
    assert (
        len(synthetic.MANY_GLOSSES) > 2 * len(synthetic.GLOSSES)
        and max(len(g) for g, _ in train) > 12
    )
    # Unseen: signers, sentences, and in some of them a pair of a noun and what is said of it, which text alone has.
    people = synthetic.signers(dials)
    assert not set(people["train"]) & {*people["dev"], *people["test"]}
    assert not {tuple(g) for g, _ in train if len(g) > 2} & {tuple(g) for g, _ in test}
    held_out = [
        sum(
            any(synthetic.is_held_out(*pair, dials) for pair in synthetic.pairs(g)) for g, _ in part
        )
        for part in (train, test, text)
    ]
    assert held_out[0] == 0 and held_out[1] > 40 and held_out[2] > 480
    # One signing has several texts, words are long-tailed, and a reason is signed before what it is the reason of.
    texts = {}
    for glosses, sentence in train:
        texts.setdefault(tuple(glosses), set()).add(sentence)
    assert sum(len(g) > 4 and len(said) > 1 for g, said in texts.items()) > 100
    counts = sorted(
        (sum(g.count(noun) for g, _ in train) for noun in synthetic.NOUNS), reverse=True
    )
    assert counts[0] > 5 * counts[-1] > 0
    glosses, sentence = next(
        (g, t) for g, t in train if "BECAUSE" in g and "SNOW" in g[: g.index("BECAUSE")]
    )
    assert "snow" in sentence[sentence.index(" because ") :]


def test_a_signs_form_depends_on_its_neighbours():
    from flallm.data.corpora.signer import HAND, Sign, make_signer, perform

    high, low = (
        Sign("fist", "up", "forehead", "hold", "one"),
        Sign("five", "down", "low", "hold", "one"),
    )

    def first_sign(*signs: Sign, assimilation: float) -> np.ndarray:
        return perform(list(signs), make_signer(0), np.random.default_rng(0), assimilation)[
            8:12, :HAND
        ]

    alone, before_low = (first_sign(*signs, assimilation=0.5) for signs in ((high,), (high, low)))
    assert (
        before_low[:, 1].mean() > alone[:, 1].mean() + 0.2
        and before_low[:, 4].mean() > alone[:, 4].mean() + 0.3
    )  # lower, and the index opens
    assert np.array_equal(first_sign(high, assimilation=0.5), first_sign(high, assimilation=0))


@pytest.mark.parametrize(
    "glosses,text",
    [
        (
            "TOMORROW SHOP MOTHER APPLE RED 2 BUY",
            "tomorrow my mother will buy two red apples in the shop",
        ),
        ("YESTERDAY FATHER COFFEE DRINK NOT", "my father did not drink any coffee yesterday"),
        ("TODAY EVENING DOG BIG SEE", "they see a huge dog tonight"),
        ("ANNA TEACHER SEE QUESTION", "does anna meet the teacher"),
    ],
)
def test_grammar(glosses, text):
    g = glosses.split()
    slots = {
        "time": synthetic.TIMES,
        "part": synthetic.PARTS,
        "place": synthetic.MAX_POSITIONS,
        "adjective": synthetic.ADJECTIVES,
        "number": synthetic.NUMBERS,
    }
    parts = {slot: next((x for x in g if x in members), None) for slot, members in slots.items()}
    people = [x for x in g if x in synthetic.NAMES | synthetic.PEOPLE]
    thing = next((x for x in g if x in synthetic.NOUNS), None)
    parts |= {
        "subject": people[0] if people else None,
        "object": thing or (people[1] if len(people) > 1 else None),
    }
    parts |= {"negated": "NOT" in g, "question": "QUESTION" in g}
    assert synthetic._translate(next(x for x in g if x in synthetic.VERBS), **parts) == text


def test_phoenix14t_official_tree(tmp_path):
    root = tmp_path / "PHOENIX-2014-T-release-v3/PHOENIX-2014-T"
    (root / "annotations/manual").mkdir(parents=True)
    header = "name|video|start|end|speaker|orth|translation\n"
    for split, name in (
        ("train", "01April_2010_Thursday_heute-6694"),
        ("dev", "11August_2010"),
        ("test", "25October_2010"),
    ):
        row = f'{name}|{name}/1/*.png|-1|-1|Signer04|JETZT WETTER|und nun "die wettervorhersage\n'
        if split == "test":  # rows that give no clip, and do not shift those that do
            row = f"gone|x|-1|-1|S|A|text\n../dev/11August_2010|x|-1|-1|S|A|text\n{row}{name}|x|-1|-1|S|A| \nshort|x\n"
        (root / f"annotations/manual/PHOENIX-2014-T.{split}.corpus.csv").write_text(header + row)
        folder = root / "features/fullFrame-210x260px" / split / name
        images(folder / "1" if split == "dev" else folder)  # some trees still have the 1/
    (
        root / "features/fullFrame-210x260px/train/01April_2010_Thursday_heute-6694/x.lprof"
    ).write_text("stray")
    rows = list(phoenix14t.clips(tmp_path / "PHOENIX-2014-T-release-v3"))
    clips, left = (
        [x for x in rows if isinstance(x, Clip)],
        [x for x in rows if isinstance(x, SkippedClip)],
    )
    assert [x.cause for x in left] == [
        MISSING,
        MISSING,
        "has no text",
        "has 2 fields, not 7",
    ] and left[3].source.endswith("test.corpus.csv:6")
    assert [(c.split, c.text, c.gloss, c.signer) for c in clips] == [
        (s, 'und nun "die wettervorhersage', "JETZT WETTER", "Signer04")
        for s in ("train", "dev", "test")
    ]
    for clip in clips:
        _, meta = encode(clip, EncodeOptions())
        assert (meta["num_frames"], meta["fps"], meta["width"], meta["height"]) == (
            5,
            25.0,
            210,
            260,
        )
    with pytest.raises(UserError, match="does not exist"):
        list(phoenix14t.clips(tmp_path))


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
    *clips, leads, none = labels.clips(tmp_path / "labels", tmp_path / "videos")
    counts = [encode(clip, EncodeOptions())[1]["num_frames"] for clip in clips]
    assert counts == [7, 7, 7, 5, 1, 7] and numbers(clips[0].media) == list(range(7))
    assert "leads out" in leads.cause and none.cause.startswith("is no clip of")


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
    *left, clip = labels.clips(tmp_path / "labels", tmp_path / "frames")
    half, row, leads = (
        "its text holds a NUL or half a character",
        "is no clip of {name, text, gloss, imgs_path or video_path}",
        "a path in it is empty or leads out of the folder of images",
    )
    assert [x.cause for x in left] == [
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
    assert isinstance(clip, Clip) and left[-1].key == "clip 9"
    with pytest.raises(UserError, match="another --root"):
        list(labels.clips(tmp_path / "labels", tmp_path / "outside"))


def sidecars(folder: Path) -> None:
    """What macOS leaves beside every file of a folder on a disk that is not its own."""
    for path in list(folder.iterdir()):
        (folder / f"._{path.name}").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X".ljust(4096, b"\0"))
    (folder / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")


def test_hidden_files_are_passed_over(tmp_path):
    images(tmp_path / "frames/a")
    sidecars(tmp_path / "frames/a")
    assert len(list(ImageFiles(str(tmp_path / "frames/a")).frames()[1])) == 5
    listed = sorted(os.listdir(tmp_path / "frames/a"))  # as scripts write label files
    assert listed[:2] == [".DS_Store", "._images0001.png"] and len(listed) == 11
    names = [f"a/{name}" for name in listed if name.endswith(".png")]
    write_labels(
        tmp_path / "labels",
        [
            {"name": "a", "text": "x", "imgs_path": names},
            {"name": "b", "text": "x", "imgs_path": names[:1]},
        ],
    )
    sidecars(tmp_path / "labels")
    clip, left = labels.clips(tmp_path / "labels", tmp_path / "frames")
    assert encode(clip, EncodeOptions())[1]["num_frames"] == 5 and left.cause == "names no image"
    (tmp_path / "videos/.AppleDouble").mkdir(parents=True)
    (tmp_path / "videos/.AppleDouble/v-rgb_front.mp4").write_bytes(b"\0\5\x16\7")
    numbered(tmp_path / "videos/v-rgb_front.mp4", 24, 9)
    sidecars(tmp_path / "videos")
    how2sign_tree(tmp_path, ["v\tv-rgb_front\ts\tk\t0\t0.2\thello"])
    (clip,) = how2sign.clips(tmp_path, tmp_path / "videos", precut=False)
    assert numbers(clip.media) == [0, 1, 2, 3, 4]


def test_images_of_one_number_have_one_order(tmp_path):
    for i, name in enumerate(("2.png", "01.png", "1.png")):
        tmp_path.joinpath(name).write_bytes(
            cv2.imencode(".png", np.full((16, 16), 100 * i, np.uint8))[1].tobytes()
        )
    assert [
        f.to_ndarray(format="gray").mean().round(-1)
        for _, f in ImageFiles(str(tmp_path)).frames()[1]
    ] == [100, 200, 0]


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
    for content, said in (
        (nested[:2] + b"}" + nested[2:] + b"Ns.", "unhashable"),
        (b"\x80\x04Nr\xff\xff\xff\x7f.", "NoneType"),
        (b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b".", "refused"),
    ):
        write_labels(tmp_path / "labels", content)
        with pytest.raises(UserError, match=said):
            list(labels.clips(tmp_path / "labels", tmp_path))


def test_manifest(tmp_path):
    images(tmp_path / "frames", 12, "{}.png")
    table = tmp_path / "clips.tsv"
    table.write_text(
        "\ufeffvideo\ttext\tsplit\tfps\tsigner\nframes\tGuten Morgen\ttrain\t12.5\tAnna\n",
        encoding="utf-8",
    )
    (clip,) = manifest.clips(table, tmp_path)
    assert (clip.text, clip.split, clip.signer, encode(clip, EncodeOptions())[1]["fps"]) == (
        "Guten Morgen",
        "train",
        "Anna",
        12.5,
    )
    levels = [frame.to_ndarray(format="gray").mean() for _, frame in clip.media.frames()[1]]
    assert levels == sorted(levels) and len(levels) == 12  # 10.png comes after 9.png
    table = tmp_path / "clips.jsonl"
    rows = [
        {"video": "frames", "text": text, "split": "dev", "signer": 3, "key": key}
        for key, text in (("a.b/c", "eins"), ("d", ""), ("e", "\0"))
    ]
    table.write_text(
        "\n\n".join(
            json.dumps(row)
            for row in [*rows, {"video": str(tmp_path / "gone"), "text": "x", "split": "dev"}]
        )
    )
    clip, *left = manifest.clips(table, tmp_path)
    assert (clip.key, clip.signer) == ("a_b_c", "3")
    assert [(x.key, x.cause) for x in left] == [
        ("d", "has no text"),
        ("e", "its text holds a NUL or half a character"),
        ("dev-0000003", MISSING),
    ]


@pytest.mark.parametrize(
    "name,content,message",
    [
        ("a.csv", "video,text\nframes,x\n", "row 1: no split"),
        ("a.csv", "video,text,split,glos\nframes,x,train,y\n", "unknown column 'glos'"),
        ("a.csv", "video,text,split\nnothing.mp4,x,train\n", "does not exist"),
        ("a.csv", "video,text,split,start\nframes,x,train,soon\n", "is not a number"),
        ("a.csv", "video,text,split,fps\nframes,x,train,nan\n", "is not a number"),
        ("a.csv", "video,text,split,end\nframes,x,train,5\n", "is a folder of images"),
        (
            "a.csv",
            "video,text,split\nframes,x,../../train\n",
            r"row 1: unknown split '../../train': use train \(or training\), dev",
        ),
        ("a.csv", "video,text,split\nframes,x\n", "line 2: it has more or fewer fields"),
        ("a.csv", 'video,text,split\nframes,"x" y,train\n', "line 2: ',' expected"),
        ("a.csv", 'video,text,split\nframes,"x,train\nframes,y,train\n', "unexpected end"),
        ("a.csv", "video,text,split\nframes,ä,train\n".encode("latin-1"), "line 2: not UTF-8"),
        ("a.csv", "video,text,split\n".encode("utf-16"), "line 1: not UTF-8"),
        ("a.jsonl", "[1]\n", "line 1: it is no JSON object"),
        ("a.jsonl", '{"video": "frames", "text": 1, "split": "train"}', "no text"),
        (
            "a.jsonl",
            '{"video": "frames", "text": "x", "split": "train", "gloss": ["A"]}',
            "its gloss is no text",
        ),
        ("a.jsonl", "[" * 100_000, "line 1"),
        ("a.txt", "", "ends in"),
    ],
)
def test_a_table_with_a_mistake_is_one_clear_line(tmp_path, name, content, message):
    images(tmp_path / "frames")
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as caught:
        list(manifest.clips(tmp_path / name, tmp_path))
    assert "\n" not in str(caught.value)


def numbered(
    path: Path,
    fps,
    count: int,
    x264: str = "keyint=100:bframes=3:scenecut=0",
    start: int = 0,
    first: int = 0,
) -> Path:
    """A video whose frame i shows first + i as eight bright or dark columns."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.options = {"preset": "veryfast", "crf": "1", "x264-params": x264}
        for i in range(count):
            columns = np.repeat([255 * (first + i >> bit & 1) for bit in range(8)], 8).astype(
                np.uint8
            )
            frame = av.VideoFrame.from_ndarray(
                np.broadcast_to(columns[:, None], (48, 64, 3)).copy(), "rgb24"
            )
            frame.pts, frame.time_base = i + start, 1 / Fraction(fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def numbers(media) -> list[int]:
    return [
        int(sum((f.to_ndarray(format="gray")[24, 8 * bit + 4] > 128) << bit for bit in range(8)))
        for _, f in media.frames()[1]
    ]


@pytest.mark.parametrize(
    "name,fps,x264",
    [
        ("long.mp4", 24, "keyint=100:bframes=3:b-pyramid=normal:scenecut=0"),
        (
            "open.mp4",
            30,
            "keyint=48:bframes=8:b-adapt=0:open-gop=1:scenecut=0",
        ),  # here seeking lands behind frames of the cut
        (
            "ntsc.ts",
            Fraction(30000, 1001),
            "keyint=48:bframes=3:open-gop=1:scenecut=0",
        ),  # no index, and times that begin at 0.07
        ("milli.mkv", 24, "keyint=48:bframes=3:scenecut=0"),  # times in milliseconds
    ],
)
def test_a_cut_is_exact_to_the_frame(tmp_path, name, fps, x264):
    path = str(numbered(tmp_path / name, fps, 130, x264))
    assert numbers(VideoFile(path)) == list(range(130))
    for first in (0, 1, 45, 46, 47, 48, 49, 94, 95, 96, 99, 100, 101, 129):
        start, end = (round(float(i / Fraction(fps)), 3) for i in (first, first + 3))
        assert numbers(VideoFile(path, start, end)) == list(range(first, min(first + 3, 130))), (
            first
        )
    with pytest.raises(ValueError, match="no frame begins in this part"):
        numbers(VideoFile(path, 60, 61))


def test_a_cut_does_not_decode_what_lies_before_its_keyframe(tmp_path):
    path = numbered(tmp_path / "a.mp4", 24, 130, "keyint=24:bframes=3:scenecut=0")
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        for packet in container.demux(video=0):
            if packet.pts is not None and packet.pts * packet.time_base < 3.9:
                data[packet.pos : packet.pos + packet.size] = b"\xff" * packet.size
    path.write_bytes(data)
    assert numbers(VideoFile(str(path), 4.5, 4.625)) == [108, 109, 110]
    with pytest.raises(ValueError, match="no frame decodes"):
        numbers(VideoFile(str(path)))


def set_display_matrix(path: Path, matrix: tuple[int, int, int, int]) -> None:
    """Writes (a, b, c, d) into the header of an MP4's first track."""
    data, (a, b, c, d) = bytearray(path.read_bytes()), matrix
    at = data.index(b"tkhd") + 4 + 40
    data[at : at + 36] = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    path.write_bytes(data)


@pytest.mark.parametrize(
    "matrix",
    [
        (1, 0, 0, 1),
        (0, 1, -1, 0),
        (-1, 0, 0, -1),
        (0, -1, 1, 0),
        (-1, 0, 0, 1),
        (1, 0, 0, -1),
        (0, 1, 1, 0),
        (0, -1, -1, 0),
    ],
)
def test_frames_come_out_upright(tmp_path, matrix):
    """Signs have sides: a video that is stored turned or mirrored, with a note to show it otherwise, is shown as the note says."""
    path, picture = tmp_path / "turned.mp4", np.zeros((48, 64, 3), np.uint8)
    picture[:24, :32] = 255
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=24)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        container.mux(
            [*stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")), *stream.encode()]
        )
    set_display_matrix(path, matrix)
    a, b, c, d = matrix
    ((_, frame),) = VideoFile(str(path)).frames()[1]
    seen = frame.to_ndarray(format="gray")
    assert seen.shape == ((48, 64) if a else (64, 48)) and not frame.rotation
    right, below = -a - c > 0, -b - d > 0  # where the corner above and left of the middle goes
    rows, columns = (
        np.array_split(seen, 2)[below],
        slice(seen.shape[1] // 2, None) if right else slice(seen.shape[1] // 2),
    )
    assert rows[:, columns].mean() > 200 and seen.mean() < 90


def test_videos_with_odd_rates(tmp_path):
    assert VideoFile(str(numbered(tmp_path / "one.mp4", 24, 1))).frames()[0] == 24 and numbers(
        VideoFile(str(tmp_path / "one.mp4"))
    ) == [0]
    raw = str(numbered(tmp_path / "raw.h264", 24, 9))  # frames without times
    assert numbers(VideoFile(raw)) == list(range(9))
    with pytest.raises(ValueError, match="carry no times"):
        numbers(VideoFile(raw, 0, 0.2))


def test_a_video_cut_short_is_no_shorter_video(tmp_path):
    for name in ("a.mp4", "a.mkv"):
        whole = numbered(tmp_path / name, 24, 200)
        if name == "a.mp4":
            with (
                av.open(str(whole)) as source,
                av.open(
                    str(tmp_path / "fast.mp4"), "w", options={"movflags": "faststart"}
                ) as container,
            ):
                stream = container.add_stream_from_template(source.streams.video[0])
                for packet in source.demux(video=0):
                    if packet.dts is not None:
                        packet.stream = stream
                        container.mux(packet)
            whole = tmp_path / "fast.mp4"
        whole.write_bytes(whole.read_bytes()[: whole.stat().st_size * 2 // 3])
        with pytest.raises(ValueError, match=r"breaks after \d\d+ frames"):
            numbers(VideoFile(str(whole)))


def test_only_the_file_itself_is_opened(tmp_path):
    """A "video" that is a script of other files' names is no video, and a header cannot ask for all of the memory."""
    numbered(tmp_path / "other.ts", 24, 5)
    (tmp_path / "clip.mp4").write_text("ffconcat version 1.0\nfile other.ts\n")
    with pytest.raises((ValueError, av.FFmpegError)):
        numbers(VideoFile(str(tmp_path / "clip.mp4")))

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    for width, height in ((100_000, 100_000), (9000, 9000)):
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        (tmp_path / "huge.png").write_bytes(
            b"\x89PNG\r\n\x1a\n"
            + header
            + chunk(b"IDAT", zlib.compress(b"\0" * 999))
            + chunk(b"IEND", b"")
        )
        with pytest.raises(ValueError, match=r"huge\.png is no image"):
            list(ImageFiles(str(tmp_path), ("huge.png",)).frames()[1])


ODD = Path(
    os.environ.get("FLALLM_ODD_VIDEOS", Path(__file__).parents[3] / "shared/data/odd-videos")
)
ODD_FRAMES = {
    "decord_corrupted.mp4": "breaks after 28 frames",
    "exo_invalid-bitstream.webm": "no frame decodes",
    "exo_sample_av1.mp4": (30, 1080, 720, 29.97),
    "exo_sample.mkv": (30, 1080, 720, 29.99),
    "exo_sample_android_slow_motion.mp4": (7, 1280, 720, 13.32),
    "exo_sample_fragmented.mp4": (30, 1080, 720, 29.97),
    "exo_bear-vp9-odd-dimensions.webm": (30, 161, 121, 29.97),
    "exo_sample_h265.ts": (30, 854, 480, 30),
    "exo_video_desks.3gp": (71, 352, 288, 14.14),
    "decord_video_90.mov": (3, 320, 568, 30),
}


@pytest.mark.skipif(not ODD.is_dir(), reason="the folder of odd videos is not there")
@pytest.mark.parametrize("name", ODD_FRAMES)
def test_odd_videos(name):
    """Real files that break naive readers give all of their frames, or say why not."""
    rate, frames = VideoFile(str(ODD / name)).frames()
    if isinstance(ODD_FRAMES[name], str):
        with pytest.raises(ValueError, match=ODD_FRAMES[name]):
            list(frames)
    else:
        frames = [frame for _, frame in frames]
        assert (
            len(frames),
            frames[0].width,
            frames[0].height,
            round(float(rate), 2),
        ) == ODD_FRAMES[name]


def csl_tree(root: Path) -> None:
    (root / "sentence_label").mkdir()
    (root / "sentence_label/split_1.txt").write_text(
        "name|split\nS000000_P0000_T00|train\nS000001_P0003_T00|dev\nS000005_P0004_T00|train\nS000002_P0001_T00|test\n"
    )
    for name in ("S000000_P0000_T00", "S000001_P0003_T00"):
        images(root / "sentence/frames_512x512" / name, 4, "{:06d}.jpg")


CSL_ROWS = [
    {
        "name": f"S00000{i}_P000{p}_T00",
        "signer": p,
        "length": 4,
        "label_gloss": ["今天", "天气", "好"],
        "label_char": [*"今天天气很好,真的?"],
        "label_word": (),
        "label_postag": [],
    }
    for i, p in ((0, 0), (1, 3), (2, 1))
]


@pytest.mark.parametrize("source", ["pickle", "table"])
def test_csl_daily_official_tree(tmp_path, source):
    csl_tree(tmp_path)
    if source == "pickle":
        (tmp_path / "sentence_label/csl2020ct_v2.pkl").write_bytes(
            pickle.dumps({"info": CSL_ROWS, "gloss_map": {"a": [(1, 2)]}})
        )
    else:
        lines = [
            f"{i}|{r['name']}|4|{' '.join(r['label_gloss'])}|{' '.join(r['label_char'])}|x|x"
            for i, r in enumerate(CSL_ROWS)
        ]
        (tmp_path / "sentence_label/video_map.txt").write_text(
            "\n".join(["index|name|length|gloss|char|word|postag", *lines])
        )
    train, dev, *left = csl_daily.clips(tmp_path)
    assert (train.key, train.split, train.text, train.gloss, train.signer) == (
        "S000000_P0000_T00",
        "train",
        "今天天气很好,真的?",
        "今天 天气 好",
        "0",
    )
    assert (
        dev.split,
        dev.signer,
        encode(dev, EncodeOptions())[1]["fps"],
        len(list(dev.media.frames()[1])),
    ) == ("dev", "3", 30, 4)
    assert [(x.key, x.split, x.cause) for x in left] == [
        ("S000005_P0004_T00", "train", "is in the split file but has no label"),
        ("S000002_P0001_T00", "test", MISSING),
    ]


def test_names_of_csl_daily_without_a_split_or_with_an_unknown_one_are_left_out(tmp_path):
    csl_tree(tmp_path)
    split = tmp_path / "sentence_label/split_1.txt"
    split.write_text("name|split\nS000000_P0000_T00|trian\nS000001_P0003_T00|dev\n")
    (tmp_path / "sentence_label/csl2020ct_v2.pkl").write_bytes(pickle.dumps({"info": CSL_ROWS}))
    left = [x for x in csl_daily.clips(tmp_path) if isinstance(x, SkippedClip)]
    assert [(x.key, x.cause) for x in left] == [
        ("S000000_P0000_T00", "its split is none of train, dev, test"),
        ("S000002_P0001_T00", "has a label but is not in the split file"),
    ]


def test_different_labels_of_one_name_are_all_named(tmp_path):
    csl_tree(tmp_path)
    other = [{**row, "label_char": [*"不好"]} for row in CSL_ROWS[:2]]
    (tmp_path / "sentence_label/csl2020ct_v2.pkl").write_bytes(
        pickle.dumps({"info": [*CSL_ROWS, CSL_ROWS[2], *other]})
    )
    with pytest.raises(
        UserError,
        match=r"different labels have one name, .*: S000000_P0000_T00, S000001_P0003_T00$",
    ):
        list(csl_daily.clips(tmp_path))


def test_csl_daily_videos(tmp_path):
    csl_tree(tmp_path)
    (tmp_path / "sentence").rename(tmp_path / "elsewhere")
    (tmp_path / "sentence_label/csl2020ct_v2.pkl").write_bytes(pickle.dumps({"info": CSL_ROWS}))
    with pytest.raises(UserError, match="sentence-crop does not exist"):
        list(csl_daily.clips(tmp_path))
    (tmp_path / "sentence-crop").mkdir()
    with pytest.raises(UserError, match="no other clip has a video either"):
        list(csl_daily.clips(tmp_path))
    numbered(tmp_path / "sentence-crop/S000001_P0003_T00.mp4", 30, 6)
    (clip,) = (c for c in csl_daily.clips(tmp_path) if isinstance(c, Clip))
    assert clip.key == "S000001_P0003_T00" and numbers(clip.media) == list(range(6))


def how2sign_tree(root: Path, rows: list[str]) -> None:
    header = (
        "VIDEO_ID\tVIDEO_NAME\tSENTENCE_ID\tSENTENCE_NAME\tSTART_REALIGNED\tEND_REALIGNED\tSENTENCE"
    )
    for name in ("train", "val", "test"):
        (root / f"how2sign_realigned_{name}.csv").write_text(
            "\n".join([header, *(rows if name == "val" else [])]) + "\n"
        )


def test_how2sign(tmp_path, capsys):
    """Re-aligned times are cut from full videos of both rates; what lies behind a video's end is cut or left out, and said."""
    (tmp_path / "raw/val").mkdir(parents=True)
    numbered(tmp_path / "raw/val/-a.b-5-rgb_front.mp4", 24, 120)
    numbered(tmp_path / "raw/val/c-8-rgb_front.mp4", 30, 120)
    numbered(tmp_path / "raw/val/c_0-8-rgb_front.mp4", 30, 9)
    times = {
        "a_1": (2.0, 2.13, "-a.b-5"),
        "a_2": (4.9, 9.0, "-a.b-5"),
        "a_3": (5.5, 6, "-a.b-5"),
        "c_0": (0.97, 1.1, "c-8"),
        "c_1": (1, "x", "c-8"),
        "d_0": (0, 1, "d-1"),
    }
    how2sign_tree(
        tmp_path,
        [
            f"v\t{v}-rgb_front\ts\t{k}-8-rgb_front\t{a}\t{b}\tHe said \"hi. It's {k}"
            for k, (a, b, v) in times.items()
        ]
        + ["only\ttwo", ""],
    )
    a_1, a_2, a_3, c_0, *left = how2sign.clips(tmp_path, tmp_path / "raw", precut=False)
    assert (a_1.key, a_1.split, a_1.text) == ("a_1-8-rgb_front", "dev", "He said \"hi. It's a_1")
    assert (numbers(a_1.media), numbers(a_2.media), numbers(c_0.media)) == (
        [48, 49, 50, 51],
        [118, 119],
        [30, 31, 32],
    )
    assert (a_1.media.frames()[0], c_0.media.frames()[0]) == (24, 30)
    assert "dev: 1 sentences end after their video does" in capsys.readouterr().out
    assert a_3.cause == "begins at 5.50 s, and its video ends at 5.00 s"
    assert [x.cause for x in left] == [
        "its times are none: '1' to 'x'",
        MISSING,
        "has 2 fields, not 7",
    ]
    (clip,) = (
        c for c in how2sign.clips(tmp_path, tmp_path / "raw", precut=True) if isinstance(c, Clip)
    )
    assert clip.key == "c_0-8-rgb_front" and numbers(clip.media) == list(range(9))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no <VIDEO_NAME>\.mp4 of the tables"):
        list(how2sign.clips(tmp_path, tmp_path / "empty", precut=False))
    (tmp_path / "how2sign_realigned_test.csv").write_text("VIDEO_ID,VIDEO_NAME\n")
    with pytest.raises(UserError, match=r"realigned_test\.csv: the header is not"):
        list(how2sign.clips(tmp_path, tmp_path / "raw", precut=False))
    (tmp_path / "raw/train").mkdir()
    (tmp_path / "raw/train/c-8-rgb_front.mp4").write_bytes(b"another video of that name")
    with pytest.raises(
        UserError, match=r"train/c-8-rgb_front.mp4 and .*val/c-8-rgb_front.mp4 have one name"
    ):
        list(how2sign.clips(tmp_path, tmp_path / "raw", precut=False))


def test_how2sign_tool_says_which_times_it_used(tmp_path):
    how2sign_tree(tmp_path, ["v\tv-rgb_front\ts\tv_0-8-rgb_front\t0.5\t1\thello"])
    (tmp_path / "clips").mkdir()
    numbered(tmp_path / "clips/v_0-8-rgb_front.mp4", 30, 9)
    tool = [
        sys.executable,
        str(Path(__file__).parents[2] / "tools/make_shards.py"),
        "how2sign",
        str(tmp_path),
        f"--out={tmp_path / 'out'}",
    ]
    neither = subprocess.run(tool, capture_output=True, text=True)
    assert (
        neither.returncode == 2
        and "either --videos=DIR" in neither.stderr
        and neither.stderr.count("\n") == 1
    )
    done = subprocess.run(
        [*tool, f"--precut={tmp_path / 'clips'}", "--processes=1"], capture_output=True, text=True
    )
    assert "times: original" in done.stdout and "dev: 1 clips, 9 frames" in done.stdout, done.stderr
    assert json.loads((tmp_path / "out/dataset.json").read_text())["corpus"]["times"].startswith(
        "original"
    )


def test_isolated_signs_are_joined_into_sentences(tmp_path):
    (tmp_path / "words").mkdir()
    first = {name.lower(): 50 * i for i, name in enumerate(("Go", "Thank You", "not"))}
    for i, name in enumerate(("Go", "Thank You", "not")):
        numbered(tmp_path / f"words/{name}.mp4", 25, 10 + i, first=50 * i)
    sidecars(tmp_path / "words")
    tool = Path(__file__).parents[2] / "benchmarks/join_words.py"
    command = [
        sys.executable,
        str(tool),
        str(tmp_path / "words"),
        f"--out={tmp_path / 'joined'}",
        "--train=4",
        "--dev=3",
        "--test=40",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    clips = list(manifest.clips(tmp_path / "joined/clips.tsv", tmp_path / "joined"))
    assert [clip.split for clip in clips] == ["train"] * 4 + ["dev"] * 3 + ["test"] * 40 and len(
        {clip.text for clip in clips}
    ) > 5
    # As many long sentences in test as elsewhere, where a few belong to it.
    assert (
        sum(len(clip.text.replace("thank you", "thank_you").split()) > 2 for clip in clips[-40:])
        > 15
    )
    for clip in clips:
        shown, said = numbers(clip.media), clip.text.replace("thank you", "thank_you").split()
        lengths = {"go": 10, "thank_you": 11, "not": 12}
        assert shown == [
            first[word.replace("_", " ")] + i for word in said for i in range(lengths[word])
        ]
        assert (
            len(said) < 3
            or synthetic.split_of(tuple(word.replace("_", " ") for word in said)) == clip.split
        )  # in no other one
    for option, message in (
        ("--longest=two", "--longest: 'two' is not a whole number"),
        ("--train=-1", "is not a whole number"),
        ("--longest=0", "at least one word"),
    ):
        done = subprocess.run([*command, option], capture_output=True, text=True)
        assert done.returncode == 2 and message in done.stderr
    numbered(tmp_path / "words/go.mp4", 25, 3)
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "are videos of one word" in done.stderr
