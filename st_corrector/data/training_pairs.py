"""Training data that a corpus makes: the pairs of a split, and targets with questions of their own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from ..errors import CorpusError
from ..storage.arrow import read_or_write_arrow
from ..storage.fingerprint import digest, digest_json
from .columns import BATCH, TARGETS
from .own_questions import OwnQuestions, Question

if TYPE_CHECKING:
    from .corpus import Corpus

_PAIRS = pa.schema([("anchor", pa.string()), ("positive", pa.string()), ("label", pa.list_(pa.int64()))])


class TrainingPairs:
    """Pairs with the columns ``anchor``, ``positive`` and ``label``, ``[row, key]``, as Arrow files; see
    :meth:`.Corpus.pairs` and :meth:`.Corpus.own_pairs`.
    """

    def __init__(self, corpus: Corpus) -> None:
        self._corpus = corpus
        self._asked: dict[str, OwnQuestions] = {}

    def of_split(self, split: str) -> Dataset:
        """One pair for each judgement of ``split``."""
        qrels = self._corpus.qrels(split)
        anchors = qrels.queries.with_format("arrow")

        def tables() -> Iterator[pa.Table]:
            for start in range(0, len(qrels.row), BATCH):
                query, row = qrels.query[start : start + BATCH], qrels.row[start : start + BATCH]
                yield self._table(anchors[query].column("text"), row, qrels.keys[query])

        key = digest(self._corpus.fingerprint, qrels.query.tobytes(), qrels.row.tobytes(), qrels.queries._fingerprint)
        return read_or_write_arrow(self._corpus.cache_dir / f"keyed-pairs-{key}.arrow", _PAIRS, tables())

    def own(self, count: int | None, question: Question | None, split: str, seed: int) -> Dataset:
        """Targets that no question of ``split`` asks for, each with a question of its own."""
        answered = np.union1d(self._corpus.qrels(split).row, self._corpus.withdrawn)
        questions = self._ask(question)
        rows, texts = questions.draw(answered, count, seed)

        def tables() -> Iterator[pa.Table]:
            for start in range(0, len(rows), BATCH):
                some = rows[start : start + BATCH]
                yield self._table(pa.array(texts[start : start + BATCH]), some, questions.keys[some])

        key = digest(self._corpus.fingerprint, rows.tobytes(), digest_json(texts))
        return read_or_write_arrow(self._corpus.cache_dir / f"own-pairs-{key}.arrow", _PAIRS, tables())

    def relevant_to_own(self, key: int) -> np.ndarray:
        """The rows that have the own question with this key, and those whose text it is, ascending.

        Raises:
            CorpusError: this corpus has not been asked for such questions.
        """
        asked = [each for each in self._asked.values() if len(each.rows_of(key))]
        if not asked:
            # Pairs that another process or an earlier run has made, most likely by the default.
            try:
                asked = [each for each in [self._ask(None)] if len(each.rows_of(key))]
            except CorpusError:
                asked = []
        if not asked:
            raise CorpusError(
                "A pair is of a target's own question that this corpus does not know, so that targets with the same "
                "question could become its negatives: call corpus.own_pairs(0, question=…) with the question that the "
                "pairs were made by."
            )
        return np.unique(
            np.concatenate([rows for each in asked for rows in (each.rows_of(key), each.rows_saying(key))])
        )

    def _table(self, anchors: pa.Array, rows: np.ndarray, keys: np.ndarray) -> pa.Table:
        labels = pa.array(list(np.stack([rows, keys], axis=1)))
        return pa.table([anchors, pa.array(self._corpus.texts(rows)), labels], schema=_PAIRS)

    def _ask(self, question: Question | None) -> OwnQuestions:
        """The targets' own questions; the same ones where they were asked for before."""
        corpus = self._corpus
        if question is None:
            lengths = pc.binary_length(corpus.targets.data.column("title").cast(pa.string()))
            question = "title" if pc.any(pc.greater(lengths, 0)).as_py() else "first_sentence"
        targets = corpus.targets.select_columns(TARGETS.names)
        asked = OwnQuestions(targets, question, corpus.digests, corpus.cache_dir)
        return self._asked.setdefault(asked.identity, asked)
