"""The training loop: one for stage 1, stage 2 and the joint baseline. What differs between them is in `Translator`."""

from __future__ import annotations

import contextlib
import copy
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
from dataclasses import replace
from itertools import islice
from pathlib import Path
from zlib import crc32

import numpy as np
import torch

from flallm import UserError, checkpoint, write_whole
from flallm import config as cfg
from flallm import engine as engines
from flallm.checkpoint import State, Writer
from flallm.config import Config, Train
from flallm.engine import AGAIN, Ranks, Step
from flallm.evaluate import Prediction, check_features, decode_split, note_bad_samples, of_run, swapped_bleu4
from flallm.loader import Clips, batches
from flallm.metrics import bleu4
from flallm.model.llm import save_base
from flallm.model.translator import Translator
from flallm.plan import make_plan, training_groups
from flallm.store import absolute
from flallm.text import Text

# What may differ from the recipe a run was begun with. All else would make the two halves of the run two different runs.
FREE = (
    "name", "data.shards", "data.workers", "data.fps", "data.prefetch_mib", "data.cache", "encoder.weights", "llm.path", "decode.beam", "decode.max_tokens", "decode.length_penalty",
    "decode.batch", "checkpoint", "train.micro_batches", "train.deepspeed", "train.spike", "train.log_every", "train.dev_every", "train.dev_clips", "train.max_skipped", "train.timeout",
)  # fmt: skip

USUAL = 0.98  # what the running mean of the loss keeps a step: about 50 steps count
SHOWN = 4  # dev clips in TensorBoard
STRAGGLES = 1.25  # times the mean of all ranks' seconds a step, from which on a rank is named


def train(config: Config, run: Path, ranks: Ranks, stage1: Path | None = None) -> None:
    """Trains a run into its folder, from its newest good checkpoint if it has one: the same command goes on where it ended.

    Stage 2 takes its encoder from the best checkpoint of the run `stage1`. Exits with `AGAIN` after a signal to stop, once all is saved.
    """
    clips, dev = (Clips(split, config.data, config.seed) for split in ("train", "dev"))  # dev better missed now than after an epoch
    if clips.features and config.frozen != "encoder":
        raise UserError(f"{config.data.shards} holds features: {config.stage} trains the encoder and needs shards of video")
    if config.data.fps not in (0, clips.shards.fps):
        raise UserError(
            f"data.fps: {config.data.shards} has {clips.shards.fps:g}: the frame rate is chosen when shards are made, make_shards.py --fps={config.data.fps:g}"
        )
    # The run records absolute paths: its other commands may be called from another folder.
    recorded = {"shards": absolute(config.data.shards), "cache": absolute(config.data.cache)}
    config = replace(config, data=replace(config.data, fps=clips.shards.fps, **recorded))
    plan = make_plan(config, clips.used, clips.shards.index["text_length"], ranks.world_size)
    data = {"clips": len(plan.frames), "crc32": crc32(np.ascontiguousarray(clips.shards.index["checksum"]))}
    origin = checkpoint.identity(stage1) if config.stage == "stage2" and stage1 and (stage1 / "checkpoints").is_dir() else None
    there = ranks.gather(checkpoint.steps(run))[0]
    found = newest(config, run, ranks, data, origin)
    torch.manual_seed(config.seed)  # all ranks start from the same weights …
    model = of_run(copy.deepcopy(config), run) if found else begin(config, stage1, origin, ranks)  # with its own tokenizer: llm.path may be another by now
    if found:
        checkpoint.load_model(found[0], model)
    text, total = model.text, config.train.steps or plan.total(config.train.epochs)
    check_fits(config, np.concatenate([clips.used, dev.used]).max(), model)
    check_features(clips, model)
    engine = engines.start_engine(model.to(ranks.device), config.train, ranks)
    dev_every = config.train.dev_every or plan.steps(0)
    wait = round(config.train.llm_start * total) if model.one_pass else 0  # steps that the LLM waits
    with checkpoint.lock(run, ranks), engines.Asked() as asked, contextlib.ExitStack() as leaving:
        if ranks.gather(checkpoint.steps(run))[0] != there:
            raise UserError(f"{run} was written to while this start read it: start again")
        torch.manual_seed(config.seed * 1000 + ranks.rank + 1)  # … and drop out different units
        first = found[1]["step"] if found else 0
        decoded = batches(clips, text, training_groups(plan, ranks.rank, first, total), config.data.workers)
        loader = leaving.enter_context(contextlib.closing(engines.on_the_way(decoded, ranks.device)))
        state = checkpoint.restore(*found, engine, ranks, config.seed) if found else State()
        with engines.whole(engine):
            log = Log(config, run, ranks, total, text, model, state)
        if config.stage == "stage2" and not found:
            reached, last = checkpoint.progress(stage1)
            if reached < last:
                log.say(f"warning: {stage1} has got to step {reached} of {last}: this run takes the best encoder it has so far")
        origin = found[1].get("stage1", origin) if found else origin
        writer = Writer(
            run, ranks, config.checkpoint, {"data": data, "stage1": origin, "steps": total, "config": cfg.flat(config), "environment": environment(ranks)}
        )
        engine.train()
        for state.step in range(first + 1, total + 1):
            with log.waiting():
                micro_batches = [next(loader) for _ in range(config.train.micro_batches)]
            rates = engines.set_learning_rates(engine, config.train, lambda start: schedule(config.train, state.step - 1, total, start))
            model.llm_waits = state.step <= wait
            if state.step == wait + 1 > 1:  # the LLM's first
                engines.begin_anew(engine, ("language", "adapter"))
                state.usual = 0.0
            most = (config.train.spike * state.usual or math.inf) if config.train.spike else None
            flags = (asked.stop, writer.written, writer.due() and ranks.first)
            step = engines.train_step(engine, micro_batches, ranks, *flags, most=most, norms=log.is_due())
            log.step(step, micro_batches, rates)
            stop, written, due = step.flags
            if state.skipped_in_a_row >= config.train.max_skipped:
                give_up(writer, log, f"{config.train.max_skipped} steps in a row had to be left out, see {run}/skipped.jsonl; the last good checkpoint is kept")
            score = None
            if state.step % dev_every == 0 or state.step == total:
                with engines.whole(engine):
                    score = look_at_dev(model, config, ranks, log)
            try:
                if score is not None or stop or due or (config.checkpoint.every and state.step % config.checkpoint.every == 0):
                    writer.save(engine, log.up_to_now(), score)
                elif written == ranks.world_size:
                    writer.settle()
                if stop or state.step == total:
                    writer.close()
            except checkpoint.DiskError as error:
                give_up(writer, log, f"{error}; the checkpoints before it are kept")
            if stop and state.step < total:
                log.say(f"step {state.step}/{total}  asked to stop: all is saved, and the same command goes on from here")
                raise SystemExit(AGAIN)


