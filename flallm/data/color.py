"""Colours: converts a frame of any video to RGB, or to the YUV of shards, by the same rules."""

from __future__ import annotations

import av
import numpy as np
from av.video.reformatter import (
    ColorPrimaries,
    ColorRange,
    Colorspace,
    ColorTrc,
    Interpolation,
    VideoReformatter,
)

# Matrices by their number in ITU-T H.273, as FFmpeg's AVColorSpace has them.
RGB = 0
UNSPECIFIED = (2, 3)
BT601 = (5, 6)  # two names of one matrix
# The matrices that swscale converts: BT.709, FCC, BT.601, SMPTE 240M, BT.2020.
CONVERTED = (1, 4, *BT601, 7, 9)
GREY = ("gray", "ya8", "ya16")  # beginnings of pixel formats
HDR_TRANSFERS = (ColorTrc.SMPTE2084, ColorTrc.ARIB_STD_B67)  # PQ and HLG


def matrix_of(frame: av.VideoFrame) -> int:
    """The frame's matrix: the one it states, else the one that players assume for its size.

    Raises ValueError for a matrix that FFmpeg's scaler does not convert.
    """
    if frame.format.is_rgb:
        return RGB
    if frame.colorspace in (RGB, *UNSPECIFIED):  # a YUV frame cannot have RGB's
        high_definition = frame.width >= 1280 or frame.height > 576
        return Colorspace.ITU709 if high_definition else Colorspace.ITU601
    if frame.colorspace not in CONVERTED:
        number = int(frame.colorspace)
        raise ValueError(f"its colour matrix (number {number} of ITU-T H.273) is not supported")
    return frame.colorspace


def range_of(frame: av.VideoFrame) -> int:
    """The range of the frame's values: the one it states, else limited for YUV.

    RGB and grey images have full range; the scaler takes grey for nothing else.
    Raises ValueError for grey of limited range.
    """
    if frame.format.name.startswith(GREY) and frame.color_range == ColorRange.MPEG:
        raise ValueError("its grey values have limited range, which is not supported")
    if frame.format.is_rgb or frame.format.name.startswith(("yuvj", *GREY)):
        return ColorRange.JPEG
    return frame.color_range or ColorRange.MPEG


def is_wide(frame: av.VideoFrame) -> bool:
    """Whether the frame is HDR (PQ or HLG) or has the colours of BT.2020."""
    return frame.color_trc in HDR_TRANSFERS or frame.color_primaries == ColorPrimaries.BT2020


def is_shard_yuv(frame: av.VideoFrame) -> bool:
    """Whether the frame's colours are coded as in shards: YUV of BT.601 in limited range."""
    return matrix_of(frame) in BT601 and range_of(frame) == ColorRange.MPEG and not is_wide(frame)


class FrameConverter:
    """Scales the frames of one video and converts their colours.

    HDR and BT.2020 are mapped to standard dynamic range and BT.709's colours: 203 cd/m², the
    reference white of ITU-R BT.2408, becomes white, and what is brighter is clipped to white.
    One object serves all frames of a video, because scalers keep their tables.
    """

    def __init__(self):
        self.rgb_scaler = VideoReformatter()
        self.yuv_scaler = VideoReformatter()

    def to_rgb(self, frame: av.VideoFrame, width: int, height: int) -> np.ndarray:
        """The frame as (height, width, 3) uint8."""
        return self._rgb(frame, width, height, Interpolation.BILINEAR).to_ndarray()

    def to_shard_yuv(self, frame: av.VideoFrame, width: int, height: int) -> av.VideoFrame:
        """The frame as `yuv420p` of BT.601 in limited range.

        Other matrices and ranges go through RGB: swscale's direct way between two kinds of YUV is
        less exact.
        """
        if matrix_of(frame) != RGB and not is_shard_yuv(frame):
            frame = self._rgb(frame, width, height, Interpolation.AREA)
        return self.yuv_scaler.reformat(
            frame,
            width,
            height,
            "yuv420p",
            src_colorspace=matrix_of(frame),
            dst_colorspace=Colorspace.ITU601,
            src_color_range=range_of(frame),
            dst_color_range=ColorRange.MPEG,
            interpolation=Interpolation.AREA,
            threads=1,
        )

    def _rgb(
        self, frame: av.VideoFrame, width: int, height: int, interpolation: Interpolation
    ) -> av.VideoFrame:
        wide = is_wide(frame)
        return self.rgb_scaler.reformat(
            frame,
            width,
            height,
            "rgb24",
            src_colorspace=matrix_of(frame),
            dst_colorspace=RGB,
            src_color_range=range_of(frame),
            dst_color_range=ColorRange.JPEG,
            dst_color_trc=ColorTrc.BT709 if wide else None,
            dst_color_primaries=ColorPrimaries.BT709 if wide else None,
            interpolation=interpolation,
            threads=1,  # the other cores decode other clips
        )
