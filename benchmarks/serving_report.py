"""The page on the day after training: tables and the plot, from the JSON of ``benchmarks/serving.py``.

    python benchmarks/serving_report.py

writes ``benchmarks/results/serving/README.md``, the guide's tables and the plot beside it.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from carry_over_report import mean
from report import panels, save

RESULTS = Path(__file__).resolve().parent / "results" / "serving"
PAIRS = {
    "static": "A static encoder, before and after training with corrected negatives",
    "transformer": "The first two layers of all-MiniLM-L6-v2, before and after training",
    "unrelated": "Unrelated models of different width: latent semantic analysis, then the trained two layers",
}
HEAD = ("what is served", "encoded again", "nDCG@10", "recall@100", "kept of the first 10", "kept of the first 100")
IN_GUIDE = ("unchanged", "query adapter", "upgraded", "re-embedded", "the old model over it")
Key = tuple[str, int, str]
Rows = dict[Key, list[dict]]


def rows_of(runs: list[dict]) -> Rows:
    """The rows of a pair's runs, by name, number encoded again, and order."""
    found: Rows = defaultdict(list)
    for run in runs:
        for row in run["rows"]:
            found[row["name"], row["encoded"], row.get("order", "")].append(row)
    return found


def table(runs: list[dict], is_shown: Callable[[Key], bool] = lambda key: True) -> str:
    """Ways by how many targets they encode again."""
    targets = runs[0]["targets"]
    lines = ["| " + " | ".join(HEAD) + " |", "|:--|" + "--:|" * (len(HEAD) - 1)]
    for key, rows in sorted(rows_of(runs).items(), key=lambda item: (item[0][1], item[0][2], item[0][0])):
        name, encoded, order = key
        if not is_shown(key):
            continue
        measured = [
            mean(100 * row["metrics"]["ndcg@10"] for row in rows),
            mean(100 * row["metrics"]["recall@100"] for row in rows),
            *(mean(100 * row[f"kept@{k}"] for row in rows) for k in (10, 100)),
        ]
        again = f"{encoded:,} ({100 * encoded / targets:.0f} %{f', {order}' if order else ''})" if encoded else "0"
        lines.append(f"| {name} | {again} | {' | '.join(measured)} |")
    return "\n".join(lines)


def headline(runs: list[dict]) -> str:
    """What the guide shows: the ways that the package has, in the order that it gives."""
    shown = table(runs, lambda key: key[0] in IN_GUIDE and key[2] in ("", "in order"))
    about = (
        f"A static encoder on {runs[0]['targets']:,} passages of Natural Questions, before and after training; "
        f"percent, {f'mean ± sample standard deviation over {len(runs)} seeds' if len(runs) > 1 else 'one seed'}."
    )
    return f"{about}\n\n{shown}"


def plan(run: dict) -> str:
    """What ``serve_plan`` said, beside the truth where a row has it."""
    truth = {
        (name, encoded): row["kept@10"]
        for (name, encoded, order), (row, *_) in rows_of([run]).items()
        if order in ("", "in order")
    }
    lines = [
        "| choice | said of recall@10, with its 95 % interval | true | targets encoded | s |",
        "|:--|--:|--:|--:|--:|",
    ]
    for each in run["plan"]["choices"]:
        known = truth.get((each["name"].partition(",")[0], each["encodings"]))
        said = f"{100 * each['recall']:.1f} [{100 * each['low']:.1f}, {100 * each['high']:.1f}]"
        true = "" if known is None else f"{100 * known:.1f}"
        lines.append(f"| {each['name']} | {said} | {true} | {each['encodings']:,} | {each['seconds']:.0f} |")
    return "\n".join(
        [
            *lines,
            "",
            f"{run['plan']['why']} Finding it out took {run['plan']['seconds']:.0f} s. The true values are over all "
            f"{run['queries']:,} dev questions, with what the training questions taught; the plan had dev questions "
            "alone, some to learn from and 200 to judge.",
        ]
    )


def covered(found: dict) -> str:
    """How often intervals covered the truth."""
    lines = [
        "| way | depth | true recall | bias | half width | covered | lower end too high |",
        "|:--|--:|--:|--:|--:|--:|--:|",
    ]
    for row in found["rows"]:
        cells = f"{100 * row['truth']:.1f} | {100 * row['bias']:+.2f} | {100 * row['half_width']:.1f}"
        lines.append(
            f"| {row['way']} | {row['k']} | {cells} | {100 * row['covered']:.1f} % | {100 * row['too_high']:.1f} % |"
        )
    encoded = {row["k"]: row["encoded"] for row in found["rows"]}
    told = ", ".join(f"{count:,.0f} targets at depth {k}" for k, count in encoded.items())
    about = (
        f"{found['draws']:,} draws of {found['judging']} of {found['queries']:,} training questions, each with one of "
        f"{found['samples']} samples of targets; intervals of {100 * found['confidence']:g} %, less what "
        f"{found['judging']} of {found['queries']:,} leave to chance. "
        f"All ways together encode {told} a draw, of {found['targets']:,}."
    )
    return f"{about}\n\n" + "\n".join(lines) + f"\n\n`{found['command']}`"


