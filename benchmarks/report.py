"""The study's report: tables and plots from the JSON of its runs.

    python benchmarks/report.py                                      # of benchmarks/results
    python benchmarks/report.py --results benchmarks/results/gpu/study

writes ``benchmarks/results/README.md`` and the plots beside it (PNG and SVG), and puts the tables that the project's
README and its page of results mark into these; with ``--results``, of another folder and without touching the README.
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

from st_corrector.training.plan import LOW_COVERAGE

RATES = ("1e-4", "2e-5")  # of all-MiniLM-L6-v2 as a whole
METRICS = ("mrr@10", "recall@1", "recall@5", "recall@20", "recall@100", "answer_recall@20")
TITLES = {
    "smoke": "Smoke test",
    "nq-high-coverage": "High coverage",
    "nq-medium-coverage": "Medium coverage",
    "nq-low-coverage": "Low coverage",
    "nq-coverage-0.05": "Very low coverage",
    "nq-coverage-15": "Very high coverage",
    "minilm-2-layers": "A transformer: the first two layers of all-MiniLM-L6-v2",
    "minilm-2-layers-all-passages": "The same transformer on all passages, at low coverage",
    "minilm-2-layers-lora": "The first two layers with LoRA: adapters of rank 8 are all that is trained",
    "minilm-cpu": "A transformer that knows it already: all-MiniLM-L6-v2",
    "minilm-2-layers-low-coverage": "Low coverage: the first two layers of all-MiniLM-L6-v2",
    "minilm-2-layers-high-coverage": "High coverage: the first two layers of all-MiniLM-L6-v2",
    "bert-from-scratch-low-coverage": "Low coverage: all-MiniLM-L6-v2's architecture from scratch",
    "bert-from-scratch": "High coverage: all-MiniLM-L6-v2's architecture from scratch",
    **{f"minilm-{rate}-low-coverage": f"Low coverage: all-MiniLM-L6-v2, learning rate {rate}" for rate in RATES},
    **{f"minilm-{rate}": f"High coverage: all-MiniLM-L6-v2, learning rate {rate}" for rate in RATES},
}
# Those that the plots show side by side.
MAIN = (
    *("nq-high-coverage", "nq-low-coverage", "smoke"),
    *("minilm-2-layers-low-coverage", "minilm-2-layers-high-coverage"),
    *("bert-from-scratch-low-coverage", "minilm-1e-4-low-coverage"),
)
COVERAGE = ("nq-coverage-0.05", "nq-low-coverage", "nq-medium-coverage", "nq-high-coverage", "nq-coverage-15")
# What the plots show, with one colour for each everywhere.
SHOWN = (
    *("in-batch", "mined-once", "stale", "stale-write-back", "refresh-50", "refresh-10", "exhaustive"),
    *("corrected-mlp", "corrected-ridge", "mlp-pull-back", "ridge-pull-back", "ridge-pull-back-query-side"),
)
CORRECTED, WRITTEN = "mlp-pull-back", "stale-write-back"
# Whose difference decides something: what correcting and writing back gains, over what else; what correcting alone
# gains over writing back alone; what verifying adds.
COMPARED = (
    *((CORRECTED, other) for other in ("in-batch", "mined-once", "stale", WRITTEN, "exhaustive")),
    ("corrected-mlp", WRITTEN),
    *((f"mlp-verify-{candidates}", CORRECTED) for candidates in (8, 32)),
)
COLOURS = dict(zip(SHOWN, plt.get_cmap("tab20").colors, strict=False))

Runs = dict[str, list[dict]]


def load(folder: Path) -> Runs:
    """The runs of a regime by strategy, in the study's order, each sorted by seed; then those of strategies that have
    been removed from the package since, for a negative result stays a result.
    """
    runs: Runs = defaultdict(list)
    for path in sorted(folder.glob("*-seed*.json")):
        runs[path.name.rpartition("-seed")[0]].append(json.loads(path.read_text()))
    return {name: runs[name] for name in (*STRATEGIES, *sorted(runs.keys() - STRATEGIES)) if name in runs}


def mean_sd(values: list[float], sign: str = "") -> str:
    """``"47.3 ± 0.2"``: mean and sample standard deviation; the mean alone where there is one value."""
    mean = f"{statistics.mean(values):{sign}.1f}"
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean


def mean(group: list[dict], value: Callable[[dict], float]) -> float:
    return statistics.mean(value(run) for run in group)


def mrr(run: dict) -> float:
    return 100 * run["after"]["mrr@10"]


def differences(name: str, other: str, runs: Runs, value: Callable[[dict], float] = mrr) -> list[float]:
    """MRR@10 (or another value) of one strategy less another's, for each seed that both have."""
    reference = {run["seed"]: value(run) for run in runs.get(other, [])}
    return [value(run) - reference[run["seed"]] for run in runs.get(name, []) if run["seed"] in reference]


