"""The sentences of a run's page: word differences, clips, attention and nearest training text."""

from __future__ import annotations

import base64
import difflib
import itertools
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from sacrebleu.metrics import CHRF

from flallm.data.dataset import ClipDataset
from flallm.data.reader import BadSample, Shards, splits_of
from flallm.distributed.context import precision
from flallm.evaluation import metrics
from flallm.evaluation import sentences as sentence_files
from flallm.evaluation.decode import load_run
from flallm.evaluation.probe import training_clips
from flallm.utils import UserError

MAX_VIDEO_BYTES = 12 * 2**20  # of all clips in the page, which takes a third more as base64
MAX_WORDS = 400  # of a text whose words are compared or drawn

Parts = list[tuple[str, bool]]  # a text in parts: (words, whether the other text lacks them)


@dataclass(frozen=True)
class WordAttention:
    word: str
    mask: str  # weights over time as a CSS mask
    peak: float  # time of the largest weight, from 0 to 1


@dataclass
class Sentence:
    key: str
    reference: str
    hypothesis: str
    score: float  # chrF
    reference_parts: Parts
    hypothesis_parts: Parts
    nearest: str = ""  # sentence of the training text
    signer: str = ""
    video: str = ""  # data URL
    attention: list[WordAttention] = field(default_factory=list)


def load_sentences(path: Path, convention: str) -> list[Sentence]:
    """The sentences of predictions/<split>.jsonl, compared by the words of the convention."""
    split_words = str.split
    if convention in metrics.CONVENTIONS:
        split_words = metrics.splitter(convention)
    chrf = CHRF()
    sentences = []
    for hypothesis, reference, key in zip(*sentence_files.pairs(path)):
        score = chrf.sentence_score(hypothesis, [reference]).score
        reference_words, hypothesis_words = split_words(reference), split_words(hypothesis)
        if max(len(reference_words), len(hypothesis_words)) > MAX_WORDS:
            parts = [(reference, False)], [(hypothesis, False)]
        else:
            has_spaces = len(reference.split()) > 1 or len(hypothesis.split()) > 1
            parts = word_differences(reference_words, hypothesis_words, " " if has_spaces else "")
        sentences.append(Sentence(str(key), reference, hypothesis, score, *parts))
    return sentences


def word_differences(
    reference: list[str], hypothesis: list[str], space: str
) -> tuple[Parts, Parts]:
    """Both texts in parts. space: what separates words."""
    reference_parts: Parts = []
    hypothesis_parts: Parts = []
    matcher = difflib.SequenceMatcher(None, reference, hypothesis, autojunk=False)
    for kind, a, b, c, d in matcher.get_opcodes():
        _add_part(reference_parts, reference[a:b], space, kind != "equal")
        _add_part(hypothesis_parts, hypothesis[c:d], space, kind != "equal")
    return reference_parts, hypothesis_parts


def _add_part(parts: Parts, words: list[str], space: str, differs: bool) -> None:
    if not words:
        return
    if parts and space:
        parts.append((space, False))
    parts.append((space.join(words), differs))


def add_nearest(sentences: list[Sentence], shards: Shards) -> None:
    """Adds to each sentence the training text that is nearest to its hypothesis."""
    if "train" not in splits_of(shards.folder):
        return
    texts = list(dict.fromkeys(meta["text"] for meta in training_clips(shards.folder)))
    if not texts:
        return
    nearest = Nearest(texts)
    for sentence in sentences:
        sentence.nearest = nearest(sentence.hypothesis)


