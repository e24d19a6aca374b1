"""`flallm shards CORPUS … --out DIR`, which is `python tools/make_shards.py CORPUS … --out DIR`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from flallm import config
from flallm.commands import parse
from flallm.commands.parse import Count, PositiveInt, parse_value
from flallm.utils import UserError, usable_cpus

if TYPE_CHECKING:
    from flallm.data.clips import Clip, SkippedClip

ENCODING = """\
Encoding, for every corpus:
    --short_side=256   pixels of the short side; a smaller source is not enlarged
    --fps=N            frames per second; the source's by default
    --crf=22           x264's quality, lower is better
    --gop=96           frames between keyframes
    --per_shard=500    clips a shard
    --processes=N      encoders at a time; by default one for each core that it may use
    --part=i/n         only every n-th shard from the i-th on (from 0), so that many nodes can
                       share the work; at the end the same command without --part joins the indexes
"""
MAX_SIZE = 1024


def synthetic(
    *,
    out: str,
    preset: str = "demo",
    dials: str = "",
    seed: Count = 0,
    train: Count | None = None,
    dev: Count | None = None,
    test: Count | None = None,
    size: Count = 72,
    **options: str,
) -> None:
    """The embedded corpus: sentences of a small grammar, signed by procedural signers.

    Text for a language model goes into OUT/text.txt.

    Args:
        out: the folder to write into
        preset: demo, or bench, a harder one to measure on
        dials: what differs from the preset, as in --dials=tail=0,signers=16,4,6: fields of
            `CorpusConfig` in flallm/data/corpora/synthetic.py
        seed: of everything random
        train: clips in train; 2400 in demo, 4800 in bench
        dev: clips in dev; 100 and 150
        test: clips in test, by signers that are in no other split; 250 and 400
        size: pixels of a frame's sides, 16 to 1024
        options: encoding, see --help without a corpus
    """
    from flallm.data.corpora import synthetic

    if preset not in synthetic.PRESETS:
        raise UserError(f"--preset: {preset!r} is none of {', '.join(synthetic.PRESETS)}")
    if size < 16:
        raise UserError(f"--size: '{size}' is not a whole number from 16 on")
    if size > MAX_SIZE:
        raise UserError(f"--size: {size} is over {MAX_SIZE} pixels")
    changes = [dial.partition("=") for dial in re.split(r",(?=\w+=)", dials) if dial]
    fields = vars(synthetic.PRESETS[preset]) | {name: value for name, _, value in changes}
    corpus_config = config.from_dict(synthetic.CorpusConfig, fields, "--dials")
    numbers = {"seed": seed}
    for split, given, usual in zip(
        ("train", "dev", "test"), (train, dev, test), corpus_config.clips
    ):
        numbers[split] = usual if given is None else given
    numbers["size"] = size
    corpus = {"name": "synthetic", **numbers}
    if corpus_config != synthetic.DEMO:
        values = vars(corpus_config).items()
        plain = {name: list(v) if isinstance(v, tuple) else v for name, v in values}
        corpus |= {"preset": preset, "dials": plain}

    def sentences() -> Iterator[str]:
        pairs = synthetic.sentences("text", corpus_config.sentences, seed, corpus_config)
        return (sentence for _, sentence in pairs)

    def clips() -> Iterator[Clip]:
        return synthetic.clips(**numbers, dials=corpus_config)

    _make(clips, out, options, corpus, sentences)


def manifest(table: Path, *, out: str, root: Path | None = None, **options: str) -> None:
    """Any data set: a table of videos (or folders of frames) and their texts.

    Args:
        table: .csv, .tsv or .jsonl with the columns video, text, split, and optionally key, start,
            end (seconds), gloss, signer, fps (of folders)
        out: the folder to write into
        root: what the paths in `video` are relative to; the table's folder by default
        options: encoding, see --help without a corpus
    """
    from flallm.data.corpora import manifest

    corpus = {"name": "manifest", "table": table.name}
    _make(lambda: manifest.clips(table, root or table.parent), out, options, corpus)


def phoenix14t(release: Path, *, out: str, **options: str) -> None:
    """PHOENIX-2014-T from its official tree.

    Args:
        release: the folder PHOENIX-2014-T-release-v3 or the PHOENIX-2014-T in it
        out: the folder to write into
        options: encoding, see --help without a corpus
    """
    from flallm.data.corpora import phoenix14t

    _make(lambda: phoenix14t.clips(release), out, options, {"name": "phoenix14t"})


def csl_daily(root: Path, *, out: str, **options: str) -> None:
    """CSL-Daily from its official tree.

    Args:
        root: the folder that holds sentence_label and sentence/frames_512x512 or sentence-crop
        out: the folder to write into
        options: encoding, see --help without a corpus
    """
    from flallm.data.corpora import csl_daily

    _make(lambda: csl_daily.clips(root), out, options, {"name": "csl-daily"})


def how2sign(
    tables: Path,
    *,
    out: str,
    videos: Path | None = None,
    precut: Path | None = None,
    **options: str,
) -> None:
    """How2Sign: its re-aligned sentences, cut out of the full videos, or the published clips.

    The published clips were cut at other times.

    Args:
        tables: the folder of how2sign_realigned_train.csv, how2sign_realigned_val.csv and
            how2sign_realigned_test.csv
        out: the folder to write into
        videos: the folder of the full videos; they may lie deeper in it
        precut: instead of it the folder of the published clips
        options: encoding, see --help without a corpus
    """
    from flallm.data.corpora import how2sign

    if (videos is None) == (precut is None):
        raise UserError(
            "how2sign: either --videos=DIR of the full videos "
            "or --precut=DIR of the published clips is needed"
        )
    times = "re-aligned"
    if precut is not None:
        times = (
            "original: the published clips' own, "
            "which differ from the re-aligned times of the tables"
        )

    def clips() -> Iterator[Clip | SkippedClip]:
        print(f"times: {times}")
        return how2sign.clips(tables, videos or precut, precut is not None)

    _make(clips, out, options, {"name": "how2sign", "times": times})


def labels(folder: Path, *, root: Path, out: str, **options: str) -> None:
    """The labels.train, labels.dev, labels.test files of GFSLT-VLP and its descendants.

    Args:
        folder: where labels.* lie
        root: what their imgs_path or video_path are relative to
        out: the folder to write into
        options: encoding, see --help without a corpus
    """
    from flallm.data.corpora import labels

    _make(lambda: labels.clips(folder, root), out, options, {"name": "labels"})


def verify(folder: str, *, split: str | None = None, processes: PositiveInt | None = None) -> int:
    """Reads every sample back: checksums, frames, keys, and that the tars match the index.

    Exit code 1: something is wrong.

    Args:
        folder: the folder of finished shards
        split: only this one; all by default
        processes: readers at a time; by default one for each core that it may use
    """
    from flallm.data.reader import splits_of
    from flallm.data.verify import verify

    splits = [split] if split else splits_of(folder)
    problems = 0
    for line in verify(folder, splits, processes or usable_cpus()):
        print(line)
        problems += 1
    print(f"{problems} problems" if problems else "all samples are as the index says")
    return 1 if problems else 0


def parse_part(value: str) -> tuple[int, int]:
    """i and n of --part=i/n."""
    number, _, parts = value.partition("/")
    if not (number.isdecimal() and parts.isdecimal() and int(number) < int(parts)):
        raise UserError(f"--part: {value!r} is not of the form i/n with i from 0 to n - 1")
    return int(number), int(parts)


def _make(
    clips: Callable[[], Iterable[Clip | SkippedClip]],
    out: str,
    options: dict[str, str],
    corpus: dict,
    sentences: Callable[[], Iterator[str]] | None = None,
) -> None:
    """Writes the shards, and the sentences into OUT/text.txt.

    options: of `EncodeOptions`, processes and part. corpus: what dataset.json has of the source.
    """
    from flallm.data.encode import EncodeOptions
    from flallm.data.shards import make_shards

    processes = None
    if "processes" in options:
        processes = parse_value("processes", options.pop("processes"), PositiveInt)
    part = parse_part(options.pop("part", "0/1"))
    encoding = config.from_options(EncodeOptions, options)
    dataset = make_shards(clips(), out, encoding, corpus, processes, part)
    if not dataset:
        print(
            f"part {part[0]} of {part[1]} is made; "
            "when all are, the same command without --part joins them"
        )
        return
    if sentences:
        text = "".join(f"{sentence}\n" for sentence in sentences())
        (Path(out) / "text.txt").write_text(text, encoding="utf-8")
    _summarize(dataset, out)


def _summarize(dataset: dict, out: str) -> None:
    for split, counts in dataset["splits"].items():
        print(f"{split}: {counts['clips']} clips, {counts['frames']} frames")
    skipped = dataset["left_out"]
    print(f"rows kept: sha256 {dataset['rows_sha256'][:16]}…, left out: {len(skipped)}")
    for row in skipped[:10]:
        print(f"  {row['split']} {row['key']}: {row['cause']}")
    if len(skipped) > 10:
        print(f"  … all are listed in {out}/dataset.json")


COMMANDS = {
    "synthetic": synthetic,
    "manifest": manifest,
    "phoenix14t": phoenix14t,
    "csl-daily": csl_daily,
    "how2sign": how2sign,
    "labels": labels,
    "verify": verify,
}


def overview(program: str) -> str:
    """The corpora and the options of encoding."""
    lines = [f"{program} CORPUS …: makes the WebDataset shards that flallm trains on.", ""]
    lines += [f"  {name:11} {parse.summary(command)}" for name, command in COMMANDS.items()]
    return "\n".join([*lines, "", "Each has --help.", "", ENCODING])


def run(words: list[str], program: str) -> int:
    """Runs the command that the words name; returns the exit code."""
    return parse.run(words, COMMANDS, program, lambda: overview(program))
