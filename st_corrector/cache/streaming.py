"""Chunks of a cache that is held by the CPU, or on disk, on their way through a GPU."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from .shard import Shard


def on_device(chunks: Iterable[tuple[int, Shard]], device: torch.device) -> Iterator[tuple[int, Shard]]:
    """``chunks`` on ``device``; while the caller computes with one, the next is read and copied.

    Chunks that are there already are passed on as they are. Otherwise each goes through one of two blocks of pinned
    memory, from which the GPU copies by itself, on a stream of its own: reading from disk, copying and computing
    overlap, and the GPU holds three chunks at a time, the one that was asked for last and two that follow it.
    """
    copying: torch.cuda.Stream | None = None
    staging: list[tuple[Shard, torch.cuda.Event]] = []
    copied: tuple[int, Shard, torch.cuda.Event] | None = None
    for number, (row, chunk) in enumerate(chunks):
        if chunk.values.device == device or device.type != "cuda":
            yield row, chunk.map(lambda each: each.to(device))
            continue
        copying = copying or _stream_for_copies(device)
        if len(staging) < 2 or len(staging[number % 2][0].values) < len(chunk.values):
            pinned = chunk.map(lambda each: torch.empty_like(each, pin_memory=True))
            staging[number % 2 : number % 2 + 1] = [(pinned, torch.cuda.Event())]
        pinned, read = staging[number % 2]
        read.synchronize()  # the copy before the last has left this block
        here = pinned.at(slice(0, len(chunk.values))).copy_(chunk)
        with torch.cuda.stream(copying):
            arrived = here.map(lambda each: each.to(device, non_blocking=True))
            read.record(copying)
        if copied is not None:
            yield _awaited(*copied)
        copied = (row, arrived, _recorded(copying))
    if copied is not None:
        yield _awaited(*copied)


@functools.cache
def _stream_for_copies(device: torch.device) -> torch.cuda.Stream:
    """The same every time: memory that was freed on one stream is not used again on another."""
    return torch.cuda.Stream(device)


def _recorded(stream: torch.cuda.Stream) -> torch.cuda.Event:
    event = torch.cuda.Event()
    event.record(stream)
    return event


def _awaited(row: int, chunk: Shard, arrived: torch.cuda.Event) -> tuple[int, Shard]:
    """The chunk, usable on the present stream; its memory is not reused before that has finished with it."""
    stream = torch.cuda.current_stream(chunk.values.device)
    stream.wait_event(arrived)
    for each in chunk:
        if isinstance(each, Tensor):
            each.record_stream(stream)
    return row, chunk
