"""All targets as the encoder would embed them now: the stale cache, the corrector, and what has been written back."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sentence_transformers import SentenceTransformer
from torch import Tensor

from ..cache.embedding_cache import EmbeddingCache
from ..correctors import Corrector, IdentityCorrector
from ..data.corpus import Corpus
from ..data.encoding import DocumentEncoder, unwrap
from ..errors import InputError
from ..negatives.filters import repeats_earlier
from ..runtime.distributed import Processes, checksum
from ..search.exact import CorrectedSearch, Found
from ..search.fidelity import staleness
from ..search.shortlist import ShortlistSearch
from ..storage.fingerprint import differences
from .checks import check_cache, require_finite
from .divergence import DivergenceWatch
from .settings import CorrectionSettings
from .similarity import Similarity
from .step_metrics import StepMetrics

logger = logging.getLogger(__name__)
_REFRESHED_AT_ONCE = 16_384
_ENCODED_AT_ONCE = 256  # texts without gradient; a GPU is not filled by fewer, and a step's own batch takes more memory
_SAME_EMBEDDING = 0.999  # cosine of what one encoder says of one text, twice, and what is left of it in 8 bits
_COMPARED_EVERY = 100  # steps between two comparisons of what the processes have learnt


class CorrectedCorpus:
    """All targets as the encoder would embed them now, ``h(𝓑)``: searched for negatives, and taught by what each step
    encodes. Loss, checkpoints, recorder and callbacks speak to it and to nothing inside it.

    Args:
        model: the encoder that is trained.
        encoder: its document side over the corpus.
        cache: the stale buffer 𝓑, of the whole corpus; each of several processes keeps its part.
        settings: how it is kept.
        similarity: how embeddings are compared.
        scale: the inverse temperature β of the task loss, for correctors that learn a softmax.
        processes: those that train together, each with a part of the cache.
        metrics: takes in what the steps measure.

    Raises:
        InputError: the cache is of another corpus or kind of encoder, or the corrector does not fit.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        encoder: DocumentEncoder,
        cache: EmbeddingCache,
        settings: CorrectionSettings,
        similarity: Similarity,
        scale: float,
        processes: Processes,
        metrics: StepMetrics,
    ) -> None:
        self._model, self.encoder, self.settings = model, encoder, settings
        self.similarity, self.scale = similarity, scale
        self.processes, self.metrics = processes, metrics
        self.steps = 0
        """Steps from which a corrector has learnt so far, across refreshes and restarts."""
        self.targets_reencoded = 0
        """Targets encoded for the cache alone so far, by :meth:`refresh`, in the background, or to judge a teacher."""
        self.refreshed = False
        """Whether :meth:`refresh` has replaced the cache."""
        self.diverged = False
        """Whether the corrector made things worse and was given up (``corrector_divergence``)."""
        self.writes_back = settings.write_back
        """Whether what a step encodes replaces stale embeddings; not where nothing goes stale."""
        self.is_fixed = False
        """Whether the document encoder is frozen and the cache is what it says: then nothing is encoded."""
        check_cache(cache, encoder.fingerprint(unwrap(model), weights=False))
        self._configured = settings.make_corrector(cache.dim, unit=similarity.unit)
        if encoder.is_frozen(model) and self._is_fresh(cache):
            logger.info("The document encoder is frozen: targets are looked up in the cache, and nothing is corrected.")
            self.is_fixed = True
            self._configured = IdentityCorrector(cache.dim, normalize=self._configured.normalize)
            self.writes_back = False
        if processes.size > 1 and len(cache) == len(encoder.corpus):
            cache = cache.part(processes.share(len(encoder.corpus)))
        self.divergence_watch = DivergenceWatch(processes)
        self.search = self._make_search(cache, self._configured)
        """The search over it; see :meth:`choosing`."""

    def is_of(self, model: SentenceTransformer, corpus: Corpus) -> bool:
        """Whether it is this model's over this corpus."""
        ours = self.encoder.corpus
        return (
            unwrap(self._model) is unwrap(model)
            and ours.fingerprint == corpus.fingerprint
            and ours.withdrawn_digest == corpus.withdrawn_digest
        )

    def __len__(self) -> int:
        """Number of targets, of all processes together."""
        return len(self.encoder.corpus)

    @property
    def cache(self) -> EmbeddingCache:
        """The stale embeddings, of this process's part of the corpus."""
        return self.search.cache

    @property
    def corrector(self) -> Corrector:
        """The corrector that learns."""
        return self.search.corrector

    # ------------------------------------------------------------------ reading

    @property
    def is_warming_up(self) -> bool:
        return self.steps < self.settings.corrector_warmup_steps

    @property
    def is_choosing(self) -> bool:
        """Whether a step takes negatives from it now: not during a warm-up with in-batch negatives."""
        return not (self.is_warming_up and self.settings.corrector_warmup_negatives == "in-batch")

    @property
    def choosing_corrector(self) -> Corrector:
        """The corrector by which negatives are chosen now; during the warm-up none, in effect."""
        return self._identity if self.is_warming_up else self.corrector

    @contextmanager
    def choosing(self) -> Iterator[CorrectedSearch]:
        """The search by which negatives are chosen now."""
        with self.search.choosing_by(self.choosing_corrector) as search:
            yield search

    def hardest(self, queries: Tensor, k: int, exclude: Tensor) -> Found:
        """The ``k`` targets that score highest with each query, as negatives are chosen now.

        Args:
            queries: ``f(x)``, ``(B, d)``.
            exclude: rows that a query must not get, ``(B, m)``, padded with −1.
        """
        with self.choosing() as search:
            return search.search(queries, k, exclude)

    def exact_search(self) -> CorrectedSearch:
        """An exact search by which negatives would be chosen now, which leaves the search of the training as it is."""
        search = CorrectedSearch(
            self.cache,
            self.choosing_corrector,
            normalize=self.similarity.normalizes,
            processes=self.processes,
            withdrawn=self.encoder.corpus.withdrawn,
        )
        search.overlay = self.search.overlay
        return search

    def stale(self, rows: Tensor) -> Tensor:
        """What the corrector sees of ``rows``, in the frame of the cache: float32, ``(n,) → (n, d)``."""
        return self.search.stale(rows)

    def cached(self, rows: Tensor) -> Tensor:
        """What the cache has of ``rows``, without what has been written back: float32, ``(n,) → (n, d)``."""
        return self.search.cached(rows)

    def corrected(self, rows: Tensor, by: Corrector | None = None) -> Tensor:
        """``h`` of ``rows``, by the corrector that learns or another one: float32, ``(n,) → (n, d)``."""
        return (by or self.corrector).to(rows.device)(self.stale(rows))

    def age(self, rows: Tensor) -> tuple[float, float]:
        """The share of ``rows`` that has been written back, and the mean age of their vectors in steps."""
        return self.search.age(rows)

    @torch.no_grad()
    def encode(self, rows: Sequence[int] | np.ndarray, batch_size: int = _ENCODED_AT_ONCE) -> Tensor:
        """``g(y)`` of ``rows`` by the model as it is now, comparable and without gradient, ``(n,) → (n, d)``; this
        process encodes all of them.
        """
        return self.similarity.comparable(self.encoder.encode(unwrap(self._model), rows, batch_size=batch_size))

    @torch.no_grad()
    def encode_together(self, rows: np.ndarray) -> Tensor:
        """The same, where each process encodes a share and all get the whole.

        Raises:
            NonFiniteError: an embedding is NaN or infinite.
        """
        processes = self.processes
        if self.is_fixed:
            return self.cached(torch.from_numpy(rows).to(unwrap(self._model).device))
        share = rows[processes.share(len(rows))]
        # All processes call the model, which may exchange something itself.
        fresh = self.encode(share if len(share) else rows[:1])
        fresh = processes.gather(fresh[: len(share)], [len(rows[each]) for each in processes.shares(len(rows))])
        return require_finite(fresh, "targets encoded without gradient", torch.from_numpy(rows))

    # ------------------------------------------------------------------ learning

    @torch.no_grad()
    def learn(self, rows: Tensor, fresh: Tensor, queries: Tensor) -> dict[str, Tensor]:
        """Let the corrector and the overlay learn what a step has encoded, and ``background_targets`` more.

        Args:
            rows: corpus rows, ``(n,)``; a row that occurs twice counts once.
            fresh: ``g(y)``, ``(n, d)``.
            queries: ``f(x)``, ``(B, d)``.

        Returns:
            What the corrector logs (:meth:`Corrector.fit_step`).

        Raises:
            NonFiniteError: the corrector has become NaN or infinite; it has learnt nothing from this step.
            ProcessError: the correctors of several processes differ.
        """
        if (count := self.settings.background_targets) and not self.is_fixed:
            kept = self._kept_rows
            background = torch.randint(len(self) if kept is None else len(kept), (count,))
            background = self.processes.broadcast((background if kept is None else kept[background]).to(rows.device))
            self.targets_reencoded += count
            rows = torch.cat([rows, background])
            fresh = torch.cat([fresh, self.encode_together(background.cpu().numpy())])
        # Positives that queries share were encoded twice, verified targets that were selected as well.
        once = ~repeats_earlier(rows)
        rows, fresh = rows[once], fresh[once]
        search, corrector = self.search, self.corrector.to(rows.device)
        stale, cached = search.stale(rows), search.cached(rows)
        corrected = corrector(stale)
        measured = staleness(cached, corrected, fresh)
        self.metrics.add(**measured)
        unseen = ~search.seen(rows)
        if self.writes_back and unseen.any():
            of_unseen = staleness(cached[unseen], corrected[unseen], fresh[unseen])
            self.metrics.add(corrected_error_unseen=of_unseen["corrected_error"])
        learnt = corrector.learn(stale, fresh, queries, self.scale)
        if self.writes_back:
            pulled = search.write_back(rows, fresh)
            self.metrics.add(pull_back_residual=pulled.residual.mean(), pull_back_damped=float(pulled.damped))
        search.steps += 1
        self.steps += 1
        if self.processes.size > 1 and self.steps % _COMPARED_EVERY == 0:
            learnt_so_far = checksum(corrector.state_dict()).to(rows.device)
            self.processes.require_same(learnt_so_far, f"The corrector after {self.steps} steps")
        if not isinstance(corrector, IdentityCorrector):
            self._watch(measured["drift"], measured["corrected_error"])
        return learnt

    def _watch(self, drift: Tensor, error: Tensor) -> None:
        """Give up a corrector that makes things worse."""
        found, gives_up = self.divergence_watch.add(drift, error), self.settings.corrector_divergence == "identity"
        if found is None:
            return
        logger.warning(
            "Over the last steps the error (1 - cos) of the corrected embeddings was %.3f, and that of the uncorrected "
            "cache %.3f: %r makes things worse. %s",
            found.error,
            found.drift,
            self.corrector,
            "Continuing without it." if gives_up else "It continues (corrector_divergence='warn').",
        )
        if gives_up:
            self.restart(diverged=True)

    @torch.no_grad()
    def refresh(self, batch_size: int = 256) -> None:
        """Encode all targets with the model as it is now, and choose negatives by these embeddings from here on.

        The new embeddings are held in memory, in the dtype and on the device of the old ones; a cache on disk does not
        change. The corrector, and what has been written back, start again: they belonged to the old embeddings.
        """
        old, model = self.cache, unwrap(self._model)
        starts = range(old.first_row, old.end, _REFRESHED_AT_ONCE)
        rows = (np.arange(start, min(start + _REFRESHED_AT_ONCE, old.end)) for start in starts)
        on_device = (self.encoder.encode(model, each, batch_size=batch_size).to(old.device) for each in rows)
        cache = EmbeddingCache.from_blocks(on_device, old.dtype, old.first_row, len(self), rows=len(old))
        self.targets_reencoded += len(self)
        self.refreshed = True
        self.search = self._make_search(cache, type(self.corrector)(**self.corrector.config))
        self.divergence_watch = DivergenceWatch(self.processes)

    def restart(self, diverged: bool) -> None:
        """Start again with an untrained corrector, or if it has ``diverged`` without one. What has been written back
        belonged to the one before, and goes with it.
        """
        age, self.diverged = self.search.steps, diverged
        corrector = self._identity if diverged else type(self._configured)(**self._configured.config)
        self.search = self._make_search(self.cache, corrector)
        self.search.steps = age
        self.divergence_watch = DivergenceWatch(self.processes)

    @functools.cached_property
    def _kept_rows(self) -> Tensor | None:
        """The rows that have not been withdrawn, ``(n,)``; None for all."""
        gone = self.encoder.corpus.is_withdrawn
        return None if gone is None else torch.from_numpy(np.flatnonzero(~gone))

    @functools.cached_property
    def _identity(self) -> IdentityCorrector:
        return IdentityCorrector(self.cache.dim, normalize=self.corrector.normalize)

    def _make_search(self, cache: EmbeddingCache, corrector: Corrector) -> CorrectedSearch:
        normalize, shortlist = self.similarity.normalizes, self.settings.shortlist
        withdrawn, processes = self.encoder.corpus.withdrawn, self.processes
        if shortlist is None:
            return CorrectedSearch(cache, corrector, normalize=normalize, processes=processes, withdrawn=withdrawn)
        return ShortlistSearch(
            cache, corrector, shortlist, normalize=normalize, processes=processes, withdrawn=withdrawn
        )

    @torch.no_grad()
    def _is_fresh(self, cache: EmbeddingCache) -> bool:
        """Whether the model says of some targets what the cache has of them; the same on all processes."""
        rows = np.linspace(cache.first_row, cache.end - 1, min(8, len(cache))).astype(np.int64)
        fresh = self.encoder.encode(unwrap(self._model), rows)
        others = F.cosine_similarity(cache[rows].to(fresh.device), fresh) < _SAME_EMBEDDING
        return int(self.processes.sum(others.sum())) == 0

    # ------------------------------------------------------------------ memory and state

    def memory(self, batch_size: int, k: int, written: int) -> dict[str, int]:
        """Bytes that searching and writing back take at most on the model's device, in addition to model and cache.

        Args:
            batch_size: queries of all processes in one step.
            k: how many targets a query is given.
            written: how many targets training encodes in all.
        """
        written = min(written, len(self)) if self.writes_back else 0
        return self.search.memory(batch_size, k, unwrap(self._model).device, rows_written=written)

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that a run needs to go on as if it had not been interrupted: tensors, and plain values. Each process has
        what was written back of its part, the first one the corrector as well; the cache stays where it is.
        """
        tensors = {f"overlay.{name}": value for name, value in self.search.overlay.state_dict().items()}
        if self.processes.rank == 0:
            tensors |= {f"corrector.{name}": value for name, value in self.corrector.state_dict().items()}
            tensors["divergence"] = self.divergence_watch.state
        return tensors, {
            **self._identified(),
            "steps": self.steps,
            "cache_age": self.search.steps,
            "refreshed": self.refreshed,
            "diverged": self.diverged,
            "targets_reencoded": self.targets_reencoded,
        }

    def load_state_dicts(self, parts: Sequence[tuple[dict[str, Tensor], dict[str, Any]]]) -> None:
        """Take over the states of all processes, in their order, of as many or of another number of processes.

        Where the cache had been refreshed it is refreshed again, by the model as it is now, and the corrector starts
        again: no checkpoint holds embeddings of the whole corpus.

        Raises:
            InputError: they are of another corrector, corpus or cache.
        """
        tensors, described = parts[0]
        if self.diverged != described["diverged"]:
            self.restart(described["diverged"])
        refreshed = described["refreshed"] or self.refreshed
        expected = json.loads(json.dumps(self._identified()))
        compared = ("corrector", "rows", "withdrawn") if refreshed else (*expected, "withdrawn")
        there, here = ({name: each.get(name) for name in compared} for each in (described, expected))
        if different := differences(there, here):
            raise InputError(
                "The checkpoint's corrector has learnt from something else:\n  " + "\n  ".join(different) + "\n"
                "Continue with the corrector, corpus and cache that the run began with. corrector='auto' goes by the "
                "plan of a run: name the one that it took then."
            )
        if refreshed:
            self.refresh()
        else:
            self.corrector.load_state_dict(_under("corrector.", tensors))
            self.search.overlay.load_state_dicts(_under("overlay.", each) for each, _ in parts)
            self.divergence_watch.state = tensors["divergence"]
            self.search.steps = described["cache_age"]
        self.steps, self.targets_reencoded = described["steps"], described["targets_reencoded"]

    def _identified(self) -> dict[str, Any]:
        return {
            "corrector": repr(self.corrector),
            "cache": self.cache.fingerprint,
            "rows": self.cache.corpus_size,
            **({} if (gone := self.encoder.corpus.withdrawn_digest) is None else {"withdrawn": gone}),
        }


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
