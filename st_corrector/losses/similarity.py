"""How a model's embeddings are compared: by cosine or by dot product."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from sentence_transformers.base.modules import Normalize
from sentence_transformers.util import cos_sim, dot_score
from torch import Tensor, nn

from ..data.encoding import unwrap
from ..data.routing import DOCUMENT, QUERY, modules_for
from ..errors import InputError

_FUNCTIONS: dict[str | None, Callable[[Tensor, Tensor], Tensor]] = {"cosine": cos_sim, "dot": dot_score}


class Similarity:
    """How a model's embeddings are compared.

    Args:
        model: the encoder of both sides.
        function: :func:`sentence_transformers.util.cos_sim` or :func:`sentence_transformers.util.dot_score`; by default
            what the model compares by (``model.similarity_fn_name``).

    Raises:
        InputError: the corpus cannot be searched by this function, or a Router lacks a route.
    """

    def __init__(self, model: nn.Module, function: Callable[[Tensor, Tensor], Tensor] | None = None) -> None:
        model = unwrap(model)
        name = model.similarity_fn_name
        if function is None and name not in _FUNCTIONS:
            raise InputError(
                f"The model compares by {name!r}, by which a corpus cannot be searched: set "
                f"model.similarity_fn_name to {' or '.join(map(repr, _FUNCTIONS))} first, or pass "
                "similarity_fct=cos_sim or dot_score."
            )
        self.function = function or _FUNCTIONS[name]
        """``(B, d), (C, d) → (B, C)``."""
        if self.function not in (cos_sim, dot_score):
            raise InputError(
                f"similarity_fct must be sentence_transformers.util.cos_sim or dot_score, by which the corpus can be "
                f"searched; got {function!r}."
            )
        last = [modules_for(model, task)[-1] for task in (QUERY, DOCUMENT)]
        self.normalizes = self.function is cos_sim
        """Whether embeddings are brought to unit length before they are compared."""
        self.unit = self.normalizes or all(isinstance(each, Normalize) for each in last)
        """Whether what is compared has unit length, because of the function or because of the model."""

    @property
    def default_scale(self) -> float:
        """The inverse temperature where none is given: 20 for scores up to 1, 1 for unbounded dot products."""
        return 20.0 if self.unit else 1.0

    def comparable(self, embeddings: Tensor) -> Tensor:
        """Embeddings as the search and the corrector see them: detached, float32, unit vectors for cosine."""
        embeddings = embeddings.detach().float()
        return F.normalize(embeddings, dim=-1) if self.normalizes else embeddings
