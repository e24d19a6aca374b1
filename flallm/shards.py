"""`Clip` -> WebDataset tars with an index beside them, and a sample's bytes back from (shard, offset).

A folder of shards holds, for every split,
    <split>-000000.tar …   ordinary WebDataset: `<key>.mp4` (H.264 at training size), then `<key>.json`
    <split>.index.npy      one row a sample (`INDEX`), memory-mapped when read
and `dataset.json`: format, counts, options, a hash of the rows kept, and which rows were left out and why.
A shard is written under another name and renamed when it is whole, so a killed run leaves none that is half; the same
command goes on where it stopped and ends with the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import tarfile
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import webdataset
from av.video.reformatter import Interpolation, VideoReformatter
from tqdm import tqdm

from flallm import UserError
from flallm.corpora import Clip, VideoFile

FORMAT = 1
INDEX = np.dtype(
    [
        ("shard", "<i4"),
        ("video_offset", "<i8"),
        ("video_size", "<i4"),
        ("json_offset", "<i8"),
        ("json_size", "<i4"),
        ("frames", "<i4"),
        ("text_length", "<i4"),  # characters
        ("checksum", "<u8"),  # of the video's and the JSON's bytes
    ]
)


@dataclass(frozen=True)
class Options:
    """How clips are encoded.

    short_side: pixels; a smaller source is not enlarged. 256 is what the 224 crops are taken from.
    fps: frames per second, or None to keep those of the source.
    crf: x264's quality; 22 leaves fingers sharp at these sizes (about 52 dB on rendered 720p signing), 23 is x264's own default.
    gop: frames between keyframes. Nothing seeks inside a clip, so a long one costs only little robustness.
    per_shard: clips a shard; 500 of some 100 kB make files that parallel file systems like.
    """

    short_side: int = 256
    fps: float | None = None
    crf: int = 22
    gop: int = 96
    per_shard: int = 500


def encode(clip: Clip, options: Options) -> tuple[bytes, dict]:
    """The clip as (mp4 bytes, the sample's JSON). Raises OSError, ValueError or av.FFmpegError for one that cannot be read."""
    video = _fitting_file(clip.media, options) or _encode_frames(clip.media, options)
    with av.open(io.BytesIO(video)) as container:
        stream = container.streams.video[0]
        frames = sum(1 for _ in container.decode(stream))
        meta = {"key": clip.key, "text": clip.text, "gloss": clip.gloss, "signer": clip.signer, "num_frames": frames}
        meta |= {"fps": round(float(stream.average_rate), 3), "width": stream.width, "height": stream.height, "source": clip.media.source}
    if not frames:
        raise ValueError("holds no frame")
    return video, {name: value for name, value in meta.items() if value is not None}


def _fitting_file(media, options: Options) -> bytes | None:
    """The bytes of a file that is already what `_encode_frames` would aim for, else None."""
    if not isinstance(media, VideoFile) or media.start is not None or media.end is not None:
        return None
    with av.open(media.path) as container:
        stream = container.streams.video[0] if container.streams.video else None
        if (
            stream is None
            or "mp4" not in container.format.name
            or stream.codec_context.name != "h264"
            or stream.codec_context.pix_fmt != "yuv420p"
            or min(stream.width, stream.height) > options.short_side
            or (options.fps and stream.average_rate != Fraction(options.fps))
        ):
            return None
    return Path(media.path).read_bytes()


def _encode_frames(media, options: Options) -> bytes:
    fps, frames = media.frames()
    if options.fps:
        frames, fps = _resample(frames, fps, Fraction(options.fps)), Fraction(options.fps)
    fps = fps.limit_denominator(1001)
    output, scaler = io.BytesIO(), VideoReformatter()  # one for all frames: it keeps its tables
    with av.open(output, "w", format="mp4") as container:
        stream = None
        for i, frame in enumerate(frames):
            if stream is None:
                stream = container.add_stream("libx264", rate=fps)
                scale = min(1.0, options.short_side / min(frame.width, frame.height))
                stream.width, stream.height = (2 * round(side * scale / 2) for side in (frame.width, frame.height))
                stream.pix_fmt = "yuv420p"
                stream.thread_count = 1  # all cores are busy with other clips, and the bytes do not depend on their number
                # Every 4th frame is a reference frame and the three between are not, so that a reader of T/4 frames
                # (the paper's sub-sampling) can pass over the others without decoding them.
                # No mbtree: its AVX-512 code gives other bytes from run to run below 256 pixels (measured, x264 in PyAV 18.1).
                x264 = f"keyint={options.gop}:scenecut=0:bframes=3:b-adapt=0:b-pyramid=none:ref=1:mbtree=0"
                stream.options = {"preset": "veryfast", "crf": str(options.crf), "x264-params": x264}
            frame = scaler.reformat(frame, stream.width, stream.height, "yuv420p", interpolation=Interpolation.AREA)
            frame.pts, frame.time_base = i, 1 / fps
            container.mux(stream.encode(frame))
        if stream is None:
            raise ValueError("holds no frame")
        container.mux(stream.encode())
    return output.getvalue()


def _resample(frames: Iterator[av.VideoFrame], source: Fraction, target: Fraction) -> Iterator[av.VideoFrame]:
    """Drops or repeats frames so that frame i is the one shown at i / target seconds."""
    shown = 0
    for i, frame in enumerate(frames):
        while shown / target < (i + 1) / source:
            shown += 1
            yield frame


def make_shards(clips: Iterable[Clip], out: str | Path, options: Options, corpus: dict, processes: int | None = None) -> dict:
    """Writes the shards of `clips` into `out` and returns what `dataset.json` says. `corpus` names the data set and its arguments."""
    out, splits, rows = Path(out), {}, hashlib.sha256()
    for clip in clips:
        splits.setdefault(clip.split, []).append(clip)
        rows.update(json.dumps([clip.key, clip.split, clip.text, clip.gloss, clip.signer, clip.media.source]).encode())
    if not splits:
        raise UserError("the corpus holds no clip: nothing to make shards of")
    for split, members in splits.items():
        key, count = Counter(clip.key for clip in members).most_common(1)[0]
        if count > 1:
            raise UserError(f"two clips of {split} have the key {key!r}: keys must be unique")
    made_from = {"format": FORMAT, "corpus": corpus, "options": asdict(options), "rows_sha256": rows.hexdigest()}
    begun = out / "dataset.json.part"
    for file in (out / "dataset.json", begun):
        if file.exists() and {k: json.loads(file.read_text()).get(k) for k in made_from} != made_from:
            raise UserError(f"{out} holds shards made of other clips or with other options: remove it or name another folder")
    if (out / "dataset.json").exists():
        return json.loads((out / "dataset.json").read_text())
    out.mkdir(parents=True, exist_ok=True)
    begun.write_text(json.dumps(made_from))

    total = sum(len(members) for members in splits.values())
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes or os.cpu_count(), context) as pool, tqdm(total=total, unit="clip", desc="shards", disable=None) as bar:
        shards = [
            (out / f"{split}-{number:06d}.tar", members[first : first + options.per_shard])
            for split, members in splits.items()
            for number, first in enumerate(range(0, len(members), options.per_shard))
        ]
        missing = [(path, members) for path, members in shards if not path.exists()]
        bar.update(total - sum(len(members) for _, members in missing))
        encoded = _in_order(pool, [clip for _, members in missing for clip in members], options)
        for path, members in missing:
            _write_shard(path, members, (result for result in encoded if not bar.update()))

    left_out = []
    for path, _ in shards:
        left_out += json.loads(path.with_suffix(".left_out.json").read_text())
    dataset = {**made_from, "splits": {}, "left_out": left_out}
    for split in splits:
        index = np.concatenate([_index_shard(path, number) for number, path in enumerate(sorted(out.glob(f"{split}-*.tar")))])
        np.save(out / f"{split}.index.npy", index)
        dataset["splits"][split] = {"clips": len(index), "frames": int(index["frames"].sum())}
    begun.write_text(json.dumps(dataset, indent=1, ensure_ascii=False))
    begun.rename(out / "dataset.json")
    for path, _ in shards:
        path.with_suffix(".left_out.json").unlink()
    return dataset


