"""Scoring one chunk of rows after another for the queries of one search."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ..correctors import Corrector
from .topk import BLOCK


class Buffers:
    """Memory that successive searches reuse: new memory must be mapped page by page."""

    def __init__(self) -> None:
        self._tensors: dict[str, Tensor] = {}

    def get(self, name: str, rows: int, width: int, device: torch.device) -> Tensor:
        """Uninitialised float32 memory ``(rows, width)``, the same for each name as long as it is large enough."""
        tensor = self._tensors.get(name)
        if tensor is None or tensor.device != device or tensor.numel() < rows * width:
            tensor = self._tensors[name] = torch.empty(rows * width, device=device)
        return tensor[: rows * width].view(rows, width)

    def holds(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` is in this memory."""
        return any(tensor.data_ptr() == mine.data_ptr() for mine in self._tensors.values())


class Scorer:
    """Scores vectors for the queries of one search, in the cheapest way for its corrector.

    Without normalisation, the end of the correction is folded into the queries, if there are fewer queries than
    dimensions or if the vectors then need no correction at all; otherwise vectors are corrected. Norms divide the
    scores, which are fewer than the vectors' coordinates.

    Args:
        corrector: ``h``.
        queries: ``f(x)``, ``(B, d)``.
        corrects_queries: whether the queries are corrected instead of the vectors.
        buffers: memory for scores and converted vectors.
    """

    def __init__(
        self, corrector: Corrector, queries: Tensor, corrects_queries: bool, buffers: Buffers | None = None
    ) -> None:
        self._corrector, self._buffers = corrector, buffers or Buffers()
        self.offset = queries.new_zeros(len(queries))
        """An offset missing from each query's scores, the same for all rows, ``(B,)``."""
        side = None
        if corrects_queries or (not corrector.normalize and len(queries) < corrector.dim):
            side = corrector.on_query_side(queries)
        self._probes, self._of_features = queries.T.contiguous(), None
        self._corrects_vectors = side is None
        if side is not None:
            self._probes, self.offset = side.probes.T.contiguous(), side.offset
            self._of_features = None if side.of_features is None else side.of_features.T.contiguous()

    def as_float(self, values: Tensor) -> Tensor:
        """``values`` in float32; in a separate buffer unless they already are."""
        if values.dtype == torch.float32:
            return values
        return self._buffers.get("values", len(values), values.shape[1], values.device).copy_(values)

    def multiplied(self, values: Tensor, factors: Tensor | None) -> Tensor:
        """``values`` ``(C, d)`` with each row multiplied by its factor, in place only where that is safe."""
        if factors is None:
            return values
        return values.mul_(factors[:, None]) if self._buffers.holds(values) else values * factors[:, None]

    def gathered(self, vectors: Tensor, slots: Tensor) -> Tensor:
        """``vectors[slots]``, ``(n, d)``, in a separate buffer."""
        out = self._buffers.get("gathered", len(slots), vectors.shape[1], vectors.device)
        return torch.index_select(vectors, 0, slots, out=out)

    def replaced(self, values: Tensor, factors: Tensor | None, places: Tensor, others: Tensor) -> Tensor:
        """``values`` ``(C, d)``, of any dtype, multiplied by ``factors`` ``(C,)``, except ``others`` ``(n, d)`` at
        ``places`` ``(n,)``: in a buffer.
        """
        out = self._buffers.get("values", len(values), values.shape[1], values.device).copy_(values)
        return self.multiplied(out, factors).index_copy_(0, places, others)

    def score(self, values: Tensor, factors: Tensor | None, out: Tensor) -> None:
        """Put scores of ``values`` ``(C, d)``, multiplied by ``factors`` ``(C,)``, into ``out`` ``(C, B)``."""
        if self._corrects_vectors:
            corrected = self._corrector.unnormalized(self.multiplied(values, factors))
            torch.mm(corrected, self._probes, out=out)
            if self._corrector.normalize:
                out.div_(torch.linalg.vector_norm(corrected, dim=-1, keepdim=True).clamp_min_(1e-12))
        elif self._of_features is not None:
            values = self.multiplied(values, factors)
            torch.mm(values, self._probes, out=out)
            out.addmm_(self._corrector.features(values), self._of_features)
        else:
            torch.mm(values, self._probes, out=out)
            if factors is not None:
                out.mul_(factors[:, None])

    def room(self, rows: int, first_row: int) -> ChunkScores:
        """Room for the scores of that many rows, the same memory each time."""
        batch_size, device = len(self.offset), self.offset.device
        keys = self._buffers.get("keys", rows, batch_size, device)
        return ChunkScores(keys, self._buffers.get("maxima", rows // BLOCK, batch_size, device), first_row)

    def operands(self, values: Tensor, factors: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """The operands of :meth:`score`: vectors ``(C, d)`` of any dtype, probes ``(d, B)``, and factors ``(C,)``."""
        if self._corrects_vectors:
            corrected = self._corrector.unnormalized(self.multiplied(self.as_float(values), factors))
            norms = corrected.norm(dim=-1).clamp_min_(1e-12) if self._corrector.normalize else None
            return corrected, self._probes, None if norms is None else norms.reciprocal_()
        if self._of_features is not None:
            values = self.multiplied(self.as_float(values), factors)
            both = torch.cat([values, self._corrector.features(values)], dim=1)
            return both, torch.cat([self._probes, self._of_features]), None
        return values, self._probes, factors

    def of(self, vectors: Tensor) -> Tensor:
        """Scores of some vectors, ``(n, d)`` → ``(n, B)``."""
        scores = vectors.new_empty(len(vectors), len(self.offset))
        self.score(vectors, None, scores)
        return scores


class Excluded:
    """Rows forbidden for queries, sorted so that each chunk finds its own directly.

    Args:
        rows: ``(B, m)``, padded with −1.
    """

    def __init__(self, rows: Tensor) -> None:
        query, place = (rows >= 0).nonzero(as_tuple=True)
        row, order = rows[query, place].sort()
        self._query, self._row = query[order], row
        self._row_on_host = row.cpu().numpy()

    def between(self, first_row: int, end: int) -> tuple[Tensor, Tensor]:
        """Row offsets and queries of the pairs with rows ``first_row … end − 1``, ``(m,)`` each."""
        here = slice(*np.searchsorted(self._row_on_host, [first_row, end]))
        return self._row[here] - first_row, self._query[here]


class ChunkScores:
    """Scores of consecutive rows, and the maximum of each whole block of 64; it is filled from the start.

    Args:
        keys: room for scores, ``(C, B)``.
        maxima: room for maxima, ``(C // 64, B)``.
        first_row: the first row's number.
    """

    def __init__(self, keys: Tensor, maxima: Tensor, first_row: int = 0) -> None:
        self.first_row = first_row
        self._keys, self._maxima, self._rows = keys, maxima, 0
        self._blocks = keys[: len(maxima) * BLOCK].view(-1, BLOCK, keys.shape[1])

    def __len__(self) -> int:
        return self._rows

    @property
    def keys(self) -> Tensor:
        """The scores so far, ``(len(self), B)``."""
        return self._keys[: self._rows]

    @property
    def maxima(self) -> Tensor:
        """The largest of each whole block, ``(len(self) // 64, B)``."""
        return self._maxima[: self._rows // BLOCK]

    def room(self, rows: int) -> Tensor:
        """Memory for the scores of the next rows, ``(rows, B)``."""
        return self._keys[self._rows : self._rows + rows]

    def add(self, rows: int) -> None:
        """Add the next rows, whose scores are in place, and find their maxima while the scores are still in cache."""
        before, self._rows = self._rows, self._rows + rows
        blocks = slice(before // BLOCK, self._rows // BLOCK)
        torch.amax(self._blocks[blocks], 1, out=self._maxima[blocks])

    def mask(self, rows: Tensor, queries: Tensor) -> None:
        """Set the scores of some rows ``(m,)`` for some queries ``(m,)`` to −∞."""
        self.keys[rows, queries] = -math.inf
        block = rows // BLOCK
        whole = block < len(self.maxima)
        block, query = block[whole], queries[whole]
        self.maxima[block, query] = self._blocks[block, :, query].amax(1)

    def mask_above(self, limit: Tensor) -> Tensor:
        """Set scores above their query's ``limit`` ``(B,)`` to −∞; returns their number, ``(B,)``."""
        counts = torch.zeros(self.keys.shape[1], dtype=torch.int64, device=self.keys.device)
        block, query = (self.maxima > limit).nonzero(as_tuple=True)
        if len(block):
            inside = self._blocks[block, :, query]
            above = inside > limit[query, None]
            self._blocks[block, :, query] = inside = inside.masked_fill(above, -math.inf)
            self.maxima[block, query] = inside.amax(1)
            counts.index_add_(0, query, above.sum(1))
        rest = self.keys[len(self.maxima) * BLOCK :]
        above = rest > limit
        rest.masked_fill_(above, -math.inf)
        return counts.add_(above.sum(0))
