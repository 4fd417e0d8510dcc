"""The interface of every corrector: a map from stale to fresh embeddings that trains itself."""

from __future__ import annotations

import inspect
import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError, NonFiniteError
from ..runtime.precision import in_float32
from . import saving
from .types import Frames, PullBack, QuerySide

if TYPE_CHECKING:
    from typing_extensions import Self


class Corrector(ABC):
    """The target corrector network ``h(·; Ψ)``, with ``h(g'(y)) ≈ g(y)``.

    Deliberately not a :class:`torch.nn.Module`: the trainer's optimizer would pick up a module inside a loss, but would
    neither synchronise it over processes, nor clip it, nor restore it on resume. A corrector owns its parameters and
    their training; the loss steps it. The task loss never reaches Ψ, and the correction loss never reaches the encoder.

    Subclasses define the added term in :meth:`correction` (or, if cheaper, the sum in :meth:`unnormalized`). If it ends
    in a matrix, they apply that to the queries in :meth:`on_query_side`. The search uses these and never calls
    :meth:`forward`. Each setting is a constructor argument with the same name as its attribute, from which
    :attr:`config` follows.

    Args:
        dim: dimension ``d`` of the embeddings.
        normalize: whether ``h`` returns unit vectors; set it if the encoder's embeddings are compared by cosine.

    Raises:
        InputError: ``dim`` is not a positive integer.
    """

    name: str
    """Its short name in the loss and the recipes."""

    def __init__(self, dim: int, *, normalize: bool = True) -> None:
        if not isinstance(dim, int) or dim < 1:
            raise InputError(f"A corrector needs the embeddings' dimension as a positive integer, got {dim!r}.")
        self.dim = dim
        self.normalize = normalize
        self.frames: Frames | None = None
        """The embeddings that it maps between; known once it is trained and saved, or fitted."""

    @torch.no_grad()
    @in_float32
    def __call__(self, stale: Tensor) -> Tensor:
        """:meth:`forward`, without gradient."""
        return self.forward(stale)

    def forward(self, stale: Tensor) -> Tensor:
        """Corrected embeddings ``h(z)``: float32, ``(n, d) → (n, d)``."""
        corrected = self.unnormalized(stale)
        return F.normalize(corrected, dim=-1) if self.normalize else corrected

    @property
    def working_width(self) -> int:
        """Roughly how many numbers scoring holds at once per target, in addition to its input."""
        return 2 * self.dim

    def leaves_corpus(self, unit: bool) -> bool:
        """Whether ``⟨f(x), h(z)⟩ = ⟨q', z⟩ + a`` for stale vectors ``z`` (of unit length, if ``unit``): then the
        queries of :meth:`on_query_side` score them unchanged.
        """
        return False

    def on_query_side(self, queries: Tensor) -> QuerySide | None:
        """The queries ``(B, d)`` with the last matrix of ``c`` folded into them; None if there is none.

        It replaces the product of that matrix with every target, ``m·d`` for ``m`` features, by one with the queries,
        ``m·B``. It is useful if ``h`` does not normalise: norms need ``z + c(z)`` itself (their Gram matrix would take
        another product of ``m²`` in addition to those of ``φ(z)`` and ``z`` with ``W``, always more than it saves).
        """
        return None

    def features(self, stale: Tensor) -> Tensor:
        """``φ(z)``, ``(n, d) → (n, m)``, to be multiplied with :attr:`QuerySide.of_features`."""
        raise NotImplementedError

    def unnormalized(self, stale: Tensor) -> Tensor:
        """``z + c(z)``, ``(n, d) → (n, d)``."""
        return stale + self.correction(stale)

    @abstractmethod
    def correction(self, stale: Tensor) -> Tensor:
        """The term added to stale embeddings before normalisation, ``(n, d) → (n, d)``; zero before the first step."""

    @abstractmethod
    def fit_step(self, stale: Tensor, fresh: Tensor, queries: Tensor, scale: float) -> dict[str, Tensor]:
        """Learn from the targets that a training step has just encoded.

        Args:
            stale: ``g'(y)`` of these targets, ``(n, d)``.
            fresh: ``g(y)`` of the same targets, ``(n, d)``; detached here.
            queries: ``f(x)`` of the step's queries, ``(B, d)``; also detached here.
            scale: the inverse temperature β of the task loss.

        Returns:
            Metrics to log, as scalars; ``"correction_loss"`` is the loss before this step, if there is one.
        """

    @in_float32
    def learn(self, stale: Tensor, fresh: Tensor, queries: Tensor, scale: float) -> dict[str, Tensor]:
        """:meth:`fit_step`, completely or not at all.

        Raises:
            NonFiniteError: its new state or loss is NaN or infinite; its old state is restored.
        """
        before = self.state_dict()
        try:
            metrics = self.fit_step(stale, fresh, queries, scale)
            after = self.state_dict()
            # One check for all tensors: on a GPU each check waits for its result.
            answers = [torch.isfinite(value).all().to(fresh.device) for value in after.values()]
            finite = torch.stack(answers).tolist() if answers else []
            if not all(finite):
                raise NonFiniteError(
                    f"{list(after)[finite.index(False)]} of {self!r} has become NaN or infinite: its settings, or the "
                    f"embeddings' lengths (up to {float(fresh.norm(dim=-1).max()):.3g}), are too much for float32."
                )
        except (NonFiniteError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]  # public, but not in __all__
            self.load_state_dict(before)
            if isinstance(error, NonFiniteError):
                raise
            raise NonFiniteError(
                f"{self!r} cannot solve this step's regression ({error}): its regularization is too small for "
                f"embeddings of length {float(fresh.norm(dim=-1).max()):.3g}."
            ) from error
        return metrics

    @torch.no_grad()
    @in_float32
    def pull_back(self, fresh: Tensor) -> PullBack:
        """Fresh embeddings in the stale frame: ``z'`` for which the current corrector gives ``h(z') = g(y)``.

        Uses the fixed-point iteration ``z' ← g(y) − c(z')`` with ``c`` = :meth:`correction`, which converges if ``c``
        is a contraction. A row stops as soon as a step does not improve it, and keeps its best.

        Args:
            fresh: ``g(y)``, ``(n, d)``.
        """
        scale = fresh.norm(dim=-1).clamp_min(1e-12)
        best, stale = fresh, fresh
        residual = torch.full_like(scale, torch.inf)
        for _ in range(_MAX_ITERATIONS):
            missing = fresh - stale - self.correction(stale)
            error = missing.norm(dim=-1) / scale
            better = error < residual
            best = torch.where(better[:, None], stale, best)
            residual = torch.where(better, error, residual)
            if not (better & (error > _TOLERANCE)).any():
                break
            stale = torch.where(better[:, None], stale + missing, best)
        return PullBack(best, residual, bool((residual > 10 * _TOLERANCE).any()))

    def _require_finite(self, loss: Tensor) -> Tensor:
        """Refuse to learn from non-finite values: such a step would spoil every later selection."""
        if not torch.isfinite(loss):
            raise NonFiniteError(
                f"The correction loss is {loss.item()}: the stale or fresh embeddings are not finite, or the corrector "
                f"has diverged ({self!r}). Nothing was learnt from this step."
            )
        return loss

    @abstractmethod
    def state_dict(self) -> dict[str, Tensor]:
        """All learnt state, including that needed to continue training, as tensors by name."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the :meth:`state_dict` of an equally configured corrector."""

    @abstractmethod
    def to(self, device: torch.device | str) -> Corrector:
        """Move everything to ``device``, in place; returns itself."""

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write it into ``folder/corrector``, next to a model's files, if any.

        Raises:
            StorageError: it cannot be written.
        """
        saving.write(self, Path(folder))

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
    ) -> Self:
        """Load a corrector from a folder or a Hub repository, either its own or that of a model trained with it.

        ``Corrector.from_pretrained`` loads any corrector of this package, a subclass only its own kind.

        Args:
            name: the folder, or the repository's id.
            revision: branch, tag or commit of the repository.
            token, cache_dir, local_files_only: see :func:`huggingface_hub.hf_hub_download`.

        Raises:
            InputError: there is none, it is damaged, or it is of another kind.
            OSError: the repository cannot be reached, found or read (huggingface_hub's own exceptions).
        """
        options = {"revision": revision, "token": token, "local_files_only": local_files_only}
        corrector = saving.load(name, cls, _kinds(), **options, cache_dir=None if cache_dir is None else str(cache_dir))
        assert isinstance(corrector, cls)
        return corrector

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Add the corrector",
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
    ) -> str:
        """Upload it into the folder ``corrector`` of a Hub repository: its own, or that of the model that it was
        trained with, where nothing else changes. Returns the commit's address.

        Args:
            repo_id: created if missing.
            private: for a repository created here.
            token: by default the one of ``hf auth login`` or ``HF_TOKEN``.
            revision: a branch, created if missing.

        Raises:
            OSError: the Hub cannot be reached or refuses (huggingface_hub's own exceptions).
        """
        return saving.send(
            self, repo_id, commit_message=commit_message, private=private, token=token, revision=revision
        )

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments: ``type(corrector)(**corrector.config)`` is an untrained copy."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.config.items())})"


def _kinds() -> dict[str, type[Corrector]]:
    """The correctors of this package, by name; load your own by its class."""
    kinds, waiting = {}, [Corrector]
    while waiting:
        kind = waiting.pop()
        waiting += kind.__subclasses__()
        if isinstance(getattr(kind, "name", None), str) and kind.__module__.startswith(f"{__package__}."):
            kinds[kind.name] = kind
    return dict(sorted(kinds.items()))


_MAX_ITERATIONS = 50
_TOLERANCE = 1e-6
