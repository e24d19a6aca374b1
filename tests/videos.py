"""Files of video and images for tests."""

import struct
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np


def images(folder: Path, count: int = 5, name: str = "images{:04d}.png") -> None:
    folder.mkdir(parents=True)
    for i in range(count):
        cv2.imwrite(str(folder / name.format(i + 1)), np.full((260, 210, 3), 10 * i, np.uint8))


def sidecars(folder: Path) -> None:
    """What macOS leaves beside every file of a folder on a disk that is not its own."""
    for path in list(folder.iterdir()):
        (folder / f"._{path.name}").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X".ljust(4096, b"\0"))
    (folder / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")


def numbered(
    path: Path,
    fps,
    count: int,
    x264: str = "keyint=100:bframes=3:scenecut=0",
    start: int = 0,
    first: int = 0,
) -> Path:
    """A video whose frame i shows first + i as eight bright or dark columns."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.options = {"preset": "veryfast", "crf": "1", "x264-params": x264}
        for i in range(count):
            bits = [255 * (first + i >> bit & 1) for bit in range(8)]
            columns = np.repeat(bits, 8).astype(np.uint8)
            image = np.broadcast_to(columns[:, None], (48, 64, 3)).copy()
            frame = av.VideoFrame.from_ndarray(image, "rgb24")
            frame.pts, frame.time_base = i + start, 1 / Fraction(fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def numbers(media) -> list[int]:
    """The numbers that the frames of a `numbered` video show."""
    shown = []
    for _, frame in media.frames()[1]:
        columns = frame.to_ndarray(format="gray")[24, 4::8] > 128
        shown.append(sum(1 << bit for bit in range(8) if columns[bit]))
    return shown


def set_display_matrix(path: Path, matrix: tuple[int, int, int, int]) -> None:
    """Writes (a, b, c, d) into the header of an MP4's first track."""
    data, (a, b, c, d) = bytearray(path.read_bytes()), matrix
    at = data.index(b"tkhd") + 4 + 40
    data[at : at + 36] = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
