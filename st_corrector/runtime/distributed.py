"""The processes that train together, and what they exchange."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import PartialState
from sentence_transformers.util import all_gather_with_grad
from torch import Tensor

from ..errors import InputError, ProcessError

_TIMEOUT = timedelta(seconds=1800)  # transformers' own default for training


class Processes:
    """All processes of this training: if one calls a method here, all must call it.

    With one process, as in ``Processes()``, every method returns its argument.

    Args:
        rank: of this process.
        size: number of processes.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size
        self.bytes_received = 0
        """Bytes received from other processes so far."""

    @classmethod
    def current(cls) -> Processes:
        """The processes of ``torch.distributed``'s group, which accelerate sets up. If a launcher has started several
        processes and there is no group yet, it is set up here: create the training arguments first for their
        ``ddp_timeout`` to apply.

        Raises:
            InputError: accelerate treats each of several processes as the only one; each would train its own encoder.
        """
        if int(os.environ.get("WORLD_SIZE", 1)) > 1 and dist.is_available() and not dist.is_initialized():
            PartialState(cpu=not torch.accelerator.is_available(), timeout=_TIMEOUT)
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        if PartialState._shared_state and PartialState().num_processes != dist.get_world_size():
            raise InputError(
                f"{dist.get_world_size()} processes have been started, but accelerate treats each as the only one, as "
                "it does without a GPU unless told otherwise: each would train its own encoder. Pass use_cpu=True in "
                "the training arguments, or Accelerator(cpu=True)."
            )
        return cls(dist.get_rank(), dist.get_world_size())

    def __repr__(self) -> str:
        return f"Processes(rank={self.rank}, size={self.size})"

    def share(self, count: int) -> slice:
        """This process's part of ``count`` items: consecutive, with sizes differing by at most one."""
        return self.shares(count)[self.rank]

    def shares(self, count: int) -> list[slice]:
        """Every process's part."""
        return [slice(rank * count // self.size, (rank + 1) * count // self.size) for rank in range(self.size)]

    def counts(self, count: int, device: torch.device) -> list[int]:
        """``count`` of every process."""
        return [count] if self.size == 1 else self.gather(torch.tensor([count], device=device)).tolist()

    def gather(self, tensor: Tensor, counts: list[int] | None = None) -> Tensor:
        """``tensor`` ``(n, …)`` of every process, concatenated, without gradient: ``(Σn, …)``.

        Args:
            counts: ``n`` of every process; by default all are equal.
        """
        if self.size == 1:
            return tensor.detach()
        padded = _padded(tensor.detach(), counts).contiguous()
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded)
        self.bytes_received += (self.size - 1) * padded.nbytes
        return _joined(parts, counts)

    def gather_with_grad(self, tensor: Tensor, counts: list[int]) -> Tensor:
        """The same with gradient: the gradients of all processes' losses are summed at the process that sent the
        row."""
        if self.size == 1:
            return tensor
        padded = _padded(tensor, counts).contiguous()
        gathered = all_gather_with_grad(padded)
        # Gradients of all rows return the way the embeddings came.
        self.bytes_received += 2 * (self.size - 1) * padded.nbytes
        return _joined(list(gathered.split(len(padded))), counts)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of all processes' tensors of one shape, in place; exact where all but one are zero."""
        if self.size > 1:
            dist.all_reduce(tensor)
            self.bytes_received += 2 * tensor.nbytes * (self.size - 1) // self.size
        return tensor

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether the flag is set on any process."""
        return bool(self.sum(torch.tensor(int(flag), device=device))) if self.size > 1 else flag

    def broadcast(self, tensor: Tensor) -> Tensor:
        """The first process's tensor, in place: for random draws, as generators may have diverged."""
        if self.size > 1:
            dist.broadcast(tensor, 0)
            self.bytes_received += tensor.nbytes
        return tensor

    def told(self, value: Any) -> Any:
        """What the first process says: any object that can be pickled."""
        said = [value]
        if self.size > 1:
            dist.broadcast_object_list(said, 0)
        return said[0]

    @contextmanager
    def together(self, what: str) -> Iterator[None]:
        """Run the block in every process; if it fails in one, all raise an error instead of waiting for it.

        Args:
            what: the block's purpose, for the message.

        Raises:
            ProcessError: it has failed in another process.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        if self.size > 1:
            failed: list[str | None] = [None] * self.size
            dist.all_gather_object(failed, None if error is None else f"{type(error).__name__}: {error}")
            if error is None and any(failed):
                which = "\n".join(f"  rank {rank}: {each}" for rank, each in enumerate(failed) if each)
                raise ProcessError(f"{what} has failed in another process:\n{which}")
        if error is not None:
            raise error

    def wait(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            dist.barrier()

    def require_same(self, checksum: Tensor, what: str) -> None:
        """Stop if values that must be equal differ between processes.

        Args:
            checksum: int64, ``(1,)``.
            what: the checked value, for the message.

        Raises:
            ProcessError: they differ; the message names the ranks.
        """
        checksums = self.gather(checksum).tolist()
        others = [rank for rank, each in enumerate(checksums) if each != checksums[0]]
        if others:
            raise ProcessError(
                f"{what} differs between processes: that of rank {others} is not that of rank 0. All learn it from "
                "the same pairs in the same order, so one of them computed something differently: the processes must "
                "run the same versions on the same kind of device, and none may change it on its own."
            )


def checksum(tensors: dict[str, Tensor]) -> Tensor:
    """A checksum over all bits, int64 ``(1,)``."""
    total = torch.zeros(1, dtype=torch.int64)
    for name in sorted(tensors):
        bits = tensors[name].detach().contiguous().cpu().flatten()
        bits = bits.view(torch.uint8) if bits.numel() else bits.new_empty(0, dtype=torch.uint8)
        weights = torch.arange(1, len(bits) + 1, dtype=torch.int64) * 2_654_435_761
        total += ((bits.long() + 1) * weights).sum() * (len(name) + 1)
    return total


def _padded(tensor: Tensor, counts: list[int] | None) -> Tensor:
    missing = 0 if counts is None else max(counts) - len(tensor)
    return F.pad(tensor, [0, 0] * (tensor.ndim - 1) + [0, missing]) if missing else tensor


def _joined(parts: list[Tensor], counts: list[int] | None) -> Tensor:
    if counts is None:
        return torch.cat(parts)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
