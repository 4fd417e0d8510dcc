"""What the evidence compares, under which names and by which figures (:mod:`evidence_report` writes the page)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from presets import AS_LONG, OTHER_WAYS, SPENT, WAYS, WEIGHTS
from report import Runs, load
from scipy import stats

CORPORA = {"nq": "Natural Questions", "code": "code search", "packages": "package search"}
ENCODERS = {
    "2-layers": "Two layers of MiniLM, 30,000 targets",
    "2-layers-all": "Two layers of MiniLM, all targets",
    "minilm": "All of MiniLM, 15,000 targets",
    "minilm-lora": "All of MiniLM with LoRA, 15,000 targets",
    "static": "Static encoder, all targets",
    "static-long": "Static encoder, all targets, 400 steps",
    "static-longer": "Static encoder, all targets, 800 steps",
    "static-high": "Static encoder, 30,000 targets, five encodings each",
}
# All passages, of which a run encodes few, are those of one corpus.
REGIMES = {encoder: {corpus: f"{corpus}-{encoder}" for corpus in CORPORA} for encoder in ENCODERS}
REGIMES["2-layers-all"] = {"nq": "minilm-2-layers-all-passages"}
REGIMES |= {
    encoder: {"code": f"code-{encoder}"} for encoder in ("minilm", "minilm-lora", "static-long", "static-longer")
}
REGIMES["static-high"] = {"nq": "labels-high-coverage"}
CORRECTED, WRITTEN = "mlp-pull-back", "stale-write-back"
FEWER = "-2-negatives-2-layers"
ADDED = {"": "corrected", "-own-pairs": "+ own pairs", "-teacher": "+ teacher", "-own-pairs-teacher": "+ both"}
TITLES = {
    CORRECTED: "**corrected**",
    WRITTEN: "written back, no corrector",
    "corrected-mlp": "the paper's setting",
    "stale": "stale cache",
    "in-batch-larger": "in-batch, larger batches",
    "in-batch-larger-static": "in-batch, larger batches",
    "mined-margin": "mined once, with a margin",
    "mined-once": "mined once, without a margin",
    "mlp-margin": "corrected, with a margin",
    "mlp-window-32": "corrected, any of the hardest 32",
    "mined-again": "mined again every 25 steps, with a margin",
    "mined-by-teacher": "mined by the teacher, with a margin",
    "mined-by-teacher-scores": "mined by the teacher, `DistillKLDivLoss`",
    "refresh-10": "re-embedded every 10 steps",
    "refresh-50": "re-embedded every 50 steps",
    "gist": "in-batch, larger batches, guided (GIST)",
}
TITLES["in-batch-larger-static-own-pairs"] = f"{TITLES['in-batch-larger-static']}, own pairs"
TITLES |= {
    f"{name}-{count}-negatives-{encoder}": f"{TITLES[name].strip('*')}, {questions} questions × {count}"
    for name in (*WAYS, *OTHER_WAYS)
    for encoder, spent in SPENT.items()
    for count, questions in spent.items()
}
TITLES["mined-by-teacher-scores-8-negatives-2-layers"] = f"{TITLES['mined-by-teacher-scores']}, 16 questions × 8"
TITLES |= {
    f"{name}{spent}{suffix}": f"{TITLES[f'{name}{spent}'].strip('*')} {added}"
    for name in (CORRECTED, WRITTEN)
    for spent in ("", *(f"-{count}-negatives-{encoder}" for encoder, counts in SPENT.items() for count in counts))
    for suffix, added in ADDED.items()
    if suffix
}
TITLES |= {f"{name}-as-long": f"{TITLES[name]}, {steps} steps" for name, steps in AS_LONG.items()}
TITLES |= {
    f"{name}-weight-{weight}": f"{title}, weight {weight}"
    for name, title in TITLES.items()
    if name.startswith(CORRECTED) and name.endswith("-teacher")
    for weight in WEIGHTS
}

LONGER = tuple(f"{name}-as-long" for name in AS_LONG)


class Default(NamedTuple):
    """What the trainer takes by itself, and what is compared with it."""

    strategy: str
    instead: tuple[str, ...]


DEFAULTS = {
    # Without a teacher, and with one. The static encoder's runs go through the questions more than once.
    "2-layers": (
        Default(
            f"{WRITTEN}{FEWER}",
            (
                *(f"{CORRECTED}{FEWER}", "in-batch-larger", f"mined-margin{FEWER}", f"mined-again{FEWER}"),
                *(f"refresh-50{FEWER}", f"corrected-mlp{FEWER}"),
            ),
        ),
        Default(
            f"{CORRECTED}{FEWER}-teacher",
            (
                *(f"{WRITTEN}{FEWER}-teacher", f"mined-by-teacher{FEWER}", "mined-by-teacher-scores", "gist"),
                *(f"{WRITTEN}{FEWER}", "in-batch-larger"),
            ),
        ),
    ),
    "2-layers-all": (Default(CORRECTED, (WRITTEN,)),),
    "minilm": (Default(f"{WRITTEN}{FEWER}", (f"{CORRECTED}{FEWER}", "in-batch-larger")),),
    "minilm-lora": (Default(f"{WRITTEN}{FEWER}", (f"{CORRECTED}{FEWER}", "in-batch-larger")),),
    # The labels study has them; here are those by the present rule for a teacher's weight.
    "static-high": (
        Default(f"{WRITTEN}-own-pairs", (f"{CORRECTED}-own-pairs",)),
        Default(f"{CORRECTED}-teacher", (f"{CORRECTED}-own-pairs-teacher", f"{WRITTEN}-teacher")),
    ),
    "static-long": (
        Default(f"{WRITTEN}-own-pairs", ()),
        Default(f"{CORRECTED}-own-pairs-teacher", (f"{CORRECTED}-teacher",)),
    ),
    "static-longer": (
        Default(f"{WRITTEN}-own-pairs", (WRITTEN, "in-batch-larger-static-own-pairs")),
        Default(
            f"{CORRECTED}-own-pairs-teacher",
            (f"{CORRECTED}-teacher", f"{WRITTEN}-own-pairs", "in-batch-larger-static-own-pairs"),
        ),
    ),
    "static": (
        Default(
            f"{WRITTEN}-own-pairs",
            (
                *(f"{CORRECTED}-own-pairs", "in-batch-larger-static-own-pairs", WRITTEN, CORRECTED),
                *("in-batch-larger-static", "mined-margin", "mined-once", "refresh-10"),
            ),
        ),
        Default(
            f"{CORRECTED}-teacher",
            (
                *(f"{CORRECTED}-own-pairs-teacher", f"{WRITTEN}-teacher", "mined-by-teacher"),
                *(f"{WRITTEN}-own-pairs", "in-batch-larger-static-own-pairs"),
            ),
        ),
    ),
}

SUMMARY = {
    "in-batch-larger": "in-batch negatives",
    f"mined-margin{FEWER}": "mined once, with a margin",
    f"{WRITTEN}{FEWER}": "written back, no corrector: **what the trainer takes**",
    f"{CORRECTED}{FEWER}": "corrected",
    f"{CORRECTED}{FEWER}-teacher": "corrected, with a teacher: **what the trainer takes with one**",
}
"""The rows of two layers that the project's README shows, with as many targets encoded in each."""

