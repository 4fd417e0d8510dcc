"""A Triton kernel that scores rows and keeps only the maximum of each block."""

from __future__ import annotations

import functools
import logging
import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import InputError
from .topk import BLOCK

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of torch neither have nor need it
    triton = None

logger = logging.getLogger(__name__)
_LOOKED_AT = 1 << 25  # numbers of the cache gathered at once


class Tiles(NamedTuple):
    """How :func:`block_maxima` tiles its product.

    As compiled by Triton 3.6, the choice here keeps every dtype in registers (except 8 bytes, int8 with 128 queries on
    8.6 and 8.9) and in the 99 KB of shared memory of GPUs with compute capability 8.6, 8.9 and 12.0. It reads rows once
    for a batch of up to 128 queries.

    Args:
        queries: scored by one program.
        rows: scored by one program, a multiple of the block.
        dim: coordinates multiplied at once.
        warps: per program.
        stages: tiles in flight from memory, plus the one being multiplied.
    """

    queries: int
    rows: int = 128
    dim: int = 32
    warps: int = 8
    stages: int = 3


@functools.cache
def usable(device: torch.device) -> bool:
    """Whether :func:`block_maxima` runs on ``device``: a CUDA GPU with tensor cores, or Triton's interpreter.

    On a GPU this runs it once: Triton also compiles the kernel's launcher, with a C compiler that may be missing. Then
    searches do without the kernel, and a warning says why.
    """
    if triton is None or triton.knobs.runtime.interpret:
        return triton is not None
    if not _has_tensor_cores(device):
        return False
    values, probes = torch.ones(BLOCK, 16, device=device), torch.ones(16, 1, device=device)
    left_out = torch.zeros(BLOCK, dtype=torch.bool, device=device)
    try:
        return block_maxima(values, probes, None, left_out, BLOCK).item() == 16
    except Exception as error:  # from Triton, a compiler or the driver, of any class
        logger.warning(
            "Searches on %s do not use the Triton kernel and are slower: it cannot be compiled or launched there "
            "(%s: %s).",
            device,
            type(error).__name__,
            error,
        )
        return False


def _has_tensor_cores(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


class BlockScores:
    """The scores of a chunk of rows; at first only the maximum of each block is computed.

    Args:
        values: ``(C, d)``, as stored.
        probes: ``(d, B)``.
        factors: factor of each row, ``(C,)``, or None for 1.
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
            # An excluded score may have been a maximum.
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
                "Scores are not numbers: the queries, the cache or the corrected embeddings are not finite."
            )
        gone |= self._left_out[rows]
        if self._excluded is not None:
            gone |= torch.isin(rows * len(self._queries) + query[:, None], self._excluded)
        return scores.masked_fill_(gone, -math.inf)


def block_maxima(
    values: Tensor,
    probes: Tensor,
    factors: Tensor | None,
    left_out: Tensor,
    block: int,
    tiles: Tiles | None = None,
) -> Tensor:
    """The largest score of each block of rows for each query, ``(⌈C / block⌉, B)``; the scores are never stored.

    Scores are ``factors · values @ probes``. On tensor cores, with float32 accumulation: bfloat16 and float16 values
    are exact there, and each query is split into a sum of two or three numbers of that type; float32 values take three
    TF32 products. The result should be as close to a float32 product as another order of summation.

    Args:
        values: ``(C, d)``, float32, bfloat16, float16 or int8.
        probes: ``(d, B)``, float32.
        factors: factor of each row, float32 ``(C,)``, or None for 1.
        left_out: rows that count as −∞, bool ``(C,)``.
        block: rows in a block; a divisor of 128.
        tiles: how the product is tiled; the default suits the batch.
    """
    rows, dim = values.shape
    batch_size = probes.shape[1]
    if values.stride(1) != 1:  # each row is read contiguously
        values = values.contiguous()
    tiles = tiles or Tiles(queries=64 if batch_size <= 64 else 128)
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
    grid = (triton.cdiv(rows, tiles.rows) * triton.cdiv(batch_size, tiles.queries),)
    with torch.cuda.device_of(values):  # Triton launches on the current device, whatever its arguments
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
            TILE_ROWS=tiles.rows,
            TILE_QUERIES=tiles.queries,
            TILE_DIM=tiles.dim,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )
    return maxima


if triton is not None:
    # Avoids a separate kernel for numbers of rows divisible by 16.
    @triton.jit(do_not_specialize=("rows", "count"))  # type: ignore[untyped-decorator]
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
        # Programs that read the same rows for different queries run in succession and find them in the L2 cache.
        of_queries = tl.cdiv(batch_size, TILE_QUERIES)
        tile = tl.program_id(0).to(tl.int64) // of_queries
        row = tile * TILE_ROWS + tl.arange(0, TILE_ROWS)
        query = tl.program_id(0) % of_queries * TILE_QUERIES + tl.arange(0, TILE_QUERIES)
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
            # Small parts first: added to a large sum, they would be lost.
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
        # A maximum would drop NaN; as +∞ it is looked at and found.
        scores = tl.where(scores != scores, float("inf"), scores)
        of_block = tl.max(tl.reshape(scores, (TILE_ROWS // BLOCK, BLOCK, TILE_QUERIES)), axis=1)
        number = tile * (TILE_ROWS // BLOCK) + tl.arange(0, TILE_ROWS // BLOCK)
        tl.store(
            maxima + number[:, None] * batch_size + query[None, :],
            of_block,
            mask=(number < count)[:, None] & (query < batch_size)[None, :],
        )
