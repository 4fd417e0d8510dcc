"""Run the NQ recipe for every strategy and seed; one JSON file for each run, and runs that are there are skipped.

    python benchmarks/strategies.py --dataset data/nq
    python benchmarks/strategies.py --dataset data/nq --regime nq-low-coverage --seeds 0 1 2

Each run is the recipe itself, in a process of its own; its JSON holds the command.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# How much of the corpus a run encodes: what write-back can do by itself depends on it.
REGIMES = {
    "nq": [],
    "nq-low-coverage": ["--max_steps", "60", "--per_device_train_batch_size", "32", "--num_negatives", "8"],
}
# name → the recipe's options. The exhaustive run re-embeds all passages before every step.
STRATEGIES = {
    "in-batch": ["--strategy", "in-batch"],
    "stale": ["--strategy", "stale"],
    "stale-write-back": ["--strategy", "stale", "--write_back"],
    "corrected-mlp": ["--strategy", "corrected", "--corrector", "mlp"],
    "corrected-ridge": ["--strategy", "corrected", "--corrector", "ridge"],
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
    parser.add_argument("--regime", default="nq", choices=REGIMES)
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES), choices=STRATEGIES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--results", type=Path, help="by default benchmarks/results/<regime>")
    args = parser.parse_args()
    results = args.results or ROOT / "benchmarks" / "results" / args.regime
    for seed in args.seeds:
        for name in args.strategies:
            path = results / f"{name}-seed{seed}.json"
            if path.exists():
                continue
            command = ["recipes/train_nq.py", "--dataset", args.dataset, "--encoder", "static", *STRATEGIES[name]]
            command += [*REGIMES[args.regime], "--seed", str(seed), "--disable_tqdm", "true"]
            command += ["--results", os.path.relpath(path, ROOT)]
            command += ["--output_dir", f"outputs/{args.regime}/{name}-seed{seed}"]
            print(name, "seed", seed, flush=True)
            subprocess.run([sys.executable, *command], cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
