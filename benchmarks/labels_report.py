"""The page of what own pairs and a teacher give, from the JSON of `strategies.py --preset labels`.

python benchmarks/labels_report.py
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

from report import load, machine, mean_sd, mrr
from strategies import LABELLED, RESULTS

COLUMNS = {"": "as it is", "-own-pairs": "own pairs", "-teacher": "teacher", "-own-pairs-teacher": "both"}
TITLES = {
    "in-batch": "in-batch negatives",
    "mined-once": "mined once (with a teacher: `DistillKLDivLoss` on the mined tuples)",
    "stale": "stale cache",
    "stale-write-back": "stale cache, written back",
    "mlp-pull-back": "**corrected, the default**",
    "exhaustive": "exhaustive re-embedding",
}
REGIMES = {
    "labels-high-coverage": "High coverage: 30,000 passages, 300 steps of 64 questions, 8 negatives each",
    "labels-low-coverage": "Low coverage: 99,471 passages, 60 steps of 32 questions, 8 negatives each",
}


def table(runs: dict[str, list[dict]]) -> str:
    """MRR@10, a row for each way to choose negatives and a column for what is added."""
    rows = [f"| | {' | '.join(COLUMNS.values())} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name in LABELLED:
        cells = []
        for suffix in COLUMNS:
            group = runs.get(f"{name}{suffix}", [])
            cells.append(f"{mean_sd([mrr(run) for run in group])} ({len(group)})" if group else "")
        if any(cells):
            rows.append(f"| {TITLES[name]} | {' | '.join(cells)} |")
    return "\n".join(rows)


def choices(runs: dict[str, list[dict]]) -> str:
    """MRR@10 on the held-out training questions, best first."""
    rows = ["| setting | MRR@10 | seeds |", "|---|---|---|"]
    ordered = sorted(runs.items(), key=lambda item: -sum(map(mrr, item[1])) / len(item[1]))
    for name, group in ordered:
        setting = name.removeprefix("mlp-pull-back").lstrip("-") or "the default, nothing added"
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
        "36 % of every batch; all runs of a table take the same number of steps. Not all cells have been run yet: "
        "`make bench PRESET=labels` goes on where it was stopped.",
    ]
    for regime, title in REGIMES.items():
        if runs := regimes.get(regime):
            parts += [f"## {title}", table(runs), trusted(runs)]
    if runs := regimes.get("labels-choice"):
        parts += [
            "## How the settings were chosen",
            "On 1,000 of the training questions, held out (`--hold_out 1000`), at high coverage; nothing above is "
            "measured on them. `teacher` is the default, whose weight and scale are found out as the run goes; the "
            "others of a teacher have theirs set.",
            choices(runs),
            trusted(runs),
        ]
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
