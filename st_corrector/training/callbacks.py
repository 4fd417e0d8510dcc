"""Trainer callbacks."""

from __future__ import annotations

import logging
from typing import Any, Literal

import numpy as np
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..data.encoding import unwrap
from ..errors import InputError
from ..losses.multiple_negatives import CorrectedMultipleNegativesLoss
from ..search.fidelity import selection_fidelity, staleness

logger = logging.getLogger(__name__)


class RefreshCallback(TrainerCallback):
    """Re-embeds the whole corpus every ``every`` optimizer steps or epochs: the expensive way that a
    corrector replaces.

    ``every=1`` step is exhaustive: negatives are always chosen by embeddings of the model as it is. The
    re-embedded targets are counted in :attr:`CorrectedCorpus.targets_reencoded`.

    Args:
        loss: the loss whose cache is refreshed.
        every: how many ``unit`` lie between two refreshes. The cache is taken as fresh before the first step.
        unit: ``"step"`` (of the optimizer) or ``"epoch"``.
        batch_size: targets in one forward pass of a refresh.

    Raises:
        InputError: ``every`` is below 1, or an unknown unit.
    """

    def __init__(
        self,
        loss: CorrectedMultipleNegativesLoss,
        every: int,
        unit: Literal["step", "epoch"] = "step",
        batch_size: int = 256,
    ) -> None:
        if every < 1:
            raise InputError(f"every must be at least 1, got {every}.")
        if unit not in ("step", "epoch"):
            raise InputError(f"unit {unit!r} is neither 'step' nor 'epoch'.")
        self.loss, self.every, self.unit, self.batch_size = loss, every, unit, batch_size

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.unit == "step" and state.global_step and state.global_step % self.every == 0:
            self.loss.corrected.refresh(batch_size=self.batch_size)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        epoch = int((state.epoch or 0.0) + 1e-6)
        if self.unit == "epoch" and epoch and epoch % self.every == 0:
            self.loss.corrected.refresh(batch_size=self.batch_size)


class FidelityCallback(TrainerCallback):
    """Measures every ``every`` steps how far the corrected cache selects what fresh embeddings would.

    For a fixed probe of queries and targets it logs, through :class:`CorrectorTrainer`:

    - ``fidelity``: the mean overlap of the top ``k`` by corrected and by fresh score among the probe's targets
      (:func:`~st_corrector.search.fidelity.selection_fidelity`);
    - ``fidelity_stale``: the same for the cache as it was built;
    - ``fidelity_drift``: ``1 − cos(g', g)`` of these targets, the mean;
    - ``seconds_fidelity``: what it took.

    The probe is encoded without gradient and does not affect training. Queries and
    targets whose embeddings are not finite are left out, with a warning; where none are left, nothing is measured.

    Args:
        loss: the loss whose selection is measured.
        every: optimizer steps between two measurements; the first is before the first step.
        queries: how many queries of the loss's split (or of ``split``).
        targets: how many targets of the corpus, drawn once; None takes all of it. Among few targets the top ``k``
            lie further apart, so fidelity depends on this number: compare only what was measured with the same.
        k: by default the loss's ``num_negatives``.
        split: where the queries come from; by default the loss's split.
        seed: of the probe's choice.
        batch_size: texts in one forward pass.

    Raises:
        InputError: a number is below 1, there is no split to take queries from, or the loss chooses nothing.
    """

    def __init__(
        self,
        loss: CorrectedMultipleNegativesLoss,
        every: int,
        queries: int = 256,
        targets: int | None = 4096,
        k: int | None = None,
        split: str | None = None,
        seed: int = 0,
        batch_size: int = 256,
    ) -> None:
        split = split or loss.negatives.train_split
        k = loss.negatives.num_negatives if k is None else k
        if not loss.negatives.num_negatives:
            raise InputError(
                "A loss with num_negatives=0 chooses nothing from the corpus whose fidelity could be measured."
            )
        if min(every, queries, k, 1 if targets is None else targets) < 1:
            raise InputError(
                f"every, queries, targets and k must be at least 1, got {every}, {queries}, {targets} and {k}."
            )
        if split is None or split not in loss.corpus.splits:
            raise InputError(
                f"The probe needs judged queries: the corpus has the splits {loss.corpus.splits}, not {split!r}."
            )
        self.loss, self.every, self.k, self.batch_size = loss, every, k, batch_size
        generator = np.random.default_rng(seed)
        texts = loss.corpus.qrels(split).queries["text"][:]
        self._queries = [texts[n] for n in sorted(generator.permutation(len(texts))[:queries])]
        rows = np.setdiff1d(np.arange(len(loss.corpus)), loss.corpus.withdrawn)
        self._rows = np.sort(rows[generator.permutation(len(rows))[: len(rows) if targets is None else targets]])
        self.targets_encoded = 0
        """Targets encoded for the measurement alone so far."""
        self.history: list[dict[str, float]] = []
        """What was measured, and after how many steps."""

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step % self.every == 0 and (measured := self.measure()):
            self.history.append({"step": state.global_step, **measured})

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """Measure now, for the next log; returns what goes into it, which is nothing where nothing is finite."""
        loss, corpus = self.loss, self.loss.corrected
        with loss.metrics.timed("fidelity", unwrap(loss.model).device):
            queries = loss.encode_queries(self._queries, self.batch_size)
            fresh = corpus.encode(self._rows, self.batch_size)
            rows = torch.from_numpy(self._rows).to(fresh.device)
            corrected, cached = corpus.corrected(rows), corpus.cached(rows)
            self.targets_encoded += len(rows)
            usable = [torch.isfinite(each).all(-1) for each in (queries, torch.cat([corrected, fresh], dim=1))]
            if not all(each.all() for each in usable):
                logger.warning(
                    "Fidelity is measured without %d of %d queries and %d of %d targets: they are not finite.",
                    *(int(number) for each in usable for number in ((~each).sum(), len(each))),
                )
                queries, corrected, cached, fresh = (
                    each[usable[number > 0]] for number, each in enumerate((queries, corrected, cached, fresh))
                )
            if not len(queries) or not len(fresh):
                return {}
            measured = {
                "fidelity": selection_fidelity(queries, corrected, fresh, self.k).item(),
                "fidelity_stale": selection_fidelity(queries, cached, fresh, self.k).item(),
                "fidelity_drift": staleness(cached, corrected, fresh)["drift"].item(),
            }
        loss.metrics.add(**measured)
        return measured
