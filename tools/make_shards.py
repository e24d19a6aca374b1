"""Makes the WebDataset shards that flallm trains on: `python tools/make_shards.py CORPUS … --out DIR`."""

import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from flallm import cli, config
from flallm.data.clips import Clip, SkippedClip
from flallm.data.encode import EncodeOptions
from flallm.data.shards import make_shards
from flallm.utils import UserError, usable_cpus

ENCODING = """
    Encoding, for every corpus:
        --short_side=256   pixels of the short side; a smaller source is not enlarged
        --fps=N            frames per second; the source's where it is not given
        --crf=22           x264's quality, lower is better
        --gop=96           frames between keyframes
        --per_shard=500    clips a shard
        --processes=N      encoders at a time; one for each core that it may use where it is not given
        --part=i/n         only every n-th shard from the i-th on (from 0), so that many nodes can share the work;
                           at the end the same command without --part joins the indexes
"""


def synthetic(
    *,
    out: str,
    preset: str = "demo",
    dials: str = "",
    seed: str = "0",
    train: str | None = None,
    dev: str | None = None,
    test: str | None = None,
    size: str = "72",
    **options: str,
) -> cli.DeferredCommand:
    """The embedded corpus: sentences of a small grammar, signed by procedural signers. Text for a language model goes into OUT/text.txt.

    Args:
        out: the folder to write into
        preset: demo, or bench, a harder one to measure on
        dials: what differs from the preset, as in --dials=tail=0,signers=16,4,6: fields of `CorpusConfig` in flallm/data/corpora/synthetic.py
        seed: of everything random
        train: clips in train; 2400 in demo, 4800 in bench
        dev: clips in dev; 100 and 150
        test: clips in test, by signers that are in no other split; 250 and 400
        size: pixels of a frame's sides
        options: encoding, see --help of the tool
    """
    from flallm.data.corpora import synthetic

    if preset not in synthetic.PRESETS:
        raise UserError(f"--preset: {preset!r} is none of {', '.join(synthetic.PRESETS)}")
    given = dict(dial.partition("=")[::2] for dial in re.split(r",(?=\w+=)", dials) if dial)
    turned = config.from_dict(
        synthetic.CorpusConfig, vars(synthetic.PRESETS[preset]) | given, "--dials"
    )
    counts = dict(zip(("train", "dev", "test"), turned.clips))
    counts |= {
        name: cli.parse_int(name, value)
        for name, value in (("train", train), ("dev", dev), ("test", test))
        if value is not None
    }
    numbers = {
        "seed": cli.parse_int("seed", seed),
        **counts,
        "size": cli.parse_int("size", size, 16),
    }
    if numbers["size"] > 1024:
        raise UserError(f"--size: {size} is over 1024 pixels")

    def text() -> Iterator[str]:
        return (
            sentence
            for _, sentence in synthetic.sentences(
                "text", turned.sentences, numbers["seed"], turned
            )
        )

    corpus = {"name": "synthetic", **numbers}
    if turned != synthetic.DEMO:
        corpus |= {
            "preset": preset,
            "dials": {
                name: list(v) if isinstance(v, tuple) else v for name, v in vars(turned).items()
            },
        }
    return _job(lambda: synthetic.clips(**numbers, dials=turned), out, options, corpus, text)


def manifest(
    table: str, *, out: str, root: str | None = None, **options: str
) -> cli.DeferredCommand:
    """Any data set: a table of videos (or folders of frames) and their texts.

    Args:
        table: .csv, .tsv or .jsonl with the columns video, text, split, and optionally key, start, end (seconds), gloss, signer, fps (of folders)
        out: the folder to write into
        root: what the paths in `video` are relative to; the table's folder where it is not given
        options: encoding, see --help of the tool
    """
    from flallm.data.corpora import manifest

    return _job(
        lambda: manifest.clips(Path(table), Path(root) if root else Path(table).parent),
        out,
        options,
        {"name": "manifest", "table": Path(table).name},
    )


def phoenix14t(release: str, *, out: str, **options: str) -> cli.DeferredCommand:
    """PHOENIX-2014-T from its official tree.

    Args:
        release: the folder PHOENIX-2014-T-release-v3 or the PHOENIX-2014-T in it
        out: the folder to write into
        options: encoding, see --help of the tool
    """
    from flallm.data.corpora import phoenix14t

    return _job(lambda: phoenix14t.clips(Path(release)), out, options, {"name": "phoenix14t"})


def csl_daily(root: str, *, out: str, **options: str) -> cli.DeferredCommand:
    """CSL-Daily from its official tree.

    Args:
        root: the folder that holds sentence_label and sentence/frames_512x512 or sentence-crop
        out: the folder to write into
        options: encoding, see --help of the tool
    """
    from flallm.data.corpora import csl_daily

    return _job(lambda: csl_daily.clips(Path(root)), out, options, {"name": "csl-daily"})


