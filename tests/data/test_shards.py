import contextlib
import hashlib
import json
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import webdataset

from flallm.data.clips import Clip, SkippedClip
from flallm.data.corpora import synthetic
from flallm.data.encode import EncodeOptions, encode
from flallm.data.reader import Shards, splits_of
from flallm.data.shards import make_shards
from flallm.data.video import VideoFile
from flallm.utils import UserError

TOOL = Path(__file__).parents[2] / "tools/make_shards.py"


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def test_shards_are_ordinary_webdataset(shards):
    """Plain webdataset reads the samples of the contract, and the index finds the same bytes."""
    ours = Shards(shards, "train")
    for i, sample in enumerate(
        webdataset.WebDataset(
            [str(p) for p in sorted(shards.glob("train-*.tar"))], shardshuffle=False
        )
    ):
        meta = json.loads(sample["json"])
        assert {
            "key",
            "text",
            "gloss",
            "signer",
            "num_frames",
            "fps",
            "width",
            "height",
            "source",
        } == set(meta)
        assert sample["__key__"] == meta["key"] and "." not in meta["key"]
        assert ours.read(i) == (sample["mp4"], meta)
        assert (ours.index["frames"][i], ours.index["text_length"][i]) == (
            meta["num_frames"],
            len(meta["text"]),
        )
    assert i + 1 == len(ours) == 24
    assert {p.stat().st_mode & 0o777 for p in shards.glob("*.index.safetensors")} == {
        0o644
    }  # for all who share a cluster


def test_a_killed_run_resumes_to_equal_bytes_on_a_terminal_too(tmp_path):
    command = [
        sys.executable,
        TOOL,
        "synthetic",
        "--train=24",
        "--dev=4",
        "--test=4",
        "--size=36",
        "--per_shard=4",
    ]
    subprocess.run(
        [*command, f"--out={tmp_path / 'uninterrupted'}"], check=True, capture_output=True
    )
    killed = subprocess.Popen(
        [*command, f"--out={tmp_path / 'killed'}"],
        start_new_session=True,
        stdout=subprocess.DEVNULL,
    )
    while not list((tmp_path / "killed").glob("train-*.tar")):
        assert killed.poll() is None
        time.sleep(0.01)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "killed/dataset.json").exists()
    screen, terminal = pty.openpty()  # where a progress bar is drawn, here at every clip
    termios.tcsetwinsize(terminal, (24, 80))
    with subprocess.Popen(
        [*command, f"--out={tmp_path / 'killed'}"],
        stdout=subprocess.DEVNULL,
        stderr=terminal,
        env=os.environ | {"TQDM_MININTERVAL": "0"},
    ):
        os.close(terminal)
        drawn = b""
        with contextlib.suppress(OSError):  # when the command closes the terminal
            while part := os.read(screen, 4096):
                drawn += part
    os.close(screen)
    assert b"32/32" in drawn
    resumed = digests(tmp_path / "killed")
    resumed = {name: digest for name, digest in resumed.items() if not name.endswith(".part")}
    assert resumed == digests(tmp_path / "uninterrupted")


def test_parts_written_in_parallel_and_then_joined_are_the_bytes_of_one_run(tmp_path):
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(b"no video" * 100)
    clips = [
        *synthetic.clips(train=9, dev=3, test=1, size=36),
        Clip("bad", "train", "text", VideoFile(str(bad))),
    ]
    options, out = EncodeOptions(per_shard=3), tmp_path / "parts"
    dataset = make_shards(clips, tmp_path / "single", options, {"name": "test"}, 2)
    assert [row["key"] for row in dataset["left_out"]] == ["bad"]

    def make(part: tuple[int, int] = (0, 1)) -> dict:
        return make_shards(clips, out, options, {"name": "test"}, 1, part)

    def times() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}

    with ThreadPoolExecutor(3) as threads:
        assert list(threads.map(make, [(0, 3), (1, 3), (2, 3)])) == [{}, {}, {}]
    assert not (out / "dataset.json").exists()
    before = times()
    assert make() == dataset
    assert digests(out) == digests(tmp_path / "single")
    assert times() == before  # joining writes no shard again


def test_a_clip_that_cannot_be_decoded_is_left_out_and_named(tmp_path):
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(b"no video" * 100)
    good = next(synthetic.clips(train=1, dev=0, test=0, size=36))
    clips = [
        good,
        Clip("bad", "train", "text", VideoFile(str(bad))),
        SkippedClip("mute", "train", "x.mp4", "has no text"),
    ]
    dataset = make_shards(clips, tmp_path / "out", EncodeOptions(), {"name": "test"}, processes=1)
    assert dataset["splits"]["train"]["clips"] == 1
    causes = {row["key"]: row["cause"] for row in dataset["left_out"]}
    assert (
        set(causes) == {"bad", "mute"}
        and causes["mute"] == "has no text"
        and "cannot be decoded" in causes["bad"]
    )


