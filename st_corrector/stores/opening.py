"""Which reader served embeddings need, wherever they are."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ..carry_over.array_files import CacheVectors, NumpyVectors, SafetensorsVectors
from ..carry_over.faiss_files import FaissVectors
from ..carry_over.vectors import Vectors
from ..errors import InputError

POSTGRESQL, LANCEDB, QDRANT = ("postgresql://", "postgres://"), "lancedb:", "qdrant:"


def is_store(address: str | os.PathLike[str]) -> bool:
    """Whether this is the address of a vector store, and no file or folder."""
    return str(address).startswith((*POSTGRESQL, LANCEDB, QDRANT))


def open_vectors(
    path: str | os.PathLike[str],
    tensor: str | None = None,
    factory: str | None = None,
    ids: Sequence[str | None] | None = None,
) -> Vectors:
    """Open embeddings that are served.

    - a ``.npy`` or ``.safetensors`` file, or the folder of an :class:`EmbeddingCache`;
    - a table of PostgreSQL (``postgresql://…#table``) or LanceDB (``lancedb:…#table``), a collection of Qdrant
      (``qdrant:…#collection``);
    - with any other name a FAISS index whose vectors can be reconstructed.

    Args:
        tensor: name of the tensor in a safetensors file; by default the only two-dimensional one.
        factory: factory string for a new FAISS index; by default it is of the same kind.
        ids: of the corpus, in its order, for a store, which knows its targets by them, and for a FAISS index, which
            may; other files have rows. None for a target that has been withdrawn, which a store need not have.

    Raises:
        InputError: there is nothing, or no floating-point embeddings, one per row.
        CacheError: the cache is damaged or not finished.
        StorageError: a server cannot be reached.
    """
    if is_store(path):
        if tensor is not None or factory is not None:
            raise InputError("tensor and factory are for files.")
        if str(path).startswith(LANCEDB):
            from .lance import LanceVectors

            return LanceVectors(str(path), ids)
        if str(path).startswith(QDRANT):
            from .qdrant import QdrantVectors

            return QdrantVectors(str(path), ids)
        from .pgvector import PgVectors

        return PgVectors(str(path), ids)
    file = Path(path)
    if not file.exists():
        raise InputError(f"{file} does not exist: expected a .npy or .safetensors file, a FAISS index or a cache.")
    if tensor is not None and file.suffix != ".safetensors":
        raise InputError(f"tensor={tensor!r} is for .safetensors files, which {file} is not.")
    if file.is_dir():
        found: Vectors = CacheVectors(file)
    elif file.suffix == ".npy":
        found = NumpyVectors(file)
    elif file.suffix == ".safetensors":
        found = SafetensorsVectors(file, tensor)
    else:
        return FaissVectors(file, factory, ids)
    if factory is not None:
        raise InputError(f"factory={factory!r} is for FAISS indices, which {file} is not.")
    return found