def above_exhaustive(name: str, runs: Runs) -> list[float]:
    """What a strategy has over exhaustive re-embedding with as many negatives, seed by seed."""
    suffix = next((suffix for suffix in ("-k4", "-k16") if name.endswith(suffix)), "")
    return differences(name, f"exhaustive{suffix}", runs) if name != f"exhaustive{suffix}" else []


def comparisons(regimes: dict[str, Runs]) -> str:
    """MRR@10 of one less that of another, in every regime that has both; nothing where none has."""
    named = {CORRECTED: "corrected"}
    pairs = [f"{named.get(one, one)} − {named.get(other, other)}" for one, other in COMPARED]
    lines = [f"| | {' | '.join(pairs)} |", "|---|" + "---|" * len(pairs)]
    for name, runs in regimes.items():
        gained = [differences(one, other, runs) for one, other in COMPARED]
        if any(gained):
            cells = (f"{mean_sd(values, sign='+')} ({len(values)})" if values else "" for values in gained)
            lines.append(f"| {TITLES[name]} | {' | '.join(cells)} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def to_exhaustive(name: str, runs: Runs) -> str:
    above = above_exhaustive(name, runs)
    return mean_sd(above, sign="+") if above else ""


def coverage(run: dict) -> float:
    """Encodings with gradient, per target of the corpus."""
    others = run["targets_encoded_for_cache"] + run.get("targets_verified", 0)
    return (run["targets_encoded"] - others) / run["targets"]


def by_default(runs: Runs) -> str:
    """What ``corrector="auto"`` takes in a regime, where there is no teacher."""
    chosen = next(run for group in runs.values() for run in group if run["strategy"] in ("corrected", "stale"))
    given = chosen["args"]
    encoded = chosen["steps"] * given["per_device_train_batch_size"] * (1 + given["num_negatives"])
    return CORRECTED if encoded / chosen["targets"] < LOW_COVERAGE else WRITTEN


def reencoded(run: dict) -> float:
    """Encodings for the cache alone."""
    return run["targets_encoded_for_cache"]


def seconds(run: dict) -> float:
    """Training, without what was only measured. Building the cache is left out: runs of one seed share it."""
    return run["seconds"]["train"] - run["seconds"].get("probe", 0.0)


def at_once(runs: Iterable[dict]) -> int:
    """How many runs were side by side, at most."""
    return max(run.get("at_once", 1) for run in runs)


def peak_memory(group: list[dict]) -> str:
    """The most GB that a run has had in use on its GPU; nothing of a CPU."""
    peaks = [run["device"]["peak_allocated"] for run in group if "peak_allocated" in run.get("device", {})]
    return f"{max(peaks) / 1e9:.1f}" if peaks else ""


def series(run: dict, name: str) -> tuple[list[int], list[float]]:
    """Steps and values of a logged metric."""
    logged = [entry for entry in run["log"] if name in entry]
    return [entry["step"] for entry in logged], [entry[name] for entry in logged]


def probed(run: dict, name: str = "fidelity") -> tuple[list[int], list[float]]:
    """Steps and values of what the run's probes measured; before the first step every cache is fresh."""
    if "probes" not in run:  # the first runs have only what was logged: the mean of a window of ten steps, at its end
        steps, values = series(run, name)
        return steps[1:], values[1:]
    probes = [probe for probe in run["probes"] if probe["step"]]
    return [probe["step"] for probe in probes], [probe[name] for probe in probes]


def drift(group: list[dict]) -> float | None:
    """``1 − cos`` of the cache as it was last built to the model at the last probe, of the seed that was probed."""
    values = [probed(run, "fidelity_drift")[1] for run in group]
    return next((each[-1] for each in values if each), None)


def fidelity(name: str, group: list[dict]) -> float | None:
    """Mean over the run, of the seed that was probed; none where k is another than in the other rows."""
    values = [value for run in group for value in probed(run)[1]]
    return statistics.mean(values) if values and not name.endswith(("-k4", "-k16")) else None


def table(runs: Runs) -> str:
    # The untrained encoder depends on the seed alone.
    untrained = list({run["seed"]: run["before"] for group in runs.values() for run in group}.values())
    before = " | ".join(mean_sd([100 * run[metric] for run in untrained]) for metric in METRICS)
    columns = ["to exhaustive", "fidelity", "drift", "coverage", "re-encoded", "TFLOPs", "s"]
    columns += ["GB"] if any(map(peak_memory, runs.values())) else []
    lines = [
        f"| strategy | seeds | {' | '.join([*METRICS, *columns])} |",
        "|---|---|" + "---|" * (len(METRICS) + len(columns)),
        f"| before training | {len(untrained)} | {before} |{' |' * len(columns)}",
    ]
    for name, group in runs.items():
        overlap, drifted = fidelity(name, group), drift(group)
        side_by_side = at_once(group)
        flops = [run["encoder_flops"] for run in group if "encoder_flops" in run]
        cells = [
            *(mean_sd([100 * run["after"][metric] for run in group]) for metric in METRICS),
            to_exhaustive(name, runs),
            f"{overlap:.2f}" if overlap is not None else "",
            f"{drifted:.2f}" if drifted is not None else "",
            f"{mean(group, coverage):.2f}",
            f"{mean(group, reencoded):,.0f}",
            f"{statistics.mean(flops) / 1e12:.2f}" if flops else "",
            f"{statistics.median(map(seconds, group)):.0f}" + (f" ({side_by_side})" if side_by_side > 1 else ""),
        ]
        cells += [peak_memory(group)] if "GB" in columns else []
        lines.append(f"| {name} | {len(group)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def short_table(runs: Runs) -> str:
    """The rows and columns that the documentation's page of results shows."""
    lines = [
        "| strategy | seeds | MRR@10 | to exhaustive | R@20 | answer R@20 | re-encoded for the cache |",
        "|---|---|---|---|---|---|---|",
    ]
    auto = by_default(runs)
    for name in (name for name in SHOWN if name in runs):
        group = runs[name]
        quality = [
            mean_sd([100 * run["after"][metric] for run in group]) for metric in ("recall@20", "answer_recall@20")
        ]
        shown = f"{name} (`auto`)" if name == auto else name
        cells = [mean_sd([mrr(run) for run in group]), to_exhaustive(name, runs), *quality]
        lines.append(f"| {shown} | {len(group)} | {' | '.join(cells)} | {mean(group, reencoded):,.0f} |")
    return "\n".join(lines)


def settings(runs: Runs) -> str:
    """What the runs of a regime have in common, from what they recorded."""
    run = next(iter(runs.values()))[0]
    given = run["args"]
    return (
        f"{run['targets']:,} passages, {run['steps']} steps of {given['per_device_train_batch_size']} questions, "
        f"{given['num_negatives']} negative{'s' * (given['num_negatives'] != 1)} each unless the row says otherwise, "
        f"{given['encoder']} encoder, learning rate {given['learning_rate']:g}{machine(runs)}."
    )


def machine(runs: Runs) -> str:
    """What the runs of a regime were computed in and on, where they have noted it."""
    devices = {
        f"{run['precision']} on {run['device']['name']}"
        + (f" with CUDA {run['device']['cuda']}" if "cuda" in run["device"] else "")
        for group in runs.values()
        for run in group
        if "device" in run
    }
    return "".join(f", {device}" for device in sorted(devices))


# ---------------------------------------------------------------------- plots


def save(figure: plt.Figure, folder: Path, name: str) -> str:
    """Write PNG and SVG; returns Markdown that shows it."""
    for suffix in ("png", "svg"):
        # Without a date and with the same names inside, so that the same results give the same file.
        metadata = {"Date": None} if suffix == "svg" else None
        with plt.rc_context({"svg.hashsalt": "st_corrector"}):
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


def legend(axes: list[plt.Axes]) -> None:
    """One legend beside all panels, of whatever any of them shows."""
    shown = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            shown.setdefault(label, handle)
    if shown:
        axes[-1].legend(shown.values(), shown, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))


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
    legend(axes)
    return save(figure, folder, name)


def plot_fidelity(folder: Path, regimes: dict[str, Runs]) -> str:
    """Fidelity over the steps of the probed runs that differ in what they search."""
    figure, axes = panels(TITLES[regime] for regime in regimes)
    for axis, runs in zip(axes, regimes.values(), strict=True):
        names = [name for name in runs if (name in SHOWN or "pull-back" in name) and probed(runs[name][0])[0]]
        others = iter(plt.get_cmap("Dark2").colors)
        for name in names:
            style = {"color": COLOURS[name]} if name in SHOWN else {"color": next(others), "linestyle": "--"}
            axis.plot(*probed(runs[name][0]), label=name, **style)
        axis.set(xlabel="step", ylabel="overlap with fresh top k", ylim=(0, 1.02))
    legend(axes)
    return save(figure, folder, "fidelity-over-steps")


def plot_coverage(folder: Path, regimes: dict[str, Runs]) -> str:
    """What each strategy has over exhaustive re-embedding, against how often a target is encoded."""
    figure, (axis,) = panels(["MRR@10 above exhaustive re-embedding"])
    for strategy in ("stale", "stale-write-back", "mlp-pull-back", "ridge-pull-back", "ridge-pull-back-query-side"):
        points = []
        for runs in regimes.values():
            if above := above_exhaustive(strategy, runs):
                points.append((mean(runs[strategy], coverage), statistics.mean(above)))
        if points:
            axis.plot(*zip(*sorted(points), strict=True), "o-", label=strategy, color=COLOURS[strategy])
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set_xscale("log")
    ticks = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20)
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_xticks([], minor=True)
    axis.set(xlabel="encodings per target over the run", ylabel="points")
    legend([axis])
    return save(figure, folder, "coverage")


