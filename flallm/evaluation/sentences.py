"""Sentences to score, as files hold them: a sentence a line, `predictions.jsonl`, or the pickles that other code bases write."""

from __future__ import annotations

import json
from pathlib import Path

from flallm.data.corpora.labels import read_plain_pickle
from flallm.data.tables import read_text, require_path
from flallm.utils import UserError

FIELDS = {"hypothesis": ("hypothesis", "txt_hyp"), "reference": ("reference", "txt_ref")}  # ours, and results.pkl of MMTLB and TwoStream-SLT
PICKLE, GZIP = b"\x80", b"\x1f\x8b"  # no text in UTF-8 begins so

Key = str | int  # a sentence's own, or else its number from 1


def pairs(hypotheses: Path, references: Path | None = None) -> tuple[list[str], list[str], list[Key]]:
    """(hypotheses, references, keys) of two files or of one that holds both. Two files that have keys are matched by these, others line by line."""
    rows = _rows(hypotheses)
    if references is None and not all(isinstance(row, dict) for _, row in rows):
        raise UserError(f"{hypotheses} holds no references: name a file of them after it")
    said = _sentences(rows, "hypothesis", hypotheses)
    meant = _sentences(_rows(references) if references else rows, "reference", references or hypotheses)
    if len(said) != len(meant):
        raise UserError(f"{hypotheses} has {len(said)} sentences and {references} has {len(meant)}: each hypothesis needs its reference")
    if not said:
        raise UserError(f"{hypotheses} holds no sentence")
    if all(isinstance(key, str) for key in (*said, *meant)):
        if strangers := said.keys() - meant.keys():
            raise UserError(f"{references} has no reference for {min(strangers)!r} of {hypotheses}")
        meant = {key: meant[key] for key in said}
    return list(said.values()), list(meant.values()), list(said)


def _rows(path: Path) -> list[tuple[str | None, object]]:
    """A file's rows, each with its key where the file gives one."""
    if require_path(path, "a file of sentences was expected there").is_dir():
        raise UserError(f"{path} is a folder: name a file of sentences, such as predictions/test.jsonl of a run")
    with open(path, "rb") as file:
        start = file.read(2)
    if start.startswith((PICKLE, GZIP)):
        table = read_plain_pickle(path)
        if not isinstance(table, dict | list):
            raise UserError(f"{path}: neither a dict nor a list of sentences but a {type(table).__name__}")
        return [(str(key), row) for key, row in table.items()] if isinstance(table, dict) else [(None, row) for row in table]
    rows = []
    for number, line in enumerate(_lines(path), 1):
        try:
            rows.append((None, json.loads(line) if path.suffix == ".jsonl" else line))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: no JSON: {error}") from None
    return rows


def _lines(path: Path) -> list[str]:
    """The lines of a text file. The newline at its end begins no further one; what else Unicode calls a line break belongs to a sentence."""
    text = read_text(path, "a file of sentences was expected there")
    if "\0" in text:
        raise UserError(f"{path}, line {text[: text.index(chr(0))].count(chr(10)) + 1}: holds a zero byte: is it UTF-16? UTF-8 text is needed")
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")] if text else []


def _sentences(rows: list[tuple[str | None, object]], field: str, path: Path) -> dict[Key, str]:
    sentences: dict[Key, str] = {}
    for number, (key, row) in enumerate(rows, 1):
        text = row
        if isinstance(row, dict):
            key = key or row.get("key") or row.get("name")
            key = str(key) if key else None
            text = next((row[name] for name in FIELDS[field] if name in row), None)
        if not isinstance(text, str):
            raise UserError(f"{path}, sentence {number}: no text under {' or '.join(FIELDS[field])}")
        if key in sentences:
            raise UserError(f"{path}, sentence {number}: the key {key!r} was there before")
        sentences[key or number] = text
    return sentences
