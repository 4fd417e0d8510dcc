"""Files of served embeddings, read in blocks and written anew: NumPy, safetensors, FAISS, and embedding caches."""

from __future__ import annotations

import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from .cache import EmbeddingCache
from .cache_folder import CacheFolder, Description
from .carry_over import ROWS_AT_ONCE as _ROWS_AT_ONCE
from .carry_over import upgrade_embeddings
from .correctors import AffineMap, Corrector
from .errors import InputError, NonFiniteError, StorageError
from .files import make_folder, whole
from .fingerprint import differences, digest
from .index import faiss_module
from .shard import DTYPES, Shard

_TRAINED_ON = 262_144  # rows, at most, of an index that has to be trained anew
Ids = np.ndarray[Any, np.dtype[np.int64]]


class Vectors(ABC):
    """Embeddings in a file or folder, row by row those of a corpus: open them with :func:`open_vectors`.

    Args:
        path: where they are.
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
        """What they depend on, by component; empty where that is not known."""
        return {}

    @abstractmethod
    def write(self, path: Path, corrector: Corrector, blocks: Iterable[Tensor]) -> None:
        """Write into ``path``, in the form that these have, what ``corrector`` has made of them."""

    def check(self, corrector: Corrector) -> None:
        """Refuse a corrector that maps from something else.

        Raises:
            InputError: its dimension is another, or as far as is known, what it maps from.
        """
        if corrector.dim != self.dim:
            raise InputError(
                f"{self.path} holds embeddings of {self.dim} dimensions, the corrector maps from {corrector.dim}."
            )

    def upgrade(self, corrector: Corrector, path: Path, progress: bool = True) -> None:
        """Write into ``path`` what the corrector makes of them, block by block; they stay as they are.

        Raises:
            InputError: the corrector does not fit, or there is something in ``path``.
            NonFiniteError: an embedding is NaN or infinite, or becomes so.
            StorageError: ``path`` cannot be written; nothing of it is left.
        """
        self.check(corrector)
        if path.exists():
            raise InputError(f"{path} is there already: choose another name, or move it away.")
        make_folder(path.parent)
        with tqdm(total=self.count, desc="Carrying over", unit=" targets", disable=not progress) as bar:

            def blocks() -> Iterator[Tensor]:
                for start in range(0, self.count, _ROWS_AT_ONCE):
                    rows = np.arange(start, min(start + _ROWS_AT_ONCE, self.count))
                    yield upgrade_embeddings(self.take(rows), corrector)
                    bar.update(len(rows))

            self.write(path, corrector, blocks())


def open_vectors(path: str | os.PathLike[str], tensor: str | None = None, factory: str | None = None) -> Vectors:
    """What is in ``path``: a ``.npy`` or ``.safetensors`` file, the folder of an :class:`EmbeddingCache`, or, by any
    other name, a FAISS index whose vectors can be reconstructed.

    Args:
        tensor: of a safetensors file, which of its tensors; by default the only one of two dimensions.
        factory: of a FAISS index, the string by which the new one is made; by default it is of the same kind.

    Raises:
        InputError: there is nothing, or nothing that holds floating-point embeddings, one a row.
        CacheError: the cache is damaged or not finished.
    """
    file = Path(path)
    if not file.exists():
        raise InputError(f"{file} does not exist: expected a .npy or .safetensors file, a FAISS index or a cache.")
    if tensor is not None and file.suffix != ".safetensors":
        raise InputError(f"tensor={tensor!r} is for .safetensors files, and {file} is none.")
    if file.is_dir():
        found: Vectors = CacheVectors(file)
    elif file.suffix == ".npy":
        found = NumpyVectors(file)
    elif file.suffix == ".safetensors":
        found = SafetensorsVectors(file, tensor)
    else:
        return FaissVectors(file, factory)
    if factory is not None:
        raise InputError(f"factory={factory!r} is for FAISS indices, and {file} is none.")
    return found


class NumpyVectors(Vectors):
    """A ``.npy`` file, memory-mapped."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            self._array = np.load(path, mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise InputError(f"{path} is not readable as a NumPy array ({error}).") from error
        if self._array.ndim != 2 or self._array.dtype.kind != "f" or 0 in self._array.shape:
            raise InputError(
                f"{path} holds {self._array.dtype} of shape {self._array.shape}, expected floating-point embeddings, "
                "(n, d)."
            )
        self.count, self.dim = self._array.shape

    def take(self, rows: Ids) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(self._array[rows], dtype=np.float32))

    def write(self, path: Path, corrector: Corrector, blocks: Iterable[Tensor]) -> None:
        with whole(path) as partial:
            form = {"descr": np.lib.format.dtype_to_descr(self._array.dtype), "fortran_order": False}
            # Written, not mapped: on a full disk a mapped file ends the process instead of raising anything.
            with partial.open("wb") as file:
                np.lib.format.write_array_header_1_0(file, {**form, "shape": (self.count, width_after(corrector))})
                for block in blocks:
                    file.write(_stored(block.numpy().astype(self._array.dtype)).tobytes())


