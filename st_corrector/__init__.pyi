from ._version import __version__
from .cache.embedding_cache import EmbeddingCache
from .carry_over.certificate import Certificate, certify
from .carry_over.fitting import fit_corrector
from .carry_over.mapping import IndexMap, upgrade_embeddings
from .carry_over.plan import ServePlan, serve_plan
from .carry_over.query_adapter import QueryAdapter
from .correctors import (
    AffineCorrector,
    AffineMap,
    Corrector,
    IdentityCorrector,
    KernelRidgeCorrector,
    MLPCorrector,
    RidgeCorrector,
    RidgeMLPCorrector,
)
from .data.corpus import Corpus
from .errors import (
    CacheError,
    CheckpointError,
    CorpusError,
    InputError,
    NonFiniteError,
    ProcessError,
    StCorrectorError,
    StorageError,
    TeacherError,
)
from .evaluation import CorpusRetrievalEvaluator
from .losses.cached_multiple_negatives import CachedCorrectedMultipleNegativesLoss
from .losses.corrected_corpus import CorrectedCorpus
from .losses.distillation import DistillationSettings
from .losses.multiple_negatives import CorrectedMultipleNegativesLoss
from .losses.settings import CorrectionSettings
from .mining import load_mined, mine_negatives, push_mined
from .negatives.filters import AnswerCheck, Check, CrossEncoderCheck, FalseNegativeFilter, TeacherCheck
from .negatives.settings import NegativeSettings
from .search.exact import CorrectedSearch
from .search.faiss_index import FaissIndex
from .search.shortlist import Shortlist, ShortlistSearch
from .teachers import AverageTeacher, CrossEncoderTeacher, EmbeddingTeacher, Teacher
from .training.arguments import CorrectorTrainingArguments
from .training.callbacks import FidelityCallback, RefreshCallback
from .training.trainer import CorrectorTrainer

__all__ = [
    "AffineCorrector",
    "AffineMap",
    "AnswerCheck",
    "AverageTeacher",
    "CacheError",
    "CachedCorrectedMultipleNegativesLoss",
    "Certificate",
    "Check",
    "CheckpointError",
    "Corpus",
    "CorpusError",
    "CorpusRetrievalEvaluator",
    "CorrectedCorpus",
    "CorrectedMultipleNegativesLoss",
    "CorrectedSearch",
    "CorrectionSettings",
    "Corrector",
    "CorrectorTrainer",
    "CorrectorTrainingArguments",
    "CrossEncoderCheck",
    "CrossEncoderTeacher",
    "DistillationSettings",
    "EmbeddingCache",
    "EmbeddingTeacher",
    "FaissIndex",
    "FalseNegativeFilter",
    "FidelityCallback",
    "IdentityCorrector",
    "IndexMap",
    "InputError",
    "KernelRidgeCorrector",
    "MLPCorrector",
    "NegativeSettings",
    "NonFiniteError",
    "ProcessError",
    "QueryAdapter",
    "RefreshCallback",
    "RidgeCorrector",
    "RidgeMLPCorrector",
    "ServePlan",
    "Shortlist",
    "ShortlistSearch",
    "StCorrectorError",
    "StorageError",
    "Teacher",
    "TeacherCheck",
    "TeacherError",
    "__version__",
    "certify",
    "fit_corrector",
    "load_mined",
    "mine_negatives",
    "push_mined",
    "serve_plan",
    "upgrade_embeddings",
]
