"""The study: ways to choose negatives, compared on Natural Questions through the same recipe, loss and search.

    python benchmarks/strategies.py --preset smoke --dataset data/nq     # a minute: does everything run?
    python benchmarks/strategies.py --preset cpu --dataset data/nq       # hours on two cores, static encoder
    python benchmarks/strategies.py --preset labels --dataset data/nq    # own pairs and a teacher beside them
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

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
GPU_RESULTS = RESULTS / "gpu" / "study"


def options(**settings: object) -> list[str]:
    """``max_steps=60`` → ``["--max_steps", "60"]``; dictionaries as JSON."""
    texts = {
        name: json.dumps(value) if isinstance(value, (dict, bool)) else str(value) for name, value in settings.items()
    }
    return [part for name, text in texts.items() for part in (f"--{name}", text)]


def on_gpu(**settings: object) -> list[str]:
    """A transformer on all passages, with what keeps a GPU busy: large batches where nothing is learnt, the cache in
    its memory, texts tokenized beside.
    """
    for_gpu = {"bf16": True, "cache_on_device": True, "cache_batch_size": 1_024, "dataloader_num_workers": 2}
    return options(max_seq_length=128, **for_gpu, **settings)


def low_coverage(**settings: object) -> list[str]:
    return on_gpu(**{"max_steps": 100, "per_device_train_batch_size": 32, "num_negatives": 4, **settings})


def high_coverage(**settings: object) -> list[str]:
    return on_gpu(max_steps=300, per_device_train_batch_size=64, num_negatives=8, **settings)


def gold(**settings: object) -> list[str]:
    return options(max_targets=9_383, num_negatives=4, max_seq_length=32) + options(**settings)


def static(**settings: object) -> list[str]:
    return options(encoder="static") + options(**settings)


# Of MiniLM's architecture with random weights; see benchmarks/README.md for what it was chosen by.
FROM_SCRATCH = "1e-4"
# How much of the corpus a run encodes, which decides what write-back can do by itself, and how far the encoder drifts.
REGIMES = {
    "smoke": static(max_targets=9_400, max_steps=4, per_device_train_batch_size=8, num_negatives=2, logging_steps=2),
    "nq-high-coverage": static(max_targets=30_000, max_steps=300, num_negatives=8),
    "nq-medium-coverage": static(),
    "nq-low-coverage": static(max_steps=60, per_device_train_batch_size=32, num_negatives=8),
    "labels-high-coverage": static(max_targets=30_000, max_steps=300, num_negatives=8),
    # Settings are chosen here: on 1,000 of the training questions, which nothing that is reported is measured on.
    "labels-choice": static(max_targets=30_000, max_steps=300, num_negatives=8, hold_out=1_000),
    "labels-low-coverage": static(max_steps=60, per_device_train_batch_size=32, num_negatives=8),
    # At 64 questions a step, 112 steps are an epoch.
    **{
        f"labels-epochs-{epochs}": static(max_targets=30_000, max_steps=round(112 * epochs), num_negatives=8)
        for epochs in (0.25, 0.5, 1, 2, 4, 10)
    },
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
    # The same on all passages, of which a run encodes few: encoding them all once takes longer than training.
    "minilm-2-layers-all-passages": options(
        **{"num_layers": 2, "num_negatives": 4, "max_seq_length": 32},
        **{"max_steps": 100, "per_device_train_batch_size": 32, "learning_rate": "5e-4"},
    ),
    # All passages, with a GPU. What decides is low coverage where the encoder learns and drifts: MiniLM's first layers.
    "minilm-2-layers-low-coverage": low_coverage(num_layers=2, learning_rate="5e-4"),
    "minilm-2-layers-high-coverage": high_coverage(num_layers=2, learning_rate="5e-4"),
    # From random weights it takes more steps to learn anything: with one negative a question they are of low coverage.
    "bert-from-scratch-low-coverage": low_coverage(
        from_scratch=True, learning_rate=FROM_SCRATCH, max_steps=600, num_negatives=1
    ),
    "bert-from-scratch": high_coverage(from_scratch=True, learning_rate=FROM_SCRATCH),
    **{f"minilm-{rate}-low-coverage": low_coverage(learning_rate=rate) for rate in ("1e-4", "2e-5")},
    **{f"minilm-{rate}": high_coverage(learning_rate=rate) for rate in ("1e-4", "2e-5")},
}
# Fidelity is measured with seed 0 alone, over the whole corpus where the encoder is cheap; at intervals that are no
# multiple of those of the refreshes, right after which it is 1.
PROBES = {
    "smoke": options(probe_every=2, probe_targets=100),
    "nq-high-coverage": options(probe_every=19, probe_targets=30_000),
    "minilm-cpu": options(probe_every=19, probe_targets=1_000),
    "minilm-2-layers": options(probe_every=19, probe_targets=9_383),
    "minilm-2-layers-lora": options(probe_every=19, probe_targets=9_383),
    "minilm-2-layers-all-passages": options(probe_every=19, probe_targets=10_000),
    "nq-low-coverage": options(probe_every=7, probe_targets=99_471),
    **{
        f"nq-rate-{rate}": options(probe_every=10, probe_targets=10_000)
        for rate in ("1e-4", "3e-4", "1e-3", "3e-3", "1e-2")
    },
    **{
        name: options(probe_every=19, probe_targets=99_471)
        for name in ("minilm-2-layers-low-coverage", "minilm-1e-4-low-coverage", "minilm-2e-5-low-coverage")
    },
    **{
        name: options(probe_every=37, probe_targets=99_471)
        for name in ("minilm-2-layers-high-coverage", "minilm-1e-4", "minilm-2e-5", "bert-from-scratch")
    },
    "bert-from-scratch-low-coverage": options(probe_every=59, probe_targets=99_471),
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
    "kernel-ridge-pull-back": corrected("kernel-ridge"),
    "ridge-mlp-pull-back": corrected("ridge-mlp"),
    "mlp-32-pull-back": corrected("mlp", hidden=32),
    "mlp-512-pull-back": corrected("mlp", hidden=512),
    "mlp-depth-2-pull-back": corrected("mlp", hidden=128, depth=2),
    "mlp-mse-pull-back": corrected("mlp", hidden=128, loss="mse"),
    "mlp-unnormalised-pull-back": corrected("mlp", hidden=128, normalize=False),
    # ways to select, with the default corrector
    "mlp-gumbel": corrected("mlp", hidden=128, sampler="gumbel"),
    "mlp-window-32": corrected("mlp", hidden=128, sampler="uniform", range_max=32),
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


# With a GPU: whether correcting gains anything over write-back alone, what lies below and above both, and what else.
DECISIVE = ("stale-write-back", "mlp-pull-back", "corrected-mlp")
BESIDE = ("stale", "in-batch", "ridge-pull-back")
DEAR = ("mined-once", "mlp-verify-32", "refresh-50", "refresh-10")


class Block(NamedTuple):
    """Every one of some strategies with every one of some seeds."""

    regime: str
    strategies: tuple[str, ...]
    seeds: tuple[int, ...]


# What a target hears besides: the corpus's own questions, a teacher's labels, both (--preset labels).
LABELLED = ("in-batch", "mined-once", "stale", "stale-write-back", "mlp-pull-back", "exhaustive")
OWN = options(own_pairs_share=0.36)
TEACHER = options(teacher_model="default", teacher_max_seq_length=96)
# Where nothing is chosen from the corpus, how far a teacher is to be trusted is not found out: as it is elsewhere.
TRUSTED = options(teacher_weight=4, teacher_scale=10)
for name in LABELLED:
    taught = TEACHER + (TRUSTED if name in ("in-batch", "mined-once") else [])
    added = {"own-pairs": OWN, "teacher": taught, "own-pairs-teacher": OWN + taught}
    STRATEGIES |= {f"{name}-{kind}": STRATEGIES[name] + given for kind, given in added.items()}


# What was chosen among.
CHOICES = {
    **{f"own-pairs-{share}": options(own_pairs_share=share) for share in (0.25, 0.36, 0.5)},
    "own-pairs-first-sentence": options(own_pairs_share=0.36, own_question="first_sentence"),
    **{
        f"teacher-weight-{weight}-scale-{scale}": TEACHER + options(teacher_weight=weight, teacher_scale=scale)
        for weight, scale in ((1, 7), (1, 10), (1, 15), (1, 20), (2, 10), (4, 10), (8, 10))
    },
    "teacher": TEACHER,
}
STRATEGIES |= {f"mlp-pull-back-{name}": STRATEGIES["mlp-pull-back"] + given for name, given in CHOICES.items()}


def _labelled(name: str) -> tuple[str, ...]:
    """A strategy with the corpus's own pairs, with a teacher, with both."""
    return tuple(f"{name}-{kind}" for kind in ("own-pairs", "teacher", "own-pairs-teacher"))


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
        Block("minilm-2-layers-all-passages", ("stale-write-back", "mlp-pull-back", "stale", "in-batch"), (0, 1, 2)),
        Block("minilm-2-layers-all-passages", ("corrected-mlp", "mlp-verify-8", "ridge-pull-back"), (0, 1, 2)),
        Block("minilm-2-layers-all-passages", ("refresh-10", "refresh-50", "mined-once"), (0,)),
        Block("minilm-2-layers-lora", ("in-batch", "stale", "stale-write-back", "mlp-pull-back"), (0,)),
        Block("minilm-cpu", TRANSFORMER, (0,)),
    ],
    # The most telling first, seed by seed: what own pairs and a teacher give beside the default and exhaustive.
    "labels": [
        Block("labels-choice", ("mlp-pull-back", *(f"mlp-pull-back-{name}" for name in CHOICES)), (0, 1)),
        Block("labels-high-coverage", ("mlp-pull-back", *_labelled("mlp-pull-back"), "exhaustive"), (0, 1, 2)),
        Block("labels-high-coverage", ("in-batch", *_labelled("in-batch"), "stale-write-back"), (0, 1, 2)),
        Block("labels-high-coverage", (*_labelled("stale-write-back"), "stale", *_labelled("stale")), (0, 1, 2)),
        Block("labels-high-coverage", ("mined-once", *_labelled("mined-once"), *_labelled("exhaustive")), (0, 1, 2)),
        Block("labels-low-coverage", ("mlp-pull-back", *_labelled("mlp-pull-back"), "exhaustive"), (0, 1, 2)),
        Block("labels-low-coverage", ("in-batch", *_labelled("in-batch"), "stale-write-back"), (0, 1, 2)),
        Block("labels-low-coverage", (*_labelled("stale-write-back"), "stale", *_labelled("stale")), (0, 1, 2)),
        Block("labels-low-coverage", ("mined-once", *_labelled("mined-once"), *_labelled("exhaustive")), (0, 1, 2)),
        *(
            Block(
                f"labels-epochs-{epochs}",
                (*"mlp-pull-back", *_labelled("mlp-pull-back"), "stale-write-back", "exhaustive"),
                (0, 1, 2),
            )
            for epochs in (1, 10, 0.25, 0.5, 2, 4)
        ),
        *(
            Block(regime, tuple(each for name in LABELLED for each in (name, *_labelled(name))), (3, 4))
            for regime in ("labels-high-coverage", "labels-low-coverage")
        ),
    ],
    # The most telling first: whatever time there is, it buys these. Verifying 8 needs fewer negatives than 8.
    "gpu": [
        Block("minilm-2-layers-low-coverage", ("exhaustive", *DECISIVE, "mlp-verify-8", *BESIDE), (0,)),
        Block("minilm-2-layers-low-coverage", (*DECISIVE, "mlp-verify-8", "stale"), (1, 2)),
        Block("bert-from-scratch-low-coverage", ("refresh-10", *DECISIVE, "mlp-verify-8", *BESIDE), (0,)),
        Block("minilm-1e-4-low-coverage", (*DECISIVE, "mlp-verify-8", *BESIDE), (0,)),
        Block("minilm-2-layers-high-coverage", (*DECISIVE, "mlp-verify-32", *BESIDE), (0,)),
        Block("bert-from-scratch-low-coverage", (*DECISIVE, "mlp-verify-8", "stale"), (1, 2)),
        Block("minilm-2-layers-low-coverage", ("exhaustive",), (1, 2)),
        Block("minilm-2-layers-low-coverage", (*BESIDE, *DEAR), (0, 1, 2)),
        *(
            Block(name, (*DECISIVE, *BESIDE, *DEAR), (0,))
            for name in ("bert-from-scratch", "minilm-1e-4", "minilm-2e-5")
        ),
        Block("minilm-2e-5-low-coverage", (*DECISIVE, "mlp-verify-8", *BESIDE), (0,)),
        Block("minilm-2-layers-high-coverage", (*DECISIVE, "mlp-verify-32", *BESIDE, *DEAR), (0, 1, 2)),
        *(Block(name, (*DECISIVE, *BESIDE), (1, 2)) for name in ("minilm-1e-4-low-coverage", "bert-from-scratch")),
    ],
}


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
        *("recipes/train_nq.py", "--dataset", dataset, *REGIMES[run.regime], *STRATEGIES[run.strategy], *probes),
        *(tiny(bool(probes)) if smoke else ()),
        *("--seed", str(run.seed), "--disable_tqdm", "true"),
        *("--output_dir", str(run.outputs(outputs)), "--caches", str(outputs / "caches")),
    ]


def tiny(probed: bool) -> list[str]:
    """What is given last counts: a few short steps, on a CPU where there is no GPU."""
    import torch

    return options(
        **{"max_targets": 9_400, "max_seq_length": 32, "max_steps": 12, "per_device_train_batch_size": 8},
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
        path = run.results(self.results)
        path.parent.mkdir(parents=True, exist_ok=True)
        # There whole or not at all: what is there is not run again.
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, path)
        self.done[run] = figures
        print(f"ends: {run}, MRR@10 {100 * figures['after']['mrr@10']:.1f}, {seconds:.0f} s", flush=True)


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
        help="a folder for each regime is made in it; by default benchmarks/results, gpu/study and "
        "labels in it for these presets, and outputs/smoke-results with --smoke",
    )
    parser.add_argument("--outputs", type=Path, default=ROOT / "outputs", help="where models and embedding caches go")
    args = parser.parse_args()
    if args.at_once < 1:
        parser.error("--at_once must be at least 1")
    results = args.results or (
        ROOT / "outputs" / "smoke-results"
        if args.smoke
        else {"gpu": GPU_RESULTS, "labels": RESULTS / "labels"}.get(args.preset, RESULTS)
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
