"""`flallm doctor`: looks at a machine, and at what a recipe needs of it, before a run finds out. A row a thing: OK, WARN or MISS, and what to do."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
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
Row = tuple[str, str, str]  # (state, what, what is found and what to do)
SAMPLES = 16  # of a split that are read and decoded
TEXTS = 10_000  # of a split that are looked through for tokens without an embedding
DISK_GIB = 20  # free below which a run of real size has no room for its checkpoints
MIB = 256  # written to see how fast a disk is


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
    """Whether what is installed is what pyproject.toml asks for, and comes up."""
    wrong = []
    for line in importlib.metadata.requires("flallm") or []:
        wanted = Requirement(line)
        if wanted.marker and not wanted.marker.evaluate({"extra": ""}):
            continue
        try:
            there = importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(
                (MISS, wanted.name, f"is not installed: pip install '{line.split(';')[0].strip()}'")
            )
            continue
        if not wanted.specifier.contains(there, prereleases=True):
            wrong.append(
                (
                    WARN,
                    wanted.name,
                    f"{there}, tested with {wanted.specifier}: pip install '{wanted.name}{wanted.specifier}'",
                )
            )
    yield from wrong or [(OK, "packages", "as pyproject.toml asks for")]
    for name in ("torchaudio", "deepspeed"):
        try:
            importlib.import_module(name)
            yield OK, name, importlib.metadata.version(name)
        except (ImportError, OSError, RuntimeError) as error:
            yield (
                MISS,
                name,
                f"does not come up ({first_line(error)}): torch and torchaudio have to be a pair of one index",
            )


def _devices() -> Iterator[Row]:
    if not torch.cuda.is_available():
        yield (
            WARN,
            "GPU",
            "none that PyTorch can use: everything runs, on CPUs with gloo, at a size for trying out",
        )
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        said, bf16 = (
            f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB",
            properties.major >= 8,
        )
        yield (
            (OK, f"GPU {i}", said)
            if bf16
            else (WARN, f"GPU {i}", f"{said}, no bf16: set train.precision=fp32")
        )
    cores = usable_cpus()
    fit = torch.cuda.is_available() or computes_in_bf16(Train(), "cpu")
    yield (
        OK,
        "CPU cores",
        str(cores) + ", without instructions for bf16: recipes compute in fp32" * (not fit),
    )


def _ranks() -> Row:
    """Whether processes of this machine find each other and add up."""
    count, backend = (
        (torch.cuda.device_count(), "NCCL")
        if torch.cuda.device_count() > 1
        else (2, "gloo")
        if not torch.cuda.is_available()
        else (1, "NCCL")
    )
    began = time.monotonic()
    try:
        spawn(_add_up, count)
    except Exception as error:
        return (
            MISS,
            "all-reduce",
            f"{count} ranks over {backend} did not come together: {str(error).strip().splitlines()[-1]}",
        )
    return (
        OK,
        "all-reduce",
        f"{count} ranks over {backend}, {time.monotonic() - began:.0f} s with their start",
    )


def _add_up() -> None:
    ranks = init_distributed(60)
    (total,) = ranks.sum(ranks.rank + 1)
    assert total == ranks.world_size * (ranks.world_size + 1) / 2, f"ranks add up to {total}"


def _disk(folder: Path) -> Row:
    """folder need not be there yet."""
    there = next(path for path in (folder.resolve(), *folder.resolve().parents) if path.is_dir())
    free = shutil.disk_usage(there).free / 2**30
    try:
        with tempfile.NamedTemporaryFile(dir=there) as file:
            began, block = time.monotonic(), os.urandom(2**20)
            for _ in range(MIB):
                file.write(block)
            os.fsync(file.fileno())
            speed = MIB / (time.monotonic() - began)
    except OSError as error:
        return MISS, "disk", f"{there} cannot be written to: {error.strerror}"
    said = f"{there}: {free:.0f} GiB free, {speed:.0f} MiB/s written"
    return (
        (OK, "disk", said)
        if free > DISK_GIB
        else (
            WARN,
            "disk",
            f"{said}; a checkpoint of ResNet18 + mBART-large has 7 GiB, and three are kept",
        )
    )


def _slurm() -> Row:
    if not shutil.which("sbatch"):
        return OK, "Slurm", "none here: start runs with flallm, torchrun or deepspeed"
    try:
        answer = subprocess.run(
            ["sinfo", "--noheader", "--format=%P %a %D %G"],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=30,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return WARN, "Slurm", "sinfo does not answer within 30 s"
    if answer.returncode:
        return (
            WARN,
            "Slurm",
            f"sinfo fails: {answer.stderr.strip().splitlines()[-1] if answer.stderr.strip() else answer.returncode}",
        )
    return OK, "Slurm", "; ".join(answer.stdout.splitlines()[:4])


def _shards(config: Config) -> Iterator[Row]:
    """Reads and decodes some samples of each split, and says how fast a core does it."""
    for split in ("train", "dev", "test"):
        try:
            clips = ClipDataset(split, config.data, config.seed)
        except (UserError, OSError, ImportError) as error:
            yield MISS, f"data: {split}", str(error)
            continue
        if warning := clips.shards.color_warning():
            yield MISS, f"data: {split}", warning
            continue
        numbers = np.unique(
            np.linspace(0, len(clips.used) - 1, min(SAMPLES, len(clips.used))).astype(int)
        ).tolist()
        bad, seconds, frames = [], 0.0, 0
        for number in numbers:
            out = np.empty((int(clips.used[number]), *clips.shape), clips.dtype)
            began = time.process_time()
            key, _, cause = decoder.load(
                clips.shards,
                clips.options,
                number,
                clips.shards.row(number),
                0 if split == "train" else None,
                out,
            )
            seconds, frames = (
                seconds + time.process_time() - began,
                frames + int(clips.used[number]),
            )
            bad += [f"{key}: {cause}"] * bool(cause)
        found = f"{len(clips.used):,} clips, {len(numbers)} of them read and decoded"
        yield (
            (
                MISS,
                f"data: {split}",
                f"{len(bad)} of {len(numbers)} are broken, as {bad[0]}: see make_shards.py verify",
            )
            if bad
            else (OK, f"data: {split}", found)
        )
        if split == "train":
            cores, workers = usable_cpus(), config.data.workers * max(1, torch.cuda.device_count())
            rate = frames / max(seconds, 1e-9)
            said = f"{rate:.0f} used frames/s a core; data.workers={config.data.workers} give a rank {rate * config.data.workers / clips.used.mean():.0f} clips/s"
            few = workers >= cores
            yield (
                (
                    WARN,
                    "reading",
                    f"{said}, but {workers} workers and the ranks share {cores} cores",
                )
                if few
                else (OK, "reading", said)
            )


def _models(configs: list[Config]) -> Iterator[Row]:
    """Whether the pre-trained models that the stages name are there and are what they should be."""
    for llm in {(c.llm.path, c.llm.language, c.llm.prompt): c.llm for c in configs}.values():
        yield _language_model(llm, configs[0].data)
    for path in dict.fromkeys(
        config.encoder.weights for config in configs if config.encoder.weights
    ):
        there = Path(path).is_file()
        yield (
            (OK, "encoder.weights", path)
            if there
            else (
                MISS,
                "encoder.weights",
                f"{path} does not exist: fetch it, or train from scratch with --encoder.weights=none",
            )
        )


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
    about += (
        f", {len(text.without_row)} without an embedding in the model, as {text.without_row[0]}"
    )
    cause = _text_without_row(text, data)
    if cause:
        return (
            MISS,
            "language model",
            f"{about}: a clip is left out: {cause}. Resize the model's embeddings (resize_token_embeddings) and save it",
        )
    return (
        WARN,
        "language model",
        f"{about}: padding takes another, and a clip whose text has one is left out",
    )


def _text_without_row(text: TranslationTokenizer, data: Data) -> str:
    """Why the first text with a token without an embedding is refused; nothing where no text that is read has one."""
    for split in ("train", "dev", "test"):
        try:
            shards = Shards(data.shards, split, data.cache, data.cache_gib)
        except (UserError, OSError, ImportError):  # the rows above say it
            continue
        for meta in shards.metas(range(min(TEXTS, len(shards)))):
            ids = (
                text.tokenizer(meta["text"], add_special_tokens=False)["input_ids"] if meta else []
            )
            if max(ids, default=0) >= text.rows:
                return text.refusal(max(ids))
    return ""
