"""Sentences of isolated signs, for where these are all there is: `python benchmarks/join_words.py VIDEOS --out DIR`, then `make_shards.py manifest DIR/clips.tsv`.

VIDEOS has a video a word, named by it. A clip is some of these one after another, its text the words. That shows whether signs are seen, and little
more: there is no grammar, nothing between signs, and a sign looks the same in training and in test.
"""

import csv
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from flallm.commands.parse import Count, run_command, write_utf8
from flallm.data.clips import Clip
from flallm.data.corpora.synthetic import split_of
from flallm.data.encode import EncodeOptions, encode_all
from flallm.data.video import VideoFile
from flallm.utils import UserError, ensure_dir, usable_cpus, visible_files


@dataclass(frozen=True)
class Joined:
    """Videos one after another, at the first one's frames per second."""

    videos: tuple[VideoFile, ...]

    @property
    def source(self) -> str:
        return " + ".join(video.source for video in self.videos)

    def frames(self) -> tuple[Fraction, Iterator[tuple[float, av.VideoFrame]]]:
        fps = self.videos[0].rate()
        frames = (frame for video in self.videos for _, frame in video.frames()[1])
        return fps, ((i / float(fps), frame) for i, frame in enumerate(frames))


def sentences(
    words: list[str], split: str, count: int, longest: int, seed: int
) -> Iterator[tuple[str, ...]]:
    """Of one to `longest` words, any number and any word as often as another; those of three and more are in one split alone."""
    rng = np.random.default_rng([seed, *split.encode()])
    for length in rng.integers(1, longest + 1, size=count):
        drawn = (tuple(rng.choice(words, length).tolist()) for _ in range(1000))
        said = next((one for one in drawn if length < 3 or split_of(one) == split), None)
        if said is None:
            raise UserError(
                f"{len(words)} words are too few: of 1000 sentences of {length} of them none belongs to {split}; take a lower --longest"
            )
        yield said


def join(
    videos: str,
    *,
    out: Path,
    train: Count = 2000,
    dev: Count = 100,
    test: Count = 250,
    longest: Count = 5,
    seed: Count = 0,
    short_side: Count = 256,
) -> None:
    """Writes DIR/<split>/<number>.mp4 and DIR/clips.tsv.

    Args:
        videos: a folder with one video a word, such as hello.mp4
        out: the folder to write into
        train: sentences in train
        dev: in dev
        test: in test
        longest: words of the longest sentence
        seed: of what is drawn
        short_side: pixels
    """
    counts = {"train": train, "dev": dev, "test": test}
    if not longest:
        raise UserError("--longest: a sentence has at least one word")
    files: dict[str, VideoFile] = {}
    for path in visible_files(Path(videos), "*.mp4"):
        other = files.setdefault(path.stem.lower(), VideoFile(str(path)))
        if other.path != str(path):
            raise UserError(f"{other.path} and {path} are videos of one word: keep one of them")
    if not files:
        raise UserError(f"{videos}: there is no .mp4 in it")
    words = list(files)

    for split in ("train", "dev", "test"):
        ensure_dir(out / split)
    said = [
        (split, one)
        for split in ("train", "dev", "test")
        for one in sentences(words, split, counts[split], longest, seed)
    ]
    clips = (
        Clip(str(i), split, " ".join(one), Joined(tuple(files[word] for word in one)))
        for i, (split, one) in enumerate(said)
    )
    rows = [("video", "text", "split")]
    for i, ((split, one), done) in enumerate(
        zip(said, encode_all(clips, EncodeOptions(short_side=short_side), usable_cpus()))
    ):
        if isinstance(done, str):
            raise UserError(f"{' + '.join(one)}: {done}")
        path = out / split / f"{i:06d}.mp4"
        path.write_bytes(done[0])
        rows.append((path.relative_to(out), " ".join(one), split))
    with open(
        out / "clips.tsv", "w", newline="", encoding="utf-8"
    ) as file:  # once there is all that it names
        csv.writer(file, "excel-tab").writerows(rows)
    text = sentences(words, "train", 20_000, longest, seed + 1)
    (out / "text.txt").write_text("".join(f"{' '.join(one)}\n" for one in text), encoding="utf-8")


if __name__ == "__main__":
    write_utf8()
    words = sys.argv[1:]
    if words[:1] == ["join"]:
        words = words[1:]
    sys.exit(run_command(join, words or ["--help"], "join_words.py"))
