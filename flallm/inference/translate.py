"""`flallm translate`: sentences of video files, of segments of one, or of stretches of a long one, with how sure the model is."""

from __future__ import annotations

import csv
import json
import math
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import av
import numpy as np
import torch

from flallm.config import Config
from flallm.data.color import FrameConverter
from flallm.data.dataset import Batch
from flallm.data.resample import Resampler
from flallm.data.transforms import centre_crop, positions
from flallm.data.video import DECODE_ERRORS, TIME_EPS, VideoFile, check_clock, open_video, upright, video_stream, with_seconds
from flallm.distributed.context import precision
from flallm.model.translator import Translator
from flallm.utils import UserError

LONGEST = 2  # times the frames that training sees of a clip: longer ones are no sentence


@dataclass
class Translation:
    """A sentence. start, end: seconds in the video. confidence: the geometric mean of the probabilities of the
    text's tokens and of the end after them. alternatives: further sentences of the beam, best first. error: why there is no sentence."""

    video: str
    start: float = 0.0
    end: float = 0.0
    text: str = ""
    confidence: float = 0.0
    alternatives: list[tuple[str, float]] | None = None
    error: str | None = None


def translate(
    model: Translator,
    config: Config,
    videos: Iterable[str],
    device: torch.device,
    segments: list[tuple[float, float]] | None = None,
    window: float = 0.0,
    alternatives: int = 0,
) -> Iterator[Translation]:
    """In the order of videos, and of time in each; decoded in batches. segments: (start, end) seconds of every video.
    window: seconds of the stretches that videos are cut into, one after another. Without either a video is one sentence."""
    found = (clip for path in videos for clip in _clips(path, segments, window, config))
    while group := list(islice(found, config.decode.batch)):
        clips = [frames for _, frames in group if frames is not None]
        if clips:
            # (F, H, W, 3), clips one after another
            batch = Batch(
                torch.from_numpy(np.concatenate(clips)), torch.tensor([len(c) for c in clips]), torch.zeros(len(clips), 1, dtype=torch.long), [], [], []
            )
            with precision(config.train, device):
                generate_with_scores = iter(model.generate_with_scores(batch.to(device), config.decode, 1 + alternatives))
        for one, frames in group:
            if frames is not None:
                (one.text, one.confidence), *others = next(generate_with_scores)
                one.alternatives = others or None
            yield one


