"""The record of a training run, as one JSON file: the source of its model card and report.

``CorrectorTrainer`` writes it into its output folder. Its name begins with an underscore, so it is not pushed to the
Hub.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from ..errors import InputError
from ..storage.files import whole

FILE = "_run.json"
METRICS = (
    "ndcg@10",
    "mrr@10",
    *(f"{kind}@{k}" for kind in ("recall", "answer_recall") for k in (1, 5, 20, 100)),
)
"""Metrics of :class:`CorpusRetrievalEvaluator`, in display order."""
_SCHEMA = 1
_LARGEST = 256 << 20  # bytes
_LARGEST_INTEGER = 1 << 63


@dataclass
class Chosen:
    """A target that a query took as a negative.

    Args:
        id: of the target.
        text: its beginning.
        corrected_score: ``⟨f(x), h(g'(y))⟩``, by which it was chosen.
        score: ``⟨f(x), g(y)⟩``, by the encoder at that step.
        has_answer: whether it contains one of the query's answers; None if it has none.
    """

    id: str
    text: str
    corrected_score: float
    score: float
    has_answer: bool | None = None


@dataclass
class Choice:
    """A query's negatives at some step.

    Args:
        step: of the optimizer.
        positive_score: of the query's positive, by the encoder at that step.
        negatives: hardest first.
    """

    step: int
    positive_score: float
    negatives: list[Chosen]


@dataclass
class Example:
    """A training query, and its early and late negatives.

    Args:
        query, positive: beginnings of the texts.
        choices: by step, ascending.
    """

    query: str
    positive: str
    choices: list[Choice] = field(default_factory=list)


@dataclass
class LossRecord:
    """How one loss chose negatives, and at what cost.

    Args:
        settings: :meth:`CorrectedMultipleNegativesLoss.get_config_dict`.
        corpus: ``name`` (may be null), ``targets``, ``fingerprint`` and ``splits``: queries by split.
        cache: ``dtype``, ``dim``, ``bytes`` and ``fingerprint``, with digests for long values; None for a loss without
            one.
        counts: ``targets_encoded`` for the loss, ``targets_verified`` and ``targets_reencoded`` only for the cache.
        removed: candidates removed by each rule on false negatives.
        diverged: whether the corrector made things worse and was switched off.
        examples: queries with their choices.
    """

    settings: dict[str, Any]
    corpus: dict[str, Any]
    cache: dict[str, Any] | None
    counts: dict[str, int] = field(default_factory=dict)
    removed: dict[str, int] = field(default_factory=dict)
    diverged: bool = False
    examples: list[Example] = field(default_factory=list)

    @property
    def is_corrected(self) -> bool:
        """Whether there is a corrector; else embeddings were written back at most."""
        return not str(self.settings.get("corrector")).startswith("IdentityCorrector")

    @property
    def labels(self) -> str | None:
        """Whose labels there were beside the hard ones, how far they were trusted in the end, and why; None without a
        teacher.
        """
        teacher, weight, scale = (self.settings.get(name) for name in ("teacher", "teacher_weight", "teacher_scale"))
        if teacher is None or weight is None or scale is None:
            return None
        said = f"hard ones, and those of {teacher} with weight {weight:.2g} and scale {scale:.3g}"
        theirs, ours = self.settings.get("teacher_mrr"), self.settings.get("encoder_mrr")
        if theirs is None or ours is None:
            return f"{said}, as they were set"
        named = self.settings.get("found_out") or ["weight", "scale"]
        what = "" if len(named) == 2 else f"of which the {named[0]} was "
        return f"{said}, {what}found out on held-out training questions: MRR@10 {theirs:.3f}, the encoder's {ours:.3f}"


@dataclass
class ServingChoice:
    """One of the things to do with the index that serves: see :class:`~st_corrector.carry_over.plan.Choice`.

    Args:
        low, high: the recall's interval.
    """

    name: str
    recall: float
    low: float
    high: float
    encodings: int
    seconds: float
    writes: bool


@dataclass
class Serving:
    """What ``st-corrector serve-plan`` has found: see :class:`~st_corrector.carry_over.plan.ServePlan`."""

    k: int
    wanted: float
    confidence: float
    targets: int
    queries: int
    encoded: int
    choices: list[ServingChoice]
    recommended: str
    why: str


@dataclass
class RunRecord:
    """A training run.

    Args:
        model: ``name`` (the card's, or its modules), ``parameters``, ``trainable``, ``dim`` and ``similarity``.
        arguments: the training arguments that differ from their defaults; no folders, no tokens.
        losses: by data set's name; ``""`` if there is only one.
        steps: of the optimizer, so far.
        seconds: wall-clock training time, resumed parts included.
        processes: how many trained together.
        log: its entries, each with its ``step``.
        evaluations: metrics of the whole corpus by time of measurement: ``"before"``, ``"after"``, a step's number.
        versions: of this package and its dependencies.
        serving: what to do with the index that serves, once that was measured.
    """

    model: dict[str, Any]
    arguments: dict[str, Any]
    losses: dict[str, LossRecord]
    steps: int = 0
    seconds: float = 0.0
    processes: int = 1
    log: list[dict[str, Any]] = field(default_factory=list)
    evaluations: dict[str, dict[str, float]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    serving: Serving | None = None

    def save(self, run: Path) -> None:
        """Write it into the folder of a run.

        Raises:
            StorageError: it cannot be written.
        """
        text = json.dumps({"schema": _SCHEMA, **asdict(self)}, indent=1, ensure_ascii=False, allow_nan=True)
        with whole(run / FILE) as partial:
            # Half characters, which only JSON's escapes can represent, are written as escapes.
            partial.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")

    @classmethod
    def load(cls, run: Path) -> RunRecord:
        """The record of the run in the folder ``run``.

        Raises:
            InputError: there is none, or it is damaged.
        """
        path = run / FILE
        if not path.is_file():
            raise InputError(
                f"{run} holds no record of a run (no {FILE}): it is written by CorrectorTrainer into its output_dir."
            )
        try:
            if path.stat().st_size > _LARGEST:
                raise ValueError(f"{path.stat().st_size:,} bytes")
            found = json.loads(path.read_bytes())
            if not isinstance(found, dict) or found.pop("schema", None) != _SCHEMA:
                raise ValueError("it is none, or another version of st_corrector wrote it")
            record: RunRecord = _read(cls, found, "the record")
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise InputError(f"{path} is not readable as the record of a run ({error}).") from error
        return record

    def reached(self, when: str) -> dict[str, float]:
        """The metrics of one of :attr:`evaluations`, by :data:`METRICS`, without the evaluator's name prefix."""
        found = {}
        for name, value in self.evaluations[when].items():
            # The longest match: "dev_answer_recall@20" also ends with another metric's name.
            fitting = [metric for metric in METRICS if name == metric or name.endswith(f"_{metric}")]
            if fitting:
                found[max(fitting, key=len)] = value
        return {metric: found[metric] for metric in METRICS if metric in found}

    @property
    def series(self) -> list[dict[str, Any]]:
        """The log's entries about training steps."""
        return [entry for entry in self.log if "loss" in entry or any(name.endswith("drift") for name in entry)]


def _read(kind: Any, found: Any, name: str) -> Any:
    """``found``, checked to be of that type throughout.

    Args:
        kind: a dataclass, a list or dictionary of a type, a type or None, a plain type, or Any.
        name: of the value, for the error.

    Raises:
        TypeError: it is not of that type.
        ValueError: a number is larger than any that this package writes.
    """
    if kind is Any:  # down to empty containers, so that nesting too deep to be shown is refused here
        if isinstance(found, (list, dict)):
            return _read(list[Any] if isinstance(found, list) else dict[str, Any], found, name)
        return found
    inner, actual, has_fields = get_args(kind), type(found), is_dataclass(kind)
    if type(None) in inner:
        return None if found is None else _read(inner[0], found, name)
    plain = get_origin(kind) or (dict if has_fields else kind)
    if actual is not plain and not (plain is float and actual is int):
        raise TypeError(f"{name} is a {actual.__name__}, expected a {plain.__name__}")
    if actual is int and abs(found) >= _LARGEST_INTEGER:
        raise ValueError(f"{name} is larger than any number that is written")
    if plain is list:
        return [_read(inner[0], each, f"{name}[{n}]") for n, each in enumerate(found)]
    if inner:
        return {key: _read(inner[1], each, f"{name}, {key:.40}") for key, each in found.items()}
    if not has_fields:
        return kind(found)
    types = get_type_hints(kind)
    if unknown := sorted(found.keys() - types.keys()):
        raise TypeError(f"{name} has {unknown[0]!r:.80}, which is not known")
    return kind(**{key: _read(types[key], each, f"{name}, {key}") for key, each in found.items()})
