"""Kernel ridge regression by random features: non-affine drift, in closed form."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import InputError
from .base import Corrector
from .regression import StreamingRidge
from .state import TensorState
from .types import QuerySide


class KernelRidgeCorrector(TensorState, Corrector):
    """``h(z) = z + [z, c, φ(z)] W``, with random Fourier features of a Gaussian kernel.

    ``φ(z) = √(2/m) cos(Ωz + u)``, ``Ω ~ N(0, 1/σ²)``, ``u ~ U[0, 2π)``, gives
    ``⟨φ(z), φ(z')⟩ ≈ exp(−‖z − z'‖²/2σ²)`` (`Rahimi and Recht 2007
    <https://papers.nips.cc/paper/3182-random-features-for-large-scale-kernel-machines>`_), and ``W`` is a
    :class:`StreamingRidge` from these features to ``g(y) − z``. It is affine in the features: a cache of them, ``m``
    numbers per target in addition to ``z``'s ``d``, could be searched from the query side. Without one, it costs
    ``2·d·m + 2·(d + m)·d`` operations per target in the search.

    Args:
        dim: dimension ``d`` of the embeddings.
        num_features: ``m``.
        bandwidth: ``σ``, in units of the embeddings (unit vectors are 0 to 2 apart).
        regularization: λ.
        forgetting: ρ, a pair's remaining weight after each further step, in ``(0, 1]``.
        bias: the constant ``c``, as in :class:`RidgeCorrector`.
        seed: of the random features.
        normalize: see :class:`Corrector`.

    Raises:
        InputError: λ, σ or m is not positive, or ρ is outside ``(0, 1]``.
    """

    name = "kernel-ridge"

    def __init__(
        self,
        dim: int,
        *,
        num_features: int = 512,
        bandwidth: float = 1.0,
        regularization: float = 1.0,
        forgetting: float = 0.97,
        bias: float = 0.1,
        seed: int = 0,
        normalize: bool = True,
    ) -> None:
        super().__init__(dim, normalize=normalize)
        if num_features < 1 or not bandwidth > 0:
            raise InputError(
                f"num_features must be at least 1 and bandwidth positive, got {num_features} and {bandwidth}."
            )
        self.num_features, self.bandwidth, self.seed = num_features, bandwidth, seed
        self.regularization, self.forgetting, self.bias = regularization, forgetting, bias
        generator = torch.Generator().manual_seed(seed)
        self._frequencies = torch.randn(dim, num_features, generator=generator) / bandwidth
        self._phases = torch.rand(num_features, generator=generator) * 2 * math.pi
        self._regression = StreamingRidge(dim + 1 + num_features, dim, regularization, forgetting)
        self._weight = torch.zeros(dim + 1 + num_features, dim)

    def features(self, stale: Tensor) -> Tensor:
        """``φ(z)``, ``(n, d) → (n, m)``."""
        return torch.addmm(self._phases, stale, self._frequencies).cos_().mul_((2 / self.num_features) ** 0.5)

    def _inputs(self, stale: Tensor) -> Tensor:
        """``[z, c, φ(z)]``."""
        return torch.cat([stale, stale.new_full((len(stale), 1), self.bias), self.features(stale)], dim=1)

    def correction(self, stale: Tensor) -> Tensor:
        return self._inputs(stale) @ self._weight

    @property
    def working_width(self) -> int:
        return 3 * self.dim + 2 * self.num_features

    def on_query_side(self, queries: Tensor) -> QuerySide:
        """``⟨q, z + [z, c, φ(z)]W⟩ = ⟨q + qW_zᵀ, z⟩ + ⟨qW_φᵀ, φ(z)⟩ + c·⟨q, W_c⟩``."""
        of_stale, of_constant, of_features = self._weight.split([self.dim, 1, self.num_features])
        probes = torch.addmm(queries, queries, of_stale.T)
        return QuerySide(probes, self.bias * (queries @ of_constant[0]), queries @ of_features.T)

    @torch.no_grad()
    def fit_step(self, stale: Tensor, fresh: Tensor, queries: Tensor, scale: float) -> dict[str, Tensor]:
        error = self._require_finite((fresh - self(stale)).square().sum(-1).mean())
        self._weight = self._regression.update(self._inputs(stale), fresh - stale)
        return {"correction_loss": error}
