"""Train dense retrievers with hard negatives chosen at every step, from the whole corpus, by the model as it is now."""

from ._version import __version__
from .cache import EmbeddingCache
from .callbacks import RefreshCallback
from .corpus import Corpus
from .correctors import Corrector, IdentityCorrector, MLPCorrector, RidgeCorrector
from .errors import CacheError, CorpusError, InputError, StCorrectorError
from .evaluation import CorpusRetrievalEvaluator
from .loss import CorrectedMultipleNegativesLoss
from .search import CorrectedSearch

__all__ = [
    "CacheError",
    "Corpus",
    "CorpusError",
    "CorpusRetrievalEvaluator",
    "CorrectedMultipleNegativesLoss",
    "CorrectedSearch",
    "Corrector",
    "EmbeddingCache",
    "IdentityCorrector",
    "InputError",
    "MLPCorrector",
    "RefreshCallback",
    "RidgeCorrector",
    "StCorrectorError",
    "__version__",
]
