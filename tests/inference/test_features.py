"""Features in place of video: the same whatever the ranks and restarts, and the same losses."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from flallm.data import decoding as decoder
from flallm.data import shards
from flallm.data.dataset import ClipDataset
from flallm.data.tokenizer import TranslationTokenizer
from flallm.data.verify import verify
from flallm.distributed.context import init_distributed
from flallm.distributed.launch import spawn
from flallm.evaluation import decode as evaluate
from flallm.inference.features import about, features
from flallm.model.translator import Translator
from flallm.training.train import train
from flallm.utils import UserError


def made(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def two_ranks(config, out: Path) -> None:
    ranks = init_distributed()
    train(config, out / "stage1", ranks)
    features(out / "stage1", out / "two", ranks, "fp32", 2)


def one_rank(config, stage2, out: Path) -> None:
    ranks, write = init_distributed(), shards.write_tar

    def full_disk(path, *args):
        if path.name == "train-000001.tar":
            raise OSError("no space left")
        write(path, *args)

    shards.write_tar = full_disk
    with pytest.raises(OSError):
        features(out / "stage1", out / "one", ranks, "fp32", 2)
    shards.write_tar = write
    with pytest.raises(UserError, match="holds shards made of other clips or with other options"):
        features(out / "stage1", out / "one", ranks, "bf16", 2)
    features(out / "stage1", out / "one", ranks, "fp32", 2)
    assert made(out / "one") == made(out / "two")
    assert shards.Shards(out / "one", "train").corpus == {"name": "synthetic"} and [*verify(str(out / "one"), ["train", "dev", "test"], 1)] == []
    features(out / "stage1", out / "bf16", ranks, "bf16", 0)

    model, _ = evaluate.load_run(out / "stage1", ranks.device)
    with torch.no_grad():
        for epoch, n in ((None, 0), (None, 5), (0, 3), (1, 3), (3, 3)):  # copies of epochs 0 and 1; 3 is seen as 1 is
            batches = [
                ClipDataset("train", c, config.seed).batch(model.text, [(e, n)]) for c, e in ((config.data, epoch and epoch % 2), (stage2["fp32"].data, epoch))
            ]
            assert batches[1].frames.ndim == 2
            assert torch.allclose(model(batches[0])[0], model(batches[1])[0], rtol=1e-5, atol=0)
        group = [(None, n) for n in range(4)]
        losses = [float(model(ClipDataset("train", c.data, 0).batch(model.text, group))[0]) for c in (config, stage2["fp32"], stage2["bf16"])]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and losses[2] == pytest.approx(losses[0], rel=1e-2)

    for name, run in stage2.items():
        train(run, out / f"stage2-{name}", ranks, out / "stage1")
    assert evaluate.evaluate(out / "stage2-bf16", "test", ranks)["raw"]["num_samples"] == 7
    with pytest.raises(UserError, match="stage1 trains the encoder and needs shards of video"):
        stage1 = type(config)(**(vars(config) | {"data": stage2["fp32"].data}))
        train(stage1, out / "no", ranks)

    dataset = out / "one/dataset.json"
    said = json.loads(dataset.read_text())
    dataset.write_text(json.dumps(said | {"features": said["features"] | {"encoder_sha256": "of another"}}))
    with pytest.raises(UserError, match="holds features of another encoder"):
        train(stage2["fp32"], out / "stale", ranks, out / "stage1")
    assert not (out / "stale").exists()
    dataset.write_text(json.dumps(said | {"features": said["features"] | {"stride": 8}}))
    with pytest.raises(UserError, match=r"data\.stride=8, not 4"):
        evaluate.evaluate(out / "stage2-fp32", "test", ranks)
    dataset.write_text(json.dumps(said | {"features": said["features"] | {"stride": 0}}))
    with pytest.raises(UserError, match="its features are none"):
        shards.Shards(out / "one", "test")


def test_features_take_the_place_of_video(small, tmp_path):
    settings = {"train.steps": 2, "train.dev_clips": 4, "train.batch": 4}
    config = small("stage1", settings)
    stage2 = {
        name: small("stage2", settings | {"data.shards": str(tmp_path / folder), "data.workers": workers})
        for name, folder, workers in (("fp32", "one", 0), ("bf16", "bf16", 1))
    }
    spawn(two_ranks, 2, config, tmp_path)
    spawn(one_rank, 1, config, stage2, tmp_path)


NPY = {"bytes": b"", "zip": b"PK\x03\x04" + bytes(200)}
for name, array in (("type", np.zeros((1, 3, 4), np.float64)), ("copies", np.zeros((3, 3, 4), np.float32)), ("objects", np.array([[[{}] * 4] * 3]))):
    np.save(file := io.BytesIO(), array, allow_pickle=True)
    NPY[name] = file.getvalue()
np.lib.format.write_array_header_1_0(file := io.BytesIO(), {"descr": "<f4", "fortran_order": False, "shape": (1, 10**13, 4)})
NPY["size"] = file.getvalue()


@pytest.mark.parametrize("content", NPY.values(), ids=NPY)
def test_what_is_no_array_of_the_features_is_left_out_without_a_look_into_it(content):
    with pytest.raises(shards.BadSample, match="is no array of 3 features of 4 channels in float32"):
        decoder.features(content, (3, 4), np.float32, 1)


@pytest.mark.parametrize("copies", [0, 2])
def test_features_are_read_as_numpy_wrote_them(copies):
    np.save(file := io.BytesIO(), array := np.random.default_rng(0).random((1 + copies, 3, 4), np.float32))
    assert np.array_equal(decoder.features(file.getvalue(), (3, 4), np.float32, 2), array)


def test_parts_of_two_caches_are_refused(tmp_path):
    sample = ("a", b"", {"key": "a", "text": "", "num_frames": 1}, ["a"])
    for name in "ab":
        shards.write_tar(tmp_path / f"{name}.tar", [sample], "npy", name)
    with pytest.raises(UserError, match=r"a\.tar was made by another encoder"):
        shards.join_indexes(tmp_path, [(tmp_path / "a.tar", "train"), (tmp_path / "b.tar", "train")], {"left_out": []}, "b")


def test_features_that_were_made_in_another_way_are_refused(small):
    config = small("stage1")
    model, clips = Translator(config, TranslationTokenizer(config.llm)), ClipDataset("dev", config.data, 0)
    made = about(model, config.data, "fp32", 2, 0)
    other = {field: (8, rf"made with data\.{field}=8, not") for field in ("resize", "crop", "stride", "max_frames")}
    other |= {"augment": ({"rotate": 5}, "copies augmented in another way"), "encoder_sha256": ("", "features of another encoder")}
    clips.features = made
    evaluate.check_features(clips, model)
    for field, (value, said) in other.items():
        clips.features = made | {field: value}
        with pytest.raises(UserError, match=said):
            evaluate.check_features(clips, model)
    clips.features, model.input = made, "frames"
    with pytest.raises(UserError, match="holds sign-wise features"):
        evaluate.check_features(clips, model)
