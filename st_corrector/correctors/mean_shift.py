"""The simplest correction: the drift that all targets share."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InputError
from .affine import AffineCorrector


class MeanShiftCorrector(AffineCorrector):
    """``h(z) = z + b``, where ``b`` is the mean of ``g(y) − z`` over the steps so far, with exponential forgetting.

    Costs ``d`` operations per target in the search.

    Args:
        dim: dimension ``d`` of the embeddings.
        forgetting: ρ, a pair's remaining weight after each further step, in ``(0, 1]``.
        normalize: see :class:`Corrector`.

    Raises:
        InputError: ρ is outside ``(0, 1]``.
    """

    name = "mean-shift"

    def __init__(self, dim: int, *, forgetting: float = 0.97, normalize: bool = True) -> None:
        super().__init__(dim, normalize=normalize)
        if not 0 < forgetting <= 1:
            raise InputError(f"forgetting must lie in (0, 1], got {forgetting}.")
        self.forgetting = forgetting
        self._total = torch.zeros(dim)
        self._count = torch.zeros(())

    def unnormalized(self, stale: Tensor) -> Tensor:
        return stale + self.shift

    def correction(self, stale: Tensor) -> Tensor:
        return self.shift.expand_as(stale)

    @torch.no_grad()
    def fit_step(self, stale: Tensor, fresh: Tensor, queries: Tensor, scale: float) -> dict[str, Tensor]:
        error = self._require_finite((fresh - self(stale)).square().sum(-1).mean())
        self._total = self.forgetting * self._total + (fresh - stale).sum(0)
        self._count = self.forgetting * self._count + len(stale)
        self.shift = self._total / self._count
        return {"correction_loss": error}
