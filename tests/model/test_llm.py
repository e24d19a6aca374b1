"""Stage 2's families of language models: each reads features as it reads words, alone as in a batch."""

import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from models import KINDS, save
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BertConfig,
    GenerationConfig,
    GPT2Config,
    MBartConfig,
    MBartTokenizer,
    PreTrainedTokenizerFast,
)
from transformers.models.mbart.tokenization_mbart import FAIRSEQ_LANGUAGE_CODES

from flallm import config as cfg
from flallm.data.corpora import synthetic
from flallm.data.dataset import IGNORE_INDEX, ClipDataset
from flallm.data.reader import Shards
from flallm.data.tokenizer import TranslationTokenizer
from flallm.demo.pretrain import make_tokenizer, noise, pretrain
from flallm.evaluation.decode import reachable_score
from flallm.model.llm import load_llm, make_lm_adapter, untie
from flallm.model.translator import Translator
from flallm.model.trim import trim_tokenizer
from flallm.model.weights import load_weights, unique_tensors
from flallm.planning import doctor
from flallm.training.resume import check_fits
from flallm.utils import UserError

PROMPTS = {"mbart": "{video}", "mt5": "we {video}", "llama": "we saw {video} and"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    return {kind: save(kind, tmp_path_factory.mktemp(kind)) for kind in KINDS}


@pytest.fixture
def built(small, folders):
    """`built(kind, **overrides)`: the config and the translator of stage 2 with a language model of that family."""

    def make(kind: str, **overrides) -> tuple[cfg.Config, Translator]:
        config = small(
            "stage2",
            {
                "llm.path": str(folders[kind]),
                "llm.prompt": PROMPTS[kind],
                "decode.max_tokens": 12,
                **overrides,
            },
        )
        torch.manual_seed(1)
        return config, Translator(config, TranslationTokenizer(config.llm)).eval()

    return make


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stack", [1, 3])
def test_loss_and_answer_of_a_clip_do_not_depend_on_its_batch(built, kind, stack):
    config, model = built(kind, **{"llm.stack": stack})
    clips = ClipDataset("train", config.data, 0)
    together, *alone = (
        clips.batch(model.text, [(None, n) for n in numbers])
        for numbers in (range(6), *([n] for n in range(6)))
    )
    assert (
        len(set(together.lengths.tolist())) > 2 and (together.labels == IGNORE_INDEX).any()
    )  # or padding is not tested
    with torch.no_grad():
        torch.testing.assert_close(
            model(together)[0], sum(model(b)[0] for b in alone), rtol=1e-4, atol=1e-3
        )
    generate_with_scores = model.translate(together, config.decode)
    assert generate_with_scores == [model.translate(b, config.decode)[0] for b in alone]
    assert stack > 1 or len(set(generate_with_scores)) > 1


def test_a_model_that_was_pretrained_here_knows_the_next_word_from_those_before_it(tmp_path):
    sentences = ["we saw peter", "peter saw the red house", "the house is red", "is peter here"]
    pretrain(
        sentences * 8,
        tmp_path / "llm",
        vocabulary=60,
        layers=1,
        width=48,
        heads=2,
        steps=100,
        batch=16,
    )
    model, tokenizer = (
        AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "llm"),
        AutoTokenizer.from_pretrained(tmp_path / "llm"),
    )
    losses = []
    for sentence in sentences:
        ids = tokenizer(f"<s>{sentence}</s>", add_special_tokens=False, return_tensors="pt")[
            "input_ids"
        ]
        with torch.no_grad():
            logits = model(input_ids=ids[:, 1:], decoder_input_ids=ids[:, :-1]).logits
        losses.append(float(nn.functional.cross_entropy(logits[0], ids[0, 1:])))
    assert np.mean(losses) < 0.75 * np.log(len(tokenizer))  # of chance


