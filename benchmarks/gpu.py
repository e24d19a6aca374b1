"""What a GPU makes of the paper's sizes: one JSON object a line, with the card's name.

    python benchmarks/gpu.py [ceiling | steps | profile | pipeline | CASE …]

`steps` are training steps of each stage on made-up clips as long as PHOENIX-2014-T's, each in a process of its own: their time, the
share of the card's bf16 peak (MFU), and the peak memory beside what `flallm plan` computes; a CASE is one of them. `pipeline` runs the commands themselves on
rendered signers of 256 pixels, so that decoding takes part.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import torch

from flallm import config as cfg
from flallm.data.corpora import synthetic
from flallm.data.dataset import Batch
from flallm.data.transforms import used_frames
from flallm.demo.pretrain import pretrain
from flallm.distributed.context import init_distributed, shutdown
from flallm.distributed.prefetch import prefetch_to_device
from flallm.model.translator import Translator
from flallm.planning.devices import DEVICES, GIB, Device
from flallm.planning.estimate import memory
from flallm.planning.lengths import CORPORA
from flallm.planning.memory import SHAPES, StubTokenizer, dry_step
from flallm.training.step import start_engine, train_step
from flallm.utils import first_line, usable_cpus

TOKENS, WARM, TIMED, CLIPS = 30, 4, 10, 640
# name -> (stage, clips of the micro-batch, features in place of video, what differs from the recipe)
CASES = {
    "stage1_8": ("stage1", 8, False, {}),
    "stage1_64": ("stage1", 64, False, {}),
    "stage1_64_any_order": ("stage1", 64, False, {}),  # without deterministic algorithms
    "stage2_features_16": ("stage2", 16, True, {}),
    "joint_16": ("joint", 16, False, {}),
    "llama7b_lora_8": (
        "stage2",
        8,
        True,
        {
            "llm.path": "meta-llama/Llama-2-7b-hf",
            "llm.lora.rank": 16,
            "llm.gradient_checkpointing": True,
        },
    ),
    "stage2_features_16_zero3": (
        "stage2",
        16,
        True,
        {"train.deepspeed": str(Path(__file__).parents[1] / "ds_configs/zero3.json")},
    ),
    "stage2_features_64": ("stage2", 64, True, {}),
    "stage2_16": ("stage2", 16, False, {}),
    "stage2_trimmed_64": ("stage2", 64, True, {"vocab_size": 2500}),
}


def figure(name: str, value: float | None, unit: str, **more) -> None:
    value = value if value is None else round(value, 4)
    print(
        json.dumps(
            {
                "figure": name,
                "value": value,
                "unit": unit,
                "detail": {"device": torch.cuda.get_device_name(), **more},
            }
        ),
        flush=True,
    )


def card() -> Device:
    return DEVICES[
        "h200"
        if "H200" in torch.cuda.get_device_name()
        else "h100-80"
        if "H100" in torch.cuda.get_device_name()
        else "a100-80"
    ]


def ceiling(out: Path) -> None:
    """The largest rate of a bf16 product of 8192 x 8192 matrices."""
    with multiprocessing.get_context("spawn").Pool(
        1
    ) as pool:  # this process takes no memory of the card that steps would be charged for
        figure("gemm", 2 * 8192**3 / pool.apply(product) / 1e12, "TFLOP/s", peak=card().tflops)


def product() -> float:
    """Median seconds."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    seconds = []
    for _ in range(20):
        torch.cuda.synchronize()
        began = time.perf_counter()
        a @ b
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def case(name: str, out: Path) -> tuple[cfg.Config, StubTokenizer, list[int], bool]:
    stage, clips, features, changes = CASES[name]
    changes = {"llm.path": "facebook/mbart-large-cc25", "encoder.weights": "none", **changes}
    shape = SHAPES[changes["llm.path"]] | {
        k: changes.pop(k) for k in ("vocab_size",) if k in changes
    }
    (out / name).mkdir()
    (out / name / "config.json").write_text(json.dumps(shape), encoding="utf-8")
    config = cfg.load("phoenix14t", stage, changes | {"llm.path": str(out / name)})
    frames, _ = CORPORA["phoenix14t"].lengths()
    return (
        config,
        StubTokenizer(shape["vocab_size"]),
        used_frames(frames[:clips], config.data.stride, config.data.max_frames).tolist(),
        features,
    )


def steps(out: Path, names: Iterable[str] = CASES) -> None:
    for name in names:
        config, text, lengths, features = case(name, out)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            there = pool.apply_async(
                measured, (config, text, lengths, features, not name.endswith("_any_order"))
            )
            dry = dry_step(config, text, lengths, TOKENS, features, "cuda")
            planned = memory(config, dry, 1, card()).peak
            try:
                seconds, allocated, reserved, context = there.get()
            except RuntimeError as error:
                print(f"{name}: {first_line(error)}", file=sys.stderr, flush=True)
                continue
        figure(
            name, dry.flops / seconds / card().tflops / 1e12, "MFU", ms=round(seconds * 1000, 1), clips_per_s=round(len(lengths) / seconds, 1), frames=sum(lengths),
            frames_per_s=round(sum(lengths) / seconds), tflop=round(dry.flops / 1e12, 3), tensors=dry.tensors, gib_planned=round(planned / GIB, 2),
            gib_measured=round((reserved + context) / GIB, 2), gib_allocated=round(allocated / GIB, 2), gib_context=round(context / GIB, 2),
        )  # fmt: skip


