"""BLEU, chrF and TER agree with sacreBLEU; ROUGE-L and WER agree with figures worked out by hand.

ROUGE-L and WER also agree with slow implementations that share no code with the product: one tries
every subsequence, one uses the recursive definition of the edit distance.
"""

import itertools
import json
import math
import subprocess
import sys

import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st

from flallm.evaluation import metrics

HYPOTHESES = ["the cat sat on the mat", "a dog , barks", ""]
REFERENCES = ["the cat sat on a mat", "a dog barks .", "nothing here"]
GERMAN = [
    (
        "Am Tag vor allem im Norden Regen, sonst ist es heiter.",
        "am Tag vor allem im Norden Regen , sonst heiter und trocken .",
    ),
    ("morgen  regnet es in Köln 1.5 Liter", "Morgen regnet es in Köln 1.5 Liter und am Rhein"),
    ("", "und nun die wettervorhersage für morgen dienstag den elften"),
    (
        "und nun die wettervorhersage für morgen mittwoch",
        "und nun die wettervorhersage für morgen dienstag den elften",
    ),
]
CHINESE = [
    ("我今天去学校上课,你呢?", "我今天去学校上课，你去吗？"),
    ("他喜欢吃 苹果 iPhone 13", "他喜欢吃苹果 iPhone 12"),
    ("明天 下雨", "明天会下大雨"),
]
SENTENCES = st.lists(st.text("ab", min_size=1, max_size=2), max_size=6)


def sides(corpus):
    return [h for h, _ in corpus], [r for _, r in corpus]


def value(name, hypotheses, references, convention="raw"):
    return metrics.metric(convention, name).corpus_score(hypotheses, [references]).score


def test_figures_worked_out_by_hand():
    scores = metrics.scores(HYPOTHESES, REFERENCES, ["raw"])["raw"]
    # 5 + 3 matches of 6 + 4 tokens; 6 + 4 + 2 tokens in the references.
    assert scores["bleu1"]["value"] == pytest.approx(100 * 8 / 10 * math.exp(1 - 12 / 10))
    # LCS 5 of 6 and 6; 3 of 4 and 4; 0. With equal lengths F is the share itself for any beta.
    for name in ("rouge_l", "rouge_l_slrt"):
        assert scores[name]["value"] == pytest.approx(100 * (5 / 6 + 3 / 4 + 0) / 3)
    # One substitution of 6 words; one insertion and one deletion of 4; two deletions of 2.
    assert scores["wer"]["value"] == pytest.approx(100 * (1 + 2 + 2) / 12)
    # P = 1, R = 1/2. COCO: 2.44 * 1/2 / (1/2 + 1.44). SLRT, beta = 2: 5 * 1/2 / (1/2 + 4).
    assert value("rouge_l", ["a b"], ["a b c d"]) == pytest.approx(100 * 1.22 / 1.94)
    assert value("rouge_l_slrt", ["a b"], ["a b c d"]) == pytest.approx(100 * 2.5 / 4.5)


NO_SMOOTHING = {"tokenize": "none", "smooth_method": "floor", "smooth_value": 0}