def test_words_are_put_together_from_tokens_and_chinese_ones_stand_alone(folders, tmp_path):
    text = TranslationTokenizer(cfg.LLM(path=str(folders["mbart"])))
    ids = text.encode("we unsaw peter")
    words = text.words(ids)
    assert [word for word, _ in words] == ["we", "unsaw", "peter"] and len(words[1][1]) > 1
    assert [place for _, places in words for place in places] == list(range(len(ids) - 1))
    sentences = ["今天天气很好。", "明天下雨。", "我们 DVD 看"]
    shutil.copytree(folders["mbart"], tmp_path / "zh")
    make_tokenizer(sentences, 60).save_pretrained(tmp_path / "zh")
    text = TranslationTokenizer(cfg.LLM(path=str(tmp_path / "zh")))
    assert all(
        "".join(word for word, _ in text.words(text.encode(s))) == s.replace(" ", "")
        for s in sentences
    )
    assert len(text.words(text.encode("今天下雨好。"))) == len(text.encode("今天下雨好。")) - 1 > 2
    letters = Tokenizer(models.BPE())  # a token is a byte: a Chinese character has three
    letters.pre_tokenizer, letters.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    letters.train_from_iterator(
        [],
        trainers.BpeTrainer(
            special_tokens=["</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        ),
    )
    PreTrainedTokenizerFast(tokenizer_object=letters, eos_token="</s>").save_pretrained(
        tmp_path / "zh"
    )
    text = TranslationTokenizer(cfg.LLM(path=str(tmp_path / "zh")))
    assert text.words(text.encode("天 über")) == [("天", [0, 1, 2, 3]), ("über", [4, 5, 6, 7, 8])]


@pytest.mark.parametrize("kind", KINDS)
def test_word_embeddings_in_the_place_of_features_give_the_models_own_outputs(built, kind):
    """So what features go through (scale, positions, LayerNorm, the place in the prompt) is what words go through."""
    _, model = built(kind)
    words = [model.text.encode(text)[:-1] for text in ("we saw my small sister", "peter")]
    labels = nn.utils.rnn.pad_sequence(
        [torch.tensor(model.text.encode(text)) for text in ("anna bought some water", "we saw")],
        True,
        IGNORE_INDEX,
    )
    model.adapter = nn.Identity()
    with torch.no_grad():
        inputs = model._read(
            model.language.get_input_embeddings().weight[[i for ids in words for i in ids]],
            torch.tensor([len(w) for w in words]),
        )
        ours = model.lm_adapter.logits(inputs, labels)
        for row, ids, answer in zip(ours, words, labels):
            ids, answer = (
                [*model.text.before, *ids, *model.text.after],
                answer[answer != IGNORE_INDEX].tolist(),
            )
            if kind == "llama":
                theirs = model.language(input_ids=torch.tensor([ids + answer[:-1]])).logits[
                    0, len(ids) - 1 :
                ]
            else:
                theirs = model.language(
                    input_ids=torch.tensor([ids]),
                    decoder_input_ids=torch.tensor([model.text.start + answer[:-1]]),
                ).logits[0]
            torch.testing.assert_close(row[: len(answer)], theirs, rtol=1e-4, atol=1e-4)


PIECES = ["▁", "▁a", "▁de", "▁en", "▁do", "▁not", "▁go", "▁.", "▁,"]


def mbart(folder: Path, **config) -> MBartTokenizer:
    """The tokenizer of mBART, of a few pieces and all its language codes, with a config."""
    special = [
        (piece, 0.0)
        for piece in ("<s>", "<pad>", "</s>", "<unk>", *PIECES, *FAIRSEQ_LANGUAGE_CODES, "<mask>")
    ]
    tokenizer = MBartTokenizer(vocab=special)
    tokenizer.save_pretrained(folder)
    MBartConfig(vocab_size=len(tokenizer), **config).save_pretrained(folder)
    return tokenizer


def test_only_language_codes_are_languages(folders, tmp_path):
    whole = mbart(tmp_path / "whole")
    kept, trimmed = trim_tokenizer(whole, set(whole("a de en")["input_ids"]))
    trimmed.save_pretrained(tmp_path / "trimmed")
    MBartConfig(vocab_size=len(kept)).save_pretrained(tmp_path / "trimmed")
    for name, tokenizer in (("whole", whole), ("trimmed", trimmed)):
        text = TranslationTokenizer(cfg.LLM(path=str(tmp_path / name), language="de_DE"))
        assert (
            text.start == [tokenizer.convert_tokens_to_ids("de_DE")]
            and text.decode([*text.start, *text.encode("a de")]) == "a de"
        )
        for piece in ("a", "de", "▁de", "en", "<mask>", "</s>", "xx_XX"):
            with pytest.raises(
                UserError,
                match=f"llm.language: '{piece}' is no language code of .*, which has ar_AR, cs_CZ, de_DE, .*zh_CN$",
            ):
                TranslationTokenizer(cfg.LLM(path=str(tmp_path / name), language=piece))
        with pytest.raises(
            UserError, match="answers after the code of a language: name one of ar_AR"
        ):
            TranslationTokenizer(cfg.LLM(path=str(tmp_path / name)))
    for kind in KINDS:  # this mbart has none either
        with pytest.raises(
            UserError,
            match=r"has no language codes, so 'i' is none: leave it out with --llm.language=none",
        ):
            TranslationTokenizer(cfg.LLM(path=str(folders[kind]), language="i"))


def test_mbart_50_answers_after_its_end_token_and_the_languages_code(tmp_path):
    tokenizer = mbart(tmp_path, decoder_start_token_id=2)
    assert TranslationTokenizer(cfg.LLM(path=str(tmp_path), language="de_DE")).start == [
        2,
        tokenizer.convert_tokens_to_ids("de_DE"),
    ]
    with pytest.raises(
        UserError, match="name one of ar_AR"
    ):  # </s> alone is not what it started from
        TranslationTokenizer(cfg.LLM(path=str(tmp_path)))


def test_a_tokenizers_clean_up_of_spaces_does_not_get_into_scores(tmp_path):
    sentences = ["do not go .", "a de , do not go a en ."]
    mbart(tmp_path / "mbart")
    settings = json.loads((tmp_path / "mbart/tokenizer_config.json").read_text()) | {
        "clean_up_tokenization_spaces": True
    }
    (tmp_path / "mbart/tokenizer_config.json").write_text(json.dumps(settings))
    ids = {
        piece: i
        for i, piece in enumerate(
            ["[UNK]", "[PAD]", "[SEP]", "do", "not", "go", ".", ",", "a", "de", "en"]
        )
    }
    words = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    words.pre_tokenizer, words.decoder = (
        pre_tokenizers.BertPreTokenizer(),
        decoders.WordPiece(cleanup=True),
    )
    bert = PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token="[UNK]",
        pad_token="[PAD]",
        eos_token="[SEP]",
        clean_up_tokenization_spaces=True,
    )
    bert.save_pretrained(tmp_path / "gpt2")  # Chinese GPT-2 has BERT's tokenizer
    GPT2Config(vocab_size=len(bert)).save_pretrained(tmp_path / "gpt2")
    for name, language in (("mbart", "en_XX"), ("gpt2", None)):
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / name)
        assert (
            tokenizer.decode(tokenizer(sentences[0], add_special_tokens=False)["input_ids"])
            != sentences[0]
        )  # or nothing is tested
        text = TranslationTokenizer(cfg.LLM(path=str(tmp_path / name), language=language))
        assert [text.decode(text.encode(sentence)) for sentence in sentences] == sentences
        assert reachable_score(sentences, text, "raw", "bleu4") == pytest.approx(100)


