"""The embedded corpus: sentences from a small grammar, signed by procedural signers (`signer.py`), deterministic from a seed.

Translating it is more than naming signs:
- signs come as TIME PLACE SUBJECT OBJECT ADJECTIVE NUMBER VERB NOT QUESTION, the English as subject verb object place time,
  or with the time first where a place is named too;
- articles, prepositions, auxiliaries, plural and tense have no sign: they follow from number, time and noun;
- a sign's word depends on its neighbours (BIG is "big", of animals "huge"; EVENING after TODAY is "tonight"), an unsigned
  subject is "they", and some words are free choices of the speaker ("mother" or "mum", "hello" or "hi");
- two of five sentences are one or two signs long, the rest up to eight, about as in real corpora.
Sentences of three and more signs never occur in two splits, and nobody signs in two splits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from zlib import crc32

import av
import numpy as np

from flallm.corpora import Clip
from flallm.corpora.signer import FPS, Sign, make_signer, make_signs, perform, render

# gloss -> English. Nouns: (singular, plural), a plural of "" is a mass noun. Verbs: (base, third person, past, participle).
NAMES = {"ANNA": "anna", "PETER": "peter", "MARIA": "maria"}
PEOPLE = {"MOTHER": "my mother", "FATHER": "my father", "SISTER": "my sister", "FRIEND": "my friend", "TEACHER": "the teacher", "DOCTOR": "the doctor"}
PRONOUNS = {"IX-1": ("i", "me"), "IX-2": ("you", "you"), "IX-12": ("we", "us")}
TIMES = {"YESTERDAY": "yesterday", "TODAY": "today", "TOMORROW": "tomorrow"}
PARTS = {"MORNING": "in the morning", "EVENING": "in the evening"}
PLACES = {"HOME": "at home", "SCHOOL": "at school", "SHOP": "in the shop", "CITY": "in the city", "PARK": "in the park"}
FOOD = {"APPLE": ("apple", "apples"), "BREAD": ("bread", ""), "CAKE": ("cake", "cakes")}
DRINKS = {"WATER": ("water", ""), "COFFEE": ("coffee", "")}
PAPER = {"BOOK": ("book", "books"), "LETTER": ("letter", "letters")}
ANIMALS = {"DOG": ("dog", "dogs"), "CAT": ("cat", "cats")}
THINGS = {"CAR": ("car", "cars"), "HOUSE": ("house", "houses"), "FLOWER": ("flower", "flowers"), "BALL": ("ball", "balls"), "KEY": ("key", "keys")}
NOUNS = FOOD | DRINKS | PAPER | ANIMALS | THINGS
ADJECTIVES = {"RED": "red", "BLUE": "blue", "BIG": "big", "SMALL": "small", "OLD": "old", "NEW": "new"}
NUMBERS = {"2": "two", "3": "three", "4": "four", "5": "five"}
TRANSITIVE = {
    "BUY": ("buy", "buys", "bought", "buying"),
    "SELL": ("sell", "sells", "sold", "selling"),
    "FIND": ("find", "finds", "found", "finding"),
    "DRAW": ("draw", "draws", "drew", "drawing"),
    "NEED": ("need", "needs", "needed", ""),
    "LOVE": ("love", "loves", "loved", ""),
    "SEE": ("see", "sees", "saw", ""),
    "EAT": ("eat", "eats", "ate", "eating"),
    "DRINK": ("drink", "drinks", "drank", "drinking"),
    "READ": ("read", "reads", "read", "reading"),
}
MEET = ("meet", "meets", "met", "")  # SEE with a person
INTRANSITIVE = {
    "SLEEP": ("sleep", "sleeps", "slept", "sleeping"),
    "WORK": ("work", "works", "worked", "working"),
    "WAIT": ("wait", "waits", "waited", "waiting"),
    "DANCE": ("dance", "dances", "danced", "dancing"),
}
VERBS = TRANSITIVE | INTRANSITIVE
WEATHER = {"RAIN": ("rain", "rains", "rained", "raining"), "SNOW": ("snow", "snows", "snowed", "snowing")}
OTHER = ["HELLO", "THANKS", "SORRY", "PLEASE", "NOT", "QUESTION"]
GLOSSES = [*NAMES, *PEOPLE, *PRONOUNS, *TIMES, *PARTS, *PLACES, *NOUNS, *ADJECTIVES, *NUMBERS, *VERBS, *WEATHER, *OTHER]
FREE_CHOICE = {"mother": "mum", "father": "dad", "hello": "hi"}  # taken once in ten times


@cache
def lexicon() -> dict[str, Sign]:
    """gloss -> form, the same for every seed: it is the language. NOT shakes the head, QUESTION raises the brows."""
    signs = dict(zip(GLOSSES, make_signs(len(GLOSSES), seed=12), strict=True))
    for gloss, head in (("NOT", "shake"), ("QUESTION", "brows")):
        signs[gloss] = Sign(**{**vars(signs[gloss]), "head": head})
    return signs


def sentence(rng: np.random.Generator, split: str) -> tuple[list[str], str]:
    """One random sentence of a split as (glosses in signing order, English text)."""
    short = rng.random() < 0.4
    glosses, text = _short(rng) if short else _clause(rng)
    while not short and split_of(glosses) != split:
        glosses, text = _clause(rng)
    words = [FREE_CHOICE[w] if w in FREE_CHOICE and rng.random() < 0.1 else w for w in text.split()]
    return glosses, " ".join(words)


def _pick(rng: np.random.Generator, options) -> str:
    options = list(options)
    return options[rng.integers(len(options))]


def _short(rng: np.random.Generator) -> tuple[list[str], str]:
    if rng.random() < 0.45:
        gloss = _pick(rng, GLOSSES)
        return [gloss], _citation(gloss)
    match rng.integers(8):
        case 0:
            noun, number = _pick(rng, [n for n in NOUNS if NOUNS[n][1]]), _pick(rng, NUMBERS)
            return [noun, number], _noun_phrase(noun, None, number)
        case 1:
            noun, adjective = _pick(rng, NOUNS), _pick(rng, ADJECTIVES)
            return [noun, adjective], _noun_phrase(noun, adjective, None)
        case 2:
            person, verb = _pick(rng, NAMES | PEOPLE | PRONOUNS), _pick(rng, INTRANSITIVE)
            return [person, verb], _translate(verb, subject=person)
        case 3:
            time, weather = _pick(rng, TIMES), _pick(rng, WEATHER)
            return [time, weather], _translate(weather, time=time)
        case 4:
            verb = _pick(rng, INTRANSITIVE)
            return ["PLEASE", verb], f"please {VERBS[verb][0]}"
        case 5:
            person = _pick(rng, NAMES)
            return ["HELLO", person], f"hello {NAMES[person]}"
        case 6:
            time, part = _pick(rng, TIMES), _pick(rng, PARTS)
            return [time, part], _when(time, part)
        case _:
            place, weather = _pick(rng, ["CITY", "PARK"]), _pick(rng, WEATHER)
            return [place, weather], _translate(weather, place=place)


def _citation(gloss: str) -> str:
    """The English for a sign that stands alone."""
    others = {"HELLO": "hello", "THANKS": "thank you", "SORRY": "i am sorry", "PLEASE": "please", "NOT": "no", "QUESTION": "really"}
    if gloss in NOUNS:
        return _noun_phrase(gloss, None, None)
    if gloss in VERBS or gloss in WEATHER:
        return _translate(gloss)
    if gloss in PRONOUNS:
        return PRONOUNS[gloss][1]
    return (NAMES | PEOPLE | TIMES | PARTS | PLACES | ADJECTIVES | NUMBERS | others)[gloss]


def _clause(rng: np.random.Generator) -> tuple[list[str], str]:
    """A sentence of three to eight signs."""
    while True:
        verb = _pick(rng, TRANSITIVE) if rng.random() < 0.75 else _pick(rng, [*INTRANSITIVE, *WEATHER])
        parts = {"verb": verb}
        if verb not in WEATHER and rng.random() < 0.85:
            parts["subject"] = _pick(rng, NAMES | PEOPLE | PRONOUNS)
        if rng.random() < 0.6:
            parts["time"] = _pick(rng, TIMES)
            if rng.random() < 0.4:
                parts["part"] = _pick(rng, PARTS)
        if rng.random() < 0.4:
            parts["place"] = _pick(rng, ["CITY", "PARK"] if verb in WEATHER else PLACES)
        if verb in TRANSITIVE:
            if verb in ("SEE", "LOVE", "NEED") and rng.random() < 0.4:
                parts["object"] = _pick(rng, [p for p in NAMES | PEOPLE if p != parts.get("subject")])
            else:
                objects = {"EAT": FOOD, "DRINK": DRINKS, "READ": PAPER}.get(verb, NOUNS)
                parts["object"] = _pick(rng, objects)
                if rng.random() < 0.45:
                    parts["adjective"] = _pick(rng, ADJECTIVES)
                if NOUNS[parts["object"]][1] and rng.random() < 0.4:
                    parts["number"] = _pick(rng, NUMBERS)
        if rng.random() < 0.15:
            parts["negated"] = "NOT"
        elif rng.random() < 0.15 and "subject" in parts:
            parts["question"] = "QUESTION"
        order = ["time", "part", "place", "subject", "object", "adjective", "number", "verb", "negated", "question"]
        glosses = [parts[name] for name in order if name in parts]
        if 3 <= len(glosses) <= 8:
            return glosses, _translate(**parts)


def _translate(verb, subject=None, object=None, adjective=None, number=None, time=None, part=None, place=None, negated=None, question=None) -> str:
    """The English of a clause, with the agreement, tense and function words that no sign carries."""
    forms = MEET if verb == "SEE" and object in NAMES | PEOPLE else (VERBS | WEATHER)[verb]
    base, third, past, participle = forms
    who = "it" if verb in WEATHER else (NAMES | PEOPLE).get(subject) or (PRONOUNS[subject][0] if subject else "they")
    singular = verb in WEATHER or subject in NAMES | PEOPLE
    be = "am" if subject == "IX-1" else "is" if singular else "are"
    progressive = participle and (time == "TODAY" or (time is None and (verb in WEATHER or verb in INTRANSITIVE)))
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
    when, where = _when(time, part), PLACES.get(place, "")
    words = [when, *core, where] if place and not question else [*core, where, when]
    return " ".join(w for w in words if w)


def _noun_phrase(noun: str, adjective: str | None, number: str | None) -> str:
    one, many = NOUNS[noun]
    word = ADJECTIVES.get(adjective, "")
    if word == "big" and noun in ANIMALS:
        word = "huge"
    if word == "small" and noun in ANIMALS:
        word = "little"
    if word == "old" and noun in FOOD | DRINKS:
        word = "stale"
    if word == "new" and noun in FOOD | DRINKS:
        word = "fresh"
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

    @property
    def source(self) -> str:
        return f"synthetic:signer={self.signer}"

    def frames(self) -> tuple[Fraction, Iterator[av.VideoFrame]]:
        rng, signer = np.random.default_rng(self.seed), make_signer(self.signer)
        poses = perform([lexicon()[g] for g in self.glosses], signer, rng)
        return Fraction(FPS), (av.VideoFrame.from_ndarray(f, "rgb24") for f in render(poses, signer, self.size, rng))


SIGNERS = {"train": range(0, 16), "dev": range(16, 20), "test": range(20, 26)}


def split_of(glosses: list[str]) -> str:
    """Which split a sentence of three and more signs belongs to: a hash decides, so that no two splits share one."""
    slot = crc32(" ".join(glosses).encode()) % 10
    return {0: "test", 1: "dev"}.get(slot, "train")


def sentences(split: str, count: int, seed: int = 0) -> Iterator[tuple[list[str], str]]:
    """`count` random sentences of a split; "text" is further train-side material, for a language model to read."""
    rng = np.random.default_rng([seed, crc32(split.encode())])
    return (sentence(rng, "train" if split == "text" else split) for _ in range(count))


def clips(seed: int = 0, train: int = 2400, dev: int = 100, test: int = 250, size: int = 72) -> Iterator[Clip]:
    """The corpus as `Clip`s of `size` x `size` pixels."""
    for number, (split, count) in enumerate((("train", train), ("dev", dev), ("test", test))):
        for i, (glosses, text) in enumerate(sentences(split, count, seed)):
            signer = SIGNERS[split][i % len(SIGNERS[split])]
            media = Performance(tuple(glosses), signer, (seed, number, i), size)
            yield Clip(f"{split}-{i:06d}", split, text, media, " ".join(glosses), f"signer{signer:02d}")
