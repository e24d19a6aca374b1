"""What training costs besides the model's arithmetic, on this machine: one JSON object a line.

    python benchmarks/training.py [FIGURE …]

Two ranks, the demo's stage-1 model. What is compared is measured in turns inside one process group, and the medians are
divided, so that whatever else the machine does falls on both.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from figures import chosen, figure, small_llm

from flallm import config as cfg
from flallm.data.corpora import synthetic
from flallm.data.dataset import Batch
from flallm.data.encode import EncodeOptions
from flallm.data.shards import make_shards
from flallm.data.tokenizer import TranslationTokenizer
from flallm.distributed.context import DistContext, init_distributed, precision
from flallm.distributed.launch import _run_rank, spawn
from flallm.distributed.rendezvous import rendezvous
from flallm.model.translator import Translator
from flallm.planning.devices import device
from flallm.planning.memory import dry_step
from flallm.training.optim import parameter_groups
from flallm.training.step import start_engine, train_step
from flallm.training.train import train
from flallm.utils import usable_cpus

RANKS = 2


def load(out: Path, **overrides) -> cfg.Config:
    settings = {
        "data.shards": str(out / "shards"),
        "llm.path": str(out / "llm"),
        "train.log_every": 10,
        "train.dev_clips": 8,
    }
    return cfg.load(
        "demo", "stage1", settings | {k.replace("__", "."): v for k, v in overrides.items()}
    )


def made_up_batch(config: cfg.Config, text: TranslationTokenizer, clips: int) -> Batch:
    lengths = torch.full((clips,), 20)
    frames = torch.randint(
        0, 255, (int(lengths.sum()), config.data.crop, config.data.crop, 3), dtype=torch.uint8
    )
    return Batch(
        frames, lengths, torch.randint(5, len(text), (clips, 8)), [""] * clips, [""] * clips, []
    )


def start(config: cfg.Config, ranks: DistContext):
    torch.manual_seed(0)
    text = TranslationTokenizer(config.llm)
    zero2 = start_engine(Translator(config, text).train(), config.train, ranks)
    return zero2, made_up_batch(config, text, config.train.batch // ranks.world_size)


def zero2_vs_ddp(out: Path) -> None:
    ranks, config = init_distributed(), load(out)
    zero2, batch = start(config, ranks)
    model = Translator(config, zero2.module.text).train()
    optimizer = torch.optim.AdamW(
        parameter_groups(model, config.train),
        betas=config.train.betas,
        weight_decay=config.train.weight_decay,
    )
    ddp = torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)

    def plain() -> None:
        factor = ranks.world_size / ranks.sum(batch.tokens)[0]
        with precision(config.train, ranks.device):
            objective, _ = ddp(batch)
        (objective * factor).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.train.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    seconds = in_turns({"zero2": lambda: train_step(zero2, [batch], ranks), "ddp": plain}, 40)
    if ranks.is_main:
        detail = f"{seconds['zero2'] * 1000:.0f} ms against {seconds['ddp'] * 1000:.0f} ms a step of 16 clips of 20 frames; medians of 40"
        figure("zero2_vs_ddp", seconds["zero2"] / seconds["ddp"], "ratio", detail)


def in_turns(functions: dict, times: int) -> dict[str, float]:
    """The median seconds of each, one after the other."""
    seconds = {name: [] for name in functions}
    for turn in range(times + 3):
        for name, function in functions.items():
            dist.barrier()
            began = time.perf_counter()
            function()
            if turn >= 3:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def sync_share(out: Path) -> None:
    """Of a step, in collectives: the wait for the other rank included."""
    ranks, config = init_distributed(), load(out)
    zero2, batch = start(config, ranks)
    inside = 0.0

    def timed(function):
        def call(*args, **kwargs):
            nonlocal inside
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                inside += time.perf_counter() - began

        return call

    for name in (
        "all_reduce",
        "reduce",
        "all_gather",
        "all_gather_into_tensor",
        "broadcast",
        "reduce_scatter_tensor",
    ):
        setattr(dist, name, timed(getattr(dist, name)))
    for _ in range(3):
        train_step(zero2, [batch], ranks)
    inside, began = 0.0, time.perf_counter()
    for _ in range(30):
        train_step(zero2, [batch], ranks)
    shares = ranks.gather(inside / (time.perf_counter() - began))
    if ranks.is_main:
        figure(
            "sync_share",
            sum(shares) / len(shares),
            "share",
            f"mean of {ranks.world_size} ranks over 30 steps, equal work on each; gloo",
        )


def state_bytes(out: Path) -> None:
    ranks, config = init_distributed(), load(out, train__precision="fp32")
    zero2, batch = start(config, ranks)
    train_step(zero2, [batch], ranks)
    zero2.backward(zero2(batch)[0])
    state = [
        t
        for flat in zero2.optimizer.single_partition_of_fp32_groups
        for t in zero2.optimizer.state[flat].values()
    ]
    gradients = [
        g for group in zero2.optimizer.averaged_gradients.values() for g in group if g is not None
    ]
    gradients += [p.grad for p in zero2.module.parameters() if p.grad is not None]
    if ranks.is_main:
        (out / f"bytes-{ranks.world_size}").write_text(
            str(sum(t.numel() * t.element_size() for t in state + gradients)), encoding="utf-8"
        )


def optimizer_state_2_vs_1(out: Path) -> None:
    for world_size in (1, 2):
        spawn(state_bytes, world_size, out)
    one, two = (int((out / f"bytes-{n}").read_text(encoding="utf-8")) for n in (1, 2))
    figure(
        "optimizer_state_2_vs_1",
        two / one,
        "ratio",
        f"{two / 1e6:.2f} MB against {one / 1e6:.2f} MB: AdamW's two moments and the gradient, after backward",
    )


def steps_of_runs(out: Path) -> None:
    """Runs of 100 steps in turns, with a checkpoint every 10 and without."""
    ranks, seconds, waits = init_distributed(), {0: [], 10: []}, []
    for turn in range(3):
        for every in seconds:
            run = out / f"run-{every}-{turn}"
            with contextlib.redirect_stdout(sys.stderr):
                train(
                    load(
                        out,
                        train__steps=102,
                        train__log_every=1,
                        train__dev_every=102,
                        checkpoint__every=every,
                    ),
                    run,
                    ranks,
                )
            if ranks.is_main:
                rows = [
                    json.loads(line)
                    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
                ]
                at = {r["step"]: r["seconds"] for r in rows if "loss" in r}
                seconds[every].append(at[101] - at[1])
                waits += [r["data_wait_share"] for r in rows if r.get("loss") and r["step"] > 1]
    if ranks.is_main:
        with_, without = (statistics.median(seconds[every]) for every in (10, 0))
        figure(
            "checkpoint_overhead",
            with_ / without,
            "ratio",
            f"{with_:.2f} s against {without:.2f} s for 100 steps with a checkpoint every 10; medians of 3",
        )
        figure(
            "data_wait_share",
            statistics.mean(waits),
            "share",
            "of a step, demo recipe, mean of 2 ranks",
        )


def cpu_share(out: Path) -> None:
    """Of the rate at which a core multiplies two matrices, what steps of stage 1 and of joint training on one core have: flallm plan's `CPU_SHARE`."""
    ranks = init_distributed()
    torch.set_num_threads(1)
    for number_type in ("bf16", "fp32"):
        shares, details = [], []
        for stage in ("stage1", "joint"):
            config = cfg.load(
                "demo",
                stage,
                {
                    "data.shards": str(out / "shards"),
                    "llm.path": str(out / "demo-llm"),
                    "train.precision": number_type,
                },
            )
            zero2, batch = start(config, ranks)
            operations = dry_step(
                config, zero2.module.text, batch.lengths.tolist(), batch.labels.shape[1]
            ).flops
            seconds = []
            for _ in range(13):
                began = time.process_time()
                train_step(zero2, [batch], ranks)
                seconds.append(time.process_time() - began)
            rate = device("cpu", usable_cpus(), config.train).tflops
            shares.append(operations / statistics.median(seconds) / rate / 1e12)
            details.append(
                f"{stage} {operations / 1e9:.1f} GFLOP in {statistics.median(seconds) * 1000:.0f} ms"
            )
        figure(
            f"cpu_share_{number_type}",
            statistics.mean(shares),
            "share",
            f"{', '.join(details)} of a core's time; matrices {rate * 1000:.0f} GFLOP/s; medians of 13",
        )


