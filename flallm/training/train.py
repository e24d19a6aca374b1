"""The training loop: one for stage 1, stage 2 and the joint baseline.

What differs between the stages is in `Translator`.
"""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from zlib import crc32

import numpy as np
import torch

from flallm import config as cfg
from flallm.config import Config, Data
from flallm.data.dataset import Batch, ClipDataset, batches
from flallm.data.sampler import BatchSampler, make_sampler, rank_batches
from flallm.data.storage import absolute
from flallm.distributed.context import DistContext
from flallm.distributed.failures import EXIT_REQUEUE, PreemptionHandler
from flallm.distributed.prefetch import prefetch_to_device
from flallm.distributed.zero import gathered_parameters
from flallm.evaluation import metrics
from flallm.evaluation.decode import (
    check_features,
    decode_split,
    empty_model_of_run,
    mismatched_score,
    note_bad_samples,
)
from flallm.model.translator import Translator
from flallm.model.weights import checkpoint_steps, load_weights, run_progress, weights_sha256
from flallm.training.checkpoint import (
    CheckpointManager,
    DiskError,
    TrainingState,
    lock,
    restore_state,
)
from flallm.training.logger import MetricLogger, environment
from flallm.training.optim import schedule, set_learning_rates
from flallm.training.resume import build_model, check_fits, find_resume_checkpoint
from flallm.training.step import StepVotes, start_engine, train_step
from flallm.utils import UserError


@dataclass
class Setup:
    """What a run consists of before its first step.

    checkpoint: (folder, manifest) of the checkpoint that the run goes on from, None for a new run.
    fingerprint: what tells the training clips from others; kept in every checkpoint.
    stage1_sha256: of the weights that stage 2 takes its encoder from.
    """

    config: Config
    run: Path
    ranks: DistContext
    stage1: Path | None
    clips: ClipDataset
    sampler: BatchSampler
    total_steps: int
    fingerprint: dict[str, int]
    stage1_sha256: str | None
    checkpoint: tuple[Path, dict] | None
    model: Translator
    engine: object


@dataclass
class Trainer:
    """What the loop works with: the setup, the state that a checkpoint keeps, and its helpers."""

    setup: Setup
    state: TrainingState
    loader: Iterator[Batch]
    log: MetricLogger
    checkpoints: CheckpointManager
    preemption: PreemptionHandler


def train(config: Config, run: Path, ranks: DistContext, stage1: Path | None = None) -> None:
    """Trains a run into its folder, from its newest valid checkpoint if it has one.

    Stage 2 takes its encoder from the best checkpoint of the run `stage1`. After a signal to stop,
    the run saves a checkpoint and exits with `EXIT_REQUEUE`; the same command resumes it.
    """
    steps_on_disk = ranks.gather(checkpoint_steps(run))[0]
    setup = build(config, run, ranks, stage1)
    with lock(run, ranks), PreemptionHandler() as preemption, contextlib.ExitStack() as cleanup:
        if ranks.gather(checkpoint_steps(run))[0] != steps_on_disk:
            raise UserError(f"{run} was written to while this start read it: start again")
        train_steps(resume(setup, preemption, cleanup))


def train_steps(trainer: Trainer) -> None:
    """The steps that are left, each with what follows it: log, validation, checkpoint, stop."""
    setup, state, log = trainer.setup, trainer.state, trainer.log
    config, ranks, engine = setup.config.train, setup.ranks, setup.engine
    dev_every = config.dev_every or setup.sampler.steps(0)
    first_step = state.step + 1
    engine.train()
    for state.step in range(first_step, setup.total_steps + 1):
        is_last = state.step == setup.total_steps
        with log.waiting():
            micro_batches = [next(trainer.loader) for _ in range(config.micro_batches)]
        factor = schedule(config, state.step - 1, setup.total_steps)
        rates = set_learning_rates(engine, config, factor)
        votes = StepVotes(
            tokens=sum(batch.tokens for batch in micro_batches),
            stop=trainer.preemption.stop,
            checkpoint_written=trainer.checkpoints.written,
            checkpoint_due=trainer.checkpoints.due(),
        ).agree(ranks)
        result = train_step(
            engine, micro_batches, ranks, votes.tokens, max_loss(trainer), norms=log.is_due()
        )
        log.step(result, micro_batches, rates)
        abort_after_too_many_skips(trainer)
        scores = None
        if state.step % dev_every == 0 or is_last:
            with gathered_parameters(engine):
                scores = validate(setup.model, setup.config, ranks, log)
        save_checkpoint(trainer, votes, scores, is_last)
        if votes.stop and not is_last:
            progress = f"step {state.step}/{setup.total_steps}"
            log.info(f"{progress}  asked to stop: all is saved, rerun the same command to resume")
            raise SystemExit(EXIT_REQUEUE)


