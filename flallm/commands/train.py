"""Commands that train."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from flallm import config
from flallm.commands.common import group_of_ranks
from flallm.commands.parse import Count, PositiveInt
from flallm.utils import UserError


def demo(*, out: Path = Path("flallm-demo")) -> None:
    """The whole job on an embedded corpus, in some ten minutes on two cores.

    Makes shards, trains stage 1 and stage 2, scores them and translates a clip.

    Args:
        out: the folder to write into
    """
    from flallm.demo.demo import demo

    demo(out)


def stage1(recipe: str, *, run_dir: Path | None = None, **overrides: str) -> None:
    """Visual initialing: trains the visual encoder with a light translation model (Light-T).

    Args:
        recipe: a built-in name such as demo, or the path of a YAML file
        run_dir: the folder of the run; runs/<name of the recipe>-stage1 by default
        overrides: fields of the recipe, as in --train.steps=100 --data.shards=DIR
    """
    _train("stage1", recipe, run_dir, overrides)


def stage2(recipe: str, *, stage1: Path, run_dir: Path | None = None, **overrides: str) -> None:
    """LLM fine-tuning: trains a large language model on the frozen encoder of a stage-1 run.

    Args:
        recipe: a built-in name such as demo, or the path of a YAML file
        stage1: the folder of the finished stage-1 run
        run_dir: the folder of the run; runs/<name of the recipe>-stage2 by default
        overrides: fields of the recipe, as in --train.lr_language=1e-5 --llm.path=DIR
    """
    _train("stage2", recipe, run_dir, overrides, stage1)


def joint(recipe: str, *, run_dir: Path | None = None, **overrides: str) -> None:
    """The end-to-end baseline: encoder and large language model train together, none is frozen.

    Args:
        recipe: a built-in name such as demo, or the path of a YAML file
        run_dir: the folder of the run; runs/<name of the recipe>-joint by default
        overrides: fields of the recipe, as in --train.steps=100
    """
    _train("joint", recipe, run_dir, overrides)


def _train(
    stage: str,
    recipe: str,
    run_dir: Path | None,
    overrides: dict[str, str],
    stage1: Path | None = None,
) -> None:
    resolved = config.load(recipe, stage, overrides)
    run = run_dir or Path(f"runs/{resolved.name or Path(recipe).stem}-{stage}")

    from flallm.training.train import train

    with group_of_ranks(resolved.train.timeout) as ranks:
        train(resolved, run, ranks, stage1)


def ablate(
    recipe: str,
    *,
    table: str,
    seeds: PositiveInt = 1,
    rows: str = "",
    out: Path = Path("ablate"),
    ranks: PositiveInt = 1,
    where: Literal["here", "slurm", "nowhere"] = "here",
    sbatch: str = "",
    run: Count | None = None,
    **overrides: str,
) -> None:
    """The paper's tables on a recipe: prints the plan, trains what is not done, writes the tables.

    Args:
        recipe: a built-in name such as demo, or the path of a YAML file
        table: 4, 5, 6, 7, 8, 9, 10, fig2 or fig4 of the paper, or steps, words or lora, past it;
            several separated by commas share their runs. See flallm/ablation/tables.yaml
        seeds: how many seeds, 0 to n - 1, each run has
        rows: only these rows of the tables, separated by commas
        out: the folder to write into; tables in one folder share runs
        ranks: how many ranks of this machine a run has
        where: here, one run after another; slurm, as arrays of jobs; nowhere, only the plan and the
            tables of what is done
        sbatch: options of sbatch for these jobs, such as "--partition=gpu --time=8:00:00"
        run: only the run of this number in the plan, on the ranks that a launcher has started
        overrides: fields of the recipe, in all runs
    """
    from flallm.ablation.ablate import ablate, train_run
    from flallm.ablation.study import Sweep

    tables = [name.strip() for name in table.split(",")]
    selected = [name.strip() for name in rows.split(",") if name.strip()]
    sweep = Sweep(recipe, tables, seeds, selected, overrides, out)
    if run is None:
        options = {"table": table, "seeds": seeds, "rows": rows, "out": out} | overrides
        command = [recipe, *(f"--{name}={value}" for name, value in options.items())]
        ablate(sweep, where, ranks, sbatch, command)
        return
    if run >= len(sweep.runs):
        raise UserError(f"--run: the plan has runs 0 to {len(sweep.runs) - 1}")
    with group_of_ranks(sweep.timeout(sweep.runs[run])) as group:
        train_run(sweep, sweep.runs[run], group)
