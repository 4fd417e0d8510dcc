"""Soft labels: the encoder that is trained learns what a teacher says of a query's candidates."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.corpus import Corpus
from ..data.qrels import Qrels
from ..errors import InputError
from ..teachers import Teacher
from .corrected_corpus import CorrectedCorpus
from .trust import Judgement, TeacherTrust

logger = logging.getLogger(__name__)
DistillationLoss = Literal["kl", "margin-mse"]
_FEW = 0.5  # of a batch's queries: below, a warning says which ones a teacher knows


@dataclass(frozen=True)
class DistillationSettings:
    """How a teacher labels the candidates of a step.

    Args:
        teacher: says how relevant each candidate is (:class:`~st_corrector.EmbeddingTeacher`,
            :class:`~st_corrector.CrossEncoderTeacher`).
        distillation_loss: ``"kl"``, the divergence between the teacher's softmax and the encoder's over the same
            candidates (`Ren et al. 2021 <https://arxiv.org/abs/2110.07367>`_), or ``"margin-mse"``, the squared
            difference of their margins between the positive and each candidate (`Hofstätter et al. 2020
            <https://arxiv.org/abs/2010.02666>`_).
        teacher_weight: α, by which this is multiplied beside the hard label. By default it is found out as the run
            goes (:class:`.TeacherTrust`): 4 for a teacher that ranks held-out training questions much better than the
            encoder, 0 for one that ranks them no better.
        teacher_scale: τ, by which the teacher's scores are multiplied in its softmax. By default half of the
            likeliest one for the same questions.

    Raises:
        InputError: a setting is out of range.
    """

    teacher: Teacher | None = None
    distillation_loss: DistillationLoss = field(
        default="kl",
        metadata={"help": "What compares with the teacher: kl, the two softmaxes; margin-mse, the margins."},
    )
    teacher_weight: float | None = field(
        default=None,
        metadata={"help": "Weight of the teacher's labels beside the hard labels; by default it is found out."},
    )
    teacher_scale: float | None = field(
        default=None,
        metadata={"help": "By what the teacher's scores are multiplied in its softmax; by default it is found out."},
    )

    def __post_init__(self) -> None:
        if self.distillation_loss not in get_args(DistillationLoss):
            raise InputError(
                f"distillation_loss must be {' or '.join(map(repr, get_args(DistillationLoss)))}, got "
                f"{self.distillation_loss!r}."
            )
        if (self.teacher_weight or 0) < 0 or not (self.teacher_scale is None or self.teacher_scale > 0):
            raise InputError(
                f"teacher_weight must not be negative and teacher_scale must be positive, got {self.teacher_weight} "
                f"and {self.teacher_scale}."
            )


class SoftLabels(NamedTuple):
    """What a teacher says of the candidates of one process's queries.

    Args:
        logits: τ times its scores, ``(b, C)``; −∞ for candidates that do not count.
        labelled: which queries have labels, ``(b,)``, bool: not one that the teacher does not know.
        weight: α of each query, ``(b,)``.
    """

    logits: Tensor
    labelled: Tensor
    weight: Tensor


class Distillation:
    """Makes soft labels, and compares with them.

    Args:
        settings: with a teacher.
        corpus: the targets.
        qrels: of the split that is trained on, if there are any.
        has_corrected: whether there is a corrected corpus, by which a teacher is judged.

    Raises:
        InputError: the teacher is of another corpus, or how far it can be trusted cannot be found out.
    """

    def __init__(
        self, settings: DistillationSettings, corpus: Corpus, qrels: Qrels | None, has_corrected: bool
    ) -> None:
        assert settings.teacher is not None
        self.settings, self.teacher = settings, settings.teacher
        self.teacher.require_corpus(corpus)
        self.weight, self.scale = settings.teacher_weight or 0.0, settings.teacher_scale or 1.0
        self._looked = False
        self.trust: TeacherTrust | None = None
        """How far it is trusted, where that is not set."""
        # Labels that never count need no scale.
        if settings.teacher_weight is None or (settings.teacher_scale is None and settings.teacher_weight):
            if not has_corrected:
                raise InputError(
                    "How far a teacher can be trusted is found out by the corrected corpus, and there is none: pass a "
                    "cache and num_negatives, or set teacher_weight and teacher_scale."
                )
            if qrels is None:
                raise InputError(
                    "How far a teacher can be trusted is found out by the texts of the training questions, which the "
                    "corpus does not have: corpus.add_split(…) adds them; or set teacher_weight and teacher_scale."
                )
            self.trust = TeacherTrust(self.teacher, corpus, qrels, settings.teacher_weight)

    def begin_step(self, corrected: CorrectedCorpus, encode_queries: Callable[[list[str]], Tensor]) -> None:
        """Find out what is not set, if its time has come."""
        if self.trust is None:
            return
        found = self.trust.update(corrected, encode_queries)
        if self.settings.teacher_weight is None:
            self.weight = found.weight
        if self.settings.teacher_scale is None:
            self.scale = found.scale

    def held_out(self, keys: Tensor, positives: Tensor) -> Tensor | None:
        """Which queries are kept out of training, by their keys and their positives' rows: ``(b,)``, bool; None for
        none.
        """
        return None if self.trust is None else self.trust.held_out.includes(keys, positives)

    @torch.no_grad()
    def labels(self, keys: Tensor, rows: Tensor, left_out: Tensor, target: Tensor) -> SoftLabels:
        """The teacher's labels of a batch.

        Args:
            keys: of the queries, ``(b,)``.
            rows: of all candidates, ``(C,)``.
            left_out: which candidates do not count for a query, ``(b, C)``.
            target: the place of each query's positive, ``(b,)``.
        """
        if not self.weight:
            nothing = torch.zeros(len(keys), device=rows.device)
            return SoftLabels(torch.full(left_out.shape, -torch.inf, device=rows.device), nothing.bool(), nothing)
        scores = self.teacher.scores(keys, rows, ~left_out)
        counts = ~left_out & torch.isfinite(scores)
        # Without the positive, or with it alone, nothing is compared.
        labelled = counts.gather(1, target[:, None]).squeeze(1) & (counts.sum(1) > 1)
        logits = (scores * self.scale).masked_fill(~counts, -torch.inf)
        if (held_out := self.held_out(keys, rows[target])) is not None:
            labelled &= ~held_out
        return SoftLabels(logits, labelled, labelled * self.weight)

    def look(self, soft: SoftLabels) -> None:
        """Warn, once, if a first batch has few labels."""
        if self._looked or not self.weight:
            return
        self._looked = True
        if (share := float(soft.labelled.float().mean())) < _FEW:
            logger.warning(
                "The teacher labels %d%% of the first batch's queries; the others have their hard label alone. It "
                "knows the queries of the pairs that it was built with, by their keys: corpus.own_pairs(…) among "
                "them, and with labels that are rows alone none that share a positive.",
                round(100 * share),
            )

    def loss(self, logits: Tensor, soft: SoftLabels, target: Tensor) -> Tensor:
        """The weighted mean over the queries, of which those without labels count as 0.

        Args:
            logits: β times the encoder's scores of all candidates, ``(b, C)``.
            soft: the teacher's labels.
            target: the place of each query's positive, ``(b,)``.
        """
        compare = _divergence if self.settings.distillation_loss == "kl" else _margin_mse
        labelled = soft.weight > 0
        each = compare(logits[labelled], soft.logits[labelled], target[labelled])
        return (each * soft.weight[labelled]).sum() / max(1, len(logits))

    def describe(self) -> dict[str, Any]:
        """For records and cards: settings, what has been found out, and by what."""
        described = {
            **self.teacher.describe(),
            "distillation_loss": self.settings.distillation_loss,
            "teacher_weight": self.weight,
            "teacher_scale": self.scale,
        }
        if self.trust is not None and self.trust.judgement is not None:
            described |= {f"{name}_mrr": value for name, value in self.trust.judgement.mrr.items()}
            described["encoded_to_compare"] = sum(found.encoded for _, found in self.trust.history)
            named = {"weight": self.settings.teacher_weight, "scale": self.settings.teacher_scale}
            described["found_out"] = [name for name, value in named.items() if value is None]
        return described

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: JSON."""
        return {
            "weight": self.weight,
            "scale": self.scale,
            "of": self.teacher.identity,
            "history": [] if self.trust is None else [[step, *found] for step, found in self.trust.history],
        }

    def load_state(self, state: dict[str, Any] | None) -> None:
        """Take over what :meth:`state` gave, if the checkpoint is of a run with this teacher; another one is judged
        again.
        """
        if state is None or state.get("of") != self.teacher.identity:
            logger.warning(
                "The checkpoint is of a run with %s: %r is judged again.",
                "no teacher" if state is None else "another one",
                self.teacher,
            )
            return
        if self.settings.teacher_weight is None:
            self.weight = state["weight"]
        if self.settings.teacher_scale is None:
            self.scale = state["scale"]
        if self.trust is not None:
            self.trust.load_history([(step, Judgement(*found)) for step, *found in state["history"]])


def _divergence(logits: Tensor, labels: Tensor, target: Tensor) -> Tensor:
    """``KL(teacher ‖ encoder)`` of each query over the candidates that count: ``(b, C), (b, C) → (b,)``."""
    of_encoder = logits.masked_fill(labels == -torch.inf, -torch.inf).log_softmax(1)
    of_teacher = labels.log_softmax(1)
    terms = of_teacher.exp() * (of_teacher - of_encoder)
    return terms.masked_fill(labels == -torch.inf, 0.0).sum(1)


def _margin_mse(logits: Tensor, labels: Tensor, target: Tensor) -> Tensor:
    """The mean squared difference of the margins between positive and candidate: ``(b, C), (b, C) → (b,)``."""
    ours, theirs = (each.gather(1, target[:, None]) - each for each in (logits, labels))
    counts = (labels != -torch.inf).scatter(1, target[:, None], False)
    squares = F.mse_loss(ours.masked_fill(~counts, 0.0), theirs.masked_fill(~counts, 0.0), reduction="none")
    return squares.sum(1) / counts.sum(1)
