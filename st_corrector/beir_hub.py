"""The BEIR layout as a repository on the Hub: configs ``corpus`` and ``queries``, and one of judgements.

MTEB's repositories hold their judgements in a config ``qrels`` or ``default``, with a split each for train, dev and
test; BeIR's in a second repository; sentence-transformers' sets of MS MARCO as ids of triplets, or lists with labels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, IterableDataset, get_dataset_config_names, load_dataset_builder
from datasets.exceptions import DatasetsError

from .beir import Judgements, RetrievalData, normal_record, record_problem
from .columns import batches, column_names, target_tables
from .errors import CorpusError
from .fingerprint import digest_json

_TARGET_ID = ("_id", "id", "passage_id")
_TARGET_TEXT = ("text", "passage")
_QUERY_ID = ("_id", "id", "query_id")
_QUERY_TEXT = ("text", "query")
_JUDGED = (
    ("query-id", "corpus-id", "score"),
    ("query-id", "corpus-id"),
    ("query_id", "doc_ids", "labels"),
    ("query_id", "positive_id"),
    ("query", "positive"),
)
"""The columns of a judgement: query id, target id (or a list of them), and score (or as many); without one it is
relevant. The last two are of triplets: their negatives are targets that nobody has judged."""


def open_repository(
    repo_id: str,
    qrels: str | None = None,
    qrels_config: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    streaming: bool = False,
    max_targets: int | None = None,
) -> RetrievalData:
    """What is in a repository, or in a local folder with a repository's files; :meth:`.Corpus.from_hub` has the rest.

    Raises:
        CorpusError: a repository or config is not there; and, when they are read, a split, a column or a value.
    """
    repository = _Repository(repo_id, revision, token, streaming)
    if not {"corpus", "queries"} <= set(repository.configs):
        raise CorpusError(
            f"{repo_id} has the configs {repository.configs}, expected 'corpus' and 'queries', and judgements in "
            "'qrels' or 'default' or in a repository of their own. Pairs and triplets are for Corpus.from_pairs."
        )
    judged = repository if qrels is None else _Repository(qrels, None, token, streaming)
    config = qrels_config or _judged_config(judged, alone=judged is not repository)
    if config not in judged.configs:
        raise CorpusError(f"{judged.repo_id} has no config {config!r} of judgements; it has {judged.configs}.")
    judgements = []
    for split, dataset in judged.load(config).items():
        source = f"split {split!r} of config {config!r} of {judged.repo_id}"
        judgements.append(Judgements(split, source, _triples(dataset, _judged_columns(dataset, source), source)))
    folder = Path(repo_id)
    return RetrievalData(
        folder.resolve().name if folder.is_dir() else repo_id,
        _targets(repository, max_targets),
        digest_json([repository.identity("corpus"), max_targets]),
        "config 'corpus'",
        _queries(repository),
        "config 'queries'",
        judgements,
    )


class _Repository:
    """A repository of data, on the Hub or as a local folder."""

    def __init__(self, repo_id: str, revision: str | None, token: str | None, streaming: bool) -> None:
        self.repo_id = repo_id
        # What is loaded from a folder otherwise is copied once, and that copy taken ever after, whatever becomes of the
        # folder's files.
        self._streaming = streaming or Path(repo_id).is_dir()
        self._revision, self._token = revision, token
        with _reading(repo_id):
            self.configs: list[str] = get_dataset_config_names(repo_id, revision=revision, token=token)

    def _builder(self, config: str) -> Any:
        with _reading(f"Config {config!r} of {self.repo_id}"):
            return load_dataset_builder(self.repo_id, config, revision=self._revision, token=self._token)

    def identity(self, config: str) -> list[Any]:
        """What tells the files of ``config`` from others: the commit on the Hub, or names and times of a folder's."""
        builder = self._builder(config)
        files = builder.config.data_files or {}
        described = {split: [list(names), names.origin_metadata] for split, names in files.items()}
        return [builder.hash, builder.config_id, described]

    def load(self, config: str) -> Mapping[str, Dataset | IterableDataset]:
        """The splits of ``config``."""
        builder = self._builder(config)
        with _reading(f"Config {config!r} of {self.repo_id}"):
            if self._streaming:
                splits: Mapping[str, IterableDataset] = builder.as_streaming_dataset()
                return splits
            builder.download_and_prepare()
            prepared: Mapping[str, Dataset] = builder.as_dataset()
            return prepared

    def load_one(self, config: str) -> Dataset | IterableDataset:
        """The one split of ``config``, or that of the same name."""
        splits = self.load(config)
        if config not in splits and len(splits) != 1:
            raise CorpusError(
                f"Config {config!r} of {self.repo_id} has the splits {list(splits)}, expected one, or one of its name."
            )
        return splits[config] if config in splits else next(iter(splits.values()))


