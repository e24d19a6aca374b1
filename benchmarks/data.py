"""What the data plane costs, as ratios measured in one run: one JSON object a line, {"figure", "value", "unit", "detail"}.

python benchmarks/data.py            all figures; or name some parts: balance, ten_million, speed, growth, sources
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import av
import cv2
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter
from figures import figure, main, peak_bytes
from PIL import Image

from flallm.config import Data
from flallm.data.clips import Clip
from flallm.data.corpora import synthetic
from flallm.data.dataset import ClipDataset, batches
from flallm.data.encode import EncodeOptions
from flallm.data.reader import COLUMNS, Shards
from flallm.data.sampler import TEXT_COST, BatchSampler, rank_batches
from flallm.data.shards import _save, make_shards
from flallm.data.transforms import decode, used_frames
from flallm.planning.lengths import CORPORA
from flallm.utils import usable_cpus

HEIGHT, WIDTH = 260, 210  # PHOENIX14T's frames
CLIPS, ROUNDS = 96, 3


@dataclass(frozen=True)
class Narrow:
    """A clip cut to PHOENIX14T's shape."""

    media: synthetic.Performance
    source: str = "bench"

    def frames(self):
        fps, frames = self.media.frames()
        side = (HEIGHT - WIDTH) // 2
        images = (
            (
                seconds,
                np.ascontiguousarray(frame.to_ndarray(format="rgb24")[:, side : side + WIDTH]),
            )
            for seconds, frame in frames
        )
        return fps, (
            (seconds, av.VideoFrame.from_ndarray(image, "rgb24")) for seconds, image in images
        )


class StubTokenizer:
    """Stands where a tokenizer does: this is about video."""

    def encode(self, text: str) -> list[int]:
        return [len(word) for word in text.split()]


class Corpus:
    """Clips of the embedded corpus at PHOENIX14T's frame size, as shards and as the tree of PNGs that the field reads."""

    def __init__(self, folder: Path):
        clips = [
            Clip(c.key, c.split, c.text, Narrow(c.media))
            for c in synthetic.clips(train=CLIPS, dev=0, test=0, size=HEIGHT)
        ]
        make_shards(clips, folder / "shards", EncodeOptions(), {"name": "bench"})
        self.data = Data(shards=str(folder / "shards"))
        self.clips, self.png_bytes, self.squared_error, self.pngs = (
            ClipDataset("train", self.data, 0),
            0,
            [],
            [],
        )
        for n, clip in enumerate(clips):
            decoded = av.open(io.BytesIO(self.clips.shards.read(n)[0])).decode(video=0)
            kept = []
            for i, ((_, frame), again) in enumerate(zip(clip.media.frames()[1], decoded)):
                path, image = folder / f"{n:04d}-{i:04d}.png", frame.to_ndarray()
                cv2.imwrite(str(path), image[..., ::-1])
                self.png_bytes += path.stat().st_size
                if i % 4 == 0:
                    kept.append(path)
                    self.squared_error.append(
                        np.mean((image.astype(float) - again.to_ndarray(format="rgb24")) ** 2)
                    )
            self.pngs.append(kept)

    def groups(self, rounds: int, epoch: int | None = 0) -> list:
        return [[(epoch, n % CLIPS) for n in range(i, i + 8)] for i in range(0, rounds * CLIPS, 8)]

    def loader(self, workers: int, rounds: int = 2, epoch: int | None = 0) -> float:
        """Clips a second once the workers have started."""
        stream = batches(self.clips, StubTokenizer(), self.groups(rounds + 1, epoch), workers)
        seen, began = 0, 0.0
        for i, batch in enumerate(stream):
            if i == CLIPS // 8 - 1:
                began = time.perf_counter()
            elif i >= CLIPS // 8:
                seen += len(batch.keys)
        return seen / (time.perf_counter() - began)

    def raw(self) -> float:
        """Bare PyAV in a loop on one core: the used frames to 224 x 224, the others passed over."""
        sources = [self.clips.shards.read(n)[0] for n in range(CLIPS)]
        began = time.perf_counter()
        for source in sources:
            with av.open(io.BytesIO(source)) as container:
                stream, scaler = container.streams.video[0], VideoReformatter()
                stream.thread_count, stream.codec_context.skip_frame = 1, "NONREF"
                for frame in container.decode(stream):
                    if round(frame.pts * frame.time_base * stream.average_rate) % 4 == 0:
                        scaler.reformat(
                            frame, 224, 224, "rgb24", interpolation=Interpolation.BILINEAR
                        ).to_ndarray()
        return CLIPS / (time.perf_counter() - began)

    def png(self) -> float:
        """The field's way: PIL opens every kept PNG, resizes it to 256 and crops 224."""
        began = time.perf_counter()
        for paths in self.pngs:
            np.stack(
                [
                    np.asarray(
                        Image.open(p).convert("RGB").resize((256, 256)).crop((16, 16, 240, 240))
                    )
                    for p in paths
                ]
            )
        return CLIPS / (time.perf_counter() - began)


