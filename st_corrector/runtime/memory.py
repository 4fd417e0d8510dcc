"""What will be allocated, counted before it is: a plan that does not fit is refused with its numbers."""

from __future__ import annotations

from collections.abc import Mapping

import psutil
import torch

from ..errors import InputError


def available_memory(device: torch.device | str) -> int:
    """Bytes that can still be allocated on ``device``: free memory of a GPU, available memory of the machine."""
    device = torch.device(device)
    if device.type == "cuda":
        # What the caching allocator holds and does not use can be had as well.
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    available: int = psutil.virtual_memory().available
    return available


def describe_memory(needs: Mapping[str, int], device: torch.device | str) -> str:
    """A table of what is needed on ``device`` and what there is, in MB."""
    rows = [*needs.items(), ("together", sum(needs.values())), ("available", available_memory(device))]
    width = max(len(name) for name, _ in rows)
    lines = (f"  {name:{width}}  {size / 1e6:>12,.0f} MB" for name, size in rows)
    return "\n".join([f"Memory on {torch.device(device)}:", *lines])


def require_memory(needs: Mapping[str, int], device: torch.device | str) -> None:
    """Refuse to go on if ``needs``, bytes by what they are for, are more than there is on ``device``.

    Raises:
        InputError: they are; it has the numbers, and what could be done.
    """
    if sum(needs.values()) > available_memory(device):
        raise InputError(
            f"This does not fit.\n{describe_memory(needs, device)}\nStore the cache in a smaller dtype "
            "(EmbeddingCache.build(…, dtype='int8'), or cache.to(dtype=torch.int8)), leave it on disk, from where "
            "EmbeddingCache.load streams it, or take smaller batches."
        )
