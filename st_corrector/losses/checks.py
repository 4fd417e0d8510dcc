"""What the loss refuses: settings that do not fit, and batches that would teach something wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import AdaptiveLayerLoss
from torch import Tensor, nn

from ..cache.embedding_cache import EmbeddingCache
from ..data.corpus import Corpus
from ..data.encoding import DocumentEncoder, unwrap
from ..data.qrels import Qrels
from ..data.query_keys import UNKNOWN
from ..data.routing import DOCUMENT, QUERY, modules_for
from ..data.tokens import TextCorpus, TokenizedCorpus
from ..errors import InputError, NonFiniteError
from ..negatives.settings import NegativeSettings
from ..search.topk import NO_ROW
from ..storage.fingerprint import differences

LAYERS = (
    "AdaptiveLayerLoss and Matryoshka2dLoss ask a loss once for each layer of the encoder, while negatives are chosen "
    "once a step, by embeddings of the last layer: train with this loss alone, or in MatryoshkaLoss."
)
_COLUMNS = {QUERY: "queries", DOCUMENT: "targets"}


def check_settings(corpus: Corpus, cache: EmbeddingCache | None, settings: NegativeSettings) -> None:
    """Refuse a cache of another size or corpus, and a split that the corpus lacks."""
    if settings.num_negatives and cache is None:
        raise InputError("Negatives are chosen by a cache: pass EmbeddingCache.build(model, corpus, path).")
    if cache is not None and not isinstance(cache, EmbeddingCache):
        raise InputError(
            f"cache must be an EmbeddingCache, got a {type(cache).__name__}: EmbeddingCache.load(path) opens a folder, "
            "EmbeddingCache.from_tensor(embeddings) wraps vectors."
        )
    if cache is not None:
        corpus.require_rows("The cache", cache.corpus_size)
    split = settings.train_split
    if other := [check for check in settings.false_negatives.checks if check.split not in (None, split)]:
        raise InputError(
            f"{other[0]!r} knows the queries of split {other[0].split!r}, the loss is trained on {split!r}: make both "
            "with the same."
        )
    if corpus.splits and split is not None and split not in corpus.splits:
        raise InputError(
            f"The corpus has no split {split!r}, it has {corpus.splits}: pass the one that is trained on as "
            "train_split, or None if its judgements are not in the corpus."
        )


def check_cache(cache: EmbeddingCache, expected: dict[str, Any]) -> None:
    """Refuse a cache of another corpus or kind of encoder. Other weights are what a stale cache is about."""
    found = {component: value for component, value in cache.fingerprint.items() if component != "weights"}
    if found and (different := differences(found, expected)):
        raise InputError(
            "The cache was built of something else than what is trained:\n  " + "\n  ".join(different) + "\nBuild the "
            "cache again with this model and corpus (or set the model's prompts and max_seq_length before it is built)."
        )


def refuse_layers(model: nn.Module) -> None:
    """Refuse a step inside of ``AdaptiveLayerLoss``, which asks its loss once for each of the encoder's layers."""
    if type(unwrap(model).forward).__module__ == AdaptiveLayerLoss.__module__:
        raise InputError(LAYERS)


def with_task(encoder: DocumentEncoder, model: nn.Module, features: dict[str, Any], task: str) -> dict[str, Any]:
    """The features of a column, with its ``task`` where the model depends on that and the trainer has not said it."""
    if not encoder.by_task:
        return features
    if "task" not in features:  # behind a shared encoder: the texts are prepared alike
        return {**features, "task": task}
    if (given := features["task"]) is None:
        raise InputError(
            f"The model has a Router, and a column was prepared without saying that it holds {_COLUMNS[task]}: pass "
            "router_mapping={'anchor': 'query', 'positive': 'document'} (by the data set's columns) in the arguments, "
            "or model.preprocess(texts, task=…) in a loop of your own."
        )
    inner = unwrap(model)
    if task == DOCUMENT and given != DOCUMENT and modules_for(inner, given) != modules_for(inner, DOCUMENT):
        raise InputError(
            f"The positives go by the route of the task {given!r}, targets in the cache by that of 'document': map the "
            "column of the positives to 'document' in router_mapping."
        )
    return features


