"""Reading sentences, `flallm score` on them, and `flallm compare`."""

import collections
import gzip
import json
import pickle
import re

import pytest
from sacrebleu.significance import PairedTest

from flallm.evaluation import metrics
from flallm.evaluation import sentences as results
from flallm.evaluation.compare import compare
from flallm.utils import UserError

HYPOTHESES = ["the cat sat on the mat", "", "a dog\u2028barks"]
REFERENCES = ["the cat sat on a mat", "nothing here", "a dog barks"]
KEYS = ["c", "a", "b"]


def rows(hypotheses=HYPOTHESES, references=REFERENCES):
    return [{"key": k, "reference": r, "hypothesis": h} for k, r, h in zip(KEYS, references, hypotheses)]


def jsonl(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return path


def text(path, sentences, end="\n"):
    path.write_bytes((end.join(sentences) + end).encode())
    return path


def gzipped(path, content):
    path.write_bytes(gzip.compress(pickle.dumps(content)))
    return path


def test_score_prints_the_contract_for_text_and_for_a_runs_predictions(tmp_path, flallm):
    text(tmp_path / "hyp.txt", HYPOTHESES)
    text(tmp_path / "ref.txt", REFERENCES)
    jsonl(tmp_path / "predictions.jsonl", rows())
    result = flallm("score", "hyp.txt", "ref.txt", "--convention=raw", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    raw = json.loads(result.stdout)
    assert raw == metrics.scores(HYPOTHESES, REFERENCES, ["raw"])["raw"] and raw["num_samples"] == 3
    assert {"bleu1", "bleu2", "bleu3", "bleu4", "rouge_l", "rouge_l_slrt", "chrf", "wer", "signature", "num_samples", "references_sha256"} <= raw.keys()
    every = json.loads(flallm("score", "predictions.jsonl", "--convention", "all", cwd=tmp_path).stdout)
    assert list(every) == ["raw", "13a", "csl-daily", "zh", "lower"] and every["raw"] == raw


def test_every_kind_of_file_gives_the_same_sentences(tmp_path):
    theirs = {k: {"txt_hyp": h, "txt_ref": r, "gls_hyp": "X"} for k, h, r in zip(KEYS, HYPOTHESES, REFERENCES)}
    files = [
        (text(tmp_path / "hyp.txt", HYPOTHESES), text(tmp_path / "ref.txt", REFERENCES)),
        (text(tmp_path / "hyp.dos", HYPOTHESES, "\r\n"), text(tmp_path / "ref.dos", REFERENCES)),
        (jsonl(tmp_path / "predictions.jsonl", rows()), None),
        (jsonl(tmp_path / "ours.jsonl", rows(references=["?"] * 3)), jsonl(tmp_path / "other order.jsonl", rows()[::-1])),
        (jsonl(tmp_path / "ours.jsonl", rows()), tmp_path / "ref.txt"),
        (gzipped(tmp_path / "results.pkl", theirs), None),
        (gzipped(tmp_path / "list.pkl", list(theirs.values())), None),
        (gzipped(tmp_path / "hyp.pkl", dict(zip(KEYS, HYPOTHESES))), gzipped(tmp_path / "ref.pkl", dict(zip(KEYS[::-1], REFERENCES[::-1])))),
    ]
    for hypotheses, references in files:
        assert results.pairs(hypotheses, references)[:2] == (HYPOTHESES, REFERENCES), hypotheses
    assert results.pairs(text(tmp_path / "a", ["a", "", "b"]), text(tmp_path / "b", ["", "", ""]))[0] == ["a", "", "b"]  # in the middle it is a sentence


class Runs:
    def __reduce__(self):
        return (open, ("harm", "w"))


def test_what_cannot_be_scored_is_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    two, three = text(tmp_path / "two", ["a", "b"]), text(tmp_path / "three", ["a", "b", ""])
    predictions = jsonl(tmp_path / "p.jsonl", rows())
    for name, content in (
        ("latin", "é\nü\n".encode("latin-1")),
        ("utf16", "a\nb\n".encode("utf-16")),
        ("utf16-le", "a\nb\n".encode("utf-16-le")),
        ("none", b""),
    ):
        (tmp_path / name).write_bytes(content)
    for hypotheses, references, message in [
        (two, three, "two has 2 sentences and .*three has 3"),
        (two, None, "holds no references"),
        (tmp_path / "latin", two, "latin, line 1: not UTF-8"),
        (tmp_path / "utf16", two, "utf16, line 1: not UTF-8"),
        (tmp_path / "utf16-le", two, "line 1: holds a zero byte"),
        (tmp_path / "none", tmp_path / "none", "holds no sentence"),
        (tmp_path / "missing", two, "does not exist"),
        (tmp_path, two, "is a folder"),
        (jsonl(tmp_path / "twice.jsonl", [*rows(), rows()[0]]), None, "sentence 4: the key 'c' was there before"),
        (jsonl(tmp_path / "numbers.jsonl", [r | {"key": 1} for r in rows()]), None, "sentence 2: the key '1' was there before"),
        (jsonl(tmp_path / "bare.jsonl", [{"key": "a", "reference": "x"}]), None, "sentence 1: no text under hypothesis"),
        (jsonl(tmp_path / "strange.jsonl", [r | {"key": r["key"] + "x"} for r in rows()]), predictions, "no reference for 'ax'"),
        (text(tmp_path / "broken.jsonl", ['{"key": "a"', ""]), None, "broken.jsonl, line 1: no JSON"),
        (gzipped(tmp_path / "number.pkl", 3), None, "a int"),
        (gzipped(tmp_path / "harm.pkl", [Runs()]), None, "is refused"),
        (gzipped(tmp_path / "counter.pkl", collections.Counter("ab")), None, "is refused"),
    ]:
        with pytest.raises(UserError, match=message):
            results.pairs(hypotheses, references)
    assert not (tmp_path / "harm").exists()


def run(folder, hypotheses, references, config):
    folder.mkdir()
    (folder / "config.yaml").write_text(config)
    jsonl(folder / "predictions/test.jsonl", [{"key": f"k{n:02}", "reference": r, "hypothesis": h} for n, (h, r) in enumerate(zip(hypotheses, references))])
    return folder


@pytest.fixture
def runs(tmp_path):
    """b says every other sentence better than a, and one of all much worse."""
    references = [f"word{n} and then some {n % 7} others come home" for n in range(40)]
    said_a = [r.replace("some", "no") for r in references]
    said_b = [r if n % 2 else h for n, (h, r) in enumerate(zip(said_a, references))]
    said_b[12] = "wholly different"
    a = run(tmp_path / "a", said_a, references, "convention: raw\ntrain: {steps: 100, lr_encoder: 0.1}\n")
    b = run(tmp_path / "b", said_b, references, "convention: raw\ntrain: {steps: 200, lr_encoder: 0.1}\nnew: 1\n")
    file = b / "predictions/test.jsonl"
    file.write_text("".join(reversed(file.read_text().splitlines(keepends=True))))  # keys tell what belongs together
    return a, b, said_a, references


def test_compare_shows_scores_with_tests_the_configs_and_the_sentences(runs, tmp_path, flallm):
    *_, said_a, references = runs
    result = flallm("compare", "a", "b", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    said = result.stdout
    words = {line.split()[0]: line.split() for line in said.splitlines() if line.strip()}
    assert words["BLEU-4"][1] == f"{metrics.bleu4(said_a, references, 'raw'):.2f}"
    assert all(0 < float(p) < 0.05 for p in words["BLEU-4"][-2:]) and words["BLEU-4"][3].startswith("+") and words["WER"][3].startswith("-")
    assert words["train.steps"] == ["train.steps", "100", "200"] and words["new"][-1] == "1" and "lr_encoder" not in said
    first = said.index("changed most")
    assert said.index("k12", first) < said.index("k01", first) and "wholly different" in said and "20 of them differ" not in said
    assert "40 sentences, 21 of them differ" in said
    assert re.search(r"-\d\d\.\d   k12\n", said) and re.search(r"\+\d+\.\d   k01\n", said[first:])
    said_b = [p["hypothesis"] for p in sorted(map(json.loads, (tmp_path / "b/predictions/test.jsonl").read_text().splitlines()), key=lambda p: p["key"])]
    for kind, p in zip(("bs", "ar"), words["BLEU-4"][-2:]):  # paired bootstrap, approximate randomization
        _, theirs = PairedTest([("A", said_a), ("B", said_b)], {"BLEU": metrics.metric("raw", "bleu4")}, [references], kind)()
        assert p == f"{theirs['BLEU'][1].p_value:.4f}"


def test_runs_on_isolated_signs_are_compared_by_the_score_that_they_have(tmp_path):
    references = [f"sign{n % 13}" for n in range(60)]
    said_a = [r if n % 2 else "sign0" for n, r in enumerate(references)]
    said_b = [r if n % 6 else "" for n, r in enumerate(references)]
    a, b = (run(tmp_path / name, said, references, "convention: raw\n") for name, said in (("a", said_a), ("b", said_b)))
    said = compare(a, b, "test")
    assert "BLEU-1 leads in place of BLEU-4: fewer than half of the references have 2 words" in said
    words = {line.split()[0]: line.split() for line in said.splitlines() if line.endswith(tuple("0123456789-")) and len(line.split()) == 6}
    assert list(words) == ["BLEU-1", "BLEU-4", "ROUGE-L", "chrF", "WER"]
    assert float(words["BLEU-1"][2]) > float(words["BLEU-1"][1]) + 10 and all(float(p) < 0.05 for p in words["BLEU-1"][-2:])
    assert words["BLEU-4"][1:3] == ["0.00", "0.00"] and words["BLEU-4"][-2:] == ["-", "-"]


def test_a_run_beside_itself_is_no_finding(runs):
    said = compare(runs[0], runs[0], "test")
    assert [line.split()[-2:] for line in said.splitlines() if line.startswith(("BLEU-4", "ROUGE-L", "chrF", "WER"))] == [["-", "-"]] * 4
    assert "0 of them differ" in said and "no difference" in said and "changed most" not in said


def test_runs_that_cannot_be_compared_are_refused(runs, tmp_path):
    a, b, said_a, references = runs
    other = run(tmp_path / "other", said_a, [*references[:-1], "another"], "convention: raw\n")
    fewer = run(tmp_path / "fewer", said_a[:-1], references[:-1], "convention: raw\n")
    for run_b in (other, fewer):
        with pytest.raises(UserError, match="do not have the same clips and references in test, as with k39"):
            compare(a, run_b, "test")
    with pytest.raises(UserError, match=r"has no predictions/dev\.jsonl: flallm evaluate"):
        compare(a, b, "dev")
    with pytest.raises(UserError, match=r"no config\.yaml"):
        compare(a, tmp_path, "test")