Corpora = dict[str, Runs]
"""The runs of one encoder, by corpus."""


def read(folder: Path) -> dict[str, Corpora]:
    """All runs that there are, by encoder and corpus."""
    found = {
        encoder: {corpus: runs for corpus, regime in regimes.items() if (runs := load(folder / regime))}
        for encoder, regimes in REGIMES.items()
    }
    return {encoder: corpora for encoder, corpora in found.items() if corpora}


class Metric(NamedTuple):
    """A figure of a run, and of one question by the ranks of its relevant targets, ``inf`` beyond the first 100."""

    name: str
    of_question: Callable[[list[float]], float]

    def __call__(self, run: dict) -> float:
        return 100 * float(run["after"][self.name])

    def by_question(self, run: dict) -> np.ndarray | None:
        """``(Q,)``; None where ranks were not kept."""
        if "ranks" not in run:
            return None
        told = run["ranks"]["after"].replace("-", "inf").split(",")
        return 100 * np.array([self.of_question([float(rank) for rank in each.split()]) for each in told])


METRICS = {
    "MRR@10": Metric("mrr@10", lambda ranks: 1 / ranks[0] if ranks[0] <= 10 else 0.0),
    "recall@20": Metric("recall@20", lambda ranks: statistics.mean(rank <= 20 for rank in ranks)),
    "recall@100": Metric("recall@100", lambda ranks: statistics.mean(rank <= 100 for rank in ranks)),
}


