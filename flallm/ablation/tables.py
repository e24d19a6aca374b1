"""What comes out of the runs of a study: OUT/table-N.{json,md,png}."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flallm.ablation.study import SPLIT, Run, Sweep
from flallm.evaluation import metrics
from flallm.evaluation import sentences as results
from flallm.evaluation.metrics import RESAMPLES
from flallm.utils import UserError, atomic_write

SEED = 12345  # of the bootstrap, sacreBLEU's
# In the order of the paper's columns.
SCORES = {"rouge_l": "R", "bleu1": "B1", "bleu2": "B2", "bleu3": "B3", "bleu4": "B4"}
GRADIENT_NORM = "grad_norm/llm"


@dataclass(frozen=True)
class FinishedRow:
    """A row of which every run is done, with one entry a run in each list."""

    runs: list[Run]
    scores: list[dict]  # of the convention of the table
    sentences: list[tuple[list[str], list[str], list]]  # hypotheses, references, keys

    def values(self, score: str) -> list[float]:
        return [scores[score]["value"] for scores in self.scores]


class Table:
    """One table of a sweep."""

    def __init__(self, sweep: Sweep, name: str):
        self.sweep, self.name, self.spec = sweep, name, sweep.specs[name]
        self.rows, self.title = sweep.rows[name], sweep.title(name)

    @property
    def stem(self) -> Path:
        """The path of the table's files, without their suffix."""
        name = self.name if self.name.startswith("fig") else f"table-{self.name}"
        return self.sweep.out / name

    def finished(self) -> dict[str, list[Run]]:
        """The rows of which every run has scores."""
        return {
            name: runs
            for name, runs in self.rows.items()
            if all(self.sweep.scores(run) for run in runs)
        }

    def result(self) -> dict:
        """The table's finished rows, as its JSON file has them."""
        convention = self.sweep.load("stage1").convention
        rows = {name: self._read(runs, convention) for name, runs in self.finished().items()}
        first = next(iter(rows.values()), None)
        references = first.sentences[0][1] if first else []
        leading = metrics.leading(references, convention)
        return {
            "table": self.name,
            "title": self.title,
            "recipe": self.sweep.recipe,
            "convention": convention,
            "split": SPLIT,
            "seeds": len(self.sweep.seeds),
            "choice": self.spec.get("choice"),
            "leading": leading,
            "sentences": len(references),
            "bootstrap": {"resamples": RESAMPLES, "seed": SEED, "unit": "sentence"},
            "rows": self._rows(rows, convention, leading),
            "dev_leading": self._dev_leading(first.runs[0]) if first else leading,
            "missing": [name for name in self.rows if name not in rows],
        }

    def _read(self, runs: list[Run], convention: str) -> FinishedRow:
        files = [self.sweep.folder(run) / f"predictions/{SPLIT}.jsonl" for run in runs]
        return FinishedRow(
            runs,
            [self.sweep.scores(run)[convention] for run in runs],
            [results.pairs(file) for file in files],
        )

    def _rows(self, rows: dict[str, FinishedRow], convention: str, leading: str) -> dict[str, dict]:
        """The figures of each row, with the difference from the row that the paper chose."""
        samples = {}
        for name, row in rows.items():
            pairs = [(hypotheses, references) for hypotheses, references, _ in row.sentences]
            samples[name] = bootstrap(pairs, convention, leading)
        figures = {}
        for name, row in rows.items():
            figures[name] = self._figures(row, convention, leading)
            figures[name][leading]["ci95"] = _interval(samples[name])
            figures[name]["paper"] = self._paper(name)
            figures[name]["dev"] = [self._dev_curves(run) for run in row.runs]
            if self.name == "fig2":
                curves = [self.logged(run, GRADIENT_NORM) for run in row.runs]
                figures[name]["dominance"] = [dominance(curve) for curve in curves]
        choice = self.spec.get("choice")
        for name, row in rows.items():
            if choice not in rows or name == choice:
                continue
            self._check_comparable(row, rows[choice])
            mean, base = (np.mean(rows[x].values(leading)) for x in (name, choice))
            figures[name]["against_choice"] = paired(
                samples[name], samples[choice], float(mean - base), leading
            )
        return figures

    def _figures(self, row: FinishedRow, convention: str, leading: str) -> dict:
        """Scores, scores from swapped videos and hours, without what needs other rows."""
        figures = {score: spread(row.values(score)) for score in SCORES}
        for score in dict.fromkeys(("bleu4", leading)):
            swapped = [
                self._swapped(run, sentences, convention, score)
                for run, sentences in zip(row.runs, row.sentences)
            ]
            figures[f"swapped_{score}"] = spread(swapped)
        seconds = [sum(self.sweep.seconds(part) for part in run.parts()) for run in row.runs]
        figures["hours"] = float(np.mean(seconds)) / 3600
        return figures

    def _paper(self, name: str) -> dict[str, float]:
        spec = next(row for row in self.spec["rows"] if row["name"] == name)
        return spec.get("paper", {})

    def _check_comparable(self, row: FinishedRow, choice: FinishedRow) -> None:
        if row.sentences[0][1:] != choice.sentences[0][1:]:
            folders = [self.sweep.folder(finished.runs[0]) for finished in (row, choice)]
            raise UserError(
                f"{folders[0]} and {folders[1]} were scored on other sentences: "
                "they cannot be compared"
            )

    def _swapped(self, run: Run, sentences: tuple, convention: str, score: str) -> float:
        """A run's score from swapped videos. Files of an older version have BLEU-4 alone."""
        from flallm.evaluation.decode import mismatched

        scores = self.sweep.scores(run)
        if f"swapped_{score}" in scores:
            return scores[f"swapped_{score}"]
        hypotheses, references, _ = sentences
        hypotheses = mismatched(hypotheses, references)
        return metrics.point_estimate(hypotheses, references, convention, score)

    def write(self) -> str:
        """Writes the table's files; returns it as Markdown."""
        from flallm.evaluation import plots

        result, picture = self.result(), self.stem.with_suffix(".png")
        text = f"{markdown(result)}\n![{self.title}]({picture.name})\n"
        atomic_write(self.stem.with_suffix(".json"), json.dumps(result, indent=1))
        atomic_write(self.stem.with_suffix(".md"), text)
        if self.name == "fig2":
            first_runs = {name: self.rows[name][0] for name in result["rows"]}
            curves = {name: self.logged(run, GRADIENT_NORM) for name, run in first_runs.items()}
            plots.dominance(curves, picture)
        else:
            plots.table(result, picture)
        return text

    def logged(self, run: Run, name: str) -> list[dict]:
        """The rows of a run's metrics.jsonl that have this number."""
        return [row for row in self.sweep.metrics(run) if name in row]

    def _dev_leading(self, run: Run) -> str:
        """The score that leads on dev: an evaluation has BLEU-4, and another where that leads."""
        last = self.logged(run, "dev_bleu4")[-1]
        return next(
            (name for name in ("bleu1", "bleu2", "bleu3") if f"dev_{name}" in last), "bleu4"
        )

    def _dev_curves(self, run: Run) -> list[list[list[float]]]:
        """[clips seen, leading dev score] of the run's stage 1, if it has one, and of the run.

        The run counts on from where its stage 1 ends.
        """
        curves, seen = [], 0
        for part in [run.stage1, run] if run.stage1 else [run]:
            batch = self.sweep.config(part).train.batch
            score = f"dev_{self._dev_leading(part)}"
            rows = self.logged(part, score)
            curves.append([[seen + row["step"] * batch, row[score]] for row in rows])
            seen = curves[-1][-1][0]  # the last evaluation is at its end
        return curves


