"""`flallm ablate`: prints the plan, trains what is not done, and writes the tables."""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from pathlib import Path

from flallm.ablation.hours import plan
from flallm.ablation.study import SPLIT, Run, Sweep
from flallm.ablation.tables import Table
from flallm.distributed.context import init_distributed
from flallm.distributed.launch import spawn
from flallm.utils import UserError, atomic_write

GPU = "a100-80"  # the default of flallm plan
SCRIPT = Path(__file__).parents[2] / "slurm/ablate.sh"


def ablate(sweep: Sweep, where: str, world_size: int, sbatch: str, command: list[str]) -> None:
    """where: "here", "slurm" or "nowhere", which trains nothing.

    sbatch: options of sbatch. command: the words after `flallm ablate` that a job repeats.
    """
    import torch

    sweep.check_begun()
    gpu = "cpu" if where == "here" and not torch.cuda.is_available() else GPU
    print(plan(sweep, gpu, world_size), flush=True)
    left = [run for run in sweep.runs if not sweep.done(run)]
    if where != "nowhere":
        sweep.check(left)
    if where == "slurm" and left:
        submit(sweep, left, shlex.split(sbatch), command)
        return
    if where == "here":
        train_here(sweep, left, world_size)
    write_tables(sweep)


def train_here(sweep: Sweep, runs: list[Run], world_size: int) -> None:
    """Trains the runs one after another. Each has its own processes, which free its memory."""
    from torch.multiprocessing import ProcessExitedException

    for run in runs:
        try:
            spawn(_train_rank, world_size, sweep, run)
        except ProcessExitedException as error:  # the rank has printed the cause
            raise SystemExit(error.exit_code) from None


def _train_rank(sweep: Sweep, run: Run) -> None:
    ranks = init_distributed(sweep.timeout(run))
    try:
        train_run(sweep, run, ranks)
    except UserError as error:
        if ranks.is_main:
            print(f"flallm: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def train_run(sweep: Sweep, run: Run, ranks) -> None:
    """Trains and scores a run, or writes its features, on the ranks of this group, once."""
    from flallm.evaluation.decode import evaluate
    from flallm.training.train import train

    if sweep.done(run):
        return
    if ranks.is_main:
        print(f"\n== {run.name}", flush=True)
    if run.stage == "features":
        _write_features(sweep, run, ranks)
        return
    folder = sweep.folder(run)
    stage1 = sweep.folder(run.stage1) if run.stage1 else None
    train(sweep.training_config(run), folder, ranks, stage1)
    evaluate(folder, SPLIT, ranks)


def _write_features(sweep: Sweep, run: Run, ranks) -> None:
    from flallm.inference.features import features

    began = time.monotonic()
    features(sweep.folder(run.stage1), sweep.folder(run), ranks, "bf16", 0)
    if ranks.is_main:
        atomic_write(sweep.folder(run) / "seconds.txt", f"{time.monotonic() - began:.1f}")


def submit(sweep: Sweep, left: list[Run], options: list[str], command: list[str]) -> None:
    """Submits up to three arrays of jobs, each after the one before it; a job is one run.

    First the runs that need no other run, then the features of these, then the other runs.
    """
    if not SCRIPT.is_file():
        raise UserError(
            f"--where=slurm: {SCRIPT} is not there: run flallm from a checkout of its repository"
        )
    independent = [run for run in left if not run.stage1]
    features = [run for run in left if run.stage == "features"]
    dependent = [run for run in left if run.stage1 and run.stage != "features"]
    dependency: list[str] = []
    for runs in (independent, features, dependent):
        if not runs:
            continue
        numbers = ",".join(str(sweep.runs.index(run)) for run in runs)
        job = _sbatch([*options, *dependency, f"--array={numbers}", str(SCRIPT), *command])
        print(f"job {job}: runs {numbers}")
        dependency = [f"--dependency=afterok:{job}"]
    tables = "table" if len(sweep.specs) == 1 else "tables"
    print(f"The same command with --where=nowhere writes the {tables} once they are done.")


def _sbatch(arguments: list[str]) -> str:
    """Submits a job and returns its id."""
    command = ["sbatch", "--parsable", "--kill-on-invalid-dep=yes", *arguments]
    result = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
    if result.returncode:
        raise UserError(f"--where=slurm: sbatch says: {result.stderr.strip()}")
    return result.stdout.strip().split(";")[0]


def write_tables(sweep: Sweep) -> None:
    """Writes and prints each table that has a finished row."""
    for name in sweep.specs:
        table = Table(sweep, name)
        if table.finished():
            print(f"\n{table.write()}\nWritten: {table.stem}.json, .md and .png")
