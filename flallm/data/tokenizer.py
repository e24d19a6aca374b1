"""Text <-> token ids, with the tokenizer of the stage-2 language model (Light-T reads the same)."""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING
from unicodedata import east_asian_width

from flallm.config import LLM, VIDEO_PLACEHOLDER
from flallm.data import hub
from flallm.utils import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_POSITIONS = 1024  # of Light-T, and of mBART
# What tokens of bytes decode to until the last byte of a character comes.
PART_OF_CHARACTER = "\N{REPLACEMENT CHARACTER}"


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub name, whose decoder leaves spaces as they are."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **hub.options(path))
    except (OSError, ValueError) as error:
        raise hub.cannot_load("tokenizer", path, error) from None
    # Where the files are missing, transformers makes an empty tokenizer.
    if len({*tokenizer.get_vocab()} - {*tokenizer.all_special_tokens}) < 2:
        raise UserError(
            f"llm.path: {path} lacks the file of its tokenizer's vocabulary, such as tokenizer.json"
        )
    # BERT's decoder cleans up inside the tokenizers library.
    decoder = tokenizer.backend_tokenizer.decoder if tokenizer.is_fast else None
    if getattr(decoder, "cleanup", False):
        decoder.cleanup = False
    return tokenizer


class TranslationTokenizer:
    """A Hugging Face tokenizer with what a decoder needs.

    start: ids before a sentence. mBART starts from the code of its language, mBART-50 from </s> and
        that code, T5 from its padding. Decoder-only models need none; Light-T starts from theirs in
        stage 1.
    end, pad: ids of the end of a sentence and of padding.
    before, after: ids of `llm.prompt` around the features.
    longest: the most tokens, or features, that the language model takes.
    rows: embeddings of the language model. A tokenizer may have more tokens, such as LLaMA's with a
        [PAD] that was added to it alone.
    """

    def __init__(self, llm: LLM):
        from transformers import AutoConfig

        local = Path(llm.path)
        names_folder = local.is_absolute() or llm.path.startswith(".") or len(local.parts) > 2
        if names_folder and not local.is_dir():
            raise UserError(
                f"llm.path: {llm.path} is no folder: put a pre-trained model there or name one of "
                "the hub"
            )
        self.tokenizer = load_tokenizer(llm.path)
        try:
            self.config = AutoConfig.from_pretrained(llm.path, **hub.options(llm.path))
        except (OSError, ValueError) as error:
            raise hub.cannot_load("config", llm.path, error) from None
        self.rows = getattr(self.config.get_text_config(), "vocab_size", len(self.tokenizer))
        self.end = self.tokenizer.eos_token_id
        if self.end is None:
            raise UserError(
                f"llm.path: the tokenizer of {llm.path} has no end-of-sentence token (eos_token)"
            )
        # LLaMA and others have no padding token, or one without a row. Any id will do, because
        # neither attention nor the loss reads padding.
        pad = self.tokenizer.pad_token_id
        self.pad = pad if pad is not None and pad < self.rows else self.end
        self.start = self._start(llm)
        self._check_rows("llm.path", [self.end, *self.start])
        max_positions = getattr(self.config, "max_position_embeddings", MAX_POSITIONS)
        self.longest = min(MAX_POSITIONS, max_positions) - len(self.start)
        self.before, self.after = self._prompt(llm.prompt)
        self._check_rows("llm.prompt", [*self.before, *self.after])

    def _start(self, llm: LLM) -> list[int]:
        codes = self._language_codes()
        names = ", ".join(sorted(codes))
        if llm.language and not codes:
            raise UserError(
                f"llm.language: {llm.path} has no language codes, so {llm.language!r} is none: "
                "leave it out with --llm.language=none"
            )
        if llm.language and llm.language not in codes:
            raise UserError(
                f"llm.language: {llm.language!r} is no language code of {llm.path}, which has "
                f"{names}"
            )
        if not self.config.is_encoder_decoder:
            bos = self.tokenizer.bos_token_id
            return [self.end if bos is None else bos]
        default = getattr(self.config, "decoder_start_token_id", None)
        if llm.language:
            code = codes[llm.language]
            return [self.end, code] if default == self.end else [code]
        if codes and default in (None, self.end):
            raise UserError(
                f"llm.language: {llm.path} answers after the code of a language: name one of "
                f"{names}"
            )
        if default is None:
            raise UserError(
                f"llm.path: the config.json of {llm.path} has no decoder_start_token_id, the token "
                "that an answer starts from"
            )
        return [default]

    def _language_codes(self) -> dict[str, int]:
        """The ids of the language codes of a multilingual mBART, such as de_DE."""
        if self.config.model_type != "mbart":
            return {}
        codes = {}
        for token, i in zip(self.tokenizer.all_special_tokens, self.tokenizer.all_special_ids):
            is_code = re.fullmatch(r"\w+", token)  # and no mark such as <mask>
            if is_code and i < self.rows:
                codes[token] = i
        return codes

    def _prompt(self, prompt: str) -> tuple[list[int], list[int]]:
        """The ids before and after the features."""
        before, after = [], []
        text_before, text_after = prompt.split(VIDEO_PLACEHOLDER)
        if text_before:
            before = self.tokenizer(text_before, add_special_tokens=False)["input_ids"]
        if text_after:
            after = self.tokenizer(text_after, add_special_tokens=False)["input_ids"]
        bos = [self.tokenizer.bos_token_id]
        if self.config.is_encoder_decoder or before[:1] == bos:
            return before, after
        puts_bos = self.tokenizer("")["input_ids"] == bos  # before every text, as LLaMA's does
        return [*bos, *before] if puts_bos else before, after

    @cached_property
    def without_row(self) -> list[str]:
        """The tokens that the language model has no embedding for."""
        return self.tokenizer.convert_ids_to_tokens(range(self.rows, len(self.tokenizer)))

    def _check_rows(self, field: str, ids: list[int]) -> None:
        for i in ids:
            if i >= self.rows:
                raise UserError(f"{field}: {self.refusal(i)}")

    def refusal(self, i: int) -> str:
        """Why a token that has no embedding is refused."""
        token = self.tokenizer.convert_ids_to_tokens(i)
        return (
            f"the token {token!r} has the id {i}, and the language model has {self.rows} embeddings"
        )

    @cached_property
    def _special_ids(self) -> set[int]:
        without_row = range(self.rows, len(self.tokenizer))
        return {*self.tokenizer.all_special_ids, *self.start, self.pad, *without_row}

    def __len__(self) -> int:
        return len(self.tokenizer)

    def encode(self, text: str) -> list[int]:
        """The ids of a text, with the end token, without the start tokens.

        Raises ValueError where the language model takes fewer tokens or has no embedding of one.
        """
        ids = [*self.tokenizer(text, add_special_tokens=False)["input_ids"], self.end]
        if len(ids) > self.longest:
            raise ValueError(
                f"its text has {len(ids)} tokens, and {self.longest} is what the language model "
                "takes"
            )
        if max(ids) >= self.rows:
            raise ValueError(f"its text cannot be read: {self.refusal(max(ids))}")
        return ids

    def words(self, ids: list[int]) -> list[tuple[str, list[int]]]:
        """(word, positions of its tokens) for each word of an encoded text.

        In a script without spaces, such as Chinese, a word is what one token adds.
        """
        words: list[tuple[str, list[int]]] = []
        decoded, first = "", 0  # the text so far, and the first token after it
        last = len(ids) - 2  # before the end token
        for i in range(last + 1):
            longer = self.decode(ids[: i + 1])
            if longer.endswith(PART_OF_CHARACTER) and i < last:
                continue
            piece, positions = longer[len(decoded) :], list(range(first, i + 1))
            decoded, first = longer, i + 1
            is_wide = east_asian_width(piece[:1] or " ") in "WF"
            if words and not piece.startswith(" ") and not is_wide:
                word, earlier = words[-1]
                words[-1] = (word + piece, earlier + positions)
            else:
                words.append((piece.strip(), positions))
        return words

    def decode(self, ids) -> str:
        """The text of ids, without special tokens."""
        # skip_special_tokens leaves the language code glued to the text of mBART's tokenizer.
        # The tokenizer's clean-up removes spaces before punctuation and makes "don't" of "do not",
        # but scores need the raw text.
        ids = [i for i in map(int, ids) if i not in self._special_ids]
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False).strip()