def test_a_repeated_row_is_kept_once(tmp_path):
    first, second = synthetic.clips(train=2, dev=0, test=0, size=36)
    again = replace(first)  # equal, and not the same object
    dataset = make_shards(
        [first, second, again, replace(first, split="dev")],
        tmp_path / "out",
        EncodeOptions(),
        {"name": "test"},
        1,
    )
    assert dataset["splits"]["train"]["clips"] == 2 and dataset["splits"]["dev"]["clips"] == 1
    assert dataset["left_out"] == [
        {
            "key": first.key,
            "split": "train",
            "source": first.media.source,
            "cause": "is there twice: a row before it is equal",
        }
    ]


def test_different_rows_with_one_key_are_all_named(tmp_path):
    videos = [VideoFile(f"{name}.mp4") for name in "xyz"]
    rows = [
        Clip("a_b", "train", "text", videos[0]),
        Clip("a_b", "train", "text", videos[1]),
        Clip("c", "dev", "text", videos[2]),
    ]
    with pytest.raises(
        UserError, match=r"one key, .*: train 'a_b' \(x.mp4, y.mp4\); dev 'c' \(z.mp4\)$"
    ):
        make_shards(
            [*rows, replace(rows[2], text="other")],
            tmp_path / "clash",
            EncodeOptions(),
            {"name": "test"},
            1,
        )
    assert not (tmp_path / "clash").exists()


TABLE = "video\ttext\tsplit\tkey\n"


@pytest.fixture
def table(tmp_path):
    """A command that makes shards of good.mp4, which can be encoded, and bad.mp4, which cannot."""
    (tmp_path / "good.mp4").write_bytes(
        encode(next(synthetic.clips(train=1, dev=0, test=0, size=36)), EncodeOptions())[0]
    )
    (tmp_path / "bad.mp4").write_bytes(b"no video" * 100)

    def make(*rows: str) -> subprocess.CompletedProcess:
        lines = [f"{row.replace(' ', chr(9))}\t{number}" for number, row in enumerate(rows)]
        (tmp_path / "clips.tsv").write_text(TABLE + "\n".join(lines), encoding="utf-8")
        return subprocess.run(
            [sys.executable, TOOL, "manifest", tmp_path / "clips.tsv", f"--out={tmp_path / 'out'}"],
            capture_output=True,
            text=True,
        )

    return make


def test_usual_names_of_splits_are_taken_and_others_refused_before_a_clip_is_encoded(
    table, tmp_path
):
    for rows, said in (
        (
            ("good.mp4 x train", "good.mp4 x eval"),
            "row 2: unknown split 'eval': use train (or training), dev (or development, val, "
            "valid, validation), test",
        ),
        (
            ("good.mp4 x train", "good.mp4 x val", "good.mp4 x dev"),
            "the splits val and dev would both be dev: give them one name",
        ),
    ):
        refused = table(*rows)
        assert (refused.returncode, refused.stderr.count("\n")) == (2, 1) and said in refused.stderr
        assert not (tmp_path / "out").exists()
    made = table(
        "good.mp4 x Train", "good.mp4 x TRAIN", "good.mp4 x Validation", "good.mp4 x testing"
    )
    assert made.returncode == 0, made.stderr
    assert (
        splits_of(tmp_path / "out") == ["train", "dev", "test"]
        and len(Shards(tmp_path / "out", "train")) == 2
    )
    with pytest.raises(UserError, match="unknown split 'dve', 'tets': use train"):
        make_shards(
            [Clip(s, s, "text", VideoFile("x.mp4")) for s in ("train", "dve", "tets")],
            tmp_path / "other",
            EncodeOptions(),
            {"name": "test"},
            1,
        )


def test_a_split_of_which_no_clip_is_left_is_refused(table, tmp_path):
    gone = table("good.mp4 x train", "gone.mp4 x dev", "gone.mp4 x dev", "good.mp4  dev")
    assert gone.returncode == 2 and gone.stderr == (
        "make_shards.py: split dev has no clip: its 3 rows are left out, 2 of them for this cause: "
        "its video or folder of images does not exist\n"
    )
    assert not (tmp_path / "out").exists()
    rows = ("good.mp4 x train", "bad.mp4 x dev", "bad.mp4 x dev")
    bad = table(*rows)
    assert bad.returncode == 2
    cause = "its 2 rows are left out, 2 of them for this cause: cannot be decoded"
    assert f"split dev has no clip: {cause}" in bad.stderr
    assert not (tmp_path / "out/dataset.json").exists()
    (tmp_path / "bad.mp4").write_bytes((tmp_path / "good.mp4").read_bytes())
    assert (
        table(*rows).returncode == 0 and len(Shards(tmp_path / "out", "dev")) == 2
    )  # the same command, once the file is mended


def test_other_options_in_the_same_folder_are_refused(shards):
    with pytest.raises(UserError, match="other options"):
        make_shards(
            synthetic.clips(train=24, dev=8, test=7, size=36),
            shards,
            EncodeOptions(crf=30, per_shard=10),
            {"name": "synthetic"},
        )
