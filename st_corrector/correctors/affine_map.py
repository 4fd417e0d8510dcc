"""An affine map between the embeddings of two models, of any widths."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InputError
from .base import Corrector
from .regression import StreamingRidge
from .state import TensorState
from .types import PullBack, QuerySide


class AffineMap(TensorState, Corrector):
    """``h(z) = z̃ A``, where ``z̃ = [z, c]`` and ``A``, ``(d + 1, d')``, solves a ridge problem over all pairs so far.

    For two unrelated models, even of different widths. Unlike every other corrector it does not start from ``z``
    itself, so it cannot choose anything before it has learnt: training refuses it.

    Args:
        dim: dimension ``d`` of its inputs.
        new_dim: dimension ``d'`` of its outputs.
        regularization: λ.
        forgetting: ρ, a pair's remaining weight after each further step, in ``(0, 1]``.
        bias: the constant ``c`` in ``z̃``.
        normalize: whether ``h`` returns unit vectors.

    Raises:
        InputError: a dimension is not a positive integer, λ is not positive, or ρ is outside ``(0, 1]``.
    """

    name = "affine-map"

    def __init__(
        self,
        dim: int,
        *,
        new_dim: int,
        regularization: float = 1.0,
        forgetting: float = 1.0,
        bias: float = 0.1,
        normalize: bool = True,
    ) -> None:
        super().__init__(dim, normalize=normalize)
        if not isinstance(new_dim, int) or new_dim < 1:
            raise InputError(f"new_dim must be a positive integer, got {new_dim!r}.")
        self.new_dim = new_dim
        self.regularization, self.forgetting, self.bias = regularization, forgetting, bias
        self._regression = StreamingRidge(dim + 1, new_dim, regularization, forgetting)
        self.weight, self.shift = torch.zeros(dim, new_dim), torch.zeros(new_dim)

    def leaves_corpus(self, unit: bool) -> bool:
        return not self.normalize

    def on_query_side(self, queries: Tensor) -> QuerySide:
        """``q' = f(x) Aᵀ``, in the space of the inputs, and what the constant adds to all targets of a query."""
        return QuerySide(queries @ self.weight.T, queries @ self.shift)

    def unnormalized(self, stale: Tensor) -> Tensor:
        return torch.addmm(self.shift, stale, self.weight)

    def correction(self, stale: Tensor) -> Tensor:
        raise InputError(f"{self!r} maps into another space: there is nothing that it adds to stale embeddings.")

    def pull_back(self, fresh: Tensor) -> PullBack:
        raise InputError(f"{self!r} maps into another space, from which nothing can be pulled back.")

    @torch.no_grad()
    def fit_step(self, stale: Tensor, fresh: Tensor, queries: Tensor, scale: float) -> dict[str, Tensor]:
        error = self._require_finite((fresh - self(stale)).square().sum(-1).mean())
        augmented = torch.cat([stale, stale.new_full((len(stale), 1), self.bias)], dim=1)
        solution = self._regression.update(augmented, fresh)
        self.weight, self.shift = solution[:-1], self.bias * solution[-1]
        return {"correction_loss": error}
