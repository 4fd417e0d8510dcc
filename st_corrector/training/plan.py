"""What the arguments leave open, decided by the plan of the run: by how often it goes through its questions and how
often it encodes each target.
"""

from __future__ import annotations

import logging
import math
from typing import Any, cast

import torch
from datasets import Dataset, concatenate_datasets
from sentence_transformers.sentence_transformer.training_args import MultiDatasetBatchSamplers

from ..data.corpus import Corpus
from ..data.own_questions import Question
from ..errors import CorpusError
from ..losses.settings import AUTO
from ..teachers import Teacher
from .arguments import CorrectorTrainingArguments
from .columns import negatives_named
from .own_pairs import SHARE, count_for, own_positions

logger = logging.getLogger(__name__)
LOW_COVERAGE = 0.25
"""Encodings a target from which on there is no corrector, without a teacher: a sixth and a half were measured."""
MORE_EPOCHS = 3.0
"""From how many epochs on there are own pairs beside a teacher: some two of them are better without."""
_KNOWN = 0.5  # of the own questions must be known to a teacher


# ---------------------------------------------------------------------- how much is trained


def batches(args: CorrectorTrainingArguments, data: Any) -> int:
    """How many batches each process takes in a run.

    Args:
        args: of the run.
        data: what it trains on, a data set or several by name; of a stream the arguments say how many steps it has.
    """
    parts = list(data.values()) if isinstance(data, dict) else [data]
    if not all(hasattr(each, "__len__") for each in parts):
        return _batches(args, None)
    of_epoch = [_of_epoch(args, each) for each in parts]
    if args.multi_dataset_batch_sampler == MultiDatasetBatchSamplers.ROUND_ROBIN:
        return _batches(args, min(of_epoch) * len(of_epoch))
    return _batches(args, sum(of_epoch))


def _of_epoch(args: CorrectorTrainingArguments, data: Dataset) -> int:
    share = SHARE if args.own_pairs_share is None else args.own_pairs_share
    own = len(own_positions(data)) if share and isinstance(data, Dataset) else 0
    room: int = args.train_batch_size - (count_for(share, args.train_batch_size) if own else 0)
    return math.ceil((len(data) - own) / (room * int(args.world_size)))


def _batches(args: CorrectorTrainingArguments, of_epoch: int | None) -> int:
    """The same, where an epoch has ``of_epoch`` batches for each process; None if that is not known."""
    accumulated = int(args.gradient_accumulation_steps)
    if of_epoch is None:
        return int(args.max_steps) * accumulated
    # The last step of an epoch is made of what is left.
    steps_of_epoch = max(math.ceil(of_epoch / accumulated), 1)
    steps = int(args.max_steps) if args.max_steps > 0 else math.ceil(float(args.num_train_epochs) * steps_of_epoch)
    epochs, others = divmod(steps, steps_of_epoch)
    return epochs * of_epoch + min(others * accumulated, of_epoch)


def coverage(args: CorrectorTrainingArguments, data: Any, corpus: Corpus) -> float:
    """How often a run encodes each target for the loss, at most, as questions share negatives.

    Args:
        args: of the run.
        data: what it trains on, a data set or several by name.
        corpus: the targets; those that have been withdrawn do not count.
    """
    parts = data.values() if isinstance(data, dict) else [data]
    of_question = 1 + args.num_negatives + max(map(negatives_named, parts))
    asked = batches(args, data) * args.train_batch_size * int(args.world_size)
    return asked * of_question / (len(corpus) - len(corpus.withdrawn))


# ---------------------------------------------------------------------- the corrector