def begin(config: Config, stage1: Path | None, origin: str | None, ranks: Ranks) -> Translator:
    """The model that a run begins with. origin: `checkpoint.identity` of its stage 1."""
    model = Translator(config, Text(config.llm))
    if config.stage == "stage2":
        take_encoder(model, config, stage1)
        if len({*ranks.gather(origin), *ranks.gather(checkpoint.identity(stage1))}) > 1:
            raise UserError(f"--stage1: {stage1} got a better checkpoint while this start read it: start again")
    return model


def check_fits(config: Config, frames: int, model: Translator) -> None:
    """Refuses clips of so many frames, and sentences, that are longer than what the language model takes."""
    text, features = model.text, -(-int(frames) // config.llm.stack)
    if features > text.longest:
        raise UserError(f"data.max_frames: a clip has {features} features, and {text.longest} is what the language model takes: raise data.stride or llm.stack")
    if config.decode.max_tokens > text.longest:
        raise UserError(f"decode.max_tokens: {config.decode.max_tokens} are more than the {text.longest} that the language model takes")
    if config.stage != "stage1" and not text.config.is_encoder_decoder:  # one sequence for all
        together, places = len(text.before) + features + len(text.after) + config.decode.max_tokens, getattr(text.config, "max_position_embeddings", math.inf)
        if together > places:
            raise UserError(f"decode.max_tokens: prompt, features and answer have {together} places, and {places} are what the language model has")


def newest(config: Config, run: Path, ranks: Ranks, data: dict, origin: str | None) -> tuple[Path, dict] | None:
    """The newest good checkpoint, if it is one of this recipe, data and, in stage 2, encoder."""
    found = checkpoint.newest_good(run, ranks)
    if not found:
        return None
    check_same(found[1]["config"], config, run)
    if found[1]["data"] != data:
        raise UserError(
            f"{run} was begun with other data: data.shards had {found[1]['data']['clips']} clips and has {data['clips']}, or others. Name another --run_dir"
        )
    if origin and found[1].get("stage1", origin) != origin:
        raise UserError(f"{run} was begun with the encoder of another stage 1, or of an earlier checkpoint of it. Name another --run_dir, or remove it")
    return found


def check_same(theirs: dict[str, object], config: Config, run: Path, option: str = "--run_dir", free: tuple[str, ...] = FREE) -> None:
    """Refuses a recipe that is another than the one, {"a.b": value}, that a run was begun with. option: where to name another folder; free: what may differ."""
    theirs, mine = (json.loads(json.dumps(values)) for values in (cfg.flat(Config()) | theirs, cfg.flat(config)))  # a field may be younger than the run
    differing = [f"{name} was {theirs[name]} and is {value}" for name, value in mine.items() if theirs[name] != value and not name.startswith(free)]
    if differing:
        raise UserError(f"{run} was begun with another recipe: {'; '.join(differing)}. Name another {option}, or go on with what it was")


def give_up(writer: Writer, log: Log, why: str) -> None:
    log.say(f"error: {why}")
    with contextlib.suppress(checkpoint.DiskError):
        writer.close()
    raise SystemExit(1)


def take_encoder(model: Translator, config: Config, stage1: Path | None) -> None:
    """Puts the encoder of a stage-1 run into the model."""
    if stage1 is None:
        raise UserError("stage2 needs --stage1 RUN: the folder of a finished stage-1 run")
    theirs = cfg.from_dict(Config, cfg.read_run(stage1), str(stage1 / "config.yaml"))
    for name in ("encoder", "data.resize", "data.crop", "data.stride", *(["light_t"] if model.input == "light_t" else [])):
        for field, value in cfg.flat(config).items():
            if field.startswith(name) and field != "encoder.weights" and cfg.flat(theirs)[field] != value:
                raise UserError(f"{field} is {value} here but {cfg.flat(theirs)[field]} in {stage1}: the encoder would see something else")
    checkpoint.load(stage1, model.encoder, "encoder.")
    if model.input == "light_t":
        checkpoint.load(stage1, model.light_t.adapter, "adapter.")
        checkpoint.load(stage1, model.light_t.encoder, "language.model.encoder.")
    if model.input == "words":
        if not theirs.train.word_loss:
            raise UserError(f"llm.input: words are those of a stage 1 with train.word_loss, {stage1} has none")
        if Text(replace(theirs.llm, path=str(stage1 / "llm"))).tokenizer.get_vocab() != model.text.tokenizer.get_vocab():
            raise UserError(
                f"llm.input: {stage1} knows the words of {theirs.llm.path}, not those of {config.llm.path}: train a stage 1 with --llm.path={config.llm.path}"
            )
        checkpoint.load(stage1, model.words, "words.")


def schedule(config: Train, step: int, total: int, start: float = 0.0) -> float:
    """What the learning rates are multiplied by: a linear rise over the warm-up, then a cosine down to 0, both over the steps after `start`, a share of all."""
    step, total = step - round(start * total), total - round(start * total)
    if step < 0:
        return 0.0
    warmup = config.warmup * total
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def look_at_dev(model: Translator, config: Config, ranks: Ranks, log: Log) -> float:
    """BLEU-4 on dev, greedy, of the real and of swapped videos."""
    began = time.monotonic()
    greedy = replace(config.decode, beam=1, batch=max(config.decode.batch, 32))
    workers = min(1, config.data.workers)  # those of training are there too
    predictions, bad = decode_split(model, config, "dev", ranks, greedy, workers=workers, limit=config.train.dev_clips)
    if ranks.first and bad:
        note_bad_samples(log.run, bad)
    if not predictions:
        raise UserError(f"no clip of dev in {config.data.shards} could be decoded, see {log.run}/bad_samples.jsonl")
    real = bleu4([p.hypothesis for p in predictions], [p.reference for p in predictions], config.convention)
    log.dev(real, swapped_bleu4(predictions, config.convention), time.monotonic() - began)
    if ranks.first:
        log.show(model, {p.key: p for p in predictions})
    log.leave_out(time.monotonic() - began)
    return real


class Log:
    """What a run leaves to be read: a line an interval, metrics.jsonl, TensorBoard, and how it was made."""

    def __init__(self, config: Config, run: Path, ranks: Ranks, total: int, text: Text, model: Translator, state: State):
        self.config, self.run, self.ranks, self.total, self.state, self.first = config, run, ranks, total, state, state.step
        self.began = self.last = time.monotonic()
        self.before, self.outside = state.seconds, 0.0  # seconds before this start, and of this one on dev
        self.timers = dict.fromkeys(("waiting", "computing"), 0.0)  # since the last line
        self.shown = False
        state.sums = dict.fromkeys(("loss", "tokens"), 0.0) | state.sums | {"clips": 0.0}  # clips: of this start, whose seconds they are divided by
        if ranks.first:
            from torch.utils.tensorboard import SummaryWriter

            write_whole(run / "config.yaml", cfg.dump(config))
            write_whole(run / "command.txt", shlex.join(sys.argv) + "\n")
            write_whole(run / "environment.json", json.dumps(environment(ranks), indent=1))
            if not state.step:  # else it was read from there
                text.tokenizer.save_pretrained(run / "llm")
                text.config.save_pretrained(run / "llm")
                if model.base:
                    save_base(model.language, run / "llm")
            self._forget_what_is_done_again("metrics.jsonl")
            self._forget_what_is_done_again("skipped.jsonl")
            self.tensorboard = SummaryWriter(run / "tensorboard", purge_step=state.step + 1)
            trained = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
            whole = sum(p.numel() for p in model.parameters()) / 1e6
            self.say(f"{whole:.2f} M parameters, {trained:.2f} M of them train; {total} steps on {ranks.world_size} ranks")
            if config.train.precision == "bf16" and not engines.computes_in_bf16(config.train, ranks.device.type):
                self.say("computing in fp32: this CPU has no instructions for bf16")
            if state.step:
                self.say(f"going on from the checkpoint of step {state.step} of {total}")

    def _forget_what_is_done_again(self, name: str) -> None:
        path = self.run / name
        if not path.exists():
            return
        lines = path.read_text().splitlines()
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= self.state.step]  # the last may be half a line
        write_whole(path, "".join(f"{line}\n" for line in kept))

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
                self.state.usual = USUAL * self.state.usual + (1 - USUAL) * done.mean if self.state.usual else done.mean
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
            * (each[slowest] > STRAGGLES * mean)
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
        if self.ranks.first:
            with open(self.run / "skipped.jsonl", "a") as file:
                file.writelines(json.dumps({"step": self.state.step, "rank": rank, "why": why} | part) + "\n" for rank, part in enumerate(parts))
        self.say(f"step {self.state.step}/{self.total}  warning: {why}, the step is left out; its clips are in skipped.jsonl")

    def dev(self, real: float, swapped: float, seconds: float) -> None:
        self._write({"dev_bleu4": real, "dev_bleu4_swapped": swapped, "dev_seconds": seconds})
        if self.ranks.first and self.state.step == self.total:
            plain = {name: value if isinstance(value, bool | int | float | str) else str(value) for name, value in cfg.flat(self.config).items()}
            self.tensorboard.add_hparams(plain, {"hparams/dev_bleu4": real}, run_name=".", global_step=self.state.step)
        self.say(f"step {self.state.step}/{self.total}  dev BLEU-4 {real:.2f}, from swapped videos {swapped:.2f}")
        if real < 2 * swapped + 1 and self.state.step > self.total / 4:
            self.say("warning: dev scores are no better with the right video than with another: the model does not look at its input yet")

    def show(self, model: Translator, said: dict[str, Prediction]) -> None:
        """The first dev clips in TensorBoard: the sentences, where the model looks while it says them, and, once a start, the clips."""
        from flallm import plots  # rank 0 alone draws, and not before its first look at dev

        clips = Clips("dev", self.config.data, self.config.seed)
        model.eval()
        metas = ((number, clips.shards.meta(number)) for number in range(len(clips.shards)))  # one by one: the first will do
        found = ((number, said[meta["key"]]) for number, meta in metas if meta and meta["key"] in said)
        for number, one in islice(found, SHOWN):
            self.tensorboard.add_text(f"dev/{one.key}", f"reference: {one.reference}\n\nhypothesis: {one.hypothesis}", self.state.step)
            batch = clips.batch(model.text, [(None, number)])
            if not self.shown and not clips.features:
                self.tensorboard.file_writer.add_summary(plots.gif(f"dev/{one.key}", batch.frames), self.state.step)
            with engines.precision(self.config.train, self.ranks.device):
                looks = model.attention(batch.to(self.ranks.device), one.hypothesis)
            if looks:
                self.tensorboard.add_figure(f"dev_attention/{one.key}", plots.attention(looks), self.state.step)
        self.shown = True
        model.train()

    def leave_out(self, seconds: float) -> None:
        """Time that is not to be counted as training."""
        self.last += seconds
        self.outside += seconds

    def up_to_now(self) -> State:
        self.state.seconds = self.before + time.monotonic() - self.began
        return self.state

    def _write(self, values: dict[str, float]) -> None:
        if self.ranks.first:
            with open(self.run / "metrics.jsonl", "a") as file:
                file.write(json.dumps({"step": self.state.step, "seconds": round(self.up_to_now().seconds, 2), **values}) + "\n")
            for name, value in values.items():
                self.tensorboard.add_scalar(name, value, self.state.step)

    def say(self, line: str) -> None:
        if self.ranks.first:
            print(f"{self.config.stage}  {line}", flush=True)


def environment(ranks: Ranks) -> dict:
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
    root = Path(__file__).parents[1]
    if not (root / ".git").exists() or not shutil.which("git"):
        return None
    return subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip() or None
