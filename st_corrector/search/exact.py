"""Exact search of the corrected corpus: correct, score, select, in one pass over the cache in chunks.

It never holds anything of size ``N × B``, nor a corrected copy of the cache: each chunk of ``C`` rows takes ``C·d`` for
its corrected embeddings and ``B·C`` for their scores.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..cache.embedding_cache import EmbeddingCache
from ..cache.shard import Shard
from ..cache.streaming import on_device
from ..correctors import Corrector, PullBack
from ..errors import CacheError, InputError
from ..runtime.distributed import Processes
from ..runtime.precision import in_float32
from .gumbel import gumbel_noise
from .kernels import BlockScores, usable
from .overlay import Overlay
from .scoring import Buffers, ChunkScores, Excluded, Scorer
from .topk import BLOCK, NO_ROW, RunningTopK

Sampler = Literal["top_k", "gumbel", "uniform"]
_UNIT = 1e-6  # rounding error of the norm of a float32 unit vector
_SCORES = {"cpu": 1 << 23, "cuda": 1 << 25}
"""Default number of scores held at once: each round costs about thirty small operations."""
_MAXIMA = 1 << 23
"""Default number of block maxima held at once: the kernel scores rows faster than small operations are launched, so its
chunks are larger."""
_STRIP = 2_048
"""Rows that a CPU scores at once (it corrects half as many); a multiple of :class:`RunningTopK`'s blocks."""
_VECTORS = 1 << 30
"""Bytes of vectors that a GPU converts and corrects at once, at most."""
_LIBRARIES = 8 << 20  # where the matrix library packs its operands


class Found(NamedTuple):
    """The result of :meth:`CorrectedSearch.search`.

    Args:
        scores: ``s = ⟨f(x), h(g'(y))⟩``, ``(B, k)``, best first (by noisy logit when sampling); −∞ if fewer than ``k``
            rows are available.
        rows: corpus rows, ``(B, k)``; −1 where the score is −∞. Equal scores are ordered by row.
        too_similar: number of rows per query excluded for a score above its ceiling, ``(B,)``.
    """

    scores: Tensor
    rows: Tensor
    too_similar: Tensor


