"""One module a data set: what lies on disk -> `Clip`s, and a `LeftOut` for each row that gives none.

Pixels are only touched when a clip is encoded (`shards.py`), so nothing here is lost to a codec: a clip that does not
decode raises one of `BROKEN` there.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from fractions import Fraction
from pathlib import Path, PurePath
from typing import Protocol

import av
import numpy as np

from flallm import UserError, is_hidden

# What a demuxer reads from the one file it is given: no playlists and scripts, which name other files and addresses.
FORMATS = "mov,matroska,avi,mpegts,mpeg,mpegvideo,ogg,flv,asf,mxf,nut,dv,ivf,obu,h264,hevc,m4v,mjpeg,yuv4mpegpipe,gif,png_pipe,jpeg_pipe,bmp_pipe,webp_pipe"
MAX_PIXELS = 8192 * 8192  # of a frame: twice those of 8K; more is a broken or hostile header
BROKEN = (OSError, ValueError, IndexError, av.FFmpegError)  # of a video that cannot be read; IndexError where a stream begins in mid-file
SLACK = 5e-4  # seconds: times in tables are rounded, and a cut at 2.000 means the frame at 1.9999
MISSING = "its video or folder of images does not exist"


class Media(Protocol):
    """Where the pixels of a clip come from; opened in the process that encodes."""

    source: str  # what to tell a person

    def frames(self) -> tuple[Fraction, Iterator[av.VideoFrame]]:
        """(frames per second, the frames in display order, upright)."""
        ...


@dataclass(frozen=True)
class Clip:
    """A signed sentence: `key` is unique in its data set and has no dot (WebDataset cuts keys at the first one)."""

    key: str
    split: str
    text: str
    media: Media
    gloss: str | None = None
    signer: str | None = None


@dataclass(frozen=True)
class LeftOut:
    """A row that gives no clip, and why; `source` is the video or the place in a table. All of it can be printed."""

    key: str
    split: str
    source: str
    cause: str

    def __post_init__(self):
        for field in fields(self):
            object.__setattr__(self, field.name, getattr(self, field.name).encode("utf-8", "backslashreplace").decode())


def clip(key: str, split: str, text: str, media: Media, gloss: str | None = None, signer: str | None = None) -> Clip | LeftOut:
    """The clip of a row, or why it is none."""
    key, text = re.sub(r"[./\\]", "_", key), text.strip()
    if not key or not text:
        return LeftOut(key, split, media.source, "has no text" if key else "has no name")
    for what, value in (("key", key), ("text", text), ("gloss", gloss or ""), ("signer", signer or "")):
        if "\0" in value or value.encode("utf-8", "ignore").decode() != value:
            return LeftOut(key, split, media.source, f"its {what} holds a NUL or half a character")
    return Clip(key, split, text, media, gloss or None, signer or None)


def found(clips: Iterator[Clip | LeftOut], hint: str) -> Iterator[Clip | LeftOut]:
    """The same; but where no clip's video exists it is not the data set that is at fault, and that is a UserError."""
    any_clip, first = False, None
    for one in clips:
        any_clip |= isinstance(one, Clip)
        if first is None and isinstance(one, LeftOut) and one.cause == MISSING:
            first = one
        yield one
    if first and not any_clip:
        raise UserError(f"{first.source} does not exist, and no other clip has a video either: {hint}")


def open_video(source: str | bytes) -> av.container.InputContainer:
    """Opens the file of that path, or these bytes, for decoding with one thread (there are as many workers as cores).
    Raises ValueError where there is no video stream, its codec is unknown or its frames are too large, OSError or av.FFmpegError for what can't be opened."""
    file = io.BytesIO(source) if isinstance(source, bytes) else f"file:{source}"  # never a URL, whatever the name looks like
    container = av.open(file, metadata_errors="ignore", options={"format_whitelist": FORMATS})
    try:
        if not container.streams.video:
            raise ValueError("holds no video stream")
        stream = container.streams.video[0]
        if stream.codec_context is None:
            raise ValueError("its codec is unknown")
        if stream.width * stream.height > MAX_PIXELS:
            raise ValueError(f"its frames are too large: {stream.width}x{stream.height}")
        stream.thread_count = 1
        stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}  # for headers inside the stream
    except BaseException:
        container.close()
        raise
    return container


