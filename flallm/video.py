"""Video bytes -> the uint8 frames a model sees, (N, H, W, 3) RGB: every 4th frame, squared, augmented, cropped."""

from __future__ import annotations

import io
from dataclasses import dataclass

import av
import cv2
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter


@dataclass
class Augment:
    """What is drawn once a clip in training. Sources: paper.md's [I], GFSLT-VLP; never a horizontal flip (hands have sides)."""

    probability: float = 0.5  # of each of the three
    rotate: float = 30  # degrees, either way
    scale: float = 0.2  # share, either way
    translate: float = 10  # pixels of a 256-pixel frame, either way


def positions(num_frames: int, stride: int, max_frames: int) -> np.ndarray:
    """Which frames of a clip are used: every `stride`-th; of a clip over `max_frames`, as many as that leaves, evenly spread."""
    kept = np.arange(0, num_frames, stride)
    limit = -(-max_frames // stride)
    return kept if len(kept) <= limit else kept[np.linspace(0, len(kept) - 1, limit).round().astype(int)]


def decode(source: bytes | str, size: int, stride: int, max_frames: int, num_frames: int | None = None) -> np.ndarray:
    """The used frames of a video, squeezed to (N, size, size, 3). With `num_frames` known, frames that no other frame
    and nobody else needs are not even decoded. Raises ValueError or av.FFmpegError for what is no video."""
    if num_frames is not None:
        frames = _decode_reference_frames(source, size, positions(num_frames, stride, max_frames))
        if frames is not None:
            return frames
    kept, scaler = [], VideoReformatter()
    with _open(source) as container:
        for i, frame in enumerate(container.decode(video=0)):
            if i % stride == 0:
                kept.append(_to_array(frame, size, scaler))
    if not kept:
        raise ValueError("holds no frame")
    return np.stack(kept)[positions(stride * len(kept), stride, max_frames) // stride]


def _open(source: bytes | str):
    container = av.open(io.BytesIO(source) if isinstance(source, bytes) else source)
    if not container.streams.video:
        container.close()
        raise ValueError("holds no video stream")
    container.streams.video[0].thread_count = 1  # one decoder thread a worker: there are as many workers as cores
    return container


def _decode_reference_frames(source: bytes | str, size: int, wanted: np.ndarray) -> np.ndarray | None:
    """The wanted frames if all of them are reference frames (`shards.py` encodes so), else None."""
    frames, scaler = np.empty((len(wanted), size, size, 3), np.uint8), VideoReformatter()  # one scaler: it keeps its tables
    found = 0
    with _open(source) as container:
        stream = container.streams.video[0]
        if stream.average_rate is None:
            return None
        stream.codec_context.skip_frame = "NONREF"
        for frame in container.decode(stream):
            i = round((frame.pts - (stream.start_time or 0)) * frame.time_base * stream.average_rate) if frame.pts is not None else -1
            if found < len(wanted) and i == wanted[found]:
                frames[found] = _to_array(frame, size, scaler)
                found += 1
    return frames if found == len(wanted) else None


def _to_array(frame: av.VideoFrame, size: int, scaler: VideoReformatter) -> np.ndarray:
    return scaler.reformat(frame, size, size, "rgb24", interpolation=Interpolation.BILINEAR).to_ndarray()


def centre_crop(frames: np.ndarray, crop: int) -> np.ndarray:
    """(N, S, S, 3) -> (N, crop, crop, 3)"""
    a = (frames.shape[1] - crop) // 2
    return frames[:, a : a + crop, a : a + crop]


def random_crop(frames: np.ndarray, crop: int, augment: Augment, rng: np.random.Generator) -> np.ndarray:
    """(N, S, S, 3) -> (N, crop, crop, 3): rotation, scale, shift and crop, one draw for the whole clip."""
    size = frames.shape[1]
    draw = rng.random(3) < augment.probability
    angle = draw[0] * rng.uniform(-augment.rotate, augment.rotate)
    scale = 1 + draw[1] * rng.uniform(-augment.scale, augment.scale)
    shift = draw[2] * rng.uniform(-augment.translate, augment.translate, 2) * size / 256
    corner = rng.integers(0, size - crop + 1, 2)
    if not draw.any():
        return frames[:, corner[1] : corner[1] + crop, corner[0] : corner[0] + crop]
    middle = (size - 1) / 2
    matrix = cv2.getRotationMatrix2D((middle, middle), angle, scale)
    matrix[:, 2] += shift - corner
    return np.stack([cv2.warpAffine(f, matrix, (crop, crop), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE) for f in frames])
