"""The token ids of every target, prepared once and kept on disk.

Tokenizing is the slowest part of a training step after the encoder itself, and negatives chosen from the corpus would
be tokenized repeatedly. Here the model's own ``preprocess`` runs once over the corpus; its padding is removed, the ids
go into an Arrow file, and a step only gathers rows and pads them again, or puts them one after the other where the
model reads them so (FlashAttention). A probe of ``preprocess`` shows the keys, the padding side and the padding values,
so the features are the library's for any tokenizer; on some of the corpus's texts they are compared with the library's.
If they would differ (token weights, one number per text), the texts are tokenized again at each step
(:class:`TextCorpus`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset, concatenate_datasets
from sentence_transformers import SentenceTransformer
from torch import Tensor
from tqdm.auto import tqdm

from ..storage.arrow import read_or_write_arrow
from ..storage.fingerprint import digest_json
from .model_fingerprint import max_lengths, tokenizer_fingerprint
from .routing import DOCUMENT, modules_for
from .targets import as_rows

if TYPE_CHECKING:
    from .corpus import Corpus

logger = logging.getLogger(__name__)

_BOUNDS = "cu_seq_lens_q"  # where each text ends, in flattened features
_AT_ONCE = 1_000  # texts that are tokenized in one call
# Two texts of clearly different length under any tokenizer: their batch shows the padding.
_PROBE = ["a", "A much longer text, which takes many more tokens than the first one in any vocabulary."]


@dataclass(frozen=True)
class TokenLayout:
    """How a model's ``preprocess`` lays out a batch of texts.

    Args:
        keys: the per-token keys that are stored, ``input_ids`` first.
        padding: the value each key has at padded positions; None for a flat stream of ids with
            ``offsets`` (:class:`~sentence_transformers.sentence_transformer.modules.StaticEmbedding`).
        pad_left: whether short rows are padded on the left.
        mask_dtype: of ``attention_mask``.
        constants: keys that are the same for every batch (``modality``, ``task``, ``prompt_length``).
        flattener: the module that puts texts one after the other, without padding, for FlashAttention; None for padded
            texts.
    """

    keys: tuple[str, ...]
    padding: dict[str, int] | None
    pad_left: bool
    mask_dtype: torch.dtype
    constants: dict[str, Any]
    flattener: Any = None

    @classmethod
    def probe(cls, model: SentenceTransformer, prompt: str | None) -> TokenLayout | None:
        """The layout of ``model.preprocess``, or None if its features cannot be split into rows."""
        features = model.preprocess(list(_PROBE), prompt=prompt, task="document")
        if _BOUNDS in features:
            module = modules_for(model, DOCUMENT)[0]
            if not hasattr(module, "data_collator"):
                return None
            others = {key: value for key, value in features.items() if key not in _flattened(module, [[0], [0]])}
            layout = cls(("input_ids",), None, False, torch.int64, others, module)
            return None if any(isinstance(value, Tensor) for value in others.values()) else layout
        constants = {key: value for key, value in features.items() if not isinstance(value, Tensor)}
        if not all(isinstance(value, (str, int, float, type(None))) for value in constants.values()):
            return None
        tensors = {key: value for key, value in features.items() if isinstance(value, Tensor)}
        ids = tensors.get("input_ids")
        if ids is None:
            return None
        if ids.ndim == 1 and set(tensors) == {"input_ids", "offsets"}:
            return cls(("input_ids",), None, False, ids.dtype, constants)
        mask = tensors.pop("attention_mask", None)
        if mask is None or any(value.shape != ids.shape or value.dtype != torch.int64 for value in tensors.values()):
            return None
        padded = mask == 0
        if not padded[0].any():
            return None
        keys = ("input_ids", *sorted(set(tensors) - {"input_ids"}))
        padding = {key: int(tensors[key][0][padded[0]][0]) for key in keys}
        return cls(keys, padding, bool(padded[0, 0]), mask.dtype, constants)

    def split(self, features: dict[str, Any]) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Remove the padding: ``(flat ids by key, lengths)`` of one preprocessed batch."""
        if self.flattener is not None:
            return {"input_ids": features["input_ids"][0].numpy()}, np.diff(features[_BOUNDS].numpy())
        if self.padding is None:
            ids = features["input_ids"].numpy()
            ends = np.append(features["offsets"].numpy()[1:], len(ids))
            return {"input_ids": ids}, np.diff(ends, prepend=0)
        mask = features["attention_mask"].bool()
        return {key: features[key][mask].numpy() for key in self.keys}, mask.sum(1).numpy()

    def join(self, flat: dict[str, np.ndarray], lengths: np.ndarray) -> dict[str, Any]:
        """The inverse of :meth:`split`: model-ready features of ``len(lengths)`` rows."""
        if self.flattener is not None:
            texts = np.split(flat["input_ids"], np.cumsum(lengths)[:-1])
            return {**_flattened(self.flattener, [ids.tolist() for ids in texts]), **self.constants}
        if self.padding is None:
            ids = torch.from_numpy(flat["input_ids"].astype(np.int64))
            offsets = torch.from_numpy(np.cumsum(lengths) - lengths)
            return {"input_ids": ids, "offsets": offsets, **self.constants}
        position = np.arange(lengths.max(initial=0))[None, :]
        width = position.shape[1]
        mask = position >= width - lengths[:, None] if self.pad_left else position < lengths[:, None]
        features: dict[str, Any] = {}
        for key in self.keys:
            padded = np.full(mask.shape, self.padding[key], dtype=np.int64)
            padded[mask] = flat[key]
            features[key] = torch.from_numpy(padded)
        features["attention_mask"] = torch.from_numpy(mask).to(self.mask_dtype)
        return {**features, **self.constants}


