"""Trims a pre-trained model's vocabulary to a data set: it is most of a multilingual model.

Kept are special tokens and language codes, bytes, every token of the training text, and on request
the most frequent tokens of another text, so that fewer words of validation become `<unk>`. Kept
tokens stay in their order and keep their embeddings: the model gives them the same logits. Text of
kept tokens is split as before. Unigram finds the best of fewer splits, and the best of all is one
of them. BPE keeps all merges that lead to a kept token, with their parts. The result is an
ordinary Hugging Face folder.
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
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from flallm.config import LLM
from flallm.data.reader import Shards, splits_of
from flallm.data.tables import read_text
from flallm.data.tokenizer import load_tokenizer
from flallm.model.llm import load_llm
from flallm.utils import UserError, ensure_dir

SPECIAL_IDS = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "decoder_start_token_id",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "sep_token_id",
)


def trim(path: str, shards: str, out: Path, text: Path | None = None, most: int = 0) -> str:
    """Writes the trimmed model of a folder or hub name to `out`; returns a summary.

    text: a file with a sentence a line; most: how many of its most frequent tokens are kept, too.
    """
    if out.exists():
        raise UserError(f"{out} exists already")
    model = load_llm(LLM(path=path))
    tokenizer = load_tokenizer(path)
    if not tokenizer.is_fast:
        raise UserError(f"the tokenizer of {path} is not one of the tokenizers library")
    counts = _count_splits(tokenizer, shards)
    used = set(counts.pop("train"))
    vocabulary, parameters = model.get_input_embeddings().num_embeddings, model.num_parameters()
    if max(used, default=0) >= vocabulary:
        largest = max(used)
        token = f"the token {tokenizer.convert_ids_to_tokens(largest)!r} with the id {largest}"
        rows = f"{path} has {vocabulary} embeddings"
        raise UserError(f"{shards}: the training text has {token}, and {rows}")
    if text:
        lines = read_text(text, "a sentence a line was expected there").splitlines()
        frequent = _count(tokenizer, lines).most_common(most)
        used |= {token_id for token_id, _ in frequent if token_id < vocabulary}
    ensure_dir(out.parent)
    new_ids, small = trim_tokenizer(tokenizer, used)
    # A tokenizer may have a [PAD] that the model has no embedding for.
    kept = {old: new for old, new in new_ids.items() if old < vocabulary}
    trim_model(model, kept)
    _save(model, small, out)
    size, small_size = parameters / 1e6, model.num_parameters() / 1e6
    summary = [
        f"vocabulary  {vocabulary:,} -> {len(kept):,} tokens",
        f"parameters  {size:.1f} M -> {small_size:.1f} M",
    ]
    for split, count in counts.items():
        lost = sum(number for token_id, number in count.items() if token_id not in kept)
        summary.append(f"{split:11} {lost / max(1, count.total()):.2%} of the tokens lost")
    return "\n".join([*summary, f"written to {out}"])


def _count_splits(tokenizer: PreTrainedTokenizerBase, shards: str) -> dict[str, Counter]:
    """By split, first train, how often each token id occurs in the texts of the shards."""
    counts = {}
    for split in ("train", *sorted({*splits_of(shards)} - {"train"})):
        texts = (meta["text"] for meta in Shards(shards, split).metas() if meta)
        counts[split] = _count(tokenizer, texts)
    return counts


def _count(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> Counter:
    counts = Counter()
    for text in texts:
        counts.update(tokenizer(text, add_special_tokens=False)["input_ids"])
    return counts


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Writes both into a folder that appears at once, complete."""
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    part.replace(out)


def trim_tokenizer(
    tokenizer: PreTrainedTokenizerBase, used: set[int]
) -> tuple[dict[int, int], PreTrainedTokenizerFast]:
    """({old id: new id} of the kept tokens, the tokenizer of these tokens).

    used: the ids to keep, besides those that every text needs.
    """
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    ids = _vocabulary(data["model"])
    merges = []
    for merge in data["model"].get("merges", []):
        merges.append(tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge))
    kept = used | _required_ids(tokenizer, data, ids)
    _add_parts(kept, ids, merges)
    new_ids = {old: new for new, old in enumerate(sorted(kept))}
    _renumber_model(data["model"], ids, merges, new_ids)
    for token in data["added_tokens"]:
        token["id"] = new_ids[token["id"]]
    _renumber_processor(data["post_processor"], new_ids)
    data["padding"] = None  # it has the old id of the padding token; callers set their own
    special = {}
    for name, value in tokenizer.special_tokens_map.items():
        if isinstance(value, str):
            special[name] = value
    small = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(data)),
        **special,
        extra_special_tokens=[t for t in tokenizer.all_special_tokens if t not in special.values()],
    )
    old_vocab = tokenizer.get_vocab().items()
    if small.get_vocab() != {token: new_ids[i] for token, i in old_vocab if i in new_ids}:
        problem = "cannot be trimmed: its tokens would not keep their order"
        raise UserError(f"the tokenizer of {tokenizer.name_or_path} {problem}")
    return new_ids, small


