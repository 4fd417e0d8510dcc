"""Curves over the steps of a run: all for its report, the most informative for its model card."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from math import ceil, isfinite
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal
from xml.etree import ElementTree

from markupsafe import Markup

from ..errors import InputError
from .record import RunRecord

ElementTree.register_namespace("", "http://www.w3.org/2000/svg")
if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LARGEST = 1e30  # larger values are not measurements and make axes overflow
_MOST_POINTS = 200  # of a line
_SIZE = (3.8, 2.2)  # inches
_SVG = "http://www.w3.org/2000/svg"
_INK = "#123456"  # stands for the page's own colour in SVG
# Readable on white and black, and distinguishable without colour.
_LINES = (
    ("#2a7de1", "-"),
    ("#d9641c", "--"),
    ("#2e9650", ":"),
    ("#a35fd0", "-."),
    ("#c2408f", (0, (6, 1, 1, 1, 1, 1))),
    ("#8a7a1f", (0, (1, 3))),
)
_STYLE = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 9,
    "grid.alpha": 0.2,
    "legend.borderaxespad": 0.2,
    "legend.columnspacing": 0.9,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "legend.handlelength": 2.1,
    "legend.handletextpad": 0.5,
    "lines.linewidth": 1.8,
    "lines.markersize": 4,
    "svg.fonttype": "none",
    "text.parse_math": False,
}


@dataclass(frozen=True)
class Kind:
    """What a chart shows.

    Args:
        title: of the chart.
        metrics: labels of its lines, by logged name.
        unit: of the vertical axis.
        caption: how to read it.
        axis: ``"share"`` is from 0, in percent; ``"zero"`` from 0; ``"stacked"`` from 0, lines stacked, as seconds per
            step; ``"free"`` fits the values.
    """

    title: str
    metrics: dict[str, str]
    unit: str
    caption: str
    axis: Literal["share", "zero", "stacked", "free"] = "zero"


TASK_LOSS = Kind(
    "Task loss",
    {"task_loss": "task loss"},
    "cross-entropy",
    "Against negatives that get harder as the model learns: it says whether training goes on, not how good the model "
    "is. Compare runs by their evaluation.",
    "free",
)
EVALUATION = Kind("Evaluation", {}, "", "Retrieval from the whole corpus.", "share")
DRIFT = Kind(
    "Drift and correction",
    {
        "drift": "cache",
        "corrected_error": "corrected or written back",
        "corrected_error_unseen": "unseen",
    },
    "1 − cos to fresh",
    "How far the step's targets, as the cache has them and as negatives are chosen by them, lay from what the encoder "
    "said of them then, before anything was learnt from them: the gap is what correcting, or writing back, is worth. "
    "Unseen: never encoded before.",
)
FIDELITY = Kind(
    "Fidelity",
    {"fidelity_stale": "cache", "fidelity": "corrected or written back"},
    "of the fresh top k",
    "On a fixed probe: of what fresh embeddings would select, the share that the cache as built selects, and the share "
    "that is selected.",
    "share",
)
REMOVED = Kind("Removed by rules", {}, "candidates per step", "Candidates that rules on false negatives took out.")
_OF_A_LOSS = (
    DRIFT,
    FIDELITY,
    Kind(
        "Hardness",
        {"hardness": "negatives − positive"},
        "score difference",
        "Fresh score of the chosen negatives less their positive's. Near 0 they are hard; far below it they teach "
        "little.",
        "free",
    ),
    Kind(
        "Harder than the positive",
        {"harder_than_positive": "above the positive"},
        "of the negatives",
        "Share of the chosen negatives that score above their positive: the hardest ones, or false negatives.",
        "share",
    ),
    Kind(
        "Seen before",
        {"seen": "written back before"},
        "of the negatives",
        "Share of the chosen negatives that an earlier step had encoded and written back.",
        "share",
    ),
    Kind(
        "Age",
        {"age": "age of the vectors"},
        "steps",
        "Steps since the vectors were computed by which negatives were chosen, on average: what a corrector has "
        "to bridge.",
    ),
    Kind(
        "Recall of the shortlist",
        {"recall": "recall"},
        "of the exact top k",
        "Of what an exact search selects, the share that the shortlist led to, as last measured.",
        "share",
    ),
    REMOVED,
    Kind(
        "Time",
        {
            "seconds_encode": "encode",
            "seconds_select": "select",
            "seconds_correct": "correct",
            "seconds_exchange": "exchange",
        },
        "seconds per step",
        "Of the forward pass alone, stacked in the legend's order from below: encoding texts, choosing negatives, "
        "training the corrector, waiting for other processes.",
        "stacked",
    ),
)
_MAIN_METRICS = ("ndcg@10", "mrr@10", "recall@20", "recall@100")


@dataclass(frozen=True)
class Line:
    """The finite values by step, and the number of others."""

    label: str
    steps: list[float]
    values: list[float]
    left_out: int = 0

    def pooled(self, size: int) -> Line:
        """The mean of every N successive values."""
        starts = range(0, len(self.steps), size)
        steps, values = ([fmean(of[n : n + size]) for n in starts] for of in (self.steps, self.values))
        return Line(self.label, steps, values, self.left_out)


@dataclass(frozen=True)
class Chart:
    """The logged lines, what they show, and their loss; ``""`` for the run or its only loss."""

    kind: Kind
    lines: list[Line]
    loss: str = ""

    @property
    def caption(self) -> str:
        """How to read it, and what it omits."""
        left_out, size = sum(line.left_out for line in self.lines), self._pool
        return " ".join(
            [
                self.kind.caption,
                *([f"Each point is the mean of {size} logged values."] if size > 1 else []),
                *([f"Not drawn: {left_out:,} values that are not finite."] if left_out else []),
            ]
        )

    @property
    def description(self) -> str:
        """The lines in words."""
        return f"{self.kind.title}, {self.kind.unit}: " + "; ".join(
            f"{line.label} from {line.values[0]:.3g} at step {line.steps[0]:.0f} to {line.values[-1]:.3g} at step "
            f"{line.steps[-1]:.0f}, lowest {min(line.values):.3g}, highest {max(line.values):.3g}"
            for line in self.lines
        )

    def svg(self) -> Markup:
        """The chart as an ``svg`` element with the page's font and colour; equal values give equal output."""
        with _style(_INK) as new_figure:
            figure = new_figure(_SIZE)
            self.draw(figure.subplots())
            file = io.StringIO()
            nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
            # Identifiers are made from it, and one page has many figures.
            with _settings({"svg.hashsalt": f"{self.loss}/{self.description}"}):
                figure.savefig(file, format="svg", transparent=True, metadata=nothing)
        # Identifiers would occur once in each figure of a page; its font is the page's.
        drawn = ElementTree.fromstring(file.getvalue())
        for group in drawn.iter(f"{{{_SVG}}}g"):
            group.attrib.pop("id", None)
        for element in [drawn, *drawn.iter(f"{{{_SVG}}}defs")]:
            for style in element.findall(f"{{{_SVG}}}style"):
                element.remove(style)
        drawn.attrib = {"viewBox": drawn.attrib["viewBox"], "role": "img", "aria-label": self.description}
        return Markup(ElementTree.tostring(drawn, encoding="unicode").replace(_INK, "currentColor"))

    def draw(self, axes: Axes) -> None:
        """Draw it into ``axes``."""
        from matplotlib.ticker import MaxNLocator

        axes.set(xlabel="step", ylabel=self.kind.unit)
        lines = [line.pooled(self._pool) for line in self.lines]
        if self.kind.axis == "stacked":
            below = [0.0] * len(lines[0].steps)
            for line, (colour, _) in zip(lines, cycle(_LINES), strict=False):
                above = [one + other for one, other in zip(below, line.values, strict=True)]
                axes.fill_between(
                    line.steps, below, above, label=line.label, facecolor=colour, alpha=0.75, edgecolor=colour
                )
                below = above
        else:
            marker = "o" if max(len(line.steps) for line in lines) <= 30 else None
            for line, (colour, dashes) in zip(lines, cycle(_LINES), strict=False):
                axes.plot(line.steps, line.values, color=colour, label=line.label, linestyle=dashes, marker=marker)
        if self.kind.axis == "free":
            if min(axes.get_ylim()) < 0 < max(axes.get_ylim()):
                axes.axhline(0, color=axes.xaxis.label.get_color(), linewidth=0.8)
        else:
            top = 1.06 * axes.dataLim.y1 or 1.0
            axes.set_ylim(0, min(top, 1.03) if self.kind.axis == "share" else top)
        if self.kind.axis == "share":
            axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.4g} %")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        if len(lines) > 1:
            columns = 3 if len(lines) <= 3 and sum(len(line.label) for line in lines) <= 32 else 2
            axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns)

    @property
    def _pool(self) -> int:
        """Number of logged values per point."""
        return ceil(max(len(line.steps) for line in self.lines) / _MOST_POINTS)