def _flattened(module: Any, texts: list[list[int]]) -> dict[str, Any]:
    """The features of token ids one after the other, as ``Transformer.preprocess`` of sentence-transformers makes them
    by the collator that it chose.
    """
    features: dict[str, Any] = module.data_collator([{"input_ids": ids} for ids in texts])
    features.pop("labels", None)
    if offset := getattr(module, "_flatten_position_offset", 0):
        features["position_ids"] = features["position_ids"] + offset
    return features


class TokenizedCorpus:
    """Features of the document encoder by corpus row, from token ids on disk.

    Obtained from :meth:`st_corrector.Corpus.tokenize`.

    Args:
        tokens: one ``list<int32>`` column for each of ``layout.keys``, one row per target.
        layout: how the rows become a batch.
        withdrawn: rows that no text is found at.
    """

    def __init__(self, tokens: Dataset, layout: TokenLayout, withdrawn: Sequence[int] | np.ndarray = ()) -> None:
        self._tokens = tokens.with_format("arrow")
        self.layout, self._withdrawn = layout, withdrawn
        column = tokens.data.column("input_ids")
        self.lengths: np.ndarray = pc.list_value_length(column).to_numpy()

    def __len__(self) -> int:
        return len(self._tokens)

    def features(self, rows: Sequence[int] | np.ndarray) -> dict[str, Any]:
        """What ``model.preprocess`` would return for the texts of ``rows``, padded to the longest of them."""
        rows = as_rows(rows, len(self))
        table: pa.Table = self._tokens[rows]
        flat = {}
        for key in self.layout.keys:
            column = table.column(key).combine_chunks()
            flat[key] = column.flatten().to_numpy(zero_copy_only=False)
        return self.layout.join(flat, self.lengths[rows].astype(np.int64))

    @cached_property
    def _by_tokens(self) -> tuple[np.ndarray, np.ndarray]:
        """Digests of all targets' token ids, sorted, and their rows."""
        digests = np.empty(len(self), dtype=np.int64)
        for start in range(0, len(self), _AT_ONCE):
            rows = np.arange(start, min(start + _AT_ONCE, len(self)))
            flat = self._tokens[rows].column("input_ids").combine_chunks().flatten().to_numpy(zero_copy_only=False)
            digests[rows] = _digests(flat, self.lengths[rows])
        order = np.argsort(digests, kind="stable")
        order = order[~np.isin(order, self._withdrawn)]
        return digests[order], order

    def rows_of(self, features: dict[str, Any]) -> np.ndarray:
        """The row of each text of a batch, as ``model.preprocess`` gives it: the first target with its token ids, −1
        where there is none: ``(b,)``.
        """
        flat, lengths = self.layout.split(features)
        known, order = self._by_tokens
        wanted = _digests(flat["input_ids"], lengths)
        place = np.searchsorted(known, wanted).clip(max=len(known) - 1)
        return np.where(known[place] == wanted, order[place], -1)


