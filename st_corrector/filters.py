"""Which candidates may not be negatives: pure functions over corpus rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .corpus import Corpus
from .qrels import Qrels


def known_positives(corpus: Corpus, qrels: Qrels | None, labels: Sequence[int]) -> list[np.ndarray]:
    """For each query of a batch, the rows that must never be its negatives.

    These are its positive (``labels``), everything else that is judged relevant to it, and every exact
    duplicate of their texts.

    Args:
        qrels: the judgements of the training split, or None where the labels are all that is known.
        labels: corpus row of each query's positive, ``(B,)``.

    Returns:
        ``B`` arrays of rows, ascending.
    """
    judged = [np.array([row]) for row in labels] if qrels is None else qrels.co_positives(labels)
    return [np.unique(np.concatenate([corpus.duplicates_of(row) for row in rows])) for rows in judged]


def pad_rows(rows: Sequence[np.ndarray]) -> Tensor:
    """Row lists of unequal length as one ``(B, m)`` tensor, padded with −1 (which is no row)."""
    width = max((len(each) for each in rows), default=0)
    padded = np.full((len(rows), width), -1, dtype=np.int64)
    for target, each in zip(padded, rows, strict=True):
        target[: len(each)] = each
    return torch.from_numpy(padded)


def is_in(candidates: Tensor, rows: Tensor) -> Tensor:
    """Whether each of ``candidates`` ``(M,)`` is among each query's ``rows`` ``(B, m)``, padded with −1: ``(B, M)``."""
    if rows.shape[1] == 0:
        return torch.zeros(len(rows), len(candidates), dtype=torch.bool, device=candidates.device)
    # Binary search, since one comparison of everything with everything would need B × M × m.
    rows = rows.sort(dim=1).values
    wanted = candidates.expand(len(rows), -1).contiguous()
    position = torch.searchsorted(rows, wanted).clamp_(max=rows.shape[1] - 1)
    return rows.gather(1, position) == wanted


def repeats_earlier(candidates: Tensor) -> Tensor:
    """Whether each of ``candidates`` ``(M,)`` equals an earlier one: ``(M,)``."""
    return (candidates[:, None] == candidates[None, :]).triu(1).any(0)
