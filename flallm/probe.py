"""How much of a run's score comes from seeing: a split decoded with the videos spoilt in several ways, and scored in parts.

Writes probes/<split>.json: {"verdict", "seen_share", "videos": {what the model saw: scores}, "groups": {which clips: scores}, "overlap", "repeated"}.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from zlib import crc32

import numpy as np
import torch
from torch.utils.hooks import RemovableHandle

from flallm import UserError, make_folder, metrics, write_whole
from flallm.engine import Ranks
from flallm.evaluate import Prediction, decode_split, load_run_and_shards
from flallm.loader import Batch
from flallm.model.translator import Translator
from flallm.shards import Shards

TEXTS = 200_000  # training sentences that are read at most, evenly spread
NGRAM = 4
BLIND = ("another clip's", "noise", "the mean feature")  # videos that say nothing about the sentence


def probe(run: Path, split: str, ranks: Ranks, shards: str | None = None) -> dict:
    model, config = load_run_and_shards(run, ranks.device, shards)
    seen = MeanFeature(model)

    def decode(title: str, change: Callable[[Batch], Batch] | None = None) -> list[Prediction]:
        return decode_split(model, config, split, ranks, config.decode, workers=config.data.workers, change=change, title=title)[0]

    make_folder(run)
    with seen.taken():
        right = decode("the right one")
    if not right:
        raise UserError(f"no clip of {split} in {config.data.shards} could be decoded")
    said = {"the right one": [p.hypothesis for p in right]}
    said["another clip's"] = said["the right one"][len(right) // 2 :] + said["the right one"][: len(right) // 2]  # a sentence depends on its video alone
    for name, change in (("noise", _noise), ("a frozen frame", _freeze), ("time-reversed", _reverse)):
        said[name] = [p.hypothesis for p in decode(name, change)]
    with seen.put_in(ranks):
        said["the mean feature"] = [p.hypothesis for p in decode("the mean feature")]
    if not ranks.first:
        return {}
    found = _judge(said, right, config.convention) | _parts(right, config.convention, Shards(config.data.shards, split), training_clips(config.data.shards))
    make_folder(run / "probes")
    write_whole(run / f"probes/{split}.json", json.dumps({"split": split} | found, indent=1, ensure_ascii=False))
    return found


def _noise(batch: Batch) -> Batch:
    """Every frame noise, or every feature, of the spread that the clip's have; a clip's own, whatever its batch."""
    draws = iter([np.random.default_rng(crc32(key.encode())) for key in batch.keys])

    def noise(frames: torch.Tensor) -> torch.Tensor:
        if frames.ndim == 2:
            return torch.from_numpy(next(draws).standard_normal(frames.shape, np.float32)) * frames.float().std()
        return torch.from_numpy(next(draws).integers(0, 256, frames.shape, np.uint8))

    return _clipwise(batch, noise)


def _freeze(batch: Batch) -> Batch:
    return _clipwise(batch, lambda frames: frames[len(frames) // 2].expand_as(frames))


def _reverse(batch: Batch) -> Batch:
    return _clipwise(batch, lambda frames: frames.flip(0))


def _clipwise(batch: Batch, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
    return replace(batch, frames=torch.cat([change(frames) for frames in batch.frames.split(batch.lengths.tolist())]))


class MeanFeature:
    """The mean of what the adapter reads over all clips of all ranks: taken in one pass over them, put in place of every feature in another."""

    def __init__(self, model: Translator):
        self.model, self.sum, self.count = model, 0.0, 0

    def taken(self) -> RemovableHandle:
        """A context."""

        def add(_, inputs: tuple[torch.Tensor]) -> None:
            (features,) = inputs  # (F, C)
            self.sum, self.count = self.sum + features.double().sum(0).cpu(), self.count + len(features)

        return self.model.adapter.register_forward_pre_hook(add)

    @contextmanager
    def put_in(self, ranks: Ranks) -> Iterator[None]:
        width = self.model.adapter[0].in_features
        *total, count = ranks.sum(*(self.sum.tolist() if self.count else [0.0] * width), self.count)
        mean = torch.tensor(total, device=ranks.device) / count
        readers = ["adapter", "words"] if self.model.input == "words" else ["adapter"]  # which see the same
        with ExitStack() as hooks:
            for name in readers:
                hooks.enter_context(self.model.get_submodule(name).register_forward_pre_hook(lambda _, inputs: (mean.to(inputs[0]).expand_as(inputs[0]),)))
            yield


def _judge(said: dict[str, list[str]], right: list[Prediction], convention: str) -> dict:
    references = [p.reference for p in right]
    videos = {
        name: _scores(hypotheses, references, convention) | {"changed": float(np.mean([h != p.hypothesis for h, p in zip(hypotheses, right)]))}
        for name, hypotheses in said.items()
    }
    real, blind = videos["the right one"]["bleu4"]["value"], max(videos[name]["bleu4"]["value"] for name in BLIND)
    share = max(0.0, 1 - blind / real) if real else 0.0
    verdict = f"{share:.0%} of BLEU-4 {real:.2f} comes from seeing: with another clip's video, noise or the mean feature it is {blind:.2f} at most"
    if real < 2 * blind + 1:
        verdict += "; the model hardly looks at its input"
    return {"verdict": verdict, "seen_share": share, "convention": convention, "num_samples": len(right), "videos": videos}


def _scores(hypotheses: list[str], references: list[str], convention: str) -> dict:
    return {name: metrics.value(hypotheses, references, convention, name) for name in ("bleu4", "rouge_l")}


def training_clips(folder: str) -> list[dict]:
    """What the shards say of their training clips."""
    shards = Shards(folder, "train")
    some = np.unique(np.linspace(0, len(shards) - 1, min(len(shards), TEXTS)).round()).astype(int).tolist()
    return [meta for meta in shards.metas(some) if meta]


def _parts(right: list[Prediction], convention: str, shards: Shards, train: list[dict]) -> dict:
    """The score of parts of the split, and what of the hypotheses is the training text's."""
    split = metrics.splitter(convention)
    words = {text: split(text) for text in {t for p in right for t in (p.reference, p.hypothesis)} | {m["text"] for m in train}}
    sentences = {" ".join(words[m["text"]]) for m in train}
    signers = {m.get("signer") for m in train} - {None}
    signer_of = {m.get("key"): m.get("signer") for m in shards.metas()}
    lengths = [len(words[p.reference]) for p in right]
    a, b = (int(x) for x in np.quantile(lengths, (1 / 3, 2 / 3)))
    groups = {
        "sentence is in the training text": [" ".join(words[p.reference]) in sentences for p in right],
        "sentence is not in the training text": [" ".join(words[p.reference]) not in sentences for p in right],
        "signer is in training": [signer_of.get(p.key) in signers for p in right],
        "signer is not in training": [signer_of.get(p.key) not in {*signers, None} for p in right],
        f"up to {a} words": [n <= a for n in lengths],
        f"{a + 1} to {b} words": [a < n <= b for n in lengths],
        f"more than {b} words": [n > b for n in lengths],
    }
    found = {}
    for name, inside in groups.items():
        if part := [p for p, yes in zip(right, inside) if yes]:
            found[name] = {"num_samples": len(part)} | _scores([p.hypothesis for p in part], [p.reference for p in part], convention)
            if all(len(words[p.reference]) < 4 for p in part):
                found[name]["bleu4"] = None  # there are no 4-grams
    known = {gram for text in {m["text"] for m in train} for gram in _ngrams(words[text])}
    overlap = {}
    for side in ("hypothesis", "reference"):
        texts = [words[getattr(p, side)] for p in right]
        grams = [gram in known for text in texts for gram in _ngrams(text)]
        overlap[side] = {f"{NGRAM}-grams": float(np.mean(grams)) if grams else 0.0, "sentences": float(np.mean([" ".join(t) in sentences for t in texts]))}
    counts = Counter(p.hypothesis for p in right)
    most, times = counts.most_common(1)[0]
    repeated = {"share": sum(n for n in counts.values() if n > 1) / len(right), "most_common": most, "times": times}
    return {"groups": found, "overlap": overlap, "repeated": repeated}


