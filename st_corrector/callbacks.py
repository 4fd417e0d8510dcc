"""Trainer callbacks."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .errors import InputError
from .loss import CorrectedMultipleNegativesLoss


class RefreshCallback(TrainerCallback):
    """Re-embeds the whole corpus every ``every`` optimizer steps: the dear baseline that a corrector replaces.

    ``every=1`` is exhaustive: negatives are always chosen by embeddings of the model as it is. What it
    costs is counted in :attr:`CorrectedMultipleNegativesLoss.targets_reencoded`.

    Args:
        loss: the loss whose cache is refreshed.
        every: optimizer steps between two refreshes. The cache is taken as fresh before the first step.
        batch_size: targets in one forward pass of a refresh.

    Raises:
        InputError: ``every`` is below 1.
    """

    def __init__(self, loss: CorrectedMultipleNegativesLoss, every: int, batch_size: int = 256) -> None:
        if every < 1:
            raise InputError(f"every must be at least 1 step, got {every}.")
        self.loss, self.every, self.batch_size = loss, every, batch_size

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step and state.global_step % self.every == 0:
            self.loss.refresh(batch_size=self.batch_size)
