"""Served embeddings in NumPy files, safetensors files and embedding caches."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..cache.embedding_cache import EmbeddingCache
from ..cache.folder import CacheFolder, Description
from ..cache.shard import DTYPES, Shard
from ..errors import InputError, NonFiniteError
from ..storage.files import whole
from ..storage.fingerprint import differences
from .mapping import ROWS_AT_ONCE, IndexMap, Rows
from .vectors import Vectors


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

    def take(self, rows: Rows) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(self._array[rows], dtype=np.float32))

    def at(self, path: str | Path | None) -> NumpyVectors:
        return NumpyVectors(Path(str(path)))

    def write(self, path: Path, how: IndexMap, blocks: Iterable[Tensor]) -> None:
        with whole(path) as partial:
            form = {"descr": np.lib.format.dtype_to_descr(self._array.dtype), "fortran_order": False}
            # Written, not mapped: on a full disk a mapped file kills the process instead of raising an error.
            with partial.open("wb") as file:
                np.lib.format.write_array_header_1_0(file, {**form, "shape": (self.count, how.new_dim)})
                for block in blocks:
                    file.write(_stored(block.numpy().astype(self._array.dtype)).tobytes())


class SafetensorsVectors(Vectors):
    """A tensor of a ``.safetensors`` file, memory-mapped; its other tensors are kept unchanged."""

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

    def take(self, rows: Rows) -> Tensor:
        if len(rows) and np.array_equal(rows, np.arange(rows[0], rows[0] + len(rows))):  # a block
            block: Tensor = self._slice[int(rows[0]) : int(rows[-1]) + 1]
            return block.float()
        mapped: Tensor = self._file.get_tensor(self.name)  # only these rows are read
        return mapped[torch.from_numpy(rows)].float()

    def at(self, path: str | Path | None) -> SafetensorsVectors:
        return SafetensorsVectors(Path(str(path)), self.name)

    def write(self, path: Path, how: IndexMap, blocks: Iterable[Tensor]) -> None:
        with whole(path) as partial:
            scratch = partial.with_suffix(".scratch")
            try:
                # On disk, since safetensors writes whole tensors, and these need not fit into memory.
                with scratch.open("wb") as file:
                    for block in blocks:
                        stored = block.to(self._dtype).contiguous()
                        _stored(stored.float().numpy())
                        file.write(stored.view(torch.uint8).numpy().tobytes())
                dim = how.new_dim
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

    def check(self, how: IndexMap) -> None:
        super().check(how)
        frames = how.correctors[0].frames
        known, expected = self.fingerprint, frames.stale if frames else {}
        # It maps embeddings of any texts, such as those by which the corpus has grown since.
        if known and expected and (different := differences({**known, "corpus": None}, {**expected, "corpus": None})):
            raise InputError(
                f"The corrector maps from other embeddings than those of {self.path}:\n  " + "\n  ".join(different)
            )

    def take(self, rows: Rows) -> Tensor:
        return self.cache[rows].cpu()

    def at(self, path: str | Path | None) -> CacheVectors:
        return CacheVectors(Path(str(path)))

    def write(self, path: Path, how: IndexMap, blocks: Iterable[Tensor]) -> None:
        frames = how.correctors[-1].frames
        fresh = dict(frames.fresh) if frames else {}
        if "corpus" in self.fingerprint:
            fresh["corpus"] = self.fingerprint["corpus"]
        # They only approximate the new model's embeddings.
        fresh["carried_over_by"] = how.digest
        dtype = str(self.cache.dtype).removeprefix("torch.")
        description = Description(self.count, how.new_dim, dtype, ROWS_AT_ONCE, fresh)
        folder = CacheFolder(path, "Partial output was removed: then repeat the call.")
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
                shutil.rmtree(path, ignore_errors=True)  # only this call used it
                raise


def _stored(block: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """A block in its stored dtype, checked to be finite."""
    if not np.isfinite(block).all():
        raise NonFiniteError(f"An embedding is not finite in {block.dtype}: store the old ones in a wider dtype first.")
    return block