def texts(run: dict) -> float:
    return float(run["targets_encoded"])


def seconds(run: dict) -> float:
    """Everything that a run needs: its cache and its teacher, whichever run made them, mining and training; NaN where
    it was not noted what they took.
    """
    strategy, spent = run["args"]["strategy"], run["seconds"]
    shared = []
    if not strategy.startswith(("mined", "in-batch", "gist")):
        shared.append(spent.get("cache"))
    if run["args"].get("teacher_model") and strategy != "gist":
        shared.append(spent.get("teacher"))
    if None in shared:
        return math.nan
    return sum([spent["prepare"], *shared, spent["train"], -spent.get("probe", 0.0)])


def usual_seconds(group: list[dict]) -> float:
    """The median of those that were noted."""
    noted = [spent for run in group if not math.isnan(spent := seconds(run))]
    return statistics.median(noted) if noted else math.nan


class Difference(NamedTuple):
    """What one strategy has over another on one corpus."""

    mean: float
    seeds: int
    parts: list[tuple[float, int]]
    """The variances of the mean that are known, each with its degrees of freedom: over seeds, and over questions."""


def difference(one: str, other: str, runs: Runs, metric: Metric) -> Difference | None:
    """Seed by seed, question by question; None where no seed has both."""
    ours, theirs = ({run["seed"]: run for run in runs.get(name, [])} for name in (one, other))
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return None
    values = [metric(ours[seed]) - metric(theirs[seed]) for seed in seeds]
    parts = [(statistics.variance(values) / len(seeds), len(seeds) - 1)] if len(seeds) > 1 else []
    asked = [(metric.by_question(ours[seed]), metric.by_question(theirs[seed])) for seed in seeds]
    by_question = [mine - its for mine, its in asked if mine is not None and its is not None]
    if len(by_question) == len(seeds):
        over_seeds = np.mean(by_question, axis=0)
        parts.append((float(over_seeds.var(ddof=1)) / len(over_seeds), len(over_seeds) - 1))
    return Difference(statistics.mean(values), len(seeds), parts)


def interval(found: list[Difference]) -> tuple[float, float] | None:
    """The 95 % interval of the mean over corpora, by Student's t.

    Each corpus counts alike. The variance of a difference is the sum of those over seeds and, where ranks were kept,
    over questions: both have a part in common, so the interval is rather too wide than too narrow. The degrees of
    freedom are those of Welch and Satterthwaite. It speaks of other seeds and questions, not of other corpora.

    Returns:
        None where a corpus has fewer than two seeds.
    """
    if not found or min(each.seeds for each in found) < 2:
        return None
    parts = [part for each in found for part in each.parts]
    total = sum(variance for variance, _ in parts)
    middle = statistics.mean(each.mean for each in found)
    if total == 0:
        return middle, middle
    freedom = total**2 / sum(variance**2 / freedom for variance, freedom in parts)
    half = float(stats.t.ppf(0.975, freedom)) * total**0.5 / len(found)
    return middle - half, middle + half


def apart(one: str, other: str, runs: list[Runs], metric: Metric) -> str:
    """``"+0.6 [+0.2, +1.0] (3)"``: a difference, the mean over corpora, its interval, and of how many seeds, with an
    ``s`` behind those of a corpus for which the interval is over seeds alone.
    """
    found = [each for some in runs if (each := difference(one, other, some, metric))]
    if not found:
        return ""
    bounds = interval(found)
    between = f" [{bounds[0]:+.1f}, {bounds[1]:+.1f}]" if bounds else ""
    seeds = " + ".join(f"{each.seeds}{'s' if bounds and len(each.parts) < 2 else ''}" for each in found)
    return f"{statistics.mean(each.mean for each in found):+.1f}{between} ({seeds})"
