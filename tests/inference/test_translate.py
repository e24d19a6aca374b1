"""`flallm translate` and `flallm doctor`, as commands, and what they are made of."""

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


def briefly(config, run):
    train(config, run, init_distributed())


@pytest.fixture(scope="module")
def run(shards, llm, tmp_path_factory):
    """A run with a few clips beside it. It has learnt little: sentences that come with it are compared, not read."""
    out = tmp_path_factory.mktemp("translate") / "run"
    given, shards = shards, out.parent / "shards"  # as of make_shards.py --fps=25
    shutil.copytree(given, shards)
    dataset = json.loads((given / "dataset.json").read_text())
    (shards / "dataset.json").write_text(json.dumps(dataset | {"options": dataset["options"] | {"fps": 25.0}}))
    config = cfg.load(
        "demo", "stage1", {"data.shards": str(shards), "llm.path": str(llm), **SMALL, "train.steps": 6, "decode.max_tokens": 12, "decode.batch": 2}
    )
    spawn(briefly, 1, config, out)
    test = Shards(str(shards), "test")
    for i in range(3):
        (out / f"{i}.mp4").write_bytes(test.read(i)[0])
    return out


@pytest.fixture(scope="module")
def loaded(run):
    return load_run(run, CPU)


def test_videos_in_batches_have_the_sentences_they_have_alone(run, loaded):
    videos = [str(run / f"{i}.mp4") for i in (0, 1, 2)]
    together = list(translate.translate(*loaded, videos, CPU, alternatives=2))
    alone = [one for path in videos for one in translate.translate(*loaded, [path], CPU, alternatives=2)]
    assert [(t.video, t.text, t.end) for t in together] == [(t.video, t.text, t.end) for t in alone]
    for a, b in zip(together, alone):
        assert a.confidence == pytest.approx(b.confidence, rel=1e-4) and 0 < a.confidence <= 1
        assert len({a.text, *(text for text, _ in a.alternatives)}) == 3


def test_confidence_is_the_geometric_mean_of_the_probabilities_of_the_tokens(run, loaded):
    model, config = loaded
    (one,) = translate.translate(model, config, [str(run / "0.mp4")], CPU)
    frames = centre_crop(every_frame(str(run / "0.mp4"), config.data.resize, config.data.stride, config.data.max_frames), config.data.crop)
    ids = model.text.encode(one.text)
    with torch.no_grad():
        signs = model.encoder(torch.from_numpy(np.ascontiguousarray(frames)), torch.tensor([len(frames)]))
        logits = model.language(
            inputs_embeds=model.adapter(signs)[None] * model.scale, decoder_input_ids=torch.tensor([[*model.text.start, *ids[:-1]]])
        ).logits[0]
    tokens = logits.log_softmax(-1)[range(len(model.text.start) - 1, len(logits)), ids]
    assert one.confidence == pytest.approx(tokens.mean().exp().item(), rel=1e-4)


