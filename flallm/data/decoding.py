"""The loader's worker side: one clip from its shard to uint8 frames in shared memory. Kept light: no torch, no transformers."""

from __future__ import annotations

import io
import math
import os
import signal
from zlib import crc32

import cv2
import numpy as np

from flallm.data.reader import BadSample, Shards
from flallm.data.transforms import centre_crop, decode, random_crop
from flallm.data.video import DECODE_ERRORS

DTYPES = {"bf16": np.uint16, "fp16": np.float16, "fp32": np.float32}  # of stored features; bf16 as the 16 bits of a number

_shards: Shards
_options: tuple


def start(shards: Shards, options: tuple) -> None:
    """What a process needs for every clip: the split, without its index, and (resize, crop, stride, max_frames, augment, seed)."""
    global _shards, _options
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # Slurm tells all processes of a step what is meant for the trainer
    os.nice(10)  # decoding fills the gaps that training leaves, and does not make ranks wait for each other
    cv2.setNumThreads(1)
    _shards, _options = shards, options


def run(number: int, row: dict[str, int], epoch: int | None, memory: str, first: int, frames: int) -> tuple[str, str, str]:
    """Puts the `frames` used frames of a clip, whose row of the index that is, into a file of shared memory from frame `first` on; returns (key, text, "") or
    (key, "", the cause why not). With an epoch they are augmented."""
    shape, dtype = kind(_shards, _options[1])
    out = np.memmap(memory, dtype, "r+", first * int(np.prod(shape)) * dtype.itemsize, (frames, *shape))
    return load(_shards, _options, number, row, epoch, out)


def kind(shards: Shards, crop: int) -> tuple[tuple[int, ...], np.dtype]:
    """(shape, type) of what a used frame becomes: an image, or features."""
    if not shards.features:
        return (crop, crop, 3), np.dtype(np.uint8)
    return (shards.features["channels"],), np.dtype(DTYPES[shards.features["dtype"]])


def features(content: bytes, shape: tuple[int, int], dtype: np.dtype, copies: int) -> np.ndarray:
    """A clip's stored features (1 or 1 + copies, N, C). Raises `BadSample` for anything but a .npy file of just these: nothing of it is interpreted."""
    for count in (1, 1 + copies):
        file = io.BytesIO()
        np.lib.format.write_array_header_1_0(file, {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": (count, *shape)})
        head = file.getvalue()
        if content.startswith(head) and len(content) == len(head) + count * math.prod(shape) * np.dtype(dtype).itemsize:
            return np.frombuffer(content, dtype, offset=len(head)).reshape(count, *shape)
    raise BadSample(f"is no array of {shape[0]} features of {shape[1]} channels in {np.dtype(dtype)}")


def load(shards: Shards, options: tuple, number: int, row: dict[str, int], epoch: int | None, out: np.ndarray) -> tuple[str, str, str]:
    """As `run`, into an array."""
    resize, crop, stride, max_frames, augment, seed = options
    key = f"{shards.split} sample {number}"
    try:
        source, meta = shards.read(number, row)
        key = meta["key"]
        if shards.features:
            copies = shards.features["copies"]
            stored = features(source, out.shape, out.dtype, copies)
            out[:] = stored[0 if epoch is None or not copies else 1 + epoch % copies]
            return key, meta["text"], ""
        frames = decode(source, resize, stride, max_frames, meta["num_frames"], squeeze=epoch is None)
        if len(frames) != len(out):
            raise BadSample(f"has {len(frames)} frames to use, {len(out)} by the index")
    except (BadSample, *DECODE_ERRORS) as error:
        return key, "", str(error) or type(error).__name__
    if epoch is None:
        out[:] = centre_crop(frames, crop)
    else:  # one draw a clip, the same whichever rank or worker has it
        random_crop(frames, resize, augment, np.random.default_rng([seed, epoch, crc32(key.encode())]), out)
    return key, meta["text"], ""
