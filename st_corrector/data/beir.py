"""Readers of the BEIR layout: ``corpus.jsonl[.gz]``, ``queries.jsonl[.gz]``, ``qrels/<split>.tsv``.

A repository on the Hub gives the same targets, queries and judgements (:mod:`.beir_hub`).

Files may be hostile: any content gives records or a :class:`CorpusError`, and at most one line of a file is in memory.
"""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from ..errors import CorpusError
from ..storage.arrow import batched_tables, half_character
from ..storage.fingerprint import digest_json
from .columns import TARGETS, as_number, is_id

LONGEST_LINE = 64 << 20
"""Bytes; a longer line means a broken file."""
_SHOWN = 5
SCORE_NAMES = ("score", "relevance", "rel", "label", "grade")
"""Names of the column of grades."""


class Judgements(NamedTuple):
    """The judgements of one split.

    Attributes:
        source: where they are read from, for error messages.
        triples: ``(query id, target id, score)``; a target is relevant where the score, its grade, is above 0.
    """

    split: str
    source: str
    triples: Iterable[tuple[str, str, float]]


class RetrievalData(NamedTuple):
    """Targets, queries and judgements, each read once, during iteration.

    Attributes:
        name: of the data set.
        targets: tables of :data:`~st_corrector.data.columns.TARGETS`.
        targets_key: a digest of the source of ``targets``.
        targets_source, queries_source: where they are read from, for error messages.
        queries: records as :func:`read_jsonl` gives them.
        judgements: one for each split.
    """

    name: str
    targets: Iterable[pa.Table]
    targets_key: str
    targets_source: str
    queries: Iterable[dict[str, Any]]
    queries_source: str
    judgements: Sequence[Judgements]


def open_folder(folder: Path, max_targets: int | None = None) -> RetrievalData:
    """The contents of a folder in BEIR's layout.

    Args:
        max_targets: read at most this many targets.

    Raises:
        CorpusError: a file is missing; and, during reading, as :func:`read_jsonl` and :func:`read_qrels`.
    """
    corpus, queries = find_jsonl(folder, "corpus"), find_jsonl(folder, "queries")
    qrels = sorted((folder / "qrels").glob("*.tsv"))
    if not qrels:
        raise CorpusError(f"{folder / 'qrels'} has no <split>.tsv: expected one file of judgements for each split.")
    targets = (
        {"id": record["_id"], "title": record["title"], "text": record["text"]}
        for record in read_jsonl(corpus, max_targets)
    )
    stat = corpus.stat()
    return RetrievalData(
        folder.resolve().name,
        batched_tables(targets, TARGETS),
        digest_json([str(corpus.resolve()), stat.st_size, stat.st_mtime_ns, max_targets]),
        corpus.name,
        read_jsonl(queries),
        queries.name,
        [Judgements(file.stem, str(file), read_qrels(file)) for file in qrels],
    )


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


def read_jsonl(path: Path, limit: int | None = None) -> Iterator[dict[str, Any]]:
    """The records of a JSON-lines file of targets or queries, plain or gzipped.

    Each has ``_id`` and ``text``, both strings (an id may be a number), and may have ``title``, a string or null, and
    ``answers``, a list of strings or null. Other keys are ignored.

    Args:
        limit: read at most this many records.

    Raises:
        CorpusError: the file cannot be read, or lines are not such records: the error counts all and shows the first.
    """
    faults, count = _Faults(path), 0
    for number, line in _lines(path, faults):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            faults.add(number, f"not valid JSON ({error})")
            continue
        if problem := record_problem(record):
            faults.add(number, problem)
            continue
        count += 1
        yield normal_record(record)
        if count == limit:
            break
    faults.raise_if_any()


