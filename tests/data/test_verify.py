import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from flallm.data.reader import BadSample, Shards, splits_of
from flallm.data.verify import verify
from flallm.planning import doctor
from flallm.utils import UserError

TOOL = Path(__file__).parents[2] / "tools/make_shards.py"


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
    line = (
        f"{copied}: split train has no clip: its 1 rows are left out, 1 of them for this cause: "
        "cannot be decoded: x: make the shards again"
    )
    verified = subprocess.run(
        [sys.executable, TOOL, "verify", copied], capture_output=True, text=True
    )
    assert (verified.returncode, verified.stdout) == (2, "") and line in verified.stderr
    config = small("stage1", {"data.shards": str(copied)})
    states = {name: (state, text) for state, name, text in doctor._shards(config)}
    state, text = states["data: train"]
    assert state == "MISS" and line in text
    assert states["data: dev"][0] == "OK"
    # Published lengths do not replace shards that exist.
    options = ["--world_size=1", "--stage=stage1", f"--data.shards={copied}"]
    for recipe in ("demo", "phoenix14t"):
        planned = flallm("plan", recipe, *options, cwd=copied)
        assert planned.returncode == 2
        assert line in planned.stderr and planned.stderr.count("\n") == 1
    dataset["splits"] = {}
    (copied / "dataset.json").write_text(json.dumps(dataset))
    with pytest.raises(UserError, match="it has no split"):
        splits_of(copied)


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


def spoil(folder: Path, damage: str) -> None:
    shard, index = folder / "dev-000000.tar", folder / "dev.index.safetensors"
    match damage:
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
    "damage,message",
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
def test_damaged_shards_are_refused_in_one_line_when_they_are_opened(copied, damage, message):
    spoil(copied, damage)
    with pytest.raises(UserError, match=message) as caught:
        Shards(copied, "dev")
    assert "\n" not in str(caught.value)


def rewrite(shard: Path, change) -> None:
    """Writes a tar again in the same size, each member by change(tar, number, member, content)."""
    with tarfile.open(shard) as tar:
        members = [(member, tar.extractfile(member).read()) for member in tar]
    size = shard.stat().st_size
    with tarfile.open(shard, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number, (member, content) in enumerate(members):
            change(tar, number, member, content)
    shard.write_bytes(shard.read_bytes()[:size].ljust(size, b"\0"))


def alter(folder: Path, damage: str) -> None:
    """Things that are there when the shards are opened, and only come out when they are read."""
    shard = folder / "dev-000000.tar"
    last = 15  # of 8 samples' files

    def change(tar, number, member, content):
        if damage == "renamed member" and number == 1:
            member.name = "../" + member.name
        if (
            damage == "member is a link" and number == last
        ):  # over the same bytes, which the tar then holds as padding
            member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(member, io.BytesIO(content))
        if damage == "extra member" and number == last:
            tar.addfile(tarfile.TarInfo("extra.json"))

    match damage:
        case "flipped byte":
            flip(shard, int(Shards(folder, "dev").index["video_offset"][3]) + 500)
        case "no tar":
            flip(shard, 3)
        case _:
            rewrite(shard, change)


@pytest.mark.parametrize(
    "damage,messages",
    [
        ("flipped byte", ["sample 3 is not what the index says"]),
        ("renamed member", ["member 1 is not the file the index says: the tar was changed"]),
        ("extra member", ["member 16 is not the file the index says: the tar was changed"]),
        ("member is a link", ["member 15 is not the file the index says: the tar was changed"]),
        ("no tar", ["no readable tar"]),
    ],
)
def test_verify_finds_damage(copied, damage, messages):
    alter(copied, damage)
    lines = list(verify(copied, ["dev"], 1))
    assert len(lines) == len(messages), lines
    for message, line in zip(messages, lines):
        assert message in line


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
