"""A second use for a corrector: carrying served embeddings over to a newer model.

A corrector is trained to map an earlier encoder's embeddings to the current one's. An index needs the same when its
encoder is replaced: instead of encoding all its texts again, we map each of its vectors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sentence_transformers import SentenceTransformer
from torch import Tensor

from ..cache.arrays import Embeddings, as_tensor
from ..correctors import Corrector
from ..data.corpus import Corpus
from ..data.encoding import DocumentEncoder, evaluating
from ..errors import InputError, NonFiniteError
from ..search.fidelity import overlap_at_k
from .fitting import drawn

ROWS_AT_ONCE = 16_384
"""Number of embeddings mapped at once."""
_DEPTHS = (10, 100, 1000)


def upgrade_embeddings(embeddings: Embeddings, corrector: Corrector) -> Tensor:
    """Map embeddings of an earlier model to a newer one's: float32, ``(n, d) → (n, d')``.

    Files and indices of any size: :func:`~st_corrector.carry_over.opening.open_vectors`, or
    ``st-corrector upgrade-index``.

    Args:
        embeddings: of the model that the corrector maps from, floating-point, ``(n, d)``; a list of vectors also works.
        corrector: of a training run (:meth:`Corrector.from_pretrained`), or of :func:`fit_corrector`.

    Raises:
        InputError: they are not floating-point, or not of the corrector's input dimension.
        NonFiniteError: one is NaN or infinite, or becomes so.
    """
    stale = as_tensor(embeddings, InputError)
    if stale.shape[1] != corrector.dim:
        raise InputError(
            f"The corrector maps from floating-point embeddings of shape (n, {corrector.dim}), got {stale.dtype} of "
            f"shape {tuple(stale.shape)}."
        )
    unit = corrector.normalize if corrector.frames is None else corrector.frames.unit
    # A corrector from training may be on a GPU.
    device = next(iter(corrector.state_dict().values()), stale).device
    mapped = []
    for start in range(0, len(stale), ROWS_AT_ONCE):
        block = stale[start : start + ROWS_AT_ONCE].to(device, torch.float32)
        mapped.append(corrector(F.normalize(block, dim=-1) if unit else block).to(stale.device))
        if len(bad := (~torch.isfinite(mapped[-1]).all(1)).nonzero().flatten()):
            raise NonFiniteError(f"The embedding of row {start + int(bad[0])} is, or becomes, NaN or infinite.")
    return torch.cat(mapped) if mapped else stale.new_empty(0, corrector.dim, dtype=torch.float32)


@dataclass
class CarryOverEstimate:
    """Estimate of what carrying an index over keeps, from targets that were really encoded again.

    Args:
        targets: of the corpus.
        sample: number of targets encoded again.
        queries: number of queries used.
        cosine: mean between carried-over and fresh embeddings.
        cosine_unchanged: mean between old and fresh embeddings; None if the widths differ.
        recall: by depth ``k``: the share of a re-embedded index's first ``k`` targets that the carried-over index also
            returns, mean over queries.
        recall_unchanged: the same for the old index with the new model's queries; empty if the widths differ.
        standard_error: of :attr:`recall`, over queries.
    """

    targets: int
    sample: int
    queries: int
    cosine: float
    cosine_unchanged: float | None
    recall: dict[int, float]
    recall_unchanged: dict[int, float]
    standard_error: dict[int, float]

    def __str__(self) -> str:
        lines = [
            f"{self.sample:,} of {self.targets:,} targets were encoded again, for {self.queries:,} queries.",
            "Estimated share of a re-embedded index's results, and in brackets that of the unchanged index:",
        ]
        for depth, recall in self.recall.items():
            old = f" ({100 * self.recall_unchanged[depth]:.1f} %)" if depth in self.recall_unchanged else ""
            error = 100 * self.standard_error[depth]
            lines.append(f"  recall@{depth:<4} {100 * recall:5.1f} ± {error:.1f} %{old}")
        old = "" if self.cosine_unchanged is None else f" ({self.cosine_unchanged:.3f})"
        return "\n".join([*lines, f"  cosine      {self.cosine:.3f}{old}"])


@torch.no_grad()
def estimate_carry_over(
    old: Embeddings,
    rows: np.ndarray[Any, Any],
    corrector: Corrector,
    new: SentenceTransformer,
    corpus: Corpus,
    queries: list[str],
    batch_size: int = 64,
) -> CarryOverEstimate:
    """Estimate how much of a re-embedded index a carried-over one keeps, by re-embedding only a sample.

    In a sample of ``n`` of ``N`` targets the first ``k·n/N`` represent the first ``k`` of all, since a random sample
    keeps the order. Depths with less than one are left out. With few, the estimate tends to be too low: by about two
    points if five represent a hundred (``benchmarks/results/carry-over``).

    Args:
        old: embeddings of the sample by the earlier model, ``(n, d)``.
        rows: the sample's corpus rows, ``(n,)``; see :func:`sample_rows`.
        corrector: the corrector that carries them over.
        new: the model that they are carried over to; it encodes the sample and the queries.
        corpus: the targets.
        queries: real user queries; a few hundred.
        batch_size: texts in one forward pass.

    Raises:
        InputError: there are fewer than two queries, the embeddings do not fit, or the sample is too small for any
            depth.
    """
    if len(queries) < 2:
        raise InputError("An estimate needs queries, at least two: a split of the corpus, or a file of them.")
    if len(old) != len(rows):
        raise InputError(
            f"old has {len(old):,} embeddings for a sample of {len(rows):,} rows: pass only those of the sample."
        )
    old = as_tensor(old, InputError).cpu()
    depths = estimated_depths(len(rows), len(corpus))
    unit = new.similarity_fn_name == "cosine"
    fresh = DocumentEncoder(new, corpus).encode(new, rows, batch_size=batch_size).cpu()
    with evaluating(new):
        asked = new.encode_query(queries, batch_size=batch_size, convert_to_tensor=True, truncate_dim=fresh.shape[1])
    asked, carried = asked.float().cpu(), upgrade_embeddings(old, corrector)
    if unit:
        fresh, carried, asked = (F.normalize(each, dim=-1) for each in (fresh, carried, asked))
    same_width = old.shape[1] == fresh.shape[1]
    unchanged = F.normalize(old.float(), dim=-1) if unit else old.float()
    recall, recall_unchanged, error = {}, {}, {}
    for depth in depths:
        k = depth * len(rows) // len(corpus)
        reference = (asked @ fresh.T).topk(k).indices
        kept = overlap_at_k((asked @ carried.T).topk(k).indices, reference)
        recall[depth], error[depth] = kept.mean().item(), kept.std().item() / len(kept) ** 0.5
        if same_width:
            recall_unchanged[depth] = overlap_at_k((asked @ unchanged.T).topk(k).indices, reference).mean().item()
    return CarryOverEstimate(
        targets=len(corpus),
        sample=len(rows),
        queries=len(queries),
        cosine=F.cosine_similarity(carried, fresh).mean().item(),
        cosine_unchanged=F.cosine_similarity(old.float(), fresh).mean().item() if same_width else None,
        recall=recall,
        recall_unchanged=recall_unchanged,
        standard_error=error,
    )


def estimated_depths(sample: int, targets: int) -> list[int]:
    """The depths ``k`` that a sample of this size from all ``targets`` can estimate.

    Raises:
        InputError: there is none.
    """
    if depths := [depth for depth in _DEPTHS if depth * sample >= targets >= 2 * depth]:
        return depths
    raise InputError(
        f"A sample of {sample:,} of {targets:,} targets is too small to estimate the first {_DEPTHS[-1]}: take at "
        f"least {-(-targets // _DEPTHS[-1]):,}, without those that a corrector is fitted on."
    )


def sample_rows(
    corpus: Corpus, sample: int, without: np.ndarray[Any, Any] | None = None
) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Random rows of ``corpus``, none of them withdrawn, for :func:`estimate_carry_over`, ascending.

    Args:
        sample: how many.
        without: excluded rows: those that a corrector was fitted on, which it maps better than others.
    """
    excluded = corpus.withdrawn if without is None else np.union1d(corpus.withdrawn, without)
    others = np.setdiff1d(np.arange(len(corpus)), excluded)
    chosen: np.ndarray[Any, np.dtype[np.int64]] = others[drawn(len(others), sample, seed=1)]
    return chosen
