"""What a training step costs, part by part, against one of sentence-transformers' own loss that encodes as many texts.

    python benchmarks/step.py --dataset data/nq                                # all-MiniLM-L6-v2, minutes on two cores
    torchrun --nproc_per_node 2 benchmarks/step.py --dataset data/nq --encoder static
    python benchmarks/step.py --dataset data/nq --preset gpu                   # up to 21 million targets, on one GPU
    python benchmarks/step_report.py                                           # the page, from all results

Both losses train the same model turn by turn, with one optimizer: the corrected one chooses negatives among all
targets and encodes them; then ``MultipleNegativesRankingLoss`` (with ``--mini_batch_size`` its cached twin) gets the
same queries, positives and negatives as columns (the last column is filled up: a few texts more, which is counted). A
step is forward, backward and optimizer; tokenizing queries and positives is a data loader's work and is not counted,
gathering the negatives' token ids is. The model is prepared as the trainer prepares it, with accelerate's autocast and
``torch.compile``; but TF32, which the trainer's arguments switch on with the latter, stays off: beside autocast it
would change the search alone.

Where more targets are wanted than there are, they are passages again and again, each time behind another word. The
cache holds what the encoder says of the passages, again and again, each time with other noise: what is selected depends
on it, what it costs does not.

A preset's settings are measured one after another, each in a process of its own, and what has its JSON is not measured
again. Options that are given replace those of its settings, to try it out.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import os
import signal
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator
from selection import machine
from selection_vectors import tiled
from selection_ways import clock
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Normalize
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.sentence_transformer.modules import Pooling
from sentence_transformers.util import batch_to_device
from tiled_corpus import TiledCorpus, single_tokens
from torch import Tensor
from torch._dynamo.utils import counters

from st_corrector import (
    CachedCorrectedMultipleNegativesLoss,
    Corpus,
    CorrectedMultipleNegativesLoss,
    EmbeddingCache,
    MLPCorrector,
)
from st_corrector.cache.shard import DTYPES, Shard
from st_corrector.data.encoding import DocumentEncoder
from st_corrector.losses.step_metrics import StepMetrics
from st_corrector.storage.files import whole
from st_corrector.storage.fingerprint import digest_json

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "recipes"))
from common import default_model, static_encoder  # noqa: E402

PASSAGES = 20_000
WARM_UP = 3  # turns
MOST_WARM_UP = 24  # turns, where each compiles something again


class Setting(NamedTuple):
    """What is measured at once; names are those of the trainer's arguments."""

    encoder: str = "transformer"
    targets: int | None = None  # by default all of the data set's
    cache_dtype: str = "float32"
    cache_on_device: bool = True
    bf16: bool = False
    torch_compile: bool = False
    batch_size: int = 32  # of all processes together
    num_negatives: int = 4
    max_seq_length: int = 64
    mini_batch_size: int | None = None  # with gradient caching
    steps: int = 8

    def options(self) -> list[str]:
        """The command line's options for what differs from the defaults."""
        given = {name: value for name, value in self._asdict().items() if value != self._field_defaults[name]}
        return [
            part
            for name, value in given.items()
            for part in (
                [f"--{name}" if value else f"--no-{name}"] if isinstance(value, bool) else [f"--{name}", str(value)]
            )
        ]

    def name(self, device: str, processes: int) -> str:
        """Of its JSON: device, encoder, processes, and what else differs from the defaults."""
        rest = self._replace(encoder=Setting().encoder, steps=Setting().steps).options()
        return "-".join([device, self.encoder, str(processes), *(part.removeprefix("--") for part in rest)])


# Counted on a CPU, activations of 64 queries with 8 negatives each take 26 to 33 GB of BERT-base; the cache is 32 GB.
BERT = Setting("bert-base", 21_000_000, "bfloat16", bf16=True, batch_size=64, num_negatives=8, max_seq_length=128)
MINILM = BERT._replace(encoder="transformer", batch_size=128)
PRESETS = {
    "cpu": [Setting("static"), Setting()],
    # The most telling first.
    "gpu": [
        BERT,
        MINILM,
        BERT._replace(targets=1_000_000),
        MINILM._replace(targets=1_000_000),
        BERT._replace(batch_size=1_024, mini_batch_size=128, steps=4),
        BERT._replace(targets=1_000_000, bf16=False),
        BERT._replace(cache_on_device=False),
        BERT._replace(cache_dtype="int8"),
        # How long it takes until nothing is left to compile is not known beforehand.
        MINILM._replace(targets=1_000_000, torch_compile=True),
        BERT._replace(torch_compile=True),
    ],
}


# ---------------------------------------------------------------------- what is trained, and on what


