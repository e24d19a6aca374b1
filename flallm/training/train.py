"""The training loop: one for stage 1, stage 2 and the joint baseline. What differs between them is in `Translator`."""

from __future__ import annotations

import contextlib
import copy
import math
import time
from dataclasses import replace
from pathlib import Path
from zlib import crc32

import numpy as np
import torch

from flallm import config as cfg
from flallm.config import Config, Data
from flallm.data.dataset import ClipDataset, batches
from flallm.data.sampler import make_sampler, rank_batches
from flallm.data.storage import absolute
from flallm.distributed.context import DistContext
from flallm.distributed.failures import EXIT_REQUEUE, PreemptionHandler
from flallm.distributed.prefetch import prefetch_to_device
from flallm.distributed.zero import gathered_parameters
from flallm.evaluation import metrics
from flallm.evaluation.decode import check_features, decode_split, empty_model_of_run, note_bad_samples, swapped_score
from flallm.model.translator import Translator
from flallm.model.weights import checkpoint_steps, load_weights, run_progress, weights_sha256
from flallm.training.checkpoint import CheckpointManager, DiskError, TrainingState, lock, restore_state
from flallm.training.logger import MetricLogger, environment
from flallm.training.optim import schedule, set_learning_rates
from flallm.training.resume import build_model, check_fits, find_resume_checkpoint
from flallm.training.step import start_engine, train_step
from flallm.utils import UserError


def train(config: Config, run: Path, ranks: DistContext, stage1: Path | None = None) -> None:
    """Trains a run into its folder, from its newest good checkpoint if it has one: the same command goes on where it ended.

    Stage 2 takes its encoder from the best checkpoint of the run `stage1`. Exits with `AGAIN` after a signal to stop, once all is saved.
    """
    clips, dev = (ClipDataset(split, config.data, config.seed) for split in ("train", "dev"))  # dev better missed now than after an epoch
    if clips.features and config.frozen != "encoder":
        raise UserError(f"{config.data.shards} holds features: {config.stage} trains the encoder and needs shards of video")
    config = replace(config, data=recorded(config.data, clips.shards.fps))
    plan = make_sampler(config, clips.used, clips.shards.index["text_length"], ranks.world_size)
    data = {"clips": len(plan.frames), "crc32": crc32(np.ascontiguousarray(clips.shards.index["checksum"]))}
    origin = weights_sha256(stage1) if config.stage == "stage2" and stage1 and (stage1 / "checkpoints").is_dir() else None
    there = ranks.gather(checkpoint_steps(run))[0]
    found = find_resume_checkpoint(config, run, ranks, data, origin)
    torch.manual_seed(config.seed)  # all ranks start from the same weights …
    model = (
        empty_model_of_run(copy.deepcopy(config), run) if found else build_model(config, stage1, origin, ranks)
    )  # with its own tokenizer: llm.path may be another by now
    if found:
        load_weights(found[0], model)
    text, total = model.text, config.train.steps or plan.total(config.train.epochs)
    check_fits(config, np.concatenate([clips.used, dev.used]).max(), model)
    check_features(clips, model)
    engine = start_engine(model.to(ranks.device), config.train, ranks)
    dev_every = config.train.dev_every or plan.steps(0)
    with lock(run, ranks), PreemptionHandler() as asked, contextlib.ExitStack() as leaving:
        if ranks.gather(checkpoint_steps(run))[0] != there:
            raise UserError(f"{run} was written to while this start read it: start again")
        torch.manual_seed(config.seed * 1000 + ranks.rank + 1)  # … and drop out different units
        first = found[1]["step"] if found else 0
        decoded = batches(clips, text, rank_batches(plan, ranks.rank, first, total), config.data.workers)
        loader = leaving.enter_context(contextlib.closing(prefetch_to_device(decoded, ranks.device)))
        state = restore_state(*found, engine, ranks, config.seed) if found else TrainingState()
        with gathered_parameters(engine):
            log = MetricLogger(config, run, ranks, total, text, model, state)
        if warning := clips.shards.color_warning():
            log.say(f"warning: {warning}")
        if config.stage == "stage2" and not found:
            reached, last = run_progress(stage1)
            if reached < last:
                log.say(f"warning: {stage1} has got to step {reached} of {last}: this run takes the best encoder it has so far")
        origin = found[1].get("stage1", origin) if found else origin
        writer = CheckpointManager(
            run, ranks, config.checkpoint, {"data": data, "stage1": origin, "steps": total, "config": cfg.flat(config), "environment": environment(ranks)}
        )
        engine.train()
        for state.step in range(first + 1, total + 1):
            with log.waiting():
                micro_batches = [next(loader) for _ in range(config.train.micro_batches)]
            rates = set_learning_rates(engine, config.train, schedule(config.train, state.step - 1, total))
            most = (config.train.spike * state.usual or math.inf) if config.train.spike else None
            flags = (asked.stop, writer.written, writer.due() and ranks.is_main)
            step = train_step(engine, micro_batches, ranks, *flags, most=most, norms=log.is_due())
            log.step(step, micro_batches, rates)
            stop, written, due = step.flags
            if state.skipped_in_a_row >= config.train.max_skipped:
                abort(writer, log, f"{config.train.max_skipped} steps in a row had to be left out, see {run}/skipped.jsonl; the last good checkpoint is kept")
            scores = None
            if state.step % dev_every == 0 or state.step == total:
                with gathered_parameters(engine):
                    scores = validate(model, config, ranks, log)
            try:
                if scores or stop or due or (config.checkpoint.every and state.step % config.checkpoint.every == 0):
                    writer.save(engine, log.snapshot(), scores)
                elif written == ranks.world_size:
                    writer.finalize()
                if stop or state.step == total:
                    writer.close()
            except DiskError as error:
                abort(writer, log, f"{error}; the checkpoints before it are kept")
            if stop and state.step < total:
                log.say(f"step {state.step}/{total}  asked to stop: all is saved, and the same command goes on from here")
                raise SystemExit(EXIT_REQUEUE)


