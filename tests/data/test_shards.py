import contextlib
import hashlib
import io
import json
import os
import pty
import signal
import subprocess
import sys
import tarfile
import termios
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import webdataset
from every_frame import every_frame
from safetensors.numpy import load_file, save_file

from flallm.data.clips import Clip, SkippedClip
from flallm.data.corpora import synthetic
from flallm.data.encode import EncodeOptions, encode
from flallm.data.reader import BadSample, Shards, splits_of
from flallm.data.shards import make_shards
from flallm.data.transforms import centre_crop, decode, positions
from flallm.data.verify import verify
from flallm.data.video import VideoFile
from flallm.planning import doctor
from flallm.utils import UserError

TOOL = Path(__file__).parents[2] / "tools/make_shards.py"


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def test_shards_are_ordinary_webdataset(shards):
    """Read by plain webdataset, samples are as the contract says, and the index finds the same bytes."""
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
    subprocess.run([*command, f"--out={tmp_path / 'whole'}"], check=True, capture_output=True)
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
        with contextlib.suppress(OSError):  # once nobody holds the terminal any more
            while part := os.read(screen, 4096):
                drawn += part
    os.close(screen)
    assert b"32/32" in drawn
    left = digests(tmp_path / "killed")
    assert {k: v for k, v in left.items() if not k.endswith(".part")} == digests(tmp_path / "whole")


def test_parts_made_side_by_side_and_then_joined_are_the_same_bytes_as_in_one_go(tmp_path):
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(b"no video" * 100)
    clips = [
        *synthetic.clips(train=9, dev=3, test=1, size=36),
        Clip("bad", "train", "text", VideoFile(str(bad))),
    ]
    whole = make_shards(clips, tmp_path / "whole", EncodeOptions(per_shard=3), {"name": "test"}, 2)
    parts = [tmp_path / "parts", EncodeOptions(per_shard=3), {"name": "test"}, 1]
    with ThreadPoolExecutor(3) as threads:
        assert list(threads.map(lambda i: make_shards(clips, *parts, (i, 3)), range(3))) == [
            {},
            {},
            {},
        ]
    assert not (tmp_path / "parts/dataset.json").exists()
    made = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "parts").glob("*.tar")}
    assert make_shards(clips, *parts) == whole and [row["key"] for row in whole["left_out"]] == [
        "bad"
    ]
    assert digests(tmp_path / "parts") == digests(tmp_path / "whole")
    assert made == {
        p.name: p.stat().st_mtime_ns for p in (tmp_path / "parts").glob("*.tar")
    }  # joining made none again


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


def test_a_row_that_is_there_twice_is_kept_once_and_different_rows_of_one_key_are_all_named(
    tmp_path,
):
    first, second, third = synthetic.clips(train=3, dev=0, test=0, size=36)
    again = replace(first)  # equal, and not the same
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
            [*rows, replace(rows[2], text="other"), third],
            tmp_path / "clash",
            EncodeOptions(),
            {"name": "test"},
            1,
        )
    assert not (tmp_path / "clash").exists()


TABLE = "video\ttext\tsplit\tkey\n"


@pytest.fixture
def table(tmp_path):
    """Makes shards of a table, as a command: of good.mp4, which can be encoded, and of bad.mp4, which cannot."""
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
            "row 2: unknown split 'eval': use train (or training), dev (or development, val, valid, validation), test",
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
        "make_shards.py: split dev has no clip: its 3 rows are left out, 2 of them for this cause: its video or folder of images does not exist\n"
    )
    assert not (tmp_path / "out").exists()
    rows = ("good.mp4 x train", "bad.mp4 x dev", "bad.mp4 x dev")
    bad = table(*rows)
    assert (
        bad.returncode == 2
        and "split dev has no clip: its 2 rows are left out, 2 of them for this cause: cannot be decoded"
        in bad.stderr
    )
    assert not (tmp_path / "out/dataset.json").exists()
    (tmp_path / "bad.mp4").write_bytes((tmp_path / "good.mp4").read_bytes())
    assert (
        table(*rows).returncode == 0 and len(Shards(tmp_path / "out", "dev")) == 2
    )  # the same command, once the file is mended


