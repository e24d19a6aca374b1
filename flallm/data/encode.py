"""Encodes clips as (mp4 bytes, the sample's JSON) in worker processes."""

from __future__ import annotations

import io
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
from av.video.frame import PictureType
from av.video.reformatter import ColorRange

from flallm.data.clips import Clip, Media
from flallm.data.color import BT601, FrameConverter, is_wide, range_of
from flallm.data.resample import ROUNDING, resample
from flallm.data.transforms import FRAME_STEP, NONREF_TAG, decode
from flallm.data.video import DECODE_ERRORS, VideoFile, open_video, video_stream, with_seconds
from flallm.data.worker_pool import TaskFailed, WorkerPool
from flallm.utils import UserError

TIMEOUT = 600  # seconds for one clip; a long one at 720p takes some


@dataclass(frozen=True)
class EncodeOptions:
    """How clips are encoded.

    short_side: pixels. A smaller source is not enlarged. Crops of 224 are taken from 256.
    fps: frames per second, or None to keep those of the source.
    crf: x264's quality. 22 leaves fingers sharp at these sizes (about 52 dB on rendered signing at
        720p); x264's own default is 23.
    gop: frames between keyframes. Nothing seeks inside a clip, so a long one costs little.
    per_shard: clips in a shard. 500 of about 100 kB make files that parallel file systems like.
    """

    short_side: int = 256
    fps: float | None = None
    crf: int = 22
    gop: int = 96
    per_shard: int = 500

    def __post_init__(self):
        for name, least in {"short_side": 2, "crf": 0, "gop": 1, "per_shard": 1}.items():
            if getattr(self, name) < least:
                raise UserError(f"--{name}: {getattr(self, name)} is less than {least}")
        if self.crf > 51:
            raise UserError(f"--crf: {self.crf} is over 51, x264's last")
        if self.fps is not None and not 0 < self.fps < math.inf:
            raise UserError(f"--fps: {self.fps} is not a number of frames a second")


def encode(clip: Clip, options: EncodeOptions) -> tuple[bytes, dict]:
    """The clip as (mp4 bytes, the sample's JSON).

    Raises one of DECODE_ERRORS for a clip that cannot be read.
    """
    video = _fitting_file(clip.media, options) or _encode_frames(clip.media, options)
    with open_video(video) as container:
        stream = video_stream(container)
        num_frames = sum(1 for _ in container.decode(stream))
        meta = {
            "key": clip.key,
            "text": clip.text,
            "gloss": clip.gloss,
            "signer": clip.signer,
            "num_frames": num_frames,
            "fps": round(float(stream.average_rate or 0), 3),
            "width": stream.width,
            "height": stream.height,
            "source": clip.media.source,
        }
    if not num_frames:
        raise ValueError("holds no frame")
    return video, {name: value for name, value in meta.items() if value is not None}


def encode_all(
    clips: Iterable[Clip], options: EncodeOptions, processes: int
) -> Iterator[tuple[bytes, dict] | str]:
    """For each clip, in order, the result of `encode` or the cause why it has none."""
    with WorkerPool(processes, "flallm.data.encode") as workers:
        pending: deque[Callable] = deque()
        for clip in clips:
            pending.append(workers.submit(_encode_or_cause, clip, options, timeout=TIMEOUT))
            if len(pending) > 16 * processes:  # bounds the memory of results
                yield _result(pending.popleft())
        while pending:
            yield _result(pending.popleft())


def _result(task: Callable) -> tuple[bytes, dict] | str:
    try:
        return task()
    except TaskFailed as cause:
        return f"cannot be decoded: {cause}"


def _encode_or_cause(clip: Clip, options: EncodeOptions) -> tuple[bytes, dict] | str:
    try:
        return encode(clip, options)
    except DECODE_ERRORS as error:
        return f"cannot be decoded: {error}"


def _fitting_file(media: Media, options: EncodeOptions) -> bytes | None:
    """The bytes of a file that is already what `_encode_frames` makes, else None."""
    if not isinstance(media, VideoFile) or media.is_cut:
        return None
    with open_video(media.path) as container:
        if "mp4" not in container.format.name or not _fits(container, options):
            return None
        has_tag = container.metadata.get(NONREF_TAG[0]) == NONREF_TAG[1]
    if has_tag and not _keeps_tag(media.path):
        return None
    if options.fps and not _has_rate(media, options.fps):
        return None
    return Path(media.path).read_bytes()