def recorded(data: Data, fps: float) -> Data:
    """What a run's config.yaml has of its data: paths with which commands find it from any folder, and the shards' frame rate."""
    cache = absolute(data.cache) if data.cache else ""
    return replace(data, shards=absolute(data.shards), cache=cache, fps=fps)


def abort(writer: CheckpointManager, log: MetricLogger, why: str) -> None:
    log.say(f"error: {why}")
    with contextlib.suppress(DiskError):
        writer.close()
    raise SystemExit(1)


def validate(model: Translator, config: Config, ranks: DistContext, log: MetricLogger) -> dict[str, float]:
    """Greedy scores on dev, BLEU-4 and the one that leads, by their names. A run's first look at dev
    decides which one leads, so that all of its checkpoints are measured by the same."""
    began = time.monotonic()
    greedy = replace(config.decode, beam=1, batch=max(config.decode.batch, 32))
    workers = min(1, config.data.workers)  # those of training are there too
    predictions, bad = decode_split(model, config, "dev", ranks, greedy, workers=workers, limit=config.train.dev_clips)
    if ranks.is_main and bad:
        note_bad_samples(log.run, bad)
    if not predictions:
        raise UserError(f"no clip of dev in {config.data.shards} could be decoded, see {log.run}/bad_samples.jsonl")
    hypotheses, references = [p.hypothesis for p in predictions], [p.reference for p in predictions]
    if not log.state.leading:
        log.state.leading = metrics.leading(references, config.convention)
        log.note_leading()
    real, swapped = {}, {}
    for name in dict.fromkeys(("bleu4", log.state.leading)):
        real[name] = metrics.point_estimate(hypotheses, references, config.convention, name)
        swapped[name] = swapped_score(predictions, config.convention, name)
    log.dev(real, swapped, time.monotonic() - began)
    if ranks.is_main:
        log.show(model, {p.key: p for p in predictions})
    log.exclude_time(time.monotonic() - began)
    return real
