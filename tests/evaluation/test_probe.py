"""Mismatched and corrupted videos, the verdict on them, and scores of parts of a split."""

from dataclasses import replace

import pytest
import torch

from flallm.data.dataset import Batch
from flallm.data.reader import Shards
from flallm.evaluation import metrics
from flallm.evaluation import probe as probes
from flallm.evaluation.decode import Prediction, mismatched


def judged(references: list[str], hypotheses: list[str]) -> dict:
    """The verdict on a model that gives the most frequent sentence if it sees nothing."""
    blind = [max(references, key=references.count)] * len(references)
    predictions = [
        Prediction(f"{n:03}", reference, hypothesis)
        for n, (reference, hypothesis) in enumerate(zip(references, hypotheses))
    ]
    videos = {
        probes.REAL: hypotheses,
        probes.MISMATCHED: mismatched(hypotheses, references),
        probes.NOISE: blind,
        probes.MEAN: blind,
    }
    return probes._judge(videos, predictions, "raw")


@pytest.mark.parametrize(
    "references",
    [
        ["yes", "no"] * 20,
        [f"sign{n % 20}" for n in range(40)],  # the list of one signer, then that of another
        ["good morning", "thank you", "see you later", "no"] * 10,
        ["how are you", "no"] * 5 + ["where do you live now"],
        [f"today it rains in the {place} of it" for place in ("north", "south", "east")] * 4,
    ],
    ids=["two signs", "two signers", "up to three words", "mixed", "sentences"],
)
def test_a_perfect_model_looks_and_a_blind_one_hardly_looks_for_any_lengths(references):
    perfect = judged(references, references)
    leading = perfect["leading"]
    assert perfect["videos"][probes.REAL][leading]["value"] == pytest.approx(100)
    assert "hardly looks" not in perfect["verdict"]
    assert metrics.LABELS[leading] in perfect["verdict"]
    blind = judged(references, [max(references, key=references.count)] * len(references))
    assert "hardly looks" in blind["verdict"]
    assert all(a != b for a, b in zip(mismatched(references, references), references))


def test_mismatched_clips_are_half_a_split_apart():
    references = [f"sentence {n}" for n in range(11)]
    references[5] = "sentence 0"  # one clip of eleven meets its own sentence: under a tenth
    assert mismatched(list("abcdefghijk"), references) == list("fghijkabcde")
    assert mismatched(["a"], ["a"]) == ["a"]
    assert mismatched(["x", "y", "z"], ["a"] * 3) == ["y", "z", "x"]


def test_videos_are_corrupted_clip_by_clip():
    frames = torch.arange(8 * 2 * 2 * 3, dtype=torch.uint8).reshape(8, 2, 2, 3)
    lengths = torch.tensor([5, 3])
    video = Batch(frames, lengths, torch.zeros(2, 1), ["a", "b"], ["", ""], [])

    def order(batch):
        return batch.frames[:, 0, 0, 0].div(12, rounding_mode="floor").tolist()

    assert order(probes._reverse(video)) == [4, 3, 2, 1, 0, 7, 6, 5]
    assert order(probes._freeze(video)) == [2] * 5 + [6] * 3
    scale = torch.tensor([3.0] * 5 + [0.1] * 3)[:, None]
    features = replace(video, frames=torch.randn(8, 500) * scale)
    for batch in (video, features):
        noise = probes._noise(batch)
        alone = replace(batch, frames=batch.frames[5:], lengths=lengths[1:], keys=["b"])
        assert noise.frames.shape == batch.frames.shape
        assert torch.equal(noise.frames[5:], probes._noise(alone).frames)
    spread = [part.std().item() for part in noise.frames.split([5, 3])]
    assert spread == pytest.approx([3.0, 0.1], rel=0.1)


def test_a_split_is_scored_in_parts_by_signer_and_length(shards):
    dev = Shards(shards, "dev")
    predictions = [Prediction(meta["key"], meta["text"], meta["text"]) for meta in dev.metas()]
    train = probes.training_clips(str(shards))
    groups = probes._parts(predictions, "raw", dev, train)["groups"]
    sizes = {name: group["num_samples"] for name, group in groups.items()}
    assert sizes["signer is not in training"] == len(predictions)
    assert "signer is in training" not in sizes
    assert sum(size for name, size in sizes.items() if "words" in name) == len(predictions)
    assert len(sizes) > 4
    signers = [meta["signer"] for meta in dev.metas()]
    train = [meta | {"signer": signers[0]} for meta in train]
    groups = probes._parts(predictions, "raw", dev, train)["groups"]
    assert groups["signer is in training"]["num_samples"] == signers.count(signers[0])


def test_parts_of_short_sentences_have_the_leading_score_if_they_have_its_n_grams(shards):
    dev = Shards(shards, "dev")
    texts = ["good morning", "yes", "thank you", "no"]
    texts += ["see you", "hello", "good night", "welcome"]
    predictions = [
        Prediction(meta["key"], text, text) for meta, text in zip(dev.metas(), texts, strict=True)
    ]
    train = [{"key": "a", "text": "good morning"}, {"key": "b", "text": "see you"}]
    videos = dict.fromkeys((probes.REAL, *probes.CONTROL), texts)
    result = probes._judge(videos, predictions, "raw")
    result |= probes._parts(predictions, "raw", dev, train)
    assert result["groups"]["up to 1 words"]["bleu2"] is None
    assert result["groups"]["2 to 2 words"]["bleu2"]["value"] == pytest.approx(100)
    assert sum("words" in name for name in result["groups"]) == 2
    overlap = result["overlap"]["reference"]
    assert overlap == {"4-grams": 0.0, "2-grams": 2 / 4, "sentences": 2 / 8}
    table = probes.table(result)
    assert "BLEU-2 [95 %]" in table
    assert "50% of the hypotheses' 2-grams" in table
    assert "BLEU-2 leads in place of BLEU-4" in table
