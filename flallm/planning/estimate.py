"""The figures of a recipe before it runs: steps, memory, time, communication, reading, checkpoints.

No GPU is touched. Sizes come from a step without values (memory.py) and from the lengths of the
clips (lengths.py). Rates are the constants below; a measured `clips_per_s` replaces the computed
time of a step. rows.py puts the figures into words.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flallm.config import Config
from flallm.data.sampler import make_sampler
from flallm.distributed.deepspeed_config import deepspeed_config
from flallm.planning.devices import GIB, Device
from flallm.planning.lengths import Lengths, training_lengths
from flallm.planning.memory import Step, dry_step, tokenizer_and_shape
from flallm.utils import UserError

SAMPLED_STEPS = 200  # evenly spread over an epoch
CHARACTERS_PER_TOKEN = 4
# A micro-batch takes as long as the host needs to launch its kernels and to run ZeRO's hooks, for
# each tensor that trains, and then as its operations: a line through steps of 8 to 64 clips on an
# H100 (docs/benchmarks.md).
LAUNCH_S = 0.5e-3  # seconds a tensor
BACKWARD_SHARE = 2 / 3  # of a step's computation; gradients are sent behind it
NODE_GPUS = 8
LATENCY_S = 40e-6  # [assumed] of a collective of a few numbers
SNAPSHOT_GB_S = (
    8.0  # [assumed] from a GPU into the host's memory, while a checkpoint stalls training
)
DISK_GB_S = 1.0  # [assumed] of a node into a shared file system
# Core-seconds of a used frame with augmentation: 49.6 clips/s of 13.8 frames (docs/planning.md).
DECODE_S = 1.5e-3


@dataclass(frozen=True)
class Batches:
    """What the sampler makes of the clips.

    Attributes:
        clips: in the training split
        epoch_steps: steps of an epoch
        steps: steps of the run
        balance: mean over steps of mean / max over ranks of their work
        padding: share of target positions
        largest: the micro-batches with most used frames and with most target positions
    """

    clips: int
    epoch_steps: int
    steps: int
    balance: float
    padding: float
    largest: list[np.ndarray]

    @property
    def clips_per_step(self) -> float:
        return self.clips / self.epoch_steps


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank, of ZeRO as DeepSpeed does it, with fp32 weights, master weights and
    gradients (autocast computes in bf16).

    Attributes:
        weights: under ZeRO-3 the rank's share, which is its master weights too
        bucket: where gradients are put together to be sent
        gathered: other ranks' weights that a ZeRO-3 step has at a time
        other_ranks: all weights of other ranks, which ZeRO-3 gathers for dev or a checkpoint
        update: a copy of the largest group's gradients and the optimiser's temporaries
        process: what the process takes before it has a model
        offloaded: whether the optimiser is on the host
    """

    weights: float
    master_weights: float
    moments: float
    gradients: float
    bucket: float
    activations: float
    gathered: float
    other_ranks: float
    update: float
    process: float
    offloaded: bool

    @property
    def state(self) -> float:
        return self.weights + self.master_weights + self.moments + self.gradients

    @property
    def peak(self) -> float:
        """The most at a time: in the backward pass, where ZeRO-3 gathers all, or in the update."""
        backward = self.bucket + self.activations + self.gathered
        return self.process + self.state + max(backward, self.other_ranks, self.update)


@dataclass(frozen=True)
class Communication:
    """What a rank sends in a step, in bytes, and how long that takes.

    Attributes:
        gradients, weights: bytes that a rank sends
        link: bytes a second
        hidden: seconds behind the computation
        exposed: seconds that the rank waits
    """

    gradients: float
    weights: float
    link: float
    hidden: float
    exposed: float


@dataclass(frozen=True)
class Checkpoint:
    """size: bytes; stall, write: seconds that it stalls training, and that it is written behind."""

    size: float
    stall: float
    write: float


