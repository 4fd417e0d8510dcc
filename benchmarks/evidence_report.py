"""The page that decides: what corrected negatives, own pairs and a teacher give beside what one would pick instead,
from the JSON of `strategies.py --preset evidence`.

    python benchmarks/evidence_report.py
    python benchmarks/evidence_report.py --open_test

Test questions are asked by every run, and their figures lie in `sealed/` unread, until the second command opens them,
once, when everything has been decided; `sealed/opened.json` says when.

Differences are taken seed by seed, with 95 % intervals by Student's t over the seeds.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterable
from datetime import datetime, timezone
from pathlib import Path

from presets import AS_LONG, INSTEAD, SPENT
from report import Runs, coverage, differences, legend, load, machine, mean, mean_sd, mrr, panels, save
from scipy import stats
from strategies import RESULTS, ROOT

sys.path.insert(0, str(ROOT / "recipes"))
from common import commit

LOW = "minilm-2-layers-all-passages"
CORPORA = {"nq": "Natural Questions", "code": "code search", "packages": "package search"}
ENCODERS = {
    "2-layers": "two layers of MiniLM, 30,000 targets",
    "2-layers-all": "two layers of MiniLM, all targets",
    "static": "static encoder, all targets",
}
REGIMES = {LOW: "Natural Questions, two layers of MiniLM, all 99,471 passages"} | {
    f"{corpus}-{encoder}": f"{title}, {how}" for encoder, how in ENCODERS.items() for corpus, title in CORPORA.items()
}
DEFAULT, BOTH = "mlp-pull-back", "mlp-pull-back-own-pairs-teacher"
ADDED = {"": "corrected", "-own-pairs": "+ own pairs", "-teacher": "+ teacher", "-own-pairs-teacher": "+ both"}
TITLES = {
    DEFAULT: "**corrected**",
    **{f"{DEFAULT}{suffix}": f"corrected {name}" for suffix, name in ADDED.items() if suffix},
    "stale-write-back": "written back, no corrector",
    "corrected-mlp": "the paper's setting",
    "stale": "stale cache",
    "in-batch-larger": "in-batch, larger batches",
    "in-batch-larger-static": "in-batch, larger batches (static)",
    "mined-margin": "mined once, with a margin",
    "mined-once": "mined once, without a margin",
    "mlp-margin": "corrected, with a margin",
    "mined-again": "mined again every 25 steps, with a margin",
    "mined-margin-teacher": "mined once, `DistillKLDivLoss`",
    "refresh-10": "re-embedded every 10 steps",
    "refresh-50": "re-embedded every 50 steps",
    "gist": "in-batch, larger batches, guided (GIST)",
}
FEWER = "-2-negatives-2-layers"
OPENED = "opened.json"
LITTLE = 0.5  # points below something else that would not matter
RIVALS = ("in-batch-larger-static", "mined-once", "refresh-10", *INSTEAD)
TITLES |= {f"{name}-own-pairs": f"{TITLES[name]}, own pairs" for name in INSTEAD}
TITLES |= {
    f"{name}-{count}-negatives-{encoder}": f"{TITLES[name].strip('*')}, {questions} questions × {count}"
    for name in (DEFAULT, "stale-write-back", "mined-margin")
    for encoder, spent in SPENT.items()
    for count, questions in spent.items()
}
TITLES |= {f"{name}-as-long": f"{TITLES[name]}, {steps} steps" for name, steps in AS_LONG.items()}
CHOICES = {f"code-{encoder}-choice": name for encoder, name in (("2-layers", "two layers"), ("static", "static"))}


def interval(values: list[float]) -> tuple[float, float] | None:
    """The 95 % interval of the mean, by Student's t; None for fewer than two values."""
    if len(values) < 2:
        return None
    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return statistics.mean(values) - half, statistics.mean(values) + half


def texts(run: dict) -> float:
    return float(run["targets_encoded"])


def recall(run: dict) -> float:
    return 100 * float(run["after"]["recall@100"])


def apart(one: str, other: str, runs: Runs, value: Callable[[dict], float] = mrr) -> str:
    """``"+0.6 [+0.2, +1.0] (3)"``: a mean difference, its interval, and of how many seeds."""
    values = differences(one, other, runs, value)
    if not values:
        return ""
    bounds = interval(values)
    between = f" [{bounds[0]:+.1f}, {bounds[1]:+.1f}]" if bounds else ""
    return f"{statistics.mean(values):+.1f}{between} ({len(values)})"


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


