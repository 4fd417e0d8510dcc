"""The stale buffer: for every target, what the encoder said when the cache was built.

On disk it is a folder of safetensors shards of consecutive rows and one ``manifest.json``::

    manifest.json            what the embeddings are: schema, rows, dim, dtype, fingerprint
    embeddings-000000.safetensors, embeddings-000001.safetensors, …    "embeddings", and "scales" where they are int8

Nothing writes to it once it is built; training reads it memory-mapped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer
from torch import Tensor
from tqdm.auto import tqdm

from .corpus import Corpus
from .distributed import Processes
from .encoding import DocumentEncoder
from .errors import CacheError
from .fingerprint import differences
from .memory import require_memory

SCHEMA = 1
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.int8}
_MANIFEST = "manifest.json"
_KEY, _SCALES = "embeddings", "scales"
_ROWS_AT_ONCE = 16_384


class Shard(NamedTuple):
    """Embeddings of consecutive rows, as they are stored.

    Args:
        values: ``(n, d)``, in one of :data:`DTYPES`.
        scales: what the values of each row are multiplied with, float32 ``(n,)``; only with int8.
    """

    values: Tensor
    scales: Tensor | None = None

    @classmethod
    def store(cls, embeddings: Tensor, dtype: torch.dtype) -> Shard:
        """Floating-point ``embeddings`` ``(n, d)`` in ``dtype``; int8 by the largest absolute value of each row."""
        if dtype != torch.int8:
            return cls(embeddings.to(dtype))
        scales = embeddings.float().abs().amax(1) / 127
        return cls((embeddings / scales.clamp_min(1e-30)[:, None]).round_().to(torch.int8), scales)

    def float(self) -> Tensor:
        """The embeddings in float32, ``(n, d)``: the stored memory itself where it is float32."""
        values = self.values.float()
        return values if self.scales is None else values.mul_(self.scales[:, None])

    def map(self, function: Callable[[Tensor], Tensor]) -> Shard:
        """The same with ``function`` applied to what it consists of."""
        return Shard(function(self.values), None if self.scales is None else function(self.scales))

    def at(self, rows: slice | Tensor) -> Shard:
        """Some of its rows."""
        return self.map(lambda each: each[rows])

    def not_finite(self) -> Tensor:
        """Positions of rows that hold what is NaN or infinite, ``(m,)``."""
        checked = self.values if self.scales is None else self.scales[:, None]
        return (~torch.isfinite(checked).all(1)).nonzero().flatten()


class EmbeddingCache:
    """The stale embeddings ``g'(y)`` of all targets, shape ``(N, d)``. Build, load or wrap them:
    :meth:`build`, :meth:`load`, :meth:`from_tensor`.

    Args:
        shards: of consecutive rows, all of one dtype.
        fingerprint: what the embeddings depend on, by component; empty where that is not known.
        first_row: the corpus row of the first embedding, where it is a :meth:`part` of a cache.
        corpus_size: rows of the whole cache, of which it is a part.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        fingerprint: Mapping[str, Any] | None = None,
        first_row: int = 0,
        corpus_size: int | None = None,
    ) -> None:
        self._shards = list(shards)
        self._starts = first_row + np.cumsum([0] + [len(shard.values) for shard in self._shards])
        self.fingerprint = dict(fingerprint or {})
        self.first_row = first_row
        """The first corpus row that it holds; rows are always counted in the corpus, in a part too."""
        self.corpus_size = len(self) if corpus_size is None else corpus_size
        """Rows of the whole corpus."""

    # ------------------------------------------------------------------ constructors

    @classmethod
    def from_tensor(cls, embeddings: Tensor | np.ndarray) -> EmbeddingCache:
        """A cache of vectors that are there already (a served index's, say), row ``i`` being target ``i``.

        The tensor is kept, not copied. Where it came from is not known, so only its size can be checked
        against a corpus.

        Raises:
            CacheError: it is not a two-dimensional array of floating-point numbers.
        """
        tensor = torch.as_tensor(embeddings)
        if tensor.ndim != 2 or not tensor.is_floating_point() or 0 in tensor.shape:
            raise CacheError(
                f"Expected floating-point embeddings of shape (targets, dimension), got {tensor.dtype} of shape "
                f"{tuple(tensor.shape)}."
            )
        cache = cls([Shard(tensor.detach())])
        for start, chunk in cache.chunks(_ROWS_AT_ONCE):
            _require_finite(chunk, start)
        return cache

    @classmethod
    def from_blocks(
        cls, blocks: Iterable[Tensor], dtype: torch.dtype, first_row: int = 0, corpus_size: int | None = None
    ) -> EmbeddingCache:
        """A cache in memory of floating-point blocks of consecutive rows, ``(n, d)`` each, stored in ``dtype``.

        Args:
            blocks: ``(n, d)`` each.
            dtype: one of :data:`DTYPES`.
            first_row, corpus_size: of a part; see :class:`EmbeddingCache`.

        Raises:
            CacheError: an embedding is not finite in that dtype.
        """
        shards: list[Shard] = []
        row = first_row
        for block in blocks:
            shards.append(Shard.store(block.detach(), dtype))
            _require_finite(shards[-1], row)
            row += len(block)
        return cls(shards, first_row=first_row, corpus_size=corpus_size)

    @classmethod
    def build(
        cls,
        model: SentenceTransformer,
        corpus: Corpus,
        path: str | os.PathLike,
        batch_size: int = 64,
        dtype: str = "float32",
        shard_size: int = 16_384,
        progress: bool = True,
    ) -> EmbeddingCache:
        """Encode every target of ``corpus`` with ``model`` into the folder ``path``.

        Killed half-way, the same call goes on behind the last finished shard; called on a finished cache, it
        loads it. Where several processes train together, all call it and each encodes its share of the shards; the
        folder must be one that all of them see.

        Args:
            path: a new folder, or one that an earlier call with the same model and corpus began.
            batch_size: targets in one forward pass; they are sorted by length within a shard.
            dtype: ``"float32"``, ``"bfloat16"``, ``"float16"``, or ``"int8"`` with one float32 scale a row.
            shard_size: rows in one file, which is also what a kill loses at most.
            progress: show a progress bar.

        Raises:
            CacheError: ``path`` holds a cache of another model, corpus, prompt or dtype (it says which),
                an unknown dtype is asked for, an embedding is not finite, or another process's files are not seen.
        """
        if dtype not in DTYPES:
            raise CacheError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}.")
        if batch_size < 1 or shard_size < 1:
            raise CacheError(f"batch_size and shard_size must be at least 1, got {batch_size} and {shard_size}.")
        processes = Processes.current()
        encoder = DocumentEncoder(model, corpus, progress=progress)
        folder = Path(path)
        manifest = {
            "schema": SCHEMA,
            "rows": len(corpus),
            "dim": encoder.encode(model, [0]).shape[1],
            "dtype": dtype,
            "fingerprint": encoder.fingerprint(model),
        }
        if processes.rank:  # the first one makes the folder
            processes.wait()
            if not (folder / _MANIFEST).exists():
                raise CacheError(
                    f"Process {processes.rank} does not see the cache that process 0 has begun in {folder}: choose a "
                    "folder on a file system that all nodes share."
                )
        if (folder / _MANIFEST).exists():
            found = _read_manifest(folder)
            # A build that was begun with shards of another size goes on with those.
            shard_size = found["shard_size"]
            if different := differences(_flat(found), _flat({**manifest, "shard_size": shard_size})):
                raise CacheError(
                    f"{folder} holds a cache of something else:\n  " + "\n  ".join(different) + "\nBuild into another "
                    "folder, or delete this one if it is no longer needed."
                )
        elif folder.is_dir() and any(file.suffix != ".partial" for file in folder.iterdir()):
            raise CacheError(f"{folder} is not empty and holds no embedding cache: choose an empty or new folder.")
        else:
            folder.mkdir(parents=True, exist_ok=True)
            _write_atomically(folder / _MANIFEST, json.dumps({**manifest, "shard_size": shard_size}, indent=2).encode())
        if processes.rank == 0:
            processes.wait()
        numbers = range(-(-len(corpus) // shard_size))
        missing = [number for number in numbers if not _shard_path(folder, number).exists()]
        processes.wait()  # all have looked before anybody writes
        progress = progress and processes.rank == 0
        with tqdm(total=len(corpus), desc="Building the cache", unit=" targets", disable=not progress) as bar:
            bar.update(len(corpus) - sum(len(_rows_of(number, shard_size, len(corpus))) for number in missing))
            for number in missing[processes.rank :: processes.size]:
                rows = _rows_of(number, shard_size, len(corpus))
                shard = _shard_path(folder, number)
                # Checked in the stored dtype: float16 overflows at 65,504.
                embeddings = encoder.encode(model, rows, batch_size=batch_size, bar=bar)
                stored = Shard.store(embeddings.cpu(), DTYPES[dtype])
                if len(bad := rows[stored.not_finite().numpy()]):
                    raise CacheError(
                        f"The embeddings of {len(bad)} targets are NaN or infinite, e.g. rows {bad[:3].tolist()} "
                        f"(ids {corpus.ids(bad[:3])}), in {dtype}: check the model's weights, or choose another dtype."
                    )
                _write_shard(shard, stored)
            processes.wait()
            bar.update(len(corpus) - bar.n)  # what the others have done
        return cls.load(folder)

    def save(self, path: str | os.PathLike) -> EmbeddingCache:
        """Write it into the new folder ``path``, as :meth:`build` would have; returns it memory-mapped from there.

        Raises:
            CacheError: there is something in ``path``, or this is only a part of a cache.
        """
        if len(self) != self.corpus_size:
            raise CacheError(f"{self!r} is a part of a cache: save the whole one.")
        folder = Path(path)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise CacheError(f"{folder} is not empty: choose a new folder to save the cache in.")
        folder.mkdir(parents=True, exist_ok=True)
        for number, start in enumerate(range(0, len(self), _ROWS_AT_ONCE)):
            parts = [chunk for _, chunk in self.chunks(_ROWS_AT_ONCE, start, start + _ROWS_AT_ONCE)]
            values = torch.cat([part.values for part in parts]).cpu()
            scales = [part.scales for part in parts if part.scales is not None]
            _write_shard(_shard_path(folder, number), Shard(values, torch.cat(scales).cpu() if scales else None))
        manifest = {
            "schema": SCHEMA,
            "rows": len(self),
            "dim": self.dim,
            "dtype": str(self.dtype).removeprefix("torch."),
            "fingerprint": self.fingerprint,
            "shard_size": _ROWS_AT_ONCE,
        }
        # Last: a folder without it is no cache.
        _write_atomically(folder / _MANIFEST, json.dumps(manifest, indent=2).encode())
        return self.load(folder)

    @classmethod
    def load(cls, path: str | os.PathLike) -> EmbeddingCache:
        """The finished cache in the folder ``path``, memory-mapped: nothing is read until it is used.

        Raises:
            CacheError: there is no cache, its build was not finished, or a shard is damaged.
        """
        folder = Path(path)
        manifest = _read_manifest(folder)
        rows, size, dim = manifest["rows"], manifest["shard_size"], manifest["dim"]
        paths = [_shard_path(folder, number) for number in range(-(-rows // size))]
        missing = [file.name for file in paths if not file.exists()]
        if missing:
            raise CacheError(
                f"The cache in {folder} is not finished: {len(missing)} of {len(paths)} shards are missing, e.g. "
                f"{missing[0]}. Call EmbeddingCache.build with the same model and corpus to complete it."
            )
        shards = []
        for number, file in enumerate(paths):
            expected = (min(size, rows - number * size), dim)
            try:
                with safe_open(file, framework="pt") as opened:
                    values = opened.get_tensor(_KEY)
                    scales = opened.get_tensor(_SCALES) if manifest["dtype"] == "int8" else None
            except SafetensorError as error:
                raise CacheError(
                    f"{file} is damaged ({error}): delete it and call EmbeddingCache.build again."
                ) from error
            if tuple(values.shape) != expected or values.dtype != DTYPES[manifest["dtype"]]:
                raise CacheError(
                    f"{file} holds {values.dtype} of shape {tuple(values.shape)}, expected {manifest['dtype']} of "
                    f"shape {expected}: delete it and call EmbeddingCache.build again."
                )
            shards.append(Shard(values, scales))
        return cls(shards, manifest["fingerprint"])

    # ------------------------------------------------------------------ reading

    def __len__(self) -> int:
        """How many rows it holds."""
        return self.end - self.first_row

    @property
    def end(self) -> int:
        """One beyond the last corpus row that it holds."""
        return int(self._starts[-1])

    @property
    def dim(self) -> int:
        """The embeddings' dimension ``d``."""
        return self._shards[0].values.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the embeddings are stored."""
        return self._shards[0].values.dtype

    @property
    def device(self) -> torch.device:
        """Where the embeddings are held; memory-mapped ones count as on the CPU."""
        return self._shards[0].values.device

    @property
    def nbytes(self) -> int:
        """Bytes that the embeddings take as they are stored."""
        return sum(each.nbytes for shard in self._shards for each in shard if each is not None)

    def __repr__(self) -> str:
        part = "" if len(self) == self.corpus_size else f" of {self.corpus_size:,}, from row {self.first_row:,}"
        return f"EmbeddingCache({len(self):,} × {self.dim}, {str(self.dtype).removeprefix('torch.')}{part})"

    def part(self, rows: slice) -> EmbeddingCache:
        """Its rows ``rows.start … rows.stop − 1`` alone, on the same memory, as one of several processes holds them.

        Raises:
            CacheError: it does not hold all of these rows, or there are none.
        """
        if not self.first_row <= rows.start < rows.stop <= self.end:
            raise CacheError(
                f"Rows {rows.start} … {rows.stop - 1} are no part of {self!r}: there must be at least one, and it must "
                "hold them all. A corpus needs as many targets as there are processes."
            )
        shards = []
        for start, shard in zip(self._starts.tolist(), self._shards, strict=False):
            first, end = max(rows.start, start), min(rows.stop, start + len(shard.values))
            if first < end:
                shards.append(shard.at(slice(first - start, end - start)))
        return EmbeddingCache(shards, self.fingerprint, rows.start, self.corpus_size)

    def share(self, device: torch.device | str) -> EmbeddingCache:
        """The part of it that this process searches where several train together, in ``device``'s memory.

        Raises:
            CacheError: there are fewer rows than processes.
            InputError: the device has no room for it.
        """
        return self.part(Processes.current().share(len(self))).to(device)

    def __getitem__(self, rows: Sequence[int] | np.ndarray | Tensor) -> Tensor:
        """The stale embeddings of ``rows``: float32, shape ``(len(rows), d)``, on the device that holds the cache.

        Raises:
            IndexError: it does not hold one of these rows.
        """
        rows = rows.cpu().numpy() if isinstance(rows, Tensor) else np.asarray(rows)
        rows = rows.astype(np.int64)
        if rows.size and (rows.min() < self.first_row or rows.max() >= self.end):
            raise IndexError(f"Rows must lie in {self.first_row} … {self.end - 1}, got {rows.min()} … {rows.max()}.")
        result = torch.empty(len(rows), self.dim, device=self.device)
        shard_of_row = np.searchsorted(self._starts, rows, side="right") - 1
        for number in np.unique(shard_of_row):
            here = np.flatnonzero(shard_of_row == number)
            local = torch.from_numpy(rows[here] - self._starts[number]).to(self.device)
            result[torch.from_numpy(here).to(self.device)] = self._shards[number].at(local).float()
        return result

    def chunks(self, size: int, first: int = 0, end: int | None = None) -> Iterator[tuple[int, Shard]]:
        """``(first row, chunk)`` over rows ``first … end − 1`` in order, as stored, each of at most ``size`` rows."""
        end = self.end if end is None else min(end, self.end)
        for start, shard in zip(self._starts.tolist(), self._shards, strict=False):
            stop = min(start + len(shard.values), end)
            for row in range(max(start, first), stop, size):
                yield row, shard.at(slice(row - start, min(row + size, stop) - start))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> EmbeddingCache:
        """The same cache in memory on ``device`` (a GPU that has room for it searches much faster), or in ``dtype``.

        Raises:
            CacheError: an embedding is not finite in that dtype.
            InputError: the device has no room for it.
        """
        device, dtype = torch.device(device or self.device), dtype or self.dtype
        scaled = dtype == torch.int8
        size = len(self) * (self.dim * dtype.itemsize + 4 * scaled)
        require_memory({f"embedding cache, {len(self):,} × {self.dim} in {dtype}": size}, device)
        # In one piece: small shards are good for files, not for a GPU.
        values = torch.empty(len(self), self.dim, dtype=dtype, device=device)
        scales = torch.empty(len(self), device=device) if scaled else None
        for row, chunk in self.chunks(_ROWS_AT_ONCE):
            here = slice(row - self.first_row, row - self.first_row + len(chunk.values))
            stored = chunk if dtype == self.dtype else Shard.store(chunk.float(), dtype)
            _require_finite(stored, row)
            values[here] = stored.values
            if scales is not None and stored.scales is not None:
                scales[here] = stored.scales
        return EmbeddingCache([Shard(values, scales)], self.fingerprint, self.first_row, self.corpus_size)


def _rows_of(number: int, shard_size: int, size: int) -> np.ndarray:
    """The rows of a shard."""
    return np.arange(number * shard_size, min((number + 1) * shard_size, size))


def _require_finite(shard: Shard, first_row: int) -> None:
    bad = shard.not_finite()
    if len(bad):
        raise CacheError(
            f"The embedding of row {first_row + int(bad[0])} is NaN or infinite in {shard.values.dtype}; each target "
            "needs a finite one."
        )


def _write_shard(path: Path, shard: Shard) -> None:
    partial = _partial(path)
    tensors = {_KEY: shard.values.contiguous()}
    if shard.scales is not None:
        tensors[_SCALES] = shard.scales.contiguous()
    save_file(tensors, partial)
    _sync(partial)
    os.replace(partial, path)


def _shard_path(folder: Path, number: int) -> Path:
    return folder / f"embeddings-{number:06d}.safetensors"


def _flat(manifest: Mapping[str, Any]) -> dict[str, Any]:
    rest = {key: value for key, value in manifest.items() if key != "fingerprint"}
    return {**rest, **manifest["fingerprint"]}


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / _MANIFEST
    if not path.is_file():
        raise CacheError(f"{folder} holds no embedding cache (no {_MANIFEST}): build one with EmbeddingCache.build.")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        complete = {"schema", "rows", "dim", "dtype", "fingerprint", "shard_size"} <= manifest.keys()
    except (ValueError, AttributeError) as error:
        raise CacheError(f"{path} is not readable ({error}): delete the folder and build the cache again.") from error
    if not complete or manifest["schema"] != SCHEMA or manifest["dtype"] not in DTYPES:
        raise CacheError(
            f"{path} does not describe a cache of schema {SCHEMA}: it was written by another version of st_corrector, "
            "or is damaged. Build the cache again in another folder."
        )
    return manifest


def _write_atomically(path: Path, data: bytes) -> None:
    partial = _partial(path)
    partial.write_bytes(data)
    _sync(partial)
    os.replace(partial, path)


def _partial(path: Path) -> Path:
    """A name of this process's own: two builders of one cache must not write into one file."""
    return path.with_name(f"{path.name}.{os.getpid()}.partial")


def _sync(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())
