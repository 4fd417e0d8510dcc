"""Queries and the targets judged relevant to them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property

import numpy as np
from datasets import Dataset

from .query_keys import UNKNOWN, query_keys
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
    def keys(self) -> np.ndarray:
        """The key of each query (:func:`.query_keys`): int64, ``(Q,)``."""
        return query_keys(self.queries["text"][:])

    @cached_property
    def _by_key(self) -> dict[int, np.ndarray]:
        return _positions(self.keys)

    def queries_with(self, key: int) -> np.ndarray:
        """The positions of the queries with this key: none, one, or several with the same text."""
        return self._by_key.get(key, np.empty(0, dtype=np.int64))

    @cached_property
    def _by_own_key(self) -> dict[int, np.ndarray]:
        return _positions(query_keys(map(normalized, self.queries["text"][:]), own=True))

    def rows_asked_by(self, own_key: int) -> np.ndarray:
        """The rows that are relevant to a query with the text of the own question with this key, ascending."""
        queries = self._by_own_key.get(own_key, ())
        return np.unique(np.concatenate([self.rows_of(query) for query in queries] or [np.empty(0, dtype=np.int64)]))

    def keys_of_rows(self, rows: Iterable[int]) -> np.ndarray:
        """The key of the one query that each of ``rows`` is relevant to, −1 where there is none or several: ``(n,)``,
        for pairs that tell the positive's row alone.
        """
        keys = (np.unique(self.keys[self.queries_of(row)]) for row in rows)
        return np.array([each[0] if len(each) == 1 else UNKNOWN for each in keys], dtype=np.int64)

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
        return self.with_same_text(self.queries_of(row))

    def asked(self, row: int, key: int) -> np.ndarray:
        """The positions of the queries that a training pair may be of, ascending, with those of the same text.

        Args:
            row: of its positive.
            key: of its query; with −1 it may be any query that the positive is relevant to, and with the key of a
                query that is not of this split, such as a target's own question, it is none.
        """
        return self.asking_for(row) if key == UNKNOWN else self.with_same_text(self.queries_with(key))

    def with_same_text(self, queries: np.ndarray) -> np.ndarray:
        """``queries``, and all that differ from one of them only in case, white space or Unicode form, ascending."""
        same = [self._same_text[query] for query in queries.tolist() if query in self._same_text]
        return np.unique(np.concatenate([*same, queries]))

    def co_positives(self, rows: Sequence[int], keys: Sequence[int]) -> list[np.ndarray]:
        """For the positive of each query of a training step: every target that shares a query with it (itself
        included), every target that is judged relevant to the query itself, and every target with the text of such a
        query, ascending.

        If one target answers several queries, the targets relevant to any of them are returned: none is a safe
        negative. Nor is the query's own text, which a corpus of questions contains.

        Args:
            rows: of the positives.
            keys: of the queries, which may have been judged without this positive; −1 for one that is not known.
        """
        result = []
        for row, key in zip(rows, keys, strict=True):
            asking = self.with_same_text(np.concatenate([self.queries_of(row), self.queries_with(key)])).tolist()
            shared = [self.rows_of(query) for query in asking]
            own = [self._own_rows[query] for query in asking if query in self._own_rows]
            result.append(np.unique(np.concatenate([[row], *shared, *own])).astype(np.int64))
        return result


def _positions(keys: np.ndarray) -> dict[int, np.ndarray]:
    """Key → where it is among ``keys``, ascending."""
    order = np.argsort(keys, kind="stable")
    distinct, starts = np.unique(keys[order], return_index=True)
    return dict(zip(distinct.tolist(), np.split(order, starts[1:]), strict=True))