def require_finite(embeddings: Tensor, what: str, rows: Tensor | None = None) -> Tensor:
    finite = torch.isfinite(embeddings.detach()).all(-1)
    if not finite.all():
        bad = (~finite).nonzero().flatten()
        where = (
            f"positions {bad[:5].tolist()}" if rows is None else f"corpus rows {rows.to(bad.device)[bad[:5]].tolist()}"
        )
        raise NonFiniteError(
            f"The embeddings of {len(bad)} of {len(embeddings)} {what} are NaN or infinite ({where}). Training has "
            "diverged or a text breaks the encoder: lower the learning rate, clip gradients, or look at these texts."
        )
    return embeddings


class Labels(NamedTuple):
    """What a batch's labels say.

    Args:
        rows: corpus rows of the positives, ``(b,)``.
        keys: of the queries, ``(b,)``; −1 where nothing tells them.
        explicit: rows that the data names as negatives of each query, ``(b, m)``, padded with −1.
    """

    rows: Tensor
    keys: Tensor
    explicit: Tensor


def check_labels(
    encoder: DocumentEncoder,
    model: SentenceTransformer,
    labels: Tensor | None,
    positives: dict[str, Any],
    negatives: Sequence[dict[str, Any]],
    qrels: Qrels | None,
) -> Labels:
    """The labels of a batch, if its rows are of the corpus, the positives their texts, and the negatives targets.

    Args:
        positives: features of the positives.
        negatives: those of each column of negatives.
        qrels: of the split that is trained on: by them the query of a positive that is relevant to one alone is known,
            where labels do not tell it.
    """
    if labels is None:
        raise InputError(
            "The dataset has no 'label' column. It must hold the corpus row of each positive, and should hold the key "
            "of its query; corpus.pairs(split) gives such a dataset, corpus.labels(ids, queries) such a column."
        )
    integers = not (labels.is_floating_point() or labels.dtype == torch.bool)
    if not integers or not (labels.ndim == 1 or (labels.ndim == 2 and labels.shape[1] >= 2)):
        raise InputError(
            "Labels must be integers: one corpus row for each pair, or [corpus row, key of the query], and then rows "
            f"of negatives; got {labels.dtype} of shape {tuple(labels.shape)}."
        )
    keys, explicit = None, labels.new_empty(len(labels), 0)
    if labels.ndim == 2:
        labels, keys, explicit = labels[:, 0], labels[:, 1], labels[:, 2:]
    outside = (labels < 0) | (labels >= len(encoder.corpus))
    if outside.any():
        position = int(outside.nonzero()[0])
        raise InputError(
            f"Label {int(labels[position])} (position {position} in the batch) is no row of the corpus, whose rows "
            f"are 0 … {len(encoder.corpus) - 1}. Labels are the positives' corpus rows: see corpus.rows_of(ids)."
        )
    if (gone := _are_withdrawn(encoder, labels)).any():
        raise InputError(
            f"{int(gone.sum())} positives of the batch have been withdrawn from the corpus, e.g. row "
            f"{int(labels[gone][0])}: take pairs of the corpus as it is now, corpus.pairs(split)."
        )
    tokens = encoder.tokens
    if isinstance(tokens, TokenizedCorpus) and "input_ids" in positives:
        _check_positive_texts(encoder, model, tokens, positives, labels)
    if keys is None:
        keys = (
            torch.full_like(labels, UNKNOWN) if qrels is None else torch.from_numpy(qrels.keys_of_rows(labels.tolist()))
        )
    found = [_rows_of(encoder, model, tokens, each).to(labels.device)[:, None] for each in negatives]
    explicit = torch.cat([explicit, *found], dim=1)
    if explicit.shape[1]:
        _check_explicit(encoder, labels, explicit)
        explicit = explicit.masked_fill(_are_withdrawn(encoder, explicit), NO_ROW)
    return Labels(labels, keys.to(labels.device), explicit)


def _are_withdrawn(encoder: DocumentEncoder, rows: Tensor) -> Tensor:
    """Which of some rows, −1 for none, have been withdrawn."""
    mask = encoder.corpus.is_withdrawn
    if mask is None:
        return torch.zeros_like(rows, dtype=torch.bool)
    return torch.from_numpy(mask[rows.clamp(min=0).cpu().numpy()]).to(rows.device) & (rows != NO_ROW)