def stores(found: dict) -> str:
    """Vectors a second of an upgrade, beside a plain copy."""
    lines = ["| store | vectors | plain copy, a second | upgrade, a second | times as long |", "|:--|--:|--:|--:|--:|"]
    for name, row in found["stores"].items():
        speeds = f"{row['plain_vectors_per_second']:,} | {row['upgrade_vectors_per_second']:,}"
        lines.append(f"| {name} | {row['count']:,} × {row['dim']} | {speeds} | {row['ratio']} |")
    about = (
        "An upgrade into a new table or collection beside a copy by the store's own client in blocks of the same size; "
        "both were checked, every vector and every payload. An upgrade also maps, digests and reads back, and looks "
        "through all rows once more at the end."
    )
    return f"{about}\n\n" + "\n".join(lines) + f"\n\n`{found['command']}`"


def plot(folder: Path, found: dict[str, list[dict]]) -> str:
    """nDCG@10 by how many targets are encoded again."""
    figure, axes = panels(f"{name}: {runs[0]['targets']:,} targets" for name, runs in found.items())
    for axis, runs in zip(axes, found.values(), strict=True):
        lines: dict[str, dict[float, float]] = defaultdict(dict)
        for (name, encoded, order), rows in sorted(rows_of(runs).items(), key=lambda item: item[0][1]):
            value = statistics.fmean(100 * row["metrics"]["ndcg@10"] for row in rows)
            share = 100 * encoded / runs[0]["targets"]
            if name in ("re-embedded", "unchanged"):
                axis.axhline(value, color="0.4", linestyle="-" if name == "re-embedded" else ":", label=name)
            elif (name == "upgraded" and "," not in order) or (name == "query adapter" and order in ("", "in order")):
                for which in [order] if order else ["in order", "at random"]:
                    label = name if name == "query adapter" else f"{name}, {which}"
                    lines[label][share] = value
        for label, points in lines.items():
            axis.plot(points.keys(), points.values(), "o-", markersize=3.5, label=label)
        axis.set(xlabel="% of targets encoded again", ylabel="nDCG@10, percent")
        axis.set_xscale("symlog", linthresh=1)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=3, frameon=False, fontsize=8)
    figure.tight_layout(rect=(0, 0.12, 1, 1))
    return save(figure, folder, "serving")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    folder = parser.parse_args().results
    found: dict[str, list[dict]] = defaultdict(list)
    for path in sorted(folder.glob("*-seed*.json")):
        run = json.loads(path.read_text(encoding="utf-8"))
        found[run["pair"]].append(run)
    if not found:
        raise SystemExit(f"{folder} has no results: run benchmarks/serving.py first.")
    found = {name: found[name] for name in PAIRS if name in found}
    parts = [
        "# The day after training",
        "Made by `benchmarks/serving_report.py` from the JSON beside it. The training questions teach the adapter and "
        "the order of re-encoding; the figures are those of dev questions. Kept: the share of a re-embedded index's "
        "first 10 or 100 that is returned. *Not corrected again*: fresh embeddings among those of the run's corrector "
        "as it is, without the correction that is fitted on them.",
        plot(folder, found),
    ]
    for name, runs in found.items():
        first = runs[0]
        seeds = f"{len(runs)} seeds, mean ± sample standard deviation" if len(runs) > 1 else "one seed"
        parts += [
            f"## {PAIRS[name]}",
            f"{first['targets']:,} targets, {first['queries']:,} dev questions, {seeds}; {first['widths'][0]} → "
            f"{first['widths'][1]} dimensions. Encoding a target took {1_000 * first['encode_seconds']:.1f} ms.",
            table(runs),
            f"What `serve_plan` said, seed {first['seed']}:",
            plan(first),
            f"`{first['command']}`",
        ]
    path = folder / "coverage.json"
    if path.exists():
        parts += ["## How often intervals cover the truth", covered(json.loads(path.read_text(encoding="utf-8")))]
    path = folder / "stores.json"
    if path.exists():
        parts += ["## Vector stores", stores(json.loads(path.read_text(encoding="utf-8")))]
    if "static" in found:
        (folder / "headline.md").write_text(headline(found["static"]) + "\n", encoding="utf-8")
    (folder / "README.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    print(folder / "README.md")


if __name__ == "__main__":
    main()
