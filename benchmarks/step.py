"""What a training step costs, part by part, against one of sentence-transformers' own loss that encodes as many texts.

    python benchmarks/step.py --dataset data/nq                                # all-MiniLM-L6-v2, minutes on two cores
    torchrun --nproc_per_node 2 benchmarks/step.py --dataset data/nq --encoder static

Both losses train the same model turn by turn: the corrected one chooses negatives among all targets and encodes them;
then ``MultipleNegativesRankingLoss`` gets the same queries, positives and negatives as columns (the last column is
filled up: a few texts more, which is counted). A step is forward, backward and optimizer; tokenizing queries
and positives is a data loader's work and is not counted, gathering the negatives' token ids is. The cache holds real
passages' vectors, repeated with noise: what is selected depends on it, what it costs does not.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from selection import machine, passages, tiled
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.util import batch_to_device

from st_corrector import Corpus, CorrectedMultipleNegativesLoss, EmbeddingCache, MLPCorrector

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "recipes"))
from common import default_model, static_encoder  # noqa: E402

PARTS = ("encode", "exchange", "select", "correct", "backward", "optimizer")
OWN = ("step", "backward", "optimizer")  # measured here, of both losses; the others the loss measures itself


class Step:
    """One loss, and the optimizer of the model that it trains."""

    def __init__(self, loss: Any, model: torch.nn.Module, accelerator: Accelerator) -> None:
        self.loss, self.model, self.accelerator = loss, model, accelerator
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def __call__(self, features: list[dict[str, Any]], labels: torch.Tensor) -> dict[str, float]:
        """Seconds of the step, and of what comes after the loss."""
        clock = self._clock()
        value = self.loss([dict(each) for each in features], labels)
        value = sum(value.values()) if isinstance(value, dict) else value
        forward = self._clock()
        self.accelerator.backward(value)
        backward = self._clock()
        self.optimizer.step()
        self.optimizer.zero_grad()
        end = self._clock()
        return {"step": end - clock, "backward": backward - forward, "optimizer": end - backward}

    def _clock(self) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()


def launched_by(processes: int) -> str:
    return "python" if processes == 1 else f"torchrun --nproc_per_node {processes}"


def page(folder: Path) -> str:
    """All results of the folder as one table."""
    head = (
        "device, encoder",
        "processes × threads",
        "targets",
        "texts a step",
        "step, s",
        "encode",
        "exchange",
        "select",
    )
    head += ("correct", "backward", "optimizer", "plain loss, s", "its texts", "overhead a text", "MB exchanged")
    rows, commands = [], []
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text())
        each = result["medians"]
        seconds = [each[f"ours_{name}" if name in OWN else name] for name in ("step", *PARTS)]
        rows.append(
            [
                ", ".join(path.stem.split("-")[:2]),
                f"{result['processes']} × {result['threads_of_each']}",
                f"{result['targets']:,}",
                f"{each['texts']:.0f}",
                *(f"{value:.3f}" for value in seconds),
                f"{each['reference_step']:.3f}",
                f"{each['reference_texts']:.0f}",
                f"{each['overhead']:+.1%} ({min(result['overheads']):+.1%} … {max(result['overheads']):+.1%})",
                f"{each['bytes_exchanged'] / 1e6:.2f}",
            ]
        )
        machine = result["machine"]
        commands.append(
            f"- `{path.name}`: `{result['command']}`; {machine['cpu']}, torch {machine['versions']['torch']}"
        )
    lines = ["| " + " | ".join(row) + " |" for row in (list(head), *rows)]
    table = "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])
    return (
        "# What a training step costs\n\nMedians over steps of one process's batch. *Plain loss*: "
        "`MultipleNegativesRankingLoss` over the same queries, positives and negatives, turn by turn in the same "
        "process, *its texts*: with the last column filled up. *Overhead a text*: of the corrected loss's step over "
        "the plain one's, each divided by its texts (in brackets from the least to the most of all steps).\n\n"
        f"{table}\n\n" + "\n".join(commands) + "\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="a BEIR folder")
    parser.add_argument("--encoder", default="transformer", choices=("transformer", "static"))
    parser.add_argument("--targets", type=int, help="by default all of the data set's")
    parser.add_argument("--batch_size", type=int, default=32, help="of all processes together")
    parser.add_argument("--num_negatives", type=int, default=4)
    parser.add_argument("--max_seq_length", type=int, default=64)
    parser.add_argument("--steps", type=int, default=8, help="after two to warm up")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "step")
    parser.add_argument("--outputs", type=Path, default=ROOT / "outputs" / "selection")
    args = parser.parse_args()
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    torch.manual_seed(0)
    corpus = Corpus.from_beir(args.dataset, max_targets=args.targets)
    if args.encoder == "static":
        model = static_encoder(default_model(), 0)
    else:
        model = SentenceTransformer(default_model())
        model.max_seq_length = args.max_seq_length
    model.to(accelerator.device)
    vectors = torch.nn.functional.normalize(passages(args.dataset, args.outputs)[0][:, :384], dim=-1)
    cache = EmbeddingCache.from_blocks(tiled(vectors, len(corpus), torch.float32), torch.float32)
    cache = cache.to(accelerator.device) if accelerator.num_processes == 1 else cache
    pairs = corpus.pairs("train")

    wrapped = accelerator.prepare_model(model)
    loss = CorrectedMultipleNegativesLoss(model, corpus, cache, args.num_negatives, MLPCorrector(cache.dim, hidden=128))
    loss.model = wrapped
    ours = Step(loss, wrapped, accelerator)
    plain = MultipleNegativesRankingLoss(model)
    plain.model = wrapped
    theirs = Step(plain, wrapped, accelerator)

    encoded: list[Any] = []
    features_of = loss.encoder.features

    def noting(rows: Any, device: Any = None) -> dict[str, Any]:
        encoded.append(rows)
        return features_of(rows, device)

    loss.encoder.features = noting  # type: ignore[method-assign]
    own = args.batch_size // accelerator.num_processes
    measured: list[dict[str, float]] = []
    for step in range(args.steps + 2):
        first = step * args.batch_size + accelerator.process_index * own
        batch = pairs[first : first + own]
        labels = torch.tensor(batch["label"], device=accelerator.device)
        columns = [
            batch_to_device(model.preprocess(batch[name]), accelerator.device) for name in ("anchor", "positive")
        ]
        loss.metrics.pop()
        encoded.clear()
        found = ours(columns, labels)
        parts = loss.pop_metrics()
        rows = torch.as_tensor(encoded[0])
        copies = -(-len(rows) // own)
        filled = rows.repeat(2)[: copies * own].view(copies, own)
        negatives = [loss.encoder.features(column.numpy(), accelerator.device) for column in filled]
        reference = theirs([*columns, *negatives], labels)
        if step < 2:
            continue
        measured.append(
            {
                **{f"ours_{name}": value for name, value in found.items()},
                **{name.removeprefix("seconds_"): parts[name] for name in parts if name.startswith("seconds_")},
                "bytes_exchanged": parts.get("bytes_exchanged", 0.0),
                "texts": 2 * own + len(rows),
                "reference_step": reference["step"],
                "reference_texts": 2 * own + filled.numel(),
                "overhead": found["step"] / (2 * own + len(rows)) / (reference["step"] / (2 * own + filled.numel()))
                - 1,
            }
        )
    if accelerator.is_main_process:
        medians = {name: statistics.median(each[name] for each in measured) for name in measured[0]}
        settings = {name: value for name, value in vars(args).items() if name not in ("results", "outputs", "dataset")}
        result = {
            **settings,
            "targets": len(corpus),
            "processes": accelerator.num_processes,
            "threads_of_each": torch.get_num_threads(),
            "medians": medians,
            "overheads": [each["overhead"] for each in measured],
            "machine": machine(accelerator.device.type),
            "command": " ".join([launched_by(accelerator.num_processes), *sys.argv]),
        }
        args.results.mkdir(parents=True, exist_ok=True)
        name = f"{accelerator.device.type}-{args.encoder}-{accelerator.num_processes}.json"
        (args.results / name).write_text(json.dumps(result, indent=1) + "\n")
        (args.results / "README.md").write_text(page(args.results), encoding="utf-8")
        print(json.dumps(medians, indent=1), os.linesep, args.results / name)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
