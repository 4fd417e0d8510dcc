"""Memory is planned before it is allocated: a plan that does not fit is refused with its numbers."""

from __future__ import annotations

from collections.abc import Mapping

import psutil
import torch

from ..errors import InputError


def available_memory(device: torch.device | str) -> int:
    """Bytes that can still be allocated on ``device``: free memory of a GPU, available memory of the machine."""
    device = torch.device(device)
    if device.type == "cuda":
        # Memory that the caching allocator holds unused is available, too.
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    available: int = psutil.virtual_memory().available
    return available


def describe_memory(needs: Mapping[str, int], device: torch.device | str) -> str:
    """A table of needed and available memory on ``device``, in MB."""
    rows = [*needs.items(), ("together", sum(needs.values())), ("available", available_memory(device))]
    width = max(len(name) for name, _ in rows)
    lines = (f"  {name:{width}}  {size / 1e6:>12,.0f} MB" for name, size in rows)
    return "\n".join([f"Memory on {torch.device(device)}:", *lines])


def require_memory(needs: Mapping[str, int], device: torch.device | str) -> None:
    """Stop if ``needs``, bytes by purpose, exceed the available memory on ``device``.

    Raises:
        InputError: they do; the message has the numbers and remedies.
    """
    if sum(needs.values()) > available_memory(device):
        raise InputError(
            f"This does not fit.\n{describe_memory(needs, device)}\nStore the cache in a smaller dtype "
            "(EmbeddingCache.build(…, dtype='int8'), or cache.to(dtype=torch.int8)), leave it on disk, from where "
            "EmbeddingCache.load streams it, or use smaller batches."
        )