def _check_explicit(encoder: DocumentEncoder, labels: Tensor, explicit: Tensor) -> None:
    """Refuse negatives that are no rows, or the positive itself."""
    outside = (explicit < NO_ROW) | (explicit >= len(encoder.corpus))
    if outside.any():
        position, column = outside.nonzero()[0].tolist()
        raise InputError(
            f"The negative {int(explicit[position, column])} (position {position} in the batch) is no row of the "
            f"corpus, whose rows are 0 … {len(encoder.corpus) - 1}; −1 stands for none. corpus.labels(ids, queries, "
            "negatives) makes such labels of ids."
        )
    own = (explicit == labels[:, None]).any(1)
    if own.any():
        position = int(own.nonzero()[0])
        raise InputError(
            f"Row {int(labels[position])} is the positive and a negative of the query at position {position} in the "
            "batch: leave it out of one of both."
        )


def _rows_of(
    encoder: DocumentEncoder, model: SentenceTransformer, tokens: TokenizedCorpus | TextCorpus, features: dict[str, Any]
) -> Tensor:
    """The corpus rows of a column of texts, by their token ids, ``(b,)``."""
    if not isinstance(tokens, TokenizedCorpus):
        raise InputError(
            "Which targets the texts of negatives are cannot be told, as this model's features are no token ids: name "
            "them by id, corpus.labels(ids, queries, negatives), and leave their texts out."
        )
    on_cpu = {key: value.cpu() if isinstance(value, Tensor) else value for key, value in features.items()}
    rows = tokens.rows_of(on_cpu)
    if (rows == NO_ROW).any():
        flat, lengths = tokens.layout.split(on_cpu)
        position = int(np.flatnonzero(rows == NO_ROW)[0])
        text = np.split(flat["input_ids"], np.cumsum(lengths)[:-1])[position]
        raise InputError(
            f"The negative at position {position} in the batch is no target of the corpus: "
            f"{unwrap(model).tokenizer.decode(text)!r:.160}. Negatives are encoded once for all queries, and so must "
            "be targets: Corpus.from_pairs(…, negatives=…) takes them in. They need the same prompt as the positives, "
            f"{encoder.prompt!r} here, and the same maximum length."
        )
    return torch.from_numpy(rows)


def _check_positive_texts(
    encoder: DocumentEncoder,
    model: SentenceTransformer,
    tokens: TokenizedCorpus,
    features: dict[str, Any],
    labels: Tensor,
) -> None:
    """A positive that is not the text of its row would teach the corrector, and mask the negatives, wrongly."""
    on_cpu = {key: value.cpu() if isinstance(value, Tensor) else value for key, value in features.items()}
    given, given_lengths = tokens.layout.split(on_cpu)
    expected, expected_lengths = tokens.layout.split(tokens.features(labels.tolist()))
    if np.array_equal(given_lengths, expected_lengths) and np.array_equal(given["input_ids"], expected["input_ids"]):
        return
    ours = np.split(given["input_ids"], np.cumsum(given_lengths)[:-1])
    theirs = np.split(expected["input_ids"], np.cumsum(expected_lengths)[:-1])
    position = next(n for n in range(len(labels)) if not np.array_equal(ours[n], theirs[n]))
    row, positive, target = int(labels[position]), ours[position], theirs[position]
    tokenizer = unwrap(model).tokenizer
    raise InputError(
        f"The positive at position {position} in the batch is not the text of corpus row {row}, to which its "
        f"label points.\n  positive ({len(positive)} tokens): {tokenizer.decode(positive)!r:.160}\n"
        f"  row {row} ({len(target)} tokens): {tokenizer.decode(target)!r:.160}\n"
        "Either the labels are wrong, or the two are prepared differently. They need the same prompt: the corpus "
        f"has {encoder.prompt!r}, which comes from Corpus(…, prompt=…) or else model.prompts['document'] as "
        "it is when the cache is built; the trainer has that of args.prompts={<positive column>: …}. They need the "
        "same maximum length, and title and text joined as in corpus.texts(rows). corpus.pairs(split) gives such "
        "pairs."
    )
