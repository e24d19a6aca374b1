"""A trimmed model says of the tokens that are left what the whole one says, and its tokenizer splits the text alike."""

import pytest
import torch
from models import save
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedTokenizerFast

from flallm.data.corpora import synthetic
from flallm.data.reader import Shards
from flallm.model.llm import untie
from flallm.model.trim import trim, trim_model, trim_tokenizer

GERMAN = ["am samstag regnet es im süden länger", "heute nacht zwölf grad an der küste", "größere wolkenfelder überqueren die alpen"]
CHINESE = ["今天天气很好，我们去公园吧。", "他昨天没有来上课。", "你叫什么名字？"]
OTHER = ["the weather is fine", "morgen scheint die sonne", "明天下雨", *(f"{a}{b} {b}{a}" for a in "abcdefg" for b in "hijklm")]
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]


def unigram() -> Tokenizer:
    """As mBART's and mT5's: sentencepiece's Unigram."""
    made = Tokenizer(models.Unigram())
    made.normalizer, made.pre_tokenizer, made.decoder = normalizers.NFKC(), pre_tokenizers.Metaspace(), decoders.Metaspace()
    made.train_from_iterator(GERMAN + CHINESE + OTHER, trainers.UnigramTrainer(vocab_size=300, special_tokens=SPECIAL, unk_token="<unk>"))
    return made


def byte_level() -> Tokenizer:
    """As LLaMA 3's, Qwen's and SmolLM's: BPE over bytes."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(GERMAN + CHINESE + OTHER, trainers.BpeTrainer(vocab_size=500, special_tokens=SPECIAL, initial_alphabet=alphabet))
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return made


def fallback() -> Tokenizer:
    """As LLaMA 1's and 2's: sentencepiece's BPE, with bytes for what it does not know."""
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer, made.decoder = normalizers.Replace(" ", "▁"), decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.train_from_iterator(GERMAN + OTHER, trainers.BpeTrainer(vocab_size=550, special_tokens=[*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]))
    return made


