"""What the arguments leave open, decided by the plan of the run: by how often it goes through its questions and how
often it encodes each target.
"""

from __future__ import annotations

import logging
import math
from typing import Any, cast

import torch
from datasets import Dataset, concatenate_datasets

from ..data.corpus import Corpus
from ..data.own_questions import Question
from ..errors import CorpusError
from ..losses.settings import AUTO
from ..teachers import Teacher
from .arguments import CorrectorTrainingArguments
from .own_pairs import SHARE, count_for, own_positions

logger = logging.getLogger(__name__)
LOW_COVERAGE = 0.25
"""Encodings a target below which a corrector pays without a teacher, too."""
_KNOWN = 0.5  # of the own questions must be known to a teacher


def batches(args: CorrectorTrainingArguments, pairs: int, own: int = 0) -> int:
    """How many batches each process takes in a run.

    Args:
        pairs: of the split, each of which comes once an epoch; not looked at with ``max_steps``.
        own: pairs of each batch that are own ones, and do not count.
    """
    if args.max_steps > 0:
        return int(args.max_steps * args.gradient_accumulation_steps)
    of_epoch: int = math.ceil(pairs / ((args.train_batch_size - own) * args.world_size))
    return math.ceil(float(args.num_train_epochs) * of_epoch)


# ---------------------------------------------------------------------- the corrector


def corrector_for(args: CorrectorTrainingArguments, data: Any, targets: int, is_taught: bool) -> str:
    """The corrector that ``args`` ask for. Where they leave it open: ``"mlp"`` if a teacher labels the candidates, or
    the run encodes each target less than :data:`LOW_COVERAGE` times; else ``"identity"``.

    With hard labels the hardest targets by fresh score teach less than the hardest among those that a run has encoded
    before, which is what plain write-back chooses, as soon as these are many. With a teacher, fresher is better.

    Args:
        args: of the run.
        data: see :func:`coverage`.
        targets: see :func:`coverage`.
        is_taught: whether there is a teacher.
    """
    if args.corrector != AUTO:
        return args.corrector
    planned = coverage(args, data, targets)
    chosen = "mlp" if is_taught or planned < LOW_COVERAGE else "identity"
    logger.info(
        "corrector='auto' is %r here: the run will encode each target %.2g times, and has %s teacher.",
        chosen,
        planned,
        "a" if is_taught else "no",
    )
    return chosen


def coverage(args: CorrectorTrainingArguments, data: Any, targets: int) -> float:
    """How often a run encodes each target for the loss, at most, as questions share negatives.

    Args:
        args: of the run.
        data: what it trains on, a data set or several by name.
        targets: in the corpus.
    """
    pairs = own = of_batch = 0
    if args.max_steps <= 0:  # never so with a stream
        for each in data.values() if isinstance(data, dict) else [data]:
            pairs += len(each)
            own += len(own_positions(each))
    share = args.own_pairs_share if args.own_pairs_share is not None else SHARE
    if own and share:
        pairs, of_batch = pairs - own, count_for(share, args.train_batch_size)
    asked = batches(args, pairs, of_batch) * args.train_batch_size * int(args.world_size)
    return asked * (1 + args.num_negatives) / targets


# ---------------------------------------------------------------------- own pairs


def training_pairs(corpus: Corpus, args: CorrectorTrainingArguments | None, teacher: Teacher | None = None) -> Dataset:
    """The pairs of the split that is trained on, and as many own pairs as the run will draw, or as there are.

    Where ``args.own_pairs_share`` is not set, see :func:`share_for`.
    """
    split = (args and args.train_split) or "train"
    pairs = corpus.pairs(split)
    if args is None or not (share := share_for(corpus, args, teacher)):
        return pairs
    if args.own_pairs_share is None:
        logger.info(
            "%d %% of every batch are the corpus's own pairs, as the run goes through the questions of %r more than "
            "once: own_pairs_share=0 leaves them out.",
            round(100 * share),
            split,
        )
    own = count_for(share, args.train_batch_size)
    count = batches(args, len(pairs), own) * own * args.world_size
    question = cast(Question | None, args.own_question)
    return concatenate_datasets([pairs, corpus.own_pairs(count, question, split, seed=args.seed)])


def share_for(corpus: Corpus, args: CorrectorTrainingArguments, teacher: Teacher | None = None) -> float:
    """The share of own pairs that ``args`` ask for. Where they say nothing: :data:`SHARE` if the run goes through the
    split's pairs more than once, there are at least as many own pairs as pairs of the split, and a teacher, if there is
    one, knows their questions; else 0.
    """
    if args.own_pairs_share is not None:
        return args.own_pairs_share
    return SHARE if _are_worth_it(corpus, args, teacher) else 0.0


def _are_worth_it(corpus: Corpus, args: CorrectorTrainingArguments, teacher: Teacher | None) -> bool:
    """Whether own pairs help, as far as has been measured (``benchmarks/results/labels``)."""
    split, question = args.train_split or "train", cast(Question | None, args.own_question)
    pairs = corpus.pairs(split)
    epochs = args.num_train_epochs
    if args.max_steps > 0:
        epochs = batches(args, len(pairs)) * args.train_batch_size * args.world_size / len(pairs)
    if epochs <= 1 or not 0 < round(SHARE * args.train_batch_size) < args.train_batch_size:
        return False
    try:
        own = corpus.own_pairs(len(pairs), question, split, seed=args.seed)
    except CorpusError:  # no target has a question
        return False
    if len(own) < len(pairs):
        return False
    return teacher is None or bool(teacher.knows(torch.tensor(own["label"][:])[:, 1]).float().mean() > _KNOWN)
