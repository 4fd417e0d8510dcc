"""The BEIR layout as a repository on the Hub: configs ``corpus`` and ``queries``, and one of judgements.

MTEB's repositories have judgements in a config ``qrels`` or ``default``, with splits for train, dev and test (with
several languages in ``en-qrels`` next to ``en-corpus`` and ``en-queries``, and so on); BeIR's have them in a second
repository; sentence-transformers' MS MARCO sets have triplets of ids, or lists with labels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, IterableDataset, get_dataset_config_names, load_dataset_builder
from datasets.exceptions import DatasetsError

from ..errors import CorpusError
from ..storage.fingerprint import digest_json
from .beir import SCORE_NAMES, Judgements, RetrievalData, normal_record, record_problem
from .columns import as_number, batches, column_names, is_id, target_tables

_TARGET_ID = ("_id", "id", "passage_id")
_TARGET_TEXT = ("text", "passage")
_QUERY_ID = ("_id", "id", "query_id")
_QUERY_TEXT = ("text", "query")
_JUDGED = (
    ("query-id", "corpus-id", SCORE_NAMES),
    ("query_id", "corpus_id", SCORE_NAMES),
    ("query_id", "doc_ids", ("labels",)),
    ("query_id", "positive_id", ()),
    ("query", "positive", ()),
)
"""The columns of a judgement: query id, target id (or a list of them), and possible names of the score (or list of
scores). Without a score the target is relevant, except in lists. The last two are for triplets, whose negatives are
unjudged targets."""


def open_repository(
    repo_id: str,
    *,
    qrels: str | None = None,
    corpus_config: str = "corpus",
    queries_config: str = "queries",
    qrels_config: str | None = None,
    split: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    streaming: bool = False,
    max_targets: int | None = None,
) -> RetrievalData:
    """The contents of a repository, or of a local folder with its files; :meth:`.Corpus.from_hub` explains the
    arguments.

    Raises:
        CorpusError: a repository or config is missing; during reading, a split or column is missing or a value is
            wrong.
    """
    repository = _Repository(repo_id, revision, token, streaming)
    if not {corpus_config, queries_config} <= set(repository.configs):
        raise CorpusError(
            f"{repo_id} has the configs {repository.configs}, expected {corpus_config!r} and {queries_config!r}, and "
            "judgements in 'qrels' or 'default' or in a repository of their own. Name others with corpus_config='…', "
            "queries_config='…' and qrels_config='…'. Pairs and triplets are for Corpus.from_pairs."
        )
    judged = repository if qrels is None else _Repository(qrels, None, token, streaming)
    config = qrels_config or _judged_config(judged, alone=judged is not repository)
    if config not in judged.configs:
        raise CorpusError(f"{judged.repo_id} has no config {config!r} of judgements; it has {judged.configs}.")
    judgements, splits = [], judged.load(config)
    if split is not None and split not in splits:
        raise CorpusError(
            f"Config {config!r} of {judged.repo_id} has the splits {list(splits)}, none called {split!r}."
        )
    for name in splits if split is None else [split]:
        source = f"split {name!r} of config {config!r} of {judged.repo_id}"
        judgements.append(
            Judgements(name, source, _triples(splits[name], _judged_columns(splits[name], source), source))
        )
    folder = Path(repo_id)
    return RetrievalData(
        folder.resolve().name if folder.is_dir() else repo_id,
        _targets(repository, corpus_config, split, max_targets),
        digest_json([repository.identity(corpus_config), split, max_targets]),
        f"config {corpus_config!r}",
        _queries(repository, queries_config, split),
        f"config {queries_config!r}",
        judgements,
    )


class _Repository:
    """A repository of data, on the Hub or as a local folder."""

    def __init__(self, repo_id: str, revision: str | None, token: str | None, streaming: bool) -> None:
        self.repo_id = repo_id
        # Without streaming, datasets copies a folder's files once and keeps using that copy, even if the files change.
        self._streaming = streaming or Path(repo_id).is_dir()
        self._revision, self._token = revision, token
        with _reading(repo_id):
            self.configs: list[str] = get_dataset_config_names(repo_id, revision=revision, token=token)

    def _builder(self, config: str) -> Any:
        with _reading(f"Config {config!r} of {self.repo_id}"):
            return load_dataset_builder(self.repo_id, config, revision=self._revision, token=self._token)

    def identity(self, config: str) -> list[Any]:
        """What identifies the files of ``config``: the commit on the Hub, or file names and times of a folder."""
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

    def load_one(self, config: str, split: str | None) -> Dataset | IterableDataset:
        """The requested split of ``config``, or the split with the config's name, or its only one."""
        splits = self.load(config)
        for name in (split, config):
            if name is not None and name in splits:
                return splits[name]
        if len(splits) != 1:
            raise CorpusError(
                f"Config {config!r} of {self.repo_id} has the splits {list(splits)}, expected one, or one with the "
                "config's name. Name one with split='…', which also selects the judgements."
            )
        return next(iter(splits.values()))


