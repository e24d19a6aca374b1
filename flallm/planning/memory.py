"""A training step on tensors that have shapes and no values: its parameters, memory and operations.

The model is built from its config without weights (PyTorch's fake tensors). Counters of operations
and of living bytes run with the step, so that sizes are computed, not guessed.
"""

from __future__ import annotations

import contextlib
import gc
import json
import tempfile
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from flallm.config import Config
from flallm.data.dataset import Batch
from flallm.data.tokenizer import TranslationTokenizer
from flallm.distributed.context import computes_in_bf16
from flallm.distributed.zero import batchnorm_buffers
from flallm.model.llm import ATTENTION
from flallm.model.translator import Translator
from flallm.training.optim import parameter_groups

# Configs of models that need not be on this machine; other fields are the defaults of transformers.
SHAPES = {
    "facebook/mbart-large-cc25": {
        "model_type": "mbart",
        "vocab_size": 250027,
        "scale_embedding": True,
    },
    "facebook/mbart-large-50": {
        "model_type": "mbart",
        "vocab_size": 250054,
        "scale_embedding": True,
    },
    "google/mt5-base": {
        "model_type": "mt5",
        "vocab_size": 250112,
        "d_model": 768,
        "d_ff": 2048,
        "num_layers": 12,
        "num_heads": 12,
        "tie_word_embeddings": False,
    },
    "meta-llama/Llama-2-7b-hf": {"model_type": "llama", "vocab_size": 32000},
}


class StubTokenizer:
    """Sizes and special tokens of a tokenizer that is not on this machine."""

    start, before, after, pad, end = [0], [], [], 1, 2

    def __init__(self, size: int):
        self.size = self.rows = size

    def __len__(self) -> int:
        return self.size


@contextlib.contextmanager
def tokenizer_and_shape(
    config: Config,
) -> Iterator[tuple[TranslationTokenizer | StubTokenizer, Config]]:
    """The recipe's tokenizer and the recipe.

    Of a model in `SHAPES` nothing is fetched: the recipe then names a folder with its config alone.
    """
    shape = SHAPES.get(config.llm.path)
    if not shape or Path(config.llm.path).exists():
        yield TranslationTokenizer(config.llm), config
        return
    with tempfile.TemporaryDirectory(prefix="flallm-plan-") as folder:
        (Path(folder) / "config.json").write_text(json.dumps(shape), encoding="utf-8")
        shaped = replace(config, llm=replace(config.llm, path=folder))
        yield StubTokenizer(shape["vocab_size"]), shaped


class MemoryTracker(TorchDispatchMode):
    """Counts the living bytes of tensors that operations make: `now`, and `most` so far.

    collect: whether tensors may be in cycles, as checkpointing leaves them. Python rarely frees
    those without values: 9.4 GiB of a step of LLaMA-7B, of which 1.2 are alive and an H200 had 1.3
    (docs/benchmarks.md).
    """

    def __init__(self, collect: bool):
        super().__init__()
        self.now = self.most = self.calls = 0
        self.collect = collect
        self.storages: set[int] = set()

    def __enter__(self) -> MemoryTracker:
        gc.freeze()  # collections pass over the objects that exist already
        return super().__enter__()

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        gc.unfreeze()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls += 1
        if self.collect and self.calls % 256 == 0:
            gc.collect()
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        self.most = max(self.most, self.now)
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.storages:
            self.storages.add(key)
            self.now += size
            weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self.storages.discard(key)
        self.now -= size


@dataclass(frozen=True)
class Step:
    """Forward and backward of one micro-batch on one rank.

    Attributes:
        parts: part of the model -> (parameters that train, parameters that are frozen)
        largest_group: parameters of the optimiser's largest group
        norms: BatchNorms that train
        tensors: tensors that train
        trimmed: parameters of tokens that `flallm trim` has left out
        reduced: bytes of gradients as they are sent
        flops: operations
        encoder_flops: operations of the visual encoder
        activations: bytes at the moment when there are most
    """

    parts: dict[str, tuple[int, int]]
    largest_group: int
    norms: int
    tensors: int
    trimmed: int
    reduced: int
    flops: int
    encoder_flops: int
    activations: int

    @property
    def trained(self) -> int:
        return sum(trained for trained, _ in self.parts.values())

    @property
    def frozen(self) -> int:
        return sum(frozen for _, frozen in self.parts.values())


