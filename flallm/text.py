"""Text <-> token ids, with the tokenizer of the stage-2 language model (Light-T reads the same)."""

from __future__ import annotations

import re
from functools import cached_property, lru_cache
from pathlib import Path
from unicodedata import east_asian_width

from flallm import UserError, first_line
from flallm.config import LLM, PLACE

# Codes of languages as tokenizers have them: de_DE (mBART), deu_Latn (NLLB), __de__ (M2M-100).
LANGUAGE_CODE = re.compile(r"[a-z]{2,3}_[A-Z]{2}|[a-z]{3}_[A-Z][a-z]{3}|__[a-z]{2,3}__")
REACH_TIMEOUT = 5  # seconds to wait for the hub
PLACES = 1024  # positions of Light-T, and of mBART


@lru_cache
def hub_options(path: str) -> dict:
    """Arguments of `from_pretrained` for a folder or a name of the hub.

    Where the hub cannot be reached, a name is looked up in the local cache alone. Else every file would be asked for
    again and again, on every rank. Raises UserError for a name that is not in the cache then.
    """
    if Path(path).is_dir() or _reaches_hub(path):
        return {}
    from huggingface_hub import constants, try_to_load_from_cache

    if not isinstance(try_to_load_from_cache(path, "config.json"), str):
        raise UserError(
            f"llm.path: {path} cannot be fetched, because {constants.ENDPOINT} is not reached from this machine, and {constants.HF_HUB_CACHE} does not "
            f"hold it: run `hf download {path}` or `flallm trim {path} --shards=DIR --out=DIR` on one that has the network"
        )
    return {"local_files_only": True}


def _reaches_hub(path: str) -> bool:
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(f"{constants.ENDPOINT}/{path}/resolve/main/config.json", timeout=REACH_TIMEOUT)
    except Exception:  # each version has other classes for proxies, names and time-outs
        return False
    return True


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
            options = hub_options(llm.path)
            self.tokenizer = AutoTokenizer.from_pretrained(llm.path, trust_remote_code=False, **options)
            self.config = AutoConfig.from_pretrained(llm.path, trust_remote_code=False, **options)
        except (OSError, ValueError) as error:
            raise UserError(f"llm.path: no tokenizer and config can be loaded from {llm.path}: {first_line(error)}") from None
        self.end = self.tokenizer.eos_token_id
        if self.end is None:
            raise UserError(f"llm.path: the tokenizer of {llm.path} has no end-of-sentence token (eos_token)")
        # Rows of the language model's word embeddings: fewer than tokens where some were added and the model not resized.
        self.rows = self.config.get_text_config().vocab_size
        if self.end >= self.rows:
            raise UserError(f"llm.path: {llm.path} has no embedding for the end-of-sentence token of its tokenizer: {self._name(self.end)}")
        # LLaMA and others have no padding token, or one without an embedding. Any will do: no attention and no loss is
        # computed over padding.
        pad = self.tokenizer.pad_token_id
        self.pad = self.end if pad is None or pad >= self.rows else pad
        self.start = self._start(llm)
        self.longest = min(PLACES, getattr(self.config, "max_position_embeddings", PLACES)) - len(self.start)  # tokens, or features
        before, after = ([] if not part else self.tokenizer(part, add_special_tokens=False)["input_ids"] for part in llm.prompt.split(PLACE))
        if not self.config.is_encoder_decoder and self.tokenizer("")["input_ids"] == [self.tokenizer.bos_token_id] != before[:1]:
            before = [self.tokenizer.bos_token_id, *before]  # what LLaMA's tokenizer puts before every text
        if without_row := self.without_row([*before, *after, *self.start]):
            raise UserError(f"llm.prompt: {llm.path} has no embedding for {', '.join(without_row)}: write the prompt without it")
        self.before, self.after = before, after

    def _name(self, token: int) -> str:
        return f"{self.tokenizer.convert_ids_to_tokens(token)!r} (number {token} of {self.rows} embeddings)"

    def without_row(self, ids: list[int]) -> list[str]:
        """The tokens among these that the language model has no embedding for."""
        return [self._name(i) for i in dict.fromkeys(ids) if i >= self.rows]

    def languages(self) -> list[str]:
        """The language codes that the tokenizer has."""
        known = {*self.tokenizer.all_special_tokens, *self.tokenizer.get_added_vocab()}
        return sorted(token for token in known if LANGUAGE_CODE.fullmatch(token))

    def _start(self, llm: LLM) -> list[int]:
        begin = self.end if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id
        default = self.config.decoder_start_token_id if self.config.is_encoder_decoder else begin
        if llm.language:
            if llm.language not in (languages := self.languages()):
                choices = f"it has {', '.join(languages)}" if languages else "it has no languages, so leave it empty"
                raise UserError(f"llm.language: {llm.language!r} is no language of the tokenizer of {llm.path}: {choices}")
            code = self.tokenizer.convert_tokens_to_ids(llm.language)
            return [self.end, code] if default == self.end else [code]
        if default is None:
            raise UserError(f"llm.language: {llm.path} states no decoder_start_token_id, so the target language must be named")
        return [default]

    @cached_property
    def _special(self) -> set[int]:
        return {*self.tokenizer.all_special_ids, *self.start, self.pad}

    @cached_property
    def _size(self) -> int:
        return max(len(self.tokenizer), 1 + max(self.tokenizer.get_vocab().values()))

    def __len__(self) -> int:
        """One more than the largest token id."""
        return self._size

    def encode(self, text: str) -> list[int]:
        """The ids of a text, with the end token, without the start token. Raises ValueError where a model has no places for so many."""
        ids = [*self.tokenizer(text, add_special_tokens=False)["input_ids"], self.end]
        if len(ids) > self.longest:
            raise ValueError(f"its text has {len(ids)} tokens, and {self.longest} is what the language model takes")
        if without_row := self.without_row(ids):
            raise ValueError(f"its text has a token that the language model has no embedding for: {without_row[0]}")
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
        ids = [i for i in map(int, ids) if i not in self._special]
        # Some tokenizers tidy up spaces before punctuation, which would get into raw scores.
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False).strip()
