"""The stale buffer: for every target, what the encoder said when the cache was built.

On disk it is a folder of safetensors shards of consecutive rows and one ``manifest.json``::

    manifest.json            what the embeddings are: schema, rows, dim, dtype, fingerprint
    embeddings-000000.safetensors, embeddings-000001.safetensors, …

Nothing writes to it once it is built; training reads it memory-mapped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer
from torch import Tensor
from tqdm.auto import tqdm

from .corpus import Corpus
from .encoding import DocumentEncoder
from .errors import CacheError
from .fingerprint import differences

SCHEMA = 1
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_MANIFEST = "manifest.json"
_KEY = "embeddings"
_CHECKED_AT_ONCE = 65_536


class EmbeddingCache:
    """The stale embeddings ``g'(y)`` of all targets, shape ``(N, d)``. Build, load or wrap them:
    :meth:`build`, :meth:`load`, :meth:`from_tensor`.

    Args:
        shards: consecutive row blocks, each ``(rows, d)`` of one dtype.
        fingerprint: what the embeddings depend on, by component; empty where that is not known.
    """

    def __init__(self, shards: Sequence[Tensor], fingerprint: Mapping[str, Any] | None = None) -> None:
        self._shards = list(shards)
        self._starts = np.cumsum([0] + [len(shard) for shard in self._shards])
        self.fingerprint = dict(fingerprint or {})

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
        for start in range(0, len(tensor), _CHECKED_AT_ONCE):
            finite = torch.isfinite(tensor[start : start + _CHECKED_AT_ONCE]).all(1)
            if not finite.all():
                row = start + int((~finite).nonzero()[0])
                raise CacheError(f"The embedding of row {row} is NaN or infinite; each target needs a finite one.")
        return cls([tensor.detach()])

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
        loads it.

        Args:
            path: a new folder, or one that an earlier call with the same model and corpus began.
            batch_size: targets in one forward pass; they are sorted by length within a shard.
            dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
            shard_size: rows in one file, which is also what a kill loses at most.
            progress: show a progress bar.

        Raises:
            CacheError: ``path`` holds a cache of another model, corpus, prompt or dtype (it says which),
                an unknown dtype is asked for, or an embedding is not finite.
        """
        if dtype not in DTYPES:
            raise CacheError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}.")
        if batch_size < 1 or shard_size < 1:
            raise CacheError(f"batch_size and shard_size must be at least 1, got {batch_size} and {shard_size}.")
        encoder = DocumentEncoder(model, corpus, progress=progress)
        folder = Path(path)
        manifest = {
            "schema": SCHEMA,
            "rows": len(corpus),
            "dim": encoder.encode(model, [0]).shape[1],
            "dtype": dtype,
            "fingerprint": encoder.fingerprint(model),
        }
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

        with tqdm(total=len(corpus), desc="Building the cache", unit=" targets", disable=not progress) as bar:
            for number, start in enumerate(range(0, len(corpus), shard_size)):
                rows = np.arange(start, min(start + shard_size, len(corpus)))
                shard = _shard_path(folder, number)
                if shard.exists():
                    bar.update(len(rows))
                    continue
                # Checked in the stored dtype: float16 overflows at 65,504.
                embeddings = encoder.encode(model, rows, batch_size=batch_size, bar=bar).to("cpu", DTYPES[dtype])
                finite = torch.isfinite(embeddings).all(1)
                if not finite.all():
                    bad = rows[(~finite).numpy()]
                    raise CacheError(
                        f"The embeddings of {len(bad)} targets are NaN or infinite, e.g. rows {bad[:3].tolist()} "
                        f"(ids {corpus.ids(bad[:3])}), in {dtype}: check the model's weights, or choose another dtype."
                    )
                partial = _partial(shard)
                save_file({_KEY: embeddings.contiguous()}, partial)
                _sync(partial)
                os.replace(partial, shard)
        return cls.load(folder)

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
                    shard = opened.get_tensor(_KEY)
            except SafetensorError as error:
                raise CacheError(
                    f"{file} is damaged ({error}): delete it and call EmbeddingCache.build again."
                ) from error
            if tuple(shard.shape) != expected or shard.dtype != DTYPES[manifest["dtype"]]:
                raise CacheError(
                    f"{file} holds {shard.dtype} of shape {tuple(shard.shape)}, expected {manifest['dtype']} of shape "
                    f"{expected}: delete it and call EmbeddingCache.build again."
                )
            shards.append(shard)
        return cls(shards, manifest["fingerprint"])

    # ------------------------------------------------------------------ reading

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def dim(self) -> int:
        """The embeddings' dimension ``d``."""
        return self._shards[0].shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the embeddings are stored."""
        return self._shards[0].dtype

    def __repr__(self) -> str:
        return f"EmbeddingCache({len(self):,} × {self.dim}, {str(self.dtype).removeprefix('torch.')})"

    def __getitem__(self, rows: Sequence[int] | np.ndarray | Tensor) -> Tensor:
        """The stale embeddings of ``rows``: float32, shape ``(len(rows), d)``, on the device that holds the cache.

        Raises:
            IndexError: a row is negative or beyond the last.
        """
        rows = rows.cpu().numpy() if isinstance(rows, Tensor) else np.asarray(rows)
        rows = rows.astype(np.int64)
        if rows.size and (rows.min() < 0 or rows.max() >= len(self)):
            raise IndexError(f"Rows must lie in 0 … {len(self) - 1}, got {rows.min()} … {rows.max()}.")
        device = self._shards[0].device
        result = torch.empty(len(rows), self.dim, device=device)
        shard_of_row = np.searchsorted(self._starts, rows, side="right") - 1
        for number in np.unique(shard_of_row):
            here = np.flatnonzero(shard_of_row == number)
            local = torch.from_numpy(rows[here] - self._starts[number]).to(device)
            result[torch.from_numpy(here).to(device)] = self._shards[number][local].float()
        return result

    def chunks(self, size: int) -> Iterator[tuple[int, Tensor]]:
        """``(first row, block)`` over all rows in order, each block at most ``size`` rows, in the stored dtype."""
        for start, shard in zip(self._starts, self._shards, strict=False):
            for offset in range(0, len(shard), size):
                yield int(start) + offset, shard[offset : offset + size]

    def empty_like(self) -> Tensor:
        """An uninitialised tensor for as many embeddings, ``(N, d)``, of the same dtype and on the same device."""
        return torch.empty(len(self), self.dim, dtype=self.dtype, device=self._shards[0].device)

    def to(self, device: torch.device | str) -> EmbeddingCache:
        """The same cache held on ``device`` (a GPU that has room for it), where it is searched much faster."""
        return EmbeddingCache([shard.to(device) for shard in self._shards], self.fingerprint)


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