def against(regimes: dict[str, Runs], rivals: Iterable[str], ours: str, value: Callable[[dict], float] = mrr) -> str:
    """What ``ours`` has over each of ``rivals``, a row for each regime."""
    rivals = [name for name in rivals if any(differences(ours, name, runs) for runs in regimes.values())]
    if not rivals:
        return "Nothing of this has been run yet."
    rows = [
        f"| | {TITLES[ours].strip('*')} | {' | '.join(TITLES[name] for name in rivals)} |",
        "|---" * (len(rivals) + 2) + "|",
    ]
    for regime, runs in regimes.items():
        if ours in runs:
            cells = [mean_sd([value(run) for run in runs[ours]]), *(apart(ours, name, runs, value) for name in rivals)]
            rows.append(f"| {REGIMES[regime]} | {' | '.join(cells)} |")
    return "\n".join(rows)


def all_rows(runs: Runs) -> str:
    """Every strategy of a regime, best first."""
    rows = ["| | MRR@10 | R@20 | R@100 | encoded a target | s, all counted |", "|---|---|---|---|---|---|"]
    for name, group in sorted(runs.items(), key=lambda item: -mean(item[1], mrr)):
        recalls = [mean_sd([100 * run["after"][metric] for run in group]) for metric in ("recall@20", "recall@100")]
        cells = [f"{mean_sd([mrr(run) for run in group])} ({len(group)})", *recalls, f"{mean(group, coverage):.2f}"]
        spent = usual_seconds(group)
        rows.append(
            f"| {TITLES.get(name, name)} | {' | '.join(cells)} | {'' if math.isnan(spent) else f'{spent:.0f}'} |"
        )
    return "\n".join(rows)


def told(regimes: dict[str, Runs], holds: Callable[[float, float], bool]) -> str:
    """Comparisons of corrected negatives with something else whose interval has a property, a line each."""
    found = []
    for regime, runs in regimes.items():
        for other in ("stale-write-back", *RIVALS, *(f"{name}-as-long" for name in AS_LONG)):
            for metric, value in (("MRR@10", mrr), ("recall@100", recall)):
                bounds = interval(differences(DEFAULT, other, runs, value))
                if bounds and holds(*bounds):
                    said = apart(DEFAULT, other, runs, value)
                    found.append(f"- {REGIMES[regime]}, {metric}: {said} against {TITLES[other]}.")
    return "\n".join(found) or "Nowhere in these runs."


def plots(folder: Path, regimes: dict[str, Runs]) -> list[str]:
    """MRR@10 against texts encoded and against time, and the gain over writing back by coverage."""
    shown = {name: runs for name, runs in regimes.items() if len(runs) > 4}
    made = []
    costs = {
        "texts": ("targets encoded, for the loss and the cache", lambda group: mean(group, texts)),
        "seconds": ("seconds, all counted", usual_seconds),
    }
    for name, (label, cost) in costs.items() if shown else ():
        figure, axes = panels(REGIMES[regime] for regime in shown)
        for axis, runs in zip(axes, shown.values(), strict=True):
            for number, strategy in enumerate(each for each in TITLES if each in runs):
                group, marker = runs[strategy], "o" if strategy.startswith(DEFAULT) else "s"
                label = TITLES[strategy].replace("*", "")
                axis.plot(cost(group), mean(group, mrr), marker, color=f"C{number % 10}", label=label)
            axis.set(xlabel=label, ylabel="MRR@10", xscale="log")
        legend(axes)
        made.append(save(figure, folder, f"quality-against-{name}"))
    points = [
        (mean(runs[DEFAULT], coverage), differences(DEFAULT, "stale-write-back", runs), "static" in regime)
        for regime, runs in regimes.items()
        if differences(DEFAULT, "stale-write-back", runs)
    ]
    if points:
        figure, (axis,) = panels(["What correcting adds to writing back"])
        for at, values, is_static in points:
            axis.plot(at, statistics.mean(values), "s" if is_static else "o", color="C1" if is_static else "C0")
        axis.axhline(0, color="grey")
        axis.set(xlabel="encodings a target, with gradient", ylabel="MRR@10, corrected less written back", xscale="log")
        made.append(save(figure, folder, "gain-by-coverage"))
    return made


def open_test(folder: Path) -> None:
    """Note that test questions are looked at from now on.

    Raises:
        SystemExit: they have been already.
    """
    path = folder / "sealed" / OPENED
    if path.exists():
        sys.exit(f"Test questions were opened before: {path.read_text(encoding='utf-8').strip()}")
    path.write_text(
        json.dumps({"opened": datetime.now(timezone.utc).date().isoformat(), **commit()}) + "\n", encoding="utf-8"
    )


def of_test(folder: Path, regimes: dict[str, Runs]) -> list[str]:
    """What test questions say, where they have been opened."""
    path = folder / "sealed" / OPENED
    if not path.exists():
        return []
    tested: dict[str, Runs] = {}
    for regime, runs in regimes.items():
        for strategy, group in runs.items():
            for run in group:
                figures = folder / "sealed" / regime / f"{strategy}-seed{run['seed']}.json"
                if figures.exists():
                    found = run | {"after": json.loads(figures.read_text(encoding="utf-8"))["test"]}
                    tested.setdefault(regime, {}).setdefault(strategy, []).append(found)
    opened = json.loads(path.read_text(encoding="utf-8"))["opened"]
    return [
        "## Test questions",
        f"Opened on {opened}, when the defaults had been decided. What is above was measured on dev questions.",
        against(tested, ["stale-write-back", *RIVALS], DEFAULT),
        added(tested),
    ]


