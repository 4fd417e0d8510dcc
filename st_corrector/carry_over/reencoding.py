"""Targets that are encoded again: which first, and what they teach about the others."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from .fitting import LEAST_PAIRS, fit_to_pairs
from .mapping import IndexMap, Rows
from .vectors import Vectors
from .ways import Way, search

DEPTH = 200
"""How far down a query's results targets count."""
EVERY, RANDOM = 4, 1_000
"""One of so many rows that are encoded again is random, up to so many."""
MOST_QUERIES = 2_000
"""More do not change the order much; a search holds a score for each, and for thousands of targets at once."""


def reencoding_order(how: IndexMap, vectors: Vectors, queries: Tensor, withdrawn: Rows, progress: bool = True) -> Rows:
    """The rows of an index, those first whose re-encoding changes most of what queries get (:func:`use`).

    Every fourth of the first is a random row instead, until there are 1,000 of these: what is encoded again also
    teaches a correction of all others (:func:`encoded_again`), which would not suit them if it came from nothing but
    what queries retrieve. Rows that no query retrieves come last, in random order. What a corrector is unsure of was
    tried as a weight, and adds nothing (``benchmarks/results/serving``).

    Args:
        how, vectors, queries, withdrawn, progress: see :func:`use`.
    """
    chance = np.random.default_rng(0).permutation(vectors.count)
    used = use(how, vectors, queries, withdrawn, progress).numpy()
    order = np.lexsort((chance, -used))
    order, chance = (each[~np.isin(each, withdrawn)] for each in (order, chance))
    count = min(RANDOM, len(order) // EVERY)
    order = order[~np.isin(order, chance[:count])]
    return np.insert(order, np.arange(EVERY - 1, EVERY * count, EVERY) - np.arange(count), chance[:count])


def use(how: IndexMap, vectors: Vectors, queries: Tensor, withdrawn: Rows, progress: bool = True) -> Tensor:
    """How much queries get each target from the upgraded index, ``(N,)``.

    A target counts for every query that it is retrieved for, at rank r by ``1 / √r``: a wrong place matters most at the
    top, and targets that are further down may belong there.

    Args:
        how: carries the index over.
        queries: embeddings by the new model of queries like those that will be asked, ``(Q, d')``; of more than 2,000
            the first.
        withdrawn: rows that are no targets any more, ascending; they are left out.
    """
    found = search({"": Way(queries[:MOST_QUERIES], vectors, how)}, {"": DEPTH}, withdrawn, progress)[""].rows
    weight = torch.arange(1, found.shape[1] + 1).rsqrt().expand_as(found)
    used = torch.zeros(vectors.count, dtype=torch.float64)
    return used.index_add_(0, found[found >= 0], weight[found >= 0].double())


def encoded_again(how: IndexMap, vectors: Vectors, rows: Rows, encode: Callable[[Rows], Tensor]) -> IndexMap:
    """``how`` with the targets of ``rows`` encoded again, and corrected by what these show.

    Their own embeddings take their places. In a mixture of fresh and corrected embeddings, correctors that were trained
    for choosing negatives alone would put fresh ones first: their scores are lower than fresh ones. So a ridge
    correction is fitted on these targets behind what there is.

    Args:
        rows: ascending, none of them encoded again before.
        encode: gives rows' embeddings by the new model.
    """
    if len(np.intersect1d(rows, how.rows)):
        raise InputError("Some of these targets were encoded again already.")
    every = np.union1d(rows, how.rows)
    fresh = torch.empty(len(every), how.new_dim)
    fresh[torch.from_numpy(np.searchsorted(every, how.rows))] = how.fresh
    fresh[torch.from_numpy(np.searchsorted(every, rows))] = encode(rows)
    correctors = list(how.correctors)
    if len(every) >= LEAST_PAIRS:
        carried = how(vectors.take(every))
        more = fit_to_pairs(carried, fresh, "ridge", unit=how.unit)
        if correctors[-1].frames is not None:
            more.frames = correctors[-1].frames._replace(stale={})
        correctors.append(more)
    return IndexMap(*correctors, rows=every, fresh=fresh)