def plot_drift(folder: Path, regimes: dict[str, Runs]) -> str:
    """Fidelity and quality against how far the encoder has moved from the cache by the end of the run."""
    figure, (left, right) = panels(["Fidelity at the last probe", "MRR@10 above exhaustive re-embedding"])
    for strategy in (name for name in SHOWN if name != "exhaustive"):
        points = []
        for runs in regimes.values():
            if strategy in runs and "exhaustive" in runs and probed(runs[strategy][0])[0]:
                run = runs[strategy][0]
                drift, overlap = (probed(run, name)[1][-1] for name in ("fidelity_drift", "fidelity"))
                points.append((drift, overlap, mrr(run) - mrr(runs["exhaustive"][0])))
        if points:
            drift, overlap, quality = zip(*sorted(points), strict=True)
            left.plot(drift, overlap, "o-", label=strategy, color=COLOURS[strategy])
            right.plot(drift, quality, "o-", color=COLOURS[strategy])
    left.set(xlabel="drift 1 − cos(g', g) at the last probe", ylabel="overlap with fresh top k", ylim=(0, 1.02))
    right.axhline(0, color="black", linewidth=0.8)
    right.set(xlabel="drift 1 − cos(g', g) at the last probe", ylabel="points")
    legend([left, right])
    return save(figure, folder, "drift")


