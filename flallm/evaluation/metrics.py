"""BLEU, ROUGE-L, chrF, TER and WER under named conventions, with signatures and intervals.

The same output has many scores, so a score is never given without its convention
(`CONVENTIONS`). All are sacreBLEU metrics (`scorers.py` adds those it lacks): every score has
sacreBLEU's bootstrap interval and works in its paired tests (`compare.py`). Scores come from raw
text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sacrebleu.metrics import BLEU
from sacrebleu.metrics.base import Metric

from flallm.evaluation.scorers import WER, ChrF, RougeL, Ter
from flallm.utils import UserError

RESAMPLES = 1000  # of the bootstrap; sacreBLEU chooses its seed and writes it into the signature
MIN_TOKENIZER_CEILING = 99.0  # leading score; users are warned below it
LABELS = {
    "bleu1": "BLEU-1",
    "bleu2": "BLEU-2",
    "bleu3": "BLEU-3",
    "bleu4": "BLEU-4",
    "rouge_l": "ROUGE-L",
    "rouge_l_slrt": "ROUGE-L (SLRT)",
    "chrf": "chrF",
    "ter": "TER",
    "wer": "WER",
}


@dataclass(frozen=True)
class Convention:
    definition: str
    used: str  # where
    tokenize: str  # sacreBLEU's name of BLEU's tokenizer
    smoothing: str  # sacreBLEU's name of BLEU's smoothing
    words: str = "none"  # tokenizer of ROUGE-L and WER; none: words are separated by spaces
    lowercase: bool = False


CONVENTIONS = {
    "raw": Convention(
        "words are separated by spaces, BLEU-n has n-grams up to n, no smoothing",
        "assumed for FLa-LLM and the papers in its tables on PHOENIX14T and How2Sign",
        tokenize="none",
        smoothing="none",
    ),
    "13a": Convention(
        "sacreBLEU's defaults: 13a tokens, exponential smoothing",
        "machine translation (WMT), YouTube-ASL",
        tokenize="13a",
        smoothing="exp",
    ),
    "csl-daily": Convention(
        "every character is a word, spaces do not count, else as raw",
        "papers on CSL-Daily",
        tokenize="char",
        smoothing="none",
        words="char",
    ),
    "zh": Convention(
        "sacreBLEU's zh tokens (every Chinese character and each run of other letters), "
        "exponential smoothing",
        "machine translation into Chinese (WMT)",
        tokenize="zh",
        smoothing="exp",
        words="zh",
    ),
    "lower": Convention(
        "13a in lower case, hypotheses and references",
        "systems that write no capitals",
        tokenize="13a",
        smoothing="exp",
        lowercase=True,
    ),
}


def scores(
    hypotheses: Sequence[str],
    references: Sequence[str],
    conventions: Sequence[str] = tuple(CONVENTIONS),
) -> dict[str, dict]:
    """Every score under each convention, for at least one sentence.

    Returns {convention: {"bleu4": {"value", "ci95"}, …, "leading", "signature", "num_samples",
    "references_sha256"}}. Raises UserError for an unknown convention.
    """
    assert len(hypotheses) == len(references) > 0
    hypotheses, references = list(hypotheses), list(references)
    joined = "\n".join(references).encode(errors="surrogatepass")
    cache: dict[tuple, tuple[dict, str]] = {}  # some conventions differ in BLEU only
    result = {}
    for convention in conventions:
        parts, signatures = {}, {}
        for name, (kind, arguments) in _kinds(convention).items():
            key = (kind, *arguments.items())
            if key not in cache:
                cache[key] = measure(kind(**arguments), hypotheses, references)
            parts[name], signatures[name] = cache[key]
        bleu_signature = {"bleu": signatures["bleu4"]}
        others = {name: s for name, s in signatures.items() if not name.startswith("bleu")}
        result[convention] = parts | {
            "leading": leading(references, convention),
            "signature": bleu_signature | others,
            "num_samples": len(references),
            "references_sha256": hashlib.sha256(joined).hexdigest(),
        }
    return result


def value(hypotheses: Sequence[str], references: Sequence[str], convention: str, name: str) -> dict:
    """{"value", "ci95"} of a single score."""
    return measure(metric(convention, name), list(hypotheses), list(references))[0]


def splitter(convention: str) -> Callable[[str], list[str]]:
    """A function that splits text into the words that ROUGE-L and WER count."""
    wer = metric(convention, "wer")
    return lambda text: wer._preprocess_segment(text).split()


def leading(references: Sequence[str], convention: str) -> str:
    """The score that decides: "bleu4", or BLEU-n of a smaller n for short references.

    It is BLEU-n with the largest n up to 4 for which at least half of the references have an
    n-gram of the convention's tokens. If fewer have one, BLEU-n depends on few sentences; if
    none has one, BLEU-n is 0 whatever the hypotheses are.
    """
    counts = token_counts(references, convention)
    for n in (4, 3, 2):
        if 2 * sum(count >= n for count in counts) >= len(counts):
            return f"bleu{n}"
    return "bleu1"


def leading_note(leading: str) -> str:
    """Says why another score than BLEU-4 leads; empty if BLEU-4 does."""
    if leading == "bleu4":
        return ""
    words = ngram_order(leading) + 1
    return (
        f"{LABELS[leading]} leads in place of BLEU-4: "
        f"fewer than half of the references have {words} words"
    )


def ngram_order(score: str) -> int:
    """The n of "bleun"."""
    return int(score.removeprefix("bleu"))


def token_counts(texts: Sequence[str], convention: str) -> list[int]:
    """The number of tokens that BLEU counts in each text."""
    bleu = metric(convention, "bleu4")
    return [len(bleu._preprocess_segment(text).split()) for text in texts]


def bleu4(hypotheses: Sequence[str], references: Sequence[str], convention: str) -> float:
    """BLEU-4 without an interval."""
    return point_estimate(hypotheses, references, convention, "bleu4")


def point_estimate(
    hypotheses: Sequence[str], references: Sequence[str], convention: str, name: str
) -> float:
    """A single score without its interval."""
    return metric(convention, name).corpus_score(list(hypotheses), [list(references)]).score


def metric(convention: str, name: str) -> Metric:
    """A score of a convention as a sacreBLEU metric."""
    kind, arguments = _kinds(convention)[name]
    return kind(**arguments)


def _kinds(convention: str) -> dict[str, tuple[type[Metric], dict]]:
    """The scores of a convention: {name: (class, its arguments)}."""
    if convention not in CONVENTIONS:
        raise UserError(f"there is no convention {convention!r}, but {', '.join(CONVENTIONS)}")
    spec = CONVENTIONS[convention]
    bleu = {
        "tokenize": spec.tokenize,
        "smooth_method": spec.smoothing,
        "lowercase": spec.lowercase,
        "force": True,  # no warning about tokenized text, which sign language corpora have
    }
    words = {"tokenize": spec.words, "lowercase": spec.lowercase}
    chinese = spec.words != "none"
    kinds = {f"bleu{n}": (BLEU, bleu | {"max_ngram_order": n}) for n in (1, 2, 3, 4)}
    return kinds | {
        "rouge_l": (RougeL, words | {"beta": 1.2}),
        "rouge_l_slrt": (RougeL, words | {"beta": None}),
        "chrf": (ChrF, {"lowercase": spec.lowercase}),
        "ter": (Ter, {"normalized": chinese, "asian_support": chinese}),
        "wer": (WER, words),
    }


def measure(metric: Metric, hypotheses: list[str], references: list[str]) -> tuple[dict, str]:
    """Returns ({"value", "ci95"}, signature).

    The interval is the one sacreBLEU prints: the mean of the resamples ± half the span of their
    middle 95 %. It is widened to hold the value and cut at the ends of the metric's scale. Takes
    up to 72 KB of memory for each sentence (chrF: 18 counts x 1000 resamples).
    """
    score = metric.corpus_score(hypotheses, [references], n_bootstrap=RESAMPLES)
    signature = str(metric.get_signature())
    printed = json.loads(score.format(width=12, is_json=True, signature=signature))
    # sacreBLEU prints no interval if every resample scores 0.
    mean, half = printed.get("confidence_mean", 0.0), printed.get("confidence_var", 0.0)
    bottom, top = getattr(metric, "bounds", (0.0, 100.0))
    value = min(float(score.score), top)  # sums of logarithms can exceed 100 a little
    low, high = max(bottom, mean - half), min(top, mean + half)
    return {"value": value, "ci95": [min(value, low), max(value, high)]}, signature
