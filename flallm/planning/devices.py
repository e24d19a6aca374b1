"""What a GPU, or this machine's CPU, computes, holds and sends."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from functools import cache

import torch

from flallm.config import Train
from flallm.distributed.context import computes_in_bf16
from flallm.utils import UserError, usable_cpus

GIB = 2**30
# The share of the peak rate that a step reaches: of a GPU by steps of 8 to 64 clips on an H100
# (docs/benchmarks.md); of a CPU, whose peak is measured, by an EPYC with AVX512-BF16
# (docs/planning.md).
GPU_SHARE = 0.12
CPU_SHARE = {"bf16": 0.15, "fp32": 0.47}
MATRIX = 512  # rows and columns of the matrices that measure a core


@dataclass(frozen=True)
class Device:
    """One rank's device; GPUs by their makers' data sheets.

    Attributes:
        tflops: peak dense bf16 rate, TFLOP/s; of a CPU the measured rate
        gib: memory, GiB
        node: GB/s that it sends in one direction inside a node of 8
        network: GB/s that it sends in one direction between nodes
        context: GiB that the process takes before it has a model, on an H100 by docs/benchmarks.md
        reached: the share of `tflops` that a step reaches
    """

    name: str
    tflops: float
    gib: float
    node: float = 0.0
    network: float = 0.0
    kind: str = "cuda"
    context: float = 1.7
    reached: float = GPU_SHARE


DEVICES = {
    "a100-40": Device("A100 40 GB", 312, 40e9 / GIB, 300, 25),
    "a100-80": Device("A100 80 GB", 312, 80e9 / GIB, 300, 25),
    "h100-80": Device("H100 80 GB", 989, 80e9 / GIB, 450, 50),
    "h200": Device("H200", 989, 141e9 / GIB, 450, 50),
}


def device(name: str, world_size: int, train: Train) -> Device:
    """One of `DEVICES`, or with "cpu" one of `world_size` ranks that share this machine."""
    if name == "cpu":
        return _cpu(world_size, train)
    if name not in DEVICES:
        raise UserError(f"--gpu: {name!r} is none of {', '.join(DEVICES)}, cpu")
    return DEVICES[name]


def _cpu(world_size: int, train: Train) -> Device:
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    cores = usable_cpus()
    cores_of_rank = cores // world_size or cores / world_size
    precision = "bf16" if computes_in_bf16(train, "cpu") else "fp32"
    return Device(
        "CPU",
        core_tflops(precision) * cores_of_rank,
        gib / world_size,
        kind="cpu",
        context=0.8,
        reached=CPU_SHARE[precision],
    )


@cache
def core_tflops(precision: str) -> float:
    """TFLOP/s at which one core multiplies two matrices, measured in CPU time of this thread."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    matrix = torch.randn(MATRIX, MATRIX, dtype=dtype)
    seconds = []
    for _ in range(20):
        began = time.thread_time()
        matrix @ matrix
        seconds.append(time.thread_time() - began)
    torch.set_num_threads(threads)
    return 2 * MATRIX**3 / min(seconds) / 1e12
