"""A Triton kernel that scores rows and keeps only the maximum of each block of them."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from .errors import InputError
from .topk import BLOCK

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU build of torch has none, and needs none
    triton = None

_TILE_ROWS, _TILE_QUERIES, _TILE_DIM = 128, 64, 64
_LOOKED_AT = 1 << 25  # numbers of the cache that are gathered at once


@functools.cache
def usable(device: torch.device) -> bool:
    """Whether :func:`block_maxima` runs on ``device``: a CUDA GPU with tensor cores, or Triton's interpreter."""
    if triton is None:
        return False
    return triton.knobs.runtime.interpret or (
        device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    )


class BlockScores:
    """The scores of a chunk of rows, of which only the maximum of each block is computed until more is asked for.

    Args:
        values: ``(C, d)``, as stored.
        probes: ``(d, B)``.
        factors: what each row is multiplied with, ``(C,)``, or None for 1.
        left_out: rows that count as −∞ for every query, bool ``(C,)``.
        excluded: rows and queries of the pairs that count as −∞, ``(m,)`` each.
    """

    def __init__(
        self,
        values: Tensor,
        probes: Tensor,
        factors: Tensor | None,
        left_out: Tensor,
        excluded: tuple[Tensor, Tensor] | None,
    ) -> None:
        self._values, self._queries = values, probes.T.contiguous()
        self._factors, self._left_out = factors, left_out
        self.maxima = block_maxima(values, probes, factors, left_out, BLOCK)
        """``(⌈C / 64⌉, B)``."""
        self._excluded = None
        if excluded is not None and len(excluded[0]):
            row, query = excluded
            self._excluded = row * len(self._queries) + query
            # What is excluded may have been a maximum.
            block, query = torch.stack([row // BLOCK, query], dim=1).unique(dim=0).T
            self.maxima[block, query] = self.of(block, query).amax(1)

    def of(self, block: Tensor, query: Tensor) -> Tensor:
        """Scores ``(m, 64)`` of the rows of some blocks ``(m,)`` for some queries ``(m,)``, −∞ beyond the last row."""
        at_once = max(1, _LOOKED_AT // (BLOCK * self._values.shape[1]))
        pieces = zip(block.split(at_once), query.split(at_once), strict=True)
        return torch.cat([self._of(some, of_some) for some, of_some in pieces])

    def _of(self, block: Tensor, query: Tensor) -> Tensor:
        rows = block[:, None] * BLOCK + torch.arange(BLOCK, device=block.device)
        gone = rows >= len(self._values)
        rows = rows.clamp(max=len(self._values) - 1)
        scores = (self._values[rows].float() @ self._queries[query][:, :, None]).squeeze(-1)
        if self._factors is not None:
            scores *= self._factors[rows]
        if scores.isnan().any():
            raise InputError(
                "Scores are not numbers: the queries, the cache or what the corrector makes of it is not finite."
            )
        gone |= self._left_out[rows]
        if self._excluded is not None:
            gone |= torch.isin(rows * len(self._queries) + query[:, None], self._excluded)
        return scores.masked_fill_(gone, -math.inf)


def block_maxima(values: Tensor, probes: Tensor, factors: Tensor | None, left_out: Tensor, block: int) -> Tensor:
    """The largest score of each block of rows for each query, ``(⌈C / block⌉, B)``; the scores are never stored.

    Scores are ``factors · values @ probes``. On tensor cores, with float32 accumulation: bfloat16 and float16 values
    are exact there, and the queries are given as the sum of two or three numbers of that type; float32 values are
    multiplied by three TF32 products. What comes out is meant to be as near to a float32
    product as another order of summation.

    Args:
        values: ``(C, d)``, float32, bfloat16, float16 or int8.
        probes: ``(d, B)``, float32.
        factors: what each row is multiplied with, float32 ``(C,)``, or None for 1.
        left_out: rows that count as −∞, bool ``(C,)``.
        block: rows in a block; a divisor of 128.
    """
    rows, dim = values.shape
    batch_size = probes.shape[1]
    count = triton.cdiv(rows, block)
    maxima = torch.empty(count, batch_size, device=values.device)
    if values.dtype in (torch.bfloat16, torch.float16, torch.int8):
        # int8 fits into bfloat16 exactly.
        narrow = torch.bfloat16 if values.dtype == torch.int8 else values.dtype
        parts, rest = [], probes
        for _ in range(3 if narrow == torch.bfloat16 else 2):
            parts.append(rest.to(narrow))
            rest = rest - parts[-1].float()
        split = torch.stack(parts).contiguous()
    else:
        split = probes[None].contiguous()
    grid = (triton.cdiv(rows, _TILE_ROWS), triton.cdiv(batch_size, _TILE_QUERIES))
    _block_maxima[grid](
        values,
        split,
        values if factors is None else factors,
        left_out,
        maxima,
        rows,
        batch_size,
        count,
        values.stride(0),
        DIM=dim,
        PARTS=len(split),
        HAS_FACTORS=factors is not None,
        # Triton's interpreter has no products in bfloat16.
        IN_FLOAT32=split.dtype == torch.float32 or triton.knobs.runtime.interpret,
        BLOCK=block,
        TILE_ROWS=_TILE_ROWS,
        TILE_QUERIES=_TILE_QUERIES,
        TILE_DIM=_TILE_DIM,
    )
    return maxima


if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator]
    def _block_maxima(  # type: ignore[no-untyped-def]  # Triton reads annotations as types of its own
        values,
        split,
        factors,
        left_out,
        maxima,
        rows,
        batch_size,
        count,
        stride,
        DIM: tl.constexpr,
        PARTS: tl.constexpr,
        HAS_FACTORS: tl.constexpr,
        IN_FLOAT32: tl.constexpr,
        BLOCK: tl.constexpr,
        TILE_ROWS: tl.constexpr,
        TILE_QUERIES: tl.constexpr,
        TILE_DIM: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64) * TILE_ROWS + tl.arange(0, TILE_ROWS)
        query = tl.program_id(1) * TILE_QUERIES + tl.arange(0, TILE_QUERIES)
        scores = tl.zeros((TILE_ROWS, TILE_QUERIES), dtype=tl.float32)
        for start in range(0, DIM, TILE_DIM):
            coordinate = start + tl.arange(0, TILE_DIM)
            inside = coordinate < DIM
            z = tl.load(
                values + row[:, None] * stride + coordinate[None, :],
                mask=(row < rows)[:, None] & inside[None, :],
                other=0,
            )
            if z.dtype == tl.int8:
                z = z.to(tl.float32)
            z = z.to(split.dtype.element_ty)
            # The small parts first: they are added before anything large swallows them.
            for part in tl.static_range(PARTS):
                q = tl.load(
                    split + ((PARTS - 1 - part) * DIM + coordinate[:, None]) * batch_size + query[None, :],
                    mask=inside[:, None] & (query < batch_size)[None, :],
                    other=0,
                )
                if IN_FLOAT32:
                    scores = tl.dot(z.to(tl.float32), q.to(tl.float32), scores, input_precision="tf32x3")
                else:
                    scores = tl.dot(z, q, scores)
        if HAS_FACTORS:
            scores *= tl.load(factors + row, mask=row < rows, other=0)[:, None]
        gone = tl.load(left_out + row, mask=row < rows, other=1)
        scores = tl.where((gone != 0)[:, None], float("-inf"), scores)
        # A maximum would drop what is not a number; as +∞ it is looked at, and found.
        scores = tl.where(scores != scores, float("inf"), scores)
        of_block = tl.max(tl.reshape(scores, (TILE_ROWS // BLOCK, BLOCK, TILE_QUERIES)), axis=1)
        number = tl.program_id(0).to(tl.int64) * (TILE_ROWS // BLOCK) + tl.arange(0, TILE_ROWS // BLOCK)
        tl.store(
            maxima + number[:, None] * batch_size + query[None, :],
            of_block,
            mask=(number < count)[:, None] & (query < batch_size)[None, :],
        )
