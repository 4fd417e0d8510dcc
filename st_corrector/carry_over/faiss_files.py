"""Served embeddings in FAISS indices."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError, StorageError
from ..search.faiss_index import faiss_module
from ..storage.files import whole
from .mapping import IndexMap, Rows
from .vectors import Vectors

_TRAINED_ON = 262_144  # maximum rows for training a new index


class FaissVectors(Vectors):
    """A FAISS index whose vectors can be reconstructed; compressed ones only approximately.

    The new index has the same kind, metric, parameters and ids. Its trained parts (rotations, centroids, codebooks) are
    trained again on the new vectors. So only kinds whose trained parts are known are supported: Flat, SQ, PQ, HNSW over
    Flat, IVF over Flat, SQ or PQ (with centroids in Flat or HNSW), these after PCA, OPQ or a random rotation, and IDMap
    of them. Others need ``factory``.

    Rows are those of ``ids`` where these are the index's own, all different, and else ordered by id; ids may repeat.
    Repeated ids are in the order in which they were added, except in an IVF index without IDMap, which does not know
    that order: see :meth:`require_rows`.

    Args:
        path: the index's file.
        factory: makes the new index from this string instead; required if the width changes.
        ids: of the corpus, in its order.

    Raises:
        InputError: it is not a FAISS index, its vectors cannot be reconstructed, no new one of its kind can be made, or
            it cannot be told whether its ids are the corpus's or numbers of its rows.
    """

    def __init__(self, path: Path, factory: str | None = None, ids: Sequence[str | None] | None = None) -> None:
        super().__init__(path)
        self._faiss, self._factory, self._names = faiss_module(), factory, ids
        try:
            self._index = self._faiss.read_index(str(path))
        except RuntimeError as error:
            raise InputError(f"{path} is not readable as a FAISS index: {str(error).splitlines()[-1]}") from error
        self.count, self.dim = self._index.ntotal, self._index.d
        if not self.count:
            raise InputError(f"{path} is an index without vectors.")
        self._layers = _layers(self._index)
        self._require_known()
        keys, stored = self._stored()
        order = np.argsort(stored, kind="stable")
        order = order[self._places_of_names(stored[order])]
        self._ids, self._keys = stored[order], keys[order]
        try:
            self.take(np.arange(1))
        except RuntimeError as error:
            raise InputError(
                f"{path} is an {type(self._layers.base).__name__}, from which FAISS cannot reconstruct vectors: carry "
                "over the vectors that it was made of, and build it again."
            ) from error

    def _require_known(self) -> None:
        faiss, base = self._faiss, self._layers.base
        kind = type(base).__name__
        # Asking for its vectors would kill the process.
        if isinstance(base, (faiss.IndexIVFFastScan, faiss.IndexFastScan)):
            raise InputError(
                f"{self.path} is an {kind}, whose vectors FAISS cannot give back: carry over the vectors that it was "
                "made of, and build it again."
            )
        for transform in self._layers.transforms:
            if not _is_reversible(transform):
                raise InputError(
                    f"{self.path} is an {kind} behind a transform ({type(transform).__name__}) that is not a rotation, "
                    "so that FAISS cannot give back the vectors before it: carry over the vectors that the index was "
                    "made of, and build it again."
                )
        if self._factory is not None:
            return
        centroids = type(faiss.downcast_index(base.quantizer)).__name__ if isinstance(base, faiss.IndexIVF) else None
        if centroids not in (None, *_FLAT, "IndexHNSWFlat"):
            kind += f" with centroids in a {centroids}"
        elif kind in _KINDS:
            return
        raise InputError(
            f"{self.path} is an {kind}: a new one of this kind cannot be made from it. Say how it is to be made, with "
            "factory=…, or --factory."
        )

    def _stored(self) -> tuple[Rows, Rows]:
        """The keys by which the innermost index reconstructs its vectors, and these vectors' ids."""
        faiss, base = self._faiss, self._layers.base
        keys = ids = np.arange(self.count)
        self._direct_map = faiss.DirectMap.NoMap
        if isinstance(base, faiss.IndexIVF):
            lists = base.invlists
            sizes = [lists.list_size(number) for number in range(base.nlist)]
            if sum(sizes) != self.count:
                raise InputError(
                    f"{self.path} is an {type(base).__name__} that keeps {sum(sizes):,} of {self.count:,} vectors: "
                    "carry over the vectors that it was made of, and build it again."
                )
            # FAISS's own map from ids to places keeps one place per id. So we use our own numbers as keys, mapped to a
            # list's number and a place in that list.
            places = np.concatenate([(number << 32) + np.arange(size) for number, size in enumerate(sizes)])
            ids = np.concatenate([self._in_list(lists, number, size) for number, size in enumerate(sizes)])
            self._direct_map = base.direct_map.type
            base.set_direct_map_type(faiss.DirectMap.NoMap)
            base.direct_map.type = faiss.DirectMap.Array
            faiss.copy_array_to_vector(places, base.direct_map.array)
        for id_map in reversed(self._layers.id_maps):
            # Inside an IDMap, an id is the position of the outer id.
            keys, ids = keys[order := np.argsort(ids)], ids[order]
            if not np.array_equal(ids, np.arange(len(id_map))):
                raise InputError(
                    f"{self.path}: the ids of its IDMap do not belong to what is inside any more, as where vectors "
                    "were removed from an IDMap over an IVF index: searches give wrong ids too. Build it again."
                )
            ids = id_map
        return keys, ids

    def _places_of_names(self, ids: Rows) -> Rows:
        """Where the corpus's targets are among ``ids``, which ascend: as they are, unless these are the corpus's ids.

        Raises:
            InputError: they may be the corpus's ids, or count its rows, in another order.
        """
        as_they_are = np.arange(self.count)
        try:
            named = np.array([int(name or "") for name in self._names or []], dtype=np.int64)
        except (ValueError, OverflowError):  # no numbers, or none of FAISS's
            return as_they_are
        repeat = (ids[1:] == ids[:-1]).any()
        if repeat or not np.array_equal(np.sort(named), ids) or np.array_equal(named, ids):
            return as_they_are
        if not np.array_equal(ids, as_they_are):
            return np.searchsorted(ids, named)
        if not self._layers.id_maps:
            return as_they_are
        raise InputError(
            f"The ids in {self.path} are 0 … {self.count - 1:,}, and so are the corpus's, in another order: it cannot "
            "be told whether they are the corpus's ids or count its rows. Put the corpus in ascending order of its ids "
            "if they are its ids; if they count its rows, give its targets ids that are no such numbers."
        )

    def _in_list(self, lists: Any, number: int, size: int) -> Rows:
        if not size:
            return np.empty(0, dtype=np.int64)
        ids: Rows = self._faiss.rev_swig_ptr(lists.get_ids(number), size)
        return ids.astype(np.int64)  # a copy: the list's own memory goes with it

    def require_rows(self) -> None:
        has_order = self._layers.id_maps or not isinstance(self._layers.base, self._faiss.IndexIVF)
        if not has_order and (self._ids[1:] == self._ids[:-1]).any():
            raise InputError(
                f"In {self.path} ids repeat, and an IVF index does not know in which order vectors of one id were "
                "added: their targets are unknown. Without a corpus they can be carried over."
            )

    def take(self, rows: Rows) -> Tensor:
        vectors = self._layers.base.reconstruct_batch(self._keys[rows])
        for transform in reversed(self._layers.transforms):
            vectors = transform.reverse_transform(vectors)
        return torch.from_numpy(vectors)

    @property
    def metric(self) -> str:
        metrics = {self._faiss.METRIC_INNER_PRODUCT: "dot", self._faiss.METRIC_L2: "l2"}
        return metrics.get(self._index.metric_type, f"FAISS's metric {self._index.metric_type}")

    def check(self, how: IndexMap) -> None:
        super().check(how)
        self.require_metric(how, self.metric)
        if how.new_dim != self.dim and self._factory is None:
            raise InputError(
                f"The new embeddings have {how.new_dim} dimensions instead of {self.dim}: say how the new index "
                "is to be made, with factory=…, or --factory."
            )
        index = self._index if self._factory is None else self._made(how.new_dim)
        if (needed := _needed(_layers(index))) > self.count:
            raise InputError(
                f"An index of this kind learns from at least {needed:,} vectors, and there are {self.count:,}: say how "
                "the new one is to be made otherwise, with factory=…, or --factory."
            )

    def at(self, path: str | Path | None) -> FaissVectors:
        return FaissVectors(Path(str(path)), self._factory, self._names)

    def write(self, path: Path, how: IndexMap, blocks: Iterable[Tensor]) -> None:
        faiss, ids = self._faiss, self._ids
        index = self._empty() if self._factory is None else self._made(how.new_dim)
        numbered = np.array_equal(ids, np.arange(self.count))
        layers = _layers(index)
        if not numbered and not layers.id_maps and not isinstance(layers.base, faiss.IndexIVF):
            index = faiss.IndexIDMap2(index)
        named = not numbered or bool(layers.id_maps)
        trained_on = min(self.count, max(_TRAINED_ON, _needed(layers)))
        waiting: list[np.ndarray[Any, Any]] = []
        start = 0
        for block in blocks:
            waiting.append(block.numpy())
            start += len(block)
            if not index.is_trained and start < trained_on:
                continue
            vectors = np.concatenate(waiting)
            here = slice(start - len(vectors), start)
            try:
                if not index.is_trained:
                    index.train(vectors)
                index.add_with_ids(vectors, ids[here]) if named else index.add(vectors)
            except RuntimeError as error:
                raise InputError(
                    f"FAISS cannot make the new index ({error}): say how it is to be made, with factory=…, or "
                    "--factory."
                ) from error
            waiting = []
        if self._factory is None and self._direct_map != faiss.DirectMap.NoMap:
            layers.base.set_direct_map_type(self._direct_map)
        with whole(path) as partial:
            try:
                faiss.write_index(index, str(partial))
            except RuntimeError as error:  # FAISS's error if a file cannot be written
                raise StorageError(f"{path} cannot be written ({error}): is the disk full?") from error

    def _made(self, dim: int) -> Any:
        """An empty index, from the factory string."""
        try:
            return self._faiss.index_factory(dim, self._factory, self._index.metric_type)
        except RuntimeError as error:
            raise InputError(f"FAISS does not understand the string {self._factory!r}: {error}") from error

    def _empty(self) -> Any:
        """An empty index of the same kind, still untrained if that kind needs training."""
        index = self._faiss.clone_index(self._index)
        index.reset()
        self._forget(index)
        return index

    def _forget(self, index: Any) -> bool:
        """Reset an empty index's training; returns whether it needs none."""
        faiss = self._faiss
        index = faiss.downcast_index(index)
        if isinstance(index, faiss.IndexIDMap):
            index.is_trained = self._forget(index.index)
        elif isinstance(index, faiss.IndexPreTransform):
            layers, size = _layers(index), index.chain.size()
            index.chain.clear()
            for transform in layers.transforms[:size]:
                index.chain.push_back(_untrained(transform, layers.base))
            self._forget(index.index)
            index.is_trained = False
        elif isinstance(index, faiss.IndexIVF):
            index.set_direct_map_type(faiss.DirectMap.NoMap)
            index.quantizer.reset()
            index.is_trained = False
        elif isinstance(index, (faiss.IndexPQ, faiss.IndexScalarQuantizer)):
            index.is_trained = False
        return bool(index.is_trained)


