"""Which candidates may not be negatives: pure functions over corpus rows."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.corpus import Corpus
from ..data.qrels import Qrels
from ..data.query_keys import UNKNOWN, is_own
from ..data.text import contains_answer
from ..errors import InputError
from ..search.topk import NO_ROW
from ..teachers import CrossEncoderTeacher, Teacher


def known_positives(
    corpus: Corpus, qrels: Qrels | None, labels: Sequence[int], keys: Sequence[int]
) -> list[np.ndarray]:
    """For each query of a batch, the rows that must never be its negatives.

    These are its positive (``labels``), everything else that is judged relevant to it or to a query with the same text,
    every target with its own text (:meth:`Qrels.co_positives`), and every target with the same text as one of these
    (:meth:`Corpus.duplicates_of`). Of a target's own question they are the targets that share it, that are judged
    relevant to a query with its text, or that have its text.

    Args:
        qrels: the judgements of the training split, or None where the labels are all that is known.
        labels: corpus row of each query's positive, ``(B,)``.
        keys: of the queries, ``(B,)``.

    Returns:
        ``B`` arrays of rows, ascending.

    Raises:
        CorpusError: a key is that of an own question that the corpus does not know.
    """
    judged = [np.array([row]) for row in labels] if qrels is None else qrels.co_positives(labels, keys)
    for n, (row, key) in enumerate(zip(labels, keys, strict=True)):
        if is_own(key):
            asked = np.empty(0, dtype=np.int64) if qrels is None else qrels.rows_asked_by(key)
            judged[n] = np.concatenate([[row], corpus.relevant_to_own(key), asked])
    return [np.unique(np.concatenate([corpus.duplicates_of(row) for row in rows])) for rows in judged]


def pad_rows(rows: Sequence[np.ndarray]) -> Tensor:
    """Row lists of unequal length as one ``(B, m)`` tensor, padded with −1 (which is no row)."""
    width = max((len(each) for each in rows), default=0)
    padded = np.full((len(rows), width), -1, dtype=np.int64)
    for target, each in zip(padded, rows, strict=True):
        target[: len(each)] = each
    return torch.from_numpy(padded)


def is_in(candidates: Tensor, rows: Tensor) -> Tensor:
    """Whether each of ``candidates`` ``(M,)`` is among each query's ``rows`` ``(B, m)``, padded with −1: ``(B, M)``."""
    if rows.shape[1] == 0:
        return torch.zeros(len(rows), len(candidates), dtype=torch.bool, device=candidates.device)
    # Binary search, since one comparison of everything with everything would need B × M × m.
    rows = rows.sort(dim=1).values
    wanted = candidates.expand(len(rows), -1).contiguous()
    position = torch.searchsorted(rows, wanted).clamp_(max=rows.shape[1] - 1)
    return rows.gather(1, position) == wanted


def repeats_earlier(candidates: Tensor) -> Tensor:
    """Whether each of ``candidates`` ``(M,)`` equals an earlier one: ``(M,)``."""
    position = torch.arange(len(candidates), device=candidates.device)
    _, value = candidates.unique(return_inverse=True)
    first = position.new_full((len(candidates),), len(candidates)).scatter_reduce(0, value, position, "amin")
    return first[value] != position


