"""FAISS indices as people serve them: of every kind, with ids of every kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

CARRIED_OVER = {
    "Flat": 1.0,
    "SQ8": 0.95,
    "SQ4": 0.6,
    "SQfp16": 0.99,
    "PQ12x4": 0.3,
    "HNSW16": 0.9,
    "IVF16,Flat": 1.0,
    "IVF16_HNSW8,Flat": 0.95,
    "IVF16,SQ8": 0.95,
    "IVF16,PQ12x4": 0.3,
    "PCA24,Flat": 0.9,
    "PCA24,SQ8": 0.9,
    "PCA24,PQ12x4": 0.3,
    "PCA24,HNSW16": 0.85,
    "PCAR24,IVF16,Flat": 0.9,
    "PCA24,IVF16,SQ8": 0.9,
    "PCA24,IVF16,PQ12x4": 0.3,
    "OPQ4,Flat": 1.0,
    "OPQ4_8,Flat": 0.2,
    "OPQ4,SQ8": 0.9,
    "OPQ4,PQ4x4": 0.2,
    "OPQ4,HNSW16": 0.9,
    "OPQ4,IVF16,Flat": 0.99,
    "OPQ4,IVF16,SQ8": 0.9,
    "OPQ4,IVF16,PQ4x4": 0.2,
    "PCA20,OPQ4_16,IVF16,PQ4x4": 0.2,
    "RR24,IVF16,Flat": 0.99,
}
"""Kinds for 24 dimensions that can be carried over, by FAISS's factory strings: the least share of the first 10 that
each finds of some hundred vectors without structure.
"""

REFUSED = {
    "IVF16,PQ12x4fs": "cannot give back",
    "PQ12x4fs": "cannot give back",
    "RaBitQfs": "cannot give back",
    "IVF16,RaBitQfs": "cannot give back",
    "L2norm,Flat": "not a rotation",
    "PCAW12,Flat": "not a rotation",
    "ITQ12,Flat": "not a rotation",
    "Pad32,Flat": "not a rotation",
    "IVF16,FlatDedup": "factory",
    "HNSW16_SQ8": "factory",
    "HNSW16_PQ12x4": "factory",
    "NSG16": "factory",
    "IVF16,SQ8,RFlat": "factory",
    "LSH": "factory",
    "RQ4x4": "factory",
    "IVF16,RQ4x4": "factory",
    "RaBitQ": "factory",
    "IVF16,RaBitQ": "factory",
    "IVF16(PQ4x4),Flat": "factory",
    "IMI2x4,Flat": "factory",
    "IMI2x4,PQ12x4": "factory",
}
"""Kinds of which that cannot be made anew, and a word of what is said."""


def repeated(count: int) -> np.ndarray:
    """Passages under their document's id, three and more of them, near to one another and apart."""
    return np.random.default_rng(0).integers(0, count // 3, count)


def odd(count: int) -> np.ndarray:
    """Negative ones, −1 among them, which FAISS takes for nothing, and hashes of more than 62 bits."""
    ids = np.random.default_rng(0).permutation(count) - count // 2
    return np.where(ids > count // 4, 2**62 + ids, ids)


def shuffled(count: int) -> np.ndarray:
    """Some of ten times as many."""
    return np.random.default_rng(0).permutation(10 * count)[:count]


def faiss_index(
    factory: str, vectors: np.ndarray, ids: np.ndarray | None = None, metric: str = "METRIC_INNER_PRODUCT"
) -> Any:
    """An index of ``vectors``."""
    faiss = pytest.importorskip("faiss")
    index = faiss.index_factory(vectors.shape[1], factory, getattr(faiss, metric))
    if not index.is_trained:
        index.train(vectors)
    index.add(vectors) if ids is None else index.add_with_ids(vectors, ids.astype(np.int64))
    return index


def on_disk(index: Any, path: Path) -> Path:
    """``path``, into which the index has been written."""
    pytest.importorskip("faiss").write_index(index, str(path))
    return path


def as_kept(factory: str, vectors: np.ndarray) -> np.ndarray:
    """What an index of this kind makes of ``vectors``, one by one, by FAISS's own account."""
    faiss = pytest.importorskip("faiss")
    index = faiss_index(factory.replace("IDMap2,", "").replace("IDMap,", ""), vectors)
    if (ivf := faiss.try_extract_index_ivf(index)) is not None:
        ivf.make_direct_map()
    return index.reconstruct_n(0, len(vectors))
