"""`flallm translate` and `flallm doctor`."""

import json
import math
import shutil
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from conftest import SMALL
from every_frame import every_frame

from flallm import config as cfg
from flallm.data.color import FrameConverter
from flallm.data.reader import Shards
from flallm.data.resample import resample
from flallm.data.transforms import centre_crop
from flallm.data.video import VideoFile
from flallm.distributed.context import init_distributed
from flallm.distributed.launch import spawn
from flallm.evaluation.decode import load_run
from flallm.inference import translate
from flallm.planning import doctor
from flallm.training.train import train
from flallm.utils import UserError

CPU = torch.device("cpu")


def train_briefly(config, run):
    train(config, run, init_distributed())


@pytest.fixture(scope="module")
def run(shards, llm, tmp_path_factory):
    """A run with three clips beside it. It has learnt little: its sentences are compared."""
    folder = tmp_path_factory.mktemp("translate")
    copied = shutil.copytree(shards, folder / "shards")
    dataset = json.loads((copied / "dataset.json").read_text())
    dataset["options"]["fps"] = 25.0  # as of make_shards.py --fps=25
    (copied / "dataset.json").write_text(json.dumps(dataset))
    settings = {"train.steps": 6, "decode.max_tokens": 12, "decode.batch": 2}
    paths = {"data.shards": str(copied), "llm.path": str(llm)}
    run = folder / "run"
    spawn(train_briefly, 1, cfg.load("demo", "stage1", paths | SMALL | settings), run)
    test = Shards(str(copied), "test")
    for i in range(3):
        (run / f"{i}.mp4").write_bytes(test.read(i)[0])
    return run


@pytest.fixture(scope="module")
def loaded(run):
    return load_run(run, CPU)


def clips(path, config, segments=None, window=0.0):
    return list(translate._clips(str(path), segments, window, config))


def all_frames(path, config):
    return every_frame(str(path), config.data.resize, 1, 10_000)


def test_videos_in_batches_have_the_sentences_they_have_alone(run, loaded):
    videos = [str(run / f"{i}.mp4") for i in (0, 1, 2)]
    together = list(translate.translate(*loaded, videos, CPU, alternatives=2))
    for path, a in zip(videos, together, strict=True):
        (b,) = translate.translate(*loaded, [path], CPU, alternatives=2)
        assert (a.video, a.text, a.end) == (b.video, b.text, b.end)
        assert a.confidence == pytest.approx(b.confidence, rel=1e-4)
        assert 0 < a.confidence <= 1
        assert len({a.text, *(text for text, _ in a.alternatives)}) == 3


def test_confidence_is_the_geometric_mean_of_the_probabilities_of_the_tokens(run, loaded):
    model, config = loaded
    path, data = str(run / "0.mp4"), config.data
    (translation,) = translate.translate(model, config, [path], CPU)
    frames = centre_crop(every_frame(path, data.resize, data.stride, data.max_frames), data.crop)
    ids = model.text.encode(translation.text)
    start = model.text.start
    with torch.no_grad():
        frames = torch.from_numpy(np.ascontiguousarray(frames))
        signs = model.encoder(frames, torch.tensor([len(frames)]))
        logits = model.language(
            inputs_embeds=model.adapter(signs)[None] * model.scale,
            decoder_input_ids=torch.tensor([[*start, *ids[:-1]]]),
        ).logits[0]
    tokens = logits.log_softmax(-1)[range(len(start) - 1, len(logits)), ids]
    assert translation.confidence == pytest.approx(tokens.mean().exp().item(), rel=1e-4)


SEGMENTS = [(0.0, 0.5), (0.25, 0.75), (0.5, 1.0)]


@pytest.mark.parametrize(
    "spans", ({"window": 0.48}, {"segments": SEGMENTS}), ids=("window", "segments")
)
def test_parts_of_a_video_hold_its_frames_of_that_time(run, loaded, spans):
    _, config = loaded
    every = all_frames(run / "0.mp4", config)
    parts = clips(run / "0.mp4", config, **spans)
    assert len(parts) == (3 if "segments" in spans else math.ceil(len(every) / 12))
    for part, frames in parts:
        times = (part.start, part.end)
        # The frames that begin in it.
        first, last = (min(math.ceil(seconds * 25 - 0.01), len(every)) for seconds in times)
        used = every[first : last : config.data.stride]
        assert np.array_equal(frames, centre_crop(used, config.data.crop))


