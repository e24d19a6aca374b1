"""The loader's side of a worker: reads one clip of a shard into shared memory.

Workers import this module, so it imports neither torch nor transformers.
"""

from __future__ import annotations

import io
import math
import os
import signal
from typing import NamedTuple
from zlib import crc32

import cv2
import numpy as np

from flallm.config import Augment
from flallm.data.reader import BadSample, Shards
from flallm.data.transforms import centre_crop, decode, random_crop
from flallm.data.video import DECODE_ERRORS

# Number types of stored features. NumPy has no bf16: its 16 bits are read as uint16.
DTYPES = {"bf16": np.uint16, "fp16": np.float16, "fp32": np.float32}


class DecodeOptions(NamedTuple):
    """How clips become frames: the fields of `Data`, and the seed of augmentation."""

    resize: int
    crop: int
    stride: int
    max_frames: int
    augment: Augment
    seed: int


class LoadedClip(NamedTuple):
    """Key and text of a clip that is read. `cause` is "" or says why it cannot be read."""

    key: str
    text: str
    cause: str


_shards: Shards
_options: DecodeOptions


def init_worker(shards: Shards, options: DecodeOptions) -> None:
    """Prepares a worker process. shards: the split, without its index."""
    global _shards, _options
    # Slurm sends the trainer's signal to all processes of a step.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    os.nice(10)  # decoding uses the gaps of training and does not make ranks wait for each other
    cv2.setNumThreads(1)
    _shards, _options = shards, options


def load_shared(
    number: int, row: dict[str, int], epoch: int | None, memory: str, first: int, frames: int
) -> LoadedClip:
    """`load` into shared memory, in a worker process.

    memory: path of the file of shared memory. first: where the clip begins in it, in frames.
    frames: used frames of the clip.
    """
    shape, dtype = frame_format(_shards, _options.crop)
    offset = first * int(np.prod(shape)) * dtype.itemsize
    out = np.memmap(memory, dtype, "r+", offset, (frames, *shape))
    return load(_shards, _options, number, row, epoch, out)


def frame_format(shards: Shards, crop: int) -> tuple[tuple[int, ...], np.dtype]:
    """(shape, number type) of one used frame: an RGB image, or its features."""
    if not shards.features:
        return (crop, crop, 3), np.dtype(np.uint8)
    return (shards.features["channels"],), np.dtype(DTYPES[shards.features["dtype"]])


def features(content: bytes, shape: tuple[int, int], dtype: np.dtype, copies: int) -> np.ndarray:
    """The stored features of a clip, (1 or 1 + copies, N, C). shape: (N, C).

    Raises BadSample for anything but a .npy file of just this array. The header is compared as a
    whole and never interpreted.
    """
    dtype = np.dtype(dtype)
    for count in (1, 1 + copies):
        array = {"descr": dtype.str, "fortran_order": False, "shape": (count, *shape)}
        file = io.BytesIO()
        np.lib.format.write_array_header_1_0(file, array)
        header = file.getvalue()
        size = len(header) + count * math.prod(shape) * dtype.itemsize
        if content.startswith(header) and len(content) == size:
            return np.frombuffer(content, dtype, offset=len(header)).reshape(count, *shape)
    raise BadSample(f"is no array of {shape[0]} features of {shape[1]} channels in {dtype}")


def load(
    shards: Shards,
    options: DecodeOptions,
    number: int,
    row: dict[str, int],
    epoch: int | None,
    out: np.ndarray,
) -> LoadedClip:
    """Reads a clip into `out`, (used frames, ...).

    number: the clip's number in the split. row: its row of the index. epoch: the seed of its
    augmentation, or None for a centre crop.
    """
    key = f"{shards.split} sample {number}"
    try:
        source, meta = shards.read(number, row)
        key = meta["key"]
        if shards.features:
            copies = shards.features["copies"]
            stored = features(source, out.shape, out.dtype, copies)
            is_augmented = epoch is not None and copies > 0
            out[:] = stored[1 + epoch % copies if is_augmented else 0]
            return LoadedClip(key, meta["text"], "")
        frames = decode(
            source,
            options.resize,
            options.stride,
            options.max_frames,
            meta["num_frames"],
            squeeze=epoch is None,
        )
        if len(frames) != len(out):
            raise BadSample(f"has {len(frames)} frames to use, {len(out)} by the index")
    except (BadSample, *DECODE_ERRORS) as error:
        return LoadedClip(key, "", str(error) or type(error).__name__)
    if epoch is None:
        out[:] = centre_crop(frames, options.crop)
    else:  # the draw depends on seed, epoch and key only, so it is the same on any rank and worker
        rng = np.random.default_rng([options.seed, epoch, crc32(key.encode())])
        random_crop(frames, options.resize, options.augment, rng, out)
    return LoadedClip(key, meta["text"], "")