def corrector_for(args: CorrectorTrainingArguments, data: Any, corpus: Corpus, is_taught: bool) -> str:
    """The corrector that ``args`` ask for. Where they leave it open: ``"mlp"`` if a teacher labels the candidates, or
    nothing is written back, or the run encodes each target less than :data:`LOW_COVERAGE` times; else ``"identity"``.

    With hard labels the hardest targets by fresh score teach a transformer less than the hardest among those that the
    run has encoded before, which is what plain write-back chooses, as soon as these are many. With a teacher
    correcting costs nothing on the average of three corpora, and a static encoder gains by it on one of them.

    Args:
        args: of the run.
        data: see :func:`coverage`.
        corpus: see :func:`coverage`.
        is_taught: whether a teacher labels the candidates.
    """
    if args.corrector != AUTO:
        return args.corrector
    planned = coverage(args, data, corpus)
    chosen = "mlp" if is_taught or not args.write_back or planned < LOW_COVERAGE else "identity"
    logger.info(
        "corrector='auto' is %r here: the run will encode each target %.2g times, and has %s teacher.",
        chosen,
        planned,
        "a" if is_taught else "no",
    )
    return chosen


# ---------------------------------------------------------------------- own pairs


def training_pairs(
    corpus: Corpus, args: CorrectorTrainingArguments, teacher: Teacher | None = None, *, is_taught: bool = False
) -> Dataset:
    """The pairs of the split that is trained on, and as many own pairs as the run will draw, or as there are.

    Where ``args.own_pairs_share`` is not set, see :func:`share_for`.

    Args:
        is_taught: whether a teacher is yet to be made, which will know these pairs.
    """
    split = args.train_split or "train"
    pairs = corpus.pairs(split)
    if not (share := share_for(corpus, args, teacher, is_taught=is_taught)):
        return pairs
    if args.own_pairs_share is None:
        logger.info(
            "%d %% of every batch are the corpus's own pairs, as the run goes through the questions of %r %s: "
            "own_pairs_share=0 leaves them out.",
            round(100 * share),
            split,
            f"{MORE_EPOCHS:g} times or more" if teacher is not None or is_taught else "more than once",
        )
    own = count_for(share, args.train_batch_size)
    of_epoch = math.ceil(len(pairs) / ((args.train_batch_size - own) * args.world_size))
    count = _batches(args, of_epoch) * own * args.world_size
    question = cast(Question | None, args.own_question)
    return concatenate_datasets([pairs, corpus.own_pairs(count, question, split, seed=args.seed)])


def share_for(
    corpus: Corpus, args: CorrectorTrainingArguments, teacher: Teacher | None = None, *, is_taught: bool = False
) -> float:
    """The share of own pairs that ``args`` ask for. Where they say nothing: :data:`SHARE` if there are at least as many
    own pairs as pairs of the split and the run goes through these more than once, or, beside a teacher, which must know
    the own questions, :data:`MORE_EPOCHS` times and more; else 0.
    """
    if args.own_pairs_share is not None:
        return args.own_pairs_share
    return SHARE if _are_worth_it(corpus, args, teacher, is_taught) else 0.0


def _are_worth_it(corpus: Corpus, args: CorrectorTrainingArguments, teacher: Teacher | None, is_taught: bool) -> bool:
    """Whether own pairs help, as far as has been measured (``labels`` and ``evidence`` in ``benchmarks/results``)."""
    split, question = args.train_split or "train", cast(Question | None, args.own_question)
    pairs = corpus.pairs(split)
    epochs = args.num_train_epochs
    if args.max_steps > 0:
        epochs = _batches(args, None) * args.train_batch_size * args.world_size / len(pairs)
    is_long = epochs >= MORE_EPOCHS if teacher is not None or is_taught else epochs > 1
    if not is_long or not 0 < round(SHARE * args.train_batch_size) < args.train_batch_size:
        return False
    try:
        own = corpus.own_pairs(len(pairs), question, split, seed=args.seed)
    except CorpusError:  # no target has a question
        return False
    if len(own) < len(pairs):
        return False
    return teacher is None or bool(teacher.knows(torch.tensor(own["label"][:])[:, 1]).float().mean() > _KNOWN)