class SafetensorsVectors(Vectors):
    """A tensor of a ``.safetensors`` file, memory-mapped; the others of the file are kept as they are."""

    def __init__(self, path: Path, tensor: str | None) -> None:
        super().__init__(path)
        try:
            self._file = safe_open(path, framework="pt")
            names = list(self._file.keys())
            shapes = {name: self._file.get_slice(name).get_shape() for name in names}
        except (SafetensorError, OSError, ValueError) as error:
            raise InputError(f"{path} is not readable as safetensors ({error}).") from error
        fitting = [name for name in names if len(shapes[name]) == 2 and (tensor is None or name == tensor)]
        if len(fitting) != 1:
            raise InputError(
                f"{path} holds the tensors {shapes}: which are the embeddings? Expected one of two dimensions"
                f"{'' if tensor is None else f', named {tensor!r}'}. Name it with tensor=…, or --tensor."
            )
        (self.name,) = fitting
        self._slice = self._file.get_slice(self.name)
        self.count, self.dim = shapes[self.name]
        self._dtype = self._slice[:1].dtype
        if not self._dtype.is_floating_point or not self.count:
            raise InputError(f"{path}: {self.name} is {self._dtype} of shape {shapes[self.name]}, not embeddings.")

    def take(self, rows: Ids) -> Tensor:
        if len(rows) and rows[-1] - rows[0] == len(rows) - 1:  # a block
            block: Tensor = self._slice[int(rows[0]) : int(rows[-1]) + 1]
            return block.float()
        mapped: Tensor = self._file.get_tensor(self.name)  # of which only these rows are read
        return mapped[torch.from_numpy(rows)].float()

    def write(self, path: Path, corrector: Corrector, blocks: Iterable[Tensor]) -> None:
        with whole(path) as partial:
            scratch = partial.with_suffix(".scratch")
            try:
                # On disk, since safetensors writes whole tensors, and these need not fit into memory.
                with scratch.open("wb") as file:
                    for block in blocks:
                        stored = block.to(self._dtype).contiguous()
                        _stored(stored.float().numpy())
                        file.write(stored.view(torch.uint8).numpy().tobytes())
                dim = width_after(corrector)
                size = self.count * dim
                out = torch.from_file(str(scratch), shared=False, size=size, dtype=self._dtype).view(self.count, dim)
                others = {name: self._file.get_tensor(name) for name in self._file.keys() if name != self.name}  # noqa: SIM118
                save_file({**others, self.name: out}, partial, self._file.metadata())
            finally:
                scratch.unlink(missing_ok=True)


