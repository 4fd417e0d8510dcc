"""State of correctors that keep plain tensors: how to find, save, restore and move them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..storage.fingerprint import differences
from .regression import StreamingRidge


class TensorState:
    """Saves, restores and moves every tensor attribute, those of a :class:`StreamingRidge` included."""

    def _holders(self) -> dict[str, Any]:
        regressions = {name: value for name, value in vars(self).items() if isinstance(value, StreamingRidge)}
        return {"": self, **{f"{name}.": value for name, value in regressions.items()}}

    def _tensors(self) -> dict[str, Tensor]:
        return {
            prefix + name: value
            for prefix, holder in self._holders().items()
            for name, value in vars(holder).items()
            if isinstance(value, Tensor)
        }

    def _set(self, tensors: dict[str, Tensor]) -> None:
        for prefix, holder in self._holders().items():
            for name in [name for name, value in vars(holder).items() if isinstance(value, Tensor)]:
                setattr(holder, name, tensors[prefix + name])

    def state_dict(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self._tensors().items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        own = self._tensors()
        expected = {name: tuple(value.shape) for name, value in own.items()}
        if different := differences({name: tuple(value.shape) for name, value in state.items()}, expected):
            raise InputError(f"Not the state of {self!r}:\n  " + "\n  ".join(different))
        self._set({name: value.clone().to(own[name].device) for name, value in state.items()})

    def to(self, device: torch.device | str) -> Any:
        self._set({name: value.to(device) for name, value in self._tensors().items()})
        return self
