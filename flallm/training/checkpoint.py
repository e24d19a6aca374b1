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

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from flallm.config import Checkpoint
from flallm.distributed.context import DistContext
from flallm.distributed.zero import gathered_parameters, load_optimizer_shards, optimizer_shards
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
    """What must survive a run's end and is no tensor."""

    step: int = 0  # the last one done: the position in the plan
    skipped: int = 0  # steps that were left out
    skipped_in_a_row: int = 0
    loss_ema: float = 0.0  # running mean of the loss a token, where train.spike looks at it
    seconds: float = 0.0
    sums: dict[str, float] = field(
        default_factory=dict
    )  # of this rank, since the last line of the log
    leading: str = (
        ""  # the dev score that decides which checkpoint is the best, from the first look at dev on
    )


class DiskError(Exception):
    """A checkpoint could not be written. The ones before it are untouched."""


class CheckpointManager:
    """Writes a run's checkpoints, at most one at a time. Every rank has one and calls the same methods at the same steps."""

    def __init__(self, run: Path, ranks: DistContext, keep: Checkpoint, facts: dict):
        """facts: what goes into every manifest."""
        self.folder, self.ranks, self.keep, self.facts = run / "checkpoints", ranks, keep, facts
        self.thread = ThreadPoolExecutor(1)
        self.manifest: dict | None = None  # of the checkpoint that is being written
        self.files: Future[dict] | None = None
        self.last = time.monotonic()  # when it saved
        if ranks.is_main:
            self.folder.mkdir(exist_ok=True)
            for part in self.folder.glob(".step-*.part"):
                shutil.rmtree(part)
        ranks.gather(None)  # nobody writes before that is done

    @property
    def written(self) -> bool:
        """Whether this rank's files of the checkpoint in progress are on disk."""
        return self.files is not None and self.files.done()

    def due(self) -> bool:
        """Whether it is time, by the clock of the rank that is asked."""
        return bool(self.keep.minutes) and time.monotonic() - self.last > 60 * self.keep.minutes

    def save(self, engine, state: TrainingState, dev: dict[str, float] | None) -> None:
        """Copies what is to be written, and leaves the writing to a thread. dev: scores by name."""
        self.finalize()
        self.last = time.monotonic()
        scores = {"dev_bleu4": None} | {f"dev_{name}": score for name, score in (dev or {}).items()}
        self.manifest = {
            "step": state.step,
            **scores,
            "world_size": self.ranks.world_size,
            "state": asdict(state),
            **self.facts,
        }
        tensors = {f"rank-{self.ranks.rank}.safetensors": rank_tensors(engine, self.ranks)}
        with gathered_parameters(engine):
            if self.ranks.is_main:
                tensors["model.safetensors"] = unique_tensors(engine.module)
            copies = {
                name: {k: v.detach().to("cpu", copy=True) for k, v in content.items()}
                for name, content in tensors.items()
            }
        self.part = self.folder / f".step-{state.step}.part"
        self.files = self.thread.submit(_write, self.part, copies)

    def finalize(self) -> None:
        """Makes a checkpoint of what all ranks have written or, where some still write, will have; raises DiskError on all of
        them if one could not."""
        if self.manifest is None:
            return
        manifest, self.manifest, files, self.files = self.manifest, None, self.files.result(), None
        reports = self.ranks.gather({"files": files, "sums": manifest["state"]["sums"]})
        problem = next((r["files"]["error"] for r in reports if "error" in r["files"]), None)
        if self.ranks.is_main and problem is None:
            manifest["state"]["sums"] = [r["sums"] for r in reports]
            manifest["files"] = {name: facts for r in reports for name, facts in r["files"].items()}
            problem = self._name(manifest)
        problem = self.ranks.gather(problem)[0]
        if problem:
            if self.ranks.is_main:
                shutil.rmtree(self.part, ignore_errors=True)
            raise DiskError(
                f"checkpoint of step {manifest['step']} could not be written: {problem}"
            )
        if self.ranks.is_main:
            self.thread.submit(_remove_old, self.folder, self.keep)

    def close(self) -> None:
        """Waits until all is written and, on every rank, known to be."""
        self.finalize()
        self.thread.shutdown()
        self.ranks.gather(None)

    def _name(self, manifest: dict) -> str | None:
        folder = self.folder / f"step-{manifest['step']}"
        try:
            for name, facts in manifest["files"].items():
                if (
                    not (self.part / name).is_file()
                    or (self.part / name).stat().st_size != facts["bytes"]
                ):
                    return f"{name}, of another rank, is not there: a run folder has to lie on a file system that all nodes share"
            with open(self.part / "manifest.json", "w", encoding="utf-8") as file:
                file.write(json.dumps(manifest | {"sha256": manifest_digest(manifest)}, indent=1))
                file.flush()
                os.fsync(file.fileno())
            _sync(self.part)
            shutil.rmtree(folder, ignore_errors=True)  # a damaged one of an earlier try
            self.part.rename(folder)
            _sync(self.folder)
        except OSError as error:
            return str(error)


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
    found = sorted(read_manifests(folder), key=lambda pair: pair[0]["step"])
    kept = {path for _, path in found[-keep.last :]} | {
        path for m, path in found if keep.every_nth and m["step"] % keep.every_nth == 0
    }
    kept |= {path for *_, path in sorted(by_dev_score(found))[-keep.best :]}
    for _, path in found:
        if path not in kept:
            gone = path.rename(
                folder / f".{path.name}.part"
            )  # what is left of it after a kill looks like no checkpoint
            shutil.rmtree(gone, ignore_errors=True)