def drift_table(regimes: dict[str, Runs]) -> str:
    """Drift at the last probe, fidelity and quality by learning rate."""
    names = [name for name in SHOWN if any(name in runs for runs in regimes.values())]
    lines = [f"| learning rate | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
    for runs in regimes.values():
        cells = []
        for name in names:
            run = runs[name][0] if name in runs else None
            cell = f"{mrr(run):.1f}" if run else ""
            if run and probed(run)[0] and name != "exhaustive":
                drift, overlap = (probed(run, metric)[1][-1] for metric in ("fidelity_drift", "fidelity"))
                cell += f" · {overlap:.2f} · {drift:.2f}"
            cells.append(cell)
        rate = next(iter(runs.values()))[0]["args"]["learning_rate"]
        lines.append(f"| {rate:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


# ---------------------------------------------------------------------- report


def put_into(readme: str, name: str, text: str, by: str = "report.py") -> str:
    """``readme`` with ``text`` between the marks for ``name``, if it has them; ``by`` is what writes it."""
    begin, end = f"<!-- {name}-table: written by benchmarks/{by} -->", f"<!-- end of {name}-table -->"
    before, found, rest = readme.partition(begin)
    return f"{before}{begin}\n\n{text}\n\n{end}{rest.partition(end)[2]}" if found else readme


def report(folder: Path, regimes: dict[str, Runs]) -> str:
    """The whole report as Markdown; writes the plots that it shows into ``folder``."""
    rates = {name: runs for name, runs in regimes.items() if name.startswith("nq-rate-")}
    main = {name: regimes[name] for name in MAIN if name in regimes}
    by_coverage = {name: regimes[name] for name in COVERAGE if name in regimes}
    all_runs = [run for runs in regimes.values() for group in runs.values() for run in group]
    findings = folder / "findings.md"
    sections = [
        "# Which negatives, and at what cost",
        "Written by `python benchmarks/report.py` from the JSON beside it, but for the findings, which stand in "
        "`findings.md`.",
        findings.read_text(encoding="utf-8").strip() if findings.exists() else "",
        "## How to read the tables",
        "Percent on the dev questions, mean ± sample standard deviation over seeds (without ±: one seed). *To "
        "exhaustive*: MRR@10 less that of exhaustive re-embedding with as many negatives, seed by seed. *Fidelity*: "
        "mean over the run of the overlap of the "
        "top k by the vectors that were searched with the top k by fresh embeddings, for 256 training questions, seed "
        "0. *Drift*: 1 − cos(g', g) of the cache as it was last built at the last probe, seed 0. *Coverage*: targets "
        "encoded for the loss, per passage of the corpus. *Re-encoded*: targets encoded for the cache alone. *TFLOPs*: "
        "of the encoder on targets. " + cost(all_runs),
    ]
    tables = {name: runs for name, runs in regimes.items() if name not in rates}
    if compared := comparisons(tables):
        sections += ["MRR@10 of one less that of another, seed by seed (number of seeds):", compared]
    for name, runs in tables.items():
        sections += [f"## {TITLES[name]}", settings(runs), table(runs)]
    sections.append("## Plots")
    if main:
        cached = "targets re-encoded for the cache"
        sections += [
            plot_quality(folder, main, "quality-vs-reencoded", cached, reencoded, "symlog"),
            plot_quality(folder, main, "quality-vs-seconds", "seconds of training" + beside(all_runs), seconds, "log"),
            plot_fidelity(folder, main),
        ]
    if by_coverage:
        sections += [
            "The regimes differ in passages, steps and batch size, too, as their sections say:",
            plot_coverage(folder, by_coverage),
        ]
    if rates:
        common = settings(next(iter(rates.values()))).rpartition(", learning")[0]
        sections += [
            "## How stale is too stale?",
            f"{common}, seed 0. MRR@10 · fidelity · drift 1 − cos(g', g), the latter two at the last probe.",
            drift_table(rates),
            plot_drift(folder, rates),
        ]
    versions = sorted({", ".join(f"{name} {value}" for name, value in run["versions"].items()) for run in all_runs})
    sections += [
        "## Versions and commands",
        "\n".join(f"- {text}" for text in versions),
        "`benchmarks/strategies.py` runs what is missing. Every JSON has its own command and, but for the first ones, "
        "its commit. Those of 0.1.0.dev0 are of commit 4e9f930, whose defaults were others (an MLP of 512, no "
        "write-back)."
        if any(run["versions"]["st-corrector"] == "0.1.0.dev0" for run in all_runs)
        else "`benchmarks/strategies.py` runs what is missing. Every JSON has its own command and its commit.",
        "<details><summary>commands</summary>\n\n"
        + "\n".join(f"    {run['command']}" for run in all_runs)
        + "\n\n</details>",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def cost(runs: list[dict]) -> str:
    """What is to be known of seconds and memory."""
    told = "*s*: seconds of training, the median over seeds, "
    if at_once(runs) > 1:
        told += (
            "in brackets of up to how many runs side by side on one device, whatever the others were: compare only "
            "roughly, and not with a run that had it to itself."
        )
    else:
        told += "on a shared machine with other runs beside: compare only roughly."
    return told + (" *GB*: the most that a run had in use on its GPU." if peak_memory(runs) else "")


def beside(runs: list[dict]) -> str:
    return f", up to {count} runs side by side" if (count := at_once(runs)) > 1 else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="a folder with a folder for each regime")
    folder = parser.parse_args().results.resolve()
    names = dict.fromkeys([*TITLES, *REGIMES])
    regimes = {name: runs for name in names if (runs := load(folder / name))}
    if not regimes:
        parser.error(f"{folder} holds no runs: benchmarks/strategies.py makes them")
    (folder / "README.md").write_text(report(folder, regimes), encoding="utf-8")
    if folder == RESULTS:
        tables = {name: short_table(runs) for name, runs in regimes.items() if "exhaustive" in runs}
        page = ROOT / "docs" / "results.md"
        text = page.read_text(encoding="utf-8")
        for name, table in tables.items():
            text = put_into(text, name, table)
        page.write_text(text, encoding="utf-8")
    count = sum(len(group) for runs in regimes.values() for group in runs.values())
    print(f"{count} runs in {folder / 'README.md'}")


if __name__ == "__main__":
    main()
