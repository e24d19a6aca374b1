"""Checkpoints of a run: `checkpoints/step-N/` with the weights as safetensors and a manifest that goes last.

A checkpoint is written beside and renamed. Only the best on dev and the last are kept.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from flallm import UserError


def save(run: Path, step: int, dev_bleu: float, model: torch.nn.Module) -> None:
    """Writes checkpoints/step-N and removes those that are neither the best nor the last. One rank calls this."""
    folder, part = run / "checkpoints" / f"step-{step}", run / "checkpoints" / f".step-{step}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    save_file(_unique_tensors(model), part / "model.safetensors")
    manifest = {"step": step, "dev_bleu4": dev_bleu, "sha256": {"model.safetensors": _sha256(part / "model.safetensors")}}
    (part / "manifest.json").write_text(json.dumps(manifest, indent=1))
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)
    keep = {best(run), folder}
    for other in folder.parent.glob("step-*"):
        if other not in keep:
            shutil.rmtree(other)


def best(run: Path) -> Path:
    """The checkpoint with the highest dev BLEU-4; of equals the later one."""
    found = [(_manifest(f), f) for f in (run / "checkpoints").glob("step-*")]
    if not found:
        raise UserError(f"{run} holds no checkpoint: has the run got as far as its first look at the dev split?")
    return max(found, key=lambda pair: (pair[0]["dev_bleu4"], pair[0]["step"]))[1]


def load(run: Path, model: torch.nn.Module, prefix: str = "") -> None:
    """Fills the model, or with `prefix` the part of that name, from the best checkpoint."""
    folder = best(run)
    path = folder / "model.safetensors"
    try:
        if _sha256(path) != _manifest(folder)["sha256"][path.name]:
            raise UserError(f"{path} is not what its manifest says: the file is cut short or altered")
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    target = model.get_submodule(prefix) if prefix else model
    weights = {k.removeprefix(prefix).lstrip("."): v for k, v in weights.items() if k.startswith(prefix)}
    missing, unexpected = target.load_state_dict(weights, strict=False)
    missing = set(missing) - set(_shared_names(target))
    if missing or unexpected:
        raise UserError(f"{path} does not fit the config of the run: missing {sorted(missing)[:3]}, unexpected {unexpected[:3]}")


def _unique_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The state without the second and further names of a shared tensor, which safetensors does not take."""
    shared = set(_shared_names(model))
    return {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name not in shared}


def _shared_names(model: torch.nn.Module) -> list[str]:
    seen: set[int] = set()
    return [n for n, t in model.state_dict(keep_vars=True).items() if id(t) in seen or seen.add(id(t))]


def _manifest(folder: Path) -> dict:
    try:
        return json.loads((folder / "manifest.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is no whole checkpoint: {error}") from None


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
