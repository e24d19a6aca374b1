"""Video files and folders of images: frames with their times, upright."""

from __future__ import annotations

import io
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import av
import numpy as np
from av.stream import Disposition

from flallm.utils import is_hidden

# What a demuxer reads from the one file it is given: no playlists and scripts, which name other files and addresses.
FORMATS = "mov,matroska,avi,mpegts,mpeg,mpegvideo,ogg,flv,asf,mxf,nut,dv,ivf,obu,h264,hevc,m4v,mjpeg,yuv4mpegpipe,gif,png_pipe,jpeg_pipe,bmp_pipe,webp_pipe"
MAX_PIXELS = 8192 * 8192  # of a frame: twice those of 8K; more is a broken or hostile header
DECODE_ERRORS = (OSError, ValueError, IndexError, av.FFmpegError)  # of a video that cannot be read; IndexError where a stream begins in mid-file
TIME_EPS = 5e-4  # seconds: times in tables are rounded, and a cut at 2.000 means the frame at 1.9999
LONGEST_STEP = 10  # seconds between frames of a transport stream, over which its clock has jumped; as in the ffmpeg command
RATE_TOLERANCE = 0.05  # share by which the number of frames may differ from what the header's rate says


def open_video(source: str | bytes) -> av.container.InputContainer:
    """Opens the file of that path, or these bytes, for decoding with one thread (there are as many workers as cores).
    Raises ValueError where there is no video stream, its codec is unknown or its frames are too large, OSError or av.FFmpegError for what can't be opened."""
    file = io.BytesIO(source) if isinstance(source, bytes) else f"file:{source}"  # never a URL, whatever the name looks like
    container = av.open(file, metadata_errors="ignore", options={"format_whitelist": FORMATS})
    try:
        stream = video_stream(container)
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


def video_stream(container: av.container.InputContainer) -> av.VideoStream:
    """The first video stream that is no cover picture. Raises ValueError where there is none."""
    for stream in container.streams.video:
        if not stream.disposition & Disposition.attached_pic:
            return stream
    raise ValueError("holds no video stream")


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
        source = {
            "video_size": f"{frame.width}x{frame.height}",
            "pix_fmt": frame.format.name,
            "time_base": str(frame.time_base or Fraction(1, 25)),
            "colorspace": str(int(frame.colorspace)),
            "range": str(int(frame.color_range)),
        }
        if (chain, source) != made_for:
            graph, made_for = av.filter.Graph(), (chain, source)
            nodes = [graph.add("buffer", **source)]
            nodes += [graph.add(name, arguments) for name, arguments in chain]
            graph.link_nodes(*nodes, graph.add("buffersink")).configure()
        graph.push(frame)
        yield graph.pull()


def start_of(container: av.container.InputContainer) -> Fraction:
    """When the first stream of a container begins, in seconds of its clock.

    Players, `ffmpeg -ss` and so people's tables count from here, even where sound begins before the first picture.
    """
    return Fraction(container.start_time or 0, av.time_base)


def is_joinable(container: av.container.InputContainer) -> bool:
    """Whether files of this format can be joined by appending bytes, so that the clock may jump in the middle."""
    return container.format.name in ("mpegts", "mpeg")


def with_seconds(container: av.container.InputContainer, frames: Iterator[av.VideoFrame], rate: Fraction) -> Iterator[tuple[float, av.VideoFrame]]:
    """(seconds, frame): when each frame begins, counted from the container's start.

    Frames that have no time follow one another at `rate`. Where the clock jumps, because recordings were joined, the
    seconds go on with the next frame.
    """
    shift, previous = -float(start_of(container)), None
    longest_step = LONGEST_STEP if is_joinable(container) else math.inf
    for frame in frames:
        following = 0.0 if previous is None else previous + 1 / float(rate)
        seconds = following if frame.pts is None else float(frame.pts * frame.time_base) + shift
        if previous is not None and not 0 <= seconds - previous <= longest_step:
            shift += following - seconds
            seconds = following
        yield seconds, frame
        previous = seconds


@lru_cache(maxsize=64)
def clock_jump(path: str) -> float | None:
    """When the clock of a file jumps, in seconds from its start, because recordings were joined; None where it does not.

    Reads the whole file, if it is of a format that can be joined.
    """
    with open_video(path) as container:
        if not is_joinable(container):
            return None
        stream, previous = video_stream(container), None
        for packet in container.demux(stream):
            if packet.dts is None:
                continue
            seconds = float(packet.dts * stream.time_base - start_of(container))
            if previous is not None and not 0 <= seconds - previous <= LONGEST_STEP:
                return previous
            previous = seconds
    return None


def check_clock(path: str) -> None:
    """Raises ValueError where the times of a file name no single place in it."""
    jump = clock_jump(path)
    if jump is not None:
        raise ValueError(
            f"its clock jumps after {jump:.2f} s, so nothing can be cut out of it by time: give it one clock with "
            f"ffmpeg -i {Path(path).name} -c copy {Path(path).stem}.mkv"
        )


