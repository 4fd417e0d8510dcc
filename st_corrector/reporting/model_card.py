"""The model card: that of sentence-transformers, and how the negatives were chosen."""

from __future__ import annotations

import functools
import logging
import tempfile
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from sentence_transformers import SentenceTransformerModelCardData

from .._version import __version__
from ..errors import InputError
from ..evaluation import CorpusRetrievalEvaluator
from ..storage.files import whole
from .record import METRICS, LossRecord, RunRecord

logger = logging.getLogger(__name__)
_BEGIN, _END = "<!-- st_corrector: how the negatives were chosen -->", "<!-- st_corrector: end -->"
_PLOT = "assets/staleness.png"
# The section goes before the first of these in sentence-transformers' template and its cards.
_BEFORE_IN_TEMPLATE = ("{% if all_hyperparameters %}", "### Framework Versions", "## Citation")
_BEFORE_IN_CARD = ("### Training Hyperparameters", "### Training Logs", "### Framework Versions", "## Citation")
_STALENESS = {
    "drift": "cache as built",
    "corrected_error": "corrected",
    "corrected_error_unseen": "corrected, never encoded before",
    "fidelity": "fidelity",
    "hardness": "hardness",
}
_ROWS = 6  # of the table of staleness


@dataclass
class CorrectorModelCardData(SentenceTransformerModelCardData):
    """:class:`~sentence_transformers.SentenceTransformerModelCardData` of a model that
    :class:`CorrectorTrainer` trains: its card has a section on how the negatives were chosen, wherever the card is
    made.
    """

    record: RunRecord | None = field(default=None, init=False, repr=False)
    """The record of the run that trained the model."""
    evaluator: str | None = field(default=None, init=False, repr=False)
    """Split and name of the evaluator whose figures are shown."""

    @classmethod
    def of(cls, data: SentenceTransformerModelCardData) -> SentenceTransformerModelCardData:
        """Converts ``data``, with its contents. A user's own class or template is left unchanged."""
        if type(data) is not SentenceTransformerModelCardData:
            return data
        made = cls()
        if data.template_path == made.template_path:
            data.template_path = _template()
        made.__dict__.update(data.__dict__)
        return made

    def tell_of(self, record: RunRecord) -> None:
        """Describe that run; earlier evaluations go into its record."""
        self.record = record
        for evaluator, metrics in (self.eval_results_dict or {}).items():
            if self._is_the_runs(evaluator):
                record.evaluations["before"] = _plain(metrics)

    def _is_the_runs(self, evaluator: Any) -> bool:
        """Whether this evaluator's figures are shown; of several it is the first, since they are not comparable."""
        if not isinstance(evaluator, CorpusRetrievalEvaluator):
            return False
        named = f"{evaluator.split} {evaluator.name}"
        self.evaluator = self.evaluator or named
        return self.evaluator == named

    def _compute_column_stats(self, dataset: Any, column: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if column == "label":  # not a class, whose every value would be listed
            return {"dtype": "int", "modality": "", "data": {"meaning": "corpus row of the positive"}}
        return super()._compute_column_stats(dataset, column, *args, **kwargs)

    def set_evaluation_metrics(self, evaluator: Any, metrics: dict[str, Any], epoch: int = 0, step: int = 0) -> None:
        super().set_evaluation_metrics(evaluator, metrics, epoch, step)
        if self.record is not None and self._is_the_runs(evaluator):
            when = str(step) if step >= 0 else "after" if self.record.steps else "before"
            self.record.evaluations[when] = _plain(metrics)

    def to_dict(self) -> dict[str, Any]:
        told = {**super().to_dict(), "negatives": self._section()}
        for name in ("all_hyperparameters", "non_default_hyperparameters"):
            told[name] = {key: value for key, value in told[name].items() if key != "cache_path"}  # of this machine
        return told

    def _section(self) -> str:
        if self.record is None or not self.record.steps:
            return ""
        return negatives_section(self.record, None if self.save_dir is None else Path(self.save_dir))


def update_card(folder: Path, record: RunRecord) -> Path:
    """Write the section of ``record`` into the card of the model in ``folder``, replacing an existing one. Returns the
    card's path.

    Raises:
        InputError: there is no card, or its section has no end.
        StorageError: it cannot be written; it stays unchanged.
    """
    card = folder / "README.md"
    if not card.is_file():
        raise InputError(f"{folder} has no README.md: save the model there first, which makes its card.")
    text, section = card.read_text(encoding="utf-8"), negatives_section(record, folder)
    before, found, rest = text.partition(_BEGIN)
    if found and _END not in rest:
        raise InputError(
            f"{card} has {_BEGIN!r}, and no {_END!r} behind it, so where the section ends is unknown: put that line "
            "back behind the section, or delete the section with its first line."
        )
    if found:
        text = before + section + rest.partition(_END)[2]
    else:
        anchor = next((anchor for anchor in _BEFORE_IN_CARD if anchor in text), None)
        before, found, rest = text.partition(anchor) if anchor else (text.rstrip() + "\n", "", "")
        text = f"{before}{section}\n\n{found}{rest}"
    with whole(card) as partial:
        partial.write_text(text, encoding="utf-8")
    return card


def negatives_section(record: RunRecord, folder: Path | None = None) -> str:
    """How the negatives of a run were chosen, as Markdown.

    Args:
        folder: of the card; the plot is written into it if matplotlib is installed.
    """
    template = resources.files(__package__).joinpath("templates/negatives.md").read_text(encoding="utf-8")
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(
        begin=_BEGIN,
        end=_END,
        package="st-corrector",
        version=record.versions.get("st-corrector", __version__),
        losses=[_Described.of(name, loss, record) for name, loss in record.losses.items()],
        plot=None if folder is None else _plot(record, folder),
        evaluations=_evaluations(record),
        run=_run(record),
    )


class _Row(NamedTuple):
    name: str
    cells: list[str]


class _Table(NamedTuple):
    columns: list[str]
    rows: list[_Row]


@dataclass
class _Described:
    """One loss, in words."""

    name: str
    corpus: str
    cache: str | None
    corrector: str
    negatives: str
    filters: str
    labels: str | None
    refresh: str
    encoded: str
    extra: str
    exhaustive: str
    staleness: _Table | None

    @classmethod
    def of(cls, name: str, loss: LossRecord, record: RunRecord) -> _Described:
        settings, corpus, counts = loss.settings, loss.corpus, loss.counts
        targets = int(corpus.get("targets", 0))
        extra = counts.get("targets_verified", 0) + counts.get("targets_reencoded", 0)
        exhaustive = record.steps * targets
        share = f" ({100 * extra / exhaustive:.2g} % of it)" if extra and exhaustive else ""
        named = f"{_cell(corpus['name'])}, " if corpus.get("name") else ""
        return cls(
            name=_cell(name),
            corpus=f"{named}{targets:,} targets, fingerprint `{_cell(corpus.get('fingerprint'))}`",
            cache=_cache(loss, targets),
            corrector=_corrector(loss),
            negatives=_negatives(settings),
            filters=_filters(loss),
            labels=None if loss.labels is None else _cell(loss.labels),
            refresh=_refresh(loss, record),
            encoded=f"{counts.get('targets_encoded', 0):,} targets, positives and negatives",
            extra=f"{extra:,} targets{share}",
            exhaustive=f"{exhaustive:,} targets ({record.steps:,} steps × {targets:,})",
            staleness=_staleness(record, loss, f"{name}/" if name else ""),
        )


def _cache(loss: LossRecord, targets: int) -> str | None:
    if loss.cache is None:
        return None
    size = f"{loss.cache.get('bytes', 0) / 1e6:,.0f} MB"
    return f"{targets:,} × {loss.cache.get('dim')} in {_cell(loss.cache.get('dtype'))}, {size}"


def _corrector(loss: LossRecord) -> str:
    if loss.cache is None or not loss.settings.get("num_negatives"):
        return "none: negatives are the other queries' positives"
    if not loss.is_corrected and not loss.diverged:
        return "none"
    given_up = ", given up during the run because it made things worse" if loss.diverged else ""
    return f"`{_cell(loss.settings.get('corrector'))}`{given_up}"


def _negatives(settings: dict[str, Any]) -> str:
    shared = "shared by the batch" if settings.get("share_negatives") else "its own"
    verified = settings.get("candidates")
    return (
        f"{settings.get('num_negatives')} ({settings.get('sampler')}"
        + (f", of {verified} that were encoded to be verified" if verified else "")
        + f"), {shared}"
        + (", beside the other queries' positives" if settings.get("in_batch_negatives") else "")
    )


def _filters(loss: LossRecord) -> str:
    rules = [f"{_cell(rule)} ({count:,} candidates)" for rule, count in sorted(loss.removed.items())]
    return "; ".join(["known positives, targets with the same text, and the query's own", *rules])


def _refresh(loss: LossRecord, record: RunRecord) -> str:
    """Derived from what was encoded, since not only the arguments can request it."""
    background = int(loss.settings.get("background_targets") or 0)
    all_targets = int(loss.corpus.get("targets", 0))
    others = background * record.steps + int(loss.settings.get("encoded_to_compare") or 0)
    times = (loss.counts.get("targets_reencoded", 0) - others) // max(1, all_targets)
    policy = f"all targets were re-embedded {times:,} times" if times > 0 else "never re-embedded"
    if loss.settings.get("write_back"):
        policy += "; what is encoded is written back"
    return policy + (f"; {background} random targets encoded at each step" if background else "")


def _staleness(record: RunRecord, loss: LossRecord, prefix: str) -> _Table | None:
    """A few steps of the log, including the first and the last."""
    entries = [entry for entry in record.series if f"{prefix}drift" in entry]
    columns = {key: title for key, title in _STALENESS.items() if any(f"{prefix}{key}" in each for each in entries)}
    if not entries:
        return None
    last = len(entries) - 1
    shown = sorted({round(last * n / (_ROWS - 1)) for n in range(_ROWS)})
    rows = [
        _Row(str(entries[n].get("step", "")), [_number(entries[n].get(f"{prefix}{key}")) for key in columns])
        for n in shown
    ]
    kept = "corrected" if loss.is_corrected else "written back"
    return _Table([title.replace("corrected", kept) for title in columns.values()], rows)


def _evaluations(record: RunRecord) -> _Table | None:
    if not record.evaluations:
        return None
    found = {when: record.reached(when) for when in record.evaluations}
    columns = [metric for metric in METRICS if any(metric in each for each in found.values())]
    order = sorted(found, key=lambda when: (when != "before", when == "after", int(when) if when.isdigit() else 0))
    names = {"before": "before training", "after": "after training"}
    rows = [
        _Row(
            names.get(when, f"step {when}"),
            [f"{100 * found[when][each]:.1f}" if each in found[when] else "" for each in columns],
        )
        for when in order
        if when != str(record.steps) or "after" not in found  # a repeat
    ]
    return _Table(columns, rows)


def _run(record: RunRecord) -> str:
    processes = f" on {record.processes} processes" if record.processes > 1 else ""
    return f"{record.steps:,} steps in {record.seconds:,.0f} seconds{processes}."


def _plot(record: RunRecord, folder: Path) -> str | None:
    from .charts import staleness_png

    drawn = staleness_png(record)
    if drawn is None:
        return None
    path = folder / _PLOT
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(drawn)
    return _PLOT


def _plain(metrics: dict[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items()}


def _number(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, (int, float)) else ""


def _cell(text: Any) -> str:
    """Text that is valid in a table cell."""
    return str(text).replace("|", "\\|").replace("\n", " ").replace("`", "'")


@functools.cache
def _template() -> Path:
    """sentence-transformers' template with a place for the section, as a file: that library needs a file name."""
    original = SentenceTransformerModelCardData().template_path
    text = Path(original).read_text(encoding="utf-8")
    anchor = next((anchor for anchor in _BEFORE_IN_TEMPLATE if anchor in text), None)
    if anchor is None:
        logger.warning("The model card has no place for how negatives were chosen: it comes at its end.")
        text += "\n\n{{ negatives }}\n"
    else:
        text = text.replace(anchor, "{% if negatives %}\n{{ negatives }}\n{% endif %}\n" + anchor, 1)
    _folder.append(tempfile.TemporaryDirectory(prefix="st_corrector-"))  # deleted when Python exits
    path = Path(_folder[0].name) / "model_card_template.md"
    path.write_text(text, encoding="utf-8")
    return path


_folder: list[tempfile.TemporaryDirectory[str]] = []
