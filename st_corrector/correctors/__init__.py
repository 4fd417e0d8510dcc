"""Correctors: how stale embeddings are mapped to what the encoder would say now. One file each."""

from __future__ import annotations

from typing import Any

from ..errors import InputError
from .affine import AffineCorrector
from .base import Corrector, PullBack
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


def make_corrector(corrector: str | Corrector, dim: int, **settings: Any) -> Corrector:
    """A corrector by its name, or the given one if it fits.

    Raises:
        InputError: the name is unknown, or the corrector is for another dimension.
    """
    if isinstance(corrector, Corrector):
        if corrector.dim != dim:
            raise InputError(f"The corrector is for dimension {corrector.dim}, the embeddings have {dim}.")
        return corrector
    if corrector not in CORRECTORS:
        raise InputError(f"corrector {corrector!r} is not one of {', '.join(CORRECTORS)}, nor a Corrector.")
    return CORRECTORS[corrector](dim, **settings)


__all__ = [
    "CORRECTORS",
    "AffineCorrector",
    "Corrector",
    "IdentityCorrector",
    "KernelRidgeCorrector",
    "MLPCorrector",
    "MeanShiftCorrector",
    "OrthogonalCorrector",
    "PullBack",
    "RidgeCorrector",
    "RidgeMLPCorrector",
    "make_corrector",
]
