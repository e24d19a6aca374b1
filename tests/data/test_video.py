"""Models see what files show: colours, times and rates, from shards and in `translate`."""

import io
import json
import shutil
from fractions import Fraction
from itertools import product
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter
from videos import numbers, set_display_matrix

from flallm import config as cfg
from flallm.data.clips import Clip
from flallm.data.color import FrameConverter
from flallm.data.encode import EncodeOptions, encode
from flallm.data.images import ImageFiles
from flallm.data.reader import Shards
from flallm.data.transforms import decode
from flallm.data.video import VideoFile
from flallm.inference import translate

GREYS = [(17 * i,) * 3 for i in range(16)]
PATCHES = [
    *((0, 0, 0), (255, 255, 255), (128, 128, 128), (200, 30, 30)),
    *((30, 180, 40), (40, 40, 200), (220, 170, 140), (90, 60, 45)),  # the last two are skin
]
MATRICES = {"601": 6, "709": 1, "unspecified": 2}  # FFmpeg's AVColorSpace
SIZES = {"standard": (256, 128), "high": (1280, 720)}


def columns(colours, width: int, height: int) -> np.ndarray:
    """An image (height, width, 3) of one column a colour."""
    return np.tile(np.repeat(np.array(colours, np.uint8), width // len(colours), 0), (height, 1, 1))


def centres(image: np.ndarray, count: int) -> np.ndarray:
    """The colours (count, 3) in the middle of each column."""
    height, width = image.shape[:2]
    at = (2 * np.arange(count) + 1) * width // (2 * count)
    return image[height // 2, at].astype(int)


def write_patches(
    path: Path, size: tuple[int, int], pixel_format: str, matrix: str, color_range: int
) -> str:
    """A video of `PATCHES` with these tags; where it has none, coded as players will assume."""
    width, height = size
    assumed = Colorspace.ITU709 if width >= 1280 else Colorspace.ITU601
    coded = {"601": Colorspace.ITU601, "709": Colorspace.ITU709}.get(matrix, assumed)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "4"})
        stream.width, stream.height, stream.pix_fmt = width, height, pixel_format
        stream.codec_context.colorspace = MATRICES[matrix]
        stream.codec_context.color_range = color_range
        picture = av.VideoFrame.from_ndarray(columns(PATCHES, width, height), "rgb24")
        frame = VideoReformatter().reformat(
            picture,
            format=pixel_format,
            dst_colorspace=coded,
            src_color_range=ColorRange.JPEG,
            dst_color_range=color_range or ColorRange.MPEG,
        )
        frame.pts, frame.time_base = 0, Fraction(1, 25)
        container.mux([*stream.encode(frame), *stream.encode()])
    return str(path)


def from_shard(media, size: int = 128) -> np.ndarray:
    """The first frame of a clip as training reads it (size, size, 3), from the bytes of a shard."""
    content, meta = encode(Clip("k", "train", "t", media), EncodeOptions())
    return decode(content, size, 4, 300, meta["num_frames"])[0]


def from_translate(path: str, size: int = 128) -> np.ndarray:
    """The first frame of a file as `flallm translate` reads it."""
    data = cfg.Data(resize=size, crop=size)
    ((_, frames),) = translate._clips(path, None, 0.0, cfg.Config(data=data))
    return frames[0]


@pytest.mark.parametrize(
    "extension,quality", [("png", []), ("jpg", [cv2.IMWRITE_JPEG_QUALITY, 98])]
)
def test_training_sees_the_greys_of_a_folder_of_images(tmp_path, extension, quality):
    cv2.imwrite(str(tmp_path / f"0.{extension}"), columns(GREYS, 256, 256), quality)
    seen = centres(from_shard(ImageFiles(str(tmp_path)), 256), 16)
    assert np.abs(seen - GREYS).max() <= 2


@pytest.mark.parametrize("pixel_format", ["yuv420p", "yuv422p", "yuv444p", "yuv420p10le"])
@pytest.mark.parametrize("size", SIZES)
def test_shards_and_translate_show_the_colours_of_the_source(tmp_path, size, pixel_format):
    ranges = (ColorRange.UNSPECIFIED, ColorRange.MPEG, ColorRange.JPEG)
    for matrix, color_range in product(MATRICES, ranges):
        path = write_patches(tmp_path / "a.mkv", SIZES[size], pixel_format, matrix, color_range)
        translated = centres(from_translate(path), 8)
        trained = centres(from_shard(VideoFile(path)), 8)
        case = (matrix, color_range)
        assert np.abs(translated - PATCHES).max() <= 4, case
        assert np.abs(trained - PATCHES).max() <= 6, case  # coded twice
        assert np.abs(trained - translated).max() <= 4, case


def test_a_shard_states_its_matrix_and_range(tmp_path):
    path = write_patches(tmp_path / "a.mkv", SIZES["high"], "yuv420p", "709", ColorRange.JPEG)
    content, _ = encode(Clip("k", "train", "t", VideoFile(path)), EncodeOptions())
    with av.open(io.BytesIO(content)) as container:
        frame = next(container.decode(video=0))
    stated = frame.format.name, frame.colorspace, frame.color_range
    assert stated == ("yuv420p", MATRICES["601"], ColorRange.MPEG)


@pytest.mark.parametrize("matrix,color_range", [("601", ColorRange.MPEG), ("709", ColorRange.JPEG)])
def test_turned_frames_keep_their_colours(tmp_path, matrix, color_range):
    path = Path(write_patches(tmp_path / "a.mp4", (256, 128), "yuv420p", matrix, color_range))
    ((_, straight),) = VideoFile(str(path)).frames()[1]
    expected = FrameConverter().to_rgb(straight, 256, 128)
    set_display_matrix(path, (0, 1, -1, 0))  # a quarter turn
    ((_, turned),) = VideoFile(str(path)).frames()[1]
    seen = FrameConverter().to_rgb(turned, 128, 256)
    assert np.abs(seen.astype(int) - np.rot90(expected, -1)).max() <= 2


def wide_frame(transfer: int, signal: float) -> av.VideoFrame:
    """A grey frame of BT.2020 in ten bits, whose luma is `signal` from 0 to 1."""
    frame = av.VideoFrame(64, 64, "yuv420p10le")
    for plane, value in zip(frame.planes, (round(64 + 876 * signal), 512, 512)):
        plane.update(np.full(plane.buffer_size // 2, value, np.uint16).tobytes())
    frame.colorspace, frame.color_range = 9, ColorRange.MPEG
    frame.color_trc, frame.color_primaries = transfer, 9
    return frame


@pytest.mark.parametrize("transfer,reference_white", [(16, 0.5807), (18, 0.75)], ids=["PQ", "HLG"])
def test_hdr_is_mapped_so_that_reference_white_is_white(transfer, reference_white):
    """203 cd/m² are 58 % of PQ's signal and 75 % of HLG's (ITU-R BT.2408, table 1)."""
    converter = FrameConverter()
    signals = (0.0, 0.3 * reference_white, 0.9 * reference_white, reference_white, 1.0)
    black, dark, bright, white, highlight = (
        int(converter.to_rgb(wide_frame(transfer, signal), 8, 8).mean()) for signal in signals
    )
    assert black == 0 and 0 < dark < bright < 250 and white >= 250 and highlight >= 250
    yuv = converter.to_shard_yuv(wide_frame(transfer, reference_white), 64, 64)
    assert converter.to_rgb(yuv, 8, 8).mean() >= 250


def write_numbered(
    path: Path, times: list[Fraction], rate: int = 25, sound: float | None = None, first: int = 0
) -> str:
    """A video whose frame i shows i as eight columns and begins at times[i].

    sound: when its sound begins, in seconds.
    """
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "4", "bf": "0"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 90000)
        audio = container.add_stream("aac", rate=16000) if sound is not None else None
        if audio:
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), "fltp", "mono")
            silence.rate, silence.pts, silence.time_base = (
                16000,
                round(16000 * sound),
                Fraction(1, 16000),
            )
            container.mux([*audio.encode(silence), *audio.encode()])
        for i, time in enumerate(times):
            bits = [255 * (first + i >> bit & 1) for bit in range(8)]
            image = columns([(value,) * 3 for value in bits], 64, 48)
            frame = av.VideoFrame.from_ndarray(image, "rgb24")
            frame.pts, frame.time_base = round(time * 90000), Fraction(1, 90000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return str(path)


@pytest.mark.parametrize("extension", ["mp4", "ts", "mkv"])
@pytest.mark.parametrize("delay", [Fraction(6, 10), Fraction(2)])
def test_cuts_count_from_the_start_of_the_container_where_sound_begins_first(
    tmp_path, extension, delay
):
    times = [delay + Fraction(i, 25) for i in range(120)]
    path = write_numbered(tmp_path / f"a.{extension}", times, sound=0.0)
    with av.open(
        path
    ) as container:  # a transport stream begins with the 64 ms that AAC's encoder adds
        zero = Fraction(container.start_time, av.time_base)
        frames = [frame.pts * frame.time_base - zero for frame in container.decode(video=0)]
    assert abs(frames[0] - delay) < 0.07
    expected = [i for i, seconds in enumerate(frames) if 4.0 - 5e-4 <= seconds < 4.2 - 5e-4]
    assert numbers(VideoFile(path, 4.0, 4.2)) == expected
    assert numbers(VideoFile(path)) == list(range(120))
    data = cfg.Data(resize=64, crop=64, stride=1)
    spans = list(translate._clips(path, [(4.0, 4.2)], 0.0, cfg.Config(data=data)))
    assert [(span.start, span.end, len(frames)) for span, frames in spans] == [(4.0, 4.2, 5)]
    spans = [span for span, _ in translate._clips(path, None, 0.5, cfg.Config(data=data))]
    assert spans[0].start == float(delay // Fraction(1, 2) / 2)  # the first stretch with a picture
    assert spans[-1].end == pytest.approx(float(times[-1]) + 0.04, abs=0.07)


def shown(frames) -> list[int]:
    """The numbers that frames (N, H, W, 3) show."""
    bits = frames[:, 24, 4::8, 0] > 128
    return [int(sum(1 << b for b in range(8) if row[b])) for row in bits]


@pytest.mark.parametrize("fps", [10, 20, 25, 60])
def test_a_frame_of_a_resampled_clip_is_the_one_on_screen_at_its_time(tmp_path, fps):
    times = [Fraction(i, 10) for i in range(20)] + [2 + Fraction(i, 30) for i in range(60)]
    path = write_numbered(tmp_path / "vfr.mp4", times)
    content, meta = encode(Clip("k", "train", "t", VideoFile(path)), EncodeOptions(fps=fps))
    trained = decode(content, 64, 1, 1000, meta["num_frames"], squeeze=False)
    on_screen = [
        sum(time <= Fraction(k, fps) for time in times) - 1 for k in range(meta["num_frames"])
    ]
    assert shown(trained) == on_screen
    assert meta["num_frames"] == 4 * fps and meta["fps"] == fps
    whole, meta = encode(Clip("k", "train", "t", VideoFile(path)), EncodeOptions())
    assert shown(decode(whole, 64, 1, 1000, meta["num_frames"], squeeze=False)) == list(range(80))
    data = cfg.Data(resize=64, crop=64, stride=1, fps=fps)
    ((_, translated),) = translate._clips(path, None, 0.0, cfg.Config(data=data))
    assert len(translated) == len(trained)


def test_a_file_whose_header_states_another_rate_is_resampled_by_its_frames_times(tmp_path):
    path = write_numbered(tmp_path / "a.mkv", [Fraction(i, 10) for i in range(30)], rate=25)
    assert VideoFile(path).rate() == 10
    assert (
        encode(Clip("k", "train", "t", VideoFile(path)), EncodeOptions(fps=20))[1]["num_frames"]
        == 60
    )
    assert encode(Clip("k", "train", "t", VideoFile(path)), EncodeOptions())[1]["fps"] == 10


def test_a_fitting_file_of_uneven_times_is_resampled_and_not_copied(tmp_path):
    times = [Fraction(i, 25) for i in range(12)] + [Fraction(12 + 2 * i, 25) for i in range(12)]
    path = write_numbered(tmp_path / "a.mp4", times, rate=25)
    _, meta = encode(Clip("k", "train", "t", VideoFile(path)), EncodeOptions(fps=25))
    assert meta["num_frames"] == 36


def write_cover(path: Path, with_video: bool) -> str:
    """A file whose first video stream is a cover picture."""
    _, jpeg = cv2.imencode(".jpg", np.full((48, 64, 3), 200, np.uint8))
    with av.open(str(path), "w") as container:
        cover = container.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 64, 48, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        audio = container.add_stream("aac", rate=16000)
        stream = container.add_stream("libx264", rate=25) if with_video else None
        if stream:
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        packet = av.Packet(jpeg.tobytes())
        packet.stream, packet.pts, packet.dts, packet.time_base = cover, 0, 0, Fraction(1, 90000)
        packet.is_keyframe = True
        container.mux(packet)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), "fltp", "mono")
        silence.rate, silence.pts, silence.time_base = 16000, 0, Fraction(1, 16000)
        container.mux([*audio.encode(silence), *audio.encode()])
        for i in range(10 if stream else 0):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 10 * i, np.uint8), "rgb24")
            frame.pts, frame.time_base = i, Fraction(1, 25)
            container.mux(stream.encode(frame))
        if stream:
            container.mux(stream.encode())
    return str(path)


