"""What a recipe will cost, before it is started: memory, time, communication, decoding, checkpoints; no GPU is touched.

The model is built from its config without any weights and a training step is run on tensors that have shapes and no values
(PyTorch's fake tensors), under counters of floating-point operations and of living bytes. So sizes are computed, not guessed.
What they are multiplied with is named in every row, and measured numbers take the place of what is assumed here by `clips_per_s`.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import tempfile
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from flallm.config import Config, Train
from flallm.data.dataset import Batch, ClipDataset
from flallm.data.reader import NoShards
from flallm.data.sampler import make_sampler
from flallm.data.tokenizer import TranslationTokenizer
from flallm.data.transforms import used_frames
from flallm.distributed.context import computes_in_bf16
from flallm.distributed.deepspeed_config import deepspeed_config
from flallm.distributed.zero import batchnorm_buffers
from flallm.model.llm import ATTENTION
from flallm.model.translator import Translator
from flallm.training.optim import parameter_groups
from flallm.utils import UserError, usable_cpus

GIB = 2**30
STEPS = 200  # of the plan that are looked at, evenly spread over an epoch
TOKEN = 4  # characters
# A micro-batch takes as long as the host needs to launch its kernels and to run ZeRO's hooks, by the tensors that train, and then as its
# operations: a line through steps of 8 to 64 clips on an H100 (docs/benchmarks.md).
TENSOR = 0.5e-3  # seconds a tensor
MFU = 0.12  # share of the peak
# The same of a CPU, whose peak is the rate at which its cores multiply two matrices: an EPYC with AVX512-BF16, docs/planning.md.
CPU_SHARE = {"bf16": 0.15, "fp32": 0.47}
HIDDEN = 2 / 3  # of a step's computation is the backward pass, behind which gradients are sent
SNAPSHOT = 8.0  # [assumed] GB/s from a GPU into the host's memory, while a checkpoint holds training up
DISK = 1.0  # [assumed] GB/s of a node into a shared file system
LATENCY = 40e-6  # [assumed] seconds of a collective of a few numbers
FRAME_BYTES = 700.0  # of a source frame of 256 pixels as make_shards encodes rendered signers by default; noise of a camera takes more
DECODE = 1.5e-3  # core-seconds a used frame takes with augmentation: 49.6 clips/s of 13.8 of them, see docs/planning.md


@dataclass(frozen=True)
class Device:
    """Peak dense bf16 rate (TFLOP/s), memory (GiB), and what a GPU sends in one direction inside a node and between nodes of 8 (GB/s);
    from the makers' data sheets; the rate of a CPU is measured. reached: the share of that rate that a step has."""

    name: str
    tflops: float
    gib: float
    node: float = 0.0
    network: float = 0.0
    kind: str = "cuda"
    context: float = 1.7  # GiB that the process takes before it has a model, on an H100 by docs/benchmarks.md
    reached: float = MFU


DEVICES = {
    "a100-40": Device("A100 40 GB", 312, 40e9 / GIB, 300, 25),
    "a100-80": Device("A100 80 GB", 312, 80e9 / GIB, 300, 25),
    "h100-80": Device("H100 80 GB", 989, 80e9 / GIB, 450, 50),
    "h200": Device("H200", 989, 141e9 / GIB, 450, 50),
}

