"""Each family of language models reads features as it reads words, alone as in a batch."""

import numpy as np
import pytest
import torch
from models import KINDS
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import CONFIG_MAPPING, AutoModelForSeq2SeqLM, AutoTokenizer, GenerationConfig

from flallm import config as cfg
from flallm.data.dataset import IGNORE_INDEX, ClipDataset
from flallm.data.tokenizer import TranslationTokenizer
from flallm.demo.pretrain import noise, pretrain
from flallm.model.llm import load_llm, make_lm_adapter
from flallm.training.resume import check_fits
from flallm.utils import UserError


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stack", [1, 3])
def test_loss_and_answer_of_a_clip_do_not_depend_on_its_batch(built, kind, stack):
    config, model = built(kind, {"llm.stack": stack})
    clips = ClipDataset("train", config.data, 0)
    together = clips.batch(model.text, [(None, number) for number in range(6)])
    alone = [clips.batch(model.text, [(None, number)]) for number in range(6)]
    assert len(set(together.lengths.tolist())) > 2  # or padding is not tested
    assert (together.labels == IGNORE_INDEX).any()
    with torch.no_grad():
        loss = sum(model(batch)[0] for batch in alone)
        torch.testing.assert_close(model(together)[0], loss, rtol=1e-4, atol=1e-3)
    sentences = model.translate(together, config.decode)
    assert sentences == [model.translate(batch, config.decode)[0] for batch in alone]
    assert stack > 1 or len(set(sentences)) > 1


@pytest.mark.parametrize("kind", KINDS)
def test_word_embeddings_in_place_of_features_give_the_models_own_outputs(built, kind):
    """So scale, positions, LayerNorm and the place in the prompt are those of words."""
    _, model = built(kind)
    text, language = model.text, model.language
    words = [text.encode(sentence)[:-1] for sentence in ("we saw my small sister", "peter")]
    answers = [text.encode(sentence) for sentence in ("anna bought some water", "we saw")]
    labels = pad_sequence([torch.tensor(ids) for ids in answers], True, IGNORE_INDEX)
    model.adapter = nn.Identity()
    with torch.no_grad():
        embeddings = language.get_input_embeddings().weight[words[0] + words[1]]
        inputs = model._read(embeddings, torch.tensor([len(ids) for ids in words]))
        logits = model.lm_adapter.logits(inputs, labels)
        for row, ids, answer in zip(logits, words, answers):
            prompt = [*text.before, *ids, *text.after]
            if kind == "llama":
                outputs = language(input_ids=torch.tensor([prompt + answer[:-1]]))
                expected = outputs.logits[0, len(prompt) - 1 :]
            else:
                start = torch.tensor([text.start + answer[:-1]])
                outputs = language(input_ids=torch.tensor([prompt]), decoder_input_ids=start)
                expected = outputs.logits[0]
            torch.testing.assert_close(row[: len(answer)], expected, rtol=1e-4, atol=1e-4)


