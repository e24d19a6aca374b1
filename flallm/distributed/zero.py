"""ZeRO's sharded state: DeepSpeed's internals behind one class.

DeepSpeed has no public way to its shards. What `ZeroShards` reads of it was checked with 0.19.8:

- `engine.optimizer.param_groups`: the groups with our names, one flat parameter each.
- ZeRO-1 and 2: `single_partition_of_fp32_groups`, this rank's flat fp32 values of each group;
  `bit16_groups`, the parameters of each group; `parameter._hp_mapping`, where a parameter lies in
  the rank's flat values, None where none of it does.
- ZeRO-3: `fp32_partitioned_groups_flat` and `fp16_groups`, the same of each sub-group;
  `sub_group_to_group_id`; `grad_position`, (…, offset in the flat values, size of a shard);
  `parameter.ds_numel`, the values of the whole parameter.
- `engine.optimizer.state[flat]`: the optimiser's state of these flat values.
- `engine.optimizer.overflow`: whether the last step was left out.
"""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open

from flallm.distributed.context import DistContext
from flallm.utils import UserError


@dataclass(frozen=True)
class ParameterShard:
    """The part of a parameter that this rank holds: `size` values from `start` on of the flattened
    parameter, which lie from `position` on in the rank's flat values."""

    name: str
    start: int
    size: int
    position: int


@dataclass(frozen=True)
class GroupShard:
    """This rank's part of a parameter group; under ZeRO-3 of a sub-group.

    flat: (values,) the rank's fp32 values; the key of the optimiser's state.
    """

    group: str
    flat: torch.Tensor
    parameters: list[ParameterShard]


@dataclass(frozen=True)
class SavedPiece:
    """A stretch of one tensor of the optimiser's state in a checkpoint's file."""

    file: object  # an open safetensors file
    name: str
    start: int = 0  # in the flattened parameter


class ZeroShards:
    """This rank's shards of the optimiser's state, in a form that no number of ranks is part of."""

    def __init__(self, engine):
        self.optimizer = engine.optimizer
        self.stage = engine.zero_optimization_stage()
        self.names = {id(p): name for name, p in engine.module.named_parameters()}

    def groups(self) -> Iterator[GroupShard]:
        yield from self._stage3_groups() if self.stage == 3 else self._stage2_groups()

    def _stage2_groups(self) -> Iterator[GroupShard]:
        zero = self.optimizer
        for group, flat, parameters in zip(
            zero.param_groups, zero.single_partition_of_fp32_groups, zero.bit16_groups
        ):
            shards = []
            for parameter in parameters:
                mapping = parameter._hp_mapping
                if mapping is None:
                    continue
                in_parameter, in_flat = mapping.lp_fragment_address, mapping.hp_fragment_address
                name = self.names[id(parameter)]
                shards.append(
                    ParameterShard(name, in_parameter.start, in_parameter.numel, in_flat.start)
                )
            yield GroupShard(group["name"], flat, shards)

    def _stage3_groups(self) -> Iterator[GroupShard]:
        """Each rank has a shard of every parameter; those of the last ranks may end in padding."""
        zero = self.optimizer
        sub_groups = zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups)
        for number, (flat, parameters) in enumerate(sub_groups):
            shards = []
            for parameter in parameters:
                _, position, shard_size = zero.grad_position[zero.get_param_id(parameter)]
                start = dist.get_rank() * shard_size
                size = max(0, min(shard_size, parameter.ds_numel - start))
                if size:
                    name = self.names[id(parameter)]
                    shards.append(ParameterShard(name, start, size, position))
            group = zero.param_groups[zero.sub_group_to_group_id[number]]["name"]
            yield GroupShard(group, flat, shards)

    def state(self) -> dict[str, torch.Tensor]:
        """The optimiser's state of this rank by names that a checkpoint's files have.

        "exp_avg|<parameter>|<start>" is a stretch of that parameter's values, laid out flat;
        "step|<group>" is a number that a group has once.
        """
        tensors = {}
        for group in self.groups():
            for key, value in self.optimizer.state[group.flat].items():
                if value.shape != group.flat.shape:
                    tensors[f"{key}|{group.group}"] = value
                    continue
                for shard in group.parameters:
                    stretch = value[shard.position : shard.position + shard.size]
                    tensors[f"{key}|{shard.name}|{shard.start}"] = stretch
        return tensors

    def load_state(self, files: list[Path]) -> None:
        """Puts this rank's state together from the files of any number of ranks.

        Raises UserError where they lack values of a parameter.
        """
        with contextlib.ExitStack() as stack:
            opened = [stack.enter_context(safe_open(path, "pt")) for path in files]
            pieces = _saved_pieces(opened)
            keys = {key for key, _ in pieces}
            for group in self.groups():
                for key in keys:
                    if (key, group.group) in pieces:
                        self._load_number(group, key, pieces[key, group.group][0])
                    else:
                        self._load_values(group, key, pieces, files[0].parent)

    def _load_number(self, group: GroupShard, key: str, piece: SavedPiece) -> None:
        fused = self.optimizer.optimizer.defaults.get("fused")
        device = group.flat.device if fused else "cpu"
        self.optimizer.state[group.flat][key] = piece.file.get_tensor(piece.name).to(device)

    def _load_values(
        self,
        group: GroupShard,
        key: str,
        pieces: dict[tuple[str, str], list[SavedPiece]],
        folder: Path,
    ) -> None:
        values = torch.zeros_like(group.flat, requires_grad=False)
        self.optimizer.state[group.flat][key] = values
        for shard in group.parameters:
            missing = shard.size
            for piece in pieces[key, shard.name]:
                stretch = piece.file.get_slice(piece.name)
                first = max(shard.start, piece.start)
                last = min(shard.start + shard.size, piece.start + stretch.get_shape()[0])
                if first >= last:
                    continue
                position = shard.position + first - shard.start
                source = stretch[first - piece.start : last - piece.start]
                values[position : position + last - first] = source.to(group.flat.device)
                missing -= last - first
            if missing:
                raise UserError(f"{folder} does not fit the recipe: it lacks {key} of {shard.name}")