def test_shards_with_a_split_without_clips_are_refused_before_they_are_used(copied, small, flallm):
    """Such as older versions made."""
    empty = {
        name: column[:0] for name, column in load_file(copied / "test.index.safetensors").items()
    }
    save_file(empty, copied / "train.index.safetensors")
    dataset = json.loads((copied / "dataset.json").read_text())
    dataset["splits"]["train"] = {"clips": 0, "frames": 0, "shard_bytes": []}
    dataset["left_out"] = [
        {"key": "a", "split": "train", "source": "a.mp4", "cause": "cannot be decoded: x"}
    ]
    (copied / "dataset.json").write_text(json.dumps(dataset))
    line = f"{copied}: split train has no clip: its 1 rows are left out, 1 of them for this cause: cannot be decoded: x: make the shards again"
    verified = subprocess.run(
        [sys.executable, TOOL, "verify", copied], capture_output=True, text=True
    )
    assert (verified.returncode, verified.stdout) == (2, "") and line in verified.stderr
    states = {
        what: (state, said)
        for state, what, said in doctor._shards(small("stage1", {"data.shards": str(copied)}))
    }
    assert (
        states["data: train"][0] == "MISS"
        and line in states["data: train"][1]
        and states["data: dev"][0] == "OK"
    )
    for recipe in (
        "demo",
        "phoenix14t",
    ):  # lengths that are published do not stand in for shards that are there
        planned = flallm(
            "plan",
            recipe,
            "--world_size=1",
            "--stage=stage1",
            f"--data.shards={copied}",
            cwd=copied,
        )
        assert (
            planned.returncode == 2 and line in planned.stderr and planned.stderr.count("\n") == 1
        )
    dataset["splits"] = {}
    (copied / "dataset.json").write_text(json.dumps(dataset))
    with pytest.raises(UserError, match="it has no split"):
        splits_of(copied)


def test_other_options_in_the_same_folder_are_refused(shards):
    with pytest.raises(UserError, match="other options"):
        make_shards(
            synthetic.clips(train=24, dev=8, test=7, size=36),
            shards,
            EncodeOptions(crf=30, per_shard=10),
            {"name": "synthetic"},
        )


