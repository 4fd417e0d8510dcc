"""Correctors fitted at once on pairs of embeddings, instead of step by step during training."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sentence_transformers import SentenceTransformer
from torch import Tensor

from ..cache.arrays import Embeddings, as_tensor
from ..cache.embedding_cache import EmbeddingCache
from ..correctors import LOADABLE, AffineMap, Corrector, Frames, IdentityCorrector, MLPCorrector, configured
from ..data.corpus import Corpus
from ..data.encoding import DocumentEncoder
from ..errors import InputError
from .mapping import by_cosine

logger = logging.getLogger(__name__)
FITTED = tuple(name for name in LOADABLE if name != IdentityCorrector.name)
"""The correctors that can be fitted, by name."""
LEAST_PAIRS = 20
"""Fewer are not enough to fit a corrector on."""
_HELD_OUT = 0.1  # share of the sample used to choose settings
_REGULARIZATIONS = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
_EPOCHS, _PATIENCE, _BATCH = 100, 5, 256  # of networks


def fit_corrector(
    old: SentenceTransformer | EmbeddingCache,
    new: SentenceTransformer,
    corpus: Corpus,
    sample: int = 20_000,
    corrector: str = "ridge",
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = True,
) -> Corrector:
    """Fit a corrector from one model's embeddings to another's, on targets encoded by both.

    The two models may be unrelated. If their embeddings differ in width, ``"ridge"`` is an affine map
    (:class:`AffineMap`). A tenth of the sample is held out to choose the regularisation or when to stop.

    Args:
        old: the old model, or a cache of its embeddings of ``corpus``, so that only ``new`` must encode.
        new: the new model.
        corpus: the targets.
        sample: how many random targets are encoded; all, if there are fewer.
        corrector: one of :data:`FITTED`.
        seed: of the draw and of a network's initialisation.
        batch_size: targets in one forward pass.
        progress: show progress bars.

    Returns:
        The corrector; its :attr:`~Corrector.frames` describe the embeddings that it maps between.

    Raises:
        InputError: the models' widths differ and the corrector does not support that, its name is unknown, the sample
            is below 20, or the cache is of another corpus.
    """
    if sample < LEAST_PAIRS:
        raise InputError(f"sample must be at least {LEAST_PAIRS}, got {sample}.")
    if isinstance(old, EmbeddingCache):
        corpus.require_rows("The cache", old.corpus_size, old.fingerprint.get("corpus"))
    rows = drawn(len(corpus), sample, seed)
    encoder = DocumentEncoder(new, corpus, progress=progress)
    fresh = encoder.encode(new, rows, batch_size=batch_size).cpu()
    if isinstance(old, EmbeddingCache):
        stale, of_stale = old[rows].cpu(), old.fingerprint
    else:
        of_old = DocumentEncoder(old, corpus, progress=progress)
        stale, of_stale = of_old.encode(old, rows, batch_size=batch_size).cpu(), of_old.fingerprint(old)
    fitted = fit_to_pairs(stale, fresh, corrector, unit=by_cosine(new), seed=seed)
    fitted.frames = Frames(dict(of_stale), encoder.fingerprint(new), fitted.normalize)
    return fitted


def fit_to_pairs(
    stale: Embeddings, fresh: Embeddings, corrector: str = "ridge", unit: bool = True, seed: int = 0
) -> Corrector:
    """Fit a corrector on pairs of embeddings; see :func:`fit_corrector`.

    Args:
        stale: ``g'(y)``, ``(n, d)``.
        fresh: ``g(y)`` of the same targets, ``(n, d')``.
        corrector: one of :data:`FITTED`.
        unit: whether embeddings are compared by cosine; then all are brought to unit length.
        seed: of the held-out split and of a network's initialisation.
    """
    stale, fresh = (as_tensor(each, InputError).float() for each in (stale, fresh))
    dim, new_dim = stale.shape[1], fresh.shape[1]
    if unit:
        stale, fresh = F.normalize(stale, dim=-1), F.normalize(fresh, dim=-1)
    if dim != new_dim and corrector == "ridge":
        corrector = AffineMap.name
    require_fitted(corrector)
    if dim != new_dim and corrector != AffineMap.name:
        raise InputError(
            f"The embeddings have {dim} and {new_dim} dimensions, between which {corrector!r} cannot map: use "
            f"{AffineMap.name!r}."
        )
    if len(stale) < LEAST_PAIRS:
        raise InputError(f"At least {LEAST_PAIRS} pairs are needed to fit a corrector, got {len(stale)}.")
    kind = LOADABLE[corrector]
    base: dict[str, Any] = {"normalize": unit}
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(stale)))
    held_out, rest = order.split([round(_HELD_OUT * len(stale)), len(stale) - round(_HELD_OUT * len(stale))])
    if issubclass(kind, MLPCorrector):
        network = configured(kind, dim, {**base, "hidden": 4 * dim, "loss": "mse", "seed": seed})
        return _train(network, (stale[rest], fresh[rest]), (stale[held_out], fresh[held_out]))
    if kind is AffineMap:
        base["new_dim"] = new_dim
    base["forgetting"] = 1.0
    tried = _choices(kind, base)
    errors = [
        _error(_solve(kind, dim, each, stale[rest], fresh[rest]), stale[held_out], fresh[held_out]) for each in tried
    ]
    best = tried[int(np.argmin(errors))]
    logger.info("%s: %s has the lowest error on %d held-out targets.", corrector, best, len(held_out))
    return _solve(kind, dim, best, stale, fresh)


def require_fitted(corrector: str) -> None:
    """Refuse the name of a corrector that cannot be fitted.

    Raises:
        InputError: it is none of :data:`FITTED`.
    """
    if corrector not in FITTED:
        raise InputError(f"corrector {corrector!r:.80} is not one of {', '.join(FITTED)}.")


def drawn(size: int, sample: int, seed: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """``sample`` random rows of ``0 … size − 1``, or all, ascending."""
    return np.sort(np.random.default_rng(seed).permutation(size)[:sample])


def _choices(kind: type[Corrector], base: dict[str, Any]) -> Sequence[dict[str, Any]]:
    """Settings to choose from."""
    if "regularization" not in configured(kind, 1, base).config:
        return [base]
    return [{**base, "regularization": each} for each in _REGULARIZATIONS]


def _solve(kind: type[Corrector], dim: int, settings: dict[str, Any], stale: Tensor, fresh: Tensor) -> Corrector:
    """A closed-form corrector: one step on all pairs at once."""
    corrector = configured(kind, dim, settings)
    corrector.learn(stale, fresh, fresh, 1.0)
    return corrector


def _train(corrector: Corrector, pairs: tuple[Tensor, Tensor], held_out: tuple[Tensor, Tensor]) -> Corrector:
    """A network, trained until it stops improving on the held-out pairs."""
    stale, fresh = pairs
    generator = torch.Generator().manual_seed(0)
    best, kept, waited = _error(corrector, *held_out), corrector.state_dict(), 0
    for _ in range(_EPOCHS):
        for batch in torch.randperm(len(stale), generator=generator).split(_BATCH):
            corrector.learn(stale[batch], fresh[batch], fresh[batch], 1.0)
        error, waited = _error(corrector, *held_out), waited + 1
        if error < best:
            best, kept, waited = error, corrector.state_dict(), 0
        if waited == _PATIENCE:
            break
    corrector.load_state_dict(kept)
    return corrector


def _error(corrector: Corrector, stale: Tensor, fresh: Tensor) -> float:
    """The mean of ``‖h − g‖²``; for unit vectors ``2 − 2 cos``."""
    return (corrector(stale) - fresh).square().sum(-1).mean().item()