def test_a_cover_picture_is_no_video(tmp_path):
    with pytest.raises(ValueError, match="holds no video stream"):
        VideoFile(write_cover(tmp_path / "sound.mp4", with_video=False)).frames()
    _, frames = VideoFile(write_cover(tmp_path / "video.mp4", with_video=True)).frames()
    assert len(list(frames)) == 10


def test_the_stretches_of_joined_recordings_follow_one_another(tmp_path):
    """Two transport streams appended to one another, each with a clock of its own."""
    later = write_numbered(tmp_path / "a.ts", [1000 + Fraction(i, 25) for i in range(50)])
    earlier = write_numbered(tmp_path / "b.ts", [Fraction(i, 25) for i in range(50)], first=50)
    for name, parts in (("back.ts", (later, earlier)), ("forth.ts", (earlier, later))):
        joined = tmp_path / name
        joined.write_bytes(b"".join(Path(part).read_bytes() for part in parts))
        data = cfg.Data(resize=64, crop=64, stride=1)
        spans = [
            span for span, _ in translate._clips(str(joined), None, 0.5, cfg.Config(data=data))
        ]
        assert [(span.start, span.error) for span in spans] == [(n / 2, None) for n in range(8)]
        assert all(span.start < span.end for span in spans)
        with pytest.raises(ValueError, match=r"its clock jumps after 1\.9"):
            numbers(VideoFile(str(joined), 1.0, 1.5))
        assert len(numbers(VideoFile(str(joined)))) == 100
        clip = Clip("k", "train", "t", VideoFile(str(joined)))
        assert encode(clip, EncodeOptions(fps=12.5))[1]["num_frames"] == 50


def test_shards_of_an_earlier_version_are_named_unless_their_frames_were_drawn(
    shards, small, tmp_path
):
    old = shutil.copytree(shards, tmp_path / "old")
    dataset = json.loads((old / "dataset.json").read_text())
    (old / "dataset.json").write_text(
        json.dumps(dataset | {"format": 2, "corpus": {"name": "manifest"}})
    )
    warning = Shards(old, "test").color_warning()
    assert "changed colours" in warning and "make_shards.py" in warning and "\n" not in warning
    (old / "dataset.json").write_text(json.dumps(dataset | {"format": 2}))
    assert dataset["corpus"]["name"] == "synthetic" and not Shards(old, "test").color_warning()
    assert dataset["format"] == 3 and not Shards(shards, "test").color_warning()
