"""Parameter groups and their learning rates."""

from __future__ import annotations

import math

from flallm.config import Train
from flallm.model.translator import Translator


def parameter_groups(model: Translator, config: Train) -> list[dict]:
    """One group for each part that trains, with its own learning rate."""
    groups = []
    for part in ("encoder", "adapter", "language"):
        modules = [getattr(model, part)] + (
            [model.words] if part == "adapter" and hasattr(model, "words") else []
        )
        params = [p for module in modules for p in module.parameters() if p.requires_grad]
        if params:
            groups.append({"name": part, "params": params, "lr": getattr(config, f"lr_{part}")})
    return groups


def set_learning_rates(engine, config: Train, factor: float) -> dict[str, float]:
    """Sets each group's learning rate to the recipe's times `factor`; returns the rates by the groups' names."""
    for group in engine.optimizer.param_groups:
        group["lr"] = factor * getattr(config, f"lr_{group['name']}")
    return {group["name"]: group["lr"] for group in engine.optimizer.param_groups}


def schedule(config: Train, step: int, total: int) -> float:
    """What the learning rates are multiplied by: a linear rise over the warm-up, then a cosine down to 0."""
    warmup = config.warmup * total
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
