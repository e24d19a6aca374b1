"""Batches that reach the GPU while the step before them is computed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from flallm.data.dataset import Batch


def prefetch_to_device(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """The batches, each sent to the GPU while the step before it is computed.

    A thread and a stream of its own do that, because a copy from memory that is not pinned blocks
    the thread that asks for it.
    """
    with contextlib.closing(batches):
        if device.type == "cpu":
            yield from batches
            return
        stream = torch.cuda.Stream(device)

        def send_next() -> Batch | None:
            batch = next(batches, None)
            if batch is None:
                return None
            with torch.cuda.stream(stream):
                batch = batch.to(device)
            stream.synchronize()
            return batch

        with ThreadPoolExecutor(1) as sender:
            pending = sender.submit(send_next)
            while (batch := pending.result()) is not None:
                pending = sender.submit(send_next)
                for tensor in (batch.frames, batch.labels):
                    tensor.record_stream(torch.cuda.current_stream())
                yield batch
