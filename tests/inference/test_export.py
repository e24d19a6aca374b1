"""An export translates as its run does, in a fresh process and without the run."""

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


def train_all(configs: dict, out: Path) -> None:
    ranks = init_distributed()
    for name, config in configs.items():
        train(config, out / name, ranks, out / "stage1")
    evaluate(out / "lora", "test", ranks)


@pytest.fixture(scope="module")
def trained(shards, llm, tmp_path_factory) -> Path:
    """Runs of stage 1 and 2, and one of stage 2 with LoRA, with a clip beside them."""
    out = tmp_path_factory.mktemp("export")
    settings = {"data.shards": str(shards), "llm.path": str(llm), **SMALL, **SHORT}
    lora = {"llm.path": str(save("llama", out / "llama")), "llm.lora.rank": 4}
    lora["llm.prompt"] = "we saw {video} and"
    configs = {
        # Stage 1 ignores LoRA, which a recipe such as smollm2 sets for stage 2.
        "stage1": cfg.load("demo", "stage1", settings | {"llm.lora.rank": 4}),
        "stage2": cfg.load("demo", "stage2", settings),
        "lora": cfg.load("demo", "stage2", settings | lora),
    }
    spawn(train_all, 1, configs, out)
    (out / "clip.mp4").write_bytes(Shards(str(shards), "test").read(3)[0])
    return out


PROGRAM = """
import flallm
model = flallm.load({folder!r})
print(model.translate({clip!r}))
"""


@pytest.mark.parametrize(
    "name,options",
    [("stage1", []), ("stage2", []), ("lora", []), ("lora", ["--lora=separate"])],
)
def test_an_export_translates_as_its_run_does(trained, tmp_path, flallm, name, options):
    run, clip, exported = trained / name, trained / "clip.mp4", tmp_path / "out"
    sentence = load(run).translate(clip)
    assert sentence
    result = flallm("export", run, exported, *options, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert (exported / "llm/model.safetensors").is_file() == bool(options)
    program = PROGRAM.format(folder=str(exported), clip=str(clip))
    os.rename(run, tmp_path / "away")  # the export does not need the run
    try:
        alone = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path
        )
    finally:
        os.rename(tmp_path / "away", run)
    assert alone.stdout.splitlines()[-1:] == [sentence], alone.stderr
    assert flallm("export", run, exported, cwd=tmp_path).returncode == 2


def test_the_card_has_data_scores_with_their_signature_and_licence(trained, tmp_path, flallm):
    run, exported = trained / "lora", tmp_path / "out"
    # macOS leaves such a file beside test.json.
    (run / "scores/._test.json").write_bytes(b"\0\5\x16\7\xff")
    result = flallm("export", run, exported, "--license=cc-by-nc-4.0", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    card = (exported / "README.md").read_text()
    for part in (
        "synthetic, 24 training clips",
        "| test | raw |",
        "tok:none",
        "license: cc-by-nc-4.0",
        "## Limits",
    ):
        assert part in card
    rows = [re.split(r"(?<!\\)\|", line) for line in card.splitlines() if line.startswith("| ")]
    assert len(rows) > 4
    assert {len(row) for row in rows} == {8}  # no content cuts a cell
    assert str(trained) not in (exported / "config.yaml").read_text() + card
    assert "base_model" not in card


def test_an_export_into_a_file_is_refused(trained, tmp_path, flallm):
    (tmp_path / "file").write_text("")
    result = flallm("export", trained / "stage2", tmp_path / "file/x", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr == f"flallm: {tmp_path}/file cannot be made: File exists\n"
