"""Encoding a corpus into the folder of a cache: built, extended by what is new, or repaired.

Every process encodes its share of the missing shards, each written whole; the first one handles the folder. What was
killed goes on after the last finished shard.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from sentence_transformers import SentenceTransformer
from tqdm.auto import tqdm

from ..data.corpus import Corpus
from ..data.encoding import DocumentEncoder, QueryEncoder
from ..data.routing import DOCUMENT, QUERY
from ..errors import CacheError, NonFiniteError
from ..runtime.distributed import Processes
from ..storage.fingerprint import differences
from .folder import MOST_SHARDS, CacheFolder, Description
from .shard import DTYPES, Shard

logger = logging.getLogger(__name__)


def build(
    model: SentenceTransformer,
    corpus: Corpus,
    path: Path,
    batch_size: int,
    dtype: str,
    shard_size: int,
    progress: bool,
    task: str = DOCUMENT,
) -> None:
    """Encode every target into the folder ``path``, or what is missing there; see :meth:`.EmbeddingCache.build`."""
    if dtype not in DTYPES:
        raise CacheError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}.")
    if batch_size < 1 or shard_size < 1:
        raise CacheError(f"batch_size and shard_size must be at least 1, got {batch_size} and {shard_size}.")
    if len(corpus) > shard_size * MOST_SHARDS:
        raise CacheError(f"{len(corpus):,} targets in shards of {shard_size} are too many files: raise shard_size.")
    processes, folder = Processes.current(), CacheFolder(path)
    encoder = _encoder(model, corpus, progress, task)
    dim = encoder.encode(model, [0]).shape[1]
    wanted = Description(len(corpus), dim, dtype, shard_size, encoder.fingerprint(model))
    # The first process handles the folder; an error in one stops all.
    with ExitStack() as held:
        with processes.together("Beginning the cache"):
            if processes.rank == 0 and folder.is_finished:
                _refuse_smaller(folder, corpus)
                _require(folder, wanted)
            elif processes.rank == 0:
                held.enter_context(folder.locked())
                folder.begin(wanted)
        with processes.together("Looking for the cache that process 0 has begun, on a file system that all share,"):
            description = folder.description()
            missing = [] if folder.is_finished else folder.missing(description)
        _encode(folder, description, missing, model, encoder, batch_size, progress, "Building the cache")
        with processes.together("Finishing the cache"):
            if processes.rank == 0 and not folder.is_finished:
                folder.finish(description)


def extend(
    model: SentenceTransformer, corpus: Corpus, path: Path, batch_size: int, progress: bool, task: str = DOCUMENT
) -> None:
    """Encode what the corpus has behind the cache's targets; see :meth:`.EmbeddingCache.extend`."""
    if batch_size < 1:
        raise CacheError(f"batch_size must be at least 1, got {batch_size}.")
    processes, folder = Processes.current(), CacheFolder(path)
    encoder = _encoder(model, corpus, progress, task)
    now = encoder.fingerprint(model)
    with ExitStack() as held:
        with processes.together("Beginning to extend the cache"):
            if processes.rank == 0:
                _require_beginning(folder, corpus, now)
                held.enter_context(folder.locked())
        # What an earlier extension has begun is finished first, where the corpus has grown further since.
        while True:
            wanted: Description | None = None
            with processes.together("Beginning to extend the cache"):
                if processes.rank == 0:
                    # Once more, as another process may have extended it before the lock was free.
                    _require_beginning(folder, corpus, now)
                    if (wanted := _extended(folder, corpus)) is None:
                        folder.forget_extension()
                    else:
                        folder.begin_extension(wanted)
            # The first process decides: others may see an older state of a shared file system.
            if (told := processes.told(wanted and wanted.record())) is None:
                return
            with processes.together("Looking for the cache that process 0 extends, on a file system that all share,"):
                begun = folder.being_extended()
                if begun is None or begun.record() != told:
                    raise CacheError(f"{folder.path} is here another folder than that which process 0 extends.")
                missing = folder.missing(begun)
            _encode(folder, begun, missing, model, encoder, batch_size, progress, "Extending the cache")
            with processes.together("Finishing the extended cache"):
                if processes.rank == 0:
                    folder.finish_extension(begun)


def repair(model: SentenceTransformer, corpus: Corpus, path: Path, batch_size: int) -> None:
    """Encode again what is damaged or missing; see :meth:`.EmbeddingCache.repair`."""
    folder, processes = CacheFolder(path), Processes.current()
    with processes.together("Looking for damage"):
        found = folder.description()
        if processes.rank == 0:
            encoder = DocumentEncoder(model, corpus)
            folder.require(replace(found, rows=len(corpus), fingerprint=encoder.fingerprint(model)))
            with folder.locked():
                if damaged := folder.damaged():
                    logger.warning("Encoding again:\n  %s", "\n  ".join(damaged.values()))
                    folder.reopen(list(damaged))
    build(model, corpus, path, batch_size, found.dtype, found.shard_size, True)