def test_a_video_and_its_last_window_end_with_the_last_frame(shards, small, tmp_path):
    content, meta = Shards(shards, "test").read(0)
    (tmp_path / "0.mp4").write_bytes(content)
    config, duration = small("stage1"), meta["num_frames"] / 25
    ((video, _),) = clips(tmp_path / "0.mp4", config)
    assert (video.start, video.end) == (0, duration)
    windows = clips(tmp_path / "0.mp4", config, window=0.48)
    assert len(windows) > 2
    ends = [round(0.48 * n, 3) for n in range(1, len(windows))]
    assert [window.end for window, _ in windows] == [*ends, duration]


@pytest.mark.parametrize("fps", (0, 20, 25, 30))
def test_a_segment_has_the_frames_of_a_training_clip_cut_at_the_same_times(run, loaded, fps):
    config = cfg.override(loaded[1], {"data.fps": fps})
    path, size, converter = str(run / "0.mp4"), config.data.resize, FrameConverter()
    segments = [(0.01, 0.47), (0.1996, 0.52), (0.25, 0.7501), (0.5, 0.99)]
    parts = clips(path, config, segments)
    rounded = [(round(start, 3), round(end, 3)) for start, end in segments]
    assert [(part.start, part.end) for part, _ in parts] == rounded
    for (start, end), (_, frames) in zip(segments, parts):
        _, timed = VideoFile(path, start, end).frames()
        cut = resample(timed, fps) if fps else (frame for _, frame in timed)
        cut = np.stack([converter.to_rgb(frame, size, size) for frame in cut])
        assert np.array_equal(frames, centre_crop(cut[:: config.data.stride], config.data.crop))