def spread(values: list[float]) -> dict:
    """Mean and standard deviation over seeds; the deviation of one seed is None."""
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "sd": deviation, "values": values}


def bootstrap(
    runs: list[tuple[list[str], list[str]]], convention: str, score: str = "bleu4"
) -> np.ndarray:
    """A score (RESAMPLES,) of resampled sentences, its mean over runs (hypotheses, references).

    Every run and every call draws the same sentences, so that differences are paired. Sentences are
    drawn, not runs: the standard deviation over seeds states how these scatter.
    """
    metric = metrics.metric(convention, score)
    sentences = len(runs[0][1])
    draws = np.random.default_rng(SEED).integers(sentences, size=(RESAMPLES, sentences))
    scores = np.zeros(RESAMPLES)
    for hypotheses, references in runs:
        # (sentences, counts)
        counts = np.array(metric._extract_corpus_statistics(hypotheses, [references]))
        sums = [counts[draw].sum(0).tolist() for draw in draws]
        scores += [metric._compute_score_from_stats(total).score for total in sums]
    return scores / len(runs)


def _interval(samples: np.ndarray) -> list[float]:
    return np.percentile(samples, [2.5, 97.5]).round(2).tolist()


def paired(samples: np.ndarray, base: np.ndarray, difference: float, score: str = "bleu4") -> dict:
    """A difference of scores with its 95 % interval and its two-sided p.

    p is how often chance alone parts the two at least as far (Riezler & Maxwell 2005).
    samples, base: (RESAMPLES,) from `bootstrap`.
    """
    differences = samples - base
    extreme = np.abs(differences - differences.mean()) >= abs(difference)
    p = (np.sum(extreme) + 1) / (RESAMPLES + 1)
    return {score: difference, "ci95": _interval(differences), "p": float(p)}


