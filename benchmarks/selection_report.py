"""The pages on what selection costs: tables and plots, from the JSON of ``benchmarks/selection.py``.

    python benchmarks/selection_report.py

writes ``benchmarks/results/selection/README.md``, of the CPU, and where a GPU has been measured
``benchmarks/results/gpu/selection/README.md``, with the plots beside them; ``--results`` of other folders.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from selection import BASE, GPU_GRID, GRID, PARTS, RESULTS

SHAPE = {
    "rows": "N",
    "dim": "d",
    "batch": "B",
    "k": "k",
    "dtype": "dtype",
    "stored": "stored",
    "written": "written back",
}
ON_CPU = (
    "corrector",
    "seconds",
    "of the floor",
    "best of best",
    "of naive",
    "of FAISS Flat",
    "extra memory, MB",
    "planned, MB",
)
ON_GPU = (
    "corrector",
    "seconds",
    "of bandwidth",
    "of products in bfloat16",
    "of products in float32",
    "of plain torch",
    "of naive",
    "GB/s",
    "TFLOP/s",
    "extra memory, GB",
    "planned, GB",
)
COMMAND = "python benchmarks/selection.py --dataset <BEIR folder> --device {}"


def table(head: tuple[str, ...], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def spread(own: list[float], other: list[float]) -> str:
    """Median and quartiles of the turns' ratios."""
    ratios = [a / b for a, b in zip(own, other, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else 3 * ratios
    return f"{middle:.2f} ({low:.2f} … {high:.2f})"


def shape(result: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(result[name] for name in SHAPE)


def shape_cells(result: dict[str, Any]) -> list[str]:
    return [
        f"{result[name]:.0%}" if name == "written" else f"{result[name]:,}" if name == "rows" else str(result[name])
        for name in SHAPE
    ]


def title(result: dict[str, Any]) -> str:
    return f"{result['rows']:,} targets of {result['dim']} dimensions, {result['batch']} queries, top {result['k']}"


def counted(results: list[dict[str, Any]], name: str, otherwise: str) -> str:
    """By commit, or by device, how many settings were measured."""
    counts = Counter(r.get(name, otherwise) for r in results)
    return ", ".join(f"{each} ({count})" for each, count in counts.items())


def measured_by(done: dict[str, Any]) -> str:
    """On which machine, with which versions, by which command."""
    machine = ", ".join(
        f"{k}: {v:,}" if isinstance(v, int) else f"{k}: {v}" for k, v in done["machine"].items() if k != "versions"
    )
    versions = ", ".join(f"{name} {value}" for name, value in done["machine"]["versions"].items())
    return f"{machine}. {versions}. `{done['command']}`."


def not_measured(done: dict[str, Any], device: str) -> str:
    """Which parts of the benchmark have not been run, or not to their end."""
    grid = {**GRID, **GPU_GRID}
    parts = [
        part
        for part in PARTS[device]
        if part not in done
        and (part not in grid or any(", ".join(map(str, each)) not in done["settings"] for each in grid[part]))
    ]
    command = "python benchmarks/selection.py" + (" --device cuda" if device == "cuda" else "")
    return f"Not run yet, or not to the end: `{command} --only {' '.join(parts)}`." if parts else ""


def save(figure: plt.Figure, path: Path) -> str:
    """Write the plot as PNG and SVG; the name of the former."""
    for suffix in ("png", "svg"):
        # Without a date and with fixed ids, so that the same results make the same file.
        plt.rcParams["svg.hashsalt"] = "st_corrector"
        metadata = {"Date": None} if suffix == "svg" else None
        figure.savefig(path.with_suffix(f".{suffix}"), bbox_inches="tight", dpi=120, metadata=metadata)
    plt.close(figure)
    return f"{path.name}.png"


def growth(results: list[dict[str, Any]], base: dict[str, Any], path: Path) -> str:
    """Seconds against the number of targets, on log axes; or nothing, if there is nothing to be seen."""
    figure, axes = plt.subplots(figsize=(6, 4))
    comparable = [r for r in results if all(r[name] == base[name] for name in SHAPE if name != "rows")]
    for name in dict.fromkeys(r["corrector"] for r in comparable):
        points = sorted((r["rows"], r["seconds"]["search"]) for r in comparable if r["corrector"] == name)
        if len(points) > 1:
            axes.plot(*zip(*points, strict=True), marker="o", label=name)
    if not axes.lines:
        plt.close(figure)
        return ""
    axes.set(xscale="log", yscale="log", xlabel="targets", ylabel="seconds a search")
    axes.set_title(f"B = {base['batch']}, k = {base['k']}, d = {base['dim']}, {base['dtype']}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return f"## Growth\n\n![seconds against targets]({save(figure, path)})"


def compiled(done: dict[str, Any]) -> str:
    each = done["compile"]
    return (
        f"## torch.compile\n\nScoring {each['rows']:,} targets by {each['corrector']} in blocks takes "
        f"{each['seconds']['eager']:.3f} s as the search does it, and {each['compiled_over_eager']:.2f} times as "
        f"long compiled, apart from {each['seconds_to_compile']:.0f} s to compile it."
    )


# ---------------------------------------------------------------------- on a CPU


def cpu_cells(result: dict[str, Any]) -> list[str]:
    turns = result["all_seconds"]["floors"]
    floor = spread(turns["search"], turns[result["floor"]]) if result["floor"] else ""
    ratios = [number(result[f"ratio_{name}"]) for name in ("of_best_to_floor", "to_naive", "to_faiss")]
    memory = [f"{result[name] / 1e6:,.0f}" for name in ("extra_bytes", "planned_bytes")]
    return [result["corrector"], f"{result['seconds']['search']:.3f}", floor, *ratios, *memory]


def cpu_page(done: dict[str, Any], folder: Path) -> list[str]:
    results = list(done["settings"].values())
    at_base = (BASE.rows, BASE.dim, BASE.batch, BASE.k, BASE.dtype, BASE.stored, BASE.written)
    first = next((r for r in results if shape(r) == at_base), results[0])
    base = [r for r in results if shape(r) == shape(first)]
    floors = ", ".join(sorted({r["floor"] for r in base if r["floor"]}))
    parts = [
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
    if (notes := folder / "notes.md").exists():
        parts.append(notes.read_text().strip())
    parts += [
        f"# On CPU\n\n{measured_by(done)}",
        f"## {title(first)}\n\n{table(ON_CPU, [cpu_cells(r) for r in base])}\n\n"
        f"The floor is the fastest of the ways tried to compute the same products ({floors}). "
        f"Settings measured at commit: {counted(results, 'commit', 'earlier ones')}.",
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
        parts.append(compiled(done))
    if rest := [r for r in results if shape(r) != shape(first)]:
        parts.append(growth(results, first, folder / "growth-cpu"))
        rows = [[*shape_cells(r), *cpu_cells(r)] for r in rest]
        parts.append(f"## Other sizes, dtypes and places\n\n{table((*SHAPE.values(), *ON_CPU), rows)}")
    return [*parts, not_measured(done, "cpu")]


# ---------------------------------------------------------------------- on a GPU


def gpu_cells(result: dict[str, Any]) -> list[str]:
    turns = result["all_seconds"]
    bandwidth = spread(turns["search"], [each / 2 for each in turns["copying"]]) if "copying" in turns else ""
    names = ("ratio_to_bfloat16", "ratio_to_float32", "kernel_over_torch", "ratio_to_naive")
    rates = [f"{result['bytes_per_second'] / 1e9:,.0f}", f"{result['flops_per_second'] / 1e12:,.1f}"]
    memory = [f"{result[name] / 1e9:.2f}" for name in ("extra_bytes", "planned_bytes")]
    ratios = [number(result[name]) for name in names]
    return [result["corrector"], f"{result['seconds']['search']:.4f}", bandwidth, *ratios, *rates, *memory]


def streamed(results: list[dict[str, Any]]) -> str:
    rows = [
        [
            *shape_cells(r)[:5],
            r["corrector"],
            f"{r['seconds']['search']:.3f}",
            number(r["ratio_to_resident"]),
            spread(r["all_seconds"]["search"], r["all_seconds"]["sending"]),
            f"{r['bytes_per_second'] / 1e9:,.1f}",
            f"{r['bytes_sent_per_second'] / 1e9:,.1f}",
            f"{r['extra_bytes'] / 1e9:.2f}",
            f"{r['planned_bytes'] / 1e9:.2f}",
        ]
        for r in results
    ]
    head = (
        *list(SHAPE.values())[:5],
        *("corrector", "seconds", "of the same on the GPU", "of sending alone", "GB/s", "GB/s of sending alone"),
        *("extra memory, GB", "planned, GB"),
    )
    return (
        "## Streamed from the CPU's memory\n\nThe cache stays where the CPU has it and goes through the GPU chunk by "
        "chunk. *Of the same on the GPU*: over the search of the same cache in the GPU's memory; *of sending alone*: "
        f"over copying as many bytes from pinned memory to the GPU.\n\n{table(head, rows)}"
    )


def tiles(results: list[dict[str, Any]]) -> str:
    rows = [
        [
            each["dtype"],
            "as launched"
            if each["tiles"] is None
            else " × ".join(str(each["tiles"][name]) for name in ("rows", "queries", "dim")),
            *(("", "") if each["tiles"] is None else (str(each["tiles"]["warps"]), str(each["tiles"]["stages"]))),
            *(
                ("does not fit", "")
                if "does_not_fit" in each
                else (f"{each['seconds'] * 1e3:.2f}", f"{each['bytes_per_second'] / 1e9:,.0f}")
            ),
            f"{each['largest_relative_error']:.1e}" if "largest_relative_error" in each else "",
        ]
        for each in results
    ]
    head = ("dtype", "rows × queries × coordinates", "warps", "stages", "ms", "GB/s", "largest error")
    return (
        f"## The kernel alone, {results[0]['rows']:,} rows\n\nCut up as it is launched, and otherwise. The error: "
        "by how much of the largest maximum one was off, against float64.\n\n" + table(head, rows)
    )


def bars(results: list[dict[str, Any]], path: Path) -> str:
    """Times over those of what bounds them, each corrector's; the name of the plot."""
    dtypes = list(dict.fromkeys(r["dtype"] for r in results))
    figure, all_axes = plt.subplots(1, len(dtypes), figsize=(6 * len(dtypes), 4), sharey=True, squeeze=False)
    shown = {
        "ratio_to_bandwidth": "reading the cache once",
        "ratio_to_bfloat16": "products in bfloat16",
        "ratio_to_float32": "products in float32",
    }
    for axes, dtype in zip(all_axes[0], dtypes, strict=True):
        here = [r for r in results if r["dtype"] == dtype]
        for number_of, (name, label) in enumerate(shown.items()):
            places = [place + (number_of - 1) * 0.27 for place in range(len(here))]
            axes.bar(places, [r[name] - 1 for r in here], bottom=1.0, width=0.25, label=label)
        axes.axhline(1.0, color="black", linewidth=0.8)
        axes.set(yscale="log", title=f"{dtype}: {here[0]['rows']:,} × {here[0]['dim']}")
        axes.set_xticks(range(len(here)), [r["corrector"] for r in here], rotation=30, ha="right", fontsize=8)
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    all_axes[0][0].set_ylabel("a search takes so many times as long as")
    figure.legend(*all_axes[0][0].get_legend_handles_labels(), loc="lower center", ncols=3, bbox_to_anchor=(0.5, 0.95))
    return save(figure, path)


def gpu_page(done: dict[str, Any], folder: Path) -> list[str]:
    results = list(done["settings"].values())
    parts = [
        "# What selecting negatives costs on a GPU",
        "Each search corrects, scores and selects over all targets, exactly. *Of bandwidth*: its time over that of "
        "reading the cache once, as fast as the GPU copies it within its memory (a copy reads and writes, so half its "
        "time); *of products in bfloat16, in float32*: over the matrix products of the search alone, on tensor cores "
        "with the stored numbers rounded to bfloat16, or as float32 without tensor cores; *of plain torch*: over the "
        "same search without the Triton kernel; *of naive*: over correcting everything, products and `topk`, chunk by "
        "chunk. *GB/s* of the cache, *TFLOP/s* of those products. Medians (and quartiles) of ratios within one turn, "
        "all ways in turns in one process. *Extra memory*: what the search had at most beyond the cache; *planned*: "
        "what `CorrectedSearch.memory` had said. The vectors are passages of Natural Questions through "
        "all-MiniLM-L6-v2 beside the means of its token vectors, repeated with noise.",
        measured_by(done),
    ]
    if results:
        off, below = (max(r["float64"][name] for r in results) for name in ("largest_error", "largest_shortfall"))
        parts.append(
            f"Before it was timed every search was compared with the naive one in float32 (of the rows at least "
            f"{min(r['rows_that_agree'] for r in results):.2%} agree; equal scores, up to rounding, may go to either "
            f"row) and, for {results[0]['float64']['queries']} queries, with the scores of all targets in float64: "
            f"scores were off by at most {off:.1e}, and the i-th best row scored at most {below:.1e} below the best "
            f"i-th; more than {max(r['tolerance'] for r in results):.1e} was not allowed. Products of float32 numbers "
            "are not taken in TF32."
        )
    if resident := [r for r in results if r["stored"] == "memory"]:
        parts += resident_parts(resident, folder)
    if from_cpu := [r for r in results if r["stored"] == "streamed"]:
        parts.append(streamed(from_cpu))
    if "tiles" in done:
        parts.append(tiles(done["tiles"]))
    if "compile" in done:
        parts.append(compiled(done))
    devices, commits = counted(results, "gpu", "a CPU, to try it out"), counted(results, "commit", "unknown")
    return [*parts, f"Settings measured on: {devices}; at commit: {commits}.", not_measured(done, "cuda")]


def resident_parts(results: list[dict[str, Any]], folder: Path) -> list[str]:
    """The largest cache in the GPU's memory, by dtype, and what smaller ones cost."""
    largest = max((r["rows"], r["dim"]) for r in results)
    main = [r for r in results if (r["rows"], r["dim"]) == largest]
    copied = [r["bytes_copied_per_second"] / 1e12 for r in main]
    parts = [
        f"## {title(main[0])}",
        f"The GPU copies {min(copied):.2f} to {max(copied):.2f} TB/s, bytes read and written.",
    ]
    for dtype in dict.fromkeys(r["dtype"] for r in main):
        here = [r for r in main if r["dtype"] == dtype]
        size = here[0]["cache_bytes"] / 1e9
        parts.append(f"In {dtype}, {size:.1f} GB:\n\n{table(ON_GPU, [gpu_cells(r) for r in here])}")
    parts.append(f"![times over their bounds]({bars(main, folder / 'bounds')})")
    parts.append(growth(results, main[0], folder / "growth-cuda"))
    if rest := [r for r in results if r not in main]:
        rows = [[*shape_cells(r)[:5], *gpu_cells(r)] for r in rest]
        parts.append(f"## Other sizes\n\n{table((*list(SHAPE.values())[:5], *ON_GPU), rows)}")
    return parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, nargs="+", default=list(RESULTS.values()), help="folders with JSON")
    folders = parser.parse_args().results
    for folder in folders:
        found = {device: folder / f"{device}.json" for device in RESULTS if (folder / f"{device}.json").exists()}
        pages = {"cpu": cpu_page, "cuda": gpu_page}
        parts = [part for device, path in found.items() for part in pages[device](json.loads(path.read_text()), folder)]
        if "cpu" in found and "cuda" not in found:
            parts.append(f"# On a GPU\n\n{on_gpu(folder)}")
        if parts:
            text = "\n\n".join(part for part in parts if part)
            (folder / "README.md").write_text(text + "\n", encoding="utf-8")
            print(folder / "README.md")


def on_gpu(folder: Path) -> str:
    """Where the GPU's page is, or how it is made."""
    page = RESULTS["cuda"] / "README.md"
    if folder == RESULTS["cpu"] and (RESULTS["cuda"] / "cuda.json").exists():
        return f"[A page of its own](../{page.relative_to(RESULTS['cpu'].parent)})."
    return f"Not measured yet: `{COMMAND.format('cuda')}`, which takes a GPU of 80 GB."


if __name__ == "__main__":
    main()