def read_qrels(path: Path) -> Iterator[tuple[str, str, float]]:
    """``(query id, target id, score)`` for each line of a qrels file; the header line is optional.

    Ids may be quoted as :mod:`csv` writes them (``QUOTE_MINIMAL``) and BEIR's own reader reads them: ``"a ""b"" c"`` is
    ``a "b" c``. In an id that does not begin with a quote, quotes are ordinary characters. An unclosed quote is refused
    (BEIR's reader would continue through the following lines), and so is text after a closing quote.

    Raises:
        CorpusError: the file cannot be read, or lines are not three tab-separated columns, the last a number: the error
            counts all and shows the first.
    """
    faults, first = _Faults(path), True
    for number, line in _lines(path, faults):
        try:
            columns = next(csv.reader([line], delimiter="\t", strict=True))
        except csv.Error as error:
            faults.add(
                number,
                f"{line[:60]!r} are not tab-separated columns ({error}): one that begins with a quote must end with "
                'one, and quotes within be doubled, as csv.writer writes "a ""b"" c" for the id a "b" c',
            )
            continue
        is_header, first = first and columns[-1].strip().lower() in SCORE_NAMES, False
        if is_header:
            continue
        if len(columns) != 3:
            hint = " (TREC's four: leave out the second)" if len(columns) == 4 or len(line.split()) == 4 else ""
            faults.add(
                number, f"{len(columns)} tab-separated columns{hint}, expected three: query-id, corpus-id, score"
            )
            continue
        query, target, score = columns
        value = as_number(score)
        if value is None:
            faults.add(number, f"score {score!r:.40} is not a number")
        elif not query or not target:
            faults.add(number, "an id is empty")
        else:
            yield query, target, value
    faults.raise_if_any()


class _Faults:
    """The malformed lines of a file: their number, and the problems of the first."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._count = 0
        self._shown: list[str] = []

    def add(self, line: int, what: str) -> None:
        self._count += 1
        if len(self._shown) < _SHOWN:
            self._shown.append(f"line {line}: {what}")

    def raise_if_any(self) -> None:
        if self._count == 1:
            raise CorpusError(f"{self.path}, {self._shown[0]}. Fix or remove this line.")
        if self._count:
            more = f"\n  and {self._count - len(self._shown):,} more" if self._count > len(self._shown) else ""
            shown = "\n  ".join(self._shown)
            raise CorpusError(
                f"{self.path} has {self._count:,} malformed lines:\n  {shown}{more}\nFix or remove these lines."
            )


def _lines(path: Path, faults: _Faults) -> Iterator[tuple[int, str]]:
    """Non-empty lines with their numbers, without line ends (Windows' included) or a byte-order mark."""
    number = 0
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            while line := file.readline(LONGEST_LINE + 1):
                number += 1
                if len(line) > LONGEST_LINE:
                    raise CorpusError(f"{path}, line {number} is longer than {LONGEST_LINE >> 20} MB: not a text file?")
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                except UnicodeDecodeError as error:
                    faults.add(number, f"not UTF-8 (byte {error.start + 1} is 0x{line[error.start]:02x})")
                    continue
                if text and not text.isspace():
                    yield number, text
    except (EOFError, zlib.error, OSError) as error:
        raise CorpusError(
            f"{path} cannot be read beyond line {number} ({error}): it is cut short or damaged, or not what its name "
            "says. Get it again."
        ) from error


def normal_record(record: dict[str, Any]) -> dict[str, Any]:
    """A valid record, reduced to ``_id``, ``text``, ``title`` and ``answers``."""
    return {
        "_id": str(record["_id"]),
        "text": record["text"],
        "title": record.get("title"),
        "answers": record.get("answers") or [],
    }


def record_problem(record: Any) -> str | None:
    """The problem with a target's or a query's record, if there is one."""
    if not isinstance(record, dict):
        return f"a JSON {type(record).__name__}, expected an object with _id and text"
    missing = [key for key in ("_id", "text") if record.get(key) is None]
    if missing:
        return f"has no {' and no '.join(map(repr, missing))}, only {sorted(map(str, record))[:8]}"
    answers = record.get("answers")
    texts = [record["text"], record.get("title") or "", *(answers if isinstance(answers, list) else [])]
    if not is_id(record["_id"]):
        return f"_id is a {type(record['_id']).__name__}, expected a string or an integer"
    if record["_id"] == "":
        return "_id is empty"
    texts.append(str(record["_id"]))
    if not isinstance(answers, (list, type(None))) or not all(isinstance(text, str) for text in texts):
        return "text and title must be strings, and answers a list of strings"
    for text in texts:
        if half := half_character(text):
            return half
    return None
