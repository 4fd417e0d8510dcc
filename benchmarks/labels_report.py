"""The page of what own pairs and a teacher give, from the JSON of `strategies.py --preset labels`, `pool.py` and
`untrusted_teachers.py`.

    python benchmarks/labels_report.py
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from presets import LABELLED
from report import legend, load, machine, mean, mean_sd, mrr, panels, save
from strategies import RESULTS
from untrusted_teachers import TEACHERS

COLUMNS = {"": "as it is", "-own-pairs": "own pairs", "-teacher": "teacher", "-own-pairs-teacher": "both"}
TITLES = {
    "in-batch": "in-batch negatives",
    "mined-once": "mined once (with a teacher: `DistillKLDivLoss` on the mined tuples)",
    "stale": "stale cache",
    "stale-write-back": "stale cache, written back",
    "mlp-pull-back": "**corrected**",
    "exhaustive": "exhaustive re-embedding",
}
REGIMES = {
    "labels-high-coverage": "High coverage: 30,000 passages, 300 steps of 64 questions, 8 negatives each",
    "labels-low-coverage": "Low coverage: 99,471 passages, 60 steps of 32 questions, 8 negatives each",
}
EPOCHS = "labels-epochs-"
CURVE = {
    "in-batch": "in-batch",
    "stale-write-back": "stale, written back",
    "exhaustive": "exhaustive",
    "stale-write-back-own-pairs": "written back, own pairs",
    "mlp-pull-back": "**corrected**",
    "mlp-pull-back-own-pairs": "corrected, own pairs",
    "mlp-pull-back-teacher": "corrected, teacher",
    "mlp-pull-back-own-pairs-teacher": "corrected, both",
}


class Pooled(NamedTuple):
    """Where a pool was tried: how it is called, and the regime of the runs without a rule."""

    title: str
    regime: str


POOLED = {
    "high": Pooled("high coverage", "labels-high-coverage"),
    "high-own-pairs": Pooled("high, own pairs", "labels-high-coverage"),
    "low": Pooled("low coverage", "labels-low-coverage"),
    "low-own-pairs": Pooled("low, own pairs", "labels-low-coverage"),
    "ten-epochs": Pooled("ten epochs", "labels-epochs-10"),
    "ten-epochs-own-pairs": Pooled("ten epochs, own pairs", "labels-epochs-10"),
}
CORPORA = {"nq": "Natural Questions", "code": "Code search", "packages": "Package search"}
POOLS = (
    "The rules of `benchmarks/pool.py`, which are not in the package. After each mean ± sd (seeds) stands the mean "
    "difference from corrected negatives without a rule, seed by seed, and the least."
)
UNTRUSTED = (
    "Corrected negatives with teachers whose weight and scale are found out as the run goes "
    "(`benchmarks/untrusted_teachers.py`): "
    "all-MiniLM-L6-v2; random vectors; the encoder before it was trained; the same encoder trained on another corpus; "
    "and trained for ten epochs on the very questions that teachers are judged by."
)


def table(runs: dict[str, list[dict]]) -> str:
    """MRR@10, a row for each way to choose negatives and a column for what is added."""
    rows = [f"| | {' | '.join(COLUMNS.values())} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name in LABELLED:
        cells = []
        for suffix in COLUMNS:
            group = runs.get(f"{name}{suffix}", [])
            cells.append(cell(group))
        if any(cells):
            rows.append(f"| {TITLES[name]} | {' | '.join(cells)} |")
    return "\n".join(rows)


def by_name(folder: Path) -> dict[str, list[dict]]:
    """The runs of ``<name>-seed<n>.json``, in the order of their seeds, by name."""
    found = defaultdict(list)
    for path in sorted(folder.glob("*-seed*.json")):
        found[path.stem.rpartition("-seed")[0]].append(json.loads(path.read_text(encoding="utf-8")))
    return {name: sorted(runs, key=lambda run: run["seed"]) for name, runs in found.items()}


def cell(group: list[dict]) -> str:
    return f"{mean_sd([mrr(run) for run in group])} ({len(group)})" if group else ""


def difference(group: list[dict], reference: list[dict]) -> str:
    """The mean difference of runs with the same seeds, and the least."""
    of_seed = {run["seed"]: mrr(run) for run in reference}
    apart = [mrr(run) - of_seed[run["seed"]] for run in group if run["seed"] in of_seed]
    return f"{sum(apart) / len(apart):+.1f} (least {min(apart):+.1f})" if apart else ""


def epochs(regimes: dict[str, dict[str, list[dict]]], folder: Path) -> str:
    """MRR@10 by how often the split's questions are gone through: a table and a curve."""
    found = {float(name.removeprefix(EPOCHS)): runs for name, runs in regimes.items() if name.startswith(EPOCHS)}
    if not found:
        return ""
    rows = [f"| epochs | {' | '.join(CURVE.values())} |", "|---" * (len(CURVE) + 1) + "|"]
    for count, runs in sorted(found.items()):
        rows.append(f"| {count:g} | {' | '.join(cell(runs.get(name, [])) for name in CURVE)} |")
    figure, axes = panels(["Natural Questions, 30,000 passages, static encoder"])
    for name, title in CURVE.items():
        points = {count: mean(runs[name], mrr) for count, runs in sorted(found.items()) if name in runs}
        axes[0].plot(points.keys(), points.values(), "o-", markersize=4, label=title.strip("*"))
    axes[0].set(xlabel="epochs", ylabel="MRR@10", xscale="log")
    legend(axes)
    return "\n".join(rows) + f"\n\n{save(figure, folder, 'epochs')}"