def test_a_folder_without_the_tokenizers_vocabulary_is_refused(tmp_path):
    """transformers makes an empty tokenizer of it, to which every word is unknown."""
    MBartConfig().save_pretrained(tmp_path)
    assert len(AutoTokenizer.from_pretrained(tmp_path)) < 40
    with pytest.raises(
        UserError, match=r"lacks the file of its tokenizer's vocabulary, such as tokenizer\.json"
    ):
        TranslationTokenizer(cfg.LLM(path=str(tmp_path), language="de_DE"))


@pytest.fixture(scope="module")
def padded(folders, tmp_path_factory) -> Path:
    """LLaMA with a [PAD] in tokenizer and config, and a word in the tokenizer, that the model has no rows for."""
    folder = shutil.copytree(folders["llama"], tmp_path_factory.mktemp("padded") / "llm")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.add_tokens(["quokka"])
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text()) | {
        "pad_token_id": tokenizer.pad_token_id
    }
    (folder / "config.json").write_text(json.dumps(config))
    assert config["vocab_size"] == tokenizer.pad_token_id == len(tokenizer) - 2
    return folder


def test_padding_without_an_embedding_changes_nothing(built, padded):
    """The model and the text are the same: so are losses and answers."""
    results = []
    for path in ({}, {"llm.path": str(padded)}):
        config, model = built("llama", **path)
        batch = ClipDataset("train", config.data, 0).batch(
            model.text, [(None, n) for n in range(6)]
        )
        assert (batch.labels == IGNORE_INDEX).any()
        with torch.no_grad():
            results.append((model(batch)[0], model.translate(batch, config.decode)))
    assert results[0][0] == results[1][0] and results[0][1] == results[1][1]


