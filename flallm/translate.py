"""`flallm translate`: sentences of video files, of segments of one, or of stretches of a long one, with how sure the model is."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from fractions import Fraction
from itertools import count, islice
from pathlib import Path

import numpy as np
import torch
from av.video.reformatter import VideoReformatter

from flallm import UserError, engine, video
from flallm.config import Config
from flallm.corpora import BROKEN, SLACK, VideoFile, open_video, upright
from flallm.loader import Batch
from flallm.model.translator import Translator

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
            with engine.precision(config.train, device):
                answers = iter(model.answers(batch.to(device), config.decode, 1 + alternatives))
        for one, frames in group:
            if frames is not None:
                (one.text, one.confidence), *others = next(answers)
                one.alternatives = others or None
            yield one


def _clips(path: str, segments: list[tuple[float, float]] | None, window: float, config: Config) -> Iterator[tuple[Translation, np.ndarray | None]]:
    """Each sentence of a video with its used frames as the model sees them (N, crop, crop, 3), in one pass over the file; None and an error where there are none."""
    whole, most = not (segments or window), LONGEST * config.data.max_frames
    spans = iter(segments) if segments else iter([(0.0, math.inf)]) if whole else ((n * window, (n + 1) * window) for n in count())
    following, now, first, under_way, scaler = next(spans), 0.0, None, [], VideoReformatter()
    try:
        with open_video(path) as container:
            stream = container.streams.video[0]
            rate = VideoFile(path).rate(stream)
            length, ratio = 1 / float(rate), Fraction(config.data.fps or rate) / rate  # seconds of a frame; to the frames that a clip has, as in training
            for i, frame in enumerate(upright(container.decode(stream))):
                at = i * length if frame.time is None else frame.time
                first = at if first is None else first
                begins, now = at - first + SLACK, at - first + length  # a frame belongs where it begins, as when clips are cut for training
                while following and following[0] <= begins:
                    under_way.append(_Clip(path, *following, config, ratio))
                    following = next(spans, None)
                for clip in [clip for clip in under_way if clip.end <= begins]:
                    under_way.remove(clip)
                    yield clip.done(clip.end)
                for clip in list(under_way):
                    clip.take(frame, scaler)
                    if clip.count <= most:
                        continue
                    why = f"over {most} frames, {LONGEST} times the longest clip of training, are no sentence"
                    if not segments:  # the stretches after it are as long
                        raise ValueError(f"{why}: take --window=SECONDS or --segments=FILE")
                    under_way.remove(clip)
                    yield Translation(path, clip.start, clip.end, error=f"{path} cannot be translated from {clip.start:g} to {clip.end:g} s: {why}"), None
            if first is None:
                raise ValueError("it holds no frame")
    except BROKEN as error:
        yield Translation(path, now, error=f"{path} cannot be translated{f' from {now:.2f} s on' * (not whole)}: {error}"), None
        return
    for clip in under_way:
        yield clip.done(min(clip.end, now))
    for start, end in [following, *spans] if segments and following else []:
        late = Translation(path, start, end, error=f"{path} ends at {now:.2f} s, before its segment from {start:g} s"), None
        yield late if start >= now else _Clip(path, start, end, config, ratio).done(end)  # the last frame begins before it


class _Clip:
    """A span of a video while its frames come. ratio: to how many each is made, dropped or repeated as `video.resample` does."""

    def __init__(self, path: str, start: float, end: float, config: Config, ratio: Fraction):
        self.path, self.start, self.end, self.data, self.ratio = path, start, end, config.data, ratio
        self.came, self.count, self.kept = 0, 0, []

    def take(self, frame, scaler: VideoReformatter) -> None:
        self.came += 1
        while self.count < self.came * self.ratio:
            if self.count % self.data.stride == 0:
                self.kept.append(video.to_array(frame, self.data.resize, self.data.resize, scaler))
            self.count += 1

    def done(self, end: float) -> tuple[Translation, np.ndarray | None]:
        one = Translation(self.path, round(self.start, 3), round(end, 3))
        if not self.kept:
            one.error = f"{self.path} holds no frame from {self.start:g} to {self.end:g} s"
            return one, None
        used = np.stack(self.kept)[video.positions(self.count, self.data.stride, self.data.max_frames) // self.data.stride]
        return one, video.centre_crop(used, self.data.crop)


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
