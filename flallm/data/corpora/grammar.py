"""Random sentences of the embedded corpus, as glosses in signing order and English text."""

from __future__ import annotations

from collections.abc import Container, Iterable

import numpy as np

from flallm.data.corpora.english import Clause, noun_phrase, single_sign, time_phrase, translate
from flallm.data.corpora.words import (
    ADJECTIVES,
    DRINKS,
    FOOD,
    FREE_CHOICE,
    INTRANSITIVE,
    JOINS,
    MANY_GLOSSES,
    NAMES,
    NOUNS,
    NUMBERS,
    PAPER,
    PARAPHRASES,
    PARTS,
    PERSONS,
    PLACES,
    PRONOUNS,
    TIMES,
    TRANSITIVE,
    VERBS,
    WEATHER,
)

Sentence = tuple[list[str], str]  # (glosses in signing order, text)


class Sampler:
    """The random choices of sentences.

    lexicon: the glosses that the corpus has. tail: a word is as frequent as 1 / rank ** tail in its
    class (Zipf); 0 is uniform.
    """

    def __init__(self, rng: np.random.Generator, lexicon: Container[str], tail: float):
        self.rng, self.lexicon, self.tail = rng, lexicon, tail

    def happens(self, probability: float) -> bool:
        return self.rng.random() < probability

    def pick(self, glosses: Iterable[str]) -> str:
        """One of the glosses that are in the lexicon; earlier ones are more frequent."""
        glosses = [gloss for gloss in glosses if gloss in self.lexicon]
        if not self.tail:
            return glosses[self.rng.integers(len(glosses))]
        weights = np.arange(1, len(glosses) + 1) ** -self.tail
        return glosses[self.rng.choice(len(glosses), p=weights / weights.sum())]


def paraphrase(sampler: Sampler, text: str, probability: float) -> str:
    """The text as somebody says it.

    probability: how often a word of PARAPHRASES is replaced, and how often a time comes first.
    """
    words = []
    for word in text.split():
        is_replaced = word in FREE_CHOICE and sampler.happens(0.1)
        words.append(FREE_CHOICE[word] if is_replaced else word)
    text = " ".join(words)
    if not probability:
        return text
    for phrase, other in PARAPHRASES.items():
        if f" {phrase} " in f" {text} " and sampler.happens(probability):
            text = f" {text} ".replace(f" {phrase} ", f" {other} ").strip()
    is_joined = any(f" {join} " in text for join in JOINS.values())
    for time in ("yesterday", "today", "tomorrow", "tonight"):
        if text.endswith(f" {time}") and not is_joined and sampler.happens(probability):
            return f"{time} {text.removesuffix(f' {time}')}"
    return text


def joined_sentence(sampler: Sampler) -> Sentence:
    """A sentence of two clauses."""
    glosses, text = _statement(sampler)
    other_glosses, other_text = _statement(sampler)
    match sampler.pick(JOINS):
        case "BUT":
            return [*glosses, "BUT", *other_glosses], f"{text} but {other_text}"
        case "BECAUSE":
            return [*other_glosses, "BECAUSE", *glosses], f"{text} because {other_text}"
        case _:
            return ["IF", *other_glosses, *glosses], f"{text} if {other_text}"


def _statement(sampler: Sampler) -> Sentence:
    while True:
        glosses, text = clause_sentence(sampler)
        if "QUESTION" not in glosses:
            return glosses, text


def clause_sentence(sampler: Sampler) -> Sentence:
    """A clause of three to eight signs."""
    while True:
        clause = _clause(sampler)
        if 3 <= len(clause.glosses) <= 8:
            return clause.glosses, translate(clause)


def _clause(sampler: Sampler) -> Clause:
    if sampler.happens(0.75):
        clause = Clause(sampler.pick(TRANSITIVE))
    else:
        clause = Clause(sampler.pick([*INTRANSITIVE, *WEATHER]))
    if clause.verb not in WEATHER and sampler.happens(0.85):
        clause.subject = sampler.pick(PERSONS | PRONOUNS)
    if sampler.happens(0.6):
        clause.time = sampler.pick(TIMES)
        if sampler.happens(0.4):
            clause.part = sampler.pick(PARTS)
    if sampler.happens(0.4):
        clause.place = sampler.pick(["CITY", "PARK"] if clause.verb in WEATHER else PLACES)
    if clause.verb in TRANSITIVE:
        _add_object(sampler, clause)
    if sampler.happens(0.15):
        clause.negated = True
    elif sampler.happens(0.15) and clause.subject:
        clause.question = True
    return clause


def _add_object(sampler: Sampler, clause: Clause) -> None:
    if clause.verb in ("SEE", "LOVE", "NEED") and sampler.happens(0.4):
        clause.object = sampler.pick(person for person in PERSONS if person != clause.subject)
        return
    nouns = {"EAT": FOOD, "DRINK": DRINKS, "READ": PAPER}.get(clause.verb, NOUNS)
    clause.object = sampler.pick(nouns)
    if sampler.happens(0.45):
        clause.adjective = sampler.pick(ADJECTIVES)
    _, plural = NOUNS[clause.object]
    if plural and sampler.happens(0.4):
        clause.number = sampler.pick(NUMBERS)


def short_sentence(sampler: Sampler) -> Sentence:
    """A sentence of one or two signs."""
    if sampler.happens(0.45):
        gloss = sampler.pick(MANY_GLOSSES)
        return [gloss], single_sign(gloss)
    match sampler.rng.integers(8):
        case 0:
            noun = sampler.pick(noun for noun, (_, plural) in NOUNS.items() if plural)
            number = sampler.pick(NUMBERS)
            return [noun, number], noun_phrase(noun, None, number)
        case 1:
            noun, adjective = sampler.pick(NOUNS), sampler.pick(ADJECTIVES)
            return [noun, adjective], noun_phrase(noun, adjective, None)
        case 2:
            person, verb = sampler.pick(PERSONS | PRONOUNS), sampler.pick(INTRANSITIVE)
            return [person, verb], translate(Clause(verb, subject=person))
        case 3:
            time, weather = sampler.pick(TIMES), sampler.pick(WEATHER)
            return [time, weather], translate(Clause(weather, time=time))
        case 4:
            verb = sampler.pick(INTRANSITIVE)
            return ["PLEASE", verb], f"please {VERBS[verb][0]}"
        case 5:
            person = sampler.pick(NAMES)
            return ["HELLO", person], f"hello {NAMES[person]}"
        case 6:
            time, part = sampler.pick(TIMES), sampler.pick(PARTS)
            return [time, part], time_phrase(time, part)
        case _:
            place, weather = sampler.pick(["CITY", "PARK"]), sampler.pick(WEATHER)
            return [place, weather], translate(Clause(weather, place=place))