@pytest.fixture
def copied(shards, tmp_path) -> Path:
    """The corpus's dev and test splits, to be spoilt."""
    for path in shards.iterdir():
        if not path.name.startswith("train"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    dataset = json.loads((tmp_path / "dataset.json").read_text())
    del dataset["splits"]["train"]
    (tmp_path / "dataset.json").write_text(json.dumps(dataset))
    return tmp_path


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_an_altered_shard_is_noticed(copied):
    shard = copied / "dev-000000.tar"
    flip(shard, Shards(copied, "dev").index["video_offset"][0] + 500)
    dev = Shards(copied, "dev")
    with pytest.raises(BadSample, match="altered"):
        dev.read(0)
    assert dev.read(1)
    shard.unlink()
    with pytest.raises(BadSample, match="No such file"):
        dev.read(1)


def spoil(folder: Path, what: str) -> None:
    shard, index = folder / "dev-000000.tar", folder / "dev.index.safetensors"
    match what:
        case "missing shard":
            shard.unlink()
        case "short shard":
            os.truncate(shard, shard.stat().st_size - 1)
        case "long shard":
            shard.write_bytes(shard.read_bytes() + b"\0")
        case "missing index":
            index.unlink()
        case "short index":
            os.truncate(index, index.stat().st_size // 2)
        case "index of another split":
            index.write_bytes((folder / "test.index.safetensors").read_bytes())
        case "no index":
            index.write_text("{}")
        case "missing dataset.json":
            (folder / "dataset.json").unlink()
        case "no dataset.json":
            (folder / "dataset.json").write_text("[]")


@pytest.mark.parametrize(
    "what,said",
    [
        ("missing shard", r"dev-000000.tar is missing: make it again"),
        ("short shard", r"dev-000000.tar is cut short or altered: make it again"),
        ("long shard", r"dev-000000.tar is cut short or altered: make it again"),
        ("missing index", r"dev.index.safetensors is no index of shards .*No such file"),
        ("short index", r"dev.index.safetensors is no index of shards"),
        ("index of another split", r"dev.index.safetensors has 7 samples, dataset.json says 8"),
        ("no index", r"dev.index.safetensors is no index of shards"),
        ("missing dataset.json", r"holds no finished shards"),
        ("no dataset.json", r"dataset.json cannot be read"),
    ],
)
def test_shards_that_are_not_whole_are_refused_in_one_line_when_they_are_opened(copied, what, said):
    spoil(copied, what)
    with pytest.raises(UserError, match=said) as caught:
        Shards(copied, "dev")
    assert "\n" not in str(caught.value)


def rewrite(shard: Path, change) -> None:
    """Writes a tar anew, member by member, each through `change(tar, number, member, content)`, in the size it had."""
    with tarfile.open(shard) as tar:
        members = [(member, tar.extractfile(member).read()) for member in tar]
    size = shard.stat().st_size
    with tarfile.open(shard, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number, (member, content) in enumerate(members):
            change(tar, number, member, content)
    shard.write_bytes(shard.read_bytes()[:size].ljust(size, b"\0"))


def alter(folder: Path, what: str) -> None:
    """Things that are there when the shards are opened, and only come out when they are read."""
    shard = folder / "dev-000000.tar"
    last = 15  # of 8 samples' files

    def change(tar, number, member, content):
        if what == "renamed member" and number == 1:
            member.name = "../" + member.name
        if (
            what == "member is a link" and number == last
        ):  # over the same bytes, which the tar then holds as padding
            member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(member, io.BytesIO(content))
        if what == "extra member" and number == last:
            tar.addfile(tarfile.TarInfo("extra.json"))

    match what:
        case "flipped byte":
            flip(shard, int(Shards(folder, "dev").index["video_offset"][3]) + 500)
        case "no tar":
            flip(shard, 3)
        case _:
            rewrite(shard, change)


@pytest.mark.parametrize(
    "what,said",
    [
        ("flipped byte", ["sample 3 is not what the index says"]),
        ("renamed member", ["member 1 is not the file the index says: the tar was changed"]),
        ("extra member", ["member 16 is not the file the index says: the tar was changed"]),
        ("member is a link", ["member 15 is not the file the index says: the tar was changed"]),
        ("no tar", ["no readable tar"]),
    ],
)
def test_verify_finds_what_is_wrong(copied, what, said):
    alter(copied, what)
    lines = list(verify(copied, ["dev"], 1))
    assert len(lines) == len(said) and all(part in line for part, line in zip(said, lines)), lines


def test_verify_finds_frames_that_are_not_those_of_the_index(copied):
    """Of a data set whose maker was wrong: every checksum fits."""
    path = copied / "dev.index.safetensors"
    rows = load_file(path)
    rows["frames"][2] += 1
    save_file(rows, path)
    (line,) = verify(copied, ["dev"], 1)
    assert "sample 2 has" in line and "by the index" in line


def test_verify_is_a_command_with_exit_codes(copied):
    command = [sys.executable, TOOL, "verify", copied]
    good = subprocess.run([*command, "--split=test"], capture_output=True, text=True)
    assert (good.returncode, good.stdout) == (0, "all samples are as the index says\n")
    flip(copied / "dev-000000.tar", int(Shards(copied, "dev").index["json_offset"][0]))
    bad = subprocess.run(command, capture_output=True, text=True)
    assert (
        bad.returncode == 1
        and "sample 0 is not what the index says" in bad.stdout
        and bad.stdout.endswith("1 problems\n")
    )
    spoil(copied, "missing shard")
    gone = subprocess.run(command, capture_output=True, text=True)
    assert (
        gone.returncode == 2
        and gone.stderr.count("\n") == 1
        and "dev-000000.tar is missing" in gone.stderr
    )


class Images:
    """A video of RGB images (H, W, 3)."""

    source = "test"

    def __init__(self, images: list[np.ndarray]):
        self.images = images

    def frames(self):
        return Fraction(25), (
            (i / 25, av.VideoFrame.from_ndarray(image, "rgb24"))
            for i, image in enumerate(self.images)
        )


def test_a_model_sees_red_green_and_blue_in_this_order_and_the_middle_of_the_frame():
    image = np.zeros((48, 64, 3), np.uint8)
    image[:, :, 1] = 255  # green around, 8 wide; inside red at the left and blue at the right
    image[8:-8, 8:32], image[8:-8, 32:-8] = (255, 0, 0), (0, 0, 255)
    data, meta = encode(Clip("k", "train", "t", Images([image])), EncodeOptions())
    (whole,) = frames = decode(
        data, 48, 4, 300, meta["num_frames"]
    )  # squeezed: 8 of 64 columns are 6 of 48
    (middle,) = centre_crop(frames, 30)
    assert whole.shape == (48, 48, 3) and middle.shape == (30, 30, 3)
    for part, colour in (
        (whole[:6, :4], 1),
        (whole[-6:, -4:], 1),
        (middle[:, :13], 0),
        (middle[:, -13:], 2),
    ):
        assert (part.argmax(-1) == colour).all() and part[..., colour].min() > 150


@pytest.mark.parametrize("frames", [1, 2, 4, 5, 38, 97, 200])
def test_reference_frames_are_every_fourth_frame(frames):
    """Passing over frames between reference frames gives the same pixels as decoding all and keeping every 4th."""
    image = (
        np.random.default_rng(frames)
        .integers(0, 255, (4, 4, 3), np.uint8)
        .repeat(16, 0)
        .repeat(16, 1)
    )
    data, meta = encode(
        Clip("k", "train", "t", Images([np.roll(image, i, 1) for i in range(frames)])),
        EncodeOptions(),
    )
    assert meta["num_frames"] == frames
    assert np.array_equal(decode(data, 48, 4, 300, frames), every_frame(data, 48, 4, 300))


def test_a_fitting_file_is_copied_and_a_large_one_made_smaller(tmp_path):
    *_, clip = synthetic.clips(train=3, dev=0, test=0, size=64)  # five signs: nearly three seconds
    data, _ = encode(clip, EncodeOptions())
    path = tmp_path / "clip.mp4"
    path.write_bytes(data)
    assert encode(Clip("k", "train", "t", VideoFile(str(path))), EncodeOptions())[0] == data
    _, meta = encode(
        Clip("k", "train", "t", VideoFile(str(path))), EncodeOptions(short_side=32, fps=12.5)
    )
    assert (meta["width"], meta["height"], meta["fps"]) == (32, 32, 12.5)
    for option, value in (("short_side", 32), ("fps", 12.5)):  # one alone is enough
        _, meta = encode(
            Clip("k", "train", "t", VideoFile(str(path))), EncodeOptions(**{option: value})
        )
        assert meta[{"short_side": "height"}.get(option, option)] == value
    _part, meta = encode(Clip("k", "train", "t", VideoFile(str(path), 0.4, 0.8)), EncodeOptions())
    assert meta["num_frames"] == 10


def test_quality_and_keyframes_are_those_of_the_options():
    *_, clip = synthetic.clips(train=3, dev=0, test=0, size=64)
    sizes = [len(encode(clip, EncodeOptions(crf=crf))[0]) for crf in (12, 22, 32)]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 1.5 * sizes[2]
    with av.open(io.BytesIO(encode(clip, EncodeOptions(gop=8))[0])) as container:
        keyframes = [i for i, frame in enumerate(container.decode(video=0)) if frame.key_frame]
    assert keyframes == list(range(0, 8 * len(keyframes), 8)) and len(keyframes) > 4


def test_a_clip_of_shards_that_other_tools_wrote_anew_is_encoded_again(tmp_path):
    """They keep its mark, which promises a loader that it may pass over frames."""
    *_, clip = synthetic.clips(train=3, dev=0, test=0, size=64)
    (tmp_path / "ours.mp4").write_bytes(encode(clip, EncodeOptions())[0])
    path = tmp_path / "theirs.mp4"
    with av.open(str(tmp_path / "ours.mp4")) as ours, av.open(str(path), "w") as theirs:
        theirs.metadata.update(ours.metadata)
        stream = theirs.add_stream("libx264", 25, width=64, height=64, pix_fmt="yuv420p")
        frames = list(ours.decode(video=0))
        for frame in frames:
            frame.pict_type = 0
            theirs.mux(stream.encode(frame))
        theirs.mux(stream.encode())
    with pytest.raises(ValueError, match="frames decode"):
        decode(str(path), 48, 4, 300, len(frames))
    data, meta = encode(Clip("k", "train", "t", VideoFile(str(path))), EncodeOptions())
    assert len(decode(data, 48, 4, 300, meta["num_frames"])) == -(-len(frames) // 4)


def test_positions_keep_every_fourth_frame_and_thin_out_long_clips():
    assert positions(10, 4, 300).tolist() == [0, 4, 8]
    long = positions(2000, 4, 300)
    assert len(long) == 75 and long[0] == 0 and long[-1] == 1996 and (np.diff(long) > 0).all()
