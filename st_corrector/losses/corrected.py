"""The loss: in-batch positives plus hard negatives chosen at each step from the whole corpus."""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import cos_sim, similarity_fct_name
from torch import Tensor, nn

from ..cache.embedding_cache import EmbeddingCache
from ..correctors import Corrector, IdentityCorrector, make_corrector
from ..data.corpus import Corpus
from ..data.encoding import DocumentEncoder, evaluating, returning_also, unwrap
from ..data.routing import DOCUMENT, QUERY, call
from ..errors import InputError, NonFiniteError
from ..negatives.filters import FalseNegativeFilter, is_in, known_positives, pad_rows, repeats_earlier
from ..negatives.selector import Budget, NegativeSelector, Selection
from ..runtime.distributed import Processes, checksum
from ..search.exact import CorrectedSearch, Sampler
from ..search.fidelity import staleness
from ..search.shortlist import Shortlist, ShortlistSearch
from ..search.topk import NO_ROW
from .checks import (
    check_cache,
    check_labels,
    check_settings,
    compares_unit_vectors,
    default_scale,
    refuse_layers,
    require_finite,
    similarity_of,
    with_task,
)
from .divergence import DivergencePolicy, DivergenceWatch
from .step_metrics import StepMetrics

logger = logging.getLogger(__name__)
_REFRESHED_AT_ONCE = 16_384
_ENCODED_AT_ONCE = 256  # texts without gradient; a GPU is not filled by fewer, and a step's own batch takes more memory
_SAME_EMBEDDING = 0.999  # cosine of what one encoder says of one text, twice, and what is left of it in 8 bits
_COMPARED_EVERY = 100  # steps between two comparisons of what the processes have learnt


WarmupNegatives = Literal["stale", "in-batch"]


class Column(NamedTuple):
    """Embeddings of one column's texts, cut off from what made them.

    Args:
        pieces: leaves that gather gradients, ``(n, d)`` in all.
        origin: what :meth:`CorrectedMultipleNegativesLoss._connected` needs to hand these gradients on.
    """

    pieces: list[Tensor]
    origin: Any

    @property
    def embeddings(self) -> Tensor:
        """``(n, d)``, without gradient."""
        return torch.cat(self.pieces).detach()


class Batch(NamedTuple):
    """The pairs of all processes, one process after the other.

    Args:
        counts: pairs of each process.
        mine: where this process's are.
        queries: ``f(x)`` as the search sees them, ``(B, d)``.
        positives: ``g(y⁺)`` likewise, ``(B, d)``.
        rows: the positives' corpus rows, ``(B,)``.
        known: rows that no query may get, ``(B, m)``, padded with −1.
    """

    counts: list[int]
    mine: slice
    queries: Tensor
    positives: Tensor
    rows: Tensor
    known: Tensor

    @property
    def positive_scores(self) -> Tensor:
        """``⟨f(x), g(y⁺)⟩``, ``(B,)``."""
        return (self.queries * self.positives).sum(-1)


class Candidates(NamedTuple):
    """What the queries of this process are told apart from.

    Args:
        counts: of each column of candidates (positives, negatives), how many each process has encoded.
        target: where the positive of each of this process's queries is among all candidates, ``(b,)``.
        forbidden: candidates that do not count for a query, ``(b, C)``.
        weight: of this process's mean over its queries, so that the mean over processes is the one over all queries.
    """

    counts: list[list[int]]
    target: Tensor
    forbidden: Tensor | None
    weight: float


