"""Queries and the targets judged relevant to them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property

import numpy as np
from datasets import Dataset

from .text import normalized


class Qrels:
    """The judged queries of one split.

    Args:
        queries: one row per query: ``id``, ``text`` and ``answers`` (a list of strings, possibly empty).
        query: query position of each (query, positive) pair, shape ``(P,)``; repeated pairs are dropped.
        row: corpus row of each pair's target, shape ``(P,)``.
        grade: how relevant each target is, above 0, shape ``(P,)``; by default 1. A repeated pair has its highest
            grade.
        rows_like: gives for each text the corpus rows with the same text (:meth:`.Corpus.rows_like`).
    """

    def __init__(
        self,
        queries: Dataset,
        query: Sequence[int] | np.ndarray,
        row: Sequence[int] | np.ndarray,
        grade: Sequence[float] | np.ndarray | None = None,
        rows_like: Callable[[list[str]], list[np.ndarray]] | None = None,
    ) -> None:
        query, row = np.asarray(query, dtype=np.int64), np.asarray(row, dtype=np.int64)
        self.queries = queries
        # Sorted by query, then row; a pair judged twice is one pair.
        (self.query, self.row), pair = np.unique(np.stack([query, row]), axis=1, return_inverse=True)
        self.grade = np.zeros(len(self.row))
        np.maximum.at(self.grade, pair.reshape(-1), 1.0 if grade is None else np.asarray(grade, dtype=np.float64))
        self._rows_like = rows_like
        self._starts = np.searchsorted(self.query, np.arange(len(queries) + 1))

    def __len__(self) -> int:
        """The number of judged queries."""
        return len(self.queries)

    def rows_of(self, query: int) -> np.ndarray:
        """The corpus rows judged relevant to the ``query``-th query, ascending."""
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

    @cached_property
    def _same_text(self) -> dict[int, np.ndarray]:
        """Query → all queries with the same text; it has only queries whose text is repeated."""
        by_text: dict[str, list[int]] = {}
        for query, text in enumerate(self.queries["text"][:]):
            by_text.setdefault(normalized(text), []).append(query)
        return {query: np.array(same) for same in by_text.values() if len(same) > 1 for query in same}

    @cached_property
    def _own_rows(self) -> dict[int, np.ndarray]:
        """Query → the corpus rows with its own text; it has only queries with such a row."""
        if self._rows_like is None:
            return {}
        return {query: rows for query, rows in enumerate(self._rows_like(self.queries["text"][:])) if len(rows)}

    def asking_for(self, row: int) -> np.ndarray:
        """The positions of the queries that the target at ``row`` is judged relevant to, and of all queries with the
        same text as one of these, ascending: one question may have several ids.
        """
        asking = self.queries_of(row)
        same = [self._same_text[query] for query in asking.tolist() if query in self._same_text]
        return np.unique(np.concatenate([*same, asking])) if same else asking

    def co_positives(self, rows: Iterable[int]) -> list[np.ndarray]:
        """For each of ``rows``: every target that shares a query with it (itself included), and every target with the
        text of such a query, ascending.

        A training step identifies a query by the corpus row of its positive. If one target answers several queries, the
        targets relevant to any of them are returned: none is a safe negative. Nor is the query's own text, which a
        corpus of questions contains.
        """
        result = []
        for row in rows:
            asking = self.asking_for(row).tolist()
            shared = [self.rows_of(query) for query in asking]
            own = [self._own_rows[query] for query in asking if query in self._own_rows]
            result.append(np.unique(np.concatenate([[row], *shared, *own])).astype(np.int64))
        return result
