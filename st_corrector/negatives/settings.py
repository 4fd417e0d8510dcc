"""How negatives are chosen: every setting, declared here alone. The loss, the training arguments and the command line
take defaults and help texts from here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from ..errors import InputError
from ..search.exact import Sampler
from .filters import FalseNegativeFilter

HardnessMode = Literal["in_batch_negatives", "hard_negatives", "all_negatives"]


@dataclass(frozen=True)
class NegativeSettings:
    """How negatives are chosen.

    Args:
        num_negatives: how many targets each query takes. 0 leaves plain in-batch negatives.
        sampler: ``"top_k"`` takes the hardest targets; ``"gumbel"`` samples from the corrected softmax without
            replacement; ``"uniform"`` samples from all targets alike.
        candidates: verify: take this many targets for each query by corrected score (more than ``num_negatives``),
            encode them without gradient, and keep the hardest by fresh score. Their fresh embeddings train the
            corrector too. It costs these encodings (:attr:`CorrectedMultipleNegativesLoss.targets_verified`).
        share_negatives: whether every query also sees the negatives of the other queries in its batch.
        in_batch_negatives: whether the positives of the other queries are negatives too.
        scale: inverse temperature β: the similarities are multiplied by it in the softmax, and by it ``"gumbel"``
            samples. By default 20 for cosine similarity and unit vectors, and 1 for the dot product of others.
        train_split: the corpus split that is trained on: its judgements say what else is relevant to a query. Where
            one target answers several queries of the split, nothing that is relevant to any of them is a negative for
            them. With ``None``, or a corpus without splits, the labels are all that is known, and other positives of a
            query may become its negatives.
        hardness_mode: which negatives count the more the harder they are, as
            :class:`~sentence_transformers.sentence_transformer.losses.MultipleNegativesRankingLoss` has it:
            ``"hard_negatives"``, those that a query has taken itself (`Schechter Vera et al. 2025
            <https://arxiv.org/abs/2509.20354>`_), ``"in_batch_negatives"``, all others (`Lan et al. 2025
            <https://arxiv.org/abs/2503.04812>`_), or ``"all_negatives"``. By default none.
        hardness_strength: by how much: times its similarity, without gradient, it is added to a negative's logit.
        false_negatives: which targets are too similar to be negatives, judged by corrected scores when they are chosen
            and by fresh scores in the softmax.

    Raises:
        InputError: a setting is out of range, or two of them do not go together.
    """

    num_negatives: int = field(
        default=16, metadata={"help": "Targets that each query takes as negatives; 0 leaves in-batch negatives."}
    )
    sampler: Sampler = field(
        default="top_k",
        metadata={
            "help": "top_k: the hardest targets; gumbel: a sample from the corrected softmax; uniform: any targets."
        },
    )
    candidates: int | None = field(
        default=None,
        metadata={"help": "Verify: encode this many targets for each query, and keep the hardest by fresh score."},
    )
    share_negatives: bool = field(
        default=True, metadata={"help": "Every query also sees the negatives of the other queries in its batch."}
    )
    in_batch_negatives: bool = field(
        default=True, metadata={"help": "The positives of the other queries are negatives too."}
    )
    scale: float | None = field(
        default=None,
        metadata={
            "help": "Inverse temperature of the softmax; by default 20, or 1 where the lengths of vectors count."
        },
    )
    train_split: str | None = field(
        default="train",
        metadata={"help": "The corpus split that is trained on; what it judges relevant is never a negative."},
    )
    hardness_mode: HardnessMode | None = field(
        default=None,
        metadata={
            "help": "Which negatives count the more the harder they are: in_batch_negatives, hard_negatives or "
            "all_negatives."
        },
    )
    hardness_strength: float = field(
        default=0.0, metadata={"help": "How much more: it is multiplied by their similarity and added to their logit."}
    )
    false_negatives: FalseNegativeFilter = field(default_factory=FalseNegativeFilter)

    def __post_init__(self) -> None:
        if self.num_negatives < 0:
            raise InputError(f"num_negatives must not be negative, got {self.num_negatives}.")
        if self.scale is not None and not self.scale > 0:
            raise InputError(f"scale must be positive, got {self.scale}.")
        if self.candidates is not None and self.candidates <= self.num_negatives:
            raise InputError(
                f"candidates are what the {self.num_negatives} negatives are chosen from: there must be more, got "
                f"{self.candidates}."
            )
        if self.sampler not in get_args(Sampler):
            raise InputError(f"sampler {self.sampler!r} is not one of {', '.join(get_args(Sampler))}.")
        if self.hardness_mode not in (None, *get_args(HardnessMode)):
            raise InputError(
                f"hardness_mode must be None or one of {', '.join(get_args(HardnessMode))}, got {self.hardness_mode!r}."
            )
        if self.hardness_strength < 0 or (self.hardness_mode is None) != (self.hardness_strength == 0):
            raise InputError(
                f"hardness_mode={self.hardness_mode!r} and hardness_strength={self.hardness_strength} do not go "
                "together: set both, with a positive strength such as 5, or none."
            )
        rules = self.false_negatives
        if rules.range_max is None and rules.range_min and self.sampler != "top_k":
            raise InputError(
                f"range_min={rules.range_min} leaves out the hardest, which sampler={self.sampler!r} does not rank: "
                "set range_max as well, and the ranks between them are sampled from."
            )
        wanted = self.candidates or self.num_negatives
        if rules.range_max is not None and rules.range_max - rules.range_min < wanted:
            raise InputError(
                f"Between range_min={rules.range_min} and range_max={rules.range_max} there must be room for the "
                f"{wanted} {'candidates' if self.candidates else 'negatives'} of each query."
            )
