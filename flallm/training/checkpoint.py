"""Writes a run's checkpoints beside training, and puts a run back where one was written."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TextIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from flallm.config import Checkpoint
from flallm.distributed.context import DistContext
from flallm.distributed.zero import ZeroShards, gathered_parameters
from flallm.model.weights import (
    by_dev_score,
    checkpoint_steps,
    file_problem,
    file_sha256,
    manifest_digest,
    read_manifest,
    read_manifests,
    unique_tensors,
)
from flallm.utils import UserError, ensure_dir


@dataclass
class TrainingState:
    """What must survive a run's end and is no tensor.

    step: the last one done, which is the position in the sampler's order.
    skipped, skipped_in_a_row: steps that changed no weights.
    loss_ema: running mean of the loss a token; 0 where train.spike does not look at it.
    seconds: that the run took, all its starts together.
    sums: of this rank, since the last line of the log.
    leading: the dev score that decides which checkpoint is best; "" before the first validation.
    """

    step: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    loss_ema: float = 0.0
    seconds: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)
    leading: str = ""


class DiskError(Exception):
    """A checkpoint could not be written. The ones before it are untouched."""


class CheckpointManager:
    """Writes a run's checkpoints, at most one at a time.

    Every rank has one and calls the same methods at the same steps.
    """

    def __init__(self, run: Path, ranks: DistContext, keep: Checkpoint, metadata: dict):
        """metadata: what goes into every manifest."""
        self.folder = run / "checkpoints"
        self.ranks, self.keep, self.metadata = ranks, keep, metadata
        self.thread = ThreadPoolExecutor(1)
        self.manifest: dict | None = None  # of the checkpoint that is being written
        self.files: Future[dict] | None = None
        self.last_save = time.monotonic()
        if ranks.is_main:
            self.folder.mkdir(exist_ok=True)
            for part in self.folder.glob(".step-*.part"):
                shutil.rmtree(part)
        ranks.gather(None)  # no rank writes before that is done

    @property
    def written(self) -> bool:
        """Whether this rank's files of the checkpoint in progress are on disk."""
        return self.files is not None and self.files.done()

    def due(self) -> bool:
        """Whether `checkpoint.minutes` have passed, by this rank's clock."""
        minutes = self.keep.minutes
        return bool(minutes) and time.monotonic() - self.last_save > 60 * minutes

    def save(self, engine, state: TrainingState, dev_scores: dict[str, float] | None) -> None:
        """Copies what a checkpoint holds, and leaves the writing to a thread.

        dev_scores: by name, where the dev split was decoded after this step.
        """
        self.finalize()
        self.last_save = time.monotonic()
        self.manifest = {"step": state.step, "dev_bleu4": None}
        for name, score in (dev_scores or {}).items():
            self.manifest[f"dev_{name}"] = score
        self.manifest |= {"world_size": self.ranks.world_size, "state": asdict(state)}
        self.manifest |= self.metadata
        files = {f"rank-{self.ranks.rank}.safetensors": rank_tensors(engine, self.ranks)}
        with gathered_parameters(engine):
            if self.ranks.is_main:
                files["model.safetensors"] = unique_tensors(engine.module)
            copies = {name: _copies(tensors) for name, tensors in files.items()}
        self.part = self.folder / f".step-{state.step}.part"
        self.files = self.thread.submit(_write, self.part, copies)

    def finalize(self) -> None:
        """Makes a checkpoint of the files that all ranks write, and waits for those that still do.

        Raises DiskError on all ranks if one rank could not write.
        """
        if self.manifest is None:
            return
        manifest, files = self.manifest, self.files.result()
        self.manifest = self.files = None
        reports = self.ranks.gather({"files": files, "sums": manifest["state"]["sums"]})
        errors = [report["files"]["error"] for report in reports if "error" in report["files"]]
        problem = errors[0] if errors else None
        if self.ranks.is_main and problem is None:
            manifest["state"]["sums"] = [report["sums"] for report in reports]
            manifest["files"] = {}
            for report in reports:
                manifest["files"] |= report["files"]
            problem = self._publish(manifest)
        problem = self.ranks.gather(problem)[0]
        if problem:
            if self.ranks.is_main:
                shutil.rmtree(self.part, ignore_errors=True)
            step = manifest["step"]
            raise DiskError(f"checkpoint of step {step} could not be written: {problem}")
        if self.ranks.is_main:
            self.thread.submit(_remove_old, self.folder, self.keep)

    def close(self) -> None:
        """Waits until the checkpoint in progress is complete on every rank."""
        self.finalize()
        self.thread.shutdown()
        self.ranks.gather(None)

    def _publish(self, manifest: dict) -> str | None:
        """Writes the manifest and gives the checkpoint its name; returns a problem, if any."""
        folder = self.folder / f"step-{manifest['step']}"
        try:
            for name, metadata in manifest["files"].items():
                path = self.part / name
                if not path.is_file() or path.stat().st_size != metadata["bytes"]:
                    return (
                        f"{name}, of another rank, is not there: "
                        "a run folder has to lie on a file system that all nodes share"
                    )
            with open(self.part / "manifest.json", "w", encoding="utf-8") as file:
                signed = manifest | {"sha256": manifest_digest(manifest)}
                file.write(json.dumps(signed, indent=1))
                file.flush()
                os.fsync(file.fileno())
            _sync(self.part)
            shutil.rmtree(folder, ignore_errors=True)  # a damaged one of an earlier try
            self.part.rename(folder)
            _sync(self.folder)
        except OSError as error:
            return str(error)
        return None


