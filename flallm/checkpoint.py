"""Checkpoints of a run, `checkpoints/step-N/`: what a run needs to go on as if it had never stopped.

    model.safetensors      all weights and buffers; rank 0 writes it
    rank-<r>.safetensors   of each rank: its share of the optimiser's state, its random generators, and, but rank 0, its buffers
    manifest.json          step, dev scores, state, config, versions; size and SHA-256 of every file and of itself

The flow: every rank copies its tensors (`Writer.save`) and trains on while a thread writes them into `.step-N.part/`. Once every
rank has said that its files are on disk, rank 0 writes the manifest and renames the folder (`Writer.settle`). So a folder
called step-N is whole, and to be sure it is verified, file by file, before anything is taken from it. Nothing is pickled.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
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

from flallm import UserError, make_folder
from flallm import engine as engines
from flallm.config import Checkpoint
from flallm.engine import Ranks
from flallm.model.llm import untie


@dataclass
class State:
    """What must survive a run's end and is no tensor."""

    step: int = 0  # the last one done: the position in the plan
    skipped: int = 0  # steps that were left out
    skipped_in_a_row: int = 0
    usual: float = 0.0  # loss of a token: a running mean over the steps, where train.spike looks at it
    seconds: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)  # of this rank, since the last line of the log
    leading: str = ""  # the dev score that decides which checkpoint is the best, from the first look at dev on


class DiskError(Exception):
    """A checkpoint could not be written. The ones before it are untouched."""


class Writer:
    """Writes a run's checkpoints, at most one at a time. Every rank has one and calls the same methods at the same steps."""

    def __init__(self, run: Path, ranks: Ranks, keep: Checkpoint, facts: dict):
        """facts: what goes into every manifest."""
        self.folder, self.ranks, self.keep, self.facts = run / "checkpoints", ranks, keep, facts
        self.thread = ThreadPoolExecutor(1)
        self.manifest: dict | None = None  # of the checkpoint that is being written
        self.files: Future[dict] | None = None
        self.last = time.monotonic()  # when it saved
        if ranks.first:
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

    def save(self, engine, state: State, dev: dict[str, float] | None) -> None:
        """Copies what is to be written, and leaves the writing to a thread. dev: scores by name."""
        self.settle()
        self.last = time.monotonic()
        scores = {"dev_bleu4": None} | {f"dev_{name}": score for name, score in (dev or {}).items()}
        self.manifest = {"step": state.step, **scores, "world_size": self.ranks.world_size, "state": asdict(state), **self.facts}
        tensors = {f"rank-{self.ranks.rank}.safetensors": rank_tensors(engine, self.ranks)}
        with engines.whole(engine):
            if self.ranks.first:
                tensors["model.safetensors"] = unique_tensors(engine.module)
            copies = {name: {k: v.detach().to("cpu", copy=True) for k, v in content.items()} for name, content in tensors.items()}
        self.part = self.folder / f".step-{state.step}.part"
        self.files = self.thread.submit(_write, self.part, copies)

    def settle(self) -> None:
        """Makes a checkpoint of what all ranks have written or, where some still write, will have; raises DiskError on all of
        them if one could not."""
        if self.manifest is None:
            return
        manifest, self.manifest, files, self.files = self.manifest, None, self.files.result(), None
        reports = self.ranks.gather({"files": files, "sums": manifest["state"]["sums"]})
        problem = next((r["files"]["error"] for r in reports if "error" in r["files"]), None)
        if self.ranks.first and problem is None:
            manifest["state"]["sums"] = [r["sums"] for r in reports]
            manifest["files"] = {name: facts for r in reports for name, facts in r["files"].items()}
            problem = self._name(manifest)
        problem = self.ranks.gather(problem)[0]
        if problem:
            if self.ranks.first:
                shutil.rmtree(self.part, ignore_errors=True)
            raise DiskError(f"checkpoint of step {manifest['step']} could not be written: {problem}")
        if self.ranks.first:
            self.thread.submit(_remove_old, self.folder, self.keep)

    def close(self) -> None:
        """Waits until all is written and, on every rank, known to be."""
        self.settle()
        self.thread.shutdown()
        self.ranks.gather(None)

    def _name(self, manifest: dict) -> str | None:
        folder = self.folder / f"step-{manifest['step']}"
        try:
            for name, facts in manifest["files"].items():
                if not (self.part / name).is_file() or (self.part / name).stat().st_size != facts["bytes"]:
                    return f"{name}, of another rank, is not there: a run folder has to lie on a file system that all nodes share"
            with open(self.part / "manifest.json", "w", encoding="utf-8") as file:
                file.write(json.dumps(manifest | {"sha256": _digest(manifest)}, indent=1))
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
            files[name] = {"bytes": (part / name).stat().st_size, "sha256": _sha256(part / name)}
        _sync(part)
    except (OSError, SafetensorError) as error:
        for name in contents:  # room for the log to say so
            (part / name).unlink(missing_ok=True)
        return {"error": str(error)}
    return files


