"""Ridge regression over a stream of pairs, with exponential forgetting."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InputError


class StreamingRidge:
    """``W`` that minimises ``Σ_t ρ^{T−t} ‖X_t W − Y_t‖² + λ‖W‖²`` over all steps ``t ≤ T`` so far::

        A ← ρA + XᵀX        R ← ρR + XᵀY        W = (A + λI)⁻¹ R

    One Cholesky solve per step: ``p³/3 + 2·p²·q`` operations, independent of the number of earlier pairs.

    Args:
        inputs: width ``p`` of ``X``.
        outputs: width ``q`` of ``Y``.
        regularization: λ.
        forgetting: ρ.

    Raises:
        InputError: λ is not positive, or ρ is outside ``(0, 1]``.
    """

    def __init__(self, inputs: int, outputs: int, regularization: float, forgetting: float) -> None:
        if not regularization > 0 or not 0 < forgetting <= 1:
            raise InputError(
                f"regularization must be positive and forgetting in (0, 1], got {regularization} and {forgetting}."
            )
        self.regularization, self.forgetting = regularization, forgetting
        self.gram = torch.zeros(inputs, inputs)
        self.moment = torch.zeros(inputs, outputs)

    def update(self, x: Tensor, y: Tensor) -> Tensor:
        """Add one step's pairs, ``(n, p)`` and ``(n, q)``; returns ``W``, ``(p, q)``."""
        self.gram = torch.addmm(self.gram, x.T, x, beta=self.forgetting)
        self.moment = torch.addmm(self.moment, x.T, y, beta=self.forgetting)
        regularized = self.gram.clone()
        regularized.diagonal().add_(self.regularization)
        # Row-major, as it is saved: a product with another memory layout differs in the last bits.
        return torch.cholesky_solve(self.moment, torch.linalg.cholesky(regularized)).contiguous()
