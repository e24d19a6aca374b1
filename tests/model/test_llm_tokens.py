"""Tokens of language models: language codes, words, and tokens without an embedding."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from models import KINDS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
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
from flallm.demo.pretrain import make_tokenizer
from flallm.evaluation.decode import tokenizer_ceiling
from flallm.model.trim import trim_tokenizer
from flallm.planning import doctor
from flallm.utils import UserError

PIECES = ["▁", "▁a", "▁de", "▁en", "▁do", "▁not", "▁go", "▁.", "▁,"]


def text_of(folder: Path, **fields) -> TranslationTokenizer:
    return TranslationTokenizer(cfg.LLM(path=str(folder), **fields))


def save_mbart(folder: Path, **config) -> MBartTokenizer:
    """mBART's tokenizer, of a few pieces and all its language codes, with a config."""
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    pieces = [*special, *PIECES, *FAIRSEQ_LANGUAGE_CODES, "<mask>"]
    tokenizer = MBartTokenizer(vocab=[(piece, 0.0) for piece in pieces])
    tokenizer.save_pretrained(folder)
    MBartConfig(vocab_size=len(tokenizer), **config).save_pretrained(folder)
    return tokenizer


def test_words_consist_of_tokens(folders):
    text = text_of(folders["mbart"])
    ids = text.encode("we unsaw peter")
    words = text.words(ids)
    assert [word for word, _ in words] == ["we", "unsaw", "peter"]
    assert len(words[1][1]) > 1
    positions = [position for _, of_word in words for position in of_word]
    assert positions == list(range(len(ids) - 1))


def test_a_chinese_token_is_a_word(folders, tmp_path):
    sentences = ["今天天气很好。", "明天下雨。", "我们 DVD 看"]
    folder = shutil.copytree(folders["mbart"], tmp_path / "zh")
    make_tokenizer(sentences, 60).save_pretrained(folder)
    text = text_of(folder)
    for sentence in sentences:
        words = text.words(text.encode(sentence))
        assert "".join(word for word, _ in words) == sentence.replace(" ", "")
    ids = text.encode("今天下雨好。")
    assert len(text.words(ids)) == len(ids) - 1 > 2


def test_bytes_of_a_character_are_one_word(folders, tmp_path):
    folder = shutil.copytree(folders["mbart"], tmp_path / "bytes")
    backend = Tokenizer(models.BPE())  # a token is a byte: a Chinese character has three
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(special_tokens=["</s>"], initial_alphabet=alphabet)
    backend.train_from_iterator([], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    tokenizer.save_pretrained(folder)
    text = text_of(folder)
    words = text.words(text.encode("天 über"))
    assert words == [("天", [0, 1, 2, 3]), ("über", [4, 5, 6, 7, 8])]


@pytest.mark.parametrize("trimmed", [False, True])
def test_only_language_codes_are_languages(tmp_path, trimmed):
    tokenizer = save_mbart(tmp_path)
    if trimmed:
        new_ids, tokenizer = trim_tokenizer(tokenizer, set(tokenizer("a de en")["input_ids"]))
        tokenizer.save_pretrained(tmp_path)
        MBartConfig(vocab_size=len(new_ids)).save_pretrained(tmp_path)
    text = text_of(tmp_path, language="de_DE")
    assert text.start == [tokenizer.convert_tokens_to_ids("de_DE")]
    assert text.decode([*text.start, *text.encode("a de")]) == "a de"
    codes = "ar_AR, cs_CZ, de_DE, .*zh_CN"
    for piece in ("a", "de", "▁de", "en", "<mask>", "</s>", "xx_XX"):
        message = f"llm.language: '{piece}' is no language code of .*, which has {codes}$"
        with pytest.raises(UserError, match=message):
            text_of(tmp_path, language=piece)
    with pytest.raises(UserError, match="answers after the code of a language: name one of ar_AR"):
        text_of(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_language_is_refused_by_a_model_without_language_codes(folders, kind):
    message = "has no language codes, so 'i' is none: leave it out with --llm.language=none"
    with pytest.raises(UserError, match=message):
        text_of(folders[kind], language="i")


def test_mbart_50_answers_after_its_end_token_and_the_languages_code(tmp_path):
    tokenizer = save_mbart(tmp_path, decoder_start_token_id=2)
    code = tokenizer.convert_tokens_to_ids("de_DE")
    assert text_of(tmp_path, language="de_DE").start == [2, code]
    with pytest.raises(UserError, match="name one of ar_AR"):  # </s> alone is not its start
        text_of(tmp_path)


def save_cleaning_mbart(folder: Path) -> None:
    save_mbart(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"clean_up_tokenization_spaces": True}
    path.write_text(json.dumps(settings))


def save_cleaning_gpt2(folder: Path) -> None:
    """A Chinese GPT-2 has BERT's tokenizer."""
    pieces = ["[UNK]", "[PAD]", "[SEP]", "do", "not", "go", ".", ",", "a", "de", "en"]
    ids = {piece: i for i, piece in enumerate(pieces)}
    backend = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=True)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="[UNK]",
        pad_token="[PAD]",
        eos_token="[SEP]",
        clean_up_tokenization_spaces=True,
    )
    tokenizer.save_pretrained(folder)
    GPT2Config(vocab_size=len(tokenizer)).save_pretrained(folder)


