"""The pre-trained language model of stage 2, in the Hugging Face layout, and how each family of
models reads features and generates text.

The adapter's output takes the place of word embeddings, between those of the prompt's words:
- mBART and mBART-50 multiply word embeddings by sqrt(D), then add learned positions and apply a
  LayerNorm. Features are multiplied likewise; positions and LayerNorm follow inside the encoder.
- T5, mT5 and Flan-T5 do nothing with word embeddings: no scale, no positions (attention has
  relative ones), no LayerNorm.
- Decoder-only models (LLaMA, Qwen, Mistral, SmolLM …) continue the prompt with the answer, in one
  sequence. Prompts are padded on the left, so that every answer begins at the same position, in
  training as in generation. Positions count from the first token that is no padding. Only tokens of
  the answer have a loss, and logits are computed for them alone.
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

logging.disable_progress_bar()  # each rank would draw one

# On a CPU the backward pass of the fused kernel is slower: 155 against 119 ms a step of the demo's
# language model.
ATTENTION = {"cuda": "sdpa", "cpu": "eager"}
ATTN_IMPL = ATTENTION["cuda" if torch.cuda.is_available() else "cpu"]
# The supported encoder-decoders, and what their configs call dropout.
DROPOUT = {"mbart": "dropout", "t5": "dropout_rate", "mt5": "dropout_rate"}

# Arguments that the forward pass of a decoder-only model must have: features in place of words,
# padding on the left, logits of the answer alone.
FORWARD = {"inputs_embeds", "attention_mask", "position_ids", "logits_to_keep"}
ALIBI = {"bloom", "mpt"}  # without position_ids; they count positions by the attention mask
# MiniMax's lightning attention gives no maps. DeepSeek-V4 chooses experts by token ids, which
# features do not have.
NOT_TAKEN = {"minimax", "deepseek_v4"}


class EncoderDecoderAdapter:
    """How mBART and T5 read and generate. Embeddings are padded on the right.

    inputs: inputs_embeds (B, N, D) and attention_mask (B, N). labels: (B, L), padded with
    IGNORE_INDEX.
    """

    side = "right"

    def __init__(self, model: PreTrainedModel, text: TranslationTokenizer):
        self.model, self.text = model, text

    def logits(self, inputs: dict[str, torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
        """Logits (B, L, V) of each label, given the inputs and the labels before it."""
        return self._run(inputs, labels).logits[:, len(self.text.start) - 1 :]

    def attention(self, inputs: dict[str, torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
        """Attention (B, L, N) of each label to each input, the mean over layers and heads."""
        outputs = self._run(inputs, labels, output_attentions=True)
        layers = outputs.cross_attentions  # each (B, heads, L, N)
        return torch.stack(layers).mean((0, 2))[:, len(self.text.start) - 1 :]

    def _run(self, inputs: dict[str, torch.Tensor], labels: torch.Tensor, **options):
        start = labels.new_tensor(self.text.start).expand(len(labels), -1)
        previous = labels[:, :-1]
        previous = previous.masked_fill(previous == IGNORE_INDEX, self.text.pad)
        ids = torch.cat([start, previous], 1)
        return self.model(**inputs, decoder_input_ids=ids, use_cache=False, **options)

    def generate(self, inputs: dict[str, torch.Tensor], options: GenerationConfig) -> torch.Tensor:
        """Token ids (B, …) of an answer to each of the inputs."""
        mask = inputs["attention_mask"]
        start = mask.new_tensor(self.text.start).expand(len(mask), -1)
        return self.model.generate(**inputs, decoder_input_ids=start, generation_config=options)


class DecoderOnlyAdapter(EncoderDecoderAdapter):
    """How LLaMA and its kin read and generate. Embeddings are padded on the left."""

    side = "left"

    def logits(self, inputs: dict[str, torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
        return self._run(inputs, labels, logits_to_keep=labels.shape[1]).logits  # (B, L, V)

    def attention(self, inputs: dict[str, torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
        outputs = self._run(inputs, labels, output_attentions=True)
        layers = outputs.attentions  # each (B, heads, N + L - 1, N + L - 1)
        num_inputs = inputs["attention_mask"].shape[1]
        return torch.stack(layers).mean((0, 2))[:, -labels.shape[1] :, :num_inputs]

    def _run(self, inputs: dict[str, torch.Tensor], labels: torch.Tensor, **options):
        previous = labels[:, :-1]
        is_token = previous != IGNORE_INDEX
        words = self.model.get_input_embeddings()(previous.masked_fill(~is_token, self.text.pad))
        features = inputs["inputs_embeds"]
        mask = torch.cat([inputs["attention_mask"], is_token.long()], 1)
        return self.model(
            inputs_embeds=torch.cat([features, words.to(features.dtype)], 1),  # (B, N + L - 1, D)
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp_min(0),
            use_cache=False,
            **options,
        )

    def generate(self, inputs: dict[str, torch.Tensor], options: GenerationConfig) -> torch.Tensor:
        return self.model.generate(**inputs, generation_config=options)


def make_lm_adapter(model: PreTrainedModel, text: TranslationTokenizer) -> EncoderDecoderAdapter:
    """How the model's family reads and generates."""
    if model.config.is_encoder_decoder:
        return EncoderDecoderAdapter(model, text)
    return DecoderOnlyAdapter(model, text)


