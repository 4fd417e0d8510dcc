"""What one would do without this package, by sentence-transformers' own means: negatives mined before training, once or
again after some steps or epochs, by the model or by a teacher; a teacher's scores of them; in-batch negatives with a
guide.
"""

from __future__ import annotations

import tempfile
from typing import Any, Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset, concatenate_datasets
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import (
    CachedGISTEmbedLoss,
    DistillKLDivLoss,
    GISTEmbedLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.sentence_transformer.model_card import SentenceTransformerModelCardData
from sentence_transformers.util import dot_score, mine_hard_negatives, pairwise_cos_sim, pairwise_dot_score
from torch import nn
from torch.utils.data import BatchSampler
from transformers import TrainerCallback

from st_corrector import Corpus, CorrectorTrainer, CorrectorTrainingArguments, EmbeddingTeacher, InputError
from st_corrector.data.encoding import prompt_for
from st_corrector.data.query_keys import query_keys
from st_corrector.data.routing import QUERY
from st_corrector.data.text import normalized
from st_corrector.losses.similarity import Similarity
from st_corrector.training.columns import prompts_by_column
from st_corrector.training.plan import share_for

MINED_BY = ("max_score", "absolute_margin", "relative_margin", "range_min")
"""What the arguments and ``mine_hard_negatives`` both know of false negatives, beside ``range_max``."""
_NEAR = 1_000  # targets among which negatives are looked for first
_AT_ONCE = 10**8  # scores of all targets at a time: some 2.4 GB


def pairs_for(corpus: Corpus, args: CorrectorTrainingArguments, *, is_taught: bool = False) -> Dataset:
    """The pairs of the split that is trained on, and of the corpus's own pairs so many that they have the share that
    ``args`` ask for, of the whole: tuples are drawn from all alike.
    """
    split, share = args.train_split or "train", share_for(corpus, args, is_taught=is_taught)
    pairs = corpus.pairs(split)
    if not share:
        return pairs
    count = round(len(pairs) * share / (1 - share))
    return concatenate_datasets([pairs, corpus.own_pairs(count, args.own_question, split, args.seed)])


class KnownEmbeddings:
    """A teacher as :func:`mine_hard_negatives` asks an embedder: what it has embedded already is looked up, and
    compared by cosine, as that function compares.
    """

    def __init__(self, corpus: Corpus, teacher: EmbeddingTeacher) -> None:
        self._teacher = teacher
        self._row_of = {text: row for row, text in enumerate(corpus.texts(range(len(corpus))))}
        self.device = torch.device("cpu")
        self.model_card_data = SentenceTransformerModelCardData()

    def encode_query(self, texts: list[str], **how: Any) -> np.ndarray:
        return F.normalize(self._teacher.query_vectors(keys_of(texts, self._teacher)).float(), dim=-1).numpy()

    def encode_document(self, texts: list[str], **how: Any) -> np.ndarray:
        rows = torch.tensor([self._row_of[text] for text in texts])
        return F.normalize(self._teacher.target_vectors(rows).float(), dim=-1).numpy()

    similarity, similarity_pairwise = staticmethod(dot_score), staticmethod(pairwise_dot_score)


def keys_of(queries: list[str], teacher: EmbeddingTeacher) -> torch.Tensor:
    """The keys by which a teacher knows the questions, which may be the corpus's own."""
    keys, own = torch.from_numpy(query_keys(queries)), query_keys(map(normalized, queries), own=True)
    return torch.where(teacher.knows(keys), keys, torch.from_numpy(own))


def mine(
    model: SentenceTransformer | KnownEmbeddings, corpus: Corpus, pairs: Dataset, args: CorrectorTrainingArguments
) -> Dataset:
    """sentence-transformers' own mining by the model as it is, from the same corpus: n-tuples of texts.

    By its own default it looks at some ten targets a negative, and leaves out the pairs that a margin leaves too few
    of: where the encoder finds little, they are most. Here it looks at 1,000 and, for the pairs that still have too
    few, at all targets, unless ``args.range_max`` says how far.
    """
    pairs = pairs.select_columns(pairs.column_names[:2])
    anchor, positive = pairs.column_names
    with tempfile.TemporaryDirectory() as embeddings:

        def among(range_max: int, wanted: Dataset) -> Dataset:
            return mine_hard_negatives(
                wanted,
                cast(SentenceTransformer, model),
                corpus=corpus.texts(range(len(corpus))),
                corpus_prompt=corpus.prompt,
                num_negatives=args.num_negatives,
                sampling_strategy="top",
                output_format="n-tuple",
                batch_size=256,
                verbose=False,
                cache_folder=embeddings,
                range_max=range_max,
                **{name: getattr(args, name) for name in MINED_BY},
            )

        mined = among(args.range_max or _NEAR, pairs)
        if args.range_max is None:
            # All pairs of a question together: what answers it is no negative of it.
            found = set(zip(mined[anchor], mined[positive], strict=True))
            rows_of: dict[str, list[int]] = {}
            for row, question in enumerate(pairs[anchor]):
                rows_of.setdefault(question, []).append(row)
            answers = pairs[positive][:]
            rest = {
                question: rows
                for question, rows in rows_of.items()
                if any((question, answers[row]) not in found for row in rows)
            }
            mined = mined.select([row for row, question in enumerate(mined[anchor]) if question not in rest])
            left, at_once = list(rest.values()), max(1, _AT_ONCE // len(corpus))
            for first in range(0, len(left), at_once):
                rows_of_some = [row for rows in left[first : first + at_once] for row in rows]
                mined = concatenate_datasets([mined, among(len(corpus), pairs.select(rows_of_some))])
    every = set(zip(pairs[anchor], pairs[positive], strict=True))
    if left_out := len(every) - len(mined):
        print(f"Mining leaves {left_out:,} of {len(every):,} pairs out: they have too few negatives.")
    return mined


class RivalTrainer(CorrectorTrainer):
    """Trains on what nothing is chosen for while training.

    Batches hold each question and each positive once. Negatives may be shared: were every text of an n-tuple to stand
    in a batch once, as sentence-transformers' sampler has it, batches would hold two thirds of what they should where
    mining finds the same negatives for many questions. One positive in a hundred is then a negative in its batch as
    well, from which less is learnt (code search, 8 negatives).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._batches, self._targets = 0, 0
        self.loss.register_forward_pre_hook(self._count)

    def _count(self, loss: nn.Module, inputs: tuple[Any, ...]) -> None:
        if torch.is_grad_enabled():  # not in an evaluation
            self._batches += 1
            self._targets += sum(_texts_in(features) for features in inputs[0][1:])

    @property
    def targets_encoded(self) -> int:
        """Targets of all batches, which are encoded with gradient; of a resumed run those before and of other processes
        as many a batch as since and here.
        """
        batches = self.state.global_step * self.args.gradient_accumulation_steps * self.args.world_size
        return round(self._targets / max(1, self._batches) * batches)

    def get_batch_sampler(self, dataset: Any, *how: Any, **settings: Any) -> BatchSampler | None:
        # Without a format, as negatives that are mined again are put in when a row is read.
        pairs = dataset.with_format(None)
        return super().get_batch_sampler(pairs.select_columns(pairs.column_names[:2]), *how, **settings)


def _texts_in(features: dict[str, torch.Tensor]) -> int:
    """How many texts a column holds; a static encoder's, and those of an attention without padding, stand behind one
    another.
    """
    if "cu_seq_lens_q" in features:
        return len(features["cu_seq_lens_q"]) - 1
    return len(features["offsets"] if "offsets" in features else features["input_ids"])


def mined_trainer(
    model: SentenceTransformer,
    corpus: Corpus,
    args: CorrectorTrainingArguments,
    pairs: Dataset,
    teacher: EmbeddingTeacher | None,
    every: int | None,
    unit: Literal["step", "epoch"],
) -> RivalTrainer:
    """A trainer on mined tuples.

    Args:
        teacher: its scores of the tuples are learnt instead of hard labels, if there is one.
        every: after how many steps or epochs negatives are mined again; by default never.
    """
    if teacher is not None and every is not None:
        raise InputError("A teacher's scores of mined tuples are learnt with --strategy mined-once alone.")
    tuples = mine(model, corpus, pairs, args)
    args.prompts = prompts_of(model, corpus, tuples)
    if teacher is not None:
        return _scores_trainer(model, corpus, args, tuples, teacher)
    if every is None:
        return RivalTrainer(model, args, train_dataset=tuples, loss=_ranking_loss(model, args))
    again = MineAgain(model, corpus, pairs, args, every, unit)
    return RivalTrainer(
        model, args, train_dataset=again.dataset(tuples), loss=_ranking_loss(model, args), callbacks=[again]
    )


def mined_by_teacher_trainer(
    model: SentenceTransformer,
    corpus: Corpus,
    args: CorrectorTrainingArguments,
    pairs: Dataset,
    teacher: EmbeddingTeacher | None,
) -> RivalTrainer:
    """A trainer on tuples that a teacher has mined; with ``args.teacher_scale`` its scores of them are learnt instead
    of hard labels.
    """
    if teacher is None:
        raise InputError("--strategy mined-by-teacher mines with a teacher: give --teacher_model.")
    tuples = mine(KnownEmbeddings(corpus, teacher), corpus, pairs, args)
    args.prompts = prompts_of(model, corpus, tuples)
    if args.teacher_scale is not None:
        return _scores_trainer(model, corpus, args, tuples, teacher)
    return RivalTrainer(model, args, train_dataset=tuples, loss=_ranking_loss(model, args))


def _ranking_loss(model: SentenceTransformer, args: CorrectorTrainingArguments) -> nn.Module:
    similarity = Similarity(model)
    return MultipleNegativesRankingLoss(
        model, scale=args.scale or similarity.default_scale, similarity_fct=similarity.function
    )


class UnscaledDistillKLDivLoss(DistillKLDivLoss):
    """Without the factor of the temperature's square, by which gradients of similarities between −1 and 1 would be so
    small that AdamW's ε slows the steps down.
    """

    def compute_loss_from_embeddings(self, embeddings: list[torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
        return super().compute_loss_from_embeddings(embeddings, labels) / self.student_temperature**2


def _scores_trainer(
    model: SentenceTransformer,
    corpus: Corpus,
    args: CorrectorTrainingArguments,
    tuples: Dataset,
    teacher: EmbeddingTeacher,
) -> RivalTrainer:
    """A trainer on a teacher's scores of tuples."""
    soft = UnscaledDistillKLDivLoss(
        model,
        similarity_fct=pairwise_cos_sim,
        temperature=1 / (args.scale or Similarity(model).default_scale),
        teacher_temperature=1 / args.teacher_scale,
    )
    return RivalTrainer(model, args, train_dataset=_with_scores(tuples, corpus, teacher), loss=soft)


def prompts_of(model: SentenceTransformer, corpus: Corpus, data: Dataset) -> dict[str, str]:
    """What a corrected loss would have put before the columns."""
    return prompts_by_column(prompt_for(model, None, QUERY), prompt_for(model, corpus.prompt), [data])


def guided_trainer(
    model: SentenceTransformer,
    corpus: Corpus,
    args: CorrectorTrainingArguments,
    pairs: Dataset,
    guide: SentenceTransformer | None,
) -> RivalTrainer:
    """In-batch negatives of which a guide leaves out what it finds more relevant than the positive (GISTEmbed). The
    guide reads texts as they were cut for the trained model, with its prompts.
    """
    if guide is None:
        raise InputError("--strategy gist has a teacher as its guide: give --teacher_model.")
    args.prompts = prompts_of(model, corpus, pairs)
    temperature = 1 / (args.scale or Similarity(model).default_scale)
    loss: nn.Module
    if args.mini_batch_size is None:
        loss = GISTEmbedLoss(model, guide, temperature)
    else:
        loss = CachedGISTEmbedLoss(model, guide, temperature, args.mini_batch_size)
    return RivalTrainer(model, args, train_dataset=pairs.select_columns(pairs.column_names[:2]), loss=loss)


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
        keys = keys_of(batch[anchor], teacher)
        rows = torch.tensor([[row_of[text] for text in batch[column]] for column in columns]).T
        return {"label": [teacher.scores(key[None], row)[0].tolist() for key, row in zip(keys, rows, strict=True)]}

    return tuples.map(scored, batched=True, batch_size=256)


def mined_while_training(trainer: CorrectorTrainer) -> int:
    """Targets that were encoded to mine again."""
    return sum(each.targets_encoded for each in trainer.callback_handler.callbacks if isinstance(each, MineAgain))
