"""Batches with a fixed share of the corpus's own pairs."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from typing import Any, cast

import numpy as np
import torch
from accelerate.data_loader import SeedableRandomSampler
from datasets import Dataset, concatenate_datasets
from sentence_transformers.base.sampler import DefaultBatchSampler
from torch.utils.data import BatchSampler

from ..data.corpus import Corpus
from ..data.own_questions import Question
from ..data.query_keys import is_own
from ..errors import CorpusError, InputError
from ..teachers import Teacher
from .arguments import CorrectorTrainingArguments

logger = logging.getLogger(__name__)
SHARE = 0.36
"""Of every batch, where own pairs help and nothing else is asked for."""
_KNOWN = 0.5  # of the own questions must be known to a teacher


def own_positions(dataset: Dataset) -> np.ndarray:
    """Where the own pairs (:meth:`.Corpus.own_pairs`) of a data set are, ascending."""
    label = next((name for name in ("label", "labels") if name in dataset.column_names), None)
    if label is None or not hasattr(dataset.features[label], "feature"):
        return np.empty(0, dtype=np.int64)
    keys = np.array(dataset[label][:], dtype=np.int64).reshape(len(dataset), -1)[:, 1]
    return np.flatnonzero(is_own(torch.from_numpy(keys)).numpy())


def count_for(share: float, batch_size: int) -> int:
    """How many of a batch's pairs are own ones.

    Raises:
        InputError: it is none, or no room is left for others.
    """
    count = round(share * batch_size)
    if not 0 < count < batch_size:
        raise InputError(
            f"own_pairs_share={share} makes {count} own pairs in a batch of {batch_size}, and there must be at least "
            "one of them and one of the split's: choose another share, or take larger batches."
        )
    return count


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
    steps_of_epoch = math.ceil(len(pairs) / ((args.train_batch_size - own) * args.world_size))
    steps = args.max_steps * args.gradient_accumulation_steps
    if args.max_steps <= 0:
        steps = math.ceil(args.num_train_epochs * steps_of_epoch)
    count = steps * own * args.world_size
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
    batch = args.train_batch_size * args.world_size
    epochs = args.num_train_epochs
    if args.max_steps > 0:
        epochs = args.max_steps * args.gradient_accumulation_steps * batch / len(pairs)
    if epochs <= 1 or not 0 < round(SHARE * args.train_batch_size) < args.train_batch_size:
        return False
    try:
        own = corpus.own_pairs(len(pairs), question, split, seed=args.seed)
    except CorpusError:  # no target has a question
        return False
    if len(own) < len(pairs):
        return False
    return teacher is None or bool(teacher.knows(torch.tensor(own["label"][:])[:, 1]).float().mean() > _KNOWN)


class OwnPairsBatchSampler(DefaultBatchSampler):
    """Batches of which a fixed share are the corpus's own pairs, and the others what another sampler makes of the
    split's pairs. An epoch goes through the split's pairs once; each takes other own pairs, until all have had their
    turn.

    In the plain trainer it is the function that ``batch_sampler`` expects:
    ``functools.partial(OwnPairsBatchSampler, share=0.25)``.

    Args:
        dataset: pairs of a split and own pairs, in any order.
        batch_size: pairs in a batch of one process.
        drop_last: whether a last batch with fewer pairs of the split is left out.
        valid_label_columns, generator, seed: see :class:`~sentence_transformers.base.sampler.DefaultBatchSampler`.
        share: of own pairs in a batch.
        make_base: makes the sampler of the split's pairs, with these arguments and ``dataset``; by default they are
            shuffled.

    Raises:
        InputError: there are only own pairs, or no room is left for others.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        drop_last: bool,
        valid_label_columns: list[str] | None = None,
        generator: torch.Generator | None = None,
        seed: int = 0,
        *,
        share: float,
        make_base: Callable[..., BatchSampler | None] | None = None,
    ) -> None:
        super().__init__(dataset, batch_size, drop_last, valid_label_columns, generator, seed)
        self._own = own_positions(dataset)
        self._others = np.setdiff1d(np.arange(len(dataset)), self._own)
        if not len(self._others):
            raise InputError("There are only own pairs: concatenate them with the pairs of a split.")
        self._count = count_for(share, batch_size) if len(self._own) else 0
        base = (make_base or _shuffled)(
            dataset.select(self._others),
            batch_size=batch_size - self._count,
            drop_last=drop_last,
            valid_label_columns=valid_label_columns,
            generator=generator,
            seed=seed,
        )
        assert base is not None  # as for a stream
        self._base: Any = base

    def __len__(self) -> int:
        return len(self._base)

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        inner: Any = getattr(self._base, "sampler", None)
        for each in (self._base, inner):
            if hasattr(each, "set_epoch"):
                each.set_epoch(epoch)

    def __iter__(self) -> Iterator[list[int]]:
        order = np.random.default_rng(self.seed).permutation(self._own)
        drawn = self.epoch * len(self) * self._count
        for batch in self._base:
            own = [int(order[place % len(order)]) for place in range(drawn, drawn + self._count)]
            drawn += self._count
            # Evenly spread, so that the batches of several processes together are the batch of one.
            mixed = self._others[batch].tolist()
            for place, position in enumerate(own, start=1):
                mixed.insert(place * self.batch_size // self._count - 1, position)
            yield mixed


def _shuffled(dataset: Dataset, batch_size: int, drop_last: bool, seed: int = 0, **others: Any) -> DefaultBatchSampler:
    """The pairs in an order that seed and epoch decide, as the trainer has it where no other sampler is asked for."""
    sampler = SeedableRandomSampler(dataset, data_seed=seed, generator=torch.Generator())
    return DefaultBatchSampler(sampler, batch_size, drop_last, seed=seed, **others)