def embedding_scale(model: PreTrainedModel) -> float:
    """The factor of word embeddings that the model does not apply to `inputs_embeds`."""
    if getattr(model.config, "scale_embedding", False):
        return math.sqrt(model.config.d_model)
    return 1.0


def load_llm(config: LLM, weights: bool = True) -> PreTrainedModel:
    """The model of `llm.path`, with gradients for what of it trains.

    weights: without them the model is random, for a checkpoint to fill.
    """
    shape = load_shape(config)
    auto = AutoModelForSeq2SeqLM if shape.model_type in DROPOUT else AutoModelForCausalLM
    arguments = {"attn_implementation": ATTN_IMPL, "dtype": torch.float32}
    source = hub.options(config.path)
    try:
        if weights and not config.random:
            model = auto.from_pretrained(config.path, config=shape, **arguments, **source)
        else:
            model = auto.from_config(shape, **arguments, trust_remote_code=False)
            # transformers ties what the published weights of mT5 and T5 1.1 do not.
            published, _ = PretrainedConfig.get_config_dict(config.path, **source)
            if shape.tie_word_embeddings and not published.get("tie_word_embeddings", True):
                untie(model, "lm_head.weight")
    except (OSError, ValueError) as error:
        raise hub.cannot_load("model", config.path, error) from None
    # Sampling and penalties of an instruction-tuned model would change beam search.
    model.generation_config = GenerationConfig()
    if config.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    if config.lora.rank:
        model = add_lora(model, config)
    if config.train_embeddings is not None:
        for table in (model.get_input_embeddings(), model.get_output_embeddings()):
            table.requires_grad_(config.train_embeddings)
    return model


def load_shape(config: LLM) -> PretrainedConfig:
    """The config of the model of `llm.path`.

    Raises UserError where stage 2 does not take its family.
    """
    source = hub.options(config.path)
    try:
        shape = AutoConfig.from_pretrained(config.path, **source)
        if shape.model_type in DROPOUT:
            dropout = {DROPOUT[shape.model_type]: config.dropout, "attention_dropout": 0.0}
            shape = AutoConfig.from_pretrained(config.path, **source, **dropout)
    except (OSError, ValueError) as error:
        raise hub.cannot_load("model", config.path, error) from None
    if not _is_taken(shape):
        raise UserError(
            f"llm.path: {config.path} is a {shape.model_type} model; stage 2 takes "
            f"{', '.join(DROPOUT)} and decoder-only models with attention maps and beam search, "
            "such as llama: see docs/models.md"
        )
    text_config = shape.get_text_config()
    pad = getattr(text_config, "pad_token_id", None)
    if pad is not None and not 0 <= pad < text_config.vocab_size:
        # A token of the tokenizer alone, which PyTorch refuses to make an embedding table with.
        text_config.pad_token_id = None
    return shape


def _is_taken(shape: PretrainedConfig) -> bool:
    """Whether stage 2 can train, decode and show attention with this family.

    State-space models such as Mamba and RWKV have no positions to skip padding and no attention
    maps; GPT-1, XLNet and others have no beam search from embeddings.
    """
    kind = shape.model_type
    if kind in DROPOUT:
        return True
    if shape.is_encoder_decoder or type(shape) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return False
    if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES or kind in NOT_TAKEN:
        return False
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(shape)]
    needed = FORWARD - {"position_ids"} if kind in ALIBI else FORWARD
    beam_search = inspect.signature(model.prepare_inputs_for_generation).parameters
    forward = inspect.signature(model.forward).parameters
    return needed <= forward.keys() and "inputs_embeds" in beam_search


def untie(module: nn.Module, name: str) -> None:
    """Gives a shared parameter values of its own."""
    owner, _, leaf = name.rpartition(".")
    values = module.get_parameter(name).detach().clone()
    setattr(module.get_submodule(owner), leaf, nn.Parameter(values))


def add_lora(model: PreTrainedModel, config: LLM) -> PreTrainedModel:
    """The model with everything frozen but low-rank updates of the targets."""
    from peft import LoraConfig, get_peft_model

    lora = config.lora
    targets = "all-linear" if lora.targets == ("all-linear",) else list(lora.targets)
    try:
        updates = LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=targets,
        )
        return get_peft_model(model, updates)
    except ValueError as error:
        raise UserError(f"llm.lora: {first_line(error)}") from None


def save_base(model: PreTrainedModel, folder: Path) -> None:
    """The model without LoRA's updates, as an ordinary Hugging Face folder."""
    base = model.get_base_model()
    weights = {}
    for name, tensor in base.state_dict().items():
        if ".lora_" not in name:
            weights[name.replace(".base_layer.", ".")] = tensor
    base.save_pretrained(folder, state_dict=weights)
