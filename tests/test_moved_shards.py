"""A run is used from another folder than it was trained in, and after its shards have moved."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SMALL

import flallm

COMMANDS = {
    "evaluate": ["--split=test"],
    "probe": ["--split=test"],
    "features": ["--out=features"],
}


@pytest.fixture(scope="module")
def place(shards, llm, tmp_path_factory):
    """A folder with a run whose command named its shards by a relative path."""
    place = tmp_path_factory.mktemp("place")
    (place / "elsewhere").mkdir()
    shutil.copytree(shards, place / "shards")
    settings = SMALL | {"train.steps": 1, "train.dev_clips": 2, "decode.max_tokens": 4}
    options = [f"--{name}={value}" for name, value in settings.items()]
    command = [sys.executable, "-m", "flallm", "stage1", "demo", "--run_dir=run"]
    command += ["--data.shards=shards", f"--llm.path={llm}", *options]
    environment = {**os.environ, "PYTHONPATH": str(Path(flallm.__file__).parents[1])}
    subprocess.run(command, cwd=place, env=environment, check=True)
    return place


def test_a_run_finds_its_shards_from_another_folder_and_in_another_place(place, flallm):
    elsewhere, run, moved = place / "elsewhere", place / "run", place / "moved"
    result = flallm("evaluate", run, cwd=elsewhere)
    assert result.returncode == 0 and (run / "predictions/test.jsonl").exists(), result.stderr

    (place / "shards").rename(moved)
    for command, options in COMMANDS.items():
        result = flallm(command, run, *options, cwd=elsewhere)
        assert result.returncode == 2 and result.stderr.count("\n") == 1, (command, result.stderr)
        assert f"{place}/shards holds no finished shards" in result.stderr
        assert f"--shards=DIR names where the shards of {run} are now" in result.stderr
        result = flallm(command, run, *options, "--shards=../moved", cwd=elsewhere)
        assert result.returncode == 0, (command, result.stderr)
    assert (run / "probes/test.json").exists() and (elsewhere / "features/dataset.json").exists()

    assert flallm("report", run, cwd=elsewhere).returncode == 0
    page = (run / "report.html").read_text()
    assert "--shards=DIR names where the shards are now" in page and "data:video/mp4" not in page
    assert flallm("report", run, "--shards=../moved", cwd=elsewhere).returncode == 0
    assert "data:video/mp4" in (run / "report.html").read_text()
    result = flallm("report", run, "--shards=nowhere", cwd=elsewhere)
    assert result.returncode == 2 and "nowhere holds no finished shards" in result.stderr


def test_shards_of_another_frame_rate_than_the_run_was_trained_at_are_refused(place, shards, flallm):
    config = place / "run/config.yaml"
    recorded = config.read_text()
    config.write_text(recorded.replace("  fps: 0.0\n", "  fps: 12.5\n"))
    result = flallm("evaluate", "run", f"--shards={shards}", cwd=place)
    config.write_text(recorded)
    assert result.returncode == 2 and "make_shards.py --fps=12.5" in result.stderr
