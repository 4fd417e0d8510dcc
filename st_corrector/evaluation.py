"""Retrieval over the whole corpus, evaluated exactly."""

from __future__ import annotations

import csv
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import SentenceEvaluator
from torch import Tensor
from tqdm.auto import tqdm

from .cache.embedding_cache import EmbeddingCache
from .data.corpus import Corpus
from .data.encoding import DocumentEncoder, evaluating
from .data.routing import QUERY, modules_for
from .data.text import contains_answer
from .errors import InputError
from .runtime.precision import in_float32
from .search.topk import RunningTopK

logger = logging.getLogger(__name__)

RECALL_AT = (1, 5, 20, 100)
_DEPTH = 100
_SCORES_AT_ONCE = 2**27  # half a GB


class CorpusRetrievalEvaluator(SentenceEvaluator):
    """Encodes the whole corpus with the current model, searches it exactly for every query of a split, and scores.

    Metrics (all in ``[0, 1]``): ``recall@{1,5,20,100}`` (the share of a query's relevant targets found), ``mrr@10``,
    ``ndcg@10``, ``map@100``, as :func:`ranking_metrics` defines them; and, where the queries have answers,
    ``answer_recall@{1,5,20,100}``: whether one of the first k targets' texts (without titles) contains one of the
    answers, as scored in open-domain question answering (:func:`~st_corrector.data.text.contains_answer`).

    Works on the corpus's token ids, in chunks: the embeddings of the corpus are never held at once. Titles, prompts and
    truncation are those of training. It does not affect training.

    If the queries are targets themselves, as in Quora or ArguAna, each usually finds itself first. By default it is
    ranked like any other target, so even a perfect model's ``mrr@10`` is 0.5. BEIR leaves it out, and so does
    ``ignore_identical_ids=True``.

    Args:
        corpus: the targets and their judged queries.
        split: the queries to evaluate.
        name: precedes every metric, as in sentence-transformers' evaluators.
        batch_size: texts in one forward pass.
        chunk_size: targets encoded and scored at once, at most.
        write_csv: append a line to a CSV file in the ``output_path`` of each call.
        show_progress_bar: show the encoding's progress.
        ignore_identical_ids: leave the target with the query's id out of its ranking, as BEIR does. Judgements stay: a
            query judged relevant to itself counts as not found.

    Raises:
        CorpusError: the corpus has no such split.
        InputError: the split has no queries, or the model's similarity is neither cosine nor dot product.
    """

    def __init__(
        self,
        corpus: Corpus,
        split: str = "dev",
        name: str = "",
        batch_size: int = 64,
        chunk_size: int = 16_384,
        write_csv: bool = True,
        show_progress_bar: bool = False,
        ignore_identical_ids: bool = False,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.corpus, self.split, self.name = corpus, split, name
        self.qrels = corpus.qrels(split)
        if not len(self.qrels):
            raise InputError(f"Split {split!r} has no queries: none of its judged targets is in the corpus.")
        self.batch_size, self.chunk_size = batch_size, chunk_size
        self.write_csv, self.show_progress_bar = write_csv, show_progress_bar
        self.primary_metric = "ndcg@10"
        self.csv_file = f"corpus-retrieval_evaluation{'_' + name if name else ''}_results.csv"
        self.ignore_identical_ids = ignore_identical_ids
        # One more, so that 100 remain without the query's own.
        self._retrieved = _DEPTH + ignore_identical_ids
        self._answers: list[list[str]] = self.qrels.queries["answers"][:]

    def __call__(  # type: ignore[override]
        self, model: SentenceTransformer, output_path: str | None = None, epoch: int = -1, steps: int = -1
    ) -> dict[str, float]:
        metrics = self.score(self.retrieve(model))
        logger.info("Retrieval from %d targets for %d queries (%s):", len(self.corpus), len(self.qrels), self.split)
        for metric, value in metrics.items():
            logger.info("%s: %.4f", metric, value)
        if output_path is not None and self.write_csv:
            self._append_csv(Path(output_path), epoch, steps, metrics)
        metrics = self.prefix_name_to_metrics(metrics, self.name)
        self.store_metrics_in_model_card_data(model, metrics, epoch, steps)
        return metrics

    def score(self, rows: Tensor) -> dict[str, float]:
        """The metrics of retrieved rows.

        Args:
            rows: corpus rows for each query, best first, −1 beyond the last: ``(Q, 100)``; see :meth:`retrieve`.
        """
        found = rows.numpy()
        total = np.bincount(self.qrels.query, minlength=len(self.qrels))
        return {**ranking_metrics(self._grades(found), total, self._best_grades()), **self._answer_metrics(found)}

    @torch.no_grad()
    def retrieve(self, model: SentenceTransformer, embeddings: EmbeddingCache | None = None) -> Tensor:
        """The first 100 corpus rows for each query, best first: ``(Q, 100)`` on the CPU, padded with −1 for a smaller
        corpus; without the query's own if ``ignore_identical_ids`` is set.

        Args:
            embeddings: search these, like a served index, instead of encoding the corpus.

        Raises:
            InputError: the model's similarity is neither cosine nor dot product, its Router lacks a route for a side,
                or the embeddings are of another corpus or width.
        """
        if model.similarity_fn_name not in ("cosine", "dot"):
            raise InputError(f"The model compares by {model.similarity_fn_name!r}; expected 'cosine' or 'dot'.")
        modules_for(model, QUERY)
        compare = (lambda x: F.normalize(x, dim=-1)) if model.similarity_fn_name == "cosine" else (lambda x: x)
        with evaluating(model):
            queries = model.encode_query(
                self.qrels.queries["text"][:],
                batch_size=self.batch_size,
                convert_to_tensor=True,
                show_progress_bar=False,
            )
        queries = compare(queries.float().clone())
        if embeddings is not None:
            return self._ranking(self._search(queries, embeddings, compare))
        encoder = DocumentEncoder(model, self.corpus, progress=self.show_progress_bar)
        best = RunningTopK(len(queries), self._retrieved, queries.device)
        with tqdm(
            total=len(self.corpus), desc="Evaluating", unit=" targets", disable=not self.show_progress_bar
        ) as bar:
            chunk_size = max(1, min(self.chunk_size, _SCORES_AT_ONCE // len(queries)))
            for start in range(0, len(self.corpus), chunk_size):
                rows = np.arange(start, min(start + chunk_size, len(self.corpus)))
                if getattr(model, "_distributed_inference", None) is None:
                    fresh = encoder.encode(model, rows, batch_size=self.batch_size, bar=bar)
                else:  # with several processes, the others only wait to serve encode()
                    fresh = model.encode(
                        self.corpus.texts(rows),
                        prompt=encoder.prompt,
                        task="document",
                        batch_size=self.batch_size,
                        convert_to_tensor=True,
                        show_progress_bar=False,
                    ).float()
                    bar.update(len(rows))
                # encode_query truncates to model.truncate_dim if set; targets are truncated to the same width.
                best.update(self._scores(compare(fresh[:, : queries.shape[1]]), queries, start), start)
        return self._ranking(best)

    def _search(self, queries: Tensor, embeddings: EmbeddingCache, compare: Callable[[Tensor], Tensor]) -> RunningTopK:
        self.corpus.require_rows(repr(embeddings), len(embeddings), embeddings.fingerprint.get("corpus"))
        if embeddings.dim != queries.shape[1]:
            raise InputError(f"{embeddings!r} does not fit: the model's queries have {queries.shape[1]} dimensions.")
        best = RunningTopK(len(queries), self._retrieved, queries.device)
        for row, chunk in embeddings.chunks(max(1, min(self.chunk_size, _SCORES_AT_ONCE // len(queries)))):
            best.update(self._scores(compare(chunk.float().to(queries.device)), queries, row), row)
        return best

    def _scores(self, targets: Tensor, queries: Tensor, first_row: int) -> Tensor:
        """``(C, d), (Q, d) → (C, Q)``, −∞ for withdrawn targets."""
        scores, withdrawn = _products(targets, queries), self.corpus.withdrawn
        here = slice(*np.searchsorted(withdrawn, [first_row, first_row + len(targets)]))
        gone = torch.from_numpy(withdrawn[here] - first_row).to(scores.device)
        return scores.index_fill_(0, gone, -torch.inf) if len(gone) else scores

    def _ranking(self, best: RunningTopK) -> Tensor:
        """The found rows, best first, without the query's own if requested."""
        rows = best.best[1].cpu()
        if not self.ignore_identical_ids:
            return rows
        own = torch.from_numpy(self.corpus.rows_of(self.qrels.queries["id"], missing=-1))
        # The query's own row, or the last, moves behind all others, which keep their order, and is cut off.
        return rows.gather(1, (rows == own[:, None]).int().argsort(dim=1, stable=True))[:, :_DEPTH]

    def get_config_dict(self) -> dict[str, Any]:
        return {
            "split": self.split,
            "targets": len(self.corpus),
            "queries": len(self.qrels),
            "ignore_identical_ids": self.ignore_identical_ids,
        }

    @property
    def description(self) -> str:
        return "Corpus Retrieval"

    def _grades(self, rows: np.ndarray) -> np.ndarray:
        """The grade at each rank, 0 if not relevant, ``(Q, depth)``."""
        grades = np.zeros(rows.shape)
        for query, found in enumerate(rows):
            _, ranks, judged = np.intersect1d(found, self.qrels.rows_of(query), return_indices=True)
            grades[query, ranks] = self.qrels.grades_of(query)[judged]
        return grades

    def _best_grades(self) -> np.ndarray:
        """Each query's ten highest grades, highest first, zeros beyond the last, ``(Q, 10)``."""
        best = np.zeros((len(self.qrels), 10))
        for query in range(len(self.qrels)):
            grades = np.sort(self.qrels.grades_of(query))[::-1][:10]
            best[query, : len(grades)] = grades
        return best

    def _answer_metrics(self, rows: np.ndarray) -> dict[str, float]:
        asked = [query for query, answers in enumerate(self._answers) if answers]
        if not asked:
            return {}
        found = np.unique(rows[asked])
        found = found[found >= 0]
        text_of = dict(zip(found.tolist(), self.corpus.targets[found]["text"], strict=True))
        first = []
        for query in asked:
            answers = self._answers[query]
            ranks = (
                n for n, row in enumerate(rows[query].tolist()) if row >= 0 and contains_answer(text_of[row], answers)
            )
            first.append(next(ranks, _DEPTH))
        return {f"answer_recall@{k}": float(np.mean(np.array(first) < k)) for k in RECALL_AT}

    def _append_csv(self, folder: Path, epoch: int, steps: int, metrics: dict[str, float]) -> None:
        os.makedirs(folder, exist_ok=True)
        path = folder / self.csv_file
        new = not path.exists()
        with path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(["epoch", "steps", *metrics])
            writer.writerow([epoch, steps, *metrics.values()])


@in_float32
def _products(targets: Tensor, queries: Tensor) -> Tensor:
    """``(C, d), (Q, d) → (C, Q)``, in float32 under a caller's autocast too."""
    return targets @ queries.T


def ranking_metrics(grades: np.ndarray, total: np.ndarray, best: np.ndarray | None = None) -> dict[str, float]:
    """Mean ranking metrics over queries, as in trec_eval (and so BEIR and MTEB).

    A target is relevant if its grade is above 0; recall, reciprocal rank and average precision ignore the grade
    otherwise. nDCG's gain is the grade itself (`Järvelin and Kekäläinen 2002
    <https://doi.org/10.1145/582415.582418>`_): it is the sum of ``grade / log2(rank + 1)`` over the first ten, divided
    by that of all judged targets in order of grade. Grades of 0 and below gain nothing, as in trec_eval.

    :class:`~sentence_transformers.sentence_transformer.evaluation.InformationRetrievalEvaluator` ignores grades: if all
    are 1, its figures are the same, otherwise its nDCG differs. Two things follow that class, not trec_eval: average
    precision of a query with more than 100 relevant targets is divided by 100, and the mean leaves out queries without
    any, which trec_eval counts as 0.

    Args:
        grades: of the target at each rank, 0 if not relevant, ``(Q, depth)``, best first.
        total: how many relevant targets each query has, ``(Q,)``.
        best: each query's ten highest grades, highest first, 0 beyond the last, ``(Q, 10)``; by default all are 1.
    """
    depth = grades.shape[1]
    relevant = grades > 0
    if best is None:
        best = np.arange(10) < total[:, None]
    rank = np.arange(1, depth + 1)
    discount = 1 / np.log2(rank + 1)
    # Summed one by one, so that grades of 1 give bit-identical sums to no grades.
    ideal = np.cumsum(best * discount[:10], axis=1)[:, -1]
    first = np.where(relevant[:, :10].any(1), relevant[:, :10].argmax(1) + 1, np.inf)
    precision = np.cumsum(relevant, axis=1) / rank
    metrics = {f"recall@{k}": relevant[:, :k].sum(1) / total for k in RECALL_AT}
    metrics["mrr@10"] = 1 / first
    metrics["ndcg@10"] = (grades[:, :10] * discount[:10]).sum(1) / ideal
    metrics["map@100"] = (precision * relevant).sum(1) / np.minimum(total, depth)
    return {name: float(values.mean()) for name, values in metrics.items()}
