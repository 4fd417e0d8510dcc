"""The new model's queries in the old index: the corrector, read backwards."""

from __future__ import annotations

import logging
from collections import OrderedDict

import torch
import torch.nn.functional as F
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Module, Normalize, Router
from sentence_transformers.sentence_transformer.modules import Dropout
from torch import Tensor, nn

from ..cache.arrays import Embeddings, as_tensor
from ..correctors import Corrector, IdentityCorrector
from ..data.routing import DOCUMENT
from ..errors import InputError
from .fitting import fit_to_pairs
from .mapping import IndexMap

logger = logging.getLogger(__name__)
LEAST_QUERIES = 50
"""Fewer are not enough to fit an adapter on."""
FITTED_ON = 20_000
"""Served embeddings that are enough."""
_STEPS, _BATCH, _RATE = 400, 64, 1e-3
_HARDEST, _RANDOM = 64, 2_048  # targets that each query, and each step, is compared with
_SHARPNESS = 4.0  # β times the standard deviation of a query's scores
_HELD_OUT = 0.1  # share of the queries by which the best step is chosen
_JUDGED_EVERY = 25


class QueryAdapter:
    """An affine map of queries, ``q' = f(x) A + c``, with which the new model searches the old model's index.

    The targets' side, and so the index, stays as it is. For a corrector ``h(z) = zM + b`` without normalisation ``A =
    Mᵀ`` ranks exactly as the upgraded index does, since ``⟨f(x), zM + b⟩ = ⟨f(x)Mᵀ, z⟩ + ⟨f(x), b⟩``, whose last term
    is the same for all targets. Otherwise ``A`` and ``c`` are fitted (:meth:`from_corrector`).

    Args:
        weight: ``A``, ``(d', d)``.
        shift: ``c``, ``(d,)``.
        unit: whether embeddings are compared by cosine; then adapted queries are of unit length.
    """

    def __init__(self, weight: Tensor, shift: Tensor, unit: bool = True) -> None:
        self.weight, self.shift, self.unit = weight, shift, unit

    def __call__(self, queries: Tensor) -> Tensor:
        """The queries in the old index's space, ``(B, d') → (B, d)``."""
        adapted = queries.float() @ self.weight.to(queries.device) + self.shift.to(queries.device)
        return F.normalize(adapted, dim=-1) if self.unit else adapted

    @classmethod
    def from_corrector(
        cls,
        corrector: Corrector | IndexMap,
        queries: Embeddings | None = None,
        stale: Embeddings | None = None,
        seed: int = 0,
    ) -> QueryAdapter:
        """The adapter that searches as the corrector corrects.

        Where no affine map does that exactly, it is fitted: from the affine map nearest to ``h``, by the
        Kullback-Leibler divergence of each query's softmax over adapted scores from that over corrected ones, on the
        targets that are hardest for the query and random ones. A tenth of the queries is held out to choose the best
        step.

        Args:
            corrector: maps the served embeddings to the new model's; or such maps in turn.
            queries: embeddings of queries by the new model, ``(Q, d')``; a few hundred at least, thousands are better.
                They should be like those that will be asked.
            stale: served embeddings, ``(n, d)``: tens of thousands drawn at random are enough.
            seed: of what is drawn.

        Raises:
            InputError: the corrector is not affine and there is nothing, or too little, to fit on; or a width differs.
        """
        mapped = IndexMap.of(corrector)
        if (exact := _exact(mapped)) is not None:
            return exact
        if queries is None or stale is None:
            raise InputError(
                f"No affine map of queries does exactly what {mapped!r} does: pass queries and stale, embeddings by "
                "which it is fitted."
            )
        asked, old = as_tensor(queries, InputError).float().cpu(), as_tensor(stale, InputError).float().cpu()
        if asked.shape[1] != mapped.new_dim or old.shape[1] != mapped.dim:
            raise InputError(
                f"{mapped!r} maps from {mapped.dim} to {mapped.new_dim} dimensions; got served embeddings of "
                f"{old.shape[1]} and queries of {asked.shape[1]}."
            )
        if len(asked) < LEAST_QUERIES or len(old) < LEAST_QUERIES:
            raise InputError(
                f"{len(asked):,} queries and {len(old):,} served embeddings are not enough to fit an adapter on: at "
                f"least {LEAST_QUERIES} of both are needed."
            )
        if mapped.unit:
            asked, old = F.normalize(asked, dim=-1), F.normalize(old, dim=-1)
        return _fitted(asked, old, mapped(old), mapped.unit, seed)

    def append_to(self, model: SentenceTransformer) -> SentenceTransformer:
        """A model whose queries pass through this adapter: ``encode_query`` gives adapted queries, ``encode_document``
        and ``encode`` what they gave.

        It is made of sentence-transformers' own modules (a ``Router`` at the end, with a ``Dense`` on the query's
        side), so that it is saved, pushed and loaded without this package. It shares the given model's modules.

        Raises:
            InputError: the model's queries have another width than the adapter's, or are cut (``truncate_dim``).
        """
        if model.truncate_dim is not None:
            raise InputError(
                f"The model cuts its embeddings to {model.truncate_dim} dimensions, behind all modules: load it "
                "without truncate_dim."
            )
        width = model.get_embedding_dimension()
        if width is not None and width != len(self.weight):
            raise InputError(f"The adapter maps queries of {len(self.weight)} dimensions, the model's have {width}.")
        dense = Dense(
            len(self.weight),
            len(self.shift),
            activation_function=nn.Identity(),
            init_weight=self.weight.T.contiguous(),
            init_bias=self.shift.clone(),
        )
        # A route needs a module: on the targets' side one that does nothing.
        asking: list[Module] = [Normalize(), dense, Normalize()] if self.unit else [dense]
        router = Router.for_query_document(asking, [Dropout(0.0)], default_route=DOCUMENT)
        router.to(device=model.device, dtype=model.dtype)
        adapted = SentenceTransformer(
            modules=OrderedDict([*model.named_children(), (f"{len(model)}", router)]),  # type: ignore[arg-type]
            device=str(model.device),
            prompts={name: text for name, text in model.prompts.items() if text is not None},
            default_prompt_name=model.default_prompt_name,
            similarity_fn_name=model.similarity_fn_name,
        )
        adapted.module_kwargs = model.module_kwargs
        return adapted


