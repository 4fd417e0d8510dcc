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
    DEFAULT,
    ENCODERS,
    FEWER,
    HEARD,
    LONGER,
    METRICS,
    REGIMES,
    RIVALS,
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
from report import Runs, coverage, load, machine, mean, mean_sd, mrr
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
    ways = {"": PLAIN, FEWER: HALF, "-teacher": f"{PLAIN}, a teacher", f"{FEWER}-teacher": f"{HALF}, a teacher"}
    return [
        "## Does the corrector beat plain write-back?",
        "What corrected negatives have over embeddings that are written back without a corrector:",
        *by_encoder(
            found,
            lambda corpora: table(
                corpora,
                "",
                [
                    (f"{metric}: {how}", less(f"{DEFAULT}{suffix}", f"{WRITTEN}{suffix}", metric)[1])
                    for metric in METRICS
                    for suffix, how in ways.items()
                ],
            ),
        ),
        "## Are corrected negatives below what one would pick instead?",
        "What corrected negatives have over each:",
        *by_encoder(found, lambda corpora: against(corpora, DEFAULT, [WRITTEN, *RIVALS])),
        f"As many texts a step, spent on {HALF} negatives each instead of 32 with 4:",
        *by_encoder(
            found,
            lambda corpora: against(
                corpora, f"{DEFAULT}{FEWER}", [DEFAULT, f"{WRITTEN}{FEWER}", f"mined-margin{FEWER}", *RIVALS]
            ),
        ),
        "What embeddings that are written back without a corrector have over each:",
        *by_encoder(
            found, lambda corpora: against(corpora, f"{WRITTEN}{FEWER}", [WRITTEN, f"mined-margin{FEWER}", *RIVALS])
        ),
        "## In as much time",
        "What corrected negatives have over these, which make as many steps as there is time for while the default "
        "makes its cache and its own steps (measured on code search):",
        *by_encoder(found, lambda corpora: against(corpora, DEFAULT, LONGER)),
        *by_encoder(found, lambda corpora: against(corpora, f"{DEFAULT}{FEWER}", LONGER)),
        "## What do own pairs and a teacher add?",
        *by_encoder(found, lambda corpora: added(corpora, DEFAULT)),
        *by_encoder(found, lambda corpora: added(corpora, f"{DEFAULT}{FEWER}")),
        *alike(found),
        "## Where it fails",
        *failures(found),
    ]


def added(found: Corpora, ours: str) -> str:
    """What own pairs, a teacher and both add to corrected negatives."""
    return "\n\n".join(
        table(
            found,
            "",
            [
                of(ours, metric),
                *((name, less(f"{ours}{suffix}", ours, metric)[1]) for suffix, name in ADDED.items() if suffix),
            ],
        )
        for metric in METRICS
        if any(f"{ours}{suffix}" in runs for runs in found.values() for suffix in ADDED if suffix)
    )


def alike(found: dict[str, Corpora]) -> list[str]:
    """What corrected negatives have over others that hear the same besides: own pairs, a teacher, both."""
    parts = []
    for suffix, name in ADDED.items():
        for spent in ("", FEWER) if suffix else ():
            rivals = [f"{WRITTEN}{spent}{suffix}", *HEARD[suffix]]
            ours = f"{DEFAULT}{spent}{suffix}"
            made = by_encoder(found, lambda corpora, ours=ours, rivals=rivals: against(corpora, ours, rivals))
            if made:
                parts += [f"What {TITLES[ours]} has over others with the same {name.removeprefix('+ ')}:", *made]
    return parts


def failures(found: dict[str, Corpora]) -> list[str]:
    """Every comparison of three seeds or more in which corrected negatives are below something that hears the same, or
    may be.
    """
    below, perhaps, count = [], 0, 0
    compared = [
        (f"{DEFAULT}{spent}{suffix}", other, encoder, corpus, name)
        for encoder, corpora in found.items()
        for corpus in corpora
        for spent in ("", FEWER)
        for suffix, rivals in HEARD.items()
        for other in (f"{WRITTEN}{spent}{suffix}", *rivals)
        for name in METRICS
    ]
    for ours, other, encoder, corpus, name in compared:
        runs = found[encoder][corpus]
        apart_by = difference(ours, other, runs, METRICS[name])
        if apart_by is None or apart_by.seeds < SEEDS:
            continue
        count += 1
        low, high = interval([apart_by]) or (-math.inf, math.inf)
        perhaps += low < -LITTLE and high >= 0
        if high < 0:
            said = f"{TITLES[ours].strip('*')} {apart(ours, other, [runs], METRICS[name])} against {TITLES[other]}"
            below.append(f"- {ENCODERS[encoder]}, {CORPORA[corpus]}, {name}: {said}.")
    return [
        f"Of {count} comparisons on one corpus with {SEEDS} seeds or more, these have a 95 % interval below 0 (one in "
        f"forty would by chance); {perhaps} more may be more than {LITTLE} points below, as far as so few seeds tell.",
        "\n".join(below) or "Nowhere in these runs.",
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


def of_test(folder: Path, found: dict[str, Corpora]) -> list[str]:
    """What test questions say, where they have been opened."""
    path = folder / "sealed" / OPENED
    if not path.exists():
        return []
    told = json.loads(path.read_text(encoding="utf-8"))
    tested: dict[str, Corpora] = {}
    for encoder, corpora in found.items():
        for corpus, runs in corpora.items():
            for strategy, group in runs.items():
                for run in group:
                    name = f"{REGIMES[encoder][corpus]}/{strategy}-seed{run['seed']}.json"
                    if name in told["runs"]:
                        figures = json.loads((path.parent / name).read_text(encoding="utf-8"))
                        ranks = {"ranks": {"after": figures["ranks"]}} if "ranks" in figures else {}
                        others = {key: value for key, value in run.items() if key != "ranks"}
                        kept = tested.setdefault(encoder, {}).setdefault(corpus, {})
                        kept.setdefault(strategy, []).append({**others, "after": figures["test"], **ranks})
    return [
        "# Test questions",
        f"Opened on {told['opened']}, when the defaults had been decided: the tables above once more, which are of dev "
        "questions. Natural Questions has no third part.",
        *compared(tested),
    ]


def page(folder: Path) -> str:
    found = read(folder)
    findings = folder / "findings.md"
    made = [run.results(folder).exists() for run in runs_of("evidence")]
    parts = [
        "# Evidence: three corpora, two encoders, and what one would pick instead",
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
        *of_test(folder, found),
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


if __name__ == "__main__":
    main()