# Shapes of models whose folder is not here; what is not named is the default of transformers' config of that type.
SHAPES = {
    "facebook/mbart-large-cc25": {"model_type": "mbart", "vocab_size": 250027, "scale_embedding": True},
    "facebook/mbart-large-50": {"model_type": "mbart", "vocab_size": 250054, "scale_embedding": True},
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


@dataclass(frozen=True)
class Corpus:
    """What is published of a data set's training split: clips, frames of a clip at the percentiles `AT`, characters a frame."""

    clips: int
    frames: tuple[int, ...]
    text: float

    def lengths(self) -> tuple[np.ndarray, np.ndarray]:
        """(frames, characters) of as many clips."""
        rng = np.random.default_rng(0)
        frames = np.interp(rng.random(self.clips) * 100, AT, self.frames).round().astype(np.int32)
        return frames, np.maximum(5, frames * self.text * rng.lognormal(0, 0.25, self.clips)).astype(np.int32)


AT = (0, 5, 25, 50, 75, 95, 99, 100)
CORPORA = {
    "phoenix14t": Corpus(7096, (16, 43, 83, 112, 144, 208, 259, 475), 0.65),  # as its annotations have them
    "csl-daily": Corpus(18401, (30, 60, 90, 115, 150, 220, 290, 500), 0.12),  # [assumed] around 4 s at 30 fps, 16 characters: 20.6 hours of 18,401 clips
    "web": Corpus(10**7, (10, 35, 70, 115, 185, 340, 550, 1500), 0.5),  # [assumed] 5.8 s a clip
    "how2sign": Corpus(31165, (15, 40, 95, 160, 260, 500, 760, 2500), 0.5),  # [assumed] around 8 s at 24 and 30 fps
}


class StubTokenizer:
    """Stands where a tokenizer does that is not here: sizes and special tokens."""

    start, before, after, pad, end = [0], [], [], 1, 2

    def __init__(self, size: int):
        self.size = self.rows = size

    def __len__(self) -> int:
        return self.size


class MemoryTracker(TorchDispatchMode):
    """Counts bytes of the tensors that operations make, as long as they live: `now`, and `most` so far.

    collect: whether some of them are in cycles, as checkpointing leaves them. Python frees those of tensors without values rarely: 9.4 GiB of a
    step of LLaMA-7B, where 1.2 are alive and an H200 had 1.3 (docs/benchmarks.md).
    """

    def __init__(self, collect: bool):
        super().__init__()
        self.now = self.most = self.calls = 0
        self.collect = collect
        self.known: set[int] = set()

    def __enter__(self) -> MemoryTracker:
        gc.freeze()  # what was there before need not be looked through each time
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
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage())._cdata not in self.known:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.now)
        return out

    def _gone(self, storage: int, size: int) -> None:
        self.known.discard(storage)
        self.now -= size


@dataclass
class Step:
    """A training step on one micro-batch of one rank, computed without values."""

    parts: dict[str, tuple[int, int]]  # part -> (parameters that train, that are frozen)
    largest_group: int  # parameters of the largest group of the optimiser
    norms: int  # BatchNorms that train
    tensors: int  # that train
    trimmed: int  # parameters of words that `flallm trim` has left out
    reduced: int  # bytes of gradients as they are sent
    flops: int
    encoder_flops: int
    activations: int  # bytes at the moment when there are most


def dry_step(config: Config, text: TranslationTokenizer | StubTokenizer, lengths: list[int], tokens: int, features: bool = False, kind: str = "cpu") -> Step:
    """Forward and backward of a micro-batch of clips with so many used frames, texts of so many tokens. features: in place of video; kind: of the device."""
    from deepspeed.runtime.torch_autocast import LOWER_PRECISION_SAFE_MODULES

    half_precision = computes_in_bf16(config.train, kind)
    frames, labels = torch.tensor(lengths), torch.full((len(lengths), tokens), text.end)
    # Without the word loss, whose shapes depend on values; it is one linear layer, which is put there to be counted.
    word_loss = config.train.word_loss
    config = replace(config, encoder=replace(config.encoder, weights=None, global_batch_norm=False), train=replace(config.train, word_loss=0.0))
    with FakeTensorMode(allow_non_fake_inputs=True):
        # peft moves new weights to where they already are, which tensors without values do not allow.
        with patch.object(torch.nn.Module, "to", lambda module, *_, **__: module):
            model = Translator(config, text, weights=False).train()
        if word_loss:
            model.words = torch.nn.Linear(config.encoder.channels, len(text))
        model.language.set_attn_implementation(ATTENTION[kind])
        for p in model.parameters():
            if p.requires_grad:  # ZeRO takes a gradient away as soon as it is there
                p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        frame, dtype = ((config.encoder.channels,), torch.bfloat16) if features else ((config.data.crop, config.data.crop, 3), torch.uint8)
        video = torch.empty(sum(lengths), *frame, dtype=dtype)
        live, counter = MemoryTracker(config.llm.gradient_checkpointing), FlopCounterMode(display=False)
        with live, counter:
            with torch.autocast("cpu", torch.bfloat16, enabled=half_precision):
                loss, _ = model(Batch(video, frames, labels, [], [], []))
            loss.backward()
    by_module = counter.get_flop_counts()
    half = {id(p) for m in model.modules() if type(m) in LOWER_PRECISION_SAFE_MODULES for p in m.parameters(recurse=False)} if half_precision else set()
    count = {part: [*module.parameters()] for part, module in model.named_children()}
    groups = parameter_groups(model, config.train)
    trained = [p for group in groups for p in group["params"]]
    return Step(
        {part: tuple(sum(p.numel() for p in params if p.requires_grad is trains) for trains in (True, False)) for part, params in count.items()},
        max(sum(p.numel() for p in group["params"]) for group in groups),
        len(batchnorm_buffers(model)) // 3,
        len(trained),
        _trimmed(model),
        sum(p.numel() * (2 if id(p) in half else 4) for p in trained),
        counter.get_total_flops(),
        sum(by_module.get("Translator.encoder", {}).values()),
        live.most + video.nbytes,
    )