def _judged_config(repository: _Repository, alone: bool) -> str:
    """The config that holds the judgements: ``qrels``, ``default``, or the only one of a repository of their own."""
    if alone and len(repository.configs) == 1:
        return repository.configs[0]
    found = [config for config in ("qrels", "default") if config in repository.configs]
    if len(found) != 1:
        raise CorpusError(
            f"{repository.repo_id} has the configs {repository.configs}: which holds the judgements? Expected was one "
            "of 'qrels' and 'default'. Name another with qrels_config='…', or their own repository with qrels='…'."
        )
    return found[0]


def _targets(repository: _Repository, limit: int | None) -> Iterator[pa.Table]:
    dataset = repository.load_one("corpus")
    if limit is not None:
        dataset = dataset.take(limit)
    source = f"Config 'corpus' of {repository.repo_id}"
    found, text, id = _columns(dataset, source, _TARGET_TEXT, _TARGET_ID)
    with _reading(source):
        yield from target_tables(dataset, text, id, "title" if "title" in found else None)


def _queries(repository: _Repository) -> Iterator[dict[str, Any]]:
    dataset = repository.load_one("queries")
    source = f"Config 'queries' of {repository.repo_id}"
    found, text, id = _columns(dataset, source, _QUERY_TEXT, _QUERY_ID)
    columns = {"_id": id, "text": text} | ({"answers": "answers"} if "answers" in found else {})
    row = 0
    with _reading(source):
        for batch in batches(dataset, list(columns.values())):
            for values in zip(*(batch[column] for column in columns.values()), strict=True):
                record = dict(zip(columns, values, strict=True))
                if problem := record_problem(record):
                    raise CorpusError(f"{source}, row {row}: {problem}.")
                yield normal_record(record)
                row += 1


def _judged_columns(dataset: Dataset | IterableDataset, source: str) -> Sequence[str]:
    """Which of :data:`_JUDGED` the data set has."""
    found = column_names(dataset)
    for names in _JUDGED:
        if set(names) <= set(found):
            return names
    expected = "; ".join(", ".join(names) for names in _JUDGED)
    raise CorpusError(f"The {source} has the columns {found}, expected those of a judgement: {expected}.")


def _triples(
    dataset: Dataset | IterableDataset, columns: Sequence[str], source: str
) -> Iterator[tuple[str, str, float]]:
    """``(query id, target id, score)`` for each judgement."""
    row = 0
    with _reading(source):
        for batch in batches(dataset, columns, size=1_000):  # a list may have a thousand targets
            for query, targets, *scores in zip(*(batch[column] for column in columns), strict=True):
                if isinstance(targets, list):
                    scores = scores[0] if scores else [1] * len(targets)
                else:
                    targets, scores = [targets], scores or [1]
                if not (_is_id(query) and all(map(_is_id, targets)) and _are_scores(scores, len(targets))):
                    raise CorpusError(
                        f"The {source}, row {row}: {query!r:.40}, {targets!r:.60}, {scores!r:.60} are not a query's "
                        "id, targets' ids, and a number for each."
                    )
                for target, score in zip(targets, scores, strict=True):
                    yield str(query), str(target), float(score)
                row += 1


def _columns(
    dataset: Dataset | IterableDataset, source: str, text: Sequence[str], id: Sequence[str]
) -> tuple[list[str], str, str]:
    """All columns' names, and which of them are the text and the id."""
    found = column_names(dataset)
    chosen = [next((name for name in names if name in found), None) for names in (text, id)]
    if chosen[0] is None or chosen[1] is None:
        raise CorpusError(
            f"{source} has the columns {found}, expected an id ({', '.join(id)}) and a text ({', '.join(text)})."
        )
    return found, chosen[0], chosen[1]


def _is_id(value: Any) -> bool:
    return (isinstance(value, str) and value != "") or type(value) is int


def _are_scores(values: Any, count: int) -> bool:
    return (
        isinstance(values, list)
        and len(values) == count
        and all(isinstance(value, (int, float)) and math.isfinite(value) for value in values)
    )


@contextmanager
def _reading(source: str) -> Iterator[None]:
    """Say of what fails in this block which source it was.

    Raises:
        CorpusError: it is not there, out of reach, or damaged.
    """
    try:
        yield
    except CorpusError:
        raise
    except (DatasetsError, FileNotFoundError, ConnectionError, ValueError) as error:
        raise CorpusError(f"{source} cannot be read: {error}") from error
