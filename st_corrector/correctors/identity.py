"""No correction: the stale baseline."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Corrector
from .types import PullBack, QuerySide


class IdentityCorrector(Corrector):
    """``h(z) = z``: negatives are chosen by the stale embeddings unchanged. It costs nothing and learns nothing."""

    name = "identity"

    def correction(self, stale: Tensor) -> Tensor:
        return torch.zeros_like(stale)

    def unnormalized(self, stale: Tensor) -> Tensor:
        return stale

    def leaves_corpus(self, unit: bool) -> bool:
        return unit or not self.normalize

    def on_query_side(self, queries: Tensor) -> QuerySide:
        """The queries themselves."""
        return QuerySide(queries, queries.new_zeros(len(queries)))

    def fit_step(self, stale: Tensor, fresh: Tensor, queries: Tensor, scale: float) -> dict[str, Tensor]:
        return {}

    def pull_back(self, fresh: Tensor) -> PullBack:
        """``z' = g(y)``: the fresh embedding itself."""
        return PullBack(fresh, fresh.new_zeros(len(fresh)), False)

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        pass

    def to(self, device: torch.device | str) -> IdentityCorrector:
        return self
