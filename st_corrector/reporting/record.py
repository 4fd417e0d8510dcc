"""What a training run was and did, as one JSON file: what its model card and its report are made from.

``CorrectorTrainer`` writes it into its output folder, where it stays when the model is pushed to the Hub: like all that
begins with an underscore.
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
"""Of :class:`CorpusRetrievalEvaluator`, in the order in which they are shown."""
_SCHEMA = 1
_LARGEST = 256 << 20  # bytes
_LARGEST_INTEGER = 1 << 63


@dataclass
class Chosen:
    """A target that a query has taken as a negative.

    Args:
        id: of the target.
        text: its beginning.
        corrected_score: ``⟨f(x), h(g'(y))⟩``, by which it was chosen.
        score: ``⟨f(x), g(y)⟩``, by the encoder as it was then.
        has_answer: whether it contains one of the query's answers; None where there are none.
    """

    id: str
    text: str
    corrected_score: float
    score: float
    has_answer: bool | None = None


@dataclass
class Choice:
    """What a query took after so many steps.

    Args:
        step: of the optimizer.
        positive_score: of the query's positive, by the encoder as it was then.
        negatives: the hardest first.
    """

    step: int
    positive_score: float
    negatives: list[Chosen]


@dataclass
class Example:
    """A training query, and what it took as negatives early and late.

    Args:
        query, positive: texts, their beginnings.
        choices: by step, ascending.
    """

    query: str
    positive: str
    choices: list[Choice] = field(default_factory=list)


@dataclass
class LossRecord:
    """How negatives were chosen by one loss, and what that took.

    Args:
        settings: :meth:`CorrectedMultipleNegativesLoss.get_config_dict`.
        corpus: ``name`` (may be null), ``targets``, ``fingerprint`` and ``splits``: queries by split.
        cache: ``dtype``, ``dim``, ``bytes`` and ``fingerprint``, of which what is long is a digest; None for a loss
            without one.
        counts: ``targets_encoded`` for the loss, ``targets_verified`` and ``targets_reencoded`` for the cache alone.
        removed: candidates that each rule on false negatives has removed.
        diverged: whether the corrector has made things worse and was given up.
        examples: queries with their choices.
    """

    settings: dict[str, Any]
    corpus: dict[str, Any]
    cache: dict[str, Any] | None
    counts: dict[str, int] = field(default_factory=dict)
    removed: dict[str, int] = field(default_factory=dict)
    diverged: bool = False
    examples: list[Example] = field(default_factory=list)


@dataclass
class RunRecord:
    """A training run.

    Args:
        model: ``name`` (the card's, or what modules it consists of), ``parameters``, ``trainable``, ``dim`` and
            ``similarity``.
        arguments: the training arguments that are not their defaults; no folders, no tokens.
        losses: by data set's name; ``""`` where there is one.
        steps: of the optimizer, taken so far.
        seconds: spent training, by the clock, resumed parts included.
        processes: that trained together.
        log: what was logged, entry by entry, each with its ``step``.
        evaluations: metrics of the whole corpus by when they were measured: ``"before"``, ``"after"``, a step's number.
        versions: of this package and those that it builds on.
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

    def save(self, run: Path) -> None:
        """Write it into the folder of a run.

        Raises:
            StorageError: it cannot be written.
        """
        text = json.dumps({"schema": _SCHEMA, **asdict(self)}, indent=1, ensure_ascii=False, allow_nan=True)
        with whole(run / FILE) as partial:
            # Halves of characters, which only JSON's own escapes can stand for, are written as these.
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
        """The metrics of one of :attr:`evaluations`, by :data:`METRICS`, whatever the evaluator's name before them."""
        found = {}
        for name, value in self.evaluations[when].items():
            # The longest: "dev_answer_recall@20" ends with another one's name, too.
            fitting = [metric for metric in METRICS if name == metric or name.endswith(f"_{metric}")]
            if fitting:
                found[max(fitting, key=len)] = value
        return {metric: found[metric] for metric in METRICS if metric in found}

    @property
    def series(self) -> list[dict[str, Any]]:
        """The entries of the log that are about training steps."""
        return [entry for entry in self.log if "loss" in entry or any(name.endswith("drift") for name in entry)]


def _read(kind: Any, found: Any, name: str) -> Any:
    """What was found, if it is of that type throughout.

    Args:
        kind: a dataclass, a list or dictionary of a type, a type or None, a plain type, or Any.
        name: of what was found, for the error.

    Raises:
        TypeError: it is not.
        ValueError: a number is larger than any that was written.
    """
    if kind is Any:  # down to where nothing is held, so that whatever is nested too deeply to be shown is refused here
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