def upright(frames: Iterator[av.VideoFrame]) -> Iterator[av.VideoFrame]:
    """Turns and mirrors frames as their display matrix says: a phone films lying on its side and only notes how it was held."""
    graph, made_for = None, None
    for frame in frames:
        matrix = frame.side_data.get("DISPLAYMATRIX")
        if matrix is None:
            yield frame
            continue
        a, b, _, c, d = np.frombuffer(bytes(matrix), "<i4")[:5].tolist()  # x' = ax + cy, y' = bx + dy
        swap = abs(a) < abs(b)
        x, y = (c, b) if swap else (a, d)
        # Last in the chain the note goes, or the next reader would turn the frame once more.
        chain = [("transpose", "cclock_flip")] * swap + [("hflip", None)] * (x < 0) + [("vflip", None)] * (y < 0) + [("sidedata", "delete:DISPLAYMATRIX")]
        layout = (chain, frame.width, frame.height, frame.format.name)
        if layout != made_for:
            graph, made_for = av.filter.Graph(), layout
            nodes = [graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base or Fraction(1, 25))]
            nodes += [graph.add(name, arguments) for name, arguments in chain]
            graph.link_nodes(*nodes, graph.add("buffersink")).configure()
        graph.push(frame)
        yield graph.pull()


@dataclass(frozen=True)
class VideoFile:
    """A video file, or the part of it from `start` to `end` seconds (a frame belongs to it when it begins in there)."""

    path: str
    start: float | None = None
    end: float | None = None

    @property
    def source(self) -> str:
        part = self.start is not None or self.end is not None
        return f"{self.path}#t={self.start or 0},{'' if self.end is None else self.end}" if part else self.path

    def frames(self) -> tuple[Fraction, Iterator[av.VideoFrame]]:
        container = open_video(self.path)
        return self.rate(container.streams.video[0]), upright(self._decode(container))

    def rate(self, stream) -> Fraction:
        """Frames per second, from 1 to 240."""
        rate = stream.average_rate
        if not rate or rate > 240:  # none is stated, or the clock's; the frames' own times tell
            with open_video(self.path) as container:
                times = [packet.pts for packet in container.demux(video=0) if packet.pts is not None]
            span = (max(times) - min(times)) * stream.time_base if times else 0
            rate = (len(times) - 1) / span if span else 25
        return min(max(Fraction(rate), Fraction(1)), Fraction(240))

    def _decode(self, container) -> Iterator[av.VideoFrame]:
        stream, count, time, cut = container.streams.video[0], 0, 0.0, self.start is not None or self.end is not None
        first = (stream.start_time or 0) * stream.time_base
        stated = container.duration / av.time_base if container.duration and "matroska" in container.format.name else 0
        try:
            with container:
                for frame in self._from_keyframe(container, first):
                    if cut and frame.pts is None:
                        raise ValueError("its frames carry no times, so no part can be cut out of it")
                    time = _seconds(frame, first)
                    if self.end is not None and time >= self.end:
                        break
                    if self.start is None or time >= self.start:
                        count += 1
                        yield frame
                else:  # a Matroska file cut short ends like a whole one; its header knows better
                    if 0 < time < min(stated - 1, 0.9 * stated):
                        raise ValueError(f"breaks after {count} frames, at {time:.2f} of {stated:.2f} seconds")
        except (av.FFmpegError, IndexError) as error:
            raise ValueError(f"breaks after {count} frames: {error}" if count else f"no frame decodes: {error}") from None
        if not count:
            raise ValueError(f"no frame begins in this part of it; the last one begins at {time:.2f} s" if cut and time else "holds no frame")

    def _from_keyframe(self, container, first: Fraction) -> Iterator[av.VideoFrame]:
        """Decodes from a keyframe that no frame of the cut comes before. Seeking may land behind such a one (open GOPs; streams
        without an index), so what comes is looked at, and if need be the search goes on further ahead."""
        back = 0
        while self.start and back < self.start:
            stream = container.streams.video[0]
            container.seek(int((first + Fraction(self.start) - back) / stream.time_base), stream=stream)
            frames = container.decode(stream)
            frame = next(frames, None)
            if frame is not None and (frame.pts is None or _seconds(frame, first) <= self.start):
                yield frame
                yield from frames
                return
            back = 2 * back or 1
        with open_video(self.path) as container:
            yield from container.decode(video=0)


