"""The embedded corpus: sentences from a small grammar, signed by procedural signers (`signer.py`), deterministic from a seed.

Translating it is more than naming signs:
- signs come as TIME PLACE SUBJECT OBJECT ADJECTIVE NUMBER VERB NOT QUESTION, the English as subject verb object place time,
  or with the time first where a place is named too;
- articles, prepositions, auxiliaries, plural and tense have no sign: they follow from number, time and noun;
- a sign's word depends on its neighbours (BIG is "big", of animals "huge"; EVENING after TODAY is "tonight"), an unsigned
  subject is "they", and some words are free choices of the speaker ("mother" or "mum", "hello" or "hi");
- two of five sentences are one or two signs long, the rest up to eight, about as in real corpora.
Sentences of three and more signs never occur in two splits, and nobody signs in two splits.

`PRESETS` has two corpora, the demo's and a harder one to measure on; `Dials` says what is harder.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from zlib import crc32

import av
import numpy as np

from flallm.data.clips import Clip
from flallm.data.corpora.signer import FPS, Sign, make_signer, make_signs, perform, render
from flallm.data.corpora.words import (
    ADJECTIVES,
    ANIMALS,
    DRINKS,
    FOOD,
    FREE_CHOICE,
    GLOSSES,
    INTRANSITIVE,
    JOINS,
    MANY_GLOSSES,
    MAX_POSITIONS,
    MEET,
    NAMES,
    NOUNS,
    NUMBERS,
    PAPER,
    PARAPHRASES,
    PARTS,
    PEOPLE,
    PRONOUNS,
    TIMES,
    TRANSITIVE,
    VERBS,
    WEATHER,
)  # fmt: skip
from flallm.utils import UserError


@dataclass(frozen=True)
class CorpusConfig:
    """What makes the corpus hard. These are the demo's values."""

    many: bool = False  # all signs of `words.py`; the demo has the first of them
    tail: float = (
        0.0  # words are as frequent as 1 / rank ** tail in their class (Zipf); 0: all alike
    )
    short: float = 0.4  # share of sentences of one or two signs
    joined: float = 0.0  # of the others, how many are two clauses: the reason is signed before BECAUSE, the condition after IF, both before what they are of
    paraphrase: float = 0.0  # how often a word is said in another way, or a time put first
    again: float = 0.0  # share of the sentences that are signed again, by somebody else, so that one signing has several texts
    assimilation: float = 0.0  # share of the way that hands are drawn, in place, orientation and shape, towards what is signed before and after
    held_out: float = 0.0  # share of the pairs of a noun with a verb or an adjective that no training clip has; text alone has them
    signers: tuple[int, ...] = (16, 4, 6)  # in train, dev and test
    clips: tuple[int, ...] = (2400, 100, 250)  # likewise
    sentences: int = 20_000  # of text alone, for a language model; none of them is a test sentence of three signs or more

    def __post_init__(self):
        if self.joined and not self.many:
            raise UserError("--dials: joined needs many, which has the signs that join clauses")
        for name, counts in (("signers", self.signers), ("clips", self.clips)):
            if len(counts) != 3 or min(counts) < 1:
                raise UserError(
                    f"--dials: {name}: three numbers are needed, of train, dev and test, each at least 1"
                )


PRESETS = {
    "demo": CorpusConfig(),
    "bench": CorpusConfig(
        True, 0.8, 0.3, 0.4, 0.3, 0.2, 0.25, 0.1, (24, 4, 8), (4800, 150, 400), 40_000
    ),
}
DEMO = PRESETS["demo"]


@cache
def lexicon(dials: CorpusConfig = DEMO) -> dict[str, Sign]:
    """gloss -> form, the same for every seed: it is the language. NOT shakes the head, QUESTION raises the brows."""
    glosses = MANY_GLOSSES if dials.many else GLOSSES
    signs = dict(zip(glosses, make_signs(len(glosses), seed=12), strict=True))
    for gloss, head in (("NOT", "shake"), ("QUESTION", "brows")):
        signs[gloss] = Sign(**{**vars(signs[gloss]), "head": head})
    return signs


