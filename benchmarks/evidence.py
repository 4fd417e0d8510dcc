"""What the evidence compares, under which names and by which figures (:mod:`evidence_report` writes the page)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from pathlib import Path

from presets import AS_LONG, INSTEAD, SPENT
from report import Runs, differences, load, mrr
from scipy import stats

CORPORA = {"nq": "Natural Questions", "code": "code search", "packages": "package search"}
ENCODERS = {
    "2-layers": "Two layers of MiniLM, 30,000 targets",
    "2-layers-all": "Two layers of MiniLM, all targets",
    "static": "Static encoder, all targets",
}
# The first of all, configured before the others, has a name of its own.
REGIMES = {
    encoder: {corpus: f"{corpus}-{encoder}" for corpus in CORPORA}
    | ({"nq": "minilm-2-layers-all-passages"} if encoder == "2-layers-all" else {})
    for encoder in ENCODERS
}
DEFAULT, WRITTEN = "mlp-pull-back", "stale-write-back"
FEWER = "-2-negatives-2-layers"
ADDED = {"": "corrected", "-own-pairs": "+ own pairs", "-teacher": "+ teacher", "-own-pairs-teacher": "+ both"}
TITLES = {
    DEFAULT: "**corrected**",
    **{f"{DEFAULT}{suffix}": f"corrected {name}" for suffix, name in ADDED.items() if suffix},
    WRITTEN: "written back, no corrector",
    "corrected-mlp": "the paper's setting",
    "stale": "stale cache",
    "in-batch-larger": "in-batch, larger batches",
    "in-batch-larger-static": "in-batch, larger batches",
    "mined-margin": "mined once, with a margin",
    "mined-once": "mined once, without a margin",
    "mlp-margin": "corrected, with a margin",
    "mined-again": "mined again every 25 steps, with a margin",
    "mined-margin-teacher": "mined once, `DistillKLDivLoss`",
    "refresh-10": "re-embedded every 10 steps",
    "refresh-50": "re-embedded every 50 steps",
    "gist": "in-batch, larger batches, guided (GIST)",
}
RIVALS = ("in-batch-larger", "in-batch-larger-static", "mined-margin", "mined-once", "mined-again", "refresh-50")
RIVALS += ("refresh-10", "mined-margin-teacher", "gist")
LONGER = tuple(f"{name}-as-long" for name in AS_LONG)
TITLES |= {f"{name}-own-pairs": f"{TITLES[name]}, own pairs" for name in INSTEAD}
TITLES |= {
    f"{name}-{count}-negatives-{encoder}": f"{TITLES[name].strip('*')}, {questions} questions × {count}"
    for name in (DEFAULT, WRITTEN, "mined-margin")
    for encoder, spent in SPENT.items()
    for count, questions in spent.items()
}
TITLES |= {f"{name}-as-long": f"{TITLES[name]}, {steps} steps" for name, steps in AS_LONG.items()}

Corpora = dict[str, Runs]
"""The runs of one encoder, by corpus."""


def read(folder: Path) -> dict[str, Corpora]:
    """All runs that there are, by encoder and corpus."""
    found = {
        encoder: {corpus: runs for corpus, regime in regimes.items() if (runs := load(folder / regime))}
        for encoder, regimes in REGIMES.items()
    }
    return {encoder: corpora for encoder, corpora in found.items() if corpora}


def recall(run: dict) -> float:
    return 100 * float(run["after"]["recall@100"])


METRICS: dict[str, Callable[[dict], float]] = {"MRR@10": mrr, "recall@100": recall}


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


def interval(groups: list[list[float]]) -> tuple[float, float] | None:
    """The 95 % interval of the mean over corpora of the mean over seeds, by Student's t.

    Each corpus counts alike. Seeds are what varies: the interval speaks of these corpora, not of others. The degrees of
    freedom are those of Welch and Satterthwaite, for one corpus its seeds less one.

    Args:
        groups: differences by seed, of each corpus.

    Returns:
        None where a corpus has fewer than two seeds.
    """
    if not groups or min(map(len, groups)) < 2:
        return None
    variances = [statistics.variance(values) / len(values) for values in groups]
    total = sum(variances)
    middle = statistics.mean(map(statistics.mean, groups))
    if total == 0:
        return middle, middle
    freedom = total**2 / sum(each**2 / (len(values) - 1) for each, values in zip(variances, groups, strict=True))
    half = float(stats.t.ppf(0.975, freedom)) * total**0.5 / len(groups)
    return middle - half, middle + half


def apart(one: str, other: str, runs: list[Runs], value: Callable[[dict], float] = mrr) -> str:
    """``"+0.6 [+0.2, +1.0] (3)"``: a difference, the mean over corpora, its interval, and of how many seeds."""
    groups = [values for each in runs if (values := differences(one, other, each, value))]
    if not groups:
        return ""
    bounds = interval(groups)
    between = f" [{bounds[0]:+.1f}, {bounds[1]:+.1f}]" if bounds else ""
    seeds = " + ".join(str(len(values)) for values in groups)
    return f"{statistics.mean(map(statistics.mean, groups)):+.1f}{between} ({seeds})"