def dominance(curves: list[dict]) -> dict:
    """Compares the last layer of the language model with that of the encoder.

    larger: the share of logged steps in which its gradient (grad) or its parameters (param) have
    the larger norm; median: of the ratio of the norms.
    """
    result: dict = {"steps": len(curves)}
    for kind in ("grad", "param"):
        ratios = [
            row[f"{kind}_norm/llm"] / max(row[f"{kind}_norm/encoder"], 1e-30) for row in curves
        ]
        larger = float((np.array(ratios) > 1).mean())
        result[kind] = {"larger": larger, "median": float(np.median(ratios))}
    return result


def markdown(result: dict) -> str:
    """The table in the paper's layout, with the paper's numbers at the right.

    The leading score is in the last column of scores, with its interval and its test.
    """
    published = {score for row in result["rows"].values() for score in row["paper"]}
    cells = [_heads(result, published)]
    for name, row in result["rows"].items():
        cells.append(_cells(name, row, result, published))
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    lines.insert(1, "|" + "---|" * len(cells[0]))
    norms = [
        _dominance_text(name, row["dominance"])
        for name, row in result["rows"].items()
        if "dominance" in row
    ]
    return "\n".join([f"**{result['title']}**", "", *lines, "", *norms, _note(result), ""])


def _columns(leading: str, published: set[str]) -> list[str]:
    """The scores that the table shows."""
    shown = published | {"rouge_l", "bleu4"}
    return [score for score in SCORES if score in shown and score != leading] + [leading]


def _heads(result: dict, published: set[str]) -> list[str]:
    leading, choice = result["leading"], result["choice"]
    heads = ["", *(SCORES[score] for score in _columns(leading, published))]
    heads[-1] += " [95 %]"
    if choice:
        heads.append(f"{SCORES[leading]} against {choice}")
    heads += [f"{SCORES[leading]}, swapped videos", "hours"]
    if published:
        names = [SCORES.get(score, score) for score in (*SCORES, "hours") if score in published]
        heads.append(f"paper: {', '.join(names)}")
    return heads


def _cells(name: str, row: dict, result: dict, published: set[str]) -> list[str]:
    leading = result["leading"]
    cells = [name, *(_mean_sd(row[score]) for score in _columns(leading, published))]
    low, high = row[leading]["ci95"]
    cells[-1] += f" [{low:.2f}, {high:.2f}]"
    if result["choice"]:
        cells.append(_test_text(row.get("against_choice"), leading))
    cells += [_mean_sd(row[f"swapped_{leading}"]), f"{row['hours']:.2f}"]
    if published:
        paper = [row["paper"][score] for score in (*SCORES, "hours") if score in row["paper"]]
        cells.append(", ".join(f"{value:.2f}" for value in paper))
    return cells


def _test_text(test: dict | None, leading: str) -> str:
    if not test:
        return ""
    low, high = test["ci95"]
    return f"{test[leading]:+.2f} [{low:+.2f}, {high:+.2f}], p = {test['p']:.3f}"


def _note(result: dict) -> str:
    seeds = "one seed"
    if result["seeds"] > 1:
        seeds = f"mean ± s.d. over {result['seeds']} seeds"
    note = (
        f"{result['recipe']}, {result['sentences']} sentences of {SPLIT}, {seeds}, "
        f"convention {result['convention']}; "
        "intervals and p by paired bootstrap over sentences."
    )
    if reason := metrics.leading_note(result["leading"]):
        note += f" {reason}."
    if result["missing"]:
        note += f" Not finished yet: {', '.join(result['missing'])}."
    return note


def _dominance_text(name: str, seeds: list[dict]) -> str:
    """A row of Figure 2 in words, with each seed's numbers."""
    parts = []
    for kind, label in (("grad", "gradient"), ("param", "parameters")):
        shares = " / ".join(f"{seed[kind]['larger']:.0%}" for seed in seeds)
        medians = " / ".join(f"{seed[kind]['median']:.2f}" for seed in seeds)
        parts.append(f"{label} in {shares} of them (median of LLM ÷ encoder {medians})")
    text = ", the larger ".join(parts)
    return f"{name}, {seeds[0]['steps']} steps: the last layer of the LLM has the larger {text}.\n"


def _mean_sd(values: dict) -> str:
    if values["sd"] is None:
        return f"{values['mean']:.2f}"
    return f"{values['mean']:.2f} ± {values['sd']:.2f}"
