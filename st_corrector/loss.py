"""The loss: in-batch positives plus hard negatives chosen at each step from the whole corpus."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules.normalize import Normalize
from sentence_transformers.util import cos_sim, dot_score, similarity_fct_name
from torch import Tensor, nn

from .cache import EmbeddingCache
from .corpus import Corpus
from .correctors import Corrector, make_corrector
from .encoding import DocumentEncoder, unwrap
from .errors import InputError
from .filters import FalseNegativeFilter, is_in, known_positives, pad_rows, repeats_earlier
from .fingerprint import differences
from .search import CorrectedSearch, Sampler
from .selection import Budget, NegativeSelector, Selection
from .shortlist import Shortlist, ShortlistSearch
from .staleness import StepMetrics, staleness
from .tokens import TokenizedCorpus
from .topk import NO_ROW

_REFRESHED_AT_ONCE = 16_384


class CorrectedMultipleNegativesLoss(nn.Module):
    def __init__(
        self,
        model: SentenceTransformer,
        corpus: Corpus,
        cache: EmbeddingCache | None = None,
        num_negatives: int = 16,
        corrector: str | Corrector = "mlp",
        sampler: Sampler = "top_k",
        scale: float = 20.0,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] = cos_sim,
        in_batch_negatives: bool = True,
        share_negatives: bool = True,
        budget: Budget = "query",
        write_back: bool = True,
        candidates: int | None = None,
        background_targets: int = 0,
        false_negatives: FalseNegativeFilter | None = None,
        shortlist: Shortlist | None = None,
        split: str | None = "train",
    ) -> None:
        r"""
        :class:`~sentence_transformers.sentence_transformer.losses.MultipleNegativesRankingLoss` with hard negatives
        that are chosen at every step, from the whole corpus, by the model as it is now, without re-embedding the corpus
        (`Monath et al. 2024 <https://arxiv.org/abs/2409.01890>`_).

        One step, for a batch of queries :math:`x` with positives :math:`y^+`:

        1. :math:`f(x)` and :math:`g(y^+)` are encoded with gradient.
        2. Without gradient, every target is scored by its *corrected* stale embedding,
           :math:`\langle f(x), h(g'(y)) \rangle`; each query takes ``num_negatives`` of them, its known positives and
           what has the same words excepted.
        3. The distinct targets taken by any query of the batch are encoded with gradient, once.
        4. The task loss is the cross-entropy of the positive among the batch's positives and all these targets, by
           fresh embeddings; its gradient reaches the encoder. The corrector ``h`` learns from the same fresh
           embeddings, by itself; it never sees the task loss's gradient, nor the encoder the corrector's.

        Args:
            model: SentenceTransformer model.
            corpus: the targets. The dataset's ``label`` column points into it; see :meth:`Corpus.pairs`.
            cache: stale embeddings of all targets, built by this model or an earlier state of it
                (:meth:`EmbeddingCache.build`). It may be left out with ``num_negatives=0``.
            num_negatives: how many targets each query takes. 0 leaves plain in-batch negatives.
            corrector: ``"mlp"`` (the paper's kind), ``"ridge"``, ``"identity"`` (no correction), or a
                :class:`Corrector` with settings of your own.
            sampler: ``"top_k"`` takes the hardest, ``"gumbel"`` samples from the corrected softmax without replacement,
                ``"mixed"`` takes half of them so and half so, ``"uniform"`` samples from all targets alike.
            scale: output of the similarity function is multiplied by it (the inverse temperature).
            similarity_fct: :func:`sentence_transformers.util.cos_sim` or :func:`sentence_transformers.util.dot_score`
                (then set ``scale`` to 1).
            in_batch_negatives: whether the other queries' positives are negatives too.
            share_negatives: whether every query sees the targets that the other queries of the batch have taken.
            budget: with ``"batch"``, the batch takes ``B × num_negatives`` distinct targets in all, those that come
                nearest to (or exceed by most) the positive of some query, so that a query whose positive is far ahead
                leaves its share to others.
            write_back: whether what a step has encoded afresh stands for these targets from then on, in the frame of
                the stale embeddings (:meth:`CorrectedSearch.write_back`), so that later corrections move it on. The
                cache itself is never changed; what is written takes a float32 vector for each target ever encoded.
            candidates: verify: take so many targets for each query by corrected score (more than ``num_negatives``),
                encode them without gradient, and keep the hardest by fresh score. Their fresh embeddings teach the
                corrector too. Costs those encodings; see :attr:`targets_verified`.
            false_negatives: which targets are too similar to be negatives, judged by corrected scores when they are
                chosen and by fresh ones in the softmax.
            background_targets: encode so many random targets at each step, without gradient, for the corrector (and
                ``write_back``) alone. Counted in :attr:`targets_reencoded`.
            shortlist: score only what an index (or a copy of the cache that is corrected once in a while) suggests,
                instead of every target: see :class:`Shortlist`. Recall is measured and logged.
            split: the corpus split that is trained on: its judgements say what else is relevant to a query.
                A query is known by its positive's row: where one target answers several queries of the split, nothing
                that is relevant to any of them is a negative for them. ``None``: the labels are all that is known.

        Requirements:
            1. (anchor, positive) pairs with an integer ``label`` column: the positive's corpus row, not its id
               (``corpus.rows_of(ids)``). ``corpus.pairs("train")`` is such a dataset.
            2. A cache of the same corpus, by a model with the same tokenizer, prompt, pooling and maximum length.

        Inputs:
            +--------------------------+----------------------------+
            | Inputs                   | Labels                     |
            +==========================+============================+
            | (anchor, positive) pairs | corpus row of the positive |
            +--------------------------+----------------------------+

        Returns:
            In training ``{"task_loss", "correction_loss"}``, which the trainer logs apart (and sums up as ``loss``;
            ``correction_loss`` carries no gradient, and is left out by correctors that learn nothing). Under
            ``torch.no_grad()``, as in evaluation, only ``{"task_loss"}`` with in-batch negatives: nothing is
            selected and nothing learnt.

        Recommendations:
            - Raise ``num_negatives`` before the batch size: the union of the batch's selections serves every query.
            - On a GPU that has room for it, pass ``cache.to("cuda")``: the search is memory-bound.

        Relations:
            - With ``num_negatives=0`` it is :class:`MultipleNegativesRankingLoss`, with known positives and
              duplicates masked out.
            - With ``corrector="identity", write_back=False`` negatives are chosen by the cache as it was built, and
              :class:`~st_corrector.RefreshCallback` turns that into periodic or exhaustive re-embedding: the baselines
              run through the same code.

        Example:
            ::

                from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
                from st_corrector import CorrectedMultipleNegativesLoss, Corpus, EmbeddingCache

                model = SentenceTransformer("sentence-transformers/all-MiniLM-L6-v2")
                corpus = Corpus.from_beir("data/nq")
                cache = EmbeddingCache.build(model, corpus, "caches/nq")
                loss = CorrectedMultipleNegativesLoss(model, corpus, cache)

                trainer = SentenceTransformerTrainer(model=model, train_dataset=corpus.pairs("train"), loss=loss)
                trainer.train()

        Raises:
            InputError: settings that are out of range, a cache of another size, corpus or kind of encoder, several
                processes; and in training a batch without ``label``, with a label outside the corpus, with a positive
                that is not the text of its row (checked by token ids, where the model has them), or with embeddings
                that are not finite.
        """
        super().__init__()
        self.selector = NegativeSelector(
            num_negatives, sampler, scale, budget, candidates, false_negatives or FalseNegativeFilter()
        )
        """How negatives are chosen."""
        _check_settings(corpus, cache, self.selector, background_targets, similarity_fct, split)
        self.model = model
        self.corpus = corpus
        self.similarity_fct = similarity_fct
        self.in_batch_negatives = in_batch_negatives
        self.share_negatives = share_negatives
        self.write_back = write_back
        self.background_targets = background_targets
        self.shortlist = shortlist
        self.split = split
        self.metrics = StepMetrics()
        """What the steps have measured since :meth:`pop_metrics` was last called."""
        self.targets_encoded = 0
        """Targets encoded for the task loss so far, positives and negatives."""
        self.targets_verified = 0
        """Targets encoded without gradient to verify them so far; see ``candidates``."""
        self.targets_reencoded = 0
        """Targets encoded for the cache alone so far, by :meth:`refresh` or as background targets; else zero."""
        self._qrels = corpus.qrels(split) if corpus.splits and split is not None else None
        self.encoder = DocumentEncoder(unwrap(model), corpus)
        # The corrector lives in the search, which is no module: see Corrector for why it must not be a submodule.
        self._search: CorrectedSearch | None = None
        if cache is not None:
            _check_cache(cache, self.encoder.fingerprint(model, weights=False))
            cosine = similarity_fct is cos_sim
            unit = cosine or isinstance(list(unwrap(model).children())[-1], Normalize)
            settings = {} if isinstance(corrector, Corrector) else {"normalize": unit}
            corrector = make_corrector(corrector, cache.dim, **settings)
            if corrector.normalize and not unit:
                raise InputError(
                    f"{corrector!r} returns unit vectors, but the encoder's embeddings are not and are compared by dot "
                    "product: make it with normalize=False."
                )
            self._search = self._make_search(cache, corrector)
            _require_one_process()

    @property
    def num_negatives(self) -> int:
        """How many targets each query takes."""
        return self.selector.num_negatives

    @property
    def scale(self) -> float:
        """The inverse temperature β."""
        return self.selector.scale

    @property
    def search(self) -> CorrectedSearch:
        """The search over the corrected cache.

        Raises:
            InputError: the loss was made without a cache.
        """
        if self._search is None:
            raise InputError("This loss was made without a cache: pass EmbeddingCache.build(model, corpus, path).")
        return self._search

    @property
    def corrector(self) -> Corrector | None:
        """The corrector in use; None without a cache."""
        return self._search.corrector if self._search else None

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None) -> dict[str, Tensor]:
        features = list(sentence_features)
        if len(features) != 2:
            raise InputError(
                f"Expected the text columns (anchor, positive), got {len(features)}. Negatives are chosen from the "
                "corpus: drop other text columns, e.g. dataset.select_columns(['anchor', 'positive', 'label'])."
            )
        training = torch.is_grad_enabled()
        rows = self._check_labels(labels, features) if training or labels is not None else None
        with self._timed("encode", training):
            queries = _finite(self.model(features[0])["sentence_embedding"], "queries in this batch")
            positives = _finite(self.model(features[1])["sentence_embedding"], "positives in this batch", rows)
        if rows is None:
            return {"task_loss": self._task_loss(queries, positives, None)}

        known = pad_rows(known_positives(self.corpus, self._qrels, rows.tolist())).to(queries.device)
        positive_scores = (self.comparable(queries) * self.comparable(positives)).sum(-1)
        if not training or self.num_negatives == 0:
            self.targets_encoded += len(rows) if training else 0
            ceiling = self.selector.false_negatives.ceiling(positive_scores) if training else None
            return {"task_loss": self._task_loss(queries, positives, self._forbidden(rows, rows[:0], known), ceiling)}

        with self._timed("select"):
            selection = self.select(queries, known, positive_scores, rows)
        selected = selection.rows[selection.rows != NO_ROW].unique()
        negative_rows = selected[~torch.isin(selected, rows)]
        self.targets_encoded += len(rows) + len(negative_rows)
        candidates = positives
        if len(negative_rows):
            with self._timed("encode"):
                negative_features = self.encoder.features(negative_rows.cpu().numpy(), queries.device)
                negatives = _finite(self.model(negative_features)["sentence_embedding"], "negatives", negative_rows)
            candidates = torch.cat([positives, negatives])
        forbidden = self._forbidden(rows, negative_rows, known, selection)
        task_loss = self._task_loss(queries, candidates, forbidden, selection.ceiling)
        with self._timed("correct"):
            self._measure_selection(selection, positive_scores, queries, candidates, torch.cat([rows, negative_rows]))
            learnt = self._fit_corrector(queries, candidates, torch.cat([rows, negative_rows]), selection)
        return {"task_loss": task_loss, **learnt}

    @torch.no_grad()
    def select(
        self, queries: Tensor, exclude: Tensor, positive_scores: Tensor | None = None, labels: Tensor | None = None
    ) -> Selection:
        """The corpus rows that each query takes as negatives, the hardest first.

        Args:
            queries: ``f(x)``, ``(B, d)``.
            exclude: rows each query must not take, ``(B, m)``, padded with −1.
            positive_scores: score of each query's positive, ``(B,)``; margins and ``budget="batch"`` depend on it.
            labels: corpus row of each query's positive, ``(B,)``; checks depend on it.

        Raises:
            InputError: a rule is set that depends on what is missing.
        """
        _require_one_process()
        rules, queries = self.selector.false_negatives, self.comparable(queries)
        if positive_scores is None:
            if (
                self.selector.budget == "batch"
                or rules.absolute_margin is not None
                or rules.relative_margin is not None
            ):
                raise InputError("Margins and budget='batch' compare with the positives: pass positive_scores.")
            positive_scores = queries.new_zeros(len(queries))
        if labels is None:
            if rules.checks:
                raise InputError("Checks know a query by its positive's row: pass labels.")
            labels = torch.full((len(queries),), NO_ROW, device=queries.device)
        selection = self.selector.select(
            self.search, queries, exclude, positive_scores.detach(), labels, self._encode_without_gradient
        )
        self.targets_verified += len(selection.verified_rows)
        self.metrics.add(**{f"removed_by_{rule}": count for rule, count in selection.removed.items()})
        if isinstance(self.search, ShortlistSearch) and self.search.recall is not None:
            self.metrics.add(recall=self.search.recall)
        return selection

    def _encode_without_gradient(self, rows: np.ndarray) -> Tensor:
        """``g(y)`` of ``rows`` as the model says now, as the search sees it: ``(n, d)``."""
        fresh = self.comparable(self.encoder.encode(unwrap(self.model), rows))
        return _finite(fresh, "targets encoded without gradient", torch.from_numpy(rows))

    def pop_metrics(self) -> dict[str, float]:
        """What the steps since the last call measured, for logging.

        Means over the steps:

        - ``drift``, ``corrected_error`` and ``corrected_mse`` (:func:`~st_corrector.staleness.staleness`) of the
          targets encoded, before the corrector learnt from them; ``corrected_error_unseen``, the same of those that had
          never been encoded before, with ``write_back``;
        - ``seen``, the share of the selected targets that have been written back, and ``age``, the mean number of the
          loss's steps since the selected targets' embeddings were computed;
        - ``hardness``, the mean fresh score of the chosen negatives less that of their query's positive, and
          ``harder_than_positive``, the share of them that score higher;
        - ``pull_back_residual`` and ``pull_back_damped`` (:class:`PullBack`);
        - ``recall``, of what an exact search selects, as last measured, with ``shortlist``;
        - ``removed_by_<rule>``, candidates that a rule on false negatives removed in a step.

        Sums over the steps: ``seconds_encode``, ``seconds_select`` and ``seconds_correct`` of the forward pass. Totals
        since the start: ``targets_encoded``, ``targets_verified``, ``targets_reencoded``.
        """
        if self._search is None:
            return {}
        totals = ("targets_encoded", "targets_verified", "targets_reencoded")
        return self.metrics.pop() | {name: float(getattr(self, name)) for name in totals}

    def memory(self, batch_size: int, batches: int) -> dict[str, int]:
        """Bytes that choosing negatives takes at most on the model's device, beside model and cache, by what they are
        for.

        Args:
            batch_size: pairs in a batch.
            batches: how many batches will be trained on.
        """
        if not self.num_negatives:
            return {}
        taken = self.selector.most_selected
        written = batches * (batch_size * (1 + taken) + self.background_targets) if self.write_back else 0
        return self.search.memory(
            batch_size, taken, unwrap(self.model).device, rows_written=min(written, len(self.corpus))
        )

    def _timed(self, part: str, training: bool = True) -> AbstractContextManager[None]:
        return self.metrics.timed(part, unwrap(self.model).device) if training else nullcontext()

    @torch.no_grad()
    def refresh(self, batch_size: int = 256) -> None:
        """Encode all targets with the model as it is now, and choose negatives by that from here on.

        The new embeddings are held in memory, in the old ones' dtype and on their device; a cache on disk is not
        changed. What the corrector has learnt was the way from the old embeddings to the present ones, so it starts
        anew, and so does what has been written back.
        """
        old = self.search
        model, size = unwrap(self.model), len(self.corpus)
        blocks = (
            self.encoder.encode(model, np.arange(start, min(start + _REFRESHED_AT_ONCE, size)), batch_size=batch_size)
            for start in range(0, size, _REFRESHED_AT_ONCE)
        )
        cache = EmbeddingCache.from_blocks((block.to(old.cache.device) for block in blocks), old.cache.dtype)
        self.targets_reencoded += size
        corrector = type(old.corrector)(**old.corrector.config)
        self._search = self._make_search(cache, corrector)

    def _make_search(self, cache: EmbeddingCache, corrector: Corrector) -> CorrectedSearch:
        cosine = self.similarity_fct is cos_sim
        if self.shortlist is None:
            return CorrectedSearch(cache, corrector, normalize=cosine)
        return ShortlistSearch(cache, corrector, self.shortlist, normalize=cosine)

    def comparable(self, embeddings: Tensor) -> Tensor:
        """Embeddings as the search and the corrector see them: float32, unit vectors where cosine is compared."""
        embeddings = embeddings.detach().float()
        return F.normalize(embeddings, dim=-1) if self.similarity_fct is cos_sim else embeddings

    def _forbidden(
        self, rows: Tensor, negative_rows: Tensor, known: Tensor, selection: Selection | None = None
    ) -> Tensor:
        """Which candidates (positives, then negatives) a query must not see as negatives: ``(B, B + M)``."""
        columns = torch.cat([rows, negative_rows])
        forbidden = is_in(columns, known)
        if selection is not None:
            if self.share_negatives:
                offered = torch.isin(columns, selection.rows).repeat(len(rows), 1)
            else:
                offered = is_in(columns, selection.rows)
            if self.in_batch_negatives:
                offered[:, : len(rows)] = True
            forbidden |= ~offered | is_in(columns, selection.false_negatives)
            for check in self.selector.false_negatives.checks:
                if check.everywhere:
                    forbidden |= check(rows, columns.expand(len(rows), -1))
        forbidden[:, : len(rows)] |= repeats_earlier(rows)  # a positive that two queries share is one candidate
        return forbidden

    def _task_loss(
        self, queries: Tensor, candidates: Tensor, forbidden: Tensor | None, ceiling: Tensor | None = None
    ) -> Tensor:
        """Cross-entropy of candidate ``i`` for query ``i`` among all candidates that are not forbidden."""
        scores = self.similarity_fct(queries, candidates)
        target = torch.arange(len(queries), device=queries.device)
        if forbidden is not None:
            if ceiling is not None:
                forbidden = forbidden | (scores.detach() > ceiling[:, None])
            forbidden[target, target] = False
            scores = scores.masked_fill(forbidden, -torch.inf)
        return F.cross_entropy(scores * self.scale, target)

    @torch.no_grad()
    def _measure_selection(
        self, selection: Selection, positive_scores: Tensor, queries: Tensor, candidates: Tensor, rows: Tensor
    ) -> None:
        """How hard each query's own negatives are by fresh score, and how old the vectors that they were chosen by."""
        own = is_in(rows, selection.rows)
        if not own.any():
            return
        margins = (self.comparable(queries) @ self.comparable(candidates).T - positive_scores[:, None])[own]
        seen, age = self.search.age(selection.rows[selection.rows != NO_ROW])
        self.metrics.add(hardness=margins.mean(), harder_than_positive=(margins > 0).float().mean(), seen=seen, age=age)

    @torch.no_grad()
    def _fit_corrector(
        self, queries: Tensor, candidates: Tensor, rows: Tensor, selection: Selection
    ) -> dict[str, Tensor]:
        """Let the corrector, and the overlay, learn from all that this step has encoded afresh."""
        rows = torch.cat([rows, selection.verified_rows])
        fresh = torch.cat([self.comparable(candidates), selection.verified])
        if self.background_targets:
            background = torch.randint(len(self.corpus), (self.background_targets,))
            self.targets_reencoded += len(background)
            rows = torch.cat([rows, background.to(rows.device)])
            fresh = torch.cat([fresh, self._encode_without_gradient(background.numpy())])
        # Positives that queries share were encoded twice, verified targets that were selected as well.
        once = ~repeats_earlier(rows)
        rows, fresh = rows[once], fresh[once]
        search = self.search
        stale, cached = search.stale(rows), search.cached(rows)
        corrected = search.corrector(stale)
        self.metrics.add(**staleness(cached, corrected, fresh))
        unseen = ~search.overlay.has(rows)
        if self.write_back and unseen.any():
            self.metrics.add(
                corrected_error_unseen=staleness(cached[unseen], corrected[unseen], fresh[unseen])["corrected_error"]
            )
        learnt = search.corrector.fit_step(stale, fresh, self.comparable(queries), self.scale)
        if self.write_back:
            pulled = search.write_back(rows, fresh)
            self.metrics.add(pull_back_residual=pulled.residual.mean(), pull_back_damped=float(pulled.damped))
        search.steps += 1
        return learnt

    def _check_labels(self, labels: Tensor | None, features: list[dict[str, Any]]) -> Tensor:
        if labels is None:
            raise InputError(
                "The dataset has no 'label' column. It must hold the corpus row of each positive; "
                "corpus.pairs(split) gives such a dataset, corpus.rows_of(ids) the rows of ids."
            )
        if labels.ndim != 1 or labels.is_floating_point() or labels.dtype == torch.bool:
            raise InputError(
                "Labels must be integers, one corpus row for each pair; got "
                f"{labels.dtype} of shape {tuple(labels.shape)}."
            )
        outside = (labels < 0) | (labels >= len(self.corpus))
        if outside.any():
            position = int(outside.nonzero()[0])
            raise InputError(
                f"Label {int(labels[position])} (position {position} in the batch) is no row of the corpus, whose rows "
                f"are 0 … {len(self.corpus) - 1}. Labels are the positives' corpus rows: see corpus.rows_of(ids)."
            )
        tokens = self.encoder.tokens
        if isinstance(tokens, TokenizedCorpus) and "input_ids" in features[1]:
            self._check_positive_texts(tokens, features[1], labels)
        return labels

    def _check_positive_texts(self, tokens: TokenizedCorpus, features: dict[str, Any], labels: Tensor) -> None:
        """A positive that is not the text of its row would teach the corrector, and mask the negatives, wrongly."""
        on_cpu = {key: value.cpu() if isinstance(value, Tensor) else value for key, value in features.items()}
        given, given_lengths = tokens.layout.split(on_cpu)
        expected, expected_lengths = tokens.layout.split(tokens.features(labels.tolist()))
        if np.array_equal(given_lengths, expected_lengths) and np.array_equal(
            given["input_ids"], expected["input_ids"]
        ):
            return
        ours = np.split(given["input_ids"], np.cumsum(given_lengths)[:-1])
        theirs = np.split(expected["input_ids"], np.cumsum(expected_lengths)[:-1])
        position = next(n for n in range(len(labels)) if not np.array_equal(ours[n], theirs[n]))
        row, positive, target = int(labels[position]), ours[position], theirs[position]
        tokenizer = unwrap(self.model).tokenizer
        raise InputError(
            f"The positive at position {position} in the batch is not the text of corpus row {row}, to which its "
            f"label points.\n  positive ({len(positive)} tokens): {tokenizer.decode(positive)!r:.160}\n"
            f"  row {row} ({len(target)} tokens): {tokenizer.decode(target)!r:.160}\n"
            "Either the labels are wrong, or the two are prepared differently. They need the same prompt: the corpus "
            f"has {self.encoder.prompt!r}, which comes from Corpus(…, prompt=…) or else model.prompts['document'] as "
            "it is when the cache is built; the trainer has that of args.prompts={<positive column>: …}. They need the "
            "same maximum length, and title and text joined as in corpus.texts(rows). corpus.pairs(split) gives such "
            "pairs."
        )

    def get_config_dict(self) -> dict[str, Any]:
        return {
            "num_negatives": self.num_negatives,
            "corrector": repr(self.corrector),
            "sampler": self.selector.sampler,
            "scale": self.scale,
            "similarity_fct": similarity_fct_name(self.similarity_fct),
            "in_batch_negatives": self.in_batch_negatives,
            "share_negatives": self.share_negatives,
            "budget": self.selector.budget,
            "write_back": self.write_back,
            "candidates": self.selector.candidates,
            "background_targets": self.background_targets,
            "false_negatives": repr(self.selector.false_negatives),
            "corpus": repr(self.corpus),
        }

    @property
    def citation(self) -> str:
        return """
@inproceedings{monath2024freshtakestaleembeddings,
      title={A Fresh Take on Stale Embeddings: Improving Dense Retriever Training with Corrector Networks},
      author={Monath, Nicholas and Grathwohl, Will and Boratko, Michael and Fergus, Rob and McCallum, Andrew and
              Zaheer, Manzil},
      booktitle={International Conference on Machine Learning},
      year={2024},
      url={https://arxiv.org/abs/2409.01890},
}
"""


def _require_one_process() -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        processes = torch.distributed.get_world_size()
        if processes > 1:
            raise InputError(
                f"Choosing negatives from the corpus is not supported on {processes} processes yet: start one "
                "(accelerate launch --num_processes 1)."
            )


def _check_settings(corpus, cache, selector, background_targets, similarity_fct, split) -> None:
    if background_targets < 0:
        raise InputError(f"background_targets must not be negative, got {background_targets}.")
    if selector.num_negatives and cache is None:
        raise InputError("Negatives are chosen by a cache: pass EmbeddingCache.build(model, corpus, path).")
    if cache is not None and not isinstance(cache, EmbeddingCache):
        raise InputError(
            f"cache must be an EmbeddingCache, got a {type(cache).__name__}: EmbeddingCache.load(path) opens a folder, "
            "EmbeddingCache.from_tensor(embeddings) wraps vectors."
        )
    if cache is not None and len(cache) != len(corpus):
        raise InputError(
            f"The cache has {len(cache)} rows, the corpus {len(corpus)} targets: they must be the same, in the same "
            "order. Build the cache of this corpus with EmbeddingCache.build."
        )
    if similarity_fct not in (cos_sim, dot_score):
        raise InputError(
            f"similarity_fct must be sentence_transformers.util.cos_sim or dot_score, by which the corpus can be "
            f"searched; got {similarity_fct!r}."
        )
    if other := [check for check in selector.false_negatives.checks if check.split not in (None, split)]:
        raise InputError(
            f"{other[0]!r} knows the queries of split {other[0].split!r}, the loss is trained on {split!r}: make both "
            "with the same."
        )
    if corpus.splits and split is not None and split not in corpus.splits:
        raise InputError(
            f"The corpus has no split {split!r}, it has {corpus.splits}: pass the one that is trained on, or None if "
            "its judgements are not in the corpus."
        )


def _check_cache(cache: EmbeddingCache, expected: dict[str, Any]) -> None:
    """Refuse a cache of another corpus or kind of encoder. Other weights are what a stale cache is about."""
    found = {component: value for component, value in cache.fingerprint.items() if component != "weights"}
    if found and (different := differences(found, expected)):
        raise InputError(
            "The cache was built of something else than what is trained:\n  " + "\n  ".join(different) + "\nBuild the "
            "cache again with this model and corpus (or set the model's prompts and max_seq_length before it is built)."
        )


def _finite(embeddings: Tensor, what: str, rows: Tensor | None = None) -> Tensor:
    finite = torch.isfinite(embeddings.detach()).all(-1)
    if not finite.all():
        bad = (~finite).nonzero().flatten()
        where = (
            f"positions {bad[:5].tolist()}" if rows is None else f"corpus rows {rows.to(bad.device)[bad[:5]].tolist()}"
        )
        raise InputError(
            f"The embeddings of {len(bad)} of {len(embeddings)} {what} are NaN or infinite ({where}). Training has "
            "diverged or a text breaks the encoder: lower the learning rate, clip gradients, or look at these texts."
        )
    return embeddings
