"""The training loop: one for stage 1, stage 2 and the joint baseline. What differs between them is in `Translator`."""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from flallm import UserError, checkpoint
from flallm import config as cfg
from flallm import engine as engines
from flallm.config import Config, Train
from flallm.engine import Ranks
from flallm.evaluate import decode_split, note_bad_samples, swapped_bleu4
from flallm.loader import Clips, batches
from flallm.metrics import bleu4
from flallm.model.translator import Translator
from flallm.plan import TEXT_COST, Plan, training_groups
from flallm.text import Text


def train(config: Config, run: Path, ranks: Ranks, stage1: Path | None = None) -> None:
    """Trains a run into its folder. Stage 2 takes its encoder from the best checkpoint of the run `stage1`."""
    if any(ranks.gather((run / "config.yaml").exists())):
        raise UserError(f"{run} holds a run already, and runs cannot be resumed yet: remove it or name another --run_dir")
    text = Text(config.llm)
    clips, _ = (Clips(split, config.data, text, config.seed) for split in ("train", "dev"))  # dev better missed now than after an epoch
    plan = make_plan(config, clips, ranks.world_size)
    torch.manual_seed(config.seed)  # all ranks start from the same weights …
    model = Translator(config, text)
    if config.stage == "stage2":
        take_encoder(model, config, stage1)
    total = config.train.steps or plan.total(config.train.epochs)
    log = Log(config, run, ranks, total, text, model)
    engine = engines.start_engine(model.to(ranks.device), config.train, ranks)
    torch.manual_seed(config.seed * 1000 + ranks.rank + 1)  # … and drop out different units
    loader = batches(clips, training_groups(plan, ranks.rank, 0, total), config.data.workers)
    engine.train()
    for step in range(1, total + 1):
        with log.waiting():
            micro_batches = [next(loader) for _ in range(config.train.micro_batches)]
        engines.set_learning_rates(engine, config.train, schedule(config.train, step - 1, total))
        loss, tokens = engines.train_step(engine, micro_batches, ranks)
        log.step(step, loss, tokens, micro_batches)
        if step % (config.train.dev_every or plan.steps(0)) == 0 or step == total:
            look_at_dev(model, config, run, ranks, log, step)


def make_plan(config: Config, clips: Clips, world_size: int) -> Plan:
    texts, train = clips.shards.index["text_length"], config.train
    return Plan(clips.used, texts, train.batch, train.micro_batches, world_size, config.seed, train.batch_frames, TEXT_COST[config.stage])


def take_encoder(model: Translator, config: Config, stage1: Path | None) -> None:
    """Puts the encoder of a stage-1 run into the model."""
    if stage1 is None:
        raise UserError("stage2 needs --stage1 RUN: the folder of a finished stage-1 run")
    path = stage1 / "config.yaml"
    if not path.is_file():
        raise UserError(f"--stage1: {stage1} is no run folder (no config.yaml)")
    theirs = cfg.from_dict(Config, cfg.read_yaml(path), str(path))
    for name in ("encoder", "data.resize", "data.crop", "data.stride"):
        for field, value in cfg.flat(config).items():
            if field.startswith(name) and field != "encoder.weights" and cfg.flat(theirs)[field] != value:
                raise UserError(f"{field} is {value} here but {cfg.flat(theirs)[field]} in {stage1}: the encoder would see something else")
    checkpoint.load(stage1, model, "encoder")


def schedule(config: Train, step: int, total: int) -> float:
    """What the learning rates are multiplied by: a linear rise over the warm-up, then a cosine down to 0."""
    warmup = config.warmup * total
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def look_at_dev(model: Translator, config: Config, run: Path, ranks: Ranks, log: Log, step: int) -> None:
    """BLEU-4 on dev, greedy, of the real and of swapped videos; a checkpoint of the model."""
    began = time.monotonic()
    greedy = replace(config.decode, beam=1, batch=max(config.decode.batch, 32))
    predictions, _ = decode_split(model, config, "dev", ranks, greedy, config.train.dev_clips)
    real = bleu4([p.hypothesis for p in predictions], [p.reference for p in predictions], config.convention)
    log.dev(step, real, swapped_bleu4(predictions, config.convention))
    if ranks.first:
        checkpoint.save(run, step, real, model)
    log.leave_out(time.monotonic() - began)


