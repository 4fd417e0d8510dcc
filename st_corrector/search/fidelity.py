"""How stale the cache is and how well it is corrected: how far it has drifted, and what it selects."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def staleness(cached: Tensor, corrected: Tensor, fresh: Tensor) -> dict[str, Tensor]:
    """How far rows have drifted, and how much of that the corrector knows; to be asked before it has seen them.

    Args:
        cached: ``g'(y)`` as the cache has it, ``(n, d)``.
        corrected: ``h`` of what stands for these rows now, ``(n, d)``.
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
    """The share of each query's ``reference`` rows that are in ``selected``, both ``(B, k)``: ``(B,)``."""
    return (reference[:, :, None] == selected[:, None, :]).any(-1).float().mean(-1)


def selection_fidelity(queries: Tensor, corrected: Tensor, fresh: Tensor, k: int) -> Tensor:
    """How much of what fresh embeddings would select the corrected ones do: the mean overlap of both top ``k``.

    Args:
        queries: ``f(x)``, ``(B, d)``.
        corrected: ``h`` of all targets in question, ``(n, d)``.
        fresh: ``g(y)`` of the same targets, ``(n, d)``.
        k: how many of them are selected for a query.
    """
    k = min(k, len(fresh))
    return overlap_at_k((queries @ corrected.T).topk(k).indices, (queries @ fresh.T).topk(k).indices).mean()
