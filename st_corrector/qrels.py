"""Queries and which targets are judged relevant to them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property

import numpy as np
from datasets import Dataset


class Qrels:
    """The judged queries of one split.

    Args:
        queries: one row a query: ``id``, ``text`` and ``answers`` (a list of strings, empty where there are none).
        query: query position of each (query, positive) pair, shape ``(P,)``; pairs that occur again are dropped.
        row: corpus row of each pair's target, shape ``(P,)``.
        grade: how relevant each target is, above 0, shape ``(P,)``; by default 1. Of a pair that occurs again the
            highest counts.
    """

    def __init__(
        self,
        queries: Dataset,
        query: Sequence[int] | np.ndarray,
        row: Sequence[int] | np.ndarray,
        grade: Sequence[float] | np.ndarray | None = None,
    ) -> None:
        query, row = np.asarray(query, dtype=np.int64), np.asarray(row, dtype=np.int64)
        self.queries = queries
        # Sorted by query, then row; a pair that is judged twice is one pair.
        (self.query, self.row), pair = np.unique(np.stack([query, row]), axis=1, return_inverse=True)
        self.grade = np.zeros(len(self.row))
        np.maximum.at(self.grade, pair.reshape(-1), 1.0 if grade is None else np.asarray(grade, dtype=np.float64))
        self._starts = np.searchsorted(self.query, np.arange(len(queries) + 1))

    def __len__(self) -> int:
        """The number of judged queries."""
        return len(self.queries)

    def rows_of(self, query: int) -> np.ndarray:
        """The corpus rows that are judged relevant to the ``query``-th query, ascending."""
        rows: np.ndarray = self.row[self._starts[query] : self._starts[query + 1]]
        return rows

    def grades_of(self, query: int) -> np.ndarray:
        """The grade of each of :meth:`rows_of`."""
        grades: np.ndarray = self.grade[self._starts[query] : self._starts[query + 1]]
        return grades

    @cached_property
    def _by_row(self) -> tuple[np.ndarray, np.ndarray]:
        order = np.argsort(self.row, kind="stable")
        return self.row[order], self.query[order]

    def queries_of(self, row: int) -> np.ndarray:
        """The positions of the queries that the target at ``row`` is judged relevant to."""
        sorted_rows, queries = self._by_row
        low, high = np.searchsorted(sorted_rows, [row, row + 1])
        return queries[low:high]

    def co_positives(self, rows: Iterable[int]) -> list[np.ndarray]:
        """For each of ``rows``: every target that shares a query with it, itself included, ascending.

        A training step knows a query by the corpus row of its positive. Where one target answers several
        queries, what is relevant to any of them is returned: none of it can safely be called negative.
        """
        result = []
        for row in rows:
            shared = [self.rows_of(query) for query in self.queries_of(row)]
            result.append(np.unique(np.concatenate([[row], *shared])).astype(np.int64))
        return result
