"""The English of the embedded corpus: agreement, tense and function words that no sign carries."""

from __future__ import annotations

from dataclasses import dataclass

from flallm.data.corpora.words import (
    ADJECTIVES,
    ANIMALS,
    DRINKS,
    FOOD,
    INTRANSITIVE,
    JOINS,
    MEET,
    NOUNS,
    NUMBERS,
    PARTS,
    PERSONS,
    PLACES,
    PRONOUNS,
    TIMES,
    VERBS,
    WEATHER,
)

SINGLE_SIGNS = {  # that are neither nouns nor verbs
    "HELLO": "hello",
    "THANKS": "thank you",
    "SORRY": "i am sorry",
    "PLEASE": "please",
    "NOT": "no",
    "QUESTION": "really",
}
ANIMAL_ADJECTIVES = {"big": "huge", "small": "little"}
FOOD_ADJECTIVES = {"old": "stale", "new": "fresh"}


@dataclass
class Clause:
    """A sentence by its glosses. None is what is not signed."""

    verb: str
    subject: str | None = None
    object: str | None = None
    adjective: str | None = None
    number: str | None = None
    time: str | None = None
    part: str | None = None  # of the day
    place: str | None = None
    negated: bool = False
    question: bool = False

    @property
    def glosses(self) -> list[str]:
        """The glosses in signing order."""
        slots = (
            self.time,
            self.part,
            self.place,
            self.subject,
            self.object,
            self.adjective,
            self.number,
            self.verb,
        )
        glosses = [gloss for gloss in slots if gloss]
        if self.negated:
            glosses.append("NOT")
        if self.question:
            glosses.append("QUESTION")
        return glosses


def translate(clause: Clause) -> str:
    """The English of a clause: subject verb object place time.

    The time comes first where a place is signed, too.
    """
    subject = _subject(clause)
    auxiliary, verb = _verb_phrase(clause)
    object_phrase = ""
    if clause.object in NOUNS:
        object_phrase = noun_phrase(clause.object, clause.adjective, clause.number)
        if clause.negated:
            object_phrase = object_phrase.replace("some ", "any ")
    elif clause.object:
        object_phrase = PERSONS[clause.object]
    if clause.question:
        core = [auxiliary, subject, verb, object_phrase]
    else:
        negation = "not" if clause.negated else ""
        core = [subject, auxiliary, negation, verb, object_phrase]
    time, place = time_phrase(clause.time, clause.part), PLACES.get(clause.place, "")
    if clause.place and not clause.question:
        return _join(time, *core, place)
    return _join(*core, place, time)


def _subject(clause: Clause) -> str:
    if clause.verb in WEATHER:
        return "it"
    if clause.subject in PERSONS:
        return PERSONS[clause.subject]
    return PRONOUNS[clause.subject][0] if clause.subject else "they"


def _verb_phrase(clause: Clause) -> tuple[str, str]:
    """(auxiliary, verb); the auxiliary is "" where there is none."""
    base, third_person, past, participle = (VERBS | WEATHER)[clause.verb]
    if clause.verb == "SEE" and clause.object in PERSONS:
        base, third_person, past, participle = MEET
    is_singular = clause.verb in WEATHER or clause.subject in PERSONS
    needs_auxiliary = clause.negated or clause.question
    if clause.time == "TOMORROW":
        return "will", base
    if clause.time == "YESTERDAY":
        return ("did", base) if needs_auxiliary else ("", past)
    is_now = clause.time == "TODAY"
    if clause.time is None:
        is_now = clause.verb in WEATHER or clause.verb in INTRANSITIVE
    if participle and is_now:
        if clause.subject == "IX-1":
            return "am", participle
        return "is" if is_singular else "are", participle
    if needs_auxiliary:
        return "does" if is_singular else "do", base
    return "", third_person if is_singular else base


def noun_phrase(noun: str, adjective: str | None, number: str | None) -> str:
    """The English of a noun with its article. An adjective's word depends on the noun."""
    singular, plural = NOUNS[noun]
    word = ADJECTIVES.get(adjective, "")
    if noun in ANIMALS:
        word = ANIMAL_ADJECTIVES.get(word, word)
    if noun in FOOD or noun in DRINKS:
        word = FOOD_ADJECTIVES.get(word, word)
    if number:
        return _join(NUMBERS[number], word, plural)
    if not plural:
        return _join("some", word, singular)
    phrase = _join(word, singular)
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def time_phrase(time: str | None, part: str | None) -> str:
    """The English of a time and a part of the day, "" for none."""
    if time == "TODAY" and part:
        return {"MORNING": "this morning", "EVENING": "tonight"}[part]
    if time and part:
        return f"{TIMES[time]} {part.lower()}"
    return TIMES.get(time, "")


def single_sign(gloss: str) -> str:
    """The English of a sign that stands alone."""
    if gloss in NOUNS:
        return noun_phrase(gloss, None, None)
    if gloss in VERBS or gloss in WEATHER:
        return translate(Clause(gloss))
    if gloss in PRONOUNS:
        return PRONOUNS[gloss][1]
    phrases = PERSONS | TIMES | PARTS | PLACES | ADJECTIVES | NUMBERS | SINGLE_SIGNS | JOINS
    return phrases[gloss]


def _join(*words: str) -> str:
    return " ".join(word for word in words if word)
