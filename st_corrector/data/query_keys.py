"""By what a training step knows a query: a key that its text alone decides.

A trainer hands a loss token ids and labels, but no texts. The second number of a pair's label is its query's key, so
that queries are told apart even where they share a positive, in any data set, in any order and in every process.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import TypeVar

import numpy as np
from torch import Tensor

UNKNOWN = -1
"""The key of a query that nothing is known of."""
_BITS = 62
_OWN = 1 << _BITS


def query_keys(texts: Iterable[str], own: bool = False) -> np.ndarray:
    """The keys of queries by their texts, without prompts: int64, not negative, ``(Q,)``.

    Args:
        texts: the queries.
        own: whether these are targets' own questions (:meth:`.Corpus.own_pairs`), whose keys differ from those of a
            split's queries with the same text.
    """
    added = _OWN if own else 0
    digests = (hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest() for text in texts)
    return np.fromiter((added + (int.from_bytes(each, "little") >> (64 - _BITS)) for each in digests), np.int64)


def own_keys(digests: np.ndarray) -> np.ndarray:
    """The keys that texts would have as own questions, by 64 bits of their digests: ``(n,)`` uint64 → int64."""
    return (digests >> np.uint64(64 - _BITS)).astype(np.int64) + _OWN


Keys = TypeVar("Keys", int, Tensor, np.ndarray)


def is_own(keys: Keys) -> Keys:
    """Whether a key, or each of several, is that of a target's own question."""
    return keys >= _OWN