class CacheVectors(Vectors):
    """An :class:`EmbeddingCache`."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.cache = EmbeddingCache.load(path)
        self.count, self.dim = len(self.cache), self.cache.dim

    @property
    def fingerprint(self) -> dict[str, Any]:
        return self.cache.fingerprint

    def check(self, corrector: Corrector) -> None:
        super().check(corrector)
        known, expected = self.fingerprint, corrector.frames.stale if corrector.frames else {}
        if known and expected and (different := differences(known, expected)):
            raise InputError(
                f"The corrector maps from other embeddings than those of {self.path}:\n  " + "\n  ".join(different)
            )

    def take(self, rows: Ids) -> Tensor:
        return self.cache[rows].cpu()

    def write(self, path: Path, corrector: Corrector, blocks: Iterable[Tensor]) -> None:
        fresh = dict(corrector.frames.fresh) if corrector.frames else {}
        # They are not what the new model says, only near to it.
        fresh["carried_over_by"] = digest(*(each.numpy().tobytes() for each in _state(corrector)))
        dtype = str(self.cache.dtype).removeprefix("torch.")
        description = Description(self.count, width_after(corrector), dtype, _ROWS_AT_ONCE, fresh)
        folder = CacheFolder(path, "Nothing of it is left: then call the same again.")
        with folder.locked():
            try:
                folder.begin(description)
                for number, block in enumerate(blocks):
                    shard = Shard.store(block, DTYPES[dtype])
                    if len(shard.not_finite()):
                        raise NonFiniteError(f"An embedding of shard {number} is not finite in {dtype}.")
                    folder.write(description, number, shard)
                folder.finish(description)
            except BaseException:
                shutil.rmtree(path, ignore_errors=True)  # it was ours alone
                raise


def width_after(corrector: Corrector) -> int:
    """The dimension of what a corrector makes."""
    return corrector.new_dim if isinstance(corrector, AffineMap) else corrector.dim


def _stored(block: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """A block as it is stored, if that is finite."""
    if not np.isfinite(block).all():
        raise NonFiniteError(f"An embedding is not finite in {block.dtype}: store the old ones in a wider dtype first.")
    return block


def _state(corrector: Corrector) -> list[Tensor]:
    return [value.detach().cpu().contiguous() for _, value in sorted(corrector.state_dict().items())]


class FaissVectors(Vectors):
    """A FAISS index whose vectors can be reconstructed; those that are compressed only as well as it keeps them.

    The new index has the same kind, metric, parameters and ids. What it has learnt about where vectors lie
    (rotations, centroids, codebooks) it learns anew from the new ones: so the kinds are those of which that is known,
    Flat, SQ, PQ, HNSW over Flat, IVF over Flat, SQ or PQ, these behind PCA or OPQ, and IDMap of them. Others need
    ``factory``.

    Args:
        path: the index's file.
        factory: makes the new index from this string instead, as it must where the width changes.
    """

    def __init__(self, path: Path, factory: str | None = None) -> None:
        super().__init__(path)
        self._faiss, self._factory = faiss_module(), factory
        try:
            self._index = self._faiss.read_index(str(path))
        except RuntimeError as error:
            raise InputError(f"{path} is not readable as a FAISS index: {str(error).splitlines()[-1]}") from error
        self.count, self.dim = self._index.ntotal, self._index.d
        if not self.count:
            raise InputError(f"{path} is an index without vectors.")
        self._require_known()
        self._source, keys, ids = self._stored()
        order = np.argsort(ids, kind="stable")
        self._ids, self._keys = ids[order], keys[order]
        try:
            self.take(np.arange(1))
        except RuntimeError as error:
            raise InputError(
                f"{path} is a {type(self._faiss.downcast_index(self._index)).__name__}, from which FAISS cannot "
                "reconstruct vectors: carry over the vectors that it was made of, and build it again."
            ) from error

    def _require_known(self) -> None:
        faiss = self._faiss
        inner = faiss.downcast_index(self._index)
        linear = True
        while isinstance(inner, (faiss.IndexIDMap, faiss.IndexIDMap2, faiss.IndexPreTransform)):
            if isinstance(inner, faiss.IndexPreTransform):
                chain = [faiss.downcast_VectorTransform(inner.chain.at(n)) for n in range(inner.chain.size())]
                linear = linear and all(isinstance(each, faiss.LinearTransform) for each in chain)
            inner = faiss.downcast_index(inner.index)
        kind = type(inner).__name__
        # Whose vectors cannot be asked for at all: it would end the process.
        if isinstance(inner, (faiss.IndexIVFFastScan, faiss.IndexFastScan)) or not linear:
            raise InputError(
                f"{self.path} is a {kind}{'' if linear else ' behind a transform that is not linear'}, whose vectors "
                "FAISS cannot give back: carry over the vectors that it was made of, and build it again."
            )
        if self._factory is None and kind not in _KINDS:
            raise InputError(
                f"{self.path} is a {kind}: a new one of this kind cannot be made from it. Say how it is to be made, "
                "with factory=…, or --factory."
            )

    def _stored(self) -> tuple[Any, Ids, Ids]:
        """What reconstructs vectors, the keys by which it does, and the ids of these vectors."""
        faiss = self._faiss
        index, keys, ids = faiss.downcast_index(self._index), np.arange(self.count), None
        if isinstance(index, (faiss.IndexIDMap, faiss.IndexIDMap2)):
            ids = np.asarray(faiss.vector_to_array(index.id_map), dtype=np.int64)
            index = faiss.downcast_index(index.index)
        if (ivf := faiss.try_extract_index_ivf(index)) is not None:
            ivf.set_direct_map_type(faiss.DirectMap.Hashtable)
            keys = np.concatenate([self._in_list(ivf.invlists, number) for number in range(ivf.nlist)])
            # Inside of an IDMap, a key is the position of an id.
            ids = keys if ids is None else ids[keys]
        return index, keys, keys if ids is None else ids

    def _in_list(self, lists: Any, number: int) -> Ids:
        size = lists.list_size(number)
        if not size:
            return np.empty(0, dtype=np.int64)
        ids: Ids = self._faiss.rev_swig_ptr(lists.get_ids(number), size)
        return ids.astype(np.int64)  # a copy: the list's own memory goes with it

    def take(self, rows: Ids) -> Tensor:
        return torch.from_numpy(self._source.reconstruct_batch(self._keys[rows]))

    def check(self, corrector: Corrector) -> None:
        super().check(corrector)
        if isinstance(corrector, AffineMap) and corrector.new_dim != self.dim and self._factory is None:
            raise InputError(
                f"The new embeddings have {corrector.new_dim} dimensions instead of {self.dim}: say how the new index "
                "is to be made, with factory=…, or --factory."
            )

    def write(self, path: Path, corrector: Corrector, blocks: Iterable[Tensor]) -> None:
        faiss = self._faiss
        index, ids = self._empty(width_after(corrector)), self._ids
        numbered = np.array_equal(ids, np.arange(self.count))
        if self._factory is not None and not numbered and faiss.try_extract_index_ivf(index) is None:
            index = faiss.IndexIDMap2(index)
        named = not numbered or isinstance(faiss.downcast_index(index), (faiss.IndexIDMap, faiss.IndexIDMap2))
        waiting: list[np.ndarray[Any, Any]] = []
        start = 0
        for block in blocks:
            waiting.append(block.numpy())
            start += len(block)
            if not index.is_trained and start < min(self.count, _TRAINED_ON):
                continue
            vectors = np.concatenate(waiting)
            if not index.is_trained:
                index.train(vectors)
            here = slice(start - len(vectors), start)
            index.add_with_ids(vectors, ids[here]) if named else index.add(vectors)
            waiting = []
        with whole(path) as partial:
            try:
                faiss.write_index(index, str(partial))
            except RuntimeError as error:  # how FAISS tells that a file cannot be written
                raise StorageError(f"{path} cannot be written ({error}): is the disk full?") from error

    def _empty(self, dim: int) -> Any:
        """An index without vectors: of the same kind, or as the factory string says."""
        faiss = self._faiss
        if self._factory is not None:
            try:
                return faiss.index_factory(dim, self._factory, self._index.metric_type)
            except RuntimeError as error:
                raise InputError(f"FAISS does not understand the string {self._factory!r}: {error}") from error
        index = faiss.clone_index(self._index)
        index.reset()
        self._forget(index)
        return index

    def _forget(self, index: Any) -> bool:
        """Make an empty index one that has to be trained, if it is of a kind that is; returns whether it is trained."""
        faiss = self._faiss
        index = faiss.downcast_index(index)
        if isinstance(index, (faiss.IndexIDMap, faiss.IndexIDMap2)):
            index.is_trained = self._forget(index.index)
        elif isinstance(index, faiss.IndexPreTransform):
            for number in range(index.chain.size()):
                index.chain.at(number).is_trained = False
            self._forget(index.index)
            index.is_trained = False
        elif isinstance(index, faiss.IndexIVF):
            index.set_direct_map_type(faiss.DirectMap.NoMap)
            index.quantizer.reset()
            index.is_trained = False
        elif isinstance(index, (faiss.IndexPQ, faiss.IndexScalarQuantizer)):
            index.is_trained = False
        return bool(index.is_trained)


# Those of which _forget knows what they have learnt.
_KINDS = (
    *("IndexFlat", "IndexFlatIP", "IndexFlatL2", "IndexScalarQuantizer", "IndexPQ", "IndexHNSWFlat"),
    *("IndexIVFFlat", "IndexIVFScalarQuantizer", "IndexIVFPQ"),
)
