"""The training arguments: sentence-transformers' own, and the settings of negatives and of the corrected corpus."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from typing import Any, get_args

from sentence_transformers import SentenceTransformerTrainingArguments

from ..errors import InputError
from ..losses.distillation import DistillationSettings
from ..losses.settings import CorrectionSettings
from ..negatives.filters import Check, FalseNegativeFilter
from ..negatives.settings import NegativeSettings
from ..teachers import Teacher
from .guard import NonFinitePolicy

SETTINGS = (NegativeSettings, FalseNegativeFilter, CorrectionSettings, DistillationSettings)
"""The single sources of the arguments that are settings. A command line cannot hold checks, a teacher or a shortlist:
checks and a teacher go to the trainer, a shortlist to a loss of one's own.
"""


def _declared_in(settings: type, name: str) -> Any:
    """A field of the arguments whose default and help text are those of a setting."""
    (setting,) = (each for each in fields(settings) if each.name == name)
    return field(default=setting.default, metadata=setting.metadata)


@dataclass
class CorrectorTrainingArguments(SentenceTransformerTrainingArguments):
    """:class:`~sentence_transformers.SentenceTransformerTrainingArguments`, the settings of
    :class:`NegativeSettings`, :class:`FalseNegativeFilter`, :class:`CorrectionSettings` and
    :class:`DistillationSettings`, which explain them, and what the trainer itself does. :class:`CorrectorTrainer` makes
    its loss and its cache by them.

    Raises:
        InputError: a setting is out of its range.
    """

    num_negatives: int = _declared_in(NegativeSettings, "num_negatives")
    sampler: str = _declared_in(NegativeSettings, "sampler")
    candidates: int | None = _declared_in(NegativeSettings, "candidates")
    share_negatives: bool = _declared_in(NegativeSettings, "share_negatives")
    in_batch_negatives: bool = _declared_in(NegativeSettings, "in_batch_negatives")
    scale: float | None = _declared_in(NegativeSettings, "scale")
    train_split: str | None = _declared_in(NegativeSettings, "train_split")
    hardness_mode: str | None = _declared_in(NegativeSettings, "hardness_mode")
    hardness_strength: float = _declared_in(NegativeSettings, "hardness_strength")
    max_score: float | None = _declared_in(FalseNegativeFilter, "max_score")
    absolute_margin: float | None = _declared_in(FalseNegativeFilter, "absolute_margin")
    relative_margin: float | None = _declared_in(FalseNegativeFilter, "relative_margin")
    range_min: int = _declared_in(FalseNegativeFilter, "range_min")
    range_max: int | None = _declared_in(FalseNegativeFilter, "range_max")
    corrector: str = _declared_in(CorrectionSettings, "corrector")
    corrector_settings: str = _declared_in(CorrectionSettings, "corrector_settings")
    corrector_warmup_steps: int = _declared_in(CorrectionSettings, "corrector_warmup_steps")
    corrector_warmup_negatives: str = _declared_in(CorrectionSettings, "corrector_warmup_negatives")
    corrector_divergence: str = _declared_in(CorrectionSettings, "corrector_divergence")
    write_back: bool = _declared_in(CorrectionSettings, "write_back")
    background_targets: int = _declared_in(CorrectionSettings, "background_targets")
    distillation_loss: str = _declared_in(DistillationSettings, "distillation_loss")
    teacher_weight: float | None = _declared_in(DistillationSettings, "teacher_weight")
    teacher_scale: float | None = _declared_in(DistillationSettings, "teacher_scale")

    own_pairs_share: float | None = field(
        default=None,
        metadata={
            "help": "Share of every batch that are the corpus's own pairs: targets that no training question asks for, "
            "each with a question of its own. By default 0.36 in a run that goes through the split's questions more "
            "than once, with a teacher three times and more, else 0."
        },
    )
    own_question: str | None = field(
        default=None,
        metadata={"help": "A target's own question: title or first_sentence; by default the title, if there are any."},
    )
    cache_path: str | None = field(
        default=None,
        metadata={
            "help": "Where the embedding cache is, or is built; by default in output_dir. With model_init: a folder "
            "for a cache of each model."
        },
    )
    cache_dtype: str = field(
        default="float32", metadata={"help": "What the cache is stored in: float32, bfloat16, float16 or int8."}
    )
    cache_batch_size: int = field(
        default=64, metadata={"help": "Targets in one forward pass where the cache is built or refreshed."}
    )
    cache_on_device: bool = field(
        default=False,
        metadata={"help": "Hold the cache (each process its part) on the model's device: faster, if it fits."},
    )
    mini_batch_size: int | None = field(
        default=None,
        metadata={"help": "Cache gradients: encode this many texts at once, for batches that do not fit into memory."},
    )
    refresh_every: int | None = field(
        default=None, metadata={"help": "Re-embed the whole corpus every N steps, which is expensive."}
    )
    probe_every: int | None = field(default=None, metadata={"help": "Measure the selection's fidelity every N steps."})
    probe_targets: int | None = field(
        default=4096, metadata={"help": "Targets of the corpus among which fidelity is measured."}
    )
    example_queries: int = field(
        default=8,
        metadata={"help": "Training queries whose negatives, early and late, are recorded for the run's report."},
    )
    non_finite: str = field(
        default="stop",
        metadata={"help": "When something is NaN or infinite: stop, or skip the step, at most ten in a row."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        if isinstance(self.corrector_settings, dict):
            self.corrector_settings = json.dumps(self.corrector_settings)
        self.negatives()
        self.correction()
        self.distillation()
        if not 0 <= (self.own_pairs_share or 0) < 1:
            raise InputError(f"own_pairs_share is a share of a batch, below 1, got {self.own_pairs_share}.")
        if self.non_finite not in get_args(NonFinitePolicy):
            raise InputError(f"non_finite must be 'stop' or 'skip', got {self.non_finite!r}.")
        if self.non_finite == "skip" and self.fp16:
            raise InputError(
                "With fp16 the gradients' scaler leaves out steps by itself and cannot know of others: use bf16, or "
                "non_finite='stop'."
            )

    def __repr__(self) -> str:
        return str(self)  # which hides tokens

    def __getstate__(self) -> dict[str, Any]:
        """Without the token: the trainer pickles its arguments into every checkpoint, and these may be pushed."""
        return {**self.__dict__, "hub_token": None}

    def negatives(self, checks: tuple[Check, ...] = ()) -> NegativeSettings:
        """How negatives are chosen, as these arguments say.

        Args:
            checks: rules on false negatives that look at texts; no command line has them.
        """
        filtered = FalseNegativeFilter(**self._of(FalseNegativeFilter), checks=checks)
        return NegativeSettings(**self._of(NegativeSettings), false_negatives=filtered)

    def correction(self) -> CorrectionSettings:
        """How the corrected corpus is kept, as these arguments say."""
        return CorrectionSettings(**self._of(CorrectionSettings))

    def distillation(self, teacher: Teacher | None = None) -> DistillationSettings:
        """How a teacher labels candidates, as these arguments say.

        Args:
            teacher: which no command line has.
        """
        return DistillationSettings(**self._of(DistillationSettings), teacher=teacher)

    def _of(self, settings: type) -> dict[str, Any]:
        mine = {each.name for each in fields(self)}
        return {each.name: getattr(self, each.name) for each in fields(settings) if each.name in mine}
