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

from flallm import cli
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
    out: str,
    train: str = "2000",
    dev: str = "100",
    test: str = "250",
    longest: str = "5",
    seed: str = "0",
    short_side: str = "256",
) -> cli.DeferredCommand:
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
    given = {
        "train": train,
        "dev": dev,
        "test": test,
        "longest": longest,
        "seed": seed,
        "short_side": short_side,
    }
    numbers = {name: cli.parse_int(name, value) for name, value in given.items()}
    if not numbers["longest"]:
        raise UserError("--longest: a sentence has at least one word")
    files: dict[str, VideoFile] = {}
    for path in visible_files(Path(videos), "*.mp4"):
        other = files.setdefault(path.stem.lower(), VideoFile(str(path)))
        if other.path != str(path):
            raise UserError(f"{other.path} and {path} are videos of one word: keep one of them")
    if not files:
        raise UserError(f"{videos}: there is no .mp4 in it")
    words = list(files)

    def work() -> None:
        for split in ("train", "dev", "test"):
            ensure_dir(Path(out) / split)
        said = [
            (split, one)
            for split in ("train", "dev", "test")
            for one in sentences(words, split, numbers[split], numbers["longest"], numbers["seed"])
        ]
        clips = (
            Clip(str(i), split, " ".join(one), Joined(tuple(files[word] for word in one)))
            for i, (split, one) in enumerate(said)
        )
        rows = [("video", "text", "split")]
        for i, ((split, one), done) in enumerate(
            zip(
                said,
                encode_all(clips, EncodeOptions(short_side=numbers["short_side"]), usable_cpus()),
            )
        ):
            if isinstance(done, str):
                raise UserError(f"{' + '.join(one)}: {done}")
            path = Path(out) / split / f"{i:06d}.mp4"
            path.write_bytes(done[0])
            rows.append((path.relative_to(out), " ".join(one), split))
        with open(
            Path(out) / "clips.tsv", "w", newline="", encoding="utf-8"
        ) as file:  # once there is all that it names
            csv.writer(file, "excel-tab").writerows(rows)
        text = sentences(words, "train", 20_000, numbers["longest"], numbers["seed"] + 1)
        (Path(out) / "text.txt").write_text(
            "".join(f"{' '.join(one)}\n" for one in text), encoding="utf-8"
        )

    return cli.DeferredCommand(work)


if __name__ == "__main__":
    if sys.argv[1:2] != ["join"]:  # which help and errors name
        sys.argv.insert(1, "join")
    sys.exit(cli.run({"join": join}, "join_words.py"))