def prepared(config: cfg.Config, text: StubTokenizer, lengths: list[int], features: bool):
    """(engine, a batch on the host, ranks)"""
    ranks = init_distributed()
    torch.manual_seed(0)
    with ranks.device:
        model = Translator(config, text, weights=False).train()
    zero2 = start_engine(model, config.train, ranks)
    shape, dtype = (
        ((config.encoder.channels,), torch.bfloat16)
        if features
        else ((config.data.crop, config.data.crop, 3), torch.uint8)
    )
    frames = torch.randint(0, 255, (sum(lengths), *shape), dtype=torch.uint8).to(dtype)
    labels = torch.randint(5, 2000, (len(lengths), TOKENS))
    return (
        zero2,
        Batch(frames, torch.tensor(lengths), labels, [""] * len(lengths), [""] * len(lengths), []),
        ranks,
    )


def measured(
    config: cfg.Config, text: StubTokenizer, lengths: list[int], features: bool, deterministic: bool
) -> tuple[float, int, int, int]:
    """(median seconds of a step, peak bytes of tensors, peak bytes that the allocator held, bytes of the process besides)"""
    zero2, batch, ranks = prepared(config, text, lengths, features)
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    ends = []
    for sent in prefetch_to_device((batch for _ in range(WARM + TIMED)), ranks.device):
        train_step(zero2, [sent], ranks)
        torch.cuda.synchronize()
        ends.append(time.perf_counter())
    seconds = [after - before for before, after in pairwise(ends[WARM - 1 :])]
    free, total = torch.cuda.mem_get_info()
    found = (
        statistics.median(seconds),
        torch.cuda.max_memory_allocated(),
        torch.cuda.max_memory_reserved(),
        total - free - torch.cuda.memory_reserved(),
    )
    shutdown()
    return found


def profile(out: Path) -> None:
    """What takes the most of a stage-2 step from features, on the GPU and on the host."""
    config, text, lengths, features = case("stage2_features_16", out / "profile")
    zero2, batch, ranks = prepared(config, text, lengths, features)
    for _ in range(WARM):
        train_step(zero2, [batch], ranks)
    with torch.profiler.profile() as profiler:
        train_step(zero2, [batch], ranks)
        torch.cuda.synchronize()
    for by in ("self_device_time_total", "self_cpu_time_total"):
        print(
            profiler.key_averages().table(sort_by=by, row_limit=25, max_name_column_width=80),
            file=sys.stderr,
            flush=True,
        )
    shutdown()


def run(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, encoding="utf-8", errors="replace"
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)}: {done.stderr[-2000:]}")
    return done.stdout


def pipeline(out: Path) -> None:
    """Clips/s of the commands with the recipe's model, reading and decoding included."""
    tools, cores = Path(__file__).parents[1] / "tools", usable_cpus()
    began = time.monotonic()
    run(
        str(tools / "make_shards.py"),
        "synthetic",
        "--out",
        str(out / "shards"),
        f"--train={CLIPS}",
        "--dev=16",
        "--test=16",
        "--size=256",
    )
    figure("make_shards", (CLIPS + 32) / (time.monotonic() - began), "clips/s", cores=cores)
    with open(os.devnull, "w", encoding="utf-8") as sys.stdout:
        pretrain(
            [text for _, text in synthetic.sentences("text", 3000)],
            out / "llm",
            layers=12,
            width=1024,
            heads=16,
            steps=1,
            batch=2,
        )
    sys.stdout = sys.__stdout__
    common = [
        f"--llm.path={out / 'llm'}",
        "--llm.language=none",
        "--encoder.weights=none",
        "--train.dev_clips=8",
        f"--data.workers={cores - 1}",
    ]
    last = train(
        "stage1",
        out,
        *common,
        f"--data.shards={out / 'shards'}",
        "--train.batch=32",
        "--train.steps=60",
    )
    figure(
        "stage1",
        last["clips_per_s"],
        "clips/s",
        waiting=last["data_wait_share"],
        workers=cores - 1,
        batch=32,
    )
    began = time.monotonic()
    run("-m", "flallm", "features", str(out / "stage1"), "--out", str(out / "features"))
    figure("features", (CLIPS + 32) / (time.monotonic() - began), "clips/s", start_included=True)
    for kind in ("features", "shards"):
        options = [
            *common,
            f"--data.shards={out / kind}",
            "--train.batch=16",
            "--train.steps=60",
            f"--stage1={out / 'stage1'}",
        ]
        last = train("stage2", out / kind, *options)
        figure(
            f"stage2_from_{kind}",
            last["clips_per_s"],
            "clips/s",
            waiting=last["data_wait_share"],
            batch=16,
        )
    began = time.monotonic()
    run("-m", "flallm", "evaluate", str(out / "features/stage2"), "--split=test")
    figure("evaluate", 16 / (time.monotonic() - began), "clips/s", start_included=True)


def train(stage: str, folder: Path, *options: str) -> dict:
    """The last line of training figures that the run `folder/stage` has left."""
    run(
        "-m",
        "flallm",
        stage,
        "phoenix14t",
        f"--run_dir={folder / stage}",
        "--train.log_every=20",
        *options,
    )
    lines = [
        json.loads(line)
        for line in (folder / stage / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    return [line for line in lines if "clips_per_s" in line][-1]


FIGURES = {f.__name__: f for f in (ceiling, steps, profile, pipeline)}

if __name__ == "__main__":
    if unknown := set(sys.argv[1:]) - FIGURES.keys() - CASES.keys():
        sys.exit(
            f"no figure {', '.join(sorted(unknown))}; there are {', '.join((*FIGURES, *CASES))}"
        )
    if not torch.cuda.is_available():
        sys.exit("there is no GPU here")
    with tempfile.TemporaryDirectory() as folder:
        for name in sys.argv[1:] or FIGURES:
            (Path(folder) / "profile").mkdir(exist_ok=True)
            FIGURES[name](Path(folder)) if name in FIGURES else steps(Path(folder), [name])