def test_what_reads_words_reads_those_with_an_embedding(built, padded):
    config, model = built("llama", **{"llm.path": str(padded), "llm.input": "words"})
    model.words.weight.data.zero_(), model.words.bias.data.zero_()
    batch = ClipDataset("train", config.data, 0).batch(model.text, [(None, 0)])
    with torch.no_grad():
        read = model._read(model.features(batch), batch.lengths)["inputs_embeds"][0]
    every_word_alike = model.language.get_input_embeddings().weight.mean(0)
    features = read[len(model.text.before) : len(read) - len(model.text.after)]
    torch.testing.assert_close(features, every_word_alike.expand_as(features), rtol=1e-4, atol=1e-6)


def test_a_token_without_an_embedding_is_refused_where_it_occurs(small, padded):
    text = TranslationTokenizer(cfg.LLM(path=str(padded)))
    assert text.without_row == ["[PAD]", "quokka"]
    for token, i in (("[PAD]", text.rows), ("quokka", text.rows + 1)):
        message = rf"the token '{re.escape(token)}' has the id {i}, and the language model has {text.rows} embeddings"
        with pytest.raises(ValueError, match=f"its text cannot be read: {message}"):
            text.encode(f"we saw a {token}")
        with pytest.raises(UserError, match=f"llm.prompt: {message}"):
            TranslationTokenizer(cfg.LLM(path=str(padded), prompt=f"{token} {{video}}"))
    assert text.decode([*text.encode("we saw")[:-1], text.rows + 1]) == "we saw"


def test_doctor_knows_tokens_without_an_embedding(small, padded, tmp_path):
    config = small("stage2", {"llm.path": str(padded)})
    [(state, _, finding)] = doctor._models([config])
    assert (
        state == "WARN"
        and "2 without an embedding in the model, as [PAD]: padding takes another" in finding
    )
    word = next(Shards(config.data.shards, "train").metas())["text"].split()[0]
    folder = shutil.copytree(padded, tmp_path / "llm")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([word])
    tokenizer.save_pretrained(folder)
    [(state, _, finding)] = doctor._models([small("stage2", {"llm.path": str(folder)})])
    assert (
        state == "MISS"
        and f"a clip is left out: the token {word!r} has the id {len(tokenizer) - 1}" in finding
    )


