import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import webdataset

from flallm import UserError, video
from flallm.corpora import Clip, LeftOut, VideoFile, synthetic
from flallm.encode import Options, encode
from flallm.shards import BadSample, Shards, make_shards

TOOL = Path(__file__).parents[1] / "tools/make_shards.py"


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def test_shards_are_ordinary_webdataset(shards):
    """Read by plain webdataset, samples are as the contract says, and the index finds the same bytes."""
    ours = Shards(shards, "train")
    for i, sample in enumerate(webdataset.WebDataset([str(p) for p in sorted(shards.glob("train-*.tar"))], shardshuffle=False)):
        meta = json.loads(sample["json"])
        assert {"key", "text", "gloss", "signer", "num_frames", "fps", "width", "height", "source"} == set(meta)
        assert sample["__key__"] == meta["key"] and "." not in meta["key"]
        assert ours.read(i) == (sample["mp4"], meta)
    assert i + 1 == len(ours) == 24


def test_a_killed_run_resumes_to_equal_bytes(tmp_path):
    command = [sys.executable, TOOL, "synthetic", "--train=24", "--dev=4", "--test=4", "--size=36", "--per_shard=4"]
    subprocess.run([*command, f"--out={tmp_path / 'whole'}"], check=True, capture_output=True)
    killed = subprocess.Popen([*command, f"--out={tmp_path / 'killed'}"], start_new_session=True, stdout=subprocess.DEVNULL)
    while not list((tmp_path / "killed").glob("train-*.tar")):
        time.sleep(0.01)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "killed/dataset.json").exists()
    subprocess.run([*command, f"--out={tmp_path / 'killed'}"], check=True, capture_output=True)
    left = digests(tmp_path / "killed")
    assert {k: v for k, v in left.items() if not k.endswith(".part")} == digests(tmp_path / "whole")


def test_a_clip_that_cannot_be_decoded_is_left_out_and_named(tmp_path):
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(b"no video" * 100)
    good = next(synthetic.clips(train=1, dev=0, test=0, size=36))
    clips = [good, Clip("bad", "train", "text", VideoFile(str(bad))), LeftOut("mute", "train", "x.mp4", "has no text")]
    dataset = make_shards(clips, tmp_path / "out", Options(), {"name": "test"}, processes=1)
    assert dataset["splits"]["train"]["clips"] == 1
    causes = {row["key"]: row["cause"] for row in dataset["left_out"]}
    assert set(causes) == {"bad", "mute"} and causes["mute"] == "has no text" and "cannot be decoded" in causes["bad"]


def test_other_options_in_the_same_folder_are_refused(shards):
    with pytest.raises(UserError, match="other options"):
        make_shards(synthetic.clips(train=24, dev=8, test=7, size=36), shards, Options(crf=30, per_shard=10), {"name": "synthetic"})


def test_an_altered_shard_is_noticed(shards, tmp_path):
    for path in shards.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    shard = tmp_path / "dev-000000.tar"
    content = bytearray(shard.read_bytes())
    content[Shards(tmp_path, "dev").index["video_offset"][0] + 500] ^= 1
    shard.write_bytes(content)
    dev = Shards(tmp_path, "dev")
    with pytest.raises(BadSample, match="altered"):
        dev.read(0)
    shard.unlink()
    with pytest.raises(BadSample, match="No such file"):
        dev.read(1)
    with pytest.raises(UserError, match="is missing"):
        Shards(tmp_path, "dev")


@pytest.mark.parametrize("frames", [1, 2, 4, 5, 38, 97, 200])
def test_reference_frames_are_every_fourth_frame(frames):
    """Passing over frames between reference frames gives the same pixels as decoding all and keeping every 4th."""
    images = np.random.default_rng(frames).integers(0, 255, (4, 4, 3), np.uint8).repeat(16, 0).repeat(16, 1)

    class Moving:
        source = "test"

        def frames(self):
            return Fraction(25), (av.VideoFrame.from_ndarray(np.roll(images, i, 1), "rgb24") for i in range(frames))

    clip = Clip("k", "train", "t", Moving())
    data, meta = encode(clip, Options())
    assert meta["num_frames"] == frames
    assert np.array_equal(video.decode(data, 48, 4, 300, frames), video.decode(data, 48, 4, 300))


def test_a_fitting_file_is_copied_and_a_large_one_made_smaller(tmp_path):
    *_, clip = synthetic.clips(train=3, dev=0, test=0, size=64)  # five signs: nearly three seconds
    data, _ = encode(clip, Options())
    path = tmp_path / "clip.mp4"
    path.write_bytes(data)
    assert encode(Clip("k", "train", "t", VideoFile(str(path))), Options())[0] == data
    _, meta = encode(Clip("k", "train", "t", VideoFile(str(path))), Options(short_side=32, fps=12.5))
    assert (meta["width"], meta["height"], meta["fps"]) == (32, 32, 12.5)
    _part, meta = encode(Clip("k", "train", "t", VideoFile(str(path), 0.4, 0.8)), Options())
    assert meta["num_frames"] == 10


def test_positions_keep_every_fourth_frame_and_thin_out_long_clips():
    assert video.positions(10, 4, 300).tolist() == [0, 4, 8]
    long = video.positions(2000, 4, 300)
    assert len(long) == 75 and long[0] == 0 and long[-1] == 1996 and (np.diff(long) > 0).all()
