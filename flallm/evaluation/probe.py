"""How much of a run's score comes from seeing: a split decoded with the videos spoilt in several ways, and scored in parts.

Writes probes/<split>.json: {"verdict", "seen_share", "leading", "videos": {what the model saw: scores}, "groups": {which clips: scores}, "overlap", "repeated"}.
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

from flallm.data.dataset import Batch
from flallm.data.reader import Shards
from flallm.distributed.context import DistContext
from flallm.evaluation import metrics
from flallm.evaluation.decode import Prediction, decode_split, hardly_looks, load_run, swapped
from flallm.model.translator import Translator
from flallm.utils import UserError, atomic_write, ensure_dir

TEXTS = 200_000  # training sentences that are read at most, evenly spread
CONTROL = ("another clip's", "noise", "the mean feature")  # videos that say nothing about the sentence


def probe(run: Path, split: str, ranks: DistContext, shards: str = "") -> dict:
    model, config = load_run(run, ranks.device, shards)
    seen = MeanFeature(model)

    def decode(title: str, change: Callable[[Batch], Batch] | None = None) -> list[Prediction]:
        return decode_split(model, config, split, ranks, config.decode, workers=config.data.workers, change=change, title=title)[0]

    ensure_dir(run)
    with seen.taken():
        right = decode("the right one")
    if not right:
        raise UserError(f"no clip of {split} in {config.data.shards} could be decoded")
    said = {"the right one": [p.hypothesis for p in right]}
    # A sentence depends on its video alone.
    said["another clip's"] = swapped(said["the right one"], [p.reference for p in right])
    for name, change in (("noise", _noise), ("a frozen frame", _freeze), ("time-reversed", _reverse)):
        said[name] = [p.hypothesis for p in decode(name, change)]
    with seen.put_in(ranks):
        said["the mean feature"] = [p.hypothesis for p in decode("the mean feature")]
    if not ranks.is_main:
        return {}
    found = _judge(said, right, config.convention) | _parts(right, config.convention, Shards(config.data.shards, split), training_clips(config.data.shards))
    ensure_dir(run / "probes")
    atomic_write(run / f"probes/{split}.json", json.dumps({"split": split} | found, indent=1, ensure_ascii=False))
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
    def put_in(self, ranks: DistContext) -> Iterator[None]:
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
    leading = metrics.leading(references, convention)
    videos = {
        name: _scores(hypotheses, references, convention, leading) | {"changed": float(np.mean([h != p.hypothesis for h, p in zip(hypotheses, right)]))}
        for name, hypotheses in said.items()
    }
    real, blind = videos["the right one"][leading]["value"], max(videos[name][leading]["value"] for name in CONTROL)
    share = max(0.0, 1 - blind / real) if real else 0.0
    verdict = f"{share:.0%} of {metrics.LABELS[leading]} {real:.2f} comes from seeing"
    verdict += f": with another clip's video, noise or the mean feature it is {blind:.2f} at most"
    if hardly_looks(real, blind):
        verdict += "; the model hardly looks at its input"
    return {"verdict": verdict, "seen_share": share, "leading": leading, "convention": convention, "num_samples": len(right), "videos": videos}


def _scores(hypotheses: list[str], references: list[str], convention: str, leading: str) -> dict:
    names = dict.fromkeys(("bleu4", leading, "rouge_l"))
    return {name: metrics.value(hypotheses, references, convention, name) for name in names}


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
    tokens = metrics.token_counts([p.reference for p in right], convention)
    leading = metrics.leading([p.reference for p in right], convention)
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
            found[name] = {"num_samples": len(part)} | _scores([p.hypothesis for p in part], [p.reference for p in part], convention, leading)
            longest = max(count for count, yes in zip(tokens, inside) if yes)
            for score in {"bleu4", leading}:
                if longest < _order(score):
                    found[name][score] = None  # no reference has an n-gram
    trained = [words[text] for text in {m["text"] for m in train}]
    overlap = {
        "hypothesis": _overlap([words[p.hypothesis] for p in right], trained, _order(leading)),
        "reference": _overlap([words[p.reference] for p in right], trained, _order(leading)),
    }
    counts = Counter(p.hypothesis for p in right)
    most, times = counts.most_common(1)[0]
    repeated = {"share": sum(n for n in counts.values() if n > 1) / len(right), "most_common": most, "times": times}
    return {"groups": found, "overlap": overlap, "repeated": repeated}


def _overlap(texts: list[list[str]], train: list[list[str]], order: int) -> dict[str, float]:
    """What share of the texts' n-grams, of 4 words and of `order`, and of whole texts is in the training text."""
    shares = {}
    for n in dict.fromkeys((4, order)):
        known = {gram for text in train for gram in _ngrams(text, n)}
        grams = [gram in known for text in texts for gram in _ngrams(text, n)]
        shares[f"{n}-grams"] = float(np.mean(grams)) if grams else 0.0
    sentences = {" ".join(text) for text in train}
    shares["sentences"] = float(np.mean([" ".join(text) in sentences for text in texts]))
    return shares


def _order(score: str) -> int:
    """The n of BLEU-n."""
    return int(score.removeprefix("bleu"))


def _ngrams(words: list[str], n: int) -> Iterator[tuple[str, ...]]:
    return zip(*(words[i:] for i in range(n)))


def table(found: dict) -> str:
    """What the command prints."""
    leading, n = found["leading"], _order(found["leading"])
    head = f"{metrics.LABELS[leading]} [95 %]"
    rows = [f"{'video':22}{head:>24}{'ROUGE-L':>9}{'sentences changed':>19}"]
    rows += [f"{name:22}{_interval(s[leading]):>24}{s['rouge_l']['value']:9.2f}{s['changed']:>19.0%}" for name, s in found["videos"].items()]
    rows += [f"\n{'of the right one':38}{'clips':>6}{head:>24}{'ROUGE-L':>9}"]
    rows += [f"{name:38}{s['num_samples']:6}{_interval(s[leading]):>24}{s['rouge_l']['value']:9.2f}" for name, s in found["groups"].items()]
    said, meant, repeated = found["overlap"]["hypothesis"], found["overlap"]["reference"], found["repeated"]
    rows += [
        "",
        f"in the training text   {said[f'{n}-grams']:.0%} of the hypotheses' {n}-grams (references: {meant[f'{n}-grams']:.0%}), "
        f"{said['sentences']:.0%} of the hypotheses (references: {meant['sentences']:.0%})",
        f"said more than once    {repeated['share']:.0%} of the hypotheses; {repeated['times']} times {repeated['most_common']!r}",
        "",
        *([note, ""] if (note := metrics.leading_note(leading)) else []),
        found["verdict"],
    ]
    return "\n".join(rows)


def _interval(score: dict | None) -> str:
    if not score:
        return "-"
    low, high = score["ci95"]
    return f"{score['value']:.2f} [{low:.2f}, {high:.2f}]"
