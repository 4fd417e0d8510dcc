"""The study: ways to choose negatives, compared on Natural Questions through the same recipe, loss and search.

    python benchmarks/strategies.py --preset smoke --dataset data/nq     # a minute: does everything run?
    python benchmarks/strategies.py --preset cpu --dataset data/nq       # hours on two cores, static encoder
    python benchmarks/strategies.py --preset labels --dataset data/nq    # own pairs and a teacher beside them
    python benchmarks/strategies.py --preset evidence --dataset data/nq  # three corpora, what one would pick instead
    python benchmarks/strategies.py --preset gpu --dataset data/nq --at_once 4 --minutes 9     # transformers

Each run is the recipe itself, in a process of its own, and leaves one JSON with its figures and its command. Runs whose
JSON is there are skipped, so the study goes on where it was stopped; `python benchmarks/report.py` makes the report.
The order is that of what they tell. `--smoke` makes every run of a preset tiny: its figures are no results.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from presets import PRESETS, PROBES, REGIMES, SELECTION, STRATEGIES, options

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
GPU_RESULTS = RESULTS / "gpu" / "study"


class Run(NamedTuple):
    """One training run."""

    regime: str
    strategy: str
    seed: int

    def __str__(self) -> str:
        return f"{self.regime} {self.strategy} seed {self.seed}"

    def results(self, folder: Path) -> Path:
        """Its JSON."""
        return folder / self.regime / f"{self.strategy}-seed{self.seed}.json"

    def sealed(self, folder: Path) -> Path:
        """What it scored on test questions, which a report reads only when it is told to."""
        return folder / "sealed" / self.regime / f"{self.strategy}-seed{self.seed}.json"

    def outputs(self, folder: Path) -> Path:
        """Where its model goes, and what it prints."""
        return folder / self.regime / f"{self.strategy}-seed{self.seed}"


def runs(preset: str) -> Iterator[Run]:
    """Every run of a preset once, block by block and seed by seed."""
    return iter(
        dict.fromkeys(
            Run(regime, strategy, seed)
            for regime, strategies, seeds in PRESETS[preset]
            for seed in seeds
            for strategy in strategies
        )
    )


def command(dataset: str, run: Run, outputs: Path, smoke: bool = False) -> list[str]:
    """The recipe's command line, relative to the project.

    Args:
        outputs: where models, embedding caches and the recipe's own JSON go.
        smoke: whether the run is made tiny.
    """
    outputs = Path(os.path.relpath(outputs, ROOT))
    # Ways to select share one corrector: it is the correctors whose fidelity is compared.
    probed = run.seed == 0 and run.strategy not in ("in-batch", "mined-once") and run.strategy not in SELECTION
    probes = PROBES.get(run.regime, []) if probed else []
    return [
        # Where a strategy says nothing of own pairs, it has none: they are columns of their own.
        *("recipes/train_nq.py", "--dataset", dataset, "--own_pairs_share", "0"),
        *(*REGIMES[run.regime], *STRATEGIES[run.strategy], *probes),
        *(tiny(bool(probes), is_static="static" in REGIMES[run.regime]) if smoke else ()),
        *("--seed", str(run.seed), "--disable_tqdm", "true"),
        *("--output_dir", str(run.outputs(outputs)), "--caches", str(outputs / "caches")),
    ]


def tiny(probed: bool, is_static: bool) -> list[str]:
    """What is given last counts: a few short steps, on a CPU where there is no GPU."""
    import torch

    return options(
        **{"max_targets": 9_400, "max_steps": 12, "per_device_train_batch_size": 8},
        **({} if is_static else {"max_seq_length": 32}),
        **{"logging_steps": 4, "cache_batch_size": 64, "use_cpu": not torch.cuda.is_available()},
        **({"probe_every": 7, "probe_targets": 100} if probed else {}),
    )


class Study:
    """Runs side by side, each in a process of its own.

    Args:
        dataset, results, outputs, smoke: see :func:`command` and ``--help``.
        at_once: how many, at most.
        minutes: after these none is started, nor one that would probably not end before.
    """

    def __init__(
        self, dataset: str, results: Path, outputs: Path, smoke: bool, at_once: int, minutes: float | None
    ) -> None:
        self.dataset, self.results, self.outputs, self.smoke = dataset, results, outputs, smoke
        self.at_once, self.minutes = at_once, minutes
        self.done: dict[Run, dict] = {}
        """What runs have found, now and before."""
        self.failed: list[Run] = []
        self._running: dict[Run, tuple[subprocess.Popen, float]] = {}
        self._began = time.monotonic()

    def carry_out(self, wanted: list[Run]) -> list[Run]:
        """Make those that are missing; returns those for which there was no time."""
        for run in wanted:
            if (path := run.results(self.results)).exists():
                self.done[run] = json.loads(path.read_text(encoding="utf-8"))
        waiting = [run for run in wanted if run not in self.done]
        worked = len(self.done)
        try:
            while True:
                # Where the first ones fail, all would.
                is_broken = len(self.failed) >= self.at_once and len(self.done) == worked
                for run in [] if is_broken else list(waiting):
                    if len(self._running) == self.at_once:
                        break
                    if self._has_time(run):
                        waiting.remove(run)
                        self._start(run)
                if not self._running:
                    return waiting
                time.sleep(0.2)
                for run, (process, began) in list(self._running.items()):
                    if process.poll() is not None:
                        del self._running[run]
                        self._end(run, process.returncode, time.monotonic() - began)
        finally:
            for process, _ in self._running.values():
                process.terminate()
            for process, _ in self._running.values():
                process.wait()

    def _has_time(self, run: Run) -> bool:
        if self.minutes is None:
            return True
        return time.monotonic() - self._began + expected_seconds(run, self.done) <= 60 * self.minutes

    def _start(self, run: Run) -> None:
        # Set to true, tokenizing in parallel hangs in the data loader's processes; unset, it is left off there alone.
        environment = {name: value for name, value in os.environ.items() if name != "TOKENIZERS_PARALLELISM"}
        if self.at_once > 1:  # else each would take all cores
            environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self.at_once)))
        arguments = command(self.dataset, run, self.outputs, self.smoke)
        folder = run.outputs(self.outputs)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "log.txt").open("w") as log:
            process = subprocess.Popen(
                [sys.executable, *arguments], cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
            )
        self._running[run] = (process, time.monotonic())
        print("begins:", run, flush=True)

    def _end(self, run: Run, status: int, seconds: float) -> None:
        folder = run.outputs(self.outputs)
        if status:
            self.failed.append(run)
            said = (folder / "log.txt").read_text(errors="replace").splitlines()[-15:]
            print(f"FAILS ({status}): {run}", *said, sep="\n    ", flush=True)
            return
        figures = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        figures["seconds"]["process"] = round(seconds, 1)
        figures["at_once"] = self.at_once
        if test := figures.pop("test", None):
            told = {name: figures[name] for name in ("strategy", "seed", "command", "versions")}
            _write(run.sealed(self.results), {"test": test, "ranks": figures["ranks"].pop("test"), **told})
        _write(run.results(self.results), figures)
        self.done[run] = figures
        print(f"ends: {run}, MRR@10 {100 * figures['after']['mrr@10']:.1f}, {seconds:.0f} s", flush=True)


def _write(path: Path, figures: Mapping) -> None:
    """There whole or not at all: what is there is not run again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


