"""`flallm translate`: sentences of video files, of segments, or of windows of long ones."""

from __future__ import annotations

import csv
import json
import math
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path

import av
import numpy as np
import torch

from flallm.config import Config
from flallm.data.color import FrameConverter
from flallm.data.dataset import Batch
from flallm.data.resample import Resampler
from flallm.data.transforms import centre_crop, positions
from flallm.data.video import (
    DECODE_ERRORS,
    TIME_EPS,
    VideoFile,
    check_clock,
    open_video,
    upright,
    video_stream,
    with_seconds,
)
from flallm.distributed.context import precision
from flallm.model.translator import Translator
from flallm.utils import UserError

MAX_LENGTH_RATIO = 2  # of a clip's frames to data.max_frames; longer ones are no sentence


@dataclass
class Translation:
    """The sentence of a video or of a part of it."""

    video: str
    start: float = 0.0  # seconds from the start of the container
    end: float = 0.0
    text: str = ""
    # Geometric mean of the probabilities of the text's tokens and of the end token.
    confidence: float = 0.0
    alternatives: list[tuple[str, float]] | None = None  # (text, confidence), best first
    error: str | None = None  # why there is no sentence


Clip = tuple[Translation, np.ndarray | None]  # without its text; frames (N, crop, crop, 3)


def translate(
    model: Translator,
    config: Config,
    videos: Iterable[str],
    device: torch.device,
    segments: list[tuple[float, float]] | None = None,
    window: float = 0.0,
    alternatives: int = 0,
) -> Iterator[Translation]:
    """Yields translations in the order of videos, and of time within each.

    segments: (start, end) in seconds, the same of every video.
    window: seconds; cuts videos into windows of this length. Without segments or window a video
    is one sentence.
    alternatives: number of further sentences for each clip.
    """
    clips = chain.from_iterable(_clips(path, segments, window, config) for path in videos)
    while group := list(islice(clips, config.decode.batch)):
        _translate_batch(model, config, group, device, 1 + alternatives)
        for translation, _ in group:
            yield translation


def _translate_batch(
    model: Translator, config: Config, group: list[Clip], device: torch.device, num_sentences: int
) -> None:
    """Fills in text, confidence and alternatives of the clips that have frames."""
    translations = [translation for translation, frames in group if frames is not None]
    clips = [frames for _, frames in group if frames is not None]
    if not clips:
        return
    batch = Batch(
        frames=torch.from_numpy(np.concatenate(clips)),
        lengths=torch.tensor([len(frames) for frames in clips]),
        labels=torch.zeros(len(clips), 1, dtype=torch.long),
        keys=[],
        texts=[],
        bad=[],
    )
    with precision(config.train, device):
        results = model.generate_with_scores(batch.to(device), config.decode, num_sentences)
    for translation, (best, *others) in zip(translations, results, strict=True):
        translation.text, translation.confidence = best
        translation.alternatives = others or None


def _clips(
    path: str, segments: list[tuple[float, float]] | None, window: float, config: Config
) -> Iterator[Clip]:
    """Yields the clips of a video in one pass over the file.

    A clip has the frames that the model sees, or None and an error. Only windows in which a frame
    begins are clips.
    """
    spans = _Spans(path, segments, window, config)
    try:
        if segments:
            check_clock(path)
        with open_video(path) as container:
            rate = VideoFile(path).rate()
            frames = upright(container.decode(video_stream(container)))
            for seconds, frame in with_seconds(container, frames, rate):
                yield from spans.add(seconds, 1 / float(rate), frame)
        if not spans.num_frames:
            raise ValueError("it holds no frame")
    except DECODE_ERRORS as error:
        place = f" from {spans.end:.2f} s on" if segments or window else ""
        message = f"{path} cannot be translated{place}: {error}"
        yield Translation(path, spans.end, error=message), None
        return
    yield from spans.finish()


