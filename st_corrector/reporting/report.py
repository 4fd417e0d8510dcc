"""The report of a run: one self-contained HTML file, made from the run's record."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, isfinite
from pathlib import Path
from statistics import fmean
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from .._version import __version__
from ..storage.files import whole
from .charts import Chart, evaluations_by_step, loss_charts, run_charts, values_of
from .record import Choice, Example, LossRecord, RunRecord

_SENTENCES = 5
_SHORT = 160  # characters of a text shown at first
_NEGATIVES = 4  # negatives of a choice shown at first
_COUNTS = {
    "targets_encoded": "for the loss, positives and negatives",
    "targets_verified": "to verify candidates, without gradient",
    "targets_reencoded": "for the cache alone, or to compare a teacher with the encoder",
}

Facts = list[tuple[str, str]]


def write_report(record: RunRecord, path: Path) -> Path:
    """Write the report of a run.

    It has no scripts and no external references; texts of the corpus are shown verbatim and never interpreted as
    markup. The same record gives the same file.

    Args:
        path: the HTML file.

    Returns:
        ``path``.

    Raises:
        InputError: matplotlib is not installed.
        StorageError: the file cannot be written.
    """
    environment = Environment(
        loader=PackageLoader(__package__),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(signed=_signed)
    page = environment.get_template("report.html").render(
        title=_named(record.model.get("name"), "a model without a name"),
        version=record.versions.get("st-corrector", __version__),
        facts=_run_facts(record),
        evaluation=_evaluation(record),
        serving=record.serving,
        charts=run_charts(record),
        sections=[_Section.of(record, name, loss) for name, loss in record.losses.items()],
        tables={
            "Model": _flat(record.model),
            "Training arguments that are not their defaults": _flat(record.arguments),
            "Versions": _flat(record.versions),
        },
        short=_SHORT,
        shown=_NEGATIVES,
        tally=_tally,
    )
    with whole(path, "Choose another one.") as partial:
        # Half characters, which JSON can hold and a file cannot, become question marks.
        partial.write_text(page, encoding="utf-8", errors="replace")
    return path


@dataclass
class _Section:
    """The part of the page about one loss."""

    name: str
    facts: Facts
    sentences: list[str]
    charts: list[Chart]
    removed: list[tuple[str, int, float]]
    examples: list[Example]
    tables: dict[str, Facts]

    @classmethod
    def of(cls, record: RunRecord, name: str, loss: LossRecord) -> _Section:
        return cls(
            name=name,
            facts=_loss_facts(loss),
            sentences=_sentences(record, name, loss)[:_SENTENCES],
            charts=loss_charts(record, name),
            removed=[(rule, count, count / max(1, record.steps)) for rule, count in sorted(loss.removed.items())],
            examples=[example for example in loss.examples if example.choices],
            tables={
                "Targets encoded": _counts(record, loss),
                "Settings": _flat(loss.settings),
                "Corpus": _flat(loss.corpus),
                "Cache": _flat(loss.cache or {}),
            },
        )


@dataclass
class _Evaluation:
    """Metrics of the first and the last evaluation: column names, and rows of cells."""

    columns: list[str]
    rows: list[tuple[str, list[str]]]


def _run_facts(record: RunRecord) -> Facts:
    parameters, trainable = (_integer(record.model.get(name)) for name in ("parameters", "trainable"))
    part = "all" if trainable == parameters else f"{trainable:,}"
    return [
        ("Model", _named(record.model.get("name"), "without a name")),
        *([("Parameters", f"{parameters:,}, {part} trained")] if parameters and trainable else []),
        ("Steps", f"{record.steps:,}"),
        ("Time", _duration(record.seconds)),
        *([("Processes", f"{record.processes:,}")] if record.processes > 1 else []),
    ]


def _loss_facts(loss: LossRecord) -> Facts:
    settings, targets = loss.settings, _integer(loss.corpus.get("targets"))
    corpus = _named(loss.corpus.get("name"), "without a name")
    taken = f"{_plain(settings.get('num_negatives'))} a query, {_plain(settings.get('sampler'))}"
    if loss.cache is None:
        chosen = [("Negatives", "the other queries' positives")]
    else:
        chosen = [
            # Its settings are further below.
            ("Corrector", _plain(settings.get("corrector")).partition("(")[0] if loss.is_corrected else "none"),
            ("Negatives", taken),
            ("Diverged", "yes: the corrector was given up" if loss.diverged else "no"),
        ]
    labels = [] if loss.labels is None else [("Labels", loss.labels)]
    return [("Corpus", corpus if targets is None else f"{corpus}, {targets:,} targets"), *chosen, *labels]


def _evaluation(record: RunRecord) -> _Evaluation | None:
    """The first and the last choice side by side."""
    measured = evaluations_by_step(record)
    if not measured:
        return None
    first, last = measured[0], measured[-1]
    if first is last:
        return _Evaluation(
            [_when(first[0], record)], [(name, [_score(name, value)]) for name, value in first[1].items()]
        )
    rows = [
        (
            name,
            [
                _score(name, first[1].get(name)),
                _score(name, last[1].get(name)),
                _score(name, last[1].get(name, float("nan")) - first[1].get(name, float("nan")), "+"),
            ],
        )
        for name in {**first[1], **last[1]}
    ]
    return _Evaluation([_when(first[0], record), _when(last[0], record), "difference"], rows)


def _sentences(record: RunRecord, name: str, loss: LossRecord) -> list[str]:
    """What the figures say, most important first; only what was measured."""
    prefix, told = f"{name}/" if name else "", []

    def at_the_end(metric: str) -> float | None:
        points = values_of(record, prefix + metric)
        return fmean(value for _, value in points[-ceil(len(points) / 10) :]) if points else None

    if loss.diverged:
        told.append(
            "The corrector made things worse than the cache as it was and was given up: from then on negatives were "
            "chosen without it."
        )
    drift, error = at_the_end("drift"), at_the_end("corrected_error")
    kept, keeping = ("corrected", "correction") if loss.is_corrected else ("written back", "writing back")
    if drift is not None and error is not None:
        told.append(
            f"In the last tenth of the log the cache had drifted by {drift:.3f} (1 − cos to fresh embeddings), and "
            + (f"{keeping} left {error:.3f} of it." if error <= drift else f"what was {kept} was {error:.3f} off.")
        )
    if probed := values_of(record, f"{prefix}fidelity"):
        step, fidelity = probed[-1]
        stale = dict(values_of(record, f"{prefix}fidelity_stale")).get(step)
        told.append(
            f"Of what fresh embeddings would select, the {kept} cache selected {_percent(fidelity)}"
            + (f" and the cache as built {_percent(stale)}" if stale is not None else "")
            + f", as last measured (logged at step {step:,.0f})."
        )
    harder = at_the_end("harder_than_positive")
    if harder is not None:
        hint = ": the examples below show whether they are false negatives" if harder and loss.examples else ""
        told.append(
            f"In the last tenth of the log {_percent(harder)} of the chosen negatives scored above their "
            f"positive{hint}."
        )
    targets = _integer(loss.corpus.get("targets"))
    if loss.cache is not None and targets and record.steps and loss.counts:
        encoded, exhaustive = sum(loss.counts.get(count, 0) for count in _COUNTS), record.steps * targets
        told.append(
            f"{encoded:,} targets were encoded while training, {_percent(encoded / exhaustive)} of the {exhaustive:,} "
            "that re-embedding the corpus at every step would have taken for the cache alone."
        )
    late = [
        negative.has_answer
        for example in loss.examples
        for choice in example.choices[-1:]
        for negative in choice.negatives
        if negative.has_answer is not None
    ]
    if late:
        told.append(
            "Late negatives in the examples below that contain an answer of their query, and so are likely false ones: "
            f"{sum(late):,} of {len(late):,}."
        )
    return told


def _counts(record: RunRecord, loss: LossRecord) -> Facts:
    targets = _integer(loss.corpus.get("targets"))
    encoded = [(f"Encoded {text}", f"{loss.counts[name]:,}") for name, text in _COUNTS.items() if name in loss.counts]
    if loss.cache is None or not targets:
        return encoded
    return [
        *encoded,
        ("Encoded to build the cache, once", f"{targets:,}"),
        (
            f"Re-embedding at every step: {record.steps:,} steps × {targets:,} targets",
            f"{record.steps * targets:,}",
        ),
    ]


def _tally(choice: Choice) -> str:
    """A choice in words."""
    negatives = choice.negatives
    if not negatives:
        return "no negatives"
    above = sum(each.score > choice.positive_score for each in negatives)
    answers = [each.has_answer for each in negatives if each.has_answer is not None]
    told = f"{above} of {len(negatives)} above the positive"
    return f"{told}, {sum(answers)} with an answer" if answers else told


def _when(step: int, record: RunRecord) -> str:
    return {0: "before", record.steps: "after"}.get(step, f"step {step:,}")


def _score(metric: str, value: float | None, sign: str = "") -> str:
    """A metric in the field's notation: ranking metrics, which have an @, in percent."""
    if value is None or not isfinite(value):
        return "–"
    shown = f"{100 * value:{sign}.1f}" + ("" if sign else "\u00a0%") if "@" in metric else f"{value:{sign}.4g}"
    return shown.replace("-", "−")


def _percent(share: float) -> str:
    value = 100 * share
    return f"{value:,.0f}\u00a0%" if value >= 10 or not value else f"{value:.2g}\u00a0%"


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−") if isfinite(value) else "not finite"


def _duration(seconds: float) -> str:
    if not 60 <= seconds < 1e9:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60} min"


def _named(value: Any, otherwise: str) -> str:
    return str(value) if value else otherwise


def _integer(value: Any) -> int | None:
    """The value, if it is a count."""
    return value if type(value) is int and 0 <= value < 1 << 63 else None


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Facts:
    """Settings, nested ones included, as text."""
    rows: Facts = []
    for name, value in settings.items():
        if isinstance(value, dict) and value:
            rows += _flat(value, f"{prefix}{name}: ")
        else:
            rows.append((f"{prefix}{name}", _plain(value)))
    return rows


def _plain(value: Any) -> str:
    """A setting as text."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    if isinstance(value, (int, float)):
        return f"{value:,}" if isinstance(value, int) else f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
