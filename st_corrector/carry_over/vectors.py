"""Embeddings in a file or folder, whatever its format: read in blocks, and written to a new one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from tqdm.auto import tqdm

from ..correctors import AffineMap, Corrector
from ..errors import InputError
from ..storage.files import make_folder
from .estimate import ROWS_AT_ONCE, upgrade_embeddings

Ids = np.ndarray[Any, np.dtype[np.int64]]


class Vectors(ABC):
    """Embeddings in a file or folder, one row per corpus row: open them with :func:`open_vectors`.

    Args:
        path: the file or folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    count: int
    dim: int

    @abstractmethod
    def take(self, rows: Ids) -> Tensor:
        """The embeddings of these rows: float32, ``(len(rows), d)``."""

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What they depend on, by component; empty if unknown."""
        return {}

    def require_rows(self) -> None:  # noqa: B027
        """Refuse if it is unknown which target each row belongs to.

        Raises:
            InputError: it is unknown.
        """

    @abstractmethod
    def write(self, path: Path, corrector: Corrector, blocks: Iterable[Tensor]) -> None:
        """Write the output of ``corrector`` into ``path``, in the same format as the input."""

    def check(self, corrector: Corrector) -> None:
        """Refuse a corrector that maps from other embeddings.

        Raises:
            InputError: its dimension differs or, as far as known, the embeddings that it maps from.
        """
        if corrector.dim != self.dim:
            raise InputError(
                f"{self.path} holds embeddings of {self.dim} dimensions, the corrector maps from {corrector.dim}."
            )

    def upgrade(self, corrector: Corrector, path: Path, progress: bool = True) -> None:
        """Write the corrected embeddings into ``path``, block by block; the originals stay unchanged.

        Raises:
            InputError: the corrector does not fit, or ``path`` exists.
            NonFiniteError: an embedding is NaN or infinite, or becomes so.
            StorageError: ``path`` cannot be written; partial output is removed.
        """
        self.check(corrector)
        if path.exists():
            raise InputError(f"{path} exists already: choose another name, or move it away.")
        make_folder(path.parent)
        with tqdm(total=self.count, desc="Carrying over", unit=" targets", disable=not progress) as bar:

            def blocks() -> Iterator[Tensor]:
                for start in range(0, self.count, ROWS_AT_ONCE):
                    rows = np.arange(start, min(start + ROWS_AT_ONCE, self.count))
                    yield upgrade_embeddings(self.take(rows), corrector)
                    bar.update(len(rows))

            self.write(path, corrector, blocks())


def width_after(corrector: Corrector) -> int:
    """The dimension of a corrector's output."""
    return corrector.new_dim if isinstance(corrector, AffineMap) else corrector.dim
