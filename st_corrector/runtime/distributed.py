"""The processes that train together, and the little that they tell one another."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import PartialState
from sentence_transformers.util import all_gather_with_grad
from torch import Tensor

from ..errors import InputError, ProcessError

_TIMEOUT = timedelta(seconds=1800)  # transformers' own default for training


class Processes:
    """All processes of this training, in step: what one of them calls here, all call.

    With one process, which is what ``Processes()`` is, every method returns what it was given.

    Args:
        rank: which of them this is.
        size: how many there are.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size
        self.bytes_received = 0
        """What the others have sent to this process so far."""

    @classmethod
    def current(cls) -> Processes:
        """Those of ``torch.distributed``'s process group, which accelerate sets up; where a launcher has started
        several processes and nobody has done so yet, it is set up here: make the training arguments first if their
        ``ddp_timeout`` is to count.

        Raises:
            InputError: accelerate takes each of several processes for the only one, and would train as many encoders.
        """
        if int(os.environ.get("WORLD_SIZE", 1)) > 1 and dist.is_available() and not dist.is_initialized():
            PartialState(cpu=not torch.accelerator.is_available(), timeout=_TIMEOUT)
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        if PartialState._shared_state and PartialState().num_processes != dist.get_world_size():
            raise InputError(
                f"{dist.get_world_size()} processes have been started, but accelerate takes each for the only one, as "
                "it does where there is no GPU and nobody has said so: each would train an encoder of its own. Pass "
                "use_cpu=True in the training arguments, or Accelerator(cpu=True)."
            )
        return cls(dist.get_rank(), dist.get_world_size())

    def __repr__(self) -> str:
        return f"Processes(rank={self.rank}, size={self.size})"

    def share(self, count: int) -> slice:
        """This process's part of ``count`` things: consecutive ones, as many as any other's but for one."""
        return self.shares(count)[self.rank]

    def shares(self, count: int) -> list[slice]:
        """Every process's part."""
        return [slice(rank * count // self.size, (rank + 1) * count // self.size) for rank in range(self.size)]

    def counts(self, count: int, device: torch.device) -> list[int]:
        """``count`` of every process."""
        return [count] if self.size == 1 else self.gather(torch.tensor([count], device=device)).tolist()

    def gather(self, tensor: Tensor, counts: list[int] | None = None) -> Tensor:
        """``tensor`` ``(n, …)`` of every process one after the other, without gradient: ``(Σn, …)``.

        Args:
            counts: ``n`` of every process; by default all have the same.
        """
        if self.size == 1:
            return tensor.detach()
        padded = _padded(tensor.detach(), counts).contiguous()
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded)
        self.bytes_received += (self.size - 1) * padded.nbytes
        return _joined(parts, counts)

    def gather_with_grad(self, tensor: Tensor, counts: list[int]) -> Tensor:
        """The same with gradient: what each process's loss says of a row is summed up at the process that sent it."""
        if self.size == 1:
            return tensor
        padded = _padded(tensor, counts).contiguous()
        gathered = all_gather_with_grad(padded)
        # Gradients of all come back as the embeddings went.
        self.bytes_received += 2 * (self.size - 1) * padded.nbytes
        return _joined(list(gathered.split(len(padded))), counts)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of all processes' tensors of one shape, in place; exact where all but one are zero."""
        if self.size > 1:
            dist.all_reduce(tensor)
            self.bytes_received += 2 * tensor.nbytes * (self.size - 1) // self.size
        return tensor

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether it is so for any of them."""
        return bool(self.sum(torch.tensor(int(flag), device=device))) if self.size > 1 else flag

    def broadcast(self, tensor: Tensor) -> Tensor:
        """What the first process has, in place: for draws from generators that may have moved apart."""
        if self.size > 1:
            dist.broadcast(tensor, 0)
            self.bytes_received += tensor.nbytes
        return tensor

    @contextmanager
    def together(self, what: str) -> Iterator[None]:
        """Run the block in every process; where it fails in one, all end with an error, instead of waiting for it.

        Args:
            what: what the block does, for the message.

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
        """Until all are here."""
        if self.size > 1:
            dist.barrier()

    def require_same(self, checksum: Tensor, what: str) -> None:
        """Refuse to go on where processes that must hold the same do not.

        Args:
            checksum: int64, ``(1,)``.
            what: what it is the checksum of, for the message.

        Raises:
            ProcessError: they differ; it says on which ranks.
        """
        checksums = self.gather(checksum).tolist()
        others = [rank for rank, each in enumerate(checksums) if each != checksums[0]]
        if others:
            raise ProcessError(
                f"{what} differs between processes: that of rank {others} is not that of rank 0. All learn it from the "
                "same pairs in the same order, so something was computed otherwise: the processes must run the same "
                "versions on the same kind of device, and none may change it by itself."
            )


def checksum(tensors: dict[str, Tensor]) -> Tensor:
    """A number that tells apart what differs in any bit, int64 ``(1,)``."""
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
