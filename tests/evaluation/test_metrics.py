"""BLEU, chrF and TER are held against plain calls of sacreBLEU and its command; ROUGE-L and WER against figures worked out by hand and against
implementations here that share nothing with the product's: every subsequence tried, and the recursive definition of the edit distance."""

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import sacrebleu
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from flallm.evaluation import metrics
from flallm.report import report

HYPOTHESES = ["the cat sat on the mat", "a dog , barks", ""]
REFERENCES = ["the cat sat on a mat", "a dog barks .", "nothing here"]
GERMAN = [
    ("Am Tag vor allem im Norden Regen, sonst ist es heiter.", "am Tag vor allem im Norden Regen , sonst heiter und trocken ."),
    ("morgen  regnet es in Köln 1.5 Liter", "Morgen regnet es in Köln 1.5 Liter und am Rhein"),
    ("", "und nun die wettervorhersage für morgen dienstag den elften"),
    ("und nun die wettervorhersage für morgen mittwoch", "und nun die wettervorhersage für morgen dienstag den elften"),
]
CHINESE = [("我今天去学校上课,你呢?", "我今天去学校上课，你去吗？"), ("他喜欢吃 苹果 iPhone 13", "他喜欢吃苹果 iPhone 12"), ("明天 下雨", "明天会下大雨")]
SENTENCES = st.lists(st.text("ab", min_size=1, max_size=2), max_size=6)


def sides(corpus):
    return [h for h, _ in corpus], [r for _, r in corpus]


def value(name, hypotheses, references, convention="raw"):
    return metrics.metric(convention, name).corpus_score(hypotheses, [references]).score


def test_figures_worked_out_by_hand():
    """BLEU-1 raw: 5 + 3 matches of 6 + 4 tokens, 6 + 4 + 2 in the references: 100 * 8/10 * exp(1 - 12/10)."""
    scores = metrics.scores(HYPOTHESES, REFERENCES, ["raw"])["raw"]
    assert scores["bleu1"]["value"] == pytest.approx(100 * 0.8 * 2.718281828459045 ** (1 - 12 / 10))
    # LCS 5 of 6 and 6; 3 of 4 and 4; 0: with equal lengths F is the share itself, whatever the beta.
    for name in ("rouge_l", "rouge_l_slrt"):
        assert scores[name]["value"] == pytest.approx(100 * (5 / 6 + 3 / 4 + 0) / 3)
    # One substitution of 6 words; one insertion and one deletion of 4; two deletions of 2.
    assert scores["wer"]["value"] == pytest.approx(100 * (1 + 2 + 2) / 12)
    # P = 1, R = 1/2. COCO: 2.44 * 1/2 / (1/2 + 1.44). SLRT, beta = 2: 5 * 1/2 / (1/2 + 4).
    assert value("rouge_l", ["a b"], ["a b c d"]) == pytest.approx(100 * 1.22 / 1.94)
    assert value("rouge_l_slrt", ["a b"], ["a b c d"]) == pytest.approx(100 * 2.5 / 4.5)


@pytest.mark.parametrize(
    "convention,corpus,prepare,arguments",
    [
        ("raw", GERMAN, str, {"tokenize": "none", "smooth_method": "floor", "smooth_value": 0}),
        ("13a", GERMAN, str, {}),
        ("lower", GERMAN, str.lower, {}),
        ("csl-daily", CHINESE, lambda text: " ".join(text.replace(" ", "")), {"tokenize": "none", "smooth_method": "floor", "smooth_value": 0}),
        ("zh", CHINESE, str, {"tokenize": "zh"}),
    ],
)
def test_agrees_with_plain_calls_of_sacrebleu(convention, corpus, prepare, arguments):
    """BLEU-n from sacreBLEU's BLEU-4: its brevity penalty and the geometric mean of its first n precisions."""
    scores = metrics.scores(*sides(corpus), [convention])[convention]
    hypotheses, references = ([prepare(text) for text in side] for side in sides(corpus))
    theirs = sacrebleu.corpus_bleu(hypotheses, [references], **arguments)
    assert 0 < theirs.score < 100
    for n in (1, 2, 3, 4):
        assert scores[f"bleu{n}"]["value"] == pytest.approx(theirs.bp * math.exp(sum(map(math.log, theirs.precisions[:n])) / n), abs=1e-6)
    assert scores["bleu4"]["value"] == pytest.approx(theirs.score, abs=1e-6) == metrics.bleu4(*sides(corpus), convention)
    assert scores["chrf"]["value"] == pytest.approx(sacrebleu.corpus_chrf(hypotheses, [references]).score, abs=1e-6)
    said, meant = sides(corpus)
    chinese = corpus is CHINESE  # whose characters TER takes for words
    ter = sacrebleu.corpus_ter(said, [meant], normalized=chinese, asian_support=chinese).score
    assert scores["ter"]["value"] == pytest.approx(ter, abs=1e-6)