def _encoder(model: SentenceTransformer, corpus: Corpus, progress: bool, task: str) -> DocumentEncoder:
    return (QueryEncoder if task == QUERY else DocumentEncoder)(model, corpus, progress=progress)


def _encode(
    folder: CacheFolder,
    description: Description,
    missing: list[int],
    model: SentenceTransformer,
    encoder: DocumentEncoder,
    batch_size: int,
    progress: bool,
    what: str,
) -> None:
    """Encode and write this process's share of the missing shards, in step with the others."""
    processes, corpus = Processes.current(), encoder.corpus
    progress = progress and processes.rank == 0
    with tqdm(total=len(corpus), desc=what, unit=" targets", disable=not progress) as bar:
        bar.update(len(corpus) - sum(len(description.rows_of(number)) for number in missing))
        with processes.together(what):
            for number in missing[processes.rank :: processes.size]:
                rows = np.asarray(description.rows_of(number))
                # Checked in the stored dtype: float16 overflows at 65,504.
                embeddings = encoder.encode(model, rows, batch_size=batch_size, bar=bar)
                stored = Shard.store(embeddings.cpu(), DTYPES[description.dtype])
                if len(bad := rows[stored.not_finite().numpy()]):
                    raise NonFiniteError(
                        f"The embeddings of {len(bad)} targets are NaN or infinite, e.g. rows {bad[:3].tolist()} "
                        f"(ids {corpus.ids(bad[:3])}), in {description.dtype}: check the model's weights, or choose "
                        "another dtype."
                    )
                folder.write(description, number, stored)
        bar.update(len(corpus) - bar.n)  # what the others have done


def _begins_with(corpus: Corpus, found: Description) -> bool:
    """Whether the corpus begins with the targets of a cache that has a corpus's fingerprint."""
    return found.rows <= len(corpus) and found.fingerprint.get("corpus") == corpus.fingerprint_of(found.rows)


def _require(folder: CacheFolder, wanted: Description) -> None:
    """Refuse a finished cache that is neither what is wanted, nor was it before it was extended."""
    found = folder.description()
    if found.stage(wanted.rows, wanted.fingerprint["corpus"]) is not None:
        found = replace(
            found, rows=wanted.rows, fingerprint={**found.fingerprint, "corpus": wanted.fingerprint["corpus"]}
        )
    folder.require(wanted, found)


def _refuse_smaller(folder: CacheFolder, corpus: Corpus) -> None:
    """Say of a finished cache that it lacks what the corpus has grown by."""
    found = folder.description()
    if found.rows < len(corpus) and _begins_with(corpus, found):
        raise CacheError(
            f"{folder.path} holds a cache of the first {found.rows:,} of the {len(corpus):,} targets: "
            "EmbeddingCache.extend (or `st-corrector cache extend`) encodes the others and adds them. Build into "
            "another folder to keep both."
        )


def _require_beginning(folder: CacheFolder, corpus: Corpus, now: dict[str, Any]) -> None:
    """Refuse a cache that the corpus does not begin with.

    Args:
        now: the fingerprint of encoder and corpus.
    """
    found = folder.description()
    if not folder.is_finished:
        raise CacheError(
            f"The cache in {folder.path} is not finished: EmbeddingCache.build with the corpus that it was begun with "
            "completes it. Then extend it."
        )
    if not _begins_with(corpus, found) and found.stage(len(corpus), corpus.fingerprint) is None:
        raise CacheError(
            f"{folder.path} holds a cache of {found.rows:,} targets, and the {len(corpus):,} of the corpus do not "
            "begin with the same texts in the same order: new targets belong behind those that are there "
            "(Corpus.extend puts them there). Build a cache of this corpus in another folder."
        )
    # Whatever a text's embedding depends on.
    if different := differences({**found.fingerprint, "corpus": None}, {**now, "corpus": None}):
        raise CacheError(
            f"The cache in {folder.path} is of another encoder:\n  " + "\n  ".join(different) + "\nExtend it by the "
            "model that it was built by, or build a cache of this one in another folder."
        )


def _extended(folder: CacheFolder, corpus: Corpus) -> Description | None:
    """What the finished cache becomes next: what was begun, if the corpus begins with that, or else all of the corpus;
    None if it has that already.
    """
    found, begun = folder.description(), folder.being_extended()
    if found.rows >= len(corpus):
        return None
    if begun is not None and _begins_with(corpus, begun):
        fingerprint = {**begun.fingerprint, "corpus": found.fingerprint["corpus"]}
        if fingerprint == found.fingerprint and begun.earlier == found.extended(begun.rows, "").earlier:
            return begun
    return found.extended(len(corpus), corpus.fingerprint)
