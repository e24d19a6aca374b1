"""The reference of `flallm.data.transforms.decode`: every frame is decoded, and those that are used are picked."""

import numpy as np

from flallm.data.color import FrameConverter
from flallm.data.transforms import positions
from flallm.data.video import open_video, upright, video_stream


def every_frame(source: bytes | str, size: int, stride: int, max_frames: int) -> np.ndarray:
    converter = FrameConverter()
    with open_video(source) as container:
        frames = upright(container.decode(video_stream(container)))
        kept = [
            converter.to_rgb(frame, size, size) for i, frame in enumerate(frames) if i % stride == 0
        ]
    return np.stack(kept)[positions(stride * len(kept), stride, max_frames) // stride]
