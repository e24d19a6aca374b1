"""Decodes a split over all ranks, every clip once, and writes its predictions and scores."""

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
from flallm.data.dataset import Batch, ClipDataset, Group, batches
from flallm.data.reader import Shards
from flallm.data.tokenizer import TranslationTokenizer
from flallm.distributed.context import DistContext, precision
from flallm.evaluation import metrics
from flallm.model.translator import Translator
from flallm.model.weights import load_best, load_weights
from flallm.utils import UserError, atomic_write, ensure_dir, progress

MAX_SAME_SENTENCE = 0.1  # share of the clips whose mismatched video may show the same sentence


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
    """Decodes a split and returns the same on every rank.

    workers: processes that decode video.
    limit: number of clips, spread evenly over the split; 0 takes all of them.
    change: changes each batch before the model reads it.
    title: label of the progress bar; without one nothing is printed.
    Returns (predictions sorted by key, bad samples as {"key", "cause"}).
    """
    clips = ClipDataset(split, config.data, config.seed)
    check_features(clips, model)
    verbose = bool(title) and ranks.is_main
    if verbose:
        warn_about_colors(clips.shards)
    groups = _groups_of_rank(clips, ranks, decode.batch, limit)
    num_clips = sum(len(group) for group in groups)
    was_training = model.training
    model.eval()
    decoded, bad = [], []
    with precision(config.train, ranks.device), progress(num_clips, "clip", title, verbose) as bar:
        for batch in batches(clips, model.text, groups, workers):
            bad += batch.bad
            bar.update(len(batch.bad))
            if batch.is_placeholder:
                continue
            bar.update(len(batch.keys))
            if change:
                batch = change(batch)
            hypotheses = model.translate(batch.to(ranks.device), decode)
            decoded += zip(batch.keys, batch.texts, hypotheses)
    model.train(was_training)
    predictions = [Prediction(*row) for part in ranks.gather(decoded) for row in part]
    bad_of_all_ranks = [sample for part in ranks.gather(bad) for sample in part]
    return sorted(predictions, key=lambda p: p.key), bad_of_all_ranks


def _groups_of_rank(
    clips: ClipDataset, ranks: DistContext, batch_size: int, limit: int
) -> list[Group]:
    """The clips of this rank in batches, without augmentation."""
    indices = np.arange(len(clips.used))
    if limit and limit < len(indices):
        # Clips of one video or signer are neighbours, so the clips are spread evenly.
        indices = np.unique(np.linspace(0, len(indices) - 1, limit).astype(int))
    # Clips of similar length share a batch, and each rank gets about the same work.
    by_length = indices[np.argsort(clips.used[indices], kind="stable")]
    samples = [(None, int(index)) for index in by_length[ranks.rank :: ranks.world_size]]
    return [samples[i : i + batch_size] for i in range(0, len(samples), batch_size)]


def warn_about_colors(shards: Shards) -> None:
    """Prints a warning if the shards were written with wrong colors."""
    warning = shards.color_warning()
    if warning:
        print(f"warning: {warning}", file=sys.stderr)


def check_features(clips: ClipDataset, model: Translator) -> None:
    """Raises UserError for features that the model's own encoder would not compute."""
    made, folder = clips.features, clips.shards.folder
    if not made:
        return
    if model.input == "frames":
        raise UserError(f"{folder} holds sign-wise features: llm.input=frames needs video shards")
    advice = "make them again with flallm features"
    for field in ("resize", "crop", "stride", "max_frames"):
        required = getattr(clips.data, field)
        if made.get(field) != required:
            raise UserError(
                f"{folder} holds features made with data.{field}={made.get(field)}, "
                f"not {required}: {advice}"
            )
    if made["copies"] and made.get("augment") != asdict(clips.data.augment):
        raise UserError(
            f"{folder} holds features of copies augmented in another way than "
            f"data.augment says: {advice}"
        )
    if made.get("encoder_sha256") != model.encoder.sha256():
        raise UserError(
            f"{folder} holds features of another encoder: {advice} from the run of this encoder"
        )


def mismatched(hypotheses: list[str], references: list[str]) -> list[str]:
    """The hypotheses for mismatched videos: each clip gets that of the clip half a split further.

    Scored against the clip's own reference, they reach the real score only when the model does
    not look at its input. If more than a tenth of the clips get a clip with the same sentence
    (signers may repeat one list), the clips are first sorted by sentence, which separates equal
    ones.
    """
    half = len(references) // 2
    order = list(range(len(references)))
    rotated = references[half:] + references[:half]
    num_same = sum(a == b for a, b in zip(references, rotated))
    if num_same > MAX_SAME_SENTENCE * len(references):
        order.sort(key=references.__getitem__)
    partner = dict(zip(order, order[half:] + order[:half]))
    return [hypotheses[partner[i]] for i in range(len(references))]


def mismatched_score(predictions: list[Prediction], convention: str, name: str) -> float:
    """A score of the same clips decoded from mismatched videos."""
    references = [p.reference for p in predictions]
    hypotheses = mismatched([p.hypothesis for p in predictions], references)
    return metrics.point_estimate(hypotheses, references, convention, name)