@pytest.mark.parametrize("cut", ({"window": 0.48}, {"segments": [(0.0, 0.5), (0.25, 0.75), (0.5, 1.0)]}), ids=("window", "segments"))
def test_stretches_of_a_video_hold_its_frames_of_that_time(run, loaded, cut):
    _, config = loaded
    path = str(run / "0.mp4")
    every = every_frame(path, config.data.resize, 1, 10_000)
    found = list(translate._clips(path, cut.get("segments"), cut.get("window", 0.0), config))
    assert len(found) == (3 if "segments" in cut else -(-len(every) // 12))
    for one, frames in found:
        first, last = (min(math.ceil(seconds * 25 - 0.01), len(every)) for seconds in (one.start, one.end))  # those that begin in it
        assert np.array_equal(frames, centre_crop(every[first : last : config.data.stride], config.data.crop))


def test_a_video_and_its_last_stretch_end_with_the_last_frame(shards, small, tmp_path):
    content, meta = Shards(shards, "test").read(0)
    (tmp_path / "0.mp4").write_bytes(content)
    whole, stretches = (list(translate._clips(str(tmp_path / "0.mp4"), None, window, small("stage1"))) for window in (0.0, 0.48))
    assert [(one.start, one.end) for one, _ in whole] == [(0, meta["num_frames"] / 25)]
    assert len(stretches) > 2 and [one.end for one, _ in stretches] == [*(round(0.48 * n, 3) for n in range(1, len(stretches))), meta["num_frames"] / 25]


@pytest.mark.parametrize("fps", (0, 20, 25, 30))
def test_a_segment_has_the_frames_of_a_clip_that_is_cut_for_training_at_the_same_times(run, loaded, fps):
    config = cfg.override(loaded[1], {"data.fps": fps})
    path, size, converter = str(run / "0.mp4"), config.data.resize, FrameConverter()
    segments = [(0.01, 0.47), (0.1996, 0.52), (0.25, 0.7501), (0.5, 0.99)]
    found = list(translate._clips(path, segments, 0.0, config))
    assert [(one.start, one.end) for one, _ in found] == [(round(start, 3), round(end, 3)) for start, end in segments]
    for (start, end), (_, frames) in zip(segments, found):
        _, cut = VideoFile(path, start, end).frames()
        cut = resample(cut, fps) if fps else (frame for _, frame in cut)
        cut = np.stack([converter.to_rgb(frame, size, size) for frame in cut])
        assert np.array_equal(frames, centre_crop(cut[:: config.data.stride], config.data.crop))


def test_a_video_is_brought_to_the_frame_rate_that_make_shards_brought_the_clips_to(run, loaded, tmp_path):
    _, config = loaded
    assert config.data.fps == 25
    every = every_frame(str(run / "0.mp4"), config.data.resize, 1, 10_000)
    for rate, name in ((25, "25.mp4"), (50, "50.mp4"), (100, "100.mp4"), (50, "50.mkv")):  # the last says that it has 1,000 frames a second
        with av.open(str(tmp_path / name), "w") as container:
            stream = container.add_stream("libx264rgb", 1000 if "mkv" in name else rate, {"crf": "0", "bf": "0"})
            stream.width, stream.height, stream.pix_fmt = every.shape[2], every.shape[1], "rgb24"
            for i, picture in enumerate(every.repeat(rate // 25, 0)):
                frame = av.VideoFrame.from_ndarray(picture)
                frame.pts, frame.time_base = i, Fraction(1, rate)
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    own, *brought = (next(translate._clips(str(tmp_path / name), None, 0.0, config)) for name in ("25.mp4", "50.mp4", "100.mp4", "50.mkv"))
    assert all(np.array_equal(own[1], frames) and one.end == own[0].end for one, frames in brought)
    twice = next(translate._clips(str(tmp_path / "50.mp4"), None, 0.0, cfg.override(config, {"data.fps": 0})))[1]
    assert len(twice) == -(-2 * len(every) // config.data.stride)  # as for shards whose clips have their own


def test_the_command_writes_subtitles_and_names_what_has_no_sentence(run, tmp_path, flallm):
    (tmp_path / "segments.csv").write_text("start,end\n0.0,0.5,a note\n0.5,1\n70,71\n")
    done = flallm("translate", run, run / "0.mp4", "--format=srt", f"--segments={tmp_path / 'segments.csv'}", cwd=tmp_path)
    assert done.returncode == 2 and "before its segment from 70 s" in done.stderr
    blocks = done.stdout.split("\n\n")
    assert [block.split("\n")[:2] for block in blocks[:2]] == [["1", "00:00:00,000 --> 00:00:00,500"], ["2", "00:00:00,500 --> 00:00:01,000"]]
    (tmp_path / "no.mp4").write_text("no video")
    done = flallm("translate", run, tmp_path / "no.mp4", run / "1.mp4", "--format=json", "--alternatives=1", cwd=tmp_path)
    assert done.returncode == 2 and "no.mp4 cannot be translated" in done.stderr and "Traceback" not in done.stderr
    (said,) = map(json.loads, done.stdout.splitlines())
    assert said["video"].endswith("1.mp4") and len(said["alternatives"]) == 1


def test_a_video_much_longer_than_what_was_trained_on_is_refused(run, loaded):
    model, config = loaded
    short = cfg.override(config, {"data.max_frames": 12})
    (one,) = translate.translate(model, short, [str(run / "0.mp4")], CPU)
    assert not one.text and "--window" in one.error
    first, last, long = translate.translate(model, short, [str(run / "0.mp4")], CPU, segments=[(0.0, 0.5), (0.1, 1.4), (0.2, 0.7)])
    assert "from 0.1 to 1.4 s: over 24 frames" in long.error and first.confidence and last.confidence  # it costs the others nothing


@pytest.mark.parametrize("text", ("", "1.0\n", "2 1\n3 2\n", "a b\nc d\n", "0 1\nnan 3\n"))
def test_segments_that_are_none_are_one_clear_line(tmp_path, text):
    (tmp_path / "s").write_text(text)
    with pytest.raises(UserError, match="--segments"):
        translate.read_segments(tmp_path / "s")


def test_segments_are_taken_in_the_order_of_time(tmp_path):
    (tmp_path / "s").write_text("start end\n3 4\n0.5 2 a note\n\n1 2\n")
    assert translate.read_segments(tmp_path / "s") == [(0.5, 2), (1, 2), (3, 4)]


def test_a_line_is_what_its_format_asks_for():
    one = translate.Translation("a.mp4", 1.5, 3661.25, "a text")
    assert translate.line(one, "srt", 2, True, False) == "2\n00:00:01,500 --> 01:01:01,250\na text\n"
    assert translate.line(one, "vtt", 2, True, False) == "2\n00:00:01.500 --> 01:01:01.250\na text\n"
    timed = [translate.line(one, "text", 2, timed, several) for timed, several in ((False, False), (True, False), (False, True))]
    assert timed == ["a text", "1.50\t3661.25\ta text", "a.mp4\ta text"]


def test_doctor_says_what_is_there_and_what_is_not(shards, llm, tmp_path, flallm):
    rows = flallm("doctor", "demo", f"--data.shards={shards}", f"--llm.path={llm}", f"--run_dir={tmp_path}", cwd=tmp_path)
    assert rows.returncode == 0, rows.stdout + rows.stderr
    for what in ("torchaudio", "all-reduce       2 ranks over gloo", "data: test       7 clips, 7 of them read", "used frames/s a core", "mbart, vocabulary"):
        assert what in rows.stdout
    (tmp_path / "cut").mkdir()
    for file in shards.iterdir():
        (tmp_path / "cut" / file.name).write_bytes(file.read_bytes()[: 2000 if file.name == "test-000000.tar" else None])
    rows = flallm("doctor", "demo", f"--data.shards={tmp_path / 'cut'}", f"--llm.path={tmp_path / 'no'}", f"--run_dir={tmp_path}", cwd=tmp_path)
    assert rows.returncode == 1 and "MISS  data: test" in rows.stdout and "MISS  language model" in rows.stdout and "Traceback" not in rows.stderr


def test_doctor_names_samples_that_are_broken_and_is_content_with_the_packages_of_pyproject(shards, small, tmp_path):
    copied = shutil.copytree(shards, tmp_path / "shards")
    shard = bytearray((copied / "dev-000000.tar").read_bytes())
    shard[int(Shards(shards, "dev").index["video_offset"][3]) + 500] ^= 1
    (copied / "dev-000000.tar").write_bytes(shard)
    rows = {what: (state, said) for state, what, said in doctor._shards(small("stage1", {"data.shards": str(copied)}))}
    assert [rows[f"data: {split}"][0] for split in ("train", "dev", "test")] == ["OK", "MISS", "OK"]
    assert rows["data: dev"][1].startswith("1 of 8 are broken, as dev sample 3: ")
    assert next(doctor._packages()) == ("OK", "packages", "as pyproject.toml asks for")