def _in_order(pool: ProcessPoolExecutor, clips: list[Clip], options: Options) -> Iterator[tuple[bytes, dict] | str]:
    """What `_encode_or_cause` gives for each clip, in order, with a bounded number of them under way."""
    waiting: deque = deque()
    for clip in clips:
        waiting.append(pool.submit(_encode_or_cause, clip, options))
        if len(waiting) > 256:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _encode_or_cause(clip: Clip, options: Options) -> tuple[bytes, dict] | str:
    if not clip.text.strip():
        return "has no text"
    try:
        return encode(clip, options)
    except (OSError, ValueError, av.FFmpegError) as error:
        return f"cannot be decoded: {error}"


def _write_shard(path: Path, clips: list[Clip], encoded: Iterator[tuple[bytes, dict] | str]) -> None:
    left_out, part = [], path.with_suffix(".tar.part")
    with open(part, "wb") as file:
        tar = webdataset.TarWriter(file, mtime=0, user="flallm", group="flallm")  # equal bytes on any day, for any user
        for clip, result in zip(clips, encoded):
            if isinstance(result, str):
                left_out.append({"key": clip.key, "split": clip.split, "source": clip.media.source, "cause": result})
            else:
                video, meta = result
                tar.write({"__key__": clip.key, "mp4": video, "json": json.dumps(meta, ensure_ascii=False).encode()})
        tar.close()
        file.flush()
        os.fsync(file.fileno())
    path.with_suffix(".left_out.json").write_text(json.dumps(left_out))
    part.rename(path)


