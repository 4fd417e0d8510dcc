"""Which candidates may not be negatives: pure functions over corpus rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .corpus import Corpus
from .errors import InputError
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
    position = torch.arange(len(candidates), device=candidates.device)
    _, value = candidates.unique(return_inverse=True)
    first = position.new_full((len(candidates),), len(candidates)).scatter_reduce(0, value, position, "amin")
    return first[value] != position


@dataclass(frozen=True)
class FalseNegativeFilter:
    """Which targets are so similar to a query that they are taken for unjudged positives, not for negatives.

    All rules that are set hold. The names are those of
    :func:`sentence_transformers.util.mine_hard_negatives`; the margins are the positive-aware rules of NV-Retriever
    (`Moreira et al. 2024 <https://arxiv.org/abs/2407.15831>`_). Scores are those of the loss's similarity function,
    without its scale.

    Args:
        max_score: no negative may score higher.
        absolute_margin: a negative must score at least this much less than the query's positive.
        relative_margin: a negative's score must be at most ``(1 − relative_margin)`` times the positive's, e.g. 0.05.
        range_min: leave out so many of the hardest targets that the other rules allow.

    Raises:
        InputError: a margin or ``range_min`` is negative.
    """

    max_score: float | None = None
    absolute_margin: float | None = None
    relative_margin: float | None = None
    range_min: int = 0

    def __post_init__(self) -> None:
        for name in ("absolute_margin", "relative_margin", "range_min"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise InputError(f"{name} must not be negative, got {value}.")

    def ceiling(self, positive_scores: Tensor) -> Tensor:
        """The highest score that a negative of each query may have, given its positive's: ``(B,) → (B,)``."""
        ceiling = torch.full_like(positive_scores, torch.inf)
        if self.max_score is not None:
            ceiling = ceiling.clamp(max=self.max_score)
        if self.absolute_margin is not None:
            ceiling = torch.minimum(ceiling, positive_scores - self.absolute_margin)
        if self.relative_margin is not None:
            # A share of the absolute value, so that the ceiling lies below a negative score too.
            ceiling = torch.minimum(ceiling, positive_scores - self.relative_margin * positive_scores.abs())
        return ceiling
