"""The page on what selection costs: tables and the plot, from the JSON of ``benchmarks/selection.py``.

    python benchmarks/selection_report.py

writes ``benchmarks/results/selection/README.md`` and the plot beside it.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import Counter
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from selection import GRID, OTHERS

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "selection"
HEAD = (
    "corrector",
    "seconds",
    "of the floor",
    "best of best",
    "of naive",
    "of FAISS Flat",
    "extra memory, MB",
    "planned, MB",
)


def table(head: tuple[str, ...], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def cells(result: dict) -> list[str]:
    ratios = [number(result[f"ratio_{name}"]) for name in ("of_best_to_floor", "to_naive", "to_faiss")]
    memory = [f"{result[name] / 1e6:,.0f}" for name in ("extra_bytes", "planned_bytes")]
    return [f"{result['seconds']['search']:.3f}", to_floor(result), *ratios, *memory]


def to_floor(result: dict) -> str:
    """Median and quartiles of the turns' ratios."""
    if result["floor"] is None:
        return ""
    turns = result["all_seconds"]["floors"]
    ratios = [own / floor for own, floor in zip(turns["search"], turns[result["floor"]], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return f"{middle:.2f} ({low:.2f} … {high:.2f})"


def shape(result: dict) -> tuple:
    return tuple(result[name] for name in ("rows", "dim", "batch", "k", "dtype", "stored", "written"))


def section(title: str, results: list[dict]) -> str:
    """One table for results that differ in shape as well."""
    rows = [
        [
            f"{r['rows']:,}",
            str(r["dim"]),
            str(r["batch"]),
            str(r["k"]),
            r["dtype"],
            r["stored"],
            f"{r['written']:.0%}",
            r["corrector"],
            *cells(r),
        ]
        for r in results
    ]
    return f"## {title}\n\n" + table(("N", "d", "B", "k", "dtype", "stored", "written back", *HEAD), rows)


def growth(results: list[dict], base: dict, path: Path) -> bool:
    """Seconds against the number of targets, on log axes; whether there is anything to be seen."""
    figure, axes = plt.subplots(figsize=(6, 4))
    comparable = [
        r for r in results if all(r[name] == base[name] for name in ("dim", "batch", "k", "dtype", "stored", "written"))
    ]
    for name in dict.fromkeys(r["corrector"] for r in comparable):
        points = sorted((r["rows"], r["seconds"]["search"]) for r in comparable if r["corrector"] == name)
        if len(points) > 1:
            axes.plot(*zip(*points, strict=True), marker="o", label=name)
    if not axes.lines:
        plt.close(figure)
        return False
    axes.set(xscale="log", yscale="log", xlabel="targets", ylabel="seconds a search")
    axes.set_title(f"B = {base['batch']}, k = {base['k']}, d = {base['dim']}, {base['dtype']}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    for suffix in ("png", "svg"):
        # Without a date and with fixed ids, so that the same results make the same file.
        plt.rcParams["svg.hashsalt"] = "st_corrector"
        metadata = {"Date": None} if suffix == "svg" else None
        figure.savefig(path.with_suffix(f".{suffix}"), bbox_inches="tight", dpi=120, metadata=metadata)
    plt.close(figure)
    return True


def commits(results: list[dict]) -> str:
    """At which commit how many settings were measured."""
    counts = Counter(r.get("commit", "earlier ones") for r in results)
    return "Settings measured at commit: " + ", ".join(f"{name} ({count})" for name, count in counts.items()) + "."


def not_measured(done: dict, device: str) -> str:
    """Which parts of the benchmark have not been run, or not to their end."""
    parts = [part for part in GRID if (part == "gpu") == (device == "cuda") or part in ("base", "dtypes", "growth")]
    open_parts = [part for part in parts if not all(", ".join(map(str, s)) in done["settings"] for s in GRID[part])]
    return ", ".join([*open_parts, *(part for part in OTHERS if part not in done and device == "cpu")])


def page(done: dict, folder: Path, device: str) -> str:
    results = list(done["settings"].values())
    first = next((r for r in results if shape(r) == (1_000_000, 384, 64, 32, "float32", "memory", 0.0)), results[0])
    base = [r for r in results if shape(r) == shape(first)]
    floors = ", ".join(sorted({r["floor"] for r in base if r["floor"]}))
    machine = ", ".join(f"{k}: {v}" for k, v in done["machine"].items() if k != "versions")
    versions = ", ".join(f"{name} {value}" for name, value in done["machine"]["versions"].items())
    parts = [
        f"# On {device.upper()}\n\n{machine}. {versions}. `{done['command']}`.",
        f"## {first['rows']:,} targets of {first['dim']} dimensions, {first['batch']} queries, top {first['k']}\n\n"
        + table(HEAD, [[r["corrector"], *cells(r)] for r in base])
        + f"\n\nThe floor is the fastest of the ways tried to compute the same products ({floors}). {commits(results)}",
    ]
    if engines := [*done.get("indices", []), *done.get("indices-10M", [])]:
        rows = [
            [
                each["engine"],
                each["searched"],
                str(each["rescored"]),
                each["corrector"],
                f"{each['rows']:,}",
                f"{each['recall_at_k']:.3f}",
                f"{each['seconds']['approximate']:.4f}",
                f"{each['times_faster_than_exact']:.1f}",
                f"{each['seconds_to_build_or_load']:.0f}",
                f"{each['bytes_of_index'] / 1e6:,.0f}",
            ]
            for each in engines
        ]
        head = (
            "engine",
            "over",
            "rescored",
            "corrector",
            "N",
            "recall of the exact top k",
            "seconds",
            "times faster than exact",
            "build (or load), s",
            "index, MB",
        )
        parts.append(f"## Approximate engines\n\n{table(head, rows)}")
    if "recall" in done:
        rows = [[name, f"{value:.4f}"] for name, value in done["recall"].items()]
        parts.append("## Dtypes of the cache\n\n" + table(("dtype", "recall of float32's top k"), rows))
    if "compile" in done:
        each = done["compile"]
        parts.append(
            f"## torch.compile\n\nScoring {each['rows']:,} targets by {each['corrector']} in blocks takes "
            f"{each['seconds']['eager']:.3f} s as the search does it, and {each['compiled_over_eager']:.2f} times as "
            f"long compiled, apart from {each['seconds_to_compile']:.0f} s to compile it."
        )
    if rest := [r for r in results if shape(r) != shape(first)]:
        if growth(results, first, folder / f"growth-{device}"):
            parts.append(f"## Growth\n\n![seconds against targets](growth-{device}.png)")
        parts.append(section("Other sizes, dtypes and places", rest))
    if missing := not_measured(done, device):
        parts.append(f"Not run yet, or not to the end: `python benchmarks/selection.py --only` {missing}.")
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    folder = parser.parse_args().results
    text = [
        "# What selecting negatives costs",
        "Each search corrects, scores and selects over all targets. *Of the floor*: its time over that of the same "
        "matrix products alone; *best of best*: the same for the fastest turn of each, which is what is left when "
        "nobody else uses the machine; *of naive*: over correcting everything, one product and `topk`; *of FAISS "
        "Flat*: over correcting everything, handing it to an `IndexFlatIP` and searching that (with corrected queries, "
        "over its search alone). Medians (and quartiles) of ratios within one turn; every result is checked against "
        "the naive one first. *Extra memory*: what the process had at most beyond what it had before the search; "
        "*planned*: what `CorrectedSearch.memory` had said. The vectors are passages of Natural Questions through "
        "all-MiniLM-L6-v2 (beyond 384 dimensions beside the means of its token vectors), repeated with noise.",
    ]
    for device in ("cpu", "cuda"):
        path = folder / f"{device}.json"
        if path.exists():
            text.append(page(json.loads(path.read_text()), folder, device))
        else:
            command = f"python benchmarks/selection.py --dataset <BEIR folder> --device {device}"
            text.append(f"# On {device.upper()}\n\nNot run yet: `{command}`.")
    notes = folder / "notes.md"
    if notes.exists():
        text.insert(2, notes.read_text().strip())
    (folder / "README.md").write_text("\n\n".join(text) + "\n", encoding="utf-8")
    print(folder / "README.md")


if __name__ == "__main__":
    main()
