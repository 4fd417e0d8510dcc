"""Arrow files on disk: written as a stream, complete or absent, read back memory-mapped."""

from __future__ import annotations

import logging
import os
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset
from datasets import config as datasets_config
from filelock import FileLock

from ..errors import CorpusError
from .files import make_folder, storing

logger = logging.getLogger(__name__)


def default_cache_dir() -> Path:
    """Default folder for derived Arrow files: next to those of ``datasets`` (environment variable
    ``HF_DATASETS_CACHE``)."""
    return Path(datasets_config.HF_DATASETS_CACHE) / "st_corrector"


def write_arrow(path: Path, schema: pa.Schema, tables: Iterable[pa.Table]) -> Dataset:
    """Stream ``tables`` into ``path`` and return it memory-mapped.

    The file gets its name only when it is complete: an error or a kill leaves no file that a later run could take for
    finished.

    Raises:
        StorageError: it cannot be written.
    """
    make_folder(path.parent, _ADVICE)
    # Remains of a killed process; a file still being written is younger.
    for leftover in path.parent.glob(f"{path.name}.*.partial"):
        with suppress(FileNotFoundError):  # another process has just finished it
            if time.time() - leftover.stat().st_mtime > 3600:
                leftover.unlink()
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.partial")
    with ExitStack() as stack:
        stack.callback(partial.unlink, missing_ok=True)
        with storing(path, _ADVICE):
            sink = stack.enter_context(pa.OSFile(str(partial), "wb"))
            writer = pa.ipc.new_stream(sink, schema)
        for table in tables:  # an error in reading them is not the disk's fault
            with storing(path, _ADVICE):
                writer.write_table(table.cast(schema))
        with storing(path, _ADVICE):
            writer.close()
            sink.close()
            with partial.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(partial, path)
    return Dataset.from_file(str(path))


def read_or_write_arrow(path: Path, schema: pa.Schema, tables: Iterable[pa.Table]) -> Dataset:
    """The file at ``path``; if missing, it is first written from ``tables`` (which are otherwise not read).

    One of several processes writes, the others wait. A damaged file is written again.

    Raises:
        StorageError: it cannot be written.
    """
    make_folder(path.parent, _ADVICE)
    with storing(path, _ADVICE):
        lock = FileLock(f"{path}.lock")
        lock.acquire()
    try:
        if path.exists():
            try:
                return Dataset.from_file(str(path))
            except (pa.ArrowInvalid, OSError) as error:
                logger.warning("%s is damaged (%s): it is written again.", path, error)
        return write_arrow(path, schema, tables)
    finally:
        lock.release()


def batched_tables(
    records: Iterable[dict[str, Any]], schema: pa.Schema, batch_size: int = 10_000
) -> Iterator[pa.Table]:
    """Collect dict records into tables of at most ``batch_size`` rows.

    Raises:
        CorpusError: a value is not of its column's type, or is an invalid string; the message has the record's number.
    """
    first, batch = 0, []
    for record in records:
        batch.append(record)
        if len(batch) == batch_size:
            yield _table(batch, schema, first)
            first, batch = first + batch_size, []
    if batch:
        yield _table(batch, schema, first)


def _table(records: list[dict[str, Any]], schema: pa.Schema, first: int) -> pa.Table:
    try:
        return pa.Table.from_pylist(records, schema=schema)
    except UnicodeEncodeError:
        for number, record in enumerate(records, first):
            for name, value in record.items():
                for text in [value] if isinstance(value, str) else value if isinstance(value, list) else []:
                    if isinstance(text, str) and (half := half_character(text)):
                        raise CorpusError(f"{name!r} of record {number} has {half}: fix or drop it.") from None
        raise
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise CorpusError(f"Among records {first} … {first + len(records) - 1}: {error}. Expected: {schema}") from error


_ADVICE = "Then repeat the call, or set HF_DATASETS_CACHE (or cache_dir) to another folder."


def half_character(text: str) -> str | None:
    """Describes why no file can hold a string; None if one can.

    JSON's ``\\ud83d`` without its other half, or a text cut in the middle of a character, gives such strings.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        return f"half of a character (a lone surrogate, U+{code:04X}) at position {error.start} of {text!r:.60}"
    return None
