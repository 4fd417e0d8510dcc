"""A teacher that reads query and target together, and remembers what it has said."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn

from ..data.corpus import Corpus
from ..data.model_fingerprint import described_modules, max_lengths, weights_fingerprint
from ..errors import InputError, NonFiniteError
from ..runtime.precision import in_float32
from ..storage.fingerprint import digest_json
from .base import Teacher
from .queries import queries_of
from .store import ScoreStore


class CrossEncoderTeacher(Teacher):
    """A cross-encoder that scores a pair when it is asked for the first time, and remembers it across steps, epochs and
    runs. It is expensive: a step asks for every candidate of every query. With ``share_negatives=False`` and
    ``in_batch_negatives=False`` these are the positive and the query's own negatives.

    With several processes each scores the pairs of its own queries, and all of a machine share what they have scored.

    Args:
        cross_encoder: a :class:`~sentence_transformers.CrossEncoder`, or anything with its ``predict``.
        corpus: the targets, which are read titles and all.
        path: the file of the scores, on a local disk; None keeps them in memory.
        pairs: data sets whose queries it is to know, as for :meth:`EmbeddingTeacher.build`; by default the queries of
            all splits of the corpus.
        batch_size: pairs in one forward pass.
        identity: what identifies the model, for one that is no :class:`torch.nn.Module`; by default a digest of its
            weights, configuration and prompts.

    Raises:
        InputError: a model that is no module has no ``identity``, or the pairs have no keys.
        TeacherError: the file holds the scores of another model.
        StorageError: the file cannot be written.
    """

    everywhere = False

    def __init__(
        self,
        cross_encoder: Any,
        corpus: Corpus,
        path: str | os.PathLike[str] | None = None,
        pairs: Dataset | Sequence[Dataset] | None = None,
        *,
        batch_size: int = 64,
        identity: str | None = None,
    ) -> None:
        self.cross_encoder, self.corpus, self.batch_size = cross_encoder, corpus, batch_size
        data = [corpus.pairs(split) for split in corpus.splits] if pairs is None else pairs
        texts, keys = queries_of(data)
        self._texts = dict(zip(keys.tolist(), texts, strict=True))
        self._keys = np.sort(keys)
        if identity is None and path is not None and not isinstance(cross_encoder, nn.Module):
            raise InputError(
                f"What identifies this {type(cross_encoder).__name__} is unknown, and its scores are kept on disk: "
                "pass identity='…', a name that changes with it."
            )
        self.store = ScoreStore(path, identity or self._identity())
        self.pairs_scored = 0
        """Pairs that the model has scored here, as they were not in the store."""

    def _identity(self) -> str:
        model = self.cross_encoder
        if not isinstance(model, nn.Module):
            return type(model).__name__
        modules = list(model.children())
        settings = {name: repr(getattr(model, name, None)) for name in ("prompts", "default_prompt_name")}
        activation = type(getattr(model, "activation_fn", None)).__name__
        return digest_json(
            [described_modules(modules), max_lengths(modules), settings, activation, weights_fingerprint(modules)]
        )

    @property
    def identity(self) -> str:
        return self.store.identity

    @property
    def corpus_size(self) -> int:
        return len(self.corpus)

    def knows(self, queries: Tensor) -> Tensor:
        return torch.from_numpy(np.isin(queries.cpu().numpy(), self._keys)).to(queries.device)

    @in_float32
    def scores(self, queries: Tensor, rows: Tensor, wanted: Tensor | None = None) -> Tensor:
        asked = self.knows(queries).cpu()[:, None].expand(-1, len(rows))
        asked = asked if wanted is None else asked & wanted.cpu()
        query, column = (each.numpy() for each in asked.nonzero(as_tuple=True))
        keys, targets = queries.cpu().numpy()[query], rows.cpu().numpy()[column]
        scores = torch.full((len(queries), len(rows)), torch.nan, dtype=torch.float64)
        scores[query, column] = torch.from_numpy(self._score(keys, targets))
        return scores.float().to(rows.device)

    def _score(self, keys: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Scores of pairs, ``(n,), (n,) → (n,)``; what is missing in the store is computed and added."""
        digests = self.corpus.text_digests(rows)
        pairs, place = np.unique(np.stack([keys, digests]), axis=1, return_inverse=True)
        found = self.store.find(pairs[0], pairs[1])
        missing = np.flatnonzero(np.isnan(found))
        if len(missing):
            first = np.full(pairs.shape[1], -1)
            first[place.reshape(-1)] = np.arange(len(rows))
            texts = self.corpus.texts(rows[first[missing]])
            inputs = [(self._texts[int(key)], text) for key, text in zip(pairs[0, missing], texts, strict=True)]
            predicted = self.cross_encoder.predict(inputs, batch_size=self.batch_size, show_progress_bar=False)
            new = np.asarray(predicted, dtype=np.float64).reshape(len(missing), -1)
            if new.shape[1] != 1:
                raise InputError(
                    f"The cross-encoder says {new.shape[1]} numbers of each pair, expected one: take one with "
                    "num_labels=1."
                )
            if not np.isfinite(new).all():
                worst = inputs[int(np.flatnonzero(~np.isfinite(new[:, 0]))[0])]
                raise NonFiniteError(f"The cross-encoder's score is NaN or infinite, e.g. of {worst!r:.160}.")
            self.store.add(pairs[0, missing], pairs[1, missing], new[:, 0])
            self.pairs_scored += len(missing)
            found[missing] = new[:, 0]
        return found[place.reshape(-1)]

    def __repr__(self) -> str:
        return f"CrossEncoderTeacher({type(self.cross_encoder).__name__}, {len(self._keys):,} queries)"
