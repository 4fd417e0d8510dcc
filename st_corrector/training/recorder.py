"""Writes the record of a run while it trains."""

from __future__ import annotations

import dataclasses
import logging
import math
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .._version import __version__
from ..data.encoding import unwrap
from ..data.text import contains_answer
from ..errors import InputError
from ..losses.multiple_negatives import CorrectedMultipleNegativesLoss
from ..negatives.filters import known_positives, pad_rows
from ..reporting.record import Choice, Chosen, Example, LossRecord, RunRecord
from ..search.topk import NO_ROW
from ..storage.fingerprint import digest_json

logger = logging.getLogger(__name__)
_BUILT_ON = ("torch", "sentence-transformers", "transformers", "accelerate", "datasets")
_SHOWN = 1_000  # characters of a text
_ELSEWHERE = ("_dir", "_path", "_token", "_config", "_id", "_checkpoint")  # of the machine, or of an account
_NOT_OF_THE_RUN = {"run_name", "local_rank", "deepspeed", "fsdp", "report_to", "disable_tqdm", "push_to_hub"}


class Recorder(TrainerCallback):
    """Keeps the :class:`RunRecord` of a run, and writes it with every checkpoint and at the end.

    For a few fixed training queries it looks before and after training at what they take as negatives, with an exact
    search of its own: training is the same with it and without. What it cannot look at, since something is not finite,
    it leaves out, and says so in the log.

    Args:
        model: that is trained.
        losses: its corrected losses, by data set's name.
        examples: queries of each loss's split whose negatives are recorded.
    """

    def __init__(
        self, model: SentenceTransformer, losses: dict[str, CorrectedMultipleNegativesLoss], examples: int
    ) -> None:
        self.model, self.losses = unwrap(model), losses
        self._queries = {name: _queries(loss, examples) for name, loss in losses.items()}
        self._began, self._seconds_before, self._trained = time.perf_counter(), 0.0, False
        self.record = RunRecord(_model(self.model), {}, {name: _loss(loss) for name, loss in losses.items()})
        """What is known of the run so far."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._began, self._trained = time.perf_counter(), False
        record = self.record
        record.arguments, record.versions, record.processes = _arguments(args), versions(), args.world_size
        if state.global_step:
            self._go_on(Path(str(args.output_dir)), state.global_step)
        self._look(state.global_step)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.write(args, state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._look(state.global_step)
        self.write(args, state)
        self._trained = True

    def _go_on(self, run: Path, step: int) -> None:
        """Take over what an interrupted run has recorded up to the step from which it is resumed."""
        try:
            found = RunRecord.load(run)
        except InputError:
            return  # resumed somewhere else, or written by another version: it begins here
        self._seconds_before = found.seconds * min(1.0, step / max(1, found.steps))
        for when, metrics in found.evaluations.items():
            if when == "before" or (when.isdigit() and int(when) <= step):
                self.record.evaluations.setdefault(when, metrics)
        for name, loss in self.record.losses.items():
            if name in found.losses:
                loss.examples = found.losses[name].examples
            for example in loss.examples:
                example.choices = [choice for choice in example.choices if choice.step < step]

    def _look(self, step: int) -> None:
        for name, loss in self.losses.items():
            examples = self.record.losses[name].examples
            try:
                found = _choices(loss, self._queries[name], step)
            except InputError as error:  # e.g. a corrector that is not finite: the run itself deals with it
                logger.warning("Step %d: the examples are left out of the record. %s", step, error)
                continue
            for query, positive, choice in found:
                here = [each for each in examples if (each.query, each.positive) == (query, positive)]
                if not here:
                    here.append(Example(query, positive))
                    examples.append(here[0])
                here[0].choices = [each for each in here[0].choices if each.step != step] + [choice]

    def update(self, state: TrainerState) -> RunRecord:
        """The record of the run as far as ``state`` has come."""
        record = self.record
        record.steps, record.log = state.global_step, list(state.log_history)
        if not self._trained:
            record.seconds = round(self._seconds_before + time.perf_counter() - self._began, 1)
        for name, loss in self.losses.items():
            of_loss = record.losses[name]
            of_loss.counts = {
                "targets_encoded": loss.targets_encoded,
                "targets_verified": loss.targets_verified,
                "targets_reencoded": loss.corrected.targets_reencoded if loss.has_corrected else 0,
            }
            if loss.distillation is not None:  # how far the teacher is trusted now
                of_loss.settings |= loss.distillation.describe()
            of_loss.removed, of_loss.diverged = dict(loss.removed), loss.has_corrected and loss.corrected.diverged
        return record

    def write(self, args: TrainingArguments, state: TrainerState) -> None:
        """Write the record into the run's folder; to be called again when something was evaluated after training."""
        record = self.update(state)
        if args.should_save:
            record.save(Path(str(args.output_dir)))


def versions() -> dict[str, str]:
    """Of Python, this package and those that it builds on."""
    built_on = {name: version(name) for name in _BUILT_ON}
    return {"python": platform.python_version(), "st-corrector": __version__, **built_on}


def _model(model: SentenceTransformer) -> dict[str, Any]:
    parameters = list(model.parameters())
    return {
        "name": model.model_card_data.model_name or " · ".join(type(module).__name__ for module in model.children()),
        "parameters": sum(each.numel() for each in parameters),
        "trainable": sum(each.numel() for each in parameters if each.requires_grad),
        "dim": model.get_embedding_dimension(),
        "similarity": model.similarity_fn_name,
    }


