"""ROUGE-L and WER, which sacreBLEU lacks, as sacreBLEU metrics.

They have its bootstrap, paired tests and signatures. Methods with an underscore are sacreBLEU's
interface. An empty hypothesis gets a ROUGE-L of 0 and one error for each word of its reference;
if the reference is empty too, it is perfect.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from sacrebleu.metrics import BLEU, CHRF, TER
from sacrebleu.metrics.base import Metric, Score, Signature
from torchaudio.functional import edit_distance


class _PlainNumbers:
    """Converts the counts of sacreBLEU's bootstrap from numpy's float32 to float.

    Without it the bootstrap fails if some resamples score a float32 and others a plain 0.
    """

    def _compute_score_from_stats(self, stats) -> Score:
        return super()._compute_score_from_stats([float(x) for x in stats])


class ChrF(_PlainNumbers, CHRF):
    """sacreBLEU's chrF."""


class Ter(_PlainNumbers, TER):
    """sacreBLEU's TER."""

    bounds = (0.0, math.inf)


class _Ratio(Metric):
    """A corpus score in per cent: a sum over the sentences divided by another sum."""

    name: str

    def __init__(self, tokenize: str, lowercase: bool):
        super().__init__()
        self.tokenizer, self.lowercase = BLEU(tokenize=tokenize).tokenizer, lowercase

    def count(self, hypothesis: list[str], reference: list[str]) -> tuple[float, float]:
        """What a sentence adds to (numerator, denominator)."""
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
        numerator, denominator = (float(x) for x in stats)
        if denominator:
            return Score(self.name, 100 * numerator / denominator)
        return Score(self.name, 100.0 if numerator > 0 else 0.0)


class WER(_Ratio):
    """Word error rate: edits divided by words of the references, over the corpus."""

    name, bounds = "WER", (0.0, math.inf)

    def count(self, hypothesis: list[str], reference: list[str]) -> tuple[float, float]:
        return edit_distance(hypothesis, reference), len(reference)


class RougeL(_Ratio):
    """The mean of `rouge_l` over sentences.

    beta: 1.2 is that of the COCO caption evaluation; None is that of the SLRT code base,
    precision divided by recall.
    """

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
    if beta is None:
        beta = precision / recall
    return (1 + beta**2) * precision * recall / (recall + beta**2 * precision)


def _longest_common_subsequence(a: list[str], b: list[str]) -> int:
    """Its length (Hyyrö 2004).

    The bits of one integer hold a row of the usual table: bit j is clear if the length grows at
    b[j].
    """
    positions: dict[str, int] = {}  # of each word in b, as bits
    for j, word in enumerate(b):
        positions[word] = positions.get(word, 0) | 1 << j
    mask = (1 << len(b)) - 1
    row = mask
    for word in a:
        matches = row & positions.get(word, 0)
        row = ((row + matches) | (row - matches)) & mask
    return len(b) - row.bit_count()