def how2sign(
    tables: str, *, out: str, videos: str | None = None, precut: str | None = None, **options: str
) -> cli.DeferredCommand:
    """How2Sign: its re-aligned sentences, cut out of the full videos; or the published clips, which were cut at other times.

    Args:
        tables: the folder of how2sign_realigned_train.csv, how2sign_realigned_val.csv and how2sign_realigned_test.csv
        out: the folder to write into
        videos: the folder of the full videos; they may lie deeper in it
        precut: instead of it the folder of the published clips
        options: encoding, see --help of the tool
    """
    from flallm.data.corpora import how2sign

    if (videos is None) == (precut is None):
        raise UserError(
            "how2sign: either --videos=DIR of the full videos or --precut=DIR of the published clips is needed"
        )
    times = (
        "re-aligned"
        if videos
        else "original: the published clips' own, which differ from the re-aligned times of the tables"
    )

    def clips():
        print(f"times: {times}")
        return how2sign.clips(Path(tables), Path(videos or precut), precut is not None)

    return _job(clips, out, options, {"name": "how2sign", "times": times})


def labels(folder: str, *, root: str, out: str, **options: str) -> cli.DeferredCommand:
    """The labels.train, labels.dev, labels.test files of GFSLT-VLP and its descendants.

    Args:
        folder: where labels.* lie
        root: what their imgs_path or video_path are relative to
        out: the folder to write into
        options: encoding, see --help of the tool
    """
    from flallm.data.corpora import labels

    return _job(lambda: labels.clips(Path(folder), Path(root)), out, options, {"name": "labels"})


def verify(
    folder: str, *, split: str | None = None, processes: str | None = None
) -> cli.DeferredCommand:
    """Reads every sample back: checksums, all frames, keys, and that the tars hold what the index says. Exit code 1 where something is wrong.

    Args:
        folder: the folder of finished shards
        split: only this one; all where it is not given
        processes: readers at a time; one for each core that it may use where it is not given
    """

    def work() -> int:
        from flallm.data.reader import splits_of
        from flallm.data.verify import verify

        problems = 0
        for line in verify(
            folder,
            [split] if split else splits_of(folder),
            cli.parse_int("processes", processes, 1) if processes else usable_cpus(),
        ):
            print(line)
            problems += 1
        print(f"{problems} problems" if problems else "all samples are as the index says")
        return 1 if problems else 0

    return cli.DeferredCommand(work)


def _part(value: str) -> tuple[int, int]:
    number, _, of = value.partition("/")
    if not (number.isdecimal() and of.isdecimal() and int(number) < int(of)):
        raise UserError(f"--part: {value!r} is not of the form i/n with i from 0 to n - 1")
    return int(number), int(of)


def _job(
    clips,
    out: str,
    options: dict[str, str],
    corpus: dict,
    text: Callable[[], Iterator[str]] | None = None,
) -> cli.DeferredCommand:
    processes, part = options.pop("processes", None), _part(options.pop("part", "0/1"))
    encoding = config.from_options(EncodeOptions, options)

    def work() -> None:
        found: Iterable[Clip | SkippedClip] = clips()
        dataset = make_shards(
            found,
            out,
            encoding,
            corpus,
            cli.parse_int("processes", processes, 1) if processes else None,
            part,
        )
        if not dataset:
            print(
                f"part {part[0]} of {part[1]} is made; when all are, the same command without --part joins them"
            )
            return
        if text:
            (Path(out) / "text.txt").write_text(
                "".join(f"{sentence}\n" for sentence in text()), encoding="utf-8"
            )
        for split, counts in dataset["splits"].items():
            print(f"{split}: {counts['clips']} clips, {counts['frames']} frames")
        print(
            f"rows kept: sha256 {dataset['rows_sha256'][:16]}…, left out: {len(dataset['left_out'])}"
        )
        for row in dataset["left_out"][:10]:
            print(f"  {row['split']} {row['key']}: {row['cause']}")
        if len(dataset["left_out"]) > 10:
            print(f"  … all are listed in {out}/dataset.json")

    return cli.DeferredCommand(work)


COMMANDS = {
    f.__name__.replace("_", "-"): f
    for f in (synthetic, manifest, phoenix14t, csl_daily, how2sign, labels, verify)
}

if __name__ == "__main__":
    if sys.argv[1:] in ([], ["--help"]):
        print(
            __doc__
            + "\nCORPUS is one of these, each with --help: "
            + ", ".join(COMMANDS)
            + "\n"
            + ENCODING
        )
        sys.exit(0)
    sys.exit(cli.run(COMMANDS, "make_shards.py"))