def test_intervals_are_those_the_sacrebleu_command_prints(tmp_path):
    for name, side in zip(("hypotheses", "references"), sides(GERMAN * 10)):
        (tmp_path / name).write_text("\n".join(side) + "\n")
    command = [sys.executable, "-m", "sacrebleu", "references", "-i", "hypotheses", "-m", "bleu", "chrf", "ter", "--confidence", "-w", "6", "--force"]
    printed = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True).stdout
    ours = metrics.scores(*sides(GERMAN * 10), ["13a"])["13a"]
    for name, theirs in zip(("bleu4", "chrf", "ter"), json.loads(printed), strict=True):
        assert ours[name]["value"] == pytest.approx(theirs["score"], abs=1e-6)
        mean, half = theirs["confidence_mean"], theirs["confidence_var"]
        assert ours[name]["ci95"] == pytest.approx([mean - half, mean + half], abs=1e-5)
        assert ours["signature"][name.rstrip("4")] == theirs["signature"]


def longest_common_subsequence(a, b):
    def subsequences(words):
        return {picked for n in range(len(words) + 1) for picked in itertools.combinations(words, n)}

    return max(map(len, subsequences(a) & subsequences(b)))


def edits(a, b):
    if not a or not b:
        return len(a) + len(b)
    return min(edits(a[1:], b) + 1, edits(a, b[1:]) + 1, edits(a[1:], b[1:]) + (a[0] != b[0]))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(SENTENCES, SENTENCES), min_size=1, max_size=3))
def test_rouge_and_wer_agree_with_brute_force(pairs):
    hypotheses, references = [" ".join(h) for h, _ in pairs], [" ".join(r) for _, r in pairs]
    coco, slrt = [], []
    for h, r in pairs:
        common = longest_common_subsequence(h, r)
        p, q = common / max(1, len(h)), common / max(1, len(r))
        coco.append(2.44 * p * q / (q + 1.44 * p) if common else float(h == r))
        slrt.append(p * q * (p**2 + q**2) / (p**3 + q**3) if common else float(h == r))
    assert value("rouge_l", hypotheses, references) == pytest.approx(100 * sum(coco) / len(pairs), abs=1e-6)
    assert value("rouge_l_slrt", hypotheses, references) == pytest.approx(100 * sum(slrt) / len(pairs), abs=1e-6)
    wrong, words = sum(edits(h, r) for h, r in pairs), sum(len(r) for _, r in pairs)
    assert value("wer", hypotheses, references) == pytest.approx(100 * wrong / words if words else 100 * (wrong > 0), abs=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.text("abé我.", min_size=1, max_size=3), min_size=4, max_size=9), min_size=1, max_size=6))
def test_references_against_themselves_are_perfect(sentences):
    texts = [" ".join(words) for words in sentences]
    for convention in metrics.CONVENTIONS:
        for name in ("bleu1", "bleu2", "bleu3", "bleu4", "rouge_l", "rouge_l_slrt", "chrf"):
            assert value(name, texts, texts, convention) == pytest.approx(100)
        assert value("wer", texts, texts, convention) == value("ter", texts, texts, convention) == 0


@settings(max_examples=6, deadline=None)
@given(st.lists(st.tuples(SENTENCES, SENTENCES), min_size=2, max_size=8), st.randoms())
def test_the_order_of_samples_does_not_matter_and_the_interval_holds_the_value(pairs, random):
    pairs = [(" ".join(h), " ".join(r)) for h, r in pairs]
    ours = metrics.scores(*sides(pairs), ["raw", "13a"])
    shuffled = metrics.scores(*sides(random.sample(pairs, len(pairs))), ["raw", "13a"])
    for convention, scores in ours.items():
        for name in ("bleu1", "bleu2", "bleu3", "bleu4", "rouge_l", "rouge_l_slrt", "chrf", "ter", "wer"):
            assert scores[name]["value"] == pytest.approx(shuffled[convention][name]["value"])
            low, high = scores[name]["ci95"]
            assert 0 <= low <= scores[name]["value"] <= high
            assert high <= 100 or name in ("ter", "wer")


