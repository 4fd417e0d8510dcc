"""The correctors by name."""

from __future__ import annotations

from typing import Any

from ..errors import InputError
from .affine_map import AffineMap
from .base import Corrector
from .identity import IdentityCorrector
from .kernel import KernelRidgeCorrector
from .mlp import MLPCorrector
from .ridge import RidgeCorrector
from .ridge_mlp import RidgeMLPCorrector
from .settings import configured

CORRECTORS: dict[str, type[Corrector]] = {
    cls.name: cls
    for cls in (
        IdentityCorrector,
        RidgeCorrector,
        KernelRidgeCorrector,
        MLPCorrector,
        RidgeMLPCorrector,
    )
}
LOADABLE: dict[str, type[Corrector]] = {**CORRECTORS, AffineMap.name: AffineMap}
"""What can be saved and loaded: those, and maps to another width, which training cannot use."""


def make_corrector(corrector: str | Corrector, dim: int, /, **settings: Any) -> Corrector:
    """The corrector of that name, or the given one if it fits.

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
