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

MAX_POSITIONS = 1024  # positions of Light-T, and of mBART
PART_OF_CHARACTER = "\N{REPLACEMENT CHARACTER}"  # what tokens of bytes decode to before the last byte of a character is there


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub name, whose decoder leaves spaces as they are."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **hub.options(path))
    except (OSError, ValueError) as error:
        raise hub.cannot_load("tokenizer", path, error) from None
    if len({*tokenizer.get_vocab()} - {*tokenizer.all_special_tokens}) < 2:  # transformers makes an empty one where the files are missing
        raise UserError(f"llm.path: {path} lacks the file of its tokenizer's vocabulary, such as tokenizer.json")
    if tokenizer.is_fast and getattr(tokenizer.backend_tokenizer.decoder, "cleanup", False):  # BERT's: a clean-up inside the tokenizers library
        tokenizer.backend_tokenizer.decoder.cleanup = False
    return tokenizer


class TranslationTokenizer:
    """A Hugging Face tokenizer with what a decoder needs: what it starts from, where it ends, what is padding.

    start: the tokens before a sentence. mBART starts from the code of its language, mBART-50 from </s> and that code, T5 from
    its padding; decoder-only models need no such token, theirs is what Light-T starts from in stage 1.
    before, after: the tokens of `llm.prompt` around the features.
    rows: embeddings of the language model. A tokenizer may have more tokens, as LLaMA's with a [PAD] that was added to it alone.
    """

    def __init__(self, llm: LLM):
        from transformers import AutoConfig

        local = Path(llm.path)
        if (local.is_absolute() or llm.path.startswith(".") or len(local.parts) > 2) and not local.is_dir():
            raise UserError(f"llm.path: {llm.path} is no folder: put a pre-trained model there or name one of the hub")
        self.tokenizer = load_tokenizer(llm.path)
        try:
            self.config = AutoConfig.from_pretrained(llm.path, **hub.options(llm.path))
        except (OSError, ValueError) as error:
            raise hub.cannot_load("config", llm.path, error) from None
        self.rows = getattr(self.config.get_text_config(), "vocab_size", len(self.tokenizer))
        self.end = self.tokenizer.eos_token_id
        if self.end is None:
            raise UserError(f"llm.path: the tokenizer of {llm.path} has no end-of-sentence token (eos_token)")
        # LLaMA and others have no padding token, or one without a row. Any will do: no attention and no loss is computed over padding.
        pad = self.tokenizer.pad_token_id
        self.pad = pad if pad is not None and pad < self.rows else self.end
        self.start = self._start(llm)
        self._check_rows("llm.path", [self.end, *self.start])
        self.longest = min(MAX_POSITIONS, getattr(self.config, "max_position_embeddings", MAX_POSITIONS)) - len(self.start)  # tokens, or features
        before, after = ([] if not part else self.tokenizer(part, add_special_tokens=False)["input_ids"] for part in llm.prompt.split(VIDEO_PLACEHOLDER))
        if not self.config.is_encoder_decoder and self.tokenizer("")["input_ids"] == [self.tokenizer.bos_token_id] != before[:1]:
            before = [self.tokenizer.bos_token_id, *before]  # what LLaMA's tokenizer puts before every text
        self._check_rows("llm.prompt", [*before, *after])
        self.before, self.after = before, after

    def _start(self, llm: LLM) -> list[int]:
        codes = self._languages()
        if llm.language and not codes:
            raise UserError(f"llm.language: {llm.path} has no language codes, so {llm.language!r} is none: leave it out with --llm.language=none")
        if llm.language and llm.language not in codes:
            raise UserError(f"llm.language: {llm.language!r} is no language code of {llm.path}, which has {', '.join(sorted(codes))}")
        if not self.config.is_encoder_decoder:
            return [self.end if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id]
        default = getattr(self.config, "decoder_start_token_id", None)
        if llm.language:
            return [self.end, codes[llm.language]] if default == self.end else [codes[llm.language]]
        if codes and default in (None, self.end):
            raise UserError(f"llm.language: {llm.path} answers after the code of a language: name one of {', '.join(sorted(codes))}")
        if default is None:
            raise UserError(f"llm.path: the config.json of {llm.path} has no decoder_start_token_id, the token that an answer starts from")
        return [default]

    def _languages(self) -> dict[str, int]:
        """The language codes of a multilingual mBART, as de_DE, with their ids: its special tokens that are no marks such as <mask>."""
        if self.config.model_type != "mbart":
            return {}
        ids = zip(self.tokenizer.all_special_tokens, self.tokenizer.all_special_ids)
        return {token: i for token, i in ids if re.fullmatch(r"\w+", token) and i < self.rows}

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
        return f"the token {token!r} has the id {i}, and the language model has {self.rows} embeddings"

    @cached_property
    def _special(self) -> set[int]:
        return {*self.tokenizer.all_special_ids, *self.start, self.pad, *range(self.rows, len(self.tokenizer))}

    def __len__(self) -> int:
        return len(self.tokenizer)

    def encode(self, text: str) -> list[int]:
        """The ids of a text, with the end token, without the start token. Raises ValueError where a model has no places for so many, or no embedding of one."""
        ids = [*self.tokenizer(text, add_special_tokens=False)["input_ids"], self.end]
        if len(ids) > self.longest:
            raise ValueError(f"its text has {len(ids)} tokens, and {self.longest} is what the language model takes")
        if max(ids) >= self.rows:
            raise ValueError(f"its text cannot be read: {self.refusal(max(ids))}")
        return ids

    def words(self, ids: list[int]) -> list[tuple[str, list[int]]]:
        """The words of an encoded text, each with the places of its tokens; where words have no spaces between them, as in Chinese, what a token adds."""
        words, said, first = [], "", 0
        for i in range(len(ids) - 1):  # the last one is the end
            longer = self.decode(ids[: i + 1])
            if longer.endswith(PART_OF_CHARACTER) and i < len(ids) - 2:
                continue
            piece, places, said, first = longer[len(said) :], list(range(first, i + 1)), longer, i + 1
            if words and not piece.startswith(" ") and east_asian_width(piece[:1] or " ") not in "WF":
                words[-1] = (words[-1][0] + piece, [*words[-1][1], *places])
            else:
                words.append((piece.strip(), places))
        return words

    def decode(self, ids) -> str:
        # Not skip_special_tokens: with it the language code can stay glued to the text of mBART's tokenizer.
        # Without the tokenizer's clean-up, which takes spaces before punctuation out of what is scored as raw text, and makes "don't" of "do not".
        return self.tokenizer.decode([i for i in map(int, ids) if i not in self._special], clean_up_tokenization_spaces=False).strip()