@dataclass(frozen=True)
class Plan:
    """Every figure of one stage on `ranks` devices.

    Attributes:
        micro_batch: the clips of the micro-batch that takes most memory, which is `step`
        frames: used frames of a rank's step
        flops: operations of a rank's step
        launch, compute: seconds to launch a step, and to compute it with its launches
        communication: None on CPUs and where `clips_per_s` is given
        clips_per_s: of all ranks, as measured; None: computed
        step_seconds, run_seconds: of a step and of all steps
        decoding_cores: CPU cores that a rank needs to decode video; None for features
        read_bytes_per_s: by all ranks
    """

    config: Config
    ranks: int
    device: Device
    lengths: Lengths
    batches: Batches
    micro_batch: np.ndarray
    step: Step
    memory: Memory
    frames: float
    flops: float
    launch: float
    compute: float
    communication: Communication | None
    clips_per_s: float | None
    step_seconds: float
    run_seconds: float
    decoding_cores: float | None
    read_bytes_per_s: float
    checkpoint: Checkpoint


def estimate(
    config: Config,
    ranks: int,
    device: Device,
    clips_per_s: float | None = None,
    cached: bool = False,
) -> Plan:
    """clips_per_s: of all ranks, as measured. cached: plans for features of the shards' clips.

    Raises UserError where there are no lengths, or too few clips for the ranks.
    """
    lengths = _lengths(config, cached)
    batches = sample_batches(config, lengths, ranks)
    micro_batch, step = _largest_step(config, lengths, batches, device.kind)
    frames = float(lengths.frames.mean()) * batches.clips / batches.epoch_steps / ranks
    flops = step.flops / int(lengths.frames[micro_batch].sum()) * frames
    compute = flops / (device.reached * device.tflops * 1e12) / batches.balance
    launch, communication = 0.0, None
    if device.kind == "cuda":
        launch = LAUNCH_S * step.tensors * config.train.micro_batches
        compute += launch
        if not clips_per_s:
            communication = communicate(config, step, ranks, device, compute)
    seconds = compute + (communication.exposed if communication else 0)
    if clips_per_s:
        seconds = batches.clips_per_step / clips_per_s
    return Plan(
        config=config,
        ranks=ranks,
        device=device,
        lengths=lengths,
        batches=batches,
        micro_batch=micro_batch,
        step=step,
        memory=memory(config, step, ranks, device),
        frames=frames,
        flops=flops,
        launch=launch,
        compute=compute,
        communication=communication,
        clips_per_s=clips_per_s,
        step_seconds=seconds,
        run_seconds=batches.steps * seconds,
        decoding_cores=None if lengths.features else frames / seconds * DECODE_S,
        read_bytes_per_s=lengths.clip_bytes * batches.clips / batches.epoch_steps / seconds,
        checkpoint=checkpoint(config, step, ranks),
    )


def _lengths(config: Config, cached: bool) -> Lengths:
    lengths = training_lengths(config)
    features = lengths.features or cached
    if features and config.llm.input == "frames":
        raise UserError(
            f"llm.input=frames needs shards of video: "
            f"{config.data.shards} is to be read as features"
        )
    if not cached:
        return lengths
    bf16_features = lengths.frames.mean() * config.encoder.channels * 2
    return Lengths(lengths.frames, lengths.characters, lengths.source, bf16_features, features=True)


def sample_batches(config: Config, lengths: Lengths, ranks: int) -> Batches:
    """Steps evenly spread over the first epoch."""
    frames, characters = lengths.frames, lengths.characters
    sampler = make_sampler(config, frames, characters, ranks)
    epoch_steps = sampler.steps(0)
    numbers = np.linspace(0, epoch_steps - 1, min(SAMPLED_STEPS, epoch_steps)).astype(int)
    balances, micro_batches = [], []
    for number in np.unique(numbers):
        groups = sampler.step(0, int(number))  # micro-batches, each with the clips of every rank
        work = np.zeros(ranks)
        for group in groups:
            for rank in range(ranks):
                texts = characters[group[rank]].sum()
                work[rank] += float(frames[group[rank]].sum() + sampler.text_cost * texts)
            micro_batches += group
        balances.append(np.mean(work) / max(work))
    positions = [len(clips) * int(characters[clips].max()) for clips in micro_batches]
    targets = sum(int(characters[clips].sum()) for clips in micro_batches)
    used = [int(frames[clips].sum()) for clips in micro_batches]
    largest = sorted({int(np.argmax(used)), int(np.argmax(positions))})
    return Batches(
        clips=len(frames),
        epoch_steps=epoch_steps,
        steps=config.train.steps or sampler.total(config.train.epochs),
        balance=float(np.mean(balances)),
        padding=1 - targets / sum(positions),
        largest=[micro_batches[number] for number in largest],
    )


