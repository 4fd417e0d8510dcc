"""The targets by row: their ids and texts, on disk, and which of them have been withdrawn."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, concatenate_datasets
from torch import Tensor

from ..errors import CorpusError, InputError
from ..storage.arrow import half_character
from .columns import TARGETS, as_id, as_list, is_transformed
from .duplicates import TextDigests
from .text import join_title

logger = logging.getLogger(__name__)
WITHDRAWN = "withdrawn"
"""The column that says which targets are no longer there."""


def as_rows(rows: Sequence[int] | np.ndarray | Tensor, count: int) -> np.ndarray:
    """Rows as int64, ``(n,)``; of a mask over all ``count`` those that are true, ascending.

    Raises:
        InputError: they are no integers, or a mask of another length.
    """
    given = rows.cpu().numpy() if isinstance(rows, Tensor) else np.asarray(rows)
    if given.dtype == bool:
        if given.shape != (count,):
            raise InputError(f"A mask must say of each of {count:,} rows whether it is meant, got shape {given.shape}.")
        return np.flatnonzero(given)
    if given.size and given.dtype.kind not in "iu":
        raise InputError(f"Rows must be integers, or a mask of booleans, got {given.dtype}.")
    return given.astype(np.int64)


class Targets:
    """The targets of a corpus, by row ``0 … len(targets) − 1``.

    Args:
        dataset: columns ``id``, ``title`` (may be null) and ``text``, all strings; where targets have been withdrawn,
            ``withdrawn``, booleans.
        cache_dir: folder for Arrow files derived from them.
        parts: whose rows these are, one after the other, where they were put together: what has been derived from them
            is not derived again.

    Raises:
        CorpusError: there are no targets, two share an id, or the columns are wrong.
    """

    def __init__(self, dataset: Dataset, cache_dir: Path, parts: Sequence[Targets] = ()) -> None:
        if len(dataset) == 0:
            raise CorpusError("The corpus has no targets.")
        if is_transformed(dataset):
            raise CorpusError(
                "The targets have a transform, which Corpus(targets) would ignore: use Corpus.from_dataset, which "
                "applies it."
            )
        types = {field.name: str(field.type) for field in dataset.data.schema}
        if [types.get("id"), types.get("text")] != ["string"] * 2 or types.get("title") not in ("string", "null"):
            raise CorpusError(
                f"Corpus(targets) expects the columns id, title and text, all strings, and got {types}. "
                "Corpus.from_dataset reads other columns, and integers as ids."
            )
        dataset = dataset if dataset.format["type"] is None else dataset.with_format(None)
        # The Arrow columns, read below, ignore any selection or shuffling of rows.
        self.dataset = dataset if dataset._indices is None else dataset.flatten_indices()
        self.parts: list[Targets] = [leaf for part in parts for leaf in part.parts or [part]]
        """The parts that they were put together from; none if they were made at once."""
        self.digests: TextDigests = TextDigests(self.dataset, cache_dir, [part.digests for part in self.parts])
        """Of the texts, by which equal ones are found."""
        self._arrow = self.dataset.with_format("arrow")
        columns = self.dataset.data
        self.is_withdrawn: np.ndarray | None = None
        """Which rows have been withdrawn, bool ``(N,)``; None if there are none."""
        if types.get(WITHDRAWN, "bool") != "bool":
            raise CorpusError(
                f"The column {WITHDRAWN!r} says which targets have been withdrawn, and holds {types[WITHDRAWN]}, not "
                f"booleans: dataset.cast_column({WITHDRAWN!r}, datasets.Value('bool')), or remove it."
            )
        if WITHDRAWN in types:
            self.is_withdrawn = columns.column(WITHDRAWN).to_numpy().astype(bool)
            if self.is_withdrawn.all():
                raise CorpusError("All targets have been withdrawn: none is left.")
        if empty := pc.sum(_is_empty(columns.column("text"), columns.column("title"))).as_py():
            rows = np.flatnonzero(_is_empty(columns.column("text"), columns.column("title")).to_numpy())[:3].tolist()
            logger.warning("%d targets have neither text nor title, e.g. rows %s: all look the same.", empty, rows)
        self._require_ids()

    def _require_ids(self) -> None:
        ids = self.dataset.data.column("id")
        if ids.null_count:
            raise CorpusError(
                f"{ids.null_count} targets have no id: give each its own, or leave the ids out altogether."
            )
        if self.is_withdrawn is not None:
            ids = ids.filter(pa.array(~self.is_withdrawn))
        if pc.count_distinct(ids).as_py() != len(ids):
            counts = pc.value_counts(ids.combine_chunks())
            repeated = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")
            raise CorpusError(
                f"{len(repeated)} target ids occur more than once, e.g. {repeated[:3].to_pylist()}. Rows are found "
                "by id, so each target needs its own: drop the repeated targets or leave the ids out (then their row "
                "numbers are their ids, which targets that are added must not have)."
            )

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> dict[str, str | None]:
        """``{"id", "title", "text"}`` of one row."""
        target = self.dataset[int(row)]
        return {name: target[name] for name in TARGETS.names}

    @cached_property
    def withdrawn(self) -> np.ndarray:
        """The rows that have been withdrawn, ascending, int64."""
        return np.flatnonzero(np.zeros(0, dtype=bool) if self.is_withdrawn is None else self.is_withdrawn)

    def ids(self, rows: Sequence[int] | np.ndarray) -> list[str]:
        """The ids of ``rows``, see :func:`as_rows`."""
        ids: list[str] = self._arrow[as_rows(rows, len(self))].column("id").to_pylist()
        return ids

    def rows_of(self, ids: Sequence[str | int], missing: int | None = None) -> np.ndarray:
        """The rows of ``ids``; see :meth:`.Corpus.rows_of`."""
        ids = [as_id(id, "An id") for id in as_list(ids)]
        try:
            wanted = pa.array(ids, pa.string())
        except UnicodeEncodeError as error:
            raise CorpusError(f"An id has {half_character(error.object)}: fix or drop it.") from None
        distinct = wanted.unique()
        row_of_distinct = np.full(len(distinct), -1, dtype=np.int64)
        start = withdrawn = 0
        for found in pc.index_in(self.dataset.data.column("id"), value_set=distinct).chunks:
            here = np.flatnonzero(found.is_valid().to_numpy(zero_copy_only=False))
            places = found.drop_null().to_numpy()
            if self.is_withdrawn is not None:
                kept = ~self.is_withdrawn[start + here]
                withdrawn += int((~kept).sum())
                here, places = here[kept], places[kept]
            row_of_distinct[places] = start + here
            start += len(found)
        rows: np.ndarray = row_of_distinct[pc.index_in(wanted, value_set=distinct).to_numpy(zero_copy_only=False)]
        if (rows < 0).any():
            if missing is None:
                unknown = [id for id, row in zip(ids, rows, strict=True) if row < 0]
                once = f" ({withdrawn} rows with such ids have been withdrawn)" if withdrawn else ""
                raise CorpusError(f"{len(unknown)} ids are not in the corpus, e.g. {unknown[:3]}{once}.")
            rows[rows < 0] = missing
        return rows

    def texts(self, rows: Sequence[int] | np.ndarray) -> list[str]:
        """The texts of ``rows`` as they are encoded (title joined in, without the prompt)."""
        table = self._arrow[as_rows(rows, len(self))]
        titles, texts = table.column("title").to_pylist(), table.column("text").to_pylist()
        return [join_title(title, text) for title, text in zip(titles, texts, strict=True)]

    def text_lengths(self) -> np.ndarray:
        """The length of every target's text in bytes, shape ``(N,)``."""
        lengths: np.ndarray = pc.binary_length(self.dataset.data.column("text")).to_numpy()
        return lengths.astype(np.int64)

    def followed_by(self, more: Dataset, withdrawn: np.ndarray, cache_dir: Path) -> Targets:
        """These and then ``more``, of which there may be none, of them ``withdrawn`` rows in addition to those that
        have been before.
        """
        kept = self.dataset.select_columns(TARGETS.names)
        parts = [self, Targets(more, cache_dir)] if len(more) else [self]
        both = concatenate_datasets([kept, more]) if len(more) else kept
        gone = np.zeros(len(both), dtype=bool)
        gone[self.withdrawn] = gone[withdrawn] = True
        if gone.any():
            both = concatenate_datasets([both, Dataset.from_dict({WITHDRAWN: gone})], axis=1)
        return Targets(both, cache_dir, parts)


def _is_empty(text: pa.ChunkedArray, title: pa.ChunkedArray) -> pa.ChunkedArray:
    """Which targets are empty."""
    return pc.and_(
        *(pc.equal(pc.binary_length(pc.fill_null(column.cast(pa.string()), "")), 0) for column in (text, title))
    )