TINY = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
HYBRID = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "head_dim": 8,
}
FAMILIES = {
    "gpt2": {"vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 4},
    "opt": {**TINY, "ffn_dim": 64, "word_embed_proj_dim": 32},
    "bloom": {"vocab_size": 300, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "mpt": {"vocab_size": 300, "d_model": 32, "n_layers": 2, "n_heads": 4},
    "gpt_neox": TINY,
    "mistral": TINY,
    "qwen2": TINY,
    "gemma2": {**TINY, "head_dim": 8},
    "phi3": {**TINY, "pad_token_id": 1},
    "qwen3_5_text": {
        **TINY,
        **HYBRID,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },  # most layers keep a state in place of attention
}


@pytest.mark.parametrize("kind", FAMILIES)
def test_decoder_only_families_decode_and_show_attention_alone_as_in_a_batch(
    folders, kind, tmp_path
):
    CONFIG_MAPPING[kind](
        **{**FAMILIES[kind], "bos_token_id": 0, "eos_token_id": 2}
    ).save_pretrained(tmp_path)
    torch.manual_seed(0)
    model = load_llm(cfg.LLM(path=str(tmp_path), random=True)).eval()
    reader = make_lm_adapter(model, TranslationTokenizer(cfg.LLM(path=str(folders["llama"]))))
    clips = torch.randn(2, 9, 32).split(1)
    lengths, labels = (5, 9), torch.tensor([[7, 8, 9, 2], [7, 2, IGNORE_INDEX, IGNORE_INDEX]])
    padded = torch.cat(
        [nn.functional.pad(clip[:, :n], (0, 0, 9 - n, 0)) for clip, n in zip(clips, lengths)]
    )
    together = {
        "inputs_embeds": padded,
        "attention_mask": torch.tensor([[0] * 4 + [1] * 5, [1] * 9]),
    }
    options = GenerationConfig(num_beams=3, max_new_tokens=4, eos_token_id=2, pad_token_id=1)
    with torch.no_grad():
        both = (
            reader.logits(together, labels),
            reader.attention(together, labels),
            reader.generate(together, options),
        )
        for i, (clip, n) in enumerate(zip(clips, lengths)):
            alone = {
                "inputs_embeds": clip[:, :n],
                "attention_mask": torch.ones(1, n, dtype=torch.long),
            }
            known = labels[i] != IGNORE_INDEX
            torch.testing.assert_close(
                both[0][i, known],
                reader.logits(alone, labels[i : i + 1])[0, known],
                rtol=1e-3,
                atol=1e-4,
            )
            torch.testing.assert_close(
                both[1][i, known, 9 - n :],
                reader.attention(alone, labels[i : i + 1])[0, known],
                rtol=1e-3,
                atol=1e-4,
            )
            answer = reader.generate(alone, options)[0].tolist()
            assert both[2][i, : len(answer)].tolist() == answer


@pytest.mark.parametrize(
    "kind",
    [
        "mamba",
        "mamba2",
        "falcon_mamba",
        "rwkv",
        "xlstm",
        "openai-gpt",
        "ctrl",
        "xlnet",
        "bamba",
        "minimax",
        "gemma3",
        "whisper",
    ],
)
def test_families_without_attention_maps_or_beam_search_are_refused_by_name(
    small, folders, kind, tmp_path
):
    CONFIG_MAPPING[kind]().save_pretrained(tmp_path)
    (
        shutil.copy(folders["llama"] / "tokenizer.json", tmp_path),
        shutil.copy(folders["llama"] / "tokenizer_config.json", tmp_path),
    )
    message = f"{tmp_path} is a {kind} model; stage 2 takes mbart, t5, mt5 and decoder-only models with attention maps and beam search, such as llama"
    with pytest.raises(UserError, match=message):
        load_llm(cfg.LLM(path=str(tmp_path)))
    [(state, _, finding)] = doctor._models([small("stage2", {"llm.path": str(tmp_path)})])
    assert state == "MISS" and message in finding


def test_what_a_tokenizer_cannot_say_bounds_the_score(folders):
    """These normalise by NFKC, as mBART's and mT5's do, which makes a comma of a full-width one."""
    text = TranslationTokenizer(cfg.LLM(path=str(folders["mbart"])))
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
    trained, again = (
        built("mt5", **{"llm.path": str(tmp_path), "llm.random": random})[1]
        for random in (False, True)
    )
    assert (
        trained.language.lm_head.weight != trained.language.shared.weight
    ).all() and again.language.lm_head.weight is again.language.shared.weight
    save_file(unique_tensors(trained), tmp_path / "model.safetensors")
    load_weights(tmp_path, again)
    assert all(
        torch.equal(a, b)
        for a, b in zip(trained.state_dict().values(), again.state_dict().values())
    )


@pytest.mark.parametrize("embeddings", [None, True, False])
@pytest.mark.parametrize("rank", [0, 4])
def test_what_trains_is_what_the_recipe_says(folders, rank, embeddings):
    config = cfg.LLM(
        path=str(folders["llama"]), lora=cfg.LoRA(rank=rank), train_embeddings=embeddings
    )
    model = load_llm(config)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    words = {
        name for name, _ in model.named_parameters() if "embed_tokens" in name or "lm_head" in name
    }
    others = {name for name, _ in model.named_parameters()} - words
    expected = {name for name in others if not rank or ".lora_" in name}
    expected |= words if embeddings or (embeddings is None and not rank) else set()
    assert trained == expected
    if rank:
        assert {name.split(".")[-4] for name in trained - words} == {"q_proj", "v_proj"}
        assert sum(
            p.numel() for p in model.parameters() if p.requires_grad and p.ndim == 2
        ) >= 2 * 4 * (2 * 32 + 32 + 16)


def test_gradient_checkpointing_changes_memory_alone(built):
    losses = []
    for checkpointing in (False, True):
        config, model = built("llama", **{"llm.gradient_checkpointing": checkpointing})
        loss, _ = model.train()(
            ClipDataset("train", config.data, 0).batch(model.text, [(None, n) for n in range(3)])
        )
        loss.backward()
        losses.append((loss.item(), model.adapter[0].weight.grad.clone()))
    assert losses[0][0] == pytest.approx(losses[1][0])
    torch.testing.assert_close(losses[0][1], losses[1][1])


def test_a_prompt_names_the_place_of_the_features_once():
    with pytest.raises(UserError, match=r"must hold \{video\} once"):
        cfg.load("demo", "stage2", {"llm.prompt": "translate this"})


def test_code_in_a_model_folder_is_not_run(folders, tmp_path, monkeypatch):
    shutil.copytree(folders["llama"], tmp_path / "llm")
    (tmp_path / "llm/theirs.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\nclass C: pass\n"
    )
    content = json.loads((tmp_path / "llm/config.json").read_text()) | {
        "model_type": "theirs",
        "auto_map": {"AutoConfig": "theirs.C", "AutoModelForCausalLM": "theirs.C"},
    }
    (tmp_path / "llm/config.json").write_text(json.dumps(content))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))  # who answers every question with yes
    for load in (TranslationTokenizer, load_llm):
        with pytest.raises(UserError, match="can be loaded from"):
            load(cfg.LLM(path=str(tmp_path / "llm")))
    assert not (tmp_path / "ran").exists()


