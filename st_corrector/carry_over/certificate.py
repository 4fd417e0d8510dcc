"""How much of a re-embedded index another way to serve returns, with an interval: see :mod:`.sampling`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from sentence_transformers import SentenceTransformer
from torch import Tensor

from ..cache.arrays import Embeddings
from ..correctors import Corrector
from ..data.corpus import Corpus
from ..data.encoding import DocumentEncoder, evaluating
from ..errors import InputError
from .mapping import IndexMap, Rows, by_cosine
from .query_adapter import QueryAdapter
from .sampling import Judged, Recalls, require
from .vectors import TensorVectors, Vectors
from .ways import Way

UNCHANGED, ADAPTED, UPGRADED = "unchanged", "query adapter", "upgraded"
"""The ways to serve, by name."""


class Interval(NamedTuple):
    """A mean and its confidence interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.mean:5.1f} % [{100 * self.low:.1f}, {100 * self.high:.1f}]"


@dataclass
class Certificate:
    """How much of a re-embedded index each way to serve returns.

    Args:
        k: depth.
        confidence: of the intervals.
        targets: of the corpus.
        queries: number of queries.
        encoded: number of targets really encoded.
        recall: by way: the share of a re-embedded index's first ``k`` targets that are among its first ``k``, mean over
            queries like these.
    """

    k: int
    confidence: float
    targets: int
    queries: int
    encoded: int
    recall: dict[str, Interval]

    def __str__(self) -> str:
        width = max(map(len, self.recall))
        return "\n".join(
            [
                f"recall@{self.k} against a re-embedded index, with {100 * self.confidence:g} % intervals, for queries "
                f"like these {self.queries:,} ({self.encoded:,} of {self.targets:,} targets encoded):",
                *(f"  {name:{width}} {found}" for name, found in self.recall.items()),
            ]
        )


@torch.no_grad()
def certify(
    index: Vectors | Embeddings,
    new: SentenceTransformer,
    corpus: Corpus,
    queries: Sequence[str],
    corrector: Corrector | IndexMap | None = None,
    adapter: QueryAdapter | None = None,
    k: int = 10,
    confidence: float = 0.95,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = True,
) -> Certificate:
    """Certify how much of a re-embedded index is kept: by the index as it is, by an adapter, by the upgraded index.

    Encodes some 130 targets for each query and ``k = 10``, of which those that several queries draw are encoded once;
    the interval halves with four times as many queries. The queries must be none on which a corrector or an adapter was
    fitted, or by which targets to re-encode were chosen.

    Args:
        index: the served embeddings, rows as in the corpus: a tensor, an array, or what
            :func:`~st_corrector.stores.opening.open_vectors` opens.
        new: the new model; it encodes queries and the sample.
        corpus: the targets.
        queries: real user queries; a hundred or two.
        corrector: carries the index over: then the upgraded index is one of the ways.
        adapter: adapts queries to the index as it is: then this is one of the ways.
        k: depth.
        confidence: of the intervals.
        seed: of the draw.
        batch_size: texts in one forward pass.
        progress: show progress bars.

    Returns:
        The certificate, with the ways ``"unchanged"`` (if the widths agree), ``"query adapter"`` and ``"upgraded"``.

    Raises:
        InputError: there are fewer than 20 queries, the index does not fit, or there is no way to search it.
    """
    vectors = index if isinstance(index, Vectors) else TensorVectors(index)
    vectors.require_corpus(corpus)
    require(len(queries), k, len(corpus) - len(corpus.withdrawn))
    asked = encode_queries(new, queries, batch_size)
    ways = {}
    if vectors.dim == asked.shape[1]:
        ways[UNCHANGED] = as_served(vectors, asked, new)
    if adapter is not None:
        ways[ADAPTED] = as_served(vectors, adapter(asked), new)
    if corrector is not None:
        how = IndexMap.of(corrector)
        vectors.check(how)
        ways[UPGRADED] = Way(asked, vectors, how)
    if not ways:
        raise InputError(
            f"The index has {vectors.dim} dimensions, the model's queries {asked.shape[1]}: pass a corrector or an "
            "adapter."
        )
    encode = encoder_of(new, corpus, batch_size, progress)
    judged = Judged.draw(ways, list(ways)[-1], asked, encode, k, corpus.withdrawn, seed, progress)
    return certificate(judged, confidence)


