"""Scoring one chunk of rows after another for the queries of one search."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from .correctors import Corrector


class Scorer:
    """Scores vectors for the queries of one search, in the way that is cheapest for its corrector.

    Args:
        corrector: ``h``.
        queries: ``f(x)``, ``(B, d)``.
        corrects_queries: whether the queries are corrected instead of the vectors.
    """

    def __init__(self, corrector: Corrector, queries: Tensor, corrects_queries: bool) -> None:
        self._corrector, self._queries = corrector, queries
        self._probes: Tensor | None = None
        self.offset = queries.new_zeros(len(queries))
        """What is missing from each query's scores, the same for all rows, ``(B,)``."""
        if corrects_queries:
            probes, self.offset = corrector.on_query_side(queries)
            self._probes = probes.T.contiguous()
        self._values = queries.new_empty(0, queries.shape[1])
        self._keys = queries.new_empty(0, len(queries))

    def as_float(self, values: Tensor) -> Tensor:
        """``values`` in float32; in a buffer of its own where they are not that already."""
        if values.dtype == torch.float32:
            return values
        if len(self._values) < len(values):
            self._values = self._queries.new_empty(len(values), values.shape[1])
        return self._values[: len(values)].copy_(values)

    def multiplied(self, values: Tensor, factors: Tensor | None) -> Tensor:
        """``values`` ``(C, d)`` with each row multiplied by its factor, in place only where that harms nobody."""
        if factors is None:
            return values
        owned = values.untyped_storage().data_ptr() == self._values.untyped_storage().data_ptr()
        return values.mul_(factors[:, None]) if owned else values * factors[:, None]

    def score(self, values: Tensor, factors: Tensor | None) -> Tensor:
        """Scores ``(C, B)`` of ``values`` ``(C, d)`` multiplied by ``factors`` ``(C,)``."""
        if self._probes is None:
            return self._corrector.scores(self._queries, self.multiplied(values, factors))
        if len(self._keys) < len(values):
            self._keys = self._queries.new_empty(len(values), len(self._queries))
        keys = torch.mm(values, self._probes, out=self._keys[: len(values)])
        return keys if factors is None else keys.mul_(factors[:, None])

    def operands(self, values: Tensor, factors: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """What :meth:`score` multiplies: vectors ``(C, d)`` of any dtype, probes ``(d, B)``, and factors ``(C,)``."""
        if self._probes is not None:
            return values, self._probes, factors
        corrected = self._corrector.unnormalized(self.multiplied(self.as_float(values), factors))
        norms = corrected.norm(dim=-1).clamp_min_(1e-12) if self._corrector.normalize else None
        return corrected, self._queries.T.contiguous(), None if norms is None else norms.reciprocal_()

    def of(self, vectors: Tensor) -> Tensor:
        """Scores of some vectors, in memory that is not shared with :meth:`score`."""
        return self._corrector.scores(self._queries, vectors) if self._probes is None else vectors @ self._probes


class Excluded:
    """Rows that queries must not get, ordered so that each chunk finds its own without looking at the others.

    Args:
        rows: ``(B, m)``, padded with −1.
    """

    def __init__(self, rows: Tensor) -> None:
        query, place = (rows >= 0).nonzero(as_tuple=True)
        row, order = rows[query, place].sort()
        self._query, self._row = query[order], row
        self._row_on_host = row.cpu().numpy()

    def between(self, first_row: int, end: int) -> tuple[Tensor, Tensor]:
        """Rows, counted from the first, and queries of the pairs with rows ``first_row … end − 1``, ``(m,)`` each."""
        here = slice(*np.searchsorted(self._row_on_host, [first_row, end]))
        return self._row[here] - first_row, self._query[here]

    def mask(self, keys: Tensor, first_row: int) -> None:
        """Set the keys ``(C, B)`` of excluded rows to −∞, in place."""
        row, query = self.between(first_row, first_row + len(keys))
        if len(row):
            keys[row, query] = -math.inf


def mask_above(keys: Tensor, limit: Tensor) -> Tensor:
    """Set keys ``(C, B)`` above their query's ``limit`` ``(B,)`` to −∞, in place; returns how many, ``(B,)``."""
    counts = torch.zeros(keys.shape[1], dtype=torch.int64, device=keys.device)
    concerned = (keys.amax(0) > limit).nonzero().flatten()
    if len(concerned):
        columns = keys[:, concerned]
        above = columns > limit[concerned]
        counts[concerned] = above.sum(0)
        keys[:, concerned] = columns.masked_fill_(above, -math.inf)
    return counts
