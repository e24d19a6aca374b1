"""A real pre-trained LLaMA-architecture model in stage 2: `make test-llm`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import SMALL
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from flallm import config as cfg
from flallm.distributed.context import init_distributed
from flallm.distributed.launch import spawn
from flallm.evaluation.decode import evaluate
from flallm.model.weights import best_checkpoint
from flallm.training.train import train


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2") / "smollm2"
    subprocess.run(
        [sys.executable, Path(__file__).parents[1] / "tools/make_smollm2.py", folder], check=True
    )
    return folder


def both_stages(first: cfg.Config, second: cfg.Config, out: Path) -> None:
    ranks = init_distributed()
    train(first, out / "stage1", ranks)
    train(second, out / "stage2", ranks, out / "stage1")
    evaluate(out / "stage2", "dev", ranks)


def test_the_folder_holds_the_pretrained_model(smollm2):
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(smollm2),
        AutoTokenizer.from_pretrained(smollm2),
    )
    asked = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        said = tokenizer.decode(model.generate(**asked, max_new_tokens=3, do_sample=False)[0])
    assert "Paris" in said
    assert (
        134e6 < sum(p.numel() for p in model.parameters()) < 136e6
        and model.config.num_key_value_heads == 3
    )  # grouped queries


def test_its_recipe_trains_low_rank_updates_and_speaks(shards, smollm2, tmp_path):
    at = {"data.shards": str(shards), "llm.path": str(smollm2), **SMALL}
    short = {"train.batch": 4, "train.log_every": 1, "decode.max_tokens": 8, "decode.beam": 2}
    first = cfg.load("smollm2", "stage1", {**at, **short, "train.steps": 1, "train.pool": 1})
    second = cfg.load("smollm2", "stage2", {**at, **short, "train.steps": 6, "train.pool": 1})
    spawn(both_stages, 1, first, second, tmp_path)
    losses = [
        json.loads(line).get("loss")
        for line in (tmp_path / "stage2/metrics.jsonl").read_text().splitlines()
    ]
    losses = [loss for loss in losses if loss]
    assert losses[-1] < losses[0] < 12
    with safe_open(best_checkpoint(tmp_path / "stage2") / "model.safetensors", "pt") as weights:
        names = [name for name in weights.keys() if name.startswith("language.")]  # noqa: SIM118
    assert names and all("lora_" in name for name in names)
    assert len((tmp_path / "stage2/predictions/dev.jsonl").read_text().splitlines()) == 8