@pytest.mark.parametrize("make", [unigram, byte_level, fallback])
def test_text_of_kept_tokens_is_split_and_joined_as_before(make, tmp_path):
    whole = PreTrainedTokenizerFast(tokenizer_object=make(), bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    texts = GERMAN + CHINESE
    used = {i for text in texts for i in whole(text, add_special_tokens=False)["input_ids"]}
    kept, small = trim_tokenizer(whole, used)
    assert used < kept.keys() and len(small) == len(kept) < len(whole)
    small.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for text in texts:
        ids = whole(text)["input_ids"]
        assert again(text)["input_ids"] == [kept[i] for i in ids]
        assert (
            again.decode(again(text, add_special_tokens=False)["input_ids"]).strip() == whole.decode(whole(text, add_special_tokens=False)["input_ids"]).strip()
        )
        assert make is unigram or again.decode(again(text, add_special_tokens=False)["input_ids"]).strip() == text
    assert [getattr(again, f"{name}_token") for name in ("bos", "pad", "eos", "unk")] == ["<s>", "<pad>", "</s>", "<unk>"]
    if make is not unigram:  # what was never seen is bytes
        assert again.decode(again("xyz 漢", add_special_tokens=False)["input_ids"]).strip() == "xyz 漢"


def test_tokens_that_a_post_processor_puts_around_a_text_are_kept():
    """Such as the first word of an instruction, which is no special token."""
    first = unigram()
    split = PreTrainedTokenizerFast(tokenizer_object=first)
    used = set(split(GERMAN[0])["input_ids"])
    piece = next(piece for piece, i in sorted(first.get_vocab().items()) if i not in used and piece not in SPECIAL)
    i = first.token_to_id(piece)
    for processor in (
        processors.TemplateProcessing(single=f"<s> {piece} $A", special_tokens=[("<s>", 0), (piece, i)]),
        processors.RobertaProcessing((piece, i), ("<s>", 0)),
        processors.Sequence([processors.BertProcessing((piece, i), ("<s>", 0))]),
    ):
        first.post_processor = processor
        whole = PreTrainedTokenizerFast(tokenizer_object=first, bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
        kept, small = trim_tokenizer(whole, used)
        ids = whole(GERMAN[0])["input_ids"]
        assert i in ids and small(GERMAN[0])["input_ids"] == [kept[i] for i in ids]
        assert piece in small.convert_ids_to_tokens(small(GERMAN[0])["input_ids"])


def test_a_padding_token_that_the_model_has_no_embedding_for_stays_without_one(shards, tmp_path, flallm):
    """As a LLaMA that a [PAD] was added to in its tokenizer alone."""
    folder = save("llama", tmp_path / "whole")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    done = flallm("trim", folder, f"--shards={shards}", f"--out={tmp_path / 'small'}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    small, again = AutoTokenizer.from_pretrained(tmp_path / "small"), AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    rows = again.get_input_embeddings().weight
    assert len(small) - 1 == small.pad_token_id == len(rows) == again.config.vocab_size < model.config.vocab_size
    for token in small.get_vocab().keys() - {"[PAD]"}:
        assert torch.equal(rows[small.convert_tokens_to_ids(token)], model.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids(token)])
    word = next(Shards(shards, "train").metas())["text"].split()[0]
    tokenizer.add_tokens([word])
    tokenizer.save_pretrained(folder)
    done = flallm("trim", folder, f"--shards={shards}", f"--out={tmp_path / 'other'}", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and not (tmp_path / "other").exists()
    assert f"the training text has the token {word!r} with the id {len(tokenizer) - 1}, and {folder} has {model.config.vocab_size} embeddings" in done.stderr


@pytest.mark.parametrize("kind", ["mbart", "mt5", "llama"])
@pytest.mark.parametrize("tied", [True, False])
def test_logits_of_kept_tokens_are_the_same(kind, tied, tmp_path):
    auto = AutoModelForCausalLM if kind == "llama" else AutoModelForSeq2SeqLM
    whole, small = (auto.from_pretrained(save(kind, tmp_path / "whole"), dtype=torch.float32).eval() for _ in range(2))
    if kind != "llama" and not tied:
        for model in (whole, small):
            untie(model, "lm_head.weight")
        whole.lm_head.weight.data.mul_(2), small.lm_head.weight.data.mul_(2)
    kept = {old: new for new, old in enumerate(sorted({0, 1, 2, 3, *range(5, 100, 3)}))}
    if kind == "llama":  # as Phi's head, and as LLaMA's own config says of a token there is not
        for model in (whole, small):
            model.lm_head.bias = torch.nn.Parameter(torch.arange(float(model.config.vocab_size)) / 100)
        small.config.pad_token_id = -1
    trim_model(small, kept)
    assert kind != "llama" or (torch.equal(small.lm_head.bias, whole.lm_head.bias[list(kept)]) and small.config.pad_token_id is None)
    if kind == "llama":
        whole.lm_head.bias = small.lm_head.bias = None
    small.save_pretrained(tmp_path / "small")
    again = auto.from_pretrained(tmp_path / "small", dtype=torch.float32).eval()
    assert again.config.vocab_size == len(kept) and again.config.trimmed_from == whole.config.vocab_size and again.config.eos_token_id == 2
    old = torch.tensor([list(kept)[4:20], list(kept)[10:26]])
    new = torch.tensor([[kept[int(i)] for i in row] for row in old])
    inputs = ({"input_ids": x} | ({} if kind == "llama" else {"decoder_input_ids": x[:, :7]}) for x in (old, new))
    with torch.no_grad():
        a, b = (model(**x).logits for model, x in zip((whole, again), inputs))
    torch.testing.assert_close(b, a[..., list(kept)], rtol=1e-5, atol=1e-5)


def test_trim_keeps_what_training_says_and_tells_what_the_others_lose(shards, tmp_path, flallm):
    model = save("mbart", tmp_path / "whole")
    said = trim(str(model), str(shards), tmp_path / "small")
    assert (tmp_path / "small/model.safetensors").is_file()
    whole, small = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("whole", "small"))
    for split in ("dev", "test"):
        tokens = [token for meta in Shards(shards, split).metas() for token in whole.tokenize(meta["text"])]
        lost = sum(token not in small.get_vocab() for token in tokens) / len(tokens)
        assert f"{split:11} {lost:.2%} of the tokens lost" in said and lost < 0.4
    more = tmp_path / "text.txt"
    more.write_text("\n".join(text for _, text in synthetic.sentences("text", 300)))
    command = ["trim", model, f"--shards={shards}", f"--out={tmp_path / 'more'}", f"--text={more}", "--most=50"]
    done = flallm(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    sizes = [len(AutoTokenizer.from_pretrained(tmp_path / name)) for name in ("whole", "small", "more")]
    assert sizes[1] < sizes[2] <= sizes[0]
    done = flallm(*command[:-1], "--most=no", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert flallm(*command, cwd=tmp_path).stderr == f"flallm: {tmp_path / 'more'} exists already\n"
    done = flallm("trim", model, f"--shards={shards}", f"--out={more}/x", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr == f"flallm: {more} cannot be made: File exists\n"