class Chance:
    """What is random in a sentence."""

    def __init__(self, rng: np.random.Generator, dials: CorpusConfig):
        self.rng, self.dials, self.known = rng, dials, lexicon(dials)

    def often(self, share: float) -> bool:
        return self.rng.random() < share

    def pick(self, options) -> str:
        options = [o for o in options if o in self.known]
        if not self.dials.tail:
            return options[self.rng.integers(len(options))]
        weights = np.arange(1, len(options) + 1) ** -self.dials.tail
        return options[self.rng.choice(len(options), p=weights / weights.sum())]


def _sentence(chance: Chance, split: str) -> tuple[list[str], str]:
    """One random sentence of a split as (glosses in signing order, plain text)."""
    dials = chance.dials
    short = chance.often(dials.short)
    while True:
        glosses, text = (
            _short(chance)
            if short
            else _joined(chance)
            if dials.joined and chance.often(dials.joined)
            else _clause(chance)
        )
        if not short and split_of(glosses) != ("train" if split == "text" else split):
            continue
        if (
            dials.held_out
            and split == "train"
            and any(is_held_out(noun, other, dials) for noun, other in pairs(glosses))
        ):
            continue
        return glosses, text


def pairs(glosses: list[str]) -> list[tuple[str, str]]:
    return [
        (noun, other)
        for noun in glosses
        if noun in NOUNS
        for other in glosses
        if other in VERBS or other in ADJECTIVES
    ]


def is_held_out(noun: str, other: str, dials: CorpusConfig) -> bool:
    return crc32(f"{noun} {other}".encode()) % 1000 < 1000 * dials.held_out


def _said(chance: Chance, text: str) -> str:
    """The text as somebody says it: with some words in another way."""
    text = " ".join(
        FREE_CHOICE[w] if w in FREE_CHOICE and chance.often(0.1) else w for w in text.split()
    )
    share = chance.dials.paraphrase
    if not share:
        return text
    for usual, other in PARAPHRASES.items():
        if f" {usual} " in f" {text} " and chance.often(share):
            text = f" {text} ".replace(f" {usual} ", f" {other} ").strip()
    when = next(
        (w for w in ("yesterday", "today", "tomorrow", "tonight") if text.endswith(" " + w)), None
    )
    if when and not any(f" {join} " in text for join in JOINS.values()) and chance.often(share):
        text = f"{when} {text.removesuffix(' ' + when)}"
    return text


def _joined(chance: Chance) -> tuple[list[str], str]:
    """Two clauses."""
    (glosses, text), (others, more) = _statement(chance), _statement(chance)
    match chance.pick(JOINS):
        case "BUT":
            return [*glosses, "BUT", *others], f"{text} but {more}"
        case "BECAUSE":
            return [*others, "BECAUSE", *glosses], f"{text} because {more}"
        case _:
            return ["IF", *others, *glosses], f"{text} if {more}"


def _statement(chance: Chance) -> tuple[list[str], str]:
    while "QUESTION" in (found := _clause(chance))[0]:
        pass
    return found


def _short(chance: Chance) -> tuple[list[str], str]:
    if chance.often(0.45):
        gloss = chance.pick(MANY_GLOSSES)
        return [gloss], _citation(gloss)
    match chance.rng.integers(8):
        case 0:
            noun, number = chance.pick([n for n in NOUNS if NOUNS[n][1]]), chance.pick(NUMBERS)
            return [noun, number], _noun_phrase(noun, None, number)
        case 1:
            noun, adjective = chance.pick(NOUNS), chance.pick(ADJECTIVES)
            return [noun, adjective], _noun_phrase(noun, adjective, None)
        case 2:
            person, verb = chance.pick(NAMES | PEOPLE | PRONOUNS), chance.pick(INTRANSITIVE)
            return [person, verb], _translate(verb, subject=person)
        case 3:
            time, weather = chance.pick(TIMES), chance.pick(WEATHER)
            return [time, weather], _translate(weather, time=time)
        case 4:
            verb = chance.pick(INTRANSITIVE)
            return ["PLEASE", verb], f"please {VERBS[verb][0]}"
        case 5:
            person = chance.pick(NAMES)
            return ["HELLO", person], f"hello {NAMES[person]}"
        case 6:
            time, part = chance.pick(TIMES), chance.pick(PARTS)
            return [time, part], _when(time, part)
        case _:
            place, weather = chance.pick(["CITY", "PARK"]), chance.pick(WEATHER)
            return [place, weather], _translate(weather, place=place)


