"""Commands that look ahead: what a recipe takes, and what this machine lacks."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from flallm import config
from flallm.commands.parse import PositiveFloat, PositiveInt
from flallm.utils import UserError


def plan(
    recipe: str,
    *,
    world_size: PositiveInt,
    gpu: str = "a100-80",
    stage: Literal["stage1", "stage2", "joint"] | None = None,
    clips_per_s: PositiveFloat | None = None,
    **overrides: str,
) -> int:
    """What a recipe takes on so many GPUs: memory, steps, hours, communication, checkpoints.

    Exit code 1: it does not fit.

    Args:
        recipe: a built-in name such as phoenix14t, or the path of a YAML file
        world_size: ranks, one a GPU
        gpu: a100-40, a100-80, h100-80, h200, or cpu for this machine
        stage: stage1, stage2 or joint; stage 1 and stage 2 by default
        clips_per_s: of all ranks, as measured, in place of a computed step; needs --stage
        overrides: fields of the recipe, as in --train.batch=64
    """
    if clips_per_s and not stage:
        raise UserError("--clips_per_s belongs to one stage: name it with --stage")
    stages = [stage] if stage else ["stage1", "stage2"]
    configs = [config.load(recipe, name, overrides) for name in stages]

    from flallm.planning.devices import device
    from flallm.planning.estimate import estimate
    from flallm.planning.rows import advice, rows, show

    code = 0
    for resolved in configs:
        rank_device = device(gpu, world_size, resolved.train)
        figures = estimate(resolved, world_size, rank_device, clips_per_s)
        print(f"{resolved.name or recipe} {resolved.stage} on {world_size} x {rank_device.name}")
        print(show(rows(figures)) + "\n")
        if too_much := advice(figures.memory, rank_device):
            print(f"{resolved.stage} {too_much}\n")
            code = 1
    return code


def doctor(recipe: str | None = None, *, run_dir: Path = Path("runs"), **overrides: str) -> int:
    """Looks at this machine and at what a recipe needs of it: rows OK, WARN, MISS with what to do.

    Exit code 1: something is missing.

    Args:
        recipe: a built-in name such as phoenix14t, or the path of a YAML file, as a first word too
            (doctor RECIPE); without it only the machine
        run_dir: where runs will lie
        overrides: fields of the recipe, as in --data.shards=DIR
    """
    stages = ("stage1", "stage2") if recipe else ()
    configs = [config.load(recipe, stage, overrides) for stage in stages]

    from flallm.planning.doctor import MISS, doctor

    missing = 0
    for state, name, detail in doctor(configs, run_dir):
        missing += state == MISS
        print(f"{state:5} {name:16} {detail}", flush=True)
    return 1 if missing else 0