class Nearest:
    """Finds the text that shares most with another.

    It compares words and pairs of words, weighted by how rare they are, as shared weight divided
    by the weight of both texts.
    """

    def __init__(self, texts: list[str]):
        self.texts = texts
        postings: dict[object, list[int]] = {}  # the texts that hold a term
        for i, text in enumerate(texts):
            for term in self._terms(text):
                postings.setdefault(term, []).append(i)
        self.postings = {term: np.array(indices) for term, indices in postings.items()}
        self.weights = {
            term: math.log(1 + len(texts) / len(indices)) for term, indices in postings.items()
        }
        self.sizes = np.array([self._size(self._terms(text)) for text in texts])

    @staticmethod
    def _terms(text: str) -> set:
        words = text.lower().split() if " " in text else list(text)
        return {*words, *itertools.pairwise(words)}

    def _size(self, terms) -> float:
        return sum(self.weights[term] for term in terms)

    def __call__(self, text: str) -> str:
        """Returns an empty text if none shares a term."""
        terms = [term for term in self._terms(text) if term in self.postings]
        if not terms:
            return ""
        holders = [self.postings[term] for term in terms]
        weights = np.repeat([self.weights[term] for term in terms], [len(h) for h in holders])
        shared = np.bincount(np.concatenate(holders), weights, len(self.texts))
        return self.texts[int(np.argmax(shared / (self.sizes + self._size(terms))))]


def add_clips(
    sentences: list[Sentence], shards: Shards, count: int, run: Path, notes: list[str]
) -> None:
    """Adds signers to all sentences, and clips with attention to some.

    count: number of sentences with a clip, evenly spread from the best to the worst. notes: gets
    a line for what cannot be shown.
    """
    index_by_key = {}
    signer_by_key = {}
    for i, meta in enumerate(shards.metas()):
        if meta:
            index_by_key[meta["key"]] = i
            signer_by_key[meta["key"]] = str(meta.get("signer") or "")
    for sentence in sentences:
        sentence.signer = signer_by_key.get(sentence.key, "")
    if shards.features:
        notes.append("No clips are shown: this run reads features.")
        return
    chosen = _evenly_ranked([s for s in sentences if s.key in index_by_key], count)
    shown = _embed_videos(chosen, shards, index_by_key)
    if len(shown) < len(chosen):
        notes.append(
            f"{len(shown)} of {len(chosen)} clips are shown: the others cannot be read or are too "
            "large for a page."
        )
    try:
        _add_attention(shown, shards, index_by_key, run)
    except UserError as error:
        notes.append(f"Not shown where the model looks: {error}.")


def _evenly_ranked(sentences: list[Sentence], count: int) -> list[Sentence]:
    ranked = sorted(sentences, key=lambda sentence: -sentence.score)
    positions = np.linspace(0, len(ranked) - 1, min(count, len(ranked))).round().astype(int)
    return [ranked[i] for i in dict.fromkeys(positions.tolist())]


def _embed_videos(
    sentences: list[Sentence], shards: Shards, index_by_key: dict[str, int]
) -> list[Sentence]:
    """Adds videos while they fit; returns the sentences that have one."""
    bytes_left = MAX_VIDEO_BYTES
    shown = []
    for sentence in sentences:
        try:
            video, _ = shards.read(index_by_key[sentence.key])
        except BadSample:
            continue
        if len(video) <= bytes_left:
            bytes_left -= len(video)
            sentence.video = "data:video/mp4;base64," + base64.b64encode(video).decode()
            shown.append(sentence)
    return shown


def _add_attention(
    sentences: list[Sentence], shards: Shards, index_by_key: dict[str, int], run: Path
) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, config = load_run(run, device, shards.folder)
    clips = ClipDataset(shards.split, config.data, config.seed)
    with precision(config.train, device):
        for sentence in sentences:
            batch = clips.batch(model.text, [(None, index_by_key[sentence.key])])
            num_words = len(sentence.hypothesis.split())
            is_decoded = batch.keys == [sentence.key]
            if not is_decoded or not sentence.hypothesis or num_words > MAX_WORDS:
                continue
            for word, weights in model.attention(batch.to(device), sentence.hypothesis):
                peak = (int(weights.argmax()) + 0.5) / len(weights)
                sentence.attention.append(WordAttention(word, _mask(weights), peak))


def _mask(weights: torch.Tensor) -> str:
    """A CSS gradient over time, opaque where the weights are largest."""
    opacities = (weights / max(float(weights.max()), 1e-9)).tolist()
    stops = [
        f"rgb(0 0 0/{opacity:.2f}) {(i + 0.5) / len(opacities):.1%}"
        for i, opacity in enumerate(opacities)
    ]
    return f"linear-gradient(90deg,{','.join(stops)})"
