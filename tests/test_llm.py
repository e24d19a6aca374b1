"""Stage 2's families of language models: each reads features as it reads words, alone as in a batch."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from models import KINDS, save
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, BertConfig

from flallm import UserError
from flallm import config as cfg
from flallm.checkpoint import load_model, unique_tensors
from flallm.corpora import synthetic
from flallm.evaluate import reachable_score
from flallm.loader import IGNORE, Clips
from flallm.model.llm import load_llm, untie
from flallm.model.translator import Translator
from flallm.pretrain import make_tokenizer, noise, pretrain
from flallm.text import Text
from flallm.train import check_fits

PROMPTS = {"mbart": "{video}", "mt5": "we {video}", "llama": "we saw {video} and"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    return {kind: save(kind, tmp_path_factory.mktemp(kind)) for kind in KINDS}


@pytest.fixture
def built(small, folders):
    """`built(kind, **overrides)`: the config and the translator of stage 2 with a language model of that family."""

    def make(kind: str, **overrides) -> tuple[cfg.Config, Translator]:
        config = small("stage2", {"llm.path": str(folders[kind]), "llm.prompt": PROMPTS[kind], "decode.max_tokens": 12, **overrides})
        torch.manual_seed(1)
        return config, Translator(config, Text(config.llm)).eval()

    return make


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stack", [1, 3])
def test_loss_and_answer_of_a_clip_do_not_depend_on_its_batch(built, kind, stack):
    config, model = built(kind, **{"llm.stack": stack})
    clips = Clips("train", config.data, 0)
    together, *alone = (clips.batch(model.text, [(None, n) for n in numbers]) for numbers in (range(6), *([n] for n in range(6))))
    assert len(set(together.lengths.tolist())) > 2 and (together.labels == IGNORE).any()  # or padding is not tested
    with torch.no_grad():
        torch.testing.assert_close(model(together)[0], sum(model(b)[0] for b in alone), rtol=1e-4, atol=1e-3)
    answers = model.translate(together, config.decode)
    assert answers == [model.translate(b, config.decode)[0] for b in alone]
    assert stack > 1 or len(set(answers)) > 1


def test_a_model_that_was_pretrained_here_knows_the_next_word_from_those_before_it(tmp_path):
    sentences = ["we saw peter", "peter saw the red house", "the house is red", "is peter here"]
    pretrain(sentences * 8, tmp_path / "llm", vocabulary=60, layers=1, width=48, heads=2, steps=100, batch=16)
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "llm"), AutoTokenizer.from_pretrained(tmp_path / "llm")
    losses = []
    for sentence in sentences:
        ids = tokenizer(f"<s>{sentence}</s>", add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = model(input_ids=ids[:, 1:], decoder_input_ids=ids[:, :-1]).logits
        losses.append(float(nn.functional.cross_entropy(logits[0], ids[0, 1:])))
    assert np.mean(losses) < 0.75 * np.log(len(tokenizer))  # of chance


def test_words_are_put_together_from_tokens_and_chinese_ones_stand_alone(folders, tmp_path):
    text = Text(cfg.LLM(path=str(folders["mbart"])))
    ids = text.encode("we unsaw peter")
    words = text.words(ids)
    assert [word for word, _ in words] == ["we", "unsaw", "peter"] and len(words[1][1]) > 1
    assert [place for _, places in words for place in places] == list(range(len(ids) - 1))
    sentences = ["今天天气很好。", "明天下雨。", "我们 DVD 看"]
    shutil.copytree(folders["mbart"], tmp_path / "zh")
    make_tokenizer(sentences, 60).save_pretrained(tmp_path / "zh")
    text = Text(cfg.LLM(path=str(tmp_path / "zh")))
    assert all("".join(word for word, _ in text.words(text.encode(s))) == s.replace(" ", "") for s in sentences)
    assert len(text.words(text.encode("今天下雨好。"))) == len(text.encode("今天下雨好。")) - 1 > 2


@pytest.mark.parametrize("kind", KINDS)
def test_word_embeddings_in_the_place_of_features_give_the_models_own_outputs(built, kind):
    """So what features go through (scale, positions, LayerNorm, the place in the prompt) is what words go through."""
    _, model = built(kind)
    words = [model.text.encode(text)[:-1] for text in ("we saw my small sister", "peter")]
    labels = nn.utils.rnn.pad_sequence([torch.tensor(model.text.encode(text)) for text in ("anna bought some water", "we saw")], True, IGNORE)
    model.adapter = nn.Identity()
    with torch.no_grad():
        inputs = model._read(model.language.get_input_embeddings().weight[[i for ids in words for i in ids]], torch.tensor([len(w) for w in words]))
        ours = model.family.logits(inputs, labels)
        for row, ids, answer in zip(ours, words, labels):
            ids, answer = [*model.text.before, *ids, *model.text.after], answer[answer != IGNORE].tolist()
            if kind == "llama":
                theirs = model.language(input_ids=torch.tensor([ids + answer[:-1]])).logits[0, len(ids) - 1 :]
            else:
                theirs = model.language(input_ids=torch.tensor([ids]), decoder_input_ids=torch.tensor([model.text.start + answer[:-1]])).logits[0]
            torch.testing.assert_close(row[: len(answer)], theirs, rtol=1e-4, atol=1e-4)


def test_mbart_50_answers_after_its_end_token_and_the_languages_code(folders):
    text = Text(cfg.LLM(path=str(folders["mbart"]), language="i"))
    assert text.start == [text.tokenizer.convert_tokens_to_ids("i")]  # this one starts from <s>, as mBART does from the code
    text.config.decoder_start_token_id = text.end
    assert text._start(cfg.LLM(language="i")) == [text.end, text.tokenizer.convert_tokens_to_ids("i")]


def test_what_a_tokenizer_cannot_say_bounds_the_score(folders):
    """These normalise by NFKC, as mBART's and mT5's do, which makes a comma of a full-width one."""
    text = Text(cfg.LLM(path=str(folders["mbart"])))
    sentences = [text for _, text in synthetic.sentences("test", 20)]
    assert reachable_score(sentences, text, "raw", "bleu4") == pytest.approx(100)
    assert reachable_score([f"{sentence} ，" for sentence in sentences], text, "raw", "bleu4") < 90


def test_prompt_features_and_answer_fit_into_a_decoder_only_model_together(built):
    config, model = built("llama")
    model.text.config.max_position_embeddings = 40
    room = 40 - len(model.text.before) - len(model.text.after) - config.decode.max_tokens
    check_fits(config, room, model)
    with pytest.raises(UserError, match="have 41 places, and 40"):
        check_fits(config, room + 1, model)


def test_a_head_that_is_not_tied_stays_so_in_a_checkpoint(built, folders, tmp_path):
    """As in mT5's published weights; transformers' own config says that it is."""
    model = AutoModelForSeq2SeqLM.from_pretrained(folders["mt5"])
    untie(model, "lm_head.weight")
    model.lm_head.weight.data.mul_(2)
    for saved in (model, AutoTokenizer.from_pretrained(folders["mt5"])):
        saved.save_pretrained(tmp_path)
    trained, again = (built("mt5", **{"llm.path": str(tmp_path), "llm.random": random})[1] for random in (False, True))
    assert (trained.language.lm_head.weight != trained.language.shared.weight).all() and again.language.lm_head.weight is again.language.shared.weight
    save_file(unique_tensors(trained), tmp_path / "model.safetensors")
    load_model(tmp_path, again)
    assert all(torch.equal(a, b) for a, b in zip(trained.state_dict().values(), again.state_dict().values()))


@pytest.mark.parametrize("embeddings", [None, True, False])
@pytest.mark.parametrize("rank", [0, 4])
def test_what_trains_is_what_the_recipe_says(folders, rank, embeddings):
    config = cfg.LLM(path=str(folders["llama"]), lora=cfg.LoRA(rank=rank), train_embeddings=embeddings)
    model = load_llm(config)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    words = {name for name, _ in model.named_parameters() if "embed_tokens" in name or "lm_head" in name}
    others = {name for name, _ in model.named_parameters()} - words
    expected = {name for name in others if not rank or ".lora_" in name}
    expected |= words if embeddings or (embeddings is None and not rank) else set()
    assert trained == expected
    if rank:
        assert {name.split(".")[-4] for name in trained - words} == {"q_proj", "v_proj"}
        assert sum(p.numel() for p in model.parameters() if p.requires_grad and p.ndim == 2) >= 2 * 4 * (2 * 32 + 32 + 16)


def test_gradient_checkpointing_changes_memory_alone(built):
    losses = []
    for checkpointing in (False, True):
        config, model = built("llama", **{"llm.gradient_checkpointing": checkpointing})
        loss, _ = model.train()(Clips("train", config.data, 0).batch(model.text, [(None, n) for n in range(3)]))
        loss.backward()
        losses.append((loss.item(), model.adapter[0].weight.grad.clone()))
    assert losses[0][0] == pytest.approx(losses[1][0])
    torch.testing.assert_close(losses[0][1], losses[1][1])


def test_a_prompt_names_the_place_of_the_features_once():
    with pytest.raises(UserError, match=r"must hold \{video\} once"):
        cfg.load("demo", "stage2", {"llm.prompt": "translate this"})


def test_code_in_a_model_folder_is_not_run(folders, tmp_path, monkeypatch):
    shutil.copytree(folders["llama"], tmp_path / "llm")
    (tmp_path / "llm/theirs.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass C: pass\n")
    content = json.loads((tmp_path / "llm/config.json").read_text()) | {
        "model_type": "theirs",
        "auto_map": {"AutoConfig": "theirs.C", "AutoModelForCausalLM": "theirs.C"},
    }
    (tmp_path / "llm/config.json").write_text(json.dumps(content))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))  # who answers every question with yes
    for load in (Text, load_llm):
        with pytest.raises(UserError, match="can be loaded from"):
            load(cfg.LLM(path=str(tmp_path / "llm")))
    assert not (tmp_path / "ran").exists()


def test_families_that_do_not_fit_and_folders_that_lack_files_are_named(folders, tmp_path):
    BertConfig(hidden_size=32, num_attention_heads=2).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is a bert model; stage 2 takes mbart, t5, mt5 and decoder-only models"):
        load_llm(cfg.LLM(path=str(tmp_path)))
    for name in ("tokenizer.json", "config.json"):
        (tmp_path / name).write_bytes((folders["llama"] / name).read_bytes())
    with pytest.raises(UserError, match="no model can be loaded from"):
        load_llm(cfg.LLM(path=str(tmp_path)))
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="no tokenizer"):
        Text(cfg.LLM(path=str(tmp_path)))
    with pytest.raises(UserError, match=r"llm.lora: .*nosuch"):
        load_llm(cfg.LLM(path=str(folders["llama"]), lora=cfg.LoRA(rank=2, targets=("nosuch",))))


def test_in_pretraining_about_a_third_of_the_words_is_masked_and_the_others_stay():
    rng, sentence = np.random.default_rng(0), " ".join(f"w{i}" for i in range(30))
    seen = [[word for word in noise(sentence, rng).split() if word != "<mask>"] for _ in range(300)]
    assert 0.25 < 1 - np.mean([len(words) for words in seen]) / 30 < 0.4
    assert all(set(words) <= set(sentence.split()) and len(set(words)) == len(words) for words in seen)
    moved = [words != sorted(words, key=lambda word: int(word[1:])) for words in seen]
    assert 0.4 < np.mean(moved) < 0.6


def test_a_text_that_a_model_has_no_places_for_is_refused(folders, tmp_path):
    shutil.copytree(folders["mbart"], tmp_path / "llm")
    config = json.loads((tmp_path / "llm/config.json").read_text())
    (tmp_path / "llm/config.json").write_text(json.dumps(config | {"max_position_embeddings": 20}))
    text = Text(cfg.LLM(path=str(tmp_path / "llm")))
    assert len(text.start) == 1 and len(text.encode(" ".join(["we"] * 18))) == 19  # the start and these take 20 places
    with pytest.raises(ValueError, match="its text has 20 tokens, and 19 is what the language model takes"):
        text.encode(" ".join(["we"] * 19))
