"""Commands that use a trained model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

from flallm.commands.common import group_of_ranks, shards_option
from flallm.commands.parse import Count, Seconds
from flallm.utils import UserError


def translate(
    run: Path,
    *videos: str,
    format: Literal["text", "json", "srt", "vtt"] = "text",
    segments: Path | None = None,
    window: Seconds = 0.0,
    alternatives: Count = 0,
) -> int:
    """Prints a sentence for each video file.

    A file that gives none has a line on stderr, and the exit code is 2 in the end.

    Args:
        run: the folder of a run, or of an export
        videos: files that FFmpeg can read; options go before or after all of them
        format: text, json (a line an object, with confidence), or subtitles of one video: srt, vtt
        segments: a text file with start and end in seconds, a sentence a line: these parts of the
            video are translated
        window: seconds; a long video is translated in stretches of this length, one after another
        alternatives: how many further sentences of the beam json has
    """
    if not videos:
        raise UserError("translate needs at least one video file")
    for path in videos:
        if not Path(path).is_file():
            raise UserError(f"{path} is no file")
    if format in ("srt", "vtt") and len(videos) > 1:
        raise UserError(f"--format={format} is for one video")
    if alternatives and format != "json":
        raise UserError("--alternatives goes with --format=json")
    if window and segments is not None:
        raise UserError("--window is a number of seconds, and excludes --segments")

    from flallm.inference.translate import read_segments

    spans = None if segments is None else read_segments(segments)
    return _print_sentences(run, videos, format, spans, window, alternatives)


def _print_sentences(
    run: Path,
    videos: tuple[str, ...],
    format: str,
    spans: list | None,
    window: float,
    alternatives: int,
) -> int:
    """Prints a sentence as soon as it is decoded. Returns the exit code."""
    from tqdm import tqdm

    from flallm.evaluation.decode import load_run
    from flallm.inference.translate import line, translate

    timed, several = bool(spans or window), len(videos) > 1
    failed, number = 0, 0
    with group_of_ranks() as ranks:
        model, config = load_run(run, ranks.device)
        beam = config.decode.beam
        if alternatives >= beam:
            raise UserError(
                f"--alternatives: {run} decodes with a beam of {beam}, "
                f"so there are {beam - 1} at most"
            )
        if format == "vtt":
            print("WEBVTT\n")
        sentences = translate(model, config, videos, ranks.device, spans, window, alternatives)
        # None: tqdm draws a bar on a terminal and nothing in a log.
        hidden = None if several or timed else True
        for sentence in tqdm(sentences, unit=" sentences", disable=hidden):
            if sentence.error:
                failed += 1
                tqdm.write(f"flallm: {sentence.error}", file=sys.stderr)
            else:
                number += 1
                tqdm.write(line(sentence, format, number, timed, several), file=sys.stdout)
    return 2 if failed else 0


def export(
    run: Path,
    out: Path,
    *,
    lora: Literal["merged", "separate"] = "merged",
    license: str = "unknown",
    shards: str = "",
) -> None:
    """Writes a run's best model as a folder of its own, with a model card.

    `flallm.load(OUT).translate(video)` reads it.

    Args:
        run: the folder of a run
        out: the folder to write
        lora: merged or separate: whether low-rank updates are added to the weights under them
        license: this model's licence on its card
        shards: where the run's shards lie now, which the card describes, if not where its
            config.yaml says
    """
    from flallm.inference.export import export

    with shards_option(shards):
        export(run, out, lora == "merged", license, shards)
