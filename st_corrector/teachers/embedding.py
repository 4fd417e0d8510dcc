"""A teacher that has embedded the corpus and the questions once: its score of any pair is a lookup and a product."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from torch import Tensor

from ..cache.arrays import Embeddings
from ..cache.embedding_cache import EmbeddingCache
from ..cache.folder import CacheFolder
from ..correctors import IdentityCorrector
from ..data.corpus import Corpus
from ..data.query_keys import is_own
from ..errors import InputError
from ..runtime.precision import in_float32
from ..search.exact import CorrectedSearch
from ..storage.fingerprint import digest, digest_json
from .base import Teacher
from .queries import queries_of

logger = logging.getLogger(__name__)
_SIMILARITIES = ("cosine", "dot")
_SOME = 64  # vectors by which a teacher is known


class EmbeddingTeacher(Teacher):
    """A frozen embedder that has embedded all targets and the questions once. A step gathers the candidates' vectors
    from the memory-mapped file and multiplies once.

    Make one with :meth:`build`, or of vectors that exist, such as a served index or an API's embeddings.

    Args:
        targets: a cache, or vectors in any form that :meth:`EmbeddingCache.from_tensor` takes, ``(N, d)``; row ``i`` is
            target ``i`` of the corpus.
        queries: likewise, ``(Q, d)``.
        keys: the queries' keys, in their order (:func:`~st_corrector.data.query_keys.query_keys`,
            ``corpus.qrels(split).keys``).
        similarity: how the embedder's vectors are compared, ``"cosine"`` or ``"dot"``.
        withdrawn: rows of targets that are no longer there (``corpus.withdrawn``).

    Raises:
        InputError: the shapes do not fit, or ``similarity`` is something else.
    """

    def __init__(
        self,
        targets: EmbeddingCache | Embeddings,
        queries: EmbeddingCache | Embeddings,
        keys: Sequence[int] | np.ndarray,
        similarity: str = "cosine",
        withdrawn: Sequence[int] | np.ndarray = (),
    ) -> None:
        self.targets, self.queries = (
            each if isinstance(each, EmbeddingCache) else EmbeddingCache.from_tensor(each)
            for each in (targets, queries)
        )
        if self.targets.dim != self.queries.dim or len(keys) != len(self.queries):
            raise InputError(
                f"Targets are {self.targets.dim} wide, the {len(self.queries)} queries {self.queries.dim}, with "
                f"{len(keys)} keys: both must be of one embedder, and each query needs its key."
            )
        self.similarity, self.withdrawn = _require_similarity(similarity), withdrawn
        keys = np.asarray(keys, dtype=np.int64)
        self._order = np.argsort(keys, kind="stable")
        self._keys = keys[self._order]

    @classmethod
    def build(
        cls,
        model: SentenceTransformer,
        corpus: Corpus,
        path: str | os.PathLike[str],
        pairs: Dataset | Sequence[Dataset],
        *,
        query_prompt: str | None = None,
        document_prompt: str | None = None,
        batch_size: int = 64,
        dtype: str = "float16",
        progress: bool = True,
    ) -> EmbeddingTeacher:
        """Embed all targets, and the queries of some training data, with ``model``, into the folder ``path``.

        What is there already is loaded, what was interrupted goes on (:meth:`EmbeddingCache.build`), and of a corpus
        that has grown only what is new is embedded (:meth:`EmbeddingCache.extend`). With several processes all call it.

        Args:
            model: any SentenceTransformer, with its own dimension, pooling and prompts, a ``Router`` as well.
            pairs: data sets of :meth:`.Corpus.pairs` and :meth:`.Corpus.own_pairs`, whose queries it is to know. Those
                of an evaluation may be among them.
            query_prompt: precedes queries; by default what ``model.encode_query`` would take.
            document_prompt: precedes targets; by default what ``model.encode_document`` would take.
            batch_size: texts in one forward pass.
            dtype: in which vectors are stored.
            progress: show a progress bar.

        Raises:
            InputError: the pairs have no keys in their labels, or the model compares by something else than cosine or
                dot product.
            CacheError: ``path`` holds the vectors of another model or corpus.
            NonFiniteError: an embedding is NaN or infinite in that dtype.
            StorageError: the disk has no room for them, or cannot be written to.
        """
        similarity = _require_similarity(model.similarity_fn_name)
        texts, keys = queries_of(pairs)
        folder = Path(path)
        settings: dict[str, Any] = {"batch_size": batch_size, "dtype": dtype, "progress": progress}
        of_targets = corpus.with_prompt(document_prompt)
        if CacheFolder(folder / "targets").is_finished and len(EmbeddingCache.load(folder / "targets")) < len(corpus):
            targets = EmbeddingCache.extend(model, of_targets, folder / "targets", batch_size, progress)
        else:
            targets = EmbeddingCache.build(model, of_targets, folder / "targets", **settings)
        parts = []
        # Own questions apart: other ones are drawn in other runs, while those of a split stay.
        for some in filter(len, np.split(np.arange(len(keys)), [np.count_nonzero(~is_own(keys))])):
            of_queries = Corpus.from_texts([texts[n] for n in some], prompt=query_prompt, cache_dir=corpus.cache_dir)
            # By the texts: a key is that of all texts that differ in case or white space alone.
            path_of_part = folder / f"queries-{digest_json([texts[n] for n in some])[:12]}"
            parts.append(EmbeddingCache.build(model, of_queries, path_of_part, task="query", **settings))
        return cls(targets, EmbeddingCache.joined(parts), keys, similarity, corpus.withdrawn)

    @property
    def identity(self) -> str:
        """A digest of some of its targets' vectors, whatever queries it knows."""
        some = np.linspace(0, len(self.targets) - 1, _SOME).astype(np.int64)
        return digest(self.targets[torch.from_numpy(some)].numpy().tobytes(), self.similarity)

    @property
    def corpus_size(self) -> int:
        return len(self.targets)

    def require_corpus(self, corpus: Corpus) -> None:
        corpus.require_rows("The teacher", self.corpus_size, self.targets.fingerprint.get("corpus"))

    def _places(self, queries: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Of each key whether it is known, and its place among the queries."""
        wanted = queries.cpu().numpy()
        found = np.searchsorted(self._keys, wanted).clip(max=len(self._keys) - 1)
        return self._keys[found] == wanted, self._order[found]

    def knows(self, queries: Tensor) -> Tensor:
        return torch.from_numpy(self._places(queries)[0]).to(queries.device)

    def query_vectors(self, queries: Tensor) -> Tensor:
        """What it has embedded, as it compares them: ``(B,) → (B, d)``; NaN where it does not know the key."""
        known, places = self._places(queries)
        vectors = self._comparable(self.queries[torch.from_numpy(places)].to(queries.device))
        return vectors.masked_fill(~torch.from_numpy(known).to(queries.device)[:, None], torch.nan)

    def target_vectors(self, rows: Tensor) -> Tensor:
        """What it has embedded, as it compares them: ``(n,) → (n, d)``."""
        return self._comparable(self.targets[rows.cpu()].to(rows.device))

    @in_float32
    def scores(self, queries: Tensor, rows: Tensor, wanted: Tensor | None = None) -> Tensor:
        return self.query_vectors(queries.to(rows.device)) @ self.target_vectors(rows).T

    def best_rows(self, queries: Tensor, exclude: Tensor, k: int) -> Tensor | None:
        ours = self.query_vectors(queries).nan_to_num(0.0)
        unchanged = IdentityCorrector(self.targets.dim, normalize=False)
        is_cosine = self.similarity == "cosine"
        search = CorrectedSearch(self.targets, unchanged, normalize=is_cosine, withdrawn=self.withdrawn)
        return search.search(ours, k, exclude).rows

    def _comparable(self, vectors: Tensor) -> Tensor:
        return F.normalize(vectors, dim=-1) if self.similarity == "cosine" else vectors

    def __repr__(self) -> str:
        return f"EmbeddingTeacher({self.corpus_size:,} targets, {len(self.queries):,} queries, d={self.targets.dim})"


def _require_similarity(name: str) -> str:
    if name not in _SIMILARITIES:
        raise InputError(
            f"similarity must be {' or '.join(map(repr, _SIMILARITIES))}, got {name!r}: by it a teacher's vectors are "
            "compared."
        )
    return name
