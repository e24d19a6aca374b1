"""`flallm ablate`: the paper's tables and figures on any recipe, as `tables.yaml` states them.

The tables' rows and the seeds give a plan of runs; what two rows need alike is one run. OUT/runs holds the run folders, named by what
differs from the recipe, so that tables share them, and a finished run (one with scores on test) is never trained again; one that was
interrupted goes on from its checkpoint. OUT/table-N.{json,md,png} is written from what is finished.
"""

from __future__ import annotations

import json
import math
import re
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np

from flallm import config as cfg
from flallm.config import Config
from flallm.data.storage import absolute
from flallm.distributed.context import init_distributed
from flallm.distributed.launch import spawn
from flallm.evaluation import metrics
from flallm.evaluation import sentences as results
from flallm.evaluation.metrics import RESAMPLES
from flallm.utils import UserError, atomic_write

TABLES = Path(__file__).parent / "tables.yaml"
SPLIT = "test"
SEED = 12345  # of the bootstrap, sacreBLEU's
SCORES = {"rouge_l": "R", "bleu1": "B1", "bleu2": "B2", "bleu3": "B3", "bleu4": "B4"}  # in the paper's order
# What a run may change when it goes on, and the runs of a table may not: a row would differ in it from the others.
MUST_MATCH = (
    "data.shards",
    "llm.path",
    "encoder.weights",
    "decode.beam",
    "decode.max_tokens",
    "decode.length_penalty",
    "train.spike",
    "train.dev_every",
    "train.dev_clips",
)
GPU = "a100-80"  # whose hours a plan has before any run is done, as in flallm plan


@dataclass(frozen=True)
class Run:
    """One training run, or with stage "features" the writing of those of a stage 1. changes: what differs from the recipe, as sorted (field, value) pairs.
    features: the run whose features it reads in place of video."""

    stage: str
    changes: tuple[tuple[str, object], ...]
    seed: int
    stage1: Run | None = None
    features: Run | None = None

    @property
    def name(self) -> str:
        """Its folder: `stage2+frozen=backbone-after-stage1+stride=2/seed0`."""
        if self.stage == "features":
            return f"{self.stage1.name}/features"
        runs = [self, self.stage1] if self.stage1 else [self]
        words = [
            "+".join([run.stage, *["cached"] * bool(run.features), *(f"{field.split('.', 1)[1]}={value}" for field, value in run.changes)])
            for run in runs
            if run is self or run.changes
        ]
        return re.sub(r"[^\w+=.-]", "_", "-after-".join(words)) + f"/seed{self.seed}"


