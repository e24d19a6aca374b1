"""A trimmed model gives kept tokens the logits of the original; its tokenizer splits text alike."""

from pathlib import Path

import pytest
import torch
from models import save
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from flallm.data.corpora import synthetic
from flallm.data.reader import Shards
from flallm.model.llm import untie
from flallm.model.trim import trim, trim_model, trim_tokenizer

GERMAN = [
    "am samstag regnet es im süden länger",
    "heute nacht zwölf grad an der küste",
    "größere wolkenfelder überqueren die alpen",
]
CHINESE = ["今天天气很好，我们去公园吧。", "他昨天没有来上课。", "你叫什么名字？"]
PAIRS = [f"{a}{b} {b}{a}" for a in "abcdefg" for b in "hijklm"]
OTHER = ["the weather is fine", "morgen scheint die sonne", "明天下雨", *PAIRS]
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]
SPECIAL_NAMES = {
    "bos_token": "<s>",
    "pad_token": "<pad>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
}


def unigram() -> Tokenizer:
    """As mBART's and mT5's: sentencepiece's Unigram."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=SPECIAL, unk_token="<unk>")
    tokenizer.train_from_iterator(GERMAN + CHINESE + OTHER, trainer)
    return tokenizer


def byte_level() -> Tokenizer:
    """As LLaMA 3's, Qwen's and SmolLM's: BPE over bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=SPECIAL, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(GERMAN + CHINESE + OTHER, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return tokenizer


