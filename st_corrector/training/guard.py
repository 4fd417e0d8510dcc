"""What keeps a run from ending badly: numbers that are not finite, and being told to stop."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.utils import get_total_norm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import NonFiniteError
from ..runtime.distributed import Processes

logger = logging.getLogger(__name__)
NonFinitePolicy = Literal["stop", "skip"]
MOST_SKIPPED_IN_A_ROW = 10


class Guard(TrainerCallback):
    """Watches a run of :class:`CorrectorTrainer`.

    - What is not finite (embeddings, the loss, the corrector, gradients) ends the run before it has touched a weight,
      or, by policy, drops the optimizer step that it belongs to, with all that was accumulated for it: weights and
      optimizer stay as they were, the learning rate's schedule goes on. The corrector learns nothing from the batch in
      which it was found, but has learnt from those accumulated before it, and from a batch whose gradients alone are
      not finite. Ten such steps in a row end the run in any case.
    - SIGTERM, which clusters send before they take a machine away, is answered with a checkpoint after the present
      step, by all processes after the same one; then the processes exit with status 143, as terminated ones do. A
      second SIGTERM ends them at once.

    Args:
        policy: ``"stop"`` or ``"skip"``.
        processes: those that train together.
    """

    def __init__(self, policy: NonFinitePolicy, processes: Processes) -> None:
        self.processes = processes
        self._told = False
        self.begin(policy)

    def begin(self, policy: NonFinitePolicy) -> None:
        """A run begins, of which nothing has been seen."""
        self.policy = policy
        self.steps_skipped = 0
        """Optimizer steps that were dropped so far."""
        self.is_stopping = False
        """Whether the processes have agreed to save and exit."""
        self._dropped, self._in_a_row = False, 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take note of SIGTERM while the block runs. Outside of the main thread Python does not let us."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def told(number: int, frame: Any) -> None:
            if self._told:  # a second SIGTERM: do not wait for the checkpoint
                signal.signal(signal.SIGTERM, before)
                signal.raise_signal(signal.SIGTERM)
            self._told = True

        self._told = False
        before = signal.signal(signal.SIGTERM, told) or signal.SIG_DFL
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)
            if self._told and not self.is_stopping:  # after the last step
                signal.raise_signal(signal.SIGTERM)

    def drop_step(self, error: NonFiniteError, model: nn.Module, step: int) -> None:
        """Drop the optimizer step ``step`` for ``error``, or raise it.

        Raises:
            NonFiniteError: by policy, or because too many steps in a row were dropped.
        """
        message = f"Step {step}: {error}"
        if self.policy == "stop":
            raise NonFiniteError(
                f"{message} The weights are as they were before this step; go on from the last checkpoint, or with "
                "non_finite='skip' to leave out such steps."
            ) from error
        if self._in_a_row >= MOST_SKIPPED_IN_A_ROW:
            raise NonFiniteError(
                f"{message} So were the {self._in_a_row} steps before: skipping does not help. Go on from the last "
                "checkpoint with a lower learning rate."
            ) from error
        logger.warning("%s The step is left out.", message)
        model.zero_grad()
        self._dropped = True

    def check_gradients(self, model: nn.Module, args: TrainingArguments, step: int) -> None:
        """Drop the step if its gradients are not finite.

        Raises:
            NonFiniteError: see :meth:`drop_step`.
        """
        if args.fp16:  # the gradients' scaler looks for them, and leaves out the step by itself
            return
        gradients = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
        if gradients and not torch.isfinite(get_total_norm(gradients.values())):
            bad = [name for name, gradient in gradients.items() if not torch.isfinite(gradient).all()]
            # A norm beyond float32 is infinite though all gradients are finite.
            what = f"The gradients of {len(bad)} parameters, e.g. {bad[:3]}," if bad else "The gradients' norm"
            advice = "lower the learning rate or the loss's scale."
            self.drop_step(NonFiniteError(f"{what} are NaN or infinite: {advice}"), model, step)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = kwargs["model"]
        if args.max_grad_norm <= 0:  # else they were looked at before they were clipped
            self.check_gradients(model, args, state.global_step)
        if self._dropped:
            model.zero_grad()  # of what has been accumulated after that
        self._in_a_row = self._in_a_row + 1 if self._dropped else 0
        self.steps_skipped += self._dropped
        self._dropped = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.processes.any(self._told, args.device) and not self.is_stopping:
            logger.warning("Told to stop (SIGTERM): saving a checkpoint, then exiting.")
            self.is_stopping = True
        if self.is_stopping:
            control.should_save, control.should_evaluate, control.should_training_stop = True, False, True
