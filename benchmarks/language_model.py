"""What stage 2 costs, on this machine: one JSON object a line.

    python benchmarks/language_model.py [FIGURE …]

What is compared is measured in turns inside one process, and the medians are divided.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import sys
import time
from itertools import pairwise
from pathlib import Path

import torch
from figures import figure, main, peak_bytes, small_llm
from transformers import AutoConfig, AutoModelForSeq2SeqLM, LlamaConfig, MBartConfig

from flallm import config as cfg
from flallm.data.corpora import synthetic
from flallm.data.dataset import Batch, ClipDataset, batches
from flallm.data.encode import EncodeOptions
from flallm.data.shards import make_shards
from flallm.data.tokenizer import TranslationTokenizer
from flallm.distributed.context import init_distributed, shutdown
from flallm.inference.features import features
from flallm.model.translator import Translator
from flallm.planning.devices import device
from flallm.planning.estimate import memory
from flallm.planning.memory import SHAPES, StubTokenizer, dry_step
from flallm.training.resume import load_stage1_encoder
from flallm.training.step import start_engine, train_step
from flallm.training.train import train


def features_vs_video(out: Path) -> None:
    """Clips/s of stage-2 steps of 16 clips (the demo's, a rank), reading included, with the paper's encoder at 224 pixels and the demo's language model."""
    said, sys.stdout = sys.stdout, sys.stderr
    make_shards(
        synthetic.clips(train=48, dev=1, test=0),
        out / "shards",
        EncodeOptions(),
        {"name": "synthetic"},
    )
    small_llm(out / "llm", layers=3, width=192, heads=4, steps=2)
    encoder = {
        "encoder.stem": 64,
        "encoder.widths": [64, 128, 256, 512],
        "encoder.depths": [2, 2, 2, 2],
        "encoder.channels": 1024,
    }
    settings = {
        "llm.path": str(out / "llm"),
        "data.resize": 256,
        "data.crop": 224,
        "data.workers": 1,
        "train.batch": 2,
        "train.steps": 1,
        **encoder,
    }
    video = cfg.load("demo", "stage1", settings | {"data.shards": str(out / "shards")})
    ranks = init_distributed()
    train(video, out / "stage1", ranks)
    features(out / "stage1", out / "features", ranks, "bf16", 0)
    times: dict[str, list[float]] = {"shards": [], "features": []}
    for _ in range(2):
        for name, seconds in times.items():
            config = cfg.load(
                "demo", "stage2", settings | {"data.shards": str(out / name), "train.batch": 16}
            )
            model, clips = (
                Translator(config, TranslationTokenizer(config.llm)),
                ClipDataset("train", config.data, 0),
            )
            load_stage1_encoder(model, config, out / "stage1")
            zero2, groups = (
                start_engine(model.train(), config.train, ranks),
                [[(0, n) for n in range(m, m + 16)] for m in (0, 16, 32)],
            )
            ends = []
            for batch in batches(clips, model.text, groups, 1):
                train_step(zero2, [batch], ranks)
                ends.append(time.monotonic())
            seconds += [
                b - a for a, b in pairwise(ends)
            ]  # the first step starts workers and kernels
    sys.stdout = said
    speeds = {name: 16 / statistics.median(seconds) for name, seconds in times.items()}
    detail = f"{speeds['features']:.1f} clips/s from features, {speeds['shards']:.2f} from video, {clips.used.mean():.1f} used frames a clip"
    figure("features_vs_video", speeds["features"] / speeds["shards"], "ratio", detail)


MBART = {
    "d_model": 768,
    "encoder_layers": 6,
    "decoder_layers": 6,
    "encoder_ffn_dim": 3072,
    "decoder_ffn_dim": 3072,
    "vocab_size": 20000,
}
# (stage, precision, shape of the language model, used frames of the clips of a micro-batch)
PLANNED = [
    ("stage1", "fp32", {"vocab_size": 2500}, [60, 45]),
    ("stage2", "bf16", {"scale_embedding": True, **MBART}, [60, 45, 30, 30]),
    (
        "joint",
        "fp32",
        {
            "scale_embedding": True,
            **MBART,
            "encoder_layers": 3,
            "decoder_layers": 3,
            "vocab_size": 5000,
        },
        [40, 30],
    ),
]


def plan_memory_error(out: Path) -> None:
    """What `flallm plan` says of a rank's peak, against the peak of a process that does three steps."""
    errors, detail = [], []
    for stage, precision, shape, lengths in PLANNED:
        MBartConfig(**shape).save_pretrained(out)
        config = cfg.load(
            "phoenix14t",
            stage,
            {"llm.path": str(out), "train.precision": precision, "encoder.weights": "none"},
        )
        text = StubTokenizer(shape["vocab_size"])
        planned = memory(
            config, dry_step(config, text, lengths, 30), 1, device("cpu", 1, config.train)
        ).peak
        measured, _ = _alone(_peak, config, text, lengths)
        errors.append(abs(planned - measured) / measured)
        detail.append(
            f"{stage} {precision} {planned / 2**30:.2f} planned, {measured / 2**30:.2f} measured"
        )
    figure("plan_memory_error", max(errors), "share", "GiB: " + "; ".join(detail))


def _peak(
    config: cfg.Config,
    text: StubTokenizer,
    lengths: list[int],
    features: bool = False,
    steps: int = 3,
) -> tuple[int, float]:
    """(peak bytes, seconds of the fastest step) of a process of its own; features: in the place of video."""
    os.environ.pop("RANK", None)  # a group of its own, whatever the parent is in
    ranks, seconds = init_distributed(), []
    zero2 = start_engine(Translator(config, text, weights=False).train(), config.train, ranks)
    frames = (
        torch.randn(sum(lengths), config.encoder.channels)
        if features
        else torch.randint(0, 255, (sum(lengths), 224, 224, 3), dtype=torch.uint8)
    )
    for _ in range(steps):
        began = time.monotonic()
        train_step(
            zero2,
            [
                Batch(
                    frames,
                    torch.tensor(lengths),
                    torch.full((len(lengths), 30), text.end),
                    [],
                    [],
                    [],
                )
            ],
            ranks,
        )
        seconds.append(time.monotonic() - began)
    shutdown()
    return peak_bytes(), min(seconds)


def _alone(function, *arguments):
    """The result of a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def trimmed(out: Path) -> None:
    """mBART-large with its 250,027 words and with 2,500: parameters, and a stage-2 step of four clips from features."""
    found = {}
    for words in (2500, 250027):
        (out / "config.json").write_text(
            json.dumps(SHAPES["facebook/mbart-large-cc25"] | {"vocab_size": words}),
            encoding="utf-8",
        )
        config = cfg.load(
            "phoenix14t",
            "stage2",
            {"llm.path": str(out), "train.precision": "fp32", "encoder.weights": "none"},
        )
        with torch.device("meta"):
            model = AutoModelForSeq2SeqLM.from_config(AutoConfig.from_pretrained(out))
        parameters = sum(p.numel() for p in model.parameters())
        found[words] = (
            parameters,
            *_alone(_peak, config, StubTokenizer(words), [30, 30, 25, 20], True),
        )
    (small, peak, seconds), (whole, most, slow) = found.values()
    figure(
        "trimmed_params_m",
        small / 1e6,
        "M",
        f"mBART-large with 2,500 words; {whole / 1e6:.1f} M with 250,027",
    )
    figure(
        "trimmed_memory_ratio",
        peak / most,
        "ratio",
        f"{peak / 2**30:.2f} GiB, {most / 2**30:.2f} whole: AdamW, fp32, one rank, 4 clips from features, 30 target tokens",
    )
    figure("trimmed_step_ratio", seconds / slow, "ratio", f"{seconds:.2f} s, {slow:.2f} s whole")


def lora(out: Path) -> None:
    """AdamW's state for SmolLM2-135M: LoRA of rank 16 on all linear layers, as in its recipe, against full fine-tuning. The adapter trains in both."""
    shape = {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
    }
    LlamaConfig(**shape, tie_word_embeddings=True).save_pretrained(out)
    trained = []
    for rank in (16, 0):
        config = cfg.load("smollm2", "stage2", {"llm.path": str(out), "llm.lora.rank": rank})
        step = dry_step(config, StubTokenizer(49152), [8], 8)
        trained.append(sum(part[0] for part in step.parts.values()))
    figure(
        "lora_state_ratio",
        trained[0] / trained[1],
        "ratio",
        f"{8 * trained[0] / 2**20:.1f} MiB, {8 * trained[1] / 2**20:.1f} MiB full: 8 bytes a trained parameter",
    )


def beam(out: Path) -> None:
    """Clips/s of beam-5 decoding by the demo's language model, 20 tokens each, at batch 16 and one by one."""
    small_llm(out / "llm", layers=3, width=192, heads=4, steps=2)
    config = cfg.load("demo", "stage2", {"llm.path": str(out / "llm"), "decode.max_tokens": 20})
    text = TranslationTokenizer(config.llm)
    model = Translator(config, text).eval()
    batch = Batch(
        torch.randn(16 * 12, config.encoder.channels),
        torch.full((16,), 12),
        torch.zeros(16, 1, dtype=torch.long),
        [],
        [],
        [],
    )
    ones = [
        Batch(frames, torch.tensor([12]), batch.labels[:1], [], [], [])
        for frames in batch.frames.split(12)
    ]
    speeds: dict[str, list[float]] = {"16": [], "1": []}
    for turn in range(4):
        for name, parts in (("16", [batch]), ("1", ones)):
            began = time.monotonic()
            for part in parts:
                model.translate(part, config.decode)
            if turn:
                speeds[name].append(16 / (time.monotonic() - began))
    many, one = (statistics.median(speeds[name]) for name in ("16", "1"))
    figure(
        "beam_batch_ratio",
        many / one,
        "ratio",
        f"{many:.1f} clips/s at batch 16, {one:.1f} one by one; 12 features a clip, 20 tokens, beam 5",
    )


FIGURES = {
    "features_vs_video": features_vs_video,
    "plan_memory_error": plan_memory_error,
    "trimmed": trimmed,
    "lora": lora,
    "beam": beam,
}


if __name__ == "__main__":
    main(FIGURES)
    shutdown()