def hardly_looks(real: float, blind: float) -> bool:
    """Whether a score is so close to that of wrong videos that the model hardly looks at its input.

    It is if the score is less than one point over twice the blind one, and at least half as far
    from 100. The second condition matters for BLEU-1 of a few isolated signs: there a blind guess
    gets more than half.
    """
    return real < 2 * blind + 1 and 100 - real >= (100 - blind) / 2


def tokenizer_ceiling(
    references: list[str], text: TranslationTokenizer, convention: str, name: str
) -> float:
    """The score of the references after encoding and decoding: no model can exceed it.

    It is below 100 if the tokenizer lacks words or normalises them: mBART's has no full-width
    commas.
    """
    encoded = [text.tokenizer(r, add_special_tokens=False)["input_ids"] for r in references]
    decoded = [text.decode(ids) for ids in encoded]
    return metrics.point_estimate(decoded, references, convention, name)


def load_run(run: Path, device: torch.device, shards: str = "") -> tuple[Translator, Config]:
    """Loads the best model of a run folder, or an exported one, in eval mode.

    shards: where the run's shards are now, if not where its config says.
    """
    config = cfg.from_dict(Config, cfg.read_run(run, shards), str(run / "config.yaml"))
    model = empty_model_of_run(config, run)
    if (run / "model.safetensors").is_file():  # written by `flallm export`
        load_weights(run, model)
    else:
        load_best(run, model)
    return model.to(device).eval(), config


def empty_model_of_run(config: Config, run: Path) -> Translator:
    """Builds the model of a run without the weights that its checkpoints hold.

    The weights under LoRA are in no checkpoint: they are read from the run's llm/ folder. Sets
    the fields of the config that say so.
    """
    config.llm.path = str((run / "llm").resolve())
    config.llm.random = False
    config.encoder.weights = None
    tokenizer = TranslationTokenizer(config.llm)
    return Translator(config, tokenizer, weights=bool(config.llm.lora.rank))


def evaluate(run: Path, split: str, ranks: DistContext, shards: str = "") -> dict:
    """Writes predictions/<split>.jsonl and scores/<split>.json of a run.

    Returns the scores on rank 0 and {} on the others.
    """
    model, config = load_run(run, ranks.device, shards)
    ensure_dir(run)  # fails now, not after decoding, if the folder is read-only
    predictions, bad = decode_split(
        model, config, split, ranks, config.decode, workers=config.data.workers, title=split
    )
    if not predictions:
        raise UserError(f"no clip of {split} in {config.data.shards} could be decoded")
    if not ranks.is_main:
        return {}
    scores = _score(predictions, model.text, config.convention)
    scores["bad_samples"] = len(bad)
    _write_results(run, split, predictions, scores)
    note_bad_samples(run, bad)
    _print_notes(run, scores)
    return scores


def _score(predictions: list[Prediction], text: TranslationTokenizer, convention: str) -> dict:
    """All conventions, the run's first, and the checks on the leading score and BLEU-4."""
    hypotheses = [p.hypothesis for p in predictions]
    references = [p.reference for p in predictions]
    others = [name for name in metrics.CONVENTIONS if name != convention]
    scores: dict = metrics.scores(hypotheses, references, [convention, *others])
    scores["leading"] = scores[convention]["leading"]
    for name in dict.fromkeys(("bleu4", scores["leading"])):
        scores[f"swapped_{name}"] = mismatched_score(predictions, convention, name)
        scores[f"reachable_{name}"] = tokenizer_ceiling(references, text, convention, name)
    return scores


def _write_results(run: Path, split: str, predictions: list[Prediction], scores: dict) -> None:
    for folder in ("predictions", "scores"):
        ensure_dir(run / folder)
    # A crash between the two writes must not leave new predictions beside old scores.
    (run / f"scores/{split}.json").unlink(missing_ok=True)
    lines = [json.dumps(vars(p), ensure_ascii=False) + "\n" for p in predictions]
    atomic_write(run / f"predictions/{split}.jsonl", "".join(lines))
    atomic_write(run / f"scores/{split}.json", json.dumps(scores, indent=1))


def _print_notes(run: Path, scores: dict) -> None:
    leading = scores["leading"]
    note = metrics.leading_note(leading)
    if note:
        print(note, file=sys.stderr)
    ceiling = scores[f"reachable_{leading}"]
    if ceiling < metrics.MIN_TOKENIZER_CEILING:
        print(
            f"warning: the tokenizer of {run} does not reproduce all references: "
            f"its ceiling is {metrics.LABELS[leading]} {ceiling:.2f}",
            file=sys.stderr,
        )


def note_bad_samples(run: Path, bad: list[dict]) -> None:
    """Appends the samples that could not be decoded to bad_samples.jsonl."""
    with open(run / "bad_samples.jsonl", "a", encoding="utf-8") as file:
        file.writelines(json.dumps(sample, ensure_ascii=False) + "\n" for sample in bad)