def _citation(gloss: str) -> str:
    """The English for a sign that stands alone."""
    others = {
        "HELLO": "hello",
        "THANKS": "thank you",
        "SORRY": "i am sorry",
        "PLEASE": "please",
        "NOT": "no",
        "QUESTION": "really",
    } | JOINS
    if gloss in NOUNS:
        return _noun_phrase(gloss, None, None)
    if gloss in VERBS or gloss in WEATHER:
        return _translate(gloss)
    if gloss in PRONOUNS:
        return PRONOUNS[gloss][1]
    return (NAMES | PEOPLE | TIMES | PARTS | MAX_POSITIONS | ADJECTIVES | NUMBERS | others)[gloss]


def _clause(chance: Chance) -> tuple[list[str], str]:
    """A sentence of three to eight signs."""
    while True:
        verb = (
            chance.pick(TRANSITIVE)
            if chance.often(0.75)
            else chance.pick([*INTRANSITIVE, *WEATHER])
        )
        parts = {"verb": verb}
        if verb not in WEATHER and chance.often(0.85):
            parts["subject"] = chance.pick(NAMES | PEOPLE | PRONOUNS)
        if chance.often(0.6):
            parts["time"] = chance.pick(TIMES)
            if chance.often(0.4):
                parts["part"] = chance.pick(PARTS)
        if chance.often(0.4):
            parts["place"] = chance.pick(["CITY", "PARK"] if verb in WEATHER else MAX_POSITIONS)
        if verb in TRANSITIVE:
            if verb in ("SEE", "LOVE", "NEED") and chance.often(0.4):
                parts["object"] = chance.pick(
                    [p for p in NAMES | PEOPLE if p != parts.get("subject")]
                )
            else:
                objects = {"EAT": FOOD, "DRINK": DRINKS, "READ": PAPER}.get(verb, NOUNS)
                parts["object"] = chance.pick(objects)
                if chance.often(0.45):
                    parts["adjective"] = chance.pick(ADJECTIVES)
                if NOUNS[parts["object"]][1] and chance.often(0.4):
                    parts["number"] = chance.pick(NUMBERS)
        if chance.often(0.15):
            parts["negated"] = "NOT"
        elif chance.often(0.15) and "subject" in parts:
            parts["question"] = "QUESTION"
        order = [
            "time",
            "part",
            "place",
            "subject",
            "object",
            "adjective",
            "number",
            "verb",
            "negated",
            "question",
        ]
        glosses = [parts[name] for name in order if name in parts]
        if 3 <= len(glosses) <= 8:
            return glosses, _translate(**parts)


def _translate(
    verb,
    subject=None,
    object=None,
    adjective=None,
    number=None,
    time=None,
    part=None,
    place=None,
    negated=None,
    question=None,
) -> str:
    """The English of a clause, with the agreement, tense and function words that no sign carries."""
    forms = MEET if verb == "SEE" and object in NAMES | PEOPLE else (VERBS | WEATHER)[verb]
    base, third, past, participle = forms
    who = (
        "it"
        if verb in WEATHER
        else (NAMES | PEOPLE).get(subject) or (PRONOUNS[subject][0] if subject else "they")
    )
    singular = verb in WEATHER or subject in NAMES | PEOPLE
    be = "am" if subject == "IX-1" else "is" if singular else "are"
    progressive = participle and (
        time == "TODAY" or (time is None and (verb in WEATHER or verb in INTRANSITIVE))
    )
    if time == "TOMORROW":
        auxiliary, main = "will", base
    elif time == "YESTERDAY":
        auxiliary, main = ("did", base) if negated or question else ("", past)
    elif progressive:
        auxiliary, main = be, participle
    elif negated or question:
        auxiliary, main = ("does" if singular else "do"), base
    else:
        auxiliary, main = "", (third if singular else base)
    what = ""
    if object in NOUNS:
        what = _noun_phrase(object, adjective, number)
        if negated:
            what = what.replace("some ", "any ")
    elif object:
        what = (NAMES | PEOPLE)[object]
    not_ = "not" if negated else ""
    core = [auxiliary, who, main, what] if question else [who, auxiliary, not_, main, what]
    when, where = _when(time, part), MAX_POSITIONS.get(place, "")
    words = [when, *core, where] if place and not question else [*core, where, when]
    return " ".join(w for w in words if w)