def build(config: Config, run: Path, ranks: DistContext, stage1: Path | None) -> Setup:
    """Opens the data, finds the checkpoint to resume from, and builds the model and its engine."""
    clips = ClipDataset("train", config.data, config.seed)
    # A missing dev split is better noticed now than after an epoch.
    dev = ClipDataset("dev", config.data, config.seed)
    if clips.features and config.frozen != "encoder":
        raise UserError(
            f"{config.data.shards} holds features: {config.stage} trains the encoder and needs "
            "shards of video"
        )
    config = replace(config, data=recorded(config.data, clips.shards.fps))
    lengths = clips.shards.index["text_length"]
    sampler = make_sampler(config, clips.used, lengths, ranks.world_size)
    checksums = np.ascontiguousarray(clips.shards.index["checksum"])
    fingerprint = {"clips": len(sampler.frames), "crc32": crc32(checksums)}
    stage1_sha256 = None
    if config.stage == "stage2" and stage1 and (stage1 / "checkpoints").is_dir():
        stage1_sha256 = weights_sha256(stage1)
    checkpoint = find_resume_checkpoint(config, run, ranks, fingerprint, stage1_sha256)
    torch.manual_seed(config.seed)  # all ranks start from the same weights
    if checkpoint:
        # The run has its own tokenizer, because llm.path may be another by now.
        model = empty_model_of_run(copy.deepcopy(config), run)
        load_weights(checkpoint[0], model)
    else:
        model = build_model(config, stage1, stage1_sha256, ranks)
    total_steps = config.train.steps or sampler.total(config.train.epochs)
    check_fits(config, np.concatenate([clips.used, dev.used]).max(), model)
    check_features(clips, model)
    engine = start_engine(model.to(ranks.device), config.train, ranks)
    return Setup(
        config=config,
        run=run,
        ranks=ranks,
        stage1=stage1,
        clips=clips,
        sampler=sampler,
        total_steps=total_steps,
        fingerprint=fingerprint,
        stage1_sha256=stage1_sha256,
        checkpoint=checkpoint,
        model=model,
        engine=engine,
    )


def resume(setup: Setup, preemption: PreemptionHandler, cleanup: contextlib.ExitStack) -> Trainer:
    """Puts the run where its checkpoint was written, or at its start.

    cleanup: closes the loader when training ends.
    """
    config, ranks, checkpoint = setup.config, setup.ranks, setup.checkpoint
    torch.manual_seed(config.seed * 1000 + ranks.rank + 1)  # ranks drop out different units
    first = checkpoint[1]["step"] if checkpoint else 0
    groups = rank_batches(setup.sampler, ranks.rank, first, setup.total_steps)
    decoded = batches(setup.clips, setup.model.text, groups, config.data.workers)
    loader = cleanup.enter_context(contextlib.closing(prefetch_to_device(decoded, ranks.device)))
    state, stage1_sha256 = TrainingState(), setup.stage1_sha256
    if checkpoint:
        state = restore_state(*checkpoint, setup.engine, ranks, config.seed)
        stage1_sha256 = checkpoint[1].get("stage1", stage1_sha256)
    with gathered_parameters(setup.engine):
        log = MetricLogger(config, setup.run, ranks, setup.total_steps, setup.model, state)
    warn_before_training(setup, log)
    metadata = {
        "data": setup.fingerprint,
        "stage1": stage1_sha256,
        "steps": setup.total_steps,
        "config": cfg.flat(config),
        "environment": environment(ranks),
    }
    checkpoints = CheckpointManager(setup.run, ranks, config.checkpoint, metadata)
    return Trainer(setup, state, loader, log, checkpoints, preemption)


