"""The stale buffer: every target's embedding from when the cache was built.

Nothing of it is written again after the build (:mod:`.folder` has its files); training reads it memory-mapped.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor

from ..data.corpus import Corpus
from ..data.routing import DOCUMENT
from ..data.targets import as_rows
from ..errors import CacheError, NonFiniteError, StorageError
from ..runtime.distributed import Processes
from ..runtime.memory import require_memory
from .arrays import Embeddings, as_tensor
from .building import build, extend, repair
from .folder import CacheFolder, Description
from .shard import Shard
from .sharing import download, upload

logger = logging.getLogger(__name__)
_ROWS_AT_ONCE = 16_384


class EmbeddingCache:
    """The stale embeddings ``g'(y)`` of all targets, shape ``(N, d)``. Build, load or wrap them:
    :meth:`build`, :meth:`load`, :meth:`from_tensor`.

    Args:
        shards: of consecutive rows, all of one dtype.
        fingerprint: what the embeddings depend on, by component; empty if unknown.
        first_row: the corpus row of the first embedding, for a :meth:`part` of a cache.
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
        """The first corpus row that it holds; row numbers always refer to the corpus, also in a part."""
        self.corpus_size = len(self) if corpus_size is None else corpus_size
        """Rows of the whole corpus."""
        self.path: Path | None = None
        """The folder that it is memory-mapped from, if it is one whole cache."""

    # ------------------------------------------------------------------ constructors

    @classmethod
    def from_tensor(cls, embeddings: Embeddings) -> EmbeddingCache:
        """A cache of existing vectors (such as a served index's); row ``i`` is target ``i``.

        A tensor or array of float32, bfloat16 or float16 is kept, not copied; wider numbers become float32
        (:func:`~st_corrector.cache.arrays.as_tensor`). Its origin is unknown, so only its size can be checked against a
        corpus.

        Args:
            embeddings: ``(targets, dimension)``; a list or column of vectors also works.

        Raises:
            CacheError: it is not a two-dimensional array of floating-point numbers.
            NonFiniteError: an embedding is NaN or infinite.
        """
        tensor = as_tensor(embeddings, CacheError)
        if not tensor.numel():
            raise CacheError(
                f"Expected floating-point embeddings of shape (targets, dimension), got none: {tuple(tensor.shape)}."
            )
        cache = cls([Shard(tensor)])
        for start, chunk in cache.chunks(_ROWS_AT_ONCE):
            _require_finite(chunk, start)
        return cache

    @classmethod
    def joined(cls, caches: Sequence[EmbeddingCache]) -> EmbeddingCache:
        """Whole caches of one dtype and width, one after the other; nothing is copied."""
        return cls([shard for cache in caches for shard in cache._shards])

    @classmethod
    def from_blocks(
        cls,
        blocks: Iterable[Tensor],
        dtype: torch.dtype,
        first_row: int = 0,
        corpus_size: int | None = None,
        rows: int | None = None,
    ) -> EmbeddingCache:
        """A cache in memory of floating-point blocks of consecutive rows, ``(n, d)`` each, stored in ``dtype``.

        Args:
            blocks: ``(n, d)`` each, on the device that will hold the cache.
            dtype: one of :data:`DTYPES`.
            first_row, corpus_size: for a part; see :class:`EmbeddingCache`.
            rows: of all blocks together, if known: then the cache is allocated as one piece, which a GPU searches
                faster and which never takes memory twice.

        Raises:
            CacheError: the blocks have a different number of rows.
            NonFiniteError: an embedding is not finite in that dtype.
        """
        stored = _finite((Shard.store(block.detach(), dtype) for block in blocks), first_row)
        shards = list(stored) if rows is None else [_in_one_piece(stored, rows)]
        return cls(shards, first_row=first_row, corpus_size=corpus_size)

    @classmethod
    def build(
        cls,
        model: SentenceTransformer,
        corpus: Corpus,
        path: str | os.PathLike[str],
        batch_size: int = 64,
        dtype: str = "float32",
        shard_size: int = 16_384,
        progress: bool = True,
        task: str = DOCUMENT,
    ) -> EmbeddingCache:
        """Encode every target of ``corpus`` with ``model`` into the folder ``path``.

        If it is killed, the same call continues after the last finished shard; called on a finished cache, it loads it;
        of one that was extended since, what it was of this corpus.
        If several processes train together, all call it and each encodes its share of the shards; all must see the
        folder.

        Args:
            path: a new folder, or one started by an earlier call with the same model and corpus.
            batch_size: targets in one forward pass; they are sorted by length within a shard.
            dtype: ``"float32"``, ``"bfloat16"``, ``"float16"``, or ``"int8"`` with one float32 scale per row.
            shard_size: rows in one file; a kill loses at most one file.
            progress: show a progress bar.
            task: ``"query"`` encodes a corpus of queries, as ``model.encode_query`` would.

        Raises:
            CacheError: ``path`` holds a cache of another model, corpus, prompt or dtype (it says which), another
                process is building in it, or the dtype is unknown.
            NonFiniteError: an embedding is NaN or infinite in that dtype.
            StorageError: the disk has no room for it, or cannot be written to.
            ProcessError: another process has failed, or does not see the same folder.
        """
        build(model, corpus, Path(path), batch_size, dtype, shard_size, progress, task)
        return cls.load(path)._when_it_was_of(corpus)

    @classmethod
    def extend(
        cls,
        model: SentenceTransformer,
        corpus: Corpus,
        path: str | os.PathLike[str],
        batch_size: int = 64,
        progress: bool = True,
        task: str = DOCUMENT,
    ) -> EmbeddingCache:
        """Encode what ``corpus`` has behind the targets of the finished cache in the folder ``path``, and add it there.

        A corpus has grown from that cache's if it begins with the same texts: by :meth:`Corpus.extend`, or because its
        source has been appended to. What is there is not written to. Until all is encoded the folder holds the cache
        that it held; if it is killed, the same call continues after the last finished shard. A cache that has all of
        the corpus is loaded. With several processes all call it.

        Args:
            model: the one that the cache was built by, as it was.
            batch_size: targets in one forward pass.
            progress: show a progress bar.
            task: as for :meth:`build`.

        Raises:
            CacheError: the corpus does not begin with the cache's targets, the cache is of another model or prompt (it
                says which), or not finished, or another process is building in its folder.
            NonFiniteError: an embedding is NaN or infinite in the cache's dtype.
            StorageError: the disk has no room for it, or cannot be written to.
            ProcessError: another process has failed, or does not see the same folder.
        """
        extend(model, corpus, Path(path), batch_size, progress, task)
        return cls.load(path)._when_it_was_of(corpus)

    @classmethod
    def repair(
        cls, model: SentenceTransformer, corpus: Corpus, path: str | os.PathLike[str], batch_size: int = 64
    ) -> EmbeddingCache:
        """Encode again what is damaged or missing in the cache of ``model`` and ``corpus`` in ``path``.

        All of it is read and compared with its digests.

        Raises:
            CacheError: it is a cache of something else, or :meth:`build` refuses it.
        """
        repair(model, corpus, Path(path), batch_size)
        return cls.load(path)

    def save(self, path: str | os.PathLike[str]) -> EmbeddingCache:
        """Write it into the new folder ``path``, as :meth:`build` would have; returns it memory-mapped from there.

        Raises:
            CacheError: ``path`` is not empty, or this is only a part of a cache.
            StorageError: the disk has no room for it, or cannot be written to.
        """
        if len(self) != self.corpus_size:
            raise CacheError(f"{self!r} is a part of a cache: save the whole one.")
        folder = CacheFolder(Path(path), "Partial output was removed: then repeat the call.")
        if folder.path.exists() and (not folder.path.is_dir() or any(folder.path.iterdir())):
            raise CacheError(f"{path} is not empty: choose a new folder to save the cache in.")
        try:
            self._save(folder)
        except StorageError:
            shutil.rmtree(path, ignore_errors=True)  # only this call used it
            raise
        return self.load(path)

    def _save(self, folder: CacheFolder) -> None:
        dtype = str(self.dtype).removeprefix("torch.")
        description = Description(len(self), self.dim, dtype, _ROWS_AT_ONCE, self.fingerprint)
        with folder.locked():
            folder.begin(description)
            for number in description.shards:
                rows = description.rows_of(number)
                parts = [chunk for _, chunk in self.chunks(_ROWS_AT_ONCE, rows.start, rows.stop)]
                values = torch.cat([part.values for part in parts]).cpu().contiguous()
                scales = [part.scales for part in parts if part.scales is not None]
                folder.write(description, number, Shard(values, torch.cat(scales).cpu() if scales else None))
            folder.finish(description)

    @classmethod
    def load(cls, path: str | os.PathLike[str], verify: bool = False) -> EmbeddingCache:
        """The finished cache in the folder ``path``, memory-mapped: nothing is read until it is used.

        Args:
            verify: read all of it and compare it with its digests, as ``st-corrector cache verify`` does; useful after
                a copy or download.

        Raises:
            CacheError: there is no cache, its build was not finished, or a shard is missing, cut short, from another
                cache or, with ``verify``, damaged.
        """
        folder = CacheFolder(Path(path))
        if verify and (damaged := folder.damaged()):
            raise CacheError("\n".join(list(damaged.values())[:5]) + f"\n{len(damaged)} shards in all.")
        description, shards = folder.read()
        cache = cls(shards, description.fingerprint)
        cache.path = folder.path
        return cache

    @classmethod
    def from_hub(
        cls,
        repo_id: str,
        path: str | os.PathLike[str] | None = None,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        verify: bool = True,
    ) -> EmbeddingCache:
        """A cache from a dataset repository (:meth:`push_to_hub`), memory-mapped from a local copy.

        If it is interrupted, the same call continues after the files already there. When all are there, it only checks
        for a newer version; offline (``HF_HUB_OFFLINE=1``), it does not check.

        Args:
            path: folder of the local copy; by default among this package's derived files.
            revision: branch, tag or commit.
            token: by default the one of ``hf auth login`` or ``HF_TOKEN``.
            verify: read all of it and compare it with what was written.

        Raises:
            CacheError: the repository has no finished cache, the download differs from what was written, or ``path``
                holds another cache.
            OSError: the Hub cannot be reached, or has no such repository (huggingface_hub's own exceptions).
        """
        return cls.load(download(repo_id, path, revision, token), verify=verify)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str = "Add an embedding cache",
    ) -> str:
        """Upload it into a dataset repository on the Hub, shard by shard; returns the commit's address.

        If it is interrupted, the same call sends only the shards that the Hub has not received. Another cache in the
        repository is replaced. Embeddings reveal information about their texts: think before you publish those of a
        private corpus.

        Args:
            repo_id: created if missing.
            private: for a repository created here.
            token: by default the one of ``hf auth login`` or ``HF_TOKEN``.
            revision: a branch, created if missing.

        Raises:
            CacheError: it is only a part of a cache, or its folder is being extended.
            OSError: the Hub cannot be reached or refuses (huggingface_hub's own exceptions).
        """
        if self.path is None or CacheFolder(self.path).description().rows != len(self):  # it was extended since
            with tempfile.TemporaryDirectory() as folder:
                return self.save(Path(folder) / "cache").push_to_hub(
                    repo_id, private=private, token=token, revision=revision, commit_message=commit_message
                )
        return upload(self.path, repr(self), self.fingerprint, repo_id, private, token, revision, commit_message)

    def _when_it_was_of(self, corpus: Corpus) -> EmbeddingCache:
        """What a cache of this corpus was before it was extended, or all of it."""
        if self.path is None or len(self) == len(corpus):
            return self
        count = CacheFolder(self.path).description().stage(len(corpus), corpus.fingerprint)
        return EmbeddingCache(self._shards[:count], {**self.fingerprint, "corpus": corpus.fingerprint})

    # ------------------------------------------------------------------ reading

    def __len__(self) -> int:
        """The number of rows that it holds."""
        return self.end - self.first_row

    @property
    def end(self) -> int:
        """The last corpus row that it holds, plus one."""
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
        """The device that holds the embeddings; memory-mapped ones count as on the CPU."""
        return self._shards[0].values.device

    @property
    def nbytes(self) -> int:
        """Bytes of the stored embeddings."""
        return sum(each.nbytes for shard in self._shards for each in shard if each is not None)

    def __repr__(self) -> str:
        part = "" if len(self) == self.corpus_size else f" of {self.corpus_size:,}, from row {self.first_row:,}"
        return f"EmbeddingCache({len(self):,} × {self.dim}, {str(self.dtype).removeprefix('torch.')}{part})"

    def part(self, rows: slice) -> EmbeddingCache:
        """Only its rows ``rows.start … rows.stop − 1``, sharing memory, as one of several processes holds them.

        Raises:
            CacheError: it does not hold all of these rows, or there are none.
        """
        if not self.first_row <= rows.start < rows.stop <= self.end:
            raise CacheError(
                f"Rows {rows.start} … {rows.stop - 1} are not a part of {self!r}: there must be at least one, and it "
                "must hold them all. A corpus needs at least as many targets as processes."
            )
        shards = []
        for start, shard in zip(self._starts.tolist(), self._shards, strict=False):
            first, end = max(rows.start, start), min(rows.stop, start + len(shard.values))
            if first < end:
                shards.append(shard.at(slice(first - start, end - start)))
        return EmbeddingCache(shards, self.fingerprint, rows.start, self.corpus_size)

    def share(self, device: torch.device | str) -> EmbeddingCache:
        """The part that this process searches if several train together, in ``device``'s memory.

        Raises:
            CacheError: there are fewer rows than processes.
            InputError: the device has no room for it.
        """
        return self.part(Processes.current().share(len(self))).to(device)

    def __getitem__(self, rows: Sequence[int] | np.ndarray | Tensor) -> Tensor:
        """The stale embeddings of ``rows``: float32, shape ``(len(rows), d)``, on the device that holds the cache.

        Args:
            rows: integers, or a mask over all rows of the corpus.

        Raises:
            IndexError: it does not hold one of these rows.
            InputError: they are neither.
        """
        rows = as_rows(rows, self.corpus_size)
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
            NonFiniteError: an embedding is not finite in that dtype.
            InputError: the device has no room for it.
        """
        device, dtype = torch.device(device or self.device), dtype or self.dtype
        scaled = dtype == torch.int8
        size = len(self) * (self.dim * dtype.itemsize + 4 * scaled)
        require_memory({f"embedding cache, {len(self):,} × {self.dim} in {dtype}": size}, device)
        # In one piece: small shards suit files, not a GPU.
        chunks = (chunk for _, chunk in self.chunks(_ROWS_AT_ONCE))
        stored = (chunk if dtype == self.dtype else Shard.store(chunk.float(), dtype) for chunk in chunks)
        whole = _in_one_piece(_finite(stored, self.first_row), len(self), device)
        return EmbeddingCache([whole], self.fingerprint, self.first_row, self.corpus_size)


def _in_one_piece(shards: Iterable[Shard], rows: int, device: torch.device | None = None) -> Shard:
    """Shards of ``rows`` consecutive rows, joined, on ``device`` or the first shard's device."""
    whole: Shard | None = None
    filled = 0
    for shard in shards:
        if whole is None:
            whole = shard.map(lambda each: each.new_empty((rows, *each.shape[1:]), device=device))
        start, filled = filled, filled + len(shard.values)
        if filled > rows:
            break
        whole.at(slice(start, filled)).copy_(shard)
    if whole is None or filled != rows:
        raise CacheError(f"Expected embeddings of {rows:,} rows, got {'more' if filled > rows else f'{filled:,}'}.")
    return whole


def _finite(shards: Iterable[Shard], first_row: int) -> Iterator[Shard]:
    """``shards`` of consecutive rows, each as soon as it has been checked."""
    for shard in shards:
        _require_finite(shard, first_row)
        first_row += len(shard.values)
        yield shard


def _require_finite(shard: Shard, first_row: int) -> None:
    bad = shard.not_finite()
    if len(bad):
        raise NonFiniteError(
            f"The embedding of row {first_row + int(bad[0])} is NaN or infinite in {shard.values.dtype}; each target "
            "needs a finite one."
        )
