"""Searching and correcting in float32, whatever the training loop lets the encoder compute in."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

Returned = TypeVar("Returned")


def in_float32(method: Callable[..., Returned]) -> Callable[..., Returned]:
    """Leave the caller's autocast and TF32 for the time of ``method``, whose first argument is a tensor.

    A training loop that puts the whole loss under autocast, and not only the encoder as the trainers do, would have
    what is learnt added up in 8 bits of precision, and matrices of two dtypes meet. TF32, which ``tf32=True`` and
    ``torch_compile=True`` allow on GPUs, has 10: a search by it is not exact.
    """

    @functools.wraps(method)
    def outside(self: Any, tensor: Tensor, *args: Any, **settings: Any) -> Returned:
        with torch.autocast(tensor.device.type, enabled=False), _without_tf32():
            return method(self, tensor, *args, **settings)

    return outside


@contextmanager
def _without_tf32() -> Iterator[None]:
    products = torch.backends.cuda.matmul
    before = products.fp32_precision
    products.fp32_precision = "ieee"
    try:
        yield
    finally:
        products.fp32_precision = before
