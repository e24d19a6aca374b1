"""The pre-trained language model of stage 2, in the Hugging Face layout, and how each family reads features and answers.

The adapter's output takes the place of word embeddings, between those of the prompt's words:
- mBART and mBART-50 multiply word embeddings by sqrt(D), then add learned positions and apply a LayerNorm. Features are
  multiplied likewise; positions and LayerNorm follow inside the encoder, as for words.
- T5, mT5 and Flan-T5 do nothing with word embeddings: no scale, no positions (attention has relative ones), no LayerNorm.
- Decoder-only models (LLaMA, Qwen, Mistral, SmolLM …) go on from the prompt with the answer, in one sequence. Prompts are
  padded on the left, so that every answer begins at the same place, in training as in generation; positions count from the
  first that is no padding. Only answer tokens bear a loss, and logits are computed for them alone.
"""

from __future__ import annotations

import inspect
import math
from pathlib import Path

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.utils import logging

from flallm.config import LLM
from flallm.data import hub
from flallm.data.dataset import IGNORE_INDEX
from flallm.data.tokenizer import TranslationTokenizer
from flallm.utils import UserError, first_line

logging.disable_progress_bar()  # it would draw a bar a rank, for weights that are there at once

# On a CPU the fused kernel's backward is the slower one: 155 against 119 ms a step of the demo's language model.
ATTENTION = {"cuda": "sdpa", "cpu": "eager"}
ATTN_IMPL = ATTENTION["cuda" if torch.cuda.is_available() else "cpu"]
DROPOUT = {"mbart": "dropout", "t5": "dropout_rate", "mt5": "dropout_rate"}  # the encoder-decoders that are known

# What the forward pass of a decoder-only model takes: features in the place of words, padding on the left, logits of the answer alone.
FORWARD = {"inputs_embeds", "attention_mask", "position_ids", "logits_to_keep"}
ALIBI = {"bloom", "mpt"}  # they have no position_ids, and count positions by the attention mask
# MiniMax's lightning attention gives no maps, and DeepSeek-V4 chooses experts by token ids, which features do not have.
NOT_TAKEN = {"minimax", "deepseek_v4"}


