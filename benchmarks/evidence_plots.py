"""The evidence in pictures: quality against texts encoded, against time, and what correcting adds, by coverage."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
from evidence import (
    CORPORA,
    CORRECTED,
    DEFAULTS,
    ENCODERS,
    FEWER,
    LONGER,
    METRICS,
    TITLES,
    WRITTEN,
    Corpora,
    difference,
    interval,
    texts,
    usual_seconds,
)
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from report import Runs, coverage, mean, mrr, save

from st_corrector.training.plan import LOW_COVERAGE

# By what is done, wherever it is done: the first beginning of a strategy's name counts.
COLOURS = {"mlp": "C0", "stale": "C1", "in-batch": "C2", "gist": "C2", "mined": "C3", "refresh": "C7"}
MARKERS = {"nq": "o", "code": "^", "packages": "s"}
HEARS = {"": ("C0", "hard labels"), "-own-pairs": ("C2", "own pairs"), "-teacher": ("C3", "a teacher")}
ENOUGH = 6  # strategies without which a panel says little
FAR_BELOW = {"mined-by-teacher-scores"}  # with it in the picture, all others lie on one line; the tables have it


def colour(strategy: str) -> str:
    return next((colour for begins, colour in COLOURS.items() if strategy.startswith(begins)), "C4")


def plots(folder: Path, found: dict[str, Corpora]) -> list[str]:
    """Markdown that shows the plots, which are written beside the page."""
    costs: dict[str, tuple[str, Callable[[list[dict]], float]]] = {
        "texts": ("targets encoded, for the loss and the cache", lambda group: mean(group, texts)),
        "seconds": ("seconds on one core, all counted", usual_seconds),
    }
    made = [_quality(folder, found, f"quality-against-{name}", *cost) for name, cost in costs.items()]
    return [each for each in [*made, _gain(folder, found)] if each]


def _quality(
    folder: Path, found: dict[str, Corpora], name: str, label: str, cost: Callable[[list[dict]], float]
) -> str:
    """MRR@10, mean ± sd over seeds, against a cost; a row of panels an encoder, a panel a corpus."""
    shown = {
        (encoder, corpus): points
        for encoder, corpora in found.items()
        for corpus, runs in corpora.items()
        if len(points := _shown(encoder, runs, cost)) >= ENOUGH
    }
    if not shown:
        return ""
    encoders = [each for each in ENCODERS if any(encoder == each for encoder, _ in shown)]
    corpora = [each for each in CORPORA if any(corpus == each for _, corpus in shown)]
    figure, axes = plt.subplots(
        len(encoders), len(corpora), figsize=(6.2 * len(corpora), 4.6 * len(encoders)), squeeze=False
    )
    for row, encoder in zip(axes, encoders, strict=True):
        for axis, corpus in zip(row, corpora, strict=True):
            if points := shown.get((encoder, corpus)):
                _panel(axis, found[encoder][corpus], points)
                axis.set_title(f"{CORPORA[corpus]}: {ENCODERS[encoder]}", fontsize=9)
                axis.set(xlabel=label, ylabel="MRR@10")
            else:
                axis.set_axis_off()
    figure.tight_layout()
    return save(figure, folder, name)


def _shown(encoder: str, runs: Runs, cost: Callable[[list[dict]], float]) -> dict[str, float]:
    """What is compared with the default, and what it takes."""
    names = {each for default in DEFAULTS[encoder] for each in (default.strategy, *default.instead)} | {*LONGER}
    names -= FAR_BELOW
    return {name: at for name in runs if name in names and not math.isnan(at := cost(runs[name]))}


def _panel(axis: plt.Axes, runs: Runs, points: dict[str, float]) -> None:
    """Each strategy as a point with its name beside it; names that would lie upon one another are moved apart."""
    values = {strategy: [mrr(run) for run in runs[strategy]] for strategy in points}
    order = sorted(points, key=lambda strategy: statistics.mean(values[strategy]))
    for strategy in order:
        deviation = statistics.stdev(values[strategy]) if len(values[strategy]) > 1 else 0.0
        is_ours = strategy.startswith(CORRECTED)
        axis.errorbar(
            *(points[strategy], statistics.mean(values[strategy]), deviation),
            **{"fmt": "o" if is_ours else "s", "color": colour(strategy), "ms": 7 if is_ours else 5, "lw": 1},
        )
    axis.set_xscale("log")
    axis.grid(alpha=0.3)
    # The right half is for the names.
    low, high = min(points.values()), max(points.values())
    width = max(high / low, 1.3) ** 2.2
    axis.set_xlim(low / width**0.05, low * width**0.95)
    _plain_ticks(axis)
    bottom, top = axis.get_ylim()
    gap, lowest, places = 0.052, -math.inf, {}
    for strategy in order:
        at = (statistics.mean(values[strategy]) - bottom) / (top - bottom)
        places[strategy] = lowest = max(at, lowest + gap)
    highest = 0.97 + gap
    for strategy in reversed(order):
        places[strategy] = highest = min(places[strategy], highest - gap)
    for strategy in order:
        axis.annotate(
            TITLES[strategy].replace("*", "").replace("`", "").replace(" questions × ", " × "),
            **{"xy": (points[strategy], statistics.mean(values[strategy])), "xycoords": "data"},
            **{"xytext": (0.54, places[strategy]), "textcoords": "axes fraction", "fontsize": 7, "va": "center"},
            **{"color": colour(strategy), "weight": "bold" if strategy == CORRECTED else "normal"},
            arrowprops={"arrowstyle": "-", "color": colour(strategy), "lw": 0.5, "alpha": 0.5},
        )


def _gain(folder: Path, found: dict[str, Corpora]) -> str:
    """What correcting adds to writing back, with its interval, by how often a run encodes each target."""
    figure, axis = plt.subplots(figsize=(8.5, 4.6))
    is_empty = True
    for encoder, corpora in found.items():
        for corpus, runs in corpora.items():
            for place, (suffix, (colour_of, _)) in enumerate(HEARS.items()):
                spent = FEWER if f"{CORRECTED}{FEWER}{suffix}" in runs else ""
                ours = f"{CORRECTED}{spent}{suffix}"
                found_here = difference(ours, f"{WRITTEN}{spent}{suffix}", runs, METRICS["MRR@10"])
                if found_here is None or not (bounds := interval([found_here])):
                    continue
                middle, at = found_here.mean, mean(runs[ours], coverage)
                # Beside one another, where they would lie upon one another.
                at *= 1.035 ** (3 * place + [*CORPORA].index(corpus) - 4)
                axis.errorbar(
                    *(at, middle, [[middle - bounds[0]], [bounds[1] - middle]]),
                    **{"color": colour_of, "fmt": MARKERS[corpus], "ms": 7, "lw": 1, "capsize": 2},
                    mfc="white" if encoder.startswith("static") else colour_of,
                )
                is_empty = False
    if is_empty:
        plt.close(figure)
        return ""
    axis.axhline(0, color="grey")
    axis.axvline(LOW_COVERAGE, color="grey", ls=":")
    axis.grid(alpha=0.3)
    axis.set(
        xscale="log",
        xlabel="encodings a target, with gradient (points are moved apart)",
        ylabel="MRR@10, corrected less written back",
    )
    axis.set_title("What correcting adds to writing back (95 % intervals)", fontsize=10)
    said = [
        *(Line2D([], [], color=colour, label=hears) for colour, hears in HEARS.values()),
        *(Line2D([], [], color="grey", ls="", marker=MARKERS[name], label=title) for name, title in CORPORA.items()),
        Line2D([], [], color="grey", ls="", marker="D", label="two layers"),
        Line2D([], [], color="grey", ls="", marker="D", mfc="white", label="static encoder"),
        Line2D([], [], color="grey", ls=":", label="auto: a corrector to the left, or with a teacher"),
    ]
    axis.legend(handles=said, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    axis.margins(x=0.15)
    _plain_ticks(axis)
    return save(figure, folder, "gain-by-coverage")


def _plain_ticks(axis: plt.Axes) -> None:
    """1, 2, 5, 10 … on a logarithmic axis, as numbers."""
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_locator(NullLocator())