def _noun_phrase(noun: str, adjective: str | None, number: str | None) -> str:
    one, many = NOUNS[noun]
    word = ADJECTIVES.get(adjective, "")
    for nouns, others in (
        (ANIMALS, {"big": "huge", "small": "little"}),
        (FOOD | DRINKS, {"old": "stale", "new": "fresh"}),
    ):
        word = others.get(word, word) if noun in nouns else word
    if number:
        return " ".join(filter(None, [NUMBERS[number], word, many]))
    if not many:
        return " ".join(filter(None, ["some", word, one]))
    phrase = " ".join(filter(None, [word, one]))
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def _when(time: str | None, part: str | None) -> str:
    if time == "TODAY" and part:
        return {"MORNING": "this morning", "EVENING": "tonight"}[part]
    if time and part:
        return f"{TIMES[time]} {part.lower()}"
    return TIMES.get(time, "")


@dataclass(frozen=True)
class Performance:
    """A sentence signed by somebody, rendered when it is encoded."""

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
        poses = perform(
            [lexicon(self.dials)[g] for g in self.glosses], signer, rng, self.dials.assimilation
        )
        images = render(poses, signer, self.size, rng)
        return Fraction(FPS), (
            (i / FPS, av.VideoFrame.from_ndarray(image, "rgb24")) for i, image in enumerate(images)
        )


def signers(dials: CorpusConfig = DEMO) -> dict[str, range]:
    """Who signs in which split."""
    ends = np.cumsum(dials.signers).tolist()
    return {
        split: range(end - count, end)
        for split, end, count in zip(("train", "dev", "test"), ends, dials.signers)
    }


def split_of(glosses: list[str]) -> str:
    """Which split a sentence of three and more signs belongs to: a hash decides, so that no two splits share one."""
    slot = crc32(" ".join(glosses).encode()) % 10
    return {0: "test", 1: "dev"}.get(slot, "train")


def sentences(
    split: str, count: int, seed: int = 0, dials: CorpusConfig = DEMO
) -> Iterator[tuple[list[str], str]]:
    """`count` random sentences of a split as (glosses in signing order, text); "text" is what training has without video: a language model may read it."""
    chance = Chance(np.random.default_rng([seed, crc32(split.encode())]), dials)
    for i in range(count):
        if i == 0 or not dials.again or not chance.often(dials.again):
            glosses, text = _sentence(chance, split)
        yield glosses, _said(chance, text)


def clips(
    seed: int = 0,
    train: int | None = None,
    dev: int | None = None,
    test: int | None = None,
    size: int = 72,
    dials: CorpusConfig = DEMO,
) -> Iterator[Clip]:
    """The corpus as `Clip`s of `size` x `size` pixels."""
    for number, (split, count) in enumerate((("train", train), ("dev", dev), ("test", test))):
        people = signers(dials)[split]
        for i, (glosses, text) in enumerate(
            sentences(split, dials.clips[number] if count is None else count, seed, dials)
        ):
            signer = people[i % len(people)]
            media = Performance(tuple(glosses), signer, (seed, number, i), size, dials)
            yield Clip(
                f"{split}-{i:06d}", split, text, media, " ".join(glosses), f"signer{signer:02d}"
            )
