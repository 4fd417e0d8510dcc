"""What a step minimises: the cross-entropy of hard labels, and beside it what a teacher says of the same candidates."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .batch import Candidates
from .distillation import Distillation
from .step_metrics import StepMetrics


class Objective:
    """Compares each query's scores with its labels.

    Args:
        scale: the inverse temperature β.
        hardness_strength: how much is added to the logit of each negative that is
            :attr:`~.batch.Candidates.hardened`, times its score, so that harder negatives count more
            (`Lan et al. 2025 <https://arxiv.org/abs/2503.04812>`_, Eq. 5).
        distillation: compares with a teacher's labels, if there is one.
        metrics: takes in what is logged.
    """

    def __init__(
        self, scale: float, hardness_strength: float, distillation: Distillation | None, metrics: StepMetrics
    ) -> None:
        self.scale, self.hardness_strength = scale, hardness_strength
        self.distillation, self.metrics = distillation, metrics

    def __call__(self, scores: Tensor, candidates: Candidates) -> Tensor:
        """The mean over the queries, ``()``; with a teacher both terms, hard labels first, ``(2,)``.

        Args:
            scores: similarities of queries and candidates, ``(b, C)``.
            candidates: which of them is what to whom.
        """
        logits = scores * self.scale
        hard = self._hard_labels(scores, logits, candidates) * candidates.weight
        if self.distillation is None:
            return hard
        soft = logits.new_zeros(())
        if candidates.soft is not None:
            soft = self.distillation.loss(logits, candidates.soft, candidates.target) * candidates.weight
        return torch.stack([hard, soft])

    def _hard_labels(self, scores: Tensor, logits: Tensor, candidates: Candidates) -> Tensor:
        if candidates.hardened is not None:
            logits = logits + self.hardness_strength * scores.detach() * candidates.hardened
        if candidates.forbidden is not None:
            logits = logits.masked_fill(candidates.forbidden, -torch.inf)
        if candidates.held_out is None and candidates.own is None:
            return F.cross_entropy(logits, candidates.target)
        each = F.cross_entropy(logits, candidates.target, reduction="none")
        if candidates.own is not None:
            for name, queries in (("own_pairs", candidates.own), ("split_pairs", ~candidates.own)):
                if queries.any():
                    self.metrics.add(**{f"task_loss_{name}": each[queries].mean()})
        if candidates.held_out is not None:
            each = each.masked_fill(candidates.held_out, 0.0)
        return each.mean()
