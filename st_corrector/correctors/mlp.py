"""The paper's corrector: a small network trained by gradient steps."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import skip_init

from ..errors import InputError
from .base import Corrector
from .types import QuerySide

_ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU, "silu": nn.SiLU, "tanh": nn.Tanh}


class MLPCorrector(Corrector):
    """``h(z) = z + W₂ σ(W₁ z + b₁) + b₂``, two layers with a residual connection, or more.

    The last layer starts at zero, so the untrained corrector is the identity. Costs ``4·d·hidden + 2·(depth −
    1)·hidden²`` operations per target in the search. A narrow hidden layer, such as ``hidden=64``, makes a low-rank
    residual.

    Args:
        dim: dimension ``d`` of the embeddings.
        hidden: width of the hidden layers.
        depth: number of hidden layers.
        activation: σ, one of ``"gelu"``, ``"relu"``, ``"silu"``, ``"tanh"``.
        loss: ``"ce"``: cross-entropy between the softmax over the step's targets by fresh and by corrected
            embeddings, Eq. 6 of `Monath et al. 2024 <https://arxiv.org/abs/2409.01890>`_;
            ``"mse"``: squared distance ``‖g(y) − h(g'(y))‖²``, Eq. 5.
        learning_rate: of its own Adam optimizer.
        steps: optimizer steps for each training step.
        seed: of the first layer's initialisation, independent of the global generator.
        normalize: see :class:`Corrector`.

    Raises:
        InputError: an unknown activation or loss, or a width, rate or count that is not positive.
    """

    name = "mlp"

    def __init__(
        self,
        dim: int,
        *,
        hidden: int = 128,
        depth: int = 1,
        activation: str = "gelu",
        loss: Literal["ce", "mse"] = "ce",
        learning_rate: float = 1e-3,
        steps: int = 1,
        seed: int = 0,
        normalize: bool = True,
    ) -> None:
        super().__init__(dim, normalize=normalize)
        if activation not in _ACTIVATIONS:
            raise InputError(f"activation {activation!r} is not one of {', '.join(_ACTIVATIONS)}.")
        if loss not in ("ce", "mse"):
            raise InputError(f"loss {loss!r} is neither 'ce' (Eq. 6) nor 'mse' (Eq. 5).")
        if min(hidden, depth, steps) < 1 or not learning_rate > 0:
            raise InputError(
                f"hidden, depth and steps must be at least 1 and learning_rate positive, got {hidden}, {depth}, "
                f"{steps} and {learning_rate}."
            )
        self.hidden, self.depth, self.activation, self.loss = hidden, depth, activation, loss
        self.learning_rate, self.steps, self.seed = learning_rate, steps, seed
        # Uses its own generator, so that making a corrector does not change other random numbers; distributions as in
        # nn.Linear.
        generator = torch.Generator().manual_seed(seed)
        layers: list[nn.Module] = []
        for width in [dim] + [hidden] * (depth - 1):
            layer: nn.Linear = skip_init(nn.Linear, width, hidden)
            for parameter in (layer.weight, layer.bias):
                nn.init.uniform_(parameter, -(width**-0.5), width**-0.5, generator=generator)
            layers += [layer, _ACTIVATIONS[activation]()]
        last: nn.Linear = skip_init(nn.Linear, hidden, dim)
        for parameter in (last.weight, last.bias):
            nn.init.zeros_(parameter)
        self._hidden_layers, self._last = nn.Sequential(*layers), last
        self.network = nn.Sequential(*layers, last)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=learning_rate)

    def correction(self, stale: Tensor) -> Tensor:
        corrected: Tensor = self.network(stale)
        return corrected

    @property
    def working_width(self) -> int:
        return 2 * self.dim + 2 * self.hidden  # before and after σ

    def unnormalized(self, stale: Tensor) -> Tensor:
        return (stale + self._last.bias).addmm_(self.features(stale), self._last.weight.T)

    def on_query_side(self, queries: Tensor) -> QuerySide:
        """``⟨q, z + W₂φ + b₂⟩ = ⟨q, z⟩ + ⟨W₂ᵀq, φ⟩ + ⟨q, b₂⟩``, where ``φ`` is the last hidden layer."""
        return QuerySide(queries, queries @ self._last.bias, queries @ self._last.weight)

    def features(self, stale: Tensor) -> Tensor:
        """The last hidden layer, ``(n, d) → (n, hidden)``."""
        features: Tensor = self._hidden_layers(stale)
        return features

    def fit_step(self, stale: Tensor, fresh: Tensor, queries: Tensor, scale: float) -> dict[str, Tensor]:
        stale, fresh, queries = stale.detach(), fresh.detach(), queries.detach()
        losses = []
        for _ in range(self.steps):
            with torch.enable_grad():
                corrected = self.forward(stale)
                if self.loss == "mse":
                    loss = (fresh - corrected).square().sum(-1).mean()
                else:
                    target = (scale * queries @ fresh.T).softmax(-1)
                    loss = F.cross_entropy(scale * queries @ corrected.T, target)
                self._require_finite(loss)
                gradients = torch.autograd.grad(loss, list(self.network.parameters()))
            for parameter, gradient in zip(self.network.parameters(), gradients, strict=True):
                parameter.grad = gradient
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            losses.append(loss.detach())
        return {"correction_loss": losses[0]}

    def state_dict(self) -> dict[str, Tensor]:
        state = {f"network.{name}": value.detach().clone() for name, value in self.network.state_dict().items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            state |= {f"optimizer.{index}.{name}": torch.as_tensor(value).clone() for name, value in moments.items()}
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.network.load_state_dict(
            {k.removeprefix("network."): v for k, v in state.items() if k.startswith("network.")}
        )
        moments: dict[int, dict[str, Tensor]] = {}
        for key, value in state.items():
            if key.startswith("optimizer."):
                _, index, name = key.split(".", 2)
                moments.setdefault(int(index), {})[name] = value.clone()
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})

    def to(self, device: torch.device | str) -> MLPCorrector:
        self.network.to(device)
        for moments in self.optimizer.state.values():
            moments.update({k: v.to(device) for k, v in moments.items() if k != "step"})
        return self