def page(folder: Path) -> str:
    regimes = {name: load(folder / name) for name in REGIMES if (folder / name).is_dir()}
    parts = [
        "# Evidence: three corpora, two encoders, and what one would pick instead",
        "Made by `benchmarks/evidence_report.py` from the JSON beside it; every JSON has its command, and "
        "`benchmarks/corpora.py` makes the corpora. MRR@10 on dev questions, mean ± sd; differences seed by seed with "
        "95 % intervals by Student's t (number of seeds). Runs of a row and its rivals encode about as many texts with "
        "gradient. Not all runs have been made yet: `make bench PRESET=evidence` goes on where it was stopped.",
        "Seconds are of one core of two; one or two other processes ran beside, so they compare only roughly.",
        "## Does the corrector beat plain write-back?",
        against(regimes, ["stale-write-back"], DEFAULT),
        "The same in recall@100:",
        against(regimes, ["stale-write-back"], DEFAULT, recall),
        "## Are corrected negatives below what one would pick instead?",
        against(regimes, RIVALS, DEFAULT),
        "As many texts a step, spent on 48 questions with 2 negatives each instead of 32 with 4:",
        against(regimes, [DEFAULT, f"stale-write-back{FEWER}", f"mined-margin{FEWER}", *RIVALS], f"{DEFAULT}{FEWER}"),
        "The same in recall@100:",
        against(
            regimes, [DEFAULT, f"stale-write-back{FEWER}", f"mined-margin{FEWER}", *RIVALS], f"{DEFAULT}{FEWER}", recall
        ),
        "## In as much time",
        "As many steps as there is time for while the default makes its cache and its own steps.",
        against(regimes, [f"{name}-as-long" for name in AS_LONG], DEFAULT),
        "## What do own pairs and a teacher add?",
        added(regimes),
        "## Where it fails",
        "Corrected negatives are below something else, as an interval tells:",
        told(regimes, lambda low, high: high < 0),
        f"They may be, by more than {LITTLE} points, as far as so few seeds tell:",
        told(regimes, lambda low, high: low < -LITTLE and high >= 0),
        *of_test(folder, regimes),
        *plots(folder, regimes),
        "## What was chosen before",
        "Learning rates, ways to mine, and how texts are spent (*questions × negatives* a step): on 1,000 questions "
        "held out of the training questions of code search, which nothing above is measured on; one seed, MRR@10.",
        *(chosen(load(folder / regime), title) for regime, title in CHOICES.items() if (folder / regime).is_dir()),
        "## All runs",
        *(part for name, runs in regimes.items() for part in (f"### {REGIMES[name]}", all_rows(runs))),
    ]
    everything = {f"{regime} {name}": group for regime, runs in regimes.items() for name, group in runs.items()}
    return "\n\n".join([*parts, f"Computed in {machine(everything).removeprefix(', ')}."]) + "\n"


def chosen(runs: Runs, encoder: str) -> str:
    """What held-out questions say of rates and of mining, a row a strategy, a column a rate."""
    rates = sorted({float(group[0]["args"]["learning_rate"]) for group in runs.values()})
    rows = [f"| {encoder} | {' | '.join(f'{rate:g}' for rate in rates)} |", "|---" * (len(rates) + 1) + "|"]
    for name in dict.fromkeys(each.partition("-rate-")[0] for each in runs):
        alike = [group for each, group in runs.items() if each.partition("-rate-")[0] == name]
        tried = {group[0]["args"]["learning_rate"]: group for group in alike}
        cells = [mean_sd([mrr(run) for run in tried[rate]]) if rate in tried else "" for rate in rates]
        rows.append(f"| {TITLES[name]} | {' | '.join(cells)} |")
    return "\n".join(rows)


def added(regimes: dict[str, Runs]) -> str:
    """What own pairs, a teacher and both add to the default."""
    rows = [f"| | {' | '.join(ADDED.values())} |", "|---" * (len(ADDED) + 1) + "|"]
    for regime, runs in regimes.items():
        if DEFAULT in runs:
            gains = [apart(f"{DEFAULT}{suffix}", DEFAULT, runs) for suffix in ADDED if suffix]
            rows.append(f"| {REGIMES[regime]} | {mean_sd([mrr(run) for run in runs[DEFAULT]])} | {' | '.join(gains)} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS / "evidence")
    parser.add_argument("--open_test", action="store_true", help="look at the test questions: once, at the end")
    args = parser.parse_args()
    folder = args.results
    if args.open_test:
        open_test(folder)
    (folder / "README.md").write_text(page(folder), encoding="utf-8")


if __name__ == "__main__":
    main()
