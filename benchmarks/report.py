"""The table of the NQ strategies, from the JSON of their runs.

    python benchmarks/report.py

writes ``benchmarks/results/nq/README.md`` and puts the same table into the project's README.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ORDER = ("in-batch", "stale", "corrected-ridge", "corrected-mlp", "refresh-50", "exhaustive")
METRICS = ("mrr@10", "ndcg@10", "recall@1", "recall@20", "recall@100", "answer_recall@20")
BEGIN, END = "<!-- nq-table: written by benchmarks/report.py -->", "<!-- end of nq-table -->"


def load(folder: Path) -> dict[str, list[dict]]:
    """The runs by strategy, each sorted by seed."""
    runs: dict[str, list[dict]] = defaultdict(list)
    for path in sorted(folder.glob("*-seed*.json")):
        runs[path.name.rpartition("-seed")[0]].append(json.loads(path.read_text()))
    return runs


def mean_sd(values: list[float], digits: int = 1) -> str:
    """``"47.3 ± 0.2"``: mean and sample standard deviation; the mean alone where there is one value."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def table(runs: dict[str, list[dict]]) -> str:
    # The untrained encoder depends on the seed alone.
    untrained = list({run["seed"]: run["before"] for group in runs.values() for run in group}.values())
    before = " | ".join(mean_sd([100 * run[metric] for run in untrained]) for metric in METRICS)
    lines = [
        "| strategy | seeds | " + " | ".join(METRICS) + " | re-encoded for the cache | training, s |",
        "|---|---|" + "---|" * (len(METRICS) + 2),
        f"| before training | {len(untrained)} | {before} | | |",
    ]
    for name in (name for name in ORDER if name in runs):
        group = runs[name]
        cells = [mean_sd([100 * run["after"][metric] for run in group]) for metric in METRICS]
        cost = f"{statistics.mean(run['targets_encoded_for_cache'] for run in group):,.0f}"
        seconds = f"{statistics.median(run['seconds']['cache'] + run['seconds']['train'] for run in group):.0f}"
        lines.append(f"| {name} | {len(group)} | {' | '.join(cells)} | {cost} | {seconds} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "nq")
    args = parser.parse_args()
    runs = load(args.results)
    if not runs:
        parser.error(f"{args.results} has no <strategy>-seed<n>.json: run benchmarks/strategies.py first")
    text = table(runs)
    commands = "\n".join(f"    {run['command']}" for group in runs.values() for run in group)
    first = next(iter(runs.values()))[0]
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    sections = [
        "# Strategies on Natural Questions",
        f"{first['targets']:,} passages, {first['steps']} steps, static encoder; percent on the dev questions, mean ± "
        "sample sd over seeds. Seconds are medians on a shared machine: compare them only roughly.",
        text,
        f"Versions: {versions}.",
        "Commands (`make bench` runs them all):",
        commands,
    ]
    (args.results / "README.md").write_text("\n\n".join(sections) + "\n")
    readme = ROOT / "README.md"
    start, _, rest = readme.read_text().partition(BEGIN)
    readme.write_text(f"{start}{BEGIN}\n\n{text}\n\n{END}{rest.partition(END)[2]}")
    print(text)


if __name__ == "__main__":
    main()
