"""Shared by affine correctors: an exact pull-back, and scoring on the query side."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Corrector
from .state import TensorState
from .types import PullBack, QuerySide


class AffineCorrector(TensorState, Corrector):
    """``h(z) = zM + b`` with ``M = I + W``; subclasses learn :attr:`weight` ``W`` and :attr:`shift` ``b``.

    Costs ``2·d²`` operations per target in the search; nothing without normalisation, since then ``⟨f(x), zM + b⟩ =
    ⟨f(x)Mᵀ, z⟩ + ⟨f(x), b⟩``: the queries are transformed and the stale vectors stay unchanged.
    """

    def __init__(self, dim: int, *, normalize: bool = True) -> None:
        super().__init__(dim, normalize=normalize)
        self.weight = torch.zeros(dim, dim)
        self.shift = torch.zeros(dim)

    def correction(self, stale: Tensor) -> Tensor:
        return torch.addmm(self.shift, stale, self.weight)

    def unnormalized(self, stale: Tensor) -> Tensor:
        return (stale + self.shift).addmm_(stale, self.weight)

    @property
    def matrix(self) -> Tensor:
        """``M``, ``(d, d)``."""
        return self.weight + torch.eye(self.dim, device=self.weight.device)

    def leaves_corpus(self, unit: bool) -> bool:
        return not self.normalize

    def on_query_side(self, queries: Tensor) -> QuerySide:
        """``q' = f(x)Mᵀ`` and ``a = ⟨f(x), b⟩``, which is the same for all targets of a query."""
        return QuerySide(torch.addmm(queries, queries, self.weight.T), queries @ self.shift)

    @torch.no_grad()
    def pull_back(self, fresh: Tensor) -> PullBack:
        """One solve: ``z' = (g(y) − b) M⁻¹``.

        If ``M`` is so ill-conditioned that the solution grows beyond :data:`_LONGEST` times the embedding's own length,
        rounding and noise would affect every later score. Then the whole step is solved with damping (``z' = g + (g −
        gM − b) Mᵀ(MMᵀ + δI)⁻¹``, the least change of ``g`` that nearly solves it).
        """
        matrix = self.matrix
        stale, info = torch.linalg.solve_ex(matrix.T, (fresh - self.shift).T)
        stale = stale.T
        too_long = stale.norm(dim=-1) > _LONGEST * fresh.norm(dim=-1)
        damped = bool(info) or not bool(torch.isfinite(stale).all()) or bool(too_long.any())
        if damped:
            gram = matrix @ matrix.T
            gram.diagonal().add_(_DAMPING * gram.diagonal().mean())
            error = fresh - fresh @ matrix - self.shift
            stale = fresh + error @ matrix.T @ torch.linalg.inv(gram)
        residual = (stale @ matrix + self.shift - fresh).norm(dim=-1) / fresh.norm(dim=-1).clamp_min(1e-12)
        return PullBack(stale.contiguous(), residual, damped)


# Every useful corrector is near the identity: M's singular values are within a small factor of 1.
_LONGEST = 10.0
_DAMPING = 1e-2
