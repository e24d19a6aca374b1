"""ZeRO's sharded state: DeepSpeed's internals, checked with 0.19.8, behind functions of our own."""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open

from flallm.distributed.context import DistContext
from flallm.utils import UserError


@contextlib.contextmanager
def gathered_parameters(engine) -> Iterator[None]:
    """Every rank has the model of the checkpoint, and it computes on each of them by itself: all weights, which ZeRO-3 brings together here, and
    rank 0's statistics where BatchNorm's are each rank's own. All ranks enter together."""
    moving = batchnorm_buffers(engine.module)
    own = [t.clone() for t in moving]
    for tensor in moving:
        dist.broadcast(tensor, 0)
    try:
        if engine.zero_optimization_stage() < 3:
            yield
        else:
            from deepspeed.runtime.zero.stage3 import unwrap_model_for_generation

            with unwrap_model_for_generation(engine):
                yield
    finally:
        for tensor, value in zip(moving, own):
            tensor.copy_(value)


def backward_to_skip(engine, objective: torch.Tensor) -> None:
    """Runs backward so that DeepSpeed leaves the whole step out on every rank.

    DeepSpeed has no call for that. A gradient that is not finite makes it drop the gradients of all
    micro-batches and change neither weights nor optimiser state.
    """
    engine.backward(objective * math.nan)


def step_was_skipped(engine) -> bool:
    """Whether DeepSpeed found a gradient that is not finite on some rank, and left the step out."""
    return bool(engine.optimizer.overflow)


def optimizer_shards(engine) -> dict[str, torch.Tensor]:
    """This rank's share of the optimiser's state, in a form that does not depend on the number of ranks: "exp_avg|<parameter>|<offset>"
    is a stretch of that parameter's values, laid out flat, and "step|<group>" a number that a group has once."""
    pieces = {}
    for group, flat, parameters in _partitions(engine):
        for key, value in engine.optimizer.state[flat].items():
            if value.shape == flat.shape:
                pieces |= {
                    f"{key}|{name}|{at.start}": value[here.start : here.start + at.numel]
                    for name, at, here in parameters
                }
            else:
                pieces[f"{key}|{group}"] = value
    return pieces


def load_optimizer_shards(engine, files: list[Path]) -> None:
    """Puts this rank's share together from the files of any number of ranks, whose tensors are called "optimizer|<piece>"."""
    with contextlib.ExitStack() as stack:
        pieces = defaultdict(list)  # (key, parameter or group) -> (offset, where it lies)
        for file in [stack.enter_context(safe_open(path, "pt")) for path in files]:
            for name in file.keys():  # noqa: SIM118 - it is no dict
                kind, _, piece = name.partition("|")
                if kind == "optimizer":
                    key, owner, *offset = piece.split("|")
                    pieces[key, owner].append((int(offset[0]) if offset else None, file, name))
        keys = {key for key, _ in pieces}
        for group, flat, parameters in _partitions(engine):
            state = engine.optimizer.state[flat]
            for key in keys:
                if (key, group) in pieces:
                    _, file, name = pieces[key, group][0]
                    state[key] = file.get_tensor(name).to(
                        flat.device if engine.optimizer.optimizer.defaults.get("fused") else "cpu"
                    )
                    continue
                state[key] = torch.zeros_like(flat, requires_grad=False)
                for parameter, at, here in parameters:
                    missing = at.numel
                    for offset, file, name in pieces[key, parameter]:
                        stretch = file.get_slice(name)
                        first, last = (
                            max(at.start, offset),
                            min(at.start + at.numel, offset + stretch.get_shape()[0]),
                        )
                        if first < last:
                            values = stretch[first - offset : last - offset]
                            state[key][
                                here.start + first - at.start : here.start + last - at.start
                            ] = values.to(flat.device)
                            missing -= last - first
                    if missing:
                        raise UserError(
                            f"{files[0].parent} does not fit the recipe: it lacks {key} of {parameter}"
                        )


def _partitions(engine) -> Iterator[tuple[str, torch.Tensor, list[tuple]]]:
    """(name, this rank's flat share, [(parameter, where in the parameter, where in the share)]) of each group; under ZeRO-3 of each part of one."""
    names = {id(p): name for name, p in engine.module.named_parameters()}
    zero = engine.optimizer
    if (
        engine.zero_optimization_stage() == 3
    ):  # each rank has a share of every parameter; the last ranks' may end in padding
        from deepspeed.utils.tensor_fragment import fragment_address

        for part, (flat, parameters) in enumerate(
            zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups)
        ):
            mapped = []
            for p in parameters:
                _, offset, size = zero.grad_position[zero.get_param_id(p)]
                start = dist.get_rank() * size
                here = max(0, min(size, p.ds_numel - start))
                mapped.append(
                    (names[id(p)], fragment_address(here, start), fragment_address(here, offset))
                )
            yield (
                zero.param_groups[zero.sub_group_to_group_id[part]]["name"],
                flat,
                [m for m in mapped if m[1].numel],
            )
        return
    for group, flat, parameters in zip(
        zero.param_groups, zero.single_partition_of_fp32_groups, zero.bit16_groups
    ):
        mapped = [(names[id(p)], p._hp_mapping) for p in parameters if p._hp_mapping is not None]
        yield (
            group["name"],
            flat,
            [(name, m.lp_fragment_address, m.hp_fragment_address) for name, m in mapped],
        )


def layer_norms(engine, ranks: DistContext) -> dict[str, float]:
    """Norms of gradient and parameters of the last layer of the encoder and of the language model, between backward and step: the paper's
    analysis of which of the two dominates (Fig. 2). Under ZeRO each rank holds a share of both, so it is their squares that are added up."""
    from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_grad

    layers = engine.module.last_layers()
    squares = []
    for layer in layers.values():
        trained = [p for p in layer.parameters() if p.requires_grad]
        if engine.zero_optimization_stage() == 3:
            shares = [
                (
                    safe_get_local_grad(p),
                    safe_get_local_fp32_param(p),
                    p.ds_numel - ranks.rank * p.partition_numel(),
                )
                for p in trained
            ]
            shares = [
                (grad[: max(0, left)], value[: max(0, left)]) for grad, value, left in shares
            ]  # without padding
        else:
            mapped = [
                (p._hp_mapping, p._index_in_param_group)
                for p in trained
                if p._hp_mapping is not None
            ]
            shares = [(m.get_lp_grad_fragment(i), m.get_hp_fragment()) for m, i in mapped]
        squares += [
            sum(float(share[kind].detach().double().square().sum()) for share in shares)
            for kind in (0, 1)
        ]
    names = [f"{what}_norm/{part}" for part in layers for what in ("grad", "param")]
    return {name: math.sqrt(square) for name, square in zip(names, ranks.sum(*squares))}


def batchnorm_buffers(model: torch.nn.Module) -> list[torch.Tensor]:
    """What a forward pass in training changes: the buffers of BatchNorms that train."""
    norms = [
        m
        for m in model.modules()
        if isinstance(m, torch.nn.modules.batchnorm._BatchNorm) and m.training
    ]
    return [t for m in norms for t in m.buffers(recurse=False)]
