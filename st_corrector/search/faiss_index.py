"""Static FAISS indices over the stale vectors of a cache: built once, saved, searched for the whole run."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..cache.embedding_cache import EmbeddingCache
from ..errors import CacheError, InputError, StorageError
from ..storage.files import make_folder, whole
from ..storage.fingerprint import differences
from .topk import NO_ROW

logger = logging.getLogger(__name__)

_INDEX, _DESCRIPTION = "index.faiss", "index.json"
_ROWS_AT_ONCE = 65_536
_SOME = 64  # rows by which a cache of a known origin is told from another
_MOST_ON_GPU = 2_048  # results of one query that FAISS gives on a GPU
_TRAINED_ON = 262_144  # maximum rows: FAISS itself asks for 39 to 256 per centroid


class FaissIndex:
    """A FAISS index for inner products over a cache's vectors. Build or load one: :meth:`build`, :meth:`load`.

    Args:
        index: the FAISS index; its ids are corpus rows.
        factory: the string that it was made from.
        normalize: whether its vectors were brought to unit length.
        parameters: search parameters in the syntax of FAISS's ``ParameterSpace``: ``"nprobe=32"``.
    """

    def __init__(self, index: Any, factory: str, normalize: bool, parameters: str = "") -> None:
        self._index, self.factory, self.normalize, self.parameters = index, factory, normalize, parameters
        self._copies: dict[int, Any] = {}  # on GPUs; None where there can be none
        if parameters:
            try:
                faiss_module().ParameterSpace().set_index_parameters(index, parameters)
            except RuntimeError as error:
                raise InputError(f"FAISS cannot set {parameters!r} on an index {factory!r}: {error}") from error

    @classmethod
    def build(
        cls,
        cache: EmbeddingCache,
        factory: str,
        path: str | os.PathLike[str] | None = None,
        *,
        normalize: bool = True,
        parameters: str = "",
    ) -> FaissIndex:
        """Index all vectors of ``cache``; if ``path`` already holds this index of this cache, load it.

        Args:
            factory: FAISS's index factory string: ``"Flat"``, ``"IVF4096,Flat"``, ``"HNSW32"``, ``"IVF4096,PQ48"``, …
            path: its folder, such as one inside the cache's; None keeps it in memory.
            normalize: bring the vectors to unit length (cosine similarity).
            parameters: search parameters, such as ``"nprobe=32"`` or ``"efSearch=128"``.

        Raises:
            InputError: FAISS is not installed, does not understand ``factory`` or ``parameters``, or cannot make such
                an index of this cache.
            CacheError: ``path`` holds something else.
        """
        faiss = faiss_module()
        folder = None if path is None else Path(path)
        if folder is not None and (folder / _DESCRIPTION).exists():
            return cls.load(folder, cache, factory=factory, normalize=normalize, parameters=parameters)
        if folder is not None and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise CacheError(f"{folder} is not empty and holds no index: choose an empty or new folder.")
        try:
            index = faiss.index_factory(cache.dim, factory, faiss.METRIC_INNER_PRODUCT)
        except RuntimeError as error:
            raise InputError(f"FAISS does not understand the index factory string {factory!r}: {error}") from error
        prepare = (lambda x: F.normalize(x, dim=-1)) if normalize else (lambda x: x)
        try:
            if not index.is_trained:
                generator = np.random.default_rng(0)
                rows = cache.first_row + np.sort(generator.permutation(len(cache))[:_TRAINED_ON])
                index.train(prepare(cache[rows].cpu()).numpy())
            for _, chunk in cache.chunks(_ROWS_AT_ONCE):
                index.add(prepare(chunk.float().cpu()).numpy())
        except RuntimeError as error:
            raise InputError(f"FAISS cannot make an index {factory!r} of {cache!r}: {error}") from error
        built = cls(index, factory, normalize, parameters)
        if folder is not None:
            built._save(folder, cache)
        return built

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        cache: EmbeddingCache,
        *,
        factory: str | None = None,
        normalize: bool = True,
        parameters: str = "",
    ) -> FaissIndex:
        """The index in the folder ``path``, memory-mapped where FAISS can.

        Args:
            path: the folder given to :meth:`build`.
            cache: the indexed cache.
            factory: refuse one made from another string.
            normalize: refuse one with another setting.
            parameters: what it is searched with.

        Raises:
            CacheError: there is none, or it belongs to something else.
        """
        faiss, folder = faiss_module(), Path(path)
        expected = {**_identity(cache), "factory": factory, "normalize": normalize}
        try:
            found = json.loads((folder / _DESCRIPTION).read_text(encoding="utf-8"))
            if not isinstance(found, dict):
                raise ValueError(f"its {_DESCRIPTION} is a {type(found).__name__}")
        except (OSError, ValueError, RecursionError) as error:
            raise CacheError(f"{folder} holds no index ({error}): build one with FaissIndex.build.") from error
        if factory is None:
            expected["factory"] = found.get("factory")
        if different := differences({name: found.get(name) for name in expected}, expected):
            raise CacheError(f"{folder} holds an index of something else:\n  " + "\n  ".join(different))
        file = str(folder / _INDEX)
        if not os.path.isfile(file) or os.path.getsize(file) != found.get("bytes"):
            raise CacheError(f"{file} is missing or cut short: delete the folder and build it again.")
        try:
            index = faiss.read_index(file, faiss.IO_FLAG_MMAP_IFC)
        except RuntimeError:  # not every kind of index can be mapped
            try:
                index = faiss.read_index(file)
            except RuntimeError as error:
                raise CacheError(f"{file} is damaged ({error}): delete the folder and build it again.") from error
        return cls(index, found["factory"], normalize, parameters)

    def __len__(self) -> int:
        return int(self._index.ntotal)

    def __repr__(self) -> str:
        return f"FaissIndex({self.factory!r}, {len(self):,} rows, parameters={self.parameters!r})"

    @torch.no_grad()
    def search(self, queries: Tensor, k: int, skip: np.ndarray | None = None) -> Tensor:
        """The rows with the ``k`` largest inner products that the index finds, counted from the cache's first row:
        ``(B, k)``, −1 where it finds fewer.

        Args:
            queries: ``(B, d)``.
            k: how many rows.
            skip: excluded rows, as a bitmap: bit ``row % 8`` of byte ``row // 8``.

        Queries on a GPU search a copy of the index there, where FAISS was built for GPUs, has this kind for them
        (``Flat`` and ``IVF…``; not ``HNSW``), and half of the free memory has room for it.
        """
        gpu = _gpu_of(queries.device)
        if gpu is None or k > _MOST_ON_GPU or self._copy_on(gpu) is None:
            return self._search_here(queries, k, skip)
        return self._search_copy(gpu, queries, k, skip)

    def _search_here(self, queries: Tensor, k: int, skip: np.ndarray | None) -> Tensor:
        faiss = faiss_module()
        faiss.omp_set_num_threads(torch.get_num_threads())
        parameters = None
        if skip is not None:
            skipped = faiss.IDSelectorBitmap(skip)
            selector = faiss.IDSelectorNot(skipped)
            parameters = _search_parameters(self._index, selector)
        found = self._index.search(queries.float().cpu().numpy(), k, params=parameters)[1]
        return torch.from_numpy(found).to(queries.device)

    def _copy_on(self, gpu: int) -> Any:
        """A copy of the index on a GPU, made once; None where there can be none."""
        if gpu not in self._copies:
            faiss, free = faiss_module(), _free_on(gpu)
            try:
                size = len(self) * (self._index.sa_code_size() + 8)  # of kinds that GPUs have
                if size > free // 2:
                    raise RuntimeError(f"it takes {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free")
                copy = faiss.index_cpu_to_gpu(_resources_of(gpu), gpu, self._index)
                if self.parameters:
                    faiss.GpuParameterSpace().set_index_parameters(copy, self.parameters)
            except RuntimeError as error:
                self._give_up(gpu, error)
            else:
                self._copies[gpu] = copy
        return self._copies[gpu]

    def _give_up(self, gpu: int, error: RuntimeError) -> None:
        logger.warning("%r is searched on the CPU: FAISS cannot search it on GPU %d (%s).", self, gpu, error)
        self._copies[gpu] = None

    def _search_copy(self, gpu: int, queries: Tensor, k: int, skip: np.ndarray | None) -> Tensor:
        """Search the copy on a GPU, where FAISS excludes no rows: more are found, and these left out. Queries that lack
        some are searched here.
        """
        vectors, most = queries.float().cpu().numpy(), min(len(self), _MOST_ON_GPU)
        wanted = min(k if skip is None else 2 * k, most)
        while True:
            try:
                found = self._copies[gpu].search(vectors, wanted)[1]
            except RuntimeError as error:  # more lists than it can probe, or no memory
                self._give_up(gpu, error)
                return self._search_here(queries, k, skip)
            gone = found == NO_ROW
            exhausted = gone[:, -1].copy()  # there are no more in the lists that were looked into
            if skip is not None:
                gone |= (skip[found // 8] >> (found % 8).astype(np.uint8) & 1).astype(bool)
            lacking = ((~gone).sum(1) < k) & ~exhausted
            if not lacking.any() or wanted == most:
                break
            wanted = min(2 * wanted, most)
        order = gone.argsort(axis=1, kind="stable")[:, :k]
        rows = np.where(np.take_along_axis(gone, order, 1), NO_ROW, np.take_along_axis(found, order, 1))
        rows = np.pad(rows, ((0, 0), (0, k - rows.shape[1])), constant_values=NO_ROW)
        if lacking.any() and wanted < len(self):
            rows[lacking] = self._search_here(queries[torch.from_numpy(lacking)], k, skip).cpu().numpy()
        return torch.from_numpy(rows).to(queries.device)

    def _save(self, folder: Path, cache: EmbeddingCache) -> None:
        make_folder(folder)
        with whole(folder / _INDEX) as partial:
            try:
                faiss_module().write_index(self._index, str(partial))
            except RuntimeError as error:  # FAISS's error if a file cannot be written
                raise StorageError(f"{folder / _INDEX} cannot be written ({error}): is the disk full?") from error
        description = {**_identity(cache), "factory": self.factory, "normalize": self.normalize}
        description["bytes"] = (folder / _INDEX).stat().st_size
        # Last: a folder without this file has no index.
        with whole(folder / _DESCRIPTION) as partial:
            partial.write_text(json.dumps(description, indent=2), encoding="utf-8")


def _identity(cache: EmbeddingCache) -> dict[str, Any]:
    """Identifies a cache: by some of its embeddings, and by all of them where its origin is unknown."""
    digest = hashlib.sha256()
    if cache.fingerprint:
        some = np.linspace(cache.first_row, cache.end - 1, _SOME).astype(np.int64)
        digest.update(cache[some].cpu().numpy().tobytes())
    else:
        for _, chunk in cache.chunks(_ROWS_AT_ONCE):
            digest.update(chunk.float().cpu().numpy().tobytes())
    return {
        "rows": len(cache),
        "first_row": cache.first_row,
        "dim": cache.dim,
        "fingerprint": cache.fingerprint,
        "embeddings": digest.hexdigest(),
    }


def _search_parameters(index: Any, selector: Any) -> Any:
    """FAISS's parameters for one search: a selector, and otherwise the index's own."""
    faiss = faiss_module()
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        return faiss.SearchParametersPreTransform(index_params=_search_parameters(index.index, selector))
    if isinstance(index, faiss.IndexIVFPQ):
        return faiss.IVFPQSearchParameters(sel=selector, nprobe=index.nprobe)
    if isinstance(index, faiss.IndexIVF):
        return faiss.SearchParametersIVF(sel=selector, nprobe=index.nprobe)
    if isinstance(index, faiss.IndexHNSW):
        return faiss.SearchParametersHNSW(sel=selector, efSearch=index.hnsw.efSearch)
    return faiss.SearchParameters(sel=selector)


def _gpu_of(device: torch.device) -> int | None:
    """The number of the GPU that FAISS may search for queries there; None for none."""
    if device.type != "cuda" or not getattr(faiss_module(), "get_num_gpus", lambda: 0)():
        return None
    return torch.cuda.current_device() if device.index is None else device.index


@functools.cache
def _resources_of(gpu: int) -> Any:
    """FAISS's scratch memory on a GPU, which all indices share."""
    return faiss_module().StandardGpuResources()


def _free_on(gpu: int) -> int:
    """Free bytes of a GPU."""
    return torch.cuda.mem_get_info(gpu)[0]


def faiss_module() -> Any:
    """FAISS.

    Raises:
        InputError: it is not installed.
    """
    try:
        import faiss
    except ImportError as error:
        raise InputError(
            "An index needs FAISS: pip install 'st-corrector[faiss-cpu]', or a build for GPUs, such as faiss-gpu-cu12."
        ) from error
    return faiss