def warn_before_training(setup: Setup, log: MetricLogger) -> None:
    """Logs what a person should know of the data and of stage 1."""
    if color_warning := setup.clips.shards.color_warning():
        log.warning(color_warning)
    if setup.config.stage == "stage2" and not setup.checkpoint:
        reached, last = run_progress(setup.stage1)
        if reached < last:
            log.warning(
                f"{setup.stage1} has got to step {reached} of {last}: this run takes the best "
                "encoder it has so far"
            )


def recorded(data: Data, fps: float) -> Data:
    """The data section that a run's config.yaml records.

    Its paths are absolute, so that commands find the shards from any folder. Its frame rate is the
    shards'.
    """
    cache = absolute(data.cache) if data.cache else ""
    return replace(data, shards=absolute(data.shards), cache=cache, fps=fps)


def max_loss(trainer: Trainer) -> float | None:
    """The loss a token above which a step is skipped; None where the recipe sets no limit."""
    spike = trainer.setup.config.train.spike
    if not spike:
        return None
    return spike * trainer.state.loss_ema or math.inf


def abort_after_too_many_skips(trainer: Trainer) -> None:
    limit = trainer.setup.config.train.max_skipped
    if trainer.state.skipped_in_a_row >= limit:
        abort(
            trainer,
            f"{limit} steps in a row had to be left out, see {trainer.setup.run}/skipped.jsonl; "
            "the last good checkpoint is kept",
        )


def save_checkpoint(
    trainer: Trainer, votes: StepVotes, scores: dict[str, float] | None, is_last: bool
) -> None:
    """Begins a checkpoint if one is due, or completes the one that all ranks have written.

    scores: of the dev split, by name, where it was decoded after this step.
    """
    setup, checkpoints, step = trainer.setup, trainer.checkpoints, trainer.state.step
    every = setup.config.checkpoint.every
    is_due = votes.checkpoint_due or (every and step % every == 0)
    try:
        if scores or votes.stop or is_due:
            checkpoints.save(setup.engine, trainer.log.snapshot(), scores)
        elif votes.checkpoint_written:
            checkpoints.finalize()
        if votes.stop or is_last:
            checkpoints.close()
    except DiskError as error:
        abort(trainer, f"{error}; the checkpoints before it are kept")


def abort(trainer: Trainer, reason: str) -> None:
    """Ends the run with exit code 1, once the checkpoint in progress is complete."""
    trainer.log.error(reason)
    with contextlib.suppress(DiskError):
        trainer.checkpoints.close()
    raise SystemExit(1)


def validate(
    model: Translator, config: Config, ranks: DistContext, log: MetricLogger
) -> dict[str, float]:
    """Decodes dev greedily and returns BLEU-4 and the leading score by their names.

    A run's first look at dev decides which score leads, so that all of its checkpoints are measured
    by the same.
    """
    began = time.monotonic()
    greedy = replace(config.decode, beam=1, batch=max(config.decode.batch, 32))
    predictions, bad_samples = decode_split(
        model,
        config,
        "dev",
        ranks,
        greedy,
        workers=min(1, config.data.workers),  # those of training are there too
        limit=config.train.dev_clips,
    )
    if ranks.is_main and bad_samples:
        note_bad_samples(log.run, bad_samples)
    if not predictions:
        raise UserError(
            f"no clip of dev in {config.data.shards} could be decoded, "
            f"see {log.run}/bad_samples.jsonl"
        )
    hypotheses = [prediction.hypothesis for prediction in predictions]
    references = [prediction.reference for prediction in predictions]
    if not log.state.leading:
        log.state.leading = metrics.leading(references, config.convention)
        log.note_leading()
    scores, mismatched_scores = {}, {}
    for name in dict.fromkeys(("bleu4", log.state.leading)):
        scores[name] = metrics.point_estimate(hypotheses, references, config.convention, name)
        mismatched_scores[name] = mismatched_score(predictions, config.convention, name)
    log.dev(scores, mismatched_scores, time.monotonic() - began)
    if ranks.is_main:
        log.show(model, {prediction.key: prediction for prediction in predictions})
    log.exclude_time(time.monotonic() - began)
    return scores