class CorrectedSearch:
    """Searches the corrected corpus ``h(𝓑)`` for the targets that score highest with each query.

    Each pass costs little more than its matrix products. These depend on the corrector: if it is affine and does not
    normalise, the queries are transformed and the stale vectors are scored unchanged (:attr:`corrects_queries`).

    Args:
        cache: the stale buffer 𝓑, ``(N, d)``.
        corrector: ``h``; it is read at every search, so training it needs no rebuild.
        normalize: bring stale vectors to unit length before they are corrected (cosine similarity).
        chunk_size: rows corrected and scored at once; the default suits the device.
        processes: the processes that search together, each one part of the cache. All must call every method in step
            with the same arguments. All get the same result: that of one process with the whole cache.
        withdrawn: corpus rows that no query finds, of any part of the cache.

    Raises:
        InputError: the corrector is for another dimension.
    """

    def __init__(
        self,
        cache: EmbeddingCache,
        corrector: Corrector,
        *,
        normalize: bool = True,
        chunk_size: int | None = None,
        processes: Processes | None = None,
        withdrawn: Sequence[int] | np.ndarray = (),
    ) -> None:
        if corrector.dim != cache.dim:
            raise InputError(f"The corrector is for dimension {corrector.dim}, the cache has {cache.dim}.")
        if chunk_size is not None and chunk_size < 1:
            raise InputError(f"chunk_size must be at least 1, got {chunk_size}.")
        self.cache, self.corrector = cache, corrector
        self.normalize, self.chunk_size = normalize, chunk_size
        self.processes = processes or Processes()
        self.overlay = Overlay(len(cache), cache.dim, cache.first_row)
        """Rows written back; they are searched instead of the cache's. See :meth:`write_back`."""
        self._withdrawn_on_host = np.unique(np.asarray(withdrawn, dtype=np.int64))
        self._withdrawn = torch.from_numpy(self._withdrawn_on_host)
        # Each row's factor to unit length, computed in the first whole pass; None if it is 1, as in most caches.
        self._factors: Tensor | None = None
        self._passed = False
        self._buffers = Buffers()
        self.use_kernel = True
        """Whether the Triton kernel may compute scores, where it runs (:func:`.kernels.usable`)."""
        self.steps = 0
        """Steps of the loss since the cache was built: the age of its embeddings."""

    @contextmanager
    def choosing_by(self, corrector: Corrector) -> Iterator[CorrectedSearch]:
        """This search with another corrector during the block; both share memory and facts about the cache."""
        own, self.corrector = self.corrector, corrector
        try:
            yield self
        finally:
            self.corrector = own

    @property
    def corrects_queries(self) -> bool:
        """Whether corrected queries score the unchanged stale vectors, without correcting the corpus."""
        return self.corrector.leaves_corpus(unit=self.normalize and self.overlay.unit)

    def memory(self, batch_size: int, k: int, device: torch.device | str, rows_written: int = 0) -> dict[str, int]:
        """Bytes that a search takes in addition to the cache, by purpose; none of it grows with ``N × B``.

        Args:
            batch_size: number of queries ``B``.
            k: how many targets a query gets.
            device: where the queries are.
            rows_written: how many rows will be written back.
        """
        device = torch.device(device)
        rows, dim = min(len(self.cache), self._chunk_size(batch_size, device)), self.cache.dim
        strip = min(rows, _STRIP) if device.type == "cpu" else rows
        staged = rows * dim * self.cache.dtype.itemsize * 3 if device != self.cache.device else 0
        return {
            # Scores, and copies if some are masked; vectors in float32, and their corrections.
            f"scores of {rows:,} rows": staged + 12 * rows * batch_size,
            f"strips of {strip:,} rows": 4 * strip * (2 * dim + self.corrector.working_width) + _LIBRARIES,
            "norms": 4 * len(self.cache) if self.normalize else 0,
            f"top {k} of {batch_size} queries": 2 * rows * batch_size + 32 * 8 * batch_size * k,
            **self.overlay.memory(rows_written),
        }

    def _chunk_size(self, batch_size: int, device: torch.device) -> int:
        if self.chunk_size is not None:
            return self.chunk_size
        strips = min(128, _SCORES.get(device.type, _SCORES["cpu"]) // max(1, batch_size) // _STRIP)
        if device.type != "cpu":  # which goes through them strip by strip
            strips = min(strips, _VECTORS // (4 * (2 * self.cache.dim + self.corrector.working_width)) // _STRIP)
        return _STRIP * max(1, strips)

    def _keeps_only_maxima(self, device: torch.device) -> bool:
        """Whether a search by the kernel neither copies nor converts nor corrects the cache's vectors."""
        return self.corrects_queries and self._passed and self.cache.device == device

    def cached(self, rows: Tensor) -> Tensor:
        """The cache's vectors of ``rows``, ignoring write-back: float32, ``(n, d)``, on their device."""
        return self._of_all(rows, self._cached_here)

    def stale(self, rows: Tensor) -> Tensor:
        """The corrector's input for ``rows``: float32, ``(n, d)``, on the device of ``rows``."""
        return self._of_all(rows, self._stale_here)

    def _cached_here(self, rows: Tensor) -> Tensor:
        cached = self.cache[rows].to(rows.device)
        return F.normalize(cached, dim=-1) if self.normalize else cached

    def _stale_here(self, rows: Tensor) -> Tensor:
        return self.overlay.replace(self._cached_here(rows), rows)

    def _of_all(self, rows: Tensor, of_mine: Callable[[Tensor], Tensor]) -> Tensor:
        """Vectors of ``rows``, each from the process that holds it."""
        if self.processes.size == 1:
            return of_mine(rows)
        mine = self.overlay.holds(rows)
        vectors = torch.zeros(len(rows), self.cache.dim, device=rows.device)
        vectors[mine] = of_mine(rows[mine])
        return self.processes.sum(vectors)

    def seen(self, rows: Tensor) -> Tensor:
        """Which of ``rows`` ``(n,)`` have been written back: ``(n,)``, bool."""
        return self.processes.sum(self.overlay.has(rows).int()).bool()

    def age(self, rows: Tensor) -> tuple[float, float]:
        """The share of ``rows`` that has been written back, and the mean age of all their vectors, in steps."""
        here = rows[self.overlay.has(rows)]
        totals = torch.stack([torch.tensor(len(here), device=rows.device), self.overlay.written_at(here).sum()])
        seen, written_at = self.processes.sum(totals).tolist()
        count = max(1, len(rows))
        return seen / count, self.steps - written_at / count

    def write_back(self, rows: Tensor, fresh: Tensor) -> PullBack:
        """Write fresh embeddings of ``rows`` back into the stale frame, where later correctors move them on.

        Args:
            rows: distinct corpus rows, ``(n,)``.
            fresh: ``g(y)``, ``(n, d)``.
        """
        pulled = self.corrector.pull_back(fresh)
        self.overlay.write(rows, pulled.stale, self.steps)
        return pulled

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
        """The ``k`` targets of each query, by ``s = ⟨f(x), h(g'(y))⟩`` over all rows.

        Args:
            queries: ``f(x)``, ``(B, d)``; the search runs on their device.
            k: how many targets a query gets.
            exclude: rows forbidden for each query, ``(B, m)``, or for all, ``(m,)``, padded with −1.
            sampler: ``"top_k"`` takes the largest scores; ``"gumbel"`` draws without replacement from
                ``P_h(y|x) ∝ exp(β s)``, Eq. 4 of `Monath et al. 2024 <https://arxiv.org/abs/2409.01890>`_, by
                adding Gumbel noise to ``β s`` and taking the largest; ``"uniform"`` ignores scores.
            scale: the inverse temperature β; only sampling depends on it.
            seed: of the random samplers, which require it. The same seed gives the same draw.
            ceiling: each query's highest allowed score ``s``, ``(B,)``.

        Raises:
            InputError: the shapes do not fit, ``k < 1``, an unknown sampler, a random one without seed, or scores that
                are not numbers.
            CacheError: an embedding of the cache is not finite.
        """
        queries = self._check(queries, k, sampler, seed)
        seed = None if sampler == "top_k" else seed
        device, batch_size = queries.device, len(queries)
        self.corrector.to(device)
        scorer = Scorer(self.corrector, queries, self.corrects_queries, self._buffers)
        excluded = None if exclude is None else Excluded(exclude.to(device).expand(batch_size, -1))
        limit = None if ceiling is None or (ceiling == math.inf).all() else ceiling - scorer.offset
        best = RunningTopK(batch_size, k, device)  # by score, or where it is sampled by noisy logit
        too_similar = torch.zeros(batch_size, dtype=torch.int64, device=device)
        # To find only the largest, scores need not be stored.
        fused = self.use_kernel and sampler == "top_k" and limit is None and usable(device)
        # Noise takes more memory than scores do.
        chunk_size = self._chunk_size(batch_size, device)
        if seed is not None:
            chunk_size = max(1, chunk_size // 8)
        elif fused and self.chunk_size is None and self._keeps_only_maxima(device):
            chunk_size = max(chunk_size, _MAXIMA * BLOCK // max(batch_size, BLOCK))
        chunks = on_device(self.cache.chunks(chunk_size), device)
        if fused:
            for first_row, chunk in chunks:
                self._update_fused(best, scorer, first_row, chunk, excluded)
        for scores in () if fused else self._scored(scorer, chunks, chunk_size):
            first_row, keys = scores.first_row, scores.keys
            if excluded is not None:
                scores.mask(*excluded.between(first_row, first_row + len(keys)))
            if limit is not None:
                too_similar += scores.mask_above(limit)
            if seed is None:
                best.update(keys, first_row, scores.maxima)
            else:
                allowed = keys > -math.inf
                logits = keys.mul_(scale) if sampler == "gumbel" else keys.zero_()
                logits += gumbel_noise(batch_size, first_row, len(keys), seed, device).T
                best.update(logits.masked_fill_(~allowed, -math.inf), first_row)
        self._finish_pass()
        too_similar = self.processes.sum(too_similar)
        found, rows = best.best
        if seed is None:
            found, rows = self._merge(found, rows)
            return Found(found + scorer.offset[:, None], rows, too_similar)
        _, rows, found = self._merge(found, rows, self.score(queries, rows))
        return Found(found, rows, too_similar)

    def _merge(self, keys: Tensor, rows: Tensor, *beside: Tensor) -> tuple[Tensor, ...]:
        """The ``k`` largest keys of all processes' results, ``(B, k)`` each, equal ones by row; with their rows and
        other values.
        """
        (batch_size, k), size = keys.shape, self.processes.size
        if size == 1 or k == 0:
            return keys, rows, *beside
        keys, rows, *others = (
            self.processes.gather(each).view(size, batch_size, k).transpose(0, 1).flatten(1)
            for each in (keys, rows, *beside)
        )
        rows, by_row = rows.sort(dim=1)
        order = keys.gather(1, by_row).sort(dim=1, descending=True, stable=True).indices[:, :k]
        return (
            keys.gather(1, by_row.gather(1, order)),
            rows.gather(1, order),
            *(each.gather(1, by_row.gather(1, order)) for each in others),
        )

    @torch.no_grad()
    @in_float32
    def score(self, queries: Tensor, rows: Tensor) -> Tensor:
        """Corrected scores of given ``rows`` ``(B, k)``, which this process holds: ``(B, k)``, −∞ for row −1."""
        here = rows.clamp(min=self.cache.first_row).flatten()
        corrected = self.corrector(self._stale_here(here)).view(*rows.shape, -1)
        return (corrected @ queries[:, :, None]).squeeze(-1).masked_fill(rows == NO_ROW, -math.inf)

    def _check(self, queries: Tensor, k: int, sampler: Sampler, seed: int | None) -> Tensor:
        """The queries in the form that the search needs."""
        if queries.ndim != 2 or queries.shape[1] != self.cache.dim:
            raise InputError(f"Expected queries of shape (B, {self.cache.dim}), got {tuple(queries.shape)}.")
        if k < 1:
            raise InputError(f"k must be at least 1, got {k}.")
        if sampler not in get_args(Sampler):
            raise InputError(f"sampler {sampler!r} is not one of {', '.join(get_args(Sampler))}.")
        if sampler != "top_k" and seed is None:
            raise InputError(f"sampler={sampler!r} needs a seed: an integer, different for each draw.")
        if not torch.isfinite(queries).all():
            bad = (~torch.isfinite(queries).all(1)).nonzero().flatten()
            raise InputError(f"Queries {bad[:5].tolist()} of {len(queries)} hold NaN or infinite numbers.")
        return queries.detach().float()

    def _scored(self, scorer: Scorer, chunks: Iterable[tuple[int, Shard]], chunk_size: int) -> Iterator[ChunkScores]:
        """The scores of all chunks, joined to ``chunk_size`` rows: each use of scores has a fixed cost, and shards are
        small. The caller may overwrite them.
        """
        scores: ChunkScores | None = None
        for first_row, chunk in chunks:
            if scores is not None and len(scores) + len(chunk.values) > chunk_size:
                yield scores
                scores = None
            if scores is None:
                scores = scorer.room(min(chunk_size, self.cache.end - first_row), first_row)
            self._score_chunk(scorer, first_row, chunk, scores)
        if scores is not None:
            yield scores

    def _score_chunk(self, scorer: Scorer, first_row: int, chunk: Shard, scores: ChunkScores) -> None:
        """Add the scores of a chunk's rows to ``scores``; written-back rows use their written vectors.

        It works in strips that stay in the CPU's caches, from vectors to maxima of scores.
        """
        size = strip = chunk.values.shape[0]
        if chunk.values.device.type == "cpu":
            strip = _STRIP if self.corrects_queries else _STRIP // 2
        starts = range(0, size, strip)
        written, slots = self.overlay.between(first_row, first_row + size, chunk.values.device)
        # Which written rows are in which strip.
        bounds = torch.arange(0, size + strip, strip, device=written.device)
        places = torch.searchsorted(written, bounds).tolist() if written.shape[0] else [0] * (len(starts) + 1)
        withdrawn = self._withdrawn_between(first_row, first_row + size) if len(self._withdrawn) else None
        factors = self._factors_of(chunk, first_row) if self._passed else None
        for start, first, last in zip(starts, places, places[1:], strict=False):
            end = min(start + strip, size)
            here, keys = slice(start, end), scores.room(end - start)
            values = chunk.values[here]
            if self._passed:
                of_strip = None if factors is None else factors[here]
            else:
                of_strip = self._find_factors(scorer.as_float(values), chunk.at(here), first_row + start)
            self._score_strip(scorer, values, of_strip, written[first:last] - start, slots[first:last], keys)
            if withdrawn is not None:
                here_gone = withdrawn[(withdrawn >= start) & (withdrawn < end)] - start
                keys.index_fill_(0, here_gone, -math.inf)
            scores.add(end - start)

    def _score_strip(
        self, scorer: Scorer, values: Tensor, factors: Tensor | None, written: Tensor, slots: Tensor, keys: Tensor
    ) -> None:
        """Write scores of the stored ``values`` ``(C, d)`` into ``keys`` ``(C, B)``; rows at ``written`` ``(n,)`` use
        the overlay's vectors at ``slots`` ``(n,)`` instead.
        """
        count, vectors = len(written), self.overlay.vectors
        if count == len(values):
            scorer.score(scorer.gathered(vectors, slots), None, out=keys)
        elif count > len(values) // 8:
            # Inserting it is cheaper than scoring the rows that it replaces.
            others = scorer.gathered(vectors, slots)
            scorer.score(scorer.replaced(values, factors, written, others), None, out=keys)
        else:
            scorer.score(scorer.as_float(values), factors, out=keys)
            if count:
                keys.index_copy_(0, written, scorer.of(scorer.gathered(vectors, slots)))

    def _of_written(self, scorer: Scorer, vectors: Tensor) -> Tensor:
        """Scores of written-back vectors, ``(n, d)`` → ``(n, B)``."""
        return scorer.of(vectors)

    def _update_fused(
        self, best: RunningTopK, scorer: Scorer, first_row: int, chunk: Shard, excluded: Excluded | None
    ) -> None:
        """Add a chunk to ``best``; only the scores that it looks at are stored."""
        end = first_row + len(chunk.values)
        factors = self._factors_of(chunk, first_row)
        written, slots = self.overlay.between(first_row, end, chunk.values.device)
        left_out = torch.zeros(len(chunk.values), dtype=torch.bool, device=written.device)
        if len(self._withdrawn):
            left_out[self._withdrawn_between(first_row, end)] = True
            # Those that were written back before they were withdrawn are not looked at either.
            kept = ~left_out[written]
            written, slots = written[kept], slots[kept]
        left_out[written] = True
        pairs = None if excluded is None else excluded.between(first_row, end)
        scores = BlockScores(*scorer.operands(chunk.values, factors), left_out, pairs)
        best.update_blocks(scores.maxima, scores.of, first_row)
        at_once = self._chunk_size(len(scorer.offset), written.device)
        for start in range(0, len(written), at_once):
            places = written[start : start + at_once]
            keys = self._of_written(scorer, self.overlay.vectors[slots[start : start + at_once]])
            if pairs is not None:
                slot = torch.full_like(left_out, -1, dtype=torch.int64)
                slot[places] = torch.arange(len(places), device=places.device)
                place, query = slot[pairs[0]], pairs[1]
                keys[place[place >= 0], query[place >= 0]] = -math.inf
            best.take(keys, places + first_row)

    def _withdrawn_between(self, first_row: int, end: int) -> Tensor:
        """Offsets of the withdrawn rows among ``first_row … end − 1``, ``(n,)``."""
        here = slice(*np.searchsorted(self._withdrawn_on_host, [first_row, end]))
        return self._withdrawn[here].to(self.overlay.rows.device) - first_row

    def _are_withdrawn(self, rows: Tensor) -> Tensor:
        """Which of ``rows`` ``(n,)`` have been withdrawn: ``(n,)``, bool."""
        withdrawn = self._withdrawn = self._withdrawn.to(rows.device)
        place = torch.searchsorted(withdrawn, rows).clamp(max=max(0, len(withdrawn) - 1))
        return withdrawn[place] == rows if len(withdrawn) else torch.zeros_like(rows, dtype=torch.bool)

    def _factors_of(self, chunk: Shard, first_row: int) -> Tensor | None:
        """Factors of a chunk's rows before correction, ``(C,)``; None for 1."""
        if not self._passed:
            return self._find_factors(chunk.values, chunk, first_row)
        if not self.normalize:
            return chunk.scales
        if self._factors is None:
            return None
        self._factors = self._factors.to(chunk.values.device)
        return self._factors[self._place(first_row, chunk.values)]

    def _find_factors(self, values: Tensor, chunk: Shard, first_row: int) -> Tensor | None:
        """The same in the first pass, which computes them and checks that all is finite."""
        norms: Tensor = values.float().norm(dim=-1)
        if not torch.isfinite(norms).all() and len(bad := chunk.not_finite()):
            rows = (bad[:5] + first_row).tolist()
            raise CacheError(
                f"The cache's embeddings of {len(bad)} rows, e.g. {rows}, are NaN or infinite: the cache is damaged. "
                "Build it again."
            )
        if not self.normalize:
            return chunk.scales
        if self._factors is None:
            self._factors = torch.ones(len(self.cache), device=values.device)
        here = self._place(first_row, values)
        factors = norms.clamp_min_(1e-12).reciprocal_()
        if self.cache.dtype == torch.float32:
            # Rounding alone does not call for a factor; and the first pass (also after a resume) must equal the others.
            factors.masked_fill_((factors - 1).abs() < _UNIT, 1.0)
        self._factors[here] = factors
        return factors

    def _place(self, first_row: int, values: Tensor) -> slice:
        """Positions of some rows among those that the cache holds."""
        start = first_row - self.cache.first_row
        return slice(start, start + len(values))

    def _finish_pass(self) -> None:
        if self._factors is not None and (self._factors == 1).all():
            self._factors = None
        self._passed = True
