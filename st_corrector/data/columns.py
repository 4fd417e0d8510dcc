"""Columns of data sets, on disk or streamed."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import ClassLabel, Dataset, IterableDataset

from ..errors import CorpusError
from ..storage.arrow import half_character, write_arrow

BATCH = 10_000
TARGETS = pa.schema([("id", pa.string()), ("title", pa.string()), ("text", pa.string())])
"""What a corpus keeps of each target."""


def is_id(value: Any) -> bool:
    """Whether ``value`` is an id: a string, or an integer, which stands for its digits."""
    return isinstance(value, (str, int, np.integer)) and not isinstance(value, bool)


def as_id(value: Any, what: str) -> str:
    """The id ``value`` as a string.

    Args:
        what: whose id it is, for error messages.

    Raises:
        CorpusError: it is neither a string nor an integer.
    """
    if not is_id(value):
        raise CorpusError(
            f"{what} is a {type(value).__name__}, expected a string or an integer: {value!r:.40}. Convert such ids to "
            "strings first (pandas turns integers into floats if one is missing)."
        )
    return str(value)


def as_list(value: Any) -> list[Any]:
    """The values of a list, tuple, array or set; a single value, such as a string, gives a list of one."""
    return list(value) if isinstance(value, Iterable) and not isinstance(value, (str, bytes)) else [value]


def as_number(value: Any) -> float | None:
    """A finite number, also from a string or a bool; None for anything else."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def is_transformed(dataset: Dataset | IterableDataset) -> bool:
    """Whether a function (``with_transform``, ``set_transform``) computes ``dataset[i]`` on access."""
    return isinstance(dataset, Dataset) and dataset.format["type"] == "custom"


def column_names(dataset: Dataset | IterableDataset) -> list[str]:
    """The column names; if only the rows know them, as in some streams, those of the first row."""
    if is_transformed(dataset):
        return list(dataset[0]) if len(dataset) else []
    return list(next(iter(dataset), {}) if dataset.column_names is None else dataset.column_names)


def batches(
    dataset: Dataset | IterableDataset, columns: Sequence[str], size: int = BATCH
) -> Iterator[dict[str, list[Any]]]:
    """The columns' values as Python objects, ``size`` rows at a time; a value missing in a stream's row is None.

    Raises:
        CorpusError: a data set's transform changes the number of rows.
    """
    if is_transformed(dataset):
        yield from _transformed(dataset, columns, size)
        return
    if dataset.column_names is not None:
        dataset = dataset.select_columns(list(dict.fromkeys(columns)))
    for batch in dataset.with_format(None).iter(size):
        rows = len(next(iter(batch.values())))
        yield {column: batch.get(column, [None] * rows) for column in columns}


def _transformed(dataset: Dataset, columns: Sequence[str], size: int) -> Iterator[dict[str, list[Any]]]:
    """:func:`batches` of the output of a data set's transform, which gets all columns."""
    for start, batch in zip(range(0, len(dataset), size), dataset.iter(size), strict=True):
        rows = min(size, len(dataset) - start)
        values = {column: list(batch[column]) if column in batch else [None] * rows for column in columns}
        if wrong := {column: len(found) for column, found in values.items() if len(found) != rows}:
            raise CorpusError(
                f"The data set's transform makes {wrong} values of {rows} rows, expected one per row: use "
                "dataset.map, which may change the number of rows."
            )
        yield values


def label_column(
    split: str, dataset: Dataset | IterableDataset, found: Sequence[str], columns: Sequence[str]
) -> str | None:
    """The column that says which positives are relevant, if there is one.

    Raises:
        CorpusError: there are scores or classes instead.
    """
    further = [name for name in found if name not in columns]
    label = next((name for name in ("label", "labels") if name in further), None)
    score = next((name for name in ("score", "scores") if name in further), None)
    # With a column of negatives, positives are relevant, whatever their score.
    if label is None and score is not None and len(columns) == 2 and not any(name.startswith("neg") for name in found):
        raise CorpusError(
            f"Split {split!r} has a column {score!r} next to its pairs, as mine_hard_negatives writes it when it "
            "mixes negatives with positives: it does not say which are relevant. Keep the relevant pairs and remove "
            f"the column: dataset.filter(…).remove_columns({score!r})."
        )
    classes = None if is_transformed(dataset) else (dataset.features or {}).get(label)
    classes = getattr(classes, "feature", classes)  # of a list
    if isinstance(classes, ClassLabel):
        raise CorpusError(
            f"The column {label!r} of split {split!r} holds the classes {classes.names[:5]}, expected numbers: 1 where "
            f"the positive is relevant, else 0. Map it to these, or leave it out: dataset.remove_columns({label!r})."
        )
    return label


