"""The embedded corpus: sentences from a small grammar, signed by procedural signers (`signer.py`).

It is deterministic from a seed. Translating it is more than naming signs:

- Signs come as TIME PLACE SUBJECT OBJECT ADJECTIVE NUMBER VERB NOT QUESTION, the English as subject
  verb object place time, or with the time first where a place is signed, too.
- Articles, prepositions, auxiliaries, plural and tense have no sign. They follow from number, time
  and noun.
- The word of a sign depends on its neighbours: BIG is "big", of animals "huge"; EVENING after TODAY
  is "tonight". A subject that is not signed is "they". Some words are free choices of the speaker:
  "mother" or "mum", "hello" or "hi".
- Two of five sentences have one or two signs, the rest up to eight, about as in real corpora.

Sentences of three and more signs never occur in two splits, and nobody signs in two splits.

`PRESETS` has two corpora, the demo's and a harder one to measure on; `CorpusConfig` says what is
harder.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache
from itertools import product
from zlib import crc32

import av
import numpy as np

from flallm.data.clips import Clip
from flallm.data.corpora.drawing import render
from flallm.data.corpora.grammar import (
    Sampler,
    Sentence,
    clause_sentence,
    joined_sentence,
    paraphrase,
    short_sentence,
)
from flallm.data.corpora.signer import FPS, Sign, make_signer, make_signs, perform
from flallm.data.corpora.words import ADJECTIVES, GLOSSES, MANY_GLOSSES, NOUNS, VERBS
from flallm.utils import UserError

SPLITS = ("train", "dev", "test")


@dataclass(frozen=True)
class CorpusConfig:
    """What makes the corpus hard. The defaults are the demo's.

    many: all signs of `words.py`; the demo has the first of them.
    tail: words are as frequent as 1 / rank ** tail in their class (Zipf); 0 is uniform.
    short: share of sentences of one or two signs.
    joined: share of the others that are two clauses. The reason is signed before BECAUSE and the
        condition after IF, both before the main clause.
    paraphrase: how often a word is replaced by another, or a time comes first.
    again: share of sentences that are signed again by another signer, so one signing has several
        texts.
    assimilation: share of the way that hands are drawn towards the signs before and after, in
        place, orientation and shape.
    held_out: share of the pairs of a noun with a verb or an adjective that no training clip has;
        text alone has them.
    signers, clips: how many in train, dev and test.
    sentences: of text alone, for a language model. None of three or more signs is a test sentence.
    """

    many: bool = False
    tail: float = 0.0
    short: float = 0.4
    joined: float = 0.0
    paraphrase: float = 0.0
    again: float = 0.0
    assimilation: float = 0.0
    held_out: float = 0.0
    signers: tuple[int, ...] = (16, 4, 6)
    clips: tuple[int, ...] = (2400, 100, 250)
    sentences: int = 20_000

    def __post_init__(self):
        if self.joined and not self.many:
            raise UserError("--dials: joined needs many, which has the signs that join clauses")
        for name, counts in (("signers", self.signers), ("clips", self.clips)):
            if len(counts) != 3 or min(counts) < 1:
                raise UserError(
                    f"--dials: {name}: three numbers are needed, of train, dev and test, each at "
                    "least 1"
                )


PRESETS = {
    "demo": CorpusConfig(),
    "bench": CorpusConfig(
        many=True,
        tail=0.8,
        short=0.3,
        joined=0.4,
        paraphrase=0.3,
        again=0.2,
        assimilation=0.25,
        held_out=0.1,
        signers=(24, 4, 8),
        clips=(4800, 150, 400),
        sentences=40_000,
    ),
}
DEMO = PRESETS["demo"]


@cache
def lexicon(dials: CorpusConfig = DEMO) -> dict[str, Sign]:
    """{gloss: form}, the same for every seed: it is the language.

    NOT shakes the head, QUESTION raises the brows.
    """
    glosses = MANY_GLOSSES if dials.many else GLOSSES
    signs = dict(zip(glosses, make_signs(len(glosses), seed=12), strict=True))
    signs["NOT"] = replace(signs["NOT"], head="shake")
    signs["QUESTION"] = replace(signs["QUESTION"], head="brows")
    return signs


def sentences(
    split: str, count: int, seed: int = 0, dials: CorpusConfig = DEMO
) -> Iterator[Sentence]:
    """`count` random sentences of a split as (glosses in signing order, text).

    The split "text" has the sentences of training, without video: text for a language model.
    """
    rng = np.random.default_rng([seed, crc32(split.encode())])
    sampler = Sampler(rng, lexicon(dials), dials.tail)
    for i in range(count):
        is_repeated = i > 0 and dials.again > 0 and sampler.happens(dials.again)
        if not is_repeated:
            glosses, text = _sentence(sampler, split, dials)
        yield glosses, paraphrase(sampler, text, dials.paraphrase)


def split_of(glosses: list[str]) -> str:
    """The split of a sentence of three and more signs: a hash, so no two splits share it."""
    slot = crc32(" ".join(glosses).encode()) % 10
    return {0: "test", 1: "dev"}.get(slot, "train")


def pairs(glosses: list[str]) -> list[tuple[str, str]]:
    """Every noun of a sentence with every verb and adjective of it."""
    nouns = [gloss for gloss in glosses if gloss in NOUNS]
    others = [gloss for gloss in glosses if gloss in VERBS or gloss in ADJECTIVES]
    return list(product(nouns, others))


def is_held_out(noun: str, other: str, dials: CorpusConfig) -> bool:
    """Whether no training clip has this pair."""
    return crc32(f"{noun} {other}".encode()) % 1000 < 1000 * dials.held_out


def _sentence(sampler: Sampler, split: str, dials: CorpusConfig) -> Sentence:
    """One random sentence of a split."""
    is_short = sampler.happens(dials.short)
    while True:
        if is_short:
            glosses, text = short_sentence(sampler)
        elif dials.joined and sampler.happens(dials.joined):
            glosses, text = joined_sentence(sampler)
        else:
            glosses, text = clause_sentence(sampler)
        if not is_short and split_of(glosses) != ("train" if split == "text" else split):
            continue
        if split == "train" and any(is_held_out(*pair, dials) for pair in pairs(glosses)):
            continue
        return glosses, text


@dataclass(frozen=True)
class Performance:
    """A sentence as somebody signs it. Its video is rendered when it is encoded."""

    glosses: tuple[str, ...]
    signer: int
    seed: tuple[int, ...]
    size: int
    dials: CorpusConfig = DEMO

    @property
    def source(self) -> str:
        return f"synthetic:signer={self.signer}"

    def frames(self) -> tuple[Fraction, Iterator[tuple[float, av.VideoFrame]]]:
        rng, signer = np.random.default_rng(self.seed), make_signer(self.signer)
        signs = [lexicon(self.dials)[gloss] for gloss in self.glosses]
        poses = perform(signs, signer, rng, self.dials.assimilation)
        return Fraction(FPS), _timed(render(poses, signer, self.size, rng))


def _timed(images: Iterator[np.ndarray]) -> Iterator[tuple[float, av.VideoFrame]]:
    for i, image in enumerate(images):
        yield i / FPS, av.VideoFrame.from_ndarray(image, "rgb24")


def signers(dials: CorpusConfig = DEMO) -> dict[str, range]:
    """{split: the numbers of its signers}"""
    ranges, first = {}, 0
    for split, count in zip(SPLITS, dials.signers):
        ranges[split] = range(first, first + count)
        first += count
    return ranges


def clips(
    seed: int = 0,
    train: int | None = None,
    dev: int | None = None,
    test: int | None = None,
    size: int = 72,
    dials: CorpusConfig = DEMO,
) -> Iterator[Clip]:
    """The corpus as `Clip`s of `size` x `size` pixels.

    train, dev, test: the number of clips, by default that of `dials`.
    """
    for number, count in enumerate((train, dev, test)):
        split = SPLITS[number]
        if count is None:
            count = dials.clips[number]
        split_signers = signers(dials)[split]
        for i, (glosses, text) in enumerate(sentences(split, count, seed, dials)):
            signer = split_signers[i % len(split_signers)]
            media = Performance(tuple(glosses), signer, (seed, number, i), size, dials)
            key = f"{split}-{i:06d}"
            yield Clip(key, split, text, media, " ".join(glosses), f"signer{signer:02d}")