def pools(folder: Path, regimes: dict[str, dict[str, list[dict]]]) -> str:
    """MRR@10 by the rule that changes the pool, at both coverages, without and with own pairs."""
    runs = {each: by_name(folder / each) for each in POOLED}
    if not any(runs.values()):
        return ""
    for each, rules in runs.items():
        regime = POOLED[each].regime
        rules["none"] = regimes.get(regime, {}).get("mlp-pull-back-own-pairs" if "own" in each else "mlp-pull-back", [])
    runs = {each: rules for each, rules in runs.items() if len(rules) > 1}
    rows = [f"| pool | {' | '.join(POOLED[each].title for each in runs)} |", "|---" * (len(runs) + 1) + "|"]
    for rule in ("none", "positives-0.5", "positives-1.0", "limit-4", "weight-1"):
        cells = []
        for rules in runs.values():
            apart = difference(rules.get(rule, []), rules["none"]) if rule != "none" else ""
            cells.append(f"{cell(rules.get(rule, []))} {apart}".strip())
        rows.append(f"| {rule if rule != 'none' else 'as it is'} | {' | '.join(cells)} |")
    return "\n".join(rows)


def untrusted(folder: Path) -> str:
    """MRR@10 with each teacher beside none, on each corpus, and how far it was trusted in the end."""
    parts = []
    for corpus in sorted(folder.iterdir()) if folder.is_dir() else []:
        runs = by_name(corpus)
        rows = [
            "| teacher | MRR@10 | against none, seed by seed | its MRR@10 | the encoder's, last | α |",
            "|---|---|---|---|---|---|",
        ]
        for name in ("none", *(each for each in TEACHERS if each != "none")):
            group = runs.get(name.replace(" ", "-"), [])
            if not group:
                continue
            last = [run["trust"][-1] for run in group if run["trust"]]
            told = []
            for key, digits in (("teacher_mrr", 3), ("encoder_mrr", 3), ("weight", 2)):
                ends = [f"{end(each[key] for each in last):.{digits}f}" for end in (min, max)] if last else []
                told.append(" … ".join(dict.fromkeys(ends)))
            apart = difference(group, runs.get("none", [])) if name != "none" else ""
            rows.append(f"| {name} | {cell(group)} | {apart} | {' | '.join(told)} |")
        parts += [f"### {CORPORA.get(corpus.name, corpus.name)}", "\n".join(rows)]
    return "\n\n".join(parts)


def choices(runs: dict[str, list[dict]]) -> str:
    """MRR@10 on the held-out training questions, best first."""
    rows = ["| setting | MRR@10 | seeds |", "|---|---|---|"]
    ordered = sorted(runs.items(), key=lambda item: -sum(map(mrr, item[1])) / len(item[1]))
    for name, group in ordered:
        setting = name.removeprefix("mlp-pull-back").lstrip("-") or "nothing added"
        rows.append(f"| {setting} | {mean_sd([mrr(run) for run in group])} | {len(group)} |")
    return "\n".join(rows)


