"""Which targets become a batch's negatives: searched, checked, verified, and shared out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..runtime.distributed import Processes
from ..search.exact import CorrectedSearch, Found
from ..search.gumbel import gumbel_noise
from ..search.topk import NO_ROW
from .filters import Check
from .settings import NegativeSettings

_CHECKED_FOR_EACH = 2  # times the wanted negatives are selected where checks will remove some


class Selection(NamedTuple):
    """The negatives of a batch.

    Args:
        rows: each query's negatives, ``(B, num_negatives)``, hardest first; −1 where there are fewer.
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


class NegativeSelector:
    """Chooses a batch's negatives.

    Args:
        settings: how.
        scale: the inverse temperature β, by which ``"gumbel"`` samples.
    """

    def __init__(self, settings: NegativeSettings, scale: float) -> None:
        self.settings, self.scale = settings, scale

    @property
    def _pool(self) -> int:
        """How many candidates are selected for each query before anything is checked or encoded."""
        settings = self.settings
        if settings.candidates is not None:
            return settings.candidates
        return settings.num_negatives * (_CHECKED_FOR_EACH if settings.false_negatives.checks else 1)

    @property
    def most_selected(self) -> int:
        """How many targets a search is asked for, for each query."""
        rules = self.settings.false_negatives
        return rules.range_max if rules.range_max is not None else self._pool + rules.range_min

    @torch.no_grad()
    def select(
        self,
        search: CorrectedSearch,
        queries: Tensor,
        exclude: Tensor,
        positive_scores: Tensor,
        labels: Tensor,
        keys: Tensor,
        encode: Callable[[np.ndarray], Tensor],
    ) -> Selection:
        """Choose the negatives of one batch; where several processes search together, of all their batches.

        Args:
            search: over the corrected corpus.
            queries: ``f(x)``, ``(B, d)``.
            exclude: rows each query must not take, ``(B, m)``, padded with −1.
            positive_scores: fresh score of each query's positive, ``(B,)``.
            labels: corpus row of each query's positive, ``(B,)``.
            keys: of the queries, ``(B,)``; −1 where they are unknown.
            encode: fresh embeddings of rows, ``(V,) → (V, d)``; only called with ``candidates``.
        """
        rules = self.settings.false_negatives
        ceiling = rules.ceiling(positive_scores)
        found, rows, scores = self._candidates(search, queries, exclude, ceiling)
        removed = Counter(rules.by_rule(positive_scores, found.too_similar))
        false_negatives = found.rows[:, : rules.range_min]
        if rules.range_min:
            removed["range_min"] = int((false_negatives != NO_ROW).sum())
        for check in rules.checks:
            false = _asked(check, labels, rows, keys, search.processes) & (rows != NO_ROW)
            removed[check.name] += int(false.sum())
            false_negatives = torch.cat([false_negatives, torch.where(false, rows, NO_ROW)], dim=1)
            rows, scores = rows.masked_fill(false, NO_ROW), scores.masked_fill(false, -torch.inf)

        verified_rows, verified = rows.new_empty(0), queries.new_empty(0, queries.shape[1])
        if self.settings.candidates is not None and (rows != NO_ROW).any():
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
        return Selection(
            rows[:, : self.settings.num_negatives], ceiling, false_negatives, verified_rows, verified, removed
        )

    def _candidates(
        self, search: CorrectedSearch, queries: Tensor, exclude: Tensor, ceiling: Tensor
    ) -> tuple[Found, Tensor, Tensor]:
        """What the search found, and of that rows and scores ``(B, pool)`` in order of preference."""
        rules = self.settings.false_negatives
        # From torch's own generator: seeded by the trainer, and restored by it on resume.
        seed = None
        if self.settings.sampler != "top_k":
            seed = int(search.processes.broadcast(torch.randint(2**62, (1,)).to(queries.device)))
        in_window = rules.range_max is not None
        found = search.search(
            queries,
            self.most_selected,
            exclude,
            sampler="top_k" if in_window else self.settings.sampler,
            scale=self.scale,
            seed=None if in_window else seed,
            ceiling=ceiling,
        )
        rows, scores = found.rows[:, rules.range_min :], found.scores[:, rules.range_min :]
        if in_window and seed is not None:
            tempered = scores * (self.scale if self.settings.sampler == "gumbel" else 0.0)
            keys = tempered.nan_to_num(0.0) + gumbel_noise(len(rows), 0, rows.shape[1], seed, rows.device)
            order = keys.masked_fill(rows == NO_ROW, -torch.inf).argsort(dim=1, descending=True)
            rows, scores = rows.gather(1, order), scores.gather(1, order)
        return found, rows[:, : self._pool], scores[:, : self._pool]


def _asked(check: Check, labels: Tensor, rows: Tensor, keys: Tensor, processes: Processes) -> Tensor:
    """What a check says of candidates, ``(B, m)``: each process asks it about a share of the queries, so that nothing
    is asked twice, and all hear the same.
    """
    mine = processes.share(len(rows))
    answer = torch.zeros_like(rows[mine], dtype=torch.uint8)
    with processes.together(f"Asking {check!r}"):
        if len(answer):
            answer = check(labels[mine], rows[mine], keys[mine]).to(answer)
    return processes.gather(answer, [len(rows[each]) for each in processes.shares(len(rows))]).bool()
