"""What a teacher is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from ..data.corpus import Corpus
from ..errors import InputError
from ..storage.fingerprint import digest_json


class Teacher(ABC):
    """Says how relevant targets are to queries.

    A query is known by its key (:func:`~st_corrector.data.query_keys.query_keys`), which the labels of
    :meth:`.Corpus.pairs` carry; a target by its corpus row.
    """

    everywhere = True
    """Whether it is cheap enough to be asked about every candidate of every query."""

    @abstractmethod
    def scores(self, queries: Tensor, rows: Tensor, wanted: Tensor | None = None) -> Tensor:
        """How relevant each target is to each query, in the teacher's own units: float32, ``(B, C)``, on the device of
        ``rows``; NaN where it cannot say, as for all targets of a query that it does not know.

        Args:
            queries: keys, int64, ``(B,)``.
            rows: corpus rows, ``(C,)``.
            wanted: the pairs that are asked for, bool, ``(B, C)``; of the others NaN may be returned. By default all.
        """

    @abstractmethod
    def knows(self, queries: Tensor) -> Tensor:
        """Which queries it has scores for: ``(B,)``, bool."""

    def best_rows(self, queries: Tensor, exclude: Tensor, k: int) -> Tensor | None:
        """The targets with the best scores for each query, ``(B, k)``, padded with −1; None where finding them is too
        expensive.

        Args:
            queries: keys of queries that it knows, ``(B,)``.
            exclude: rows that do not count for a query, ``(B, m)``, padded with −1.
            k: how many.
        """
        return None

    @property
    def identity(self) -> str:
        """What tells it from other teachers: a resumed run takes over what was found out about this one alone."""
        return repr(self)

    @property
    @abstractmethod
    def corpus_size(self) -> int:
        """Targets of the corpus that it has been made for."""

    def require_corpus(self, corpus: Corpus) -> None:
        """Refuse a corpus that it was not made for, as far as that is known.

        Raises:
            InputError: it was made for another one.
        """
        corpus.require_rows("The teacher", self.corpus_size)

    def describe(self) -> dict[str, Any]:
        """What it is, for records and cards."""
        return {"teacher": repr(self)}


class AverageTeacher(Teacher):
    """The mean of several teachers' scores, which must be in the same units, such as cosines. How far it can be trusted
    is told by how it ranks what the encoder finds.

    Args:
        teachers: at least one, of the same corpus.
        weights: of each, which are divided by their sum; by default they count alike.

    Raises:
        InputError: there is none, they are of corpora of different sizes, or weights do not fit.
    """

    def __init__(self, *teachers: Teacher, weights: tuple[float, ...] | None = None) -> None:
        weights = (1.0,) * len(teachers) if weights is None else tuple(weights)
        if not teachers or len(weights) != len(teachers) or min(weights) < 0 or not sum(weights):
            raise InputError(
                f"AverageTeacher takes at least one teacher and a weight for each, not negative and not all 0; got "
                f"{len(teachers)} and {weights}."
            )
        if len(sizes := {teacher.corpus_size for teacher in teachers}) > 1:
            raise InputError(f"The teachers are of corpora of different sizes: {sorted(sizes)} targets.")
        self.teachers = teachers
        self.everywhere = all(teacher.everywhere for teacher in teachers)
        self.weights = tuple(weight / sum(weights) for weight in weights)

    @property
    def corpus_size(self) -> int:
        return self.teachers[0].corpus_size

    def require_corpus(self, corpus: Corpus) -> None:
        for teacher in self.teachers:
            teacher.require_corpus(corpus)

    @property
    def identity(self) -> str:
        return digest_json([[teacher.identity for teacher in self.teachers], self.weights])

    def knows(self, queries: Tensor) -> Tensor:
        return torch.stack([teacher.knows(queries) for teacher in self.teachers]).all(0)

    def scores(self, queries: Tensor, rows: Tensor, wanted: Tensor | None = None) -> Tensor:
        each = [teacher.scores(queries, rows, wanted) for teacher in self.teachers]
        return torch.stack([weight * scores for weight, scores in zip(self.weights, each, strict=True)]).sum(0)

    def __repr__(self) -> str:
        return f"AverageTeacher({', '.join(map(repr, self.teachers))})"