def _vocabulary(model: dict) -> dict[str, int]:
    """{piece: id} of the model of a tokenizer.json; a Unigram lists (piece, score) by id."""
    vocab = model["vocab"]
    if isinstance(vocab, list):
        return {piece: token_id for token_id, (piece, _) in enumerate(vocab)}
    return vocab


def _required_ids(tokenizer: PreTrainedTokenizerBase, data: dict, ids: dict[str, int]) -> set[int]:
    """Special and added tokens, the unknown token, bytes, and those of the post-processor.

    data: the content of a tokenizer.json; ids: its vocabulary.
    """
    model = data["model"]
    required = {*tokenizer.all_special_ids, *(token["id"] for token in data["added_tokens"])}
    required |= _processor_ids(data["post_processor"])
    unknown = _unknown_id(model, ids)
    if unknown is not None:
        required.add(unknown)
    if model["type"] == "BPE" or model.get("byte_fallback"):
        alphabet = {*ByteLevel.alphabet(), *(f"<0x{byte:02X}>" for byte in range(256))}
        required |= {ids[piece] for piece in alphabet & ids.keys()}
    return required


def _unknown_id(model: dict, ids: dict[str, int]) -> int | None:
    return model.get("unk_id", ids.get(model.get("unk_token")))


def _add_parts(kept: set[int], ids: dict[str, int], merges: list[tuple[str, str]]) -> None:
    """Adds the pieces that BPE merges into kept ones, and their parts in turn."""
    parts: dict[str, list[str]] = {}
    for left, right in merges:
        parts.setdefault(left + right, []).extend((left, right))
    pieces = [piece for piece, token_id in ids.items() if token_id in kept]
    while pieces:
        for part in parts.pop(pieces.pop(), []):
            kept.add(ids[part])
            pieces.append(part)


def _renumber_model(
    model: dict, ids: dict[str, int], merges: list[tuple[str, str]], new_ids: dict[int, int]
) -> None:
    """Leaves the model of a tokenizer.json the kept tokens, under their new ids."""
    if isinstance(model["vocab"], list):
        unknown = _unknown_id(model, ids)
        model["vocab"] = [entry for i, entry in enumerate(model["vocab"]) if i in new_ids]
        model["unk_id"] = new_ids.get(unknown)
    else:
        model["vocab"] = {piece: new_ids[i] for piece, i in ids.items() if i in new_ids}
    if merges:
        model["merges"] = []
        for left, right in merges:
            if all(ids.get(piece) in new_ids for piece in (left, right, left + right)):
                model["merges"].append([left, right])


def _processor_ids(processor: dict | None) -> set[int]:
    """The ids of the tokens that a post-processor of a tokenizer.json puts around a text."""
    ids: set[int] = set()
    if processor is None:
        return ids
    for token in processor.get("special_tokens", {}).values():  # TemplateProcessing
        ids.update(token["ids"])
    for end in ("sep", "cls"):  # BERT's and RoBERTa's
        if end in processor:
            ids.add(processor[end][1])
    for inner in processor.get("processors", []):
        ids |= _processor_ids(inner)
    return ids


def _renumber_processor(processor: dict | None, new_ids: dict[int, int]) -> None:
    """Puts the new ids into a post-processor of a tokenizer.json."""
    if processor is None:
        return
    for token in processor.get("special_tokens", {}).values():
        token["ids"] = [new_ids[old] for old in token["ids"]]
    for end in ("sep", "cls"):
        if end in processor:
            processor[end][1] = new_ids[processor[end][1]]
    for inner in processor.get("processors", []):
        _renumber_processor(inner, new_ids)


def trim_model(model: PreTrainedModel, kept: dict[int, int]) -> None:
    """Leaves the model the kept tokens, {old id: new id}.

    `trimmed_from` in its config is how many tokens it had.
    """
    if hasattr(model.config, "vocab_size_per_layer_input"):
        kind = f"a {model.config.model_type} model has embeddings of its tokens in every layer"
        raise UserError(f"{kind} and cannot be trimmed")
    rows, vocabulary = torch.tensor(list(kept)), model.get_input_embeddings().num_embeddings
    # resize_token_embeddings would tie what the config says is tied, as T5's always does.
    tables = {}
    for table in (model.get_input_embeddings(), model.get_output_embeddings()):
        tables[id(table.weight)] = nn.Parameter(table.weight.detach()[rows])
    for module in model.modules():
        if id(getattr(module, "weight", None)) not in tables:
            continue
        module.weight = tables[id(module.weight)]
        if getattr(module, "bias", None) is not None:
            module.bias = nn.Parameter(module.bias.detach()[rows])
        size = "num_embeddings" if isinstance(module, nn.Embedding) else "out_features"
        setattr(module, size, len(rows))
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias = model.final_logits_bias[:, rows]
    model.config.vocab_size = len(rows)
    for config in (model.config, model.generation_config):
        for name in SPECIAL_IDS:
            value = getattr(config, name, None)
            if isinstance(value, list):
                setattr(config, name, [kept[old] for old in value if old in kept])
            elif value is not None:
                setattr(config, name, kept.get(value))
    model.config.trimmed_from = vocabulary
