"""What correctors give and take beside embeddings."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class Frames(NamedTuple):
    """Between which embeddings a trained corrector maps.

    Args:
        stale: what those that it maps from depend on, by component (:attr:`EmbeddingCache.fingerprint`); empty where
            that is not known.
        fresh: the same of those that it maps to.
        unit: whether stale embeddings are brought to unit length before they are corrected.
    """

    stale: dict[str, Any]
    fresh: dict[str, Any]
    unit: bool


class PullBack(NamedTuple):
    """What :meth:`Corrector.pull_back` found.

    Args:
        stale: ``z'``, ``(n, d)``, with ``h(z') ≈ g(y)`` for the present corrector.
        residual: what is missing, ``‖z' + c(z') − g(y)‖ / ‖g(y)‖``, ``(n,)``.
        damped: whether an exact solution was given up because it would have been unstable.
    """

    stale: Tensor
    residual: Tensor
    damped: bool


class QuerySide(NamedTuple):
    """Queries that score stale embeddings as they are: ``⟨f(x), z + c(z)⟩ = ⟨q', z⟩ + ⟨q'', φ(z)⟩ + a`` for all ``z``.

    Args:
        probes: ``q'``, ``(B, d)``.
        offset: ``a``, ``(B,)``.
        of_features: ``q''``, ``(B, m)``, where ``c`` has features ``φ`` (:meth:`Corrector.features`); else None.
    """

    probes: Tensor
    offset: Tensor
    of_features: Tensor | None = None
