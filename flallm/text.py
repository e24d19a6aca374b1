"""Text <-> token ids, with the tokenizer of the stage-2 language model (Light-T reads the same)."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from flallm import UserError
from flallm.config import LLM


class Text:
    """A Hugging Face tokenizer with what a decoder needs: where it starts, where it ends, what is padding."""

    def __init__(self, llm: LLM):
        from transformers import AutoConfig, AutoTokenizer

        local = Path(llm.path)
        if (local.is_absolute() or llm.path.startswith(".") or len(local.parts) > 2) and not local.is_dir():
            raise UserError(f"llm.path: {llm.path} is no folder: put a pre-trained model there or name one of the hub")
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(llm.path)
            self.config = AutoConfig.from_pretrained(llm.path)
        except (OSError, ValueError) as error:
            raise UserError(f"llm.path: no tokenizer and config can be loaded from {llm.path}: {str(error).splitlines()[0]}") from None
        self.pad, self.end = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        self.start = self.config.decoder_start_token_id
        if llm.language:
            self.start = self.tokenizer.convert_tokens_to_ids(llm.language)
            if self.start == self.tokenizer.unk_token_id:
                raise UserError(f"llm.language: the tokenizer of {llm.path} has no language {llm.language!r}")
        if self.start is None:
            raise UserError(f"llm.language: {llm.path} states no decoder_start_token_id, so the target language must be named")

    @cached_property
    def _special(self) -> set[int]:
        return {*self.tokenizer.all_special_ids, self.start}

    def __len__(self) -> int:
        return len(self.tokenizer)

    def encode(self, text: str) -> list[int]:
        """The ids of a text, with the end token, without the start token."""
        return [*self.tokenizer(text, add_special_tokens=False)["input_ids"], self.end]

    def decode(self, ids) -> str:
        # Not skip_special_tokens: with it the language code can stay glued to the text of mBART's tokenizer.
        return self.tokenizer.decode([i for i in map(int, ids) if i not in self._special]).strip()
