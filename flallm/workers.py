"""Worker processes for code that may crash or hang, as codecs do: that costs one task, not the run."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import TimeoutError

from pebble import ProcessExpired, ProcessPool


class Lost(Exception):
    """A task that hung, or crashed its worker twice; the message is the cause."""


class Workers:
    """A context: `processes` of them, born of a small process that has imported `module` and knows neither models nor threads."""

    def __init__(self, processes: int, module: str, initializer: Callable | None = None, initargs: tuple = ()):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([module])
        self._pool = ProcessPool(processes, initializer=initializer, initargs=initargs, context=context)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_) -> None:
        self._pool.stop()  # without waiting for what nobody wants any more
        self._pool.join()

    def start(self, function: Callable, *args, timeout: float) -> Callable:
        """Begins a task of at most `timeout` seconds. What comes back waits for its result, or raises `Lost`."""
        future = self._pool.schedule(function, args=args, timeout=timeout)

        def result():
            try:
                try:
                    return future.result()
                except ProcessExpired:  # by this task, or by something that killed it: then the second try goes through
                    return self._pool.schedule(function, args=args, timeout=timeout).result()
            except TimeoutError:
                raise Lost(f"not done after {timeout} s") from None
            except ProcessExpired as death:
                raise Lost(f"its worker process died (exit code {death.exitcode})") from None

        return result
