"""Correctors map stale embeddings to what the encoder would return now. One file each.

Tensors in, tensors out: nothing here knows a corpus or a cache. A corrector learns a step completely or not at all.
"""

from .affine import AffineCorrector
from .affine_map import AffineMap
from .base import Corrector
from .identity import IdentityCorrector
from .kernel import KernelRidgeCorrector
from .mlp import MLPCorrector
from .registry import CORRECTORS, LOADABLE, make_corrector
from .ridge import RidgeCorrector
from .ridge_mlp import RidgeMLPCorrector
from .settings import configured, read_settings
from .types import Frames, PullBack

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
    "PullBack",
    "RidgeCorrector",
    "RidgeMLPCorrector",
    "configured",
    "make_corrector",
    "read_settings",
]
