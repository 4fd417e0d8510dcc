"""The study's report: tables and plots from the JSON of its runs.

    python benchmarks/report.py

writes ``benchmarks/results/README.md`` and the plots beside it (PNG and SVG), and puts the tables that the project's
README marks into that; with ``--results``, of another folder and without touching the README.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from strategies import REGIMES, RESULTS, ROOT, STRATEGIES

METRICS = ("mrr@10", "recall@1", "recall@5", "recall@20", "recall@100", "answer_recall@20")
TITLES = {
    "smoke": "Smoke test",
    "nq-high-coverage": "High coverage",
    "nq-medium-coverage": "Medium coverage",
    "nq-low-coverage": "Low coverage",
    "nq-coverage-0.05": "Very low coverage",
    "nq-coverage-15": "Very high coverage",
    "minilm-cpu": "A transformer, all-MiniLM-L6-v2, on a CPU",
    "minilm-2e-5": "all-MiniLM-L6-v2, learning rate 2e-5",
    "minilm-1e-4": "all-MiniLM-L6-v2, learning rate 1e-4",
    "bert-from-scratch": "The same architecture from scratch",
}
COVERAGE = ("nq-coverage-0.05", "nq-low-coverage", "nq-medium-coverage", "nq-high-coverage", "nq-coverage-15")
# What the plots show, with one colour for each everywhere.
SHOWN = (
    *("in-batch", "mined-once", "stale", "stale-write-back", "refresh-50", "refresh-10", "exhaustive"),
    *("corrected-mlp", "corrected-ridge", "mlp-pull-back", "ridge-pull-back", "ridge-pull-back-query-side"),
)
DEFAULT = "mlp-pull-back"
COLOURS = dict(zip(SHOWN, plt.get_cmap("tab20").colors, strict=False))

Runs = dict[str, list[dict]]


def load(folder: Path) -> Runs:
    """The runs of a regime by strategy, in the study's order, each sorted by seed."""
    runs: Runs = defaultdict(list)
    for path in sorted(folder.glob("*-seed*.json")):
        runs[path.name.rpartition("-seed")[0]].append(json.loads(path.read_text()))
    return {name: runs[name] for name in STRATEGIES if name in runs}