def write_video(path, images, rate, header_rate):
    """Writes lossless video. header_rate: what the file claims as its frame rate."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264rgb", header_rate, {"crf": "0", "bf": "0"})
        stream.width, stream.height, stream.pix_fmt = images.shape[2], images.shape[1], "rgb24"
        for i, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(image)
            frame.pts, frame.time_base = i, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def test_a_video_is_resampled_to_the_frame_rate_of_the_shards(run, loaded, tmp_path):
    _, config = loaded
    assert config.data.fps == 25
    every = all_frames(run / "0.mp4", config)
    results = []
    for rate, header_rate, name in (
        (25, 25, "25.mp4"),
        (50, 50, "50.mp4"),
        (100, 100, "100.mp4"),
        (50, 1000, "50.mkv"),
    ):
        write_video(tmp_path / name, every.repeat(rate // 25, 0), rate, header_rate)
        results += clips(tmp_path / name, config)
    (expected, expected_frames), *others = results
    for translation, frames in others:
        assert np.array_equal(frames, expected_frames)
        assert translation.end == expected.end
    # Shards without a frame rate keep that of each video.
    ((_, frames),) = clips(tmp_path / "50.mp4", cfg.override(config, {"data.fps": 0}))
    assert len(frames) == math.ceil(2 * len(every) / config.data.stride)


def test_the_command_writes_subtitles_and_names_what_has_no_sentence(run, tmp_path, flallm):
    segments = tmp_path / "segments.csv"
    segments.write_text("start,end\n0.0,0.5,a note\n0.5,1\n70,71\n")
    result = flallm(
        "translate", run, run / "0.mp4", "--format=srt", f"--segments={segments}", cwd=tmp_path
    )
    assert result.returncode == 2
    assert "before its segment from 70 s" in result.stderr
    entries = [entry.split("\n")[:2] for entry in result.stdout.split("\n\n")[:2]]
    assert entries[0] == ["1", "00:00:00,000 --> 00:00:00,500"]
    assert entries[1] == ["2", "00:00:00,500 --> 00:00:01,000"]


def test_the_command_translates_the_other_videos_if_one_is_broken(run, tmp_path, flallm):
    (tmp_path / "no.mp4").write_text("no video")
    videos = (tmp_path / "no.mp4", run / "1.mp4")
    options = ("--format=json", "--alternatives=1")
    result = flallm("translate", run, *videos, *options, cwd=tmp_path)
    assert result.returncode == 2
    assert "no.mp4 cannot be translated" in result.stderr
    assert "Traceback" not in result.stderr
    (translation,) = map(json.loads, result.stdout.splitlines())
    assert translation["video"].endswith("1.mp4")
    assert len(translation["alternatives"]) == 1


def test_a_video_much_longer_than_training_clips_is_refused(run, loaded):
    model, config = loaded
    short = cfg.override(config, {"data.max_frames": 12})
    videos = [str(run / "0.mp4")]
    (video,) = translate.translate(model, short, videos, CPU)
    assert not video.text and "--window" in video.error
    segments = [(0.0, 0.5), (0.1, 1.4), (0.2, 0.7)]
    first, last, too_long = translate.translate(model, short, videos, CPU, segments)
    assert "from 0.1 to 1.4 s: over 24 frames" in too_long.error
    assert first.confidence and last.confidence  # the others are translated


@pytest.mark.parametrize("text", ("", "1.0\n", "2 1\n3 2\n", "a b\nc d\n", "0 1\nnan 3\n"))
def test_a_file_without_segments_is_refused(tmp_path, text):
    (tmp_path / "s").write_text(text)
    with pytest.raises(UserError, match="--segments"):
        translate.read_segments(tmp_path / "s")


def test_segments_are_sorted_by_time(tmp_path):
    (tmp_path / "s").write_text("start end\n3 4\n0.5 2 a note\n\n1 2\n")
    assert translate.read_segments(tmp_path / "s") == [(0.5, 2), (1, 2), (3, 4)]


def test_a_translation_is_printed_in_each_format():
    translation = translate.Translation("a.mp4", 1.5, 3661.25, "a text")

    def line(form, timed=True, several=False):
        return translate.line(translation, form, 2, timed, several)

    assert line("srt") == "2\n00:00:01,500 --> 01:01:01,250\na text\n"
    assert line("vtt") == "2\n00:00:01.500 --> 01:01:01.250\na text\n"
    assert line("text", timed=False) == "a text"
    assert line("text") == "1.50\t3661.25\ta text"
    assert line("text", timed=False, several=True) == "a.mp4\ta text"


def run_doctor(flallm, shards, llm, folder):
    paths = (f"--data.shards={shards}", f"--llm.path={llm}", f"--run_dir={folder}")
    return flallm("doctor", "demo", *paths, cwd=folder)


def test_doctor_says_what_is_there_and_what_is_missing(shards, llm, tmp_path, flallm):
    result = run_doctor(flallm, shards, llm, tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    for text in (
        "torchaudio",
        "all-reduce       2 ranks over gloo",
        "data: test       7 clips, 7 of them read",
        "used frames/s a core",
        "mbart, vocabulary",
    ):
        assert text in result.stdout
    cut = shutil.copytree(shards, tmp_path / "cut")
    shard = cut / "test-000000.tar"
    shard.write_bytes(shard.read_bytes()[:2000])
    result = run_doctor(flallm, cut, tmp_path / "no", tmp_path)
    assert result.returncode == 1
    assert "MISS  data: test" in result.stdout
    assert "MISS  language model" in result.stdout
    assert "Traceback" not in result.stderr


def test_doctor_names_broken_samples_and_accepts_the_packages_of_pyproject(shards, small, tmp_path):
    copied = shutil.copytree(shards, tmp_path / "shards")
    shard = bytearray((copied / "dev-000000.tar").read_bytes())
    shard[int(Shards(shards, "dev").index["video_offset"][3]) + 500] ^= 1
    (copied / "dev-000000.tar").write_bytes(shard)
    config = small("stage1", {"data.shards": str(copied)})
    rows = {name: (state, text) for state, name, text in doctor._shards(config)}
    states = [rows[f"data: {split}"][0] for split in ("train", "dev", "test")]
    assert states == ["OK", "MISS", "OK"]
    assert rows["data: dev"][1].startswith("1 of 8 are broken, as dev sample 3: ")
    assert next(doctor._packages()) == ("OK", "packages", "as pyproject.toml asks for")
