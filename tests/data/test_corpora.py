import json
import subprocess
import sys
from pathlib import Path

import pytest
from videos import images, numbered, numbers, sidecars

from flallm.data.clips import MISSING, Clip, SkippedClip
from flallm.data.corpora import how2sign, manifest, phoenix14t, synthetic
from flallm.data.encode import EncodeOptions, encode
from flallm.utils import UserError


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
        if split == "test":  # rows that give no clip do not shift others
            missing = "gone|x|-1|-1|S|A|text\n../dev/11August_2010|x|-1|-1|S|A|text\n"
            row = f"{missing}{row}{name}|x|-1|-1|S|A| \nshort|x\n"
        (root / f"annotations/manual/PHOENIX-2014-T.{split}.corpus.csv").write_text(header + row)
        folder = root / "features/fullFrame-210x260px" / split / name
        images(folder / "1" if split == "dev" else folder)  # some trees still have the 1/
    train = root / "features/fullFrame-210x260px/train"
    (train / "01April_2010_Thursday_heute-6694/x.lprof").write_text("stray")
    rows = list(phoenix14t.clips(tmp_path / "PHOENIX-2014-T-release-v3"))
    clips = [row for row in rows if isinstance(row, Clip)]
    skipped = [row for row in rows if isinstance(row, SkippedClip)]
    causes = [MISSING, MISSING, "has no text", "has 2 fields, not 7"]
    assert [row.cause for row in skipped] == causes
    assert skipped[3].source.endswith("test.corpus.csv:6")
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


def test_hidden_videos_are_ignored(tmp_path):
    (tmp_path / "videos/.AppleDouble").mkdir(parents=True)
    (tmp_path / "videos/.AppleDouble/v-rgb_front.mp4").write_bytes(b"\0\5\x16\7")
    numbered(tmp_path / "videos/v-rgb_front.mp4", 24, 9)
    sidecars(tmp_path / "videos")
    how2sign_tree(tmp_path, ["v\tv-rgb_front\ts\tk\t0\t0.2\thello"])
    (clip,) = how2sign.clips(tmp_path, tmp_path / "videos", precut=False)
    assert numbers(clip.media) == [0, 1, 2, 3, 4]


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
    clip, *skipped = manifest.clips(table, tmp_path)
    assert (clip.key, clip.signer) == ("a_b_c", "3")
    assert [(x.key, x.cause) for x in skipped] == [
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


def how2sign_tree(root: Path, rows: list[str]) -> None:
    header = (
        "VIDEO_ID\tVIDEO_NAME\tSENTENCE_ID\tSENTENCE_NAME\tSTART_REALIGNED\tEND_REALIGNED\tSENTENCE"
    )
    for name in ("train", "val", "test"):
        (root / f"how2sign_realigned_{name}.csv").write_text(
            "\n".join([header, *(rows if name == "val" else [])]) + "\n"
        )


def test_how2sign(tmp_path, capsys):
    """Re-aligned times are cut from full videos of both rates.

    What lies after the end of a video is cut or left out, and the output says so.
    """
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
    a_1, a_2, a_3, c_0, *skipped = how2sign.clips(tmp_path, tmp_path / "raw", precut=False)
    assert (a_1.key, a_1.split, a_1.text) == ("a_1-8-rgb_front", "dev", "He said \"hi. It's a_1")
    assert (numbers(a_1.media), numbers(a_2.media), numbers(c_0.media)) == (
        [48, 49, 50, 51],
        [118, 119],
        [30, 31, 32],
    )
    assert (a_1.media.frames()[0], c_0.media.frames()[0]) == (24, 30)
    assert "dev: 1 sentences end after their video does" in capsys.readouterr().out
    assert a_3.cause == "begins at 5.50 s, and its video ends at 5.00 s"
    assert [x.cause for x in skipped] == [
        "its times are none: '1' to 'x'",
        MISSING,
        "has 2 fields, not 7",
    ]
    rows = how2sign.clips(tmp_path, tmp_path / "raw", precut=True)
    (clip,) = [row for row in rows if isinstance(row, Clip)]
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
    assert [clip.split for clip in clips] == ["train"] * 4 + ["dev"] * 3 + ["test"] * 40
    assert len({clip.text for clip in clips}) > 5

    def words_of(clip: Clip) -> tuple[str, ...]:
        words = clip.text.replace("thank you", "thank_you").split()
        return tuple(word.replace("_", " ") for word in words)

    # Long sentences are as frequent in test as elsewhere, although few belong to it.
    assert sum(len(words_of(clip)) > 2 for clip in clips[-40:]) > 15
    lengths = {"go": 10, "thank you": 11, "not": 12}
    for clip in clips:
        words = words_of(clip)
        expected = []
        for word in words:
            expected += range(first[word], first[word] + lengths[word])
        assert numbers(clip.media) == expected
        assert len(words) < 3 or synthetic.split_of(words) == clip.split
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
