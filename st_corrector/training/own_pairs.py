"""Batches with a fixed share of the corpus's own pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import SeedableRandomSampler
from datasets import Dataset
from sentence_transformers.base.sampler import DefaultBatchSampler
from torch.utils.data import BatchSampler

from ..data.query_keys import is_own
from ..errors import InputError
from .columns import keys_in_labels

SHARE = 0.36
"""Of every batch, where own pairs help and nothing else is asked for."""


def own_positions(dataset: Dataset) -> np.ndarray:
    """Where the own pairs (:meth:`.Corpus.own_pairs`) of a data set are, ascending."""
    return np.flatnonzero(is_own(torch.from_numpy(keys_in_labels(dataset))).numpy())


def count_for(share: float, batch_size: int) -> int:
    """How many of a batch's pairs are own ones.

    Raises:
        InputError: it is none, or no room is left for others.
    """
    count = round(share * batch_size)
    if not 0 < count < batch_size:
        raise InputError(
            f"own_pairs_share={share} makes {count} own pairs in a batch of {batch_size}, and there must be at least "
            "one of them and one of the split's: choose another share, or take larger batches."
        )
    return count


class OwnPairsBatchSampler(DefaultBatchSampler):
    """Batches of which a fixed share are the corpus's own pairs, and the others what another sampler makes of the
    split's pairs. An epoch goes through the split's pairs once; each takes other own pairs, until all have had their
    turn.

    In the plain trainer it is the function that ``batch_sampler`` expects:
    ``functools.partial(OwnPairsBatchSampler, share=0.25)``.

    Args:
        dataset: pairs of a split and own pairs, in any order.
        batch_size: pairs in a batch of one process.
        drop_last: whether a last batch with fewer pairs of the split is left out.
        valid_label_columns, generator, seed: see :class:`~sentence_transformers.base.sampler.DefaultBatchSampler`.
        share: of own pairs in a batch.
        make_base: makes the sampler of the split's pairs, with these arguments and ``dataset``; by default they are
            shuffled.

    Raises:
        InputError: there are only own pairs, or no room is left for others.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        drop_last: bool,
        valid_label_columns: list[str] | None = None,
        generator: torch.Generator | None = None,
        seed: int = 0,
        *,
        share: float,
        make_base: Callable[..., BatchSampler | None] | None = None,
    ) -> None:
        super().__init__(dataset, batch_size, drop_last, valid_label_columns, generator, seed)
        self._own = own_positions(dataset)
        self._others = np.setdiff1d(np.arange(len(dataset)), self._own)
        if not len(self._others):
            raise InputError("There are only own pairs: concatenate them with the pairs of a split.")
        self._count = count_for(share, batch_size) if len(self._own) else 0
        base = (make_base or _shuffled)(
            dataset.select(self._others),
            batch_size=batch_size - self._count,
            drop_last=drop_last,
            valid_label_columns=valid_label_columns,
            generator=generator,
            seed=seed,
        )
        assert base is not None  # as for a stream
        self._base: Any = base

    def __len__(self) -> int:
        return len(self._base)

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        inner: Any = getattr(self._base, "sampler", None)
        for each in (self._base, inner):
            if hasattr(each, "set_epoch"):
                each.set_epoch(epoch)

    def __iter__(self) -> Iterator[list[int]]:
        order = np.random.default_rng(self.seed).permutation(self._own)
        drawn = self.epoch * len(self) * self._count
        for batch in self._base:
            own = [int(order[place % len(order)]) for place in range(drawn, drawn + self._count)]
            drawn += self._count
            # Evenly spread, so that the batches of several processes together are the batch of one.
            mixed = self._others[batch].tolist()
            for place, position in enumerate(own, start=1):
                mixed.insert(place * self.batch_size // self._count - 1, position)
            yield mixed


def _shuffled(dataset: Dataset, batch_size: int, drop_last: bool, seed: int = 0, **others: Any) -> DefaultBatchSampler:
    """The pairs in an order that seed and epoch decide, as the trainer has it where no other sampler is asked for."""
    sampler = SeedableRandomSampler(dataset, data_seed=seed, generator=torch.Generator())
    return DefaultBatchSampler(sampler, batch_size, drop_last, seed=seed, **others)
