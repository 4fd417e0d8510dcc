"""Correctors: how stale embeddings are mapped to what the encoder would say now. One file each."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Mapping
from typing import Any

from ..errors import InputError
from .affine import AffineCorrector
from .affine_map import AffineMap
from .base import Corrector, Frames, PullBack
from .identity import IdentityCorrector
from .kernel import KernelRidgeCorrector
from .mean_shift import MeanShiftCorrector
from .mlp import MLPCorrector
from .orthogonal import OrthogonalCorrector
from .ridge import RidgeCorrector
from .ridge_mlp import RidgeMLPCorrector

CORRECTORS: dict[str, type[Corrector]] = {
    cls.name: cls
    for cls in (
        IdentityCorrector,
        MeanShiftCorrector,
        OrthogonalCorrector,
        RidgeCorrector,
        KernelRidgeCorrector,
        MLPCorrector,
        RidgeMLPCorrector,
    )
}
LOADABLE: dict[str, type[Corrector]] = {**CORRECTORS, AffineMap.name: AffineMap}
"""What can be saved and loaded: those, and what maps to another width, which no training can use."""


def make_corrector(corrector: str | Corrector, dim: int, /, **settings: Any) -> Corrector:
    """A corrector by its name, or the given one if it fits.

    Raises:
        InputError: the name is unknown, the corrector is for another dimension, or has no such setting.
    """
    if isinstance(corrector, Corrector):
        if corrector.dim != dim:
            raise InputError(f"The corrector is for dimension {corrector.dim}, the embeddings have {dim}.")
        return corrector
    if not isinstance(corrector, str) or corrector not in CORRECTORS:
        raise InputError(f"corrector {corrector!r:.80} is not one of {', '.join(CORRECTORS)}, nor a Corrector.")
    return configured(CORRECTORS[corrector], dim, settings)


def configured(kind: type[Corrector], dim: int, settings: Mapping[str, Any]) -> Corrector:
    """A corrector of that kind, whose settings are checked: they may come from a file.

    Raises:
        InputError: it has no such setting, it lacks one, or one is out of its range.
    """
    parameters = dict(list(inspect.signature(kind).parameters.items())[1:])  # without dim
    for name, value in settings.items():
        if name not in parameters:
            raise InputError(f"{kind.name!r} has no setting {name!r:.80}; it has {', '.join(parameters)}.")
        default = parameters[name].default
        _check_setting(name, value, int if default is inspect.Parameter.empty else type(default))
    for name, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and name not in settings:
            raise InputError(f"{kind.name!r} needs the setting {name!r}.")
    return kind(dim, **settings)


def read_settings(text: str) -> dict[str, Any]:
    """A corrector's settings from a JSON object, such as ``{"hidden": 128}``.

    Raises:
        InputError: it is none.
    """
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError, TypeError):
        settings = None
    if not isinstance(settings, dict):
        raise InputError(f'A corrector\'s settings must be a JSON object such as {{"hidden": 128}}, got {text!r:.200}.')
    return settings


def _check_setting(name: str, value: Any, kind: type) -> None:
    """Settings come from files and command lines; what they say is what is allocated and computed."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is float:
        fits, expected = is_number and math.isfinite(value) and abs(value) <= _LARGEST_NUMBER, "a number"
    elif kind is int:
        largest = _LARGEST.get(name, _LARGEST_SEED)
        fits, expected = type(value) is int and 0 <= value <= largest, f"an integer from 0 to {largest}"
    else:
        fits, expected = isinstance(value, kind), f"a {kind.__name__}"
    if not fits:
        raise InputError(f"A corrector's {name} must be {expected}, got {value!r:.80}.")


# Wider or deeper correctors would cost more than encoding does.
_LARGEST = {"new_dim": 16_384, "hidden": 4_096, "depth": 4, "num_features": 4_096, "steps": 1_000}
_LARGEST_SEED = 2**63 - 1
_LARGEST_NUMBER = 1e30


__all__ = [
    "CORRECTORS",
    "LOADABLE",
    "AffineCorrector",
    "AffineMap",
    "Corrector",
    "Frames",
    "IdentityCorrector",
    "KernelRidgeCorrector",
    "MLPCorrector",
    "MeanShiftCorrector",
    "OrthogonalCorrector",
    "PullBack",
    "RidgeCorrector",
    "RidgeMLPCorrector",
    "configured",
    "make_corrector",
    "read_settings",
]
