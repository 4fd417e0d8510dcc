"""An affine corrector in closed form: ridge regression over the stream of (stale, fresh) pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from .affine import AffineCorrector
from .regression import StreamingRidge


class RidgeCorrector(AffineCorrector):
    """``h(z) = z + z̃ W``, where ``z̃ = [z, c]`` and ``W`` solves a ridge problem over all pairs so far.

    The regression (:class:`StreamingRidge`) is from ``z̃`` to ``g(y) − z``. There is no learning rate, and before the
    first pair ``W = 0``. The search costs as in :class:`AffineCorrector`, each step one Cholesky solve of size ``d +
    1``, for any corpus.

    Args:
        dim: dimension ``d`` of the embeddings.
        regularization: λ.
        forgetting: ρ, a pair's remaining weight after each further step, in ``(0, 1]``.
        bias: the constant ``c`` in ``z̃``: how freely a common shift of all targets is learnt, relative to ``z``'s own
            coordinates, which are of the order ``1/√d`` in unit vectors.
        normalize: see :class:`Corrector`.

    Raises:
        InputError: λ is not positive, or ρ is outside ``(0, 1]``.
    """

    name = "ridge"

    def __init__(
        self,
        dim: int,
        *,
        regularization: float = 1.0,
        forgetting: float = 0.97,
        bias: float = 0.1,
        normalize: bool = True,
    ) -> None:
        super().__init__(dim, normalize=normalize)
        self.regularization, self.forgetting, self.bias = regularization, forgetting, bias
        self._regression = StreamingRidge(dim + 1, dim, regularization, forgetting)

    @torch.no_grad()
    def fit_step(self, stale: Tensor, fresh: Tensor, queries: Tensor, scale: float) -> dict[str, Tensor]:
        error = self._require_finite((fresh - self(stale)).square().sum(-1).mean())
        augmented = torch.cat([stale, stale.new_full((len(stale), 1), self.bias)], dim=1)
        solution = self._regression.update(augmented, fresh - stale)
        self.weight, self.shift = solution[:-1], self.bias * solution[-1]
        return {"correction_loss": error}
