"""Video bytes -> the uint8 frames a model sees, (N, H, W, 3) RGB: every 4th frame, squared, augmented, cropped."""

from __future__ import annotations

import cv2
import numpy as np

from flallm.config import Augment
from flallm.data.color import FrameConverter
from flallm.data.video import open_video, upright, video_stream

# In the metadata of a file: every 4th of its frames is a reference frame, so the others need not be decoded for T/4.
NONREF_TAG = ("comment", "flallm: a reference frame in 4")
FRAME_STEP = 4
MAX_DOWNSCALE = 1.5  # times the size they are squeezed to, frames can still be warped straight from theirs without aliasing that shows


def positions(num_frames: int, stride: int, max_frames: int) -> np.ndarray:
    """Which frames of a clip are used: every `stride`-th; of a clip over `max_frames`, as many as that leaves, evenly spread."""
    kept, limit = -(-num_frames // stride), -(-max_frames // stride)
    return stride * (np.arange(kept) if kept <= limit else np.linspace(0, kept - 1, limit).round().astype(int))


def used_frames(num_frames: np.ndarray, stride: int, max_frames: int) -> np.ndarray:
    """How many `positions` clips of so many frames have."""
    return np.minimum(-(-num_frames // stride), -(-max_frames // stride)).astype(np.int32)


def decode(source: bytes | str, size: int, stride: int, max_frames: int, num_frames: int, squeeze: bool = True) -> np.ndarray:
    """The used frames of a video of `num_frames`, squeezed to (N, size, size, 3); without `squeeze` as they are if they are not much larger. No other frame is
    looked at, and those that nothing depends on are not even decoded. Raises OSError, ValueError or av.FFmpegError for what is no such video."""
    wanted, frames, converter, found = positions(num_frames, stride, max_frames), None, FrameConverter(), 0
    with open_video(source) as container:
        stream = video_stream(container)
        # Frames that are skipped do not count, so then the position comes from the time; all frames of such a file are evenly spaced.
        skip = container.metadata.get(NONREF_TAG[0]) == NONREF_TAG[1] and stride % FRAME_STEP == 0 and stream.average_rate
        if skip:
            stream.codec_context.skip_frame = "NONREF"
            first, rate = stream.start_time or 0, stream.time_base * stream.average_rate
        for i, frame in enumerate(upright(container.decode(stream))):
            if skip:
                i = round((frame.pts - first) * rate) if frame.pts is not None else -1
            if i == wanted[found]:
                if frames is None:
                    width, height = (size, size) if squeeze or max(frame.width, frame.height) > MAX_DOWNSCALE * size else (frame.width, frame.height)
                    frames = np.empty((len(wanted), height, width, 3), np.uint8)
                frames[found] = converter.to_rgb(frame, width, height)
                found += 1
                if found == len(wanted):
                    return frames
    raise ValueError(f"only {found} of {len(wanted)} frames decode")


def centre_crop(frames: np.ndarray, crop: int) -> np.ndarray:
    """(N, S, S, 3) -> (N, crop, crop, 3)"""
    a = (frames.shape[1] - crop) // 2
    return frames[:, a : a + crop, a : a + crop]


def random_crop(frames: np.ndarray, size: int, augment: Augment, rng: np.random.Generator, out: np.ndarray) -> None:
    """(N, H, W, 3) -> out (N, crop, crop, 3): squeezing to size x size, rotation, scale, shift and crop in one step, one draw for the
    whole clip."""
    (height, width), crop = frames.shape[1:3], out.shape[1]
    draw = rng.random(3) < augment.probability
    angle = draw[0] * rng.uniform(-augment.rotate, augment.rotate)
    scale = 1 + draw[1] * rng.uniform(-augment.scale, augment.scale)
    shift = draw[2] * rng.uniform(-augment.translate, augment.translate, 2) * size / 256
    corner = rng.integers(0, size - crop + 1, 2)
    if not draw.any() and height == width == size:
        out[:] = frames[:, corner[1] : corner[1] + crop, corner[0] : corner[0] + crop]
        return
    middle = (size - 1) / 2
    matrix = cv2.getRotationMatrix2D((middle, middle), angle, scale)
    matrix[:, 2] += shift - corner
    x, y = size / width, size / height
    matrix = matrix @ np.array([[x, 0, (x - 1) / 2], [0, y, (y - 1) / 2], [0, 0, 1]])  # from the centres of the stored pixels
    for frame, to in zip(frames, out):
        cv2.warpAffine(frame, matrix, (crop, crop), dst=to, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
