"""The DeepSpeed settings of a recipe."""

from __future__ import annotations

import json
from pathlib import Path

from flallm.config import Train
from flallm.utils import UserError

# What of a DeepSpeed config follows from the recipe or the plan. Parameters stay fp32, and train.precision=bf16 computes with autocast.
MANAGED_KEYS = {
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping", "optimizer", "scheduler", "bf16", "fp16",
    "torch_autocast",
}  # fmt: skip


def deepspeed_config(config: Train, device: str) -> dict:
    """The content of the recipe's file for cuda or cpu, with the overrides put in."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    here = Path(__file__).parents[1]
    folder = next(
        f for f in (here / "ds_configs", here.parent / "ds_configs") if f.is_dir()
    )  # installed, or in the repo
    path = (
        Path(config.deepspeed)
        if config.deepspeed
        else folder / ("zero2.json" if device == "cuda" else "zero2_cpu.json")
    )
    if not path.exists() and path.parent.name in (
        "",
        "ds_configs",
    ):  # ours, by its name, from any working folder
        path = folder / path.name
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"train.deepspeed: {path} cannot be read as JSON: {error}") from None
    if not isinstance(settings, dict) or not isinstance(
        settings.get("zero_optimization", {}), dict
    ):
        raise UserError(
            f"train.deepspeed: {path} holds no settings of DeepSpeed: an object with sections such as zero_optimization was expected"
        )
    for name, value in config.deepspeed_overrides.items():
        if name not in settings:
            raise UserError(
                f"train.deepspeed_overrides: {path} has no field {name!r} but {', '.join(settings)}"
            )
        if isinstance(settings[name], dict) is not isinstance(value, dict):
            raise UserError(
                f"train.deepspeed_overrides: {name} is {settings[name]} in {path} and cannot be {value}"
            )
        settings[name] = settings[name] | value if isinstance(value, dict) else value
    if ours := settings.keys() & MANAGED_KEYS:
        raise UserError(
            f"train.deepspeed: {', '.join(sorted(ours))} in {path} would be filled in from the recipe: leave it out of the file"
        )
    try:
        stage = DeepSpeedZeroConfig(**settings.get("zero_optimization", {})).stage
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(
            f"train.deepspeed: zero_optimization.{'.'.join(map(str, first['loc']))} in {path}: {first['msg']}"
        ) from None
    if stage not in (1, 2, 3):
        raise UserError(
            f"train.deepspeed: zero_optimization.stage is {stage} in {path}; 1, 2 and 3 are supported"
        )
    return settings