class Check(ABC):
    """A rule on false negatives that looks at texts instead of embeddings, and so at selected candidates only."""

    name: str
    """Under which its removals are logged."""
    split: str | None = None
    """The split whose queries it knows, if it knows queries."""
    everywhere: bool
    """Whether it is cheap enough to be asked about every candidate of every query in the softmax, too."""

    @abstractmethod
    def __call__(self, labels: Tensor, rows: Tensor, queries: Tensor) -> Tensor:
        """Which candidates are no negatives of the query: ``(B, m)``, bool.

        Args:
            labels: corpus row of each query's positive, ``(B,)``.
            rows: corpus rows, ``(B, m)``; the answer for −1 is ignored.
            queries: each query's key (:func:`.query_keys`), ``(B,)``; −1 where the label does not tell it. Then what is
                a false negative of any query of the split with this positive is one.
        """

    @property
    def identity(self) -> str:
        """What tells it from other checks: what was mined with one is not taken for what another would give."""
        return repr(self)

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class AnswerCheck(Check):
    """A target that contains an answer of the query is no negative: for question answering data.

    Args:
        corpus: its targets' texts, titles left out, are searched for the answers as consecutive tokens
            (:func:`~st_corrector.data.text.contains_answer`).
        split: the split that is trained on. Queries without answers lose no candidates.

    Raises:
        InputError: no query of the split has answers.
    """

    name = "answer"
    everywhere = True

    def __init__(self, corpus: Corpus, split: str = "train") -> None:
        self.corpus, self.split, self.qrels = corpus, split, corpus.qrels(split)
        self._answers: list[list[str]] = self.qrels.queries["answers"][:]
        if not any(self._answers):
            raise InputError(f"No query of split {split!r} has answers: they are the 'answers' of queries.jsonl.")

    def __call__(self, labels: Tensor, rows: Tensor, queries: Tensor) -> Tensor:
        distinct = rows[rows >= 0].unique()
        found = distinct.cpu().numpy()
        texts = dict(zip(found.tolist(), self.corpus.targets[found]["text"] if len(found) else [], strict=True))
        result = torch.zeros(rows.shape, dtype=torch.bool)
        pairs = zip(labels.tolist(), queries.tolist(), rows.tolist(), strict=True)
        for query, (label, key, candidates) in enumerate(pairs):
            answers = [answer for n in self.qrels.asked(label, key) for answer in self._answers[n]]
            if answers:
                found_in = [row >= 0 and contains_answer(texts[row], answers) for row in candidates]
                result[query] = torch.tensor(found_in, dtype=torch.bool)
        return result.to(rows.device)


class TeacherCheck(Check):
    """A target that a teacher finds more relevant than the positive is no negative: the rule of GISTEmbed (`Solatorio
    2024 <https://arxiv.org/abs/2402.16829>`_), over all targets that were selected. Queries that the teacher does not
    know lose no candidates.

    Args:
        teacher: an :class:`~st_corrector.EmbeddingTeacher`, for example. One that is expensive is asked about each
            query's own candidates alone, twice as many as the negatives that are wanted.
        margin: a negative must score at least so much less than the positive, in the teacher's own units.
        qrels: of the split that is trained on (``corpus.qrels("train")``), for labels that are rows alone: by them all
            queries are asked about that share a positive. Without, such queries lose no candidates.
    """

    name = "teacher"

    def __init__(self, teacher: Teacher, margin: float = 0.0, qrels: Qrels | None = None) -> None:
        self.teacher, self.margin, self.qrels, self.everywhere = teacher, margin, qrels, teacher.everywhere

    def __call__(self, labels: Tensor, rows: Tensor, queries: Tensor) -> Tensor:
        found = self._more_relevant(labels, rows, queries)
        if self.qrels is None:
            return found
        for query in (queries == UNKNOWN).nonzero().flatten().tolist():
            keys = torch.from_numpy(np.unique(self.qrels.keys[self.qrels.queries_of(int(labels[query]))]))
            label, candidates = (values[query].expand(len(keys), *values.shape[1:]) for values in (labels, rows))
            found[query] |= self._more_relevant(label, candidates, keys.to(queries.device)).any(0)
        return found

    def _more_relevant(self, labels: Tensor, rows: Tensor, queries: Tensor) -> Tensor:
        asked = torch.cat([labels[:, None], rows], dim=1)
        columns, place = asked.unique(return_inverse=True)
        wanted = torch.zeros(len(labels), len(columns), dtype=torch.bool, device=rows.device)
        wanted.scatter_(1, place, asked != NO_ROW)
        scores = self.teacher.scores(queries, columns.clamp(min=0), wanted).gather(1, place)
        return (scores[:, 1:] > scores[:, :1] - self.margin) & (rows != NO_ROW)

    @property
    def identity(self) -> str:
        return f"{self.name}, {self.teacher.identity}, {self.margin}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.teacher!r}, margin={self.margin})"


class CrossEncoderCheck(TeacherCheck):
    """A target that a cross-encoder finds nearly as relevant as the positive is no negative: :class:`TeacherCheck` with
    a :class:`~st_corrector.CrossEncoderTeacher`, which remembers what it has said.

    Args:
        corpus: its targets are read, titles and all.
        cross_encoder: a :class:`~sentence_transformers.CrossEncoder`, or anything with its ``predict``.
        split: the split that is trained on.
        margin: a negative must score at least so much less than the positive, in the cross-encoder's own units.
        batch_size: pairs in one forward pass.
        path: the file of its scores; by default they are kept in memory.
        identity: what identifies the model, for one that is no :class:`torch.nn.Module`.
    """

    name = "cross_encoder"

    def __init__(
        self,
        corpus: Corpus,
        cross_encoder: Any,
        split: str = "train",
        margin: float = 0.0,
        batch_size: int = 64,
        path: str | os.PathLike[str] | None = None,
        identity: str | None = None,
    ) -> None:
        pairs = corpus.pairs(split)
        teacher = CrossEncoderTeacher(cross_encoder, corpus, path, pairs, batch_size=batch_size, identity=identity)
        super().__init__(teacher, margin, corpus.qrels(split))
        self.split = split


