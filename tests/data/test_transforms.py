import io
from fractions import Fraction

import av
import cv2
import numpy as np
import pytest
from every_frame import every_frame

from flallm.config import Augment
from flallm.data.clips import Clip
from flallm.data.color import FrameConverter
from flallm.data.encode import EncodeOptions, encode
from flallm.data.transforms import decode, positions, random_crop
from flallm.data.video import VideoFile


@pytest.mark.parametrize(
    "name,options",
    [
        ("libx264", {"x264-params": "bframes=8:b-adapt=2:b-pyramid=normal:keyint=48"}),
        (
            "libx264",
            {"x264-params": "bframes=3:b-pyramid=strict:open-gop=1:keyint=10:min-keyint=5"},
        ),
        ("libx264", {"tune": "zerolatency"}),
        ("mpeg4", {"bf": "2", "g": "12"}),
        ("libx265", {"x265-params": "bframes=4:b-pyramid=1:open-gop=1:keyint=20:log-level=none"}),
        (
            "libvpx-vp9",
            {"deadline": "realtime", "cpu-used": "8", "auto-alt-ref": "1", "lag-in-frames": "10"},
        ),
    ],
)
def test_used_frames_are_every_fourth_frame_of_streams_that_others_encode(tmp_path, name, options):
    """Both the file and its shard give what decoding all frames in order gives, to the bit."""
    rng, path = np.random.default_rng(0), tmp_path / "clip.mp4"
    image = rng.integers(0, 255, (8, 8, 3), np.uint8).repeat(12, 0).repeat(12, 1)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(name, rate=Fraction(30000, 1001))
        stream.width, stream.height, stream.pix_fmt, stream.options = 96, 96, "yuv420p", options
        for i in range(50):  # some still, some moving
            container.mux(
                stream.encode(
                    av.VideoFrame.from_ndarray(np.roll(image, max(0, i - 20) * 2, i % 2), "rgb24")
                )
            )
        container.mux(stream.encode())
    shard, meta = encode(Clip("k", "train", "t", VideoFile(str(path))), EncodeOptions())
    assert meta["num_frames"] == 50
    for data in (path.read_bytes(), shard):
        with av.open(io.BytesIO(data)) as container:
            all_frames = [
                FrameConverter().to_rgb(frame, 48, 48) for frame in container.decode(video=0)
            ]
        for stride, longest in ((4, 300), (4, 24), (3, 300), (1, 300)):
            wanted = np.stack(all_frames)[positions(50, stride, longest)]
            assert np.array_equal(decode(data, 48, stride, longest, 50), wanted)
            assert np.array_equal(every_frame(data, 48, stride, longest), wanted)


def test_augmentation_in_one_step_is_squeezing_then_augmenting():
    y, x = np.mgrid[:260, :210]
    channels = [127 + 100 * np.sin(x / 17 + c) * np.cos(y / 23 - c) for c in range(3)]
    smooth = np.stack(channels, -1).astype(np.uint8)[None]
    squeezed = cv2.resize(smooth[0], (256, 256), interpolation=cv2.INTER_LINEAR)[None]
    for seed in range(20):
        direct, in_turn = np.empty((2, 1, 224, 224, 3), np.uint8)
        for frames, out in ((smooth, direct), (squeezed, in_turn)):
            random_crop(frames, 256, Augment(), np.random.default_rng(seed), out)
        # A shift by half a pixel makes it 1.4 and more.
        assert np.abs(direct.astype(int) - in_turn).mean() < 0.5


def test_augmentation_rotates_scales_and_shifts_as_far_and_as_often_as_its_options_say():
    y, x = np.mgrid[:72, :72]
    places = np.stack([3 * x, 3 * y, 0 * x], -1).astype(np.uint8)[None]
    seen = np.empty((1, 72, 72, 3), np.uint8)
    turned, scaled, shifted = [], [], []
    for seed in range(300):
        random_crop(places, 72, Augment(probability=0.2), np.random.default_rng(seed), seen)
        come_from = seen[0, :, :, :2] / 3  # where the pixel that is seen at a place was
        right, down = (come_from[36, 46] - come_from[36, 26]) / 20
        turned.append(np.degrees(np.arctan2(down, right)))
        scaled.append(1 / np.hypot(down, right) - 1)
        shifted.append(np.hypot(*(come_from[35:37, 35:37].mean((0, 1)) - 35.5)))
    for values, most in ((turned, 30), (scaled, 0.2)):
        assert -1.1 * most < min(values) < -0.7 * most and 0.7 * most < max(values) < 1.1 * most
        assert 0.1 < np.mean(np.abs(values) > 0.1 * most) < 0.3
    # 10 pixels of a frame of 256, in both directions, before a scale of 0.8.
    assert 2 < max(shifted) < 1.1 * 2**0.5 * 10 * 72 / 256 / 0.8
