"""What a run begins with: a new model, the encoder of stage 1, or its newest checkpoint."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

from flallm import config as cfg
from flallm.config import Config
from flallm.data.tokenizer import TranslationTokenizer
from flallm.distributed.context import DistContext
from flallm.model.translator import Translator
from flallm.model.weights import load_best, weights_sha256
from flallm.training.checkpoint import latest_valid
from flallm.utils import UserError

# Beginnings of the fields that may differ from the recipe a run was begun with. Any other would
# make the two halves of the run two different runs.
MUTABLE_ON_RESUME = (
    "name",
    *("data.shards", "data.workers", "data.fps", "data.prefetch_mib", "data.cache"),
    *("encoder.weights", "llm.path"),
    *("decode.beam", "decode.max_tokens", "decode.length_penalty", "decode.batch"),
    "checkpoint",
    *("train.micro_batches", "train.deepspeed", "train.spike", "train.log_every"),
    *("train.dev_every", "train.dev_clips", "train.max_skipped", "train.timeout"),
)


def build_model(
    config: Config, stage1: Path | None, stage1_sha256: str | None, ranks: DistContext
) -> Translator:
    """The model that a new run begins with.

    stage1_sha256: `weights_sha256` of the run `stage1`, read before.
    """
    model = Translator(config, TranslationTokenizer(config.llm))
    if config.stage == "stage2":
        load_stage1_encoder(model, config, stage1)
        seen = {*ranks.gather(stage1_sha256), *ranks.gather(weights_sha256(stage1))}
        if len(seen) > 1:
            raise UserError(
                f"--stage1: {stage1} got a better checkpoint while this start read it: start again"
            )
    return model


def check_fits(config: Config, frames: int, model: Translator) -> None:
    """Refuses clips of so many used frames, and sentences, that the language model cannot take."""
    text = model.text
    features = math.ceil(int(frames) / config.llm.stack)
    if features > text.longest:
        raise UserError(
            f"data.max_frames: a clip has {features} features, and {text.longest} is what the "
            "language model takes: raise data.stride or llm.stack"
        )
    max_tokens = config.decode.max_tokens
    if max_tokens > text.longest:
        raise UserError(
            f"decode.max_tokens: {max_tokens} are more than the {text.longest} that the language "
            "model takes"
        )
    if config.stage == "stage1" or text.config.is_encoder_decoder:
        return
    # A decoder-only model has one sequence for prompt, features and answer.
    positions = len(text.before) + features + len(text.after) + max_tokens
    limit = getattr(text.config, "max_position_embeddings", math.inf)
    if positions > limit:
        raise UserError(
            f"decode.max_tokens: prompt, features and answer have {positions} places, and {limit} "
            "are what the language model has"
        )


def find_resume_checkpoint(
    config: Config, run: Path, ranks: DistContext, fingerprint: dict, stage1_sha256: str | None
) -> tuple[Path, dict] | None:
    """(folder, manifest) of the newest valid checkpoint; None for a new run.

    Raises UserError where it is of another recipe, other clips or, in stage 2, another encoder.
    """
    checkpoint = latest_valid(run, ranks)
    if checkpoint is None:
        return None
    _, manifest = checkpoint
    check_same(manifest["config"], config, run)
    if manifest["data"] != fingerprint:
        saved, current = manifest["data"]["clips"], fingerprint["clips"]
        raise UserError(
            f"{run} was begun with other data: data.shards had {saved} clips and has {current}, "
            "or others. Name another --run_dir"
        )
    if stage1_sha256 and manifest.get("stage1", stage1_sha256) != stage1_sha256:
        raise UserError(
            f"{run} was begun with the encoder of another stage 1, or of an earlier checkpoint of "
            "it. Name another --run_dir, or remove it"
        )
    return checkpoint


def check_same(
    saved: dict[str, object],
    config: Config,
    run: Path,
    option: str = "--run_dir",
    mutable: tuple[str, ...] = MUTABLE_ON_RESUME,
) -> None:
    """Refuses a recipe that differs from the one, {"a.b": value}, that a run was begun with.

    option: the one that names another folder; mutable: beginnings of fields that may differ.
    """
    saved = _as_json(cfg.flat(Config()) | saved)  # a field may be younger than the run
    differences = []
    for name, value in _as_json(cfg.flat(config)).items():
        if saved[name] != value and not name.startswith(mutable):
            differences.append(f"{name} was {saved[name]} and is {value}")
    if differences:
        raise UserError(
            f"{run} was begun with another recipe: {'; '.join(differences)}. "
            f"Name another {option}, or go on with what it was"
        )


def _as_json(values: dict[str, object]) -> dict[str, object]:
    """The values as a manifest keeps them: tuples become lists."""
    return json.loads(json.dumps(values))


def load_stage1_encoder(model: Translator, config: Config, stage1: Path | None) -> None:
    """Puts the encoder of a stage-1 run into the model, and what else `llm.input` needs of it."""
    if stage1 is None:
        raise UserError("stage2 needs --stage1 RUN: the folder of a finished stage-1 run")
    stage1_config = cfg.from_dict(Config, cfg.read_run(stage1), str(stage1 / "config.yaml"))
    _check_same_input(model, config, stage1_config, stage1)
    load_best(stage1, model.encoder, "encoder.")
    if model.input == "light_t":
        load_best(stage1, model.light_t.adapter, "adapter.")
        load_best(stage1, model.light_t.encoder, "language.model.encoder.")
    if model.input == "words":
        _check_same_words(model, config, stage1_config, stage1)
        load_best(stage1, model.words, "words.")


def _check_same_input(
    model: Translator, config: Config, stage1_config: Config, stage1: Path
) -> None:
    """Refuses a recipe with which the encoder would see something else than in stage 1."""
    sections = ["encoder", "data.resize", "data.crop", "data.stride"]
    if model.input == "light_t":
        sections.append("light_t")
    stage1_values = cfg.flat(stage1_config)
    for field, value in cfg.flat(config).items():
        if not field.startswith(tuple(sections)) or field == "encoder.weights":
            continue
        if stage1_values[field] != value:
            raise UserError(
                f"{field} is {value} here but {stage1_values[field]} in {stage1}: "
                "the encoder would see something else"
            )


def _check_same_words(
    model: Translator, config: Config, stage1_config: Config, stage1: Path
) -> None:
    """Refuses a stage 1 whose word loss has not learnt the tokens of this language model."""
    if not stage1_config.train.word_loss:
        raise UserError(
            f"llm.input: words are those of a stage 1 with train.word_loss, {stage1} has none"
        )
    saved = TranslationTokenizer(replace(stage1_config.llm, path=str(stage1 / "llm")))
    if saved.tokenizer.get_vocab() != model.text.tokenizer.get_vocab():
        path = config.llm.path
        raise UserError(
            f"llm.input: {stage1} knows the words of {stage1_config.llm.path}, "
            f"not those of {path}: train a stage 1 with --llm.path={path}"
        )
