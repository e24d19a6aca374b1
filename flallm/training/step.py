"""One optimiser step under DeepSpeed."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch

from flallm.config import Train
from flallm.data.dataset import Batch
from flallm.distributed.context import DistContext, computes_in_bf16
from flallm.distributed.deepspeed_config import deepspeed_config
from flallm.distributed.zero import batchnorm_buffers, layer_norms
from flallm.model.translator import Translator
from flallm.training.optim import parameter_groups


def start_engine(model: Translator, config: Train, ranks: DistContext):
    """A DeepSpeed engine around the model, from a file of ds_configs/ with the batch arithmetic filled in."""
    import deepspeed

    groups, fused = parameter_groups(model, config), ranks.device.type == "cuda"
    if config.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, momentum=config.momentum, weight_decay=config.weight_decay, fused=fused)
    else:  # a torch object: naming AdamW in the JSON would compile DeepSpeed's own
        optimizer = torch.optim.AdamW(groups, betas=config.betas, weight_decay=config.weight_decay, fused=fused)
    settings = deepspeed_config(config, ranks.device.type) | {
        # The plan deals in clips; to DeepSpeed a micro-batch on a rank is one unit.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": config.micro_batches,
        "gradient_clipping": config.max_grad_norm,
    }
    if computes_in_bf16(config, ranks.device.type):  # fp32 parameters; bf16 ones would cast them but not BatchNorm's buffers
        settings["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
    return engine


@dataclass(frozen=True)
class Step:
    """What an optimiser step gave. loss, tokens: this rank's sum over its target tokens, and their number; applied: whether the
    weights were changed, on every rank the same; flags: those given to `train_step`, summed over ranks."""

    loss: float
    tokens: float
    mean: float  # loss of a token over all ranks; only known where `most` is given
    applied: bool
    flags: list[float]
    seconds: float  # that this rank computed without waiting for others, as far as can be told: the forward passes
    norms: dict[str, float]  # see `layer_norms`; only where they are asked for


def train_step(engine, batches: list[Batch], ranks: DistContext, *flags: float, most: float | None = None, norms: bool = False) -> Step:
    """One optimiser step on this rank's micro-batches.

    The gradient is that of the mean over all target tokens of the step, wherever they are: DeepSpeed averages over
    ranks and micro-batches, so every sum of losses is multiplied by their number and divided by all tokens. A step whose
    gradient is not finite on some rank is left out on all of them, and leaves no trace; so is one whose loss of a token is over `most`, and
    one without a token on any rank, because none of its clips could be read.
    """
    tokens, moving = sum(batch.tokens for batch in batches), batchnorm_buffers(engine.module)
    before = [t.clone() for t in moving]
    all_tokens, *flags = ranks.sum(tokens, *flags)
    if not all_tokens:
        return Step(0.0, 0, math.nan, False, flags, 0.0, {})
    factor = ranks.world_size * len(batches) / all_tokens
    total, seconds, mean, found = 0.0, 0.0, math.nan, {}
    for number, batch in enumerate(batches, 1):
        began = time.monotonic()
        objective, loss = engine(batch.to(ranks.device))
        seconds += time.monotonic() - began
        total += loss
        if most is not None and number == len(batches):
            mean = ranks.sum(total)[0] / all_tokens
            if mean > most:
                factor = math.nan  # and so every rank leaves the step out
        engine.backward(objective * factor)
        if norms and number == len(batches):
            found = layer_norms(engine, ranks)
        engine.step()
    applied = not engine.optimizer.overflow
    if not applied:
        for tensor, value in zip(moving, before):
            tensor.copy_(value)
    return Step(float(total), tokens, mean, applied, flags, seconds, found)