def _ngrams(words: list[str]) -> Iterator[tuple[str, ...]]:
    return zip(*(words[i:] for i in range(NGRAM)))


def table(found: dict) -> str:
    """What the command prints."""
    rows = [f"{'video':22}{'BLEU-4 [95 %]':>24}{'ROUGE-L':>9}{'sentences changed':>19}"]
    rows += [f"{name:22}{_interval(s):>24}{s['rouge_l']['value']:9.2f}{s['changed']:>19.0%}" for name, s in found["videos"].items()]
    rows += [f"\n{'of the right one':38}{'clips':>6}{'BLEU-4 [95 %]':>24}{'ROUGE-L':>9}"]
    rows += [f"{name:38}{s['num_samples']:6}{_interval(s):>24}{s['rouge_l']['value']:9.2f}" for name, s in found["groups"].items()]
    said, meant, repeated = found["overlap"]["hypothesis"], found["overlap"]["reference"], found["repeated"]
    rows += [
        "",
        f"in the training text   {said[f'{NGRAM}-grams']:.0%} of the hypotheses' {NGRAM}-grams (references: {meant[f'{NGRAM}-grams']:.0%}), "
        f"{said['sentences']:.0%} of the hypotheses (references: {meant['sentences']:.0%})",
        f"said more than once    {repeated['share']:.0%} of the hypotheses; {repeated['times']} times {repeated['most_common']!r}",
        "",
        found["verdict"],
    ]
    return "\n".join(rows)


def _interval(scores: dict) -> str:
    if not scores["bleu4"]:
        return "-"
    low, high = scores["bleu4"]["ci95"]
    return f"{scores['bleu4']['value']:.2f} [{low:.2f}, {high:.2f}]"
