"""A corrector's settings, from files and command lines: read and checked before use."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import InputError

if TYPE_CHECKING:
    from .base import Corrector


def configured(kind: type[Corrector], dim: int, settings: Mapping[str, Any]) -> Corrector:
    """A corrector of that kind with checked settings, which may come from a file.

    Raises:
        InputError: a setting is unknown, missing or out of range.
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
        InputError: it is not a JSON object.
    """
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError, TypeError):
        settings = None
    if not isinstance(settings, dict):
        raise InputError(f'A corrector\'s settings must be a JSON object such as {{"hidden": 128}}, got {text!r:.200}.')
    return settings


def _check_setting(name: str, value: Any, kind: type) -> None:
    """Settings come from files and command lines, and decide what is allocated and computed."""
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


# Wider or deeper correctors would cost more than encoding.
_LARGEST = {"new_dim": 16_384, "hidden": 4_096, "depth": 4, "num_features": 4_096, "steps": 1_000}
_LARGEST_SEED = 2**63 - 1
_LARGEST_NUMBER = 1e30
