"""The page that decides: what corrected negatives, own pairs and a teacher give beside what one would pick instead,
from the JSON of `strategies.py --preset evidence`.

    python benchmarks/evidence_report.py
    python benchmarks/evidence_report.py --open_test

Test questions are asked by every run, and their figures lie in `sealed/` unread, until the second command opens them,
once, when everything has been decided; `sealed/opened.json` says when.

Differences are taken seed by seed and question by question, with 95 % intervals. What is said of all this is written by
hand, in `findings.md` beside the JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable
from datetime import datetime, timezone
from pathlib import Path

from evidence import (
    ADDED,
    CORPORA,
    CORRECTED,
    DEFAULTS,
    ENCODERS,
    FEWER,
    LONGER,
    METRICS,
    REGIMES,
    SUMMARY,
    TITLES,
    WRITTEN,
    Corpora,
    apart,
    difference,
    interval,
    read,
    usual_seconds,
)
from evidence_plots import plots
from report import Runs, coverage, load, machine, mean, mean_sd, mrr, put_into
from strategies import RESULTS, ROOT
from strategies import runs as runs_of

sys.path.insert(0, str(ROOT / "recipes"))
from common import commit

OPENED = "opened.json"
SEEDS = 3  # with two an interval says little
LITTLE = 0.5  # points below something else that would not matter
CHOICES = {
    f"{corpus}-{encoder}-choice": f"{title}, {name}"
    for corpus, title in CORPORA.items()
    for encoder, name in (("2-layers", "two layers"), ("static", "static"))
}
PLAIN, HALF = "32 questions × 4 (static: 64 × 8)", "48 questions × 2"


def table(found: Corpora, heading: str, rows: Iterable[tuple[str, Callable[[list[Runs]], str]]]) -> str:
    """A row each, a column a corpus, and one for all where there are several; rows without a figure are left out."""
    columns = [[runs] for runs in found.values()] + ([list(found.values())] if len(found) > 1 else [])
    titles = [CORPORA[corpus] for corpus in found] + (["mean"] if len(found) > 1 else [])
    lines = []
    for title, cell in rows:
        cells = [cell(runs) if len(runs) == 1 or _in_several(cell, runs) else "" for runs in columns]
        if any(cells):
            lines.append(f"| {title} | {' | '.join(cells)} |")
    if not lines:
        return ""
    return "\n".join([f"| {heading} | {' | '.join(titles)} |", "|---" * (len(titles) + 1) + "|", *lines])


def _in_several(cell: Callable[[list[Runs]], str], runs: list[Runs]) -> bool:
    """Whether a mean over corpora is one of more than one of them."""
    return sum(bool(cell([each])) for each in runs) > 1


def of(strategy: str, metric: str) -> tuple[str, Callable[[list[Runs]], str]]:
    """A row: the figure itself, which has no mean over corpora."""

    def cell(runs: list[Runs]) -> str:
        groups = [each[strategy] for each in runs if strategy in each]
        return mean_sd([METRICS[metric](run) for run in groups[0]]) if len(groups) == len(runs) == 1 else ""

    return f"*{TITLES[strategy].strip('*')}, {metric}*", cell


def less(one: str, other: str, metric: str) -> tuple[str, Callable[[list[Runs]], str]]:
    """A row: what one has over another."""
    return TITLES[other].strip("*"), lambda runs: apart(one, other, runs, METRICS[metric])


def against(found: Corpora, ours: str, rivals: Iterable[str]) -> str:
    """What ours has over each of the rivals, in each metric."""
    rivals = list(rivals)
    tables = [
        table(found, "", [of(ours, metric), *(less(ours, each, metric) for each in rivals)])
        for metric in METRICS
        if any(difference(ours, each, runs, METRICS[metric]) for runs in found.values() for each in rivals)
    ]
    return "\n\n".join(filter(None, tables))


def by_encoder(found: dict[str, Corpora], part: Callable[[Corpora], str]) -> list[str]:
    """A part for each encoder that has something to say."""
    return [
        text for each, corpora in found.items() if (made := part(corpora)) for text in (f"**{ENCODERS[each]}**", made)
    ]


def compared(found: dict[str, Corpora]) -> list[str]:
    """The tables, one or more for each question."""
    hears = [(spent, suffix) for suffix in ADDED for spent in (("", PLAIN), (FEWER, HALF))]
    return [
        "## Does the corrector beat plain write-back?",
        "What corrected negatives have over embeddings that are written back without a corrector:",
        *by_encoder(
            found,
            lambda corpora: table(
                corpora,
                "",
                [
                    (
                        f"{metric}: {', '.join(filter(None, [how, ADDED[suffix][2:] if suffix else '']))}",
                        less(f"{CORRECTED}{spent}{suffix}", f"{WRITTEN}{spent}{suffix}", metric)[1],
                    )
                    for metric in METRICS
                    for (spent, how), suffix in hears
                ],
            ),
        ),
        "## Is the default below what one would pick instead?",
        "What the trainer takes by itself has over others. Without a teacher:",
        *by_default(found, 0),
        "With a teacher:",
        *by_default(found, 1),
        "## What do own pairs and a teacher add?",
        *(
            part
            for ours in (CORRECTED, WRITTEN, f"{CORRECTED}{FEWER}", f"{WRITTEN}{FEWER}")
            for part in by_encoder(found, lambda corpora, ours=ours: added(corpora, ours))
        ),
        "## On what are texts spent best?",
        f"What {HALF} negatives have over 32 with 4, as many texts a step:",
        *(
            part
            for name in (CORRECTED, WRITTEN)
            for part in by_encoder(found, lambda corpora, name=name: against(corpora, f"{name}{FEWER}", [name]))
        ),
        "## Is mining once better than in-batch negatives?",
        "What negatives that are mined once, with a margin, have over in-batch negatives:",
        *by_encoder(found, lambda corpora: against(corpora, f"mined-margin{FEWER}", ["in-batch-larger"])),
        *by_encoder(found, lambda corpora: against(corpora, "mined-margin", ["in-batch-larger-static"])),
        "## In as much time",
        "What corrected and written back negatives have over these, which make as many steps as there is time for "
        "while corrected ones make their cache and their own steps (measured on code search):",
        *(
            part
            for ours in (CORRECTED, f"{CORRECTED}{FEWER}", f"{WRITTEN}{FEWER}")
            for part in by_encoder(found, lambda corpora, ours=ours: against(corpora, ours, LONGER))
        ),
        "## Where it fails",
        *failures(found),
    ]


def by_default(found: dict[str, Corpora], taught: int) -> list[str]:
    """What the default has over others, for each encoder."""
    parts = []
    for encoder, corpora in found.items():
        for default in DEFAULTS[encoder][taught : taught + 1]:
            if made := against(corpora, *default):
                parts += [f"**{ENCODERS[encoder]}**", made]
    return parts


def added(found: Corpora, ours: str) -> str:
    """What own pairs, a teacher and both add to a strategy."""
    kinds = {name: f"{ours}{suffix}" for suffix, name in ADDED.items() if suffix}
    found = {corpus: runs for corpus, runs in found.items() if runs.keys() & kinds.values()}
    tables = (
        table(found, "", [of(ours, metric), *((name, less(each, ours, metric)[1]) for name, each in kinds.items())])
        for metric in METRICS
    )
    return "\n\n".join(filter(None, tables)) if any(ours in runs for runs in found.values()) else ""


def failures(found: dict[str, Corpora]) -> list[str]:
    """Every comparison of three seeds or more in which the default is below something else, or may be."""
    below, perhaps, count = [], 0, 0
    for encoder, corpora in found.items():
        for corpus, runs in corpora.items():
            for default in DEFAULTS[encoder]:
                for other in default.instead:
                    for name, metric in METRICS.items():
                        apart_by = difference(default.strategy, other, runs, metric)
                        if apart_by is None or apart_by.seeds < SEEDS:
                            continue
                        count += 1
                        low, high = interval([apart_by]) or (-math.inf, math.inf)
                        perhaps += low < -LITTLE and high >= 0
                        if high < 0:
                            ours, theirs = (TITLES[each].replace("*", "") for each in (default.strategy, other))
                            said = f"{ours} {apart(default.strategy, other, [runs], metric)} against {theirs}"
                            below.append(f"- {ENCODERS[encoder]}, {CORPORA[corpus]}, {name}: {said}.")
    return [
        f"Of {count} comparisons of the default on one corpus with {SEEDS} seeds or more, these have a 95 % interval "
        f"below 0 (one in forty would by chance); {perhaps} more may be more than {LITTLE} points below, as far as so "
        "few seeds tell.",
        "\n".join(below) or "None.",
    ]


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


def open_test(folder: Path) -> None:
    """Note that test questions are looked at from now on.

    Raises:
        SystemExit: they have been already.
    """
    path = folder / "sealed" / OPENED
    if path.exists():
        sys.exit(f"Test questions were opened before: {path.read_text(encoding='utf-8').strip()}")
    # What is run later has no part in it: it could have been run because of what was seen.
    sealed = sorted(each.relative_to(path.parent).as_posix() for each in path.parent.glob("*/*.json"))
    opened = {"opened": datetime.now(timezone.utc).date().isoformat(), **commit(), "runs": sealed}
    path.write_text(json.dumps(opened, indent=1) + "\n", encoding="utf-8")


def tested(folder: Path, found: dict[str, Corpora]) -> dict[str, Corpora]:
    """The runs by test questions, where they have been opened."""
    path = folder / "sealed" / OPENED
    if not path.exists():
        return {}
    told = json.loads(path.read_text(encoding="utf-8"))
    opened: dict[str, Corpora] = {}
    for encoder, corpora in found.items():
        for corpus, runs in corpora.items():
            for strategy, group in runs.items():
                for run in group:
                    name = f"{REGIMES[encoder][corpus]}/{strategy}-seed{run['seed']}.json"
                    if name in told["runs"]:
                        figures = json.loads((path.parent / name).read_text(encoding="utf-8"))
                        ranks = {"ranks": {"after": figures["ranks"]}} if "ranks" in figures else {}
                        others = {key: value for key, value in run.items() if key != "ranks"}
                        kept = opened.setdefault(encoder, {}).setdefault(corpus, {})
                        kept.setdefault(strategy, []).append({**others, "after": figures["test"], **ranks})
    return opened


def of_test(folder: Path, tests: dict[str, Corpora]) -> list[str]:
    """What test questions say, where they have been opened."""
    if not tests:
        return []
    told = json.loads((folder / "sealed" / OPENED).read_text(encoding="utf-8"))
    return [
        "# Test questions",
        f"Opened on {told['opened']}, when the defaults had been decided: the tables above once more, which are of dev "
        "questions. Natural Questions has no third part.",
        *compared(tests),
    ]


def summary(found: dict[str, Corpora], tests: dict[str, Corpora]) -> str:
    """MRR@10 of the rows that the project's README shows, by test questions where there are some; and what each takes
    in time, in-batch negatives being 1.
    """
    runs = {corpus: tests.get("2-layers", {}).get(corpus, dev) for corpus, dev in found["2-layers"].items()}
    titles = [CORPORA[corpus] for corpus in runs]
    rows = [f"| | {' | '.join(titles)} | time, roughly |", "|---" * (len(titles) + 2) + "|"]
    for name, words in SUMMARY.items():
        cells = [mean_sd([mrr(run) for run in each[name]]) if name in each else "" for each in runs.values()]
        rows.append(f"| {words} | {' | '.join(cells)} | {_times(found['2-layers'], name)} |")
    return "\n".join(rows)


def _times(found: Corpora, name: str) -> str:
    """How much longer than the first row of the summary a strategy takes, from the least to the most over corpora."""
    first = next(iter(SUMMARY))
    both = [runs for runs in found.values() if name in runs and first in runs]
    times = [usual_seconds(runs[name]) / usual_seconds(runs[first]) for runs in both]
    times = sorted(each for each in times if not math.isnan(each))
    return " to ".join(dict.fromkeys(f"{each:.1f}" for each in (times[0], times[-1]))) if times else ""


def page(folder: Path) -> str:
    found = read(folder)
    findings = folder / "findings.md"
    made = [run.results(folder).exists() for run in runs_of("evidence")]
    parts = [
        "# Evidence: three corpora, three encoders, and what one would pick instead",
        "Made by `benchmarks/evidence_report.py` from the JSON beside it; every JSON has its command, and "
        "`benchmarks/corpora.py` makes the corpora. Figures are of dev questions, mean ± sd. Differences are taken "
        "seed by seed and question by question, with 95 % intervals by Student's t (number of seeds). They speak of "
        "other seeds and other questions, behind an *s* of other seeds alone. *Mean* is that over corpora, which count "
        "alike. Runs encode about as many texts with gradient as their rivals, where no other number of "
        f"steps is named. {sum(made)} of {len(made)} runs have been made; `make bench PRESET=evidence` goes on.",
        "Seconds are of one core of two; one or two other processes ran beside, so they compare only roughly.",
        *([findings.read_text(encoding="utf-8").strip()] if findings.exists() else []),
        *plots(folder, found),
        *compared(found),
        "## What was chosen before",
        "Learning rates, ways to mine, and how texts are spent (*questions × negatives* a step): on 1,000 questions "
        "held out of the training questions, which nothing above is measured on; one seed where no deviation is named, "
        "MRR@10 and recall@100.",
        *(chosen(load(folder / regime), title) for regime, title in CHOICES.items() if (folder / regime).is_dir()),
        "## All runs",
        *(
            part
            for encoder, corpora in found.items()
            for corpus, runs in corpora.items()
            for part in (f"### {ENCODERS[encoder]}: {CORPORA[corpus]}", all_rows(runs))
        ),
        *of_test(folder, tested(folder, found)),
    ]
    everything = {
        f"{encoder} {corpus} {name}": group
        for encoder, corpora in found.items()
        for corpus, runs in corpora.items()
        for name, group in runs.items()
    }
    return "\n\n".join([*parts, f"Computed in {machine(everything).removeprefix(', ')}."]) + "\n"


def chosen(runs: Runs, encoder: str) -> str:
    """What held-out questions say of rates and of mining, a row a strategy, a column a rate."""
    rates = sorted({float(group[0]["args"]["learning_rate"]) for group in runs.values()})
    rows = [f"| {encoder} | {' | '.join(f'{rate:g}' for rate in rates)} |", "|---" * (len(rates) + 1) + "|"]
    for name in dict.fromkeys(each.partition("-rate-")[0] for each in runs):
        alike = [group for each, group in runs.items() if each.partition("-rate-")[0] == name]
        tried = {group[0]["args"]["learning_rate"]: group for group in alike}
        cells = [
            " · ".join(mean_sd([METRICS[name](run) for run in tried[rate]]) for name in ("MRR@10", "recall@100"))
            if rate in tried
            else ""
            for rate in rates
        ]
        rows.append(f"| {TITLES.get(name, name)} | {' | '.join(cells)} |")
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
    if folder.resolve() == RESULTS / "evidence":
        found, path = read(folder), ROOT / "README.md"
        text = put_into(
            path.read_text(encoding="utf-8"), "evidence", summary(found, tested(folder, found)), Path(__file__).name
        )
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
