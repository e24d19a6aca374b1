"""The reference of `flallm.video.decode`: every frame is decoded, and those that are used are picked."""

import numpy as np
from av.video.reformatter import VideoReformatter

from flallm.video import open_video, positions, to_array, upright


def every_frame(source: bytes | str, size: int, stride: int, max_frames: int) -> np.ndarray:
    scaler = VideoReformatter()
    with open_video(source) as container:
        kept = [to_array(frame, size, size, scaler) for i, frame in enumerate(upright(container.decode(video=0))) if i % stride == 0]
    return np.stack(kept)[positions(stride * len(kept), stride, max_frames) // stride]
