"""Which targets become a batch's negatives: searched, checked, verified, and shared out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..search.exact import SAMPLERS, CorrectedSearch, Found, Sampler
from ..search.gumbel import gumbel_noise
from ..search.topk import NO_ROW
from .filters import FalseNegativeFilter

Budget = Literal["query", "batch"]
_CHECKED_FOR_EACH = 2  # so many times the wanted negatives are selected where checks will remove some of them
_MOST_FOR_ONE_QUERY = 4  # so many times its own share one query can take of a budget that the batch has in common


class Selection(NamedTuple):
    """The negatives of a batch.

    Args:
        rows: each query's negatives, ``(B, m)``, hardest first; −1 where there are fewer. ``m`` is
            ``num_negatives``, or more with ``budget="batch"``, where one query may take more than another.
        ceiling: the highest score that a negative of each query may have, ``(B,)``.
        false_negatives: rows that ``range_min`` or a check has kept from the query, ``(B, c)``, padded with −1: no
            other query's selection may bring them back.
        verified_rows: the distinct rows that were encoded to be verified, ``(V,)``; none unless asked for.
        verified: their fresh embeddings, ``(V, d)``.
        removed: how many candidates each rule has removed.
    """

    rows: Tensor
    ceiling: Tensor
    false_negatives: Tensor
    verified_rows: Tensor
    verified: Tensor
    removed: dict[str, int]


@dataclass(frozen=True)
class NegativeSelector:
    """How negatives are chosen; the settings are those of :class:`CorrectedMultipleNegativesLoss`.

    Raises:
        InputError: a setting is out of range, or two of them do not go together.
    """

    num_negatives: int
    sampler: Sampler = "top_k"
    scale: float = 20.0
    budget: Budget = "query"
    candidates: int | None = None
    false_negatives: FalseNegativeFilter = field(default_factory=FalseNegativeFilter)

    def __post_init__(self) -> None:
        if self.num_negatives < 0:
            raise InputError(f"num_negatives must not be negative, got {self.num_negatives}.")
        if not self.scale > 0:
            raise InputError(f"scale must be positive, got {self.scale}.")
        if self.candidates is not None and self.candidates <= self.num_negatives:
            raise InputError(
                f"candidates are what the {self.num_negatives} negatives are chosen from: there must be more, got "
                f"{self.candidates}."
            )
        if self.sampler not in SAMPLERS:
            raise InputError(f"sampler {self.sampler!r} is not one of {', '.join(SAMPLERS)}.")
        if self.budget not in ("query", "batch"):
            raise InputError(f"budget {self.budget!r} is neither 'query' nor 'batch'.")
        if self.budget == "batch" and self.sampler != "top_k":
            raise InputError(f"budget='batch' takes the hardest of the batch: it needs 'top_k', not {self.sampler!r}.")
        rules = self.false_negatives
        if rules.range_max is None and rules.range_min and self.sampler != "top_k":
            raise InputError(
                f"range_min={rules.range_min} leaves out the hardest, which sampler={self.sampler!r} does not rank: "
                "set range_max as well, and the ranks between them are sampled from."
            )
        wanted = self.candidates or self.num_negatives
        if rules.range_max is not None and rules.range_max - rules.range_min < wanted:
            raise InputError(
                f"Between range_min={rules.range_min} and range_max={rules.range_max} there must be room for the "
                f"{wanted} {'candidates' if self.candidates else 'negatives'} of each query."
            )
        if self.sampler == "mixed" and (self.candidates or rules.checks or rules.range_max is not None):
            raise InputError(
                "sampler='mixed' takes half by rank and half by chance, which candidates, checks and range_max would "
                "undo: use 'top_k' or 'gumbel' with them."
            )

    @property
    def _pool(self) -> int:
        """How many candidates are selected for each query before anything is checked or encoded."""
        if self.candidates is not None:
            return self.candidates
        pool = self.num_negatives * (_MOST_FOR_ONE_QUERY if self.budget == "batch" else 1)
        return pool * (_CHECKED_FOR_EACH if self.false_negatives.checks else 1)

    @property
    def most_selected(self) -> int:
        """How many targets a search is asked for, for each query."""
        rules = self.false_negatives
        return rules.range_max if rules.range_max is not None else self._pool + rules.range_min

    @torch.no_grad()
    def select(
        self,
        search: CorrectedSearch,
        queries: Tensor,
        exclude: Tensor,
        positive_scores: Tensor,
        labels: Tensor,
        encode: Callable[[np.ndarray], Tensor],
    ) -> Selection:
        """Choose the negatives of one batch; where several processes search together, of all their batches.

        Args:
            search: over the corrected corpus.
            queries: ``f(x)``, ``(B, d)``.
            exclude: rows each query must not take, ``(B, m)``, padded with −1.
            positive_scores: fresh score of each query's positive, ``(B,)``.
            labels: corpus row of each query's positive, ``(B,)``.
            encode: fresh embeddings of rows, ``(V,) → (V, d)``; only called with ``candidates``.
        """
        rules = self.false_negatives
        ceiling = rules.ceiling(positive_scores)
        found, rows, scores = self._candidates(search, queries, exclude, ceiling)
        removed = Counter(rules.by_rule(positive_scores, found.too_similar))
        false_negatives = found.rows[:, : rules.range_min]
        if rules.range_min:
            removed["range_min"] = int((false_negatives != NO_ROW).sum())
        for check in rules.checks:
            false = check(labels, rows) & (rows != NO_ROW)
            removed[check.name] += int(false.sum())
            false_negatives = torch.cat([false_negatives, torch.where(false, rows, NO_ROW)], dim=1)
            rows, scores = rows.masked_fill(false, NO_ROW), scores.masked_fill(false, -torch.inf)

        verified_rows, verified = rows.new_empty(0), queries.new_empty(0, queries.shape[1])
        if self.candidates is not None and (rows != NO_ROW).any():
            verified_rows = rows[rows != NO_ROW].unique()
            verified = encode(verified_rows.cpu().numpy())
            position = torch.searchsorted(verified_rows, rows.clamp(min=0)).clamp(max=len(verified_rows) - 1)
            scores = (queries @ verified.T).gather(1, position).masked_fill(rows == NO_ROW, -torch.inf)
            known_now = scores > ceiling[:, None]
            removed.update(rules.by_rule(positive_scores, known_now.sum(1)))
            scores = scores.masked_fill(known_now, -torch.inf)
            order = scores.argsort(dim=1, descending=True, stable=True)
        else:
            order = (rows == NO_ROW).to(torch.uint8).argsort(dim=1, stable=True)  # as selected, gaps closed
        rows, scores = rows.gather(1, order), scores.gather(1, order)
        rows = rows.masked_fill(scores == -torch.inf, NO_ROW)
        if self.budget == "batch":
            rows = _hardest_of_the_batch(rows, scores - positive_scores[:, None], self.num_negatives * len(rows))
        else:
            rows = rows[:, : self.num_negatives]
        return Selection(rows, ceiling, false_negatives, verified_rows, verified, removed)

    def _candidates(
        self, search: CorrectedSearch, queries: Tensor, exclude: Tensor, ceiling: Tensor
    ) -> tuple[Found, Tensor, Tensor]:
        """What the search found, and of that rows and scores ``(B, pool)`` in order of preference."""
        rules = self.false_negatives
        # From torch's own generator: seeded by the trainer, and restored by it on resume.
        seed = None
        if self.sampler != "top_k":
            seed = int(search.processes.broadcast(torch.randint(2**62, (1,)).to(queries.device)))
        in_window = rules.range_max is not None
        found = search.search(
            queries,
            self.most_selected,
            exclude,
            sampler="top_k" if in_window else self.sampler,
            scale=self.scale,
            seed=None if in_window else seed,
            ceiling=ceiling,
        )
        rows, scores = found.rows[:, rules.range_min :], found.scores[:, rules.range_min :]
        if in_window and seed is not None:
            tempered = scores * (self.scale if self.sampler == "gumbel" else 0.0)
            keys = tempered.nan_to_num(0.0) + gumbel_noise(len(rows), 0, rows.shape[1], seed, rows.device)
            order = keys.masked_fill(rows == NO_ROW, -torch.inf).argsort(dim=1, descending=True)
            rows, scores = rows.gather(1, order), scores.gather(1, order)
        return found, rows[:, : self._pool], scores[:, : self._pool]


def _hardest_of_the_batch(rows: Tensor, margins: Tensor, budget: int) -> Tensor:
    """Keep the ``budget`` distinct rows that come nearest to some query's positive (or exceed it by most).

    Args:
        rows: candidates of each query, ``(B, m)``, padded with −1.
        margins: their scores less that of the query's positive, ``(B, m)``.
    """
    real = rows != NO_ROW
    distinct, position = rows[real].unique(return_inverse=True)
    if len(distinct) <= budget:
        return rows
    hardest = margins.new_full((len(distinct),), -torch.inf).scatter_reduce(0, position, margins[real], "amax")
    kept = distinct[hardest.topk(budget).indices]
    return rows.masked_fill(~torch.isin(rows, kept), NO_ROW)