def _largest_step(
    config: Config, lengths: Lengths, batches: Batches, kind: str
) -> tuple[np.ndarray, Step]:
    """The micro-batch with the most activations, and its step."""
    steps = []
    with tokenizer_and_shape(config) as (text, shaped):
        for clips in batches.largest:
            frames = lengths.frames[clips].tolist()
            tokens = int(lengths.characters[clips].max()) // CHARACTERS_PER_TOKEN + 2
            steps.append(dry_step(shaped, text, frames, tokens, lengths.features, kind))
    largest = int(np.argmax([step.activations for step in steps]))
    return batches.largest[largest], steps[largest]


def is_zero3(config: Config, device: Device) -> bool:
    return _zero(config, device)["stage"] == 3


def _zero(config: Config, device: Device) -> dict:
    return deepspeed_config(config.train, device.kind)["zero_optimization"]


def memory(config: Config, step: Step, ranks: int, device: Device) -> Memory:
    """Memory of a rank whose largest micro-batch is `step`."""
    settings, train = _zero(config, device), config.train
    offload = settings.get("offload_optimizer", {}).get("device", "none")
    offloaded = offload == "cpu" and device.kind == "cuda"
    zero3 = settings["stage"] == 3
    moments = 2 if train.optimizer == "adamw" else 1
    all_weights = 4 * (step.trained + step.frozen)
    share = 4 * step.trained / ranks
    bucket = 4 * min(settings.get("reduce_bucket_size", 5e8), step.trained)
    if settings.get("overlap_comm"):
        bucket *= 2  # one is filled while the other is sent
    live = min(all_weights, 4 * settings.get("stage3_max_live_parameters", 1e9))
    gradients = share * (2 if train.micro_batches > 1 else 1)
    return Memory(
        weights=all_weights / ranks if zero3 else all_weights,
        master_weights=0 if offloaded or zero3 else share,
        moments=0 if offloaded else share * moments,
        gradients=0 if offloaded else gradients,
        bucket=bucket,
        activations=step.activations,
        gathered=live if zero3 else 0,
        other_ranks=all_weights * (1 - 1 / ranks) if zero3 else 0,
        update=0 if offloaded else 4 * step.largest_group / ranks * moments,
        process=device.context * GIB,
        offloaded=offloaded,
    )


def communicate(
    config: Config, step: Step, ranks: int, device: Device, compute: float
) -> Communication:
    """What a rank sends in a step that computes for `compute` seconds."""
    micro_batches, others = config.train.micro_batches, (ranks - 1) / ranks
    link = 1e9 * (device.node if ranks <= NODE_GPUS else device.network)
    if is_zero3(config, device):
        # Reduce-scatter of gradients; weights are gathered for each forward and backward pass.
        gradients = others * step.reduced * micro_batches
        weights = others * 4 * 2 * micro_batches * (step.trained + step.frozen)
        hidden = min((gradients + weights) / link, compute)
    else:
        # A ring sends what it reduces once and, for all ranks to have it, once more.
        gradients = others * 2 * step.reduced * micro_batches
        weights = others * 4 * step.trained
        hidden = min(gradients / link, BACKWARD_SHARE * compute)
    waits = 0.0
    if ranks > 1 and config.encoder.global_batch_norm:
        waits = LATENCY_S * 2 * step.norms * micro_batches
    exposed = (gradients + weights) / link - hidden + waits
    return Communication(gradients, weights, link, hidden, exposed)


def checkpoint(config: Config, step: Step, ranks: int) -> Checkpoint:
    """Weights and moments in fp32. Rank 0 copies all weights and its share of the moments."""
    weights = 4 * (step.trained + step.frozen)
    moments = (8 if config.train.optimizer == "adamw" else 4) * step.trained
    return Checkpoint(
        size=weights + moments,
        stall=(weights + moments / ranks) / (SNAPSHOT_GB_S * 1e9),
        write=(weights + moments) / (DISK_GB_S * 1e9),
    )
