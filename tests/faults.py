"""`make faults`: what a cluster does to a run, done to real runs. A row each, OK or FAILED, with its figures.

    python tests/faults.py [NAME …]

A run here is real processes, a rank each, which are killed for real; they are forked from one that has imported everything, so
that starting takes a second. `plant`s go wrong inside a rank: they wrap the call in which it is to happen.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from conftest import FORK, SMALL
from safetensors.torch import load_file

from flallm import config as cfg
from flallm.commands.common import group_of_ranks
from flallm.data.dataset import Batch
from flallm.distributed.context import DistContext
from flallm.distributed.rendezvous import rendezvous
from flallm.model.translator import Translator
from flallm.training import checkpoint
from flallm.training.checkpoint import CheckpointManager
from flallm.training.step import StepVotes
from flallm.training.train import train
from flallm.utils import UserError

ZERO3 = str(Path(__file__).parents[1] / "ds_configs/zero3.json")
DAMAGE = {
    "truncated": "rank-1.safetensors",
    "removed": "model.safetensors",
    "flipped": "model.safetensors",
    "manifest": "manifest.json",
}
SHORT = {
    "train.steps": 6,
    "train.batch": 12,
    "train.log_every": 1,
    "train.dev_every": 3,
    "checkpoint.every": 2,
    "checkpoint.last": 20,
}


class Run:
    """The ranks of one run, as processes that can be killed."""

    def __init__(
        self,
        config: cfg.Config,
        folder: Path,
        world_size: int = 2,
        plant: Callable | None = None,
        stage1: Path | None = None,
    ):
        self.folder, self.log, self.began = folder, folder.with_suffix(".log"), time.monotonic()
        where = rendezvous() | {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
        self.ranks = [
            FORK.Process(
                target=one_rank,
                args=(
                    where | {"RANK": str(r), "LOCAL_RANK": str(r)},
                    config,
                    folder,
                    self.log,
                    plant,
                    stage1,
                ),
            )
            for r in range(world_size)
        ]
        for rank in self.ranks:
            rank.start()

    def reach(self, step: int) -> Run:
        """Waits until a step is in the log, or nobody is left to do it."""
        while step not in losses(self.folder) and all(rank.is_alive() for rank in self.ranks):
            time.sleep(0.01)
        return self

    def kill(self, *ranks: int, number: int = signal.SIGKILL) -> Run:
        for rank in ranks or range(len(self.ranks)):
            if self.ranks[rank].is_alive():
                os.kill(self.ranks[rank].pid, number)
        return self

    def wait(self, *ranks: int) -> list[int | None]:
        """The exit codes."""
        for rank in ranks or range(len(self.ranks)):
            self.ranks[rank].join(120)
        codes = [self.ranks[rank].exitcode for rank in ranks or range(len(self.ranks))]
        if None in codes:
            self.kill()
        return codes

    @property
    def said(self) -> str:
        return self.log.read_text()


def one_rank(
    env: dict,
    config: cfg.Config,
    folder: Path,
    log: Path,
    plant: Callable | None,
    stage1: Path | None,
) -> None:
    os.environ.update(env)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    if plant:
        plant(int(env["RANK"]))
    try:
        with group_of_ranks(config.train.timeout) as ranks:
            train(config, folder, ranks, stage1)
    except UserError as error:
        print(error, file=sys.stderr, flush=True)
        sys.exit(2)


class At:
    """A plant: from its `call`-th call (`times` times) in `rank`, `owner.name` does `what` first. Calls go on being counted in that process."""

    def __init__(
        self, owner: str, name: str, what: str, rank: int = 0, call: int = 1, times: int = 1
    ):
        self.owner, self.name, self.what, self.rank, self.call, self.times = (
            owner,
            name,
            what,
            rank,
            call,
            times,
        )

    def __call__(self, rank: int) -> None:
        if rank != self.rank:
            return
        owner = {
            "checkpoint": checkpoint,
            "CheckpointManager": CheckpointManager,
            "Path": Path,
            "Batch": Batch,
            "Translator": Translator,
        }[self.owner]
        original, calls = getattr(owner, self.name), 0

        def wrapped(*args, **kwargs):
            nonlocal calls
            calls += 1
            now = self.call <= calls < self.call + self.times
            if now and self.what == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if now and self.what == "throw":
                raise RuntimeError("planted")
            result = original(*args, **kwargs)
            if now and self.what == "nan":
                result.frames = torch.full(result.frames.shape, float("nan"))
            if now and self.what == "spike":
                result = tuple(10 * loss for loss in result)
            if now and self.what == "kill after":
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(owner, self.name, wrapped)


class Lab:
    """Where runs are made, and unbroken ones to compare with."""

    def __init__(self, folder: Path, shards: Path, llm: Path):
        self.folder, self.settings = (
            folder,
            {"data.shards": str(shards), "llm.path": str(llm), **SMALL, **SHORT},
        )

    def config(self, stage: str = "stage1", **overrides) -> cfg.Config:
        dropout = {
            "stage1": {"light_t.dropout": 0.1},
            "stage2": {},
            "joint": {"train.optimizer": "sgd"},
        }[stage]
        return cfg.load(
            "demo",
            stage,
            self.settings | dropout | {k.replace("__", "."): v for k, v in overrides.items()},
        )

    def new(self, name: str) -> Path:
        return Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self.folder)) / "run"

    def unbroken(self, stage: str = "stage1", **overrides) -> Path:
        """A run never stopped; one for each setting."""
        folder = (
            self.folder
            / "-".join(["unbroken", stage, *(f"{k}={v}" for k, v in overrides.items())])
            / "run"
        )
        if not folder.exists():
            folder.parent.mkdir()
            stage1 = self.stage1(stage, **overrides)
            run = Run(self.config(stage, **overrides), folder, stage1=stage1)
            assert run.wait() == [0, 0], run.said
        return folder

    def stage1(self, stage: str, **overrides) -> Path | None:
        """What a run of stage 2 begins from."""
        return self.unbroken("stage1", **overrides) if stage == "stage2" else None


def rows(path: Path) -> list[dict]:
    return (
        [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
        if path.exists()
        else []
    )


def losses(run: Path) -> dict[int, float]:
    found = [(x["step"], x["loss"]) for x in rows(run / "metrics.jsonl") if "loss" in x]
    assert len(found) == len(dict(found)), f"{run} has a step twice"
    return dict(found)


def children(process: int) -> list[int]:
    return [
        int(c)
        for task in Path(f"/proc/{process}/task").iterdir()
        for c in (task / "children").read_text().split()
    ]


def steps(run: Path) -> list[int]:
    """Those with a checkpoint."""
    return sorted(int(p.name[5:]) for p in (run / "checkpoints").glob("step-*"))


def same(one: Path, other: Path) -> bool:
    """Losses, dev scores, and every tensor of the last checkpoint, optimiser and generators too."""
    a, b = (
        [
            {k: v for k, v in x.items() if k in ("step", "loss", "dev_bleu4")}
            for x in rows(run / "metrics.jsonl")
        ]
        for run in (one, other)
    )
    assert a == b, (a, b)
    last = f"step-{steps(one)[-1]}"
    files = sorted(p.name for p in (one / "checkpoints" / last).glob("*.safetensors"))
    assert files == sorted(p.name for p in (other / "checkpoints" / last).glob("*.safetensors"))
    for file in files:
        x, y = (load_file(run / "checkpoints" / last / file) for run in (one, other))
        assert x.keys() == y.keys() and len(x) > 1
        assert all(torch.equal(x[k], y[k]) for k in x), [
            k for k in x if not torch.equal(x[k], y[k])
        ]
    return True


def damage(how: str, folder: Path) -> None:
    path = folder / DAMAGE[how]
    if how == "truncated":
        with open(path, "r+b") as file:
            file.truncate(1000)
    elif how == "removed":
        path.unlink()
    else:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)


# The scenarios: each takes a lab and returns what it measured, or an assertion fails.


def all_ranks_killed(lab: Lab, stage: str = "stage1", times: int = 10, seed: int = 0) -> str:
    config, plain, rng = (
        {"train__steps": 3 * times},
        lab.unbroken(stage, train__steps=3 * times),
        random.Random(seed),
    )
    folder, killed = lab.new("killed"), []
    stage1 = lab.stage1(stage, **config)
    for i in range(times):
        run = Run(lab.config(stage, **config), folder, stage1=stage1).reach(
            min(3 * times - 1, 3 * i + rng.randint(1, 4))
        )
        time.sleep(rng.random() / 10)
        killed.append(max(losses(folder)))
        run.kill().wait()
        assert losses(folder).items() <= losses(plain).items()
    assert Run(lab.config(stage, **config), folder, stage1=stage1).wait() == [0, 0]
    same(plain, folder)
    return f"{stage}: killed in steps {killed}, {times} of {times} bit-equal"


def one_rank_killed(lab: Lab, number: int = signal.SIGKILL, rank: int = 1) -> str:
    folder = lab.new("one")
    run = (
        Run(lab.config(train__steps=500, train__timeout=5), folder)
        .reach(3)
        .kill(rank, number=number)
    )
    codes = run.wait(*(r for r in (0, 1) if r != rank))
    run.kill()
    assert codes == [1], (codes, run.said)
    assert rank == 0 or f"no word from rank {rank}" in run.said, (
        run.said
    )  # without rank 0 nothing can be told; the launcher names it
    return "the other ended and named it"


def one_rank_hangs(lab: Lab) -> str:
    return one_rank_killed(lab, signal.SIGSTOP)


def one_rank_throws(lab: Lab) -> str:
    run = Run(
        lab.config(train__steps=500),
        lab.new("throws"),
        plant=At("Batch", "to", "throw", rank=1, call=4),
    )
    assert run.wait() == [1, 1], run.said
    assert "rank 0 ends because another did: rank 1: RuntimeError: planted" in run.said, run.said
    return "rank 0 names the cause on rank 1"


PHASES = {
    "before the files": At("checkpoint", "_write", "kill", call=2),
    "with half of the files": At("checkpoint", "save_file", "kill after", call=3),
    "on another rank": At("checkpoint", "save_file", "kill after", rank=1, call=2),
    "before the manifest": At("CheckpointManager", "_publish", "kill", call=2),
    "before the new name": At("Path", "rename", "kill", call=2),
    "after the new name": At("Path", "rename", "kill after", call=2),
}


def killed_while_saving(lab: Lab, phases: tuple[str, ...] = tuple(PHASES)) -> str:
    for phase in phases:
        folder = lab.new("saving")
        run = Run(lab.config(), folder, plant=PHASES[phase])
        while all(rank.is_alive() for rank in run.ranks):
            time.sleep(0.01)
        run.kill().wait()
        assert steps(folder) == ([2, 3] if phase == "after the new name" else [2]), (
            phase,
            steps(folder),
        )
        run = Run(lab.config(), folder)
        assert run.wait() == [0, 0], run.said
        same(lab.unbroken(), folder)
    return f"{len(phases)} phases: {', '.join(phases)}"


def newest_damaged(lab: Lab, ways: tuple[str, ...] = tuple(DAMAGE)) -> str:
    for how in ways:
        folder = lab.new(how)
        shutil.copytree(lab.unbroken(), folder)
        damage(how, folder / "checkpoints/step-6")
        run = Run(lab.config(), folder)
        assert run.wait() == [0, 0], run.said
        assert (
            "going on from the checkpoint before it" in run.said
            and "checkpoint of step 4" in run.said
        ), run.said
        same(lab.unbroken(), folder)
    return f"{', '.join(ways)}: the one before serves"


def disk_full(lab: Lab) -> str:
    folder = lab.new("full")
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode:
        raise Skip(f"no tmpfs can be mounted: {mounted.stderr.strip()}")
    try:
        config = lab.config(checkpoint__every=1)
        run = Run(config, folder)
        assert run.wait() == [1, 1], run.said
        assert (
            "could not be written" in run.said
            and "the checkpoints before it are kept" in run.said
            and "Traceback" not in run.said
        ), run.said
        kept = steps(folder)
        assert kept and len(kept) < 6
        subprocess.run(["mount", "-o", "remount,size=200m", folder], check=True)
        again = Run(config, folder)
        assert again.wait() == [0, 0] and f"checkpoint of step {kept[-1]}" in again.said, again.said
        same(lab.unbroken(), folder)
    finally:
        subprocess.run(["umount", folder])
    return f"ended with one line, kept steps {kept}, went on when there was room"


def not_finite(lab: Lab) -> str:
    folder = lab.new("nan")
    run = Run(lab.config(), folder, plant=At("Batch", "to", "nan", rank=1, call=2))
    assert run.wait() == [0, 0], run.said
    noted = rows(folder / "skipped.jsonl")
    skipped = noted[0]["step"]
    assert [x["rank"] for x in noted] == [0, 1] and all(x["keys"] for x in noted)
    assert all(
        t.isfinite().all()
        for t in load_file(folder / "checkpoints/step-6/model.safetensors").values()
    )
    assert {s: x for s, x in losses(folder).items() if s < skipped} == {
        s: x for s, x in losses(lab.unbroken()).items() if s < skipped
    }
    row = Run(
        lab.config(train__steps=50, train__max_skipped=3),
        folder := lab.new("nans"),
        plant=At("Batch", "to", "nan", rank=1, call=6, times=1000),
    )
    assert (
        row.wait() == [1, 1]
        and "3 steps in a row had to be left out" in row.said
        and "Traceback" not in row.said
    ), row.said
    return f"step {skipped} left out on both ranks, its {sum(len(x['keys']) for x in noted)} clips named; after 3 in a row the end, at checkpoint {steps(folder)[-1]}"


def clips_gone(lab: Lab) -> str:
    """As when a disk of the network goes away: nothing is learnt from nothing, and the checkpoints stay."""
    folder, shards = lab.new("gone"), lab.folder / "shards that go"
    shutil.copytree(lab.settings["data.shards"], shards)
    run = Run(
        lab.config(
            data__shards=str(shards),
            train__steps=500,
            train__max_skipped=3,
            checkpoint__every=1,
            checkpoint__last=2,
        ),
        folder,
    ).reach(3)
    for tar in shards.glob("train-*.tar"):
        tar.unlink()
    assert (
        run.wait() == [1, 1]
        and "3 steps in a row had to be left out" in run.said
        and "Traceback" not in run.said
    ), run.said
    noted = rows(folder / "skipped.jsonl")
    assert {x["why"] for x in noted} == {
        "none of its clips can be read, see bad_samples.jsonl"
    } and len(rows(folder / "bad_samples.jsonl")) > 12
    assert steps(folder)[-1] < noted[0]["step"] + 3 and all(
        t.isfinite().all()
        for t in load_file(
            folder / f"checkpoints/step-{steps(folder)[-1]}/model.safetensors"
        ).values()
    )
    return f"from step {noted[0]['step']} on nothing was learnt, after 3 of them the end, at checkpoint {steps(folder)[-1]}"


def loss_spike(lab: Lab) -> str:
    folder = lab.new("spike")
    run = Run(
        lab.config(train__spike=3),
        folder,
        plant=At("Translator", "forward", "spike", rank=1, call=4),
    )
    assert run.wait() == [0, 0], run.said
    noted, usual = rows(folder / "skipped.jsonl"), losses(lab.unbroken())
    assert [x["step"] for x in noted] == [4, 4] and "usual" in noted[0]["why"], noted
    assert {s: x for s, x in losses(folder).items() if s < 4} == {
        s: x for s, x in usual.items() if s < 4
    } and set(usual) - set(losses(folder)) == {4}
    return f"step 4 left out on both ranks: {noted[0]['why']}"


def one_rank_signalled(lab: Lab, number: int = signal.SIGTERM) -> str:
    folder, config = (
        lab.new("signal"),
        lab.config(data__workers=1, train__steps=16, train__dev_every=16),
    )
    run = Run(config, folder).reach(2)
    for child in children(run.ranks[1].pid):  # launchers signal a rank's whole group
        os.kill(child, number)
    run.kill(1, number=number)
    assert run.wait() == [75, 75], run.said
    stopped = steps(folder)[-1]
    assert stopped < 16 and Run(config, folder).wait() == [0, 0]
    same(lab.unbroken(train__steps=16, train__dev_every=16), folder)
    return f"both left with 75 after step {stopped}, and went on bit-equal"


def other_world_sizes(lab: Lab, stages: tuple[str, ...] = ("stage1", "stage2")) -> str:
    worst = 0.0
    for stage in stages:
        same_losses = {
            "encoder__global_batch_norm": True,
            "light_t__dropout": 0,
            "llm__dropout": 0,
            "checkpoint__every": 1,
        }
        plain, folder = losses(lab.unbroken(stage, **same_losses)), lab.new("worlds")
        stage1 = lab.stage1(stage, **same_losses)
        for world_size, calls in ((2, 2), (1, 2), (4, None)):
            zero = (
                {"train__deepspeed": ZERO3} if stage == "stage2" and world_size > 1 else {}
            )  # the stage of ZeRO may change as well
            run = Run(
                lab.config(stage, **same_losses, **zero),
                folder,
                world_size,
                plant=calls and StopAfter(calls),
                stage1=stage1,
            )
            assert set(run.wait()) == {75 if calls else 0}, run.said
        assert losses(folder).keys() == plain.keys()
        worst = max([worst, *(abs(losses(folder)[s] / plain[s] - 1) for s in plain)])
    assert worst < 1e-5, worst
    return f"2 -> 1 -> 4 ranks, {' and '.join(stages)}, stage 2 under ZeRO-3 -> 2 -> 3: losses within {worst:.1e}"


class StopAfter:
    """A plant: rank 0 gets SIGUSR1 in its `step`-th step."""

    def __init__(self, step: int):
        self.step = step

    def __call__(self, rank: int) -> None:
        if rank == 0:
            original, calls = StepVotes.agree, 0

            def agree(votes: StepVotes, ranks: DistContext) -> StepVotes:
                nonlocal calls
                calls += 1
                if calls == self.step:
                    os.kill(os.getpid(), signal.SIGUSR1)
                return original(replace(votes, stop=calls >= self.step), ranks)

            StepVotes.agree = agree


def two_runs_in_one_folder(lab: Lab) -> str:
    folder, config = lab.new("two"), lab.config(train__steps=16, train__dev_every=16)
    first = Run(config, folder).reach(1)
    first.kill(number=signal.SIGSTOP)  # or it could be done before the second has started
    second = Run(config, folder)
    assert second.wait() == [2, 2] and "is being written by process" in second.said, second.said
    first.kill(number=signal.SIGCONT)
    assert first.wait() == [0, 0]
    same(lab.unbroken(train__steps=16, train__dev_every=16), folder)
    return "the second is refused, the first ends as if alone"


def torchrun_restarts(lab: Lab, nodes: int = 1) -> str:
    """SIGKILL to rank 1 under a real torchrun, or two that share a rendezvous as on two nodes."""
    name = f"torchrun-{nodes}"
    folder, config = lab.new(name), {"train__steps": 16, "train__dev_every": 16}
    settings = lab.settings | {"light_t.dropout": 0.1, "train.steps": 16, "train.dev_every": 16}
    options = [f"--{k}={json.dumps(v) if isinstance(v, list) else v}" for k, v in settings.items()]
    port = rendezvous()["MASTER_PORT"]
    command = [sys.executable, "-m", "torch.distributed.run", "--max-restarts=1"]
    if nodes == 1:
        command += ["--nproc_per_node=2", f"--master_port={port}"]
    else:
        command += [f"--nnodes={nodes}", "--nproc_per_node=1", "--rdzv_backend=c10d"]
        command += [f"--rdzv_endpoint=127.0.0.1:{port}"]
    command += ["-m", "flallm", "stage1", "demo", f"--run_dir={folder}", *options]
    log = folder.with_suffix(".log")
    with open(log, "w") as file:
        launchers = [subprocess.Popen(command, stdout=file, stderr=file) for _ in range(nodes)]
    while not steps(folder) and all(launcher.poll() is None for launcher in launchers):
        time.sleep(0.01)
    workers = [child for launcher in launchers for child in children(launcher.pid)]
    killed = [w for w in workers if b"\0RANK=1\0" in Path(f"/proc/{w}/environ").read_bytes()]
    os.kill(killed[0], signal.SIGKILL)
    codes = [launcher.wait(timeout=180) for launcher in launchers]
    assert codes == [0] * nodes, log.read_text()
    assert "going on from the checkpoint of step" in log.read_text(), log.read_text()
    same(lab.unbroken(**config), folder)
    return f"rank 1 of 2 killed on {nodes} node{'s' if nodes > 1 else ''}, bit-equal in the end"


class Skip(Exception):
    pass


SCENARIOS: dict[str, Callable[[Lab], str]] = {
    "all ranks killed, stage 1": all_ranks_killed,
    "all ranks killed, stage 2": lambda lab: all_ranks_killed(lab, "stage2", seed=1),
    "one rank killed": one_rank_killed,
    "one rank hangs": one_rank_hangs,
    "one rank throws": one_rank_throws,
    "killed while saving": killed_while_saving,
    "newest checkpoint damaged": newest_damaged,
    "disk full": disk_full,
    "not finite": not_finite,
    "loss spike": loss_spike,
    "clips gone": clips_gone,
    "SIGTERM to one rank": one_rank_signalled,
    "SIGUSR1 to one rank": lambda lab: one_rank_signalled(lab, signal.SIGUSR1),
    "other world sizes": other_world_sizes,
    "two runs in one folder": two_runs_in_one_folder,
    "torchrun restarts": torchrun_restarts,
    "torchrun restarts, two nodes": lambda lab: torchrun_restarts(lab, nodes=2),
}


def main(names: list[str]) -> int:
    from flallm.data.corpora import synthetic
    from flallm.data.encode import EncodeOptions
    from flallm.data.shards import make_shards
    from flallm.demo.pretrain import pretrain

    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        lab = Lab(Path(folder), Path(folder) / "shards", Path(folder) / "llm")
        make_shards(
            synthetic.clips(train=24, dev=8, test=7, size=36),
            Path(folder) / "shards",
            EncodeOptions(per_shard=10),
            {"name": "synthetic"},
        )
        pretrain(
            [text for _, text in synthetic.sentences("text", 3000)],
            Path(folder) / "llm",
            layers=1,
            width=48,
            heads=2,
            steps=2,
        )
        for name, scenario in SCENARIOS.items():
            if names and not any(n in name for n in names):
                continue
            began = time.monotonic()
            try:
                verdict, figures = "OK", scenario(lab)
            except Skip as reason:
                verdict, figures = "SKIPPED", str(reason)
            except Exception:
                verdict, figures = "FAILED", traceback.format_exc()
                failed += 1
            print(f"{verdict:8} {name:28} {time.monotonic() - began:5.0f} s  {figures}", flush=True)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