SHAPE = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
FAMILIES = {
    "gpt2": {"vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 4},
    "opt": {**SHAPE, "ffn_dim": 64, "word_embed_proj_dim": 32},
    "bloom": {"vocab_size": 300, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "mpt": {"vocab_size": 300, "d_model": 32, "n_layers": 2, "n_heads": 4},
    "gpt_neox": SHAPE,
    "mistral": SHAPE,
    "qwen2": SHAPE,
    "gemma2": {**SHAPE, "head_dim": 8},
    "phi3": {**SHAPE, "pad_token_id": 1},
    "qwen3_5_text": {  # most layers keep a state in place of attention
        **SHAPE,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "head_dim": 8,
    },
}


@pytest.mark.parametrize("kind", FAMILIES)
def test_decoder_only_families_give_the_same_alone_and_in_a_batch(folders, kind, tmp_path):
    shape = {**FAMILIES[kind], "bos_token_id": 0, "eos_token_id": 2}
    CONFIG_MAPPING[kind](**shape).save_pretrained(tmp_path)
    torch.manual_seed(0)
    model = load_llm(cfg.LLM(path=str(tmp_path), random=True)).eval()
    text = TranslationTokenizer(cfg.LLM(path=str(folders["llama"])))
    adapter = make_lm_adapter(model, text)
    clips, lengths = torch.randn(2, 9, 32).split(1), (5, 9)
    labels = torch.tensor([[7, 8, 9, 2], [7, 2, IGNORE_INDEX, IGNORE_INDEX]])
    padded = [
        nn.functional.pad(clip[:, :length], (0, 0, 9 - length, 0))
        for clip, length in zip(clips, lengths)
    ]
    mask = torch.tensor([[0] * 4 + [1] * 5, [1] * 9])
    together = {"inputs_embeds": torch.cat(padded), "attention_mask": mask}
    options = GenerationConfig(num_beams=3, max_new_tokens=4, eos_token_id=2, pad_token_id=1)
    with torch.no_grad():
        logits = adapter.logits(together, labels)
        attention = adapter.attention(together, labels)
        ids = adapter.generate(together, options)
        for i, (clip, length) in enumerate(zip(clips, lengths)):
            alone = {
                "inputs_embeds": clip[:, :length],
                "attention_mask": torch.ones(1, length, dtype=torch.long),
            }
            own, valid = labels[i : i + 1], labels[i] != IGNORE_INDEX
            expected = adapter.logits(alone, own)[0, valid]
            torch.testing.assert_close(logits[i, valid], expected, rtol=1e-3, atol=1e-4)
            expected = adapter.attention(alone, own)[0, valid]
            weights = attention[i, valid, 9 - length :]
            torch.testing.assert_close(weights, expected, rtol=1e-3, atol=1e-4)
            answer = adapter.generate(alone, options)[0].tolist()
            assert ids[i, : len(answer)].tolist() == answer


def test_prompt_features_and_answer_fit_into_a_decoder_only_model_together(built):
    config, model = built("llama")
    model.text.config.max_position_embeddings = 40
    prompt = len(model.text.before) + len(model.text.after)
    longest = 40 - prompt - config.decode.max_tokens
    check_fits(config, longest, model)
    with pytest.raises(UserError, match="have 41 places, and 40"):
        check_fits(config, longest + 1, model)


def test_gradient_checkpointing_changes_memory_alone(built):
    losses, gradients = [], []
    for checkpointing in (False, True):
        config, model = built("llama", {"llm.gradient_checkpointing": checkpointing})
        clips = ClipDataset("train", config.data, 0)
        loss, _ = model.train()(clips.batch(model.text, [(None, n) for n in range(3)]))
        loss.backward()
        losses.append(loss.item())
        gradients.append(model.adapter[0].weight.grad.clone())
    assert losses[0] == pytest.approx(losses[1])
    torch.testing.assert_close(*gradients)


def test_a_prompt_names_the_place_of_the_features_once():
    with pytest.raises(UserError, match=r"must hold \{video\} once"):
        cfg.load("demo", "stage2", {"llm.prompt": "translate this"})


def test_a_pretrained_demo_model_predicts_the_next_word_from_those_before_it(tmp_path):
    sentences = ["we saw peter", "peter saw the red house", "the house is red", "is peter here"]
    folder = tmp_path / "llm"
    pretrain(sentences * 8, folder, vocabulary=60, layers=1, width=48, heads=2, steps=100, batch=16)
    model = AutoModelForSeq2SeqLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    losses = []
    for sentence in sentences:
        marked = f"<s>{sentence}</s>"
        ids = tokenizer(marked, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = model(input_ids=ids[:, 1:], decoder_input_ids=ids[:, :-1]).logits
        losses.append(float(nn.functional.cross_entropy(logits[0], ids[0, 1:])))
    assert np.mean(losses) < 0.75 * np.log(len(tokenizer))  # of chance


def test_pretraining_masks_a_third_of_the_words_and_moves_some():
    rng = np.random.default_rng(0)
    words = [f"w{i}" for i in range(30)]
    num_words, num_moved = [], 0
    for _ in range(300):
        unmasked = [word for word in noise(" ".join(words), rng).split() if word != "<mask>"]
        assert set(unmasked) <= set(words)
        assert len(set(unmasked)) == len(unmasked)
        num_words.append(len(unmasked))
        num_moved += unmasked != sorted(unmasked, key=words.index)
    assert 0.25 < 1 - np.mean(num_words) / 30 < 0.4
    assert 0.4 < num_moved / 300 < 0.6