def mean_sd(values: list[float], digits: int = 1) -> str:
    """``"47.3 ± 0.2"``: mean and sample standard deviation; the mean alone where there is one value."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def mean(group: list[dict], value: Callable[[dict], float]) -> float:
    return statistics.mean(value(run) for run in group)


def mrr(run: dict) -> float:
    return 100 * run["after"]["mrr@10"]


def coverage(run: dict) -> float:
    """Encodings for the loss, per target of the corpus."""
    return (run["targets_encoded"] - run["targets_encoded_for_cache"]) / run["targets"]


def reencoded(run: dict) -> float:
    """Encodings for the cache alone."""
    return run["targets_encoded_for_cache"]


def seconds(run: dict) -> float:
    """Preparing and training, without what was only measured."""
    parts = run["seconds"]
    return parts.get("prepare", parts.get("cache", 0.0)) + parts["train"] - parts.get("probe", 0.0)


def series(run: dict, name: str) -> tuple[list[int], list[float]]:
    """Steps and values of a logged metric."""
    logged = [entry for entry in run["log"] if name in entry]
    return [entry["step"] for entry in logged], [entry[name] for entry in logged]


def fidelity(group: list[dict]) -> float | None:
    """Mean over the run, of the seed that was probed."""
    values = [value for run in group for value in series(run, "fidelity")[1]]
    return statistics.mean(values) if values else None


def table(runs: Runs) -> str:
    # The untrained encoder depends on the seed alone.
    untrained = list({run["seed"]: run["before"] for group in runs.values() for run in group}.values())
    before = " | ".join(mean_sd([100 * run[metric] for run in untrained]) for metric in METRICS)
    exhaustive = mean(runs["exhaustive"], mrr) if "exhaustive" in runs else None
    lines = [
        f"| strategy | seeds | {' | '.join(METRICS)} | to exhaustive | fidelity | coverage | re-encoded | TFLOPs | s |",
        "|---|---|" + "---|" * (len(METRICS) + 6),
        f"| before training | {len(untrained)} | {before} | | | | | | |",
    ]
    for name, group in runs.items():
        overlap = fidelity(group)
        cells = [
            *(mean_sd([100 * run["after"][metric] for run in group]) for metric in METRICS),
            f"{mean(group, mrr) - exhaustive:+.1f}" if exhaustive is not None and name != "exhaustive" else "",
            f"{overlap:.2f}" if overlap is not None else "",
            f"{mean(group, coverage):.2f}",
            f"{mean(group, reencoded):,.0f}",
            f"{mean(group, lambda run: run['encoder_flops']) / 1e12:.2f}" if "encoder_flops" in group[0] else "",
            f"{statistics.median(map(seconds, group)):.0f}",
        ]
        lines.append(f"| {name} | {len(group)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def short_table(runs: Runs) -> str:
    """The rows and columns that the project's README shows."""
    exhaustive = mean(runs["exhaustive"], mrr)
    lines = [
        "| strategy | seeds | MRR@10 | to exhaustive | R@20 | answer R@20 | re-encoded for the cache |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in (name for name in SHOWN if name in runs):
        group = runs[name]
        quality = [
            mean_sd([100 * run["after"][metric] for run in group]) for metric in ("recall@20", "answer_recall@20")
        ]
        shown = f"**{name}** (default)" if name == DEFAULT else name
        cells = [mean_sd([mrr(run) for run in group]), f"{mean(group, mrr) - exhaustive:+.1f}", *quality]
        lines.append(f"| {shown} | {len(group)} | {' | '.join(cells)} | {mean(group, reencoded):,.0f} |")
    return "\n".join(lines)


def settings(runs: Runs) -> str:
    """What the runs of a regime have in common, from what they recorded."""
    run = next(iter(runs.values()))[0]
    given = run["args"]
    return (
        f"{run['targets']:,} passages, {run['steps']} steps of {given['per_device_train_batch_size']} questions, "
        f"{given['num_negatives']} negatives each unless the row says otherwise, {given['encoder']} encoder, learning "
        f"rate {given['learning_rate']:g}."
    )


# ---------------------------------------------------------------------- plots


def save(figure: plt.Figure, folder: Path, name: str) -> str:
    """Write PNG and SVG; returns Markdown that shows it."""
    for suffix in ("png", "svg"):
        # Without a date, so that the same results give the same file.
        metadata = {"Date": None} if suffix == "svg" else None
        figure.savefig(folder / f"{name}.{suffix}", dpi=110, bbox_inches="tight", metadata=metadata)
    plt.close(figure)
    return f"![{name}]({name}.png)"


def panels(titles: Iterable[str]) -> tuple[plt.Figure, list[plt.Axes]]:
    titles = list(titles)
    figure, axes = plt.subplots(1, len(titles), figsize=(5.2 * len(titles), 4), squeeze=False)
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title)
        axis.grid(alpha=0.3)
    return figure, list(axes[0])


