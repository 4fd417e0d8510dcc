"""Staleness of the cache and quality of the correction: drift, and overlap of selections."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def staleness(cached: Tensor, corrected: Tensor, fresh: Tensor) -> dict[str, Tensor]:
    """Drift of rows, and how much of it the corrector predicts; call it before the corrector learns from them.

    Args:
        cached: ``g'(y)`` from the cache, ``(n, d)``.
        corrected: ``h`` of these rows' current vectors, ``(n, d)``.
        fresh: ``g(y)``, ``(n, d)``.

    Returns:
        Means over the rows: ``drift``, ``1 − cos(g', g)``; ``corrected_error``, ``1 − cos(h, g)``; and
        ``corrected_mse``, ``‖h − g‖² / ‖g‖²``.
    """
    squared = (corrected - fresh).square().sum(-1) / fresh.square().sum(-1).clamp_min(1e-24)
    return {
        "drift": 1 - F.cosine_similarity(cached, fresh, dim=-1).mean(),
        "corrected_error": 1 - F.cosine_similarity(corrected, fresh, dim=-1).mean(),
        "corrected_mse": squared.mean(),
    }


def overlap_at_k(selected: Tensor, reference: Tensor) -> Tensor:
    """The share of each query's ``reference`` rows in ``selected``, both ``(B, k)``: ``(B,)``."""
    return (reference[:, :, None] == selected[:, None, :]).any(-1).float().mean(-1)


def selection_fidelity(queries: Tensor, corrected: Tensor, fresh: Tensor, k: int) -> Tensor:
    """The share of the fresh embeddings' selection that corrected ones also select: mean overlap of both top ``k``.

    Args:
        queries: ``f(x)``, ``(B, d)``.
        corrected: ``h`` of all targets to compare, ``(n, d)``.
        fresh: ``g(y)`` of the same targets, ``(n, d)``.
        k: number of targets selected per query.
    """
    k = min(k, len(fresh))
    return overlap_at_k((queries @ corrected.T).topk(k).indices, (queries @ fresh.T).topk(k).indices).mean()
