"""One optimiser step under DeepSpeed, and what the ranks agree on before it."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from enum import Enum

import torch

from flallm.config import Train
from flallm.data.dataset import Batch
from flallm.distributed.context import DistContext, computes_in_bf16
from flallm.distributed.deepspeed_config import deepspeed_config
from flallm.distributed.zero import (
    backward_to_skip,
    batchnorm_buffers,
    layer_norms,
    step_was_skipped,
)
from flallm.model.translator import Translator
from flallm.training.optim import parameter_groups


def start_engine(model: Translator, config: Train, ranks: DistContext):
    """A DeepSpeed engine around the model, with the batch arithmetic of the recipe."""
    import deepspeed

    groups, fused = parameter_groups(model, config), ranks.device.type == "cuda"
    if config.optimizer == "sgd":
        optimizer = torch.optim.SGD(
            groups, momentum=config.momentum, weight_decay=config.weight_decay, fused=fused
        )
    else:  # a torch object: DeepSpeed would compile an AdamW of its own
        optimizer = torch.optim.AdamW(
            groups, betas=config.betas, weight_decay=config.weight_decay, fused=fused
        )
    settings = deepspeed_config(config, ranks.device.type) | {
        # The sampler deals in clips; to DeepSpeed a micro-batch on a rank is one unit.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": config.micro_batches,
        "gradient_clipping": config.max_grad_norm,
    }
    if computes_in_bf16(config, ranks.device.type):
        # Parameters stay fp32: DeepSpeed's own bf16 casts them but not BatchNorm's buffers.
        settings["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=settings, dist_init_required=False
    )
    return engine


@dataclass(frozen=True)
class StepVotes:
    """What one rank brings to a step, or, after `agree`, what all ranks bring together.

    tokens: target tokens of the step's micro-batches; summed over ranks.
    stop: whether the rank was asked to stop; true if any rank was.
    checkpoint_written: whether the rank's files of the checkpoint in progress are on disk; true if
        all ranks' are.
    checkpoint_due: whether the time for a checkpoint has come; rank 0's clock decides.
    """

    tokens: int
    stop: bool = False
    checkpoint_written: bool = False
    checkpoint_due: bool = False

    def agree(self, ranks: DistContext) -> StepVotes:
        """The votes of all ranks, the same on every rank, by one all-reduce."""
        tokens, stop, written, due = ranks.sum(
            self.tokens, self.stop, self.checkpoint_written, self.checkpoint_due and ranks.is_main
        )
        return StepVotes(int(tokens), stop > 0, written == ranks.world_size, due > 0)


class SkipReason(Enum):
    """Why a step changes no weights on any rank."""

    NO_TOKENS = "no clip of the step can be read"
    LOSS_SPIKE = "the loss is far above its running mean"
    NOT_FINITE = "the gradient is not finite"


@dataclass(frozen=True)
class StepResult:
    """What an optimiser step gave.

    loss, tokens: this rank's sum of losses over its target tokens, and their number.
    mean_loss: loss a token over all ranks; NaN where no `max_loss` was given.
    skipped: why no weights changed, the same on every rank; None for an ordinary step.
    compute_seconds: time of the forward passes, in which a rank does not wait for others.
    norms: see `layer_norms`; empty where they were not asked for.
    """

    loss: float
    tokens: int
    mean_loss: float
    skipped: SkipReason | None
    compute_seconds: float
    norms: dict[str, float]


def train_step(
    engine,
    batches: list[Batch],
    ranks: DistContext,
    all_tokens: int | None = None,
    max_loss: float | None = None,
    norms: bool = False,
) -> StepResult:
    """One optimiser step on this rank's micro-batches.

    The gradient is that of the mean over all target tokens of the step, wherever they are:
    DeepSpeed averages over ranks and micro-batches, so every sum of losses is multiplied by their
    number and divided by all tokens. A skipped step leaves no trace on any rank.

    all_tokens: target tokens over all ranks; summed here where it is not given.
    max_loss: a step whose mean loss a token is above it is skipped.
    norms: whether to measure `layer_norms`.
    """
    tokens = sum(batch.tokens for batch in batches)
    if all_tokens is None:
        all_tokens = StepVotes(tokens).agree(ranks).tokens
    if not all_tokens:
        return StepResult(0.0, 0, math.nan, SkipReason.NO_TOKENS, 0.0, {})
    scale = ranks.world_size * len(batches) / all_tokens
    statistics = batchnorm_buffers(engine.module)
    statistics_before = [tensor.clone() for tensor in statistics]
    loss_sum, compute_seconds, mean_loss, measured_norms = 0.0, 0.0, math.nan, {}
    skipped = None
    for number, batch in enumerate(batches, 1):
        is_last = number == len(batches)
        began = time.monotonic()
        objective, loss = engine(batch.to(ranks.device))
        compute_seconds += time.monotonic() - began
        loss_sum += loss
        if is_last and max_loss is not None:
            mean_loss = ranks.sum(loss_sum)[0] / all_tokens
            if mean_loss > max_loss:
                skipped = SkipReason.LOSS_SPIKE
        if skipped:
            backward_to_skip(engine, objective)
        else:
            engine.backward(objective * scale)
        if is_last and norms:
            measured_norms = layer_norms(engine, ranks)
        engine.step()
    if step_was_skipped(engine):
        skipped = skipped or SkipReason.NOT_FINITE
        for tensor, value in zip(statistics, statistics_before):
            tensor.copy_(value)
    return StepResult(float(loss_sum), tokens, mean_loss, skipped, compute_seconds, measured_norms)