def _clips(path: str, segments: list[tuple[float, float]] | None, window: float, config: Config) -> Iterator[tuple[Translation, np.ndarray | None]]:
    """Each sentence of a video with its used frames as the model sees them (N, crop, crop, 3), in one pass over the file;
    None and an error where there are none. Seconds count from the container's start.

    Only stretches of `window` seconds in which a frame begins are sentences.
    """
    is_whole, limit = not (segments or window), LONGEST * config.data.max_frames
    too_long = f"over {limit} frames, {LONGEST} times the longest clip of training, are no sentence"
    waiting, under_way, seconds, end = deque(segments or []), [], None, 0.0
    try:
        if segments:
            check_clock(path)
        with open_video(path) as container:
            rate = VideoFile(path).rate()
            for seconds, frame in with_seconds(container, upright(container.decode(video_stream(container))), rate):
                begins = seconds + TIME_EPS  # a frame belongs where it begins, as when clips are cut for training
                end = seconds + 1 / float(rate)
                for span in [span for span in under_way if span.end <= begins]:
                    under_way.remove(span)
                    yield span.done(span.end)
                while waiting and waiting[0][0] <= begins:
                    under_way.append(_Span(path, *waiting.popleft(), config))
                if window and not under_way:
                    number = int(begins // window)
                    under_way.append(_Span(path, number * window, (number + 1) * window, config))
                if is_whole and not under_way:
                    under_way.append(_Span(path, 0.0, math.inf, config))
                for span in [span for span in under_way if begins < span.end]:
                    span.add(seconds, frame)
                    if span.count <= limit:
                        continue
                    if not segments:  # the stretches after it are as long
                        raise ValueError(f"{too_long}: take --window=SECONDS or --segments=FILE")
                    under_way.remove(span)
                    error = f"{path} cannot be translated from {span.start:g} to {span.end:g} s: {too_long}"
                    yield Translation(path, span.start, span.end, error=error), None
            if seconds is None:
                raise ValueError("it holds no frame")
    except DECODE_ERRORS as error:
        place = "" if is_whole else f" from {end:.2f} s on"
        yield Translation(path, end, error=f"{path} cannot be translated{place}: {error}"), None
        return
    for span in under_way:
        yield span.done(min(span.end, end))
    for start, stop in waiting:
        if start >= end:
            yield Translation(path, start, stop, error=f"{path} ends at {end:.2f} s, before its segment from {start:g} s"), None
        else:  # the last frame begins before it
            yield _Span(path, start, stop, config).done(stop)


class _Span:
    """A span of a video while its frames come, brought to the frame rate that make_shards brought the clips to."""

    def __init__(self, path: str, start: float, end: float, config: Config):
        self.path, self.start, self.end, self.data = path, start, end, config.data
        self.resampler = Resampler(config.data.fps) if config.data.fps else None
        self.count, self.images, self.converter = 0, [], FrameConverter()

    def add(self, seconds: float, frame: av.VideoFrame) -> None:
        self._take(self.resampler.add(seconds, frame) if self.resampler else [frame])

    def _take(self, frames: Iterable[av.VideoFrame]) -> None:
        for frame in frames:
            if self.count % self.data.stride == 0:
                self.images.append(self.converter.to_rgb(frame, self.data.resize, self.data.resize))
            self.count += 1

    def done(self, end: float) -> tuple[Translation, np.ndarray | None]:
        if self.resampler:
            self._take(self.resampler.finish())
        one = Translation(self.path, round(self.start, 3), round(end, 3))
        if not self.images:
            one.error = f"{self.path} holds no frame from {self.start:g} to {self.end:g} s"
            return one, None
        used = np.stack(self.images)[positions(self.count, self.data.stride, self.data.max_frames) // self.data.stride]
        return one, centre_crop(used, self.data.crop)


def read_segments(path: Path) -> list[tuple[float, float]]:
    """(start, end) in seconds from the first two columns of a text file, separated by commas or white space, in the order of time; a header is skipped."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--segments: {path} cannot be read: {error}") from None
    found = []
    for number, line in enumerate(lines, 1):
        columns = next(csv.reader([line])) if "," in line else line.split()
        try:
            start, end = float(columns[0]), float(columns[1])
            if not 0 <= start < end < math.inf:
                raise ValueError
        except (ValueError, IndexError):
            if not line.strip() or number == 1:
                continue
            raise UserError(f"--segments: {path}, line {number}: {line.strip()[:60]!r} does not begin with two numbers of seconds, start before end") from None
        found.append((start, end))
    if not found:
        raise UserError(f"--segments: {path} has no line of two numbers of seconds, such as 1.5 4.2")
    return sorted(found)


def line(one: Translation, form: str, number: int, timed: bool, several: bool) -> str:
    """A translation as text, json, or as the entry `number` of srt or vtt subtitles."""
    if form == "json":
        return json.dumps({name: value for name, value in asdict(one).items() if value is not None}, ensure_ascii=False)
    if form == "text":
        return "\t".join([one.video] * several + [f"{one.start:.2f}\t{one.end:.2f}"] * timed + [one.text])
    start, end = (_clock(seconds, "," if form == "srt" else ".") for seconds in (one.start, one.end))
    return f"{number}\n{start} --> {end}\n{one.text}\n"


def _clock(seconds: float, point: str) -> str:
    milliseconds = round(seconds * 1000)
    return f"{milliseconds // 3_600_000:02}:{milliseconds // 60_000 % 60:02}:{milliseconds // 1000 % 60:02}{point}{milliseconds % 1000:03}"
