"""Batches that reach the GPU while the step before them is computed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from flallm.data.dataset import Batch


def prefetch_to_device(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """The batches, each sent to the GPU while the step before it is computed: by a thread of its own, for a copy out of memory that is
    not pinned holds up who asks for it, and on a stream of its own."""
    with contextlib.closing(batches):
        if device.type == "cpu":
            yield from batches
            return
        stream = torch.cuda.Stream(device)

        def send() -> Batch | None:
            if batch := next(batches, None):
                with torch.cuda.stream(stream):
                    batch = batch.to(device)
                stream.synchronize()
            return batch

        with ThreadPoolExecutor(1) as sender:
            coming = sender.submit(send)
            while batch := coming.result():
                coming = sender.submit(send)
                for tensor in (batch.frames, batch.labels):
                    tensor.record_stream(torch.cuda.current_stream())
                yield batch