class EncoderDecoderAdapter:
    """How mBART and T5 read and answer. Embeddings are padded on the right."""

    side = "right"

    def __init__(self, model: PreTrainedModel, text: TranslationTokenizer):
        self.model, self.text = model, text

    def logits(self, inputs: dict[str, torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
        """What the model says of each label (B, L), having read the inputs and the labels before it: (B, L, V)."""
        return self._run(inputs, labels).logits[:, len(self.text.start) - 1 :]

    def attention(self, inputs: dict[str, torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
        """How much it looks at each input while it says each label, the mean over layers and heads: (B, L, N)."""
        layers = self._run(inputs, labels, output_attentions=True).cross_attentions  # each (B, heads, L, N)
        return torch.stack(layers).mean((0, 2))[:, len(self.text.start) - 1 :]

    def _run(self, inputs: dict[str, torch.Tensor], labels: torch.Tensor, **options):
        start = labels.new_tensor(self.text.start).expand(len(labels), -1)
        ids = torch.cat([start, labels[:, :-1].masked_fill(labels[:, :-1] == IGNORE_INDEX, self.text.pad)], 1)
        return self.model(**inputs, decoder_input_ids=ids, use_cache=False, **options)

    def generate(self, inputs: dict[str, torch.Tensor], options: GenerationConfig) -> torch.Tensor:
        """Token ids (B, …) of an answer to each of the inputs."""
        start = inputs["attention_mask"].new_tensor(self.text.start).expand(len(inputs["attention_mask"]), -1)
        return self.model.generate(**inputs, decoder_input_ids=start, generation_config=options)


class DecoderOnlyAdapter(EncoderDecoderAdapter):
    """How LLaMA and its kin read and answer. Embeddings are padded on the left."""

    side = "left"

    def logits(self, inputs: dict[str, torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
        return self._run(inputs, labels, logits_to_keep=labels.shape[1]).logits  # (B, L, V)

    def attention(self, inputs: dict[str, torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
        layers = self._run(inputs, labels, output_attentions=True).attentions  # each (B, heads, N + L - 1, N + L - 1)
        return torch.stack(layers).mean((0, 2))[:, -labels.shape[1] :, : inputs["attention_mask"].shape[1]]

    def _run(self, inputs: dict[str, torch.Tensor], labels: torch.Tensor, **options):
        known = labels[:, :-1] != IGNORE_INDEX
        words = self.model.get_input_embeddings()(labels[:, :-1].masked_fill(~known, self.text.pad))
        embeddings = torch.cat([inputs["inputs_embeds"], words.to(inputs["inputs_embeds"].dtype)], 1)  # (B, N + L - 1, D)
        mask = torch.cat([inputs["attention_mask"], known.long()], 1)
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        return self.model(inputs_embeds=embeddings, attention_mask=mask, position_ids=positions, use_cache=False, **options)

    def generate(self, inputs: dict[str, torch.Tensor], options: GenerationConfig) -> torch.Tensor:
        return self.model.generate(**inputs, generation_config=options)


def family(model: PreTrainedModel, text: TranslationTokenizer) -> EncoderDecoderAdapter:
    return (EncoderDecoderAdapter if model.config.is_encoder_decoder else DecoderOnlyAdapter)(model, text)


def embedding_scale(model: PreTrainedModel) -> float:
    """What the model multiplies word embeddings by and leaves to others to do with what takes their place."""
    return math.sqrt(model.config.d_model) if getattr(model.config, "scale_embedding", False) else 1.0


def load_llm(config: LLM, weights: bool = True) -> PreTrainedModel:
    """The model of `llm.path` with what of it trains; without `weights` only its shape, for weights that a checkpoint holds."""
    shape = load_shape(config)
    auto = AutoModelForSeq2SeqLM if shape.model_type in DROPOUT else AutoModelForCausalLM
    arguments = {"attn_implementation": ATTN_IMPL, "dtype": torch.float32}
    source = hub.options(config.path)
    try:
        if weights and not config.random:
            model = auto.from_pretrained(config.path, config=shape, **arguments, **source)
        else:
            model = auto.from_config(shape, **arguments, trust_remote_code=False)
            if not PretrainedConfig.get_config_dict(config.path, **source)[0].get("tie_word_embeddings", True) and shape.tie_word_embeddings:
                untie(model, "lm_head.weight")  # mT5 and T5 1.1: transformers ties what their published weights do not
    except (OSError, ValueError) as error:
        raise hub.cannot_load("model", config.path, error) from None
    model.generation_config = GenerationConfig()  # else sampling and penalties of an instruction-tuned model would get into beam search
    if config.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    if config.lora.rank:
        model = add_lora(model, config)
    if config.train_embeddings is not None:
        for words in (model.get_input_embeddings(), model.get_output_embeddings()):
            words.requires_grad_(config.train_embeddings)
    return model


def load_shape(config: LLM) -> PretrainedConfig:
    """The config of the model of `llm.path`. Raises UserError where stage 2 does not take its family."""
    source = hub.options(config.path)
    try:
        shape = AutoConfig.from_pretrained(config.path, **source)
        if shape.model_type in DROPOUT:
            dropout = {DROPOUT[shape.model_type]: config.dropout, "attention_dropout": 0.0}
            shape = AutoConfig.from_pretrained(config.path, **source, **dropout)
    except (OSError, ValueError) as error:
        raise hub.cannot_load("model", config.path, error) from None
    if not _is_taken(shape):
        families = f"{', '.join(DROPOUT)} and decoder-only models with attention maps and beam search"
        raise UserError(f"llm.path: {config.path} is a {shape.model_type} model; stage 2 takes {families}, such as llama: see docs/models.md")
    words = shape.get_text_config()
    pad = getattr(words, "pad_token_id", None)
    if pad is not None and not 0 <= pad < words.vocab_size:
        words.pad_token_id = None  # of a token that was added to the tokenizer alone; PyTorch makes no embedding table with it
    return shape


def _is_taken(shape: PretrainedConfig) -> bool:
    """Whether stage 2 can train, decode and show attention with this family. State-space models such as Mamba and RWKV have no positions to skip
    padding and no attention maps; GPT-1, XLNet and others have no beam search from embeddings."""
    kind = shape.model_type
    if kind in DROPOUT:
        return True
    if shape.is_encoder_decoder or type(shape) not in MODEL_FOR_CAUSAL_LM_MAPPING or kind in {*MODEL_FOR_MASKED_LM_MAPPING_NAMES, *NOT_TAKEN}:
        return False
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(shape)]
    needed = FORWARD - {"position_ids"} if kind in ALIBI else FORWARD
    beam_search = inspect.signature(model.prepare_inputs_for_generation).parameters
    return needed <= {*inspect.signature(model.forward).parameters} and "inputs_embeds" in beam_search


def untie(module: nn.Module, name: str) -> None:
    """Gives a parameter that is another's as well values of its own."""
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, nn.Parameter(module.get_parameter(name).detach().clone()))


def add_lora(model: PreTrainedModel, config: LLM) -> PreTrainedModel:
    """The model with everything frozen but low-rank updates of the targets."""
    from peft import LoraConfig, get_peft_model

    lora = config.lora
    targets = lora.targets[0] if lora.targets == ("all-linear",) else list(lora.targets)
    try:
        return get_peft_model(model, LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets))
    except ValueError as error:
        raise UserError(f"llm.lora: {first_line(error)}") from None


def save_base(model: PreTrainedModel, folder: Path) -> None:
    """The model without LoRA's updates, as an ordinary Hugging Face folder."""
    base = model.get_base_model()
    weights = {name.replace(".base_layer.", "."): tensor for name, tensor in base.state_dict().items() if ".lora_" not in name}
    base.save_pretrained(folder, state_dict=weights)