def make_encoder(setting: Setting) -> SentenceTransformer:
    if setting.encoder == "static":
        return static_encoder(default_model(), 0)
    model = SentenceTransformer(default_model(), device="cpu")
    if setting.encoder == "bert-base":
        model = as_large_as_bert_base(model)
    model.max_seq_length = setting.max_seq_length
    # Loading leaves it in eval mode, without dropout.
    return model.train()


def as_large_as_bert_base(model: SentenceTransformer) -> SentenceTransformer:
    """all-MiniLM-L6-v2 with every coordinate twice, which changes nothing of what it says, and every layer twice, which
    changes little: BERT-base's 12 layers of 768 dimensions.

    Random weights would say nearly the same of all texts, so that all queries of a batch would choose the same few
    negatives, and a step would encode too few texts. These choose as a retriever does.
    """
    small = model.transformers_model
    config = copy.deepcopy(small.config)
    config.update(
        {name: 2 * getattr(config, name) for name in ("hidden_size", "intermediate_size", "num_hidden_layers")}
    )
    state: dict[str, Tensor] = {}
    for name, value in small.state_dict().items():
        before, layer, after = name.partition(".layer.")
        number, _, parameter = after.partition(".")
        twice = [f"{before}{layer}{2 * int(number) + n}.{parameter}" for n in (0, 1)] if layer else [name]
        state |= dict.fromkeys(twice, twice_as_wide(name, value))
    large = type(small)(config)
    large.load_state_dict(state)
    model[0].model = large
    return SentenceTransformer(modules=[model[0], Pooling(config.hidden_size), Normalize()], device="cpu")


def twice_as_wide(name: str, value: Tensor) -> Tensor:
    """A parameter of a BERT for hidden states whose every coordinate stands twice."""
    if not value.is_floating_point():
        return value
    if ".query." in name:
        value = value / 2**0.5  # of a product of heads that are twice as wide, the square root of that is taken off
    if value.ndim > 1:
        value = value.repeat_interleave(2, 1)
        return value if "embeddings" in name else value.repeat_interleave(2, 0) / 2
    return value.repeat_interleave(2)