def _exact(mapped: IndexMap) -> QueryAdapter | None:
    """The adapter of a map that scores as adapted queries do, if there is one."""
    if len(mapped.correctors) > 1 or len(mapped.rows):
        return None
    (corrector,) = mapped.correctors
    # Corrected embeddings that are compared by cosine are divided by their lengths, which no query can do.
    if not corrector.leaves_corpus(mapped.unit) or (mapped.unit and not isinstance(corrector, IdentityCorrector)):
        return None
    device = next(iter(corrector.state_dict().values()), torch.empty(0)).device
    side = corrector.on_query_side(torch.eye(mapped.new_dim, device=device))
    assert side is not None
    return QueryAdapter(side.probes.detach().cpu(), torch.zeros(corrector.dim), mapped.unit)


@torch.enable_grad()
def _fitted(queries: Tensor, stale: Tensor, carried: Tensor, unit: bool, seed: int) -> QueryAdapter:
    """See :meth:`QueryAdapter.from_corrector`."""
    generator = torch.Generator().manual_seed(seed)
    nearest = fit_to_pairs(stale, carried, "affine-map", unit=unit, seed=seed)
    weight = nearest.weight.T.contiguous().clone().requires_grad_()  # type: ignore[attr-defined]
    shift = torch.zeros(stale.shape[1], requires_grad=True)
    optimizer = torch.optim.Adam([weight, shift], lr=_RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, _STEPS)
    queries = queries[torch.randperm(len(queries), generator=generator)]
    hardest = torch.cat([(each @ carried.T).topk(min(_HARDEST, len(stale))).indices for each in queries.split(256)])
    spread = (queries[:256] @ carried[torch.randperm(len(stale), generator=generator)[:4_096]].T).std(dim=1).mean()
    sharpness = _SHARPNESS / spread.clamp_min(1e-12)
    held_out = max(1, round(_HELD_OUT * len(queries)))

    def divergence(asking: Tensor, rows: Tensor) -> Tensor:
        wanted = sharpness * asking @ carried[rows].T
        given = sharpness * (asking @ weight + shift) @ stale[rows].T
        return F.kl_div(given.log_softmax(-1), wanted.log_softmax(-1), reduction="batchmean", log_target=True)

    def some() -> Tensor:
        return torch.randint(len(stale), (min(_RANDOM, len(stale)),), generator=generator)

    judged = torch.cat([hardest[:held_out].flatten(), some()]).unique()

    def error() -> float:
        with torch.no_grad():
            return divergence(queries[:held_out], judged).item()

    first = least = error()
    best = weight.detach().clone(), shift.detach().clone()
    for step in range(1, _STEPS + 1):
        drawn = torch.randint(held_out, len(queries), (_BATCH,), generator=generator)
        loss = divergence(queries[drawn], torch.cat([hardest[drawn].flatten(), some()]).unique())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % _JUDGED_EVERY == 0 and (found := error()) < least:
            least, best = found, (weight.detach().clone(), shift.detach().clone())
    logger.info("Query adapter: divergence on %d held-out queries %.3f → %.3f.", held_out, first, least)
    return QueryAdapter(*best, unit)
