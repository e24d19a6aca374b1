"""Weights of a run's checkpoints: which are intact, which is best, and loading them."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file

from flallm.model.llm import untie
from flallm.utils import UserError


class ScoredCheckpoint(NamedTuple):
    """A checkpoint with a dev score. They sort by score; of equal ones the later is greater."""

    score: float
    step: int
    folder: Path


def checkpoint_steps(run: Path) -> list[int]:
    """The steps of which a run has checkpoints, intact or not.

    A copy under another name, such as step-10.bak, does not count.
    """
    steps = []
    for path in (run / "checkpoints").glob("step-*"):
        number = path.name.removeprefix("step-")
        if number.isdecimal() and number.isascii():
            steps.append(int(number))
    return sorted(steps)


def best_checkpoint(run: Path) -> Path:
    """The checkpoint with the highest leading dev score; of equal ones the later."""
    scored = by_dev_score(read_manifests(run / "checkpoints"))
    if not scored:
        question = "has the run got as far as its first look at the dev split?"
        raise UserError(f"{run} holds no scored checkpoint: {question}")
    return max(scored).folder


def by_dev_score(manifests: list[tuple[dict, Path]]) -> list[ScoredCheckpoint]:
    """The checkpoints that have the score that leads in the newest of them.

    manifests: of checkpoints, with their folders. Those of older versions name no leading score:
    it was BLEU-4.
    """
    scored = [pair for pair in manifests if pair[0]["dev_bleu4"] is not None]
    if not scored:
        return []
    newest = max((manifest for manifest, _ in scored), key=lambda manifest: manifest["step"])
    score = f"dev_{newest['state'].get('leading') or 'bleu4'}"
    return [
        ScoredCheckpoint(manifest[score], manifest["step"], folder)
        for manifest, folder in scored
        if score in manifest
    ]


def run_progress(run: Path) -> tuple[int, int]:
    """(the step of a run's newest checkpoint, the number of its steps)."""
    manifests = [manifest for manifest, _ in read_manifests(run / "checkpoints")]
    newest = max(manifests, key=lambda manifest: manifest["step"])
    return newest["step"], newest.get("steps", newest["step"])


def weights_sha256(run: Path) -> str:
    """The SHA-256 of the weights of a run's best checkpoint."""
    return read_manifest(best_checkpoint(run))["files"]["model.safetensors"]["sha256"]


def load_best(run: Path, model: torch.nn.Module, prefix: str = "") -> None:
    """Loads the best checkpoint of a run into the model.

    prefix: only the weights whose names begin with it, without it. Raises UserError for a
    checkpoint that is damaged or does not fit.
    """
    folder = best_checkpoint(run)
    facts = read_manifest(folder)["files"]["model.safetensors"]
    problem = file_problem(folder / "model.safetensors", facts)
    if problem:
        raise UserError(problem)
    load_weights(folder, model, prefix)


def load_weights(folder: Path, model: torch.nn.Module, prefix: str = "") -> None:
    """Loads the weights of a verified checkpoint; prefix: as in `load_best`."""
    path = folder / "model.safetensors"
    weights = {}
    for name, tensor in load_file(path).items():
        if name.startswith(prefix):
            weights[name.removeprefix(prefix)] = tensor
    for name in weights.keys() & set(_repeated_names(model)):  # two tensors in the file
        untie(model, name)
    absent, unexpected = model.load_state_dict(weights, strict=False)
    missing = set(absent) - set(_repeated_names(model)) - getattr(model, "base", set())
    if missing or unexpected:
        names = f"missing {sorted(missing)[:3]}, unexpected {unexpected[:3]}"
        raise UserError(f"{path} does not fit the config of the run: {names}")


def unique_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The state of a model for safetensors, which refuses shared tensors.

    Each shared tensor has its first name alone. The frozen weights under LoRA's are left out.
    """
    excluded = {*_repeated_names(model), *model.base}
    state = model.state_dict().items()
    return {name: tensor.contiguous() for name, tensor in state if name not in excluded}


def _repeated_names(model: torch.nn.Module) -> list[str]:
    """The second and further names of shared tensors."""
    seen, repeated = set(), []
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in seen:
            repeated.append(name)
        seen.add(id(tensor))
    return repeated


def read_manifests(folder: Path) -> list[tuple[dict, Path]]:
    """The readable manifests of the checkpoints in a folder, with the checkpoints' folders."""
    manifests = []
    for step in checkpoint_steps(folder.parent):
        checkpoint = folder / f"step-{step}"
        with contextlib.suppress(UserError):
            manifests.append((read_manifest(checkpoint), checkpoint))
    return manifests


def read_manifest(folder: Path) -> dict:
    """The manifest of a checkpoint. Raises UserError where it is missing or altered."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        digest = manifest.pop("sha256", None)
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{folder} is no whole checkpoint: {error}") from None
    if digest != manifest_digest(manifest):
        raise UserError(f"{folder}/manifest.json is altered")
    return manifest


def file_problem(path: Path, facts: dict) -> str | None:
    """What is wrong with a file of a checkpoint; facts: its bytes and sha256 in the manifest."""
    try:
        if path.stat().st_size == facts["bytes"] and file_sha256(path) == facts["sha256"]:
            return None
    except OSError as error:
        return f"{path} cannot be read: {error}"
    return f"{path} is not what its manifest says: the file is cut short or altered"


def manifest_digest(manifest: dict) -> str:
    """The SHA-256 of a manifest without its own `sha256`."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