def by_label(found: Any, label: Any, column: str, pair: int, split: str) -> tuple[list[Any], list[Any]]:
    """The texts of a row's positives labelled 1, and those labelled 0; nulls are dropped.

    Raises:
        CorpusError: not every text has one label, 0 or 1.
    """
    positives, labels = (each if isinstance(each, (list, tuple)) else [each] for each in (found, label))
    relevant = [as_number(each) for each in labels]
    if len(labels) != len(positives) or not {*relevant} <= {0.0, 1.0}:
        raise CorpusError(
            f"Column {column!r} in row {pair} of split {split!r} is {label!r:.60}, expected 1 where a text is relevant "
            f"and 0 where it is a negative, of {len(positives)} texts. If it says something else (such as the labels "
            f"that Corpus.pairs gives), leave it out: dataset.remove_columns({column!r})."
        )
    marked = list(zip(positives, relevant, strict=True))
    return as_texts([text for text, mark in marked if mark]), as_texts([text for text, mark in marked if not mark])


def as_texts(value: Any) -> list[Any]:
    """A column's value as a list of texts: several, one, or none; nulls are dropped."""
    return [text for text in (value if isinstance(value, (list, tuple)) else [value]) if text is not None]


def target_tables(
    dataset: Dataset | IterableDataset, text: str, id: str | None = None, title: str | None = None
) -> Iterator[pa.Table]:
    """Tables of :data:`TARGETS` from a data set's columns; without ``id`` each target's row number is its id.

    Raises:
        CorpusError: a column cannot be read as strings, ids are neither strings nor integers, or a text is null.
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
    # The type of a stream's Arrow batch depends on its contents: a batch with only nulls has another type. Python
    # values avoid this.
    if isinstance(dataset, Dataset) and not is_transformed(dataset):
        found = dataset.select_columns(names).with_format("arrow").iter(BATCH)
    else:
        found = batches(dataset, names)
    for batch in found:
        try:
            arrays = {role: _array(batch[column]) for role, column in columns.items()}
            if "id" in arrays and not _are_ids(arrays["id"].type):
                raise CorpusError(
                    f"The ids in column {columns['id']!r} are of type {arrays['id'].type}, expected strings or "
                    "integers. Convert them to strings first (pandas turns integers into floats if one is missing)."
                )
            yield {role: array.cast(pa.string()) for role, array in arrays.items()}
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError) as error:
            raise CorpusError(f"The columns {dict(columns)} cannot be read as strings ({error}).") from error
        except UnicodeEncodeError as error:
            raise CorpusError(f"A text has {half_character(error.object)}: fix or drop it.") from None


def _array(values: list[Any] | pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    return pa.array(values) if isinstance(values, list) else values


def _are_ids(type: pa.DataType) -> bool:
    """Whether values of an Arrow type can be ids; nulls are counted later."""
    type = type.value_type if pa.types.is_dictionary(type) else type
    return any(
        fits(type)
        for fits in (
            pa.types.is_string,
            pa.types.is_large_string,
            pa.types.is_string_view,
            pa.types.is_integer,
            pa.types.is_null,
        )
    )


def write_by_content(tables: Iterable[pa.Table], folder: Path) -> Dataset:
    """Write targets to a file named after their content, which is known only afterwards."""
    state = hashlib.blake2b(digest_size=16)

    def hashed() -> Iterator[pa.Table]:
        for table in tables:
            state.update(repr(table.to_pydict()).encode("utf-8"))
            yield table

    partial = folder / f"targets-{os.getpid()}-{id(state)}.arrow"
    write_arrow(partial, TARGETS, hashed())
    path = folder / f"targets-{state.hexdigest()}.arrow"
    if path.is_file() and path.stat().st_size == partial.stat().st_size:
        # Others may have mapped it, and what was derived from it, such as digests, is known by its time.
        partial.unlink()
    else:
        os.replace(partial, path)
    return Dataset.from_file(str(path))
