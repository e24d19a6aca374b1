import hashlib
from dataclasses import replace

import numpy as np
import pytest

from flallm.data.corpora import synthetic, words
from flallm.data.corpora.english import Clause, translate
from flallm.data.corpora.signer import HAND, Sign, make_signer, perform
from flallm.data.encode import EncodeOptions, encode
from flallm.utils import UserError


def long_sentences(sentences: list) -> set[tuple[str, ...]]:
    return {tuple(glosses) for glosses, _ in sentences if len(glosses) > 2}


def test_the_demo_corpus_is_as_its_docstring_says():
    train = list(synthetic.sentences("train", 2400))
    test = list(synthetic.sentences("test", 250))
    vocabulary = set(" ".join(text for _, text in train).split())
    assert len(synthetic.GLOSSES) >= 60 and len(vocabulary) >= 120
    assert len(set(map(str, synthetic.lexicon().values()))) == len(synthetic.GLOSSES)
    lengths = [len(glosses) for glosses, _ in train]
    assert min(lengths) == 1 and max(lengths) == 8
    train_texts = {text for _, text in train}
    assert sum(text in train_texts for _, text in test) < len(test) / 2
    assert not long_sentences(train) & long_sentences(test)
    signers = {split: set(numbers) for split, numbers in synthetic.signers().items()}
    assert not signers["train"] & (signers["dev"] | signers["test"])


def test_a_clip_is_encoded_to_equal_bytes_twice():
    def encoded() -> tuple[bytes, dict]:
        return encode(next(synthetic.clips(seed=3, train=1, dev=0, test=0)), EncodeOptions())

    assert encoded() == encoded()


def test_the_sentences_of_the_demo_stay_the_same():
    """Scores are compared over versions."""
    digest = hashlib.sha256()
    for split in ("train", "dev", "test"):
        for glosses, text in synthetic.sentences(split, 500):
            digest.update(f"{' '.join(glosses)}|{text}\n".encode())
    assert digest.hexdigest().startswith("0c1ac1df1c2a7a0e")


@pytest.mark.parametrize(
    "change,message",
    [
        ({"many": False}, "joined needs many"),
        ({"signers": (8,)}, "signers: three numbers are needed"),
        ({"clips": (8, 0, 1)}, "clips: three"),
    ],
)
def test_a_corpus_config_that_cannot_be_is_a_user_error(change, message):
    with pytest.raises(UserError, match=message):
        replace(synthetic.PRESETS["bench"], **change)


def test_the_benchmark_corpus_is_as_its_config_says():
    dials = synthetic.PRESETS["bench"]
    train = list(synthetic.sentences("train", 4800, dials=dials))
    test = list(synthetic.sentences("test", 400, dials=dials))
    text_alone = list(synthetic.sentences("text", 4800, dials=dials))
    assert len(synthetic.MANY_GLOSSES) > 2 * len(synthetic.GLOSSES)
    assert max(len(glosses) for glosses, _ in train) > 12
    signers = synthetic.signers(dials)
    assert not set(signers["train"]) & {*signers["dev"], *signers["test"]}
    assert not long_sentences(train) & long_sentences(test)

    def num_held_out(sentences: list) -> int:
        """Sentences with a pair of a noun and another word that no training clip has."""
        count = 0
        for glosses, _ in sentences:
            pairs = synthetic.pairs(glosses)
            count += any(synthetic.is_held_out(*pair, dials) for pair in pairs)
        return count

    assert num_held_out(train) == 0
    assert num_held_out(test) > 40 and num_held_out(text_alone) > 480


def test_the_benchmark_corpus_has_paraphrases_rare_words_and_reordered_clauses():
    train = list(synthetic.sentences("train", 4800, dials=synthetic.PRESETS["bench"]))
    texts: dict[tuple[str, ...], set[str]] = {}  # of each signing
    for glosses, text in train:
        texts.setdefault(tuple(glosses), set()).add(text)
    assert sum(len(signing) > 4 and len(texts[signing]) > 1 for signing in texts) > 100
    counts = sorted(sum(glosses.count(noun) for glosses, _ in train) for noun in words.NOUNS)
    assert counts[-1] > 5 * counts[0] > 0
    # A reason is signed before its main clause, and comes after it in English.
    for glosses, text in train:
        if "BECAUSE" in glosses and "SNOW" in glosses[: glosses.index("BECAUSE")]:
            assert "snow" in text[text.index(" because ") :]
            return
    raise AssertionError("no sentence has snow as its reason")


def test_the_form_of_a_sign_depends_on_its_neighbours():
    high = Sign("fist", "up", "forehead", "hold", "one")
    low = Sign("five", "down", "low", "hold", "one")

    def first_sign(*signs: Sign, assimilation: float) -> np.ndarray:
        rng = np.random.default_rng(0)
        return perform(list(signs), make_signer(0), rng, assimilation)[8:12, :HAND]

    single, before_low = first_sign(high, assimilation=0.5), first_sign(high, low, assimilation=0.5)
    y, index_finger = 1, 4
    assert before_low[:, y].mean() > single[:, y].mean() + 0.2  # lower
    assert before_low[:, index_finger].mean() > single[:, index_finger].mean() + 0.3  # more open
    assert np.array_equal(single, first_sign(high, assimilation=0))


@pytest.mark.parametrize(
    "glosses,text",
    [
        (
            "TOMORROW SHOP MOTHER APPLE RED 2 BUY",
            "tomorrow my mother will buy two red apples in the shop",
        ),
        ("YESTERDAY FATHER COFFEE DRINK NOT", "my father did not drink any coffee yesterday"),
        ("TODAY EVENING DOG BIG SEE", "they see a huge dog tonight"),
        ("ANNA TEACHER SEE QUESTION", "does anna meet the teacher"),
    ],
)
def test_the_english_of_a_clause(glosses, text):
    glosses = glosses.split()
    kinds = {
        "verb": words.VERBS,
        "time": words.TIMES,
        "part": words.PARTS,
        "place": words.PLACES,
        "adjective": words.ADJECTIVES,
        "number": words.NUMBERS,
        "object": words.NOUNS,
    }
    slots = {}
    for slot, members in kinds.items():
        slots[slot] = next((gloss for gloss in glosses if gloss in members), None)
    persons = [gloss for gloss in glosses if gloss in words.PERSONS]
    slots["subject"] = persons[0] if persons else None
    if len(persons) > 1:
        slots["object"] = persons[1]
    clause = Clause(**slots, negated="NOT" in glosses, question="QUESTION" in glosses)
    assert clause.glosses == glosses
    assert translate(clause) == text
