"""The loss: in-batch positives plus hard negatives chosen at each step from the whole corpus."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import similarity_fct_name
from torch import Tensor, nn

from ..cache.embedding_cache import EmbeddingCache
from ..correctors import Corrector
from ..data.corpus import Corpus
from ..data.encoding import DocumentEncoder, evaluating, returning_also, unwrap
from ..data.query_keys import UNKNOWN
from ..data.routing import DOCUMENT, QUERY, call
from ..errors import InputError, NonFiniteError
from ..negatives.filters import is_in
from ..negatives.selector import NegativeSelector, Selection
from ..negatives.settings import NegativeSettings
from ..runtime.distributed import Processes
from ..search.shortlist import ShortlistSearch
from ..search.topk import NO_ROW
from ..teachers import Teacher
from .batch import (
    Batch,
    Candidates,
    Column,
    candidates_of,
    explicit_negatives,
    in_batch_candidates,
    known_rows,
    not_offered,
    with_explicit,
)
from .checks import Labels, check_labels, check_settings, refuse_layers, require_finite, with_task
from .corrected_corpus import CorrectedCorpus
from .distillation import Distillation, DistillationSettings
from .objective import Objective
from .settings import CorrectionSettings, with_others
from .similarity import Similarity
from .step_metrics import StepMetrics

logger = logging.getLogger(__name__)


class CorrectedMultipleNegativesLoss(nn.Module):
    # So that MatryoshkaLoss shrinks what calculate_loss is given, and negatives are chosen once, by whole embeddings.
    uses_gradient_cache = True

    def __init__(
        self,
        model: SentenceTransformer,
        corpus: Corpus,
        cache: EmbeddingCache | None = None,
        num_negatives: int | None = None,
        corrector: str | Corrector | None = None,
        teacher: Teacher | None = None,
        *,
        negatives: NegativeSettings | None = None,
        correction: CorrectionSettings | None = None,
        distillation: DistillationSettings | None = None,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] | None = None,
        **earlier: Any,
    ) -> None:
        r"""
        :class:`~sentence_transformers.sentence_transformer.losses.MultipleNegativesRankingLoss` with hard negatives
        that are chosen at every step, from the whole corpus, by the model as it is now, without re-embedding the corpus
        (`Monath et al. 2024 <https://arxiv.org/abs/2409.01890>`_).

        One step, for a batch of queries :math:`x` with positives :math:`y^+`:

        1. :math:`f(x)` and :math:`g(y^+)` are encoded with gradient.
        2. Without gradient, every target is scored by its *corrected* stale embedding,
           :math:`\langle f(x), h(g'(y)) \rangle`. Each query takes ``num_negatives`` of them; its known positives,
           targets with the same text as these, and targets with the query's own text are excepted.
        3. The distinct targets taken by any query of the batch are encoded with gradient, once.
        4. The task loss is the cross-entropy of the positive among the batch's positives and all these targets, by
           fresh embeddings; its gradient reaches the encoder. The corrector ``h`` learns from the same fresh
           embeddings, by itself. It never sees the gradient of the task loss, nor the encoder that of the corrector.

        Args:
            model: SentenceTransformer model.
            corpus: the targets. The dataset's ``label`` column points into it; see :meth:`Corpus.pairs`.
            cache: stale embeddings of all targets, built by this model or an earlier state of it
                (:meth:`EmbeddingCache.build`). It may be left out with ``num_negatives=0``.
            num_negatives: short for ``negatives=NegativeSettings(num_negatives=…)``.
            corrector: short for ``correction=CorrectionSettings(corrector=…)``.
            teacher: short for ``distillation=DistillationSettings(teacher=…)``.
            negatives: how negatives are chosen: how many, the sampler, false negatives, the scale of the softmax.
            correction: how the corrected corpus is kept: the corrector, its warm-up, what is written back.
            distillation: what a teacher says of the candidates, beside the hard labels.
            similarity_fct: :func:`sentence_transformers.util.cos_sim` or :func:`sentence_transformers.util.dot_score`;
                by default what the model compares by (``model.similarity_fn_name``).
            earlier: settings as they were given before there were ``negatives`` and ``correction``; deprecated.

        Requirements:
            1. (anchor, positive) pairs with a ``label`` column: ``[row, key]``, the positive's corpus row and the
               query's key (``corpus.labels(ids, anchors)``). ``corpus.pairs("train")`` is such a dataset. Rows alone
               (``corpus.rows_of(ids)``) will do; then queries that share a positive cannot be told apart. Negatives of
               your own may follow the key, as rows (``corpus.labels(ids, anchors, negatives)``), or the positive, as
               columns of texts, which must be targets of the corpus. They join what is chosen, once each; rules on
               false negatives do not apply to them, and what is known to be relevant is left out.
            2. A cache of the same corpus, by a model with the same tokenizer, prompt, pooling and maximum length.

        Inputs:
            +---------------------------------+---------------------------------------------------------------+
            | Inputs                          | Labels                                                        |
            +=================================+===============================================================+
            | (anchor, positive) pairs        | corpus row of the positive, or [corpus row, key of the query] |
            +---------------------------------+---------------------------------------------------------------+
            | (anchor, positive) pairs        | [corpus row, key of the query, rows of negatives …]           |
            +---------------------------------+---------------------------------------------------------------+
            | (anchor, positive, negative, …) | corpus row of the positive, or [corpus row, key of the query] |
            +---------------------------------+---------------------------------------------------------------+

        Returns:
            In training ``{"task_loss", "correction_loss"}``, and with a teacher ``"distillation_loss"``. The trainer
            logs all, and their sum as ``loss``. ``correction_loss`` carries no gradient; correctors that learn nothing
            leave it out. Under ``torch.no_grad()``, as in evaluation, the others alone, with in-batch negatives:
            nothing is selected and nothing learnt.

        With several processes (``accelerate launch``) a batch is that of all of them: each holds and searches a part of
        the cache for all queries, encodes its share of the batch's negatives, and all see every candidate, with
        gradient. What is selected and learnt is what one process would have with the whole batch.

        A document encoder that is frozen (a ``Router`` whose document route has nothing to train) does not go stale:
        then positives and negatives are looked up in the cache instead of encoded (without dropout), and nothing is
        corrected or written back.

        Recommendations:
            - With a transformer, raise the batch size before ``num_negatives``: the union of the batch's selections
              serves every query.
            - On a GPU that has room for it, pass ``cache.to("cuda")``: the search is memory-bound.

        Relations:
            - With a teacher its other term is that of
              :class:`~sentence_transformers.sentence_transformer.losses.DistillKLDivLoss` (or ``MarginMSELoss``) over
              all of the step's candidates.
            - With ``num_negatives=0`` it is :class:`MultipleNegativesRankingLoss`, with known positives and
              duplicates masked out.
            - With ``CorrectionSettings("identity", write_back=False)`` negatives are chosen by the cache as it was
              built, and :class:`~st_corrector.RefreshCallback` turns that into periodic or exhaustive re-embedding: the
              baselines run through the same code.

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
            InputError: a cache of another size, corpus or kind of encoder, or settings that do not fit; and in
                training a batch without ``label``, with a label outside the corpus, with a positive that is not the
                text of its row (checked by token ids, where the model has them).
            NonFiniteError: embeddings, the loss or the corrector are NaN or infinite: nothing was learnt from the step
                then, by the corrector neither.
            ProcessError: the correctors of several processes differ.
        """
        super().__init__()
        short = {"num_negatives": num_negatives, "corrector": corrector, "teacher": teacher}
        groups = (
            negatives or NegativeSettings(),
            correction or CorrectionSettings(),
            distillation or DistillationSettings(),
        )
        self.negatives, self.correction, taught = with_others(groups, short, earlier)
        check_settings(corpus, cache, self.negatives)
        self.model, self.corpus = model, corpus
        self.similarity = Similarity(model, similarity_fct)
        """How embeddings are compared."""
        self.scale = self.similarity.default_scale if self.negatives.scale is None else self.negatives.scale
        """The inverse temperature β."""
        self.selector = NegativeSelector(self.negatives, self.scale)
        self.processes = Processes.current()
        """Those that train together; more than one under ``accelerate launch``."""
        self.metrics = StepMetrics()
        """What the steps have measured since :meth:`pop_metrics` was last called."""
        self.query_prompt: str | None = None
        """What :meth:`encode_queries` puts before queries; by default what the model does. CorrectorTrainer sets it to
        that of the column it trains on.
        """
        self.targets_encoded = 0
        """Targets encoded for the task loss so far, positives and negatives."""
        self.targets_verified = 0
        """Targets encoded without gradient to verify them so far (``candidates``)."""
        self.removed: Counter[str] = Counter()
        """Candidates that each rule on false negatives has removed so far, by :attr:`Check.name` or argument."""
        split = self.negatives.train_split
        self._qrels = corpus.qrels(split) if corpus.splits and split is not None else None
        self.distillation: Distillation | None = None
        """Compares with a teacher's labels, if there is one."""
        if taught.teacher is not None:
            self.distillation = Distillation(
                taught, corpus, self._qrels, cache is not None and self.negatives.num_negatives > 0
            )
        self._objective = Objective(self.scale, self.negatives.hardness_strength, self.distillation, self.metrics)
        if self.negatives.num_negatives and split is not None and not corpus.splits:
            logger.warning(
                "The corpus has no judgements, so that nothing is known of a query but its label: its other positives, "
                "and a target that is the query itself, may become its negatives. corpus.add_split(%r, queries, "
                "relevant) tells which targets are relevant; train_split=None says that there are no others.",
                split,
            )
        self.encoder = DocumentEncoder(unwrap(model), corpus)
        # It is no module: see Corrector for why it must not be a submodule.
        self._corrected: CorrectedCorpus | None = None
        if cache is not None:
            self._corrected = CorrectedCorpus(
                model, self.encoder, cache, self.correction, self.similarity, self.scale, self.processes, self.metrics
            )

    @property
    def has_corrected(self) -> bool:
        """Whether there is a corrected corpus: the loss was made with a cache."""
        return self._corrected is not None

    @property
    def corrected(self) -> CorrectedCorpus:
        """The corrected corpus, from which negatives are chosen.

        Raises:
            InputError: the loss was made without a cache.
        """
        if self._corrected is None:
            raise InputError("This loss was made without a cache: pass EmbeddingCache.build(model, corpus, path).")
        return self._corrected

    @property
    def is_choosing(self) -> bool:
        """Whether a step takes negatives from the corpus now."""
        return self.negatives.num_negatives > 0 and self.corrected.is_choosing

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None) -> dict[str, Tensor]:
        features, told = self._checked(list(sentence_features), labels)
        training = torch.is_grad_enabled()
        columns: list[Column] = []
        with self._timed("encode", training):
            for each in features[:1] if training and self._looks_up else features:
                columns.append(self._embed(each, columns))
        if told is None or not training:
            return self._named(self._in_batch_loss(columns, told))
        received = self.processes.bytes_received
        batch = self._gather(columns, told)
        if self._looks_up:
            columns.append(Column.of(batch.positives[batch.mine]))
        else:
            self.targets_encoded += len(batch.rows)
        selection = with_explicit(self._select(batch) if self.is_choosing else None, batch, self.negatives)
        negative_rows, counts, fresh = batch.rows[:0], [batch.counts], batch.positives
        if selection is not None:
            selected = selection.rows[selection.rows != NO_ROW].unique()
            negative_rows = selected[~torch.isin(selected, batch.rows)]
            self.targets_encoded += 0 if self._looks_up else len(negative_rows)
        if len(negative_rows):
            column, shares, negatives = self._encode_negatives(negative_rows, columns)
            columns.append(column)
            counts.append(shares)
            fresh = torch.cat([fresh, negatives])
        left_out = not_offered(batch, negative_rows, selection, self.negatives)
        candidates = candidates_of(
            batch, negative_rows, selection, left_out, fresh, counts, self.negatives, self.processes
        )
        if self.distillation is not None:
            candidates = self._taught(self.distillation, candidates, batch, negative_rows, left_out)
        terms = self._named(self._finite_loss(columns, candidates))
        terms["task_loss"] = self._connected(terms["task_loss"], columns)
        if not (self.has_corrected and self.negatives.num_negatives):
            return terms
        learnt = self._hand_over(batch, negative_rows, fresh, selection)
        if self.processes.size > 1:
            self.metrics.add(bytes_exchanged=float(self.processes.bytes_received - received))
        return {**terms, **learnt}

    @property
    def _looks_up(self) -> bool:
        """Whether targets are looked up instead of encoded."""
        if not (self.has_corrected and self.corrected.is_fixed):
            return False
        if not self.encoder.is_frozen(self.model):
            raise InputError(
                "The document encoder was frozen when the loss was made, so that targets are looked up, and is not any "
                "more: make the loss again after what is trained has changed."
            )
        return True

    def _named(self, terms: Tensor) -> dict[str, Tensor]:
        """The terms of :meth:`calculate_loss` as the trainer logs them."""
        if self.distillation is None:
            return {"task_loss": terms}
        return {"task_loss": terms[0], "distillation_loss": terms[1]}

    def _checked(
        self, features: list[dict[str, Tensor]], labels: Tensor | None
    ) -> tuple[list[dict[str, Tensor]], Labels | None]:
        """The features of queries and positives with their tasks, and what the labels say."""
        if len(features) < 2:
            raise InputError(
                f"Expected the text columns (anchor, positive), and negatives after them, got {len(features)}."
            )
        refuse_layers(self.model)
        features = [
            with_task(self.encoder, self.model, each, QUERY if n == 0 else DOCUMENT) for n, each in enumerate(features)
        ]
        pair, negatives = features[:2], features[2:]
        if labels is None and not torch.is_grad_enabled():
            return pair, None
        return pair, check_labels(self.encoder, self.model, labels, pair[1], negatives, self._qrels)

    def _in_batch_loss(self, columns: list[Column], told: Labels | None) -> Tensor:
        """The loss over this process's own positives, by which evaluation goes; nothing is chosen or learnt."""
        queries, positives = columns[0].embeddings, columns[1].embeddings
        require_finite(queries, "queries in this batch")
        require_finite(positives, "positives in this batch", None if told is None else told.rows)
        known = None if told is None else known_rows(self.corpus, self._qrels, told.rows, told.keys)
        candidates = in_batch_candidates(told and told.rows, known, len(queries), queries.device)
        if self.distillation is not None and told is not None:
            rows, none = told.rows, told.explicit[:, :0]
            here = Batch([len(rows)], slice(0, len(rows)), queries, positives, rows, told.keys, rows[:, None], none)
            left_out = not_offered(here, rows[:0], None, self.negatives)
            soft = self.distillation.labels(told.keys, rows, left_out, candidates.target)
            candidates = candidates._replace(soft=soft)
        return self.calculate_loss([each.pieces for each in columns], candidates)

    @torch.no_grad()
    def _gather(self, columns: list[Column], told: Labels) -> Batch:
        """The batch of all processes."""
        processes = self.processes
        with self._timed("exchange"):
            counts = processes.counts(len(told.rows), told.rows.device)
            first = sum(counts[: processes.rank])
            queries, *encoded = (
                processes.gather(self.similarity.comparable(column.embeddings), counts) for column in columns
            )
            mine = slice(first, first + len(told.rows))
            labels = processes.gather(torch.cat([told.rows[:, None], told.keys[:, None], told.explicit], dim=1), counts)
            rows, keys, explicit = labels[:, 0], labels[:, 1], labels[:, 2:]
            positives = encoded[0] if encoded else self.corrected.cached(rows)
            known = known_rows(self.corpus, self._qrels, rows, keys)
        # What all processes have gathered is looked at, so that none goes on alone.
        require_finite(queries, "queries in this batch")
        require_finite(positives, "positives in this batch", rows)
        return Batch(counts, mine, queries, positives, rows, keys, known, explicit_negatives(explicit, known))

    def _select(self, batch: Batch) -> Selection:
        with self._timed("select"):
            labels = torch.stack([batch.rows, batch.keys], dim=1)
            return self.select(batch.queries, batch.known, batch.positive_scores, labels)

    @torch.no_grad()
    def select(
        self, queries: Tensor, exclude: Tensor, positive_scores: Tensor | None = None, labels: Tensor | None = None
    ) -> Selection:
        """The corpus rows that each query takes as negatives, the hardest first.

        Args:
            queries: ``f(x)``, ``(B, d)``.
            exclude: rows each query must not take, ``(B, m)``, padded with −1.
            positive_scores: score of each query's positive, ``(B,)``; margins depend on it.
            labels: corpus row of each query's positive, ``(B,)``, or with its key, ``(B, 2)``; checks depend on it.

        Raises:
            InputError: a rule is set that depends on what is missing.
        """
        rules, queries = self.negatives.false_negatives, self.similarity.comparable(queries)
        if positive_scores is None:
            if rules.absolute_margin is not None or rules.relative_margin is not None:
                raise InputError("Margins compare with the positives: pass positive_scores.")
            positive_scores = queries.new_zeros(len(queries))
        if labels is None:
            if rules.checks:
                raise InputError("Checks know a query by its label: pass labels.")
            labels = torch.full((len(queries),), NO_ROW, device=queries.device)
        labels, keys = labels.unbind(1) if labels.ndim == 2 else (labels, torch.full_like(labels, UNKNOWN))
        with self.corrected.choosing() as search:
            selection = self.selector.select(
                search, queries, exclude, positive_scores.detach(), labels, keys, self.corrected.encode_together
            )
        self.targets_verified += 0 if self._looks_up else len(selection.verified_rows)
        self.removed.update(selection.removed)
        self.metrics.add(**{f"removed_by_{rule}": count for rule, count in selection.removed.items()})
        if isinstance(search, ShortlistSearch) and search.recall is not None:
            self.metrics.add(recall=search.recall)
        return selection

    def _encode_negatives(self, rows: Tensor, earlier: list[Column]) -> tuple[Column, list[int], Tensor]:
        """Encode this process's share of ``rows`` with gradient, or look it up: its column, how many each process has
        encoded, and the embeddings of all, ``(n, d)``.
        """
        shares, mine = [len(rows[each]) for each in self.processes.shares(len(rows))], self.processes.share(len(rows))
        share = rows[mine]
        if self._looks_up:
            found = self.corrected.cached(rows)
            return Column.of(found[mine]), shares, found
        with self._timed("encode"):
            # All processes call the model, since it may exchange something itself: a rank without a share encodes one
            # text and discards it.
            to_encode = share if len(share) else rows[:1]
            column = self._embed(self.encoder.features(to_encode.cpu().numpy(), rows.device), earlier)
        with self._timed("exchange"):
            negatives = self.processes.gather(self.similarity.comparable(column.embeddings)[: len(share)], shares)
        return column, shares, require_finite(negatives, "negatives", rows)

    def _taught(
        self, distillation: Distillation, candidates: Candidates, batch: Batch, negative_rows: Tensor, left_out: Tensor
    ) -> Candidates:
        """The candidates with the teacher's labels, and without questions by which the teacher is judged."""
        with self._timed("teach"):
            if self.has_corrected:
                distillation.begin_step(self.corrected, self.encode_queries)
            rows, keys = torch.cat([batch.rows, negative_rows]), batch.keys[batch.mine]
            # A teacher may fail in one process alone: a model that says NaN of a pair, a full disk.
            with self.processes.together("Asking the teacher"):
                soft = distillation.labels(keys, rows, left_out, candidates.target)
        distillation.look(soft)
        self.metrics.add(
            teacher_weight=distillation.weight, teacher_scale=distillation.scale, taught=soft.labelled.float().mean()
        )
        return candidates._replace(soft=soft, held_out=distillation.held_out(keys, batch.rows[batch.mine]))

    def _finite_loss(self, columns: list[Column], candidates: Candidates) -> Tensor:
        """The loss, back-propagated as far as the columns' pieces."""
        loss = self.calculate_loss([each.pieces for each in columns], candidates, with_backward=True)
        if self.processes.any(not torch.isfinite(loss).all(), loss.device):
            raise NonFiniteError(
                f"The loss is {loss.tolist()} here, and not finite in one of {self.processes.size} processes, though "
                f"the embeddings are: their similarities, or scale={self.scale}, are too large."
            )
        return loss

    @torch.no_grad()
    def _hand_over(
        self, batch: Batch, negative_rows: Tensor, fresh: Tensor, selection: Selection | None
    ) -> dict[str, Tensor]:
        """Let the corrected corpus learn all that this step has encoded."""
        with self._timed("correct"):
            rows = torch.cat([batch.rows, negative_rows])
            if selection is not None:
                self._measure_selection(selection, batch, fresh, rows)
                rows = torch.cat([rows, selection.verified_rows])
                fresh = torch.cat([fresh, selection.verified])
            return self.corrected.learn(rows, fresh, batch.queries)

    @torch.no_grad()
    def _measure_selection(self, selection: Selection, batch: Batch, fresh: Tensor, rows: Tensor) -> None:
        """How hard each query's own negatives are by fresh score, and how old the vectors that they were chosen by."""
        own = is_in(rows, selection.rows)
        if not own.any():
            return
        margins = (batch.queries @ fresh.T - batch.positive_scores[:, None])[own]
        seen, age = self.corrected.age(selection.rows[selection.rows != NO_ROW])
        self.metrics.add(hardness=margins.mean(), harder_than_positive=(margins > 0).float().mean(), seen=seen, age=age)

    def _embed(self, features: dict[str, Tensor], earlier: Sequence[Column]) -> Column:
        """Embeddings of a column; their gradients go where :meth:`_connected` sends them, with those of the step's
        ``earlier`` columns.
        """
        with returning_also(self.model, [column.origin for column in earlier if column.origin is not None]):
            embeddings = call(self.model, features)["sentence_embedding"]
        # In float32, in which the search and the loss compare them, and gradients are summed up.
        embeddings = embeddings.float()
        return Column([embeddings.detach().requires_grad_(torch.is_grad_enabled())], embeddings)

    def _connected(self, loss: Tensor, columns: list[Column]) -> Tensor:
        """``loss`` with the gradients that the columns' pieces have gathered, on their way to the encoder."""
        # Its derivative by what the encoder has said is what calculate_loss has found.
        encoded = [column for column in columns if column.origin is not None]
        terms = [(column.origin * column.pieces[0].grad).sum() for column in encoded]
        linear = torch.stack(terms).sum()
        return loss + (linear - linear.detach())

    def calculate_loss(self, reps: list[list[Tensor]], labels: Candidates, *, with_backward: bool = False) -> Tensor:
        """Cross-entropy of each query's positive among all candidates that are not forbidden to it, ``()``; with a
        teacher, followed by what it has to say of them, ``(2,)``.

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
        scores = self.similarity.function(queries.float(), candidates.float())
        loss = self._objective(scores, labels)
        if with_backward:
            loss.sum().backward()
            loss = loss.detach()
        return loss

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
        - ``removed_by_<rule>``, candidates that a rule on false negatives removed in a step;
        - ``bytes_exchanged``, what the other processes have sent to this one in a step;
        - ``teacher_weight`` and ``teacher_scale``, how far a teacher is trusted, and ``taught``, the share of the
          queries that have its labels;
        - ``task_loss_own_pairs`` and ``task_loss_split_pairs``, where a batch has own pairs;

        Sums over the steps: ``seconds_encode``, ``seconds_exchange``, ``seconds_select``, ``seconds_teach`` and
        ``seconds_correct`` of the forward pass. Totals since the start: ``targets_encoded``, ``targets_verified``,
        ``targets_reencoded``.
        """
        if not self.has_corrected:
            return {}
        totals = {
            "targets_encoded": self.targets_encoded,
            "targets_verified": self.targets_verified,
            "targets_reencoded": self.corrected.targets_reencoded,
        }
        return self.metrics.pop() | {name: float(total) for name, total in totals.items()}

    def memory(self, batch_size: int, batches: int) -> dict[str, int]:
        """Bytes that choosing negatives takes at most on the model's device, in addition to model and cache, by what
        they are for.

        Args:
            batch_size: pairs in a batch of one process.
            batches: how many batches will be trained on.
        """
        if not self.negatives.num_negatives:
            return {}
        taken, batch_size = self.selector.most_selected, batch_size * self.processes.size
        written = batches * (batch_size * (1 + taken) + self.correction.background_targets)
        return self.corrected.memory(batch_size, taken, written)

    def training_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a checkpoint keeps of this process: :meth:`CorrectedCorpus.state_dict`, and the counters of the loss."""
        tensors, described = self.corrected.state_dict()
        counted = {"targets_encoded": self.targets_encoded, "targets_verified": self.targets_verified}
        trust = None if self.distillation is None else self.distillation.state()
        return tensors, {**described, **counted, "removed": dict(self.removed), "teacher": trust}

    def load_training_state(self, parts: Sequence[tuple[dict[str, Tensor], dict[str, Any]]]) -> None:
        """Take over what :meth:`training_state` gave in all processes of a run, in their order.

        Raises:
            InputError: it is of another corrector, corpus or cache.
        """
        self.corrected.load_state_dicts(parts)
        described = parts[0][1]
        self.targets_encoded, self.targets_verified = described["targets_encoded"], described["targets_verified"]
        self.removed = Counter(described["removed"])
        if self.distillation is not None:
            self.distillation.load_state(described.get("teacher"))

    def _timed(self, part: str, training: bool = True) -> AbstractContextManager[None]:
        return self.metrics.timed(part, unwrap(self.model).device) if training else nullcontext()

    @torch.no_grad()
    def encode_queries(self, texts: list[str], batch_size: int = 64) -> Tensor:
        """``f(x)`` of ``texts`` by the model as it is now, as the search sees it: ``(B, d)``; nothing is changed by it.

        In full width, as in training, behind :attr:`query_prompt`; the model's ``truncate_dim`` is ignored.
        """
        model = unwrap(self.model)
        with evaluating(model):
            return self.similarity.comparable(
                model.encode_query(
                    texts,
                    prompt=self.query_prompt,
                    batch_size=batch_size,
                    convert_to_tensor=True,
                    show_progress_bar=False,
                    truncate_dim=self.corrected.cache.dim,
                )
            )

    def get_config_dict(self) -> dict[str, Any]:
        corrected = self._corrected
        return {
            **{each.name: getattr(self.negatives, each.name) for each in dataclasses.fields(self.negatives)},
            **{each.name: getattr(self.correction, each.name) for each in dataclasses.fields(self.correction)},
            **({} if self.distillation is None else self.distillation.describe()),
            "scale": self.scale,
            "corrector": repr(None if corrected is None else corrected.corrector),
            "write_back": self.correction.write_back if corrected is None else corrected.writes_back,
            "false_negatives": repr(self.negatives.false_negatives),
            "shortlist": self.correction.shortlist and repr(self.correction.shortlist),
            "similarity_fct": similarity_fct_name(self.similarity.function),
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
