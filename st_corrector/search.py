"""Exact search of the corrected corpus: correct, score, select, in one pass over the cache in chunks.

Nothing of size ``N × B`` is ever held, and no corrected copy of the cache: for each chunk of ``C`` rows
the memory is ``C·d`` for its corrected embeddings and ``B·C`` for their scores.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .cache import EmbeddingCache
from .correctors import AffineCorrector, Corrector, PullBack
from .errors import InputError
from .overlay import Overlay

Sampler = Literal["top_k", "gumbel", "mixed", "uniform"]
SAMPLERS: tuple[Sampler, ...] = ("top_k", "gumbel", "mixed", "uniform")
NO_ROW = -1
_UNIT = 1e-6  # how far from 1 rounding takes the norm of a float32 unit vector


class Found(NamedTuple):
    """What :meth:`CorrectedSearch.search` found.

    Args:
        scores: ``s = ⟨f(x), h(g'(y))⟩``, ``(B, k)``, best first (by noisy logit when sampling); −∞ where there are
            fewer than ``k`` rows to be had.
        rows: corpus rows, ``(B, k)``; −1 where the score is −∞. Equal scores are ordered by row.
        too_similar: how many rows of each query were left out because they score above its ceiling, ``(B,)``.
    """

    scores: Tensor
    rows: Tensor
    too_similar: Tensor


class RunningTopK:
    """The ``k`` largest scores of each query over blocks of rows that come one after another.

    Exact, and independent of how the rows are cut into blocks: equal scores are ordered by row, the
    smaller first, also where only some of them fit.

    Args:
        batch_size: number of queries ``B``.
        k: how many to keep.
    """

    def __init__(self, batch_size: int, k: int, device: torch.device | str = "cpu") -> None:
        self.k = k
        self.scores = torch.full((batch_size, k), -math.inf, device=device)
        self.rows = torch.full((batch_size, k), NO_ROW, dtype=torch.int64, device=device)

    def update(self, scores: Tensor, first_row: int) -> None:
        """Take in ``scores`` ``(B, C)`` of the rows ``first_row … first_row + C − 1``; −∞ is never selected."""
        top, columns = _top_k(scores, min(self.k, scores.shape[1]))
        rows = (columns + first_row).masked_fill_(top == -math.inf, NO_ROW)
        # Earlier rows come first, so that a stable sort leaves equal scores in the order of their rows.
        merged_scores, merged_rows = torch.cat([self.scores, top], dim=1), torch.cat([self.rows, rows], dim=1)
        order = merged_scores.sort(dim=1, descending=True, stable=True).indices[:, : self.k]
        self.scores, self.rows = merged_scores.gather(1, order), merged_rows.gather(1, order)


def _top_k(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row and their columns, ordered by score and, among equal ones, by column."""
    width = scores.shape[1]
    # One more than asked for shows whether equal scores straddle the edge, where topk takes any of them.
    top, columns = scores.topk(min(k + 1, width), dim=1)
    columns, order = columns.sort(dim=1)
    top = top.gather(1, order)
    order = top.sort(dim=1, descending=True, stable=True).indices
    top, columns = top.gather(1, order), columns.gather(1, order)
    if width > k:
        tied = (top[:, k] == top[:, k - 1]) & (top[:, k] > -math.inf)
        top, columns = top[:, :k].contiguous(), columns[:, :k].contiguous()
        if tied.any():
            exact = scores[tied].sort(dim=1, descending=True, stable=True)
            top[tied], columns[tied] = exact.values[:, :k], exact.indices[:, :k]
    return top, columns


def gumbel_noise(queries: int, first_row: int, rows: int, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """Independent standard Gumbel noise for queries ``0 … queries − 1`` and rows ``first_row …``, ``(queries, rows)``.

    Each number is a function of (seed, query, row) alone (the SplitMix64 hash of a counter), so that a draw
    does not depend on chunk sizes or on the device.
    """
    row = torch.arange(first_row, first_row + rows, dtype=torch.int64, device=device)
    query = torch.arange(queries, dtype=torch.int64, device=device)
    key = _splitmix64(_splitmix64(torch.tensor(_to_int64(seed), device=device)) + query)
    bits = _splitmix64(key[:, None] + row[None, :] * _to_int64(0x9E3779B97F4A7C15))
    # 53 bits, towards 0 in full relative precision: Gumbel's upper tail, which decides the selection, is there.
    uniform = (_shift_right(bits, 11).float() + 0.5) * 2.0**-53
    return -torch.log(-torch.log1p(-uniform.clamp_(max=1 - 2.0**-24)))


def _splitmix64(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele et al. 2014), on int64 with wrap-around."""
    x = (x ^ _shift_right(x, 30)) * _to_int64(0xBF58476D1CE4E5B9)
    x = (x ^ _shift_right(x, 27)) * _to_int64(0x94D049BB133111EB)
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's ``>>`` on int64 copies the sign bit."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _to_int64(value: int) -> int:
    """``value`` modulo 2⁶⁴ as a signed 64-bit integer."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >= 1 << 63 else value


class CorrectedSearch:
    """Searches the corrected corpus ``h(𝓑)`` for the targets that score highest with each query.

    Args:
        cache: the stale buffer 𝓑, ``(N, d)``.
        corrector: ``h``; it is read at every search, so that training it needs no rebuild of anything.
        normalize: bring stale vectors to unit length before they are corrected (cosine similarity).
        chunk_size: rows that are corrected and scored at once.

    Raises:
        InputError: the corrector is for another dimension.
    """

    def __init__(
        self, cache: EmbeddingCache, corrector: Corrector, *, normalize: bool = True, chunk_size: int = 16_384
    ) -> None:
        if corrector.dim != cache.dim:
            raise InputError(f"The corrector is for dimension {corrector.dim}, the cache has {cache.dim}.")
        if chunk_size < 1:
            raise InputError(f"chunk_size must be at least 1, got {chunk_size}.")
        self.cache, self.corrector = cache, corrector
        self.normalize, self.chunk_size = normalize, chunk_size
        self.overlay = Overlay(len(cache), cache.dim)
        """Rows written back; they are searched instead of the cache's. See :meth:`write_back`."""
        # Most caches hold unit vectors already; the first whole pass finds out, and later ones need not normalise.
        self._cache_is_unit = False
        self.steps = 0
        """Steps of the loss since the cache was built, as far as this search has seen them."""

    @property
    def query_side(self) -> AffineCorrector | None:
        """The corrector if the queries can be corrected instead of the corpus: affine, and not normalising."""
        corrector = self.corrector
        return corrector if isinstance(corrector, AffineCorrector) and not corrector.normalize else None

    def cached(self, rows: Tensor) -> Tensor:
        """What the cache has of ``rows``, whatever was written over it: float32, ``(n, d)``, on their device."""
        return self._comparable(self.cache[rows].to(rows.device))

    def stale(self, rows: Tensor) -> Tensor:
        """What the corrector sees of ``rows``: float32, ``(n, d)``, on the device of ``rows``."""
        return self.overlay.replace(self.cached(rows), rows)

    def age(self, rows: Tensor) -> tuple[float, float]:
        """Which share of ``rows`` has been written back, and how many steps old the vectors of all are on average."""
        seen = self.overlay.has(rows)
        written_at = self.overlay.written_at(rows[seen]).double().sum().item()
        count = max(1, len(rows))
        return seen.sum().item() / count, self.steps - written_at / count

    def _comparable(self, stale: Tensor) -> Tensor:
        return F.normalize(stale, dim=-1) if self.normalize else stale

    def write_back(self, rows: Tensor, fresh: Tensor) -> PullBack:
        """Let what the encoder has just said of ``rows`` stand in the stale frame, where later correctors move it on.

        Args:
            rows: distinct corpus rows, ``(n,)``.
            fresh: ``g(y)``, ``(n, d)``.
        """
        pulled = self.corrector.pull_back(fresh)
        self.overlay.write(rows, pulled.stale, self.steps)
        return pulled

    @torch.no_grad()
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
            exclude: rows that each query must not get, ``(B, m)`` or ``(m,)`` for all, padded with −1.
            sampler: ``"top_k"`` takes the largest scores; ``"gumbel"`` draws without replacement from
                ``P_h(y|x) ∝ exp(β s)``, Eq. 4 of `Monath et al. 2024 <https://arxiv.org/abs/2409.01890>`_, by
                adding Gumbel noise to ``β s`` and taking the largest; ``"mixed"`` takes the ``⌈k/2⌉`` largest and
                draws the others from what is left of ``P_h``; ``"uniform"`` draws without regard to scores.
            scale: the inverse temperature β; only sampling depends on it.
            seed: of the random samplers' noise; required for them. The same seed gives the same draw.
            ceiling: each query's highest allowed score ``s``, ``(B,)``.

        Raises:
            InputError: the shapes do not fit, ``k < 1``, an unknown sampler, or a random one without seed.
        """
        if queries.ndim != 2 or queries.shape[1] != self.cache.dim:
            raise InputError(f"Expected queries of shape (B, {self.cache.dim}), got {tuple(queries.shape)}.")
        if k < 1:
            raise InputError(f"k must be at least 1, got {k}.")
        if sampler not in SAMPLERS:
            raise InputError(f"sampler {sampler!r} is not one of {', '.join(SAMPLERS)}.")
        if sampler != "top_k" and seed is None:
            raise InputError(f"sampler={sampler!r} needs a seed: an integer, another one for each draw.")
        queries = queries.detach().float()
        device, batch_size = queries.device, len(queries)
        if exclude is not None:
            exclude = exclude.to(device).expand(batch_size, -1)
        self.corrector.to(device)

        affine = self.query_side
        probes, offset = affine.on_query_side(queries) if affine else (queries, queries.new_zeros(batch_size))
        drawn = {"top_k": 0, "gumbel": k, "mixed": k // 2, "uniform": k}[sampler]
        # Of a mixed selection at most k − drawn are taken as the largest: k drawn leave enough that are others.
        largest, sampled = RunningTopK(batch_size, k - drawn, device), RunningTopK(batch_size, k, device)
        too_similar = torch.zeros(batch_size, dtype=torch.int64, device=device)
        all_unit = self.normalize and self.cache.dtype == torch.float32
        for first_row, block in self.cache.chunks(self.chunk_size):
            block = block.to(device).float()
            if self.normalize and not self._cache_is_unit:
                norms = block.norm(dim=-1, keepdim=True)
                all_unit = all_unit and bool((norms - 1).abs().max() < _UNIT)
                block = block / norms.clamp_min(1e-12)
            # Written rows are in the corrector's frame already: their length says something, and they keep it.
            vectors = self.overlay.replace(block, slice(first_row, first_row + len(block)))
            keys = probes @ vectors.T if affine else self.corrector.scores(probes, vectors)
            if exclude is not None:
                _mask_rows(keys, exclude, first_row)
            if ceiling is not None:
                above = keys > (ceiling - offset)[:, None]
                too_similar += above.sum(1)
                keys = keys.masked_fill_(above, -math.inf)
            if drawn < k:
                largest.update(keys, first_row)
            if drawn and seed is not None:
                allowed = keys > -math.inf
                logits = keys.mul_(scale) if sampler != "uniform" else keys.zero_()
                logits += gumbel_noise(batch_size, first_row, len(block), seed, device)
                sampled.update(logits.masked_fill_(~allowed, -math.inf), first_row)
        self._cache_is_unit = all_unit
        if not drawn:
            return Found(largest.scores + offset[:, None], largest.rows, too_similar)
        rows = _first_others(largest.rows, sampled.rows, drawn)
        return Found(self.score(queries, rows), rows, too_similar)

    @torch.no_grad()
    def score(self, queries: Tensor, rows: Tensor) -> Tensor:
        """Corrected scores of given ``rows`` ``(B, k)``: ``(B, k)``, −∞ for row −1."""
        corrected = self.corrector(self.stale(rows.clamp(min=0).flatten())).view(*rows.shape, -1)
        return (corrected @ queries[:, :, None]).squeeze(-1).masked_fill(rows == NO_ROW, -math.inf)


def _first_others(rows: Tensor, others: Tensor, count: int) -> Tensor:
    """``rows`` ``(B, n)``, then the first ``count`` of ``others`` ``(B, k)`` that are not among them, then −1."""
    if rows.shape[1] == 0:
        return others[:, :count]
    new = (others != NO_ROW) & (others[:, :, None] != rows[:, None, :]).all(-1)
    order = (~new).to(torch.uint8).argsort(dim=1, stable=True)[:, :count]
    return torch.cat([rows, others.gather(1, order).masked_fill(~new.gather(1, order), NO_ROW)], dim=1)


def _mask_rows(scores: Tensor, exclude: Tensor, first_row: int) -> None:
    """Set the scores ``(B, C)`` of each query's excluded rows to −∞, in place."""
    column = exclude - first_row
    inside = (exclude >= 0) & (column >= 0) & (column < scores.shape[1])
    query, position = inside.nonzero(as_tuple=True)
    scores[query, column[query, position]] = -math.inf