def _copies(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies in the memory of the host, which training does not change."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def _write(part: Path, contents: dict[str, dict[str, torch.Tensor]]) -> dict:
    """Files on disk -> their sizes and checksums, or {"error": why}."""
    files = {}
    try:
        part.mkdir(parents=True, exist_ok=True)
        for name, tensors in contents.items():
            save_file(tensors, part / name)
            with open(part / name, "rb") as file:
                os.fsync(file.fileno())
            files[name] = {
                "bytes": (part / name).stat().st_size,
                "sha256": file_sha256(part / name),
            }
        _sync(part)
    except (OSError, SafetensorError) as error:
        for name in contents:  # room for the log to say so
            (part / name).unlink(missing_ok=True)
        return {"error": str(error)}
    return files


def _remove_old(folder: Path, keep: Checkpoint) -> None:
    """Removes the checkpoints that are neither among the last nor the best nor every n-th."""
    manifests = sorted(read_manifests(folder), key=lambda pair: pair[0]["step"])
    kept = {path for _, path in manifests[-keep.last :]}
    if keep.every_nth:
        kept |= {path for m, path in manifests if m["step"] % keep.every_nth == 0}
    kept |= {path for *_, path in sorted(by_dev_score(manifests))[-keep.best :]}
    for _, path in manifests:
        if path not in kept:
            # What is left of it after a kill does not look like a checkpoint.
            part = path.rename(folder / f".{path.name}.part")
            shutil.rmtree(part, ignore_errors=True)


def rank_tensors(engine, ranks: DistContext) -> dict[str, torch.Tensor]:
    """What each rank has of its own: its shard of the optimiser's state, generators, buffers."""
    tensors = {f"optimizer|{name}": t for name, t in ZeroShards(engine).state().items()}
    tensors["random|cpu"] = torch.get_rng_state()
    if ranks.device.type == "cuda":
        tensors["random|cuda"] = torch.cuda.get_rng_state()
    if not ranks.is_main:
        # Rank 0's are in model.safetensors. Others' differ where BatchNorm's statistics are local.
        tensors |= {f"buffer|{name}": t for name, t in _buffers(engine.module).items()}
    return tensors


def restore_state(
    folder: Path, manifest: dict, engine, ranks: DistContext, seed: int
) -> TrainingState:
    """Puts optimiser, generators and buffers back; the weights are in the model already.

    Another number of ranks shares the optimiser's state out anew.
    """
    rank_files = [folder / f"rank-{rank}.safetensors" for rank in range(manifest["world_size"])]
    ZeroShards(engine).load_state(rank_files)
    saved = dict(manifest["state"])
    if "usual" in saved:  # its name in earlier versions
        saved["loss_ema"] = saved.pop("usual")
    state = TrainingState(**saved)
    if manifest["world_size"] != ranks.world_size:
        torch.manual_seed(seed * 1000 + ranks.rank + 1 + 1_000_003 * state.step)
        ranks_sums, state.sums = state.sums, {}
        for name in ranks_sums[0]:
            total = sum(sums[name] for sums in ranks_sums)
            state.sums[name] = total if ranks.is_main else 0
        return state
    own = load_file(rank_files[ranks.rank])
    torch.set_rng_state(own["random|cpu"])
    if "random|cuda" in own and ranks.device.type == "cuda":
        torch.cuda.set_rng_state(own["random|cuda"])
    if not ranks.is_main:
        for name, buffer in _buffers(engine.module).items():
            buffer.copy_(own[f"buffer|{name}"])
    state.sums = state.sums[ranks.rank]
    return state


def latest_valid(run: Path, ranks: DistContext) -> tuple[Path, dict] | None:
    """(folder, manifest) of the newest checkpoint whose every file is as its manifest says.

    None in a run that has no checkpoint yet. Raises UserError where all checkpoints are damaged.
    """
    steps = ranks.gather(checkpoint_steps(run))[0]
    for step in reversed(steps):
        folder = run / f"checkpoints/step-{step}"
        manifest, problem = _check_files(folder, ranks)
        problems = [p for p in ranks.gather(problem) if p]
        if not problems:
            return folder, manifest
        if ranks.is_main:
            print(f"warning: {problems[0]}; going on from the checkpoint before it", flush=True)
    if steps:
        raise UserError(
            f"none of the {len(steps)} checkpoints in {run} is whole: "
            "remove them to start from the beginning"
        )
    return None


def _check_files(folder: Path, ranks: DistContext) -> tuple[dict, str | None]:
    """(manifest, problem) of a checkpoint; each rank reads its part of the files."""
    try:
        manifest = read_manifest(folder)
    except UserError as error:
        return {}, str(error)
    for name in list(manifest["files"])[ranks.rank :: ranks.world_size]:
        if problem := file_problem(folder / name, manifest["files"][name]):
            return manifest, problem
    return manifest, None


@contextlib.contextmanager
def lock(run: Path, ranks: DistContext) -> Iterator[None]:
    """A context in which no other run may write into the folder.

    The lock is rank 0's and goes with its process, however that ends.
    """
    file, holder = None, None
    if ranks.is_main:
        ensure_dir(run)
        file, holder = _try_lock(run)
    if holder := ranks.gather(holder)[0]:
        raise UserError(
            f"{run} is being written by {holder}: wait for it, or name another --run_dir"
        )
    try:
        yield
    finally:
        if file:
            file.close()


def _try_lock(run: Path) -> tuple[TextIO, str | None]:
    """(the open lock file, the process that holds the lock if it is another)."""
    try:
        file = open(run / "lock", "a+", encoding="utf-8")  # noqa: SIM115 - it stays open
    except OSError as error:
        raise UserError(f"{run} cannot be written to: {error.strerror}") from None
    try:
        # Not flock, which worker processes would inherit and keep.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
    except (BlockingIOError, PermissionError):
        file.seek(0)
        return file, file.read() or "another process"
    except OSError as error:
        print(
            f"warning: {run} cannot be locked ({error}): "
            "see to it that only one run writes into it",
            flush=True,
        )
    return file, None


def _buffers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Those that a checkpoint holds."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in parameters}


def _sync(folder: Path) -> None:
    """A new name is on disk once its folder is."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