def dry_step(
    config: Config,
    text: TranslationTokenizer | StubTokenizer,
    lengths: list[int],
    tokens: int,
    features: bool = False,
    kind: str = "cpu",
) -> Step:
    """A step of clips with `lengths` used frames and texts of `tokens` tokens.

    features: the clips are features in place of video. kind: of the device, "cpu" or "cuda".
    """
    half_precision = computes_in_bf16(config.train, kind)
    # The model reads the values of these.
    frame_counts = torch.tensor(lengths)
    labels = torch.full((len(lengths), tokens), text.end)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = _model(config, text, kind)
        frames = _frames(config, sum(lengths), features)
        tracker = MemoryTracker(config.llm.gradient_checkpointing)
        flops = FlopCounterMode(display=False)
        with tracker, flops:
            with torch.autocast("cpu", torch.bfloat16, enabled=half_precision):
                loss, _ = model(Batch(frames, frame_counts, labels, [], [], []))
            loss.backward()
    groups = parameter_groups(model, config.train)
    trained = [parameter for group in groups for parameter in group["params"]]
    encoder_flops = flops.get_flop_counts().get("Translator.encoder", {})
    return Step(
        parts={name: _parameters(module) for name, module in model.named_children()},
        largest_group=max(sum(p.numel() for p in group["params"]) for group in groups),
        norms=len(batchnorm_buffers(model)) // 3,
        tensors=len(trained),
        trimmed=_trimmed(model),
        reduced=_gradient_bytes(model, trained, half_precision),
        flops=flops.get_total_flops(),
        encoder_flops=sum(encoder_flops.values()),
        activations=tracker.most + frames.nbytes,
    )


def _model(config: Config, text: TranslationTokenizer | StubTokenizer, kind: str) -> Translator:
    """The recipe's model without values, for a step under FakeTensorMode."""
    # Shapes of the word loss depend on values. It is left out; its linear layer is counted.
    word_loss = config.train.word_loss
    encoder = replace(config.encoder, weights=None, global_batch_norm=False)
    train = replace(config.train, word_loss=0.0)
    # peft moves new weights to the device of the layer, which fails for tensors without values
    # unless they are on the meta device.
    with torch.device("meta"):
        model = Translator(replace(config, encoder=encoder, train=train), text, weights=False)
    _move_from_meta(model.train())
    if word_loss:
        model.words = nn.Linear(config.encoder.channels, len(text))
    model.language.set_attn_implementation(ATTENTION[kind])
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_drop_gradient)
    return model


def _move_from_meta(model: nn.Module) -> None:
    """Moves tensors from the meta device to the CPU; what modules share stays shared."""
    moved: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in moved:
                    moved[id(tensor)] = _empty_on_cpu(tensor)
                tensors[name] = moved[id(tensor)]


def _empty_on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    empty = torch.empty_like(tensor, device="cpu")
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(empty, tensor.requires_grad)
    return empty


def _drop_gradient(parameter: torch.Tensor) -> None:
    """ZeRO takes a gradient away as soon as it is complete."""
    parameter.grad = None


def _frames(config: Config, number: int, features: bool) -> torch.Tensor:
    if features:
        return torch.empty(number, config.encoder.channels, dtype=torch.bfloat16)
    side = config.data.crop
    return torch.empty(number, side, side, 3, dtype=torch.uint8)


def _parameters(module: nn.Module) -> tuple[int, int]:
    """(parameters that train, parameters that are frozen)"""
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in module.parameters() if not p.requires_grad)
    return trained, frozen


def _gradient_bytes(model: nn.Module, trained: list[nn.Parameter], half_precision: bool) -> int:
    """Bytes of the gradients as ranks send them: bf16 where autocast computes in it, or fp32."""
    from deepspeed.runtime.torch_autocast import LOWER_PRECISION_SAFE_MODULES

    half = set()
    if half_precision:
        for module in model.modules():
            if type(module) in LOWER_PRECISION_SAFE_MODULES:
                half |= {id(parameter) for parameter in module.parameters(recurse=False)}
    return sum(p.numel() * (2 if id(p) in half else 4) for p in trained)


def _trimmed(model: Translator) -> int:
    before = getattr(model.language.config, "trimmed_from", 0)
    if not before:
        return 0
    language = model.language
    layers = (language.get_input_embeddings(), language.get_output_embeddings())
    tables = {id(layer.weight): layer.weight.shape for layer in layers}  # they may be tied
    return sum((before - tokens) * width for tokens, width in tables.values())
