"""Finds the negatives of queries: the search, the rules and the checks of the loss, without the loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import similarity_fct_name
from torch import Tensor

from ..cache.embedding_cache import EmbeddingCache
from ..correctors import Corrector, IdentityCorrector
from ..data.corpus import Corpus
from ..data.encoding import DocumentEncoder, evaluating, prompt_for
from ..data.model_fingerprint import max_lengths, tokenizer_fingerprint, weights_fingerprint
from ..data.routing import QUERY, modules_for
from ..errors import InputError
from ..losses.corrected_corpus import CorrectedCorpus
from ..losses.similarity import Similarity
from ..negatives.filters import known_positives, pad_rows
from ..negatives.selector import NegativeSelector
from ..negatives.settings import NegativeSettings
from ..search.exact import CorrectedSearch
from ..search.topk import NO_ROW
from ..storage.fingerprint import differences, digest, digest_json

_SOME = 64  # rows by which a cache is known


class Mined(NamedTuple):
    """A query with what was found for it.

    Args:
        query: its position in the split.
        positives: corpus rows.
        negatives: corpus rows, the hardest first.
        positive_scores, negative_scores: similarities of these.
    """

    query: int
    positives: list[int]
    negatives: list[int]
    positive_scores: list[float]
    negative_scores: list[float]


class Miner:
    """Finds the negatives of queries; see :func:`.mine_negatives`."""

    def __init__(
        self,
        model: SentenceTransformer,
        corpus: Corpus,
        cache: EmbeddingCache | CorrectedCorpus,
        corrector: Corrector | None,
        settings: NegativeSettings,
        split: str,
        batch_size: int,
    ) -> None:
        self.model, self.corpus, self.settings, self.batch_size = model, corpus, settings, batch_size
        self.qrels = corpus.qrels(split)
        self.encoder = DocumentEncoder(model, corpus, progress=False)
        self._choosing: Callable[[], AbstractContextManager[CorrectedSearch]]
        written = ""
        if isinstance(cache, CorrectedCorpus):
            self._require_training(cache, corrector)
            self.similarity = cache.similarity
            self._choosing, stale, corrector = cache.choosing, cache.cache, cache.choosing_corrector
            written = _digest_of(cache.search.overlay.state_dict())
        else:
            self.similarity = Similarity(model)
            stale = cache
            self._require_fits(cache, corrector)
            corrector = corrector or IdentityCorrector(cache.dim, normalize=False)
            search = CorrectedSearch(cache, corrector, normalize=self.similarity.normalizes, withdrawn=corpus.withdrawn)
            self._choosing = lambda: nullcontext(search)
        self._dim = stale.dim
        scale = self.similarity.default_scale if settings.scale is None else settings.scale
        self._selector = NegativeSelector(settings, scale)
        asking, prompt = modules_for(model, QUERY), prompt_for(model, None, QUERY)
        some = torch.from_numpy(np.linspace(stale.first_row, stale.end - 1, _SOME).astype(np.int64))
        ids = list(self.qrels.queries["id"])
        self.fingerprint = {
            "queries": digest(digest_json([split, ids]), self.qrels.keys.tobytes()),
            "judgements": digest(self.qrels.query.tobytes(), self.qrels.row.tobytes()),
            "corpus": corpus.fingerprint,
            **({} if corpus.withdrawn_digest is None else {"withdrawn": corpus.withdrawn_digest}),
            "model": weights_fingerprint(asking),
            "prompt": [prompt, tokenizer_fingerprint(model, asking, prompt, QUERY), max_lengths(asking)],
            "similarity": similarity_fct_name(self.similarity.function),
            "cache": digest(stale[some].numpy().tobytes(), digest_json(stale.fingerprint), written),
            "corrector": digest(repr(corrector), _digest_of(corrector.state_dict())),
            "negatives": repr(settings),
            "checks": [check.identity for check in settings.false_negatives.checks],
        }

    def _require_training(self, corrected: CorrectedCorpus, corrector: Corrector | None) -> None:
        if corrector is not None:
            raise InputError("loss.corrected has its own corrector: leave corrector out.")
        if corrected.processes.size > 1:
            raise InputError(
                f"loss.corrected is spread over {corrected.processes.size} processes, and negatives are mined by one: "
                "mine after the run, in one process, with the trained model, the run's cache and its corrector, "
                "Corrector.from_pretrained(folder); or of a run without one with a cache of the trained model."
            )
        if not corrected.is_of(self.model, self.corpus):
            raise InputError(
                "loss.corrected is of another model or corpus than is mined with: pass the model and the corpus that "
                "the loss was made with."
            )
        if corrected.search.steps and isinstance(corrected.corrector, IdentityCorrector) and not corrected.is_fixed:
            raise InputError(
                "The run had no corrector: of targets that it has not encoded there are stale embeddings alone, which "
                "the trained model cannot be asked for. Pass a cache that this model has built, "
                "EmbeddingCache.build(model, corpus, path)."
            )

    def _require_fits(self, cache: EmbeddingCache, corrector: Corrector | None) -> None:
        self.corpus.require_rows("The cache", cache.corpus_size)
        expected = self.encoder.fingerprint(self.model, weights=corrector is None)
        found = {name: value for name, value in cache.fingerprint.items() if name in expected}
        if found and (different := differences(found, expected)):
            raise InputError(
                "The cache is of something else than what is mined with:\n  " + "\n  ".join(different) + "\nBuild it "
                "with this model and corpus, or pass the corrector that maps it to this model."
            )
        if corrector is None or corrector.frames is None:
            return
        sides = (
            ("of other embeddings than the cache's", corrector.frames.stale, cache.fingerprint),
            ("to another model", corrector.frames.fresh, self.encoder.fingerprint(self.model)),
        )
        for what, maps, given in sides:
            # It maps embeddings of any texts, such as those by which the corpus has grown since.
            if maps and given and (different := differences({**maps, "corpus": None}, {**given, "corpus": None})):
                raise InputError(f"The corrector maps {what}:\n  " + "\n  ".join(different))

    @torch.no_grad()
    def mine(self, queries: np.ndarray) -> Iterator[Mined]:
        """What is found for queries, by their positions in the split."""
        positives = [self.qrels.rows_of(query) for query in queries]
        texts = self.qrels.queries[queries]["text"]
        with evaluating(self.model):
            encoded = self.similarity.comparable(
                self.model.encode_query(
                    texts,
                    batch_size=self.batch_size,
                    convert_to_tensor=True,
                    show_progress_bar=False,
                    truncate_dim=self._dim,
                )
            )
        keys = torch.from_numpy(self.qrels.keys[queries]).to(encoded.device)
        with self._choosing() as search:
            scores = [self._scores(search, query, rows) for query, rows in zip(encoded, positives, strict=True)]
            lowest = [int(each.argmin()) for each in scores]
            labels = [int(rows[n]) for rows, n in zip(positives, lowest, strict=True)]
            known = known_positives(self.corpus, self.qrels, labels, keys.tolist())
            exclude = pad_rows([np.union1d(rows, more) for rows, more in zip(known, positives, strict=True)])
            selection = self._selector.select(
                search,
                encoded,
                exclude.to(encoded.device),
                torch.stack([each.min() for each in scores]).to(encoded.device),
                torch.tensor(labels, device=encoded.device),
                keys,
                lambda rows: self.similarity.comparable(self.encoder.encode(self.model, rows, self.batch_size)),
            )
            for n, query in enumerate(queries.tolist()):
                chosen = selection.rows[n][selection.rows[n] != NO_ROW]
                of_chosen = self._scores(search, encoded[n], chosen.cpu().numpy())
                yield Mined(query, positives[n].tolist(), chosen.tolist(), scores[n].tolist(), of_chosen.tolist())

    @staticmethod
    def _scores(search: CorrectedSearch, query: Tensor, rows: np.ndarray) -> Tensor:
        """Similarities of a query, ``(d,)``, and targets, ``(n,)``, by their corrected embeddings."""
        where = torch.from_numpy(np.asarray(rows, dtype=np.int64)).to(query.device)
        vectors: Tensor = search.corrector.to(query.device)(search.stale(where))
        return vectors @ query


def _digest_of(tensors: dict[str, Tensor]) -> str:
    """A digest of a state, bit by bit."""
    named = sorted((name, value.detach().cpu().contiguous()) for name, value in tensors.items())
    parts = ((name, value.view(-1).view(torch.uint8).numpy().tobytes()) for name, value in named)
    return digest(*(part for pair in parts for part in pair))
