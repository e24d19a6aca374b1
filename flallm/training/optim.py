"""Parameter groups and their learning rates."""

from __future__ import annotations

import math

from flallm.config import Train
from flallm.model.translator import Translator


def parameter_groups(model: Translator, config: Train) -> list[dict]:
    """One group for each part that trains, with its own learning rate."""
    groups = []
    for part in ("encoder", "adapter", "language"):
        modules = [getattr(model, part)]
        if part == "adapter" and hasattr(model, "words"):
            modules.append(model.words)
        params = []
        for module in modules:
            params += [p for p in module.parameters() if p.requires_grad]
        if params:
            groups.append({"name": part, "params": params, "lr": getattr(config, f"lr_{part}")})
    return groups


def set_learning_rates(engine, config: Train, factor: float) -> dict[str, float]:
    """Sets each group's learning rate to the recipe's times `factor`.

    Returns the rates by the names of the groups.
    """
    for group in engine.optimizer.param_groups:
        group["lr"] = factor * getattr(config, f"lr_{group['name']}")
    return {group["name"]: group["lr"] for group in engine.optimizer.param_groups}


def schedule(config: Train, step: int, total: int) -> float:
    """The factor of the learning rates in a step, from 0 on, of `total` steps.

    It rises linearly over the warm-up and then falls along a cosine to 0.
    """
    warmup = config.warmup * total
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