def make_corpus(dataset: str, targets: int | None, model: SentenceTransformer) -> tuple[Corpus, Corpus]:
    """As many targets as are wanted; and the first of them alone, or as many as the cache's vectors are made of."""
    corpus = Corpus.from_beir(dataset)
    first = Corpus.from_beir(dataset, max_targets=min(PASSAGES, targets or PASSAGES))
    if targets is None or targets == len(corpus):
        return corpus, first
    if targets < len(corpus):
        return Corpus.from_beir(dataset, max_targets=targets), first
    tiles = TiledCorpus(first, targets, single_tokens(model, -(-targets // len(first))))
    return tiles, tiles.passages


def make_cache(vectors: Tensor, rows: int, setting: Setting, device: torch.device) -> EmbeddingCache:
    """A cache of ``rows`` vectors: made on ``device``, and kept there in one piece, or in memory in shards, as one on
    disk is.
    """
    dtype = DTYPES[setting.cache_dtype]
    blocks = tiled(vectors, rows, device)
    if setting.cache_on_device:
        return EmbeddingCache.from_blocks(blocks, dtype, rows=rows)
    return EmbeddingCache([Shard.store(block, dtype).map(Tensor.cpu) for block in blocks])


# ---------------------------------------------------------------------- measuring


class Step:
    """One loss, and the optimizer of the model that it trains."""

    def __init__(self, loss: Any, optimizer: torch.optim.Optimizer, accelerator: Accelerator) -> None:
        self.loss, self.optimizer, self.accelerator = loss, optimizer, accelerator
        self.metrics = StepMetrics()

    def __call__(self, features: list[dict[str, Any]], labels: Tensor) -> dict[str, float]:
        """Seconds of the step, and of what comes after the loss; on a GPU the most bytes that it takes beyond what is
        held before it.
        """
        device = self.accelerator.device
        held = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = clock(device.type)
        value = self.loss([dict(each) for each in features], labels)
        value = sum(value.values()) if isinstance(value, dict) else value
        # No part is waited for, so that the CPU can run ahead of the GPU, as in training.
        with self.metrics.timed("backward", device):
            self.accelerator.backward(value)
        with self.metrics.timed("optimizer", device):
            self.optimizer.step()
            self.optimizer.zero_grad()
        found = {"step": clock(device.type) - start}
        found |= {name.removeprefix("seconds_"): seconds for name, seconds in self.metrics.pop().items()}
        return found | ({"bytes": torch.cuda.max_memory_allocated() - held} if device.type == "cuda" else {})


class Pair:
    """Both losses of one model, and what they are given."""

    def __init__(
        self,
        setting: Setting,
        model: SentenceTransformer,
        wrapped: torch.nn.Module,
        corpus: Corpus,
        cache: EmbeddingCache,
        accelerator: Accelerator,
    ) -> None:
        self.model, self.accelerator = model, accelerator
        corrector = MLPCorrector(cache.dim, hidden=128)
        if setting.mini_batch_size is None:
            self.loss = CorrectedMultipleNegativesLoss(model, corpus, cache, setting.num_negatives, corrector)
            plain = MultipleNegativesRankingLoss(model)
        else:
            size = setting.mini_batch_size
            self.loss = CachedCorrectedMultipleNegativesLoss(
                model, corpus, cache, setting.num_negatives, corrector, mini_batch_size=size
            )
            plain = CachedMultipleNegativesRankingLoss(model, mini_batch_size=size)
        self.loss.model = plain.model = wrapped
        optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-5, fused=True)  # the trainer's own default
        self.ours, self.theirs = Step(self.loss, optimizer, accelerator), Step(plain, optimizer, accelerator)
        self._encoded: list[np.ndarray] = []
        self._features = self.loss.encoder.features
        self.loss.encoder.features = self._noting  # type: ignore[method-assign]

    def _noting(self, rows: np.ndarray, device: Any = None) -> dict[str, Any]:
        self._encoded.append(rows)
        return self._features(rows, device)

    def turn(self, batch: dict[str, list[Any]]) -> dict[str, float]:
        """A step of each, and what became of them; ``batch`` is this process's own."""
        device, graphs = self.accelerator.device, counters["stats"]["unique_graphs"]
        labels = torch.tensor(batch["label"], device=device)
        columns = [batch_to_device(self.model.preprocess(batch[name]), device) for name in ("anchor", "positive")]
        self._encoded.clear()
        ours = self.ours(columns, labels)
        parts = self.loss.pop_metrics()
        (rows,) = self._encoded
        # The same negatives as columns, the last of them filled up.
        filled = np.resize(rows, (-(-len(rows) // len(labels)), len(labels)))
        negatives = [self._features(column, device) for column in filled]
        theirs = self.theirs([*columns, *negatives], labels)
        texts, of_theirs = 2 * len(labels) + len(rows), 2 * len(labels) + filled.size
        return {
            **{f"ours_{name}": value for name, value in ours.items()},
            **{name.removeprefix("seconds_"): parts[name] for name in parts if name.startswith("seconds_")},
            "bytes_exchanged": parts.get("bytes_exchanged", 0.0),
            "texts": texts,
            **{f"reference_{name}": value for name, value in theirs.items()},
            "reference_texts": of_theirs,
            "overhead": ours["step"] / texts / (theirs["step"] / of_theirs) - 1,
            **({"bytes_held": torch.cuda.memory_allocated()} if device.type == "cuda" else {}),
            "graphs_compiled": counters["stats"]["unique_graphs"] - graphs,
        }


def measured(turns: Iterator[dict[str, float]], steps: int) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """The turns that warm up, and so many that count: a turn that compiles something is one to warm up, until there are
    :data:`MOST_WARM_UP` of these. After that it counts, as it would in training.
    """
    warm_up, counted = [next(turns) for _ in range(WARM_UP)], []
    while len(counted) < steps:
        counted.append(next(turns))
        if counted[-1]["graphs_compiled"] and len(warm_up) + len(counted) <= MOST_WARM_UP:
            warm_up, counted = warm_up + counted, []
    return warm_up, counted


def measure(setting: Setting, dataset: str, outputs: Path) -> dict[str, Any]:
    on_gpu = torch.cuda.is_available()
    accelerator = Accelerator(
        cpu=not on_gpu,
        mixed_precision="bf16" if setting.bf16 else "no",
        dynamo_backend="inductor" if setting.torch_compile else "no",
    )
    torch.manual_seed(0)
    model = make_encoder(setting)
    corpus, first = make_corpus(dataset, setting.targets, model)
    wrapped = accelerator.prepare_model(model)
    device = accelerator.device
    fingerprint = DocumentEncoder(model, first).fingerprint(model)
    folder = outputs / f"passages-{digest_json([fingerprint, setting.bf16])[:12]}"
    passages = EmbeddingCache.build(model, first, folder, batch_size=256)
    cache = make_cache(passages[range(len(passages))], len(corpus), setting, device)
    pair = Pair(setting, model, wrapped, corpus, cache, accelerator)

    pairs, own = corpus.pairs("train"), setting.batch_size // accelerator.num_processes

    def turns() -> Iterator[dict[str, float]]:
        start = accelerator.process_index * own
        while True:
            yield pair.turn(pairs[[n % len(pairs) for n in range(start, start + own)]])
            start += setting.batch_size

    warm_up, counted = measured(turns(), setting.steps)
    medians = {name: statistics.median(turn[name] for turn in counted) for name in counted[0]}
    result = {
        **setting._asdict(),
        "targets": len(corpus),
        "dim": cache.dim,
        "cache_bytes": cache.nbytes,
        "processes": accelerator.num_processes,
        "threads_of_each": torch.get_num_threads(),
        "medians": medians,
        "overheads": [turn["overhead"] for turn in counted],
        "turns": {"to_warm_up": warm_up, "counted": counted},
        "machine": machine(device.type),
        "command": command(setting, dataset, accelerator.num_processes),
    }
    if setting.torch_compile:
        # What the first turns took beyond what one takes: with the rest of what is done once.
        usual = medians["ours_step"] + medians["reference_step"]
        result["seconds_to_compile"] = sum(turn["ours_step"] + turn["reference_step"] - usual for turn in warm_up)
    return result


# ---------------------------------------------------------------------- running


def command(setting: Setting, dataset: str, processes: int) -> str:
    """The command line of this setting alone."""
    launcher = "python" if processes == 1 else f"torchrun --nproc_per_node {processes}"
    return " ".join([launcher, "benchmarks/step.py", "--dataset", dataset, *setting.options()])


def measure_and_keep(setting: Setting, dataset: str, outputs: Path, path: Path) -> None:
    result = measure(setting, dataset, outputs)
    if int(os.environ.get("RANK", 0)) == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as partial:
            partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(json.dumps(result["medians"], indent=1), path, sep="\n", flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()


def measure_each(settings: list[Setting], dataset: str, outputs: Path, folder: Path) -> list[str]:
    """Measure what is not there yet, each in a process of its own, so that what fails, for want of memory say, costs no
    other, and none finds what another has left; returns the names of those that failed.
    """
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["sentence_transformers", "st_corrector"])  # imported once
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("Stopped; the same command goes on."))
    failed = []
    for setting in settings:
        path = folder / f"{setting.name(device(), 1)}.json"
        if path.exists():
            continue
        began = time.monotonic()
        print("begins:", path.stem, flush=True)
        process = processes.Process(target=measure_and_keep, args=(setting, dataset, outputs, path))
        process.start()
        try:
            process.join()
        finally:  # it does not outlive this one, and keep the GPU's memory
            process.terminate()
            process.join()
        if process.exitcode:
            failed.append(path.stem)
        print("FAILS:" if process.exitcode else "ends:", path.stem, f"{time.monotonic() - began:.0f} s", flush=True)
    return failed


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="a BEIR folder")
    parser.add_argument("--preset", choices=PRESETS, help="by default one setting, of the options alone")
    given = parser.add_argument_group("a setting", argument_default=argparse.SUPPRESS)
    given.add_argument("--encoder", choices=("transformer", "static", "bert-base"), help="by default all-MiniLM-L6-v2")
    given.add_argument("--targets", type=int, help="by default all of the data set's")
    given.add_argument("--cache_dtype", choices=DTYPES)
    given.add_argument(
        "--cache_on_device", action=argparse.BooleanOptionalAction, help="else it is streamed from memory"
    )
    given.add_argument("--bf16", action=argparse.BooleanOptionalAction, help="autocast the encoder")
    given.add_argument("--torch_compile", action=argparse.BooleanOptionalAction, help="compile the encoder")
    given.add_argument("--batch_size", type=int, help="of all processes together")
    given.add_argument("--num_negatives", type=int)
    given.add_argument("--max_seq_length", type=int)
    given.add_argument("--mini_batch_size", type=int, help="with gradient caching")
    given.add_argument("--steps", type=int, help=f"that count, after {WARM_UP} or more to warm up")
    where = "benchmarks/results/step, on a GPU benchmarks/results/gpu/step"
    parser.add_argument("--results", type=Path, help=f"by default {where}")
    parser.add_argument("--outputs", type=Path, default=ROOT / "outputs" / "step", help="for the passages' embeddings")
    return parser


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    given = {name: value for name, value in vars(args).items() if name in Setting._fields}
    if args.preset == "gpu" and device() == "cpu" and not given:
        parser.error("torch sees no GPU: see nvidia-smi and torch.version.cuda. Options make it fit a CPU.")
    results = ROOT / "benchmarks" / "results"
    folder = args.results or (results / "gpu" / "step" if device() == "cuda" else results / "step")
    if args.preset and given and not args.results:
        folder = ROOT / "outputs" / "step"  # what is only tried out is no result
    if args.preset is None:
        setting = Setting(**given)
        path = folder / f"{setting.name(device(), int(os.environ.get('WORLD_SIZE', 1)))}.json"
        if path.exists() and not args.results:
            parser.error(f"{path} is there already: remove it, or name another folder by --results.")
        measure_and_keep(setting, args.dataset, args.outputs, path)
        return
    settings = dict.fromkeys(setting._replace(**given) for setting in PRESETS[args.preset])
    if failed := measure_each(list(settings), args.dataset, args.outputs, folder):
        sys.exit("\n    ".join(["Failed:", *failed]))


if __name__ == "__main__":
    main()
