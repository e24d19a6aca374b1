import os
import struct
import zlib
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from videos import numbered, numbers, set_display_matrix

from flallm.data.images import ImageFiles
from flallm.data.video import VideoFile


def test_images_of_one_number_have_one_order(tmp_path):
    for i, name in enumerate(("2.png", "01.png", "1.png")):
        _, png = cv2.imencode(".png", np.full((16, 16), 100 * i, np.uint8))
        (tmp_path / name).write_bytes(png.tobytes())
    _, frames = ImageFiles(str(tmp_path)).frames()
    greys = [frame.to_ndarray(format="gray").mean().round(-1) for _, frame in frames]
    assert greys == [100, 200, 0]


@pytest.mark.parametrize(
    "name,fps,x264",
    [
        ("long.mp4", 24, "keyint=100:bframes=3:b-pyramid=normal:scenecut=0"),
        (
            "open.mp4",
            30,
            "keyint=48:bframes=8:b-adapt=0:open-gop=1:scenecut=0",
        ),  # here seeking lands behind frames of the cut
        (
            "ntsc.ts",
            Fraction(30000, 1001),
            "keyint=48:bframes=3:open-gop=1:scenecut=0",
        ),  # no index, and times that begin at 0.07
        ("milli.mkv", 24, "keyint=48:bframes=3:scenecut=0"),  # times in milliseconds
    ],
)
def test_a_cut_is_exact_to_the_frame(tmp_path, name, fps, x264):
    path = str(numbered(tmp_path / name, fps, 130, x264))
    assert numbers(VideoFile(path)) == list(range(130))
    for first in (0, 1, 45, 46, 47, 48, 49, 94, 95, 96, 99, 100, 101, 129):
        start, end = (round(float(i / Fraction(fps)), 3) for i in (first, first + 3))
        assert numbers(VideoFile(path, start, end)) == list(range(first, min(first + 3, 130))), (
            first
        )
    with pytest.raises(ValueError, match="no frame begins in this part"):
        numbers(VideoFile(path, 60, 61))


def test_a_cut_does_not_decode_what_lies_before_its_keyframe(tmp_path):
    path = numbered(tmp_path / "a.mp4", 24, 130, "keyint=24:bframes=3:scenecut=0")
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        for packet in container.demux(video=0):
            if packet.pts is not None and packet.pts * packet.time_base < 3.9:
                data[packet.pos : packet.pos + packet.size] = b"\xff" * packet.size
    path.write_bytes(data)
    assert numbers(VideoFile(str(path), 4.5, 4.625)) == [108, 109, 110]
    with pytest.raises(ValueError, match="no frame decodes"):
        numbers(VideoFile(str(path)))


@pytest.mark.parametrize(
    "matrix",
    [
        (1, 0, 0, 1),
        (0, 1, -1, 0),
        (-1, 0, 0, -1),
        (0, -1, 1, 0),
        (-1, 0, 0, 1),
        (1, 0, 0, -1),
        (0, 1, 1, 0),
        (0, -1, -1, 0),
    ],
)
def test_frames_come_out_upright(tmp_path, matrix):
    """A video that is stored turned or mirrored is shown as its display matrix says."""
    path, picture = tmp_path / "turned.mp4", np.zeros((48, 64, 3), np.uint8)
    picture[:24, :32] = 255
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=24)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        container.mux(
            [*stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")), *stream.encode()]
        )
    set_display_matrix(path, matrix)
    a, b, c, d = matrix
    ((_, frame),) = VideoFile(str(path)).frames()[1]
    seen = frame.to_ndarray(format="gray")
    assert seen.shape == ((48, 64) if a else (64, 48)) and not frame.rotation
    right, below = -a - c > 0, -b - d > 0  # where the corner above and left of the middle goes
    half = np.array_split(seen, 2)[below]
    corner = np.array_split(half, 2, axis=1)[right]
    assert corner.mean() > 200 and seen.mean() < 90


def test_videos_with_odd_rates(tmp_path):
    single = VideoFile(str(numbered(tmp_path / "single.mp4", 24, 1)))
    assert single.rate() == 24 and numbers(single) == [0]
    raw = str(numbered(tmp_path / "raw.h264", 24, 9))  # frames without times
    assert numbers(VideoFile(raw)) == list(range(9))
    with pytest.raises(ValueError, match="carry no times"):
        numbers(VideoFile(raw, 0, 0.2))


def with_header_first(path: Path, out: Path) -> Path:
    """Copies an MP4 with its header in front, so that a part of it can be opened."""
    options = {"movflags": "faststart"}
    with av.open(str(path)) as source, av.open(str(out), "w", options=options) as container:
        stream = container.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                container.mux(packet)
    return out


def test_a_video_that_is_cut_short_is_an_error(tmp_path):
    for name in ("a.mp4", "a.mkv"):
        path = numbered(tmp_path / name, 24, 200)
        if name == "a.mp4":
            path = with_header_first(path, tmp_path / "fast.mp4")
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
        with pytest.raises(ValueError, match=r"breaks after \d\d+ frames"):
            numbers(VideoFile(str(path)))


def test_only_the_file_itself_is_opened(tmp_path):
    """A script that names other files is no video, and no header can ask for all of the memory."""
    numbered(tmp_path / "other.ts", 24, 5)
    (tmp_path / "clip.mp4").write_text("ffconcat version 1.0\nfile other.ts\n")
    with pytest.raises((ValueError, av.FFmpegError)):
        numbers(VideoFile(str(tmp_path / "clip.mp4")))

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    for width, height in ((100_000, 100_000), (9000, 9000)):
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        (tmp_path / "huge.png").write_bytes(
            b"\x89PNG\r\n\x1a\n"
            + header
            + chunk(b"IDAT", zlib.compress(b"\0" * 999))
            + chunk(b"IEND", b"")
        )
        with pytest.raises(ValueError, match=r"huge\.png is no image"):
            list(ImageFiles(str(tmp_path), ("huge.png",)).frames()[1])


ODD = Path(
    os.environ.get("FLALLM_ODD_VIDEOS", Path(__file__).parents[3] / "shared/data/odd-videos")
)


ODD_FRAMES = {
    "decord_corrupted.mp4": "breaks after 28 frames",
    "exo_invalid-bitstream.webm": "no frame decodes",
    "exo_sample_av1.mp4": (30, 1080, 720, 29.97),
    "exo_sample.mkv": (30, 1080, 720, 29.99),
    "exo_sample_android_slow_motion.mp4": (7, 1280, 720, 13.32),
    "exo_sample_fragmented.mp4": (30, 1080, 720, 29.97),
    "exo_bear-vp9-odd-dimensions.webm": (30, 161, 121, 29.97),
    "exo_sample_h265.ts": (30, 854, 480, 30),
    "exo_video_desks.3gp": (71, 352, 288, 14.14),
    "decord_video_90.mov": (3, 320, 568, 30),
}


@pytest.mark.skipif(not ODD.is_dir(), reason="the folder of odd videos is not there")
@pytest.mark.parametrize("name", ODD_FRAMES)
def test_odd_videos(name):
    """Real files that break naive readers give all of their frames, or say why not."""
    rate, frames = VideoFile(str(ODD / name)).frames()
    if isinstance(ODD_FRAMES[name], str):
        with pytest.raises(ValueError, match=ODD_FRAMES[name]):
            list(frames)
    else:
        frames = [frame for _, frame in frames]
        assert (
            len(frames),
            frames[0].width,
            frames[0].height,
            round(float(rate), 2),
        ) == ODD_FRAMES[name]
