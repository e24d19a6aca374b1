"""The process group: one process is one rank, one rank is one GPU where there are any."""

from __future__ import annotations

import logging
import os
import platform
import warnings
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from flallm.config import Train
from flallm.distributed.rendezvous import complete_environment, join_group
from flallm.utils import usable_cpus


@dataclass(frozen=True)
class DistContext:
    """This process among all: one process is one rank, one rank is one GPU where there are any."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def gather(self, value) -> list:
        """The values of all ranks, in the order of ranks, on every rank."""
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def sum(self, *values: float) -> list[float]:
        """Each value summed over ranks."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()


def init_distributed(timeout: float = 600) -> DistContext:
    """Joins the process group that torchrun, deepspeed or srun describes in the environment; alone: a group of one.

    timeout: seconds without an answer from the others after which a rank gives up.
    """
    env = os.environ
    complete_environment()
    rank, world_size = int(env["RANK"]), int(env["WORLD_SIZE"])
    if torch.cuda.is_available():
        env.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # clips differ in length, and so do the blocks of every step
        # A run that goes on is to differ from one never stopped as little as kernels allow; this costs no time (docs/benchmarks.md).
        env.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # DeepSpeed calls what torch renames
    import deepspeed

    if hasattr(deepspeed.ops, "__compatible_ops__"):  # else every start on a CPU compiles it (79 s), and a killed build locks the next
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        # With --gpus-per-task Slurm shows a task its own GPU alone, which then has the number 0.
        device = torch.device("cuda", int(env["LOCAL_RANK"]) % torch.cuda.device_count())
        env["LOCAL_RANK"] = str(device.index)  # DeepSpeed takes it for the number of the GPU
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        join_group(rank, world_size, device, timedelta(seconds=timeout))
    deepspeed.init_distributed(dist.get_backend(), verbose=False)  # takes the group that is there
    ranks = DistContext(rank, world_size, device)
    if device.type == "cpu":
        _share_cores(ranks)
    return ranks


def _share_cores(ranks: DistContext) -> None:
    """Ranks that may run on the same cores share them, whatever launcher has started them."""
    machine, cores = platform.node(), os.sched_getaffinity(0)
    sharing = 0
    for other_machine, other_cores in ranks.gather((machine, cores)):
        sharing += machine == other_machine and not cores.isdisjoint(other_cores)
    torch.set_num_threads(usable_cpus(sharing))


def shutdown() -> None:
    """Ranks that end without this die with SIGABRT under gloo, after correct work."""
    if dist.is_initialized():
        dist.destroy_process_group()


def computes_in_bf16(config: Train, kind: str) -> bool:
    """Whether the recipe says so and a device of that kind, cpu or cuda, is fit for it. A CPU without instructions for it takes 40 times
    as long as for fp32 (matrices of 512 x 512, AVX2 alone)."""
    return config.precision == "bf16" and (kind == "cuda" or getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)())


def precision(config: Train, device: torch.device) -> torch.autocast:
    """The context in which a model computes outside training."""
    return torch.autocast(device.type, torch.bfloat16, enabled=computes_in_bf16(config, device.type))
