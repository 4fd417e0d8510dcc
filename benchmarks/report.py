"""The tables of the strategies on Natural Questions, from the JSON of their runs.

    python benchmarks/report.py

writes a README.md into each folder of results, and puts the tables that the project's README marks into that.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
ORDER = (
    *("in-batch", "stale", "stale-write-back", "corrected-ridge", "corrected-mlp", "ridge-pull-back"),
    *("ridge-pull-back-query-side", "mlp-pull-back", "refresh-50", "exhaustive"),
)
METRICS = ("mrr@10", "ndcg@10", "recall@1", "recall@20", "recall@100", "answer_recall@20")


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
        "| strategy | seeds | " + " | ".join(METRICS) + " | coverage | re-encoded | training, s |",
        "|---|---|" + "---|" * (len(METRICS) + 3),
        f"| before training | {len(untrained)} | {before} | | | |",
    ]
    for name in (name for name in ORDER if name in runs):
        group = runs[name]
        cells = [mean_sd([100 * run["after"][metric] for run in group]) for metric in METRICS]
        refreshed = statistics.mean(run["targets_encoded_for_cache"] for run in group)
        encoded = statistics.mean(run["targets_encoded"] for run in group)
        cost = f"{(encoded - refreshed) / group[0]['targets']:.2f} | {refreshed:,.0f}"
        seconds = f"{statistics.median(run['seconds']['cache'] + run['seconds']['train'] for run in group):.0f}"
        lines.append(f"| {name} | {len(group)} | {' | '.join(cells)} | {cost} | {seconds} |")
    return "\n".join(lines)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    readme = (ROOT / "README.md").read_text()
    for folder in sorted(path for path in RESULTS.iterdir() if path.is_dir()):
        runs = load(folder)
        if runs:
            write_report(folder, runs)
            print(f"{folder.name}\n\n{table(runs)}\n")
            readme = put_into(readme, folder.name, table(runs))
    (ROOT / "README.md").write_text(readme)


def put_into(readme: str, name: str, text: str) -> str:
    """``readme`` with ``text`` between the marks for ``name``, if it has them."""
    begin, end = f"<!-- {name}-table: written by benchmarks/report.py -->", f"<!-- end of {name}-table -->"
    before, found, rest = readme.partition(begin)
    return f"{before}{begin}\n\n{text}\n\n{end}{rest.partition(end)[2]}" if found else readme


def write_report(folder: Path, runs: dict[str, list[dict]]) -> None:
    """The folder's README.md: what was run, the table, versions and commands."""
    commands = "\n".join(f"    {run['command']}" for group in runs.values() for run in group)
    first = next(iter(runs.values()))[0]
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    batch, negatives = first["args"]["per_device_train_batch_size"], first["args"]["num_negatives"]
    sections = [
        "# Strategies on Natural Questions",
        f"{first['targets']:,} passages, {first['steps']} steps of {batch} questions, {negatives} negatives each, "
        "static encoder; percent on the dev questions, mean ± sample sd over seeds. Coverage: targets encoded for the "
        "loss, per passage of the corpus; re-encoded: targets encoded only to refresh the cache. Seconds are medians "
        "on a shared machine: compare them only roughly.",
        table(runs),
        f"Versions: {versions}.",
        "Commands (`make bench` runs those that are missing):",
        commands,
    ]
    (folder / "README.md").write_text("\n\n".join(sections) + "\n")


if __name__ == "__main__":
    main()