def plot_quality(
    folder: Path, regimes: dict[str, Runs], name: str, label: str, cost: Callable[[dict], float], scale: str
) -> str:
    """MRR@10 against a cost, mean ± sd over seeds; one panel a regime."""
    figure, axes = panels(TITLES[regime] for regime in regimes)
    for axis, runs in zip(axes, regimes.values(), strict=True):
        for strategy in (strategy for strategy in SHOWN if strategy in runs):
            group = runs[strategy]
            values = [mrr(run) for run in group]
            deviation = statistics.stdev(values) if len(values) > 1 else 0.0
            axis.errorbar(
                mean(group, cost), statistics.mean(values), deviation, fmt="o", color=COLOURS[strategy], label=strategy
            )
        axis.set_xscale(scale, **({"linthresh": 1e4} if scale == "symlog" else {}))
        axis.set(xlabel=label, ylabel="MRR@10")
    axes[-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return save(figure, folder, name)


def plot_fidelity(folder: Path, regimes: dict[str, Runs]) -> str:
    figure, axes = panels(TITLES[regime] for regime in regimes)
    for axis, runs in zip(axes, regimes.values(), strict=True):
        probed = {name: group[0] for name, group in runs.items() if series(group[0], "fidelity")[0]}
        # Ways to select share one corrector: here it is the correctors that are compared.
        correctors = {
            name: run for name, run in probed.items() if not (name.startswith("mlp-") and "pull-back" not in name)
        }
        for number, (name, run) in enumerate(correctors.items()):
            if name not in ("uniform", "exhaustive-gumbel", "exhaustive-k4", "exhaustive-k16"):
                axis.plot(*series(run, "fidelity"), label=name, color=plt.get_cmap("tab20").colors[number % 20])
        axis.set(xlabel="step", ylabel="overlap with fresh top k", ylim=(0, 1.02))
        if correctors:
            axis.legend(fontsize=6, loc="lower left")
    return save(figure, folder, "fidelity-over-steps")


def plot_coverage(folder: Path, regimes: dict[str, Runs]) -> str:
    """What each strategy has over exhaustive re-embedding, against how often a target is encoded."""
    figure, (axis,) = panels(["MRR@10 above exhaustive re-embedding"])
    for strategy in ("stale", "stale-write-back", "mlp-pull-back", "ridge-pull-back", "ridge-pull-back-query-side"):
        points = []
        for runs in regimes.values():
            if strategy in runs and "exhaustive" in runs:
                points.append(
                    (mean(runs[strategy], coverage), mean(runs[strategy], mrr) - mean(runs["exhaustive"], mrr))
                )
        if points:
            axis.plot(*zip(*sorted(points), strict=True), "o-", label=strategy, color=COLOURS[strategy])
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set_xscale("log")
    axis.set(xlabel="encodings per target over the run", ylabel="points")
    axis.legend(fontsize=8)
    return save(figure, folder, "coverage")


def plot_drift(folder: Path, regimes: dict[str, Runs]) -> str:
    """Fidelity and quality against how far the encoder has moved from the cache by the end of the run."""
    figure, (left, right) = panels(["Fidelity at the last probe", "MRR@10 above exhaustive re-embedding"])
    names = [name for name in SHOWN if any(name in runs for runs in regimes.values())]
    for strategy in names:
        overlap, quality = [], []
        for runs in regimes.values():
            if strategy in runs and "exhaustive" in runs and series(runs[strategy][0], "fidelity")[1]:
                run = runs[strategy][0]
                drift = series(run, "drift")[1][-1] if strategy != "exhaustive" else None
                if drift is not None:
                    overlap.append((drift, series(run, "fidelity")[1][-1]))
                    quality.append((drift, mrr(run) - mrr(runs["exhaustive"][0])))
        if overlap:
            left.plot(*zip(*sorted(overlap), strict=True), "o-", label=strategy, color=COLOURS[strategy])
            right.plot(*zip(*sorted(quality), strict=True), "o-", color=COLOURS[strategy])
    left.set(xlabel="drift 1 − cos(g', g) at the end", ylabel="overlap with fresh top k", ylim=(0, 1.02))
    right.axhline(0, color="black", linewidth=0.8)
    right.set(xlabel="drift 1 − cos(g', g) at the end", ylabel="points")
    left.legend(fontsize=7)
    return save(figure, folder, "drift")


def drift_table(regimes: dict[str, Runs]) -> str:
    """Drift at the end, fidelity and quality by learning rate."""
    names = [name for name in SHOWN if any(name in runs for runs in regimes.values())]
    lines = [
        f"| learning rate | drift at the end | {' | '.join(names)} |",
        "|---|---|" + "---|" * len(names),
    ]
    for runs in regimes.values():
        reference = next(runs[name][0] for name in names if name in runs and name != "exhaustive")
        cells = []
        for name in names:
            if name not in runs:
                cells.append("")
                continue
            overlap = series(runs[name][0], "fidelity")[1]
            cells.append(f"{mrr(runs[name][0]):.1f}" + (f" ({overlap[-1]:.2f})" if overlap else ""))
        rate = reference["args"]["learning_rate"]
        lines.append(f"| {rate:g} | {series(reference, 'drift')[1][-1]:.2f} | {' | '.join(cells)} |")
    return "\n".join(lines)


# ---------------------------------------------------------------------- report


def put_into(readme: str, name: str, text: str) -> str:
    """``readme`` with ``text`` between the marks for ``name``, if it has them."""
    begin, end = f"<!-- {name}-table: written by benchmarks/report.py -->", f"<!-- end of {name}-table -->"
    before, found, rest = readme.partition(begin)
    return f"{before}{begin}\n\n{text}\n\n{end}{rest.partition(end)[2]}" if found else readme


def report(folder: Path, regimes: dict[str, Runs]) -> str:
    """The whole report as Markdown; writes the plots that it shows into ``folder``."""
    rates = {name: runs for name, runs in regimes.items() if name.startswith("nq-rate-")}
    main = {name: regimes[name] for name in ("nq-high-coverage", "nq-low-coverage", "smoke") if name in regimes}
    by_coverage = {name: regimes[name] for name in COVERAGE if name in regimes}
    findings = folder / "findings.md"
    sections = [
        "# Which negatives, and at what cost",
        "Written by `python benchmarks/report.py` from the JSON beside it, but for the findings, which stand in "
        "`findings.md`.",
        findings.read_text(encoding="utf-8").strip() if findings.exists() else "",
        "## How to read the tables",
        "Percent on the dev questions, mean ± sample standard deviation over seeds (without ±: one seed). *To "
        "exhaustive*: MRR@10 less that of exhaustive re-embedding. *Fidelity*: mean over the run of the overlap of the "
        "top k by the vectors that were searched with the top k by fresh embeddings, for 256 training questions, seed "
        "0. *Coverage*: targets encoded for the loss, per passage of the corpus. *Re-encoded*: targets encoded for the "
        "cache alone. *TFLOPs*: of the encoder on targets. *s*: seconds of preparing and training, the median over "
        "seeds, on a shared machine with other runs beside: compare only roughly.",
    ]
    for name, runs in regimes.items():
        if name not in rates:
            sections += [f"## {TITLES[name]}", settings(runs), table(runs)]
    sections.append("## Plots")
    if main:
        cached = "targets re-encoded for the cache"
        sections += [
            plot_quality(folder, main, "quality-vs-reencoded", cached, reencoded, "symlog"),
            plot_quality(folder, main, "quality-vs-seconds", "seconds of preparing and training", seconds, "log"),
            plot_fidelity(folder, main),
        ]
    if by_coverage:
        sections.append(plot_coverage(folder, by_coverage))
    if rates:
        common = settings(next(iter(rates.values()))).rpartition(", learning")[0]
        sections += [
            "## How stale is too stale?",
            f"{common}; MRR@10 and in brackets fidelity at the last probe, by learning rate, seed 0.",
            drift_table(rates),
            plot_drift(folder, rates),
        ]
    all_runs = [run for runs in regimes.values() for group in runs.values() for run in group]
    versions = sorted({", ".join(f"{name} {value}" for name, value in run["versions"].items()) for run in all_runs})
    sections += [
        "## Versions and commands",
        "\n".join(f"- {text}" for text in versions),
        "`make bench` runs what is missing. Every JSON has its own command; these are all of them:",
        "<details><summary>commands</summary>\n\n"
        + "\n".join(f"    {run['command']}" for run in all_runs)
        + "\n\n</details>",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="a folder with a folder for each regime")
    folder = parser.parse_args().results
    plt.rcParams["svg.hashsalt"] = "st_corrector"
    names = dict.fromkeys([*TITLES, *REGIMES])
    regimes = {name: runs for name in names if (runs := load(folder / name))}
    if not regimes:
        parser.error(f"{folder} holds no runs: benchmarks/strategies.py makes them")
    (folder / "README.md").write_text(report(folder, regimes), encoding="utf-8")
    if folder == RESULTS:
        readme = (ROOT / "README.md").read_text(encoding="utf-8")
        for name, runs in regimes.items():
            readme = put_into(readme, name, short_table(runs)) if "exhaustive" in runs else readme
        (ROOT / "README.md").write_text(readme, encoding="utf-8")
    count = sum(len(group) for runs in regimes.values() for group in runs.values())
    print(f"{count} runs in {folder / 'README.md'}")


if __name__ == "__main__":
    main()
