"""How much a teacher's labels count: as much as it ranks held-out training questions better than the encoder does."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..data.corpus import Corpus
from ..data.qrels import Qrels
from ..data.query_keys import UNKNOWN
from ..errors import InputError
from ..negatives.filters import known_positives, pad_rows
from ..runtime.distributed import Processes
from ..search.topk import NO_ROW
from ..teachers import Teacher
from .corrected_corpus import CorrectedCorpus

logger = logging.getLogger(__name__)
_HELD_OUT = 1 / 32  # of the training questions
_MOST, _FEWEST = 256, 32  # held-out questions
_MOST_HELD_OUT = 1 / 6  # of the training questions; where the fewest are more, none are kept out
_FIRST = 20  # steps until it is measured for the second time; then after twice as many, and so on
_FULL = 0.20  # MRR by which a teacher must be ahead to count fully
_MOST_WEIGHT = 4.0  # of a teacher that counts fully: the hard label is a fifth then
_SOFTENED = 0.5  # of the likeliest scale is taken: what else is relevant is told by softer labels
_CANDIDATES = 16  # targets that the encoder confuses with each positive, which are encoded to compare
RANKED = 10


class HeldOut(NamedTuple):
    """Training questions that are kept out of training, to compare teacher and encoder by. Of fewer than 192 none can
    be spared: then all are compared by and trained on, which favours the encoder.

    Args:
        texts: of the questions.
        keys: by what they are known, ``(n,)``.
        positives: corpus row of one relevant target each, ``(n,)``.
        exclude: rows relevant to each, ``(n, m)``, padded with −1.
        kept_out: keys of these questions and of all that differ from one only in case, white space or Unicode form.
        answering: rows relevant to one of them.
    """

    texts: list[str]
    keys: Tensor
    positives: Tensor
    exclude: Tensor
    kept_out: Tensor
    answering: Tensor

    @classmethod
    def choose(cls, corpus: Corpus, qrels: Qrels, teacher: Teacher) -> HeldOut:
        """One of 32 questions that the teacher knows, at least 32 and at most 256, by their keys: the same in every
        process and run.

        Raises:
            InputError: it knows too few.
        """
        known = teacher.knows(torch.from_numpy(qrels.keys)).numpy()
        _, first = np.unique(qrels.keys, return_index=True)
        positions = first[known[first]]
        if len(positions) < _FEWEST:
            raise InputError(
                f"{teacher!r} knows {len(positions)} questions of the split that is trained on, and it takes {_FEWEST} "
                "to find out how far it can be trusted: build it with corpus.pairs(split), or set teacher_weight and "
                "teacher_scale."
            )
        can_spare = len(positions) * _MOST_HELD_OUT >= _FEWEST
        wanted = int(np.clip(len(positions) * _HELD_OUT, _FEWEST, _MOST)) if can_spare else len(positions)
        # Keys are digests, so that the smallest are a random choice.
        positions = positions[:wanted]
        rows = [int(qrels.rows_of(position)[0]) for position in positions.tolist()]
        exclude = known_positives(corpus, qrels, rows, qrels.keys[positions].tolist())
        rows_of_none = np.empty(0, dtype=np.int64)
        same = qrels.with_same_text(positions) if can_spare else positions[:0]
        return cls(
            qrels.queries[positions]["text"],
            torch.from_numpy(qrels.keys[positions]),
            torch.tensor(rows, dtype=torch.int64),
            pad_rows(exclude),
            torch.from_numpy(np.unique(qrels.keys[same])),
            torch.from_numpy(np.unique(np.concatenate([rows_of_none, *(qrels.rows_of(query) for query in same)]))),
        )

    def includes(self, keys: Tensor, rows: Tensor) -> Tensor:
        """Which queries nothing may be learnt of: ``(b,), (b,) → (b,)``, bool.

        Args:
            keys: of the queries; one of −1 may be any query that its positive answers.
            rows: their positives' corpus rows.
        """
        maybe = (keys == UNKNOWN) & torch.isin(rows, self.answering.to(rows.device))
        return torch.isin(keys, self.kept_out.to(keys.device)) | maybe


class Judgement(NamedTuple):
    """What a comparison has found.

    Args:
        teacher_mrr, encoder_mrr: mean reciprocal rank, cut off at 10, of the held-out questions' positives; the
            teacher's among all targets, if it knows its best ones, the encoder's among those that it confuses with the
            positive, by embeddings as they are now.
        scale: τ, half of the one by which the teacher's softmax is most likely to name the positives.
        weight: α.
    """

    teacher_mrr: float
    encoder_mrr: float
    scale: float
    weight: float

    @property
    def mrr(self) -> dict[str, float]:
        """Both, by whose they are."""
        return {"teacher": self.teacher_mrr, "encoder": self.encoder_mrr}


class TeacherTrust:
    """Finds out how much a teacher is to be trusted, as the run goes: it is compared with the encoder on training
    questions that are kept out of training, before the first step and then after 20, 40, 80 … steps. A teacher that
    ranks their positives no better than the encoder does has nothing to teach. Its weight never rises: it is the
    encoder that learns.

    A comparison encodes the held-out questions, their positives and 16 targets for each, at most 4,352 in all, without
    gradient (:attr:`.CorrectedCorpus.targets_reencoded` counts them).

    Args:
        teacher: whose labels are weighed.
        corpus: the targets.
        qrels: of the split that is trained on.

    Raises:
        InputError: the teacher knows too few questions of the split to be judged by.
    """

    def __init__(self, teacher: Teacher, corpus: Corpus, qrels: Qrels) -> None:
        self.teacher = teacher
        self.held_out = HeldOut.choose(corpus, qrels, teacher)
        self._questions = len(qrels)
        self.history: list[tuple[int, Judgement]] = []
        """All comparisons, with the steps before which they were made."""

    @property
    def judgement(self) -> Judgement | None:
        """The last comparison."""
        return self.history[-1][1] if self.history else None

    def update(self, corrected: CorrectedCorpus, encode_queries: Callable[[list[str]], Tensor]) -> Judgement:
        """The comparison that holds at this step, made now if its time has come; in step in all processes."""
        if not self.history or corrected.steps >= max(_FIRST, 2 * self.history[-1][0]):
            # The search takes the same queries in all processes, whose GPUs may round differently.
            queries = corrected.processes.broadcast(encode_queries(self.held_out.texts))
            found = self._compare(corrected, queries)
            if self.history:
                # Early steps may disturb an encoder; that makes no teacher better.
                found = found._replace(weight=min(found.weight, self.history[-1][1].weight))
            self.history.append((corrected.steps, found))
            log = logger.warning if found.teacher_mrr <= found.encoder_mrr else logger.info
            log(
                "On %d of %d training questions%s the teacher's MRR@10 is %.3f, the encoder's after "
                "%d steps %.3f: the teacher's labels count with weight %.2f%s.",
                len(self.held_out.keys),
                self._questions,
                ", which are held out," if len(self.held_out.kept_out) else "",
                found.teacher_mrr,
                corrected.steps,
                found.encoder_mrr,
                found.weight,
                "" if found.weight else ", which is not at all",
            )
        return self.history[-1][1]

    def load_history(self, history: list[tuple[int, Judgement]]) -> None:
        """Take over the comparisons of a run that goes on."""
        self.history = history

    def _compare(self, corrected: CorrectedCorpus, queries: Tensor) -> Judgement:
        positives, exclude = (each.to(queries.device) for each in (self.held_out.positives, self.held_out.exclude))
        found = corrected.hardest(queries, _CANDIDATES, exclude)
        # The positive, and what the encoder confuses it with.
        rows = torch.cat([positives[:, None], found.rows], dim=1)
        columns, place = rows.clamp(min=0).unique(return_inverse=True)
        of_encoder = (queries @ corrected.encode_together(columns.cpu().numpy()).to(queries.device).T).gather(1, place)
        corrected.targets_reencoded += 0 if corrected.is_fixed else len(columns)
        of_encoder = of_encoder.masked_fill(rows == NO_ROW, -torch.inf)
        of_teacher, best = self._ask(corrected.processes, rows, exclude)
        if best is None:
            best = of_teacher[:, 1:]
            # It can only rank again what the encoder has found: elsewhere it has found nothing either.
            missed = (of_encoder[:, 1:] > of_encoder[:, :1]).sum(1) >= _CANDIDATES
            best = best.masked_fill(missed[:, None], torch.inf)
        by_teacher = reciprocal_ranks(of_teacher[:, 0], best)
        by_encoder = reciprocal_ranks(of_encoder[:, 0], of_encoder[:, 1:])
        # By how much at least, as far as so few questions can tell: one standard error less than the mean.
        difference = by_teacher - by_encoder
        ahead = float(difference.mean() - difference.std() / len(difference) ** 0.5)
        # Squared, so that a teacher that is hardly ahead hardly counts.
        weight = _MOST_WEIGHT * min(1.0, max(0.0, ahead / _FULL)) ** 2
        scale = _SOFTENED * likeliest_scale(of_teacher)
        return Judgement(float(by_teacher.mean()), float(by_encoder.mean()), scale, weight)

    def _ask(self, processes: Processes, rows: Tensor, exclude: Tensor) -> tuple[Tensor, Tensor | None]:
        """The teacher's scores of ``rows``, ``(n, C)``, and its best ones; each process asks for a share of the
        questions, and all get the same.
        """
        mine, counts = processes.share(len(rows)), [len(rows[each]) for each in processes.shares(len(rows))]
        keys, theirs = self.held_out.keys.to(rows.device)[mine], rows[mine]
        columns, place = theirs.unique(return_inverse=True)
        wanted = torch.zeros(len(keys), len(columns), dtype=torch.bool, device=keys.device).scatter_(1, place, True)
        wanted &= columns != NO_ROW
        with processes.together("Judging the teacher"):
            scores = self.teacher.scores(keys, columns.clamp(min=0), wanted).gather(1, place)
            best = self.teacher.best_scores(keys, exclude[mine], RANKED)
        scores = scores.masked_fill(theirs == NO_ROW, -torch.inf)
        return processes.gather(scores, counts), None if best is None else processes.gather(best, counts)


def likeliest_scale(scores: Tensor) -> float:
    """The τ by which ``softmax(τ · scores)`` gives the first column most on the average, in logarithms: a temperature
    by maximum likelihood (`Guo et al. 2017 <https://arxiv.org/abs/1706.04599>`_); 1 where nothing is comparable.

    Args:
        scores: of positive and others, ``(n, C)``, −∞ for none, NaN for unknown.
    """
    scores = scores[~scores[:, 0].isnan()].double().nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    scores = scores[(scores[:, 1:] > -torch.inf).any(1)]
    if not len(scores):
        return 1.0
    gaps = (scores[:, :1] - scores[:, 1:]).abs()
    spread = float(gaps[gaps.isfinite()].mean()) or 1.0
    scales = torch.logspace(-2, 2, 81, dtype=torch.float64) / spread
    likelihoods = torch.stack([(scores * scale).log_softmax(1)[:, 0].mean() for scale in scales])
    return float(scales[likelihoods.argmax()])


def reciprocal_ranks(positive_scores: Tensor, others: Tensor) -> Tensor:
    """``1 / rank`` of each positive among others' scores, 0 beyond :data:`RANKED` and for one whose score is unknown
    (NaN): ``(n,), (n, m) → (n,)``.
    """
    rank = 1 + (others >= positive_scores[:, None]).sum(1)
    return torch.where((rank <= RANKED) & ~positive_scores.isnan(), 1.0 / rank, 0.0)
