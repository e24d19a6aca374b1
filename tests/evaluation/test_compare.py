"""Reading sentences, `flallm score` on them, and `flallm compare`."""

import collections
import gzip
import json
import pickle
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from sacrebleu.significance import PairedTest

from flallm.evaluation import metrics, sentences
from flallm.evaluation.compare import compare
from flallm.utils import UserError

HYPOTHESES = ["the cat sat on the mat", "", "a dog\u2028barks"]
REFERENCES = ["the cat sat on a mat", "nothing here", "a dog barks"]
KEYS = ["c", "a", "b"]


def rows(hypotheses=HYPOTHESES, references=REFERENCES):
    return [
        {"key": k, "reference": r, "hypothesis": h} for k, r, h in zip(KEYS, references, hypotheses)
    ]


def jsonl(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return path


def text(path, lines, end="\n"):
    path.write_bytes((end.join(lines) + end).encode())
    return path


def gzipped(path, content):
    path.write_bytes(gzip.compress(pickle.dumps(content)))
    return path


def test_score_prints_the_contract_for_text_and_for_predictions(tmp_path, flallm):
    text(tmp_path / "hyp.txt", HYPOTHESES)
    text(tmp_path / "ref.txt", REFERENCES)
    jsonl(tmp_path / "predictions.jsonl", rows())
    result = flallm("score", "hyp.txt", "ref.txt", "--convention=raw", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    raw = json.loads(result.stdout)
    assert raw == metrics.scores(HYPOTHESES, REFERENCES, ["raw"])["raw"]
    assert raw["num_samples"] == 3
    scores = {"bleu1", "bleu2", "bleu3", "bleu4", "rouge_l", "rouge_l_slrt", "chrf", "wer"}
    assert scores | {"signature", "num_samples", "references_sha256"} <= raw.keys()
    result = flallm("score", "predictions.jsonl", "--convention", "all", cwd=tmp_path)
    conventions = json.loads(result.stdout)
    assert list(conventions) == ["raw", "13a", "csl-daily", "zh", "lower"]
    assert conventions["raw"] == raw


def test_every_kind_of_file_gives_the_same_sentences(tmp_path):
    results = {
        key: {"txt_hyp": hypothesis, "txt_ref": reference, "gls_hyp": "X"}
        for key, hypothesis, reference in zip(KEYS, HYPOTHESES, REFERENCES)
    }
    hypothesis_by_key = dict(zip(KEYS, HYPOTHESES))
    reference_by_key = dict(zip(KEYS[::-1], REFERENCES[::-1]))
    reference_file = text(tmp_path / "ref.txt", REFERENCES)
    files = [
        (text(tmp_path / "hyp.txt", HYPOTHESES), reference_file),
        (text(tmp_path / "hyp.dos", HYPOTHESES, "\r\n"), reference_file),
        (jsonl(tmp_path / "predictions.jsonl", rows()), None),
        (
            jsonl(tmp_path / "unknown.jsonl", rows(references=["?"] * 3)),
            jsonl(tmp_path / "other order.jsonl", rows()[::-1]),
        ),
        (jsonl(tmp_path / "known.jsonl", rows()), reference_file),
        (gzipped(tmp_path / "results.pkl", results), None),
        (gzipped(tmp_path / "list.pkl", list(results.values())), None),
        (
            gzipped(tmp_path / "hyp.pkl", hypothesis_by_key),
            gzipped(tmp_path / "ref.pkl", reference_by_key),
        ),
    ]
    for hypotheses, references in files:
        read = sentences.pairs(hypotheses, references)[:2]
        assert read == (HYPOTHESES, REFERENCES), hypotheses


def test_an_empty_line_in_the_middle_is_a_sentence(tmp_path):
    hypotheses = text(tmp_path / "a", ["a", "", "b"])
    references = text(tmp_path / "b", ["", "", ""])
    assert sentences.pairs(hypotheses, references)[0] == ["a", "", "b"]


class RunsCode:
    def __reduce__(self):
        return (open, ("harm", "w"))


def test_what_cannot_be_scored_is_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    two = text(tmp_path / "two", ["a", "b"])
    three = text(tmp_path / "three", ["a", "b", ""])
    predictions = jsonl(tmp_path / "p.jsonl", rows())

    def raw(name, content):
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    def changed(name, change):
        return jsonl(tmp_path / name, [row | change(row) for row in rows()])

    latin = raw("latin", "é\nü\n".encode("latin-1"))
    utf16 = raw("utf16", "a\nb\n".encode("utf-16"))
    utf16_le = raw("utf16-le", "a\nb\n".encode("utf-16-le"))
    empty = raw("none", b"")
    twice = jsonl(tmp_path / "twice.jsonl", [*rows(), rows()[0]])
    numbers = changed("numbers.jsonl", lambda row: {"key": 1})
    strange = changed("strange.jsonl", lambda row: {"key": row["key"] + "x"})
    bare = jsonl(tmp_path / "bare.jsonl", [{"key": "a", "reference": "x"}])
    broken = text(tmp_path / "broken.jsonl", ['{"key": "a"', ""])
    for hypotheses, references, message in [
        (two, three, "two has 2 sentences and .*three has 3"),
        (two, None, "holds no references"),
        (latin, two, "latin, line 1: not UTF-8"),
        (utf16, two, "utf16, line 1: not UTF-8"),
        (utf16_le, two, "line 1: holds a zero byte"),
        (empty, empty, "holds no sentence"),
        (tmp_path / "missing", two, "does not exist"),
        (tmp_path, two, "is a folder"),
        (twice, None, "sentence 4: the key 'c' was there before"),
        (numbers, None, "sentence 2: the key '1' was there before"),
        (bare, None, "sentence 1: no text under hypothesis"),
        (strange, predictions, "no reference for 'ax'"),
        (broken, None, "broken.jsonl, line 1: no JSON"),
        (gzipped(tmp_path / "number.pkl", 3), None, "a int"),
        (gzipped(tmp_path / "harm.pkl", [RunsCode()]), None, "is refused"),
        (gzipped(tmp_path / "counter.pkl", collections.Counter("ab")), None, "is refused"),
    ]:
        with pytest.raises(UserError, match=message):
            sentences.pairs(hypotheses, references)
    assert not (tmp_path / "harm").exists()


def make_run(folder, hypotheses, references, config):
    folder.mkdir()
    (folder / "config.yaml").write_text(config)
    predictions = [
        {"key": f"k{n:02}", "reference": reference, "hypothesis": hypothesis}
        for n, (hypothesis, reference) in enumerate(zip(hypotheses, references))
    ]
    jsonl(folder / "predictions/test.jsonl", predictions)
    return folder


@dataclass
class Runs:
    a: Path
    b: Path
    hypotheses_a: list[str]
    hypotheses_b: list[str]
    references: list[str]


@pytest.fixture
def runs(tmp_path):
    """b is better than a in every other sentence, and much worse in one."""
    references = [f"word{n} and then some {n % 7} others come home" for n in range(40)]
    hypotheses_a = [reference.replace("some", "no") for reference in references]
    hypotheses_b = hypotheses_a.copy()
    hypotheses_b[1::2] = references[1::2]
    hypotheses_b[12] = "wholly different"
    config = "convention: raw\ntrain: {steps: 100, lr_encoder: 0.1}\n"
    a = make_run(tmp_path / "a", hypotheses_a, references, config)
    config = "convention: raw\ntrain: {steps: 200, lr_encoder: 0.1}\nnew: 1\n"
    b = make_run(tmp_path / "b", hypotheses_b, references, config)
    file = b / "predictions/test.jsonl"  # in another order: keys say what belongs together
    file.write_text("".join(reversed(file.read_text().splitlines(keepends=True))))
    return Runs(a, b, hypotheses_a, hypotheses_b, references)


def test_compare_shows_scores_with_tests_configs_and_sentences(runs, tmp_path, flallm):
    result = flallm("compare", "a", "b", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    output = result.stdout
    cells = {line.split()[0]: line.split() for line in output.splitlines() if line.strip()}
    bleu4 = metrics.bleu4(runs.hypotheses_a, runs.references, "raw")
    assert cells["BLEU-4"][1] == f"{bleu4:.2f}"
    assert all(0 < float(p) < 0.05 for p in cells["BLEU-4"][-2:])
    assert cells["BLEU-4"][3].startswith("+") and cells["WER"][3].startswith("-")
    assert cells["train.steps"] == ["train.steps", "100", "200"]
    assert cells["new"][-1] == "1"
    assert "lr_encoder" not in output
    assert "40 sentences, 21 of them differ" in output
    changed = output[output.index("changed most") :]
    assert changed.index("k12") < changed.index("k01")
    assert "wholly different" in changed
    assert re.search(r"-\d\d\.\d   k12\n", changed)
    assert re.search(r"\+\d+\.\d   k01\n", changed)


def test_compare_prints_the_p_of_sacrebleu(runs):
    output = compare(runs.a, runs.b, "test")
    (row,) = (line.split() for line in output.splitlines() if line.startswith("BLEU-4"))
    systems = [("A", runs.hypotheses_a), ("B", runs.hypotheses_b)]
    for kind, p in zip(("bs", "ar"), row[-2:]):  # paired bootstrap, approximate randomization
        tested = {"BLEU": metrics.metric("raw", "bleu4")}
        _, scores = PairedTest(systems, tested, [runs.references], kind)()
        assert p == f"{scores['BLEU'][1].p_value:.4f}"


def test_runs_on_isolated_signs_are_compared_by_their_leading_score(tmp_path):
    references = [f"sign{n % 13}" for n in range(60)]
    hypotheses_a = [r if n % 2 else "sign0" for n, r in enumerate(references)]
    hypotheses_b = [r if n % 6 else "" for n, r in enumerate(references)]
    a = make_run(tmp_path / "a", hypotheses_a, references, "convention: raw\n")
    b = make_run(tmp_path / "b", hypotheses_b, references, "convention: raw\n")
    output = compare(a, b, "test")
    note = "BLEU-1 leads in place of BLEU-4: fewer than half of the references have 2 words"
    assert note in output
    labels = ("BLEU-1", "BLEU-4", "ROUGE-L", "chrF", "WER")
    lines = [line.split() for line in output.splitlines() if line.startswith(labels)]
    cells = {line[0]: line for line in lines if len(line) == 6}
    assert tuple(cells) == labels
    assert float(cells["BLEU-1"][2]) > float(cells["BLEU-1"][1]) + 10
    assert all(float(p) < 0.05 for p in cells["BLEU-1"][-2:])
    assert cells["BLEU-4"][1:3] == ["0.00", "0.00"]
    assert cells["BLEU-4"][-2:] == ["-", "-"]


def test_a_run_compared_with_itself_has_no_p(runs):
    output = compare(runs.a, runs.a, "test")
    labels = ("BLEU-4", "ROUGE-L", "chrF", "WER")
    cells = [line.split()[-2:] for line in output.splitlines() if line.startswith(labels)]
    assert cells == [["-", "-"]] * 4
    assert "0 of them differ" in output
    assert "no difference" in output
    assert "changed most" not in output


def test_runs_that_cannot_be_compared_are_refused(runs, tmp_path):
    hypotheses, references = runs.hypotheses_a, runs.references
    config = "convention: raw\n"
    other = make_run(tmp_path / "other", hypotheses, [*references[:-1], "another"], config)
    fewer = make_run(tmp_path / "fewer", hypotheses[:-1], references[:-1], config)
    message = "do not have the same clips and references in test, as with k39"
    for run in (other, fewer):
        with pytest.raises(UserError, match=message):
            compare(runs.a, run, "test")
    with pytest.raises(UserError, match=r"has no predictions/dev\.jsonl: flallm evaluate"):
        compare(runs.a, runs.b, "dev")
    with pytest.raises(UserError, match=r"no config\.yaml"):
        compare(runs.a, tmp_path, "test")
