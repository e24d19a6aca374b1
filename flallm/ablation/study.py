"""Which runs the tables of a study need, and which of them are done.

`tables.yaml` states the rows of each table. A row has one run a seed, with the runs that it builds
on; rows that need the same run share it, over all tables. OUT/runs holds the run folders. A folder
is named by what differs from the recipe. A run that has scores on test is done.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

from flallm import config as cfg
from flallm.config import Config
from flallm.data.storage import absolute
from flallm.utils import UserError

TABLES = Path(__file__).parent / "tables.yaml"
SPLIT = "test"
# An interrupted run may change these fields when it resumes. The runs of one table have to agree.
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


@dataclass(frozen=True)
class Run:
    """A training run, or with stage "features" the pass that writes the features of a stage 1.

    changes: sorted (field, value) pairs that differ from the recipe.
    features: the run whose features this one reads in place of video.
    """

    stage: str
    changes: tuple[tuple[str, object], ...]
    seed: int
    stage1: Run | None = None
    features: Run | None = None

    @property
    def name(self) -> str:
        """Its folder, such as `stage2+frozen=backbone-after-stage1+stride=2/seed0`."""
        if self.stage == "features":
            return f"{self.stage1.name}/features"
        label = self._label()
        if self.stage1 and self.stage1.changes:
            label += f"-after-{self.stage1._label()}"
        return re.sub(r"[^\w+=.-]", "_", label) + f"/seed{self.seed}"

    def _label(self) -> str:
        words = [self.stage]
        if self.features:
            words.append("cached")
        words += [f"{field.split('.', 1)[1]}={value}" for field, value in self.changes]
        return "+".join(words)

    def parts(self) -> list[Run]:
        """This run and the runs that it builds on."""
        return [run for run in (self, self.stage1, self.features) if run]


class Sweep:
    """The runs of some tables on one recipe, with seeds 0 to `seeds` - 1.

    Attributes:
        rows: table -> row -> its runs, one a seed
        all_runs: the runs of all rows and the runs that these build on, which come first
        runs: the same of the selected rows alone; the number of a run is its place here

    Raises UserError for a table or row that does not exist.
    """

    def __init__(
        self,
        recipe: str,
        tables: list[str],
        seeds: int,
        rows: list[str],
        overrides: dict[str, object],
        out: Path,
    ):
        """rows: the selected rows; all where it is empty. overrides: fields of all runs."""
        known = cfg.read_yaml(TABLES)
        common = known.pop("common")
        for table in tables:
            if table not in known:
                names = ", ".join(known)
                raise UserError(f"--table: there is no table {table!r} but {names}")
        if "seed" in overrides:
            raise UserError("--seed: a table has --seeds=n of them, 0 to n - 1")
        self.recipe, self.out, self.seeds = recipe, out, range(seeds)
        self.overrides = common | overrides
        self.base_fields = {stage: _fields(self.load(stage)) for stage in cfg.STAGES}
        self.specs = {table: known[table] for table in tables}
        self._check_rows(rows)
        self.rows = {table: self._rows(spec) for table, spec in self.specs.items()}
        scored, selected = [], []
        for table_rows in self.rows.values():
            for name, runs in table_rows.items():
                scored += runs
                if not rows or name in rows:
                    selected += runs
        self.all_runs = _with_prerequisites(scored)
        self.runs = _with_prerequisites(selected)

    def _check_rows(self, rows: list[str]) -> None:
        names = {}
        for spec in self.specs.values():
            names |= dict.fromkeys(row["name"] for row in spec["rows"])
        for row in rows:
            if row not in names:
                tables = ", ".join(self.specs)
                raise UserError(f"--rows: table {tables} has no row {row!r} but {', '.join(names)}")

    def title(self, table: str) -> str:
        if table.startswith("fig"):
            label = f"Figure {table[3:]}"
        elif table.isdigit():
            label = f"Table {table}"
        else:
            label = "Past the paper"
        return f"{label}. {self.specs[table]['title']}"

    def load(self, stage: str, fields: dict[str, object] | None = None) -> Config:
        """The recipe with the overrides and these fields."""
        overrides = self.overrides | (fields or {})
        if stage == "joint":  # joint training reads signs, whatever the LLM of stage 2 reads
            overrides["llm.input"] = "signs"
        return cfg.load(self.recipe, stage, overrides)

    def _rows(self, spec: dict) -> dict[str, list[Run]]:
        rows = {}
        for row in spec["rows"]:
            cached = row.get("cached", spec.get("cached", False))
            rows[row["name"]] = [self._run(row, cached, seed) for seed in self.seeds]
        return rows

    def _run(self, row: dict, cached: bool, seed: int) -> Run:
        """The scored run of a row. cached: its stage 2 reads features that are written once."""
        stage, common = row.get("stage", "stage2"), row.get("common", {})
        fields = common | row.get("overrides", {}) | self._length(stage, row.get("length"))
        changes = self._changes(stage, fields)
        if stage != "stage2":
            return Run(stage, changes, seed)
        length = self._length("stage1", row.get("stage1_length"))
        stage1_fields = common | row.get("stage1", {}) | length
        stage1 = Run("stage1", self._changes("stage1", stage1_fields), seed)
        if not cached:
            return Run(stage, changes, seed, stage1)
        config = self.load(stage, fields)
        if config.llm.input == "frames" or config.frozen != "encoder":
            raise UserError(
                f"row {row['name']!r} reads features that are written once: "
                "with llm.input=frames or an encoder that trains it would need video"
            )
        return Run(stage, changes, seed, stage1, Run("features", (), seed, stage1))

    def _length(self, stage: str, factor: float | None) -> dict[str, object]:
        """The field that makes a stage `factor` times as long."""
        if not factor:
            return {}
        train = self.load(stage).train
        if train.steps:
            return {"train.steps": math.ceil(train.steps * factor)}
        return {"train.epochs": round(train.epochs * factor, 2)}

    def _changes(self, stage: str, fields: dict[str, object]) -> tuple[tuple[str, object], ...]:
        """The fields whose values differ from the recipe's."""
        fields = {name: self._resolve(value) for name, value in fields.items()}
        resolved, base = _fields(self.load(stage, fields)), self.base_fields[stage]
        return tuple(
            sorted((name, resolved[name]) for name in fields if resolved[name] != base[name])
        )

    def _resolve(self, value: object) -> object:
        """A value such as =joint.train.lr_encoder is the recipe's, of that stage and field."""
        stage, _, field = str(value).partition(".")
        if stage.startswith("=") and stage[1:] in cfg.STAGES:
            return self.base_fields[stage[1:]][field]
        return value

    def config(self, run: Run) -> Config:
        if run.stage == "features":
            return self.config(run.stage1)
        return self.load(run.stage, dict(run.changes) | {"seed": run.seed})

    def training_config(self, run: Run) -> Config:
        """A run's config with the shards that it reads, of video or of features."""
        config = self.config(run)
        if not run.features:
            return config
        return replace(config, data=replace(config.data, shards=str(self.folder(run.features))))

    def folder(self, run: Run) -> Path:
        return self.out / "runs" / run.name

    def scores(self, run: Run) -> dict | None:
        """A finished run's scores."""
        path = self.folder(run) / f"scores/{SPLIT}.json"
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):  # not written yet, or cut off
            return None

    def done(self, run: Run) -> bool:
        if run.stage == "features":
            return (self.folder(run) / "seconds.txt").exists()
        return self.scores(run) is not None

    def metrics(self, run: Run) -> list[dict]:
        """The rows of a run's metrics.jsonl."""
        text = (self.folder(run) / "metrics.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]

    def seconds(self, run: Run) -> float:
        """How long a finished run trained, over all its starts, without what interruptions lost.

        The time of features is that of their last start.
        """
        if run.stage == "features":
            return float((self.folder(run) / "seconds.txt").read_text(encoding="utf-8"))
        return self.metrics(run)[-1]["seconds"]

    def timeout(self, run: Run) -> float:
        """Seconds that the ranks of a run wait for each other."""
        from flallm.inference.features import TIMEOUT

        if run.stage == "features":
            return TIMEOUT
        return self.config(run).train.timeout

    def steps(self, run: Run) -> int:
        """Optimiser steps of a run; 1 for features, which are one pass."""
        from flallm.data.dataset import ClipDataset
        from flallm.data.sampler import make_sampler

        config = self.config(run)
        if run.stage == "features":
            return 1
        if config.train.steps:
            return config.train.steps
        clips = ClipDataset("train", config.data, config.seed)
        sampler = make_sampler(config, clips.used, clips.shards.index["text_length"], 1)
        return sampler.total(config.train.epochs)

    def check_begun(self) -> None:
        """Raises UserError where a run in OUT has another recipe, shards, weights or decoding.

        A table would compare it with runs that it does not match.
        """
        from flallm.training.resume import MUTABLE_ON_RESUME, check_same

        mutable = tuple({*MUTABLE_ON_RESUME} - {*MUST_MATCH})
        for run in self.all_runs:
            path = self.folder(run) / "config.yaml"
            if run.stage == "features" or not path.is_file():
                continue
            current = self.config(run)
            current.data.shards = absolute(current.data.shards)  # as a run records it
            saved = cfg.flat(cfg.from_dict(Config, cfg.read_yaml(path), str(path)))
            if run.features:  # its config.yaml names the features
                saved["data.shards"] = current.data.shards
            else:
                saved["data.shards"] = absolute(saved["data.shards"])
            check_same(saved, current, self.folder(run), "--out", mutable)

    def check(self, runs: list[Run]) -> None:
        """Raises UserError where shards or a language model are missing, before any run begins."""
        from flallm.data.dataset import ClipDataset
        from flallm.data.tokenizer import TranslationTokenizer

        configs = {}
        for run in runs:
            if run.features and not self.done(run.features):
                continue  # its shards are written later
            config = self.training_config(run)
            configs[config.data.shards, config.llm.path] = config
        for config in configs.values():
            for split in ("train", "dev", SPLIT):
                ClipDataset(split, config.data, config.seed)
            TranslationTokenizer(config.llm)


def _fields(config: Config) -> dict[str, object]:
    """All fields; train.frozen is what holds where a recipe does not state it."""
    return cfg.flat(config) | {"train.frozen": config.frozen}


def _with_prerequisites(scored: list[Run]) -> list[Run]:
    """These runs and those that they build on, in an order in which they can be trained."""
    stage1 = [run.stage1 for run in scored if run.stage1]
    features = [run.features for run in scored if run.features]
    independent = [run for run in scored if not run.stage1]
    dependent = [run for run in scored if run.stage1]
    return list(dict.fromkeys(stage1 + features + independent + dependent))
