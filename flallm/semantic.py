"""Scores by meaning, of a model in a local folder: BLEURT where its head gives one number for a pair of sentences, else BERTScore."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from flallm import UserError, first_line, metrics
from flallm.scorers import Meaning

BATCH = 64


def semantic(folder: Path, hypotheses: Sequence[str], references: Sequence[str], layer: int | None = None) -> dict:
    """{"bleurt" or "bertscore": {"value", "ci95"}, "signature"}, the mean over sentences x 100 with its bootstrap. layer: whose embeddings BERTScore compares;
    none: the last one's. An empty sentence has no embeddings and a BERTScore of 0."""
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise UserError(f"--semantic: {folder} is no model folder (no config.json)")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        head = (config.architectures or [""])[0].endswith("ForSequenceClassification")
        if head and config.num_labels != 1:
            raise UserError(f"--semantic: {folder} puts sentences into {config.num_labels} classes; BLEURT gives one number")
        pairs = sorted(set(zip(hypotheses, references)))
        name, bounds = ("bleurt", (-math.inf, math.inf)) if head else ("bertscore", (-100.0, 100.0))
        values = _bleurt(folder, pairs) if head else _bertscore(folder, pairs, layer)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"--semantic: {folder}: {first_line(error)}") from None
    score, signature = metrics.measure(Meaning(name, bounds, dict(zip(pairs, values))), list(hypotheses), list(references))
    return {name: score, "signature": f"{signature}|model:{folder.resolve().name}" + f"|layer:{layer or config.num_hidden_layers}" * (not head)}


@torch.no_grad()
def _bleurt(folder: Path, pairs: list[tuple[str, str]]) -> list[float]:
    """What the model says of (reference, hypothesis): Sellam et al. 2020."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    model, values = AutoModelForSequenceClassification.from_pretrained(folder, local_files_only=True, trust_remote_code=False).eval(), []
    for i in range(0, len(pairs), BATCH):
        hypotheses, references = zip(*pairs[i : i + BATCH])
        inputs = tokenizer(list(references), list(hypotheses), padding=True, truncation="longest_first", max_length=512, return_tensors="pt")
        values += model(**inputs).logits.flatten().tolist()
    return values


@torch.no_grad()
def _bertscore(folder: Path, pairs: list[tuple[str, str]], layer: int | None) -> list[float]:
    """F1 of greedily matched embeddings, special tokens left out, without idf weights or a baseline: Zhang et al. 2020. Our own, since
    torchmetrics 1.9 matches sentences of a batch with others' references (it undoes its sorting by length the wrong way)."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = (
        AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False),
        AutoModel.from_pretrained(folder, local_files_only=True, trust_remote_code=False).eval(),
    )
    layers = model.config.num_hidden_layers
    if not 1 <= (layer or layers) <= layers:
        raise UserError(f"--layer: {folder} has layers 1 to {layers}, not {layer}")

    def embed(sentences: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings (B, L, D) of length 1, and which of them are words' (B, L)."""
        inputs = tokenizer(list(sentences), padding=True, truncation=True, max_length=512, return_tensors="pt", return_special_tokens_mask=True)
        special = inputs.pop("special_tokens_mask").bool()
        hidden = model(**inputs, output_hidden_states=True).hidden_states[layer or layers]
        return torch.nn.functional.normalize(hidden, dim=-1), inputs["attention_mask"].bool() & ~special

    values = []
    for i in range(0, len(pairs), BATCH):
        (said, words), (meant, references) = map(embed, zip(*pairs[i : i + BATCH]))
        alike = (said @ meant.mT).masked_fill(~(words[:, :, None] & references[:, None]), -torch.inf)  # (B, L, M)
        sums = [alike.amax(axis).masked_fill(~mask, 0.0).sum(1) / mask.sum(1) for axis, mask in ((2, words), (1, references))]
        f1 = 2 * sums[0] * sums[1] / (sums[0] + sums[1])
        values += f1.masked_fill(~(words.any(1) & references.any(1)), 0.0).tolist()
    return values