def median(pairs: list[tuple[float, float]]) -> float:
    return float(np.median([a / b for a, b in pairs]))


def speed(folder: Path) -> None:
    corpus = Corpus(folder)
    runs = [
        (
            corpus.loader(1),
            corpus.loader(1, epoch=None),
            corpus.loader(2),
            corpus.raw(),
            corpus.png(),
        )
        for _ in range(ROUNDS)
    ]
    one, plain, two, raw, png = (np.median([r[i] for r in runs]) for i in range(5))
    used = corpus.clips.used.mean()
    figure(
        "loader_vs_raw",
        median([(r[0], r[3]) for r in runs]),
        "ratio",
        f"{one:.1f} clips/s with augmentation, {plain:.1f} without, bare PyAV {raw:.1f}; {used:.1f} used frames a clip",
    )
    figure(
        "shards_vs_png_path",
        median([(r[0], r[4]) for r in runs]),
        "ratio",
        f"{one:.1f} clips/s from shards, {png:.1f} from PNGs of {WIDTH}x{HEIGHT}",
    )
    figure(
        "two_workers",
        median([(r[2], r[0]) for r in runs]),
        "ratio",
        f"{two:.1f} clips/s with 2 workers, {one:.1f} with 1, on {usable_cpus()} cores that the trainer's process shares",
    )
    psnr = 10 * np.log10(255**2 / np.mean(corpus.squared_error))
    size = sum(corpus.clips.shards.shard_bytes)
    figure(
        "bytes_vs_png",
        size / corpus.png_bytes,
        "ratio",
        f"{size / 1e6:.2f} MB of shards, {corpus.png_bytes / 1e6:.1f} MB of PNGs, PSNR of the used frames {psnr:.1f} dB in RGB",
    )


def lengths(clips: int) -> tuple[np.ndarray, np.ndarray]:
    """(used frames, characters of text) of clips with PHOENIX14T's lengths."""
    frames, texts = replace(CORPORA["phoenix14t"], clips=clips).lengths()
    return used_frames(frames, 4, 300), texts


def balance(_: Path) -> None:
    frames, texts = lengths(7096)
    padding = {}
    for ranks in (8, 64, 256):
        plan = BatchSampler(frames, texts, 8 * ranks, 1, ranks, 0, text_cost=TEXT_COST["stage1"])
        shares, padded, tokens, means = [], 0, 0, []
        for epoch in range(1 if ranks < 64 else 4):
            for step in range(plan.steps(epoch)):
                (parts,) = plan.step(epoch, step)
                work = np.array([frames[ids].sum() for ids in parts])
                shares.append(work.mean() / work.max())
                padded += sum(int(texts[ids].max()) * len(ids) for ids in parts)
                tokens += sum(int(texts[ids].sum()) for ids in parts)
                means.append(frames[np.concatenate(parts)].mean())
        padding[ranks] = 1 - tokens / padded
        strays = np.std(means) / (frames.std() / np.sqrt(8 * ranks))
        figure(
            f"balance_{ranks}",
            np.mean(shares),
            "share",
            f"worst step {np.min(shares):.3f}; the mean length of a step strays {strays:.2f} times as much as that of random clips",
        )
    detail = ", ".join(f"{ranks} ranks {share:.3f}" for ranks, share in padding.items())
    figure(
        "text_padding",
        padding[64],
        "share",
        f"8 clips a rank: {detail}; clips dealt out at random have about 0.46",
    )


