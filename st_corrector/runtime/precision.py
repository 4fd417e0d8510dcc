"""Searching and correcting in float32, whatever the training loop lets the encoder compute in."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

Given = ParamSpec("Given")
Returned = TypeVar("Returned")


def in_float32(method: Callable[Given, Returned]) -> Callable[Given, Returned]:
    """Leave the caller's autocast and TF32 for the time of ``method``, on the device of its first tensor.

    A training loop that puts the whole loss under autocast, and not only the encoder as the trainers do, would have
    what is learnt added up in 8 bits of precision, and matrices of two dtypes meet. TF32, which ``tf32=True`` and
    ``torch_compile=True`` allow on GPUs, has 10: a search by it is not exact. Whether it is allowed is one setting of
    the whole process, other threads included.
    """

    @functools.wraps(method)
    def outside(*args: Given.args, **settings: Given.kwargs) -> Returned:
        device = next((each.device.type for each in (*args, *settings.values()) if isinstance(each, Tensor)), "cpu")
        with torch.autocast(device, enabled=False), _without_tf32():
            return method(*args, **settings)

    return outside


@contextmanager
def _without_tf32() -> Iterator[None]:
    products = torch.backends.cuda.matmul
    before = products.fp32_precision
    products.fp32_precision = "ieee"
    try:
        yield
    finally:
        # What was only inherited from the setting for everything is not made a setting of its own.
        inherited = torch.backends.fp32_precision  # type: ignore[attr-defined]  # made by torch at run time
        products.fp32_precision = "none" if before == inherited else before