def _remove_old(folder: Path, keep: Checkpoint) -> None:
    found = sorted(_manifests(folder), key=lambda pair: pair[0]["step"])
    kept = {path for _, path in found[-keep.last :]} | {path for m, path in found if keep.every_nth and m["step"] % keep.every_nth == 0}
    kept |= {path for *_, path in sorted(_scored(found))[-keep.best :]}
    for _, path in found:
        if path not in kept:
            gone = path.rename(folder / f".{path.name}.part")  # what is left of it after a kill looks like no checkpoint
            shutil.rmtree(gone, ignore_errors=True)


def rank_tensors(engine, ranks: Ranks) -> dict[str, torch.Tensor]:
    """What each rank has of its own."""
    tensors = {f"optimizer|{name}": t for name, t in engines.optimizer_pieces(engine).items()}
    tensors["random|cpu"] = torch.get_rng_state()
    if ranks.device.type == "cuda":
        tensors["random|cuda"] = torch.cuda.get_rng_state()
    if not ranks.first:  # rank 0's are in model.safetensors; others' differ where BatchNorm's statistics are local
        tensors |= {f"buffer|{name}": t for name, t in _buffers(engine.module).items()}
    return tensors


def restore(folder: Path, manifest: dict, engine, ranks: Ranks, seed: int) -> State:
    """Puts optimiser, generators and buffers back; the weights are in the model already. A changed number of ranks shares the
    optimiser's state out anew."""
    engines.load_optimizer_pieces(engine, [folder / f"rank-{r}.safetensors" for r in range(manifest["world_size"])])
    state = State(**manifest["state"])
    if manifest["world_size"] != ranks.world_size:
        torch.manual_seed(seed * 1000 + ranks.rank + 1 + 1_000_003 * state.step)
        state.sums = {k: sum(s[k] for s in state.sums) * ranks.first for k in state.sums[0]}
        return state
    own = load_file(folder / f"rank-{ranks.rank}.safetensors")
    torch.set_rng_state(own["random|cpu"])
    if "random|cuda" in own and ranks.device.type == "cuda":
        torch.cuda.set_rng_state(own["random|cuda"])
    for name, buffer in _buffers(engine.module).items():
        if not ranks.first:
            buffer.copy_(own[f"buffer|{name}"])
    state.sums = state.sums[ranks.rank]
    return state


def steps(run: Path) -> list[int]:
    """Of which steps a run has checkpoints, whole or not. A copy under another name, such as step-10.bak, is none of them."""
    return sorted(int(path.name[5:]) for path in (run / "checkpoints").glob("step-*") if path.name[5:].isdecimal() and path.name.isascii())


def newest_good(run: Path, ranks: Ranks) -> tuple[Path, dict] | None:
    """(folder, manifest) of the newest checkpoint whose every file is what its manifest says; None in a run that has none yet."""
    found = ranks.gather(steps(run))[0]
    for step in reversed(found):
        folder = run / f"checkpoints/step-{step}"
        try:
            manifest, problem = _manifest(folder), None
            files = list(manifest["files"])[ranks.rank :: ranks.world_size]  # ranks share the reading
            problem = next((p for p in (_problem(folder / f, manifest["files"][f]) for f in files) if p), None)
        except UserError as error:
            manifest, problem = {}, str(error)
        problem = next((p for p in ranks.gather(problem) if p), None)
        if problem is None:
            return folder, manifest
        if ranks.first:
            print(f"warning: {problem}; going on from the checkpoint before it", flush=True)
    if found:
        raise UserError(f"none of the {len(found)} checkpoints in {run} is whole: remove them to start from the beginning")
    return None


def best(run: Path) -> Path:
    """The checkpoint with the highest leading dev score; of equals the later one."""
    found = _scored(_manifests(run / "checkpoints"))
    if not found:
        raise UserError(f"{run} holds no scored checkpoint: has the run got as far as its first look at the dev split?")
    return max(found)[2]


