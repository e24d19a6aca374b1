"""`flallm doctor`: looks at a machine, and at what a recipe needs of it, before a run does.

A row a thing: OK, WARN or MISS, and what to do.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from packaging.requirements import Requirement

from flallm.config import LLM, Config, Data, Train
from flallm.data import decoding as decoder
from flallm.data import hub
from flallm.data.dataset import ClipDataset
from flallm.data.reader import Shards
from flallm.data.tokenizer import TranslationTokenizer
from flallm.distributed.context import computes_in_bf16, init_distributed
from flallm.distributed.launch import spawn
from flallm.utils import UserError, first_line, usable_cpus

OK, WARN, MISS = "OK", "WARN", "MISS"
Row = tuple[str, str, str]  # (state, name, detail and what to do)
SAMPLES = 16  # of a split that are read and decoded
TEXTS = 10_000  # of a split that are looked through for tokens without an embedding
DISK_GIB = 20  # a run of real size has no room for its checkpoints where less is free
MIB = 256  # written to measure a disk


def doctor(configs: list[Config], folder: Path) -> Iterator[Row]:
    """configs: the stages of a recipe, or none. folder: where runs will lie."""
    yield from _packages()
    yield from _devices()
    yield _ranks()
    yield _disk(folder)
    yield _slurm()
    if configs:
        yield from _shards(configs[0])
        yield from _models(configs)


def _packages() -> Iterator[Row]:
    """Whether the installed packages are those that pyproject.toml asks for, and import."""
    rows = []
    for line in importlib.metadata.requires("flallm") or []:
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        row = _package(requirement, line)
        if row:
            rows.append(row)
    yield from rows or [(OK, "packages", "as pyproject.toml asks for")]
    for name in ("torchaudio", "deepspeed"):
        try:
            importlib.import_module(name)
            yield OK, name, importlib.metadata.version(name)
        except (ImportError, OSError, RuntimeError) as error:
            cause = f"does not come up ({first_line(error)})"
            yield MISS, name, f"{cause}: torch and torchaudio have to be a pair of one index"


def _package(requirement: Requirement, line: str) -> Row | None:
    """What is wrong with a package; None where nothing is. line: as pyproject.toml has it."""
    name, specifier = requirement.name, requirement.specifier
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return MISS, name, f"is not installed: pip install '{line.split(';')[0].strip()}'"
    if specifier.contains(version, prereleases=True):
        return None
    return WARN, name, f"{version}, tested with {specifier}: pip install '{name}{specifier}'"


def _devices() -> Iterator[Row]:
    if not torch.cuda.is_available():
        yield (
            WARN,
            "GPU",
            "none that PyTorch can use: everything runs, on CPUs with gloo, "
            "at a size for trying out",
        )
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        detail = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        if properties.major >= 8:
            yield OK, f"GPU {i}", detail
        else:
            yield WARN, f"GPU {i}", f"{detail}, no bf16: set train.precision=fp32"
    cores = str(usable_cpus())
    if not torch.cuda.is_available() and not computes_in_bf16(Train(), "cpu"):
        cores += ", without instructions for bf16: recipes compute in fp32"
    yield OK, "CPU cores", cores


def _ranks() -> Row:
    """Whether processes of this machine find each other and add up."""
    if torch.cuda.is_available():
        count, backend = max(1, torch.cuda.device_count()), "NCCL"
    else:
        count, backend = 2, "gloo"
    ranks = f"{count} ranks over {backend}"
    began = time.monotonic()
    try:
        spawn(_add_up, count)
    except Exception as error:
        cause = str(error).strip().splitlines()[-1]
        return MISS, "all-reduce", f"{ranks} did not come together: {cause}"
    return OK, "all-reduce", f"{ranks}, {time.monotonic() - began:.0f} s with their start"


def _add_up() -> None:
    ranks = init_distributed(60)
    (total,) = ranks.sum(ranks.rank + 1)
    assert total == ranks.world_size * (ranks.world_size + 1) / 2, f"ranks add up to {total}"


def _disk(folder: Path) -> Row:
    """folder need not exist yet."""
    folder = folder.resolve()
    existing = next(path for path in (folder, *folder.parents) if path.is_dir())
    free = shutil.disk_usage(existing).free / 2**30
    try:
        with tempfile.NamedTemporaryFile(dir=existing) as file:
            began, block = time.monotonic(), os.urandom(2**20)
            for _ in range(MIB):
                file.write(block)
            os.fsync(file.fileno())
            speed = MIB / (time.monotonic() - began)
    except OSError as error:
        return MISS, "disk", f"{existing} cannot be written to: {error.strerror}"
    detail = f"{existing}: {free:.0f} GiB free, {speed:.0f} MiB/s written"
    if free > DISK_GIB:
        return OK, "disk", detail
    size = "a checkpoint of ResNet18 + mBART-large has 7 GiB, and three are kept"
    return WARN, "disk", f"{detail}; {size}"


def _slurm() -> Row:
    if not shutil.which("sbatch"):
        return OK, "Slurm", "none here: start runs with flallm, torchrun or deepspeed"
    command = ["sinfo", "--noheader", "--format=%P %a %D %G"]
    try:
        answer = subprocess.run(
            command,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=30,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return WARN, "Slurm", "sinfo does not answer within 30 s"
    if answer.returncode:
        lines = answer.stderr.strip().splitlines()
        return WARN, "Slurm", f"sinfo fails: {lines[-1] if lines else answer.returncode}"
    return OK, "Slurm", "; ".join(answer.stdout.splitlines()[:4])


def _shards(config: Config) -> Iterator[Row]:
    """Reads and decodes some samples of each split, and measures how fast a core does it."""
    for split in ("train", "dev", "test"):
        try:
            clips = ClipDataset(split, config.data, config.seed)
        except (UserError, OSError, ImportError) as error:
            yield MISS, f"data: {split}", str(error)
            continue
        if warning := clips.shards.color_warning():
            yield MISS, f"data: {split}", warning
            continue
        sample = _decode_sample(clips, split)
        yield _decoded(split, len(clips.used), sample)
        if split == "train":
            yield _reading(config, float(clips.used.mean()), sample)


@dataclass(frozen=True)
class Sample:
    """Clips that were read and decoded: their number, used frames, seconds of a core, failures."""

    clips: int
    frames: int
    seconds: float
    failures: list[str]


def _decode_sample(clips: ClipDataset, split: str) -> Sample:
    count = len(clips.used)
    numbers = np.unique(np.linspace(0, count - 1, min(SAMPLES, count)).astype(int)).tolist()
    epoch = 0 if split == "train" else None  # training clips are augmented
    failures, seconds, frames = [], 0.0, 0
    for number in numbers:
        used = int(clips.used[number])
        out = np.empty((used, *clips.shape), clips.dtype)
        began = time.process_time()
        key, _, cause = decoder.load(
            clips.shards, clips.options, number, clips.shards.row(number), epoch, out
        )
        seconds += time.process_time() - began
        frames += used
        if cause:
            failures.append(f"{key}: {cause}")
    return Sample(len(numbers), frames, seconds, failures)


def _decoded(split: str, clips: int, sample: Sample) -> Row:
    if not sample.failures:
        return OK, f"data: {split}", f"{clips:,} clips, {sample.clips} of them read and decoded"
    broken = f"{len(sample.failures)} of {sample.clips} are broken, as {sample.failures[0]}"
    return MISS, f"data: {split}", f"{broken}: see make_shards.py verify"


def _reading(config: Config, mean_frames: float, sample: Sample) -> Row:
    """How many clips the workers of a rank decode. mean_frames: used frames of a clip."""
    cores = usable_cpus()
    workers = config.data.workers * max(1, torch.cuda.device_count())
    rate = sample.frames / max(sample.seconds, 1e-9)
    clips = rate * config.data.workers / mean_frames
    detail = (
        f"{rate:.0f} used frames/s a core; "
        f"data.workers={config.data.workers} give a rank {clips:.0f} clips/s"
    )
    if workers < cores:
        return OK, "reading", detail
    return WARN, "reading", f"{detail}, but {workers} workers and the ranks share {cores} cores"


def _models(configs: list[Config]) -> Iterator[Row]:
    """Whether the pre-trained models that the stages name exist and are what they should be."""
    models = {(c.llm.path, c.llm.language, c.llm.prompt): c.llm for c in configs}
    for llm in models.values():
        yield _language_model(llm, configs[0].data)
    weights = [config.encoder.weights for config in configs if config.encoder.weights]
    for path in dict.fromkeys(weights):
        if Path(path).is_file():
            yield OK, "encoder.weights", path
        else:
            advice = "fetch it, or train from scratch with --encoder.weights=none"
            yield MISS, "encoder.weights", f"{path} does not exist: {advice}"


def _language_model(llm: LLM, data: Data) -> Row:
    from flallm.model.llm import load_shape

    try:
        text = TranslationTokenizer(llm)
        load_shape(llm)
        if not llm.random:
            hub.check_weights(llm.path)
    except UserError as error:
        return MISS, "language model", str(error)
    about = f"{llm.path}: {text.config.model_type}, vocabulary {len(text):,}"
    if not text.without_row:
        return OK, "language model", about
    count, first = len(text.without_row), text.without_row[0]
    about += f", {count} without an embedding in the model, as {first}"
    cause = _text_without_row(text, data)
    if cause:
        advice = "Resize the model's embeddings (resize_token_embeddings) and save it"
        return MISS, "language model", f"{about}: a clip is left out: {cause}. {advice}"
    effect = "padding takes another, and a clip whose text has one is left out"
    return WARN, "language model", f"{about}: {effect}"


def _text_without_row(text: TranslationTokenizer, data: Data) -> str:
    """Why the first text with a token without an embedding is refused; empty if none is."""
    for split in ("train", "dev", "test"):
        try:
            shards = Shards(data.shards, split, data.cache, data.cache_gib)
        except (UserError, OSError, ImportError):  # the rows above report it
            continue
        for meta in shards.metas(range(min(TEXTS, len(shards)))):
            if not meta:
                continue
            ids = text.tokenizer(meta["text"], add_special_tokens=False)["input_ids"]
            if max(ids, default=0) >= text.rows:
                return text.refusal(max(ids))
    return ""
