"""A run works from another folder, and after its shards have moved."""

import json
import os
import shutil
from pathlib import Path

import pytest
from conftest import SMALL

from flallm import config as cfg
from flallm.data.storage import absolute
from flallm.distributed.context import init_distributed
from flallm.distributed.launch import spawn
from flallm.training.train import train

SHORT = {"train.steps": 2, "train.batch": 8, "train.log_every": 1, "decode.max_tokens": 8}
SHORT |= {"checkpoint.every": 1, "decode.beam": 1}


def begin_and_resume(settings: dict, out: Path) -> None:
    ranks = init_distributed()
    os.chdir(out / "begun")
    train(cfg.load("demo", "stage1", settings | {"data.shards": "shards"}), out / "run", ranks)
    shutil.copy(out / "run/config.yaml", out / "begun.yaml")
    shutil.rmtree(out / "run/checkpoints/step-2")
    os.rename(out / "begun/shards", out / "moved")
    os.chdir(out)
    train(cfg.load("demo", "stage1", settings | {"data.shards": "moved"}), out / "run", ranks)


@pytest.fixture(scope="module")
def out(shards, llm, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("moved")
    shutil.copytree(shards, folder / "begun/shards")
    spawn(begin_and_resume, 1, {"llm.path": str(llm), **SMALL, **SHORT}, folder)
    return folder


def test_a_run_records_an_absolute_path_and_resumes_with_moved_shards(out):
    assert cfg.read_yaml(out / "begun.yaml")["data"]["shards"] == str(out / "begun/shards")
    assert cfg.read_run(out / "run")["data"]["shards"] == str(out / "moved")
    rows = [json.loads(line) for line in (out / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2]
    for address in ("s3://bucket/shards", "simplecache::https://host/shards"):
        assert absolute(address) == address


def test_commands_find_the_shards_of_a_run_from_another_folder(out, tmp_path, flallm):
    result = flallm("evaluate", out / "run", "--split=dev", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["raw"]["num_samples"] == 8


@pytest.fixture
def away(out, tmp_path) -> Path:
    """A folder with a copy of the run, whose config names no shards; they are in `now`."""
    run = shutil.copytree(out / "run", tmp_path / "run")
    config = cfg.read_run(run)
    config["data"]["shards"] = str(tmp_path / "gone")
    (run / "config.yaml").write_text(json.dumps(config))  # which is YAML as well
    (tmp_path / "now").symlink_to(out / "moved")
    return tmp_path


WRITTEN = {
    "run/scores/dev.json": ["evaluate", "run", "--split=dev"],
    "run/probes/dev.json": ["probe", "run", "--split=dev"],
    "features/dataset.json": ["features", "run", "--out=features"],
}


@pytest.mark.parametrize("written", WRITTEN)
def test_commands_accept_the_folder_of_moved_shards(away, flallm, written):
    command = WRITTEN[written]
    result = flallm(*command, cwd=away)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert f"{away / 'gone'} holds no finished shards" in result.stderr
    assert "--shards=DIR" in result.stderr
    result = flallm(*command, "--shards=now", cwd=away)
    assert result.returncode == 0, result.stderr
    assert (away / written).is_file()
    if written == "features/dataset.json":
        splits = json.loads((away / written).read_text())["splits"]
        num_clips = {name: split["clips"] for name, split in splits.items()}
        assert num_clips == {"train": 24, "dev": 8, "test": 7}


def test_the_page_and_the_card_accept_the_folder_of_moved_shards(away, flallm):
    assert flallm("evaluate", "run", "--split=dev", "--shards=now", cwd=away).returncode == 0
    assert flallm("report", "run", "--split=dev", cwd=away).returncode == 0
    page = (away / "run/report.html").read_text()
    assert "<video" not in page and "name their folder with --shards=DIR" in page
    assert flallm("report", "run", "--split=dev", "--shards=now", cwd=away).returncode == 0
    page = (away / "run/report.html").read_text()
    assert "<video" in page and "Not shown where the model looks" not in page
    assert flallm("export", "run", "exported", "--shards=now", cwd=away).returncode == 0
    assert "synthetic, 24 training clips" in (away / "exported/README.md").read_text()
    for words in (["report", "run"], ["export", "run", "other"]):
        result = flallm(*words, "--shards=nowhere", cwd=away)
        assert result.returncode == 2 and "nowhere holds no finished shards" in result.stderr
    assert not (away / "other").exists()


def test_an_export_is_scored_on_named_shards(away, flallm):
    assert flallm("export", "run", "exported", "--shards=now", cwd=away).returncode == 0
    result = flallm("evaluate", "exported", "--split=dev", "--shards=now", cwd=away)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["raw"]["num_samples"] == 8


def test_shards_of_another_frame_rate_are_refused(away, flallm):
    config = cfg.read_run(away / "run")
    config["data"]["fps"] = 12.5
    (away / "run/config.yaml").write_text(json.dumps(config))
    result = flallm("evaluate", "run", "--split=dev", "--shards=now", cwd=away)
    assert result.returncode == 2 and "data.fps: now has 0, not 12.5" in result.stderr
