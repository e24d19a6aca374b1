"""Videos become the frames a model sees: (N, H, W, 3) RGB uint8.

Every 4th frame (the paper's T/4) is squeezed to a square, augmented and cropped.
"""

from __future__ import annotations

from collections.abc import Iterator

import av
import cv2
import numpy as np

from flallm.config import Augment
from flallm.data.color import FrameConverter
from flallm.data.video import open_video, upright, video_stream

# Metadata of a file of which every 4th frame is a reference frame. Then a reader of T/4 frames need
# not decode the others.
NONREF_TAG = ("comment", "flallm: a reference frame in 4")
FRAME_STEP = 4
# Frames up to this many times the size they are squeezed to can be warped straight from their own
# size without visible aliasing.
MAX_DOWNSCALE = 1.5


def positions(num_frames: int, stride: int, max_frames: int) -> np.ndarray:
    """Which frames of a clip are used: every `stride`-th.

    A clip of more than `max_frames` keeps as many as a clip of `max_frames`, evenly spread.
    """
    count, limit = -(-num_frames // stride), -(-max_frames // stride)
    if count <= limit:
        return stride * np.arange(count)
    return stride * np.linspace(0, count - 1, limit).round().astype(int)


def used_frames(num_frames: np.ndarray, stride: int, max_frames: int) -> np.ndarray:
    """The number of `positions` of each clip, (clips,) -> (clips,)."""
    return np.minimum(-(-num_frames // stride), -(-max_frames // stride)).astype(np.int32)


def decode(
    source: bytes | str,
    size: int,
    stride: int,
    max_frames: int,
    num_frames: int,
    squeeze: bool = True,
) -> np.ndarray:
    """The used frames of a video of `num_frames`, squeezed to (N, size, size, 3).

    Without `squeeze`, frames that are not much larger than `size` keep their size. Frames that are
    not used are not converted, and in files with NONREF_TAG most are not even decoded. Raises
    OSError, ValueError or av.FFmpegError for a file that is no such video.
    """
    used = positions(num_frames, stride, max_frames)
    frames, converter, count = None, FrameConverter(), 0
    with open_video(source) as container:
        for position, frame in _frames_at(container, stride):
            if position != used[count]:
                continue
            if frames is None:
                height, width = frame.height, frame.width
                if squeeze or max(height, width) > MAX_DOWNSCALE * size:
                    height, width = size, size
                frames = np.empty((len(used), height, width, 3), np.uint8)
            frames[count] = converter.to_rgb(frame, width, height)
            count += 1
            if count == len(used):
                return frames
    raise ValueError(f"only {count} of {len(used)} frames decode")


def _frames_at(
    container: av.container.InputContainer, stride: int
) -> Iterator[tuple[int, av.VideoFrame]]:
    """(position, frame), where only reference frames are decoded if that is enough for `stride`."""
    stream = video_stream(container)
    has_tag = container.metadata.get(NONREF_TAG[0]) == NONREF_TAG[1]
    if not has_tag or stride % FRAME_STEP or not stream.average_rate:
        yield from enumerate(upright(container.decode(stream)))
        return
    stream.codec_context.skip_frame = "NONREF"
    # Skipped frames cannot be counted, so the position comes from the time. The frames of such a
    # file are evenly spaced.
    first, rate = stream.start_time or 0, stream.time_base * stream.average_rate
    for frame in upright(container.decode(stream)):
        yield -1 if frame.pts is None else round((frame.pts - first) * rate), frame


def centre_crop(frames: np.ndarray, crop: int) -> np.ndarray:
    """(N, S, S, 3) -> (N, crop, crop, 3)"""
    edge = (frames.shape[1] - crop) // 2
    return frames[:, edge : edge + crop, edge : edge + crop]


def random_crop(
    frames: np.ndarray, size: int, augment: Augment, rng: np.random.Generator, out: np.ndarray
) -> None:
    """(N, H, W, 3) -> out (N, crop, crop, 3): one random warp for all frames of a clip.

    Squeezing to size x size, rotation, scale, shift and crop are one interpolation.
    """
    (height, width), crop = frames.shape[1:3], out.shape[1]
    is_drawn = rng.random(3) < augment.probability  # rotation, scale, shift
    angle = is_drawn[0] * rng.uniform(-augment.rotate, augment.rotate)
    scale = 1 + is_drawn[1] * rng.uniform(-augment.scale, augment.scale)
    shift = is_drawn[2] * rng.uniform(-augment.translate, augment.translate, 2) * size / 256
    corner = rng.integers(0, size - crop + 1, 2)
    left, top = corner
    if not is_drawn.any() and height == width == size:
        out[:] = frames[:, top : top + crop, left : left + crop]
        return
    middle = (size - 1) / 2
    matrix = cv2.getRotationMatrix2D((middle, middle), angle, scale)
    matrix[:, 2] += shift - corner
    # Squeezing maps the centres of pixels, which are at half-integer coordinates.
    x, y = size / width, size / height
    matrix = matrix @ np.array([[x, 0, (x - 1) / 2], [0, y, (y - 1) / 2], [0, 0, 1]])
    for frame, cropped in zip(frames, out):
        cv2.warpAffine(
            frame,
            matrix,
            (crop, crop),
            dst=cropped,
            flags=cv2.INTER_LINEAR,
            borderMode=cv2.BORDER_REPLICATE,
        )
