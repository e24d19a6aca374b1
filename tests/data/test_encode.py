import io
from fractions import Fraction

import av
import numpy as np
import pytest
from every_frame import every_frame

from flallm.data.clips import Clip
from flallm.data.corpora import synthetic
from flallm.data.encode import EncodeOptions, encode
from flallm.data.transforms import centre_crop, decode, positions
from flallm.data.video import VideoFile


class Images:
    """A video of RGB images (H, W, 3)."""

    source = "test"

    def __init__(self, images: list[np.ndarray]):
        self.images = images

    def frames(self):
        return Fraction(25), (
            (i / 25, av.VideoFrame.from_ndarray(image, "rgb24"))
            for i, image in enumerate(self.images)
        )


def test_a_model_sees_red_green_and_blue_in_this_order_and_the_middle_of_the_frame():
    image = np.zeros((48, 64, 3), np.uint8)
    image[:, :, 1] = 255  # green around, 8 wide; inside red at the left and blue at the right
    image[8:-8, 8:32], image[8:-8, 32:-8] = (255, 0, 0), (0, 0, 255)
    data, meta = encode(Clip("k", "train", "t", Images([image])), EncodeOptions())
    frames = decode(data, 48, 4, 300, meta["num_frames"])
    (squeezed,), (middle,) = frames, centre_crop(frames, 30)  # 8 of 64 columns are 6 of 48
    assert squeezed.shape == (48, 48, 3) and middle.shape == (30, 30, 3)
    for part, colour in (
        (squeezed[:6, :4], 1),
        (squeezed[-6:, -4:], 1),
        (middle[:, :13], 0),
        (middle[:, -13:], 2),
    ):
        assert (part.argmax(-1) == colour).all() and part[..., colour].min() > 150


@pytest.mark.parametrize("frames", [1, 2, 4, 5, 38, 97, 200])
def test_reference_frames_are_every_fourth_frame(frames):
    """Skipping the other frames gives the same pixels as decoding all and keeping every 4th."""
    image = (
        np.random.default_rng(frames)
        .integers(0, 255, (4, 4, 3), np.uint8)
        .repeat(16, 0)
        .repeat(16, 1)
    )
    data, meta = encode(
        Clip("k", "train", "t", Images([np.roll(image, i, 1) for i in range(frames)])),
        EncodeOptions(),
    )
    assert meta["num_frames"] == frames
    assert np.array_equal(decode(data, 48, 4, 300, frames), every_frame(data, 48, 4, 300))


def test_a_fitting_file_is_copied_and_a_large_one_made_smaller(tmp_path):
    *_, clip = synthetic.clips(train=3, dev=0, test=0, size=64)  # five signs: nearly three seconds
    data, _ = encode(clip, EncodeOptions())
    path = tmp_path / "clip.mp4"
    path.write_bytes(data)
    assert encode(Clip("k", "train", "t", VideoFile(str(path))), EncodeOptions())[0] == data
    _, meta = encode(
        Clip("k", "train", "t", VideoFile(str(path))), EncodeOptions(short_side=32, fps=12.5)
    )
    assert (meta["width"], meta["height"], meta["fps"]) == (32, 32, 12.5)
    for option, value in (("short_side", 32), ("fps", 12.5)):  # one alone is enough
        _, meta = encode(
            Clip("k", "train", "t", VideoFile(str(path))), EncodeOptions(**{option: value})
        )
        assert meta[{"short_side": "height"}.get(option, option)] == value
    _part, meta = encode(Clip("k", "train", "t", VideoFile(str(path), 0.4, 0.8)), EncodeOptions())
    assert meta["num_frames"] == 10


def test_quality_and_keyframes_are_those_of_the_options():
    *_, clip = synthetic.clips(train=3, dev=0, test=0, size=64)
    sizes = [len(encode(clip, EncodeOptions(crf=crf))[0]) for crf in (12, 22, 32)]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 1.5 * sizes[2]
    with av.open(io.BytesIO(encode(clip, EncodeOptions(gop=8))[0])) as container:
        keyframes = [i for i, frame in enumerate(container.decode(video=0)) if frame.key_frame]
    assert keyframes == list(range(0, 8 * len(keyframes), 8)) and len(keyframes) > 4


def test_a_clip_of_shards_that_other_tools_wrote_anew_is_encoded_again(tmp_path):
    """They keep its mark, which promises a loader that it may pass over frames."""
    *_, clip = synthetic.clips(train=3, dev=0, test=0, size=64)
    (tmp_path / "ours.mp4").write_bytes(encode(clip, EncodeOptions())[0])
    path = tmp_path / "theirs.mp4"
    with av.open(str(tmp_path / "ours.mp4")) as ours, av.open(str(path), "w") as theirs:
        theirs.metadata.update(ours.metadata)
        stream = theirs.add_stream("libx264", 25, width=64, height=64, pix_fmt="yuv420p")
        frames = list(ours.decode(video=0))
        for frame in frames:
            frame.pict_type = 0
            theirs.mux(stream.encode(frame))
        theirs.mux(stream.encode())
    with pytest.raises(ValueError, match="frames decode"):
        decode(str(path), 48, 4, 300, len(frames))
    data, meta = encode(Clip("k", "train", "t", VideoFile(str(path))), EncodeOptions())
    assert len(decode(data, 48, 4, 300, meta["num_frames"])) == -(-len(frames) // 4)


def test_positions_keep_every_fourth_frame_and_thin_out_long_clips():
    assert positions(10, 4, 300).tolist() == [0, 4, 8]
    long = positions(2000, 4, 300)
    assert len(long) == 75 and long[0] == 0 and long[-1] == 1996 and (np.diff(long) > 0).all()