def byte_fallback() -> Tokenizer:
    """As LLaMA 1's and 2's: sentencepiece's BPE, with bytes for what it does not know."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    special = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=550, special_tokens=special)
    tokenizer.train_from_iterator(GERMAN + OTHER, trainer)
    return tokenizer


def plain_ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def round_trip(tokenizer: PreTrainedTokenizerFast, text: str) -> str:
    return tokenizer.decode(plain_ids(tokenizer, text)).strip()


@pytest.mark.parametrize("make", [unigram, byte_level, byte_fallback])
def test_text_of_kept_tokens_is_split_and_joined_as_before(make, tmp_path):
    original = PreTrainedTokenizerFast(tokenizer_object=make(), **SPECIAL_NAMES)
    texts = GERMAN + CHINESE
    used = set()
    for text in texts:
        used.update(plain_ids(original, text))
    new_ids, small = trim_tokenizer(original, used)
    assert used < new_ids.keys()
    assert len(small) == len(new_ids) < len(original)
    small.save_pretrained(tmp_path)
    trimmed = AutoTokenizer.from_pretrained(tmp_path)
    for text in texts:
        expected = [new_ids[token_id] for token_id in original(text)["input_ids"]]
        assert trimmed(text)["input_ids"] == expected
        assert round_trip(trimmed, text) == round_trip(original, text)
        assert make is unigram or round_trip(trimmed, text) == text
    assert {name: getattr(trimmed, name) for name in SPECIAL_NAMES} == SPECIAL_NAMES
    if make is not unigram:  # unseen text is bytes
        assert round_trip(trimmed, "xyz 漢") == "xyz 漢"


def test_tokens_that_a_post_processor_puts_around_a_text_are_kept():
    """Such as the first word of an instruction, which is no special token."""
    backend = unigram()
    used = set(PreTrainedTokenizerFast(tokenizer_object=backend)(GERMAN[0])["input_ids"])
    vocabulary = sorted(backend.get_vocab().items())
    unused = [piece for piece, i in vocabulary if i not in used and piece not in SPECIAL]
    piece, piece_id = unused[0], backend.token_to_id(unused[0])
    special_tokens = [("<s>", 0), (piece, piece_id)]
    for processor in (
        processors.TemplateProcessing(single=f"<s> {piece} $A", special_tokens=special_tokens),
        processors.RobertaProcessing((piece, piece_id), ("<s>", 0)),
        processors.Sequence([processors.BertProcessing((piece, piece_id), ("<s>", 0))]),
    ):
        backend.post_processor = processor
        original = PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL_NAMES)
        new_ids, small = trim_tokenizer(original, used)
        old, new = original(GERMAN[0])["input_ids"], small(GERMAN[0])["input_ids"]
        assert piece_id in old
        assert new == [new_ids[token_id] for token_id in old]
        assert piece in small.convert_ids_to_tokens(new)


@pytest.fixture
def llama_with_pad(tmp_path) -> Path:
    """A LLaMA with a [PAD] in its tokenizer alone: the model has no embedding for it."""
    folder = save("llama", tmp_path / "original")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    return folder


def test_a_padding_token_without_an_embedding_stays_without_one(
    llama_with_pad, shards, tmp_path, flallm
):
    tokenizer = AutoTokenizer.from_pretrained(llama_with_pad)
    model = AutoModelForCausalLM.from_pretrained(llama_with_pad)
    out = tmp_path / "small"
    result = flallm("trim", llama_with_pad, f"--shards={shards}", f"--out={out}", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    small, trimmed = AutoTokenizer.from_pretrained(out), AutoModelForCausalLM.from_pretrained(out)
    rows = trimmed.get_input_embeddings().weight
    assert len(small) - 1 == small.pad_token_id == len(rows) == trimmed.config.vocab_size
    assert trimmed.config.vocab_size < model.config.vocab_size
    old_rows = model.get_input_embeddings().weight
    for token in small.get_vocab().keys() - {"[PAD]"}:
        row = rows[small.convert_tokens_to_ids(token)]
        assert torch.equal(row, old_rows[tokenizer.convert_tokens_to_ids(token)])


def test_a_training_text_with_a_token_without_an_embedding_is_refused(
    llama_with_pad, shards, tmp_path, flallm
):
    tokenizer = AutoTokenizer.from_pretrained(llama_with_pad)
    word = next(Shards(shards, "train").metas())["text"].split()[0]
    tokenizer.add_tokens([word])
    tokenizer.save_pretrained(llama_with_pad)
    out = tmp_path / "small"
    result = flallm("trim", llama_with_pad, f"--shards={shards}", f"--out={out}", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert not out.exists()
    rows = AutoModelForCausalLM.from_pretrained(llama_with_pad).config.vocab_size
    message = f"the training text has the token {word!r} with the id {len(tokenizer) - 1}"
    assert f"{message}, and {llama_with_pad} has {rows} embeddings" in result.stderr


@pytest.mark.parametrize("kind", ["mbart", "mt5", "llama"])
@pytest.mark.parametrize("tied", [True, False])
def test_logits_of_kept_tokens_are_the_same(kind, tied, tmp_path):
    auto = AutoModelForCausalLM if kind == "llama" else AutoModelForSeq2SeqLM
    folder = save(kind, tmp_path / "original")
    original, small = (auto.from_pretrained(folder, dtype=torch.float32).eval() for _ in range(2))
    new_ids = {old: new for new, old in enumerate(sorted({0, 1, 2, 3, *range(5, 100, 3)}))}
    rows = list(new_ids)
    for model in (original, small):
        if kind == "llama":  # a head with a bias, as Phi's
            bias = torch.arange(float(model.config.vocab_size)) / 100
            model.lm_head.bias = torch.nn.Parameter(bias)
        elif not tied:
            untie(model, "lm_head.weight")
            model.lm_head.weight.data.mul_(2)
    if kind == "llama":
        small.config.pad_token_id = -1  # as in LLaMA's own config: there is no such token
    trim_model(small, new_ids)
    if kind == "llama":
        assert torch.equal(small.lm_head.bias, original.lm_head.bias[rows])
        assert small.config.pad_token_id is None
        original.lm_head.bias = small.lm_head.bias = None
    small.save_pretrained(tmp_path / "small")
    trimmed = auto.from_pretrained(tmp_path / "small", dtype=torch.float32).eval()
    assert trimmed.config.vocab_size == len(new_ids)
    assert trimmed.config.trimmed_from == original.config.vocab_size
    assert trimmed.config.eos_token_id == 2
    old = torch.tensor([rows[4:20], rows[10:26]])
    new = torch.tensor([range(4, 20), range(10, 26)])
    logits = []
    for model, ids in ((original, old), (trimmed, new)):
        inputs = {"input_ids": ids}
        if kind != "llama":
            inputs["decoder_input_ids"] = ids[:, :7]
        with torch.no_grad():
            logits.append(model(**inputs).logits)
    torch.testing.assert_close(logits[1], logits[0][..., rows], rtol=1e-5, atol=1e-5)


def test_trim_keeps_the_tokens_of_train_and_tells_what_other_splits_lose(shards, tmp_path):
    model = save("mbart", tmp_path / "original")
    summary = trim(str(model), str(shards), tmp_path / "small")
    assert (tmp_path / "small/model.safetensors").is_file()
    original = AutoTokenizer.from_pretrained(model)
    vocabulary = AutoTokenizer.from_pretrained(tmp_path / "small").get_vocab()
    for split in ("dev", "test"):
        tokens = []
        for meta in Shards(shards, split).metas():
            tokens += original.tokenize(meta["text"])
        lost = sum(token not in vocabulary for token in tokens) / len(tokens)
        assert f"{split:11} {lost:.2%} of the tokens lost" in summary
        assert lost < 0.4


def test_trim_keeps_frequent_tokens_of_another_text_on_request(shards, tmp_path, flallm):
    model, out, text = save("mbart", tmp_path / "original"), tmp_path / "more", tmp_path / "a.txt"
    trim(str(model), str(shards), tmp_path / "small")
    text.write_text("\n".join(sentence for _, sentence in synthetic.sentences("text", 300)))
    command = ["trim", model, f"--shards={shards}", f"--out={out}", f"--text={text}"]
    refused = flallm(*command, "--most=no", cwd=tmp_path)
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    result = flallm(*command, "--most=50", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    small, more, original = (
        len(AutoTokenizer.from_pretrained(folder)) for folder in (tmp_path / "small", out, model)
    )
    assert small < more <= original


def test_trim_refuses_a_folder_that_exists_or_cannot_be_made(shards, tmp_path, flallm):
    model, file = save("mbart", tmp_path / "original"), tmp_path / "file"
    file.touch()
    exists = flallm("trim", model, f"--shards={shards}", f"--out={model}", cwd=tmp_path)
    assert exists.stderr == f"flallm: {model} exists already\n"
    inside = flallm("trim", model, f"--shards={shards}", f"--out={file}/x", cwd=tmp_path)
    assert inside.returncode == 2
    assert inside.stderr == f"flallm: {file} cannot be made: File exists\n"
