"""The pre-trained language model of stage 2, in the Hugging Face layout."""

from pathlib import Path

import torch
from transformers import AutoConfig, MBartForConditionalGeneration
from transformers.utils import logging

from flallm import UserError
from flallm.config import LLM

logging.disable_progress_bar()  # it would draw a bar a rank, for weights that are there at once

# On a CPU the fused kernel's backward is the slower one: 155 against 119 ms a step of the demo's language model.
ATTENTION = "sdpa" if torch.cuda.is_available() else "eager"


def load_llm(config: LLM, weights: bool = True) -> MBartForConditionalGeneration:
    """The model of `llm.path`; without `weights` only its shape, for weights that a checkpoint holds."""
    options = {"dropout": config.dropout, "attention_dropout": 0.0, "attn_implementation": ATTENTION}
    try:
        shape = AutoConfig.from_pretrained(config.path, **options)
        if shape.model_type != "mbart":
            raise UserError(f"llm.path: {config.path} is a {shape.model_type} model; stage 2 takes mbart")
        return (
            MBartForConditionalGeneration.from_pretrained(config.path, config=shape) if weights and not config.random else MBartForConditionalGeneration(shape)
        )
    except (OSError, ValueError) as error:
        raise UserError(f"llm.path: no model can be loaded from {Path(config.path)}: {str(error).splitlines()[0]}") from None
