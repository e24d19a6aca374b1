"""Every command. Fire reads the command line; a command checks it and returns its work, which starts once all is read."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import fire
from fire.decorators import SetParseFn

from flallm import config
from flallm.distributed.context import init_distributed, shutdown
from flallm.distributed.failures import report_first_failure
from flallm.utils import UserError, usable_cpus


class DeferredCommand:
    """Work that waits until Fire has accepted the whole command line; what it returns is the exit code, None is 0."""

    def __init__(self, work: Callable[[], int | None]):
        self._work = work


def parse_int(option: str, value: str, least: int = 0) -> int:
    """The whole number that an option was given."""
    if not value.isdecimal() or int(value) < least:
        raise UserError(
            f"--{option}: {value!r} is not a whole number" + f" from {least} on" * bool(least)
        )
    return int(value)


def demo(*, out: str = "flallm-demo") -> DeferredCommand:
    """The whole job on an embedded corpus: shards, stage 1, stage 2, scores and a translated clip, in some ten minutes on two cores.

    Args:
        out: the folder to write into
    """
    from flallm.demo.demo import demo

    return DeferredCommand(lambda: demo(Path(out)))


def stage1(recipe: str, *, run_dir: str | None = None, **overrides: str) -> DeferredCommand:
    """Visual initialing: trains the visual encoder with a light translation model (Light-T) behind it.

    Args:
        recipe: a built-in name such as demo, or the path of a YAML file
        run_dir: the folder of the run; runs/<the name of the recipe>-stage1 where it is not given
        overrides: fields of the recipe, as in --train.steps=100 --data.shards=DIR
    """
    return _training("stage1", recipe, run_dir, overrides)


def stage2(
    recipe: str, *, stage1: str, run_dir: str | None = None, **overrides: str
) -> DeferredCommand:
    """LLM fine-tuning: trains a large language model on the frozen visual encoder of a stage-1 run.

    Args:
        recipe: a built-in name such as demo, or the path of a YAML file
        stage1: the folder of the finished stage-1 run
        run_dir: the folder of the run; runs/<the name of the recipe>-stage2 where it is not given
        overrides: fields of the recipe, as in --train.lr_language=1e-5 --llm.path=DIR
    """
    return _training("stage2", recipe, run_dir, overrides, Path(stage1))


def joint(recipe: str, *, run_dir: str | None = None, **overrides: str) -> DeferredCommand:
    """The end-to-end baseline: encoder and large language model trained together, nothing frozen.

    Args:
        recipe: a built-in name such as demo, or the path of a YAML file
        run_dir: the folder of the run; runs/<the name of the recipe>-joint where it is not given
        overrides: fields of the recipe, as in --train.steps=100
    """
    return _training("joint", recipe, run_dir, overrides)


def _training(
    stage: str,
    recipe: str,
    run_dir: str | None,
    overrides: dict[str, str],
    stage1: Path | None = None,
) -> DeferredCommand:
    resolved = config.load(recipe, stage, overrides)
    run = Path(run_dir or f"runs/{resolved.name or Path(recipe).stem}-{stage}")

    def work() -> None:
        from flallm.training.train import train

        with _ranks(resolved.train.timeout) as ranks:
            train(resolved, run, ranks, stage1)

    return DeferredCommand(work)


def evaluate(run: str, *, split: str = "test", shards: str = "") -> DeferredCommand:
    """Decodes a split with a run's best checkpoint, and writes predictions/<split>.jsonl and scores/<split>.json.

    Args:
        run: the folder of a run
        split: train, dev or test
        shards: where the run's shards lie now, if not where its config.yaml says
    """

    def work() -> None:
        from flallm.evaluation.decode import evaluate

        with _ranks() as ranks, _shards_option(shards):
            scores = evaluate(Path(run), split, ranks, shards)
            if ranks.is_main:
                print(json.dumps(scores, indent=1))

    return DeferredCommand(work)


def features(
    run: str, *, out: str, dtype: str = "bf16", copies: str = "0", shards: str = ""
) -> DeferredCommand:
    """Writes the sign-wise features of a run's encoder as shards: stage 2 takes them by --data.shards in place of video, and so does what is done with its run.

    Args:
        run: the folder of a stage-1 run
        out: the folder to write into
        dtype: bf16, fp16 or fp32
        copies: how many augmented copies of each training clip; 0: training sees the clips as they are
        shards: where the run's shards lie now, if not where its config.yaml says
    """
    if dtype not in ("bf16", "fp16", "fp32"):
        raise UserError(f"--dtype: {dtype!r} is none of bf16, fp16, fp32")
    number = parse_int("copies", copies)

    def work() -> None:
        from flallm.inference.features import TIMEOUT, features

        with _ranks(TIMEOUT) as ranks, _shards_option(shards):
            features(Path(run), Path(out), ranks, dtype, number, shards)

    return DeferredCommand(work)


def trim(
    llm: str, *, shards: str, out: str, text: str | None = None, most: str = "0"
) -> DeferredCommand:
    """Writes a pre-trained model without the tokens that the training text of a data set does not need; `--llm.path=OUT` then names it.

    Args:
        llm: a folder or hub name in Hugging Face layout
        shards: the data set
        out: the folder to write
        text: a file with other text of the language, a sentence a line …
        most: … of which so many of the most frequent tokens are kept as well, for words that training lacks
    """
    number = parse_int("most", most)
    if bool(text) != bool(number):
        raise UserError(
            "--text and --most belong together: a file, and how many of its tokens to keep"
        )
    if text and not Path(text).is_file():
        raise UserError(f"--text: {text} does not exist")

    def work() -> None:
        from flallm.model.trim import trim

        print(trim(llm, shards, Path(out), Path(text) if text else None, number))

    return DeferredCommand(work)


def plan(
    recipe: str,
    *,
    world_size: str,
    gpu: str = "a100-80",
    stage: str | None = None,
    clips_per_s: str | None = None,
    **overrides: str,
) -> DeferredCommand:
    """What a recipe will take on so many GPUs: parameters, memory, steps, hours, communication, decoding, checkpoints. Exit code 1: it does not fit.

    Args:
        recipe: a built-in name such as phoenix14t, or the path of a YAML file
        world_size: ranks, one a GPU
        gpu: a100-40, a100-80, h100-80, h200, or cpu for this machine
        stage: stage1, stage2 or joint; both stages where it is not given
        clips_per_s: of the whole job, where they were measured, in place of a computed step; needs --stage
        overrides: fields of the recipe, as in --train.batch=64
    """
    ranks = parse_int("world_size", world_size, 1)
    if clips_per_s and not stage:
        raise UserError("--clips_per_s belongs to one stage: name it with --stage")
    if clips_per_s and not (clips_per_s.replace(".", "", 1).isdecimal() and float(clips_per_s)):
        raise UserError(f"--clips_per_s: {clips_per_s!r} is not a number above 0")
    stages = [stage] if stage else ["stage1", "stage2"]
    if stage and stage not in config.STAGES:
        raise UserError(f"--stage: {stage!r} is none of {', '.join(config.STAGES)}")
    resolved = [config.load(recipe, name, overrides) for name in stages]

    def work() -> int:
        from flallm.planning import estimate as cost

        code = 0
        for one in resolved:
            device = cost.device(gpu, ranks, one.train)
            figures = cost.cost(one, ranks, device, float(clips_per_s) if clips_per_s else None)
            print(
                f"{one.name or recipe} {one.stage} on {ranks} x {device.name}\n{cost.show(figures)}\n"
            )
            if too_much := cost.advice(figures, device):
                print(f"{one.stage} {too_much}\n")
                code = 1
        return code

    return DeferredCommand(work)


def export(
    run: str, out: str, *, lora: str = "merged", license: str = "unknown", shards: str = ""
) -> DeferredCommand:
    """Writes a run's best model as a folder of its own, with a model card: `flallm.load(OUT).translate(video)`.

    Args:
        run: the folder of a run
        out: the folder to write
        lora: merged or separate: whether low-rank updates are added to the weights under them
        license: what the card says of this model's licence
        shards: where the run's shards lie now, which the card tells of, if not where its config.yaml says
    """
    if lora not in ("merged", "separate"):
        raise UserError(f"--lora: {lora!r} is neither merged nor separate")

    def work() -> None:
        from flallm.inference.export import export

        with _shards_option(shards):
            export(Path(run), Path(out), lora == "merged", license, shards)

    return DeferredCommand(work)


def score(
    hypotheses: str, references: str | None = None, *, convention: str = "all"
) -> DeferredCommand:
    """Scores sentences with 95 % intervals and prints them as JSON; "all" prints them under the name of each convention.

    Args:
        hypotheses: a text file with a sentence a line, a predictions.jsonl, or a pickle of another code base's results
        references: the same of the references, as a second word too (score HYPOTHESES REFERENCES); not needed where the first file holds both
        convention: raw, 13a, csl-daily, zh, lower or all
    """

    def work() -> None:
        from flallm.evaluation import metrics
        from flallm.evaluation import sentences as results

        names = list(metrics.CONVENTIONS) if convention == "all" else [convention]
        said, meant, _ = results.pairs(Path(hypotheses), Path(references) if references else None)
        scores = metrics.scores(said, meant, names)
        print(json.dumps(scores if convention == "all" else scores[convention], indent=1))

    return DeferredCommand(work)


def compare(run_a: str, run_b: str, *, split: str = "test") -> DeferredCommand:
    """Two evaluated runs side by side: scores with paired tests, what differs in their configs, the sentences that changed most.

    Args:
        run_a: the folder of a run
        run_b: the folder of another, scored on the same references
        split: train, dev or test
    """

    def work() -> None:
        from flallm.evaluation.compare import compare

        print(compare(Path(run_a), Path(run_b), split))

    return DeferredCommand(work)


def probe(run: str, *, split: str = "test", shards: str = "") -> DeferredCommand:
    """How much of a run's score comes from seeing: decodes a split from spoilt videos too, scores it in parts, and writes probes/<split>.json.

    Args:
        run: the folder of a run
        split: train, dev or test
        shards: where the run's shards lie now, if not where its config.yaml says
    """

    def work() -> None:
        from flallm.evaluation.probe import probe, table

        with _ranks() as ranks, _shards_option(shards):
            found = probe(Path(run), split, ranks, shards)
            if ranks.is_main:
                print(table(found))

    return DeferredCommand(work)


def report(
    run: str, *, split: str = "test", clips: str = "24", shards: str = ""
) -> DeferredCommand:
    """Writes report.html of a run, one file for any browser, no network: scores among the published ones, curves, probes, config, sentences with clips.

    Args:
        run: the folder of a run
        split: train, dev or test
        clips: how many sentences come with their clip, evenly spread from the best to the worst
        shards: where the run's shards lie now, if not where its config.yaml says
    """
    number = parse_int("clips", clips)

    def work() -> None:
        from flallm.report.report import report

        with _shards_option(shards):
            print(report(Path(run), split, number, shards))

    return DeferredCommand(work)


def ablate(
    recipe: str,
    *,
    table: str,
    seeds: str = "1",
    rows: str = "",
    out: str = "ablate",
    ranks: str = "1",
    where: str = "here",
    sbatch: str = "",
    run: str | None = None,
    **overrides: str,
) -> DeferredCommand:
    """The runs of the paper's tables on a recipe, those that are not done yet; prints the plan first, and writes the tables with tests.

    Args:
        recipe: a built-in name such as demo, or the path of a YAML file
        table: 4, 5, 6, 7, 8, 9, 10, fig2 or fig4 of the paper, or steps, words or lora, past it; several
            separated by commas share their runs. See flallm/ablation/tables.yaml
        seeds: how many seeds, 0 to n - 1, each run has
        rows: only these rows of the tables, separated by commas
        out: the folder to write into; tables in one folder share runs
        ranks: how many ranks of this machine a run has
        where: here, one run after another; slurm, as arrays of jobs; nowhere, only the plan and the tables of what is done
        sbatch: options of sbatch for these jobs, such as "--partition=gpu --time=8:00:00"
        run: only the run of this number in the plan, on the ranks that a launcher has started
        overrides: fields of the recipe, in all runs
    """
    from flallm.ablation.ablate import ablate, train_run
    from flallm.ablation.study import Sweep

    if where not in ("here", "slurm", "nowhere"):
        raise UserError(f"--where: {where!r} is none of here, slurm, nowhere")
    world_size = parse_int("ranks", ranks, 1)
    tables, chosen_rows = ([word.strip() for word in words.split(",")] for words in (table, rows))
    study = Sweep(
        recipe,
        tables,
        parse_int("seeds", seeds, 1),
        [row for row in chosen_rows if row],
        overrides,
        Path(out),
    )
    if run is None:
        options = {"table": table, "seeds": seeds, "rows": rows, "out": out} | overrides
        return DeferredCommand(
            lambda: ablate(
                study,
                where,
                world_size,
                sbatch,
                [recipe, *(f"--{name}={value}" for name, value in options.items())],
            )
        )
    number = parse_int("run", run)
    if number >= len(study.runs):
        raise UserError(f"--run: the plan has runs 0 to {len(study.runs) - 1}")

    def work() -> None:
        chosen = study.runs[number]
        with _ranks(study.timeout(chosen)) as group:
            train_run(study, chosen, group)

    return DeferredCommand(work)


def translate(
    run: str,
    *videos: str,
    format: str = "text",
    segments: str | None = None,
    window: str = "0",
    alternatives: str = "0",
) -> DeferredCommand:
    """Prints a sentence for each video file. One that gives none has a line on stderr, and the exit code is 2 in the end.

    Args:
        run: the folder of a run, or of an export
        videos: files that FFmpeg can read; --alternatives and the like go before or after all of them
        format: text, json (a line an object, with confidence), or subtitles of one video: srt, vtt
        segments: a text file with start and end in seconds, a sentence a line: these parts of the video are translated
        window: seconds; a long video is translated in stretches of this length, one after another
        alternatives: how many further sentences of the beam json has
    """
    if not videos:
        raise UserError("translate needs at least one video file")
    if missing := next((path for path in videos if not Path(path).is_file()), None):
        raise UserError(f"{missing} is no file")
    if format not in ("text", "json", "srt", "vtt"):
        raise UserError(f"--format: {format!r} is none of text, json, srt, vtt")
    if format in ("srt", "vtt") and len(videos) > 1:
        raise UserError(f"--format={format} is for one video")
    further = parse_int("alternatives", alternatives)
    if further and format != "json":
        raise UserError("--alternatives goes with --format=json")
    if not window.replace(".", "", 1).isdecimal() or (float(window) and segments is not None):
        raise UserError("--window is a number of seconds, and excludes --segments")

    def work() -> int:
        from tqdm import tqdm

        from flallm.evaluation.decode import load_run
        from flallm.inference.translate import line, read_segments, translate

        spans, failed, number = None if segments is None else read_segments(Path(segments)), 0, 0
        with _ranks() as ranks:
            model, config = load_run(Path(run), ranks.device)
            if further >= config.decode.beam:
                raise UserError(
                    f"--alternatives: {run} decodes with a beam of {config.decode.beam}, so there are {config.decode.beam - 1} at most"
                )
            if format == "vtt":
                print("WEBVTT\n")
            found = translate(model, config, videos, ranks.device, spans, float(window), further)
            for one in tqdm(
                found,
                unit=" sentences",
                disable=None if len(videos) > 1 or spans or float(window) else True,
            ):
                if one.error:
                    failed += 1
                    tqdm.write(f"flallm: {one.error}", file=sys.stderr)
                else:
                    number += 1
                    tqdm.write(
                        line(one, format, number, bool(spans or float(window)), len(videos) > 1),
                        file=sys.stdout,
                    )
        return 2 if failed else 0

    return DeferredCommand(work)


def doctor(
    recipe: str | None = None, *, run_dir: str = "runs", **overrides: str
) -> DeferredCommand:
    """Looks at this machine and at what a recipe needs of it: rows OK, WARN, MISS with what to do. Exit code 1: something is missing.

    Args:
        recipe: a built-in name such as phoenix14t, or the path of a YAML file, as a first word too (doctor RECIPE); without it only the machine
        run_dir: where runs will lie
        overrides: fields of the recipe, as in --data.shards=DIR
    """
    configs = (
        [config.load(recipe, stage, overrides) for stage in ("stage1", "stage2")] if recipe else []
    )

    def work() -> int:
        from flallm.planning.doctor import MISS, doctor

        missing = 0
        for state, what, found in doctor(configs, Path(run_dir)):
            missing += state == MISS
            print(f"{state:5} {what:16} {found}", flush=True)
        return 1 if missing else 0

    return DeferredCommand(work)


@contextlib.contextmanager
def _ranks(timeout: float = 600):
    """The ranks for the work of one command."""

    try:
        ranks = init_distributed(timeout)
        with report_first_failure(ranks):
            yield ranks
    finally:
        shutdown()


@contextlib.contextmanager
def _shards_option(shards: str):
    """The work of a command on a run whose shards may lie elsewhere now. Raises UserError, which
    names the option, where they are not found."""
    from flallm.data.reader import NoShards, splits_of

    try:
        if shards:
            splits_of(shards)  # some commands would go on without
        yield
    except NoShards as error:
        raise UserError(f"{error}, or name the folder where they lie now: --shards=DIR") from None


COMMANDS = {
    f.__name__: f
    for f in (
        demo,
        stage1,
        stage2,
        joint,
        evaluate,
        features,
        trim,
        plan,
        score,
        compare,
        probe,
        report,
        ablate,
        translate,
        export,
        doctor,
    )
}


def run(commands: dict[str, Callable], name: str) -> int:
    """Runs the command of sys.argv; returns the exit code: 0 done, 2 the user's mistake (one line)."""
    _write_utf8()
    said = io.StringIO()
    for command in commands.values():
        SetParseFn(str)(command)  # which takes words as they stand, not what Fire makes of them
    try:
        words = [
            re.sub("^(--[^=]+=)~(?=/)", lambda m: m[1] + os.path.expanduser("~"), w)
            for w in sys.argv[1:]
            if w not in ("--help", "-h")
        ]
        _check_values(words)
        if len(words) < len(sys.argv) - 1:
            words = [
                *words[:1],
                "--",
                "--help",
            ]  # Fire would take --help for one of a recipe's fields
        with contextlib.redirect_stderr(said):
            job = fire.Fire(commands, words, name, serialize=lambda _: None)
    except fire.core.FireExit as exit:
        if (
            exit.code == 0
        ):  # the help, without what Fire says of its own attribute and of letters that two options share
            text = re.sub(
                r"\nGROUPS\n.*?FIRE_METADATA\n", "", said.getvalue(), flags=re.DOTALL
            ).replace("GROUP | ", "")
            print(re.sub(r"^    -\w, --", "    --", text, flags=re.MULTILINE))
            return 0
        line = next(
            (x for x in said.getvalue().splitlines() if x.startswith("ERROR: ")),
            "ERROR: what is meant?",
        )
        return _mistake(name, f"{line.removeprefix('ERROR: ')} (see {name} --help)")
    except UserError as error:
        return _mistake(name, error)
    if not isinstance(job, DeferredCommand):
        print(f"{name}: one of these commands is needed, each with --help: {', '.join(commands)}")
        return 0 if len(sys.argv) == 1 else 2
    try:
        return job._work() or 0
    except UserError as error:
        return _mistake(name, error)


def _write_utf8() -> None:
    """Makes this process and the ranks that it starts print UTF-8, as files are written, whatever the locale's encoding is."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    os.environ.setdefault("PYTHONIOENCODING", "utf-8:backslashreplace")


def _check_values(words: list[str]) -> None:
    """Raises UserError for an option without a value, of which Fire makes the text True."""
    for word, following in itertools.pairwise([*words, "--"]):
        if word == "--":  # what follows is for Fire
            return
        if re.fullmatch(r"--[\w.]+", word) and following.startswith("--"):
            raise UserError(f"{word} has no value: write {word}=VALUE")


def _mistake(name: str, error: object) -> int:
    print(f"{name}: {error}", file=sys.stderr)
    return 2


def main() -> None:
    os.environ.setdefault(
        "TOKENIZERS_PARALLELISM", "false"
    )  # workers are forked after the tokenizer was used
    os.environ.setdefault("OMP_NUM_THREADS", str(usable_cpus()))  # PyTorch looks at no quota
    try:
        code = run(COMMANDS, "flallm")
        sys.stdout.flush()
    except BrokenPipeError:  # who reads has enough, as `flallm score … | head` does
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # for what Python flushes at its end
        code = 1
    sys.exit(code)
