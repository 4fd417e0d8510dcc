"""Run the NQ recipe for every strategy and seed; one JSON file for each run, and runs that are there are skipped.

    python benchmarks/strategies.py --dataset data/nq

Each run is the recipe itself, in a process of its own; its JSON holds the command.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# name → the recipe's options. The exhaustive run re-embeds all passages before every step.
STRATEGIES = {
    "in-batch": ["--strategy", "in-batch"],
    "stale": ["--strategy", "stale"],
    "corrected-mlp": ["--strategy", "corrected", "--corrector", "mlp"],
    "corrected-ridge": ["--strategy", "corrected", "--corrector", "ridge"],
    "stale-write-back": ["--strategy", "stale", "--write_back"],
    "mlp-pull-back": ["--strategy", "corrected", "--corrector", "mlp", "--write_back"],
    "ridge-pull-back": ["--strategy", "corrected", "--corrector", "ridge", "--write_back"],
    "ridge-pull-back-query-side": [
        *("--strategy", "corrected", "--corrector", "ridge", "--write_back"),
        *("--corrector_settings", '{"normalize": false}'),
    ],
    "refresh-50": ["--strategy", "refresh:50"],
    "exhaustive": ["--strategy", "exhaustive"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="a BEIR folder")
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES), choices=STRATEGIES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "nq")
    parser.add_argument("options", nargs="*", help="further options of the recipe, after --")
    args = parser.parse_args()
    for seed in args.seeds:
        for name in args.strategies:
            path = args.results / f"{name}-seed{seed}.json"
            if path.exists():
                continue
            command = ["recipes/train_nq.py", "--dataset", args.dataset, "--encoder", "static", *STRATEGIES[name]]
            command += ["--seed", str(seed), "--disable_tqdm", "true", "--results", os.path.relpath(path, ROOT)]
            command += ["--output_dir", f"outputs/nq/{name}-seed{seed}", *args.options]
            print(name, "seed", seed, flush=True)
            subprocess.run([sys.executable, *command], cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
