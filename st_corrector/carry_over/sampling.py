"""Queries for which targets are really encoded, and recall by them.

For a sample of queries we compare the first k of each way to serve with the first k of a re-embedded index, which we do
not have. But a target that belongs to them is nearly always near the top by a corrector too. So for each query we
encode all that any way returns, all or many of those that follow in the corrector's order, fewer and fewer further
down, and a few of the rest: stratified sampling by rank. Each encoded target stands for as many as its stratum has for
each that was drawn from it (`Horvitz and Thompson 1952 <https://doi.org/10.1080/01621459.1952.10483446>`_), and the
first k of a re-embedded index are those with the highest scores that stand for k together.

A target from far down stands for more than k, so the few that are drawn push out too little, if many such belong to
the first k: recall comes out too high. So there is a second count, in which each pushes out as many as it stands for.
It is right on average while they are few, and too low otherwise; an interval reaches down to it. Queries are drawn
independently, so the spread of their recalls has what is drawn of targets in it, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from .mapping import Rows
from .ways import Way, search

LEAST_QUERIES = 20
"""Fewer give no interval that deserves the name."""
# By multiples of k, how far down the corrector's order a stratum goes, how many are drawn from it, and of the nearest
# ones how many at least in multiples of k: where each stands for many, more of the first k seem to be kept than are.
_STRATA = ((5, 50, 1.5), (10, 25, 0.6), (30, 20, 0), (100, 20, 0), (math.inf, 10, 0))
_LOWEST = 3  # of the first k, among which is the one that is pushed out


class Judged:
    """Queries for which a sample of the corpus was really encoded.

    Args:
        k: depth.
        count: number of targets, without those that are withdrawn.
        encoded: number of targets encoded.
        samples: of each query.
        first: of each way, the first ``k`` rows for each query, ``(Q, k)``.
    """

    def __init__(
        self, k: int, count: int, encoded: int, samples: list[Sample], first: Mapping[str, np.ndarray]
    ) -> None:
        self.k, self.count, self.encoded, self.samples, self.first = k, count, encoded, samples, first

    @classmethod
    def draw(
        cls,
        ways: Mapping[str, Way],
        order: str,
        queries: Tensor,
        encode: Callable[[Rows], Tensor],
        k: int,
        withdrawn: Rows,
        seed: int = 0,
        progress: bool = True,
    ) -> Judged:
        """Draw a sample for each query, and encode it.

        Args:
            order: the way by whose order targets are drawn: the one nearest to a re-embedded index.
            queries: of the new model, ``(Q, d')``.
            encode: gives rows' embeddings by the new model.
            withdrawn: rows that are no targets, ascending.
        """
        count = ways[order].vectors.count
        require(len(queries), k, count - len(withdrawn))
        depth = dict.fromkeys(ways, k) | {order: min(_deepest() * k, count)}
        found = search(ways, depth, withdrawn, progress)
        generator = np.random.default_rng(seed)
        first = {name: each.rows[:, :k].numpy() for name, each in found.items()}
        drawn = []
        for query, ranked in enumerate(found[order].rows.numpy()):
            returned = np.unique(np.concatenate([each[query] for each in first.values()]))
            drawn.append(_draw(returned, ranked, k, count, withdrawn, generator))
        rows = np.unique(np.concatenate([each for each, _ in drawn]))
        fresh, way = encode(rows), ways[order]
        carried = way.take(way.vectors.take(rows), rows)
        samples = []
        for query, (of_query, weights) in enumerate(drawn):
            here = torch.from_numpy(np.searchsorted(rows, of_query))
            scores = (fresh[here] @ queries[query]).numpy(), (carried[here] @ way.queries[query]).numpy()
            samples.append(Sample(of_query, weights, *scores))
        return cls(k, count - len(withdrawn), len(rows), samples, first)

    def recalls(self, name: str) -> Recalls:
        """Of a way."""
        return Recalls.of(
            sample.recall(np.isin(sample.rows, rows).astype(float), self.k)
            for sample, rows in zip(self.samples, self.first[name], strict=True)
        )

    def recalls_with(self, reencoded: np.ndarray) -> Recalls:
        """Of the way by whose order was drawn, once the targets of these rows ``(N,)``, a mask, are encoded again.

        Where a corrector is bad it is too low: those that come up from far down are rarely drawn.
        """
        return Recalls.of(sample.recall_with(reencoded[sample.rows], self.k) for sample in self.samples)


class Recalls(NamedTuple):
    """Recalls for each query, ``(Q,)``.

    Args:
        likely: by all that was encoded.
        at_least: counted so that targets from far down push out as many as they stand for; may be negative.
    """

    likely: np.ndarray
    at_least: np.ndarray

    @classmethod
    def of(cls, pairs: Iterable[tuple[float, float]]) -> Recalls:
        """Of pairs for each query."""
        return cls(*np.array(list(pairs)).T)


class Sample(NamedTuple):
    """What was encoded for a query.

    Args:
        rows: ``(n,)``.
        weights: how many targets each stands for, ``(n,)``.
        fresh: its score by the new model, ``(n,)``.
        carried: its score by the way by whose order it was drawn, ``(n,)``.
    """

    rows: Rows
    weights: np.ndarray
    fresh: np.ndarray
    carried: np.ndarray

    def recall(self, returned: np.ndarray, k: int) -> tuple[float, float]:
        """The share of the first ``k`` by fresh scores in what is returned: likely, and at least.

        Args:
            returned: how much of each is, from 0 to 1.
        """
        inside, _ = self._first(self.fresh, k, self.weights > 0)
        likely = float(self.weights @ np.minimum(inside, returned)) / k
        near = self.weights <= _most(k)
        inside, lowest = self._first(self.fresh, k, near)
        from_far_down = ~near & (self.fresh > self.fresh[lowest[-1]]) & (returned == 0)
        pushed_out = self.weights[from_far_down].sum() * np.average(returned[lowest], weights=self.weights[lowest])
        kept = self.weights[near] @ np.minimum(inside, returned)[near]
        return likely, min(likely, float(kept - pushed_out) / k)

    def recall_with(self, reencoded: np.ndarray, k: int) -> tuple[float, float]:
        """The same for what would be returned if some had fresh scores."""
        scores = np.where(reencoded, self.fresh, self.carried)
        return self.recall(self._first(scores, k, self.weights > 0)[0], k)

    def _first(self, scores: np.ndarray, k: int, among: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """How much of each target is among the first ``k`` of those ``among`` which they are sought; the last ones."""
        sought = np.flatnonzero(among)
        order = sought[np.argsort(-scores[sought], kind="stable")]
        above = np.cumsum(self.weights[order])
        inside = np.zeros(len(scores))
        inside[order] = np.clip((k - (above - self.weights[order])) / self.weights[order], 0, 1)
        last = min(int(np.searchsorted(above, k - 1e-9)), len(order) - 1)
        return inside, order[max(0, last + 1 - _LOWEST) : last + 1]


def _most(k: int) -> float:
    """How many targets one stands for, at most, that is not from far down."""
    return max(1.0, k / 2)


def require(queries: int, k: int, targets: int) -> None:
    """Refuse what gives no certificate.

    Raises:
        InputError: there are too few queries to judge, or ``k`` is not a depth.
    """
    if queries < LEAST_QUERIES:
        raise InputError(f"At least {LEAST_QUERIES} queries must judge how much is kept, got {queries:,}.")
    if not 1 <= k <= targets:
        raise InputError(f"k must be from 1 to the number of targets, {targets:,}, got {k}.")


def _deepest() -> int:
    """How far down strata go, in multiples of k."""
    return int(max(end for end, *_ in _STRATA if end < math.inf))


def _draw(
    returned: Rows, ranked: Rows, k: int, count: int, withdrawn: Rows, generator: np.random.Generator
) -> tuple[Rows, np.ndarray]:
    """A query's sample: rows, and how many each stands for.

    Args:
        returned: what any way returns, all of which is taken.
        ranked: the first rows by the corrector's order.
    """
    returned, ranked = returned[returned >= 0], ranked[ranked >= 0]
    rows, weights = [returned], [np.ones(len(returned))]
    start = 0
    for end, wanted, at_least in _STRATA:
        wanted = max(wanted, round(at_least * k))
        if end < math.inf:
            members = ranked[start * k : int(end) * k]
            members = members[~np.isin(members, returned)]
            drawn = generator.permutation(members)[:wanted]
            size, start = len(members), int(end)
        else:
            known = np.union1d(np.union1d(ranked, returned), withdrawn)
            size = count - len(known)
            drawn = _others(known, count, min(wanted, size), generator)
        rows.append(drawn)
        weights.append(np.full(len(drawn), size / max(1, len(drawn))))
    return np.concatenate(rows), np.concatenate(weights)


def _others(known: Rows, count: int, wanted: int, generator: np.random.Generator) -> Rows:
    """Distinct random rows that are not ``known``, of which there are enough."""
    if count - len(known) < 4 * wanted or count < 10_000:
        return generator.permutation(np.setdiff1d(np.arange(count), known))[:wanted]
    drawn: Rows = np.empty(0, dtype=np.int64)
    while len(drawn) < wanted:
        more = generator.integers(count, size=4 * wanted)
        drawn = np.unique(np.concatenate([drawn, more[~np.isin(more, known)]]))
    return generator.permutation(drawn)[:wanted]
