"""What to do with the index that serves, the day after training: every choice measured, one recommended."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor

from ..cache.arrays import Embeddings
from ..correctors import Corrector
from ..data.corpus import Corpus
from ..errors import InputError
from .certificate import ADAPTED, UNCHANGED, UPGRADED, Interval, as_served, encode_queries, encoder_of, interval
from .fitting import LEAST_PAIRS, drawn, fit_to_pairs
from .mapping import ROWS_AT_ONCE, IndexMap, Rows, by_cosine
from .query_adapter import FITTED_ON, LEAST_QUERIES, QueryAdapter
from .reencoding import encoded_again, reencoding_order
from .sampling import Judged, require
from .vectors import TensorVectors, Vectors
from .ways import Way

REEMBEDDED = "re-embedded"
SHARES = (0.01, 0.05, 0.2)
"""Of the corpus, encoded again: the first really, to measure what it gives; the others are estimated."""
_ENOUGH = 1_000  # encoded again, for a correction to be fitted on; of a small corpus fewer
_JUDGED = 0.5  # of the queries, at most


class Choice(NamedTuple):
    """One thing to do.

    Args:
        name: of it.
        recall: of the first ``k`` against a re-embedded index.
        encodings: number of targets that it encodes.
        seconds: that it takes here, roughly: encoding, fitting an adapter, mapping the index.
        writes: whether the index is written.
    """

    name: str
    recall: Interval
    encodings: int
    seconds: float
    writes: bool


@dataclass
class ServePlan:
    """Choices with what they cost and give, and the one that is recommended.

    Args:
        k: depth of the recall.
        wanted: the recall that the recommended choice has at least, by the lower end of its interval.
        confidence: of the intervals.
        targets: of the corpus.
        queries: number of queries that judged.
        encoded: number of targets encoded to find this out.
        choices: by cost, the cheapest first.
    """

    k: int
    wanted: float
    confidence: float
    targets: int
    queries: int
    encoded: int
    choices: list[Choice]

    @property
    def recommended(self) -> Choice:
        """The cheapest choice whose recall is certain to be at least :attr:`wanted`."""
        return next(each for each in self.choices if each.recall.low >= self.wanted)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        choices = [
            each._asdict() | {"recall": each.recall.mean, "low": each.recall.low, "high": each.recall.high}
            for each in self.choices
        ]
        return asdict(self) | {"choices": choices, "recommended": self.recommended.name, "why": self.why}

    def __str__(self) -> str:
        head = ["", f"recall@{self.k}", f"{100 * self.confidence:g} % interval", "encodings", "seconds", "index"]
        rows = [
            [
                f"{each.name} ←" if each is self.recommended else each.name,
                f"{100 * each.recall.mean:.1f}",
                f"{100 * each.recall.low:.1f} … {100 * each.recall.high:.1f}",
                f"{each.encodings:,}",
                f"{each.seconds:,.0f}",
                "written" if each.writes else "as it is",
            ]
            for each in self.choices
        ]
        widths = [max(len(row[n]) for row in (head, *rows)) for n in range(len(head))]
        lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in (head, *rows)]
        return "\n".join([*lines, self.why])

    @property
    def why(self) -> str:
        """The recommendation, in a sentence."""
        return (
            f"Recommended: {self.recommended.name}, the cheapest whose recall@{self.k} is at least "
            f"{100 * self.wanted:g} % ({self.queries:,} queries, for which {self.encoded:,} of {self.targets:,} "
            "targets were encoded)."
        )


@torch.no_grad()
def serve_plan(
    index: Vectors | Embeddings,
    new: SentenceTransformer,
    corpus: Corpus,
    queries: Sequence[str],
    corrector: Corrector | None = None,
    k: int = 10,
    wanted: float = 0.9,
    judged: int = 200,
    confidence: float = 0.95,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = True,
) -> ServePlan:
    """Measure what to do with a served index now that there is a new model, and recommend one thing.

    The choices: leave it; adapt the new model's queries to it (:class:`QueryAdapter`); upgrade it by the corrector;
    upgrade it and encode some targets again, those first that change most (1 % of them really, 5 and 20 % estimated
    from the sample); embed all again. Some of the queries judge, the others teach.

    Args:
        index, new, corpus, corrector, k, confidence, batch_size, progress: see :func:`certify`. Without a corrector one
            is fitted on the first targets that are encoded again.
        queries: real user queries; some hundreds at least.
        wanted: the recall that the recommended choice has at least, by the lower end of its interval.
        judged: how many of the queries judge, at most half of them.
        seed: of what is drawn.

    Raises:
        InputError: there are too few queries, the index does not fit, or an argument is out of its range.
    """
    vectors = index if isinstance(index, Vectors) else TensorVectors(index)
    vectors.require_corpus(corpus)
    if not 0 < wanted <= 1 or not 0 < confidence < 1:
        raise InputError(f"wanted and confidence are shares, got {wanted} and {confidence}.")
    queries = list(dict.fromkeys(queries))  # one that teaches may not judge
    judging = min(judged, int(_JUDGED * len(queries)))
    require(judging, k, len(corpus) - len(corpus.withdrawn))
    if len(queries) - judging < LEAST_QUERIES:
        raise InputError(
            f"{len(queries):,} queries are not enough to teach and to judge: at least {2 * LEAST_QUERIES} are needed."
        )
    encode = EncodedOnce(encoder_of(new, corpus, batch_size, progress))
    shuffled = np.random.default_rng(seed).permutation(len(queries))
    asked = encode_queries(new, [queries[n] for n in shuffled], batch_size)
    judges, teachers = asked[:judging], asked[judging:]
    others = np.setdiff1d(np.arange(vectors.count), corpus.withdrawn)
    first = max(round(SHARES[0] * len(others)), min(_ENOUGH, round(SHARES[-1] * len(others))), LEAST_PAIRS)
    first = min(first, len(others))
    unit = by_cosine(new)
    if corrector is None:
        rows = np.sort(others[drawn(len(others), first, seed)])
        fresh = encode(rows)
        base = IndexMap(fit_to_pairs(vectors.take(rows), fresh, unit=unit, seed=seed), rows=rows, fresh=fresh)
    else:
        base = IndexMap(corrector)
    vectors.check(base)
    order = reencoding_order(base, vectors, teachers, corpus.withdrawn, progress)
    order = order[~np.isin(order, base.rows)]
    refined = base if corrector is None else encoded_again(base, vectors, np.sort(order[:first]), encode)
    stale = vectors.take(others[drawn(len(others), FITTED_ON, seed)])
    ways, costs = {}, {}
    if vectors.dim == asked.shape[1]:
        ways[UNCHANGED], costs[UNCHANGED] = as_served(vectors, judges, new), (0, 0.0, False)
    for how in [base] if corrector is None else [base, refined]:
        encodings = len(how.rows)
        suffix = f", {encodings:,} encoded again" if encodings else ""
        started = time.perf_counter()
        adapter = QueryAdapter.from_corrector(IndexMap(*how.correctors), teachers, stale, seed)
        costs[ADAPTED + suffix] = encodings, time.perf_counter() - started, False
        ways[ADAPTED + suffix] = as_served(vectors, adapter(judges), new)
        ways[UPGRADED + suffix] = Way(judges, vectors, how)
        costs[UPGRADED + suffix] = encodings, _seconds_of_mapping(how, vectors), True
    order_of = list(ways)[-1]
    found = Judged.draw(ways, order_of, judges, encode, k, corpus.withdrawn, seed, progress)
    recalls = {name: found.recalls(name) for name in ways}
    for share in SHARES[1:]:
        encodings = round(share * len(others))
        if encodings > first:
            again = np.zeros(vectors.count, dtype=bool)
            again[order[: encodings - len(base.rows)]] = again[base.rows] = True
            name = f"{UPGRADED}, {encodings:,} encoded again"
            recalls[name], costs[name] = found.recalls_with(again), (encodings, costs[order_of][1], True)
    choices = [
        Choice(name, interval(each, k, confidence), encodings, encodings * encode.each + seconds, writes)
        for (name, each), (encodings, seconds, writes) in zip(recalls.items(), costs.values(), strict=True)
    ]
    everything = Choice(REEMBEDDED, Interval(1.0, 1.0, 1.0), len(others), len(others) * encode.each, True)
    choices = sorted([*choices, everything], key=lambda each: (each.encodings, each.writes, each.seconds))
    return ServePlan(k, wanted, confidence, len(others), judging, encode.count, choices)


class EncodedOnce:
    """Encodes rows that were not encoded before, and counts them and the time."""

    def __init__(self, encode: Callable[[Rows], Tensor]) -> None:
        self._encode, self.seconds = encode, 0.0
        self._rows: Rows = np.empty(0, dtype=np.int64)
        self._fresh: Tensor | None = None

    def __call__(self, rows: Rows) -> Tensor:
        """The embeddings of ``rows``, float32, ``(len(rows), d')``."""
        if len(new := np.setdiff1d(rows, self._rows)):
            started = time.perf_counter()
            fresh = self._encode(new)
            self.seconds += time.perf_counter() - started
            known = fresh if self._fresh is None else torch.cat([self._fresh, fresh])
            order = np.argsort(every := np.concatenate([self._rows, new]))
            self._rows, self._fresh = every[order], known[torch.from_numpy(order)]
        assert self._fresh is not None
        return self._fresh[torch.from_numpy(np.searchsorted(self._rows, rows))]

    @property
    def count(self) -> int:
        """How many were encoded."""
        return len(self._rows)

    @property
    def each(self) -> float:
        """Seconds for a target."""
        return self.seconds / max(1, self.count)


def _seconds_of_mapping(how: IndexMap, vectors: Vectors) -> float:
    """Of the whole index, by a block of it."""
    rows = np.arange(min(ROWS_AT_ONCE, vectors.count))
    started = time.perf_counter()
    how(vectors.take(rows), rows)
    return (time.perf_counter() - started) * vectors.count / len(rows)