@pytest.mark.parametrize(
    "convention,corpus,prepare,arguments",
    [
        ("raw", GERMAN, str, NO_SMOOTHING),
        ("13a", GERMAN, str, {}),
        ("lower", GERMAN, str.lower, {}),
        ("csl-daily", CHINESE, lambda text: " ".join(text.replace(" ", "")), NO_SMOOTHING),
        ("zh", CHINESE, str, {"tokenize": "zh"}),
    ],
)
def test_scores_agree_with_plain_calls_of_sacrebleu(convention, corpus, prepare, arguments):
    """BLEU-n is the brevity penalty times the geometric mean of the first n precisions."""
    hypotheses, references = sides(corpus)
    scores = metrics.scores(hypotheses, references, [convention])[convention]
    prepared_hypotheses = [prepare(text) for text in hypotheses]
    prepared_references = [prepare(text) for text in references]
    bleu = sacrebleu.corpus_bleu(prepared_hypotheses, [prepared_references], **arguments)
    assert 0 < bleu.score < 100
    for n in (1, 2, 3, 4):
        expected = bleu.bp * math.exp(sum(map(math.log, bleu.precisions[:n])) / n)
        assert scores[f"bleu{n}"]["value"] == pytest.approx(expected, abs=1e-6)
    assert scores["bleu4"]["value"] == pytest.approx(bleu.score, abs=1e-6)
    assert scores["bleu4"]["value"] == metrics.bleu4(hypotheses, references, convention)
    chrf = sacrebleu.corpus_chrf(prepared_hypotheses, [prepared_references])
    assert scores["chrf"]["value"] == pytest.approx(chrf.score, abs=1e-6)
    chinese = corpus is CHINESE  # TER's words are its characters
    ter = sacrebleu.corpus_ter(hypotheses, [references], normalized=chinese, asian_support=chinese)
    assert scores["ter"]["value"] == pytest.approx(ter.score, abs=1e-6)


def test_intervals_are_those_that_the_sacrebleu_command_prints(tmp_path):
    hypotheses, references = sides(GERMAN * 10)
    (tmp_path / "hypotheses").write_text("\n".join(hypotheses) + "\n")
    (tmp_path / "references").write_text("\n".join(references) + "\n")
    command = [sys.executable, "-m", "sacrebleu", "references", "-i", "hypotheses"]
    command += ["-m", "bleu", "chrf", "ter", "--confidence", "-w", "6", "--force"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    scores = metrics.scores(hypotheses, references, ["13a"])["13a"]
    printed_scores = json.loads(result.stdout)
    for name, printed in zip(("bleu4", "chrf", "ter"), printed_scores, strict=True):
        assert scores[name]["value"] == pytest.approx(printed["score"], abs=1e-6)
        mean, half = printed["confidence_mean"], printed["confidence_var"]
        assert scores[name]["ci95"] == pytest.approx([mean - half, mean + half], abs=1e-5)
        assert scores["signature"][name.rstrip("4")] == printed["signature"]


def longest_common_subsequence(a, b):
    def subsequences(words):
        return {
            picked for n in range(len(words) + 1) for picked in itertools.combinations(words, n)
        }

    return max(map(len, subsequences(a) & subsequences(b)))


def edits(a, b):
    if not a or not b:
        return len(a) + len(b)
    return min(edits(a[1:], b) + 1, edits(a, b[1:]) + 1, edits(a[1:], b[1:]) + (a[0] != b[0]))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(SENTENCES, SENTENCES), min_size=1, max_size=3))
def test_rouge_and_wer_agree_with_brute_force(pairs):
    hypotheses = [" ".join(h) for h, _ in pairs]
    references = [" ".join(r) for _, r in pairs]
    coco, slrt = [], []
    for h, r in pairs:
        common = longest_common_subsequence(h, r)
        p, q = common / max(1, len(h)), common / max(1, len(r))
        if common:
            coco.append(2.44 * p * q / (q + 1.44 * p))
            slrt.append(p * q * (p**2 + q**2) / (p**3 + q**3))
        else:
            coco.append(float(h == r))
            slrt.append(float(h == r))

    def mean(values):
        return pytest.approx(100 * sum(values) / len(pairs), abs=1e-6)

    assert value("rouge_l", hypotheses, references) == mean(coco)
    assert value("rouge_l_slrt", hypotheses, references) == mean(slrt)
    errors, words = sum(edits(h, r) for h, r in pairs), sum(len(r) for _, r in pairs)
    wer = 100 * errors / words if words else 100 * (errors > 0)
    assert value("wer", hypotheses, references) == pytest.approx(wer, abs=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.lists(st.text("abé我.", min_size=1, max_size=3), min_size=4, max_size=9),
        min_size=1,
        max_size=6,
    )
)
def test_references_against_themselves_are_perfect(sentences):
    texts = [" ".join(words) for words in sentences]
    for convention in metrics.CONVENTIONS:
        for name in ("bleu1", "bleu2", "bleu3", "bleu4", "rouge_l", "rouge_l_slrt", "chrf"):
            assert value(name, texts, texts, convention) == pytest.approx(100)
        assert value("wer", texts, texts, convention) == value("ter", texts, texts, convention) == 0


