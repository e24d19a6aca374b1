"""What several commands share: their ranks, and shards that have moved."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from flallm.utils import UserError


@contextmanager
def group_of_ranks(timeout: float = 600) -> Iterator:
    """The ranks for the work of one command. timeout: seconds that they wait for each other."""
    from flallm.distributed.context import init_distributed, shutdown
    from flallm.distributed.failures import report_first_failure

    try:
        ranks = init_distributed(timeout)
        with report_first_failure(ranks):
            yield ranks
    finally:
        shutdown()


@contextmanager
def shards_option(shards: str) -> Iterator[None]:
    """The work of a command on a run whose shards may lie elsewhere now.

    Raises UserError, which names the option, where they are not found.
    """
    from flallm.data.reader import NoShards, splits_of

    try:
        if shards:
            splits_of(shards)  # some commands would go on without
        yield
    except NoShards as error:
        raise UserError(f"{error}, or name the folder where they lie now: --shards=DIR") from None
