"""The columns of mined negatives, as :func:`sentence_transformers.util.mine_hard_negatives` has them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from ..data.corpus import Corpus
from ..data.qrels import Qrels
from .miner import Mined

MinedFormat = Literal["triplet", "n-tuple", "labeled-pair", "labeled-list", "ids"]
_TEXT, _SCORES = pa.string(), pa.list_(pa.float64())


class Formats:
    """Makes tables of what was found for some queries.

    Args:
        corpus: the targets.
        qrels: the queries.
        num_negatives: columns of an n-tuple.
        with_scores: add similarities.
    """

    def __init__(self, corpus: Corpus, qrels: Qrels, num_negatives: int, with_scores: bool) -> None:
        self._corpus, self._qrels = corpus, qrels
        self._num_negatives, self._with_scores = num_negatives, with_scores

    def table(self, found: list[Mined], output_format: MinedFormat) -> pa.Table:
        """The rows of one format."""
        made: dict[MinedFormat, Callable[[list[Mined]], pa.Table]] = {
            "triplet": self._triplets,
            "n-tuple": self._tuples,
            "labeled-pair": self._labeled_pairs,
            "labeled-list": self._labeled_lists,
            "ids": self._ids,
        }
        return made[output_format](found)

    def _triplets(self, found: list[Mined]) -> pa.Table:
        texts = self._texts(found)
        rows = [
            {"anchor": query, "positive": texts[row], "negative": texts[negative], "scores": [score, of_negative]}
            for query, row, score, each in self._pairs(found)
            for negative, of_negative in zip(each.negatives, each.negative_scores, strict=True)
        ]
        return self._made(rows, {"anchor": _TEXT, "positive": _TEXT, "negative": _TEXT}, scores=_SCORES)

    def _tuples(self, found: list[Mined]) -> pa.Table:
        texts, names = self._texts(found), [f"negative_{n}" for n in range(1, self._num_negatives + 1)]
        rows = [
            {
                **{"anchor": query, "positive": texts[row], "scores": [score, *each.negative_scores]},
                **{name: texts[negative] for name, negative in zip(names, each.negatives, strict=True)},
            }
            for query, row, score, each in self._pairs(found)
            if len(each.negatives) == len(names)
        ]
        columns = {"anchor": _TEXT, "positive": _TEXT, **dict.fromkeys(names, _TEXT)}
        return self._made(rows, columns, scores=_SCORES)

    def _labeled_pairs(self, found: list[Mined]) -> pa.Table:
        texts = self._texts(found)
        rows = [
            {"anchor": query, "positive": texts[row], "label": label, "score": score}
            for query, each in zip(self._queries(found), found, strict=True)
            for row, label, score in self._labeled(each)
        ]
        told = {"score": pa.float64()} if self._with_scores else {"label": pa.int64()}
        return self._made(rows, {"anchor": _TEXT, "positive": _TEXT, **told})

    def _labeled_lists(self, found: list[Mined]) -> pa.Table:
        texts, rows = self._texts(found), []
        for query, each in zip(self._queries(found), found, strict=True):
            targets, labels, scores = map(list, zip(*self._labeled(each), strict=True))
            positive = [texts[row] for row in targets]
            rows.append({"anchor": query, "positive": positive, "labels": labels, "scores": scores})
        told = {"scores": _SCORES} if self._with_scores else {"labels": pa.list_(pa.int64())}
        return self._made(rows, {"anchor": _TEXT, "positive": pa.list_(_TEXT), **told})

    def _ids(self, found: list[Mined]) -> pa.Table:
        targets = self._of_targets(found, self._corpus.ids)
        rows = [
            {
                "query-id": query,
                "positive-id": targets[row],
                "negative-ids": [targets[negative] for negative in each.negatives],
                "scores": [score, *each.negative_scores],
            }
            for query, row, score, each in self._pairs(found, "id")
        ]
        columns = {"query-id": _TEXT, "positive-id": _TEXT, "negative-ids": pa.list_(_TEXT)}
        return self._made(rows, columns, scores=_SCORES)

    # ------------------------------------------------------------------ parts

    def _queries(self, found: list[Mined], column: str = "text") -> list[str]:
        return list(self._qrels.queries[[each.query for each in found]][column])

    def _texts(self, found: list[Mined]) -> dict[int, str]:
        return self._of_targets(found, self._corpus.texts)

    @staticmethod
    def _of_targets(found: list[Mined], read: Callable[[np.ndarray], list[str]]) -> dict[int, str]:
        """What is read of each target that occurs, by its row."""
        rows = np.unique(np.array([row for each in found for row in (*each.positives, *each.negatives)], np.int64))
        return dict(zip(rows.tolist(), read(rows), strict=True))

    def _pairs(self, found: list[Mined], column: str = "text") -> Iterator[tuple[str, int, float, Mined]]:
        """Query, positive and its score, once for each positive."""
        for query, each in zip(self._queries(found, column), found, strict=True):
            for row, score in zip(each.positives, each.positive_scores, strict=True):
                yield query, row, score, each

    @staticmethod
    def _labeled(each: Mined) -> Iterator[tuple[int, int, float]]:
        """Row, label and score, positives first."""
        parts = ((each.positives, each.positive_scores, 1), (each.negatives, each.negative_scores, 0))
        for rows, scores, label in parts:
            for row, score in zip(rows, scores, strict=True):
                yield row, label, score

    def _made(self, rows: list[dict[str, Any]], columns: dict[str, pa.DataType], **scores: pa.DataType) -> pa.Table:
        return pa.Table.from_pylist(rows, schema=pa.schema(columns | (scores if self._with_scores else {})))
