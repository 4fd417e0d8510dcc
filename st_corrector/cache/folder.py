"""The files of an embedding cache::

    build.json       while it is being built: what it will be
    manifest.json    written last: the same, and every shard's size and digest
    extension.json   while it is being extended: what it will be
    embeddings-000000.safetensors, embeddings-000001.safetensors, …    "embeddings", and "scales" where they are int8

A folder without ``manifest.json`` is not yet a cache. Of one that has it only shards are added, and then, at once, a
manifest that has them too: until then the cache is what it was. No file name is read from
another file, so an untrusted folder cannot refer to anything outside.
"""

from __future__ import annotations

import hashlib
import json
import logging
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ..errors import CacheError
from ..storage.files import make_folder, require_space, storing, whole
from ..storage.fingerprint import differences, digest_json
from .shard import DTYPES, Shard

logger = logging.getLogger(__name__)
SCHEMA = 2
FILES = ("manifest.json", "embeddings-*.safetensors")
"""What a finished cache consists of, as patterns."""
_MANIFEST, _BUILD, _EXTENSION, _LOCK = "manifest.json", "build.json", "extension.json", ".lock"
_KEY, _SCALES, _DIGEST = "embeddings", "scales", "sha256"
# Metadata of a shard's file: its cache, number and digest. In one entry: safetensors orders several at random.
_SHARD = "shard"
_LARGEST_JSON = 64 << 20  # of a manifest with billions of targets
MOST_SHARDS = 1 << 20  # limits the work that a file can cause


@dataclass(frozen=True)
class Description:
    """The description of a cache.

    Args:
        rows: targets ``N``.
        dim: of their embeddings, ``d``.
        dtype: one of :data:`DTYPES`.
        shard_size: rows in one file, at most.
        fingerprint: what the embeddings depend on, by component.
        earlier: what it was before it was extended, each time: ``rows``, and the fingerprint of the ``corpus``. Every
            shard holds rows of one extension.
    """

    rows: int
    dim: int
    dtype: str
    shard_size: int
    fingerprint: dict[str, Any]
    earlier: tuple[dict[str, Any], ...] = ()

    @cached_property
    def _ends(self) -> list[int]:
        """The last row of each stage, plus one."""
        return [*(each["rows"] for each in self.earlier), self.rows]

    @cached_property
    def _first_shards(self) -> list[int]:
        """The number of the first shard of each stage, and of one more."""
        starts = [0, *self._ends]
        counts = (-(-(end - start) // self.shard_size) for start, end in zip(starts, self._ends, strict=False))
        return [0, *accumulate(counts)]

    @property
    def shards(self) -> range:
        """The shards' numbers."""
        return range(self._first_shards[-1])

    def rows_of(self, shard: int) -> range:
        """The corpus rows of a shard."""
        stage = self._stage_of(shard)
        first = (self._ends[stage - 1] if stage else 0) + (shard - self._first_shards[stage]) * self.shard_size
        return range(first, min(first + self.shard_size, self._ends[stage]))

    def bytes_of(self, shard: int) -> int:
        """Bytes of a shard's embeddings, without the file's header."""
        return len(self.rows_of(shard)) * (self.dim * DTYPES[self.dtype].itemsize + 4 * (self.dtype == "int8"))

    def flat(self) -> dict[str, Any]:
        """All components on one level, for comparison; not how it came about."""
        own = {name: getattr(self, name) for name in ("rows", "dim", "dtype", "shard_size")}
        return {**own, **self.fingerprint}

    def record(self) -> dict[str, Any]:
        """What the folder keeps of it."""
        record = {field.name: getattr(self, field.name) for field in fields(self)}
        return record if self.earlier else {name: value for name, value in record.items() if name != "earlier"}

    def stage(self, rows: int, corpus: str | None) -> int | None:
        """How many shards the cache had when it was of ``rows`` targets of this fingerprint; None if it never was."""
        for number, each in enumerate(self.earlier):
            if (each["rows"], each["corpus"]) == (rows, corpus):
                return self._first_shards[number + 1]
        return None

    def extended(self, rows: int, corpus: str) -> Description:
        """Of the same cache with more rows, by the fingerprint of the larger corpus."""
        before = {"rows": self.rows, "corpus": self.fingerprint.get("corpus")}
        fingerprint = {**self.fingerprint, "corpus": corpus}
        return replace(self, rows=rows, fingerprint=fingerprint, earlier=(*self.earlier, before))

    def place(self, shard: int) -> str:
        """Identifies the cache, as it was when the shard was written, and the shard."""
        stage = self._stage_of(shard)
        was = self.flat()
        if stage < len(self.earlier):
            was |= self.earlier[stage]
        return digest_json([was, shard, *([self.rows_of(shard).start] if stage else [])])

    def _stage_of(self, shard: int) -> int:
        return bisect_right(self._first_shards, shard) - 1


class CacheFolder:
    """The folder of one cache.

    Args:
        path: the folder.
        advice: what to do once the cause of a failed write is fixed.
    """

    def __init__(self, path: Path, advice: str = "The same call continues after the finished shards.") -> None:
        self.path, self._advice = path, advice

    @property
    def is_finished(self) -> bool:
        """Whether it holds a whole cache."""
        return (self.path / _MANIFEST).is_file()

    @property
    def is_begun(self) -> bool:
        """Whether a cache is, or was, being built in it."""
        return (self.path / _BUILD).is_file()

    def description(self) -> Description:
        """The description of the cache that is finished or being built.

        Raises:
            CacheError: there is none, or its description is damaged.
        """
        return self._read_json()[0]

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other builders out; the lock of a dead process is free.

        Raises:
            CacheError: another process is building in it.
        """
        make_folder(self.path)
        lock = FileLock(self.path / _LOCK, timeout=0)
        with storing(self.path, self._advice):
            try:
                lock.acquire()
            except Timeout as error:
                raise CacheError(
                    f"Another process is building a cache in {self.path}: wait for it, or build in another folder."
                ) from error
        try:
            yield
        finally:
            lock.release()

    def require(self, description: Description, found: Description | None = None) -> Description:
        """The description in the folder, or another one of it, if it equals this one except for the shard size.

        Raises:
            CacheError: it differs; the message says how.
        """
        found = found or self.description()
        if different := differences(found.flat(), {**description.flat(), "shard_size": found.shard_size}):
            raise CacheError(
                f"{self.path} holds a cache of something else:\n  " + "\n  ".join(different) + "\nBuild into "
                "another folder, or delete this one if it is no longer needed."
            )
        return found

    def begin(self, description: Description) -> Description:
        """Begin a cache or continue one; returns the folder's description, whose shard size may differ.

        Raises:
            CacheError: there is something else in the folder.
            StorageError: the disk is too small, or cannot be written to.
        """
        if self.is_finished or self.is_begun:
            description = self.require(description)
        elif any(file.suffix != ".partial" and file.name != _LOCK for file in self.path.iterdir()):
            raise CacheError(f"{self.path} is not empty and holds no embedding cache: choose an empty or new folder.")
        for leftover in self.path.glob("*.partial"):
            leftover.unlink(missing_ok=True)
        missing = self.missing(description)
        require_space(self.path, sum(map(description.bytes_of, missing)), f"What is missing of {len(missing)} shards")
        if not self.is_finished and not self.is_begun:
            self._write_json(_BUILD, description.record())
        return description

    def begin_extension(self, description: Description) -> None:
        """Begin to extend the finished cache to what is described, or continue.

        Shards that another extension has left, which was not finished, are removed.

        Raises:
            CacheError: a shard of the finished cache is missing.
            StorageError: the disk is too small, or cannot be written to.
        """
        finished = self.description()
        if self.being_extended() != description:
            self._drop_extension(finished)
        for number in description.shards[len(finished.shards) :]:
            try:
                if self._shard(number).exists():
                    self._open(number, description)
            except CacheError as error:
                logger.warning("%s It is encoded again.", error)
                self._shard(number).unlink(missing_ok=True)
        for leftover in self.path.glob("*.partial"):
            leftover.unlink(missing_ok=True)
        missing = self.missing(description)
        if missing and missing[0] < len(finished.shards):
            raise CacheError(f"{self._shard(missing[0])} is missing: {_REPAIR} Then extend the cache.")
        require_space(self.path, sum(map(description.bytes_of, missing)), f"What is missing of {len(missing)} shards")
        self._write_json(_EXTENSION, description.record())

    def being_extended(self) -> Description | None:
        """What the finished cache is, or was, being extended to; None if nothing, or nothing that can be read."""
        try:
            begun = self._read_description(self.path / _EXTENSION)[0]
        except CacheError:
            return None
        # Killed after its manifest was written, it is finished.
        return begun if begun.rows > self.description().rows else None

    def forget_extension(self) -> None:
        """Remove the description of an extension that is finished."""
        if self.being_extended() is None:
            (self.path / _EXTENSION).unlink(missing_ok=True)

    def finish_extension(self, description: Description) -> None:
        """The cache is what is described from here on.

        Raises:
            CacheError: a shard is missing or damaged.
        """
        before, recorded = self._read_json()
        more = [self._recorded(number, description) for number in description.shards[len(before.shards) :]]
        self._write_json(_MANIFEST, {**description.record(), "shards": [*(recorded or []), *more]})
        (self.path / _EXTENSION).unlink(missing_ok=True)

    def _drop_extension(self, finished: Description) -> None:
        """Remove what does not belong to the finished cache."""
        if (left := self.being_extended()) is not None:
            logger.warning(
                "%s was being extended to %d targets, and not these: what there is of them is removed.",
                self.path,
                left.rows,
            )
        kept = {self._shard(number).name for number in finished.shards}
        for file in self.path.glob("embeddings-*.safetensors"):
            if file.name not in kept:
                file.unlink(missing_ok=True)
        (self.path / _EXTENSION).unlink(missing_ok=True)

    def missing(self, description: Description) -> list[int]:
        """The missing shards."""
        present = {file.name for file in self.path.glob("embeddings-*.safetensors")}
        return [number for number in description.shards if self._shard(number).name not in present]

    def write(self, description: Description, number: int, shard: Shard) -> None:
        """Write a shard of the described cache.

        Raises:
            StorageError: it cannot be written.
        """
        tensors = {_KEY: shard.values.contiguous()}
        if shard.scales is not None:
            tensors[_SCALES] = shard.scales.contiguous()
        with whole(self._shard(number), self._advice) as path:
            path.write_bytes(save(tensors, {_SHARD: f"{description.place(number)} {_digest(shard)}"}))

    def finish(self, description: Description) -> None:
        """Mark the cache as complete.

        Raises:
            CacheError: a shard is missing or damaged.
        """
        shards = [self._recorded(number, description) for number in description.shards]
        self._write_json(_MANIFEST, {**description.record(), "shards": shards})
        (self.path / _BUILD).unlink(missing_ok=True)

    def _recorded(self, number: int, description: Description) -> dict[str, Any]:
        _, digest = self._open(number, description)
        return {"bytes": self._shard(number).stat().st_size, _DIGEST: digest}

    def read(self) -> tuple[Description, list[Shard]]:
        """A finished cache, memory-mapped; sizes and shapes are compared, contents are not read.

        Raises:
            CacheError: there is none, or a shard is missing or damaged.
        """
        description, recorded = self._read_json()
        if recorded is None:
            missing = self.missing(description)
            raise CacheError(
                f"The cache in {self.path} is not finished: {len(missing)} of {len(description.shards)} shards are "
                f"missing{f', e.g. {self._shard(missing[0]).name}' if missing else ''}. Call EmbeddingCache.build with "
                "the same model and corpus to complete it."
            )
        return description, [self._checked(number, description, recorded) for number in description.shards]

    def damaged(self) -> dict[int, str]:
        """Every shard that differs from what was written, and why: all existing shards are read. Only an unfinished
        cache may lack some.

        Raises:
            CacheError: there is no cache.
        """
        description, recorded = self._read_json()
        missing = set(self.missing(description)) if recorded is None else set()
        found = {}
        for number in description.shards:
            if number in missing:
                continue
            try:
                if recorded is None:
                    shard, digest = self._open(number, description)
                else:
                    shard, digest = self._checked(number, description, recorded), recorded[number][_DIGEST]
                if _digest(shard) != digest:
                    found[number] = f"{self._shard(number)} is damaged: its contents are not what was written."
            except CacheError as error:
                found[number] = str(error)
        return found

    def reopen(self, shards: list[int]) -> None:
        """Remove ``shards`` from the cache, so that a build completes it."""
        description, _ = self._read_json()
        self._write_json(_BUILD, description.record())
        for number in shards:
            self._shard(number).unlink(missing_ok=True)
        # Last: if killed before this, it is a finished cache that lacks shards, not one whose damaged shards look new.
        (self.path / _MANIFEST).unlink(missing_ok=True)

    def _shard(self, number: int) -> Path:
        return self.path / f"embeddings-{number:06d}.safetensors"

    def _checked(self, number: int, description: Description, recorded: list[dict[str, Any]]) -> Shard:
        path = self._shard(number)
        if not path.is_file():
            raise CacheError(f"{path} is missing: {_REPAIR}")
        if path.stat().st_size != recorded[number]["bytes"]:
            raise CacheError(
                f"{path} is damaged: it has {path.stat().st_size:,} bytes, {recorded[number]['bytes']:,} were written. "
                + _REPAIR
            )
        shard, digest = self._open(number, description)
        if digest != recorded[number][_DIGEST]:
            raise CacheError(f"{path} is not the file that was written. {_REPAIR}")
        return shard

    def _open(self, number: int, description: Description) -> tuple[Shard, str]:
        """A shard, memory-mapped, and its digest from when it was written."""
        path = self._shard(number)
        _require_own(path)
        try:
            with safe_open(path, framework="pt") as file:
                place, _, digest = (file.metadata() or {}).get(_SHARD, "").partition(" ")
                values = file.get_tensor(_KEY)
                scales = file.get_tensor(_SCALES) if description.dtype == "int8" else None
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise CacheError(f"{path} is damaged ({error}). {_REPAIR}") from error
        expected = (len(description.rows_of(number)), description.dim)
        found = (tuple(values.shape), values.dtype, None if scales is None else (tuple(scales.shape), scales.dtype))
        if found != (
            expected,
            DTYPES[description.dtype],
            None if scales is None else (expected[:1], torch.float32),
        ):
            raise CacheError(
                f"{path} holds {values.dtype} of shape {tuple(values.shape)}, expected {description.dtype} of shape "
                f"{expected}. {_REPAIR}"
            )
        if place != description.place(number):
            raise CacheError(f"{path} is not the file that was written: it is of another cache. {_REPAIR}")
        return Shard(values, scales), digest

    def _write_json(self, name: str, value: Mapping[str, Any]) -> None:
        with whole(self.path / name, self._advice) as path:
            path.write_text(json.dumps({"schema": SCHEMA, **value}, indent=2), encoding="utf-8")

    def _read_json(self) -> tuple[Description, list[dict[str, Any]] | None]:
        """The description, and the record of each shard if the cache is finished."""
        return self._read_description(self.path / (_MANIFEST if self.is_finished else _BUILD))

    def _read_description(self, path: Path) -> tuple[Description, list[dict[str, Any]] | None]:
        if not path.is_file():
            raise CacheError(f"{self.path} holds no embedding cache: build one with EmbeddingCache.build.")
        _require_own(path)
        found = _parse(path)
        names = {field.name for field in fields(Description) if field.name != "earlier"}
        if found.get("schema") != SCHEMA or not names <= found.keys():
            raise CacheError(
                f"{path} does not describe a cache of schema {SCHEMA}: it was written by another version of "
                "st_corrector, or is damaged. Build the cache again in another folder."
            )
        damaged = CacheError(f"{path} is damaged: it contradicts itself. Build the cache again in another folder.")
        earlier = found.get("earlier", [])
        counts = (found["rows"], found["dim"], found["shard_size"])
        if (
            not all(type(count) is int and count > 0 for count in counts)
            or not _ascend(earlier, found["rows"])
            or -(-found["rows"] // found["shard_size"]) + len(earlier) > MOST_SHARDS
            or found["dtype"] not in list(DTYPES)  # may be unhashable
            or not isinstance(found["fingerprint"], dict)
            or not _is_shallow(found["fingerprint"])
        ):
            raise damaged
        description = Description(**{name: found[name] for name in names}, earlier=tuple(earlier))
        if path.name != _MANIFEST:
            return description, None
        if not _fit(found.get("shards"), len(description.shards)):
            raise damaged
        return description, found["shards"]


_REPAIR = "EmbeddingCache.repair (or `st-corrector cache repair`) encodes its targets again."


def _fit(shards: Any, count: int) -> bool:
    """Whether a manifest's records of shards have the right form."""
    return (
        isinstance(shards, list)
        and len(shards) == count
        and all(
            isinstance(each, dict) and type(each.get("bytes")) is int and isinstance(each.get(_DIGEST), str)
            for each in shards
        )
    )


def _ascend(earlier: Any, rows: int) -> bool:
    """Whether what a cache was before it had ``rows`` has the right form."""
    if not isinstance(earlier, list) or not all(
        isinstance(each, dict)
        and each.keys() == {"rows", "corpus"}
        and type(each["rows"]) is int
        and isinstance(each["corpus"], str)
        for each in earlier
    ):
        return False
    ends = [0, *(each["rows"] for each in earlier), rows]
    return all(first < second for first, second in pairwise(ends))


def _is_shallow(value: Any, depth: int = 16) -> bool:
    """Whether nesting is shallow enough for Python to compare and print it."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return depth > 0 and all(_is_shallow(each, depth - 1) for each in inner)


def _require_own(path: Path) -> None:
    """Refuse to read files elsewhere, to which an untrusted folder may link."""
    if path.resolve().parent != path.parent.resolve():
        raise CacheError(f"{path} is a link to {path.resolve()}, outside of the cache: put the file itself there.")


def _parse(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _LARGEST_JSON:
            raise ValueError(f"{path.stat().st_size:,} bytes")
        found = json.loads(path.read_bytes())
        if not isinstance(found, dict):
            raise ValueError(f"a {type(found).__name__}")
    except (OSError, ValueError, RecursionError) as error:
        raise CacheError(f"{path} is not readable ({error}): delete the folder and build the cache again.") from error
    return found


def _digest(shard: Shard) -> str:
    """SHA-256 of a shard's embeddings."""
    total = hashlib.sha256()
    for tensor in (shard.values, shard.scales):
        if tensor is not None:
            total.update(tensor.contiguous().cpu().view(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()
