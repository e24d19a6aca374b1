"""Decoding a split over all ranks, every clip once, and what is written of it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from flallm import config as cfg
from flallm.config import Config, Decode
from flallm.data.dataset import Batch, ClipDataset, batches
from flallm.data.tokenizer import TranslationTokenizer
from flallm.distributed.context import DistContext, precision
from flallm.evaluation import metrics
from flallm.model.translator import Translator
from flallm.model.weights import load_best, load_weights
from flallm.utils import UserError, atomic_write, ensure_dir, progress

SAME_SENTENCE = 0.1  # share of the clips whose swapped video may show the same sentence


@dataclass(frozen=True)
class Prediction:
    key: str
    reference: str
    hypothesis: str


def decode_split(
    model: Translator,
    config: Config,
    split: str,
    ranks: DistContext,
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
    clips = ClipDataset(split, config.data, config.seed)
    check_features(clips, model)
    if title and ranks.is_main and (warning := clips.shards.color_warning()):
        print(f"warning: {warning}", file=sys.stderr)
    count = len(clips.used)
    # Some of them are taken from everywhere: a video's or a signer's clips lie one after another.
    numbers = np.arange(count) if not limit or limit >= count else np.unique(np.linspace(0, count - 1, limit).astype(int))
    mine = numbers[np.argsort(clips.used[numbers], kind="stable")][ranks.rank :: ranks.world_size]  # alike in length and work
    groups = [[(None, int(n)) for n in mine[i : i + decode.batch]] for i in range(0, len(mine), decode.batch)]
    was_training = model.training
    model.eval()
    found, bad = [], []
    with precision(config.train, ranks.device), progress(len(mine), "clip", title, bool(title) and ranks.is_main) as bar:
        for batch in batches(clips, model.text, groups, workers):
            bad += batch.bad
            bar.update(len(batch.bad) + sum(map(bool, batch.keys)))
            if any(batch.keys):
                batch = change(batch) if change else batch
                found += zip(batch.keys, batch.texts, model.translate(batch.to(ranks.device), decode))
    model.train(was_training)
    predictions = [Prediction(*p) for part in ranks.gather(found) for p in part]
    return sorted(predictions, key=lambda p: p.key), [b for part in ranks.gather(bad) for b in part]


def check_features(clips: ClipDataset, model: Translator) -> None:
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


def swapped(hypotheses: list[str], references: list[str]) -> list[str]:
    """For each clip what the model says of the clip half a split further. Scored against this clip's
    reference it is as high as the real score when the model does not look at its input.

    Where over a tenth of the clips would get one with the same sentence (as where signers repeat the
    same list), clips are put in the order of their sentences first, so that they get another one."""
    half = len(references) // 2
    order = list(range(len(references)))
    same = sum(a == b for a, b in zip(references, references[half:] + references[:half]))
    if same > SAME_SENTENCE * len(references):
        order.sort(key=references.__getitem__)
    other = dict(zip(order, order[half:] + order[:half]))
    return [hypotheses[other[i]] for i in range(len(references))]


def swapped_score(predictions: list[Prediction], convention: str, name: str) -> float:
    """A score of the same clips decoded from swapped videos."""
    hypotheses, references = [p.hypothesis for p in predictions], [p.reference for p in predictions]
    return metrics.point_estimate(swapped(hypotheses, references), references, convention, name)


def hardly_looks(real: float, blind: float) -> bool:
    """Whether a score is so near to that of wrong videos that the model hardly looks at its input:
    less than one point over twice as high, and at least half as far from 100. The second matters for
    BLEU-1 of a few isolated signs, of which a blind guess gets more than half."""
    return real < 2 * blind + 1 and 100 - real >= (100 - blind) / 2


def reachable_score(references: list[str], text: TranslationTokenizer, convention: str, name: str) -> float:
    """A score of the references once they have been to the tokenizer and back, what no model with this tokenizer gets past. Less than 100 where it lacks
    words, or writes them otherwise: mBART's has no full-width commas."""
    said = [text.decode(text.tokenizer(reference, add_special_tokens=False)["input_ids"]) for reference in references]
    return metrics.point_estimate(said, references, convention, name)


def load_run(run: Path, device: torch.device, shards: str = "") -> tuple[Translator, Config]:
    """The best model of a run folder, ready to translate. shards: as in `config.read_run`."""
    config = cfg.from_dict(Config, cfg.read_run(run, shards), str(run / "config.yaml"))
    model = empty_model_of_run(config, run)
    if (run / "model.safetensors").is_file():  # by `flallm export`
        load_weights(run, model)
    else:
        load_best(run, model)
    return model.to(device).eval(), config


def empty_model_of_run(config: Config, run: Path) -> Translator:
    """The model of a run, for a checkpoint to fill: what no checkpoint holds, weights under LoRA's, lies in the run's folder. The config is made to say so."""
    config.llm.path, config.llm.random, config.encoder.weights = str((run / "llm").resolve()), False, None
    return Translator(config, TranslationTokenizer(config.llm), weights=bool(config.llm.lora.rank))


def evaluate(run: Path, split: str, ranks: DistContext, shards: str = "") -> dict:
    """Writes predictions/<split>.jsonl and scores/<split>.json of a run and returns the scores."""
    model, config = load_run(run, ranks.device, shards)
    ensure_dir(run)  # which is there; whether it can be written into is better known now
    predictions, bad = decode_split(model, config, split, ranks, config.decode, workers=config.data.workers, title=split)
    hypotheses, references = [p.hypothesis for p in predictions], [p.reference for p in predictions]
    if not predictions:
        raise UserError(f"no clip of {split} in {config.data.shards} could be decoded")
    scores: dict = {}
    if ranks.is_main:
        names = [config.convention, *(c for c in metrics.CONVENTIONS if c != config.convention)]
        scores = metrics.scores(hypotheses, references, names)
        leading = scores["leading"] = scores[config.convention]["leading"]
        for name in dict.fromkeys(("bleu4", leading)):
            scores[f"swapped_{name}"] = swapped_score(predictions, config.convention, name)
            scores[f"reachable_{name}"] = reachable_score(references, model.text, config.convention, name)
        scores["bad_samples"] = len(bad)
        for folder in ("predictions", "scores"):
            ensure_dir(run / folder)
        (run / f"scores/{split}.json").unlink(missing_ok=True)  # those of predictions before these
        atomic_write(run / f"predictions/{split}.jsonl", "".join(json.dumps(vars(p), ensure_ascii=False) + "\n" for p in predictions))
        atomic_write(run / f"scores/{split}.json", json.dumps(scores, indent=1))
        note_bad_samples(run, bad)
        if note := metrics.leading_note(leading):
            print(note, file=sys.stderr)
        reachable = scores[f"reachable_{leading}"]
        if reachable < metrics.REACHABLE:
            most = f"{metrics.LABELS[leading]} {reachable:.2f} is the most that can be reached"
            print(f"warning: the tokenizer of {run} cannot say all references as they are: {most}", file=sys.stderr)
    return scores


def note_bad_samples(run: Path, bad: list[dict]) -> None:
    with open(run / "bad_samples.jsonl", "a", encoding="utf-8") as file:
        file.writelines(json.dumps(b, ensure_ascii=False) + "\n" for b in bad)
