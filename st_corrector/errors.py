"""The exceptions of this package: each says what was wrong, what was expected and how to fix it."""

from __future__ import annotations


class StCorrectorError(Exception):
    """Base class of every error that this package raises on purpose."""


class CorpusError(StCorrectorError, ValueError):
    """A corpus, its queries or its judgements cannot be read as given."""


class CacheError(StCorrectorError, ValueError):
    """An embedding cache is damaged, incomplete, or belongs to something else."""


class TeacherError(StCorrectorError, ValueError):
    """A teacher's scores on disk belong to something else, or are no scores."""


class CheckpointError(StCorrectorError, ValueError):
    """A checkpoint is damaged, incomplete, or belongs to something else."""


class StorageError(StCorrectorError, OSError):
    """A file cannot be written: the disk is full, read-only, or gone."""


class InputError(StCorrectorError, ValueError):
    """An argument, or a batch that reached the loss, is not what was expected."""


class NonFiniteError(InputError):
    """Something is NaN or infinite: embeddings, the loss, the corrector or gradients."""


class ProcessError(StCorrectorError, RuntimeError):
    """Another process has failed, or the processes no longer agree."""