def train_rss_growth(out: Path) -> None:
    small = {
        "encoder__stem": 8,
        "encoder__widths": [8, 8, 8, 8],
        "light_t__width": 32,
        "light_t__ffn": 64,
        "data__resize": 36,
        "data__crop": 32,
    }
    config = load(out, **small, train__steps=2010, train__dev_every=2010, checkpoint__every=500)
    where, run = rendezvous(), out / "long"
    ranks = torch.multiprocessing.spawn(
        _run_rank, (_train, RANKS, where, (config, run)), RANKS, join=False
    )
    size = {step: resident(run, step, ranks.pids()) for step in (200, 2000)}
    while not ranks.join():
        pass
    detail = f"{size[2000] / 1e6:.0f} MB after 2000 steps against {size[200] / 1e6:.0f} MB after 200: {RANKS} ranks and their workers"
    figure("train_rss_growth", size[2000] / size[200], "ratio", detail)


def _train(config: cfg.Config, run: Path) -> None:
    with contextlib.redirect_stdout(sys.stderr):
        train(config, run, init_distributed())


def resident(run: Path, step: int, processes: list[int]) -> int:
    """Bytes in memory of the processes and their children once a step is in the log."""
    while not (
        (run / "metrics.jsonl").exists()
        and f'"step": {step},' in (run / "metrics.jsonl").read_text(encoding="utf-8")
    ):
        time.sleep(0.05)
    children = [
        int(c)
        for p in processes
        for task in Path(f"/proc/{p}/task").iterdir()
        for c in (task / "children").read_text(encoding="utf-8").split()
    ]
    return sum(
        int(Path(f"/proc/{p}/statm").read_text(encoding="utf-8").split()[1])
        for p in [*processes, *children]
    ) * os.sysconf("SC_PAGE_SIZE")


