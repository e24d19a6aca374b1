"""Decoding a split over all ranks, every clip once, and what is written of it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from flallm import UserError, checkpoint, engine, make_folder, metrics, progress, write_whole
from flallm import config as cfg
from flallm.config import Config, Decode
from flallm.engine import Ranks
from flallm.loader import Batch, Clips, batches
from flallm.model.translator import Translator
from flallm.shards import frame_rate_of
from flallm.text import Text


@dataclass(frozen=True)
class Prediction:
    key: str
    reference: str
    hypothesis: str


def decode_split(
    model: Translator,
    config: Config,
    split: str,
    ranks: Ranks,
    decode: Decode,
    *,
    workers: int,
    limit: int = 0,
    change: Callable[[Batch], Batch] | None = None,
    title: str = "",
) -> tuple[list[Prediction], list[dict]]:
    """(a prediction for each of the split's clips, in the order of their keys; samples left out). On every rank the same.
    workers: processes that decode video. limit: so many of the clips, 0 all. change: what is done to batches before the model sees them. title: what is
    said while it takes its time; nothing where it is empty."""
    clips = Clips(split, config.data, config.seed)
    check_features(clips, model)
    count = len(clips.used)
    # Some of them are taken from everywhere: a video's or a signer's clips lie one after another.
    numbers = np.arange(count) if not limit or limit >= count else np.unique(np.linspace(0, count - 1, limit).astype(int))
    mine = numbers[np.argsort(clips.used[numbers], kind="stable")][ranks.rank :: ranks.world_size]  # alike in length and work
    groups = [[(None, int(n)) for n in mine[i : i + decode.batch]] for i in range(0, len(mine), decode.batch)]
    was_training = model.training
    model.eval()
    found, bad = [], []
    with engine.precision(config.train, ranks.device), progress(len(mine), "clip", title, bool(title) and ranks.first) as bar:
        for batch in batches(clips, model.text, groups, workers):
            bad += batch.bad
            bar.update(len(batch.bad) + sum(map(bool, batch.keys)))
            if any(batch.keys):
                batch = change(batch) if change else batch
                found += zip(batch.keys, batch.texts, model.translate(batch.to(ranks.device), decode))
    model.train(was_training)
    predictions = [Prediction(*p) for part in ranks.gather(found) for p in part]
    return sorted(predictions, key=lambda p: p.key), [b for part in ranks.gather(bad) for b in part]


def check_features(clips: Clips, model: Translator) -> None:
    """Refuses features that the model's own encoder would not make of these clips."""
    made, folder = clips.features, clips.shards.folder
    if not made:
        return
    if model.input == "frames":
        raise UserError(f"{folder} holds sign-wise features: llm.input=frames needs shards of video")
    for field in ("resize", "crop", "stride", "max_frames"):
        if made.get(field) != getattr(clips.data, field):
            raise UserError(
                f"{folder} holds features made with data.{field}={made.get(field)}, not {getattr(clips.data, field)}: make them again with flallm features"
            )
    if made["copies"] and made.get("augment") != asdict(clips.data.augment):
        raise UserError(f"{folder} holds features of copies augmented in another way than data.augment says: make them again with flallm features")
    if made.get("encoder_sha256") != model.encoder.sha256():
        raise UserError(f"{folder} holds features of another encoder: make them again with flallm features from the run this encoder is of")


def swapped_bleu4(predictions: list[Prediction], convention: str) -> float:
    """BLEU-4 of the same clips decoded from swapped videos: what the model says of another clip against this clip's
    reference. As high as the real score when it does not look at its input."""
    half = len(predictions) // 2
    hypotheses = [p.hypothesis for p in predictions[half:] + predictions[:half]]
    return metrics.bleu4(hypotheses, [p.reference for p in predictions], convention)


def reachable_bleu4(references: list[str], text: Text, convention: str) -> float:
    """BLEU-4 of the references once they have been to the tokenizer and back, what no model with this tokenizer gets past. Less than 100 where it lacks
    words, or writes them otherwise: mBART's has no full-width commas."""
    said = [text.decode(text.tokenizer(reference, add_special_tokens=False)["input_ids"]) for reference in references]
    return metrics.bleu4(said, references, convention)


def load_run(
    run: Path,
    device: torch.device,
    shards: str | None = None,
) -> tuple[Translator, Config]:
    """The best model of a run folder, ready to translate. shards: see `config.read_run`."""
    config = cfg.from_dict(Config, cfg.read_run(run, shards), str(run / "config.yaml"))
    model = of_run(config, run)
    if (run / "model.safetensors").is_file():  # by `flallm export`
        checkpoint.load_model(run, model)
    else:
        checkpoint.load(run, model)
    return model.to(device).eval(), config


def load_run_and_shards(
    run: Path,
    device: torch.device,
    shards: str | None,
) -> tuple[Translator, Config]:
    """As `load_run`, for a command that reads the run's shards. Raises UserError without them."""
    data = cfg.from_dict(Config, cfg.read_run(run, shards), str(run / "config.yaml")).data
    try:
        fps = frame_rate_of(data.shards)
    except UserError as error:
        hint = f"--shards=DIR names where the shards of {run} are now"
        raise UserError(f"{error}. {hint}") from None
    if data.fps not in (0, fps):
        differ = f"{data.shards} has {fps:g} frames a second, {run} was trained at {data.fps:g}"
        raise UserError(f"{differ}: make the shards with make_shards.py --fps={data.fps:g}")
    return load_run(run, device, shards)


def of_run(config: Config, run: Path) -> Translator:
    """The model of a run, for a checkpoint to fill: what no checkpoint holds, weights under LoRA's, lies in the run's folder. The config is made to say so."""
    config.llm.path, config.llm.random, config.encoder.weights = str((run / "llm").resolve()), False, None
    return Translator(config, Text(config.llm), weights=bool(config.llm.lora.rank))


def evaluate(run: Path, split: str, ranks: Ranks, shards: str | None = None) -> dict:
    """Writes predictions/<split>.jsonl and scores/<split>.json of a run and returns the scores."""
    model, config = load_run_and_shards(run, ranks.device, shards)
    make_folder(run)  # which is there; whether it can be written into is better known now
    predictions, bad = decode_split(model, config, split, ranks, config.decode, workers=config.data.workers, title=split)
    hypotheses, references = [p.hypothesis for p in predictions], [p.reference for p in predictions]
    if not predictions:
        raise UserError(f"no clip of {split} in {config.data.shards} could be decoded")
    scores: dict = {}
    if ranks.first:
        names = [config.convention, *(c for c in metrics.CONVENTIONS if c != config.convention)]
        scores = metrics.scores(hypotheses, references, names)
        scores["swapped_bleu4"] = swapped_bleu4(predictions, config.convention)
        scores["reachable_bleu4"] = reachable_bleu4(references, model.text, config.convention)
        scores["bad_samples"] = len(bad)
        for folder in ("predictions", "scores"):
            make_folder(run / folder)
        (run / f"scores/{split}.json").unlink(missing_ok=True)  # those of predictions before these
        write_whole(run / f"predictions/{split}.jsonl", "".join(json.dumps(vars(p), ensure_ascii=False) + "\n" for p in predictions))
        write_whole(run / f"scores/{split}.json", json.dumps(scores, indent=1))
        note_bad_samples(run, bad)
        if scores["reachable_bleu4"] < metrics.REACHABLE:
            print(
                f"warning: the tokenizer of {run} cannot say all references as they are: BLEU-4 {scores['reachable_bleu4']:.2f} is the most that can be reached",
                file=sys.stderr,
            )
    return scores


def note_bad_samples(run: Path, bad: list[dict]) -> None:
    with open(run / "bad_samples.jsonl", "a") as file:
        file.writelines(json.dumps(b, ensure_ascii=False) + "\n" for b in bad)
