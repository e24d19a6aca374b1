"""Scores by meaning, on small models saved in the real format: BERTScore worked out here by its definition, BLEURT as the model's own logits."""

import json

import pytest
import torch
from transformers import AutoModel, AutoTokenizer, BertConfig, BertForSequenceClassification, BertModel, BertTokenizerFast

from flallm import UserError
from flallm.semantic import semantic

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "sun", "shines", "in", "north", "and", "rain", "falls", "tomorrow", "a", "house"]
HYPOTHESES = ["the sun shines in the north", "a house", "", "rain falls", "tomorrow rain and rain"]
REFERENCES = ["rain falls in the north tomorrow", "a house", "the sun", "rain falls and the sun shines", "rain"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    out = tmp_path_factory.mktemp("models")
    (out / "vocab.txt").write_text("\n".join(WORDS))
    torch.manual_seed(0)
    shape = {"vocab_size": len(WORDS), "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64, "initializer_range": 0.5}
    models = {"encoder": BertModel(BertConfig(**shape)), "bleurt": BertForSequenceClassification(BertConfig(num_labels=1, **shape))}
    models["classes"] = BertForSequenceClassification(BertConfig(num_labels=3, **shape))
    for name, model in models.items():
        model.save_pretrained(out / name)
        BertTokenizerFast(str(out / "vocab.txt")).save_pretrained(out / name)
    return out


@torch.no_grad()
def embeddings(folder, sentence: str, layer: int) -> torch.Tensor:
    ids = AutoTokenizer.from_pretrained(folder)(sentence, return_tensors="pt")
    hidden = AutoModel.from_pretrained(folder).eval()(**ids, output_hidden_states=True).hidden_states[layer][0]
    return torch.nn.functional.normalize(hidden[1:-1], dim=-1)  # without [CLS] and [SEP], as bert_score weighs them with 0


@pytest.mark.parametrize("layer", [None, 2])
def test_bertscore_is_the_f1_of_greedily_matched_embeddings(folders, layer):
    f1 = []
    for hypothesis, reference in zip(HYPOTHESES, REFERENCES):
        if not hypothesis:
            f1.append(0.0)  # by definition
            continue
        alike = embeddings(folders / "encoder", hypothesis, layer or 3) @ embeddings(folders / "encoder", reference, layer or 3).T
        precision, recall = alike.max(1).values.mean(), alike.max(0).values.mean()
        f1.append(float(2 * precision * recall / (precision + recall)))
    found = semantic(folders / "encoder", HYPOTHESES, REFERENCES, layer)
    assert found["bertscore"]["value"] == pytest.approx(100 * sum(f1) / len(f1), abs=1e-3)
    low, high = found["bertscore"]["ci95"]
    assert low <= found["bertscore"]["value"] <= high <= 100
    assert f"model:encoder|layer:{layer or 3}" in found["signature"]


@torch.no_grad()
def test_bleurt_is_what_the_head_says(folders):
    tokenizer, model = AutoTokenizer.from_pretrained(folders / "bleurt"), BertForSequenceClassification.from_pretrained(folders / "bleurt").eval()
    said = [model(**tokenizer([r], [h], return_tensors="pt")).logits.item() for h, r in zip(HYPOTHESES, REFERENCES)]
    assert semantic(folders / "bleurt", HYPOTHESES, REFERENCES)["bleurt"]["value"] == pytest.approx(100 * sum(said) / len(said), abs=1e-3)


def test_a_folder_that_cannot_score_is_one_line(folders, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(UserError, match="layers 1 to 3, not 4"):
        semantic(folders / "encoder", HYPOTHESES, REFERENCES, 4)
    for folder, why in ((tmp_path / "none", "no model folder"), (tmp_path, r"--semantic"), (folders / "classes", "3 classes")):
        with pytest.raises(UserError, match=why) as refused:
            semantic(folder, HYPOTHESES, REFERENCES)
        assert "\n" not in str(refused.value)
