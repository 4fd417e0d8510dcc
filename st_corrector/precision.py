"""Searching and correcting in float32, whatever the training loop lets the encoder compute in."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

Returned = TypeVar("Returned")


def in_float32(method: Callable[..., Returned]) -> Callable[..., Returned]:
    """Leave the caller's autocast for the time of ``method``, whose first argument is a tensor.

    A training loop that puts the whole loss under autocast, and not only the encoder as the trainers do, would have
    what is learnt added up in 8 bits of precision, and matrices of two dtypes meet.
    """

    @functools.wraps(method)
    def outside(self: Any, tensor: Tensor, *args: Any, **settings: Any) -> Returned:
        with torch.autocast(tensor.device.type, enabled=False):
            return method(self, tensor, *args, **settings)

    return outside