def _loss(loss: CorrectedMultipleNegativesLoss) -> LossRecord:
    corpus, cache = loss.corpus, loss.corrected.cache if loss.has_corrected else None
    return LossRecord(
        settings={name: _plain(value) for name, value in loss.get_config_dict().items()},
        corpus={
            "name": corpus.name,
            "targets": len(corpus),
            "fingerprint": corpus.fingerprint,
            "splits": {split: len(corpus.qrels(split)) for split in corpus.splits},
        },
        cache=None
        if cache is None
        else {
            "dtype": str(cache.dtype).removeprefix("torch."),
            "dim": cache.dim,
            "bytes": cache.nbytes // len(cache) * cache.corpus_size,
            "fingerprint": {
                name: value if isinstance(value, str) else digest_json(value)
                for name, value in cache.fingerprint.items()
            },
        },
    )


def _arguments(args: TrainingArguments) -> dict[str, Any]:
    """Those that are not as they are by default, and that say something about the run."""
    told = {}
    for each in dataclasses.fields(args):
        value, default = getattr(args, each.name), each.default
        if each.default_factory is not dataclasses.MISSING:
            default = each.default_factory()
        if each.name.endswith(_ELSEWHERE) or each.name in _NOT_OF_THE_RUN or each.name.startswith(("_", "hub_")):
            continue
        if value != default and not (isinstance(value, float) and math.isnan(value)):
            told[each.name] = _plain(value)
    return told


def _plain(value: Any) -> Any:
    return value if isinstance(value, (bool, int, float, str, type(None))) else str(value)


def _queries(loss: CorrectedMultipleNegativesLoss, count: int) -> list[int]:
    """Positions of some queries of the loss's split: a random choice, always the same."""
    split = loss.negatives.train_split
    if split is None or split not in loss.corpus.splits or not loss.has_corrected or not loss.negatives.num_negatives:
        return []
    size = len(loss.corpus.qrels(split))
    return sorted(np.random.default_rng(0).permutation(size)[:count].tolist())


@torch.no_grad()
def _choices(loss: CorrectedMultipleNegativesLoss, positions: list[int], step: int) -> list[tuple[str, str, Choice]]:
    """What these queries of the loss's split take as negatives now: query, positive, choice."""
    split = loss.negatives.train_split
    if not positions or split is None:
        return []
    qrels, corpus, corrected = loss.corpus.qrels(split), loss.corpus, loss.corrected
    asked = qrels.queries[positions]
    labels, keys = [int(qrels.rows_of(position)[0]) for position in positions], qrels.keys[positions].tolist()
    queries = loss.encode_queries(asked["text"])
    device = queries.device
    positive_scores = (queries * corrected.encode(labels)).sum(-1)
    finite = torch.isfinite(positive_scores)
    if not finite.all():
        _leave_out(step, [asked["text"][number] for number in (~finite).nonzero().flatten().tolist()])
        kept = [position for position, is_finite in zip(positions, finite.tolist(), strict=True) if is_finite]
        return _choices(loss, kept, step)
    known = pad_rows(known_positives(corpus, qrels, labels, keys)).to(device)
    # A search of its own, and random numbers of its own: training is not disturbed.
    search, corrector = corrected.exact_search(), corrected.choosing_corrector
    chosen = torch.full((len(labels), 0), NO_ROW)
    if loss.is_choosing:
        with torch.random.fork_rng(devices=[]):  # the search draws its seed on the CPU
            of_pairs = torch.tensor(labels, device=device), torch.tensor(keys, device=device)
            chosen = loss.selector.select(search, queries, known, positive_scores, *of_pairs, corrected.encode).rows
    found: list[tuple[str, str, Choice]] = []
    left_out = []
    for number, (query, answers) in enumerate(zip(asked["text"], asked["answers"], strict=True)):
        rows = chosen[number][chosen[number] != NO_ROW]
        negatives = []
        if len(rows):
            by_cache = (corrected.corrected(rows, by=corrector) @ queries[number]).tolist()
            scores = (corrected.encode(rows.cpu().numpy()) @ queries[number]).tolist()
            if not np.isfinite([*by_cache, *scores]).all():
                left_out.append(query)
                continue
            texts, passages = corpus.texts(rows.tolist()), corpus.targets[rows.tolist()]["text"]
            for text, passage, id, corrected_score, score in zip(
                texts, passages, corpus.ids(rows.tolist()), by_cache, scores, strict=True
            ):
                has_answer = contains_answer(passage, answers) if answers else None
                negatives.append(Chosen(id, text[:_SHOWN], corrected_score, score, has_answer))
            negatives.sort(key=lambda chosen: -chosen.corrected_score)
        positive = corpus.texts([labels[number]])[0]
        choice = Choice(step, float(positive_scores[number]), negatives)
        found.append((query[:_SHOWN], positive[:_SHOWN], choice))
    _leave_out(step, left_out)
    return found


def _leave_out(step: int, queries: list[str]) -> None:
    if not queries:
        return
    logger.warning(
        "Step %d: %d of the record's examples are left out, since they, their positives or negatives have embeddings "
        "that are not finite, e.g. %.80r.",
        step,
        len(queries),
        queries[0],
    )
