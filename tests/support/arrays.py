"""The forms in which people have vectors: what they are made of, and what becomes of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

Made = Callable[[np.ndarray, Path], Any]


def _mapped(vectors: np.ndarray, folder: Path, dtype: str = "<f4", order: str = "C") -> np.ndarray:
    np.save(folder / "mapped.npy", np.asarray(vectors, dtype=dtype, order=order))
    return np.load(folder / "mapped.npy", mmap_mode="r")


def _read_only(vectors: np.ndarray) -> np.ndarray:
    vectors = vectors.copy()
    vectors.setflags(write=False)
    return vectors


TAKEN: dict[str, tuple[Made, torch.dtype]] = {
    "float32": (lambda x, _: x, torch.float32),
    "float64": (lambda x, _: x.astype("f8"), torch.float32),
    "float16": (lambda x, _: x.astype("f2"), torch.float16),
    "long double": (lambda x, _: x.astype(np.longdouble), torch.float32),
    "big-endian": (lambda x, _: x.astype(">f4"), torch.float32),
    "big-endian float64": (lambda x, _: x.astype(">f8"), torch.float32),
    "big-endian float16": (lambda x, _: x.astype(">f2"), torch.float16),
    "Fortran order": (lambda x, _: np.asfortranarray(x), torch.float32),
    "rows backwards": (lambda x, _: x[::-1].copy()[::-1], torch.float32),
    "columns backwards": (lambda x, _: x[:, ::-1].copy()[:, ::-1], torch.float32),
    "every second column": (lambda x, _: np.repeat(x, 2, axis=1)[:, ::2], torch.float32),
    "every second row": (lambda x, _: np.repeat(x, 2, axis=0)[::2], torch.float32),
    "read-only": (lambda x, _: _read_only(x), torch.float32),
    "memory-mapped": (_mapped, torch.float32),
    "memory-mapped, big-endian": (lambda x, folder: _mapped(x, folder, ">f4"), torch.float32),
    "memory-mapped, Fortran order": (lambda x, folder: _mapped(x, folder, "<f8", "F"), torch.float32),
    "a list of arrays": (lambda x, _: list(x), torch.float32),
    "a tuple of tensors": (lambda x, _: tuple(torch.tensor(x)), torch.float32),
    "a list of lists": (lambda x, _: x.tolist(), torch.float32),
    "a tensor": (lambda x, _: torch.tensor(x), torch.float32),
    "a tensor of float64": (lambda x, _: torch.tensor(x).double(), torch.float32),
    "a tensor of bfloat16": (lambda x, _: torch.tensor(x).bfloat16(), torch.bfloat16),
    "a tensor of float8": (lambda x, _: torch.tensor(x).to(torch.float8_e4m3fn), torch.float32),
    "a tensor with gradient": (lambda x, _: torch.tensor(x, requires_grad=True), torch.float32),
    "a transposed tensor": (lambda x, _: torch.tensor(x.T.copy()).T, torch.float32),
    "an expanded tensor": (lambda x, _: torch.tensor(np.repeat(x, 2, 1))[:, ::2], torch.float32),
}
"""Made of float32 vectors ``(n, d)``, and the dtype in which they are kept."""

REFUSED: dict[str, tuple[Made, str]] = {
    "integers": (lambda x, _: x.astype(int), "floating-point embeddings .*int64"),
    "a tensor of integers": (lambda x, _: torch.tensor(x).int(), "floating-point embeddings .*int32"),
    "truth values": (lambda x, _: x > 0, "floating-point"),
    "complex numbers": (lambda x, _: x.astype("c8"), "an array of complex64"),
    "objects": (lambda x, _: np.array([*x, None], dtype=object)[:-1], "an array of object"),
    "strings": (lambda x, _: x.astype(str), "an array of <U"),
    "one vector": (lambda x, _: x[0], r"of shape \(24,\)"),
    "one number": (lambda x, _: x[0, 0], r"of shape \(\)"),
    "three dimensions": (lambda x, _: x[None], r"of shape \(1, "),
    "rows of unequal length": (lambda x, _: [x[0], x[1, :3]], "each needs the same dimension"),
    "a masked array": (lambda x, _: np.ma.masked_less(x, 0), "masked array"),
    "a sparse tensor": (lambda x, _: torch.tensor(x).to_sparse(), r"to_dense\(\)"),
}
"""Made likewise, and what is said of it."""
