"""Which reader a file of served embeddings needs."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import InputError
from .array_files import CacheVectors, NumpyVectors, SafetensorsVectors
from .faiss_files import FaissVectors
from .vectors import Vectors


def open_vectors(path: str | os.PathLike[str], tensor: str | None = None, factory: str | None = None) -> Vectors:
    """Open ``path``: a ``.npy`` or ``.safetensors`` file, the folder of an :class:`EmbeddingCache`, or, with any other
    name, a FAISS index whose vectors can be reconstructed.

    Args:
        tensor: name of the tensor in a safetensors file; by default the only two-dimensional one.
        factory: factory string for a new FAISS index; by default it is of the same kind.

    Raises:
        InputError: there is nothing, or no floating-point embeddings, one per row.
        CacheError: the cache is damaged or not finished.
    """
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
        return FaissVectors(file, factory)
    if factory is not None:
        raise InputError(f"factory={factory!r} is for FAISS indices, which {file} is not.")
    return found
