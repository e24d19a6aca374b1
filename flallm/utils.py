"""Shared by all: errors of the user, files and folders, CPU limits, progress."""

import math
import os
import sys
import tempfile
from functools import partial
from pathlib import Path


class UserError(Exception):
    """A mistake of the user. The command prints the message as one line and exits with code 2."""


def first_line(error: Exception) -> str:
    """The first line of an error's message; its type if the message is empty."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def ensure_dir(path: Path) -> None:
    """Makes a folder unless it exists. Raises UserError if nothing can be written into it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path} cannot be made: {error.strerror}") from None
    if not os.access(path, os.W_OK):
        raise UserError(f"{path} cannot be written into")


def visible_files(folder: Path, pattern: str) -> list[Path]:
    """The files of a folder that match a pattern of `Path.glob`, sorted, without hidden ones.

    macOS leaves a `._a.mp4` beside an `a.mp4`.
    """
    visible = []
    for path in folder.glob(pattern):
        if not any(is_hidden(part) for part in path.relative_to(folder).parts):
            visible.append(path)
    return sorted(visible)


def is_hidden(name: str) -> bool:
    """Whether a file or folder of that name is hidden."""
    return name.startswith(".")


def atomic_write(path: Path, text: str) -> None:
    """Writes a file so that no reader and no other writer ever sees a part of it."""
    file = tempfile.NamedTemporaryFile(  # noqa: SIM115
        "w",
        dir=path.parent,
        prefix=f".{path.name}.",
        encoding="utf-8",
        errors="replace",
        delete=False,
    )
    try:
        with file:
            file.write(text)
        os.chmod(file.name, 0o644)
        os.rename(file.name, path)
    except OSError:  # such as of a full disk
        os.unlink(file.name)
        raise


def usable_cpus(processes: int = 1) -> int:
    """How many cores this process may use, or each of `processes` that share them: at least 1.

    A job of 16 cores on a node of 128 may use 16. Slurm and containers limit them by affinity, by a
    quota of CPU time, or only by SLURM_CPUS_PER_TASK.
    """
    limit = min(len(os.sched_getaffinity(0)), cpu_quota()) // processes
    slurm_cpus = os.environ.get("SLURM_CPUS_PER_TASK", "")
    if slurm_cpus.isdecimal():
        limit = min(limit, int(slurm_cpus))
    return max(1, int(limit))


def cpu_quota(
    cgroups: Path = Path("/proc/self/cgroup"),
    mount: Path = Path("/sys/fs/cgroup"),
) -> float:
    """How many cores the cgroups (version 1 or 2) of this process grant; inf: no limit."""
    try:
        lines = cgroups.read_text(encoding="utf-8").splitlines()
    except OSError:
        return math.inf
    quota = math.inf
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2, alone or beside version 1
            hierarchies = [mount, mount / "unified"]
        elif "cpu" in controllers.split(","):
            hierarchies = [mount / "cpu"]
        else:
            continue
        for hierarchy in hierarchies:
            folder = hierarchy / path.lstrip("/")
            # The limits of the groups above hold, too. In a container `path` may be the host's.
            for group in (folder, *folder.parents):
                quota = min(quota, _quota_of(group))
    return quota


def _quota_of(group: Path) -> float:
    """The quota of one cgroup; inf where it sets none."""
    try:
        if (group / "cpu.max").is_file():
            time, period = (group / "cpu.max").read_text().split()
        else:
            time = (group / "cpu.cfs_quota_us").read_text()
            period = (group / "cpu.cfs_period_us").read_text()
        return int(time) / int(period) if int(time) > 0 else math.inf
    except (OSError, ValueError, ZeroDivisionError):  # no such file, or "max"
        return math.inf


def progress(total: int, unit: str, description: str, shown: bool = True):
    """tqdm's progress: a bar on a terminal, a line a minute in a log."""
    from tqdm import tqdm

    bar = partial(tqdm, total=total, unit=unit, desc=description, disable=not shown)
    if sys.stderr.isatty():
        return bar()
    counts = f"{{n_fmt}} of {{total_fmt}} {unit}s"
    line = f"{{desc}}: {counts}, {{elapsed}} so far, {{remaining}} left\n"
    return bar(delay=60, mininterval=60, bar_format=line)
