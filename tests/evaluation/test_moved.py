"""A run works from another folder, and with shards that lie elsewhere by now."""

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


def test_a_run_records_an_absolute_path_and_goes_on_with_moved_shards(out):
    assert cfg.read_yaml(out / "begun.yaml")["data"]["shards"] == str(out / "begun/shards")
    assert cfg.read_run(out / "run")["data"]["shards"] == str(out / "moved")
    rows = [json.loads(line) for line in (out / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2]
    for address in ("s3://bucket/shards", "simplecache::https://host/shards"):
        assert absolute(address) == address


def test_commands_find_the_shards_of_a_run_from_another_folder(out, tmp_path, flallm):
    done = flallm("evaluate", out / "run", "--split=dev", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["raw"]["num_samples"] == 8


@pytest.fixture
def away(out, tmp_path) -> Path:
    """A copy of the run whose shards have moved once more; they lie in `now`."""
    run = shutil.copytree(out / "run", tmp_path / "run")
    config = cfg.read_run(run)
    config["data"]["shards"] = str(tmp_path / "gone")
    (run / "config.yaml").write_text(json.dumps(config))  # which is YAML as well
    (tmp_path / "now").symlink_to(out / "moved")
    return tmp_path


COMMANDS = (
    ["evaluate", "run", "--split=dev"],
    ["probe", "run", "--split=dev"],
    ["features", "run", "--out=features"],
)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda words: words[0])
def test_commands_take_the_place_of_the_shards(away, flallm, command):
    lost = flallm(*command, cwd=away)
    assert lost.returncode == 2 and lost.stderr.count("\n") == 1
    assert (
        f"{away / 'gone'} holds no finished shards" in lost.stderr and "--shards=DIR" in lost.stderr
    )
    done = flallm(*command, "--shards=now", cwd=away)
    assert done.returncode == 0, done.stderr
    if command[0] == "features":
        splits = json.loads((away / "features/dataset.json").read_text())["splits"]
        assert {name: split["clips"] for name, split in splits.items()} == {
            "train": 24,
            "dev": 8,
            "test": 7,
        }
    else:
        assert (
            away / "run" / ("scores" if command[0] == "evaluate" else "probes") / "dev.json"
        ).is_file()


def test_the_page_and_the_card_take_the_place_of_the_shards(away, flallm):
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
        wrong = flallm(*words, "--shards=nowhere", cwd=away)
        assert wrong.returncode == 2 and "nowhere holds no finished shards" in wrong.stderr
    assert not (away / "other").exists()


def test_an_export_is_scored_on_shards_that_are_named(away, flallm):
    assert flallm("export", "run", "exported", "--shards=now", cwd=away).returncode == 0
    done = flallm("evaluate", "exported", "--split=dev", "--shards=now", cwd=away)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["raw"]["num_samples"] == 8


def test_shards_of_another_frame_rate_are_refused(away, flallm):
    config = cfg.read_run(away / "run")
    config["data"]["fps"] = 12.5
    (away / "run/config.yaml").write_text(json.dumps(config))
    wrong = flallm("evaluate", "run", "--split=dev", "--shards=now", cwd=away)
    assert wrong.returncode == 2 and "data.fps: now has 0, not 12.5" in wrong.stderr