@dataclass(frozen=True)
class FalseNegativeFilter:
    """Which targets are so similar to a query that they are taken for unjudged positives, not for negatives.

    All rules that are set hold. The names are those of
    :func:`sentence_transformers.util.mine_hard_negatives`; the margins are the positive-aware rules of NV-Retriever
    (`Moreira et al. 2024 <https://arxiv.org/abs/2407.15831>`_). Scores are those of the loss's similarity function,
    without its scale. How many candidates each rule removes is logged.

    Args:
        max_score: no negative may score higher.
        absolute_margin: a negative must score at least this much less than the query's positive.
        relative_margin: a negative's score must be at most ``(1 − relative_margin)`` times the positive's, e.g. 0.05.
        range_min: leave out this many of the hardest targets that scores and margins allow.
        range_max: take negatives from this many of the hardest targets that scores and margins allow; with a random
            sampler they are drawn from the ranks between ``range_min`` and ``range_max``.
        checks: rules that look at texts, asked about what the others leave: :class:`AnswerCheck`,
            :class:`CrossEncoderCheck`. Twice as many targets as wanted are selected, so that enough remain (or as many
            as are verified, or as ``range_max`` allows).

    Raises:
        InputError: a margin or ``range_min`` is negative, a relative margin is no share, or ``checks`` is no sequence
            of checks.
    """

    max_score: float | None = field(default=None, metadata={"help": "No negative may score higher."})
    absolute_margin: float | None = field(
        default=None, metadata={"help": "Negatives score at least this much less than the positive."}
    )
    relative_margin: float | None = field(
        default=None, metadata={"help": "Negatives score at most (1 - relative_margin) times what the positive does."}
    )
    range_min: int = field(default=0, metadata={"help": "Leave out this many of the hardest targets."})
    range_max: int | None = field(
        default=None, metadata={"help": "Take negatives from this many of the hardest targets."}
    )
    checks: tuple[Check, ...] = ()

    def __post_init__(self) -> None:
        for name in ("absolute_margin", "relative_margin", "range_min"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise InputError(f"{name} must not be negative, got {value}.")
        if self.relative_margin is not None and self.relative_margin >= 1:
            raise InputError(
                f"relative_margin is a share of the positive's score, e.g. 0.05, got {self.relative_margin}."
            )
        if not isinstance(self.checks, (tuple, list)) or not all(isinstance(check, Check) for check in self.checks):
            raise InputError(f"checks must be a tuple of checks, e.g. (AnswerCheck(corpus),), got {self.checks!r}.")

    def ceiling(self, positive_scores: Tensor) -> Tensor:
        """The highest score that a negative of each query may have, given its positive's: ``(B,) → (B,)``."""
        return self._ceilings(positive_scores).amin(0)

    def by_rule(self, positive_scores: Tensor, above: Tensor) -> dict[str, int]:
        """Removals by the rule that made them, the strictest for each query.

        Args:
            positive_scores: ``(B,)``.
            above: how many candidates of each query were above its ceiling, ``(B,)``.
        """
        strictest = self._ceilings(positive_scores).argmin(0)
        rules = ("none", "max_score", "absolute_margin", "relative_margin")
        return {
            rule: int(above[strictest == n].sum())
            for n, rule in enumerate(rules)
            if n and getattr(self, rule) is not None
        }

    def _ceilings(self, positive_scores: Tensor) -> Tensor:
        """By no rule, ``max_score``, ``absolute_margin`` and ``relative_margin``: ``(B,) → (4, B)``."""
        ceilings = positive_scores.new_full((4, len(positive_scores)), torch.inf)
        if self.max_score is not None:
            ceilings[1] = self.max_score
        if self.absolute_margin is not None:
            ceilings[2] = positive_scores - self.absolute_margin
        if self.relative_margin is not None:
            # A share of the absolute value, so that the ceiling lies below a negative score too.
            ceilings[3] = positive_scores - self.relative_margin * positive_scores.abs()
        return ceilings
