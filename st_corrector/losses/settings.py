"""How the corrected corpus is kept: every setting, declared here alone, as those of the choice of negatives are in
:mod:`st_corrector.negatives.settings`.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args

from ..correctors import CORRECTORS, Corrector, make_corrector, read_settings
from ..errors import InputError
from ..search.shortlist import Shortlist
from .divergence import DivergencePolicy

_EARLIER = {  # names of settings before 0.2
    "warmup_steps": "corrector_warmup_steps",
    "warmup_negatives": "corrector_warmup_negatives",
    "divergence": "corrector_divergence",
    "split": "train_split",
}
AUTO, _WITHOUT_A_PLAN = "auto", "mlp"
WarmupNegatives = Literal["stale", "in-batch"]


@dataclass(frozen=True)
class CorrectionSettings:
    """How the corrected corpus is kept: the corrector, when it begins to choose, and what is written back.

    Args:
        corrector: ``"mlp"`` (the paper's kind), ``"ridge"``, ``"identity"`` (no correction), another name of
            :data:`~st_corrector.correctors.CORRECTORS`, or a :class:`Corrector`. ``"auto"`` is ``"mlp"`` in a loss that
            you make; where :class:`CorrectorTrainer` makes it, the plan of the run decides
            (:func:`st_corrector.training.plan.corrector_for`).
        corrector_settings: the settings of a corrector that is given by name, as a JSON object, e.g.
            ``'{"hidden": 128}'``.
        corrector_warmup_steps: for this many steps of the run the corrector learns, but does not choose yet. A refresh
            of the cache does not begin the warm-up again.
        corrector_warmup_negatives: what is taken during the warm-up: ``"stale"``, the hardest targets by the cache as
            it is (and by what has been written back), or ``"in-batch"``, only the positives of the other queries.
        corrector_divergence: what to do with a corrector whose error exceeds that of the uncorrected cache by more than
            0.01 (of ``1 − cos``) over 100 steps: ``"identity"`` continues without it, ``"warn"`` only warns.
        write_back: whether the embeddings that a step has computed replace the stale ones from then on, mapped into the
            frame of the stale embeddings (:meth:`Corrector.pull_back`), so that later corrections move them on. The
            cache itself never changes; the overlay takes a float32 vector for each target ever encoded.
        background_targets: encode this many random targets at each step, without gradient, for the corrector (and
            ``write_back``) alone. They are counted in :attr:`CorrectedCorpus.targets_reencoded`.
        shortlist: score only what an index (or a copy of the cache that is corrected every N steps) suggests, instead
            of every target: see :class:`Shortlist`. Recall is measured and logged.

    Raises:
        InputError: a setting is out of range.
    """

    corrector: str | Corrector = field(
        default=AUTO,
        metadata={
            "help": f"One of {', '.join(CORRECTORS)}; or auto: mlp with a teacher, without write_back, or where the "
            "run encodes fewer targets than a quarter of the corpus; else identity."
        },
    )
    corrector_settings: str = field(
        default="{}", metadata={"help": "The corrector's settings as a JSON object, e.g. '{\"hidden\": 128}'."}
    )
    corrector_warmup_steps: int = field(
        default=0, metadata={"help": "Steps in which the corrector learns, but does not choose yet."}
    )
    corrector_warmup_negatives: WarmupNegatives = field(
        default="stale",
        metadata={"help": "Negatives during the warm-up: the hardest by the stale cache, or in-batch negatives alone."},
    )
    corrector_divergence: DivergencePolicy = field(
        default="identity",
        metadata={
            "help": "What to do with a corrector that makes things worse: continue without it (identity), or warn."
        },
    )
    write_back: bool = field(
        default=True, metadata={"help": "Freshly computed embeddings replace the stale ones from then on."}
    )
    background_targets: int = field(
        default=0, metadata={"help": "Random targets encoded at each step for the corrector alone."}
    )
    shortlist: Shortlist | None = None

    def __post_init__(self) -> None:
        if isinstance(self.corrector, str) and self.corrector not in (AUTO, *CORRECTORS):
            raise InputError(f"corrector {self.corrector!r} is not one of {', '.join((AUTO, *CORRECTORS))}.")
        if isinstance(self.corrector, Corrector) and read_settings(self.corrector_settings):
            raise InputError(f"corrector_settings are for a corrector given by name; {self.corrector!r} has its own.")
        if read_settings(self.corrector_settings) and self.corrector == AUTO:
            raise InputError("corrector_settings are for a corrector given by name: pass corrector='mlp', or another.")
        if self.corrector_warmup_steps < 0:
            raise InputError(f"corrector_warmup_steps must not be negative, got {self.corrector_warmup_steps}.")
        if self.background_targets < 0:
            raise InputError(f"background_targets must not be negative, got {self.background_targets}.")
        for name, allowed in (
            ("corrector_warmup_negatives", WarmupNegatives),
            ("corrector_divergence", DivergencePolicy),
        ):
            if getattr(self, name) not in get_args(allowed):
                raise InputError(
                    f"{name} must be {' or '.join(map(repr, get_args(allowed)))}, got {getattr(self, name)!r}."
                )

    def make_corrector(self, dim: int, *, unit: bool) -> Corrector:
        """The corrector of these settings.

        Args:
            dim: dimension of the embeddings.
            unit: whether the encoder's embeddings are compared as unit vectors; then a corrector given by name returns
                unit vectors too.

        Raises:
            InputError: a ready-made corrector is for another dimension, or returns unit vectors where the encoder's are
                not compared as such; or it has no such setting.
        """
        named = (
            {}
            if isinstance(self.corrector, Corrector)
            else {"normalize": unit, **read_settings(self.corrector_settings)}
        )
        corrector = make_corrector(_WITHOUT_A_PLAN if self.corrector == AUTO else self.corrector, dim, **named)
        if corrector.normalize and not unit:
            raise InputError(
                f"{corrector!r} returns unit vectors, but the encoder's embeddings are not and are compared by dot "
                "product: make it with normalize=False."
            )
        return corrector


def with_others(groups: Sequence[Any], short: Mapping[str, Any], earlier: Mapping[str, Any]) -> list[Any]:
    """Groups of settings, each with what was given of it beside.

    Args:
        groups: instances of dataclasses.
        short: short forms of the common ones, by name; None where not given.
        earlier: as they were given before there were groups, which is deprecated.

    Raises:
        TypeError: there is no such setting.
    """
    given: dict[str, Any] = {_EARLIER.get(name, name): value for name, value in earlier.items()}
    if earlier:
        warnings.warn(
            f"Pass {', '.join(given)} in negatives=NegativeSettings(…) or correction=CorrectionSettings(…).",
            DeprecationWarning,
            stacklevel=3,
        )
    given |= {name: value for name, value in short.items() if value is not None}
    settings: list[Any] = []
    for group in groups:
        names = [each.name for each in fields(group) if each.name in given]
        settings.append(replace(group, **{name: given.pop(name) for name in names}))
    if given:
        raise TypeError(f"The loss has no setting {next(iter(given))!r}.")
    return settings
