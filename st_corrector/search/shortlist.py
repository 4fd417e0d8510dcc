"""Approximate search: a shortlist from a cheaper search, rescored by the current corrector."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..cache.embedding_cache import EmbeddingCache
from ..correctors import Corrector, IdentityCorrector
from ..errors import InputError
from ..runtime.distributed import Processes
from ..runtime.memory import require_memory
from ..runtime.precision import in_float32
from .exact import CorrectedSearch, Found, Sampler
from .faiss_index import FaissIndex
from .fidelity import overlap_at_k
from .overlay import Overlay
from .scoring import ChunkScores, Excluded, Scorer
from .topk import BLOCK, NO_ROW, RunningTopK

logger = logging.getLogger(__name__)
_CHECKED_QUERIES = 8
_WRITTEN_AT_ONCE = 8_192
_CORRECTED_AT_ONCE = 16_384


@dataclass(frozen=True)
class Shortlist:
    """How candidates are found before the current corrector scores them.

    If the queries are corrected instead of the corpus (``normalize=False`` and an affine corrector), they search the
    index of the stale vectors. That index serves the whole run and finds what a search of the corrected corpus would
    find. Otherwise the stale vectors (or, with ``every``, a copy corrected some steps ago) only suggest candidates, and
    ``size`` decides how many of the best are among them.

    Args:
        index: ``"exact"``, a FAISS index factory string, or an existing :class:`FaissIndex` of the cache.
        size: candidates for each query before exclusions; by default the number requested if the queries are corrected,
            otherwise 8 times as many.
        every: search a corrected copy of the whole cache in bfloat16, ``2·N·d`` bytes, renewed every N steps; None
            searches the stale vectors. A FAISS index is built again each time. Checkpoints do not hold the copy: a
            resumed run makes it again at once, with the corrector of that step.
        parameters: search parameters of a FAISS index made from a string, such as ``"nprobe=32"``.
        check_every: at the first search and every N searches, some queries are also searched exactly to measure recall.
        min_recall: a measured recall below it causes a warning.

    Raises:
        InputError: a number is out of range, or ``every`` is given with an existing index.
    """

    index: str | FaissIndex = "exact"
    size: int | None = None
    every: int | None = None
    parameters: str = ""
    check_every: int = 100
    min_recall: float = 0.9

    def __post_init__(self) -> None:
        if min(1 if self.size is None else self.size, 1 if self.every is None else self.every, self.check_every) < 1:
            raise InputError(
                f"size, every and check_every must be at least 1, got {self.size}, {self.every} and {self.check_every}."
            )
        if not 0 <= self.min_recall <= 1:
            raise InputError(f"min_recall must lie in [0, 1], got {self.min_recall}.")
        if self.every is not None and isinstance(self.index, FaissIndex):
            raise InputError("every builds the index again: give its factory string instead of an existing index.")


class ShortlistSearch(CorrectedSearch):
    """Searches a shortlist instead of the whole corrected corpus; rows written back are always scored, exactly.

    Args:
        cache, corrector, normalize, chunk_size, processes, withdrawn: see :class:`CorrectedSearch`.
        shortlist: how candidates are found.

    Raises:
        InputError: the index is of other vectors, or FAISS cannot make it.
    """

    def __init__(
        self,
        cache: EmbeddingCache,
        corrector: Corrector,
        shortlist: Shortlist,
        *,
        normalize: bool = True,
        chunk_size: int | None = None,
        processes: Processes | None = None,
        withdrawn: Sequence[int] | np.ndarray = (),
    ) -> None:
        super().__init__(
            cache, corrector, normalize=normalize, chunk_size=chunk_size, processes=processes, withdrawn=withdrawn
        )
        self.shortlist = shortlist
        self.recall: float | None = None
        """The last measured recall: the share of an exact search's ``k`` targets that was selected."""
        self._searches = 0
        self._copied_at = 0
        self._copied_by: Corrector | None = None
        if shortlist.every is None:
            self._source = self._make_source(cache, normalize)

    @torch.no_grad()
    @in_float32
    def search(
        self,
        queries: Tensor,
        k: int,
        exclude: Tensor | None = None,
        sampler: Sampler = "top_k",
        scale: float = 1.0,
        seed: int | None = None,
        ceiling: Tensor | None = None,
    ) -> Found:
        """As :meth:`CorrectedSearch.search`, within the shortlist, to which ``too_similar`` is limited.

        Raises:
            InputError: the sampler needs the scores of all rows, or an exact search would refuse the arguments.
        """
        queries = self._check(queries, k, sampler, seed)
        if sampler != "top_k":
            raise InputError(
                f"sampler={sampler!r} looks at every row, a shortlist does not: use 'top_k' "
                "(FalseNegativeFilter(range_max=…) samples from the ranks up to range_max)."
            )
        self.corrector.to(queries.device)
        found = self._search_shortlist(queries, k, exclude, ceiling)
        if self._searches % self.shortlist.check_every == 0:
            self._measure_recall(queries, k, exclude, ceiling, found)
        self._searches += 1
        return found

    def memory(self, batch_size: int, k: int, device: torch.device | str, rows_written: int = 0) -> dict[str, int]:
        needs = super().memory(batch_size, k, device, rows_written)
        size = (self.shortlist.size or 8 * k) * batch_size
        needs[f"shortlists of {batch_size} queries"] = 12 * size * self.cache.dim
        if self.shortlist.every is not None:
            needs["corrected copy in bfloat16"] = 2 * len(self.cache) * self.cache.dim
        return needs

    def _search_shortlist(self, queries: Tensor, k: int, exclude: Tensor | None, ceiling: Tensor | None) -> Found:
        device, batch_size = queries.device, len(queries)
        if exclude is not None:
            exclude = exclude.to(device).expand(batch_size, -1)
        limit = queries.new_full((batch_size,), math.inf) if ceiling is None else ceiling
        best = self._best_written(queries, k, exclude, limit)
        size = self.shortlist.size or (k if self.corrects_queries else 8 * k)
        candidates = self._candidates(queries, size + (0 if exclude is None else exclude.shape[1]))
        scores = self.score(queries, candidates)
        if exclude is not None:
            known = (candidates[:, :, None] == exclude[:, None, :]).any(-1)
            scores = scores.masked_fill(known, -math.inf)
        above = scores > limit[:, None]
        scores = scores.masked_fill(above, -math.inf)
        rows = torch.cat([candidates, best.rows], dim=1)
        scores = torch.cat([scores, best.scores], dim=1)
        # Equal scores are ordered by row, as everywhere.
        rows, order = rows.sort(dim=1)
        scores = scores.gather(1, order)
        scores, order = (each[:, :k] for each in scores.sort(dim=1, descending=True, stable=True))
        rows = rows.gather(1, order).masked_fill(scores == -math.inf, NO_ROW)
        scores, rows = self._merge(scores, rows)
        return Found(scores, rows, self.processes.sum(above.sum(1) + best.too_similar))

    def _best_written(self, queries: Tensor, k: int, exclude: Tensor | None, limit: Tensor) -> Found:
        """The best of all rows that have been written back, exactly."""
        overlay = self.overlay.to(queries.device)
        scorer = Scorer(self.corrector, queries, self.corrects_queries)
        # Treats the written rows as the corpus: excluded rows become positions among them.
        excluded = None
        if exclude is not None:
            excluded = Excluded(overlay.slots(exclude.clamp(min=0)).masked_fill(exclude < 0, NO_ROW))
        best = RunningTopK(len(queries), k, queries.device)
        too_similar = torch.zeros(len(queries), dtype=torch.int64, device=queries.device)
        for start in range(0, len(overlay), _WRITTEN_AT_ONCE):
            keys = scorer.of(overlay.vectors[start : start + _WRITTEN_AT_ONCE])
            if len(self._withdrawn):
                keys[self._are_withdrawn(overlay.rows[start : start + len(keys)])] = -math.inf
            scores = ChunkScores(keys, keys.new_empty(len(keys) // BLOCK, len(queries)))
            scores.add(len(keys))
            if excluded is not None:
                scores.mask(*excluded.between(start, start + len(keys)))
            too_similar += scores.mask_above(limit - scorer.offset)
            best.update(keys, start, scores.maxima)
        found, slots = best.best
        rows = overlay.rows[slots.clamp(min=0)].masked_fill_(slots == NO_ROW, NO_ROW) if len(overlay) else slots
        return Found(found + scorer.offset[:, None], rows, too_similar)

    def _candidates(self, queries: Tensor, count: int) -> Tensor:
        """The best rows by the source, without written-back ones: ``(B, count)``, padded with −1."""
        every = self.shortlist.every
        if every is not None and (self._copied_by is not self.corrector or self.steps - self._copied_at >= every):
            self._source = self._make_source(self._corrected_copy(queries.device), normalize=False)
            self._copied_by, self._copied_at = self.corrector, self.steps
        if every is None and self.corrects_queries and (side := self.corrector.on_query_side(queries)) is not None:
            queries = side.probes
        return self._source.candidates(queries, min(count, len(self.cache)))

    def _make_source(self, cache: EmbeddingCache, normalize: bool) -> _Scan | _Indexed:
        index = self.shortlist.index
        if index == "exact":
            return _Scan(cache, normalize, self.chunk_size, self.overlay, self._withdrawn_on_host)
        if isinstance(index, str):
            index = FaissIndex.build(cache, index, normalize=normalize, parameters=self.shortlist.parameters)
        if len(index) != len(cache) or index.normalize != normalize:
            raise InputError(
                f"{index!r} with normalize={index.normalize} is not an index of {cache!r} with normalize={normalize}."
            )
        return _Indexed(index, self.overlay, cache.first_row, self._withdrawn_on_host)

    def _corrected_copy(self, device: torch.device) -> EmbeddingCache:
        """The whole cache, corrected by the current corrector, in bfloat16."""
        size = len(self.cache) * self.cache.dim * torch.bfloat16.itemsize
        require_memory({f"corrected copy, {len(self.cache):,} × {self.cache.dim} in bfloat16": size}, device)
        rows = torch.arange(self.cache.first_row, self.cache.end, device=device)
        blocks = (self.corrector(self._stale_here(some)) for some in rows.split(_CORRECTED_AT_ONCE))
        first, corpus_size = self.cache.first_row, self.cache.corpus_size
        return EmbeddingCache.from_blocks(blocks, torch.bfloat16, first, corpus_size, rows=len(rows))

    def _measure_recall(
        self, queries: Tensor, k: int, exclude: Tensor | None, ceiling: Tensor | None, found: Found
    ) -> None:
        some = slice(0, _CHECKED_QUERIES)
        if exclude is not None and exclude.ndim == 2:
            exclude = exclude[some]
        exact = super().search(queries[some], k, exclude, ceiling=None if ceiling is None else ceiling[some])
        self.recall = overlap_at_k(found.rows[some], exact.rows).mean().item()
        if self.recall < self.shortlist.min_recall:
            logger.warning(
                "The shortlist finds %.1f %% of the %d targets that an exact search selects (measured on %d queries): "
                "raise Shortlist(size=…), the index's parameters, or correct the copy more often.",
                100 * self.recall,
                k,
                len(exact.rows),
            )


class _Scan(CorrectedSearch):
    """Candidates by an exact search of the unchanged vectors, without written-back rows."""

    def __init__(
        self, cache: EmbeddingCache, normalize: bool, chunk_size: int | None, overlay: Overlay, withdrawn: np.ndarray
    ) -> None:
        unchanged = IdentityCorrector(cache.dim, normalize=False)
        super().__init__(cache, unchanged, normalize=normalize, chunk_size=chunk_size, withdrawn=withdrawn)
        self.overlay = overlay

    def candidates(self, queries: Tensor, count: int) -> Tensor:
        return self.search(queries, count).rows

    def _score_strip(
        self, scorer: Scorer, values: Tensor, factors: Tensor | None, written: Tensor, slots: Tensor, keys: Tensor
    ) -> None:
        scorer.score(scorer.as_float(values), factors, out=keys)
        keys.index_fill_(0, written, -math.inf)

    def _of_written(self, scorer: Scorer, vectors: Tensor) -> Tensor:
        return torch.full_like(scorer.of(vectors), -math.inf)


class _Indexed:
    """Candidates from a FAISS index, without written-back rows."""

    def __init__(self, index: FaissIndex, overlay: Overlay, first_row: int, withdrawn: np.ndarray) -> None:
        self._index, self._overlay, self._first_row = index, overlay, first_row
        self._withdrawn = withdrawn[(withdrawn >= first_row) & (withdrawn < first_row + len(index))]
        self._skip_only_withdrawn()

    def _skip_only_withdrawn(self) -> None:
        self._skip = np.zeros(-(-len(self._index) // 8), dtype=np.uint8)
        self._skip_also(self._withdrawn)
        self._skipped = 0

    def _skip_also(self, rows: np.ndarray) -> None:
        rows = rows - self._first_row
        np.bitwise_or.at(self._skip, rows // 8, np.left_shift(1, rows % 8).astype(np.uint8))

    def candidates(self, queries: Tensor, count: int) -> Tensor:
        if len(self._overlay) < self._skipped:  # it has been loaded again
            self._skip_only_withdrawn()
        self._skip_also(self._overlay.rows[self._skipped :].cpu().numpy())
        self._skipped = len(self._overlay)
        found = self._index.search(queries, count, self._skip if self._skip.any() else None)
        return torch.where(found == NO_ROW, found, found + self._first_row)
