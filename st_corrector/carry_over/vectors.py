"""Embeddings in a file or folder, whatever its format: read in blocks, and written to a new one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..cache.arrays import Embeddings, as_tensor
from ..correctors import Corrector
from ..data.corpus import Corpus
from ..errors import InputError
from ..storage.files import make_folder
from .mapping import ROWS_AT_ONCE, IndexMap, Rows


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
    def take(self, rows: Rows) -> Tensor:
        """The embeddings of these rows: float32, ``(len(rows), d)``."""

    @abstractmethod
    def at(self, path: str | Path | None) -> Vectors:
        """What :meth:`upgrade` has written into ``path``."""

    def before(self, path: str | Path | None) -> Vectors:
        """What served before :meth:`upgrade` wrote into ``path``."""
        return self

    @property
    def metric(self) -> str | None:
        """What they are ranked by where they serve: ``"dot"``, ``"cosine"``, ``"l2"``, or anything else by its own
        name; None where that is not known, as of a file.
        """
        return None

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What they depend on, by component; empty if unknown."""
        return {}

    def require_corpus(self, corpus: Corpus) -> None:
        """Refuse unless row ``i`` is target ``i``, as far as that is known.

        Raises:
            InputError: they are of another corpus.
        """
        corpus.require_rows(str(self.path), self.count, self.fingerprint.get("corpus"))

    def require_metric(self, how: IndexMap, metric: str, where: str = "") -> None:
        """Refuse what ranks otherwise than the model does. On vectors of unit length cosine, inner product and
        Euclidean distance rank alike; others are ranked by the inner product alone.

        Args:
            metric: what it ranks by: ``"dot"``, ``"cosine"``, ``"l2"``, or anything else by its own name.
            where: what is ranked so, in the error; by default the embeddings' path.

        Raises:
            InputError: it ranks otherwise.
        """
        if metric not in (("dot", "cosine", "l2") if how.unit else ("dot",)):
            raise InputError(
                f"{where or self.path} compares by {metric}, and the model by {'cosine' if how.unit else 'dot product'}"
                f": its ranking would be another one. Make it again to compare by {'cosine or ' * how.unit}dot product."
            )

    def require_rows(self) -> None:  # noqa: B027
        """Refuse if it is unknown which target each row belongs to.

        Raises:
            InputError: it is unknown.
        """

    @abstractmethod
    def write(self, path: Path, how: IndexMap, blocks: Iterable[Tensor]) -> None:
        """Write the output of ``how`` into ``path``, in the same format as the input."""

    def check(self, how: IndexMap) -> None:
        """Refuse a map from other embeddings.

        Raises:
            InputError: its dimension differs or, as far as known, the embeddings that it maps from.
        """
        if how.dim != self.dim:
            raise InputError(
                f"{self.path} holds embeddings of {self.dim} dimensions, the corrector maps from {how.dim}."
            )

    def upgrade(self, how: Corrector | IndexMap, path: str | Path | None, progress: bool = True) -> None:
        """Write what takes the place of the embeddings into ``path``, block by block; the originals stay unchanged.

        Args:
            path: a new file or folder, or for a store the address of a new table; None for in place, in a store.

        Raises:
            InputError: the map does not fit, or ``path`` exists.
            NonFiniteError: an embedding is NaN or infinite, or becomes so.
            StorageError: ``path`` cannot be written; partial output is removed.
        """
        if path is None:
            raise InputError(f"{self.path} is a file: it is never written over. Say where the new one is to be.")
        how, path = IndexMap.of(how), Path(path)
        self.check(how)
        if path.exists():
            raise InputError(f"{path} exists already: choose another name, or move it away.")
        make_folder(path.parent)
        with tqdm(total=self.count, desc="Carrying over", unit=" targets", disable=not progress) as bar:

            def blocks() -> Iterator[Tensor]:
                for start in range(0, self.count, ROWS_AT_ONCE):
                    rows = np.arange(start, min(start + ROWS_AT_ONCE, self.count))
                    yield how(self.take(rows), rows)
                    bar.update(len(rows))

            self.write(path, how, blocks())


class TensorVectors(Vectors):
    """Embeddings in memory, or a memory-mapped array of them, ``(n, d)``."""

    def __init__(self, embeddings: Embeddings) -> None:
        super().__init__(Path("<memory>"))
        self._embeddings = as_tensor(embeddings, InputError)
        self.count, self.dim = self._embeddings.shape

    def take(self, rows: Rows) -> Tensor:
        return self._embeddings[torch.from_numpy(rows)].float().cpu()

    def at(self, path: str | Path | None) -> Vectors:
        raise InputError(f"Embeddings in memory are not those of {path}.")

    def write(self, path: Path, how: IndexMap, blocks: Iterable[Tensor]) -> None:
        raise InputError("Embeddings in memory are not written: use upgrade_embeddings.")