def test_families_that_do_not_fit_and_folders_that_lack_files_are_named(folders, tmp_path):
    BertConfig(hidden_size=32, num_attention_heads=2).save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match="is a bert model; stage 2 takes mbart, t5, mt5 and decoder-only models"
    ):
        load_llm(cfg.LLM(path=str(tmp_path)))
    for name in ("tokenizer.json", "config.json"):
        (tmp_path / name).write_bytes((folders["llama"] / name).read_bytes())
    with pytest.raises(UserError, match="no model can be loaded from"):
        load_llm(cfg.LLM(path=str(tmp_path)))
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="no tokenizer"):
        TranslationTokenizer(cfg.LLM(path=str(tmp_path)))
    with pytest.raises(UserError, match=r"llm.lora: .*nosuch"):
        load_llm(cfg.LLM(path=str(folders["llama"]), lora=cfg.LoRA(rank=2, targets=("nosuch",))))


def test_in_pretraining_about_a_third_of_the_words_is_masked_and_the_others_stay():
    rng, sentence = np.random.default_rng(0), " ".join(f"w{i}" for i in range(30))
    seen = [[word for word in noise(sentence, rng).split() if word != "<mask>"] for _ in range(300)]
    assert 0.25 < 1 - np.mean([len(words) for words in seen]) / 30 < 0.4
    assert all(
        set(words) <= set(sentence.split()) and len(set(words)) == len(words) for words in seen
    )
    moved = [words != sorted(words, key=lambda word: int(word[1:])) for words in seen]
    assert 0.4 < np.mean(moved) < 0.6


def test_a_text_that_a_model_has_no_places_for_is_refused(folders, tmp_path):
    shutil.copytree(folders["mbart"], tmp_path / "llm")
    config = json.loads((tmp_path / "llm/config.json").read_text())
    (tmp_path / "llm/config.json").write_text(json.dumps(config | {"max_position_embeddings": 20}))
    text = TranslationTokenizer(cfg.LLM(path=str(tmp_path / "llm")))
    assert (
        len(text.start) == 1 and len(text.encode(" ".join(["we"] * 18))) == 19
    )  # the start and these take 20 places
    with pytest.raises(
        ValueError, match="its text has 20 tokens, and 19 is what the language model takes"
    ):
        text.encode(" ".join(["we"] * 19))