class _Layers(NamedTuple):
    """What a FAISS index consists of.

    Args:
        id_maps: the ids of its IDMaps, outermost first.
        transforms: applied to vectors, in this order.
        base: the index that holds them.
    """

    id_maps: list[Rows]
    transforms: list[Any]
    base: Any


def _layers(index: Any) -> _Layers:
    faiss = faiss_module()
    id_maps: list[Rows] = []
    transforms: list[Any] = []
    while isinstance(index := faiss.downcast_index(index), (faiss.IndexIDMap, faiss.IndexPreTransform)):
        if isinstance(index, faiss.IndexIDMap):
            id_maps.append(np.asarray(faiss.vector_to_array(index.id_map), dtype=np.int64))
        else:
            chain = index.chain
            transforms += [faiss.downcast_VectorTransform(chain.at(number)) for number in range(chain.size())]
        index = index.index
    return _Layers(id_maps, transforms, index)


def _is_reversible(transform: Any) -> bool:
    """Whether a transform keeps lengths and angles, apart from dropped coordinates. FAISS's own flag is also set for
    whitening if the index was read from a file.
    """
    faiss = faiss_module()
    if not isinstance(transform, faiss.LinearTransform):
        return False
    rows = faiss.vector_to_array(transform.A).reshape(transform.d_out, transform.d_in)
    return bool(np.abs(rows @ rows.T - np.eye(len(rows))).max() < 1e-3)


