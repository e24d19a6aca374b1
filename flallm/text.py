"""Text <-> token ids, with the tokenizer of the stage-2 language model (Light-T reads the same)."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from unicodedata import east_asian_width

from flallm import UserError, first_line
from flallm.config import LLM, PLACE

PLACES = 1024  # positions of Light-T, and of mBART


class Text:
    """A Hugging Face tokenizer with what a decoder needs: what it starts from, where it ends, what is padding.

    start: the tokens before a sentence. mBART starts from the code of its language, mBART-50 from </s> and that code, T5 from
    its padding; decoder-only models need no such token, theirs is what Light-T starts from in stage 1.
    before, after: the tokens of `llm.prompt` around the features.
    """

    def __init__(self, llm: LLM):
        from transformers import AutoConfig, AutoTokenizer

        local = Path(llm.path)
        if (local.is_absolute() or llm.path.startswith(".") or len(local.parts) > 2) and not local.is_dir():
            raise UserError(f"llm.path: {llm.path} is no folder: put a pre-trained model there or name one of the hub")
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(llm.path, trust_remote_code=False)
            self.config = AutoConfig.from_pretrained(llm.path, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise UserError(f"llm.path: no tokenizer and config can be loaded from {llm.path}: {first_line(error)}") from None
        self.end = self.tokenizer.eos_token_id
        if self.end is None:
            raise UserError(f"llm.path: the tokenizer of {llm.path} has no end-of-sentence token (eos_token)")
        # LLaMA and others have no padding token. Any will do: no attention and no loss is computed over padding.
        self.pad = self.end if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id
        self.start = self._start(llm)
        self.longest = min(PLACES, getattr(self.config, "max_position_embeddings", PLACES)) - len(self.start)  # tokens, or features
        before, after = ([] if not part else self.tokenizer(part, add_special_tokens=False)["input_ids"] for part in llm.prompt.split(PLACE))
        if not self.config.is_encoder_decoder and self.tokenizer("")["input_ids"] == [self.tokenizer.bos_token_id] != before[:1]:
            before = [self.tokenizer.bos_token_id, *before]  # what LLaMA's tokenizer puts before every text
        self.before, self.after = before, after

    def _start(self, llm: LLM) -> list[int]:
        begin = self.end if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id
        default = self.config.decoder_start_token_id if self.config.is_encoder_decoder else begin
        if llm.language:
            code = self.tokenizer.convert_tokens_to_ids(llm.language)
            if code in (None, self.tokenizer.unk_token_id):
                raise UserError(f"llm.language: the tokenizer of {llm.path} has no language {llm.language!r}")
            return [self.end, code] if default == self.end else [code]
        if default is None:
            raise UserError(f"llm.language: {llm.path} states no decoder_start_token_id, so the target language must be named")
        return [default]

    @cached_property
    def _special(self) -> set[int]:
        return {*self.tokenizer.all_special_ids, *self.start, self.pad}

    def __len__(self) -> int:
        return len(self.tokenizer)

    def encode(self, text: str) -> list[int]:
        """The ids of a text, with the end token, without the start token. Raises ValueError where a model has no places for so many."""
        ids = [*self.tokenizer(text, add_special_tokens=False)["input_ids"], self.end]
        if len(ids) > self.longest:
            raise ValueError(f"its text has {len(ids)} tokens, and {self.longest} is what the language model takes")
        return ids

    def words(self, ids: list[int]) -> list[tuple[str, list[int]]]:
        """The words of an encoded text, each with the places of its tokens; where words have no spaces between them, as in Chinese, what a token adds."""
        words, said = [], ""
        for i in range(len(ids) - 1):  # the last one is the end
            longer = self.decode(ids[: i + 1])
            piece, said = longer[len(said) :], longer
            if words and not piece.startswith(" ") and east_asian_width(piece[:1] or " ") not in "WF":
                words[-1] = (words[-1][0] + piece, [*words[-1][1], i])
            else:
                words.append((piece.strip(), [i]))
        return words

    def decode(self, ids) -> str:
        # Not skip_special_tokens: with it the language code can stay glued to the text of mBART's tokenizer.
        return self.tokenizer.decode([i for i in map(int, ids) if i not in self._special]).strip()