def expected_seconds(run: Run, done: Mapping[Run, Mapping]) -> float:
    """What a run will take, judged by those that are done: the longest of its regime and strategy. Else the longest of
    its regime (or of all), and each time that it re-embeds the corpus as long as an evaluation, which encodes it, too.
    """
    of_regime = {other: figures for other, figures in done.items() if other.regime == run.regime} or done
    alike = [figures for other, figures in of_regime.items() if other[:2] == run[:2]]
    longest = max(map(process_seconds, alike or of_regime.values()), default=0.0)
    every = {"exhaustive": 1, "refresh-10": 10, "refresh-50": 50}.get(run.strategy)
    if alike or every is None:
        return longest
    refreshing = (each["steps"] // every * each["seconds"]["evaluate"] for each in of_regime.values())
    return longest + max(refreshing, default=0.0)


def process_seconds(figures: Mapping) -> float:
    """Of a whole run; the first ones have noted its parts alone."""
    seconds = figures["seconds"]
    return seconds.get("process") or sum(value for part, value in seconds.items() if part != "probe")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="a BEIR folder")
    parser.add_argument("--preset", default="cpu", choices=PRESETS)
    parser.add_argument("--regimes", nargs="+", choices=REGIMES, help="only these of the preset")
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, help="only these of the preset")
    parser.add_argument("--seeds", nargs="+", type=int, help="only these of the preset")
    parser.add_argument("--smoke", action="store_true", help="make every run tiny: does it work?")
    parser.add_argument("--at_once", type=int, default=1, help="runs side by side; their seconds compare only roughly")
    parser.add_argument("--minutes", type=float, help="start no run after these, nor one that would not end before")
    parser.add_argument(
        "--results",
        type=Path,
        help="a folder for each regime is made in it; by default benchmarks/results, gpu/study, labels and evidence "
        "in it for these presets, and outputs/smoke-results with --smoke",
    )
    parser.add_argument("--outputs", type=Path, default=ROOT / "outputs", help="where models and embedding caches go")
    args = parser.parse_args()
    if args.at_once < 1:
        parser.error("--at_once must be at least 1")
    results = args.results or (
        ROOT / "outputs" / "smoke-results"
        if args.smoke
        else {"gpu": GPU_RESULTS, **{name: RESULTS / name for name in ("labels", "evidence")}}.get(args.preset, RESULTS)
    )
    wanted = [
        run
        for run in runs(args.preset)
        if all(
            only is None or value in only
            for only, value in zip((args.regimes, args.strategies, args.seeds), run, strict=True)
        )
    ]
    # The runs are ended with the study.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    study = Study(args.dataset, results.resolve(), args.outputs.resolve(), args.smoke, args.at_once, args.minutes)
    left = study.carry_out(wanted)
    if left:
        print(f"Left, {len(left)} runs:", *left, sep="\n    ")
    if study.failed:
        sys.exit("Failed:\n    " + "\n    ".join(map(str, study.failed)))


if __name__ == "__main__":
    main()
