"""Types of correctors in addition to embeddings."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class Frames(NamedTuple):
    """The embeddings that a trained corrector maps between.

    Args:
        stale: what its inputs depend on, by component (:attr:`EmbeddingCache.fingerprint`); empty if unknown.
        fresh: the same for its outputs.
        unit: whether stale embeddings are brought to unit length before correction.
    """

    stale: dict[str, Any]
    fresh: dict[str, Any]
    unit: bool


class PullBack(NamedTuple):
    """The result of :meth:`Corrector.pull_back`.

    Args:
        stale: ``z'``, ``(n, d)``, with ``h(z') ≈ g(y)`` for the current corrector.
        residual: the relative error, ``‖z' + c(z') − g(y)‖ / ‖g(y)‖``, ``(n,)``.
        damped: whether damping replaced an exact solution that would have been unstable.
    """

    stale: Tensor
    residual: Tensor
    damped: bool


class QuerySide(NamedTuple):
    """Queries that score unchanged stale embeddings: ``⟨f(x), z + c(z)⟩ = ⟨q', z⟩ + ⟨q'', φ(z)⟩ + a`` for all ``z``.

    Args:
        probes: ``q'``, ``(B, d)``.
        offset: ``a``, ``(B,)``.
        of_features: ``q''``, ``(B, m)``, if ``c`` has features ``φ`` (:meth:`Corrector.features`); else None.
    """

    probes: Tensor
    offset: Tensor
    of_features: Tensor | None = None
