"""Readers of the BEIR layout: ``corpus.jsonl[.gz]``, ``queries.jsonl[.gz]``, ``qrels/<split>.tsv``."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import CorpusError


def find_jsonl(folder: Path, stem: str) -> Path:
    """``<stem>.jsonl`` or ``<stem>.jsonl.gz`` in ``folder``.

    Raises:
        CorpusError: neither is there.
    """
    for name in (f"{stem}.jsonl", f"{stem}.jsonl.gz"):
        if (folder / name).is_file():
            return folder / name
    raise CorpusError(
        f"{folder} is not a BEIR folder: it has no {stem}.jsonl or {stem}.jsonl.gz. Expected are corpus.jsonl[.gz], "
        "queries.jsonl[.gz] and qrels/<split>.tsv."
    )


def read_jsonl(path: Path, required: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """The records of a JSON-lines file, plain or gzipped.

    Raises:
        CorpusError: a line is not a JSON object, or lacks one of the ``required`` keys; it names file and line.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise CorpusError(f"{path}, line {number}: not valid JSON ({error}).") from error
            missing = [key for key in required if not isinstance(record, dict) or record.get(key) is None]
            if missing:
                raise CorpusError(f"{path}, line {number}: has no {' and no '.join(map(repr, missing))}.")
            yield record


def read_qrels(path: Path) -> Iterator[tuple[str, str, float]]:
    """``(query id, target id, score)`` for each line of a qrels file; the header line is optional.

    Raises:
        CorpusError: a line has not three tab-separated columns, or its score is no number; it names the line.
    """
    with path.open(encoding="utf-8", newline="") as file:
        for number, columns in enumerate(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE), start=1):
            if not columns:
                continue
            if len(columns) != 3:
                raise CorpusError(
                    f"{path}, line {number}: {len(columns)} tab-separated columns, expected query-id, corpus-id, score."
                )
            try:
                yield columns[0], columns[1], float(columns[2])
            except ValueError as error:
                if number == 1:
                    continue  # the header
                raise CorpusError(f"{path}, line {number}: score {columns[2]!r} is not a number.") from error
