"""A rotation in closed form: orthogonal Procrustes over the stream of (stale, fresh) pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InputError
from .affine import AffineCorrector


class OrthogonalCorrector(AffineCorrector):
    """``h(z) = zQ`` with ``QᵀQ = I``: keeps all angles between targets and only rotates them together.

    ``Q = UVᵀ`` of the singular value decomposition ``λI + Σ_t ρ^{T−t} Z_tᵀG_t = UΣVᵀ`` minimises
    ``Σ_t ρ^{T−t} ‖Z_t Q − G_t‖² + λ‖Q − I‖²`` over rotations (`Schönemann 1966
    <https://doi.org/10.1007/BF02289451>`_). Costs ``2·d²`` operations per target in the search, and one decomposition
    of size ``d`` per step.

    Args:
        dim: dimension ``d`` of the embeddings.
        regularization: λ, the pull towards no rotation.
        forgetting: ρ, a pair's remaining weight after each further step, in ``(0, 1]``.
        normalize: see :class:`Corrector`.

    Raises:
        InputError: λ is not positive, or ρ is outside ``(0, 1]``.
    """

    name = "orthogonal"

    def __init__(
        self, dim: int, *, regularization: float = 1.0, forgetting: float = 0.97, normalize: bool = True
    ) -> None:
        super().__init__(dim, normalize=normalize)
        if not regularization > 0 or not 0 < forgetting <= 1:
            raise InputError(
                f"regularization must be positive and forgetting in (0, 1], got {regularization} and {forgetting}."
            )
        self.regularization, self.forgetting = regularization, forgetting
        self._moment = torch.zeros(dim, dim)

    @torch.no_grad()
    def fit_step(self, stale: Tensor, fresh: Tensor, queries: Tensor, scale: float) -> dict[str, Tensor]:
        error = self._require_finite((fresh - self(stale)).square().sum(-1).mean())
        self._moment = torch.addmm(self._moment, stale.T, fresh, beta=self.forgetting)
        identity = torch.eye(self.dim, device=self._moment.device)
        u, _, v = torch.linalg.svd(self._moment + self.regularization * identity)
        self.weight = u @ v - identity
        return {"correction_loss": error}