def trusted(runs: dict[str, list[dict]]) -> str:
    """How far teachers were trusted in the end."""
    rows = ["| run | teacher's MRR@10 | encoder's, first → last | τ | α |", "|---|---|---|---|---|"]
    for name, group in runs.items():
        for run in group[:1]:
            if run.get("trust"):
                first, last = run["trust"][0], run["trust"][-1]
                rows.append(
                    f"| {name}, seed {run['seed']} | {last['teacher_mrr']:.3f} | {first['encoder_mrr']:.3f} → "
                    f"{last['encoder_mrr']:.3f} | {last['scale']:.1f} | {last['weight']:.2f} |"
                )
    return "\n".join(rows) if len(rows) > 2 else ""


def cost(found: dict) -> str:
    """A step with a teacher beside one without, and building it beside encoding as many texts."""
    return (
        f"A step of all-MiniLM-L6-v2 ({found['batch']}) among {found['targets']:,} targets takes "
        f"{found['seconds_without']:.2f} s without a teacher and {found['seconds_with']:.2f} s with one "
        f"({found['teacher']}): {found['ratio_per_text']:.3f} times as long for each text that is encoded, in the "
        f"median of {len(found['ratios'])} turns. Building it takes {found['build']['ratio']:.2f} times as long as "
        f"`encode_document` of as many texts. `{found['command']}`"
    )


def page(folder: Path) -> str:
    regimes: dict[str, dict[str, list[dict]]] = defaultdict(dict)
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            regimes[path.name] = load(path)
    parts = [
        "# What a target hears: own pairs and a teacher",
        "Made by `benchmarks/labels_report.py` from the JSON beside it; every JSON has its command. MRR@10 on the dev "
        "questions of Natural Questions, mean ± sd (number of seeds), static encoder. The teacher is all-MiniLM-L6-v2 "
        "with 96 tokens, which was trained on these training questions by its makers. Own pairs are title → passage, "
        "36 % of every batch; by default they are added in runs of more than one epoch, here in the columns that say "
        "so. All runs of a table take the same number of steps. Not all cells have been run yet: `make bench "
        "PRESET=labels` goes on where it was stopped.",
        "These runs were made when a teacher's weight grew with the square of its lead, to 4 at twenty points; now it "
        "grows with the lead, to 4 at ten, less one standard error. Of the teachers that know nothing this makes a "
        "difference to that of another domain on code search alone, which was measured again; the others have weight 0 "
        "or 4 either way.",
    ]
    for regime, title in REGIMES.items():
        if runs := regimes.get(regime):
            parts += [f"## {title}", table(runs), trusted(runs)]
    if runs := regimes.get("labels-choice"):
        parts += [
            "## How the settings were chosen",
            "On 1,000 of the training questions, held out (`--hold_out 1000`), at high coverage; nothing above is "
            "measured on them. `teacher` is one whose weight and scale are found out as the run goes, as by default; "
            "the others of a teacher have theirs set.",
            choices(runs),
            trusted(runs),
        ]
    if curve := epochs(regimes, folder):
        parts += [
            "## One epoch, ten epochs",
            "30,000 passages, 8 negatives for each of 64 questions a step; 112 steps go once through the training "
            "questions. The learning rate falls to 0 within each run, so that each is a run of its own.",
            curve,
        ]
    if found := pools(folder / "pool", regimes):
        parts += ["## Other pools", POOLS, found]
    if found := untrusted(folder / "untrusted"):
        parts += ["## Teachers that know nothing", UNTRUSTED, found]
    if (path := folder / "cost.json").exists():
        parts += ["## What a teacher costs", cost(json.loads(path.read_text(encoding="utf-8")))]
    everything = {f"{regime} {name}": group for regime, runs in regimes.items() for name, group in runs.items()}
    parts += [f"Computed in {machine(everything).removeprefix(', ')}."]
    return "\n\n".join(filter(None, parts)) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS / "labels")
    folder = parser.parse_args().results
    (folder / "README.md").write_text(page(folder), encoding="utf-8")


if __name__ == "__main__":
    main()
