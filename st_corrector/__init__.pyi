from ._version import __version__
from .cache import EmbeddingCache
from .cached_loss import CachedCorrectedMultipleNegativesLoss
from .callbacks import FidelityCallback, RefreshCallback
from .carry_over import CarryOverEstimate, estimate_carry_over, upgrade_embeddings
from .corpus import Corpus
from .correctors import (
    AffineCorrector,
    AffineMap,
    Corrector,
    IdentityCorrector,
    KernelRidgeCorrector,
    MeanShiftCorrector,
    MLPCorrector,
    OrthogonalCorrector,
    RidgeCorrector,
    RidgeMLPCorrector,
)
from .errors import (
    CacheError,
    CheckpointError,
    CorpusError,
    InputError,
    NonFiniteError,
    ProcessError,
    StCorrectorError,
    StorageError,
)
from .evaluation import CorpusRetrievalEvaluator
from .filters import AnswerCheck, Check, CrossEncoderCheck, FalseNegativeFilter
from .fitting import fit_corrector
from .index import FaissIndex
from .loss import CorrectedMultipleNegativesLoss
from .search import CorrectedSearch
from .shortlist import Shortlist, ShortlistSearch
from .trainer import CorrectorTrainer
from .training_args import CorrectorTrainingArguments

__all__ = [
    "AffineCorrector",
    "AffineMap",
    "AnswerCheck",
    "CacheError",
    "CachedCorrectedMultipleNegativesLoss",
    "CarryOverEstimate",
    "Check",
    "CheckpointError",
    "Corpus",
    "CorpusError",
    "CorpusRetrievalEvaluator",
    "CorrectedMultipleNegativesLoss",
    "CorrectedSearch",
    "Corrector",
    "CorrectorTrainer",
    "CorrectorTrainingArguments",
    "CrossEncoderCheck",
    "EmbeddingCache",
    "FaissIndex",
    "FalseNegativeFilter",
    "FidelityCallback",
    "IdentityCorrector",
    "InputError",
    "KernelRidgeCorrector",
    "MLPCorrector",
    "MeanShiftCorrector",
    "NonFiniteError",
    "OrthogonalCorrector",
    "ProcessError",
    "RefreshCallback",
    "RidgeCorrector",
    "RidgeMLPCorrector",
    "Shortlist",
    "ShortlistSearch",
    "StCorrectorError",
    "StorageError",
    "__version__",
    "estimate_carry_over",
    "fit_corrector",
    "upgrade_embeddings",
]
