"""What takes the place of each served embedding: what a corrector makes of it, or its target encoded again."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sentence_transformers import SentenceTransformer
from torch import Tensor

from ..cache.arrays import Embeddings, as_tensor
from ..correctors import AffineMap, Corrector
from ..errors import InputError, NonFiniteError
from ..storage.fingerprint import digest, digest_json

ROWS_AT_ONCE = 16_384
"""Number of embeddings mapped at once."""
Rows = np.ndarray[Any, np.dtype[np.int64]]


def upgrade_embeddings(
    embeddings: Embeddings, corrector: Corrector, names: Sequence[Any] | Rows | None = None
) -> Tensor:
    """Map embeddings of an earlier model to a newer one's: float32, ``(n, d) → (n, d')``.

    Files and indices of any size: :func:`~st_corrector.stores.opening.open_vectors`, or
    ``st-corrector upgrade-index``.

    Args:
        embeddings: of the model that the corrector maps from, floating-point, ``(n, d)``; a list of vectors also works.
        corrector: of a training run (:meth:`Corrector.from_pretrained`), or of :func:`fit_corrector`.
        names: by which an error tells of them; by default their numbers.

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
    # A corrector from training may be on a GPU.
    device = next(iter(corrector.state_dict().values()), stale).device
    mapped = []
    for start in range(0, len(stale), ROWS_AT_ONCE):
        block = stale[start : start + ROWS_AT_ONCE].to(device, torch.float32)
        mapped.append(corrector(F.normalize(block, dim=-1) if is_unit(corrector) else block).to(stale.device))
        if len(bad := (~torch.isfinite(mapped[-1]).all(1)).nonzero().flatten()):
            name = start + int(bad[0]) if names is None else names[start + int(bad[0])]
            raise NonFiniteError(f"The embedding of row {name!s} is, or becomes, NaN or infinite.")
    return torch.cat(mapped) if mapped else stale.new_empty(0, width_after(corrector), dtype=torch.float32)


class IndexMap:
    """Correctors that are applied in turn; rows whose targets were encoded again have their own embeddings instead.

    Args:
        correctors: the first maps from the served embeddings.
        rows: of the index, encoded again, ``(m,)``, ascending.
        fresh: their embeddings by the new model, ``(m, d')``.

    Raises:
        InputError: a corrector does not map from what the one before it maps to, or the fresh embeddings have another
            width.
    """

    def __init__(self, *correctors: Corrector, rows: Rows | None = None, fresh: Tensor | None = None) -> None:
        for one, following in itertools.pairwise(correctors):
            if width_after(one) != following.dim:
                raise InputError(f"{following!r} maps from {following.dim} dimensions, not from those of {one!r}.")
        self.correctors = correctors
        self.made_of: object = None
        """What the map is told from others by, as JSON: a model, texts, settings; by default all its numbers, which
        have other last bits where targets are encoded on a GPU, or in other batches.
        """
        self.dim, self.new_dim = correctors[0].dim, width_after(correctors[-1])
        self.unit = is_unit(correctors[-1])
        """Whether embeddings are compared by cosine."""
        self.rows = np.empty(0, dtype=np.int64) if rows is None else rows
        fresh = torch.empty(0, self.new_dim) if fresh is None else fresh.float().cpu()
        if fresh.shape != (len(self.rows), self.new_dim):
            raise InputError(f"{len(self.rows):,} rows of {self.new_dim} dimensions, got {tuple(fresh.shape)}.")
        self.fresh = F.normalize(fresh, dim=-1) if self.unit else fresh

    @classmethod
    def of(cls, how: Corrector | IndexMap) -> IndexMap:
        """A corrector as such a map."""
        return how if isinstance(how, IndexMap) else cls(how)

    def __call__(self, stale: Tensor, rows: Rows | None = None, names: Sequence[Any] | Rows | None = None) -> Tensor:
        """The embeddings that take the place of ``stale`` ``(n, d)``, float32, ``(n, d')``.

        Args:
            rows: of the index, ``(n,)``, distinct; without them all are corrected.
            names: by which an error tells of them; by default ``rows``.
        """
        mapped = stale
        for corrector in self.correctors:
            mapped = upgrade_embeddings(mapped, corrector, rows if names is None else names)
        if self.unit and not self.correctors[-1].normalize:
            mapped = F.normalize(mapped, dim=-1)
        if rows is None:
            return mapped
        _, here, known = np.intersect1d(rows, self.rows, assume_unique=True, return_indices=True)
        mapped[torch.from_numpy(here)] = self.fresh[torch.from_numpy(known)].to(mapped.device)
        return mapped

    @property
    def digest(self) -> str:
        """Tells it from other maps, by which an upgrade may have been begun."""
        if self.made_of is not None:
            return digest_json(self.made_of)
        kinds = digest_json([[each.name, each.config] for each in self.correctors])
        state = [value for each in self.correctors for _, value in sorted(each.state_dict().items())]
        parts = [each.detach().cpu().contiguous().numpy().tobytes() for each in (*state, self.fresh)]
        return digest(kinds.encode(), *parts, self.rows.tobytes())

    def __repr__(self) -> str:
        how = ", then ".join(map(repr, self.correctors))
        return f"{how}; {len(self.rows):,} targets encoded again" if len(self.rows) else how


def is_unit(corrector: Corrector) -> bool:
    """Whether a corrector maps from and to embeddings that are compared by cosine."""
    return corrector.normalize if corrector.frames is None else corrector.frames.unit


def by_cosine(model: SentenceTransformer) -> bool:
    """Whether a model compares by cosine, and not by dot product.

    Raises:
        InputError: it compares otherwise.
    """
    if model.similarity_fn_name not in ("cosine", "dot"):
        raise InputError(f"The model compares by {model.similarity_fn_name!r}; expected 'cosine' or 'dot'.")
    return bool(model.similarity_fn_name == "cosine")


def width_after(corrector: Corrector) -> int:
    """The dimension of a corrector's output."""
    return corrector.new_dim if isinstance(corrector, AffineMap) else corrector.dim
