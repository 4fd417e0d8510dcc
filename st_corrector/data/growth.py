"""Corpora that grow: what is new of some texts, and what becomes of the judgements."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ..errors import CorpusError
from .columns import as_id, as_list, write_by_content
from .duplicates import digests_of
from .pairs import text_tables
from .qrels import Qrels
from .targets import Targets
from .text import join_title

logger = logging.getLogger(__name__)
_GONE = -1


def grown(
    targets: Targets,
    cache_dir: Path,
    texts: Iterable[str],
    ids: Sequence[str | int] | None,
    titles: Sequence[str | None] | None,
    withdrawn: Iterable[str | int],
) -> tuple[Targets, np.ndarray]:
    """``targets`` and what is new of some texts; see :meth:`.Corpus.extend`.

    Returns:
        All targets, and for each row of before the row where that target is now, −1 where it has been withdrawn:
        ``(N,)``.
    """
    given = [] if ids is None or isinstance(ids, str) else [as_id(id, "An id") for id in ids]
    if repeated := [id for id, count in Counter(given).items() if count > 1]:
        raise CorpusError(
            f"{len(repeated)} ids are given more than once, e.g. {repeated[:3]}: each target needs its own."
        )
    before = targets.rows_of(given, missing=_GONE)
    gone = targets.rows_of(as_list(withdrawn))
    if both := np.intersect1d(gone, before).tolist():
        raise CorpusError(
            f"{len(both)} ids are given and withdrawn, e.g. {targets.ids(both[:3])}: leave them out of one of both."
        )
    new = _New(targets, before, text_tables(texts, ids, titles, first=len(targets)))
    more = write_by_content(new.tables(), cache_dir)
    replaced = np.array(new.replaced, dtype=np.int64)
    all_targets = targets.followed_by(more, np.concatenate([gone, replaced]), cache_dir)
    row_now = np.arange(len(targets))
    row_now[targets.withdrawn] = row_now[gone] = _GONE
    row_now[replaced] = new.replacements
    logger.info(
        "%d targets are new, %d of them in the place of earlier ones; %d are withdrawn, %d are known.",
        len(more),
        len(replaced),
        len(gone),
        new.known,
    )
    return all_targets, row_now


class _New:
    """What is new of some tables of targets.

    Args:
        targets: those that are there.
        before: the row of the target with the same id for each of the new ones, −1 for none; empty for none at all.
        tables: of the new ones.
    """

    def __init__(self, targets: Targets, before: np.ndarray, tables: Iterator[pa.Table]) -> None:
        self._targets, self._before, self._tables = targets, before, tables
        self.replaced: list[int] = []
        """Rows of targets whose texts have changed."""
        self.replacements: list[int] = []
        """Where they are now."""
        self.known = 0
        """How many texts have not changed."""

    def tables(self) -> Iterator[pa.Table]:
        """What is new, to be read once; then the figures are known."""
        start, size = 0, len(self._targets)
        for table in self._tables:
            before = np.full(len(table), _GONE)
            some = self._before[start : start + len(table)]
            before[: len(some)] = some
            start += len(table)
            changed = np.ones(len(table), dtype=bool)
            there = before != _GONE
            given = (table.column(name).filter(pa.array(there)).to_pylist() for name in ("title", "text"))
            joined = [join_title(title, text) for title, text in zip(*given, strict=True)]
            changed[there] = digests_of(joined).view(np.int64) != self._targets.digests.of(before[there])
            self.known += int((~changed).sum())
            rows = size + np.cumsum(changed) - 1
            self.replaced += before[there & changed].tolist()
            self.replacements += rows[there & changed].tolist()
            size += int(changed.sum())
            yield table.filter(pa.array(changed))


def moved(
    qrels: Qrels, row_now: np.ndarray, split: str
) -> tuple[list[dict[str, Any]], np.ndarray, np.ndarray, np.ndarray]:
    """The judgements of targets that are elsewhere or nowhere now: queries, and for each judgement query, row, grade.

    Args:
        row_now: for each row of before the one of now, −1 for none.
        split: their name, for the message.
    """
    row = row_now[qrels.row]
    kept = row != _GONE
    asked = np.unique(qrels.query[kept])
    if lost := len(qrels) - len(asked):
        logger.warning(
            "%d of %d queries of split %r are dropped: all their relevant targets have been withdrawn.",
            lost,
            len(qrels),
            split,
        )
    number = np.searchsorted(asked, qrels.query[kept])
    return qrels.queries.select(asked).to_list(), number, row[kept], qrels.grade[kept]
