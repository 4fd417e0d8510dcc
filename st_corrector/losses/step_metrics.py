"""What training logs of its steps: means, and where their time went."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_EVENTS_KEPT = 1024


class StepMetrics:
    """Means of what the steps since the last log measured, and where their time went.

    Adding costs no synchronisation with a GPU; :meth:`pop` does.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor | float] = {}
        self._counts: dict[str, int] = defaultdict(int)
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    def add(self, **values: Tensor | float) -> None:
        """Take in one step's scalars."""
        for name, value in values.items():
            value = value.detach() if isinstance(value, Tensor) else value
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] += 1

    @contextmanager
    def timed(self, part: str, device: torch.device) -> Iterator[None]:
        """Add the block's time to ``seconds_<part>``: on a GPU the time between its first and last kernel."""
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            stream = torch.cuda.current_stream(device)
            start.record(stream)
            yield
            end.record(stream)
            self._events.append((part, start, end))
            if len(self._events) > _EVENTS_KEPT:  # the metrics may never be read
                self._count_events(_EVENTS_KEPT // 2)
        else:
            started = time.perf_counter()
            yield
            self._seconds[part] += time.perf_counter() - started

    def pop(self) -> dict[str, float]:
        """The means since the last call, and the seconds of all steps since then by part; then starts again."""
        means = {name: float(total) / self._counts[name] for name, total in self._sums.items()}
        self._count_events(len(self._events))
        seconds = {f"seconds_{part}": total for part, total in self._seconds.items()}
        self.__init__()  # type: ignore[misc]
        return means | seconds

    def _count_events(self, count: int) -> None:
        """Turn the oldest ``count`` pairs of events into seconds; those of past steps have ended by now."""
        for part, start, end in self._events[:count]:
            end.synchronize()
            self._seconds[part] += start.elapsed_time(end) / 1000
        del self._events[:count]
