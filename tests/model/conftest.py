"""Small random language models of each family, and translators of stage 2 with them."""

from pathlib import Path

import pytest
import torch
from models import KINDS, save

from flallm import config as cfg
from flallm.data.tokenizer import TranslationTokenizer
from flallm.model.translator import Translator

PROMPTS = {"mbart": "{video}", "mt5": "we {video}", "llama": "we saw {video} and"}


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, Path]:
    return {kind: save(kind, tmp_path_factory.mktemp(kind)) for kind in KINDS}


@pytest.fixture
def built(small, folders):
    """`built(kind, overrides)`: config and translator of stage 2 with a model of that family."""

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
