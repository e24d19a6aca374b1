"""Weights of a run's checkpoints: which are whole, which is best, and into which module they go."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from flallm.model.llm import untie
from flallm.utils import UserError


def checkpoint_steps(run: Path) -> list[int]:
    """Of which steps a run has checkpoints, whole or not. A copy under another name, such as step-10.bak, is none of them."""
    return sorted(int(path.name[5:]) for path in (run / "checkpoints").glob("step-*") if path.name[5:].isdecimal() and path.name.isascii())


def best_checkpoint(run: Path) -> Path:
    """The checkpoint with the highest leading dev score; of equals the later one."""
    found = by_dev_score(read_manifests(run / "checkpoints"))
    if not found:
        raise UserError(f"{run} holds no scored checkpoint: has the run got as far as its first look at the dev split?")
    return max(found)[2]


def by_dev_score(found: list[tuple[dict, Path]]) -> list[tuple[float, int, Path]]:
    """(score, step, folder) of the checkpoints that have the score that leads in the newest of them.
    Those that an older version wrote name none: BLEU-4 led."""
    scored = [(manifest, path) for manifest, path in found if manifest["dev_bleu4"] is not None]
    if not scored:
        return []
    newest = max((manifest for manifest, _ in scored), key=lambda manifest: manifest["step"])
    name = f"dev_{newest['state'].get('leading') or 'bleu4'}"
    return [(manifest[name], manifest["step"], path) for manifest, path in scored if name in manifest]


def run_progress(run: Path) -> tuple[int, int]:
    """The step of a run's newest checkpoint, and of how many."""
    manifest = max((m for m, _ in read_manifests(run / "checkpoints")), key=lambda m: m["step"])
    return manifest["step"], manifest.get("steps", manifest["step"])


def weights_sha256(run: Path) -> str:
    """The SHA-256 of the weights of its best checkpoint."""
    return read_manifest(best_checkpoint(run))["files"]["model.safetensors"]["sha256"]


def load_best(run: Path, model: torch.nn.Module, prefix: str = "") -> None:
    """Fills the model from the best checkpoint, or with `prefix` a module from the part of that name."""
    folder = best_checkpoint(run)
    if problem := file_problem(folder / "model.safetensors", read_manifest(folder)["files"]["model.safetensors"]):
        raise UserError(problem)
    load_weights(folder, model, prefix)


def load_weights(folder: Path, model: torch.nn.Module, prefix: str = "") -> None:
    """The weights of a verified checkpoint."""
    path = folder / "model.safetensors"
    weights = {k.removeprefix(prefix): v for k, v in load_file(path).items() if k.startswith(prefix)}
    for name in weights.keys() & set(_shared_names(model)):  # two tensors there, so two here
        untie(model, name)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    missing = set(missing) - set(_shared_names(model)) - getattr(model, "base", set())
    if missing or unexpected:
        raise UserError(f"{path} does not fit the config of the run: missing {sorted(missing)[:3]}, unexpected {unexpected[:3]}")


def unique_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The state without the second and further names of a shared tensor, which safetensors does not take, and without what the run holds elsewhere."""
    left_out = {*_shared_names(model), *model.base}
    return {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name not in left_out}


def _shared_names(model: torch.nn.Module) -> list[str]:
    seen: set[int] = set()
    return [n for n, t in model.state_dict(keep_vars=True).items() if id(t) in seen or seen.add(id(t))]


def read_manifests(folder: Path) -> list[tuple[dict, Path]]:
    """Those that can be read."""
    found = []
    for step in checkpoint_steps(folder.parent):
        with contextlib.suppress(UserError):
            found.append((read_manifest(folder / f"step-{step}"), folder / f"step-{step}"))
    return found


def read_manifest(folder: Path) -> dict:
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        if manifest.pop("sha256", None) == manifest_digest(manifest):
            return manifest
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{folder} is no whole checkpoint: {error}") from None
    raise UserError(f"{folder}/manifest.json is altered")


def file_problem(path: Path, facts: dict) -> str | None:
    try:
        if path.stat().st_size == facts["bytes"] and file_sha256(path) == facts["sha256"]:
            return None
    except OSError as error:
        return f"{path} cannot be read: {error}"
    return f"{path} is not what its manifest says: the file is cut short or altered"


def manifest_digest(manifest: dict) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
