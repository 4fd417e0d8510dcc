"""The sentence-transformers trainer, with what the corrected loss measures in its log."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from sentence_transformers import SentenceTransformerTrainer

from .loss import CorrectedMultipleNegativesLoss
from .memory import describe_memory, require_memory


class CorrectorTrainer(SentenceTransformerTrainer):
    """:class:`~sentence_transformers.SentenceTransformerTrainer` that logs staleness beside the loss.

    Whatever the trainer reports to (TensorBoard, Weights & Biases, Trackio, the console) then shows
    :meth:`CorrectedMultipleNegativesLoss.pop_metrics`. The plain trainer trains the same: it only leaves them out,
    because a loss can hand it nothing but terms of the loss.

    Before the first step it prints what choosing negatives will take in memory, and refuses what does not fit.

    Takes the arguments of :class:`~sentence_transformers.SentenceTransformerTrainer`.
    """

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As the plain trainer's, after the memory plan.

        Raises:
            InputError: what choosing negatives needs does not fit on the model's device.
        """
        batch_size = self.args.train_batch_size
        if self.args.max_steps > 0:
            batches = self.args.max_steps * self.args.gradient_accumulation_steps
        else:
            data = self.train_dataset
            pairs = sum(map(len, data.values())) if isinstance(data, dict) else len(data)  # type: ignore[arg-type]
            batches = math.ceil(pairs / batch_size * self.args.num_train_epochs)
        for name, loss in self._corrected_losses():
            if needs := loss.memory(batch_size, batches):
                require_memory(needs, self.args.device)
                if self.is_world_process_zero():
                    print(name + describe_memory(needs, self.args.device))
        return super().train(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            for prefix, loss in self._corrected_losses():
                logs = logs | {f"{prefix}{name}": round(value, 6) for name, value in loss.pop_metrics().items()}
        super().log(logs, start_time)

    def _corrected_losses(self) -> Iterator[tuple[str, CorrectedMultipleNegativesLoss]]:
        """The corrected losses among what is trained with, inside wrappers too, each once; and what precedes the names
        of their metrics: nothing, or with several data sets that of the loss's data set.
        """
        losses = self.loss if isinstance(self.loss, dict) else {"": self.loss}
        met = set()
        for name, loss in losses.items():
            for module in loss.modules():
                if isinstance(module, CorrectedMultipleNegativesLoss) and module not in met:
                    met.add(module)
                    yield f"{name}/" if name else "", module
