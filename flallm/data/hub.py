"""Loads pre-trained models from the hub, or from its cache where there is no network."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from flallm.utils import UserError, first_line


@cache
def reachable() -> bool:
    """Whether the hub answers one request.

    If not, this process stays in huggingface_hub's offline mode. Otherwise huggingface_hub would
    retry every file for 45 s and print every try.
    """
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception:  # the type depends on the HTTP library of this version of huggingface_hub
        constants.HF_HUB_OFFLINE = (
            True  # transformers does not pass local_files_only on to every request
        )
        return False
    return True


def options(path: str) -> dict[str, bool]:
    """Arguments of from_pretrained for a folder or hub name.

    They run no remote code and ask no hub that does not answer.
    """
    return {"trust_remote_code": False, "local_files_only": Path(path).is_dir() or not reachable()}


def check_weights(path: str) -> None:
    """Raises UserError where neither the folder nor the hub or its cache has the weights."""
    from huggingface_hub import try_to_load_from_cache
    from transformers.utils import (
        SAFE_WEIGHTS_INDEX_NAME,
        SAFE_WEIGHTS_NAME,
        WEIGHTS_INDEX_NAME,
        WEIGHTS_NAME,
    )

    names = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
    if Path(path).is_dir():
        present = any((Path(path) / name).is_file() for name in names)
    else:
        present = reachable() or any(
            isinstance(try_to_load_from_cache(path, name), str) for name in names
        )
    if not present:
        raise cannot_load("weights", path, FileNotFoundError(f"it has none of {', '.join(names)}"))


def cannot_load(what: str, path: str, error: Exception) -> UserError:
    """The error of a tokenizer, config or model that does not load, with what to do about it."""
    if Path(path).is_dir() or reachable():
        return UserError(f"llm.path: no {what} can be loaded from {path}: {first_line(error)}")
    from huggingface_hub import constants

    return UserError(
        f"llm.path: {path} is no folder here, its {what} cannot be found in the hub's cache "
        f"{constants.HF_HUB_CACHE}, and {constants.ENDPOINT} cannot be reached. Run "
        f"`hf download {path}` on a machine with a network and the same HF_HOME, or "
        f"`flallm trim {path} --shards=DIR --out=DIR` there and set --llm.path=DIR"
    )
