"""What a run leaves to be read: a line an interval, metrics.jsonl, TensorBoard, and how it was made."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import math
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch

from flallm import config as cfg
from flallm.config import Config
from flallm.data.dataset import ClipDataset
from flallm.data.tokenizer import TranslationTokenizer
from flallm.distributed.context import DistContext, computes_in_bf16, precision
from flallm.evaluation import metrics
from flallm.evaluation.decode import Prediction, hardly_looks, note_bad_samples
from flallm.model.llm import save_base
from flallm.model.translator import Translator
from flallm.training.checkpoint import TrainingState
from flallm.training.step import Step
from flallm.utils import atomic_write

LOSS_EMA_DECAY = 0.98  # what the running mean of the loss keeps a step: about 50 steps count
NUM_LOGGED_CLIPS = 4  # dev clips in TensorBoard
STRAGGLER_RATIO = 1.25  # times the mean of all ranks' seconds a step, from which on a rank is named


class MetricLogger:
    """What a run leaves to be read: a line an interval, metrics.jsonl, TensorBoard, and how it was made."""

    def __init__(self, config: Config, run: Path, ranks: DistContext, total: int, text: TranslationTokenizer, model: Translator, state: TrainingState):
        self.config, self.run, self.ranks, self.total, self.state, self.first = config, run, ranks, total, state, state.step
        self.began = self.last = time.monotonic()
        self.before, self.outside = state.seconds, 0.0  # seconds before this start, and of this one on dev
        self.timers = dict.fromkeys(("waiting", "computing"), 0.0)  # since the last line
        self.shown = False
        state.sums = dict.fromkeys(("loss", "tokens"), 0.0) | state.sums | {"clips": 0.0}  # clips: of this start, whose seconds they are divided by
        if ranks.is_main:
            from torch.utils.tensorboard import SummaryWriter

            atomic_write(run / "config.yaml", cfg.dump(config))
            atomic_write(run / "command.txt", shlex.join(sys.argv) + "\n")
            atomic_write(run / "environment.json", json.dumps(environment(ranks), indent=1))
            if not state.step:  # else it was read from there
                text.tokenizer.save_pretrained(run / "llm")
                text.config.save_pretrained(run / "llm")
                if model.base:
                    save_base(model.language, run / "llm")
            self._truncate_after_resume("metrics.jsonl")
            self._truncate_after_resume("skipped.jsonl")
            self.tensorboard = SummaryWriter(run / "tensorboard", purge_step=state.step + 1)
            trained = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
            whole = sum(p.numel() for p in model.parameters()) / 1e6
            self.say(f"{whole:.2f} M parameters, {trained:.2f} M of them train; {total} steps on {ranks.world_size} ranks")
            if config.train.precision == "bf16" and not computes_in_bf16(config.train, ranks.device.type):
                self.say("computing in fp32: this CPU has no instructions for bf16")
            if state.step:
                self.say(f"going on from the checkpoint of step {state.step} of {total}")

    def _truncate_after_resume(self, name: str) -> None:
        path = self.run / name
        if not path.exists():
            return
        lines = path.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= self.state.step]  # the last may be half a line
        atomic_write(path, "".join(f"{line}\n" for line in kept))

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """A context whose time counts as waiting for data."""
        began = time.monotonic()
        yield
        self.timers["waiting"] += time.monotonic() - began

    def is_due(self) -> bool:
        """Whether this step is one that is written down."""
        return self.state.step % self.config.train.log_every == 0 or self.state.step == self.total

    def step(self, done: Step, micro_batches: list, rates: dict[str, float]) -> None:
        """rates: learning rates by the parts that train."""
        if bad := [sample for batch in micro_batches for sample in batch.bad]:
            note_bad_samples(self.run, bad)
        self.timers["computing"] += done.seconds
        if done.applied:
            self.state.skipped_in_a_row = 0
            if self.config.train.spike:
                self.state.usual = LOSS_EMA_DECAY * self.state.usual + (1 - LOSS_EMA_DECAY) * done.mean if self.state.usual else done.mean
            for name, value in (("loss", done.loss), ("tokens", done.tokens), ("clips", sum(bool(key) for b in micro_batches for key in b.keys))):
                self.state.sums[name] += value
        else:
            self._skipped(done, micro_batches)
        if not self.is_due():
            return
        busy = self.timers["waiting"] + self.timers["computing"]
        sums = self.ranks.sum(*self.state.sums.values(), self.timers["waiting"], *(busy * (r == self.ranks.rank) for r in range(self.ranks.world_size)))
        (loss, tokens, clips, waiting), each = sums[:4], sums[4:]
        now = time.monotonic()
        seconds, steps = now - self.last, min(self.state.step % self.config.train.log_every or self.config.train.log_every, self.state.step - self.first)
        left = (now - self.began - self.outside) / (self.state.step - self.first) * (self.total - self.state.step)
        values = {"loss": loss / tokens} if tokens else {}  # none where all its steps were left out
        values |= {"clips_per_s": clips / seconds, "data_wait_share": waiting / seconds / self.ranks.world_size}
        values |= {f"lr_{part}": rate for part, rate in ({"encoder": 0.0} | rates).items()}
        values |= {"skipped": self.state.skipped} | (done.norms if done.applied else {})
        self.state.sums, self.timers = dict.fromkeys(self.state.sums, 0.0), dict.fromkeys(self.timers, 0.0)
        self.last = now
        self._write(values)
        slowest, mean = max(range(len(each)), key=each.__getitem__), sum(each) / len(each)
        self.say(
            f"step {self.state.step}/{self.total}  loss {values.get('loss', math.nan):.3f}  lr {values['lr_encoder']:.1e}/{values['lr_adapter']:.1e}/{values['lr_language']:.1e}  "
            f"{values['clips_per_s']:.1f} clips/s  waiting for data {values['data_wait_share']:.0%}  {left // 60:.0f}:{left % 60:02.0f} left"
            + f"  rank {slowest} is slow: {each[slowest] / steps:.2f} s a step, mean {mean / steps:.2f}"
            * (each[slowest] > STRAGGLER_RATIO * mean)
        )

    def _skipped(self, done: Step, micro_batches: list) -> None:
        """A step that was left out: it is counted, and the clips of all ranks are written down."""
        parts = self.ranks.gather({"loss": done.loss, "keys": [key for batch in micro_batches for key in batch.keys if key]})
        why = "the gradient is not finite"
        if not any(part["keys"] for part in parts):
            why = "none of its clips can be read, see bad_samples.jsonl"
        elif done.mean > self.config.train.spike * self.state.usual > 0:
            why = f"the loss is {done.mean:.3f} where {self.state.usual:.3f} is usual"
        self.state.skipped += 1
        self.state.skipped_in_a_row += 1
        if self.ranks.is_main:
            with open(self.run / "skipped.jsonl", "a", encoding="utf-8") as file:
                file.writelines(json.dumps({"step": self.state.step, "rank": rank, "why": why} | part) + "\n" for rank, part in enumerate(parts))
        self.say(f"step {self.state.step}/{self.total}  warning: {why}, the step is left out; its clips are in skipped.jsonl")

    def note_leading(self) -> None:
        if note := metrics.leading_note(self.state.leading):
            self.say(note)

    def dev(self, real: dict[str, float], swapped: dict[str, float], seconds: float) -> None:
        """real, swapped: scores by their names, of the right videos and of swapped ones."""
        values = {}
        for name in real:
            values |= {f"dev_{name}": real[name], f"dev_{name}_swapped": swapped[name]}
        self._write(values | {"dev_seconds": seconds})
        if self.ranks.is_main and self.state.step == self.total:
            plain = {name: value if isinstance(value, bool | int | float | str) else str(value) for name, value in cfg.flat(self.config).items()}
            best = {f"hparams/dev_{name}": value for name, value in real.items()}
            self.tensorboard.add_hparams(plain, best, run_name=".", global_step=self.state.step)
        leading = self.state.leading
        score = f"dev {metrics.LABELS[leading]} {real[leading]:.2f}, from swapped videos {swapped[leading]:.2f}"
        self.say(f"step {self.state.step}/{self.total}  {score}")
        if hardly_looks(real[leading], swapped[leading]) and self.state.step > self.total / 4:
            self.say("warning: dev scores are no better with the right video than with another: the model does not look at its input yet")

    def show(self, model: Translator, said: dict[str, Prediction]) -> None:
        """The first dev clips in TensorBoard: the sentences, where the model looks while it says them, and, once a start, the clips."""
        from flallm.evaluation import plots  # rank 0 alone draws, and not before its first look at dev

        clips = ClipDataset("dev", self.config.data, self.config.seed)
        model.eval()
        metas = ((number, clips.shards.meta(number)) for number in range(len(clips.shards)))  # one by one: the first will do
        found = ((number, said[meta["key"]]) for number, meta in metas if meta and meta["key"] in said)
        for number, one in islice(found, NUM_LOGGED_CLIPS):
            self.tensorboard.add_text(f"dev/{one.key}", f"reference: {one.reference}\n\nhypothesis: {one.hypothesis}", self.state.step)
            batch = clips.batch(model.text, [(None, number)])
            if not self.shown and not clips.features:
                self.tensorboard.file_writer.add_summary(plots.gif(f"dev/{one.key}", batch.frames), self.state.step)
            with precision(self.config.train, self.ranks.device):
                looks = model.attention(batch.to(self.ranks.device), one.hypothesis)
            if looks:
                self.tensorboard.add_figure(f"dev_attention/{one.key}", plots.attention(looks), self.state.step)
        self.shown = True
        model.train()

    def exclude_time(self, seconds: float) -> None:
        """Time that is not to be counted as training."""
        self.last += seconds
        self.outside += seconds

    def snapshot(self) -> TrainingState:
        self.state.seconds = self.before + time.monotonic() - self.began
        return self.state

    def _write(self, values: dict[str, float]) -> None:
        if self.ranks.is_main:
            with open(self.run / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": self.state.step, "seconds": round(self.snapshot().seconds, 2), **values}) + "\n")
            for name, value in values.items():
                self.tensorboard.add_scalar(name, value, self.state.step)

    def say(self, line: str) -> None:
        if self.ranks.is_main:
            print(f"{self.config.stage}  {line}", flush=True)


def environment(ranks: DistContext) -> dict:
    packages = ("flallm", "torch", "torchaudio", "deepspeed", "transformers", "webdataset", "av", "sacrebleu", "numpy")
    return {
        "python": platform.python_version(),
        "host": platform.node(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "world_size": ranks.world_size,
        "git": revision(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def revision() -> str | None:
    """The git revision of this code, where it runs from its repository."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists() or not shutil.which("git"):
        return None
    return subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, encoding="utf-8", errors="replace").stdout.strip() or None
