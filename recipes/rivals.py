"""What one would do without this package, by sentence-transformers' own means: negatives mined before training, once or
again after some steps or epochs; a teacher's scores of them; in-batch negatives with a guide.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from datasets import Dataset, concatenate_datasets
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import (
    CachedGISTEmbedLoss,
    DistillKLDivLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.util import mine_hard_negatives, pairwise_cos_sim
from transformers import TrainerCallback

from st_corrector import Corpus, CorrectorTrainer, CorrectorTrainingArguments, EmbeddingTeacher, InputError
from st_corrector.data.encoding import prompt_for
from st_corrector.data.query_keys import query_keys
from st_corrector.data.routing import QUERY
from st_corrector.data.text import normalized
from st_corrector.losses.similarity import Similarity
from st_corrector.training.columns import prompts_by_column
from st_corrector.training.own_pairs import share_for

MINED_BY = ("max_score", "absolute_margin", "relative_margin", "range_min", "range_max")
"""What the arguments and ``mine_hard_negatives`` both know of false negatives."""


def pairs_for(corpus: Corpus, args: CorrectorTrainingArguments) -> Dataset:
    """The pairs of the split that is trained on, and of the corpus's own pairs so many that they have the share that
    ``args`` ask for, of the whole: tuples are drawn from all alike.
    """
    split, share = args.train_split or "train", share_for(corpus, args)
    pairs = corpus.pairs(split)
    args.own_pairs_share = 0.0
    if not share:
        return pairs
    count = round(len(pairs) * share / (1 - share))
    return concatenate_datasets([pairs, corpus.own_pairs(count, args.own_question, split, args.seed)])


def mine(model: SentenceTransformer, corpus: Corpus, pairs: Dataset, args: CorrectorTrainingArguments) -> Dataset:
    """sentence-transformers' own mining by the model as it is, from the same corpus: n-tuples of texts.

    It leaves pairs out that have too few negatives among the nearest targets, which is told: where the encoder finds
    little, they are most.
    """
    mined = mine_hard_negatives(
        pairs.select_columns(pairs.column_names[:2]),
        model,
        corpus=corpus.texts(range(len(corpus))),
        corpus_prompt=corpus.prompt,
        num_negatives=args.num_negatives,
        sampling_strategy="top",
        output_format="n-tuple",
        batch_size=256,
        verbose=False,
        **{name: getattr(args, name) for name in MINED_BY},
    )
    if left_out := len(pairs) - len(mined):
        print(f"Mining leaves {left_out:,} of {len(pairs):,} pairs out; a larger --range_max leaves out fewer.")
    return mined


def mined_trainer(
    model: SentenceTransformer,
    corpus: Corpus,
    args: CorrectorTrainingArguments,
    pairs: Dataset,
    teacher: EmbeddingTeacher | None,
    every: int | None,
    unit: Literal["step", "epoch"],
) -> CorrectorTrainer:
    """A trainer on mined tuples.

    Args:
        teacher: its scores of the tuples are learnt instead of hard labels, if there is one.
        every: after how many steps or epochs negatives are mined again; by default never.
    """
    similarity = Similarity(model)
    scale = args.scale or similarity.default_scale
    tuples = mine(model, corpus, pairs, args)
    args.prompts = prompts_of(model, corpus, tuples)
    if teacher is not None:
        if every is not None:
            raise InputError("A teacher's scores of mined tuples are learnt with --strategy mined-once alone.")
        soft = DistillKLDivLoss(
            model,
            similarity_fct=pairwise_cos_sim,
            temperature=1 / scale,
            teacher_temperature=1 / args.teacher_scale,
        )
        return CorrectorTrainer(model, args, train_dataset=_with_scores(tuples, corpus, teacher), loss=soft)
    loss = MultipleNegativesRankingLoss(model, scale=scale, similarity_fct=similarity.function)
    if every is None:
        return CorrectorTrainer(model, args, train_dataset=tuples, loss=loss)
    again = MineAgain(model, corpus, pairs, args, every, unit)
    return CorrectorTrainer(model, args, train_dataset=again.dataset(tuples), loss=loss, callbacks=[again])


def prompts_of(model: SentenceTransformer, corpus: Corpus, data: Dataset) -> dict[str, str]:
    """What a corrected loss would have put before the columns."""
    return prompts_by_column(prompt_for(model, None, QUERY), prompt_for(model, corpus.prompt), [data])


def guided_trainer(
    model: SentenceTransformer,
    corpus: Corpus,
    args: CorrectorTrainingArguments,
    pairs: Dataset,
    guide: SentenceTransformer | None,
) -> CorrectorTrainer:
    """In-batch negatives of which a guide leaves out what it finds more relevant than the positive (GISTEmbed). The
    guide reads texts as they were cut for the trained model, with its prompts.
    """
    if guide is None:
        raise InputError("--strategy gist has a teacher as its guide: give --teacher_model.")
    args.prompts = prompts_of(model, corpus, pairs)
    loss = CachedGISTEmbedLoss(
        model,
        guide,
        temperature=1 / (args.scale or Similarity(model).default_scale),
        mini_batch_size=args.mini_batch_size or 32,
    )
    return CorrectorTrainer(model, args, train_dataset=pairs.select_columns(pairs.column_names[:2]), loss=loss)


class MineAgain(TrainerCallback):
    """Mines the negatives of all training questions again, by the model as it is, every ``every`` steps or epochs.

    A question of which too few negatives are left keeps those it had.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        corpus: Corpus,
        pairs: Dataset,
        args: CorrectorTrainingArguments,
        every: int,
        unit: Literal["step", "epoch"],
    ) -> None:
        self._model, self._corpus, self._pairs, self._args = model, corpus, pairs, args
        self._every, self._unit = every, unit
        self._negatives: dict[tuple[str, str], list[str]] = {}
        self.targets_encoded = 0
        """Targets encoded to mine while training."""

    def dataset(self, tuples: Dataset) -> Dataset:
        """``tuples`` with the negatives that were mined last, whenever a row is read."""
        anchor, positive, *negatives = tuples.column_names

        def current(rows: dict[str, list[str]]) -> dict[str, list[str]]:
            pairs = zip(rows[anchor], rows[positive], *(rows[name] for name in negatives), strict=True)
            found = [self._negatives.get((query, target), old) for query, target, *old in pairs]
            return {**rows, **dict(zip(negatives, map(list, zip(*found, strict=True)), strict=True))}

        return tuples.with_transform(current)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._unit == "epoch" and (epoch := round(state.epoch or 0)) and epoch % self._every == 0:
            self._mine()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._unit == "step" and state.global_step and state.global_step % self._every == 0:
            self._mine()

    def _mine(self) -> None:
        training = self._model.training
        mined = mine(self._model, self._corpus, self._pairs, self._args)
        self._model.train(training)
        anchor, positive, *negatives = mined.column_names
        self._negatives |= {(row[anchor], row[positive]): [row[name] for name in negatives] for row in mined.to_list()}
        self.targets_encoded += len(self._corpus)


def _with_scores(tuples: Dataset, corpus: Corpus, teacher: EmbeddingTeacher) -> Dataset:
    """Mined tuples with the teacher's scores of their targets, as :class:`DistillKLDivLoss` takes them."""
    row_of = {text: row for row, text in enumerate(corpus.texts(range(len(corpus))))}
    anchor, *columns = tuples.column_names

    def scored(batch: dict[str, list[str]]) -> dict[str, list[list[float]]]:
        keys, own = torch.from_numpy(query_keys(batch[anchor])), query_keys(map(normalized, batch[anchor]), own=True)
        keys = torch.where(teacher.knows(keys), keys, torch.from_numpy(own))
        rows = torch.tensor([[row_of[text] for text in batch[column]] for column in columns]).T
        return {"label": [teacher.scores(key[None], row)[0].tolist() for key, row in zip(keys, rows, strict=True)]}

    return tuples.map(scored, batched=True, batch_size=256)


def mined_while_training(trainer: CorrectorTrainer) -> int:
    """Targets that were encoded to mine again."""
    return sum(each.targets_encoded for each in trainer.callback_handler.callbacks if isinstance(each, MineAgain))
