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

EXIT_REQUEUE = (
    75  # exit code of a run that was asked to stop and has saved all: start it again (EX_TEMPFAIL)
)


@contextlib.contextmanager
def report_first_failure(ranks: DistContext) -> Iterator[None]:
    """Ranks tell each other why they end, so that each can name the one that ended first: the others only see a connection break
    or run into the time-out. A rank with nothing to say was killed or hangs."""
    try:
        yield
    except Exception as error:
        if ranks.world_size == 1:
            raise
        lost = not isinstance(error, UserError) and (
            "gloo" in str(error)
            or isinstance(error, dist.DistError)
            or "Connection" in type(error).__name__
        )
        mine = "" if lost else f"{type(error).__name__}: {error}"
        words = _exchange_failures(ranks, mine)
        if isinstance(error, UserError) and mine in [
            said for rank, said in words.items() if rank < ranks.rank
        ]:
            raise SystemExit(2) from None  # it is said
        if not lost:
            raise
        causes = [f"rank {rank}: {said}" for rank, said in words.items() if said] or [
            f"no word from rank {rank}: it was killed or hangs"
            for rank in range(ranks.world_size)
            if rank not in words
        ]
        print(
            f"rank {ranks.rank} ends because another did: {'; '.join(causes) or error}",
            file=sys.stderr,
            flush=True,
        )
        raise SystemExit(1) from None


def _exchange_failures(ranks: DistContext, said: str) -> dict[int, str]:
    """{rank: what it said} of those that say something within some seconds."""
    words = {ranks.rank: said}
    with contextlib.suppress(RuntimeError):  # rank 0 keeps them; without it there are none
        store = dist.PrefixStore("last words", dist.distributed_c10d._get_default_store())
        store.set(str(ranks.rank), said)
        for _ in range(25):  # even one who has all waits: the others may not have read yet
            time.sleep(0.2)
            words |= {
                r: store.get(str(r)).decode()
                for r in range(ranks.world_size)
                if r not in words and store.check([str(r)])
            }
    return words


class PreemptionHandler:
    """Whether SIGTERM or SIGUSR1 has asked this process to stop. SIGTERM to all processes ends decoding workers: their clips are decoded again."""

    def __init__(self):
        self.stop = False

    def __enter__(self) -> PreemptionHandler:
        self.before = {
            number: signal.signal(number, self._hear) for number in (signal.SIGTERM, signal.SIGUSR1)
        }
        return self

    def _hear(self, *_) -> None:
        self.stop = True

    def __exit__(self, _, error, __) -> None:
        # A launcher ends all ranks once the first has left with a code other than 0; those a moment behind are to leave with theirs.
        again = isinstance(error, SystemExit) and error.code == EXIT_REQUEUE
        for number, handler in self.before.items():
            signal.signal(number, signal.SIG_IGN if again else handler)
