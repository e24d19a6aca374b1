"""The figures of a plan as `flallm plan` prints them: a row a figure, and what it follows from."""

from __future__ import annotations

from dataclasses import dataclass

from flallm.planning.devices import GIB, Device
from flallm.planning.estimate import (
    DECODE_S,
    DISK_GB_S,
    LATENCY_S,
    NODE_GPUS,
    SNAPSHOT_GB_S,
    Memory,
    Plan,
    is_zero3,
)

DIVISORS = {"GiB": GIB, "GB": 1e9, "M": 1e6, "%": 0.01}


@dataclass(frozen=True)
class Row:
    """A figure and what it follows from.

    unit: GiB or GB (the value is in bytes), M, s, % (the value is a share), or what it counts.
    """

    section: str
    name: str
    value: float
    unit: str
    how: str

    def __str__(self) -> str:
        if self.unit == "s":
            return duration(self.value)
        value = self.value / DIVISORS.get(self.unit, 1)
        return f"{value:,.{_digits(float(value))}f} {self.unit}".strip()


def _digits(value: float) -> int:
    if value.is_integer() or abs(value) >= 1000:
        return 0
    if abs(value) >= 100:
        return 1
    return 2 if abs(value) >= 1 else 3


def duration(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min"), (1, "s")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds * 1000:.1f} ms"


def rows(plan: Plan) -> list[Row]:
    return [
        *_data(plan),
        *_parameters(plan),
        *_memory(plan),
        *_computation(plan),
        *_communication(plan),
        *_time(plan),
        *_reading(plan),
        *_checkpoints(plan),
    ]


def _data(plan: Plan) -> list[Row]:
    batches = plan.batches
    clips = batches.clips_per_step
    epochs = batches.steps / batches.epoch_steps
    steps = (
        f"{batches.epoch_steps:,} an epoch x {epochs:g} epochs, "
        f"{clips:.1f} clips a step over all ranks, {clips / plan.ranks:.1f} each"
    )
    balance = "mean over steps of (mean / max over ranks of frames + what a text costs in frames)"
    return [
        Row("data", "clips", batches.clips, "", plan.lengths.source),
        Row("data", "steps", batches.steps, "", steps),
        Row("data", "balance", batches.balance, "", balance),
        Row("data", "padding", batches.padding, "%", "of target positions"),
    ]


def _parameters(plan: Plan) -> list[Row]:
    step = plan.step
    trained = {part: trained for part, (trained, _) in step.parts.items() if trained}
    frozen = {part: frozen for part, (_, frozen) in step.parts.items() if frozen}
    rows = [
        Row("parameters", "trained", step.trained, "M", _millions(trained)),
        Row("parameters", "frozen", step.frozen, "M", _millions(frozen) or "none"),
    ]
    if step.trimmed:
        how = "words that the training text does not need, left out by flallm trim"
        rows.append(Row("parameters", "trimmed away", step.trimmed, "M", how))
    return rows


def _millions(parts: dict[str, int]) -> str:
    return ", ".join(f"{part} {number / 1e6:.2f}" for part, number in parts.items())


def _memory(plan: Plan) -> list[Row]:
    sizes, train = plan.memory, plan.config.train
    zero3 = is_zero3(plan.config, plan.device)
    per_rank = f"/ {plan.ranks} ranks"
    moment_bytes = 8 if train.optimizer == "adamw" else 4
    clips = len(plan.micro_batch)
    frames = plan.lengths.frames[plan.micro_batch].sum()
    micro_batch = f"{clips} clip{'' if clips == 1 else 's'}, {frames} used frames"
    how = {
        "weights": "4 bytes x all parameters: fp32",
        "master weights": f"4 bytes x trained {per_rank}",
        "moments": f"{moment_bytes} bytes x trained {per_rank}: {train.optimizer}",
        "gradients": f"4 bytes x trained {per_rank}",
        "bucket": "where gradients are put together to be sent",
        "activations": f"of the largest micro-batch: {micro_batch}, {train.precision}",
        "gathered": "other ranks' weights that a step has at a time: stage3_max_live_parameters",
        "other ranks'": "all their weights, for a look at dev or a checkpoint",
        "update": "a copy of the largest group's gradients and the optimiser's temporaries, "
        "once activations are gone",
        "peak": f"with {plan.device.context} GiB of the process; "
        f"{plan.device.name}: {plan.device.gib:.1f} GiB",
    }
    if zero3:
        how["weights"] = f"4 bytes x all parameters {per_rank}: fp32"
        how["master weights"] = "the weights themselves"
    if sizes.offloaded:
        how["moments"] = "on the host"
        if not zero3:
            how["master weights"] = "on the host"
    values = {
        "weights": sizes.weights,
        "master weights": sizes.master_weights,
        "moments": sizes.moments,
        "gradients": sizes.gradients,
        "bucket": sizes.bucket,
        "activations": sizes.activations,
    }
    if zero3:
        values |= {"gathered": sizes.gathered, "other ranks'": sizes.other_ranks}
    values |= {"update": sizes.update, "peak": sizes.peak}
    return [Row("memory", name, value, "GiB", how[name]) for name, value in values.items()]


def _computation(plan: Plan) -> list[Row]:
    step, device = plan.step, plan.device
    operations = f"a step and rank, {plan.frames:.1f} used frames"
    if step.encoder_flops:
        operations += f", {step.encoder_flops / step.flops:.0%} of them the encoder's"
    rows = [Row("computation", "operations", plan.flops / 1e12, "TFLOP", operations)]
    if plan.clips_per_s:
        return rows
    if device.kind == "cuda":
        how = (
            f"at {device.reached:.0%} of {device.tflops:g} TFLOP/s, "
            f"on the slowest rank by balance, and {duration(plan.launch)} to launch it: "
            "both as on an H100"
        )
    else:
        how = (
            f"at {device.reached:.0%} of the {device.tflops:.3g} TFLOP/s "
            "at which this rank's cores multiply matrices; decoding and what ranks send not counted"
        )
    return [*rows, Row("computation", "time", plan.compute, "s", how)]


def _communication(plan: Plan) -> list[Row]:
    sent, step = plan.communication, plan.step
    if not sent:
        return []
    if is_zero3(plan.config, plan.device):
        reduction = "reduce-scatter"
        gathered = "all, for each forward and each backward pass"
        behind = "the computation"
    else:
        reduction = "all-reduce in a ring"
        gathered = "what ranks have updated"
        behind = "the backward pass, 2/3 of the computation"
    where = "in the node" if plan.ranks <= NODE_GPUS else "a GPU over the network"
    gradient_bytes = step.reduced / step.trained
    gradients = f"sent by a rank a step: {reduction}, {gradient_bytes:.1f} bytes a parameter"
    weights = f"sent by a rank a step: all-gather of {gathered}, fp32"
    hidden = f"behind {behind}, at {sent.link / 1e9:g} GB/s {where}"
    latency = f"{LATENCY_S * 1e6:.0f} us each [assumed]"
    exposed = f"the rest, and {step.norms} BatchNorms over ranks, twice {latency}"
    return [
        Row("communication", "gradients", sent.gradients, "GB", gradients),
        Row("communication", "weights", sent.weights, "GB", weights),
        Row("communication", "hidden", sent.hidden, "s", hidden),
        Row("communication", "exposed", sent.exposed, "s", exposed),
    ]


def _time(plan: Plan) -> list[Row]:
    if plan.clips_per_s:
        how = f"{plan.clips_per_s:g} clips/s as given"
    else:
        parts = "computation + exposed communication" if plan.communication else "computation"
        how = f"{parts}: {plan.batches.clips_per_step / plan.step_seconds:.1f} clips/s"
    not_counted = "all steps; looks at the dev split not counted"
    return [
        Row("time", "step", plan.step_seconds, "s", how),
        Row("time", "run", plan.run_seconds, "s", not_counted),
    ]


def _reading(plan: Plan) -> list[Row]:
    rows = []
    if plan.decoding_cores is not None:
        how = (
            f"{plan.frames / plan.step_seconds:.0f} used frames/s x {DECODE_S * 1e3} ms of a core "
            f"(docs/planning.md); data.workers is {plan.config.data.workers}"
        )
        unit = "a GPU" if plan.device.kind == "cuda" else "a rank"
        rows.append(Row("reading", "decoding cores", plan.decoding_cores, unit, how))
    how = f"by all ranks: {plan.lengths.clip_bytes / 1e3:.0f} kB a clip"
    return [*rows, Row("reading", "bytes", plan.read_bytes_per_s / 1e6, "MB/s", how)]


def _checkpoints(plan: Plan) -> list[Row]:
    how = (
        f"rank 0 copies all weights and its share at {SNAPSHOT_GB_S:g} GB/s [assumed]; "
        f"written behind the steps at {DISK_GB_S:g} GB/s [assumed] "
        f"in {duration(plan.checkpoint.write)}"
    )
    return [
        Row("checkpoints", "size", plan.checkpoint.size, "GiB", "weights and moments, fp32"),
        Row("checkpoints", "holds up", plan.checkpoint.stall, "s", how),
    ]


def advice(sizes: Memory, device: Device) -> str:
    """What to change where the peak is over the device's memory; empty where it fits."""
    if sizes.peak <= device.gib * GIB:
        return ""
    if sizes.activations > sizes.state + sizes.update:
        how = (
            "raise train.micro_batches, bound train.batch_frames, "
            "or set llm.gradient_checkpointing=true"
        )
    else:
        how = (
            "train low-rank updates with llm.lora.rank=16, "
            "keep the optimiser on the host with train.deepspeed=zero2_offload.json, "
            "share out weights as well with train.deepspeed=zero3.json, "
            "trim the vocabulary, or take more ranks"
        )
    return f"does not fit: {sizes.peak / GIB:.1f} GiB of {device.gib:.1f}; {how}"


def show(rows: list[Row]) -> str:
    """A line a row; the section is named once."""
    lines, section = [], ""
    for row in rows:
        label = "" if row.section == section else row.section
        section = row.section
        lines.append(f"{label:14}{row.name:18}{row!s:>14}   {row.how}")
    return "\n".join(lines)