class CorrectedMultipleNegativesLoss(nn.Module):
    # So that MatryoshkaLoss shrinks what calculate_loss is given, and negatives are chosen once, by whole embeddings.
    uses_gradient_cache = True

    def __init__(
        self,
        model: SentenceTransformer,
        corpus: Corpus,
        cache: EmbeddingCache | None = None,
        num_negatives: int = 16,
        corrector: str | Corrector = "mlp",
        sampler: Sampler = "top_k",
        scale: float | None = None,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] | None = None,
        in_batch_negatives: bool = True,
        share_negatives: bool = True,
        budget: Budget = "query",
        write_back: bool = True,
        candidates: int | None = None,
        background_targets: int = 0,
        false_negatives: FalseNegativeFilter | None = None,
        shortlist: Shortlist | None = None,
        warmup_steps: int = 0,
        warmup_negatives: WarmupNegatives = "stale",
        divergence: DivergencePolicy = "identity",
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
           what has the same text, and a target with the query's own text excepted.
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
            scale: output of the similarity function is multiplied by it (the inverse temperature). By default 20 for
                cosine similarity and for unit vectors, and 1 for the dot product of others.
            similarity_fct: :func:`sentence_transformers.util.cos_sim` or :func:`sentence_transformers.util.dot_score`;
                by default what the model compares by (``model.similarity_fn_name``).
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
            warmup_steps: for so many steps of the run the corrector learns, but does not choose yet. A refresh of the
                cache does not begin that again.
            warmup_negatives: what is taken until then: ``"stale"``, the hardest by the cache as it is (and what has
                been written back), or ``"in-batch"``, nothing but the other queries' positives.
            divergence: what to do with a corrector whose error exceeds that of the cache as it is by more than 0.01 (of
                ``1 − cos``) over 100 steps: ``"identity"`` goes on without one, ``"warn"`` only says so.
            split: the corpus split that is trained on: its judgements say what else is relevant to a query.
                A query is known by its positive's row: where one target answers several queries of the split, nothing
                that is relevant to any of them is a negative for them. ``None``, or a corpus without any split: the
                labels are all that is known, and other positives of a query may become its negatives.

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

        With several processes (``accelerate launch``) a batch is that of all of them: each holds and searches a part of
        the cache for all queries, encodes its share of the batch's negatives, and all see every candidate, with
        gradient. What is selected and learnt is what one process would have with the whole batch.

        A document encoder that is frozen (a ``Router`` whose document route has nothing to train) does not go stale:
        then nothing is corrected or written back.

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
            InputError: settings that are out of range, a cache of another size, corpus or kind of encoder; and in
                training a batch without ``label``, with a label outside the corpus, with a positive that is not the
                text of its row (checked by token ids, where the model has them).
            NonFiniteError: embeddings, the loss or the corrector are NaN or infinite: nothing was learnt from the step
                then, by the corrector neither.
            ProcessError: the correctors of several processes differ.
        """
        super().__init__()
        similarity_fct = similarity_fct or similarity_of(model)
        unit = compares_unit_vectors(model, similarity_fct)
        scale = default_scale(model, similarity_fct) if scale is None else scale
        self.selector = NegativeSelector(
            num_negatives, sampler, scale, budget, candidates, false_negatives or FalseNegativeFilter()
        )
        """How negatives are chosen."""
        check_settings(corpus, cache, self.selector, background_targets, similarity_fct, split)
        if warmup_steps < 0 or warmup_negatives not in ("stale", "in-batch"):
            raise InputError(
                f"warmup_steps must not be negative and warmup_negatives 'stale' or 'in-batch', got {warmup_steps} and "
                f"{warmup_negatives!r}."
            )
        if divergence not in ("identity", "warn"):
            raise InputError(f"divergence must be 'identity' or 'warn', got {divergence!r}.")
        self.model = model
        self.corpus = corpus
        self.similarity_fct = similarity_fct
        self.in_batch_negatives = in_batch_negatives
        self.share_negatives = share_negatives
        self.write_back = write_back
        self.background_targets = background_targets
        self.shortlist = shortlist
        self.warmup_steps, self.warmup_negatives = warmup_steps, warmup_negatives
        self.divergence = divergence
        self.split = split
        self.processes = Processes.current()
        """Those that train together; more than one under ``accelerate launch``."""
        self.metrics = StepMetrics()
        """What the steps have measured since :meth:`pop_metrics` was last called."""
        self.steps = 0
        """Steps from which a corrector has learnt so far, whatever has been refreshed or begun anew since."""
        self.targets_encoded = 0
        """Targets encoded for the task loss so far, positives and negatives."""
        self.targets_verified = 0
        """Targets encoded without gradient to verify them so far; see ``candidates``."""
        self.targets_reencoded = 0
        """Targets encoded for the cache alone so far, by :meth:`refresh` or as background targets; else zero."""
        self.removed: Counter[str] = Counter()
        """Candidates that each rule on false negatives has removed so far, by :attr:`Check.name` or argument."""
        self.diverged = False
        """Whether the corrector has made things worse and was given up; see ``divergence``."""
        self.divergence_watch = DivergenceWatch(self.processes)
        """What notices it."""
        self.refreshed = False
        """Whether :meth:`refresh` has replaced the cache that the loss was made with."""
        self._qrels = corpus.qrels(split) if corpus.splits and split is not None else None
        if num_negatives and split is not None and not corpus.splits:
            logger.warning(
                "The corpus has no judgements, so that nothing is known of a query but its label: its other positives, "
                "and a target that is the query itself, may become its negatives. corpus.add_split(%r, queries, "
                "relevant) tells which targets are relevant; split=None says that there are no others.",
                split,
            )
        self.encoder = DocumentEncoder(unwrap(model), corpus)
        # The corrector lives in the search, which is no module: see Corrector for why it must not be a submodule.
        self._search: CorrectedSearch | None = None
        if cache is not None:
            check_cache(cache, self.encoder.fingerprint(model, weights=False))
            if self.encoder.is_frozen(model) and self._is_fresh(cache):
                logger.info("The document encoder is frozen: the cache stays fresh, and nothing is corrected.")
                corrector, self.write_back = "identity", False
            settings = {} if isinstance(corrector, Corrector) else {"normalize": unit}
            corrector = make_corrector(corrector, cache.dim, **settings)
            if corrector.normalize and not unit:
                raise InputError(
                    f"{corrector!r} returns unit vectors, but the encoder's embeddings are not and are compared by dot "
                    "product: make it with normalize=False."
                )
            if self.processes.size > 1 and len(cache) == len(corpus):
                cache = cache.part(self.processes.share(len(corpus)))
            self._configured = corrector
            self._search = self._make_search(cache, corrector)

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
        refuse_layers(self.model)
        features = [
            with_task(self.encoder, self.model, each, task)
            for each, task in zip(features, (QUERY, DOCUMENT), strict=True)
        ]
        training = torch.is_grad_enabled()
        rows = None
        if training or labels is not None:
            rows = check_labels(self.encoder, self.model, labels, features[1])
        with self._timed("encode", training):
            columns: list[Column] = []
            for each in features:
                columns.append(self._embed(each, columns))
        if rows is None or not training:
            require_finite(columns[0].embeddings, "queries in this batch")
            require_finite(columns[1].embeddings, "positives in this batch", rows)
            return {"task_loss": self.calculate_loss([each.pieces for each in columns], self._in_batch(columns, rows))}

        received = self.processes.bytes_received
        with self._timed("exchange"):
            batch = self._gather(columns, rows)
        # What all processes have gathered is looked at, so that none goes on alone.
        require_finite(batch.queries, "queries in this batch")
        require_finite(batch.positives, "positives in this batch", batch.rows)
        self.targets_encoded += len(batch.rows)
        selection, negative_rows = None, batch.rows[:0]
        if self.is_choosing:
            with self._timed("select"):
                selection = self.select(batch.queries, batch.known, batch.positive_scores, batch.rows)
            selected = selection.rows[selection.rows != NO_ROW].unique()
            negative_rows = selected[~torch.isin(selected, batch.rows)]
            self.targets_encoded += len(negative_rows)
        counts, fresh = [batch.counts], batch.positives
        if len(negative_rows):
            shares = [len(negative_rows[each]) for each in self.processes.shares(len(negative_rows))]
            share = negative_rows[self.processes.share(len(negative_rows))]
            with self._timed("encode"):
                # All processes call the model, since it may exchange something itself; who has no share drops a text.
                to_encode = share if len(share) else negative_rows[:1]
                features_of_negatives = self.encoder.features(to_encode.cpu().numpy(), batch.rows.device)
                columns.append(self._embed(features_of_negatives, columns))
            with self._timed("exchange"):
                negatives = self.processes.gather(self.comparable(columns[2].embeddings)[: len(share)], shares)
            fresh = torch.cat([fresh, require_finite(negatives, "negatives", negative_rows)])
            counts.append(shares)
        candidates = self._candidates(batch, negative_rows, selection, fresh, counts)
        loss = self.calculate_loss([each.pieces for each in columns], candidates, with_backward=True)
        if self.processes.any(not torch.isfinite(loss), loss.device):
            raise NonFiniteError(
                f"The loss is {loss.item()} here, and not finite in one of {self.processes.size} processes, though the "
                f"embeddings are: their similarities, or scale={self.scale}, are too large."
            )
        task_loss = self._connected(loss, columns)
        if self._search is None or not self.num_negatives:
            return {"task_loss": task_loss}
        with self._timed("correct"):
            all_rows = torch.cat([batch.rows, negative_rows])
            if selection is not None:
                self._measure_selection(selection, batch, fresh, all_rows)
            learnt = self._fit_corrector(batch.queries, fresh, all_rows, selection)
        if self.processes.size > 1:
            self.metrics.add(bytes_exchanged=float(self.processes.bytes_received - received))
        return {"task_loss": task_loss, **learnt}

    def _embed(self, features: dict[str, Tensor], earlier: Sequence[Column]) -> Column:
        """Embeddings of a column; their gradients go where :meth:`_connected` sends them, with those of the step's
        ``earlier`` columns.
        """
        with returning_also(self.model, [column.origin for column in earlier]):
            embeddings = call(self.model, features)["sentence_embedding"]
        # In float32, in which the search and the loss compare them, and gradients are summed up.
        embeddings = embeddings.float()
        return Column([embeddings.detach().requires_grad_(torch.is_grad_enabled())], embeddings)

    def _connected(self, loss: Tensor, columns: list[Column]) -> Tensor:
        """``loss`` with the gradients that the columns' pieces have gathered, on their way to the encoder."""
        # Its derivative by what the encoder has said is what calculate_loss has found.
        terms = [(column.origin * column.pieces[0].grad).sum() for column in columns]
        linear = torch.stack(terms).sum()
        return loss + (linear - linear.detach())

    def calculate_loss(self, reps: list[list[Tensor]], labels: Candidates, *, with_backward: bool = False) -> Tensor:
        """Cross-entropy of each query's positive among all candidates that are not forbidden to it.

        Args:
            reps: embeddings of queries, positives, and negatives if there are any, each in pieces.
            labels: which of them is what to whom.
            with_backward: back-propagate it as far as the pieces, and return it without gradient.
        """
        queries, *columns = (torch.cat(pieces) for pieces in reps)
        candidates = torch.cat(
            [
                self.processes.gather_with_grad(each[: counts[self.processes.rank]], counts) if with_backward else each
                for each, counts in zip(columns, labels.counts, strict=True)
            ]
        )
        scores = self.similarity_fct(queries.float(), candidates.float())
        if labels.forbidden is not None:
            scores = scores.masked_fill(labels.forbidden, -torch.inf)
        loss = F.cross_entropy(scores * self.scale, labels.target) * labels.weight
        if with_backward:
            loss.backward()
            loss = loss.detach()
        return loss

    def _in_batch(self, columns: list[Column], rows: Tensor | None) -> Candidates:
        """The positives of this process's own batch as candidates: what evaluation looks at."""
        target = torch.arange(len(columns[0].embeddings), device=columns[0].pieces[0].device)
        forbidden = None
        if rows is not None:
            known = pad_rows(known_positives(self.corpus, self._qrels, rows.tolist())).to(rows.device)
            forbidden = is_in(rows, known) | repeats_earlier(rows)
            forbidden[target, target] = False
        return Candidates([[len(target)]], target, forbidden, 1.0)

    @torch.no_grad()
    def _gather(self, columns: list[Column], rows: Tensor) -> Batch:
        """The batch of all processes."""
        processes = self.processes
        counts = processes.counts(len(rows), rows.device)
        first = sum(counts[: processes.rank])
        queries, positives = (processes.gather(self.comparable(column.embeddings), counts) for column in columns)
        rows = processes.gather(rows, counts)
        known = pad_rows(known_positives(self.corpus, self._qrels, rows.tolist())).to(rows.device)
        return Batch(counts, slice(first, first + len(columns[0].embeddings)), queries, positives, rows, known)

    @torch.no_grad()
    def _candidates(
        self,
        batch: Batch,
        negative_rows: Tensor,
        selection: Selection | None,
        fresh: Tensor,
        counts: list[list[int]],
    ) -> Candidates:
        """Which of all positives, then negatives, whose embeddings are ``fresh`` ``(C, d)``, count for whom."""
        mine = batch.mine
        columns = torch.cat([batch.rows, negative_rows])
        target = torch.arange(len(batch.rows), device=columns.device)[mine]
        forbidden = is_in(columns, batch.known[mine])
        ceiling = self.selector.false_negatives.ceiling(batch.positive_scores)
        if selection is not None:
            ceiling = selection.ceiling
            if self.share_negatives:
                offered = torch.isin(columns, selection.rows.flatten()).repeat(len(target), 1)
            else:
                offered = is_in(columns, selection.rows[mine])
            if self.in_batch_negatives:
                offered[:, : len(batch.rows)] = True
            forbidden |= ~offered | is_in(columns, selection.false_negatives[mine])
            for check in self.selector.false_negatives.checks:
                if check.everywhere:
                    forbidden |= check(batch.rows[mine], columns.expand(len(target), -1))
        if not torch.isposinf(ceiling).all():
            forbidden |= batch.queries[mine] @ fresh.T > ceiling[mine, None]
        forbidden[:, : len(batch.rows)] |= repeats_earlier(batch.rows)  # a positive that two share is one candidate
        forbidden[torch.arange(len(target), device=target.device), target] = False
        weight = len(target) * self.processes.size / len(batch.rows)
        return Candidates(counts, target, forbidden, weight)

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
        with self.search.choosing_by(self.choosing_corrector) as search:
            selection = self.selector.select(
                search, queries, exclude, positive_scores.detach(), labels, self._encode_without_gradient
            )
        self.targets_verified += len(selection.verified_rows)
        self.removed.update(selection.removed)
        self.metrics.add(**{f"removed_by_{rule}": count for rule, count in selection.removed.items()})
        if isinstance(self.search, ShortlistSearch) and self.search.recall is not None:
            self.metrics.add(recall=self.search.recall)
        return selection

    @property
    def is_choosing(self) -> bool:
        """Whether a step takes negatives from the corpus now."""
        return self.num_negatives > 0 and not (self._is_warming_up and self.warmup_negatives == "in-batch")

    @property
    def choosing_corrector(self) -> Corrector:
        """By which negatives are chosen now: none, in effect, while the one that learns warms up."""
        return self._identity if self._is_warming_up else self.search.corrector

    @property
    def _is_warming_up(self) -> bool:
        return self._search is not None and self.steps < self.warmup_steps

    def _encode_without_gradient(self, rows: np.ndarray) -> Tensor:
        """``g(y)`` of ``rows`` as the model says now, for the search, ``(n, d)``; each process encodes a share."""
        processes = self.processes
        share = rows[processes.share(len(rows))]
        share_or_any = share if len(share) else rows[:1]
        fresh = self.comparable(self.encoder.encode(unwrap(self.model), share_or_any, _ENCODED_AT_ONCE))
        fresh = processes.gather(fresh[: len(share)], [len(rows[each]) for each in processes.shares(len(rows))])
        return require_finite(fresh, "targets encoded without gradient", torch.from_numpy(rows))

    @torch.no_grad()
    def _is_fresh(self, cache: EmbeddingCache) -> bool:
        """Whether the model says of some targets what the cache has of them; the same on all processes."""
        rows = np.linspace(cache.first_row, cache.end - 1, min(8, len(cache))).astype(np.int64)
        fresh = self.encoder.encode(unwrap(self.model), rows)
        others = F.cosine_similarity(cache[rows].to(fresh.device), fresh) < _SAME_EMBEDDING
        return int(self.processes.sum(others.sum())) == 0

    def pop_metrics(self) -> dict[str, float]:
        """What the steps since the last call measured, for logging.

        Means over the steps:

        - ``drift``, ``corrected_error`` and ``corrected_mse`` (:func:`~st_corrector.search.fidelity.staleness`) of the
          targets encoded, before the corrector learnt from them; ``corrected_error_unseen``, the same of those that had
          never been encoded before, with ``write_back``;
        - ``seen``, the share of the selected targets that have been written back, and ``age``, the mean number of the
          loss's steps since the selected targets' embeddings were computed;
        - ``hardness``, the mean fresh score of the chosen negatives less that of their query's positive, and
          ``harder_than_positive``, the share of them that score higher;
        - ``pull_back_residual`` and ``pull_back_damped`` (:class:`PullBack`);
        - ``recall``, of what an exact search selects, as last measured, with ``shortlist``;
        - ``removed_by_<rule>``, candidates that a rule on false negatives removed in a step.

        - ``bytes_exchanged``, what the other processes have sent to this one in a step.

        Sums over the steps: ``seconds_encode``, ``seconds_exchange``, ``seconds_select`` and ``seconds_correct`` of the
        forward pass. Totals
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
            batch_size: pairs in a batch of one process.
            batches: how many batches will be trained on.
        """
        if not self.num_negatives:
            return {}
        taken = self.selector.most_selected
        batch_size *= self.processes.size
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
        model, first, end = unwrap(self.model), old.cache.first_row, old.cache.end
        blocks = (
            self.encoder.encode(model, np.arange(start, min(start + _REFRESHED_AT_ONCE, end)), batch_size=batch_size)
            for start in range(first, end, _REFRESHED_AT_ONCE)
        )
        on_device = (block.to(old.cache.device) for block in blocks)
        cache = EmbeddingCache.from_blocks(on_device, old.cache.dtype, first, len(self.corpus), rows=end - first)
        self.targets_reencoded += len(self.corpus)
        self.refreshed = True
        self._search = self._make_search(cache, type(old.corrector)(**old.corrector.config))
        self.divergence_watch = DivergenceWatch(self.processes)

    def restart_corrector(self, diverged: bool) -> None:
        """Go on without correction, if it has diverged, or with the corrector anew. What has been written back was
        meant for the one before, and goes with it.
        """
        steps, self.diverged = self.search.steps, diverged
        corrector = self._identity if diverged else type(self._configured)(**self._configured.config)
        self._search = self._make_search(self.search.cache, corrector)
        self._search.steps = steps
        self.divergence_watch = DivergenceWatch(self.processes)

    @functools.cached_property
    def _identity(self) -> IdentityCorrector:
        return IdentityCorrector(self.search.cache.dim, normalize=self.search.corrector.normalize)

    def _make_search(self, cache: EmbeddingCache, corrector: Corrector) -> CorrectedSearch:
        cosine = self.similarity_fct is cos_sim
        if self.shortlist is None:
            return CorrectedSearch(cache, corrector, normalize=cosine, processes=self.processes)
        return ShortlistSearch(cache, corrector, self.shortlist, normalize=cosine, processes=self.processes)

    @torch.no_grad()
    def encode_queries(self, texts: list[str], batch_size: int = 64) -> Tensor:
        """``f(x)`` of ``texts`` by the model as it is now, as the search sees it: ``(B, d)``; nothing is changed by it.

        In full width, as in training, whatever the model's ``truncate_dim``.
        """
        model = unwrap(self.model)
        with evaluating(model):
            return self.comparable(
                model.encode_query(
                    texts,
                    batch_size=batch_size,
                    convert_to_tensor=True,
                    show_progress_bar=False,
                    truncate_dim=self.search.cache.dim,
                )
            )

    def comparable(self, embeddings: Tensor) -> Tensor:
        """Embeddings as the search and the corrector see them: float32, unit vectors where cosine is compared."""
        embeddings = embeddings.detach().float()
        return F.normalize(embeddings, dim=-1) if self.similarity_fct is cos_sim else embeddings

    @torch.no_grad()
    def _measure_selection(self, selection: Selection, batch: Batch, fresh: Tensor, rows: Tensor) -> None:
        """How hard each query's own negatives are by fresh score, and how old the vectors that they were chosen by."""
        own = is_in(rows, selection.rows)
        if not own.any():
            return
        margins = (batch.queries @ fresh.T - batch.positive_scores[:, None])[own]
        seen, age = self.search.age(selection.rows[selection.rows != NO_ROW])
        self.metrics.add(hardness=margins.mean(), harder_than_positive=(margins > 0).float().mean(), seen=seen, age=age)

    @torch.no_grad()
    def _fit_corrector(
        self, queries: Tensor, fresh: Tensor, rows: Tensor, selection: Selection | None
    ) -> dict[str, Tensor]:
        """Let the corrector, and the overlay, learn from all that this step has encoded afresh."""
        if selection is not None:
            rows = torch.cat([rows, selection.verified_rows])
            fresh = torch.cat([fresh, selection.verified])
        if self.background_targets:
            background = torch.randint(len(self.corpus), (self.background_targets,)).to(rows.device)
            background = self.processes.broadcast(background)
            self.targets_reencoded += len(background)
            rows = torch.cat([rows, background])
            fresh = torch.cat([fresh, self._encode_without_gradient(background.cpu().numpy())])
        # Positives that queries share were encoded twice, verified targets that were selected as well.
        once = ~repeats_earlier(rows)
        rows, fresh = rows[once], fresh[once]
        search = self.search
        search.corrector.to(rows.device)  # while warming up, no search has done so
        stale, cached = search.stale(rows), search.cached(rows)
        corrected = search.corrector(stale)
        measured = staleness(cached, corrected, fresh)
        self.metrics.add(**measured)
        unseen = ~search.seen(rows)
        if self.write_back and unseen.any():
            self.metrics.add(
                corrected_error_unseen=staleness(cached[unseen], corrected[unseen], fresh[unseen])["corrected_error"]
            )
        learnt = search.corrector.learn(stale, fresh, queries, self.scale)
        if self.write_back:
            pulled = search.write_back(rows, fresh)
            self.metrics.add(pull_back_residual=pulled.residual.mean(), pull_back_damped=float(pulled.damped))
        search.steps += 1
        self.steps += 1
        if self.processes.size > 1 and self.steps % _COMPARED_EVERY == 0:
            learnt_so_far = checksum(search.corrector.state_dict()).to(rows.device)
            self.processes.require_same(learnt_so_far, f"The corrector after {self.steps} steps")
        if found := self.divergence_watch.add(measured["drift"], measured["corrected_error"]):
            logger.warning(
                "Over the last steps the corrected embeddings' error (1 - cos) was %.3f, while that of the cache as it "
                "is was %.3f: %r makes things worse. %s",
                found.error,
                found.drift,
                search.corrector,
                "Going on without it." if self.divergence == "identity" else "It goes on (divergence='warn').",
            )
            if self.divergence == "identity":
                self.restart_corrector(diverged=True)
        return learnt

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
            "divergence": self.divergence,
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
