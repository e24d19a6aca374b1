"""Starts ranks on this machine."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

from flallm.distributed.context import shutdown
from flallm.distributed.rendezvous import rendezvous
from flallm.utils import UserError


def spawn(function: Callable, world_size: int, *args) -> None:
    """Runs `function(*args)` on `world_size` ranks of this machine; the first to fail ends all."""
    if torch.cuda.is_available() and world_size > torch.cuda.device_count():
        have = torch.cuda.device_count()
        raise UserError(f"{world_size} ranks need a GPU each, and this machine has {have}")
    where = rendezvous()
    torch.multiprocessing.spawn(_run_rank, (function, world_size, where, args), world_size)


def _run_rank(
    rank: int, function: Callable, world_size: int, where: dict[str, str], args: tuple
) -> None:
    os.environ.update(
        where,
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
    )
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"  # should this be below a torchrun
    try:
        function(*args)
    finally:
        shutdown()