def _trimmed(model: Translator) -> int:
    tables = {id(m.weight): m.weight.shape for m in (model.language.get_input_embeddings(), model.language.get_output_embeddings())}
    before = getattr(model.language.config, "trimmed_from", 0)
    return sum((before - words) * width for words, width in tables.values()) if before else 0


@dataclass(frozen=True)
class Estimate:
    """A number with what it follows from. unit: GiB (the value is in bytes), GB, M, s, % (the value is a share), or what a number counts."""

    section: str
    name: str
    value: float
    unit: str
    how: str

    def __str__(self) -> str:
        value, unit = self.value, self.unit
        if unit == "s":
            return duration(value)
        divisor = {"GiB": GIB, "GB": 1e9, "M": 1e6, "%": 0.01}.get(unit, 1)
        value = value / divisor
        digits = 0 if float(value).is_integer() or abs(value) >= 1000 else 1 if abs(value) >= 100 else 2 if abs(value) >= 1 else 3
        return f"{value:,.{digits}f} {unit}".strip()


def memory(config: Config, step: Step, N: int, device: Device, batch: str = "") -> list[Estimate]:
    """Bytes on one rank; the last is the most at a time: in the backward pass, in the optimiser's update, or where ZeRO-3 brings all weights together.

    ZeRO as DeepSpeed does it, with fp32 weights, master weights and gradients (autocast computes in bf16). Under ZeRO-3 a rank's share of the weights is its
    master weights too. batch: what the largest micro-batch is.
    """
    settings = deepspeed_config(config.train, device.kind)["zero_optimization"]
    trained, frozen = (sum(part[i] for part in step.parts.values()) for i in (0, 1))
    share, whole, zero = 4 * trained / N, 4 * (trained + frozen), f"/ {N} ranks"
    host = settings.get("offload_optimizer", {}).get("device", "none") == "cpu" and device.kind == "cuda"
    moments, three = 2 if config.train.optimizer == "adamw" else 1, settings["stage"] == 3
    bucket = 4 * min(settings.get("reduce_bucket_size", 5e8), trained) * (2 if settings.get("overlap_comm") else 1)
    live = min(whole, 4 * settings.get("stage3_max_live_parameters", 1e9))
    update = 0 if host else 4 * step.largest_group / N * moments
    state = {
        "weights": (whole / N if three else whole, f"4 bytes x all parameters{f' {zero}' * three}: fp32"),
        "master weights": (0, "the weights themselves" if three else "on the host") if host or three else (share, f"4 bytes x trained {zero}"),
        "moments": (0, "on the host") if host else (share * moments, f"{4 * moments} bytes x trained {zero}: {config.train.optimizer}"),
        "gradients": (0 if host else share * (2 if config.train.micro_batches > 1 else 1), f"4 bytes x trained {zero}"),
    }
    backward = {
        "bucket": (bucket, "where gradients are put together to be sent"),
        "activations": (step.activations, f"of the largest micro-batch: {batch}"),
    } | ({"gathered": (live, "other ranks' weights that a step has at a time: stage3_max_live_parameters")} if three else {})
    others = {"other ranks'": (whole * (1 - 1 / N), "all their weights, for a look at dev or a checkpoint")} if three else {}
    after = {"update": (update, "a copy of the largest group's gradients and the optimiser's temporaries, once activations are gone")}
    held, *at_once = (sum(value for value, _ in rows.values()) for rows in (state, backward, others, after))
    peak = {"peak": (device.context * GIB + held + max(at_once), f"with {device.context} GiB of the process; {device.name}: {device.gib:.1f} GiB")}
    return [Estimate("memory", name, value, "GiB", how) for name, (value, how) in (state | backward | others | after | peak).items()]