def _saved_pieces(files: list) -> dict[tuple[str, str], list[SavedPiece]]:
    """{(key, parameter or group): pieces} of open files, whose tensors are "optimizer|<name>"."""
    pieces = defaultdict(list)
    for file in files:
        for name in file.keys():  # noqa: SIM118 - it is no dict
            kind, _, rest = name.partition("|")
            if kind == "optimizer":
                key, owner, *start = rest.split("|")
                pieces[key, owner].append(SavedPiece(file, name, int(start[0]) if start else 0))
    return pieces


@contextlib.contextmanager
def gathered_parameters(engine) -> Iterator[None]:
    """A context in which every rank has the model of the checkpoint and computes on it by itself.

    ZeRO-3 gathers all weights. Where BatchNorm's statistics are each rank's own, all ranks have
    those of rank 0. All ranks enter together.
    """
    statistics = batchnorm_buffers(engine.module)
    own_values = [tensor.clone() for tensor in statistics]
    for tensor in statistics:
        dist.broadcast(tensor, 0)
    try:
        if engine.zero_optimization_stage() < 3:
            yield
        else:
            from deepspeed.runtime.zero.stage3 import unwrap_model_for_generation

            with unwrap_model_for_generation(engine):
                yield
    finally:
        for tensor, value in zip(statistics, own_values):
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


def layer_norms(engine, ranks: DistContext) -> dict[str, float]:
    """Norms of gradient and parameters of the last layers of encoder and language model.

    The paper's analysis of which of the two dominates (Fig. 2) needs them, between backward and
    step. Under ZeRO each rank holds a shard of both, so squares are summed over ranks.
    """
    layers = engine.module.last_layers()
    names, squares = [], []
    for part, layer in layers.items():
        trained = [p for p in layer.parameters() if p.requires_grad]
        shards = _gradient_shards(engine, trained, ranks)
        for number, kind in enumerate(("grad", "param")):
            names.append(f"{kind}_norm/{part}")
            squares.append(
                sum(float(shard[number].detach().double().square().sum()) for shard in shards)
            )
    return {name: math.sqrt(square) for name, square in zip(names, ranks.sum(*squares))}


def _gradient_shards(
    engine, parameters: list[torch.nn.Parameter], ranks: DistContext
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(gradient, values) of this rank's shard of each parameter that it has one of."""
    from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_grad

    shards = []
    for parameter in parameters:
        if engine.zero_optimization_stage() == 3:
            start = ranks.rank * parameter.partition_numel()
            size = max(0, parameter.ds_numel - start)  # the rest is padding
            gradient = safe_get_local_grad(parameter)
            shards.append((gradient[:size], safe_get_local_fp32_param(parameter)[:size]))
        elif parameter._hp_mapping is not None:
            mapping, index = parameter._hp_mapping, parameter._index_in_param_group
            shards.append((mapping.get_lp_grad_fragment(index), mapping.get_hp_fragment()))
    return shards


def batchnorm_buffers(model: torch.nn.Module) -> list[torch.Tensor]:
    """The buffers of BatchNorms that train: what a forward pass in training changes."""
    buffers = []
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm) and module.training:
            buffers += module.buffers(recurse=False)
    return buffers