def checksum(video: bytes, meta: bytes) -> int:
    digest = hashlib.blake2b(video, digest_size=8)
    digest.update(meta)
    return int.from_bytes(digest.digest(), "little")


def _index_shard(path: Path, number: int) -> np.ndarray:
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    with tarfile.open(path) as tar, open(path, "rb") as file:
        for member in tar:
            key, _, extension = member.name.partition(".")
            samples.setdefault(key, {})[extension] = member
        rows = np.zeros(len(samples), INDEX)
        for row, parts in zip(rows, samples.values()):
            video, meta = (os.pread(file.fileno(), parts[e].size, parts[e].offset_data) for e in ("mp4", "json"))
            said = json.loads(meta)
            row["shard"], row["checksum"] = number, checksum(video, meta)
            row["video_offset"], row["video_size"] = parts["mp4"].offset_data, parts["mp4"].size
            row["json_offset"], row["json_size"] = parts["json"].offset_data, parts["json"].size
            row["frames"], row["text_length"] = said["num_frames"], len(said["text"])
    return rows


class BadSample(Exception):
    """A sample that cannot be used; the message is the cause."""


class Shards:
    """The samples of one split, readable in any order and from any process."""

    def __init__(self, folder: str | Path, split: str):
        self.folder, self.split = Path(folder), split
        try:
            self.dataset = json.loads((self.folder / "dataset.json").read_text())
        except OSError:
            raise UserError(f"{folder} holds no finished shards (no dataset.json): make them with tools/make_shards.py") from None
        if split not in self.dataset["splits"]:
            raise UserError(f"{folder} has no split {split!r}: it has {', '.join(self.dataset['splits'])}")
        self.index = np.load(self.folder / f"{split}.index.npy", mmap_mode="r", allow_pickle=False)

    def __len__(self) -> int:
        return len(self.index)

    def read(self, i: int) -> tuple[bytes, dict]:
        """(mp4 bytes, the sample's JSON) of sample i. Raises `BadSample` when the shard is missing, short or altered."""
        row = self.index[i]
        path = self.folder / f"{self.split}-{row['shard']:06d}.tar"
        try:
            with open(path, "rb") as file:
                video = os.pread(file.fileno(), int(row["video_size"]), int(row["video_offset"]))
                meta = os.pread(file.fileno(), int(row["json_size"]), int(row["json_offset"]))
        except OSError as error:
            raise BadSample(f"{path}: {error.strerror}") from None
        if checksum(video, meta) != row["checksum"]:
            raise BadSample(f"{path}: sample {i} is not what the index says: the shard is cut short or altered")
        return video, json.loads(meta)
