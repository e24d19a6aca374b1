"""What sacreBLEU lacks, ROUGE-L and WER, as metrics of its kind, with its bootstrap, paired tests and signatures; underscored methods are those it asks of one.

An empty hypothesis gets no ROUGE-L and one error for each word of its reference; where the reference is empty too it is perfect.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from sacrebleu.metrics import BLEU, CHRF, TER
from sacrebleu.metrics.base import Metric, Score, Signature
from torchaudio.functional import edit_distance


class _PlainNumbers:
    """sacreBLEU's bootstrap counts in numpy's float32, and fails where a metric makes its score of these in some resamples and of a plain 0 in others."""

    def _compute_score_from_stats(self, stats) -> Score:
        return super()._compute_score_from_stats([float(x) for x in stats])


class ChrF(_PlainNumbers, CHRF):
    """sacreBLEU's."""


class Ter(_PlainNumbers, TER):
    """sacreBLEU's."""

    bounds = (0.0, math.inf)


class _Ratio(Metric):
    """A corpus score that is a sum over the sentences ÷ another, in per cent."""

    name: str

    def __init__(self, tokenize: str, lowercase: bool):
        super().__init__()
        self.tokenizer, self.lowercase = BLEU(tokenize=tokenize).tokenizer, lowercase

    def count(self, hypothesis: list[str], reference: list[str]) -> tuple[float, float]:
        """(what the sentence adds above, what below)."""
        raise NotImplementedError

    def get_signature(self) -> Signature:
        signature = super().get_signature()
        signature.update("case", "lc" if self.lowercase else "mixed")
        signature.update("tok", self.tokenizer.signature())
        return signature

    def _preprocess_segment(self, sent: str) -> str:
        return self.tokenizer(sent.lower() if self.lowercase else sent)

    def _extract_reference_info(self, refs: Sequence[str]) -> dict:
        return {"reference": refs[0].split()}

    def _compute_segment_statistics(self, hypothesis: str, ref_kwargs: dict) -> list[float]:
        return list(self.count(hypothesis.split(), ref_kwargs["reference"]))

    def _aggregate_and_compute(self, stats) -> Score:
        return self._compute_score_from_stats(np.sum(stats, axis=0))

    def _compute_score_from_stats(self, stats) -> Score:
        above, below = map(float, stats)
        return Score(self.name, 100 * above / below if below else 100.0 * (above > 0))


class WER(_Ratio):
    """Word error rate: edits ÷ words of the references, over the corpus."""

    name, bounds = "WER", (0.0, math.inf)

    def count(self, hypothesis: list[str], reference: list[str]) -> tuple[float, float]:
        return edit_distance(hypothesis, reference), len(reference)


class RougeL(_Ratio):
    """The mean over sentences of `rouge_l`. Beta 1.2 is that of the COCO caption evaluation, none that of the SLRT code base: precision ÷ recall."""

    name = "ROUGE-L"

    def __init__(self, tokenize: str, lowercase: bool, beta: float | None):
        super().__init__(tokenize, lowercase)
        self.beta = beta

    def count(self, hypothesis: list[str], reference: list[str]) -> tuple[float, float]:
        return rouge_l(hypothesis, reference, self.beta), 1

    def get_signature(self) -> Signature:
        signature = super().get_signature()
        signature.update("beta", "precision/recall" if self.beta is None else self.beta)
        return signature


def rouge_l(hypothesis: list[str], reference: list[str], beta: float | None) -> float:
    """F-measure of the longest common subsequence (Lin 2004), from 0 to 1."""
    if not hypothesis and not reference:
        return 1.0
    common = _longest_common_subsequence(hypothesis, reference)
    if not common:
        return 0.0
    precision, recall = common / len(hypothesis), common / len(reference)
    beta = precision / recall if beta is None else beta
    return (1 + beta**2) * precision * recall / (recall + beta**2 * precision)


def _longest_common_subsequence(a: list[str], b: list[str]) -> int:
    """Its length, with a row of the usual table in the bits of one integer (Hyyrö 2004): a clear bit is a place in b where the length grows."""
    places: dict[str, int] = {}
    for j, word in enumerate(b):
        places[word] = places.get(word, 0) | 1 << j
    every = (1 << len(b)) - 1
    row = every
    for word in a:
        matches = row & places.get(word, 0)
        row = ((row + matches) | (row - matches)) & every
    return len(b) - row.bit_count()