def ten_million(folder: Path) -> None:
    clips, ranks = 10**7, 1024
    frames, texts = lengths(clips)
    began = time.perf_counter()
    plan = BatchSampler(frames, texts, 8 * ranks, 1, ranks, 0, text_cost=TEXT_COST["stage1"])
    mine = sum(len(plan.rank_step(0, step, 5)[0]) for step in range(plan.steps(0)))
    figure(
        "plan_10m_seconds",
        time.perf_counter() - began,
        "s",
        f"{plan.steps(0)} steps of {ranks} ranks, {mine} clips of rank 5",
    )
    figure(
        "plan_10m_gib",
        peak_bytes() / 2**30,
        "GiB",
        "peak of the whole process, this corpus' arrays included",
    )
    del plan

    # An index of ten million rows over one real shard.
    make_shards(
        synthetic.clips(train=64, dev=0, test=0),
        folder / "big",
        EncodeOptions(short_side=72),
        {"name": "bench"},
    )
    small, pick = Shards(folder / "big", "train").index, np.arange(clips) % 64
    _save({name: small[name][pick] for name in COLUMNS}, folder / "big/train.index.safetensors")
    dataset = json.loads((folder / "big/dataset.json").read_text(encoding="utf-8"))
    dataset["splits"]["train"]["clips"] = clips
    (folder / "big/dataset.json").write_text(json.dumps(dataset), encoding="utf-8")
    began = time.perf_counter()
    data = Data(shards=str(folder / "big"), resize=72, crop=64)
    opened = ClipDataset("train", data, 0)
    plan = BatchSampler(opened.used, opened.shards.index["text_length"], 8 * ranks, 1, ranks, 0)
    group = next(rank_batches(plan, 5, 3 * plan.steps(0) + 700, 10**6))
    opened.shards.read(group[0][1])
    figure(
        "resume_10m_seconds",
        time.perf_counter() - began,
        "s",
        "index opened, epoch 3 planned, step 700, the first clip's bytes read",
    )


def all_bytes() -> int:
    """Memory of this process and all below it, shared pages counted once."""
    parents, sizes = {}, {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError, StopIteration):
            parents[int(entry.name)] = int(
                (entry / "stat").read_text(encoding="utf-8").rsplit(") ", 1)[1].split()[1]
            )
            sizes[int(entry.name)] = (
                int(
                    next(
                        x
                        for x in (entry / "smaps_rollup").read_text(encoding="utf-8").splitlines()
                        if x.startswith("Pss:")
                    ).split()[1]
                )
                * 1024
            )

    def below(pid: int) -> int:
        return sizes.get(pid, 0) + sum(
            below(child) for child, parent in parents.items() if parent == pid
        )

    return below(os.getpid())


def growth(folder: Path) -> None:
    make_shards(
        synthetic.clips(train=200, dev=0, test=0),
        folder / "demo",
        EncodeOptions(short_side=72),
        {"name": "bench"},
    )
    clips = ClipDataset(
        "train", Data(shards=str(folder / "demo"), resize=72, crop=64, prefetch_mib=64), 0
    )
    groups = ([(0, (4 * i + k) % 200) for k in range(4)] for i in range(2100))
    sizes: dict[int, int] = {}
    for i, _batch in enumerate(batches(clips, StubTokenizer(), groups, 2), 1):
        if i in (200, 2000):
            sizes[i] = all_bytes()
    figure(
        "loader_rss_growth",
        sizes[2000] / sizes[200],
        "ratio",
        f"{sizes[200] / 2**20:.0f} MiB after 200 batches of 4, {sizes[2000] / 2**20:.0f} MiB after 2000, 2 workers",
    )


def sources(_: Path) -> None:
    """Frames a second on one core from 720p, and from shards, all frames and every 4th."""
    from flallm.data.encode import encode

    def rate(data: bytes, decode: Callable[[bytes], object], frames: int) -> float:
        best = 0.0
        for _ in range(3):
            began = time.perf_counter()
            decode(data)
            best = max(best, frames / (time.perf_counter() - began))
        return best

    clip = max(synthetic.clips(train=40, dev=0, test=0, size=720), key=lambda c: len(c.gloss or ""))
    large, meta = encode(clip, EncodeOptions(short_side=720))
    small, _ = encode(clip, EncodeOptions())
    n = meta["num_frames"]

    def everything(data: bytes):
        return sum(1 for _ in av.open(io.BytesIO(data)).decode(video=0))

    for name, data in (("720x720", large), ("256x256", small)):
        detail = f"source frames a second, one thread; decoding alone without any scaling: {rate(data, everything, n):.0f}"
        figure(
            f"frames_per_s_{name}",
            rate(data, lambda d: decode(d, 256, 4, 10**6, n), n),
            "frames/s",
            detail,
        )


if __name__ == "__main__":
    main({f.__name__: f for f in (balance, ten_million, speed, growth, sources)})