class Log:
    """What a run leaves to be read: a line an interval, metrics.jsonl, TensorBoard, and how it was made."""

    def __init__(self, config: Config, run: Path, ranks: Ranks, total: int, text: Text, model: Translator):
        self.config, self.run, self.ranks, self.total = config, run, ranks, total
        self.began = self.last = time.monotonic()
        self.outside = 0.0  # seconds spent on dev
        self.counts = dict.fromkeys(("loss", "tokens", "clips", "waiting"), 0.0)
        if ranks.first:
            from torch.utils.tensorboard import SummaryWriter

            run.mkdir(parents=True, exist_ok=True)
            (run / "config.yaml").write_text(cfg.dump(config))
            (run / "command.txt").write_text(" ".join(sys.argv) + "\n")
            (run / "environment.json").write_text(json.dumps(environment(ranks), indent=1))
            text.tokenizer.save_pretrained(run / "llm")
            text.config.save_pretrained(run / "llm")
            self.tensorboard = SummaryWriter(run / "tensorboard")
            trained = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
            whole = sum(p.numel() for p in model.parameters()) / 1e6
            print(f"{config.stage}: {whole:.2f} M parameters, {trained:.2f} M of them train; {total} steps on {ranks.world_size} ranks", flush=True)

    def waiting(self) -> Log:
        """A context whose time counts as waiting for data."""
        return self

    def __enter__(self) -> None:
        self._entered = time.monotonic()

    def __exit__(self, *_) -> None:
        self.counts["waiting"] += time.monotonic() - self._entered

    def step(self, step: int, loss: float, tokens: float, micro_batches: list) -> None:
        self.counts["loss"] += loss
        self.counts["tokens"] += tokens
        self.counts["clips"] += sum(len(b.keys) for b in micro_batches)
        if bad := [sample for batch in micro_batches for sample in batch.bad]:
            note_bad_samples(self.run, bad)
        if step % self.config.train.log_every and step != self.total:
            return
        loss, tokens, clips, waiting = self.ranks.sum(*self.counts.values())
        now = time.monotonic()
        seconds = now - self.last
        left = (now - self.began - self.outside) / step * (self.total - step)
        factor = schedule(self.config.train, step - 1, self.total)
        values = {"loss": loss / max(1, tokens), "clips_per_s": clips / seconds, "data_wait_share": waiting / seconds / self.ranks.world_size}
        values |= {f"lr_{part}": factor * getattr(self.config.train, f"lr_{part}") for part in ("encoder", "adapter", "language")}
        self.counts = dict.fromkeys(self.counts, 0.0)
        self.last = now
        self._write(step, values)
        self._print(
            f"step {step}/{self.total}  loss {values['loss']:.3f}  lr {values['lr_encoder']:.1e}/{values['lr_adapter']:.1e}/{values['lr_language']:.1e}  "
            f"{values['clips_per_s']:.1f} clips/s  waiting for data {values['data_wait_share']:.0%}  {left // 60:.0f}:{left % 60:02.0f} left"
        )

    def dev(self, step: int, real: float, swapped: float) -> None:
        self._write(step, {"dev_bleu4": real, "dev_bleu4_swapped": swapped})
        self._print(f"step {step}/{self.total}  dev BLEU-4 {real:.2f}, from swapped videos {swapped:.2f}")
        if real < 2 * swapped + 1 and step > self.total / 4:
            self._print("warning: dev scores are no better with the right video than with another: the model does not look at its input yet")

    def leave_out(self, seconds: float) -> None:
        """Time that is not to be counted as training."""
        self.last += seconds
        self.outside += seconds

    def _write(self, step: int, values: dict[str, float]) -> None:
        if self.ranks.first:
            with open(self.run / "metrics.jsonl", "a") as file:
                file.write(json.dumps({"step": step, "seconds": round(time.monotonic() - self.began, 2), **values}) + "\n")
            for name, value in values.items():
                self.tensorboard.add_scalar(name, value, step)

    def _print(self, line: str) -> None:
        if self.ranks.first:
            print(f"{self.config.stage}  {line}", flush=True)


def environment(ranks: Ranks) -> dict:
    packages = ("flallm", "torch", "torchaudio", "deepspeed", "transformers", "webdataset", "av", "sacrebleu", "numpy")
    git = subprocess.run(["git", "-C", Path(__file__).parent, "rev-parse", "HEAD"], capture_output=True, text=True)
    return {
        "python": platform.python_version(),
        "host": platform.node(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "world_size": ranks.world_size,
        "git": git.stdout.strip() or None,
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }
