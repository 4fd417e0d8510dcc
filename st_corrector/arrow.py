"""Arrow files on disk: written in a stream, complete or not there, read back memory-mapped."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
from datasets import Dataset
from datasets import config as datasets_config
from filelock import FileLock


def default_cache_dir() -> Path:
    """Where derived Arrow files go unless the caller says otherwise: beside those of ``datasets``
    (environment variable ``HF_DATASETS_CACHE``)."""
    return Path(datasets_config.HF_DATASETS_CACHE) / "st_corrector"


def write_arrow(path: Path, schema: pa.Schema, tables: Iterable[pa.Table]) -> Dataset:
    """Stream ``tables`` into ``path`` and return it memory-mapped.

    The file appears under its name only when it is whole: an error or a kill on the way leaves no
    file that a later run could take for the finished one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # What a killed process has left of this file; one that is still being written is younger.
    for leftover in path.parent.glob(f"{path.name}.*.partial"):
        with suppress(FileNotFoundError):  # another process has just finished it
            if time.time() - leftover.stat().st_mtime > 3600:
                leftover.unlink()
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            for table in tables:
                writer.write_table(table.cast(schema))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return Dataset.from_file(str(path))


def read_or_write_arrow(path: Path, schema: pa.Schema, tables: Iterable[pa.Table]) -> Dataset:
    """The file at ``path``, written from ``tables`` first if it is not there (they are not read otherwise).

    Of several processes one writes, the others wait for it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        return Dataset.from_file(str(path)) if path.exists() else write_arrow(path, schema, tables)


def batched_tables(records: Iterable[dict], schema: pa.Schema, batch_size: int = 10_000) -> Iterator[pa.Table]:
    """Collect dict records into tables of at most ``batch_size`` rows."""
    batch: list[dict] = []
    for record in records:
        batch.append(record)
        if len(batch) == batch_size:
            yield pa.Table.from_pylist(batch, schema=schema)
            batch = []
    if batch:
        yield pa.Table.from_pylist(batch, schema=schema)
