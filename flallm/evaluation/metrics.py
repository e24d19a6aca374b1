"""BLEU, ROUGE-L, chrF, TER and WER under named conventions, with signatures and bootstrap intervals.

One output has many numbers, so a score is never given without its convention (`CONVENTIONS`). All are sacreBLEU metrics (`scorers.py` has those it
lacks), so that the interval of every score is its bootstrap and every score can stand in its paired tests (`compare.py`). What is scored is raw text.
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

RESAMPLES = 1000  # of the bootstrap; its seed is sacreBLEU's and stands in the signatures
REACHABLE = 99.0  # leading score that a tokenizer lets a model reach, below which people are told
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
    tokenize: str  # sacreBLEU's name of what BLEU counts as words …
    smoothing: str
    words: str = "none"  # … and of what ROUGE-L and WER count as words; none: what stands between spaces
    lowercase: bool = False


CONVENTIONS = {
    "raw": Convention(
        "words are what stands between spaces, BLEU-n has n-grams up to n, no smoothing",
        "taken to be what FLa-LLM and the papers it compares itself with have on PHOENIX14T and How2Sign",
        "none",
        "none",
    ),
    "13a": Convention("sacreBLEU's defaults: 13a tokens, exponential smoothing", "machine translation (WMT), YouTube-ASL", "13a", "exp"),
    "csl-daily": Convention("every character is a word, spaces do not count, else as raw", "papers on CSL-Daily", "char", "none", words="char"),
    "zh": Convention(
        "sacreBLEU's zh tokens (every Chinese character and each run of other letters), exponential smoothing",
        "machine translation into Chinese (WMT)",
        "zh",
        "exp",
        words="zh",
    ),
    "lower": Convention("13a in lower case, hypotheses and references", "systems that write no capitals", "13a", "exp", lowercase=True),
}


def scores(hypotheses: Sequence[str], references: Sequence[str], conventions: Sequence[str] = tuple(CONVENTIONS)) -> dict[str, dict]:
    """Every score under each convention: {"raw": {"bleu4": {"value", "ci95"}, …, "leading", "signature", "num_samples",
    "references_sha256"}, …}."""
    assert len(hypotheses) == len(references) > 0
    hypotheses, references = list(hypotheses), list(references)
    measured: dict[tuple, tuple[dict, str]] = {}  # some conventions differ in BLEU only
    found = {}
    for convention in conventions:
        parts, signatures = {}, {}
        for name, (kind, arguments) in _kinds(convention).items():
            key = (kind, *arguments.items())
            if key not in measured:
                measured[key] = measure(kind(**arguments), hypotheses, references)
            parts[name], signatures[name] = measured[key]
        signatures = {"bleu": signatures["bleu4"]} | {name: s for name, s in signatures.items() if not name.startswith("bleu")}
        found[convention] = parts | {
            "leading": leading(references, convention),
            "signature": signatures,
            "num_samples": len(references),
            "references_sha256": hashlib.sha256("\n".join(references).encode(errors="surrogatepass")).hexdigest(),
        }
    return found


def value(hypotheses: Sequence[str], references: Sequence[str], convention: str, name: str) -> dict:
    """{"value", "ci95"} of one score alone."""
    return measure(metric(convention, name), list(hypotheses), list(references))[0]


def splitter(convention: str) -> Callable[[str], list[str]]:
    """Text -> what a convention counts as words outside BLEU."""
    counts = metric(convention, "wer")
    return lambda text: counts._preprocess_segment(text).split()


def leading(references: Sequence[str], convention: str) -> str:
    """The score that decides: "bleu4", or of short references BLEU-n of a smaller n.

    It is BLEU-n with the largest n up to 4 for which at least half of the references have an
    n-gram of the convention's tokens. Where fewer have one, BLEU-n depends on few sentences;
    where none has one, BLEU-n is 0 whatever the hypotheses are.
    """
    counts = token_counts(references, convention)
    for n in (4, 3, 2):
        if 2 * sum(count >= n for count in counts) >= len(counts):
            return f"bleu{n}"
    return "bleu1"


def leading_note(leading: str) -> str:
    """Why another score than BLEU-4 leads; empty where BLEU-4 does."""
    if leading == "bleu4":
        return ""
    order = int(leading[-1])
    return f"{LABELS[leading]} leads in place of BLEU-4: fewer than half of the references have {order + 1} words"


def token_counts(texts: Sequence[str], convention: str) -> list[int]:
    """How many tokens BLEU counts in each text."""
    bleu = metric(convention, "bleu4")
    return [len(bleu._preprocess_segment(text).split()) for text in texts]


def bleu4(hypotheses: Sequence[str], references: Sequence[str], convention: str) -> float:
    """BLEU-4 alone, without an interval."""
    return point_estimate(hypotheses, references, convention, "bleu4")


def point_estimate(hypotheses: Sequence[str], references: Sequence[str], convention: str, name: str) -> float:
    """One score alone, without its interval."""
    return metric(convention, name).corpus_score(list(hypotheses), [list(references)]).score


def metric(convention: str, name: str) -> Metric:
    """One score of a convention as a sacreBLEU metric."""
    kind, arguments = _kinds(convention)[name]
    return kind(**arguments)


def _kinds(convention: str) -> dict[str, tuple[type[Metric], dict]]:
    """A convention's scores: {name: (class, its arguments)}."""
    if convention not in CONVENTIONS:
        raise UserError(f"there is no convention {convention!r}, but {', '.join(CONVENTIONS)}")
    c = CONVENTIONS[convention]
    # force: no warning that a text looks tokenized, as sign language corpora do
    bleu = {"tokenize": c.tokenize, "smooth_method": c.smoothing, "lowercase": c.lowercase, "force": True}
    words = {"tokenize": c.words, "lowercase": c.lowercase}
    chinese = c.words != "none"
    return {f"bleu{n}": (BLEU, bleu | {"max_ngram_order": n}) for n in (1, 2, 3, 4)} | {
        "rouge_l": (RougeL, words | {"beta": 1.2}),
        "rouge_l_slrt": (RougeL, words | {"beta": None}),
        "chrf": (ChrF, {"lowercase": c.lowercase}),
        "ter": (Ter, {"normalized": chinese, "asian_support": chinese}),
        "wer": (WER, words),
    }


def measure(metric: Metric, hypotheses: list[str], references: list[str]) -> tuple[dict, str]:
    """({"value", "ci95"}, signature). The interval is the one sacreBLEU prints: the resamples' mean ± half the span of their middle 95 %; where that
    span is lopsided it is widened to the value and cut at the ends of the scale. Takes up to 72 KB of memory a sentence (chrF: 18 counts x 1000)."""
    score = metric.corpus_score(hypotheses, [references], n_bootstrap=RESAMPLES)
    signature = str(metric.get_signature())
    said = json.loads(score.format(width=12, is_json=True, signature=signature))  # states no interval where every resample scores 0
    mean, half = said.get("confidence_mean", 0.0), said.get("confidence_var", 0.0)
    bottom, top = getattr(metric, "bounds", (0.0, 100.0))
    value = min(float(score.score), top)  # sums of logarithms end a little over it
    return {"value": value, "ci95": [min(value, max(bottom, mean - half)), max(value, min(top, mean + half))]}, signature
