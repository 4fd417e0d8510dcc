"""Embeddings in the forms in which people have them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

Make = Callable[[np.ndarray], Any]


def _apart(vectors: np.ndarray) -> np.ndarray:
    """Vectors in records of an odd size, as a packed struct has them."""
    records = np.zeros(len(vectors), dtype=[("flag", "u1"), ("vector", "<f4", vectors.shape[1])])
    records["vector"] = vectors
    return records["vector"]


def _read_only(vectors: np.ndarray) -> np.ndarray:
    vectors = vectors.copy()
    vectors.flags.writeable = False
    return vectors


def _column(vectors: np.ndarray) -> np.ndarray:
    """As a data frame's column gives them."""
    column = np.empty(len(vectors), dtype=object)
    column[:] = list(vectors)
    return column


KEPT: dict[str, Make] = {
    "float32": lambda x: x.copy(),
    "Fortran order": np.asfortranarray,
    "every other column": lambda x: np.repeat(x, 2, 1)[:, ::2],
    "every other row": lambda x: np.repeat(x, 2, 0)[::2],
    "read-only": _read_only,
    "tensor": lambda x: torch.tensor(x),
    "tensor by columns": lambda x: torch.tensor(x.T.copy()).T,
    "tensor with gradient": lambda x: torch.tensor(x, requires_grad=True),
}
"""What can be kept as it is, of float32 ``(n, d)``."""

CONVERTED: dict[str, Make] = {
    "float64": lambda x: x.astype(np.float64),
    "long double": lambda x: x.astype(np.longdouble),
    "big-endian": lambda x: x.astype(">f4"),
    "big-endian float64": lambda x: x.astype(">f8"),
    "rows backwards": lambda x: x[::-1].copy()[::-1],
    "columns backwards": lambda x: x[:, ::-1].copy()[:, ::-1],
    "apart": _apart,
    "list of arrays": list,
    "list of tensors": lambda x: list(torch.tensor(x)),
    "list of lists": lambda x: x.tolist(),
    "column of arrays": _column,
    "float64 tensor": lambda x: torch.tensor(x, dtype=torch.float64),
}
"""What has to be converted, and holds the same numbers then."""

REFUSED: dict[str, Make] = {
    "integers": lambda x: x.astype(np.int64),
    "bytes": lambda x: x.astype(np.int8),
    "booleans": lambda x: x > 0,
    "complex numbers": lambda x: x.astype(np.complex64),
    "text": lambda x: x.astype(str),
    "float8": lambda x: torch.tensor(x).to(torch.float8_e4m3fn),
    "integer tensor": lambda x: torch.tensor(x).int(),
    "sparse tensor": lambda x: torch.tensor(x).to_sparse(),
    "one vector": lambda x: x[0],
    "three dimensions": lambda x: x[None],
    "a number": lambda x: x[0, 0],
    "nothing": lambda x: None,
    "an empty list": lambda x: [],
    "objects": lambda x: x.astype(object),
    "an object": lambda x: np.array(None),
    "unequal vectors": lambda x: [row[: 1 + n % 2] for n, row in enumerate(x)],
    "unequal tensors": lambda x: [torch.tensor(row[: 1 + n % 2]) for n, row in enumerate(x)],
    "a missing vector": lambda x: [*x[1:], None],
    "masked": lambda x: np.ma.masked_array(x, mask=x > 2),
}
"""What are no embeddings."""
