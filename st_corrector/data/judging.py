"""Judgements by id, on their way into a corpus: which queries, which targets, which grades."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from ..errors import CorpusError, InputError
from .columns import as_id, as_list, as_number

logger = logging.getLogger(__name__)
MissingTargets = Literal["error", "drop"]
"""How to treat judgements whose target is not in the corpus."""


class Sources(NamedTuple):
    """Where judgements, queries and targets are read from, for messages."""

    judgements: str
    queries: str
    targets: str


def query_record(id: str, text: str, answers: Iterable[str] = ()) -> dict[str, Any]:
    """The record of a judged query."""
    return {"id": id, "text": text, "answers": list(answers)}


def triples_of(
    relevant: Mapping[Any, str | int | Iterable[str | int] | Mapping[Any, float]],
) -> Iterator[tuple[str, str, float]]:
    """(query id, target id, grade) from the arguments of :meth:`Corpus.add_split`."""
    for query, targets in relevant.items():
        graded = targets.items() if isinstance(targets, Mapping) else ((target, 1) for target in as_list(targets))
        for target, given in graded:
            grade = as_number(given)
            if grade is None:
                raise CorpusError(
                    f"The grade of target {target!r:.40} for query {query!r:.40} is {given!r:.40}, expected a number."
                )
            yield as_id(query, "The id of a query"), as_id(target, f"A target of query {query!r:.40}"), grade


def require_missing(missing_targets: MissingTargets) -> MissingTargets:
    if missing_targets not in ("error", "drop"):
        raise InputError(f"missing_targets is {missing_targets!r}, expected 'error' or 'drop'.")
    return missing_targets


def require_limit(max_targets: int | None) -> None:
    if max_targets is not None and max_targets < 1:
        raise InputError(f"max_targets is {max_targets}: a corpus has at least one target; None takes all.")


def judged_queries(
    triples: Iterable[tuple[str, str, float]],
    texts: Mapping[str, str],
    answers: Mapping[str, Sequence[str]],
    rows_of: Callable[..., np.ndarray],
    missing: MissingTargets | None,
    sources: Sources,
) -> tuple[list[dict[str, Any]], list[int], np.ndarray, np.ndarray]:
    """The judged queries of a split: their records, and of each judged pair the number of its query, the row of its
    target, and its grade.

    Args:
        triples: (query id, target id, grade).
        texts, answers: by query id.
        rows_of: :meth:`Corpus.rows_of`.
        missing: how to treat judgements of missing targets; None drops them silently.

    Raises:
        CorpusError: a judged query has no text, or with ``missing="error"`` a target is not in the corpus.
    """
    # A pair judged twice is kept once: triplets repeat each pair for hundreds of negatives.
    judged: dict[tuple[str, str], float] = {}
    for query, target, grade in triples:
        if grade > 0:
            judged[query, target] = max(grade, judged.get((query, target), 0.0))
    if unknown := sorted({query for query, _ in judged} - texts.keys()):
        raise CorpusError(
            f"{sources.judgements} judges {len(unknown)} queries that {sources.queries} does not have, e.g. "
            f"{unknown[:3]}."
        )
    rows = rows_of([target for _, target in judged], missing=-1)
    numbers: dict[str, int] = {}
    of_pair = [
        numbers.setdefault(query, len(numbers)) for (query, _), row in zip(judged, rows, strict=True) if row >= 0
    ]
    if missing is not None and len(of_pair) < len(judged):
        lost = sorted({target for (_, target), row in zip(judged, rows, strict=True) if row < 0})
        found = f"{sources.judgements} judges {len(lost)} targets that {sources.targets} does not have, e.g. {lost[:3]}"
        if missing == "error":
            raise CorpusError(
                f"{found}. Get the corpus that was judged, or leave such judgements out: missing_targets='drop'."
            )
        left_out = len({query for query, _ in judged} - numbers.keys())
        logger.warning(
            "%s: %d judgements are left out, and with them %d queries that have no others.",
            found,
            len(judged) - len(of_pair),
            left_out,
        )
    grades = np.fromiter(judged.values(), np.float64, len(judged))
    records = [query_record(id, texts[id], answers.get(id, ())) for id in numbers]
    return records, of_pair, rows[rows >= 0], grades[rows >= 0]
