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
FUZZ = "fuzz: "


def main() -> None:
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    versions = {", ".join(" ".join(each) for each in figures["versions"].items()) for figures in found.values()}
    kinds = ("cache build", "cache's extension", "training run")
    builds, extensions, runs = (found[f"kills of a {kind}"] for kind in kinds)
    soak = found["soak"]
    warm = soak["resident_mb"][soak["warm_after"] :]
    fuzzed = {name.removeprefix(FUZZ): each for name, each in sorted(found.items()) if name.startswith(FUZZ)}
    table = [
        f"| {name} | {each['inputs']:,} | {each['taken']:,} | {each['refused']:,} | {each['slowest_s']:.2f} |"
        for name, each in fuzzed.items()
    ]
    lines = f"""
From [{RESULTS.name}](../{RESULTS.relative_to(ROOT)}) ({"; ".join(sorted(versions))}; two CPU cores).

- Builds of a cache killed at random moments: {builds["kills"]}, of these {builds["before_its_end"]} before their end.
  Completed to the same bytes: {builds["same_bytes"]}. Finished shards that were encoded again:
  {builds["finished_shards_encoded_again"]} of {builds["shards_kept"]:,}.
- Extensions of a cache killed at random moments: {extensions["kills"]}, of these {extensions["before_its_end"]} before
  their end. Afterwards it was what it had been, or what it was to be: {extensions["loaded"]}. Completed to the same
  bytes: {extensions["same_bytes"]}. Finished shards that were written again: {extensions["written_again"]} of
  {extensions["shards_kept"]:,}.
- Training runs killed at random moments from their first checkpoint on: {runs["kills"]}, of {len(runs["cases"])} kinds,
  {runs["before_its_end"]} before their end.
  With a complete checkpoint to go on from: {runs["went_on_from_a_checkpoint"]}.
  Ended with the same bits: {runs["identical"]}.
- {soak["steps"]:,} steps with checkpoints: {min(warm)} to {max(warm)} MB resident after warm-up, at most
  {100 * soak["growth"][0]:.1f} % above what it was then, {100 * soak["growth"][1]:.1f} % at the end.

| reader | inputs | taken | refused | slowest, s |
|---|---|---|---|---|
""".splitlines()
    before, _, _ = PAGE.read_text(encoding="utf-8").partition(HEADING)
    PAGE.write_text(before + HEADING + "\n".join(lines + table) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
