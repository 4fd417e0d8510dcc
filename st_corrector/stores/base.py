"""What all vector stores share: rows are known by keys, and carried over while the store serves."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..carry_over.mapping import IndexMap, Rows
from ..carry_over.vectors import Vectors
from ..correctors import Corrector
from ..errors import InputError, StorageError

AT_ONCE = 4_096
"""Rows, read and written together."""
_ROUNDS = 20  # through rows that were written meanwhile

Place = TypeVar("Place")
"""Where new vectors go."""


class Store(Vectors, Generic[Place]):
    """Embeddings in a vector store, one per target, known by a key.

    Beside each new vector stands a digest of the one that it was made of, until all are done: so a run that was killed
    goes on, and rows that are added or changed meanwhile are done again.

    Args:
        address: of the collection, ``…#collection``.
    """

    def __init__(self, address: str) -> None:
        super().__init__(Path(address))
        self.address = address

    def known_by(self, keys: list[Any], ids: Sequence[str | None] | None, names: Sequence[Any] | None = None) -> None:
        """Set the rows: in the order of ``ids``, or of the keys. Others are carried over, too, but are no rows.

        Args:
            ids: None for a target that need not be there: its embedding is 0.
            names: the id in the corpus of each key, or None where there is none; by default the key itself.

        Raises:
            InputError: some of the ids are not there, or there twice.
        """
        if ids is not None:
            named = zip(keys if names is None else names, keys, strict=True)
            known = [(str(name), key) for name, key in named if name is not None]
            if not known:
                raise InputError(f"{self.address}: no row has anything in that field: does another hold the ids?")
            by_id = dict(known)
            if missing := [each for each in ids if each is not None and each not in by_id]:
                raise InputError(
                    f"{self.address} has {len(keys):,} rows, the corpus {len(ids):,} targets, of which "
                    f"{len(missing):,} are not there ({', '.join(map(repr, missing[:3]))}): the ids of the corpus must "
                    + (
                        "be those of that field."
                        if names is not None
                        else "be the keys of the store. If another field holds them, name it, as in #collection@field."
                    )
                )
            count = Counter(name for name, _ in known)
            if twice := [each for each in ids if each is not None and count[each] > 1]:
                raise InputError(f"{self.address}: several rows have the id {twice[0]!r}; each target must have one.")
            keys = [None if each is None else by_id[each] for each in ids]
        self.count = len(keys)
        self.keys = keys
        self.row_of = {key: row for row, key in enumerate(keys) if key is not None}
        self._taken = np.zeros(self.count, dtype=np.uint64)

    def _changed(self, rows: Rows, vectors: np.ndarray) -> np.ndarray:
        """Of which rows these vectors are others than those that were taken first, bool; what is taken now is noted."""
        # A hash of each, sums of products modulo 2⁶⁴ with odd numbers: the vectors themselves would need much memory.
        bits = np.ascontiguousarray(vectors, dtype=np.float32).view(np.uint32).astype(np.uint64)
        factors = np.random.default_rng(0).integers(2**63, size=bits.shape[1], dtype=np.uint64) * 2 + 1
        found = np.maximum((bits * factors).sum(1, dtype=np.uint64), 1)
        before = self._taken[rows]
        self._taken[rows] = np.where(before == 0, found, before)
        changed: np.ndarray = (before != 0) & (before != found)
        return changed

    @property
    def _names(self) -> list[str | None]:
        """The ids by which the rows are known in a store of the same keys."""
        return [None if key is None else str(key) for key in self.keys]

    @staticmethod
    def _the_only(metrics: Collection[str]) -> str | None:
        """What all indices rank by; None without any, or if they differ."""
        return next(iter(metrics)) if len(metrics) == 1 else None

    def take(self, rows: Rows) -> Tensor:
        """The embeddings of these rows: float32, ``(len(rows), d)``.

        Raises:
            InputError: one has been deleted meanwhile.
        """
        found, none = [], np.zeros(self.dim, dtype=np.float32)
        for start in range(0, len(rows), AT_ONCE):
            keys = [self.keys[row] for row in rows[start : start + AT_ONCE]]
            sought = [key for key in keys if key is not None]
            read = self.read(sought)[0] if sought else {}
            if gone := [key for key in sought if key not in read]:
                raise InputError(f"{self.address}: row {gone[0]!r} has been deleted meanwhile.")
            found.append(np.stack([none if key is None else read[key] for key in keys]))
            self._changed(rows[start : start + AT_ONCE], found[-1])
        return torch.from_numpy(np.concatenate(found) if found else np.empty((0, self.dim), dtype=np.float32))

    def write(self, path: Path, how: IndexMap, blocks: Iterable[Tensor]) -> None:
        raise InputError("A store is written row by row: see upgrade.")

    def upgrade(self, how: Corrector | IndexMap, path: str | Path | None = None, progress: bool = True) -> None:
        """Write what takes the place of the embeddings, while the store serves.

        Args:
            path: the address of a new collection in the same store; None for in place.

        Raises:
            InputError: the map does not fit, the output is no new collection, another process is at it, or there is no
                right to write.
            StorageError: the store has failed, or rows are written faster than they are mapped. What is done is kept.
        """
        how = IndexMap.of(how)
        self.check(how)
        self._encoded_from: dict[Any, Any] = {}
        with self.alone():
            place = self.begun(path, how)
            todo = self.todo(place)
            with tqdm(total=len(todo), desc="Carrying over", unit=" targets", disable=not progress) as bar:
                for _ in range(_ROUNDS):
                    for start in range(0, len(todo), AT_ONCE):
                        self.carry_over(place, how, todo[start : start + AT_ONCE])
                        bar.update(len(todo[start : start + AT_ONCE]))
                    if not (todo := self.todo(place)):
                        break
                else:
                    raise StorageError(f"{self.address} is written faster than it can be carried over: go on later.")
            self.finish(place)

    def carry_over(self, place: Place, how: IndexMap, keys: list[Any]) -> None:
        """One block."""
        read, digests = self.read(keys)
        keys = [key for key in keys if key in read]  # others have been deleted meanwhile
        if not keys:
            return
        stale = np.stack([read[key] for key in keys])
        # A row that has come since is none of the map's, nor is one that has changed: what was encoded again was the
        # target as it was when its vector was taken. Each gets a number of its own that is none.
        same = {key: self._encoded_from.setdefault(key, digests[key]) == digests[key] for key in keys}
        rows = np.array([self.row_of.get(key, -1 - n) if same[key] else -1 - n for n, key in enumerate(keys)])
        known = np.flatnonzero(rows >= 0)
        changed = known[self._changed(rows[known], stale[known])]
        rows[changed] = -1 - changed
        new = how(torch.from_numpy(stale), rows, keys).numpy()
        self.put(place, keys, new, [digests[key] for key in keys])

    @abstractmethod
    def read(self, keys: list[Any]) -> tuple[dict[Any, np.ndarray], dict[Any, Any]]:
        """Vectors, float32, of those keys that are there, and digests of all that is carried over with them."""

    @abstractmethod
    def alone(self) -> AbstractContextManager[None]:
        """Keep other processes out."""

    @abstractmethod
    def require_output(self, path: str | Path | None) -> None:
        """Refuse an output that :meth:`upgrade` could not write, before anything is encoded.

        Raises:
            InputError: it is no other collection of the same store, is there already, or this one cannot be upgraded in
                place.
        """

    @abstractmethod
    def begun(self, path: str | Path | None, how: IndexMap) -> Place:
        """Where new vectors go, made where it is not there yet."""

    @abstractmethod
    def todo(self, place: Place) -> list[Any]:
        """Keys of rows that have no new vector yet, or one that was made of another."""

    @abstractmethod
    def put(self, place: Place, keys: list[Any], vectors: np.ndarray, digests: list[Any]) -> None:
        """Write a block, with all that belongs to its rows, and read it back."""

    @abstractmethod
    def finish(self, place: Place) -> None:
        """Let what is new serve."""
