"""Compares two runs: scores with two paired tests, configs, and the sentences that changed most."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sacrebleu.metrics import CHRF
from sacrebleu.significance import PairedTest, Result

from flallm import config
from flallm.evaluation import metrics, sentences
from flallm.utils import UserError

TESTED_SCORES = ("bleu4", "rouge_l", "chrf", "wer")  # besides the leading one
MAX_SENTENCES = 10  # printed of those that changed
ABSENT = "(not there)"  # printed for a field that a config lacks


@dataclass(frozen=True)
class PairedSentences:
    """The hypotheses of the runs A and B for the same clips, in A's order."""

    keys: list[sentences.Key]
    references: list[str]
    a: list[str]
    b: list[str]


@dataclass(frozen=True)
class PairedScore:
    """A score of both runs; those of B carry the p of their test."""

    a: Result
    b_bootstrap: Result
    b_randomization: Result


def compare(a: Path, b: Path, split: str) -> str:
    """The comparison as text. Raises UserError if the runs were scored on other references."""
    config_a, config_b = _config(a), _config(b)
    pairs = _paired_sentences(a, b, split)
    convention = config_a.get("convention", "raw")
    num_changed = sum(x != y for x, y in zip(pairs.a, pairs.b))
    lines = [
        f"A  {a}",
        f"B  {b}",
        f"{split}: {len(pairs.keys)} sentences, {num_changed} of them differ; "
        f"convention {convention}",
        *_score_lines(pairs, convention),
        *_config_lines(config_a, config_b),
        *_changed_lines(pairs),
    ]
    return "\n".join(lines)


def _config(run: Path) -> dict[str, object]:
    advice = "name the --run_dir of a stage1, stage2 or joint command"
    return config.flat(config.read_yaml(_require_file(run, "config.yaml", advice)))


def _require_file(run: Path, name: str, advice: str) -> Path:
    if not (run / name).is_file():
        raise UserError(f"{run} has no {name}: {advice}")
    return run / name


def _paired_sentences(a: Path, b: Path, split: str) -> PairedSentences:
    hypotheses_a, references_a, keys_a = _predictions(a, split)
    hypotheses_b, references_b, keys_b = _predictions(b, split)
    different = set(zip(keys_a, references_a)) ^ set(zip(keys_b, references_b))
    if different:
        example = min(str(key) for key, _ in different)
        raise UserError(
            f"{a} and {b} do not have the same clips and references in {split}, "
            f"as with {example}: they cannot be compared"
        )
    b_by_key = dict(zip(keys_b, hypotheses_b))
    return PairedSentences(keys_a, references_a, hypotheses_a, [b_by_key[key] for key in keys_a])


def _predictions(run: Path, split: str) -> tuple[list[str], list[str], list[sentences.Key]]:
    advice = f"flallm evaluate {run} --split={split} writes it"
    return sentences.pairs(_require_file(run, f"predictions/{split}.jsonl", advice))


def _score_lines(pairs: PairedSentences, convention: str) -> list[str]:
    """Scores with the p of sacreBLEU's paired tests, the leading score first.

    p is how often chance alone separates the runs at least as far.
    """
    leading = metrics.leading(pairs.references, convention)
    tests = _paired_tests(pairs, convention, TESTED_SCORES)
    if leading not in tests:
        tests = _paired_tests(pairs, convention, (leading,)) | tests
    lines = [""]
    note = metrics.leading_note(leading)
    if note:
        lines += [note, ""]
    lines.append(
        f"{'':9}{'A':>8}{'B':>8}{'B - A':>9}   p: paired bootstrap   p: approximate randomization"
    )
    for name, test in tests.items():
        score_a, score_b = test.a.score, test.b_bootstrap.score
        # For equal scores sacreBLEU returns the smallest p there is, which suggests a difference.
        p_bootstrap, p_randomization = "-", "-"
        if score_a != score_b:
            p_bootstrap = f"{test.b_bootstrap.p_value:.4f}"
            p_randomization = f"{test.b_randomization.p_value:.4f}"
        lines.append(
            f"{metrics.LABELS[name]:9}{score_a:8.2f}{score_b:8.2f}{score_b - score_a:+9.2f}"
            f"   {p_bootstrap:>19}   {p_randomization:>28}"
        )
    return lines


def _paired_tests(
    pairs: PairedSentences, convention: str, names: tuple[str, ...]
) -> dict[str, PairedScore]:
    """names: at most one BLEU-n, because sacreBLEU calls all of them BLEU and mixes them up."""
    systems = [("A", pairs.a), ("B", pairs.b)]
    by_kind = {}
    for kind in ("bs", "ar"):  # bootstrap, approximate randomization
        tested = {name: metrics.metric(convention, name) for name in names}
        _, scores = PairedTest(systems, tested, [pairs.references], kind)()
        del scores["System"]
        by_kind[kind] = list(scores.values())
    tests = {}
    for name, bootstrap, randomization in zip(names, by_kind["bs"], by_kind["ar"], strict=True):
        tests[name] = PairedScore(bootstrap[0], bootstrap[1], randomization[1])
    return tests


def _config_lines(a: dict[str, object], b: dict[str, object]) -> list[str]:
    rows = [("config.yaml", "A", "B")]
    for name in a | b:
        value_a, value_b = a.get(name, ABSENT), b.get(name, ABSENT)
        if value_a != value_b:
            rows.append((name, str(value_a), str(value_b)))
    if len(rows) == 1:
        return ["", "config.yaml: no difference"]
    name_width = max(len(name) for name, _, _ in rows) + 3
    a_width = max(len(value_a) for _, value_a, _ in rows) + 3
    return ["", *(f"{name:{name_width}}{in_a:{a_width}}{in_b}" for name, in_a, in_b in rows)]


def _changed_lines(pairs: PairedSentences) -> list[str]:
    chrf = CHRF()
    gains = {}
    for i, (reference, a, b) in enumerate(zip(pairs.references, pairs.a, pairs.b)):
        if a != b:
            score_a = chrf.sentence_score(a, [reference]).score
            gains[i] = chrf.sentence_score(b, [reference]).score - score_a
    if not gains:
        return []
    lines = ["", f"{'chrF':>7}   the sentences that changed most"]
    for i in sorted(gains, key=lambda i: -abs(gains[i]))[:MAX_SENTENCES]:
        lines += [
            f"{gains[i]:+7.1f}   {pairs.keys[i]}",
            f"{'':10}reference   {pairs.references[i]}",
            f"{'':10}A           {pairs.a[i]}",
            f"{'':10}B           {pairs.b[i]}",
        ]
    return lines
