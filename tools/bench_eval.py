"""What scoring costs: one JSON object a line, {"figure", "value", "unit", "detail"}."""

from __future__ import annotations

import json
import random
import time

from flallm import metrics
from flallm.corpora import synthetic

SENTENCES = 2500


def score_seconds() -> None:
    """All conventions with intervals, on sentences of PHOENIX14T's length (two of the embedded corpus in one), every fifth word of the hypotheses wrong."""
    texts = [text for _, text in synthetic.sentences("text", 2 * SENTENCES)]
    references = [" ".join(pair) for pair in zip(texts[::2], texts[1::2])]
    words, rng = sorted({word for text in texts for word in text.split()}), random.Random(0)
    hypotheses = [" ".join(rng.choice(words) if rng.random() < 0.2 else word for word in text.split()) for text in references]
    began = time.perf_counter()
    found = metrics.scores(hypotheses, references)
    seconds = time.perf_counter() - began
    length = sum(len(r.split()) for r in references) / len(references)
    detail = f"{len(found)} conventions ({', '.join(found)}), {metrics.RESAMPLES} resamples, {len(references)} sentences of {length:.1f} words"
    print(json.dumps({"figure": "score_seconds", "value": round(seconds, 2), "unit": "s", "detail": detail}))


if __name__ == "__main__":
    score_seconds()
