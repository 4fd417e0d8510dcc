"""Embeddings from users, of any origin, as tensors."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import StCorrectorError

Embeddings = Tensor | np.ndarray[Any, Any] | Sequence[Any]
"""What :func:`as_tensor` accepts: tensors, arrays, and lists or columns of vectors."""
_KEPT = (torch.float32, torch.bfloat16, torch.float16)


def as_tensor(embeddings: Embeddings, error: type[StCorrectorError]) -> Tensor:
    """``embeddings`` as a tensor in float32, bfloat16 or float16, ``(n, d)``, without gradient.

    Embeddings in one of these dtypes, in a memory layout that torch supports, are not copied, even if read-only. Wider
    numbers become float32; other byte orders, negative strides and separate vectors are copied.

    Raises:
        StCorrectorError: of the class ``error``, if they are not such numbers or have another shape.
    """
    tensor = embeddings.detach() if isinstance(embeddings, Tensor) else _from_array(embeddings, error)
    if tensor.dtype == torch.float64:
        tensor = tensor.float()
    if tensor.ndim != 2 or tensor.dtype not in _KEPT or tensor.layout != torch.strided:
        raise _refused(error, tensor.dtype, tuple(tensor.shape))
    return tensor


def _from_array(embeddings: Any, error: type[StCorrectorError]) -> Tensor:
    if not isinstance(embeddings, (list, tuple)):
        embeddings = np.asanyarray(embeddings)  # a data frame's column, too; what is masked stays so
    is_column = isinstance(embeddings, np.ndarray) and embeddings.dtype == object and embeddings.ndim == 1
    if is_column or isinstance(embeddings, (list, tuple)):
        vectors = list(embeddings)  # as encode() returns them, or a data frame's column holds them
        try:
            if vectors and all(isinstance(each, Tensor) for each in vectors):
                return torch.stack(vectors).detach()
            embeddings = np.asarray(vectors)
        except (ValueError, RuntimeError) as unequal:
            raise error(f"Expected vectors of equal dimension, got {len(vectors):,} that differ.") from unequal
    if np.ma.is_masked(embeddings):
        raise error("Some of the embeddings' numbers are masked: each target needs all of them.")
    array = np.asarray(embeddings)
    if array.dtype.kind != "f":
        raise _refused(error, array.dtype, array.shape)
    with np.errstate(over="ignore"):  # values beyond float32 become infinite and are found
        array = array.astype(array.dtype.newbyteorder("=") if array.itemsize <= 4 else np.float32, copy=False)
    if any(stride < 0 or stride % array.itemsize for stride in array.strides):
        array = np.ascontiguousarray(array)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nothing here writes to it
        return torch.from_numpy(array)


def _refused(error: type[StCorrectorError], dtype: Any, shape: tuple[int, ...]) -> StCorrectorError:
    return error(
        f"Expected floating-point embeddings of shape (targets, dimension), got {dtype} of shape {shape}: convert "
        "them to float32, float16 or bfloat16, one row per target."
    )
