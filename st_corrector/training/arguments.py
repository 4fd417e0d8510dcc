"""The training arguments: sentence-transformers' own, and how negatives are chosen."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, get_args

from sentence_transformers import SentenceTransformerTrainingArguments

from ..correctors import CORRECTORS, read_settings
from ..errors import InputError
from ..negatives.filters import FalseNegativeFilter
from ..search.exact import SAMPLERS
from .guard import NonFinitePolicy


@dataclass
class CorrectorTrainingArguments(SentenceTransformerTrainingArguments):
    """:class:`~sentence_transformers.SentenceTransformerTrainingArguments`, and how negatives are chosen.
    :class:`CorrectorTrainer` makes its loss and its cache of them.

    What is not explained here is in :class:`CorrectedMultipleNegativesLoss`.

    Raises:
        InputError: a setting is out of its range.
    """

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
    cache_batch_size: int = field(default=64, metadata={"help": "Targets in one forward pass while it is built."})
    cache_on_device: bool = field(
        default=False,
        metadata={"help": "Hold the cache (of each process, its part) on the model's device: faster, if it fits."},
    )
    num_negatives: int = field(default=16, metadata={"help": "Targets that each query takes as negatives."})
    corrector: str = field(default="mlp", metadata={"help": f"One of {', '.join(CORRECTORS)}."})
    corrector_settings: str = field(
        default="{}", metadata={"help": "The corrector's settings as JSON (or a dict), e.g. '{\"hidden\": 128}'."}
    )
    corrector_warmup_steps: int = field(
        default=0, metadata={"help": "Steps in which the corrector learns, but does not choose yet."}
    )
    corrector_warmup_negatives: str = field(
        default="stale", metadata={"help": "What is taken until then: stale or in-batch negatives."}
    )
    sampler: str = field(
        default="top_k",
        metadata={"help": "top_k: the hardest; gumbel: a sample from the corrected softmax; mixed; uniform."},
    )
    budget: str = field(
        default="query", metadata={"help": "Whether num_negatives are every query's, or the batch's to share out."}
    )
    share_negatives: bool = field(
        default=True, metadata={"help": "Whether every query sees the targets taken by the others of its batch."}
    )
    write_back: bool = field(
        default=True,
        metadata={"help": "Let freshly encoded targets stand for their stale embeddings from then on."},
    )
    candidates: int | None = field(
        default=None, metadata={"help": "Verify so many targets for each query by encoding them, and keep the hardest."}
    )
    background_targets: int = field(
        default=0, metadata={"help": "Random targets encoded at each step for the corrector alone."}
    )
    max_score: float | None = field(default=None, metadata={"help": "No negative may score higher."})
    absolute_margin: float | None = field(
        default=None, metadata={"help": "Negatives score at least so much less than the positive."}
    )
    relative_margin: float | None = field(
        default=None, metadata={"help": "Negatives score at most (1 - relative_margin) times what the positive does."}
    )
    range_min: int = field(default=0, metadata={"help": "Leave out so many of the hardest targets."})
    range_max: int | None = field(default=None, metadata={"help": "Take negatives from so many of the hardest."})
    scale: float | None = field(
        default=None,
        metadata={"help": "Inverse temperature of the softmax; by default 20, or 1 where lengths of vectors count."},
    )
    mini_batch_size: int | None = field(
        default=None,
        metadata={"help": "Cache gradients: encode so many texts at once, for batches that do not fit into memory."},
    )
    refresh_every: int | None = field(
        default=None, metadata={"help": "Re-embed the whole corpus every so many steps: the dear way."}
    )
    probe_every: int | None = field(
        default=None,
        metadata={"help": "Measure every so many steps what of the selection fresh embeddings would make."},
    )
    example_queries: int = field(
        default=8,
        metadata={"help": "Training queries whose negatives, early and late, are recorded for the run's report."},
    )
    corrector_divergence: str = field(
        default="identity",
        metadata={"help": "What to do with a corrector that makes things worse: identity (go on without) or warn."},
    )
    non_finite: str = field(
        default="stop",
        metadata={
            "help": "What to do when something is NaN or infinite: stop, or skip the step, ten in a row at most."
        },
    )
    train_split: str = field(
        default="train", metadata={"help": "The corpus split that is trained on; its judgements are never negatives."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        if isinstance(self.corrector_settings, dict):
            self.corrector_settings = json.dumps(self.corrector_settings)
        read_settings(self.corrector_settings)
        if self.corrector not in CORRECTORS:
            raise InputError(f"corrector {self.corrector!r} is not one of {', '.join(CORRECTORS)}.")
        if self.sampler not in SAMPLERS:
            raise InputError(f"sampler {self.sampler!r} is not one of {', '.join(SAMPLERS)}.")
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

    @property
    def corrector_options(self) -> dict[str, Any]:
        """:attr:`corrector_settings`, read."""
        return read_settings(self.corrector_settings)

    @property
    def loss_settings(self) -> dict[str, Any]:
        """What of these :class:`CorrectedMultipleNegativesLoss` takes by the same or another name."""
        names = ("num_negatives", "sampler", "budget", "share_negatives", "write_back", "candidates")
        return {
            **{name: getattr(self, name) for name in (*names, "background_targets", "scale")},
            "warmup_steps": self.corrector_warmup_steps,
            "warmup_negatives": self.corrector_warmup_negatives,
            "divergence": self.corrector_divergence,
            "split": self.train_split,
            "false_negatives": FalseNegativeFilter(
                max_score=self.max_score,
                absolute_margin=self.absolute_margin,
                relative_margin=self.relative_margin,
                range_min=self.range_min,
                range_max=self.range_max,
            ),
        }
