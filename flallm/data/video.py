"""Video files: frames with their times, upright."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import av
import numpy as np
from av.stream import Disposition

# Demuxers that read only the file they are given. Playlists and scripts name other files.
FORMATS = (
    "mov,matroska,avi,mpegts,mpeg,mpegvideo,ogg,flv,asf,mxf,nut,dv,ivf,obu,h264,hevc,m4v,mjpeg,"
    "yuv4mpegpipe,gif,png_pipe,jpeg_pipe,bmp_pipe,webp_pipe"
)
MAX_PIXELS = 8192 * 8192  # of a frame, twice those of 8K. More is a broken or hostile header.
# Errors of a video that cannot be read. IndexError is for streams that begin in mid-file.
DECODE_ERRORS = (OSError, ValueError, IndexError, av.FFmpegError)
# Seconds. Times in tables are rounded: a cut at 2.000 means the frame at 1.9999.
TIME_EPS = 5e-4
# Seconds between frames of a transport stream. Its clock has jumped where the step is longer, as
# in the ffmpeg command.
LONGEST_STEP = 10
RATE_TOLERANCE = 0.05  # share by which the number of frames may differ from the header's rate

TimedFrames = Iterator[tuple[float, av.VideoFrame]]  # (seconds, frame)


def open_video(source: str | bytes) -> av.container.InputContainer:
    """Opens a video for decoding with one thread, as there are as many workers as cores.

    source: a path, or the bytes of a file. Raises ValueError where there is no video stream, its
    codec is unknown or its frames are too large; OSError or av.FFmpegError where it cannot be
    opened.
    """
    if isinstance(source, bytes):
        file = io.BytesIO(source)
    else:
        file = f"file:{source}"  # never a URL, whatever the name looks like
    container = av.open(file, metadata_errors="ignore", options={"format_whitelist": FORMATS})
    try:
        stream = video_stream(container)
        if stream.codec_context is None:
            raise ValueError("its codec is unknown")
        if stream.width * stream.height > MAX_PIXELS:
            raise ValueError(f"its frames are too large: {stream.width}x{stream.height}")
        stream.thread_count = 1
        # The limit holds for headers inside the stream, too.
        stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
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
    """Rotates and mirrors frames as their display matrix says.

    A phone films lying on its side and notes how it was held.
    """
    graph, settings = None, None
    for frame in frames:
        matrix = frame.side_data.get("DISPLAYMATRIX")
        if matrix is None:
            yield frame
            continue
        filters = _filters_of(bytes(matrix))
        source = {
            "video_size": f"{frame.width}x{frame.height}",
            "pix_fmt": frame.format.name,
            "time_base": str(frame.time_base or Fraction(1, 25)),
            "colorspace": str(int(frame.colorspace)),
            "range": str(int(frame.color_range)),
        }
        if (filters, source) != settings:
            settings = (filters, source)
            graph = av.filter.Graph()
            nodes = [graph.add("buffer", **source)]
            nodes += [graph.add(name, arguments) for name, arguments in filters]
            graph.link_nodes(*nodes, graph.add("buffersink")).configure()
        graph.push(frame)
        yield graph.pull()


def _filters_of(matrix: bytes) -> list[tuple[str, str | None]]:
    """The FFmpeg filters, (name, arguments) each, that do what a display matrix says."""
    a, b, _, c, d = np.frombuffer(matrix, "<i4")[:5].tolist()  # x' = ax + cy, y' = bx + dy
    filters: list[tuple[str, str | None]] = []
    x, y = a, d
    if abs(a) < abs(b):
        filters.append(("transpose", "cclock_flip"))
        x, y = c, b
    if x < 0:
        filters.append(("hflip", None))
    if y < 0:
        filters.append(("vflip", None))
    # Without this, the next reader of the frame would turn it once more.
    filters.append(("sidedata", "delete:DISPLAYMATRIX"))
    return filters


def start_of(container: av.container.InputContainer) -> Fraction:
    """When the first stream of a container begins, in seconds of its clock.

    Players, `ffmpeg -ss` and so people's tables count from here, even where sound begins before the
    first picture.
    """
    return Fraction(container.start_time or 0, av.time_base)


def is_joinable(container: av.container.InputContainer) -> bool:
    """Whether files of this format can be joined by appending bytes, so the clock may jump."""
    return container.format.name in ("mpegts", "mpeg")


def clock_jumps(container: av.container.InputContainer, step: float) -> bool:
    """Whether the clock jumped between two frames that are `step` seconds apart.

    A long step is a jump only where files can be joined; elsewhere it is a pause.
    """
    return step < 0 or (is_joinable(container) and step > LONGEST_STEP)


def with_seconds(
    container: av.container.InputContainer, frames: Iterator[av.VideoFrame], rate: Fraction
) -> TimedFrames:
    """(seconds, frame): when each frame begins, counted from the container's start.

    Frames without a time follow one another at `rate`. Where the clock jumps, because recordings
    were joined, the next frame follows at `rate`, too.
    """
    shift, previous = -float(start_of(container)), None
    for frame in frames:
        following = 0.0 if previous is None else previous + 1 / float(rate)
        seconds = following
        if frame.pts is not None:
            seconds = float(frame.pts * frame.time_base) + shift
        if previous is not None and clock_jumps(container, seconds - previous):
            shift += following - seconds
            seconds = following
        yield seconds, frame
        previous = seconds


@lru_cache(maxsize=64)
def clock_jump(path: str) -> float | None:
    """When the clock of a file jumps, in seconds from its start; None where it does not.

    Clocks jump where recordings were joined. Reads the whole file, if its format can be joined.
    """
    with open_video(path) as container:
        if not is_joinable(container):
            return None
        stream, previous = video_stream(container), None
        for packet in container.demux(stream):
            if packet.dts is None:
                continue
            seconds = float(packet.dts * stream.time_base - start_of(container))
            if previous is not None and clock_jumps(container, seconds - previous):
                return previous
            previous = seconds
    return None


def check_clock(path: str) -> None:
    """Raises ValueError where a time in a file can mean several places."""
    jump = clock_jump(path)
    if jump is not None:
        raise ValueError(
            f"its clock jumps after {jump:.2f} s, so nothing can be cut out of it by time: give it "
            f"one clock with ffmpeg -i {Path(path).name} -c copy {Path(path).stem}.mkv"
        )


@dataclass(frozen=True)
class VideoFile:
    """A video file, or the part of it that begins in `start` to `end`.

    start, end: seconds after the container's start, None for no cut.
    """

    path: str
    start: float | None = None
    end: float | None = None

    @property
    def is_cut(self) -> bool:
        return self.start is not None or self.end is not None

    @property
    def source(self) -> str:
        if not self.is_cut:
            return self.path
        return f"{self.path}#t={self.start or 0},{'' if self.end is None else self.end}"

    def frames(self) -> tuple[Fraction, TimedFrames]:
        if self.is_cut:
            check_clock(self.path)
        rate = self.rate()
        return rate, self._decode(open_video(self.path), rate)

    def rate(self) -> Fraction:
        """Frames per second of this part, from 1 to 240.

        The header states it, unless the times of the frames say otherwise.
        """
        with open_video(self.path) as container:
            rate = video_stream(container).average_rate or Fraction(0)
            times = []
            if not rate or not is_joinable(container):
                times = self._packet_times(container)
        if len(times) > 1:
            steps, span = len(times) - 1, max(times) - min(times)
            if not rate or abs(rate * span - steps) > max(1, RATE_TOLERANCE * steps):
                rate = steps / span if span else Fraction(0)
        rate = rate or Fraction(25)
        return min(max(rate, Fraction(1)), Fraction(240))

    def _packet_times(self, container: av.container.InputContainer) -> list[Fraction]:
        """When the frames of this part begin, in seconds of the container's clock.

        Nothing is decoded.
        """
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
        except (av.FFmpegError, IndexError):  # decoding raises the same error with its cause
            pass
        return times

    def _decode(self, container: av.container.InputContainer, rate: Fraction) -> TimedFrames:
        """The frames of this part. Raises ValueError where it breaks or there is none."""
        count, seconds = 0, 0.0
        try:
            with container:
                frames = upright(self._from_keyframe(container))
                for seconds, frame in with_seconds(container, frames, rate):
                    if self.is_cut and frame.pts is None:
                        raise ValueError("its frames carry no times, so no part can be cut out")
                    begin = seconds + TIME_EPS
                    if self.end is not None and begin >= self.end:
                        break
                    if self.start is None or begin >= self.start:
                        count += 1
                        yield seconds, frame
                else:
                    _check_duration(container, count, seconds)
        except (av.FFmpegError, IndexError) as error:
            place = f"breaks after {count} frames" if count else "no frame decodes"
            raise ValueError(f"{place}: {error}") from None
        if not count and self.is_cut and seconds:
            raise ValueError(
                f"no frame begins in this part of it; the last one begins at {seconds:.2f} s"
            )
        if not count:
            raise ValueError("holds no frame")

    def _from_keyframe(self, container: av.container.InputContainer) -> Iterator[av.VideoFrame]:
        """Decodes from a keyframe at or before the start of this part.

        A seek may land after the start, in open GOPs and in streams without an index. Then the
        search goes further back.
        """
        back, zero = 0, start_of(container)
        while self.start and back < self.start:
            stream = video_stream(container)
            target = zero + Fraction(self.start) - back
            container.seek(int(target / stream.time_base), stream=stream)
            frames = container.decode(stream)
            frame = next(frames, None)
            if frame is not None and self._is_before_start(frame, zero):
                yield frame
                yield from frames
                return
            back = 2 * back or 1
        with open_video(self.path) as container:
            yield from container.decode(video_stream(container))

    def _is_before_start(self, frame: av.VideoFrame, zero: Fraction) -> bool:
        if frame.pts is None:
            return True
        return float(frame.pts * frame.time_base - zero) + TIME_EPS <= self.start


def _check_duration(container: av.container.InputContainer, count: int, seconds: float) -> None:
    """Raises ValueError for a Matroska file that was cut short.

    It ends as a complete one does, but its header states a longer duration. count, seconds: the
    frames it has, and when the last one begins.
    """
    if not container.duration or "matroska" not in container.format.name:
        return
    stated = container.duration / av.time_base
    if 0 < seconds < min(stated - 1, 0.9 * stated):
        raise ValueError(f"breaks after {count} frames, at {seconds:.2f} of {stated:.2f} seconds")