def duration(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min"), (1, "s")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds * 1000:.1f} ms"


def device(name: str, world_size: int, train: Train) -> Device:
    """One of `DEVICES` by its name, or with cpu a rank of this machine without a GPU, whose rate is measured."""
    if name != "cpu":
        if name not in DEVICES:
            raise UserError(f"--gpu: {name!r} is none of {', '.join(DEVICES)}, cpu")
        return DEVICES[name]
    gib, cores = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB, usable_cpus()
    precision = "bf16" if computes_in_bf16(train, "cpu") else "fp32"
    return Device(
        "CPU", _core(precision) * (cores // world_size or cores / world_size), gib / world_size, kind="cpu", context=0.8, reached=CPU_SHARE[precision]
    )


@cache
def _core(precision: str) -> float:
    """TFLOP/s at which a core multiplies two matrices, whatever else it does."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    matrix, seconds = torch.randn(512, 512, dtype={"bf16": torch.bfloat16, "fp32": torch.float32}[precision]), []
    for _ in range(20):
        began = time.thread_time()
        matrix @ matrix
        seconds.append(time.thread_time() - began)
    torch.set_num_threads(threads)
    return 2 * len(matrix) ** 3 / min(seconds) / 1e12


def cost(config: Config, world_size: int, device: Device, clips_per_s: float | None = None, cached: bool = False) -> list[Estimate]:
    """Every figure of one stage. clips_per_s: of the whole job, where it was measured. cached: as if it read features of the shards' clips, in place of video.
    Raises UserError where the plan has too few clips for the ranks."""
    frames, texts, source, clip_bytes, features = _lengths(config)
    if (features or cached) and config.llm.input == "frames":
        raise UserError(f"llm.input=frames needs shards of video: {config.data.shards} is to be read as features")
    if cached:
        clip_bytes = frames.mean() * config.encoder.channels * 2
    return list(_figures(config, world_size, device, clips_per_s, frames, texts, source, clip_bytes, features or cached))


def _lengths(config: Config) -> tuple[np.ndarray, np.ndarray, str, float, bool]:
    """(used frames, characters of each training clip, where these are from, bytes of a clip, whether the shards hold features)."""
    try:
        clips = ClipDataset("train", config.data, config.seed)
        return (
            clips.used,
            clips.shards.index["text_length"],
            f"as in {config.data.shards}",
            sum(clips.shards.shard_bytes) / len(clips.used),
            bool(clips.features),
        )
    except NoShards as error:
        if config.name not in CORPORA:
            raise UserError(f"{error}. Lengths without shards are known of {', '.join(CORPORA)}") from None
    frames, texts = CORPORA[config.name].lengths()
    return (
        used_frames(frames, config.data.stride, config.data.max_frames),
        texts,
        f"lengths of {config.name} as published: there are no shards at {config.data.shards}",
        FRAME_BYTES * frames.mean(),
        False,
    )


@contextlib.contextmanager
def _text(config: Config) -> Iterator[tuple[TranslationTokenizer | StubTokenizer, Config]]:
    """The tokenizer of the recipe, and the recipe; of a known model neither is fetched, and the recipe names a folder that has its shape alone."""
    shape = SHAPES.get(config.llm.path)
    if not shape or Path(config.llm.path).exists():
        yield TranslationTokenizer(config.llm), config
        return
    with tempfile.TemporaryDirectory(prefix="flallm-plan-") as folder:
        (Path(folder) / "config.json").write_text(json.dumps(shape), encoding="utf-8")
        yield StubTokenizer(shape["vocab_size"]), replace(config, llm=replace(config.llm, path=folder))


def _figures(
    config: Config, N: int, device: Device, clips_per_s: float | None, frames, texts, source: str, clip_bytes: float, features: bool
) -> Iterator[Estimate]:
    train, n = config.train, len(frames)
    plan = make_sampler(config, frames, texts, N)
    epoch_steps = plan.steps(0)
    steps = train.steps or plan.total(train.epochs)
    work, padded, tokens, micro_batches = [], 0, 0, []
    for step in np.unique(np.linspace(0, epoch_steps - 1, min(STEPS, epoch_steps)).astype(int)):
        groups = plan.step(0, int(step))
        work.append([sum(float(frames[part[r]].sum() + plan.text_cost * texts[part[r]].sum()) for part in groups) for r in range(N)])
        for clips in (clips for part in groups for clips in part):
            micro_batches.append(clips)
            padded, tokens = padded + len(clips) * int(texts[clips].max()), tokens + int(texts[clips].sum())
    balance = float(np.mean([np.mean(w) / max(w) for w in work]))
    a_step = f"{n / epoch_steps:.1f} clips a step over all ranks, {n / epoch_steps / N:.1f} each"
    yield Estimate("data", "clips", n, "", source)
    yield Estimate("data", "steps", steps, "", f"{epoch_steps:,} an epoch x {steps / epoch_steps:g} epochs, {a_step}")
    yield Estimate("data", "balance", balance, "", "mean over steps of (mean / max over ranks of frames + what a text costs in frames)")
    yield Estimate("data", "padding", 1 - tokens / padded, "%", "of target positions")

    candidates = {max(micro_batches, key=lambda c: int(frames[c].sum())).tobytes(), max(micro_batches, key=lambda c: len(c) * int(texts[c].max())).tobytes()}
    kind = micro_batches[0].dtype
    largest = [np.frombuffer(c, kind) for c in candidates]
    with _text(config) as (text, shaped):
        dry = [dry_step(shaped, text, frames[c].tolist(), int(texts[c].max()) // TOKEN + 2, features, device.kind) for c in largest]
    which = int(np.argmax([d.activations for d in dry]))
    step, clips = dry[which], largest[which]
    trained, frozen = (sum(part[i] for part in step.parts.values()) for i in (0, 1))
    yield Estimate("parameters", "trained", trained, "M", ", ".join(f"{part} {t / 1e6:.2f}" for part, (t, _) in step.parts.items() if t))
    yield Estimate("parameters", "frozen", frozen, "M", ", ".join(f"{part} {f / 1e6:.2f}" for part, (_, f) in step.parts.items() if f) or "none")
    if step.trimmed:
        yield Estimate("parameters", "trimmed away", step.trimmed, "M", "words that the training text does not need, left out by flallm trim")
    yield from memory(config, step, N, device, f"{len(clips)} clip{'s' * (len(clips) > 1)}, {frames[clips].sum()} used frames, {train.precision}")

    used = float(frames.mean()) * n / epoch_steps / N  # frames of a rank's step
    flops = step.flops / int(frames[clips].sum()) * used
    encoder = f", {step.encoder_flops / step.flops:.0%} of them the encoder's" if step.encoder_flops else ""
    yield Estimate("computation", "operations", flops / 1e12, "TFLOP", f"a step and rank, {used:.1f} used frames{encoder}")
    if clips_per_s:
        seconds, how = n / epoch_steps / clips_per_s, f"{clips_per_s:g} clips/s as given"
    else:
        compute, sent = flops / (device.reached * device.tflops * 1e12) / balance, []
        how = (
            f"at {device.reached:.0%} of the {device.tflops:.3g} TFLOP/s at which this rank's cores multiply matrices; decoding and what ranks send not counted"
        )
        if device.kind == "cuda":
            launches = TENSOR * step.tensors * train.micro_batches
            compute += launches
            how = f"at {device.reached:.0%} of {device.tflops:g} TFLOP/s, on the slowest rank by balance, and {duration(launches)} to launch it: both as on an H100"
            sent = _communication(config, step, N, device, compute)
        yield Estimate("computation", "time", compute, "s", how)
        yield from sent
        seconds = compute + sum(figure.value for figure in sent if figure.name == "exposed")
        how = f"computation{' + exposed communication' * bool(sent)}: {n / epoch_steps / seconds:.1f} clips/s"
    yield Estimate("time", "step", seconds, "s", how)
    yield Estimate("time", "run", steps * seconds, "s", "all steps; looks at the dev split not counted")
    if not features:
        how = f"{used / seconds:.0f} used frames/s x {DECODE * 1e3} ms of a core (docs/planning.md); data.workers is {config.data.workers}"
        yield Estimate("reading", "decoding cores", used / seconds * DECODE, "a GPU" if device.kind == "cuda" else "a rank", how)
    yield Estimate("reading", "bytes", clip_bytes * n / epoch_steps / seconds / 1e6, "MB/s", f"by all ranks: {clip_bytes / 1e3:.0f} kB a clip")

    weights, moments = 4 * (trained + frozen), (8 if train.optimizer == "adamw" else 4) * trained
    blocked, written = (weights + moments / N) / (SNAPSHOT * 1e9), (weights + moments) / (DISK * 1e9)
    how = f"rank 0 copies all weights and its share at {SNAPSHOT:g} GB/s [assumed]; written behind the steps at {DISK:g} GB/s [assumed] in {duration(written)}"
    yield Estimate("checkpoints", "size", weights + moments, "GiB", "weights and moments, fp32")
    yield Estimate("checkpoints", "holds up", blocked, "s", how)


def _communication(config: Config, step: Step, N: int, device: Device, compute: float) -> list[Estimate]:
    """What a rank sends in a step that computes for so many seconds, and how long it waits for that."""
    train, (trained, frozen) = config.train, (sum(part[i] for part in step.parts.values()) for i in (0, 1))
    link, where = 1e9 * (device.node if N <= 8 else device.network), "in the node" if N <= 8 else "a GPU over the network"
    # A ring sends what it reduces once and, for all to have it, once more. ZeRO-3 gathers weights for each pass instead.
    three = deepspeed_config(train, device.kind)["zero_optimization"]["stage"] == 3
    ring, whose, behind = "all-reduce in a ring", "what ranks have updated", "the backward pass, 2/3 of the computation"
    reduced, gathered = (N - 1) / N * 2 * step.reduced * train.micro_batches, (N - 1) / N * 4 * trained
    if three:
        ring, whose, behind = "reduce-scatter", "all, for each forward and each backward pass", "the computation"
        reduced, gathered = reduced / 2, (N - 1) / N * 4 * 2 * train.micro_batches * (trained + frozen)
    hidden = min((reduced + gathered) / link, compute) if three else min(reduced / link, HIDDEN * compute)
    waits = LATENCY * 2 * step.norms * train.micro_batches * (N > 1) * config.encoder.global_batch_norm
    rows = (
        ("gradients", reduced, "GB", f"sent by a rank a step: {ring}, {step.reduced / trained:.1f} bytes a parameter"),
        ("weights", gathered, "GB", f"sent by a rank a step: all-gather of {whose}, fp32"),
        ("hidden", hidden, "s", f"behind {behind}, at {link / 1e9:g} GB/s {where}"),
        ("exposed", (reduced + gathered) / link - hidden + waits, "s", f"the rest, and {step.norms} BatchNorms over ranks, twice {LATENCY * 1e6:.0f} us each [assumed]"),
    )  # fmt: skip
    return [Estimate("communication", *row) for row in rows]


def advice(figures: list[Estimate], device: Device) -> str:
    """What to change where the peak is over the device's memory; nothing where it fits."""
    sizes = {f.name: f.value for f in figures if f.section == "memory"}
    if sizes["peak"] <= device.gib * GIB:
        return ""
    state = sizes["weights"] + sizes["master weights"] + sizes["moments"] + sizes["gradients"] + sizes["update"]
    if sizes["activations"] > state:
        how = "raise train.micro_batches, bound train.batch_frames, or set llm.gradient_checkpointing=true"
    else:
        how = "train low-rank updates with llm.lora.rank=16, keep the optimiser on the host with train.deepspeed=zero2_offload.json, share out weights as well with train.deepspeed=zero3.json, trim the vocabulary, or take more ranks"
    return f"does not fit: {sizes['peak'] / GIB:.1f} GiB of {device.gib:.1f}; {how}"


def show(figures: list[Estimate]) -> str:
    """A row a figure."""
    sections = [""] + [f.section for f in figures]
    return "\n".join(f"{f.section if f.section != before else '':14}{f.name:18}{f!s:>14}   {f.how}" for f, before in zip(figures, sections))