def _digests(ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """64 bits of the hash of each text's token ids, ``(n,)`` int64; the same in this process alone."""
    ends = np.cumsum(lengths)
    whole = ids.astype(np.int32)
    texts = (whole[end - n : end].tobytes() for end, n in zip(ends, lengths, strict=True))
    return np.fromiter(map(hash, texts), np.int64, len(lengths))


class TextCorpus:
    """The same interface for models whose features cannot be split into rows, and for queries: it tokenizes at each
    call.
    """

    def __init__(self, corpus: Any, model: SentenceTransformer, prompt: str | None, task: str = DOCUMENT) -> None:
        self._corpus, self._model, self._prompt, self._task = corpus, model, prompt, task
        self.lengths = corpus.text_lengths()

    def __len__(self) -> int:
        return len(self._corpus)

    def features(self, rows: Sequence[int] | np.ndarray) -> dict[str, Any]:
        return self._model.preprocess(self._corpus.texts(rows), prompt=self._prompt, task=self._task)


def are_equal(features: dict[str, Any], others: dict[str, Any]) -> bool:
    """Whether two batches of features have the same keys, values and dtypes."""
    return features.keys() == others.keys() and all(
        value.dtype == others[key].dtype and torch.equal(value, others[key])
        if isinstance(value, Tensor) and isinstance(others[key], Tensor)
        else type(value) is type(others[key]) and value == others[key]
        for key, value in features.items()
    )


def tokenized(
    corpus: Corpus, model: SentenceTransformer, prompt: str | None, progress: bool
) -> TokenizedCorpus | TextCorpus:
    """The token ids of all targets, read from disk or made; see :meth:`.Corpus.tokenize`."""
    modules = modules_for(model, DOCUMENT)
    anew = TextCorpus(corpus, model, prompt)
    layout = TokenLayout.probe(model, prompt)
    if layout is None:
        logger.info("The model's features cannot be split into rows: targets are tokenized again at each step.")
        return anew
    rules = digest_json(
        [tokenizer_fingerprint(model, modules, prompt), prompt or "", max_lengths(modules), layout.keys]
    )
    schema = pa.schema([(name, pa.list_(pa.int32())) for name in layout.keys])

    def tables(first: int, end: int) -> Iterator[pa.Table]:
        with tqdm(total=end - first, desc="Tokenizing targets", unit=" targets", disable=not progress) as bar:
            for start in range(first, end, _AT_ONCE):
                texts = corpus.texts(range(start, min(start + _AT_ONCE, end)))
                yield _tokenize(texts, model, prompt, layout)
                bar.update(len(texts))

    parts, first = [], 0
    while first < len(corpus):
        end = _kept_until(corpus, rules, first) or len(corpus)
        path = corpus.cache_dir / _file(rules, end - first, corpus.digests.fingerprint_of(end, first))
        part = read_or_write_arrow(path, schema, tables(first, end))
        if len(part) != end - first:
            logger.warning("%s has %d texts instead of %d: it is written again.", path, len(part), end - first)
            path.unlink()
            part = read_or_write_arrow(path, schema, tables(first, end))
        parts.append(part)
        first = end
    kept = TokenizedCorpus(concatenate_datasets(parts), layout, corpus.withdrawn)
    for rows in _some_batches(kept.lengths):
        if not are_equal(kept.features(rows), anew.features(rows)):
            logger.warning(
                "The features of %s cannot be kept as token ids (rows %s differ): targets are tokenized again at "
                "each step.",
                type(modules[0]).__name__,
                rows.tolist(),
            )
            return anew
    return kept


def _file(rules: str, count: int | str, fingerprint: str) -> str:
    return f"tokens-{rules}-{count}-{fingerprint}.arrow"


def _kept_until(corpus: Corpus, rules: str, first: int) -> int | None:
    """How far the largest file reaches that has the token ids of the corpus from row ``first`` on: of a corpus that
    this one has grown from, or of what it has grown by. None if there is no such file.
    """
    counts = {int(path.name.split("-")[2]) for path in corpus.cache_dir.glob(_file(rules, "*", "*"))}
    for count in sorted(counts, reverse=True):
        if first + count <= len(corpus):
            name = _file(rules, count, corpus.digests.fingerprint_of(first + count, first))
            if (corpus.cache_dir / name).exists():
                return first + count
    return None


def _some_batches(lengths: np.ndarray) -> list[np.ndarray]:
    """Rows of some batches: the shortest with the longest, the longest alone, and a few random ones."""
    order = np.argsort(lengths, kind="stable")
    some = np.random.default_rng(0).choice(len(lengths), size=min(6, len(lengths)), replace=False)
    return [order[[0, -1]], order[-1:], some]


def _tokenize(texts: list[str], model: SentenceTransformer, prompt: str | None, layout: TokenLayout) -> pa.Table:
    """The token ids of one batch of texts, as the columns that :class:`TokenizedCorpus` reads."""
    flat, lengths = layout.split(model.preprocess(texts, prompt=prompt, task="document"))
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    return pa.table(
        {key: pa.ListArray.from_arrays(offsets, pa.array(flat[key].astype(np.int32))) for key in layout.keys}
    )