def rank_tensors(engine, ranks: DistContext) -> dict[str, torch.Tensor]:
    """What each rank has of its own."""
    tensors = {f"optimizer|{name}": t for name, t in optimizer_shards(engine).items()}
    tensors["random|cpu"] = torch.get_rng_state()
    if ranks.device.type == "cuda":
        tensors["random|cuda"] = torch.cuda.get_rng_state()
    if (
        not ranks.is_main
    ):  # rank 0's are in model.safetensors; others' differ where BatchNorm's statistics are local
        tensors |= {f"buffer|{name}": t for name, t in _buffers(engine.module).items()}
    return tensors


def restore_state(
    folder: Path, manifest: dict, engine, ranks: DistContext, seed: int
) -> TrainingState:
    """Puts optimiser, generators and buffers back; the weights are in the model already. A changed number of ranks shares the
    optimiser's state out anew."""
    load_optimizer_shards(
        engine, [folder / f"rank-{r}.safetensors" for r in range(manifest["world_size"])]
    )
    saved = dict(manifest["state"])
    if "usual" in saved:  # the name before this version
        saved["loss_ema"] = saved.pop("usual")
    state = TrainingState(**saved)
    if manifest["world_size"] != ranks.world_size:
        torch.manual_seed(seed * 1000 + ranks.rank + 1 + 1_000_003 * state.step)
        state.sums = {k: sum(s[k] for s in state.sums) * ranks.is_main for k in state.sums[0]}
        return state
    own = load_file(folder / f"rank-{ranks.rank}.safetensors")
    torch.set_rng_state(own["random|cpu"])
    if "random|cuda" in own and ranks.device.type == "cuda":
        torch.cuda.set_rng_state(own["random|cuda"])
    for name, buffer in _buffers(engine.module).items():
        if not ranks.is_main:
            buffer.copy_(own[f"buffer|{name}"])
    state.sums = state.sums[ranks.rank]
    return state


def latest_valid(run: Path, ranks: DistContext) -> tuple[Path, dict] | None:
    """(folder, manifest) of the newest checkpoint whose every file is what its manifest says; None in a run that has none yet."""
    found = ranks.gather(checkpoint_steps(run))[0]
    for step in reversed(found):
        folder = run / f"checkpoints/step-{step}"
        try:
            manifest, problem = read_manifest(folder), None
            files = list(manifest["files"])[
                ranks.rank :: ranks.world_size
            ]  # ranks share the reading
            problem = next(
                (p for p in (file_problem(folder / f, manifest["files"][f]) for f in files) if p),
                None,
            )
        except UserError as error:
            manifest, problem = {}, str(error)
        problem = next((p for p in ranks.gather(problem) if p), None)
        if problem is None:
            return folder, manifest
        if ranks.is_main:
            print(f"warning: {problem}; going on from the checkpoint before it", flush=True)
    if found:
        raise UserError(
            f"none of the {len(found)} checkpoints in {run} is whole: remove them to start from the beginning"
        )
    return None


@contextlib.contextmanager
def lock(run: Path, ranks: DistContext) -> Iterator[None]:
    """One run at a time in a folder. The lock is rank 0's and goes with its process, however that ends."""
    held = None
    if ranks.is_main:
        ensure_dir(run)
        try:
            file = open(run / "lock", "a+", encoding="utf-8")  # noqa: SIM115 - it is held
        except OSError as error:
            raise UserError(f"{run} cannot be written to: {error.strerror}") from None
        try:
            fcntl.lockf(
                file, fcntl.LOCK_EX | fcntl.LOCK_NB
            )  # not flock, which worker processes would inherit and keep
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}")
            file.flush()
        except (BlockingIOError, PermissionError):
            file.seek(0)
            held = file.read() or "another process"
        except OSError as error:
            print(
                f"warning: {run} cannot be locked ({error}): see to it that only one run writes into it",
                flush=True,
            )
    if held := ranks.gather(held)[0]:
        raise UserError(f"{run} is being written by {held}: wait for it, or name another --run_dir")
    try:
        yield
    finally:
        if ranks.is_main:
            file.close()


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
