"""The loss for batches that do not fit into memory at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from importlib.metadata import version
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Router
from torch import Tensor

from ..cache.embedding_cache import EmbeddingCache
from ..correctors import Corrector
from ..data.corpus import Corpus
from ..data.encoding import unwrap
from ..errors import InputError
from ..negatives.settings import NegativeSettings
from ..teachers import Teacher
from .batch import Column
from .distillation import DistillationSettings
from .multiple_negatives import CorrectedMultipleNegativesLoss
from .settings import CorrectionSettings

# Not all of these names of sentence-transformers are public: a release without one must not break our import.
_NEEDED = ("CachedLossMixin", "_backward_hook", "_minibatch_ranges", "has_static_embedding_input")
try:
    gradcache: Any = import_module("sentence_transformers.base.losses.gradcache")
    _Mixin: Any = gradcache.CachedLossMixin
except (ImportError, AttributeError):
    gradcache, _Mixin = None, object


class CachedCorrectedMultipleNegativesLoss(CorrectedMultipleNegativesLoss, _Mixin):  # type: ignore[misc]
    def __init__(
        self,
        model: SentenceTransformer,
        corpus: Corpus,
        cache: EmbeddingCache | None = None,
        num_negatives: int | None = None,
        corrector: str | Corrector | None = None,
        teacher: Teacher | None = None,
        *,
        mini_batch_size: int = 32,
        show_progress_bar: bool = False,
        negatives: NegativeSettings | None = None,
        correction: CorrectionSettings | None = None,
        distillation: DistillationSettings | None = None,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] | None = None,
        **earlier: Any,
    ) -> None:
        """
        :class:`CorrectedMultipleNegativesLoss` with gradient caching (`Gao et al. 2021
        <https://arxiv.org/abs/2101.06983>`_): batches and numbers of negatives that do not fit into memory at once, for
        the price of encoding everything twice.

        Queries, positives and negatives are encoded without gradient, in mini-batches; negatives are chosen once, the
        loss is taken over the whole batch, and back-propagated as far as the embeddings; then the mini-batches are
        encoded again, with the same dropout, and hand their embeddings' gradients on. Gradients are those of
        :class:`CorrectedMultipleNegativesLoss`, and so is what the corrector learns.

        Args:
            model, corpus, cache, num_negatives, corrector, teacher: see :class:`CorrectedMultipleNegativesLoss`.
            mini_batch_size: texts that are encoded with gradient at once. It decides over memory and speed alone.
            show_progress_bar: show the progress over a step's mini-batches.
            negatives, correction, distillation, similarity_fct, earlier: see :class:`CorrectedMultipleNegativesLoss`.

        Inputs:
            +--------------------------+----------------------------+
            | Inputs                   | Labels                     |
            +==========================+============================+
            | (anchor, positive) pairs | corpus row of the positive |
            +--------------------------+----------------------------+

        Raises:
            InputError: ``mini_batch_size`` is below 1, a static encoder, whose texts cannot be cut into mini-batches
                (and need not be), a module of the model's own that takes the task as an argument, a
                sentence-transformers that has no gradient caching as this one knows it, or is too old for several
                processes; besides what :class:`CorrectedMultipleNegativesLoss` refuses.
        """
        if missing := [name for name in _NEEDED if not hasattr(gradcache, name)]:
            raise InputError(
                f"sentence-transformers {version('sentence-transformers')} has no base.losses.gradcache.{missing[0]}, "
                "on which gradient caching is built: install 6.2.0, or train without mini_batch_size."
            )
        if mini_batch_size < 1:
            raise InputError(f"mini_batch_size must be at least 1, got {mini_batch_size}.")
        if gradcache.has_static_embedding_input(unwrap(model)):
            raise InputError(
                "The inputs of a StaticEmbedding cannot be cut into mini-batches, and its activations take little "
                "memory: use CorrectedMultipleNegativesLoss."
            )
        modules = [each for each in unwrap(model).modules() if not isinstance(each, Router)]
        if own := [each for each in modules if "task" in getattr(each, "forward_kwargs", ())]:
            raise InputError(
                f"{type(own[0]).__name__} takes the task as an argument, which gradient caching does not hand on: use "
                "CorrectedMultipleNegativesLoss."
            )
        super().__init__(
            model,
            corpus,
            cache,
            num_negatives,
            corrector,
            teacher,
            negatives=negatives,
            correction=correction,
            distillation=distillation,
            similarity_fct=similarity_fct,
            **earlier,
        )
        if self.processes.size > 1 and not hasattr(gradcache, "_ddp_replay_context"):
            raise InputError(
                "This sentence-transformers exchanges gradients after every mini-batch, of which processes may have "
                "different numbers, and would wait forever: upgrade it (6.2.0 will do), or use one process."
            )
        self.mini_batch_size = mini_batch_size
        self.show_progress_bar = show_progress_bar

    def _embed(self, features: dict[str, Tensor], earlier: Sequence[Column]) -> Column:
        training = torch.is_grad_enabled()
        if uncut := [name for name, value in features.items() if isinstance(value, (list, tuple))]:
            raise InputError(
                f"The model's features hold {uncut[0]!r} as a list, which cannot be cut into mini-batches: make it a "
                "tensor in preprocess, or use CorrectedMultipleNegativesLoss."
            )
        # Modules may change the features in place: the second pass must cut them where the first one did.
        ranges = gradcache._minibatch_ranges(features, self.mini_batch_size)
        pieces, random_states = [], []
        for embeddings, random_state in self.embed_minibatch_iter(  # type: ignore[operator]
            features, with_grad=False, copy_random_state=training, ranges=ranges
        ):
            pieces.append(embeddings.detach().requires_grad_(training))
            random_states.append(random_state)
        return Column(pieces, (features, ranges, random_states))

    def _connected(self, loss: Tensor, columns: list[Column]) -> Tensor:
        encoded = [column for column in columns if column.origin is not None]
        features, ranges, random_states = zip(*(column.origin for column in encoded), strict=True)
        loss = loss.detach().requires_grad_()
        loss.register_hook(
            partial(
                gradcache._backward_hook,
                sentence_features=list(features),
                loss_obj=self,
                cache=[[piece.grad for piece in column.pieces] for column in encoded],
                random_states=list(random_states),
                ranges=list(ranges),
            )
        )
        return loss

    def get_config_dict(self) -> dict[str, Any]:
        return {**super().get_config_dict(), "mini_batch_size": self.mini_batch_size}