def run_charts(record: RunRecord) -> list[Chart]:
    """The charts of a run as a whole."""
    evaluations = evaluations_by_step(record)
    names = list(dict.fromkeys(name for _, metrics in evaluations for name in metrics if "@" in name))
    main = [name for name in names if name.endswith(_MAIN_METRICS) and "answer" not in name] or names
    lines = (
        _line(_ascii(name), ((step, metrics[name]) for step, metrics in evaluations if name in metrics))
        for name in main[: len(_LINES)]
    )
    evaluation = _chart(EVALUATION, lines) if len(evaluations) > 2 else []
    return [*_chart(TASK_LOSS, _logged(record, "", TASK_LOSS)), *evaluation]


def loss_charts(record: RunRecord, name: str, kinds: Iterable[Kind] = _OF_A_LOSS) -> list[Chart]:
    """The charts of one loss, whose ``name`` precedes its metrics in the log."""
    prefix = f"{name}/" if name else ""
    return [chart for kind in kinds for chart in _chart(kind, _logged(record, prefix, kind), name)]


def evaluations_by_step(record: RunRecord) -> list[tuple[int, dict[str, float]]]:
    """Measured values by step, ascending; 0 is before training."""
    steps = {"before": 0, "after": record.steps}
    found = {
        steps[when] if when in steps else int(when): metrics
        for when, metrics in sorted(record.evaluations.items(), key=lambda each: each[0] == "after")
        if when in steps or re.fullmatch(r"\d{1,18}", when)
    }
    return sorted(found.items())


