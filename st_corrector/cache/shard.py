"""Embeddings of consecutive rows, in their stored dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import CacheError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.int8}


class Shard(NamedTuple):
    """Embeddings of consecutive rows, as they are stored.

    Args:
        values: ``(n, d)``, in one of :data:`DTYPES`.
        scales: factor of each row's values, float32 ``(n,)``; only with int8.
    """

    values: Tensor
    scales: Tensor | None = None

    @classmethod
    def store(cls, embeddings: Tensor, dtype: torch.dtype) -> Shard:
        """Floating-point ``embeddings`` ``(n, d)`` in ``dtype``; int8 is scaled by each row's largest absolute value.

        Raises:
            CacheError: ``dtype`` is none of :data:`DTYPES`.
        """
        if dtype not in DTYPES.values():
            raise CacheError(f"Embeddings are stored in {', '.join(DTYPES)}, not in {dtype}.")
        if dtype != torch.int8:
            return cls(embeddings.to(dtype))
        scales = embeddings.float().abs().amax(1) / 127
        return cls((embeddings / scales.clamp_min(1e-30)[:, None]).round_().to(torch.int8), scales)

    def float(self) -> Tensor:
        """The embeddings in float32, ``(n, d)``: the stored memory itself if it is float32."""
        values = self.values.float()
        return values if self.scales is None else values.mul_(self.scales[:, None])

    def map(self, function: Callable[[Tensor], Tensor]) -> Shard:
        """The same with ``function`` applied to its tensors."""
        return Shard(function(self.values), None if self.scales is None else function(self.scales))

    def at(self, rows: slice | Tensor) -> Shard:
        """Some of its rows."""
        return self.map(lambda each: each[rows])

    def copy_(self, source: Shard) -> Shard:
        """Copy the numbers of ``source``, of equal shape and dtype on any device; returns itself."""
        self.values.copy_(source.values)
        if self.scales is not None and source.scales is not None:
            self.scales.copy_(source.scales)
        return self

    def not_finite(self) -> Tensor:
        """Positions of rows with NaN or infinite values, ``(m,)``."""
        checked = self.values if self.scales is None else self.scales[:, None]
        return (~torch.isfinite(checked).all(1)).nonzero().flatten()
