"""Embeddings of consecutive rows, in the dtype in which they are stored."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .errors import CacheError, StCorrectorError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.int8}


class Shard(NamedTuple):
    """Embeddings of consecutive rows, as they are stored.

    Args:
        values: ``(n, d)``, in one of :data:`DTYPES`.
        scales: what the values of each row are multiplied with, float32 ``(n,)``; only with int8.
    """

    values: Tensor
    scales: Tensor | None = None

    @classmethod
    def store(cls, embeddings: Tensor, dtype: torch.dtype) -> Shard:
        """Floating-point ``embeddings`` ``(n, d)`` in ``dtype``; int8 by the largest absolute value of each row."""
        if dtype != torch.int8:
            return cls(embeddings.to(dtype))
        scales = embeddings.float().abs().amax(1) / 127
        return cls((embeddings / scales.clamp_min(1e-30)[:, None]).round_().to(torch.int8), scales)

    def float(self) -> Tensor:
        """The embeddings in float32, ``(n, d)``: the stored memory itself where it is float32."""
        values = self.values.float()
        return values if self.scales is None else values.mul_(self.scales[:, None])

    def map(self, function: Callable[[Tensor], Tensor]) -> Shard:
        """The same with ``function`` applied to what it consists of."""
        return Shard(function(self.values), None if self.scales is None else function(self.scales))

    def at(self, rows: slice | Tensor) -> Shard:
        """Some of its rows."""
        return self.map(lambda each: each[rows])

    def copy_(self, source: Shard) -> Shard:
        """Take over the numbers of ``source``, of equal shape and dtype on any device; returns itself."""
        self.values.copy_(source.values)
        if self.scales is not None and source.scales is not None:
            self.scales.copy_(source.scales)
        return self

    def not_finite(self) -> Tensor:
        """Positions of rows that hold what is NaN or infinite, ``(m,)``."""
        checked = self.values if self.scales is None else self.scales[:, None]
        return (~torch.isfinite(checked).all(1)).nonzero().flatten()


def as_embeddings(values: Any, error: type[StCorrectorError] = CacheError) -> Tensor:
    """Vectors from elsewhere, in one of the floating-point :data:`DTYPES`, ``(n, d)``.

    A tensor, or an array in this machine's byte order, is kept where its dtype is one of these. Whatever else holds
    floating-point numbers is copied: float64 and others become float32.

    Args:
        values: a tensor, an array (memory-mapped or not), or whatever NumPy makes one of: lists, a data frame.
        error: what is raised.

    Raises:
        StCorrectorError: ``error``, where ``values`` are no two-dimensional floating-point numbers.
    """
    tensor = values.detach() if isinstance(values, Tensor) else _tensor_of(values, error)
    if tensor.layout != torch.strided or tensor.is_meta:
        raise error(
            f"Expected the embeddings' numbers, got a tensor of {tensor.layout} on {tensor.device}: to_dense()."
        )
    if tensor.ndim != 2 or not tensor.is_floating_point():
        raise error(
            f"Expected floating-point embeddings of shape (targets, dimension), got {tensor.dtype} of shape "
            f"{tuple(tensor.shape)}."
        )
    return tensor if tensor.dtype in DTYPES.values() else tensor.float()


def _tensor_of(values: Any, error: type[StCorrectorError]) -> Tensor:
    try:
        array = np.asanyarray(
            [each.detach().cpu().float().numpy() if isinstance(each, Tensor) else each for each in values]
            if isinstance(values, (list, tuple))
            else values
        )
    except ValueError as reason:  # rows of unequal length
        raise error(f"The embeddings cannot be made one array ({reason}): each needs the same dimension.") from reason
    if isinstance(array, np.ma.MaskedArray):
        raise error("The embeddings are a masked array, expected a number in every place: array.filled(…).")
    if array.dtype.kind not in "fiub":
        raise error(f"Expected floating-point embeddings of shape (targets, dimension), got an array of {array.dtype}.")
    if array.dtype.kind == "f" and array.dtype.itemsize not in (2, 4):
        array = array.astype(np.float32)
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if any(stride < 0 for stride in array.strides):
        array = np.ascontiguousarray(array)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # nor does anybody write
        return torch.as_tensor(array)
