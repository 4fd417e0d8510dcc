"""One training step's pairs, of all processes, and what each query is compared with."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..data.corpus import Corpus
from ..data.qrels import Qrels
from ..data.query_keys import UNKNOWN, is_own
from ..negatives.filters import is_in, known_positives, pad_rows, repeats_earlier
from ..negatives.selector import Selection
from ..negatives.settings import HardnessMode, NegativeSettings
from ..runtime.distributed import Processes
from ..search.topk import NO_ROW
from .distillation import SoftLabels


class Column(NamedTuple):
    """Embeddings of one column's texts, cut off from what made them.

    Args:
        pieces: leaves that gather gradients, ``(n, d)`` in all.
        origin: what :meth:`CorrectedMultipleNegativesLoss._connected` needs to hand these gradients on; None where
            nothing was encoded.
    """

    pieces: list[Tensor]
    origin: Any

    @classmethod
    def of(cls, embeddings: Tensor) -> Column:
        """Embeddings that were looked up, ``(n, d)``."""
        return cls([embeddings.clone().requires_grad_()], None)

    @property
    def embeddings(self) -> Tensor:
        """``(n, d)``, without gradient."""
        return torch.cat(self.pieces).detach()


class Batch(NamedTuple):
    """The pairs of all processes, one process after the other.

    Args:
        counts: pairs of each process.
        mine: the place of this process's pairs.
        queries: ``f(x)`` as the search sees them, ``(B, d)``.
        positives: ``g(y⁺)`` likewise, ``(B, d)``.
        rows: the positives' corpus rows, ``(B,)``.
        keys: by what the queries are known (:func:`.query_keys`), ``(B,)``; −1 where nothing tells it.
        known: rows that no query may get, ``(B, m)``, padded with −1.
        explicit: rows that the data names as negatives of each query, ``(B, m)``, padded with −1; none that is known.
    """

    counts: list[int]
    mine: slice
    queries: Tensor
    positives: Tensor
    rows: Tensor
    keys: Tensor
    known: Tensor
    explicit: Tensor

    @property
    def positive_scores(self) -> Tensor:
        """``⟨f(x), g(y⁺)⟩``, ``(B,)``."""
        return (self.queries * self.positives).sum(-1)


class Candidates(NamedTuple):
    """What the queries of this process are compared with.

    Args:
        counts: of each column of candidates (positives, negatives), how many each process has encoded.
        target: the place of each of this process's positives among all candidates, ``(b,)``.
        forbidden: candidates that do not count for a query, ``(b, C)``; None for none.
        weight: of this process's mean over its queries, so that the mean over processes is the mean over all queries.
        hardened: negatives that count the more the harder they are, ``(b, C)``; None for none.
        own: queries that are targets' own questions, ``(b,)``; None for none.
        soft: a teacher's labels, if there is one.
        held_out: queries that nothing is learnt of, by which a teacher is judged, ``(b,)``; None for none.
    """

    counts: list[list[int]]
    target: Tensor
    forbidden: Tensor | None
    weight: float
    hardened: Tensor | None = None
    own: Tensor | None = None
    soft: SoftLabels | None = None
    held_out: Tensor | None = None


def known_rows(corpus: Corpus, qrels: Qrels | None, rows: Tensor, keys: Tensor) -> Tensor:
    """What no query may get, by their positives ``(B,)`` and their keys ``(B,)``: ``(B, m)``, padded with −1. Of a
    query that is in several pairs of the batch it is what is known of all of them, whatever the judgements say.
    """
    known, pairs_of = known_positives(corpus, qrels, rows.tolist(), keys.tolist()), defaultdict[int, list[int]](list)
    for pair, key in enumerate(keys.tolist()):
        pairs_of[key].append(pair)
    for key, pairs in pairs_of.items():
        if len(pairs) > 1 and key != UNKNOWN:
            together = np.unique(np.concatenate([known[pair] for pair in pairs]))
            for pair in pairs:
                known[pair] = together
    return pad_rows(known).to(rows.device)


def in_batch_candidates(rows: Tensor | None, known: Tensor | None, count: int, device: torch.device) -> Candidates:
    """The positives of one process's own batch as candidates: what evaluation looks at.

    Args:
        rows, known: the positives' corpus rows, and what no query may get; None where these are unknown.
        count: pairs in the batch.
    """
    target = torch.arange(count, device=device)
    forbidden = None
    if rows is not None and known is not None:
        forbidden = is_in(rows, known) | repeats_earlier(rows)
        forbidden[target, target] = False
    return Candidates([[count]], target, forbidden, 1.0)


@torch.no_grad()
def with_explicit(selection: Selection | None, batch: Batch, settings: NegativeSettings) -> Selection | None:
    """What was chosen, and what the data names besides; None if that is nothing."""
    explicit = batch.explicit
    if not explicit.shape[1]:
        return selection
    if selection is None:
        ceiling = settings.false_negatives.ceiling(batch.positive_scores)
        return Selection(explicit, ceiling, explicit[:, :0], batch.rows[:0], batch.positives[:0], {})
    again = (explicit[:, :, None] == selection.rows[:, None, :]).any(2)
    return selection._replace(rows=torch.cat([selection.rows, explicit.masked_fill(again, NO_ROW)], dim=1))


def explicit_negatives(explicit: Tensor, known: Tensor) -> Tensor:
    """The rows that the data names, each once, and none that is known to be relevant: ``(B, m), (B, n) → (B, m)``."""
    relevant = (explicit[:, :, None] == known[:, None, :]).any(2)
    again = (explicit[:, :, None] == explicit[:, None, :]).tril(-1).any(2)
    return explicit.masked_fill(relevant | again, NO_ROW)


@torch.no_grad()
def not_offered(batch: Batch, negative_rows: Tensor, selection: Selection | None, settings: NegativeSettings) -> Tensor:
    """Which of all positives and negatives are no candidates of a query, whether relevant to it or not: ``(b, C)``."""
    columns, size, own = torch.cat([batch.rows, negative_rows]), len(batch.rows), batch.rows[batch.mine]
    left_out = torch.zeros(len(own), len(columns), dtype=torch.bool, device=columns.device)
    if selection is not None:
        if settings.share_negatives:
            left_out |= ~torch.isin(columns, selection.rows.flatten())
        else:
            left_out |= ~is_in(columns, selection.rows[batch.mine])
        if settings.in_batch_negatives:
            left_out[:, :size] = False
    # A positive that two share is one candidate: for these two each its own, for the others the first.
    left_out[:, :size] |= repeats_earlier(batch.rows) | (batch.rows == own[:, None])
    left_out[torch.arange(len(own)), torch.arange(size)[batch.mine]] = False
    return left_out


@torch.no_grad()
def candidates_of(
    batch: Batch,
    negative_rows: Tensor,
    selection: Selection | None,
    left_out: Tensor,
    fresh: Tensor,
    counts: list[list[int]],
    settings: NegativeSettings,
    processes: Processes,
) -> Candidates:
    """Which of all positives and negatives count for which query.

    Args:
        batch: of all processes.
        negative_rows: corpus rows of the negatives, ``(C − B,)``.
        selection: what each query has taken; None if it has taken nothing.
        left_out: see :func:`not_offered`.
        fresh: embeddings of positives, then negatives, ``(C, d)``.
        counts: how many of each of both kinds each process has encoded.
        settings: what the queries share, and which candidates are false negatives.
        processes: those that the batch is of: a check that fails in one of them fails in all.
    """
    mine, rules = batch.mine, settings.false_negatives
    columns = torch.cat([batch.rows, negative_rows])
    target = torch.arange(len(batch.rows), device=columns.device)[mine]
    forbidden = left_out | is_in(columns, batch.known[mine])
    ceiling = rules.ceiling(batch.positive_scores)
    if selection is not None:
        ceiling = selection.ceiling
        forbidden |= is_in(columns, selection.false_negatives[mine])
        for check in rules.checks:
            if check.everywhere:
                with processes.together(f"Asking {check!r}"):
                    forbidden |= check(batch.rows[mine], columns.expand(len(target), -1), batch.keys[mine])
    if not torch.isposinf(ceiling).all():
        forbidden |= batch.queries[mine] @ fresh.T > ceiling[mine, None]
    if batch.explicit.shape[1]:
        # What the data says of a query no rule contradicts.
        forbidden &= ~is_in(columns, batch.explicit[mine]) | repeats_earlier(columns)
    forbidden[torch.arange(len(target), device=target.device), target] = False
    weight = len(target) * len(batch.counts) / len(batch.rows)
    is_target = torch.nn.functional.one_hot(target, len(columns)).bool()
    hardened, own = None, is_own(batch.keys[mine])
    if settings.hardness_mode is not None:
        chosen = batch.rows.new_empty(len(target), 0) if selection is None else selection.rows[mine]
        hardened = _hardened(settings.hardness_mode, is_in(columns, chosen)) & ~is_target
    return Candidates(counts, target, forbidden, weight, hardened, own if own.any() else None)


def _hardened(mode: HardnessMode, chosen: Tensor) -> Tensor:
    """Which candidates count the more the harder they are.

    Args:
        mode: see :class:`NegativeSettings`.
        chosen: which of them each query has taken itself, ``(b, C)``.
    """
    if mode == "all_negatives":
        return torch.ones_like(chosen)
    return chosen if mode == "hard_negatives" else ~chosen
