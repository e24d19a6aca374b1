import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flallm import metrics

HYPOTHESES = ["the cat sat on the mat", "a dog , barks", ""]
REFERENCES = ["the cat sat on a mat", "a dog barks .", "nothing here"]


def test_figures_worked_out_by_hand():
    """BLEU-1 raw: 5 + 3 matches of 6 + 4 tokens, 6 + 4 + 2 in the references: 100 * 8/10 * exp(1 - 12/10)."""
    scores = metrics.score(HYPOTHESES, REFERENCES, "raw")
    assert scores["bleu1"]["value"] == pytest.approx(100 * 0.8 * 2.718281828459045 ** (1 - 12 / 10))
    # LCS 5 of 6 and 6; 3 of 4 and 4; 0: with equal lengths F is the share itself.
    assert scores["rouge_l"]["value"] == pytest.approx(100 * (5 / 6 + 3 / 4 + 0) / 3)
    # One substitution of 6 words; one insertion and one deletion of 4; two deletions of 2.
    assert scores["wer"]["value"] == pytest.approx(100 * (1 + 2 + 2) / 12)
    assert metrics.rouge_l("a b", "a b c d") == pytest.approx((1 + 1.44) * 1 * 0.5 / (0.5 + 1.44 * 1))


@settings(max_examples=15, deadline=None)
@given(st.lists(st.lists(st.text("abc", min_size=1, max_size=3), min_size=4, max_size=9), min_size=2, max_size=6))
def test_references_against_themselves_are_perfect(sentences):
    texts = [" ".join(words) for words in sentences]
    for convention in metrics.CONVENTIONS:
        scores = metrics.score(texts, texts, convention)
        assert scores["bleu4"]["value"] == pytest.approx(100) and scores["rouge_l"]["value"] == pytest.approx(100)
        assert scores["wer"]["value"] == 0 and scores["chrf"]["value"] == pytest.approx(100)


def test_the_interval_holds_the_value_and_the_convention_matters():
    hypotheses, references = ["a b c d e .", "a b x d e", "f g h i j"] * 5, ["a b c d e.", "a b c d e", "f g h i k"] * 5
    values = {}
    for convention in metrics.CONVENTIONS:
        scores = metrics.score(hypotheses, references, convention)
        for name in ("bleu1", "bleu4", "rouge_l", "chrf", "wer"):
            low, high = scores[name]["ci95"]
            assert low <= scores[name]["value"] <= high
        values[convention] = scores["bleu4"]["value"]
    assert values["raw"] != values["13a"]
