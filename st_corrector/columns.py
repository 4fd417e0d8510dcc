"""Columns of data sets, whether these are on disk or come in a stream."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
from datasets import Dataset, IterableDataset

from .errors import CorpusError
from .text import half_character

BATCH = 10_000
TARGETS = pa.schema([("id", pa.string()), ("title", pa.string()), ("text", pa.string())])
"""What a corpus keeps of each target."""


def column_names(dataset: Dataset | IterableDataset) -> list[str]:
    """The columns' names; of a stream that does not know them, those of its first row."""
    return list(next(iter(dataset), {}) if dataset.column_names is None else dataset.column_names)


def batches(
    dataset: Dataset | IterableDataset, columns: Sequence[str], size: int = BATCH
) -> Iterator[dict[str, list[Any]]]:
    """The columns' values as Python objects, ``size`` rows at a time; what a row of a stream lacks is None."""
    if dataset.column_names is not None:
        dataset = dataset.select_columns(list(dict.fromkeys(columns)))
    for batch in dataset.with_format(None).iter(size):
        rows = len(next(iter(batch.values())))
        yield {column: batch.get(column, [None] * rows) for column in columns}


def target_tables(
    dataset: Dataset | IterableDataset, text: str, id: str | None = None, title: str | None = None
) -> Iterator[pa.Table]:
    """Tables of :data:`TARGETS` from a data set's columns; without ``id`` each target's row number is its id.

    Raises:
        CorpusError: a column cannot be read as strings, or a text is null.
    """
    columns = {role: column for role, column in (("text", text), ("id", id), ("title", title)) if column is not None}
    start = 0
    for batch in _strings(dataset, columns):
        if nulls := batch["text"].null_count:
            raise CorpusError(f"{nulls} targets near row {start} have no text: filter them out first.")
        rows = len(batch["text"])
        numbers = pa.array(map(str, range(start, start + rows)), pa.string())
        start += rows
        yield pa.table(
            [batch.get("id", numbers), batch.get("title", pa.nulls(rows, pa.string())), batch["text"]], schema=TARGETS
        )


def _strings(
    dataset: Dataset | IterableDataset, columns: Mapping[str, str]
) -> Iterator[dict[str, pa.Array | pa.ChunkedArray]]:
    """Batches of ``columns`` (role → column) as Arrow strings, by role."""
    names = list(columns.values())
    # The types of a stream's Arrow batches follow from what is in each: a batch of nulls alone has another. Its values
    # have no such trouble.
    if isinstance(dataset, Dataset):
        found = dataset.select_columns(names).with_format("arrow").iter(BATCH)
    else:
        found = batches(dataset, names)
    for batch in found:
        try:
            values = {role: batch[column] for role, column in columns.items()}
            yield {
                role: (pa.array(value) if isinstance(value, list) else value).cast(pa.string())
                for role, value in values.items()
            }
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError) as error:
            raise CorpusError(f"The columns {dict(columns)} cannot be read as strings ({error}).") from error
        except UnicodeEncodeError as error:
            raise CorpusError(f"A text has {half_character(error.object)}: mend or drop it.") from None
