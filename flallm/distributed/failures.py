"""How ranks end: signals that ask them to stop, and which rank failed first."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Iterator

import torch.distributed as dist

from flallm.distributed.context import DistContext
from flallm.utils import UserError

# Exit code of a run that has saved a checkpoint because it was asked to stop (EX_TEMPFAIL).
EXIT_REQUEUE = 75
EXCHANGE_SECONDS = 5  # how long ranks wait for each other's reasons


@contextlib.contextmanager
def report_first_failure(ranks: DistContext) -> Iterator[None]:
    """A context in which ranks tell each other why they end, so that each can name the first.

    The other ranks only see a connection break or run into the time-out. A rank that gives no
    reason was killed or hangs.
    """
    try:
        yield
    except Exception as error:
        if ranks.world_size == 1:
            raise
        lost_connection = _is_lost_connection(error)
        own_reason = "" if lost_connection else f"{type(error).__name__}: {error}"
        reasons = _exchange_reasons(ranks, own_reason)
        if isinstance(error, UserError):
            lower_ranks = [reasons[rank] for rank in reasons if rank < ranks.rank]
            if own_reason in lower_ranks:  # a lower rank prints it
                raise SystemExit(2) from None
        if not lost_connection:
            raise
        causes = "; ".join(_causes(reasons, ranks.world_size)) or error
        line = f"rank {ranks.rank} ends because another did: {causes}"
        print(line, file=sys.stderr, flush=True)
        raise SystemExit(1) from None


def _is_lost_connection(error: Exception) -> bool:
    """Whether the error says no more than that another rank is gone."""
    if isinstance(error, UserError):
        return False
    is_connection = "gloo" in str(error) or "Connection" in type(error).__name__
    return is_connection or isinstance(error, dist.DistError)


def _exchange_reasons(ranks: DistContext, own_reason: str) -> dict[int, str]:
    """{rank: why it ends} of the ranks that say so within `EXCHANGE_SECONDS`."""
    reasons = {ranks.rank: own_reason}
    with contextlib.suppress(RuntimeError):  # rank 0 has the store; without it there are no reasons
        store = dist.PrefixStore("last words", dist.distributed_c10d._get_default_store())
        store.set(str(ranks.rank), own_reason)
        # A rank that has all reasons waits too, because the others may not have read yet.
        for _ in range(5 * EXCHANGE_SECONDS):
            time.sleep(0.2)
            for rank in range(ranks.world_size):
                if rank not in reasons and store.check([str(rank)]):
                    reasons[rank] = store.get(str(rank)).decode()
    return reasons


def _causes(reasons: dict[int, str], world_size: int) -> list[str]:
    """What ended first: the reasons that ranks gave, else the ranks that gave none."""
    given = [f"rank {rank}: {reason}" for rank, reason in reasons.items() if reason]
    if given:
        return given
    silent = [rank for rank in range(world_size) if rank not in reasons]
    return [f"no word from rank {rank}: it was killed or hangs" for rank in silent]


class PreemptionHandler:
    """A context in which SIGTERM or SIGUSR1 asks this process to stop: `stop` becomes true.

    A SIGTERM to all processes also ends decoding workers; their clips are decoded again.
    """

    def __init__(self):
        self.stop = False

    def __enter__(self) -> PreemptionHandler:
        self.handlers_before = {}
        for number in (signal.SIGTERM, signal.SIGUSR1):
            self.handlers_before[number] = signal.signal(number, self._request_stop)
        return self

    def _request_stop(self, *_) -> None:
        self.stop = True

    def __exit__(self, _, error, __) -> None:
        # A launcher ends all ranks once the first has left with a code other than 0. Ranks that are
        # a moment behind must leave with their own code.
        is_requeue = isinstance(error, SystemExit) and error.code == EXIT_REQUEUE
        for number, handler in self.handlers_before.items():
            signal.signal(number, signal.SIG_IGN if is_requeue else handler)
