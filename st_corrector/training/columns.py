"""What the columns of a data set hold: which are read as texts, with which prompt, and what a label must be."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Value
from sentence_transformers.base.data_collator import DEFAULT_LABEL_COLUMNS

from ..data.query_keys import UNKNOWN
from ..errors import InputError

logger = logging.getLogger(__name__)
_NO_TEXTS = {*DEFAULT_LABEL_COLUMNS, "dataset_name"}


def prompts_by_column(query: str, document: str, train: Iterable[Any], others: Iterable[Any] = ()) -> dict[str, str]:
    """The prompt of each column of texts: of the first that of queries, of the others that of targets. Without them a
    model that has instructions would be trained without, and used with them.

    Args:
        query: what ``model.encode_query`` puts before a query.
        document: what a corrected loss puts before a target.
        train: data sets that it trains on.
        others: data sets that it is evaluated on; columns of the same name have the same prompt.

    Raises:
        InputError: a column holds queries in one data set that is trained on and targets in another.
    """
    columns: dict[str, str] = {}
    if not query and not document:
        return columns
    for some in train:
        for name, prompt in _of_columns(some, query, document).items():
            if columns.setdefault(name, prompt) != prompt:
                raise InputError(
                    f"Column {name!r} holds queries in one data set and targets in another, and the model has prompts "
                    "for them: say which each takes, prompts={data set: {column: prompt}} in the arguments; "
                    "prompts={} puts none."
                )
    for some in others:
        columns = _of_columns(some, query, document) | columns
    if columns:
        logger.info("The model's prompts are put before these columns: %s. prompts={…} says otherwise.", columns)
    return columns


def _of_columns(data: Any, query: str, document: str) -> dict[str, str]:
    return {name: document if place else query for place, name in enumerate(texts_in(data))}


def texts_in(data: Any) -> list[str]:
    """The columns of texts, that of the queries first."""
    return [name for name in data.column_names or () if name not in _NO_TEXTS]


def negatives_named(data: Any) -> int:
    """How many negatives each pair of a data set brings itself, in columns of texts or as rows in its labels."""
    columns = list(data.column_names or ())
    label = next((name for name in DEFAULT_LABEL_COLUMNS if name in columns), None)
    texts = len(texts_in(data))
    rows = 0
    if label is not None and isinstance(data, Dataset) and len(data):
        first = data[0][label]
        rows = len(first) if isinstance(first, list) else 0
    return max(texts - 2, 0) + max(rows - 2, 0)


def require_columns(data: Any) -> None:
    """Refuse columns here at which the data collator would fail, with a message of its own that names none."""
    features = dict(getattr(data, "features", None) or {})
    label = next((name for name in DEFAULT_LABEL_COLUMNS if name in features), None)
    for name, feature in features.items():
        dtype = feature.dtype if isinstance(feature, Value) else str(feature)
        if name != label:
            if dtype not in ("string", "large_string", "null") and name != "dataset_name":
                raise InputError(
                    f"The column {name!r} holds {dtype}, and every column but the label is read as text: "
                    f"dataset.remove_columns({name!r})."
                )
        elif not _are_labels(name, feature, data):
            raise InputError(
                f"The column {name!r} holds {dtype}, expected integers, the corpus rows of the positives, or lists of "
                "one length, [row, key of the query, rows of negatives …]: "
                f"dataset.add_column({name!r}, corpus.labels(ids, queries)), after removing what is there, makes them "
                "of ids."
            )
        elif isinstance(data, Dataset) and (nulls := column_of(data, name).null_count):
            raise InputError(
                f"The column {name!r} has {nulls} nulls, expected the corpus row of every positive: "
                f"dataset.filter(lambda row: row[{name!r}] is not None) leaves these pairs out."
            )


def _are_labels(name: str, feature: Any, data: Any) -> bool:
    """Whether a column holds integers, or lists of two or more, as many in each row."""
    of_lists = getattr(feature, "feature", None)
    if not str(getattr(of_lists or feature, "dtype", "")).startswith(("int", "uint")):
        return False
    if of_lists is None or not isinstance(data, Dataset):
        return True
    lengths = pc.min_max(pc.list_value_length(column_of(data, name))).as_py()
    return not len(data) or (lengths["min"] == lengths["max"] and lengths["min"] >= 2)


def column_of(data: Dataset, name: str) -> pa.ChunkedArray:
    """A column as Arrow has it, of the rows that were selected alone."""
    return data.select_columns(name).with_format("arrow")[:].column(0)


def keys_in_labels(data: Dataset) -> np.ndarray:
    """The queries' keys in the labels of a data set, int64, ``(n,)``; none, ``(0,)``, where labels are something else
    or rows alone.
    """
    label = next((name for name in DEFAULT_LABEL_COLUMNS if name in data.column_names), None)
    if (
        label is None
        or not hasattr(data.features[label], "feature")
        or not _are_labels(label, data.features[label], data)
    ):
        return np.empty(0, dtype=np.int64)
    found: np.ndarray = pc.list_element(column_of(data, label), 1).fill_null(UNKNOWN).to_numpy().astype(np.int64)
    return found
