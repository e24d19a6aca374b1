"""Two runs side by side: scores with two paired tests, what differs in their configs, and the sentences that changed most."""

from __future__ import annotations

from pathlib import Path

from sacrebleu.metrics import CHRF
from sacrebleu.significance import PairedTest, Result

from flallm import config
from flallm.evaluation import metrics
from flallm.evaluation import sentences as results
from flallm.utils import UserError

TESTED = ("bleu4", "rouge_l", "chrf", "wer")  # beside the score that leads
SENTENCES = 10  # that are shown


def compare(a: Path, b: Path, split: str) -> str:
    """The comparison as text. Raises UserError where the runs were not scored on the same references."""
    configs = [config.flat(config.read_yaml(_file(run, "config.yaml", "name the --run_dir of a stage1, stage2 or joint command"))) for run in (a, b)]
    said_a, references, keys = _predictions(a, split)
    said_b, references_b, keys_b = _predictions(b, split)
    if unlike := sorted(str(key) for key, _ in set(zip(keys, references)) ^ set(zip(keys_b, references_b))):
        raise UserError(f"{a} and {b} do not have the same clips and references in {split}, as with {unlike[0]}: they cannot be compared")
    by_key = dict(zip(keys_b, said_b))
    said_b = [by_key[key] for key in keys]
    convention = configs[0].get("convention", "raw")
    return "\n".join(
        [
            f"A  {a}\nB  {b}\n{split}: {len(keys)} sentences, {sum(x != y for x, y in zip(said_a, said_b))} of them differ; convention {convention}",
            *_scores(said_a, said_b, references, convention),
            *_configs(*configs),
            *_changed(said_a, said_b, references, keys),
        ]
    )


def _file(run: Path, name: str, advice: str) -> Path:
    if not (run / name).is_file():
        raise UserError(f"{run} has no {name}: {advice}")
    return run / name


def _predictions(run: Path, split: str) -> tuple[list[str], list[str], list[results.Key]]:
    return results.pairs(_file(run, f"predictions/{split}.jsonl", f"flallm evaluate {run} --split={split} writes it"))


def _scores(said_a: list[str], said_b: list[str], references: list[str], convention: str) -> list[str]:
    """sacreBLEU's paired tests, of the leading score first. A p is how often chance alone would part the runs at least as far."""
    leading = metrics.leading(references, convention)
    tested = _paired_tests(said_a, said_b, references, convention, TESTED)
    if leading not in tested:
        tested = _paired_tests(said_a, said_b, references, convention, (leading,)) | tested
    rows = [f"\n{'':9}{'A':>8}{'B':>8}{'B - A':>9}   p: paired bootstrap   p: approximate randomization"]
    if note := metrics.leading_note(leading):
        rows.insert(0, f"\n{note}")
    for name, (one, other, randomized) in tested.items():
        # Of equal scores sacreBLEU's p is the smallest there is, which would look like a finding.
        p = ("-", "-") if one.score == other.score else (f"{other.p_value:.4f}", f"{randomized.p_value:.4f}")
        rows.append(f"{metrics.LABELS[name]:9}{one.score:8.2f}{other.score:8.2f}{other.score - one.score:+9.2f}   {p[0]:>19}   {p[1]:>28}")
    return rows


def _paired_tests(
    said_a: list[str], said_b: list[str], references: list[str], convention: str, names: tuple[str, ...]
) -> dict[str, tuple[Result, Result, Result]]:
    """For each score A's, B's with the p of the bootstrap, and B's with that of randomization. At most
    one of the names is a BLEU: sacreBLEU calls all of them BLEU and would mix them up."""
    found = []
    for kind in ("bs", "ar"):
        parts = {name: metrics.metric(convention, name) for name in names}
        _, scores = PairedTest([("A", said_a), ("B", said_b)], parts, [references], kind)()
        del scores["System"]
        found.append(list(scores.values()))
    return {name: (a, b, randomized) for name, (a, b), (_, randomized) in zip(names, *found, strict=True)}


def _configs(a: dict[str, object], b: dict[str, object]) -> list[str]:
    differ = [name for name in a | b if a.get(name, "(not there)") != b.get(name, "(not there)")]
    if not differ:
        return ["\nconfig.yaml: no difference"]
    cells = [("config.yaml", "A", "B"), *((name, str(a.get(name, "(not there)")), str(b.get(name, "(not there)"))) for name in differ)]
    widths = [max(len(row[i]) for row in cells) + 3 for i in range(2)]
    return ["", *(f"{name:{widths[0]}}{one:{widths[1]}}{other}" for name, one, other in cells)]


def _changed(said_a: list[str], said_b: list[str], references: list[str], keys: list[results.Key]) -> list[str]:
    chrf = CHRF()
    gains = [chrf.sentence_score(y, [r]).score - chrf.sentence_score(x, [r]).score for x, y, r in zip(said_a, said_b, references)]
    most = [n for n in sorted(range(len(gains)), key=lambda n: -abs(gains[n])) if said_a[n] != said_b[n]][:SENTENCES]
    if not most:
        return []
    rows = [f"\n{'chrF':>7}   the sentences that changed most"]
    for n in most:
        rows.append(f"{gains[n]:+7.1f}   {keys[n]}\n{'':10}reference   {references[n]}\n{'':10}A           {said_a[n]}\n{'':10}B           {said_b[n]}")
    return rows
