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

# What may differ from the recipe a run was begun with. All else would make the two halves of the run two different runs.
MUTABLE_ON_RESUME = (
    "name", "data.shards", "data.workers", "data.fps", "data.prefetch_mib", "data.cache", "encoder.weights", "llm.path", "decode.beam", "decode.max_tokens", "decode.length_penalty",
    "decode.batch", "checkpoint", "train.micro_batches", "train.deepspeed", "train.spike", "train.log_every", "train.dev_every", "train.dev_clips", "train.max_skipped", "train.timeout",
)  # fmt: skip


def build_model(
    config: Config, stage1: Path | None, origin: str | None, ranks: DistContext
) -> Translator:
    """The model that a run begins with. origin: `weights_sha256` of its stage 1."""
    model = Translator(config, TranslationTokenizer(config.llm))
    if config.stage == "stage2":
        load_stage1_encoder(model, config, stage1)
        if len({*ranks.gather(origin), *ranks.gather(weights_sha256(stage1))}) > 1:
            raise UserError(
                f"--stage1: {stage1} got a better checkpoint while this start read it: start again"
            )
    return model


def check_fits(config: Config, frames: int, model: Translator) -> None:
    """Refuses clips of so many frames, and sentences, that are longer than what the language model takes."""
    text, features = model.text, -(-int(frames) // config.llm.stack)
    if features > text.longest:
        raise UserError(
            f"data.max_frames: a clip has {features} features, and {text.longest} is what the language model takes: raise data.stride or llm.stack"
        )
    if config.decode.max_tokens > text.longest:
        raise UserError(
            f"decode.max_tokens: {config.decode.max_tokens} are more than the {text.longest} that the language model takes"
        )
    if config.stage != "stage1" and not text.config.is_encoder_decoder:  # one sequence for all
        together, places = (
            len(text.before) + features + len(text.after) + config.decode.max_tokens,
            getattr(text.config, "max_position_embeddings", math.inf),
        )
        if together > places:
            raise UserError(
                f"decode.max_tokens: prompt, features and answer have {together} places, and {places} are what the language model has"
            )


def find_resume_checkpoint(
    config: Config, run: Path, ranks: DistContext, data: dict, origin: str | None
) -> tuple[Path, dict] | None:
    """The newest good checkpoint, if it is one of this recipe, data and, in stage 2, encoder."""
    found = latest_valid(run, ranks)
    if not found:
        return None
    check_same(found[1]["config"], config, run)
    if found[1]["data"] != data:
        raise UserError(
            f"{run} was begun with other data: data.shards had {found[1]['data']['clips']} clips and has {data['clips']}, or others. Name another --run_dir"
        )
    if origin and found[1].get("stage1", origin) != origin:
        raise UserError(
            f"{run} was begun with the encoder of another stage 1, or of an earlier checkpoint of it. Name another --run_dir, or remove it"
        )
    return found


def check_same(
    theirs: dict[str, object],
    config: Config,
    run: Path,
    option: str = "--run_dir",
    free: tuple[str, ...] = MUTABLE_ON_RESUME,
) -> None:
    """Refuses a recipe that is another than the one, {"a.b": value}, that a run was begun with. option: where to name another folder; free: what may differ."""
    theirs, mine = (
        json.loads(json.dumps(values)) for values in (cfg.flat(Config()) | theirs, cfg.flat(config))
    )  # a field may be younger than the run
    differing = [
        f"{name} was {theirs[name]} and is {value}"
        for name, value in mine.items()
        if theirs[name] != value and not name.startswith(free)
    ]
    if differing:
        raise UserError(
            f"{run} was begun with another recipe: {'; '.join(differing)}. Name another {option}, or go on with what it was"
        )


def load_stage1_encoder(model: Translator, config: Config, stage1: Path | None) -> None:
    """Puts the encoder of a stage-1 run into the model."""
    if stage1 is None:
        raise UserError("stage2 needs --stage1 RUN: the folder of a finished stage-1 run")
    theirs = cfg.from_dict(Config, cfg.read_run(stage1), str(stage1 / "config.yaml"))
    for name in (
        "encoder",
        "data.resize",
        "data.crop",
        "data.stride",
        *(["light_t"] if model.input == "light_t" else []),
    ):
        for field, value in cfg.flat(config).items():
            if (
                field.startswith(name)
                and field != "encoder.weights"
                and cfg.flat(theirs)[field] != value
            ):
                raise UserError(
                    f"{field} is {value} here but {cfg.flat(theirs)[field]} in {stage1}: the encoder would see something else"
                )
    load_best(stage1, model.encoder, "encoder.")
    if model.input == "light_t":
        load_best(stage1, model.light_t.adapter, "adapter.")
        load_best(stage1, model.light_t.encoder, "language.model.encoder.")
    if model.input == "words":
        if not theirs.train.word_loss:
            raise UserError(
                f"llm.input: words are those of a stage 1 with train.word_loss, {stage1} has none"
            )
        if (
            TranslationTokenizer(
                replace(theirs.llm, path=str(stage1 / "llm"))
            ).tokenizer.get_vocab()
            != model.text.tokenizer.get_vocab()
        ):
            raise UserError(
                f"llm.input: {stage1} knows the words of {theirs.llm.path}, not those of {config.llm.path}: train a stage 1 with --llm.path={config.llm.path}"
            )
        load_best(stage1, model.words, "words.")
