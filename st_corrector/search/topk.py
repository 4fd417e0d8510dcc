"""The exact top k over blocks of rows, for little more than the cost of reading their scores once."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import InputError

NO_ROW = -1
BLOCK = 64
"""Rows per block; its maximum is checked before its rows. Small blocks waste few reads, large ones have few maxima."""


class RunningTopK:
    """The ``k`` largest scores of each query over successive blocks of rows.

    Exact, and independent of how rows are split into blocks: equal scores are ordered by row, the smaller first, also
    if only some of them fit.

    Every score is read once, for the maximum of its block of 64 rows. Only blocks whose maximum exceeds the query's
    threshold are searched. The threshold is first the ``k``-th largest block maximum, since ``k`` blocks have a score
    at least as large; then the ``k``-th best score so far. For ``N`` rows in random order the latter passes about
    ``k·ln(N)`` scores per query.

    Args:
        batch_size: number of queries ``B``.
        k: how many to keep.
    """

    def __init__(self, batch_size: int, k: int, device: torch.device | str = "cpu") -> None:
        self.k = k
        self._scores = torch.full((batch_size, k), -math.inf, device=device)
        self._rows = torch.full((batch_size, k), NO_ROW, dtype=torch.int64, device=device)
        self._accepts_above = torch.full((batch_size,), -math.inf, device=device)
        # (query, score, row) of unranked scores above the threshold, in the order of the rows.
        self._waiting: list[tuple[Tensor, Tensor, Tensor]] = []
        self._waiting_count = 0

    def update(self, scores: Tensor, first_row: int, maxima: Tensor | None = None) -> None:
        """Add ``scores`` ``(C, B)`` of the rows ``first_row … first_row + C − 1``; −∞ is never selected.

        Earlier rows must come first. ``maxima`` ``(C // 64, B)`` of the whole blocks, if given, are not computed.

        Raises:
            InputError: a score is not a number.
        """
        rows, batch_size = scores.shape
        whole = rows - rows % BLOCK
        if whole:
            blocks = scores[:whole].reshape(-1, BLOCK, batch_size)
            self._take_blocks(blocks, blocks.amax(1) if maxima is None else maxima, first_row)
        if whole < rows:
            rest = scores[None, whole:]
            self._take_blocks(rest, rest.amax(1), first_row + whole)

    def update_blocks(self, maxima: Tensor, scores_of: Callable[[Tensor, Tensor], Tensor], first_row: int) -> None:
        """The same for scores not computed yet, of which only every block's maximum is known.

        Args:
            maxima: the largest score of each block for each query, ``(blocks, B)``.
            scores_of: maps blocks ``(m,)`` and queries ``(m,)`` to the scores of these blocks' rows for these queries,
                ``(m, 64)``, −∞ where there is no row.
            first_row: of the first block.
        """
        # scores_of may round the same row differently: either score may be larger.
        slack = 1e-5 * maxima.nan_to_num(posinf=0.0, neginf=0.0).abs().amax(0)
        self._look_into(maxima + slack, scores_of, first_row, BLOCK, lambda: self._kth(maxima) - slack, rounded=True)

    def take(self, scores: Tensor, rows: Tensor) -> None:
        """Add ``scores`` ``(n, B)`` of any ``rows`` ``(n,)``; ties may go to either row.

        Raises:
            InputError: a score is not a number.
        """
        place, query = (~(scores <= self._accepts_above)).nonzero(as_tuple=True)
        self._wait(query, scores[place, query], rows[place])

    @property
    def best(self) -> tuple[Tensor, Tensor]:
        """Scores and rows of the ``k`` best so far, ``(B, k)`` each, best first; −∞ and −1 if there are fewer."""
        self._rank()
        return self._scores, self._rows

    def _take_blocks(self, blocks: Tensor, maxima: Tensor, first_row: int) -> None:
        """Add the scores of consecutive blocks of rows, ``(blocks, rows of each, B)``, and the blocks' maxima."""
        count, height, batch_size = blocks.shape

        def kth() -> Tensor:
            # With too few blocks, use the scores themselves.
            return self._kth(maxima if count >= self.k else blocks.view(-1, batch_size))

        self._look_into(maxima, lambda block, query: blocks[block, :, query], first_row, height, kth)

    def _kth(self, scores: Tensor) -> Tensor:
        """The ``k``-th largest of some scores (or maxima of blocks) for each query, ``(n, B)`` → ``(B,)``; or −∞."""
        if len(scores) < self.k:
            return scores.new_full((scores.shape[1],), -math.inf)
        return scores.topk(self.k, dim=0).values[-1]

    def _look_into(
        self,
        maxima: Tensor,
        scores_of: Callable[[Tensor, Tensor], Tensor],
        first_row: int,
        height: int,
        kth: Callable[[], Tensor],
        rounded: bool = False,
    ) -> None:
        """Keep what exceeds the threshold. At least ``k`` scores reach the ``k``-th largest block maximum, ``kth()``,
        which is computed if the threshold passes too many. If maxima are ``rounded`` differently from scores, ``kth()``
        only chooses among blocks: fewer than ``k`` scores may reach it.
        """
        # Written so that NaN passes, and is found.
        accepts_above = self._accepts_above
        block, query = (~(maxima <= accepts_above)).nonzero(as_tuple=True)
        if len(block) > 2 * self._scores.numel():
            bound = kth()
            # Just below it, since scores equal to it may be needed.
            bound = torch.nextafter(bound, torch.full_like(bound, -math.inf))
            accepts_above = torch.fmax(accepts_above, bound)
            block, query = (~(maxima <= accepts_above)).nonzero(as_tuple=True)
            if not rounded:
                self._accepts_above = accepts_above
        if not len(block):
            return
        inside = scores_of(block, query)
        hit, offset = (~(inside <= self._accepts_above[query, None])).nonzero(as_tuple=True)
        self._wait(query[hit], inside[hit, offset], first_row + block[hit] * height + offset)

    def _wait(self, query: Tensor, score: Tensor, row: Tensor) -> None:
        if score.isnan().any():
            raise InputError(
                f"The score of row {int(row[score.isnan()].min())} is not a number: the queries, the cache's "
                "embedding or its correction is not finite."
            )
        self._waiting.append((query, score, row))
        self._waiting_count += len(query)
        if self._waiting_count > 2 * self._scores.numel():
            self._rank()

    def _rank(self) -> None:
        if not self._waiting:
            return
        batch_size = len(self._scores)
        found = self._rows != NO_ROW
        queries = torch.arange(batch_size, device=found.device)
        kept = (queries[:, None].expand_as(found)[found], self._scores[found], self._rows[found])
        query, score, row = (torch.cat(parts) for parts in zip(kept, *self._waiting, strict=True))
        # Sort by row, then by query: one number for both would overflow with many queries. Then each query gets one row
        # of a matrix, as wide as the longest, sorted by score: stable, so that equal scores stay in the order of their
        # rows.
        order = row.argsort()
        order = order[query[order].argsort(stable=True)]
        query, score, row = query[order], score[order], row[order]
        counts = query.bincount(minlength=batch_size)
        place = torch.arange(len(query), device=query.device) - (counts.cumsum(0) - counts)[query]
        width = max(self.k, int(counts.max()))
        scores = self._scores.new_full((batch_size, width), -math.inf).index_put_((query, place), score)
        rows = self._rows.new_full((batch_size, width), NO_ROW).index_put_((query, place), row)
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        self._scores, self._rows = scores[:, : self.k].contiguous(), rows.gather(1, order[:, : self.k])
        # A later row must exceed the k-th best: if equal, the earlier row stays.
        self._accepts_above = torch.maximum(self._accepts_above, self._scores[:, -1])
        self._waiting, self._waiting_count = [], 0