def _scored(found: list[tuple[dict, Path]]) -> list[tuple[float, int, Path]]:
    """(score, step, folder) of the checkpoints that have the score that leads in the newest of them.
    Those that an older version wrote name none: BLEU-4 led."""
    scored = [(manifest, path) for manifest, path in found if manifest["dev_bleu4"] is not None]
    if not scored:
        return []
    newest = max((manifest for manifest, _ in scored), key=lambda manifest: manifest["step"])
    name = f"dev_{newest['state'].get('leading') or 'bleu4'}"
    return [(manifest[name], manifest["step"], path) for manifest, path in scored if name in manifest]


def progress(run: Path) -> tuple[int, int]:
    """The step of a run's newest checkpoint, and of how many."""
    manifest = max((m for m, _ in _manifests(run / "checkpoints")), key=lambda m: m["step"])
    return manifest["step"], manifest.get("steps", manifest["step"])


def identity(run: Path) -> str:
    """The SHA-256 of the weights of its best checkpoint."""
    return _manifest(best(run))["files"]["model.safetensors"]["sha256"]


def load(run: Path, model: torch.nn.Module, prefix: str = "") -> None:
    """Fills the model from the best checkpoint, or with `prefix` a module from the part of that name."""
    folder = best(run)
    if problem := _problem(folder / "model.safetensors", _manifest(folder)["files"]["model.safetensors"]):
        raise UserError(problem)
    load_model(folder, model, prefix)


def load_model(folder: Path, model: torch.nn.Module, prefix: str = "") -> None:
    """The weights of a verified checkpoint."""
    path = folder / "model.safetensors"
    weights = {k.removeprefix(prefix): v for k, v in load_file(path).items() if k.startswith(prefix)}
    for name in weights.keys() & set(_shared_names(model)):  # two tensors there, so two here
        untie(model, name)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    missing = set(missing) - set(_shared_names(model)) - getattr(model, "base", set())
    if missing or unexpected:
        raise UserError(f"{path} does not fit the config of the run: missing {sorted(missing)[:3]}, unexpected {unexpected[:3]}")


@contextlib.contextmanager
def lock(run: Path, ranks: Ranks) -> Iterator[None]:
    """One run at a time in a folder. The lock is rank 0's and goes with its process, however that ends."""
    held = None
    if ranks.first:
        make_folder(run)
        try:
            file = open(run / "lock", "a+", encoding="utf-8")  # noqa: SIM115 - it is held
        except OSError as error:
            raise UserError(f"{run} cannot be written to: {error.strerror}") from None
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock, which worker processes would inherit and keep
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}")
            file.flush()
        except (BlockingIOError, PermissionError):
            file.seek(0)
            held = file.read() or "another process"
        except OSError as error:
            print(f"warning: {run} cannot be locked ({error}): see to it that only one run writes into it", flush=True)
    if held := ranks.gather(held)[0]:
        raise UserError(f"{run} is being written by {held}: wait for it, or name another --run_dir")
    try:
        yield
    finally:
        if ranks.first:
            file.close()


def unique_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The state without the second and further names of a shared tensor, which safetensors does not take, and without what the run holds elsewhere."""
    left_out = {*_shared_names(model), *model.base}
    return {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name not in left_out}


def _shared_names(model: torch.nn.Module) -> list[str]:
    seen: set[int] = set()
    return [n for n, t in model.state_dict(keep_vars=True).items() if id(t) in seen or seen.add(id(t))]


def _buffers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Those that a checkpoint holds."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in parameters}


def _manifests(folder: Path) -> list[tuple[dict, Path]]:
    """Those that can be read."""
    found = []
    for step in steps(folder.parent):
        with contextlib.suppress(UserError):
            found.append((_manifest(folder / f"step-{step}"), folder / f"step-{step}"))
    return found


def _manifest(folder: Path) -> dict:
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        if manifest.pop("sha256", None) == _digest(manifest):
            return manifest
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{folder} is no whole checkpoint: {error}") from None
    raise UserError(f"{folder}/manifest.json is altered")


def _problem(path: Path, facts: dict) -> str | None:
    try:
        if path.stat().st_size == facts["bytes"] and _sha256(path) == facts["sha256"]:
            return None
    except OSError as error:
        return f"{path} cannot be read: {error}"
    return f"{path} is not what its manifest says: the file is cut short or altered"


def _digest(manifest: dict) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(folder: Path) -> None:
    """A new name is on disk once its folder is."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