@dataclass(frozen=True)
class VideoFile:
    """A video file, or the part of it from `start` to `end` seconds after the container's start.

    A frame belongs to the part when it begins in there.
    """

    path: str
    start: float | None = None
    end: float | None = None

    @property
    def is_cut(self) -> bool:
        return self.start is not None or self.end is not None

    @property
    def source(self) -> str:
        return f"{self.path}#t={self.start or 0},{'' if self.end is None else self.end}" if self.is_cut else self.path

    def frames(self) -> tuple[Fraction, Iterator[tuple[float, av.VideoFrame]]]:
        if self.is_cut:
            check_clock(self.path)
        rate = self.rate()
        return rate, self._decode(open_video(self.path), rate)

    def rate(self) -> Fraction:
        """Frames per second of this part, from 1 to 240: what the header states, unless the frames' times say otherwise."""
        with open_video(self.path) as container:
            rate = video_stream(container).average_rate or Fraction(0)
            times = [] if rate and is_joinable(container) else self._packet_times(container)
        if len(times) > 1:
            steps, span = len(times) - 1, max(times) - min(times)
            if not rate or abs(rate * span - steps) > max(1, RATE_TOLERANCE * steps):
                rate = steps / span if span else Fraction(0)
        rate = rate or Fraction(25)
        return min(max(rate, Fraction(1)), Fraction(240))

    def _packet_times(self, container: av.container.InputContainer) -> list[Fraction]:
        """When the frames of this part begin, in seconds of the container's clock; nothing is decoded."""
        stream, zero = video_stream(container), start_of(container)
        first = zero + Fraction(self.start or 0) - Fraction(TIME_EPS)
        last = math.inf if self.end is None else zero + Fraction(self.end)
        times = []
        try:
            if self.start:
                container.seek(int(first / stream.time_base), stream=stream)
            for packet in container.demux(stream):
                if packet.dts is not None and packet.dts * stream.time_base >= last:
                    break
                if packet.pts is not None and first <= packet.pts * stream.time_base < last:
                    times.append(packet.pts * stream.time_base)
        except (av.FFmpegError, IndexError):  # decoding will say what is wrong
            pass
        return times

    def _decode(self, container: av.container.InputContainer, rate: Fraction) -> Iterator[tuple[float, av.VideoFrame]]:
        count, seconds = 0, 0.0
        stated = container.duration / av.time_base if container.duration and "matroska" in container.format.name else 0
        try:
            with container:
                for seconds, frame in with_seconds(container, upright(self._from_keyframe(container)), rate):
                    if self.is_cut and frame.pts is None:
                        raise ValueError("its frames carry no times, so no part can be cut out of it")
                    begins = seconds + TIME_EPS
                    if self.end is not None and begins >= self.end:
                        break
                    if self.start is None or begins >= self.start:
                        count += 1
                        yield seconds, frame
                else:  # a Matroska file cut short ends like a whole one; its header knows better
                    if 0 < seconds < min(stated - 1, 0.9 * stated):
                        raise ValueError(f"breaks after {count} frames, at {seconds:.2f} of {stated:.2f} seconds")
        except (av.FFmpegError, IndexError) as error:
            raise ValueError(f"breaks after {count} frames: {error}" if count else f"no frame decodes: {error}") from None
        if not count:
            in_part = self.is_cut and seconds
            raise ValueError(f"no frame begins in this part of it; the last one begins at {seconds:.2f} s" if in_part else "holds no frame")

    def _from_keyframe(self, container: av.container.InputContainer) -> Iterator[av.VideoFrame]:
        """Decodes from a keyframe that no frame of the cut comes before.

        Seeking may land behind such a one (open GOPs; streams without an index), so what comes is looked at, and if
        need be the search goes on further ahead.
        """
        back, zero = 0, start_of(container)
        while self.start and back < self.start:
            stream = video_stream(container)
            container.seek(int((zero + Fraction(self.start) - back) / stream.time_base), stream=stream)
            frames = container.decode(stream)
            frame = next(frames, None)
            if frame is not None and (frame.pts is None or float(frame.pts * frame.time_base - zero) + TIME_EPS <= self.start):
                yield frame
                yield from frames
                return
            back = 2 * back or 1
        with open_video(self.path) as container:
            yield from container.decode(video_stream(container))


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

    def frames(self) -> tuple[Fraction, Iterator[tuple[float, av.VideoFrame]]]:
        return Fraction(self.fps), ((i / self.fps, frame) for i, frame in enumerate(upright(self._decode())))

    def _decode(self) -> Iterator[av.VideoFrame]:
        for name in self.names or image_names(self.folder):
            try:
                with open_video(Path(self.folder, name).read_bytes()) as image:
                    frame = next(image.decode(video_stream(image)), None)
            except (ValueError, av.FFmpegError) as error:
                raise ValueError(f"{name} is no image: {error}") from None
            if frame is None:
                raise ValueError(f"{name} is no image: nothing decodes")
            yield frame


IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}


def is_image(name: str) -> bool:
    """Whether a file is an image by its name; a hidden one is none."""
    return Path(name).suffix.lower() in IMAGES and not is_hidden(Path(name).name)


def image_names(folder: str) -> list[str]:
    return sorted(filter(is_image, os.listdir(folder)), key=by_number)


def by_number(name: str) -> tuple[list, str]:
    """The numbers in a name as numbers; 1.png and 01.png are in the order of their names."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)], name
