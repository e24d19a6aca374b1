"""Reads sentences to score: text with a sentence a line, predictions.jsonl, or pickled results."""

from __future__ import annotations

import json
from pathlib import Path

from flallm.data.corpora.labels import read_plain_pickle
from flallm.data.tables import read_text, require_path
from flallm.utils import UserError

# Names in predictions.jsonl, and in results.pkl of MMTLB and TwoStream-SLT.
FIELDS = {"hypothesis": ("hypothesis", "txt_hyp"), "reference": ("reference", "txt_ref")}
PICKLE, GZIP = b"\x80", b"\x1f\x8b"  # first bytes, with which no UTF-8 text begins

Key = str | int  # the sentence's own key, or its number from 1
Row = tuple[str | None, object]  # (key if the file has one beside the row, row)


def pairs(
    hypotheses: Path, references: Path | None = None
) -> tuple[list[str], list[str], list[Key]]:
    """Reads (hypotheses, references, keys) from two files, or from one that holds both.

    Two files are matched by key if both have keys, else line by line. Raises UserError for files
    that cannot be read or do not match.
    """
    rows = _rows(hypotheses)
    if references is None and not all(isinstance(row, dict) for _, row in rows):
        raise UserError(f"{hypotheses} holds no references: name a file of them after it")
    hypothesis_by_key = _sentences(rows, "hypothesis", hypotheses)
    reference_rows = _rows(references) if references else rows
    reference_by_key = _sentences(reference_rows, "reference", references or hypotheses)
    if len(hypothesis_by_key) != len(reference_by_key):
        raise UserError(
            f"{hypotheses} has {len(hypothesis_by_key)} sentences and {references} has "
            f"{len(reference_by_key)}: each hypothesis needs its reference"
        )
    if not hypothesis_by_key:
        raise UserError(f"{hypotheses} holds no sentence")
    keys = list(hypothesis_by_key)
    if all(isinstance(key, str) for key in (*keys, *reference_by_key)):
        missing = hypothesis_by_key.keys() - reference_by_key.keys()
        if missing:
            raise UserError(f"{references} has no reference for {min(missing)!r} of {hypotheses}")
        matched = [reference_by_key[key] for key in keys]
    else:
        matched = list(reference_by_key.values())
    return list(hypothesis_by_key.values()), matched, keys


def _rows(path: Path) -> list[Row]:
    if require_path(path, "a file of sentences was expected there").is_dir():
        raise UserError(
            f"{path} is a folder: name a file of sentences, such as predictions/test.jsonl of a run"
        )
    with open(path, "rb") as file:
        start = file.read(2)
    if start.startswith((PICKLE, GZIP)):
        return _pickled_rows(path)
    lines = _lines(path)
    if path.suffix != ".jsonl":
        return [(None, line) for line in lines]
    rows: list[Row] = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append((None, json.loads(line)))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: no JSON: {error}") from None
    return rows


def _pickled_rows(path: Path) -> list[Row]:
    table = read_plain_pickle(path)
    if isinstance(table, dict):
        return [(str(key), row) for key, row in table.items()]
    if isinstance(table, list):
        return [(None, row) for row in table]
    kind = type(table).__name__
    raise UserError(f"{path}: neither a dict nor a list of sentences but a {kind}")


def _lines(path: Path) -> list[str]:
    """The lines of a text file, split at newlines only.

    A newline at the end begins no further line. Other line breaks of Unicode are part of a
    sentence.
    """
    text = read_text(path, "a file of sentences was expected there")
    if "\0" in text:
        number = text[: text.index("\0")].count("\n") + 1
        raise UserError(
            f"{path}, line {number}: holds a zero byte: is it UTF-16? UTF-8 text is needed"
        )
    if not text:
        return []
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]


def _sentences(rows: list[Row], field: str, path: Path) -> dict[Key, str]:
    """The text of each row by its key, or by its number if it has none."""
    sentences: dict[Key, str] = {}
    for number, (key, row) in enumerate(rows, 1):
        text = row
        if isinstance(row, dict):
            key = key or row.get("key") or row.get("name")
            key = str(key) if key else None
            text = next((row[name] for name in FIELDS[field] if name in row), None)
        if not isinstance(text, str):
            names = " or ".join(FIELDS[field])
            raise UserError(f"{path}, sentence {number}: no text under {names}")
        if key in sentences:
            raise UserError(f"{path}, sentence {number}: the key {key!r} was there before")
        sentences[key or number] = text
    return sentences
