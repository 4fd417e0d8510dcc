"""Which candidates may not be negatives: pure functions over corpus rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import ChainMap
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.corpus import Corpus
from ..data.qrels import Qrels
from ..data.text import contains_answer
from ..errors import InputError


def known_positives(corpus: Corpus, qrels: Qrels | None, labels: Sequence[int]) -> list[np.ndarray]:
    """For each query of a batch, the rows that must never be its negatives.

    These are its positive (``labels``), everything else that is judged relevant to it or to a query with the same text,
    every target with its own text (:meth:`Qrels.co_positives`), and every target with the same text as one of these
    (:meth:`Corpus.duplicates_of`).

    Args:
        qrels: the judgements of the training split, or None where the labels are all that is known.
        labels: corpus row of each query's positive, ``(B,)``.

    Returns:
        ``B`` arrays of rows, ascending.
    """
    judged = [np.array([row]) for row in labels] if qrels is None else qrels.co_positives(labels)
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
    def __call__(self, labels: Tensor, rows: Tensor) -> Tensor:
        """Which candidates are no negatives of the query: ``(B, m)``, bool.

        Args:
            labels: corpus row of each query's positive, ``(B,)``: by it a query is known. Where several queries of
                the split share it, what is a false negative of any of them is one.
            rows: corpus rows, ``(B, m)``; the answer for −1 is ignored.
        """

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

    def __call__(self, labels: Tensor, rows: Tensor) -> Tensor:
        distinct = rows[rows >= 0].unique()
        found = distinct.cpu().numpy()
        texts = dict(zip(found.tolist(), self.corpus.targets[found]["text"] if len(found) else [], strict=True))
        result = torch.zeros(rows.shape, dtype=torch.bool)
        for query, (label, candidates) in enumerate(zip(labels.tolist(), rows.tolist(), strict=True)):
            answers = [answer for n in self.qrels.asking_for(label) for answer in self._answers[n]]
            if answers:
                found_in = [row >= 0 and contains_answer(texts[row], answers) for row in candidates]
                result[query] = torch.tensor(found_in, dtype=torch.bool)
        return result.to(rows.device)


class CrossEncoderCheck(Check):
    """A target that a cross-encoder finds nearly as relevant as the positive is no negative.

    It reads every candidate of every step, twice as many as the negatives that are wanted (or all that are to be
    verified), together with each query that has this positive: expensive, as is everything that reads texts.

    Args:
        corpus: its targets are read, titles and all.
        cross_encoder: a :class:`~sentence_transformers.CrossEncoder`, or anything with its ``predict``.
        split: the split that is trained on.
        margin: a negative must score at least so much less than the positive, in the cross-encoder's own units.
        batch_size: pairs in one forward pass.
    """

    name = "cross_encoder"
    everywhere = False

    def __init__(
        self, corpus: Corpus, cross_encoder: Any, split: str = "train", margin: float = 0.0, batch_size: int = 64
    ) -> None:
        self.corpus, self.split, self.qrels = corpus, split, corpus.qrels(split)
        self.cross_encoder = cross_encoder
        self.margin, self.batch_size = margin, batch_size
        self._queries: list[str] = self.qrels.queries["text"][:]
        self._scores: dict[tuple[int, int], float] = {}  # of positives, which come again every epoch

    def __call__(self, labels: Tensor, rows: Tensor) -> Tensor:
        result = torch.zeros(rows.shape, dtype=torch.bool)
        asked = [
            (position, query, row)
            for position, label in enumerate(labels.tolist())
            for query in self.qrels.queries_of(label)
            for row in {label, *rows[position].tolist()}
            if row >= 0
        ]
        new = sorted({(query, row) for _, query, row in asked if (query, row) not in self._scores})
        # Looked up in both: the positives of a large training set are not copied at every step.
        scores = ChainMap(dict(zip(new, self._predict(new), strict=True)), self._scores)
        labels_of = labels.tolist()
        positives = {(query, labels_of[position]) for position, query, _ in asked}
        self._scores.update({pair: scores[pair] for pair in positives})
        for position, query, row in asked:
            if scores[query, row] > scores[query, labels_of[position]] - self.margin:
                result[position] |= (rows[position] == row).cpu()
        return result.to(rows.device)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(margin={self.margin})"

    def _predict(self, pairs: list[tuple[int, int]]) -> list[float]:
        if not pairs:
            return []
        texts = self.corpus.texts([row for _, row in pairs])
        inputs = [(self._queries[query], text) for (query, _), text in zip(pairs, texts, strict=True)]
        predicted = self.cross_encoder.predict(inputs, batch_size=self.batch_size, show_progress_bar=False)
        return np.asarray(predicted, dtype=np.float64).reshape(len(pairs)).tolist()


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
