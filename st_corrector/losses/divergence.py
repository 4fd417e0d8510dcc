"""Noticing that a corrector makes its embeddings worse than they were."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..runtime.distributed import Processes

DivergencePolicy = Literal["identity", "warn"]
_STEPS = 100
_MARGIN = 0.01


class Divergence(NamedTuple):
    """What was found over :data:`_STEPS` steps, in means of ``1 − cos`` to fresh embeddings.

    Args:
        drift: of the cache as it is.
        error: of what the corrector makes of it.
    """

    drift: float
    error: float


class DivergenceWatch:
    """Compares corrected with uncorrected error over every 100 steps.

    A corrector that has only begun is worse than none for some steps, and an error of 0.01 decides nothing: in the
    runs of this project's study corrected errors exceeded the drift in the first twenty steps alone, by at most 0.005.

    Args:
        processes: those that train together, which must all see the same.
    """

    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        self._errors: list[Tensor] = []

    def add(self, drift: Tensor, error: Tensor) -> Divergence | None:
        """Take in one step's means over the targets encoded; what is wrong, if the last hundred say so."""
        self._errors.append(torch.stack([drift, error]).detach().float())
        if len(self._errors) < _STEPS:
            return None
        found = Divergence(*self._processes.broadcast(self.state.mean(0)).tolist())
        self._errors.clear()
        return found if found.error > found.drift + _MARGIN else None

    @property
    def state(self) -> Tensor:
        """What was taken in since it last looked, ``(n, 2)``."""
        if not self._errors:
            return torch.empty(0, 2)
        # Those of before a checkpoint may be elsewhere.
        return torch.stack([each.to(self._errors[-1].device) for each in self._errors])

    @state.setter
    def state(self, errors: Tensor) -> None:
        self._errors = list(errors)
