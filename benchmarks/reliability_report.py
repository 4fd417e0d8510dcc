"""Write the figures of the long tests of faults into docs/reliability.md.

RELIABILITY_REPORT=benchmarks/results/reliability.json make test-long
python benchmarks/reliability_report.py
"""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "reliability.json"
PAGE = ROOT / "docs" / "reliability.md"
HEADING = "## Figures\n"


def main() -> None:
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    versions = sorted(
        {", ".join(f"{name} {version}" for name, version in each["versions"].items()) for each in found.values()}
    )
    builds, runs, soak = (found[name] for name in ("kills of a cache build", "kills of a training run", "soak"))
    memory = soak["resident_mb"]
    lines = [
        f"From [{RESULTS.name}](../{RESULTS.relative_to(ROOT)}) ({'; '.join(versions)}; two CPU cores).",
        "",
        f"- {builds['kills']} builds of a cache killed at random moments, {builds['before_its_end']} of them before their "
        f"end: {builds['same_bytes']} completed to the same bytes, {builds['rows_lost']} rows lost.",
        f"- {runs['kills']} training runs killed at random moments, of {len(runs['cases'])} kinds, "
        f"{runs['went_on_from_a_checkpoint']} of which had a complete checkpoint to go on from: {runs['identical']} ended "
        "with the same bits.",
        f"- {soak['steps']:,} steps: {min(memory[8:])} to {max(memory[8:])} MB resident after the first 400, "
        f"{100 * soak['growth'][0]:.1f} % above the first of these at most.",
        "",
        "| reader | inputs | taken | refused | slowest, s |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {name.removeprefix('fuzz: ')} | {each['inputs']:,} | {each['taken']:,} | {each['refused']:,} | "
        f"{each['slowest_s']:.2f} |"
        for name, each in sorted(found.items())
        if name.startswith("fuzz: ")
    ]
    before, _, _ = PAGE.read_text(encoding="utf-8").partition(HEADING)
    PAGE.write_text(before + HEADING + "\n" + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