@pytest.mark.parametrize(
    ("save_model", "language"), [(save_cleaning_mbart, "en_XX"), (save_cleaning_gpt2, None)]
)
def test_a_tokenizers_clean_up_of_spaces_does_not_change_scores(save_model, language, tmp_path):
    sentences = ["do not go .", "a de , do not go a en ."]
    save_model(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer(sentences[0], add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) != sentences[0]  # or nothing is tested
    text = text_of(tmp_path, language=language)
    assert [text.decode(text.encode(sentence)) for sentence in sentences] == sentences
    assert tokenizer_ceiling(sentences, text, "raw", "bleu4") == pytest.approx(100)


def test_a_folder_without_the_tokenizers_vocabulary_is_refused(tmp_path):
    """transformers makes an empty tokenizer of it, to which every word is unknown."""
    MBartConfig().save_pretrained(tmp_path)
    assert len(AutoTokenizer.from_pretrained(tmp_path)) < 40
    message = r"lacks the file of its tokenizer's vocabulary, such as tokenizer\.json"
    with pytest.raises(UserError, match=message):
        text_of(tmp_path, language="de_DE")


@pytest.fixture(scope="module")
def padded(folders, tmp_path_factory) -> Path:
    """A LLaMA whose tokenizer has a [PAD] and a word that the model has no embeddings for."""
    folder = shutil.copytree(folders["llama"], tmp_path_factory.mktemp("padded") / "llm")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.add_tokens(["quokka"])
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["pad_token_id"] = tokenizer.pad_token_id
    (folder / "config.json").write_text(json.dumps(config))
    assert config["vocab_size"] == tokenizer.pad_token_id == len(tokenizer) - 2
    return folder


def test_padding_without_an_embedding_changes_nothing(built, folders, padded):
    """The model and the text are the same: so are losses and answers."""
    losses, answers = [], []
    for folder in (folders["llama"], padded):
        config, model = built("llama", {"llm.path": str(folder)})
        clips = ClipDataset("train", config.data, 0)
        batch = clips.batch(model.text, [(None, number) for number in range(6)])
        assert (batch.labels == IGNORE_INDEX).any()
        with torch.no_grad():
            losses.append(model(batch)[0])
            answers.append(model.translate(batch, config.decode))
    assert losses[0] == losses[1]
    assert answers[0] == answers[1]


def test_a_model_that_reads_words_reads_those_with_an_embedding(built, padded):
    config, model = built("llama", {"llm.path": str(padded), "llm.input": "words"})
    model.words.weight.data.zero_()
    model.words.bias.data.zero_()
    batch = ClipDataset("train", config.data, 0).batch(model.text, [(None, 0)])
    with torch.no_grad():
        embeddings = model._read(model.features(batch), batch.lengths)["inputs_embeds"][0]
    features = embeddings[len(model.text.before) : len(embeddings) - len(model.text.after)]
    mean = model.language.get_input_embeddings().weight.mean(0)  # all words are equally likely
    torch.testing.assert_close(features, mean.expand_as(features), rtol=1e-4, atol=1e-6)


def test_a_token_without_an_embedding_is_refused_where_it_occurs(padded):
    text = text_of(padded)
    assert text.without_row == ["[PAD]", "quokka"]
    for token, token_id in (("[PAD]", text.rows), ("quokka", text.rows + 1)):
        has = f"has the id {token_id}, and the language model has {text.rows} embeddings"
        message = f"the token '{re.escape(token)}' {has}"
        with pytest.raises(ValueError, match=f"its text cannot be read: {message}"):
            text.encode(f"we saw a {token}")
        with pytest.raises(UserError, match=f"llm.prompt: {message}"):
            text_of(padded, prompt=f"{token} {{video}}")
    assert text.decode([*text.encode("we saw")[:-1], text.rows + 1]) == "we saw"


def test_doctor_reports_tokens_without_an_embedding(small, padded, tmp_path):
    config = small("stage2", {"llm.path": str(padded)})
    [(state, _, finding)] = doctor._models([config])
    assert state == "WARN"
    assert "2 without an embedding in the model, as [PAD]: padding takes another" in finding
    word = next(Shards(config.data.shards, "train").metas())["text"].split()[0]
    folder = shutil.copytree(padded, tmp_path / "llm")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([word])
    tokenizer.save_pretrained(folder)
    [(state, _, finding)] = doctor._models([small("stage2", {"llm.path": str(folder)})])
    assert state == "MISS"
    message = f"a clip is left out: the token {word!r} has the id {len(tokenizer) - 1}"
    assert message in finding


def test_what_a_tokenizer_cannot_express_bounds_the_score(folders):
    """It normalises by NFKC, as mBART's and mT5's do: a full-width comma becomes a comma."""
    text = text_of(folders["mbart"])
    sentences = [sentence for _, sentence in synthetic.sentences("test", 20)]
    assert tokenizer_ceiling(sentences, text, "raw", "bleu4") == pytest.approx(100)
    with_comma = [f"{sentence} ，" for sentence in sentences]
    assert tokenizer_ceiling(with_comma, text, "raw", "bleu4") < 90


def test_a_text_with_more_tokens_than_positions_is_refused(folders, tmp_path):
    folder = shutil.copytree(folders["mbart"], tmp_path / "llm")
    config = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": 20}
    (folder / "config.json").write_text(json.dumps(config))
    text = text_of(folder)
    assert len(text.start) == 1
    assert len(text.encode(" ".join(["we"] * 18))) == 19  # with the start 20 positions
    message = "its text has 20 tokens, and 19 is what the language model takes"
    with pytest.raises(ValueError, match=message):
        text.encode(" ".join(["we"] * 19))
