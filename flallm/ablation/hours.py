"""The plan that `flallm ablate` prints: the runs, which of them are done, and the hours."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flallm.ablation.study import Run, Sweep
from flallm.planning.devices import DEVICES, device
from flallm.planning.estimate import estimate
from flallm.utils import UserError

DONE, PACE, ESTIMATE, UNKNOWN = "done", "pace", "estimate", "unknown"


@dataclass(frozen=True)
class Hours:
    """source: DONE: measured; PACE: from finished runs of the same stage and input; ESTIMATE: from
    `flallm plan`; UNKNOWN: of neither, value is 0. cause: why `flallm plan` has no figures."""

    value: float
    source: str
    cause: str = ""


def run_hours(sweep: Sweep, steps: dict[Run, int], gpu: str, world_size: int) -> dict[Run, Hours]:
    """Hours of the selected runs, from finished runs where there are such, or from `flallm plan`.

    steps: of the selected and of all finished runs. gpu, world_size: what `flallm plan` plans for.
    """
    finished = {run: sweep.seconds(run) / 3600 for run in sweep.all_runs if sweep.done(run)}
    frames = {run: _frames(sweep, run, steps[run]) for run in steps}
    paces: dict[tuple, list[float]] = {}
    for run, value in finished.items():
        paces.setdefault(_kind(run), []).append(value / frames[run])
    hours, estimates = {}, {}
    for run in sweep.runs:
        if run in finished:
            hours[run] = Hours(finished[run], DONE)
        elif _kind(run) in paces:
            hours[run] = Hours(float(frames[run] * np.mean(paces[_kind(run)])), PACE)
        else:
            same = (*_kind(run), run.changes)  # seeds take equally long
            if same not in estimates:
                estimates[same] = _estimate(sweep, run, gpu, world_size)
            hours[run] = estimates[same]
    return hours


def _kind(run: Run) -> tuple[str, bool]:
    return run.stage, bool(run.features)


def _frames(sweep: Sweep, run: Run, steps: int) -> float:
    """Used frames of a run, as a multiple of the mean frames of a clip."""
    config = sweep.config(run)
    return steps * config.train.batch / config.data.stride


def _estimate(sweep: Sweep, run: Run, gpu: str, world_size: int) -> Hours:
    if run.stage == "features":
        return Hours(0, UNKNOWN)
    config = sweep.config(run)
    try:
        rank_device = device(gpu, world_size, config.train)
        figures = estimate(config, world_size, rank_device, cached=bool(run.features))
    except UserError as error:  # such as no language model on this machine: the plan goes on
        return Hours(0, UNKNOWN, str(error))
    return Hours(figures.run_seconds / 3600, ESTIMATE)


def plan(sweep: Sweep, gpu: str, world_size: int) -> str:
    """A line a run with its hours, then the sums of what is left.

    gpu, world_size: what unfinished runs are planned for; "cpu" is this machine.
    """
    done = {run for run in sweep.all_runs if sweep.done(run)}
    steps = {run: sweep.steps(run) for run in {*sweep.runs, *done}}
    hours = run_hours(sweep, steps, gpu, world_size)
    # `flallm plan` leaves decoding out on a CPU.
    marks = {DONE: "", PACE: "", ESTIMATE: ">" if gpu == "cpu" else "~"}
    titles = "; ".join(sweep.title(table) for table in sweep.specs)
    finished = sum(run in done for run in sweep.runs)
    lines = [f"{titles}: {len(sweep.runs)} runs, {finished} of them done, on {sweep.recipe}"]
    for number, run in enumerate(sweep.runs):
        state = "done " if run in done else "to do"
        unit = "pass " if run.stage == "features" else "steps"
        time = "? h"
        if hours[run].source != UNKNOWN:
            time = f"{marks[hours[run].source]}{hours[run].value:.2f} h"
        lines.append(f"{number:4}  {state}  {steps[run]:8} {unit} {time:>10}   {run.name}")
    sums = _sums(list(hours.values()), gpu, world_size, marks[ESTIMATE])
    if sums:
        lines.append(f"left: {', '.join(sums)}")
    return "\n".join(lines)


def _sums(hours: list[Hours], gpu: str, world_size: int, mark: str) -> list[str]:
    """The hours that are left, by where they come from."""
    values = {source: [h.value for h in hours if h.source == source] for source in (PACE, ESTIMATE)}
    unknown = [h for h in hours if h.source == UNKNOWN]
    sums = []
    if values[PACE]:
        sums.append(f"{sum(values[PACE]):.2f} h")
    if values[ESTIMATE]:
        name = "this CPU" if gpu == "cpu" else DEVICES[gpu].name
        total = f"{mark}{sum(values[ESTIMATE]):.2f} h"
        sums.append(f"{total} on {world_size} x {name} by flallm plan")
    if unknown:
        causes = [h.cause for h in unknown if h.cause]
        cause = causes[0] if causes else "no features have been written yet"
        sums.append(f"unknown hours of {len(unknown)}: {cause}")
    return sums