def values_of(record: RunRecord, metric: str) -> list[tuple[float, float]]:
    """The steps and finite values of a metric in the log, by its full name."""
    line = _line("", ((entry.get("step"), entry[metric]) for entry in record.series if metric in entry))
    return list(zip(line.steps, line.values, strict=True))


def staleness_figure(record: RunRecord) -> Figure | None:
    """The cache's drift, the error left after correction, and fidelity if measured, over steps: panels side by side,
    for each loss. None if none of it was logged.

    Raises:
        InputError: matplotlib is not installed.
    """
    charts = [chart for name in record.losses for chart in loss_charts(record, name, (DRIFT, FIDELITY))]
    if not charts:
        return None
    columns = min(2, len(charts))
    rows = ceil(len(charts) / columns)
    with _style("black") as new_figure:
        figure: Figure = new_figure((_SIZE[0] * columns, _SIZE[1] * rows))
        panels = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
        for panel, chart in zip(panels, charts, strict=False):
            chart.draw(panel)
            title = f"{chart.kind.title}: {_ascii(chart.loss)}" if len(record.losses) > 1 else chart.kind.title
            panel.set_title(title, loc="left", pad=20)
        for panel in panels[len(charts) :]:
            panel.remove()
    return figure


def staleness_png(record: RunRecord) -> bytes | None:
    """:func:`staleness_figure` as PNG; None if there is nothing to draw or matplotlib is missing."""
    try:
        figure = staleness_figure(record)
    except InputError:
        return None
    if figure is None:
        return None
    file = io.BytesIO()
    with _settings("default"):
        figure.savefig(file, format="png", dpi=150, metadata={"Software": None})
    return file.getvalue()


def _chart(kind: Kind, lines: Iterable[Line], loss: str = "") -> list[Chart]:
    """A chart, if there is anything to draw."""
    drawn = [line for line in lines if line.steps]
    return [Chart(kind, drawn, loss)] if drawn else []


def _logged(record: RunRecord, prefix: str, kind: Kind) -> Iterator[Line]:
    metrics = kind.metrics
    if kind is REMOVED:
        rule = f"{prefix}removed_by_"
        found = dict.fromkeys(name for entry in record.series for name in entry if name.startswith(rule))
        metrics = {name.removeprefix(prefix): _ascii(name.removeprefix(rule)) for name in found}
    if kind.axis == "stacked":
        yield from _per_step(record, {f"{prefix}{name}": label for name, label in metrics.items()})
        return
    for name, label in metrics.items():
        yield _line(
            label, ((entry.get("step"), entry[f"{prefix}{name}"]) for entry in record.series if prefix + name in entry)
        )


def _per_step(record: RunRecord, metrics: dict[str, str]) -> Iterator[Line]:
    """Converts sums since the previous entry to means per step; all lines have the same steps."""
    before, steps, rows = 0.0, [], []
    for entry in record.series:
        step = _number(entry.get("step"))
        if step is not None and step > before:
            sums = [_number(entry.get(name)) for name in metrics]
            if any(total is not None for total in sums):
                steps.append(step)
                rows.append([(total or 0.0) / (step - before) for total in sums])
            before = step
    for label, values in zip(metrics.values(), zip(*rows, strict=True), strict=False):
        if any(values):
            yield Line(label, steps, list(values))


def _line(label: str, points: Iterable[tuple[Any, Any]]) -> Line:
    read = [(_number(step), _number(value)) for step, value in points]
    finite = [(step, value) for step, value in read if step is not None and value is not None]
    return Line(label, [step for step, _ in finite], [value for _, value in finite], len(read) - len(finite))


def _number(value: Any) -> float | None:
    """The value, if it is a finite number: a log can contain anything."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < _LARGEST:
        return None
    return float(value) if isfinite(value) else None


def _ascii(text: str) -> str:
    """An external name as a label, in letters that every font has."""
    return re.sub(r"[^ -~]+", "?", text.replace("_", " ")).strip()[:40]


@contextmanager
def _style(ink: str) -> Iterator[Any]:
    """Gives the block a function that makes a figure of a size in inches, independent of the user's matplotlib
    settings."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError('Figures need matplotlib: pip install "st-corrector[report]".') from error
    colours = ("text.color", "axes.edgecolor", "axes.labelcolor", "grid.color", "xtick.color", "ytick.color")
    with _settings("default", {**_STYLE, **dict.fromkeys(colours, ink)}):
        yield lambda size: Figure(size, layout="constrained")


def _settings(*settings: Any) -> Any:
    from matplotlib import style

    return style.context(list(settings))