def _judged_config(repository: _Repository, alone: bool) -> str:
    """The config that holds the judgements: ``qrels``, ``default``, or the only config of a separate repository."""
    if alone and len(repository.configs) == 1:
        return repository.configs[0]
    found = [config for config in ("qrels", "default") if config in repository.configs]
    if len(found) != 1:
        raise CorpusError(
            f"{repository.repo_id} has the configs {repository.configs}: which holds the judgements? Expected exactly "
            "one of 'qrels' and 'default'. Name another with qrels_config='…', or their own repository with "
            "qrels='…'."
        )
    return found[0]


def _targets(repository: _Repository, config: str, split: str | None, limit: int | None) -> Iterator[pa.Table]:
    dataset = repository.load_one(config, split)
    if limit is not None:
        dataset = dataset.take(limit)
    source = f"Config {config!r} of {repository.repo_id}"
    found, text, id = _columns(dataset, source, _TARGET_TEXT, _TARGET_ID)
    with _reading(source):
        yield from target_tables(dataset, text, id, "title" if "title" in found else None)


def _queries(repository: _Repository, config: str, split: str | None) -> Iterator[dict[str, Any]]:
    dataset = repository.load_one(config, split)
    source = f"Config {config!r} of {repository.repo_id}"
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


def _judged_columns(dataset: Dataset | IterableDataset, source: str) -> list[str]:
    """Which of :data:`_JUDGED` the data set has: query, target and, if there is one, score."""
    found = column_names(dataset)
    for query, target, scores in _JUDGED:
        score = [name for name in scores if name in found][:1]
        if {query, target} <= set(found) and (score or target != "doc_ids"):
            return [query, target, *score]
    expected = "; ".join(", ".join([query, target, *scores[:1]]) for query, target, scores in _JUDGED)
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
                given = [as_number(score) for score in scores] if isinstance(scores, list) else []
                grades = [grade for grade in given if grade is not None]
                if not all(map(_is_id, [query, *targets])) or not len(targets) == len(given) == len(grades):
                    raise CorpusError(
                        f"The {source}, row {row}: {query!r:.40}, {targets!r:.60}, {scores!r:.60} are not a query's "
                        "id, targets' ids, and a number for each."
                    )
                for target, grade in zip(targets, grades, strict=True):
                    yield str(query), str(target), grade
                row += 1


def _columns(
    dataset: Dataset | IterableDataset, source: str, text: Sequence[str], id: Sequence[str]
) -> tuple[list[str], str, str]:
    """All column names, the text column and the id column."""
    found = column_names(dataset)
    chosen = [next((name for name in names if name in found), None) for names in (text, id)]
    if chosen[0] is None or chosen[1] is None:
        raise CorpusError(
            f"{source} has the columns {found}, expected an id ({', '.join(id)}) and a text ({', '.join(text)})."
        )
    return found, chosen[0], chosen[1]


def _is_id(value: Any) -> bool:
    return is_id(value) and value != ""


@contextmanager
def _reading(source: str) -> Iterator[None]:
    """Name the source of any error in this block.

    Raises:
        CorpusError: it is missing, unreachable, or damaged.
    """
    try:
        yield
    except CorpusError:
        raise
    except (DatasetsError, FileNotFoundError, ConnectionError, ValueError) as error:
        raise CorpusError(f"{source} cannot be read: {error}") from error
