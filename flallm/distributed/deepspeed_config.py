"""The DeepSpeed settings of a recipe."""

from __future__ import annotations

import json
from pathlib import Path

from flallm.config import Train
from flallm.utils import UserError

# Settings that follow from the recipe. Parameters stay fp32; train.precision=bf16 uses autocast.
MANAGED_KEYS = {
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"),
    *("gradient_clipping", "optimizer", "scheduler", "bf16", "fp16", "torch_autocast"),
}


def deepspeed_config(config: Train, device: str) -> dict:
    """The content of the recipe's JSON file for a device, cuda or cpu, with the overrides put in.

    Raises UserError for a file or a setting that cannot be used.
    """
    path = _settings_path(config, device)
    settings = _read_settings(path)
    for name, value in config.deepspeed_overrides.items():
        if name not in settings:
            fields = ", ".join(settings)
            raise UserError(f"train.deepspeed_overrides: {path} has no field {name!r} but {fields}")
        if isinstance(settings[name], dict) is not isinstance(value, dict):
            raise UserError(
                f"train.deepspeed_overrides: {name} is {settings[name]} in {path} "
                f"and cannot be {value}"
            )
        settings[name] = settings[name] | value if isinstance(value, dict) else value
    if managed := settings.keys() & MANAGED_KEYS:
        raise UserError(
            f"train.deepspeed: {', '.join(sorted(managed))} in {path} would be filled in from the "
            "recipe: leave it out of the file"
        )
    _check_zero_stage(settings, path)
    return settings


def _settings_path(config: Train, device: str) -> Path:
    package = Path(__file__).parents[1]
    folder = package / "ds_configs"  # of an installed package
    if not folder.is_dir():
        folder = package.parent / "ds_configs"  # in the repository
    if not config.deepspeed:
        return folder / ("zero2.json" if device == "cuda" else "zero2_cpu.json")
    path = Path(config.deepspeed)
    if not path.exists() and path.parent.name in ("", "ds_configs"):
        return folder / path.name  # a file of ours, from any working folder
    return path


def _read_settings(path: Path) -> dict:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"train.deepspeed: {path} cannot be read as JSON: {error}") from None
    is_object = isinstance(settings, dict)
    if not is_object or not isinstance(settings.get("zero_optimization", {}), dict):
        raise UserError(
            f"train.deepspeed: {path} holds no settings of DeepSpeed: an object with sections such "
            "as zero_optimization was expected"
        )
    return settings


def _check_zero_stage(settings: dict, path: Path) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    try:
        stage = DeepSpeedZeroConfig(**settings.get("zero_optimization", {})).stage
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise UserError(
            f"train.deepspeed: zero_optimization.{field} in {path}: {first['msg']}"
        ) from None
    if stage not in (1, 2, 3):
        raise UserError(
            f"train.deepspeed: zero_optimization.stage is {stage} in {path}; "
            "1, 2 and 3 are supported"
        )