@settings(max_examples=6, deadline=None)
@given(st.lists(st.tuples(SENTENCES, SENTENCES), min_size=2, max_size=8), st.randoms())
def test_scores_ignore_the_order_of_samples_and_lie_in_their_interval(pairs, random):
    pairs = [(" ".join(h), " ".join(r)) for h, r in pairs]
    conventions = ["raw", "13a"]
    scores_in_order = metrics.scores(*sides(pairs), conventions)
    shuffled = metrics.scores(*sides(random.sample(pairs, len(pairs))), conventions)
    for convention, scores in scores_in_order.items():
        for name in metrics.LABELS:
            assert scores[name]["value"] == pytest.approx(shuffled[convention][name]["value"])
            low, high = scores[name]["ci95"]
            assert 0 <= low <= scores[name]["value"] <= high
            assert high <= 100 or name in ("ter", "wer")


def test_csl_daily_ignores_spaces():
    unspaced = [reference for _, reference in CHINESE]
    spaced = [" ".join(reference) for reference in unspaced]
    assert value("bleu4", spaced, unspaced, "csl-daily") == pytest.approx(100)
    assert value("wer", spaced, unspaced, "csl-daily") == 0
    assert value("bleu4", spaced, unspaced, "raw") < 5
    assert value("wer", spaced, unspaced, "raw") > 100


def test_zh_splits_characters_in_wer():
    hypotheses, references = ["明天 会 下 雨 3 mm"], ["明天会下雨 3 mm"]
    assert value("wer", hypotheses, references, "zh") == 0
    assert value("wer", hypotheses, references, "raw") == 100 * 4 / 3


def test_lower_ignores_case():
    references = [reference for _, reference in GERMAN]
    upper = [reference.upper() for reference in references]
    for name in ("bleu4", "rouge_l"):
        assert value(name, upper, references, "lower") == pytest.approx(100)
    assert value("bleu4", upper, references, "13a") < 5
    assert value("rouge_l", upper, references, "13a") < 50


def test_the_leading_score_is_the_largest_n_for_which_half_of_the_references_have_an_n_gram():
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
    assert metrics.leading_note("bleu4") == ""
    note = "fewer than half of the references have 2 words"
    assert note in metrics.leading_note("bleu1")


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.lists(st.text("abé我.", min_size=1, max_size=3), min_size=1, max_size=6),
        min_size=1,
        max_size=8,
    ),
    st.randoms(),
)
def test_a_perfect_model_has_the_top_of_the_leading_score_whatever_the_lengths(sentences, random):
    texts = [" ".join(words) for words in sentences]
    for convention in metrics.CONVENTIONS:
        name = metrics.leading(texts, convention)
        assert value(name, texts, texts, convention) == pytest.approx(100)
        assert value(name, [""] * len(texts), texts, convention) == 0
        assert metrics.leading(random.sample(texts, len(texts)), convention) == name


def test_empty_hypotheses_have_defined_scores():
    for convention, scores in metrics.scores(["", "  "], ["a b c d e", "f"]).items():
        for name in ("bleu1", "bleu4", "rouge_l", "rouge_l_slrt", "chrf"):
            assert scores[name] == {"value": 0, "ci95": [0, 0]}, (convention, name)
        assert scores["wer"] == scores["ter"] == {"value": 100, "ci95": [100, 100]}