def _seconds(frame: av.VideoFrame, first: Fraction) -> float:
    """When a frame begins, with some slack."""
    return float(frame.pts * frame.time_base - first) + SLACK if frame.pts is not None else 0.0


@dataclass(frozen=True)
class ImageFiles:
    """A clip that lies on disk as one image a frame: `names` in `folder`, or where none are given every image there,
    in the order of their numbers; hidden files, and others (some data sets leave profiles there), are passed over."""

    folder: str
    names: tuple[str, ...] = ()
    fps: float = 25

    @property
    def source(self) -> str:
        return str(Path(self.folder, self.names[0]).parent) if self.names else self.folder

    def frames(self) -> tuple[Fraction, Iterator[av.VideoFrame]]:
        return Fraction(self.fps), upright(self._decode())

    def _decode(self) -> Iterator[av.VideoFrame]:
        for name in self.names or _images(self.folder):
            try:
                with open_video(Path(self.folder, name).read_bytes()) as image:
                    frame = next(image.decode(video=0), None)
            except (ValueError, av.FFmpegError) as error:
                raise ValueError(f"{name} is no image: {error}") from None
            if frame is None:
                raise ValueError(f"{name} is no image: nothing decodes")
            yield frame


IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}


def is_image(name: str) -> bool:
    """Whether a file is an image by its name; a hidden one is none."""
    return Path(name).suffix.lower() in IMAGES and not is_hidden(Path(name).name)


def _images(folder: str) -> list[str]:
    return sorted(filter(is_image, os.listdir(folder)), key=_by_number)


def _by_number(name: str) -> tuple[list, str]:
    """The numbers in a name as numbers; 1.png and 01.png are in the order of their names."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)], name


def existing(path: str | Path, what: str) -> Path:
    """The path, or a `UserError` that says what was looked for."""
    if not os.path.exists(path):
        raise UserError(f"{path} does not exist: {what}")
    return Path(path)


def inside(root: str | Path, name: str) -> Path | None:
    """`name` under `root`; None where it is empty or would lead out of there."""
    path = PurePath(name)
    return None if not path.parts or path.is_absolute() or ".." in path.parts or "\0" in name else Path(root, path)


def read_text(path: Path, what: str) -> str:
    """The text of a table. Raises UserError where there is none."""
    try:
        return existing(path, what).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise UserError(f"{path}, line {line}: not UTF-8") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def read_table(path: Path, what: str, separator: str, header: list[str], split: str = "") -> Iterator[dict[str, str] | LeftOut]:
    """The rows of a table without quoting, where a `"` is a `"`; a row with fewer or more fields is left out."""
    lines = read_text(path, what).replace("\r\n", "\n").split("\n")
    if lines[0].split(separator) != header:
        raise UserError(f"{path}: the header is not {separator.join(header)!r}")
    for number, line in enumerate(lines[1:], 2):
        row = line.split(separator)
        if len(row) == len(header):
            yield dict(zip(header, row))
        elif line.strip():
            yield LeftOut(f"line {number}", split, f"{path}:{number}", f"has {len(row)} fields, not {len(header)}")
