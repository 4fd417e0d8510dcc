"""Several data sets with several processes: in every step all take the same one, as they choose negatives together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import BatchSampler

from ..errors import InputError


class JoinedBatches:
    """The batches of one data set, as many as there are processes joined into one. What does not fill a batch for every
    process is left out of an epoch.

    Args:
        batches: the data set's batches, each for one process.
        processes: how many there are.

    Raises:
        InputError: there is not one full batch for each process.
    """

    def __init__(self, batches: BatchSampler, processes: int) -> None:
        # Its length, too, is that of whole batches then.
        batches.drop_last = True
        self._batches, self._processes = batches, processes
        self.batch_size: int = batches.batch_size
        self.drop_last = True
        if len(batches) < processes:
            raise InputError(
                f"A data set has {len(batches)} batches of {self.batch_size} pairs, fewer than the {processes} "
                "processes, which take the same data set in every step: leave it out, concatenate it with another, or "
                "take smaller batches."
            )

    def __len__(self) -> int:
        return len(self._batches) // self._processes

    def set_epoch(self, epoch: int) -> None:
        """Let the data set's sampler know the epoch."""
        if hasattr(self._batches, "set_epoch"):
            self._batches.set_epoch(epoch)

    def __iter__(self) -> Iterator[list[int]]:
        joined: list[int] = []
        for batch in self._batches:
            if len(batch) == self.batch_size:
                joined += batch
            if len(joined) == self.batch_size * self._processes:
                yield joined
                joined = []


class SplitBatches(BatchSampler):
    """What a sampler of several data sets makes of :class:`JoinedBatches`, cut into the processes' batches again:
    accelerate hands them out in turn.

    Args:
        joined: yields joined batches, of one data set each.
        processes: how many there are.
        batch_size: pairs in a batch of one process.
    """

    def __init__(self, joined: Any, processes: int, batch_size: int) -> None:
        super().__init__(joined, batch_size, drop_last=True)
        self._joined, self._processes = joined, processes

    def __len__(self) -> int:
        return len(self._joined) * self._processes

    def set_epoch(self, epoch: int) -> None:
        """Let the samplers know the epoch."""
        self._joined.set_epoch(epoch)

    def __iter__(self) -> Iterator[list[int]]:
        for batches in self._joined:
            for start in range(0, len(batches), self.batch_size):
                yield batches[start : start + self.batch_size]
