"""Clips at another frame rate."""

from __future__ import annotations

from collections.abc import Iterator

import av

ROUNDING = 1e-3  # seconds: Matroska states times in milliseconds


class Resampler:
    """Brings one clip to `fps`.

    Frame k of the result is on screen k / fps seconds after the first frame of the clip. The last
    frame of the clip is shown as long as the one before it, a second at most.
    """

    def __init__(self, fps: float):
        self.fps = fps
        self.count = 0  # frames of the result so far
        self.first: float | None = None  # seconds
        # (seconds, frame), held until the next frame tells how long it is shown.
        self.held: tuple[float, av.VideoFrame] | None = None
        self.last_step = 0.0  # seconds between the last two frames

    def add(self, seconds: float, frame: av.VideoFrame) -> Iterator[av.VideoFrame]:
        """Takes the clip's next frame and gives the frames of the result that come before it."""
        if self.held is None:
            self.first = seconds
        else:
            self.last_step = seconds - self.held[0]
            yield from self._until(seconds - ROUNDING)
        self.held = (seconds, frame)

    def finish(self) -> Iterator[av.VideoFrame]:
        """Gives the rest of the result.

        What would be shown for less than a tenth of a frame's time is a rounding error.
        """
        if self.held is not None:
            shown = min(self.last_step, 1.0) or 1 / self.fps
            yield from self._until(self.held[0] + shown - 0.1 / self.fps)

    def _until(self, end: float) -> Iterator[av.VideoFrame]:
        while self.first + self.count / self.fps < end:
            self.count += 1
            yield self.held[1]


def resample(frames: Iterator[tuple[float, av.VideoFrame]], fps: float) -> Iterator[av.VideoFrame]:
    """The frames of a clip, (seconds, frame), brought to `fps`."""
    resampler = Resampler(fps)
    for seconds, frame in frames:
        yield from resampler.add(seconds, frame)
    yield from resampler.finish()
