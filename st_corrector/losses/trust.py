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
_FULL = 0.10  # MRR by which a teacher must be ahead to count fully
_MOST_WEIGHT = 4.0  # of a teacher that counts fully: the hard label is a fifth then
_SOFTENED = 0.5  # of the likeliest scale is taken: what else is relevant is told by softer labels
_CANDIDATES = 16  # targets that encoder and teacher each confuse with a positive, which are encoded to compare
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
        teacher_mrr, encoder_mrr: mean reciprocal rank, cut off at 10, of the held-out questions' positives among the
            targets that are compared, by embeddings as they are now; for a teacher that knows its best targets this is
            its rank among all.
        scale: τ, half of the one by which the teacher's softmax is most likely to name the positives.
        weight: α.
        encoded: targets encoded to compare.
    """

    teacher_mrr: float
    encoder_mrr: float
    scale: float
    weight: float
    encoded: int = 0

    @property
    def mrr(self) -> dict[str, float]:
        """Both, by whose they are."""
        return {"teacher": self.teacher_mrr, "encoder": self.encoder_mrr}


class TeacherTrust:
    """Finds out how much a teacher is to be trusted, as the run goes: it is compared with the encoder on training
    questions that are kept out of training, before the first step and then after 20, 40, 80 … steps. A teacher that
    ranks their positives no better than the encoder does has nothing to teach. Its weight never rises: it is the
    encoder that learns.

    Both are ranked among the same targets: for all questions together, those that the encoder confuses with the
    positives, as far as the corrected cache tells, and those that the teacher does. Without the teacher's the encoder
    would seem to rank better than it does, where much has gone stale: those that it confuses are not found then. A
    teacher that cannot name its best targets (a cross-encoder) ranks for each question what the encoder confuses.

    A comparison encodes the held-out questions, their positives and up to 32 targets for each, at most 8,448 in all,
    without gradient (:attr:`.CorrectedCorpus.targets_reencoded` counts them).

    Args:
        teacher: whose labels are weighed.
        corpus: the targets.
        qrels: of the split that is trained on.
        weight: with which its labels count, where that has been set; then only their scale is found out.

    Raises:
        InputError: the teacher knows too few questions of the split to be judged by.
    """

    def __init__(self, teacher: Teacher, corpus: Corpus, qrels: Qrels, weight: float | None = None) -> None:
        self.teacher, self._set = teacher, weight
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
            weight = found.weight if self._set is None else self._set
            log(
                "On %d of %d training questions%s the teacher's MRR@10 is %.3f, the encoder's after "
                "%d steps %.3f: the teacher's labels count with weight %.2f%s.",
                len(self.held_out.keys),
                self._questions,
                ", which are held out," if len(self.held_out.kept_out) else "",
                found.teacher_mrr,
                corrected.steps,
                found.encoder_mrr,
                weight,
                ", as was set" if self._set is not None else "" if weight else ", which is not at all",
            )
        return self.history[-1][1]

    def load_history(self, history: list[tuple[int, Judgement]]) -> None:
        """Take over the comparisons of a run that goes on."""
        self.history = history

    def _compare(self, corrected: CorrectedCorpus, queries: Tensor) -> Judgement:
        positives, exclude = (each.to(queries.device) for each in (self.held_out.positives, self.held_out.exclude))
        found = corrected.hardest(queries, _CANDIDATES, exclude)
        # The positive, and what the encoder confuses it with; then what the teacher does.
        rows = torch.cat([positives[:, None], found.rows], dim=1)
        best = self._share(corrected.processes, lambda mine: self.teacher.best_rows(*mine, _CANDIDATES), exclude)
        columns = (rows if best is None else torch.cat([rows, best], dim=1)).unique()
        columns = columns[columns != NO_ROW]
        place = torch.searchsorted(columns, rows)  # of padding the first, which is masked wherever it is read
        of_encoder = queries @ corrected.encode_together(columns.cpu().numpy()).to(queries.device).T
        encoded = 0 if corrected.is_fixed else len(columns)
        corrected.targets_reencoded += encoded
        counts = _are_among(columns, rows) if best is None else torch.ones_like(of_encoder, dtype=torch.bool)
        for others in (positives[:, None], exclude):
            counts &= ~_are_among(columns, others)
        wanted = counts | _are_among(columns, positives[:, None])
        of_teacher = self._share(
            corrected.processes, lambda mine: self.teacher.scores(mine[0], columns, mine[1]), wanted
        )
        assert of_teacher is not None
        by_encoder, by_teacher = (
            reciprocal_ranks(scores.gather(1, place[:, :1])[:, 0], scores.masked_fill(~counts, -torch.inf))
            for scores in (of_encoder, of_teacher)
        )
        if best is None:
            # It can only rank again what the encoder has found: elsewhere it has found nothing either.
            harder = counts & (of_encoder > of_encoder.gather(1, place[:, :1]))
            by_teacher = by_teacher.masked_fill(harder.sum(1) >= _CANDIDATES, 0.0)
        weight = weight_by(by_teacher - by_encoder)
        scale = _SOFTENED * likeliest_scale(of_teacher.gather(1, place).masked_fill(rows == NO_ROW, -torch.inf))
        return Judgement(float(by_teacher.mean()), float(by_encoder.mean()), scale, weight, encoded)

    def _share(
        self, processes: Processes, ask: Callable[[tuple[Tensor, Tensor]], Tensor | None], about: Tensor
    ) -> Tensor | None:
        """What the teacher answers, ``(n, m)``, None if it cannot; each process asks for a share of the questions, and
        all get the same.

        Args:
            ask: takes keys and their share of ``about``.
            about: something for each question, ``(n, …)``.
        """
        mine, counts = processes.share(len(about)), [len(about[each]) for each in processes.shares(len(about))]
        with processes.together("Judging the teacher"):
            found = ask((self.held_out.keys.to(about.device)[mine], about[mine]))
        return None if found is None else processes.gather(found, counts)


def _are_among(columns: Tensor, rows: Tensor) -> Tensor:
    """Which of the ascending ``columns`` ``(C,)`` are among each question's ``rows`` ``(n, m)``, padded with −1:
    ``(n, C)``, bool.
    """
    at = torch.searchsorted(columns, rows).clamp(max=len(columns) - 1)
    found = torch.zeros(len(rows), len(columns), dtype=torch.int32, device=columns.device)
    return found.scatter_add_(1, at, (columns[at] == rows).int()) > 0


def weight_by(ahead: Tensor) -> float:
    """α of a teacher, by how far its reciprocal rank of each question, ``(n,)``, is ahead of the encoder's: the lead
    less one standard error, as a share of the one that counts fully.
    """
    least = float(ahead.mean() - ahead.std() / len(ahead) ** 0.5)
    return _MOST_WEIGHT * min(1.0, max(0.0, least / _FULL))


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
