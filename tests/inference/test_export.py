"""What is exported says the same sentences in a fresh process, without the run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SMALL
from models import save

from flallm import config as cfg
from flallm import load
from flallm.data.reader import Shards
from flallm.distributed.context import init_distributed
from flallm.distributed.launch import spawn
from flallm.evaluation.decode import evaluate
from flallm.training.train import train

SHORT = {"train.steps": 6, "train.batch": 8, "train.lr_language": 1e-2, "decode.max_tokens": 10}


def runs(configs: dict, out: Path) -> None:
    ranks = init_distributed()
    for name, config in configs.items():
        train(config, out / name, ranks, out / "stage1")
    evaluate(out / "lora", "test", ranks)


@pytest.fixture(scope="module")
def trained(shards, llm, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("export")
    at = {"data.shards": str(shards), "llm.path": str(llm), **SMALL, **SHORT}
    configs = {
        "stage1": cfg.load(
            "demo", "stage1", at | {"llm.lora.rank": 4}
        ),  # which is for stage 2, in a recipe such as smollm2
        "stage2": cfg.load("demo", "stage2", at),
        "lora": cfg.load(
            "demo",
            "stage2",
            at
            | {
                "llm.path": str(save("llama", out / "llama")),
                "llm.lora.rank": 4,
                "llm.prompt": "we saw {video} and",
            },
        ),
    }
    spawn(runs, 1, configs, out)
    (out / "clip.mp4").write_bytes(Shards(str(shards), "test").read(3)[0])
    return out


@pytest.mark.parametrize(
    "name,options", [("stage1", []), ("stage2", []), ("lora", []), ("lora", ["--lora=separate"])]
)
def test_three_lines_of_python_say_what_the_run_says(trained, tmp_path, flallm, name, options):
    said = load(trained / name).translate(trained / "clip.mp4")
    assert said
    done = flallm("export", trained / name, tmp_path / "out", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out/llm/model.safetensors").is_file() == bool(options)
    program = f"import flallm\nmodel = flallm.load({str(tmp_path / 'out')!r})\nprint(model.translate({str(trained / 'clip.mp4')!r}))"
    os.rename(trained / name, tmp_path / "away")
    try:
        alone = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path
        )
    finally:
        os.rename(tmp_path / "away", trained / name)
    assert alone.stdout.splitlines()[-1:] == [said], alone.stderr
    assert flallm("export", trained / name, tmp_path / "out", cwd=tmp_path).returncode == 2


def test_the_card_has_data_scores_with_their_signature_and_licence(trained, tmp_path, flallm):
    (trained / "lora/scores/._test.json").write_bytes(
        b"\0\5\x16\7\xff"
    )  # macOS leaves it beside test.json
    assert (
        flallm(
            "export", trained / "lora", tmp_path / "out", "--license=cc-by-nc-4.0", cwd=tmp_path
        ).returncode
        == 0
    )
    card = (tmp_path / "out/README.md").read_text()
    for part in (
        "synthetic, 24 training clips",
        "| test | raw |",
        "tok:none",
        "license: cc-by-nc-4.0",
        "## Limits",
    ):
        assert part in card
    rows = [re.split(r"(?<!\\)\|", line) for line in card.splitlines() if line.startswith("| ")]
    assert len(rows) > 4 and {len(row) for row in rows} == {
        8
    }  # no cell is cut by what stands in it
    assert (
        str(trained) not in (tmp_path / "out/config.yaml").read_text() + card
        and "base_model" not in card
    )
    inside = flallm("export", trained / "lora", tmp_path / "out/README.md/x", cwd=tmp_path)
    assert (
        inside.returncode == 2
        and inside.stderr == f"flallm: {tmp_path}/out/README.md cannot be made: File exists\n"
    )
