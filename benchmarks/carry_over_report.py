"""The page on carrying indices over: tables and the plot, from the JSON of ``benchmarks/carry_over.py``.

    python benchmarks/carry_over_report.py

writes ``benchmarks/results/carry-over/README.md`` and the plot beside it.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).resolve().parent / "results" / "carry-over"
PAIRS = {
    "static": "A static encoder, before and after training with corrected negatives",
    "transformer": "The first two layers of all-MiniLM-L6-v2, before and after training",
    "unrelated": "Two models that share token vectors alone: the untrained static encoder, then the trained two layers",
}
FIXED = ("re-embedded", "trained", "trained-overlay", "unchanged", "before")
HEAD = ("index", "encoded again", "nDCG@10", "recall@100", "kept@10", "kept@100", "cosine")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    results = parser.parse_args().results
    found: dict[str, list[dict]] = defaultdict(list)
    for path in sorted(results.glob("*-seed*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        found[result["pair"]].append(result)
    if not found:
        raise SystemExit(f"{results} has no results: run benchmarks/carry_over.py first.")
    text = (results / "notes.md").read_text(encoding="utf-8") if (results / "notes.md").exists() else ""
    sections = [section(pair, found[pair]) for pair in PAIRS if pair in found]
    plot(results, found)
    (results / "headline.md").write_text(headline(found["static"]) + "\n", encoding="utf-8")
    (results / "README.md").write_text("\n\n".join([text.strip(), *sections]).strip() + "\n", encoding="utf-8")
    print(results / "README.md")


def section(pair: str, runs: list[dict]) -> str:
    by_row: dict[tuple, list[dict]] = defaultdict(list)
    for run in runs:
        for row in run["rows"]:
            by_row[row["name"], row.get("sample")].append(row)
    order = [(name, None) for name in FIXED if (name, None) in by_row]
    fitted = sorted({key for key in by_row if key[1]}, key=lambda key: (key[1], key[0]))
    rows = [cells(name, sample, by_row[name, sample], runs[0]) for name, sample in [*order, *fitted]]
    first = runs[0]
    seeds = f"{len(runs)} seeds of training, mean ± sample standard deviation" if len(runs) > 1 else "one seed"
    about = f"{first['targets']:,} targets, {first['queries']:,} queries of dev; {seeds}."
    lines = ["| " + " | ".join(row) + " |" for row in (list(HEAD), *rows)]
    table = "\n".join([lines[0], "|:--|" + "--:|" * (len(HEAD) - 1), *lines[1:]])
    versions = ", ".join(f"{name} {value}" for name, value in first["versions"].items())
    seconds = (
        f"Encoding the corpus took {run_seconds(first, 're-embedded'):.0f} s, fitting ridge on the largest sample "
        f"{largest(first)['seconds_of_fitting']:.1f} s, mapping the index with it {largest(first)['seconds']:.1f} s "
        "(on a machine shared with others)."
    )
    return f"## {PAIRS[pair]}\n\n{about}\n\n{table}\n\n{seconds} {versions}. `{first['command']}`"


def headline(runs: list[dict]) -> str:
    """What a reader of the guide wants to see, of the static encoder over the whole corpus."""
    wanted = [("re-embedded", None), ("mlp", 4000), ("ridge", 4000), ("ridge", 1000), ("trained", None)]
    wanted += [("unchanged", None), ("before", None)]
    names = {
        "re-embedded": "re-embedded by the new model",
        "trained": "carried over by the corrector of the training run",
        "unchanged": "the old index as it is",
        "before": "(the old model over it)",
    }
    rows = []
    for name, sample in wanted:
        found = [row for run in runs for row in run["rows"] if (row["name"], row.get("sample")) == (name, sample)]
        label = names.get(name) or f"carried over by {name}, fitted on {sample:,} targets"
        again, ndcg, recall, _, kept = cells(name, sample, found, runs[0])[1:6]
        rows.append([label, again, ndcg, recall, kept])
    head = ["what the new model searches", "targets encoded again", "nDCG@10", "recall@100", "kept of the first 100"]
    lines = ["| " + " | ".join(row) + " |" for row in (head, *rows)]
    about = (
        f"A static encoder on {runs[0]['targets']:,} passages of Natural Questions, before and after training; "
        f"percent, mean ± sample standard deviation over {len(runs)} seeds of training."
    )
    return "\n".join([about, "", lines[0], "|:--|" + "--:|" * 4, *lines[1:]])


def cells(name: str, sample: int | None, rows: list[dict], run: dict) -> list[str]:
    sample = min(sample, run["targets"]) if sample else None
    label = f"{name}, fitted on {sample:,}" if sample else name
    again = {"re-embedded": f"{run['targets']:,}"}.get(name, f"{sample:,}" if sample else "0")
    return [
        f"**{label}**" if name in ("trained", "re-embedded", "unchanged") else label,
        again,
        mean(100 * row["metrics"]["ndcg@10"] for row in rows),
        mean(100 * row["metrics"]["recall@100"] for row in rows),
        mean(100 * row["kept@10"] for row in rows),
        mean(100 * row["kept@100"] for row in rows),
        f"{statistics.fmean(row['cosine'] for row in rows):.3f}",
    ]


def mean(values: Iterable[float]) -> str:
    values = list(values)
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{spread}"


def run_seconds(run: dict, name: str) -> float:
    return next(row["seconds"] for row in run["rows"] if row["name"] == name)


def largest(run: dict) -> dict:
    fitted = [row for row in run["rows"] if row["name"] == "ridge"]
    return max(fitted, key=lambda row: row["sample"])


def plot(results: Path, found: dict[str, list[dict]]) -> None:
    plt.rcParams.update({"font.size": 9, "svg.hashsalt": "st_corrector", "axes.spines.top": False})
    figure, axes = plt.subplots(1, len(found), figsize=(max(6.5, 4.2 * len(found)), 4.2), squeeze=False)
    for axis, pair in zip(axes[0], [pair for pair in PAIRS if pair in found], strict=True):
        lines: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
        fixed: dict[str, list[float]] = defaultdict(list)
        for run in found[pair]:
            for row in run["rows"]:
                value = 100 * row["metrics"]["ndcg@10"]
                if row.get("sample"):
                    lines[row["name"]][row["sample"]].append(value)
                else:
                    fixed[row["name"]].append(value)
        for (name, values), style in zip(fixed.items(), ("-", ":", "--", "-.", (0, (1, 3))), strict=False):
            axis.axhline(statistics.fmean(values), color="0.45", linestyle=style, linewidth=1.1, label=name)
        for name, points in sorted(lines.items()):
            sizes = sorted(points)
            means = [statistics.fmean(points[size]) for size in sizes]
            axis.plot(sizes, means, marker="o", markersize=3.5, linewidth=1.3, label=f"{name}, fitted")
        axis.set_xscale("log")
        axis.set_xlabel("targets encoded again")
        axis.set_ylabel("nDCG@10, percent")
        axis.set_title(f"{pair}: {found[pair][0]['targets']:,} targets", fontsize=9)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=4, frameon=False, fontsize=8)
    figure.tight_layout(rect=(0, 0.17, 1, 1))
    for ending in ("svg", "png"):
        metadata = {"Date": None} if ending == "svg" else None
        figure.savefig(results / f"carry-over.{ending}", dpi=140, metadata=metadata)
    plt.close(figure)


if __name__ == "__main__":
    main()
