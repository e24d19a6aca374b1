"""Features in place of video: the same on any number of ranks and after restarts, equal losses."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from flallm.data import decoding as decoder
from flallm.data import shards
from flallm.data.dataset import ClipDataset
from flallm.data.reader import BadSample, Shards
from flallm.data.tokenizer import TranslationTokenizer
from flallm.data.verify import verify
from flallm.distributed.context import init_distributed
from flallm.distributed.launch import spawn
from flallm.evaluation import decode
from flallm.inference import features as features_module
from flallm.inference.features import about, features
from flallm.model.translator import Translator
from flallm.training.train import train
from flallm.utils import UserError


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def two_ranks(config, out: Path) -> None:
    ranks = init_distributed()
    train(config, out / "stage1", ranks)
    features(out / "stage1", out / "two", ranks, "fp32", 2)


def one_rank(config, stage2, out: Path) -> None:
    ranks = init_distributed()
    write_and_resume(out, ranks)
    compare_losses(config, stage2, out, ranks)
    train_on_features(config, stage2, out, ranks)
    refuse_other_features(stage2, out, ranks)


def write_and_resume(out: Path, ranks) -> None:
    """A full disk stops the first try; the same command completes the same files."""
    write_tar = features_module.write_tar

    def full_disk(path, *args):
        if path.name == "train-000001.tar":
            raise OSError("no space left")
        write_tar(path, *args)

    features_module.write_tar = full_disk
    with pytest.raises(OSError):
        features(out / "stage1", out / "one", ranks, "fp32", 2)
    features_module.write_tar = write_tar
    message = "holds shards made of other clips or with other options"
    with pytest.raises(UserError, match=message):
        features(out / "stage1", out / "one", ranks, "bf16", 2)
    features(out / "stage1", out / "one", ranks, "fp32", 2)
    assert contents(out / "one") == contents(out / "two")
    assert Shards(out / "one", "train").corpus == {"name": "synthetic"}
    assert list(verify(str(out / "one"), ["train", "dev", "test"], 1)) == []
    features(out / "stage1", out / "bf16", ranks, "bf16", 0)


def compare_losses(config, stage2, out: Path, ranks) -> None:
    model, _ = decode.load_run(out / "stage1", ranks.device)

    def batch(run, samples):
        return ClipDataset("train", run.data, config.seed).batch(model.text, samples)

    with torch.no_grad():
        # Video of epochs 0 and 1 beside their copies; epoch 3 reads the copy of epoch 1.
        for video_epoch, epoch, clip in (
            (None, None, 0),
            (None, None, 5),
            (0, 0, 3),
            (1, 1, 3),
            (1, 3, 3),
        ):
            video = batch(config, [(video_epoch, clip)])
            cached = batch(stage2["fp32"], [(epoch, clip)])
            assert cached.frames.ndim == 2
            assert torch.allclose(model(video)[0], model(cached)[0], rtol=1e-5, atol=0)
        group = [(None, clip) for clip in range(4)]
        runs = (config, stage2["fp32"], stage2["bf16"])
        video, fp32, bf16 = (float(model(batch(run, group))[0]) for run in runs)
    assert fp32 == pytest.approx(video, rel=1e-5)
    assert bf16 == pytest.approx(video, rel=1e-2)


def train_on_features(config, stage2, out: Path, ranks) -> None:
    for name, run in stage2.items():
        train(run, out / f"stage2-{name}", ranks, out / "stage1")
    scores = decode.evaluate(out / "stage2-bf16", "test", ranks)
    assert scores["raw"]["num_samples"] == 7
    stage1 = type(config)(**(vars(config) | {"data": stage2["fp32"].data}))
    with pytest.raises(UserError, match="stage1 trains the encoder and needs shards of video"):
        train(stage1, out / "no", ranks)


def refuse_other_features(stage2, out: Path, ranks) -> None:
    file = out / "one/dataset.json"
    dataset = json.loads(file.read_text())

    def change(field, value):
        changed = dataset["features"] | {field: value}
        file.write_text(json.dumps(dataset | {"features": changed}))

    change("encoder_sha256", "of another")
    with pytest.raises(UserError, match="holds features of another encoder"):
        train(stage2["fp32"], out / "stale", ranks, out / "stage1")
    assert not (out / "stale").exists()
    change("stride", 8)
    with pytest.raises(UserError, match=r"data\.stride=8, not 4"):
        decode.evaluate(out / "stage2-fp32", "test", ranks)
    change("stride", 0)
    with pytest.raises(UserError, match="its features are none"):
        Shards(out / "one", "test")


def test_features_replace_video(small, tmp_path):
    settings = {"train.steps": 2, "train.dev_clips": 4, "train.batch": 4}
    config = small("stage1", settings)
    stage2 = {}
    for name, folder, workers in (("fp32", "one", 0), ("bf16", "bf16", 1)):
        data = {"data.shards": str(tmp_path / folder), "data.workers": workers}
        stage2[name] = small("stage2", settings | data)
    spawn(two_ranks, 2, config, tmp_path)
    spawn(one_rank, 1, config, stage2, tmp_path)


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def npy_that_claims_a_huge_array() -> bytes:
    file = io.BytesIO()
    header = {"descr": "<f4", "fortran_order": False, "shape": (1, 10**13, 4)}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue()


NOT_FEATURES = {
    "bytes": b"",
    "zip": b"PK\x03\x04" + bytes(200),
    "type": npy(np.zeros((1, 3, 4), np.float64)),
    "copies": npy(np.zeros((3, 3, 4), np.float32)),
    "objects": npy(np.array([[[{}] * 4] * 3])),
    "size": npy_that_claims_a_huge_array(),
}


@pytest.mark.parametrize("content", NOT_FEATURES.values(), ids=NOT_FEATURES)
def test_content_that_is_no_array_of_features_is_a_bad_sample(content):
    message = "is no array of 3 features of 4 channels in float32"
    with pytest.raises(BadSample, match=message):
        decoder.features(content, (3, 4), np.float32, 1)


@pytest.mark.parametrize("copies", [0, 2])
def test_features_are_read_as_numpy_wrote_them(copies):
    array = np.random.default_rng(0).random((1 + copies, 3, 4), np.float32)
    assert np.array_equal(decoder.features(npy(array), (3, 4), np.float32, 2), array)


def test_shards_of_two_encoders_are_not_joined(tmp_path):
    sample = ("a", b"", {"key": "a", "text": "", "num_frames": 1}, ["a"])
    for name in "ab":
        shards.write_tar(tmp_path / f"{name}.tar", [sample], "npy", name)
    paths = [(tmp_path / "a.tar", "train"), (tmp_path / "b.tar", "train")]
    with pytest.raises(UserError, match=r"a\.tar was made by another encoder"):
        shards.join_indexes(tmp_path, paths, {"left_out": []}, "b")


def test_features_made_in_another_way_are_refused(small):
    config = small("stage1")
    model = Translator(config, TranslationTokenizer(config.llm))
    clips = ClipDataset("dev", config.data, 0)
    made = about(model, config.data, "fp32", 2, 0)
    changes = {
        field: (8, rf"made with data\.{field}=8, not")
        for field in ("resize", "crop", "stride", "max_frames")
    }
    changes["augment"] = ({"rotate": 5}, "copies augmented in another way")
    changes["encoder_sha256"] = ("", "features of another encoder")
    clips.features = made
    decode.check_features(clips, model)
    for field, (value, message) in changes.items():
        clips.features = made | {field: value}
        with pytest.raises(UserError, match=message):
            decode.check_features(clips, model)
    clips.features, model.input = made, "frames"
    with pytest.raises(UserError, match="holds sign-wise features"):
        decode.check_features(clips, model)
