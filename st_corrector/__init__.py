"""Train dense retrievers with hard negatives chosen at every step, from the whole corpus, by the model as it is now."""

from ._version import __version__
from .cache import EmbeddingCache
from .callbacks import RefreshCallback
from .corpus import Corpus
from .correctors import (
    AffineCorrector,
    Corrector,
    IdentityCorrector,
    KernelRidgeCorrector,
    MeanShiftCorrector,
    MLPCorrector,
    OrthogonalCorrector,
    RidgeCorrector,
    RidgeMLPCorrector,
)
from .errors import CacheError, CorpusError, InputError, StCorrectorError
from .evaluation import CorpusRetrievalEvaluator
from .filters import FalseNegativeFilter
from .loss import CorrectedMultipleNegativesLoss
from .search import CorrectedSearch

__all__ = [
    "AffineCorrector",
    "CacheError",
    "Corpus",
    "CorpusError",
    "CorpusRetrievalEvaluator",
    "CorrectedMultipleNegativesLoss",
    "CorrectedSearch",
    "Corrector",
    "EmbeddingCache",
    "FalseNegativeFilter",
    "IdentityCorrector",
    "InputError",
    "KernelRidgeCorrector",
    "MLPCorrector",
    "MeanShiftCorrector",
    "OrthogonalCorrector",
    "RefreshCallback",
    "RidgeCorrector",
    "RidgeMLPCorrector",
    "StCorrectorError",
    "__version__",
]
