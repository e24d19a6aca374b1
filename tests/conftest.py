"""What tests share: a small corpus in shards and a small language model, made once a session by the product itself."""

import multiprocessing
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from unittest.mock import patch

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # files of tests run side by side
os.environ["OMP_WAIT_POLICY"] = (
    "passive"  # … and a thread that waits is to leave its core to the other file
)
os.environ["CUDA_VISIBLE_DEVICES"] = (
    ""  # several ranks share this machine's cores and could not share a GPU; test_gpu.py sees what there is
)

import pytest
import torch.multiprocessing

from flallm import cli
from flallm import config as cfg
from flallm.data.corpora import synthetic
from flallm.data.encode import EncodeOptions
from flallm.data.shards import make_shards

# Ranks start from a process that has imported everything: of a rank of a test that is nearly all.
FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(
    [
        "flallm.training.train",
        "flallm.evaluation.plots",
        "deepspeed.runtime.zero.muon.original_muon",
        "torch.utils.tensorboard",
    ]
)
torch.multiprocessing.spawn = partial(
    torch.multiprocessing.start_processes, start_method="forkserver"
)

SMALL = {
    "encoder.stem": 8,
    "encoder.widths": [8, 16, 16, 32],
    "encoder.channels": 32,
    "light_t.width": 32,
    "light_t.ffn": 64,
    "data.resize": 36,
    "data.crop": 32,
    "data.workers": 0,
    "train.precision": "fp32",
}


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus") / "shards"
    make_shards(
        synthetic.clips(train=24, dev=8, test=7, size=36),
        folder,
        EncodeOptions(per_shard=10),
        {"name": "synthetic"},
    )
    return folder


@pytest.fixture(scope="session")
def llm(tmp_path_factory) -> Path:
    from flallm.demo.pretrain import pretrain

    folder = tmp_path_factory.mktemp("llm") / "llm"
    pretrain(
        [text for _, text in synthetic.sentences("text", 3000)],
        folder,
        layers=1,
        width=48,
        heads=2,
        steps=2,
    )
    return folder


@pytest.fixture
def small(shards, llm):
    """The demo's recipe at a size for tests: `small("stage1", **overrides)`."""

    def make(stage: str, overrides: dict | None = None) -> cfg.Config:
        return cfg.load(
            "demo",
            stage,
            {"data.shards": str(shards), "llm.path": str(llm), **SMALL, **(overrides or {})},
        )

    return make


@pytest.fixture
def flallm(monkeypatch, capsys):
    """The command line as a function, `flallm("score", …, cwd=folder)`, in this process: one of its own would load torch for every line."""

    def command(*words: object, cwd: Path) -> subprocess.CompletedProcess:
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", ["flallm", *map(str, words)])
        capsys.readouterr()
        with patch.dict(
            os.environ
        ):  # where a command writes its rank, which what starts later would take for its own
            code = cli.run(cli.COMMANDS, "flallm")
        return subprocess.CompletedProcess(sys.argv, code, *capsys.readouterr())

    return command


PROMPTS = {"mbart": "{video}", "mt5": "we {video}", "llama": "we saw {video} and"}


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, Path]:
    """The folder of a small random language model of each family."""
    from models import KINDS, save

    return {kind: save(kind, tmp_path_factory.mktemp(kind)) for kind in KINDS}


@pytest.fixture
def built(small, folders):
    """`built(kind, overrides)`: config and translator of stage 2 with a model of that family."""
    from flallm.data.tokenizer import TranslationTokenizer
    from flallm.model.translator import Translator

    def build(kind: str, overrides: dict | None = None) -> tuple[cfg.Config, Translator]:
        fields = {
            "llm.path": str(folders[kind]),
            "llm.prompt": PROMPTS[kind],
            "decode.max_tokens": 12,
        }
        config = small("stage2", fields | (overrides or {}))
        torch.manual_seed(1)
        return config, Translator(config, TranslationTokenizer(config.llm)).eval()

    return build