def _fits(container: av.container.InputContainer, options: EncodeOptions) -> bool:
    """Whether a file has one stream, H.264 of the right size, upright, in the colours of shards."""
    stream = video_stream(container)
    codec = stream.codec_context
    if len(container.streams) > 1 or codec.name != "h264" or codec.pix_fmt != "yuv420p":
        return False
    if min(stream.width, stream.height) > options.short_side:
        return False
    frame = next(container.decode(stream), None)
    if frame is None or frame.side_data.get("DISPLAYMATRIX"):
        return False
    return range_of(frame) == ColorRange.MPEG and not is_wide(frame)


def _has_rate(media: VideoFile, fps: float) -> bool:
    """Whether every frame of a file already begins where `resample` would put it."""
    with open_video(media.path) as container:
        frames = container.decode(video_stream(container))
        times = [seconds for seconds, _ in with_seconds(container, frames, Fraction(fps))]
    errors = [abs(seconds - times[0] - i / fps) for i, seconds in enumerate(times)]
    return max(errors, default=0) <= ROUNDING


def _keeps_tag(path: str) -> bool:
    """Whether a file is as NONREF_TAG says. Tools that encode anew may copy the tag."""
    with open_video(path) as container:
        frames = sum(1 for _ in container.decode(video_stream(container)))
    try:
        return len(decode(path, 16, FRAME_STEP, frames, frames)) > 0
    except ValueError:
        return False


def _encode_frames(media: Media, options: EncodeOptions) -> bytes:
    rate, timed_frames = media.frames()
    if options.fps:
        rate, frames = Fraction(options.fps), resample(timed_frames, options.fps)
    else:
        frames = (frame for _, frame in timed_frames)
    rate = rate.limit_denominator(1001)
    output, converter, stream = io.BytesIO(), FrameConverter(), None
    with av.open(output, "w", format="mp4") as container:
        container.metadata[NONREF_TAG[0]] = NONREF_TAG[1]
        for i, frame in enumerate(frames):
            if stream is None:
                stream = _add_stream(container, frame, rate, options)
            frame = converter.to_shard_yuv(frame, stream.width, stream.height)
            frame.pts, frame.time_base = i, 1 / rate
            frame.pict_type = PictureType.NONE  # else the encoder takes the source's
            container.mux(stream.encode(frame))
        if stream is None:
            raise ValueError("holds no frame")
        container.mux(stream.encode())
    return output.getvalue()


def _add_stream(
    container: av.container.OutputContainer,
    frame: av.VideoFrame,
    rate: Fraction,
    options: EncodeOptions,
) -> av.VideoStream:
    """The stream of a clip whose first frame is `frame`."""
    stream = container.add_stream("libx264", rate=rate)
    scale = min(1.0, options.short_side / min(frame.width, frame.height))
    stream.width = max(2, 2 * round(frame.width * scale / 2))
    stream.height = max(2, 2 * round(frame.height * scale / 2))
    stream.pix_fmt = "yuv420p"
    stream.codec_context.colorspace = BT601[1]
    stream.codec_context.color_range = ColorRange.MPEG
    stream.thread_count = 1  # other cores encode other clips; the bytes depend on the number
    # Every 4th frame is a reference frame and the three between are not, so a reader of T/4 frames
    # (the paper's sub-sampling) can skip them without decoding.
    # With trellis, saturated colours of small patches are at most 4 levels off instead of 9, at the
    # same size and speed.
    # Without mbtree, because its AVX-512 code gives other bytes from run to run below 256 pixels
    # (measured, x264 in PyAV 18.1).
    x264 = [
        f"keyint={options.gop}",
        "scenecut=0",
        f"bframes={FRAME_STEP - 1}",
        "b-adapt=0",
        "b-pyramid=none",
        "ref=1",
        "mbtree=0",
        "trellis=1",
    ]
    stream.options = {
        "preset": "veryfast",
        "crf": str(options.crf),
        "x264-params": ":".join(x264),
    }
    return stream