def encode_queries(new: SentenceTransformer, queries: Sequence[str], batch_size: int) -> Tensor:
    """``f(x)``, ``(Q, d)``, of unit length for a model that compares by cosine."""
    with evaluating(new):
        asked = new.encode_query(list(queries), batch_size=batch_size, convert_to_tensor=True).float().cpu()
    return F.normalize(asked, dim=-1) if by_cosine(new) else asked


def encoder_of(new: SentenceTransformer, corpus: Corpus, batch_size: int, progress: bool) -> Callable[[Rows], Tensor]:
    """Encodes rows of the corpus: ``g(y)``, of unit length for a model that compares by cosine."""
    encoder = DocumentEncoder(new, corpus, progress=progress)

    def encode(rows: Rows) -> Tensor:
        fresh = encoder.encode(new, rows, batch_size=batch_size).cpu()[:, : new.truncate_dim]
        return F.normalize(fresh, dim=-1) if by_cosine(new) else fresh

    return encode


def as_served(vectors: Vectors, queries: Tensor, new: SentenceTransformer) -> Way:
    """Queries that search an index as it is, ranked as the index ranks; as the model compares, where that is not known.

    Raises:
        InputError: the index ranks by something else than cosine, inner product and Euclidean distance.
    """
    metric = vectors.metric or ("cosine" if by_cosine(new) else "dot")
    if metric == "cosine":
        return Way(queries, vectors, lambda stale, rows: F.normalize(stale, dim=-1))
    if metric == "dot":
        return Way(queries, vectors)
    if metric == "l2":
        # ‖x‖² − ‖x − y‖² = 2 x·y − ‖y‖², an inner product of one dimension more.
        asked = torch.cat([2 * queries, -torch.ones(len(queries), 1)], dim=1)
        return Way(asked, vectors, lambda stale, rows: torch.cat([stale, stale.square().sum(1, keepdim=True)], dim=1))
    raise InputError(
        f"{vectors.path} compares by {metric}, of which nothing is known here: only cosine, inner product (dot) and "
        "Euclidean distance (l2) are certified."
    )


def certificate(judged: Judged, confidence: float) -> Certificate:
    """Of all ways."""
    recall = {name: interval(judged.recalls(name), judged.k, confidence) for name in judged.first}
    return Certificate(judged.k, confidence, judged.count, len(judged.samples), judged.encoded, recall)


def interval(recalls: Recalls, k: int, confidence: float) -> Interval:
    """The mean recall, and its interval: Wilson's, for as many independent targets as have the variance that was seen.

    Wilson's interval is right near 1, too, where Student's is too narrow. The recall of a query is a share of ``k``
    targets, so ``Q`` queries are worth at most ``Q·k`` independent ones; as they go together, they are worth fewer
    (Kish's design effect).

    Raises:
        InputError: ``confidence`` is not between 0 and 1.
    """
    from scipy.stats import t

    if not 0 < confidence < 1:
        raise InputError(f"confidence is a share, such as 0.95, got {confidence}.")
    quantile = float(t.ppf((1 + confidence) / 2, len(recalls.likely) - 1))

    def wilson(values: np.ndarray, sign: int) -> float:
        mean, count = min(1.0, max(0.0, float(values.mean()))), len(values)
        spread = mean * (1 - mean)
        effective = count * k if spread == 0 else min(count * k, count * spread / max(values.var(ddof=1), 1e-12))
        squared = quantile**2 / effective
        half = quantile * math.sqrt(spread / effective + squared / (4 * effective))
        return float((mean + squared / 2 + sign * half) / (1 + squared))

    likely = float(recalls.likely.mean())
    low, high = wilson(recalls.at_least, -1), wilson(recalls.likely, 1)
    return Interval(likely, max(0.0, min(likely, low)), min(1.0, max(likely, high)))
