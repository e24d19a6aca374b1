"""Worker processes for code that may crash or hang, such as codecs: a task is lost, not the run."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable
from concurrent.futures import TimeoutError, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import count

from pebble import CONSTS, ProcessExpired, ProcessFuture, ProcessPool

# A task fails after so many tries. What stalls or kills a worker from outside spares the next try.
MAX_TIMEOUTS, MAX_CRASHES = 2, 3
# Pools that die in a row before any task is done. Then the fault is not in the tasks.
MAX_RESTARTS = 9
# Seconds; pebble's default is 60. A worker killed while it holds the channel's lock stops the
# others for twice this time.
CONSTS.channel_lock_timeout = 10


class TaskFailed(Exception):
    """A task that timed out or lost its worker too often. The message is the cause."""


class WorkerPool:
    """A context manager of worker processes.

    Workers are forked from a small server process that has imported `module` and holds no model
    and no thread. Each begins with initializer(*initargs).
    """

    def __init__(
        self,
        processes: int,
        module: str,
        initializer: Callable | None = None,
        initargs: tuple = (),
    ):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([module])
        self._new_pool = lambda: ProcessPool(
            processes,
            initializer=_init_worker,
            initargs=(initializer, initargs),
            context=context,
        )
        self._pool = self._new_pool()
        self._restarts = 0  # since the last task that was done

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_) -> None:
        self._pool.stop()  # does not wait for tasks that are under way
        self._pool.join()

    def submit(self, function: Callable, *args, timeout: float) -> Callable:
        """Begins function(*args), with `timeout` seconds for each try.

        Returns a function that waits for the result and returns it, or raises TaskFailed.
        """
        first_try = self._schedule(function, args, timeout)

        def result():
            pool, future = first_try
            for attempt in count(1):
                try:
                    value = _wait(pool, future)
                    self._restarts = 0
                    return value
                except TimeoutError:
                    cause, limit = f"not done after {timeout} s", MAX_TIMEOUTS
                except ProcessExpired as death:
                    cause = f"its worker process died (exit code {death.exitcode})"
                    limit = MAX_CRASHES
                except BrokenProcessPool:
                    cause, limit = "its worker process died", MAX_CRASHES
                if attempt == limit:
                    raise TaskFailed(cause)
                pool, future = self._schedule(function, args, timeout)

        return result

    def _schedule(
        self, function: Callable, args: tuple, timeout: float
    ) -> tuple[ProcessPool, ProcessFuture]:
        if not self._pool.active:  # an idle worker that dies takes the pool with it
            self._restarts += 1
            if self._restarts == MAX_RESTARTS:
                raise RuntimeError("worker processes die as soon as they are started")
            self.__exit__()
            self._pool = self._new_pool()
        future = self._pool.schedule(_run, args=(function, args, timeout), timeout=timeout)
        return self._pool, future


def _wait(pool: ProcessPool, future: ProcessFuture):
    """The result of a task. Raises BrokenProcessPool when its pool dies."""
    while not wait([future], timeout=1).done:
        if not pool.active:  # a dead pool does not always end its futures
            raise BrokenProcessPool
    return future.result()


def _init_worker(initializer: Callable | None, initargs: tuple) -> None:
    """Begins a worker. Unpickling this function imports this module, which sets CONSTS."""
    if initializer:
        initializer(*initargs)


def _run(function: Callable, args: tuple, timeout: float):
    # The alarm ends this process even inside a codec, and even when the trainer is dead.
    signal.alarm(int(timeout) + 5)
    try:
        return function(*args)
    finally:
        signal.alarm(0)
