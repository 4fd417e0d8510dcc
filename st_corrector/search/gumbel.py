"""Gumbel noise from a counter: the same for the same seed, query and row, in whatever chunks."""

from __future__ import annotations

import torch
from torch import Tensor


def gumbel_noise(queries: int, first_row: int, rows: int, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """Independent standard Gumbel noise for queries ``0 … queries − 1`` and rows ``first_row …``, ``(queries, rows)``.

    Each number depends only on (seed, query, row) (the SplitMix64 hash of a counter), so a draw does not depend on
    chunk sizes or the device.
    """
    row = torch.arange(first_row, first_row + rows, dtype=torch.int64, device=device)
    query = torch.arange(queries, dtype=torch.int64, device=device)
    key = _splitmix64(_splitmix64(torch.tensor(_to_int64(seed), device=device)) + query)
    # Row by row, as scores are stored.
    bits = _splitmix64(key + row[:, None] * _to_int64(0x9E3779B97F4A7C15))
    # 53 bits, with full relative precision near 0: there lies Gumbel's upper tail, which decides the selection.
    uniform = (_shift_right(bits, 11).float() + 0.5) * 2.0**-53
    return uniform.clamp_(max=1 - 2.0**-24).neg_().log1p_().neg_().log_().neg_().T


def _splitmix64(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele et al. 2014), on int64 with wrap-around."""
    x = (x ^ _shift_right(x, 30)) * _to_int64(0xBF58476D1CE4E5B9)
    x = (x ^ _shift_right(x, 27)) * _to_int64(0x94D049BB133111EB)
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's ``>>`` on int64 copies the sign bit."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _to_int64(value: int) -> int:
    """``value`` modulo 2⁶⁴ as a signed 64-bit integer."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >= 1 << 63 else value
