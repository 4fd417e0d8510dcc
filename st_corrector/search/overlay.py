"""Rows written back during a run: an overlay over the cache, which itself never changes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

_SMALLEST = 1_024


class Overlay:
    """Vectors that replace some of the cache's rows once they are written.

    A training step encodes some targets again. Writing them back *in the frame of the stale embeddings*
    (:meth:`Corrector.pull_back`) keeps rows of every age in one frame: later correctors move a written row along with
    the drift learnt since. Memory: 4 bytes for each target of the corpus, and a float32 vector for each row written.

    Args:
        size: number of targets ``N``.
        dim: dimension ``d``.
        first_row: row of the first target, if they are a part of the corpus. Other rows are not kept.
    """

    def __init__(self, size: int, dim: int, first_row: int = 0) -> None:
        self._first_row = first_row
        self._slot = torch.full((size,), -1, dtype=torch.int32)
        self._rows = torch.empty(0, dtype=torch.int64)
        self._vectors = torch.empty(0, dim)
        self._written_at = torch.empty(0, dtype=torch.int64)
        self._used = 0
        self.unit = True
        """Whether all written vectors are of unit length."""

    def __len__(self) -> int:
        """The number of written rows."""
        return self._used

    @property
    def rows(self) -> Tensor:
        """The written rows, in order of their first write."""
        return self._rows[: self._used]

    @property
    def vectors(self) -> Tensor:
        """The vectors of :attr:`rows`, ``(len(overlay), d)``."""
        return self._vectors[: self._used]

    def memory(self, rows: int) -> dict[str, int]:
        """Bytes that the overlay takes at most while ``rows`` are written, by purpose."""
        size, dim = len(self._slot), self._vectors.shape[1]
        capacity = min(max(2 * rows, _SMALLEST), size) if rows else 0
        # While growing, it holds the old memory and the new one of twice the size.
        vectors = capacity * 3 // 2 * (4 * dim + 16)
        return {f"overlay of up to {min(rows, size):,} written rows": vectors, f"its index of {size:,} rows": 4 * size}

    def has(self, rows: Tensor) -> Tensor:
        """Which of ``rows`` ``(n,)`` have been written: ``(n,)``, bool."""
        return self.slots(rows) >= 0

    def holds(self, rows: Tensor) -> Tensor:
        """Which of ``rows`` are among its targets."""
        return (rows >= self._first_row) & (rows < self._first_row + len(self._slot))

    def slots(self, rows: Tensor) -> Tensor:
        """Position of each of ``rows`` in :attr:`rows` and :attr:`vectors`, −1 if it has not been written."""
        self.to(rows.device)
        local = (rows - self._first_row).clamp(0, len(self._slot) - 1)
        return torch.where(self.holds(rows), self._slot[local].long(), -1)

    def written_at(self, rows: Tensor) -> Tensor:
        """The step of the last write of each of ``rows`` ``(n,)``, which must be written rows: ``(n,)``."""
        return self._written_at[self.slots(rows)]

    def write(self, rows: Tensor, vectors: Tensor, step: int | Tensor = 0) -> None:
        """Write ``vectors`` ``(n, d)`` for the distinct ``rows`` ``(n,)`` at ``step``."""
        self.to(vectors.device)
        vectors = vectors.detach().float()
        # For all written vectors, other parts' too: all parts must agree on whether to correct the queries.
        self.unit = self.unit and _are_unit(vectors)
        step = torch.as_tensor(step, device=rows.device).expand(len(rows))
        mine = self.holds(rows)
        rows, vectors, step = rows[mine], vectors[mine], step[mine]
        new = rows[self.slots(rows) < 0]
        self._reserve(self._used + len(new))
        slots = torch.arange(self._used, self._used + len(new), dtype=torch.int32, device=rows.device)
        self._slot[new - self._first_row] = slots
        self._rows[self._used : self._used + len(new)] = new
        self._used += len(new)
        written = self.slots(rows)
        self._vectors[written] = vectors
        self._written_at[written] = step

    def _reserve(self, used: int) -> None:
        """Room for ``used`` rows; it doubles, so that the cost of writing stays linear."""
        capacity = len(self._rows)
        if used <= capacity:
            return
        capacity = min(max(used, 2 * capacity, _SMALLEST), len(self._slot))
        grown_rows = self._rows.new_empty(capacity)
        grown_vectors = self._vectors.new_empty(capacity, self._vectors.shape[1])
        grown_times = self._written_at.new_empty(capacity)
        grown_rows[: self._used], grown_vectors[: self._used] = self.rows, self.vectors
        grown_times[: self._used] = self._written_at[: self._used]
        self._rows, self._vectors, self._written_at = grown_rows, grown_vectors, grown_times

    def between(self, first_row: int, end: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """The written rows among ``first_row … end − 1``: offsets from the first ``(n,)``, ascending, and positions in
        :attr:`vectors` ``(n,)``.
        """
        self.to(device)
        slot = self._slot[first_row - self._first_row : end - self._first_row] if self._used else self._slot[:0]
        written = (slot >= 0).nonzero().flatten()
        return written, slot[written]

    def replace(self, stale: Tensor, rows: Tensor) -> Tensor:
        """``stale`` ``(n, d)``, the cache's vectors of ``rows``, with written rows replaced."""
        if not self._used:
            return stale
        self.to(stale.device)
        slot = self.slots(rows)
        written = (slot >= 0).nonzero().flatten()
        # Out of place: ``stale`` may be the cache's own memory.
        return stale.index_copy(0, written, self._vectors[slot[written]]) if len(written) else stale

    def state_dict(self) -> dict[str, Tensor]:
        """The written rows, their vectors, and their steps."""
        written_at = self._written_at[: self._used]
        return {"rows": self.rows.clone(), "vectors": self.vectors.clone(), "written_at": written_at.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the :meth:`state_dict` of an overlay of the same corpus."""
        self.load_state_dicts([state])

    def load_state_dicts(self, states: Iterable[dict[str, Tensor]]) -> None:
        """The same from overlays of successive parts of the corpus; only its own targets are kept."""
        self._slot.fill_(-1)
        self._used, self.unit = 0, True
        for state in states:
            rows, vectors, written_at = (state[name] for name in ("rows", "vectors", "written_at"))
            self.unit = self.unit and _are_unit(vectors)
            mine = self.holds(rows)
            self.write(*(each[mine].to(self._slot.device) for each in (rows, vectors, written_at)))

    def to(self, device: torch.device | str) -> Overlay:
        """Move everything to ``device``, in place; returns itself."""
        if self._slot.device != torch.device(device):
            self._slot, self._rows, self._vectors, self._written_at = (
                each.to(device) for each in (self._slot, self._rows, self._vectors, self._written_at)
            )
        return self


def _are_unit(vectors: Tensor) -> bool:
    return bool(((vectors.norm(dim=-1) - 1).abs() < 1e-5).all())
