"""Worker processes for code that may crash or hang, as codecs do: that costs one task, not the run."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable
from concurrent.futures import TimeoutError, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import count

from pebble import CONSTS, ProcessExpired, ProcessFuture, ProcessPool

MAX_TIMEOUTS, MAX_CRASHES = 2, 3  # after so many a task is given up: what stalled or killed it from outside spares the next try
MAX_RESTARTS = 9  # pools in a row that die before they have done anything; then it is not the tasks that are at fault
CONSTS.channel_lock_timeout = 10  # seconds, of 60: a worker killed with the lock in hand stops the others for twice as long


class TaskFailed(Exception):
    """A task that hung or lost its worker again and again; the message is the cause."""


class WorkerPool:
    """A context: `processes` of them, born of a small process that has imported `module` and knows neither models nor threads."""

    def __init__(self, processes: int, module: str, initializer: Callable | None = None, initargs: tuple = ()):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([module])
        self._new_pool = lambda: ProcessPool(processes, initializer=_begin, initargs=(initializer, initargs), context=context)
        self._pool, self._broken = self._new_pool(), 0

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_) -> None:
        self._pool.stop()  # without waiting for what nobody wants any more
        self._pool.join()

    def start(self, function: Callable, *args, timeout: float) -> Callable:
        """Begins a task of at most `timeout` seconds. What comes back waits for its result, or raises `Lost`."""
        begun = self._schedule(function, args, timeout)

        def result():
            pool, future = begun
            for attempt in count(1):
                try:
                    value = _wait(pool, future)
                    self._broken = 0
                    return value
                except TimeoutError:
                    cause, enough = f"not done after {timeout} s", MAX_TIMEOUTS
                except ProcessExpired as death:
                    cause, enough = f"its worker process died (exit code {death.exitcode})", MAX_CRASHES
                except BrokenProcessPool:
                    cause, enough = "its worker process died", MAX_CRASHES
                if attempt == enough:
                    raise TaskFailed(cause)
                pool, future = self._schedule(function, args, timeout)

        return result

    def _schedule(self, function: Callable, args: tuple, timeout: float) -> tuple[ProcessPool, ProcessFuture]:
        if not self._pool.active:  # a worker that dies while all are idle takes the pool with it
            self._broken += 1
            if self._broken == MAX_RESTARTS:
                raise RuntimeError("worker processes die as soon as they are started")
            self.__exit__()
            self._pool = self._new_pool()
        return self._pool, self._pool.schedule(_run, args=(function, args, timeout), timeout=timeout)


def _wait(pool: ProcessPool, future: ProcessFuture):
    while not wait([future], timeout=1).done:
        if not pool.active:  # it does not always tell those who wait
            raise BrokenProcessPool
    return future.result()


def _begin(initializer: Callable | None, initargs: tuple) -> None:
    """What every process begins with; here, so that it has imported this module and what is set above."""
    if initializer:
        initializer(*initargs)


def _run(function: Callable, args: tuple, timeout: float):
    signal.alarm(int(timeout) + 5)  # ends this process even inside a codec, should there be nobody left to do it
    try:
        return function(*args)
    finally:
        signal.alarm(0)