def test_what_a_convention_passes_over():
    spaced, unspaced = [" ".join(r) for _, r in CHINESE], [r for _, r in CHINESE]
    assert value("bleu4", spaced, unspaced, "csl-daily") == pytest.approx(100) and value("wer", spaced, unspaced, "csl-daily") == 0
    assert value("bleu4", spaced, unspaced, "raw") < 5 and value("wer", spaced, unspaced, "raw") > 100
    assert [value("wer", ["明天 会 下 雨 3 mm"], ["明天会下雨 3 mm"], convention) for convention in ("zh", "raw")] == [0, 100 * 4 / 3]
    shouted, quiet = [r.upper() for _, r in GERMAN], [r for _, r in GERMAN]
    assert value("bleu4", shouted, quiet, "lower") == pytest.approx(100) and value("rouge_l", shouted, quiet, "lower") == pytest.approx(100)
    assert value("bleu4", shouted, quiet, "13a") < 5 and value("rouge_l", shouted, quiet, "13a") < 50


def test_the_leading_score_is_the_longest_that_half_of_the_references_have_an_n_gram_for():
    for references, convention, name in [
        (["a b c d", "a"], "raw", "bleu4"),  # half are enough
        (["a b c d", "a b c", "a"], "raw", "bleu3"),
        (["a b", "a", "a b c d", ""], "raw", "bleu2"),
        (["hello", "good morning", "see you later"], "raw", "bleu2"),
        (["hello"] * 99 + ["good morning to you all"], "raw", "bleu1"),
        (["", " "], "raw", "bleu1"),
        (["see you later ."], "raw", "bleu4"),
        (["see you later."], "raw", "bleu3"),
        (["see you later."], "13a", "bleu4"),  # whose tokens split the full stop off
        (["明天下雨"], "csl-daily", "bleu4"),  # whose tokens are characters
        (["明天下雨"], "zh", "bleu4"),
        (["明天下雨"], "raw", "bleu1"),
    ]:
        assert metrics.leading(references, convention) == name, (references, convention)
        assert metrics.scores(references, references, [convention])[convention]["leading"] == name
    assert metrics.leading_note("bleu4") == "" and "fewer than half of the references have 2 words" in metrics.leading_note("bleu1")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.text("abé我.", min_size=1, max_size=3), min_size=1, max_size=6), min_size=1, max_size=8), st.randoms())
def test_a_perfect_model_has_the_top_of_the_leading_score_whatever_the_lengths(sentences, random):
    texts = [" ".join(words) for words in sentences]
    for convention in metrics.CONVENTIONS:
        name = metrics.leading(texts, convention)
        assert value(name, texts, texts, convention) == pytest.approx(100)
        assert value(name, [""] * len(texts), texts, convention) == 0
        assert metrics.leading(random.sample(texts, len(texts)), convention) == name


def test_empty_hypotheses_have_defined_scores():
    for convention, scores in metrics.scores(["", "  "], ["a b c d e", "f"]).items():
        assert all(scores[name] == {"value": 0, "ci95": [0, 0]} for name in ("bleu1", "bleu4", "rouge_l", "rouge_l_slrt", "chrf")), convention
        assert scores["wer"] == scores["ter"] == {"value": 100, "ci95": [100, 100]}


def test_published_tables():
    """FLa-LLM's rows as its results section gives them, and each table's own line of gains over the best system without gloss (BLEU-4, ROUGE-L)."""
    tables = yaml.safe_load((Path(report.__file__).parent / "published.yaml").read_text())
    expected = {
        "phoenix14t": ([45.27, 46.29, 35.33, 28.03, 23.09], 1.65, 2.78, 5, 8),
        "csl-daily": ([37.25, 37.13, 25.12, 18.38, 14.20], 3.20, 0.81, 4, 5),
        "how2sign": ([27.81, 29.81, 18.99, 13.27, 9.66], 1.63, 15.20, 0, 4),
    }
    assert tables.keys() == expected.keys()
    for name, (scores, bleu4, rouge_l, gloss, gloss_free) in expected.items():
        *others, ours = [s for s in tables[name]["systems"] if not s["gloss"]]
        assert ours["name"] == "FLa-LLM" and [ours[k] for k in ("rouge_l", "bleu1", "bleu2", "bleu3", "bleu4")] == scores
        # The table of CSL-Daily measures against GFSLT-VLP, its last row: the best in most columns.
        assert ours["bleu4"] - max(s["bleu4"] for s in others) == pytest.approx(bleu4)
        assert ours["rouge_l"] - next(s["rouge_l"] for s in reversed(others) if s["rouge_l"]) == pytest.approx(rouge_l)
        assert (sum(s["gloss"] for s in tables[name]["systems"]), len(others) + 1) == (gloss, gloss_free)
        assert tables[name]["convention"] in metrics.CONVENTIONS and tables[name]["split"] == "test"
