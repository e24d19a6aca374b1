"""BLEU, ROUGE-L, chrF and WER under named conventions, with signatures and bootstrap intervals.

One output has many numbers, so a score is never given without its convention:
- raw: the sign-language line's. Whitespace tokens, BLEU-n with n-grams up to n, no smoothing.
- 13a: sacreBLEU's defaults, exponential smoothing.
ROUGE-L is COCO's under both: the mean of per-sentence F with beta 1.2 over whitespace tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from sacrebleu.metrics import BLEU, CHRF

CONVENTIONS = {
    "raw": {"tokenize": "none", "smooth_method": "none", "force": True},
    "13a": {"tokenize": "13a", "smooth_method": "exp"},
}
RESAMPLES, SEED = 1000, 12345  # of the bootstrap, as in sacreBLEU


def score(hypotheses: Sequence[str], references: Sequence[str], convention: str) -> dict:
    """Every score under one convention: {"bleu4": {"value", "ci95"}, …, "signature", "num_samples", "references_sha256"}."""
    assert len(hypotheses) == len(references)
    hypotheses, references = list(hypotheses), list(references)
    scores = {}
    for n in (1, 2, 3, 4):
        metric = BLEU(max_ngram_order=n, **CONVENTIONS[convention])
        scores[f"bleu{n}"] = _with_interval(metric, hypotheses, references)
    scores["rouge_l"] = _mean_with_interval(100 * np.array([rouge_l(h, r) for h, r in zip(hypotheses, references)]))
    chrf = CHRF()
    scores["chrf"] = _with_interval(chrf, hypotheses, references)
    scores["wer"] = _wer(hypotheses, references)
    return scores | {
        "signature": {"bleu": str(metric.get_signature()), "chrf": str(chrf.get_signature()), "rouge_l": "coco|beta:1.2|tok:none|mean"},
        "num_samples": len(references),
        "references_sha256": hashlib.sha256("\n".join(references).encode()).hexdigest(),
    }


def bleu4(hypotheses: Sequence[str], references: Sequence[str], convention: str) -> float:
    """BLEU-4 alone, without an interval."""
    return BLEU(**CONVENTIONS[convention]).corpus_score(list(hypotheses), [list(references)]).score


def _with_interval(metric, hypotheses: list[str], references: list[str]) -> dict:
    """A sacreBLEU score with the percentiles of its bootstrap (Koehn 2004), from the sentences' own statistics."""
    statistics = np.array(metric._extract_corpus_statistics(hypotheses, [references]))
    resampled = [metric._compute_score_from_stats(s.tolist()).score for s in statistics[_resampled(len(statistics))].sum(1)]
    return _scored(metric.corpus_score(hypotheses, [references]).score, resampled)


def _scored(value: float, resampled) -> dict:
    low, high = np.percentile(resampled, [2.5, 97.5])
    return {"value": float(value), "ci95": [min(float(low), float(value)), max(float(high), float(value))]}


def _resampled(count: int) -> np.ndarray:
    return np.random.default_rng(SEED).integers(0, count, (RESAMPLES, count))


def _mean_with_interval(values: np.ndarray) -> dict:
    return _scored(values.mean(), values[_resampled(len(values))].mean(1))


def _wer(hypotheses: list[str], references: list[str]) -> dict:
    from torchaudio.functional import edit_distance

    errors = np.array([edit_distance(h.split(), r.split()) for h, r in zip(hypotheses, references)])
    words = np.array([len(r.split()) for r in references])
    picks = _resampled(len(words))
    rates = 100 * errors[picks].sum(1) / np.maximum(1, words[picks].sum(1))
    return _scored(100 * errors.sum() / max(1, words.sum()), rates)


def rouge_l(hypothesis: str, reference: str, beta: float = 1.2) -> float:
    """F-measure of the longest common subsequence of whitespace tokens (Lin 2004; beta of the COCO caption evaluation)."""
    h, r = hypothesis.split(), reference.split()
    common = _longest_common_subsequence(h, r)
    if not common:
        return 0.0
    precision, recall = common / len(h), common / len(r)
    return (1 + beta**2) * precision * recall / (recall + beta**2 * precision)


def _longest_common_subsequence(a: list[str], b: list[str]) -> int:
    row = [0] * (len(b) + 1)
    for x in a:
        diagonal = 0
        for j, y in enumerate(b):
            diagonal, row[j + 1] = row[j + 1], diagonal + 1 if x == y else max(row[j + 1], row[j])
    return row[-1]
