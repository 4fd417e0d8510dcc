"""Ways to serve a new model, each a set of vectors that queries search: all of them in one pass over the index."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..search.topk import RunningTopK
from .mapping import ROWS_AT_ONCE, Rows
from .vectors import Vectors


class Way(NamedTuple):
    """A way to serve.

    Args:
        queries: as they search, ``(Q, d)``.
        vectors: the index.
        targets: maps its embeddings ``(n, d)`` of rows ``(n,)`` to what is searched instead; None for themselves.
    """

    queries: Tensor
    vectors: Vectors
    targets: Callable[[Tensor, Rows], Tensor] | None = None

    def take(self, stale: Tensor, rows: Rows) -> Tensor:
        """What is searched, ``(n, d)``."""
        return stale if self.targets is None else self.targets(stale, rows)


class Found(NamedTuple):
    """What a way returns, best first.

    Args:
        scores: ``(Q, k)``.
        rows: ``(Q, k)``, −1 behind the last.
    """

    scores: Tensor
    rows: Tensor


def search(
    ways: Mapping[str, Way], depth: Mapping[str, int], withdrawn: Rows, progress: bool = True
) -> dict[str, Found]:
    """The first results of each way, exactly.

    Args:
        depth: how many of each way.
        withdrawn: rows that are never returned, ascending.
    """
    (count,) = {way.vectors.count for way in ways.values()}
    best = {name: RunningTopK(len(way.queries), min(depth[name], count)) for name, way in ways.items()}
    with tqdm(total=count, desc="Searching", unit=" targets", disable=not progress) as bar:
        for start in range(0, count, ROWS_AT_ONCE):
            rows = np.arange(start, min(start + ROWS_AT_ONCE, count))
            gone = torch.from_numpy(withdrawn[slice(*np.searchsorted(withdrawn, [start, start + len(rows)]))] - start)
            blocks = {id(way.vectors): way.vectors for way in ways.values()}
            stale = {key: vectors.take(rows) for key, vectors in blocks.items()}
            for name, way in ways.items():
                scores = way.take(stale[id(way.vectors)], rows) @ way.queries.T
                best[name].update(scores.index_fill_(0, gone, -torch.inf), start)
            bar.update(len(rows))
    return {name: Found(*each.best) for name, each in best.items()}
