"""The document side of a sentence-transformers model over a corpus: rows in, embeddings out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import batch_to_device
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm.auto import tqdm

from ..errors import InputError
from .corpus import Corpus
from .model_fingerprint import described_modules, max_lengths, tokenizer_fingerprint, weights_fingerprint
from .routing import DOCUMENT, QUERY, call, depends_on_task, modules_for
from .targets import as_rows
from .tokens import TextCorpus, TokenizedCorpus

# The prompt names that encode_document and encode_query of SentenceTransformer look for, in their order.
_PROMPTS = {DOCUMENT: ("document", "passage", "corpus"), QUERY: ("query",)}

ONE_PROCESS_FOR_SEVERAL_GPUS = (
    "One process sees several GPUs, so the trainer uses torch.nn.DataParallel, which splits every batch and copies "
    "the model in every call. Start one process per GPU: accelerate launch --num_processes N script.py; or make only "
    "one visible: CUDA_VISIBLE_DEVICES=0."
)


def unwrap(model: nn.Module) -> SentenceTransformer:
    """The SentenceTransformer inside wrappers of DistributedDataParallel and torch.compile.

    Raises:
        InputError: it is inside DataParallel.
    """
    while not isinstance(model, SentenceTransformer):
        if isinstance(model, nn.DataParallel):
            raise InputError(ONE_PROCESS_FOR_SEVERAL_GPUS)
        inner = getattr(model, "module", None) or getattr(model, "_orig_mod", None)
        if inner is None:
            raise TypeError(f"Expected a SentenceTransformer, got a {type(model).__name__}.")
        model = inner
    return getattr(model, "_orig_mod", model)


@contextmanager
def returning_also(model: nn.Module, tensors: list[Tensor]) -> Iterator[None]:
    """Make the next call of ``model`` return ``tensors`` of earlier calls, too.

    DistributedDataParallel waits only for gradients of parameters that affect the output of its last call. Of a
    ``Router``'s two routes, it would miss the one called earlier.
    """
    if not tensors or not isinstance(getattr(model, "_orig_mod", model), DistributedDataParallel):
        yield
        return
    handle = unwrap(model).register_forward_hook(lambda module, inputs, output: {**output, "earlier": tensors})
    try:
        yield
    finally:
        handle.remove()


def prompt_for(model: SentenceTransformer, prompt: str | None, task: str = DOCUMENT) -> str:
    """``prompt``, or if that is None the one that ``model.encode_document``, or for the task ``"query"``
    ``model.encode_query``, would use (``""`` for none).
    """
    if prompt is not None:
        return prompt
    for name in _PROMPTS[task]:
        if name in model.prompts:
            return model.prompts[name] or ""
    return ""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run the block with every module in eval mode and without gradient; then restore each module's own mode.

    Module by module, because ``model.train()`` would also switch modules that the user keeps in eval mode.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


class DocumentEncoder:
    """Encodes corpus rows with a model's document side, always with the same prompt, task and truncation.

    Only this class resolves them, so the cache, the negatives and the evaluation agree; the loss checks that the
    trainer's tokenized positives agree as well.

    Args:
        model: the model; a Router, in any position, uses its route for documents.
        corpus: the targets; its ``prompt`` decides what precedes their texts.
        progress: show a progress bar while the corpus is tokenized for the first time.

    Raises:
        InputError: a Router has no route for documents.
    """

    task = DOCUMENT

    def __init__(self, model: SentenceTransformer, corpus: Corpus, progress: bool = True) -> None:
        self.corpus = corpus
        self.by_task = depends_on_task(model)
        """Whether the model's output for a text depends on its task."""
        self.prompt = prompt_for(model, corpus.prompt, self.task)
        self.tokens = self._prepared(model, progress)

    def _prepared(self, model: SentenceTransformer, progress: bool) -> TokenizedCorpus | TextCorpus:
        return self.corpus.tokenize(model, self.prompt, progress=progress)

    def features(self, rows: Sequence[int] | np.ndarray, device: torch.device | str | None = None) -> dict[str, Any]:
        """Model-ready features of ``rows``, on ``device``."""
        features = self.tokens.features(rows)
        if self.by_task:
            features["task"] = self.task
        return features if device is None else batch_to_device(features, torch.device(device))

    def encode(
        self,
        model: SentenceTransformer,
        rows: Sequence[int] | np.ndarray,
        batch_size: int = 64,
        bar: tqdm | None = None,
    ) -> Tensor:
        """``model``'s current embeddings of ``rows``, in eval mode and without gradient; the model's modes are
        restored.

        Rows are encoded in batches of similar length. ``model.truncate_dim`` is not applied: training and the cache use
        the full width.

        Returns:
            float32, shape ``(len(rows), d)``, on the model's device.
        """
        rows = as_rows(rows, len(self.tokens))
        order = np.argsort(-self.tokens.lengths[rows], kind="stable")
        device = unwrap(model).device
        embeddings: Tensor | None = None
        with evaluating(model):
            for start in range(0, len(rows), batch_size):
                batch = order[start : start + batch_size]
                output = call(model, self.features(rows[batch], device))["sentence_embedding"].float()
                if embeddings is None:
                    embeddings = output.new_empty(len(rows), output.shape[1])
                embeddings[torch.from_numpy(batch).to(device)] = output
                if bar is not None:
                    bar.update(len(batch))
        if embeddings is None:
            raise ValueError("No rows to encode.")
        return embeddings

    @staticmethod
    def is_frozen(model: SentenceTransformer) -> bool:
        """Whether no module that encodes documents is trainable: then embeddings do not change."""
        parameters = (each for module in modules_for(unwrap(model), DOCUMENT) for each in module.parameters())
        return not any(parameter.requires_grad for parameter in parameters)

    def fingerprint(self, model: SentenceTransformer, weights: bool = True) -> dict[str, Any]:
        """Exactly what this model's embeddings of this corpus depend on, by component: the query side is not
        included; weights in another precision are other weights.

        Args:
            weights: include the digest of all weights, which reads every one of them.
        """
        model = unwrap(model)
        modules = modules_for(model, self.task)
        components = {
            "corpus": self.corpus.fingerprint,
            "modules": described_modules(modules),
            "tokenizer": tokenizer_fingerprint(model, modules, self.prompt, self.task),
            "prompt": self.prompt,
            "max_seq_length": max_lengths(modules),
        }
        return {**components, "weights": weights_fingerprint(modules)} if weights else components


class QueryEncoder(DocumentEncoder):
    """The same with a model's query side, over a corpus of queries: what ``model.encode_query`` would say of them."""

    task = QUERY

    def _prepared(self, model: SentenceTransformer, progress: bool) -> TokenizedCorpus | TextCorpus:
        modules_for(model, QUERY)  # which raises where a Router has no route for queries
        return TextCorpus(self.corpus, model, self.prompt, QUERY)