class _Spans:
    """Distributes the frames of a video, in order of time, over the spans that become clips."""

    def __init__(
        self, path: str, segments: list[tuple[float, float]] | None, window: float, config: Config
    ):
        self.path, self.segments, self.window, self.config = path, segments, window, config
        self.waiting = deque(segments or [])  # segments that have not begun
        self.open: list[_Span] = []
        self.num_frames = 0
        self.end = 0.0  # of the last frame, in seconds

    def add(self, seconds: float, duration: float, frame: av.VideoFrame) -> Iterator[Clip]:
        """Takes the next frame; yields the clips that end before it."""
        # A frame belongs to the span it begins in, as when clips are cut for training.
        begin = seconds + TIME_EPS
        self.num_frames += 1
        self.end = seconds + duration
        for span in [span for span in self.open if span.end <= begin]:
            self.open.remove(span)
            yield span.clip(span.end)
        self._open_spans(begin)
        for span in [span for span in self.open if begin < span.end]:
            span.add(seconds, frame)
            if span.is_too_long():
                yield self._drop(span)

    def _open_spans(self, begin: float) -> None:
        while self.waiting and self.waiting[0][0] <= begin:
            self.open.append(_Span(self.path, *self.waiting.popleft(), self.config))
        if self.segments or self.open:
            return
        if self.window:
            number = int(begin // self.window)
            start, end = number * self.window, (number + 1) * self.window
        else:
            start, end = 0.0, math.inf
        self.open.append(_Span(self.path, start, end, self.config))

    def _drop(self, span: _Span) -> Clip:
        """The clip of a segment that is too long.

        Raises ValueError without segments: further windows would be as long.
        """
        reason = (
            f"over {span.max_frames} frames, {MAX_LENGTH_RATIO} times the longest clip of "
            "training, are no sentence"
        )
        if not self.segments:
            raise ValueError(f"{reason}: take --window=SECONDS or --segments=FILE")
        self.open.remove(span)
        part = f"from {span.start:g} to {span.end:g} s"
        error = f"{self.path} cannot be translated {part}: {reason}"
        return Translation(self.path, span.start, span.end, error=error), None

    def finish(self) -> Iterator[Clip]:
        """Yields the other clips, after the last frame."""
        for span in self.open:
            yield span.clip(min(span.end, self.end))
        for start, end in self.waiting:
            if start < self.end:  # but after the begin of the last frame
                yield _Span(self.path, start, end, self.config).clip(end)
                continue
            error = f"{self.path} ends at {self.end:.2f} s, before its segment from {start:g} s"
            yield Translation(self.path, start, end, error=error), None


class _Span:
    """The frames of a part of a video, at the frame rate of the shards."""

    def __init__(self, path: str, start: float, end: float, config: Config):
        self.path, self.start, self.end, self.data = path, start, end, config.data
        self.max_frames = MAX_LENGTH_RATIO * self.data.max_frames
        self.resampler = Resampler(self.data.fps) if self.data.fps else None
        self.converter = FrameConverter()
        self.images: list[np.ndarray] = []  # every data.stride-th frame
        self.count = 0  # of frames

    def add(self, seconds: float, frame: av.VideoFrame) -> None:
        self._keep(self.resampler.add(seconds, frame) if self.resampler else [frame])

    def _keep(self, frames: Iterable[av.VideoFrame]) -> None:
        for frame in frames:
            if self.count % self.data.stride == 0:
                size = self.data.resize
                self.images.append(self.converter.to_rgb(frame, size, size))
            self.count += 1

    def is_too_long(self) -> bool:
        return self.count > self.max_frames

    def clip(self, end: float) -> Clip:
        """end: what the translation gives as its end, in seconds."""
        if self.resampler:
            self._keep(self.resampler.finish())
        translation = Translation(self.path, round(self.start, 3), round(end, 3))
        if not self.images:
            part = f"from {self.start:g} to {self.end:g} s"
            translation.error = f"{self.path} holds no frame {part}"
            return translation, None
        used = positions(self.count, self.data.stride, self.data.max_frames) // self.data.stride
        return translation, centre_crop(np.stack(self.images)[used], self.data.crop)


def read_segments(path: Path) -> list[tuple[float, float]]:
    """Reads (start, end) in seconds from the first two columns of a text file, sorted by time.

    Columns are separated by commas or white space; a header is skipped. Raises UserError for a
    file that holds anything else.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--segments: {path} cannot be read: {error}") from None
    segments = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        segment = _parse_segment(line)
        if segment:
            segments.append(segment)
        elif number > 1:
            raise UserError(
                f"--segments: {path}, line {number}: {line.strip()[:60]!r} does not begin with "
                "two numbers of seconds, start before end"
            )
    if not segments:
        raise UserError(
            f"--segments: {path} has no line of two numbers of seconds, such as 1.5 4.2"
        )
    return sorted(segments)


def _parse_segment(line: str) -> tuple[float, float] | None:
    columns = next(csv.reader([line])) if "," in line else line.split()
    try:
        start, end = float(columns[0]), float(columns[1])
    except (ValueError, IndexError):
        return None
    return (start, end) if 0 <= start < end < math.inf else None


def line(translation: Translation, form: str, number: int, timed: bool, several: bool) -> str:
    """A translation as a line of text, as JSON, or as the entry `number` of srt or vtt subtitles.

    timed: text has start and end; several: text has the name of the video.
    """
    if form == "json":
        fields = asdict(translation).items()
        return json.dumps({k: v for k, v in fields if v is not None}, ensure_ascii=False)
    if form == "text":
        columns = [translation.text]
        if timed:
            columns = [f"{translation.start:.2f}", f"{translation.end:.2f}", *columns]
        if several:
            columns = [translation.video, *columns]
        return "\t".join(columns)
    decimal_point = "," if form == "srt" else "."
    start = _clock(translation.start, decimal_point)
    end = _clock(translation.end, decimal_point)
    return f"{number}\n{start} --> {end}\n{translation.text}\n"


def _clock(seconds: float, decimal_point: str) -> str:
    minutes, milliseconds = divmod(round(seconds * 1000), 60_000)
    return (
        f"{minutes // 60:02}:{minutes % 60:02}:"
        f"{milliseconds // 1000:02}{decimal_point}{milliseconds % 1000:03}"
    )
