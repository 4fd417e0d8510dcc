"""The page on what a training step costs: tables and the plot, from the JSON of ``benchmarks/step.py``.

    python benchmarks/step_report.py

writes ``README.md`` and the plot into ``benchmarks/results/step`` and, if there is anything, into
``benchmarks/results/gpu/step``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from selection_report import table
from step import Setting

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
PARTS = ("encode", "exchange", "select", "correct", "backward", "optimizer", "rest")
TEXT = """# What a training step costs

Medians over steps of one process's batch. *Selecting*: the share of the step that choosing negatives takes. *Plain
loss*: `MultipleNegativesRankingLoss` (where a batch is cut into mini-batches, `CachedMultipleNegativesRankingLoss`)
over the same queries, positives and negatives, turn by turn in the same process; *its texts*: with the last column
filled up. *Overhead a text*: of the corrected loss's step over the plain one's, each divided by its texts (in brackets
from the least to the most of all steps). *Rest*: checking the labels, the loss by itself, and all that is between the
parts. Encoders: *transformer* is all-MiniLM-L6-v2; *bert-base* the same with every coordinate and every layer twice,
which is as large as BERT-base; *static* the mean of token vectors.
"""
OF_GPU = """*Held*: GPU memory between steps, for model, optimizer, cache and what the search keeps; *a step*, *plain
loss*: the most that either takes beyond that. *Compiling*: what the first turns of both losses took beyond what later
ones take, and how many graphs were compiled in all.
"""


def read(path: Path) -> dict[str, Any]:
    """One result; what earlier ones do not say has the defaults."""
    result = Setting()._asdict() | json.loads(path.read_text(encoding="utf-8"))
    medians = result["medians"]
    parts = {name: medians.get(name, medians.get(f"ours_{name}")) for name in PARTS[:-1]}
    rest = max(0.0, medians["ours_step"] - sum(parts.values()))
    return result | {"file": path.name, "parts": {**parts, "rest": rest}, "cache": describe_cache(result)}


def describe_cache(result: dict[str, Any]) -> str:
    return result["cache_dtype"] + ("" if result["cache_on_device"] else ", streamed")


def describe_batch(result: dict[str, Any]) -> str:
    return f"{result['batch_size']:,}" + (f" by {result['mini_batch_size']}" if result["mini_batch_size"] else "")


def describe_compiling(result: dict[str, Any]) -> str:
    if not result["torch_compile"]:
        return ""
    graphs = sum(turn["graphs_compiled"] for turns in result["turns"].values() for turn in turns)
    return f"{result['seconds_to_compile']:.0f} ({graphs:.0f} graphs)"


def label(result: dict[str, Any]) -> str:
    """The setting in one line."""
    said = [result["encoder"], f"{result['targets']:,} targets in {result['cache']}", f"batch {describe_batch(result)}"]
    said += ["bf16"] if result["bf16"] else []
    said += ["compiled"] if result["torch_compile"] else []
    said += [f"{result['processes']} processes"] if result["processes"] > 1 else []
    return ", ".join(said)


def costs(results: list[dict[str, Any]], on_gpu: bool) -> str:
    head = ("device", "encoder", "processes × threads", "targets", "cache", "precision", "compiled", "batch")
    head += ("texts a step", "step, s", "selecting", "plain loss, s", "its texts", "overhead a text")
    of_gpu = ("cache, GB", "held, GB", "a step, GB", "plain loss, GB", "compiling, s")
    rows = []
    for result in results:
        each, overheads = result["medians"], result["overheads"]
        row = [
            result["machine"].get("gpu", "CPU"),
            result["encoder"],
            f"{result['processes']} × {result['threads_of_each']}",
            f"{result['targets']:,}",
            result["cache"],
            "bf16" if result["bf16"] else "float32",
            "yes" if result["torch_compile"] else "no",
            describe_batch(result),
            f"{each['texts']:,.0f}",
            f"{each['ours_step']:.3f}",
            f"{result['parts']['select'] / each['ours_step']:.0%}",
            f"{each['reference_step']:.3f}",
            f"{each['reference_texts']:,.0f}",
            f"{each['overhead']:+.1%} ({min(overheads):+.1%} … {max(overheads):+.1%})",
        ]
        if on_gpu:
            sizes = (result["cache_bytes"], each["bytes_held"], each["ours_bytes"], each["reference_bytes"])
            row += [*(f"{size / 1e9:.1f}" for size in sizes), describe_compiling(result)]
        rows.append(row)
    return table(head + (of_gpu if on_gpu else ()), rows)


def parts(results: list[dict[str, Any]]) -> str:
    rows = [
        [
            label(result),
            *(f"{result['parts'][name]:.3f}" for name in PARTS),
            f"{result['medians']['bytes_exchanged'] / 1e6:.2f}",
        ]
        for result in results
    ]
    return table(("seconds", *PARTS, "MB exchanged"), rows)


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Each step's parts as shares of it, and its seconds beside."""
    figure, axes = plt.subplots(figsize=(8, 0.8 + 0.4 * len(results)))
    names = [f"{label(result)}: {result['medians']['ours_step']:.3f} s" for result in results]
    places, done = range(len(results)), [0.0] * len(results)
    for name in PARTS:
        shares = [result["parts"][name] / sum(result["parts"].values()) for result in results]
        axes.barh(places, shares, left=done, label=name)
        done = [before + share for before, share in zip(done, shares, strict=True)]
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.set(xlim=(0, 1), xlabel="share of the step")
    axes.xaxis.set_major_formatter("{x:.0%}")
    axes.legend(fontsize=8, ncols=len(PARTS), loc="lower center", bbox_to_anchor=(0.3, 1.0), frameon=False)
    for suffix in ("png", "svg"):
        # Without a date and with fixed ids, so that the same results make the same file.
        plt.rcParams["svg.hashsalt"] = "st_corrector"
        metadata = {"Date": None} if suffix == "svg" else None
        figure.savefig(path.with_suffix(f".{suffix}"), bbox_inches="tight", dpi=120, metadata=metadata)
    plt.close(figure)


def page(folder: Path) -> str:
    results = [read(path) for path in sorted(folder.glob("*.json"))]
    on_gpu = any("bytes_held" in result["medians"] for result in results)
    text = TEXT + (OF_GPU if on_gpu else "")
    sections = [text.rstrip(), costs(results, on_gpu), "## Part by part", parts(results)]
    if len(results) > 1:
        plot(results, folder / "parts")
        sections.append("![the parts' shares of a step](parts.png)")
    commands = []
    for result in results:
        machine = result["machine"]
        versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
        commands.append(
            f"- `{result['file']}`: `{result['command']}`; {machine.get('gpu', machine['cpu'])}; {versions}"
        )
    return "\n\n".join([*sections, "## Commands", "\n".join(commands)]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, nargs="+", default=[RESULTS / "step", RESULTS / "gpu" / "step"])
    for folder in parser.parse_args().results:
        if any(folder.glob("*.json")):
            (folder / "README.md").write_text(page(folder), encoding="utf-8")
            print(folder / "README.md")


if __name__ == "__main__":
    main()
