"""The study: ways to choose negatives, compared on Natural Questions through the same recipe, loss and search.

    python benchmarks/strategies.py --preset smoke --dataset data/nq     # a minute: does everything run?
    python benchmarks/strategies.py --preset cpu --dataset data/nq       # hours on two cores, static encoder
    python benchmarks/strategies.py --preset gpu --dataset data/nq       # transformers

Each run is the recipe itself, in a process of its own, and leaves one JSON with its figures and its command. Runs whose
JSON is there are skipped, so the study goes on where it was stopped; `python benchmarks/report.py` makes the report.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def options(**settings: object) -> list[str]:
    """``max_steps=60`` → ``["--max_steps", "60"]``; dictionaries as JSON."""
    texts = {
        name: json.dumps(value) if isinstance(value, (dict, bool)) else str(value) for name, value in settings.items()
    }
    return [part for name, text in texts.items() for part in (f"--{name}", text)]


def transformer(**settings: object) -> list[str]:
    return options(
        encoder="transformer", num_negatives=8, per_device_train_batch_size=64, max_seq_length=128, max_steps=300
    ) + options(**settings)


def gold(**settings: object) -> list[str]:
    return options(max_targets=9_383, num_negatives=4, max_seq_length=32) + options(**settings)


def static(**settings: object) -> list[str]:
    return options(encoder="static") + options(**settings)


# How much of the corpus a run encodes, which decides what write-back can do by itself, and how far the encoder drifts.
REGIMES = {
    "smoke": static(max_targets=9_400, max_steps=4, per_device_train_batch_size=8, num_negatives=2, logging_steps=2),
    "nq-high-coverage": static(max_targets=30_000, max_steps=300, num_negatives=8),
    "nq-medium-coverage": static(),
    "nq-low-coverage": static(max_steps=60, per_device_train_batch_size=32, num_negatives=8),
    "nq-coverage-0.05": static(max_steps=40, per_device_train_batch_size=16, num_negatives=8),
    "nq-coverage-15": static(max_targets=10_000, max_steps=300, num_negatives=8),
    **{
        f"nq-rate-{rate}": static(max_targets=10_000, max_steps=100, num_negatives=8, learning_rate=rate)
        for rate in ("1e-4", "3e-4", "1e-3", "3e-3", "1e-2")
    },
    # As much of a transformer as two CPU cores train in minutes: the gold passages alone, short texts. MiniLM has
    # learnt these questions already; its first two layers have not.
    "minilm-cpu": gold(max_steps=60, per_device_train_batch_size=16, learning_rate="1e-4"),
    "minilm-2-layers": gold(num_layers=2, max_steps=100, per_device_train_batch_size=32, learning_rate="5e-4"),
    "minilm-2-layers-lora": gold(
        num_layers=2, lora_r=8, max_steps=100, per_device_train_batch_size=32, learning_rate="5e-3"
    ),
    **{f"minilm-{rate}": transformer(learning_rate=rate) for rate in ("2e-5", "1e-4")},
    "bert-from-scratch": transformer(learning_rate="1e-4", from_scratch=True),
}
# Fidelity is measured with seed 0 alone, over the whole corpus where the encoder is cheap; at intervals that are no
# multiple of those of the refreshes, right after which it is 1.
PROBES = {
    "smoke": options(probe_every=2, probe_targets=100),
    "nq-high-coverage": options(probe_every=19, probe_targets=30_000),
    "minilm-cpu": options(probe_every=19, probe_targets=1_000),
    "minilm-2-layers": options(probe_every=19, probe_targets=9_383),
    "minilm-2-layers-lora": options(probe_every=19, probe_targets=9_383),
    "nq-low-coverage": options(probe_every=7, probe_targets=99_471),
    **{
        f"nq-rate-{rate}": options(probe_every=10, probe_targets=10_000)
        for rate in ("1e-4", "3e-4", "1e-3", "3e-3", "1e-2")
    },
    **{
        name: options(probe_every=19, probe_targets=20_000)
        for name in ("minilm-2e-5", "minilm-1e-4", "bert-from-scratch")
    },
}


def stale(**settings: object) -> list[str]:
    return options(strategy="stale", **{"write_back": False, **settings})


def corrected(corrector: str, **settings: object) -> list[str]:
    given = {name: value for name, value in settings.items() if name not in ("normalize", "hidden", "depth", "loss")}
    of_corrector = {name: value for name, value in settings.items() if name not in given}
    given = {"write_back": True, **given}
    return options(
        strategy="corrected",
        corrector=corrector,
        **({"corrector_settings": of_corrector} if of_corrector else {}),
        **given,
    )


# name → the recipe's options.
STRATEGIES = {
    "in-batch": options(strategy="in-batch"),
    "uniform": stale(sampler="uniform"),
    "mined-once": options(strategy="mined-once"),
    "stale": stale(),
    "stale-write-back": stale(write_back=True),
    "refresh-50": options(strategy="refresh:50", write_back=False),
    "refresh-10": options(strategy="refresh:10", write_back=False),
    "exhaustive": options(strategy="exhaustive", write_back=False),
    "corrected-mlp": corrected("mlp", hidden=512, write_back=False),  # the paper's setting
    "corrected-ridge": corrected("ridge", write_back=False),
    "mlp-pull-back": corrected("mlp", hidden=128),  # the default
    "ridge-pull-back": corrected("ridge"),
    "ridge-pull-back-query-side": corrected("ridge", normalize=False),
    # the other correctors
    "mean-shift-pull-back": corrected("mean-shift"),
    "orthogonal-pull-back": corrected("orthogonal"),
    "kernel-ridge-pull-back": corrected("kernel-ridge"),
    "ridge-mlp-pull-back": corrected("ridge-mlp"),
    "mlp-32-pull-back": corrected("mlp", hidden=32),
    "mlp-512-pull-back": corrected("mlp", hidden=512),
    "mlp-depth-2-pull-back": corrected("mlp", hidden=128, depth=2),
    "mlp-mse-pull-back": corrected("mlp", hidden=128, loss="mse"),
    "mlp-unnormalised-pull-back": corrected("mlp", hidden=128, normalize=False),
    # ways to select, with the default corrector
    "mlp-gumbel": corrected("mlp", hidden=128, sampler="gumbel"),
    "mlp-mixed": corrected("mlp", hidden=128, sampler="mixed"),
    "mlp-window-32": corrected("mlp", hidden=128, sampler="uniform", range_max=32),
    "mlp-batch-budget": corrected("mlp", hidden=128, budget="batch"),
    "mlp-own-negatives": corrected("mlp", hidden=128, share_negatives=False),
    "mlp-margin": corrected("mlp", hidden=128, relative_margin=0.05),
    "mlp-answer-check": corrected("mlp", hidden=128, answer_check=True),
    "mlp-verify-32": corrected("mlp", hidden=128, candidates=32),
    "mlp-verify-8": corrected("mlp", hidden=128, candidates=8),
    "mlp-background-256": corrected("mlp", hidden=128, background_targets=256),
    "mlp-k4": corrected("mlp", hidden=128, num_negatives=4),
    "mlp-k16": corrected("mlp", hidden=128, num_negatives=16),
    "exhaustive-k4": options(strategy="exhaustive", write_back=False, num_negatives=4),
    "exhaustive-k16": options(strategy="exhaustive", write_back=False, num_negatives=16),
    "exhaustive-gumbel": options(strategy="exhaustive", write_back=False, sampler="gumbel"),
}
BASELINES = (
    "in-batch",
    "uniform",
    "mined-once",
    "stale",
    "refresh-50",
    "refresh-10",
    "corrected-mlp",
    "corrected-ridge",
)
DECIDING = ("stale-write-back", "mlp-pull-back", "ridge-pull-back", "ridge-pull-back-query-side", "exhaustive")
SELECTION = tuple(
    name for name in STRATEGIES if name.startswith(("mlp-", "exhaustive-")) and not name.endswith("pull-back")
)
OTHERS = tuple(name for name in STRATEGIES if name not in (*BASELINES, *DECIDING, "mlp-verify-8"))
DRIFT = (
    "stale",
    "stale-write-back",
    "corrected-mlp",
    "corrected-ridge",
    "mlp-pull-back",
    "ridge-pull-back",
    "exhaustive",
)


TRANSFORMER = (
    "in-batch",
    "mined-once",
    "stale",
    "stale-write-back",
    "mlp-pull-back",
    "ridge-pull-back",
    "mlp-verify-8",
    "refresh-10",
)


class Block(NamedTuple):
    """Every one of some strategies with every one of some seeds."""

    regime: str
    strategies: tuple[str, ...]
    seeds: tuple[int, ...]


PRESETS = {
    "smoke": [
        Block(
            "smoke",
            ("in-batch", "mined-once", "stale-write-back", "mlp-pull-back", "mlp-verify-32", "exhaustive"),
            (0,),
        )
    ],
    "cpu": [
        Block("nq-high-coverage", BASELINES + DECIDING, (0, 1, 2)),
        Block("nq-low-coverage", BASELINES + DECIDING, (0, 1, 2)),
        Block("nq-high-coverage", DECIDING, (3, 4)),
        Block("nq-low-coverage", DECIDING, (3, 4)),
        Block("nq-high-coverage", OTHERS, (0,)),
        Block("nq-low-coverage", OTHERS, (0,)),
        *(Block(name, DECIDING, (0, 1, 2)) for name in ("nq-coverage-0.05", "nq-coverage-15", "nq-medium-coverage")),
        *(Block(name, DRIFT, (0,)) for name in REGIMES if name.startswith("nq-rate-")),
        Block("minilm-2-layers", TRANSFORMER, (0,)),
        Block("minilm-2-layers", ("in-batch", "stale", "stale-write-back", "mlp-pull-back"), (1, 2)),
        Block("minilm-2-layers-lora", ("in-batch", "stale", "stale-write-back", "mlp-pull-back"), (0,)),
        Block("minilm-cpu", TRANSFORMER, (0,)),
    ],
    "gpu": [
        Block(name, (*BASELINES, *DECIDING, "mlp-verify-32"), (0, 1, 2))
        for name in ("minilm-2e-5", "minilm-1e-4", "bert-from-scratch")
    ],
}


def runs(preset: str) -> Iterator[tuple[str, str, int]]:
    """(regime, strategy, seed) of every run of a preset, seed by seed."""
    for regime, strategies, seeds in PRESETS[preset]:
        for seed in seeds:
            for strategy in strategies:
                yield regime, strategy, seed


def command(dataset: str, regime: str, strategy: str, seed: int, results: Path, outputs: Path) -> list[str]:
    """The recipe's command line, relative to the project.

    Args:
        results: the run's JSON.
        outputs: where models and embedding caches go.
    """
    outputs = Path(os.path.relpath(outputs, ROOT))
    # Ways to select share one corrector: it is the correctors whose fidelity is compared.
    probed = seed == 0 and strategy not in ("in-batch", "mined-once") and strategy not in SELECTION
    given = [*REGIMES[regime], *STRATEGIES[strategy], *(PROBES.get(regime, []) if probed else [])]
    return [
        *("recipes/train_nq.py", "--dataset", dataset, *given, "--seed", str(seed), "--disable_tqdm", "true"),
        *(
            "--results",
            os.path.relpath(results, ROOT),
            "--output_dir",
            str(outputs / regime / f"{strategy}-seed{seed}"),
        ),
        *("--caches", str(outputs / "caches")),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="a BEIR folder")
    parser.add_argument("--preset", default="cpu", choices=PRESETS)
    parser.add_argument("--regimes", nargs="+", choices=REGIMES, help="only these of the preset")
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, help="only these of the preset")
    parser.add_argument("--seeds", nargs="+", type=int, help="only these of the preset")
    parser.add_argument("--results", type=Path, default=RESULTS, help="a folder for each regime is made in it")
    parser.add_argument("--outputs", type=Path, default=ROOT / "outputs", help="where models and embedding caches go")
    args = parser.parse_args()
    for regime, strategy, seed in runs(args.preset):
        path = args.results.resolve() / regime / f"{strategy}-seed{seed}.json"
        filters = ((args.regimes, regime), (args.strategies, strategy), (args.seeds, seed))
        if path.exists() or any(only is not None and value not in only for only, value in filters):
            continue
        print(regime, strategy, "seed", seed, flush=True)
        arguments = command(args.dataset, regime, strategy, seed, path, args.outputs.resolve())
        subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
