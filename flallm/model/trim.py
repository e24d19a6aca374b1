"""A pre-trained model without the words that a data set does not need: most of a multilingual model is its vocabulary.

What is kept: special tokens and language codes, bytes, every token of the training text, and on request the most frequent ones of another
text, so that words of validation do not turn into `<unk>`. Kept tokens stay in their order and keep their embeddings, so
the model gives them the same logits. Text made of kept tokens is split as before: Unigram finds the best of fewer splits, of which the best
of all is one, and of BPE all merges are kept that lead to a kept token, with their parts. The result is an ordinary Hugging Face folder.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from flallm.config import LLM
from flallm.data.reader import Shards, splits_of
from flallm.data.tables import read_text
from flallm.data.tokenizer import load_tokenizer
from flallm.model.llm import load_llm
from flallm.utils import UserError, ensure_dir

SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id", "sep_token_id")


def trim(path: str, shards: str, out: Path, text: Path | None = None, most: int = 0) -> str:
    """Writes the trimmed model of a folder or hub name to `out` and returns what there is to say. most: tokens of the file `text` to keep besides."""
    if out.exists():
        raise UserError(f"{out} exists already")
    model = load_llm(LLM(path=path))
    tokenizer = load_tokenizer(path)
    if not tokenizer.is_fast:
        raise UserError(f"the tokenizer of {path} is not one of the tokenizers library")
    counts = {split: _count(tokenizer, _texts(Shards(shards, split))) for split in ("train", *sorted({*splits_of(shards)} - {"train"}))}
    frequent = _count(tokenizer, read_text(text, "a sentence a line was expected there").splitlines()) if text else Counter()
    before, parameters, used = model.get_input_embeddings().num_embeddings, model.num_parameters(), counts.pop("train")
    if max(used, default=0) >= before:
        token = tokenizer.convert_ids_to_tokens(max(used))
        raise UserError(f"{shards}: the training text has the token {token!r} with the id {max(used)}, and {path} has {before} embeddings")
    ensure_dir(out.parent)
    small_ids, small = trim_tokenizer(tokenizer, {*used, *(i for i, _ in frequent.most_common(most) if i < before)})
    kept = {old: new for old, new in small_ids.items() if old < before}  # a tokenizer may have a [PAD] that the model has no embedding for
    trim_model(model, kept)
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    for saved in (model, small):
        saved.save_pretrained(part)
    part.replace(out)
    said = [f"vocabulary  {before:,} -> {len(kept):,} tokens", f"parameters  {parameters / 1e6:.1f} M -> {model.num_parameters() / 1e6:.1f} M"]
    for split, count in counts.items():
        lost = sum(n for i, n in count.items() if i not in kept)
        said.append(f"{split:11} {lost / max(1, count.total()):.2%} of the tokens lost")
    return "\n".join([*said, f"written to {out}"])


def _texts(shards: Shards) -> Iterable[str]:
    return (meta["text"] for meta in shards.metas() if meta)


def _count(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> Counter:
    return Counter(i for text in texts for i in tokenizer(text, add_special_tokens=False)["input_ids"])


def trim_tokenizer(tokenizer: PreTrainedTokenizerBase, used: set[int]) -> tuple[dict[int, int], PreTrainedTokenizerFast]:
    """({id as it was: id as it is}, the tokenizer of these tokens)."""
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab = data["model"]["vocab"]  # Unigram: [[piece, score]], by id; otherwise {piece: id}
    ids = {piece: i for i, (piece, _) in enumerate(vocab)} if isinstance(vocab, list) else vocab
    names = {i: piece for piece, i in ids.items()}
    alphabet = (
        {*ByteLevel.alphabet(), *(f"<0x{byte:02X}>" for byte in range(256))} if data["model"]["type"] == "BPE" or data["model"].get("byte_fallback") else set()
    )
    always = {*tokenizer.all_special_ids, *(t["id"] for t in data["added_tokens"]), *(ids[piece] for piece in alphabet & ids.keys())}
    unknown = data["model"].get("unk_id", ids.get(data["model"].get("unk_token")))
    kept = used | always | _named_ids(data["post_processor"]) | ({unknown} if unknown is not None else set())
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in data["model"].get("merges", [])]
    parts: dict[str, list[str]] = {}
    for a, b in merges:
        parts.setdefault(a + b, []).extend((a, b))
    todo = [names[i] for i in kept if i in names]
    while todo:  # what a kept token is merged from
        for part in parts.pop(todo.pop(), []):
            if ids[part] not in kept:
                kept.add(ids[part])
                todo.append(part)
            elif part in parts:
                todo.append(part)
    new = {old: i for i, old in enumerate(sorted(kept))}
    if isinstance(vocab, list):
        data["model"]["vocab"] = [entry for i, entry in enumerate(vocab) if i in new]
        data["model"]["unk_id"] = new.get(unknown)
    else:
        data["model"]["vocab"] = {piece: new[i] for piece, i in vocab.items() if i in new}
    if merges:
        data["model"]["merges"] = [[a, b] for a, b in merges if all(ids.get(x) in new for x in (a, b, a + b))]
    for token in data["added_tokens"]:
        token["id"] = new[token["id"]]
    _renumber(data["post_processor"], new)
    data["padding"] = None  # it has the id of the padding token as it was; whoever pads states it
    special = {name: value for name, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    extra = [token for token in tokenizer.all_special_tokens if token not in special.values()]
    small = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(data)), **special, extra_special_tokens=extra)
    if small.get_vocab() != {token: new[i] for token, i in tokenizer.get_vocab().items() if i in new}:
        raise UserError(f"the tokenizer of {tokenizer.name_or_path} cannot be trimmed: its tokens would not keep their order")
    return new, small


def _named_ids(processor: dict | None) -> set[int]:
    """The ids of the tokens that a post-processor of a tokenizer.json puts around a text."""
    processor = processor or {}
    ids = {i for token in processor.get("special_tokens", {}).values() for i in token["ids"]}  # TemplateProcessing
    ids |= {processor[end][1] for end in ("sep", "cls") if end in processor}  # BERT's and RoBERTa's
    return ids.union(*map(_named_ids, processor.get("processors", [])))


def _renumber(processor: dict | None, new: dict[int, int]) -> None:
    """Puts the new ids into a post-processor of a tokenizer.json."""
    for token in (processor or {}).get("special_tokens", {}).values():  # TemplateProcessing
        token["ids"] = [new[i] for i in token["ids"]]
    for end in ("sep", "cls"):  # BERT's and RoBERTa's
        if end in (processor or {}):
            processor[end][1] = new[processor[end][1]]
    for one in (processor or {}).get("processors", []):
        _renumber(one, new)


def trim_model(model: torch.nn.Module, kept: dict[int, int]) -> None:
    """Leaves the model these tokens; `trimmed_from` in its config is how many there were."""
    if hasattr(model.config, "vocab_size_per_layer_input"):
        raise UserError(f"a {model.config.model_type} model has embeddings of its tokens in every layer and cannot be trimmed")
    rows, before = torch.tensor(list(kept)), model.get_input_embeddings().num_embeddings
    # Not by resize_token_embeddings, which ties what the config says is tied, as T5's always does.
    tables = {id(w): nn.Parameter(w.detach()[rows]) for w in (model.get_input_embeddings().weight, model.get_output_embeddings().weight)}
    for module in model.modules():
        if id(getattr(module, "weight", None)) in tables:
            module.weight = tables[id(module.weight)]
            if getattr(module, "bias", None) is not None:
                module.bias = nn.Parameter(module.bias.detach()[rows])
            setattr(module, "num_embeddings" if isinstance(module, nn.Embedding) else "out_features", len(rows))
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias = model.final_logits_bias[:, rows]
    model.config.vocab_size = len(rows)
    for config in (model.config, model.generation_config):
        for name in SPECIAL_IDS:
            value = getattr(config, name, None)
            if value is not None:
                setattr(config, name, [kept[i] for i in value if i in kept] if isinstance(value, list) else kept.get(value))
    model.config.trimmed_from = before
