"""Targets and judgements of data sets of pairs or triplets, and of plain texts."""

from __future__ import annotations

import hashlib
import logging
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
from datasets import Dataset, IterableDataset

from ..errors import CorpusError
from ..storage.arrow import batched_tables
from .columns import TARGETS, as_id, as_texts, batches, by_label, column_names, label_column

logger = logging.getLogger(__name__)


def text_tables(
    texts: Iterable[str], ids: Sequence[str | int] | None, titles: Sequence[str | None] | None, first: int = 0
) -> Iterator[pa.Table]:
    """Tables of :data:`TARGETS` from texts in their order; see :meth:`Corpus.from_texts`.

    Args:
        first: the row of the first one.

    Raises:
        CorpusError: see there.
    """
    given = {name: values for name, values in (("ids", ids), ("titles", titles)) if values is not None}
    for name, values in ({"texts": texts} | given).items():
        if isinstance(values, str):
            raise CorpusError(f"{name} is one string, expected one for each target, as in [{values!r:.40}].")

    def records() -> Iterator[dict[str, Any]]:
        row = -1
        # By position: a pandas Series' value at key 3 need not be its fourth.
        others = {name: iter(values) for name, values in given.items()}
        for row, text in enumerate(texts):
            if not isinstance(text, str):
                raise CorpusError(f"Text {row} is a {type(text).__name__}, expected a string: {text!r:.80}")
            for name, values in given.items():
                if row >= len(values):
                    raise CorpusError(f"There are more texts than {name} ({len(values)}): give one for each text.")
            of_row = {name: next(values) for name, values in others.items()}
            yield {
                "id": str(first + row) if ids is None else as_id(of_row["ids"], f"The id of text {row}"),
                "title": of_row.get("titles"),
                "text": text,
            }
        for name, values in given.items():
            if len(values) != row + 1:
                raise CorpusError(f"{row + 1} texts but {len(values)} {name}: give one for each text, or none.")

    return batched_tables(records(), TARGETS)


class PairReader:
    """Reads data sets of (query, positive) pairs or triplets: see :meth:`Corpus.from_pairs`.

    Args:
        splits: split name → data set; one data set alone is the split ``"train"``.
        query, positive: the columns of the queries and of the positives.
        negatives: columns of further texts.

    Raises:
        CorpusError: a split is no data set, or a column is not there.
    """

    def __init__(
        self,
        splits: Dataset | IterableDataset | Mapping[str, Dataset | IterableDataset],
        query: str,
        positive: str,
        negatives: Sequence[str],
    ) -> None:
        splits = {"train": splits} if isinstance(splits, (Dataset, IterableDataset)) else splits
        columns = [query, positive, *negatives]
        labels: dict[str, str | None] = {}
        for split, dataset in splits.items():
            if not isinstance(dataset, (Dataset, IterableDataset)):
                raise CorpusError(
                    f"Split {split!r} is a {type(dataset).__name__}, expected a datasets.Dataset or IterableDataset."
                )
            found = column_names(dataset)
            for column in columns:
                if column not in found:
                    raise CorpusError(
                        f"Split {split!r} has no column {column!r}; it has {found}. Say which ones: "
                        "from_pairs(splits, query='…', positive='…')."
                    )
            labels[split] = label_column(split, dataset, found, columns)
        self._splits, self._columns, self._labels = splits, columns, labels
        # 16 bytes a text instead of the text: they identify targets while the splits are streamed.
        self._row_of: dict[bytes, int] = {}
        self.judged: dict[str, tuple[dict[str, int], array[int], array[int]]] = {
            split: ({}, array("q"), array("q")) for split in splits
        }
        """By split: query text → number, and of each judged pair the number of its query and the row of its target;
        complete when :meth:`targets` has been read.
        """

    def targets(self) -> Iterator[pa.Table]:
        """The distinct texts of all splits, in the order of their first appearance.

        Raises:
            CorpusError: a row lacks its query or its positive, or labels do not say which positives are relevant.
        """
        return batched_tables((record for split in self._splits for record in self._records(split)), TARGETS)

    def _records(self, split: str) -> Iterator[dict[str, Any]]:
        dataset, label, row_of = self._splits[split], self._labels[split], self._row_of
        numbers, of_pair, row_of_pair = self.judged[split]
        read = self._columns if label is None else [*self._columns, label]
        unanswered: set[str] = set()
        rows = (row for each in batches(dataset, read) for row in zip(*map(each.get, read), strict=True))
        for pair, (question, found, *others) in enumerate(rows):
            if label is None:
                positives, irrelevant = as_texts(found), list[Any]()
            else:
                positives, irrelevant = by_label(found, others.pop(), label, pair, split)
            further = [*irrelevant, *(text for other in others for text in as_texts(other))]
            if not (positives or irrelevant) or not all(
                isinstance(text, str) for text in (question, *positives, *further)
            ):
                raise CorpusError(
                    f"Pair {pair} of split {split!r} is not {'two strings' if not others else 'all strings'}: "
                    f"{' and '.join(f'{value!r:.60}' for value in (question, found, *others[:3]))}. "
                    "Filter such pairs out first."
                )
            if not positives:
                unanswered.add(question)
            for place, text in enumerate([*positives, *further]):
                key = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
                if key not in row_of:
                    row_of[key] = len(row_of)
                    yield {"id": str(row_of[key]), "title": None, "text": text}
                if place < len(positives):
                    of_pair.append(numbers.setdefault(question, len(numbers)))
                    row_of_pair.append(row_of[key])
        unanswered -= numbers.keys()
        if unanswered and not numbers:
            raise CorpusError(
                f"No label in column {label!r} of split {split!r} is 1, so nothing is relevant to any query. "
                f"If the column says something else, leave it out: dataset.remove_columns({label!r})."
            )
        if unanswered:
            logger.warning("%d queries of split %r have no text with label 1 and are left out.", len(unanswered), split)
