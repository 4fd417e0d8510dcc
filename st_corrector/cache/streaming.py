"""Streams chunks of a cache in CPU memory or on disk through a GPU."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from .shard import Shard


def on_device(chunks: Iterable[tuple[int, Shard]], device: torch.device) -> Iterator[tuple[int, Shard]]:
    """``chunks`` on ``device``; while the caller computes with one, the next is read and copied.

    Chunks already on the device are passed on unchanged. Others go through one of two blocks of pinned memory, from
    which the GPU copies asynchronously on a separate stream: reading from disk, copying and computing overlap. The GPU
    holds three chunks at a time, the current one and the next two.
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
        read.synchronize()  # the copy before the last has finished with this block
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
    """The same stream every time: memory freed on one stream is not reused on another."""
    return torch.cuda.Stream(device)


def _recorded(stream: torch.cuda.Stream) -> torch.cuda.Event:
    event = torch.cuda.Event()
    event.record(stream)
    return event


def _awaited(row: int, chunk: Shard, arrived: torch.cuda.Event) -> tuple[int, Shard]:
    """The chunk, usable on the current stream; its memory is not reused before that stream has finished with it."""
    stream = torch.cuda.current_stream(chunk.values.device)
    stream.wait_event(arrived)
    for each in chunk:
        if isinstance(each, Tensor):
            each.record_stream(stream)
    return row, chunk