class Sweep:
    """Tables of a recipe: their runs, and what of them is done. rows: the runs of these rows alone, where any are named."""

    def __init__(self, recipe: str, tables: list[str], seeds: int, rows: list[str], overrides: dict[str, object], out: Path):
        known = cfg.read_yaml(TABLES)
        every = known.pop("every")
        if unknown := [table for table in tables if table not in known]:
            raise UserError(f"--table: there is no table {unknown[0]!r} but {', '.join(known)}")
        self.recipe, self.out, self.seeds = recipe, out, range(seeds)
        if "seed" in overrides:
            raise UserError("--seed: a table has --seeds=n of them, 0 to n - 1")
        self.overrides = every | overrides
        self.usual = {stage: _fields(self.load(stage)) for stage in cfg.STAGES}
        names = dict.fromkeys(row["name"] for table in tables for row in known[table]["rows"])
        if unknown := [row for row in rows if row not in names]:
            raise UserError(f"--rows: table {', '.join(tables)} has no row {unknown[0]!r} but {', '.join(names)}")
        self.tables = {name: Table(self, name, known[name]) for name in tables}
        scored = [(name, run) for table in self.tables.values() for name, runs in table.rows.items() for run in runs]
        self.every = _in_order([run for _, run in scored])  # a table shows what is done of all its rows
        self.runs = _in_order([run for name, run in scored if name in (rows or names)])  # of these rows

    def load(self, stage: str, fields: dict[str, object] | None = None) -> Config:
        """The recipe with what the command line has and these fields. Joint training reads signs, whatever the LLM of stage 2 is to."""
        return cfg.load(self.recipe, stage, self.overrides | (fields or {}) | ({"llm.input": "signs"} if stage == "joint" else {}))

    def run(self, row: dict, cached: bool, seed: int) -> Run:
        """The run of a table's row. cached: whether its stage 2 reads features that are written once."""
        stage, every = row.get("stage", "stage2"), row.get("every", {})
        own = every | row.get("own", {}) | self._length(stage, row.get("length"))
        if stage != "stage2":
            return Run(stage, self._changes(stage, own), seed)
        first = every | row.get("stage1", {}) | self._length("stage1", row.get("stage1_length"))
        stage1 = Run("stage1", self._changes("stage1", first), seed)
        features = Run("features", (), seed, stage1) if cached else None
        if cached and ((config := self.load(stage, own)).llm.input == "frames" or config.frozen != "encoder"):
            raise UserError(f"row {row['name']!r} reads features that are written once: with llm.input=frames or an encoder that trains it would need video")
        return Run(stage, self._changes(stage, own), seed, stage1, features)

    def _length(self, stage: str, times: float | None) -> dict[str, object]:
        """The field that makes a stage so many times as long."""
        if not times:
            return {}
        train = self.load(stage).train
        return {"train.steps": math.ceil(train.steps * times)} if train.steps else {"train.epochs": round(train.epochs * times, 2)}

    def _changes(self, stage: str, fields: dict) -> tuple[tuple[str, object], ...]:
        """Those of the fields that the recipe does not have like this already."""
        for name, value in fields.items():
            section, _, field = str(value).partition(".")
            if section[:1] == "=" and section[1:] in cfg.STAGES:
                fields = fields | {name: self.usual[section[1:]][field]}
        found = _fields(self.load(stage, fields))
        return tuple(sorted((name, found[name]) for name in fields if found[name] != self.usual[stage][name]))

    def config(self, run: Run) -> Config:
        if run.stage == "features":
            return self.config(run.stage1)
        return self.load(run.stage, dict(run.changes) | {"seed": run.seed})

    def config_to_train(self, run: Run) -> Config:
        """With the shards that it reads, of video or of features."""
        config = self.config(run)
        return replace(config, data=replace(config.data, shards=str(self.folder(run.features)))) if run.features else config

    def folder(self, run: Run) -> Path:
        return self.out / "runs" / run.name

    def scores(self, run: Run) -> dict | None:
        """A finished run's scores."""
        try:
            return json.loads((self.folder(run) / f"scores/{SPLIT}.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):  # not there, or cut off
            return None

    def done(self, run: Run) -> bool:
        return (self.folder(run) / "seconds.txt").exists() if run.stage == "features" else self.scores(run) is not None

    def seconds(self, run: Run) -> float:
        """How long its training took, all its starts together without what an interruption lost; of features what their last start took."""
        if run.stage == "features":
            return float((self.folder(run) / "seconds.txt").read_text(encoding="utf-8"))
        return json.loads((self.folder(run) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])["seconds"]

    def timeout(self, run: Run) -> float:
        """Seconds that its ranks wait for each other."""
        from flallm.inference.features import TIMEOUT

        return TIMEOUT if run.stage == "features" else self.config(run).train.timeout

    def steps(self, run: Run) -> int:
        from flallm.data.dataset import ClipDataset
        from flallm.data.sampler import make_sampler

        config = self.config(run)
        if run.stage == "features":
            return 1  # a pass
        if config.train.steps:
            return config.train.steps
        clips = ClipDataset("train", config.data, config.seed)
        return make_sampler(config, clips.used, clips.shards.index["text_length"], 1).total(config.train.epochs)

    def check_begun(self) -> None:
        """Refuses runs of another recipe, on other shards, from other weights or decoded in another way: in one table with these they would be taken for
        what they are not."""
        from flallm.training.resume import MUTABLE_ON_RESUME, check_same

        for run in self.every:
            path, mine = self.folder(run) / "config.yaml", self.config(run)
            if run.stage != "features" and path.is_file():
                theirs = cfg.flat(cfg.from_dict(Config, cfg.read_yaml(path), str(path)))
                mine.data.shards = absolute(mine.data.shards)  # as a run records it
                theirs["data.shards"] = mine.data.shards if run.features else absolute(theirs["data.shards"])
                check_same(theirs, mine, self.folder(run), "--out", tuple({*MUTABLE_ON_RESUME} - {*MUST_MATCH}))

    def check(self, runs: list[Run]) -> None:
        """Raises UserError where shards or a language model are missing, which would else be noticed once a run begins."""
        from flallm.data.dataset import ClipDataset
        from flallm.data.tokenizer import TranslationTokenizer

        there = [run for run in runs if not run.features or self.done(run.features)]  # the others' features are to be written yet
        for config in {(c.data.shards, c.llm.path): c for c in map(self.config_to_train, there)}.values():
            for split in ("train", "dev", SPLIT):
                ClipDataset(split, config.data, config.seed)
            TranslationTokenizer(config.llm)

    def plan(self, gpu: str, ranks: int) -> str:
        """The runs, what is done of them, and the hours: of what is to be done, from the seconds that a frame took in finished runs of the same stage and
        input, and where there are none, what `flallm plan` has for so many ranks of that GPU, or of this machine's CPU."""
        from flallm.planning import estimate as cost

        causes = []  # why there is no plan, such as of a machine without the language model: what is done can be shown all the same

        @cache
        def planned(run: Run, cached: bool) -> float | None:
            try:
                config = self.config(run)
                figures = cost.cost(config, ranks, cost.device(gpu, ranks, config.train), cached=cached)
            except UserError as error:
                causes.append(error)
                return None
            return next(figure.value for figure in figures if figure.name == "run") / 3600

        done = {run: self.seconds(run) / 3600 for run in self.every if self.done(run)}
        kind = {run: (run.stage, bool(run.features)) for run in self.every}
        steps = {run: self.steps(run) for run in {*self.runs, *done}}
        configs = {run: self.config(run) for run in steps}
        frames = {run: steps[run] * config.train.batch / config.data.stride for run, config in configs.items()}  # times as many as a clip has on average
        pace = {one: np.mean([done[run] / frames[run] for run in done if kind[run] == one]) for one in {kind[run] for run in done}}
        left = {run: frames[run] * pace[kind[run]] for run in self.runs if run not in done and kind[run] in pace}
        guessable = [run for run in self.runs if run not in done | left and run.stage != "features"]
        guessed = {run: hours for run in guessable if (hours := planned(replace(run, seed=0, stage1=None, features=None), bool(run.features))) is not None}
        new, about = [run for run in self.runs if run not in done], ">" if gpu == "cpu" else "~"  # of a CPU the plan leaves decoding out
        lines = [
            f"{'; '.join(table.title for table in self.tables.values())}: {len(self.runs)} runs, {len(self.runs) - len(new)} of them done, on {self.recipe}"
        ]
        for number, run in enumerate(self.runs):
            hours = next((f"{mark}{found[run]:.2f} h" for mark, found in (("", done), ("", left), (about, guessed)) if run in found), "? h")
            unit = "pass " if run.stage == "features" else "steps"
            lines.append(f"{number:4}  {'done ' if run in done else 'to do'}  {steps[run]:8} {unit} {hours:>10}   {run.name}")
        unknown = len(new) - len(left) - len(guessed)
        sums = [f"{sum(left.values()):.2f} h"] if left else []
        if guessed:
            name = "this CPU" if gpu == "cpu" else cost.DEVICES[gpu].name
            sums.append(f"{about}{sum(guessed.values()):.2f} h on {ranks} x {name} by flallm plan")
        if unknown:
            sums.append(f"unknown hours of {unknown}: {causes[0] if causes else 'no features have been written yet'}")
        return "\n".join([*lines, f"left: {', '.join(sums)}"] if sums else lines)

    def train(self, run: Run, ranks) -> None:
        """Trains and scores a run on the ranks there are, unless that is done."""
        from flallm.evaluation.decode import evaluate
        from flallm.inference.features import features
        from flallm.training.train import train

        folder = self.folder(run)
        if self.done(run):
            return
        if ranks.is_main:
            print(f"\n== {run.name}", flush=True)
        if run.stage == "features":
            began = time.monotonic()
            features(self.folder(run.stage1), folder, ranks, "bf16", 0)
            if ranks.is_main:
                atomic_write(folder / "seconds.txt", f"{time.monotonic() - began:.1f}")
            return
        train(self.config_to_train(run), folder, ranks, self.folder(run.stage1) if run.stage1 else None)
        evaluate(folder, SPLIT, ranks)


class Table:
    """A table of a study: its rows as runs, and what comes out of those that are done."""

    def __init__(self, study: Sweep, name: str, spec: dict):
        self.study, self.name, self.spec = study, name, spec
        self.rows = {row["name"]: [study.run(row, row.get("cached", spec.get("cached", False)), seed) for seed in study.seeds] for row in spec["rows"]}

    @property
    def title(self) -> str:
        return f"{'Figure ' + self.name[3:] if self.name.startswith('fig') else 'Table ' + self.name if self.name.isdigit() else 'Past the paper'}. {self.spec['title']}"

    @property
    def stem(self) -> Path:
        """What the table's files are called, without their suffix."""
        return self.study.out / (self.name if self.name.startswith("fig") else f"table-{self.name}")

    def result(self) -> dict:
        """The table as a dict, of the rows of which every run is done."""
        done = {name: runs for name, runs in self.rows.items() if all(self.study.scores(run) for run in runs)}
        rows = {row["name"]: row for row in self.spec["rows"]}
        convention = self.study.load("stage1").convention
        said = {name: [results.pairs(self.study.folder(run) / f"predictions/{SPLIT}.jsonl") for run in runs] for name, runs in done.items()}
        found = {}
        references = said[next(iter(said))][0][1] if said else []
        leading = metrics.leading(references, convention)
        resampled = {name: bootstrap([(h, r) for h, r, _ in runs], convention, leading) for name, runs in said.items()}
        choice = self.spec.get("choice")
        for name, runs in done.items():
            scores = [self.study.scores(run) for run in runs]
            found[name] = {score: spread([s[convention][score]["value"] for s in scores]) for score in SCORES}
            found[name][leading]["ci95"] = np.percentile(resampled[name], [2.5, 97.5]).round(2).tolist()
            for score in dict.fromkeys(("bleu4", leading)):
                swapped = [self._swapped(run, sentences, convention, score) for run, sentences in zip(runs, said[name])]
                found[name][f"swapped_{score}"] = spread(swapped)
            found[name]["hours"] = float(np.mean([sum(self.study.seconds(r) for r in (run, run.stage1, run.features) if r) for run in runs])) / 3600
            found[name]["paper"] = rows[name].get("paper", {})
            found[name]["dev"] = [self._learning(run) for run in runs]
            if self.name == "fig2":
                found[name]["dominance"] = [dominance(self._logged(run, "grad_norm/llm")) for run in runs]
            if name != choice and choice in done:
                if said[name][0][1:] != said[choice][0][1:]:
                    raise UserError(
                        f"{self.study.folder(runs[0])} and {self.study.folder(done[choice][0])} were scored on other sentences: they cannot be compared"
                    )
                difference = found[name][leading]["mean"] - self._mean(done[choice], convention, leading)
                found[name]["against_choice"] = paired(resampled[name], resampled[choice], difference, leading)
        return {
            "table": self.name, "title": self.title, "recipe": self.study.recipe, "convention": convention, "split": SPLIT, "seeds": len(self.study.seeds), "choice": choice,
            "leading": leading, "sentences": len(references), "bootstrap": {"resamples": RESAMPLES, "seed": SEED, "unit": "sentence"}, "rows": found,
            "dev_leading": self._dev_leading(next(iter(done.values()))[0]) if done else leading,
            "missing": [name for name in self.rows if name not in done],
        }  # fmt: skip

    def _mean(self, runs: list[Run], convention: str, score: str) -> float:
        return float(np.mean([self.study.scores(run)[convention][score]["value"] for run in runs]))

    def _swapped(self, run: Run, sentences: tuple, convention: str, score: str) -> float:
        """A run's score from swapped videos. Its file has BLEU-4 alone if an older version wrote it."""
        scores = self.study.scores(run)
        if f"swapped_{score}" in scores:
            return scores[f"swapped_{score}"]
        from flallm.evaluation.decode import swapped

        hypotheses, references, _ = sentences
        return metrics.point_estimate(swapped(hypotheses, references), references, convention, score)

    def write(self) -> str:
        """Writes the table's files; returns it as Markdown."""
        from flallm.evaluation import plots

        result = self.result()
        stem, text = self.stem, f"{markdown(result)}\n![{self.title}]({self.stem.name}.png)\n"
        atomic_write(stem.with_suffix(".json"), json.dumps(result, indent=1))
        atomic_write(stem.with_suffix(".md"), text)
        if self.name == "fig2":
            plots.dominance(
                {name: self._logged(runs[0], "grad_norm/llm") for name, runs in self.rows.items() if name in result["rows"]}, stem.with_suffix(".png")
            )
        else:
            plots.table(result, stem.with_suffix(".png"))
        return text

    def _logged(self, run: Run, name: str) -> list[dict]:
        """What a run wrote down at the steps where it has this number."""
        rows = [json.loads(line) for line in (self.study.folder(run) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        return [row for row in rows if name in row]

    def _dev_leading(self, run: Run) -> str:
        """The score that leads on dev: a look at dev has BLEU-4, and another one where that leads."""
        last = self._logged(run, "dev_bleu4")[-1]
        return next((name for name in ("bleu1", "bleu2", "bleu3") if f"dev_{name}" in last), "bleu4")

    def _learning(self, run: Run) -> list[list[list[float]]]:
        """[clips seen, leading dev score] of a stage 1, if there is one, and of the run itself, which goes on counting where that ended."""
        curves, seen = [], 0
        for one in [run.stage1, run] if run.stage1 else [run]:
            batch = self.study.config(one).train.batch
            score = f"dev_{self._dev_leading(one)}"
            curves.append([[seen + row["step"] * batch, row[score]] for row in self._logged(one, score)])
            seen = curves[-1][-1][0]  # the last look is at its end
        return curves


def ablate(study: Sweep, where: str, ranks: int, sbatch: str, command: list[str]) -> None:
    """Prints the plan, does what is to be done of it and writes the tables."""
    import torch

    study.check_begun()
    print(study.plan("cpu" if where == "here" and not torch.cuda.is_available() else GPU, ranks), flush=True)
    left = [run for run in study.runs if not study.done(run)]
    if where != "nowhere":
        study.check(left)
    if where == "slurm" and left:
        return submit(study, left, shlex.split(sbatch), command)
    if where == "here":
        from torch.multiprocessing import ProcessExitedException

        for run in study.runs:  # a process group each: what one leaves in memory is gone
            if run in left:
                try:
                    spawn(_train, ranks, study, run)
                except ProcessExitedException as end:  # it has said why
                    raise SystemExit(end.exit_code) from None
    for table in study.tables.values():
        if any(all(study.scores(run) for run in runs) for runs in table.rows.values()):
            print(f"\n{table.write()}\nWritten: {table.stem}.json, .md and .png")


def _train(study: Sweep, run: Run) -> None:

    ranks = init_distributed(study.timeout(run))
    try:
        study.train(run, ranks)
    except UserError as error:
        if ranks.is_main:
            print(f"flallm: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def submit(study: Sweep, left: list[Run], options: list[str], command: list[str]) -> None:
    """Arrays of jobs, each once those before it are done: the runs that need no other, features of these, and the runs on top of them. A job is one run."""
    script = Path(__file__).parents[2] / "slurm/ablate.sh"
    if not script.is_file():
        raise UserError(f"--where=slurm: {script} is not there: run flallm from a checkout of its repository")
    after: list[str] = []
    waves = [r for r in left if not r.stage1], [r for r in left if r.stage == "features"], [r for r in left if r.stage1 and r.stage != "features"]
    for wave in waves:
        if wave:
            numbers = ",".join(str(study.runs.index(run)) for run in wave)
            order = ["sbatch", "--parsable", "--kill-on-invalid-dep=yes", *options, *after, f"--array={numbers}", script, *command]
            done = subprocess.run(order, capture_output=True, encoding="utf-8", errors="replace")
            if done.returncode:
                raise UserError(f"--where=slurm: sbatch says: {done.stderr.strip()}")
            job = done.stdout.strip().split(";")[0]
            print(f"job {job}: runs {numbers}")
            after = [f"--dependency=afterok:{job}"]
    print(f"The same command with --where=nowhere writes the table{'s' * (len(study.tables) > 1)} once they are done.")


def _fields(config: Config) -> dict[str, object]:
    return cfg.flat(config) | {"train.frozen": config.frozen}  # where a recipe says nothing, what that means


def _in_order(scored: list[Run]) -> list[Run]:
    """These and what they build on, which comes first."""
    below = [run.stage1 for run in scored if run.stage1] + [run.features for run in scored if run.features]
    return list(dict.fromkeys(below + [run for run in scored if not run.stage1] + [run for run in scored if run.stage1]))


def spread(values: list[float]) -> dict:
    """Mean and standard deviation over seeds; of one seed there is none."""
    return {"mean": float(np.mean(values)), "sd": float(np.std(values, ddof=1)) if len(values) > 1 else None, "values": values}


def bootstrap(runs: list[tuple[list[str], list[str]]], convention: str, score: str = "bleu4") -> np.ndarray:
    """A score (RESAMPLES,) of resampled sentences, its mean over runs (hypotheses, references). The same sentences are drawn for every run and every call,
    so that differences are paired; sentences are drawn, not runs: how seeds scatter is said by their standard deviation."""
    metric = metrics.metric(convention, score)
    drawn = np.random.default_rng(SEED).integers(len(runs[0][1]), size=(RESAMPLES, len(runs[0][1])))
    scores = np.zeros(RESAMPLES)
    for hypotheses, references in runs:
        counts = np.array(metric._extract_corpus_statistics(hypotheses, [references]))  # (sentences, counts)
        scores += [metric._compute_score_from_stats(counts[d].sum(0).tolist()).score for d in drawn]
    return scores / len(runs)


def paired(ours: np.ndarray, theirs: np.ndarray, difference: float, score: str = "bleu4") -> dict:
    """The difference of a score with its interval and p, how often chance alone would part the two at least as far (two-sided; Riezler & Maxwell 2005)."""
    differences = ours - theirs
    p = (np.sum(np.abs(differences - differences.mean()) >= abs(difference)) + 1) / (RESAMPLES + 1)
    return {score: difference, "ci95": np.percentile(differences, [2.5, 97.5]).round(2).tolist(), "p": float(p)}


def dominance(curves: list[dict]) -> dict:
    """In what share of the steps written down the last layer of the language model has the larger gradient than the encoder's, and the median of their
    ratio; then of parameters."""
    found = {"steps": len(curves)}
    for kind in ("grad", "param"):
        ratio = np.array([row[f"{kind}_norm/llm"] / max(row[f"{kind}_norm/encoder"], 1e-30) for row in curves])
        found[kind] = {"larger": float((ratio > 1).mean()), "median": float(np.median(ratio))}
    return found


def markdown(result: dict) -> str:
    """The table in the paper's layout, with the paper's numbers at the right. The leading score is the one
    with an interval and a test."""
    choice, leading = result["choice"], result["leading"]
    every = {score for row in result["rows"].values() for score in row["paper"]}
    scores = [score for score in SCORES if score in every | {"rouge_l", "bleu4"} and score != leading]
    scores.append(leading)  # in the last column
    theirs = [score for score in (*SCORES, "hours") if score in every]
    heads = [SCORES[score] for score in scores]
    heads[-1] += " [95 %]"
    if choice:
        heads.append(f"{SCORES[leading]} against {choice}")
    heads += [f"{SCORES[leading]}, swapped videos", "hours"]
    cells = [["", *heads, *[f"paper: {', '.join(SCORES.get(score, score) for score in theirs)}"] * bool(theirs)]]
    for name, row in result["rows"].items():
        cells.append([name, *(_mean_sd(row[score]) for score in scores)])
        low, high = row[leading]["ci95"]
        cells[-1][-1] += f" [{low:.2f}, {high:.2f}]"
        if choice:
            test = row.get("against_choice")
            cells[-1].append(f"{test[leading]:+.2f} [{test['ci95'][0]:+.2f}, {test['ci95'][1]:+.2f}], p = {test['p']:.3f}" if test else "")
        cells[-1] += [_mean_sd(row[f"swapped_{leading}"]), f"{row['hours']:.2f}"]
        if theirs:
            cells[-1].append(", ".join(f"{row['paper'][score]:.2f}" for score in theirs if score in row["paper"]))
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    lines.insert(1, "|" + "---|" * len(cells[0]))
    seeds = f"mean ± s.d. over {result['seeds']} seeds" if result["seeds"] > 1 else "one seed"
    note = f"{result['recipe']}, {result['sentences']} sentences of {SPLIT}, {seeds}, convention {result['convention']}; intervals and p by paired bootstrap over sentences."
    if why := metrics.leading_note(leading):
        note += f" {why}."
    note += f" Not finished yet: {', '.join(result['missing'])}." * bool(result["missing"])
    norms = [_dominance(name, row["dominance"]) for name, row in result["rows"].items() if "dominance" in row]
    return "\n".join([f"**{result['title']}**", "", *lines, "", *norms, note, ""])


def _dominance(name: str, seeds: list[dict]) -> str:
    """A row of Figure 2 in words, with each seed's numbers."""
    said = []
    for kind, what in (("grad", "gradient"), ("param", "parameters")):
        shares, medians = (" / ".join(format(seed[kind][number], form) for seed in seeds) for number, form in (("larger", ".0%"), ("median", ".2f")))
        said.append(f"{what} in {shares} of them (median of LLM ÷ encoder {medians})")
    return f"{name}, {seeds[0]['steps']} steps: the last layer of the LLM has the larger {', the larger '.join(said)}.\n"


def _mean_sd(values: dict) -> str:
    return f"{values['mean']:.2f}" + ("" if values["sd"] is None else f" ± {values['sd']:.2f}")
