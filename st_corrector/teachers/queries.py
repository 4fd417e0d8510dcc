"""The queries that a teacher is to know."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from datasets import Dataset

from ..errors import InputError


def queries_of(pairs: Dataset | Sequence[Dataset]) -> tuple[list[str], np.ndarray]:
    """The distinct queries of data sets of pairs: texts, and keys in ascending order, ``(Q,)``.

    Raises:
        InputError: the labels have no keys.
    """
    text_of: dict[int, str] = {}
    for data in [pairs] if isinstance(pairs, Dataset) else pairs:
        label = next((name for name in ("label", "labels") if name in data.column_names), None)
        if label is None or not hasattr(data.features[label], "feature"):
            raise InputError(
                "The labels of the pairs must be [corpus row, key of the query], as in corpus.pairs(split): by the key "
                "a teacher knows the query. dataset.add_column('label', corpus.labels(ids, anchors)) makes them."
            )
        keys = np.array(data[label][:], dtype=np.int64).reshape(len(data), -1)[:, 1]
        distinct, first = np.unique(keys, return_index=True)
        # The first column of texts is that of the queries, as for the loss.
        anchor = next(name for name in data.column_names if name != label)
        text_of |= zip(distinct.tolist(), data.select(first)[anchor][:], strict=True)
    ordered = np.array(sorted(text_of), dtype=np.int64)
    return [text_of[key] for key in ordered.tolist()], ordered