def _untrained(transform: Any, base: Any) -> Any:
    """A new, untrained version of ``transform``, which precedes the index ``base``."""
    faiss = faiss_module()
    if type(transform) is not faiss.LinearTransform:
        transform.is_trained = False
    elif _is_learnt(transform, base):
        # FAISS reads an OPQMatrix as a LinearTransform, which suffices for a search but cannot be trained. The number
        # of codes is then unknown: use that of the PQ after it, or else one per kept coordinate, so that the
        # coordinates with most variance are kept.
        old, pq = transform, getattr(base, "pq", None)
        transform = faiss.OPQMatrix(old.d_in, old.d_out if pq is None else pq.M, old.d_out)
        old.this.own(True)
        transform.this.own(False)  # but the index's
    return transform


def _is_learnt(transform: Any, base: Any) -> bool:
    """Whether an OPQ transform matters to the index ``base``; for others all rotations are equal."""
    faiss = faiss_module()
    return type(transform) in (faiss.LinearTransform, faiss.OPQMatrix) and (
        hasattr(base, "pq") or transform.d_out < transform.d_in
    )


def _needed(layers: _Layers) -> int:
    """The minimum number of vectors for training an index."""
    base = layers.base
    of_opq = 256 if any(_is_learnt(each, base) for each in layers.transforms) else 0
    return max(of_opq, base.pq.ksub if hasattr(base, "pq") else 0, getattr(base, "nlist", 0))


_FLAT = ("IndexFlat", "IndexFlatIP", "IndexFlatL2")
# Kinds whose trained parts _forget knows.
_KINDS = (
    *(*_FLAT, "IndexScalarQuantizer", "IndexPQ", "IndexHNSWFlat"),
    *("IndexIVFFlat", "IndexIVFScalarQuantizer", "IndexIVFPQ"),
)
