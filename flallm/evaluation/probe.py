"""How much of a run's score comes from seeing: decodes a split from corrupted videos too.

Writes probes/<split>.json: {"verdict", "seen_share", "leading", "convention", "num_samples",
"videos": {what the model saw: scores}, "groups": {which clips: scores}, "overlap", "repeated"}.
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
from flallm.evaluation.decode import Prediction, decode_split, hardly_looks, load_run, mismatched
from flallm.model.translator import Translator
from flallm.utils import UserError, atomic_write, ensure_dir

MAX_TRAINING_CLIPS = 200_000  # whose text is read, evenly spread over the training split
# What the model sees, as probes/<split>.json and the printed table name it.
REAL, MISMATCHED, NOISE, MEAN = "the right one", "another clip's", "noise", "the mean feature"
FROZEN, REVERSED = "a frozen frame", "time-reversed"
CONTROL = (MISMATCHED, NOISE, MEAN)  # videos that say nothing about the sentence


def probe(run: Path, split: str, ranks: DistContext, shards: str = "") -> dict:
    """Decodes a split once for each kind of video, writes and returns what the scores say.

    shards: where the run's shards are now, if not where its config says. Returns {} on other
    ranks than 0.
    """
    model, config = load_run(run, ranks.device, shards)
    mean_feature = MeanFeature(model)
    workers = config.data.workers

    def decode(title: str, change: Callable[[Batch], Batch] | None = None) -> list[Prediction]:
        predictions, _ = decode_split(
            model, config, split, ranks, config.decode, workers=workers, change=change, title=title
        )
        return predictions

    ensure_dir(run)
    with mean_feature.taken():
        predictions = decode(REAL)
    if not predictions:
        raise UserError(f"no clip of {split} in {config.data.shards} could be decoded")
    hypotheses = {REAL: [p.hypothesis for p in predictions]}
    # A hypothesis depends on its video alone, so mismatched videos need no decoding.
    hypotheses[MISMATCHED] = mismatched(hypotheses[REAL], [p.reference for p in predictions])
    for name, change in ((NOISE, _noise), (FROZEN, _freeze), (REVERSED, _reverse)):
        hypotheses[name] = [p.hypothesis for p in decode(name, change)]
    with mean_feature.put_in(ranks):
        hypotheses[MEAN] = [p.hypothesis for p in decode(MEAN)]
    if not ranks.is_main:
        return {}
    result = _judge(hypotheses, predictions, config.convention)
    decoded_shards = Shards(config.data.shards, split)
    train = training_clips(config.data.shards)
    result |= _parts(predictions, config.convention, decoded_shards, train)
    ensure_dir(run / "probes")
    text = json.dumps({"split": split} | result, indent=1, ensure_ascii=False)
    atomic_write(run / f"probes/{split}.json", text)
    return result


def _noise(batch: Batch) -> Batch:
    """Replaces pixels by uniform noise, features by normal noise of the clip's own spread.

    The noise depends on the clip's key, not on its batch.
    """
    generators = iter([np.random.default_rng(crc32(key.encode())) for key in batch.keys])

    def noise(frames: torch.Tensor) -> torch.Tensor:
        generator = next(generators)
        if frames.ndim == 2:
            normal = torch.from_numpy(generator.standard_normal(frames.shape, np.float32))
            return normal * frames.float().std()
        return torch.from_numpy(generator.integers(0, 256, frames.shape, np.uint8))

    return _change_clips(batch, noise)


def _freeze(batch: Batch) -> Batch:
    return _change_clips(batch, lambda frames: frames[len(frames) // 2].expand_as(frames))


def _reverse(batch: Batch) -> Batch:
    return _change_clips(batch, lambda frames: frames.flip(0))


def _change_clips(batch: Batch, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
    clips = batch.frames.split(batch.lengths.tolist())
    return replace(batch, frames=torch.cat([change(frames) for frames in clips]))


class MeanFeature:
    """The mean of what the adapter reads, over all clips of all ranks.

    Decode once within `taken()`, then once more within `put_in()`.
    """

    def __init__(self, model: Translator):
        self.model, self.sum, self.count = model, 0.0, 0

    def taken(self) -> RemovableHandle:
        """A context in which the features that the adapter reads are summed."""

        def add(_, inputs: tuple[torch.Tensor]) -> None:
            (features,) = inputs  # (F, C)
            self.sum = self.sum + features.double().sum(0).cpu()
            self.count += len(features)

        return self.model.adapter.register_forward_pre_hook(add)

    @contextmanager
    def put_in(self, ranks: DistContext) -> Iterator[None]:
        """A context in which the mean takes the place of every feature."""
        width = self.model.adapter[0].in_features
        sums = self.sum.tolist() if self.count else [0.0] * width
        *total, count = ranks.sum(*sums, self.count)
        mean = torch.tensor(total, device=ranks.device) / count

        def put_mean(_, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
            return (mean.to(inputs[0]).expand_as(inputs[0]),)

        # With llm.input=words the word head reads the same features as the adapter.
        readers = ["adapter", "words"] if self.model.input == "words" else ["adapter"]
        with ExitStack() as hooks:
            for name in readers:
                module = self.model.get_submodule(name)
                hooks.enter_context(module.register_forward_pre_hook(put_mean))
            yield


def _judge(
    hypotheses: dict[str, list[str]], predictions: list[Prediction], convention: str
) -> dict:
    """Scores each kind of video and says how much of the real score comes from seeing.

    hypotheses: by kind of video; predictions: those from the real videos.
    """
    references = [p.reference for p in predictions]
    leading = metrics.leading(references, convention)
    videos = {}
    for name, texts in hypotheses.items():
        changed = [text != p.hypothesis for text, p in zip(texts, predictions)]
        videos[name] = _scores(texts, references, convention, leading)
        videos[name]["changed"] = float(np.mean(changed))
    real = videos[REAL][leading]["value"]
    blind = max(videos[name][leading]["value"] for name in CONTROL)
    seen_share = max(0.0, 1 - blind / real) if real else 0.0
    verdict = (
        f"{seen_share:.0%} of {metrics.LABELS[leading]} {real:.2f} comes from seeing: "
        f"with another clip's video, noise or the mean feature it is {blind:.2f} at most"
    )
    if hardly_looks(real, blind):
        verdict += "; the model hardly looks at its input"
    return {
        "verdict": verdict,
        "seen_share": seen_share,
        "leading": leading,
        "convention": convention,
        "num_samples": len(predictions),
        "videos": videos,
    }


def _scores(
    hypotheses: list[str], references: list[str], convention: str, leading: str
) -> dict[str, dict]:
    names = dict.fromkeys(("bleu4", leading, "rouge_l"))
    return {name: metrics.value(hypotheses, references, convention, name) for name in names}


def training_clips(folder: str) -> list[dict]:
    """The JSON of the training clips of a shard folder, of MAX_TRAINING_CLIPS at most."""
    shards = Shards(folder, "train")
    count = min(len(shards), MAX_TRAINING_CLIPS)
    indices = np.unique(np.linspace(0, len(shards) - 1, count).round()).astype(int).tolist()
    return [meta for meta in shards.metas(indices) if meta]


def _parts(
    predictions: list[Prediction], convention: str, shards: Shards, train: list[dict]
) -> dict:
    """Scores parts of the split, and compares the hypotheses with the training text."""
    split_words = metrics.splitter(convention)
    references = [split_words(p.reference) for p in predictions]
    hypotheses = [split_words(p.hypothesis) for p in predictions]
    training = [split_words(text) for text in {meta["text"] for meta in train}]
    leading = metrics.leading([p.reference for p in predictions], convention)
    order = metrics.ngram_order(leading)
    groups = {
        **_groups_by_text(references, training),
        **_groups_by_signer(predictions, shards, train),
        **_groups_by_length(references),
    }
    return {
        "groups": _score_groups(groups, predictions, convention, leading),
        "overlap": {
            "hypothesis": _overlap(hypotheses, training, order),
            "reference": _overlap(references, training, order),
        },
        "repeated": _repeated(predictions),
    }


def _groups_by_text(
    references: list[list[str]], training: list[list[str]]
) -> dict[str, list[bool]]:
    """For each group whether each clip is in it, as all functions of this kind return."""
    sentences = {" ".join(words) for words in training}
    known = [" ".join(words) in sentences for words in references]
    return {
        "sentence is in the training text": known,
        "sentence is not in the training text": [not is_known for is_known in known],
    }


def _groups_by_signer(
    predictions: list[Prediction], shards: Shards, train: list[dict]
) -> dict[str, list[bool]]:
    """Clips whose signer is not known are in neither group."""
    training_signers = {meta.get("signer") for meta in train} - {None}
    signer_by_key = {meta.get("key"): meta.get("signer") for meta in shards.metas()}
    signers = [signer_by_key.get(p.key) for p in predictions]
    return {
        "signer is in training": [signer in training_signers for signer in signers],
        "signer is not in training": [
            signer is not None and signer not in training_signers for signer in signers
        ],
    }


def _groups_by_length(references: list[list[str]]) -> dict[str, list[bool]]:
    """Thirds of the split by the number of words of the reference."""
    lengths = [len(words) for words in references]
    short, medium = (int(quantile) for quantile in np.quantile(lengths, (1 / 3, 2 / 3)))
    return {
        f"up to {short} words": [length <= short for length in lengths],
        f"{short + 1} to {medium} words": [short < length <= medium for length in lengths],
        f"more than {medium} words": [length > medium for length in lengths],
    }


def _score_groups(
    groups: dict[str, list[bool]], predictions: list[Prediction], convention: str, leading: str
) -> dict[str, dict]:
    """The scores of each group that has clips; None for BLEU-n if no reference has an n-gram."""
    scored = {}
    for name, members in groups.items():
        group = [p for p, is_member in zip(predictions, members) if is_member]
        if not group:
            continue
        references = [p.reference for p in group]
        scores = _scores([p.hypothesis for p in group], references, convention, leading)
        longest = max(metrics.token_counts(references, convention))
        for score in {"bleu4", leading}:
            if longest < metrics.ngram_order(score):
                scores[score] = None
        scored[name] = {"num_samples": len(group)} | scores
    return scored


def _overlap(texts: list[list[str]], training: list[list[str]], order: int) -> dict[str, float]:
    """The share of n-grams (of 4 words and of `order`) and of sentences in the training text."""
    shares = {}
    for n in dict.fromkeys((4, order)):
        known = {ngram for words in training for ngram in _ngrams(words, n)}
        is_known = [ngram in known for words in texts for ngram in _ngrams(words, n)]
        shares[f"{n}-grams"] = float(np.mean(is_known)) if is_known else 0.0
    sentences = {" ".join(words) for words in training}
    shares["sentences"] = float(np.mean([" ".join(words) in sentences for words in texts]))
    return shares


def _ngrams(words: list[str], n: int) -> Iterator[tuple[str, ...]]:
    return zip(*(words[i:] for i in range(n)))


def _repeated(predictions: list[Prediction]) -> dict:
    counts = Counter(p.hypothesis for p in predictions)
    most_common, times = counts.most_common(1)[0]
    num_repeated = sum(count for count in counts.values() if count > 1)
    return {
        "share": num_repeated / len(predictions),
        "most_common": most_common,
        "times": times,
    }


def table(result: dict) -> str:
    """The text that `flallm probe` prints of a probe's result."""
    leading, repeated = result["leading"], result["repeated"]
    head = f"{metrics.LABELS[leading]} [95 %]"
    rows = [f"{'video':22}{head:>24}{'ROUGE-L':>9}{'sentences changed':>19}"]
    for name, scores in result["videos"].items():
        rows.append(f"{name:22}{_score_cells(scores, leading)}{scores['changed']:>19.0%}")
    rows += ["", f"{'of ' + REAL:38}{'clips':>6}{head:>24}{'ROUGE-L':>9}"]
    for name, scores in result["groups"].items():
        rows.append(f"{name:38}{scores['num_samples']:6}{_score_cells(scores, leading)}")
    hypotheses, references = result["overlap"]["hypothesis"], result["overlap"]["reference"]
    grams = f"{metrics.ngram_order(leading)}-grams"
    rows += [
        "",
        f"in the training text   {hypotheses[grams]:.0%} of the hypotheses' {grams} "
        f"(references: {references[grams]:.0%}), {hypotheses['sentences']:.0%} of the "
        f"hypotheses (references: {references['sentences']:.0%})",
        f"said more than once    {repeated['share']:.0%} of the hypotheses; "
        f"{repeated['times']} times {repeated['most_common']!r}",
        "",
    ]
    note = metrics.leading_note(leading)
    if note:
        rows += [note, ""]
    rows.append(result["verdict"])
    return "\n".join(rows)


def _score_cells(scores: dict, leading: str) -> str:
    cell = "-"
    if scores[leading]:
        low, high = scores[leading]["ci95"]
        cell = f"{scores[leading]['value']:.2f} [{low:.2f}, {high:.2f}]"
    return f"{cell:>24}{scores['rouge_l']['value']:9.2f}"