def start_seconds(out: Path) -> None:
    for turn in ("cold", "warm"):
        run, began = out / f"start-{turn}", time.monotonic()
        settings = [
            f"--data.shards={out / 'shards'}",
            f"--llm.path={out / 'llm'}",
            "--train.steps=1",
            "--train.log_every=1",
            "--train.dev_clips=2",
        ]
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            f"--nproc_per_node={RANKS}",
            "--master_port",
            rendezvous()["MASTER_PORT"],
        ]
        ranks = subprocess.Popen(
            [*command, "-m", "flallm", "stage1", "demo", f"--run_dir={run}", *settings],
            stdout=subprocess.DEVNULL,
        )
        while not (
            (run / "metrics.jsonl").exists()
            and "loss" in (run / "metrics.jsonl").read_text(encoding="utf-8")
        ):
            assert ranks.poll() is None or (run / "metrics.jsonl").exists(), (
                "the run ended before its first step"
            )
            time.sleep(0.05)
        seconds = time.monotonic() - began
        ranks.wait()
    figure(
        "start_seconds",
        seconds,
        "s",
        f"from the command to the end of the first step, {RANKS} ranks under torchrun, files in the cache",
    )


def ranked(function):
    return lambda out: spawn(function, RANKS, out)


FIGURES = {
    "zero2_vs_ddp": ranked(zero2_vs_ddp),
    "optimizer_state_2_vs_1": optimizer_state_2_vs_1,
    "checkpoint_overhead": ranked(steps_of_runs),  # and data_wait_share
    "train_rss_growth": train_rss_growth,
    "start_seconds": start_seconds,
    "sync_share": ranked(sync_share),
    "cpu_share": lambda out: spawn(cpu_share, 1, out),  # in bf16 and fp32
}


def make_llms(out: Path) -> None:
    small_llm(out / "llm", layers=1, width=48, heads=2, steps=2)
    small_llm(out / "demo-llm", steps=1)  # of the demo's size


if __name__ == "__main__":
    names = chosen(FIGURES)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        make_shards(
            synthetic.clips(train=200, dev=8, test=0),
            out / "shards",
            EncodeOptions(short_side=72),
            {"name": "synthetic"},
        )
        spawn(make_llms, 1, out)
        for name in names:
            FIGURES[name](out)
