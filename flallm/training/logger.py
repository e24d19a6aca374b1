"""What a run leaves to be read: a line an interval, metrics.jsonl, TensorBoard, how it was made."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import logging
import math
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from flallm import config as cfg
from flallm.config import Config
from flallm.data.dataset import Batch, ClipDataset
from flallm.distributed.context import DistContext, computes_in_bf16, precision
from flallm.evaluation import metrics
from flallm.evaluation.decode import Prediction, hardly_looks, note_bad_samples
from flallm.model.llm import save_base
from flallm.model.translator import Translator
from flallm.training.checkpoint import TrainingState
from flallm.training.step import SkipReason, StepResult
from flallm.utils import atomic_write

LOSS_EMA_DECAY = 0.98  # what the running mean of the loss keeps a step: about 50 steps count
NUM_LOGGED_CLIPS = 4  # dev clips in TensorBoard
STRAGGLER_RATIO = 1.25  # a rank is named whose time a step is over so many times the ranks' mean


@dataclass(frozen=True)
class Interval:
    """What all ranks did since the last line of the log.

    loss, tokens, clips: sums over ranks; waiting: seconds that ranks waited for data, summed.
    busy: seconds that each rank computed or waited for data; seconds, steps: of the interval.
    """

    loss: float
    tokens: float
    clips: float
    waiting: float
    busy: list[float]
    seconds: float
    steps: int


def run_logger(stage: str, is_main: bool) -> logging.Logger:
    """A logger whose lines begin with the stage; only rank 0 prints them, on standard output."""
    logger = logging.getLogger(f"flallm.{stage}")
    logger.propagate = False
    logger.setLevel(logging.INFO)
    logger.handlers.clear()
    handler = logging.StreamHandler(sys.stdout) if is_main else logging.NullHandler()
    handler.setFormatter(logging.Formatter(f"{stage}  %(message)s"))
    logger.addHandler(handler)
    return logger


class MetricLogger:
    """Writes what a run leaves to be read. Every rank has one; rank 0's writes."""

    def __init__(
        self,
        config: Config,
        run: Path,
        ranks: DistContext,
        total_steps: int,
        model: Translator,
        state: TrainingState,
    ):
        self.config, self.run, self.ranks = config, run, ranks
        self.total_steps, self.state, self.first_step = total_steps, state, state.step
        self.logger = run_logger(config.stage, ranks.is_main)
        self.began = self.interval_began = time.monotonic()
        self.seconds_before = state.seconds  # of the starts before this one
        self.seconds_outside = 0.0  # of this start, on validation
        self.waiting_seconds = self.computing_seconds = 0.0  # since the last line
        self.clips_shown = False
        # Clips are counted from this start on, because its seconds divide them.
        state.sums = {"loss": 0.0, "tokens": 0.0, **state.sums, "clips": 0.0}
        if ranks.is_main:
            self._open_files(model)

    def _open_files(self, model: Translator) -> None:
        from torch.utils.tensorboard import SummaryWriter

        run, step = self.run, self.state.step
        atomic_write(run / "config.yaml", cfg.dump(self.config))
        atomic_write(run / "command.txt", shlex.join(sys.argv) + "\n")
        atomic_write(run / "environment.json", json.dumps(environment(self.ranks), indent=1))
        if not step:  # a resumed run has read them from there
            model.text.tokenizer.save_pretrained(run / "llm")
            model.text.config.save_pretrained(run / "llm")
            if model.base:
                save_base(model.language, run / "llm")
        self._truncate_after_resume("metrics.jsonl")
        self._truncate_after_resume("skipped.jsonl")
        self.tensorboard = SummaryWriter(run / "tensorboard", purge_step=step + 1)
        parameters = list(model.parameters())
        total = sum(p.numel() for p in parameters) / 1e6
        trained = sum(p.numel() for p in parameters if p.requires_grad) / 1e6
        self.info(
            f"{total:.2f} M parameters, {trained:.2f} M of them train; "
            f"{self.total_steps} steps on {self.ranks.world_size} ranks"
        )
        bf16_asked = self.config.train.precision == "bf16"
        if bf16_asked and not computes_in_bf16(self.config.train, self.ranks.device.type):
            self.info("computing in fp32: this CPU has no instructions for bf16")
        if step:
            self.info(f"going on from the checkpoint of step {step} of {self.total_steps}")

    def _truncate_after_resume(self, name: str) -> None:
        """Removes the lines of steps after the checkpoint: these steps are done again."""
        path = self.run / name
        if not path.exists():
            return
        lines = [
            line
            for line in path.read_text(encoding="utf-8").splitlines()
            # The last line may be half a line.
            if line.endswith("}") and json.loads(line)["step"] <= self.state.step
        ]
        atomic_write(path, "".join(f"{line}\n" for line in lines))

    def info(self, message: str) -> None:
        self.logger.info(message)

    def warning(self, message: str) -> None:
        self.logger.warning(f"warning: {message}")

    def error(self, message: str) -> None:
        self.logger.error(f"error: {message}")

    @property
    def progress(self) -> str:
        return f"step {self.state.step}/{self.total_steps}"

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """A context whose time counts as waiting for data."""
        began = time.monotonic()
        yield
        self.waiting_seconds += time.monotonic() - began

    def is_due(self) -> bool:
        """Whether this step ends an interval of the log."""
        at_interval = self.state.step % self.config.train.log_every == 0
        return at_interval or self.state.step == self.total_steps

    def step(self, result: StepResult, micro_batches: list[Batch], rates: dict[str, float]) -> None:
        """Counts a step and, at the end of an interval, logs it.

        rates: learning rates by the parts that train.
        """
        if bad_samples := [sample for batch in micro_batches for sample in batch.bad]:
            note_bad_samples(self.run, bad_samples)
        self.computing_seconds += result.compute_seconds
        if result.skipped:
            self._log_skipped_step(result, micro_batches)
        else:
            self._count(result, micro_batches)
        if self.is_due():
            self._log_interval(result, rates)

    def _count(self, result: StepResult, micro_batches: list[Batch]) -> None:
        state = self.state
        state.skipped_in_a_row = 0
        if self.config.train.spike:
            if state.loss_ema:
                past, new = LOSS_EMA_DECAY * state.loss_ema, (1 - LOSS_EMA_DECAY) * result.mean_loss
                state.loss_ema = past + new
            else:
                state.loss_ema = result.mean_loss
        state.sums["loss"] += result.loss
        state.sums["tokens"] += result.tokens
        state.sums["clips"] += sum(bool(key) for batch in micro_batches for key in batch.keys)

    def _log_interval(self, result: StepResult, rates: dict[str, float]) -> None:
        interval = self._end_interval()
        values = {}
        if interval.tokens:  # no loss where all steps were skipped
            values["loss"] = interval.loss / interval.tokens
        values["clips_per_s"] = interval.clips / interval.seconds
        values["data_wait_share"] = interval.waiting / interval.seconds / self.ranks.world_size
        for part, rate in ({"encoder": 0.0} | rates).items():
            values[f"lr_{part}"] = rate
        values["skipped"] = self.state.skipped
        if not result.skipped:
            values |= result.norms
        self._write(values)
        self.info(self._interval_line(values, interval))

    def _end_interval(self) -> Interval:
        """Sums over ranks what they did in the interval, and begins the next one."""
        state = self.state
        busy = [0.0] * self.ranks.world_size
        busy[self.ranks.rank] = self.waiting_seconds + self.computing_seconds
        sums = self.ranks.sum(*state.sums.values(), self.waiting_seconds, *busy)
        now = time.monotonic()
        log_every = self.config.train.log_every
        steps = min(state.step % log_every or log_every, state.step - self.first_step)
        interval = Interval(
            *sums[:4], busy=sums[4:], seconds=now - self.interval_began, steps=steps
        )
        state.sums = dict.fromkeys(state.sums, 0.0)
        self.waiting_seconds = self.computing_seconds = 0.0
        self.interval_began = now
        return interval

    def _interval_line(self, values: dict[str, float], interval: Interval) -> str:
        rates = [values[f"lr_{part}"] for part in ("encoder", "adapter", "language")]
        steps_done = self.state.step - self.first_step
        seconds_a_step = (self.interval_began - self.began - self.seconds_outside) / steps_done
        left = seconds_a_step * (self.total_steps - self.state.step)
        parts = [
            self.progress,
            f"loss {values.get('loss', math.nan):.3f}",
            "lr " + "/".join(f"{rate:.1e}" for rate in rates),
            f"{values['clips_per_s']:.1f} clips/s",
            f"waiting for data {values['data_wait_share']:.0%}",
            f"{left // 60:.0f}:{left % 60:02.0f} left",
        ]
        mean = sum(interval.busy) / len(interval.busy)
        slowest = max(range(len(interval.busy)), key=interval.busy.__getitem__)
        if interval.busy[slowest] > STRAGGLER_RATIO * mean:
            seconds = interval.busy[slowest] / interval.steps
            parts.append(
                f"rank {slowest} is slow: {seconds:.2f} s a step, mean {mean / interval.steps:.2f}"
            )
        return "  ".join(parts)

    def _log_skipped_step(self, result: StepResult, micro_batches: list[Batch]) -> None:
        """Counts a skipped step and writes down the clips of all ranks."""
        keys = [key for batch in micro_batches for key in batch.keys if key]
        parts = self.ranks.gather({"loss": result.loss, "keys": keys})
        reason = "the gradient is not finite"
        if result.skipped is SkipReason.NO_TOKENS:
            reason = "none of its clips can be read, see bad_samples.jsonl"
        elif result.skipped is SkipReason.LOSS_SPIKE:
            usual = self.state.loss_ema
            reason = f"the loss is {result.mean_loss:.3f} where {usual:.3f} is usual"
        self.state.skipped += 1
        self.state.skipped_in_a_row += 1
        if self.ranks.is_main:
            with open(self.run / "skipped.jsonl", "a", encoding="utf-8") as file:
                for rank, part in enumerate(parts):
                    row = {"step": self.state.step, "rank": rank, "why": reason, **part}
                    file.write(json.dumps(row) + "\n")
        self.info(
            f"{self.progress}  warning: {reason}, the step is left out; "
            "its clips are in skipped.jsonl"
        )

    def note_leading(self) -> None:
        """Says why another score than BLEU-4 leads, if one does."""
        if note := metrics.leading_note(self.state.leading):
            self.info(note)

    def dev(
        self, scores: dict[str, float], mismatched_scores: dict[str, float], seconds: float
    ) -> None:
        """Logs the dev scores by their names, of the right videos and of mismatched ones."""
        values = {}
        for name in scores:
            values[f"dev_{name}"] = scores[name]
            values[f"dev_{name}_swapped"] = mismatched_scores[name]
        self._write(values | {"dev_seconds": seconds})
        if self.ranks.is_main and self.state.step == self.total_steps:
            self._write_hparams(scores)
        leading = self.state.leading
        score, mismatched = scores[leading], mismatched_scores[leading]
        label = metrics.LABELS[leading]
        self.info(f"{self.progress}  dev {label} {score:.2f}, from swapped videos {mismatched:.2f}")
        if hardly_looks(score, mismatched) and self.state.step > self.total_steps / 4:
            self.warning(
                "dev scores are no better with the right video than with another: "
                "the model does not look at its input yet"
            )

    def _write_hparams(self, scores: dict[str, float]) -> None:
        fields = {}
        for name, value in cfg.flat(self.config).items():
            is_plain = isinstance(value, bool | int | float | str)
            fields[name] = value if is_plain else str(value)
        results = {f"hparams/dev_{name}": value for name, value in scores.items()}
        self.tensorboard.add_hparams(fields, results, run_name=".", global_step=self.state.step)

    def show(self, model: Translator, predictions: dict[str, Prediction]) -> None:
        """Shows the first dev clips in TensorBoard, once a start, with their sentences and where
        the model looks while it writes them.

        predictions: by the keys of their clips.
        """
        from flallm.evaluation import plots  # only rank 0 draws, and not before the first dev score

        clips = ClipDataset("dev", self.config.data, self.config.seed)
        model.eval()
        for number, prediction in islice(_first_clips(clips, predictions), NUM_LOGGED_CLIPS):
            name, step = prediction.key, self.state.step
            sentences = f"reference: {prediction.reference}\n\nhypothesis: {prediction.hypothesis}"
            self.tensorboard.add_text(f"dev/{name}", sentences, step)
            batch = clips.batch(model.text, [(None, number)])
            if not self.clips_shown and not clips.features:
                video = plots.gif(f"dev/{name}", batch.frames)
                self.tensorboard.file_writer.add_summary(video, step)
            with precision(self.config.train, self.ranks.device):
                weights = model.attention(batch.to(self.ranks.device), prediction.hypothesis)
            if weights:
                figure = plots.attention(weights)
                self.tensorboard.add_figure(f"dev_attention/{name}", figure, step)
        self.clips_shown = True
        model.train()

    def exclude_time(self, seconds: float) -> None:
        """Leaves seconds out of the time that counts as training."""
        self.interval_began += seconds
        self.seconds_outside += seconds

    def snapshot(self) -> TrainingState:
        """The state of the run, with the seconds that it took up to now."""
        self.state.seconds = self.seconds_before + time.monotonic() - self.began
        return self.state

    def _write(self, values: dict[str, float]) -> None:
        """Appends to metrics.jsonl and TensorBoard."""
        if not self.ranks.is_main:
            return
        seconds = round(self.snapshot().seconds, 2)
        row = {"step": self.state.step, "seconds": seconds, **values}
        with open(self.run / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        for name, value in values.items():
            self.tensorboard.add_scalar(name, value, self.state.step)


def _first_clips(
    clips: ClipDataset, predictions: dict[str, Prediction]
) -> Iterator[tuple[int, Prediction]]:
    """(number of a clip, its prediction) in the order of the shards, read one by one."""
    for number in range(len(clips.shards)):
        metadata = clips.shards.meta(number)
        if metadata and metadata["key"] in predictions:
            yield number, predictions[metadata["key"]]


def environment(ranks: DistContext) -> dict:
    """What a run was made with: versions, device, git revision."""
    packages = (
        *("flallm", "torch", "torchaudio", "deepspeed", "transformers"),
        *("webdataset", "av", "sacrebleu", "numpy"),
    )
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
    command = ["git", "-C", root, "rev-parse", "HEAD"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
    return done.stdout.strip() or None
