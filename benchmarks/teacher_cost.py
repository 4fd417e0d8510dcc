"""What a teacher costs in a step, against the same step without one, turn by turn; and what building it costs.

    python benchmarks/teacher_cost.py --dataset data/nq

The encoder is all-MiniLM-L6-v2, the teacher has 1,024 dimensions in float16 on disk, memory-mapped. Cache and teacher
hold random vectors, on which no cost depends. A step is forward, backward and optimizer. Before anything is timed, the
teacher's scores are compared with a product of the vectors that were written.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sentence_transformers import SentenceTransformer
from step import default_model, machine

from st_corrector import (
    Corpus,
    CorrectedMultipleNegativesLoss,
    DistillationSettings,
    EmbeddingCache,
    EmbeddingTeacher,
    NegativeSettings,
)

ROOT = Path(__file__).resolve().parents[1]
DIM, BATCH, NEGATIVES, TOKENS, BUILT = 1_024, 32, 4, 64, 1_000


def unit(rows: int, dim: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)), dim=-1)


def check(teacher: EmbeddingTeacher, targets: torch.Tensor, queries: torch.Tensor, keys: np.ndarray) -> None:
    rows = torch.arange(0, len(targets), 997)
    found = teacher.scores(torch.from_numpy(keys[:BATCH]), rows)
    expected = queries[:BATCH].half().float() @ targets[rows].half().float().T
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)


def step(loss: CorrectedMultipleNegativesLoss, optimizer: torch.optim.Optimizer, columns: list, labels: torch.Tensor):
    """Seconds of one step, and how many targets it encoded."""
    before, started = loss.targets_encoded, time.perf_counter()
    optimizer.zero_grad()
    sum(loss([dict(each) for each in columns], labels).values()).backward()
    optimizer.step()
    return time.perf_counter() - started, loss.targets_encoded - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="a BEIR folder")
    parser.add_argument("--targets", type=int, help="by default all of the data set's")
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "labels" / "cost.json")
    args = parser.parse_args()
    torch.manual_seed(0)
    corpus = Corpus.from_beir(args.dataset, max_targets=args.targets)
    pairs, keys = corpus.pairs("train"), corpus.qrels("train").keys
    model = SentenceTransformer(default_model(), device="cpu")
    model.max_seq_length = TOKENS
    with tempfile.TemporaryDirectory() as folder:
        targets, queries = unit(len(corpus), DIM, 0), unit(len(keys), DIM, 1)
        stored = [
            EmbeddingCache.from_tensor(each.half()).save(Path(folder) / name)
            for name, each in (("targets", targets), ("queries", queries))
        ]
        teacher = EmbeddingTeacher(*stored, keys)
        check(teacher, targets, queries, keys)
        cache = EmbeddingCache.from_tensor(unit(len(corpus), len(model.encode("width")), 2))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
        losses = [
            CorrectedMultipleNegativesLoss(
                model,
                corpus,
                cache,
                negatives=NegativeSettings(NEGATIVES),
                distillation=DistillationSettings(each, teacher_weight=1.0, teacher_scale=10.0),
            )
            for each in (None, teacher)
        ]
        model.train()
        turns = []
        for turn in range(args.turns + 3):
            batch = pairs[list(range(turn * BATCH, (turn + 1) * BATCH))]
            columns = [model.preprocess(batch[name]) for name in ("anchor", "positive")]
            found = [step(loss, optimizer, columns, torch.tensor(batch["label"])) for loss in losses]
            turns.append([(seconds, encoded) for seconds, encoded in found])
        counted = turns[3:]
        # Per text that was encoded: the two choose different targets, as the encoder moves on between their steps.
        ratios = [(taught / more) / (plain / less) for (plain, less), (taught, more) in counted]
        started = time.perf_counter()
        model.eval()
        model.encode_document(corpus.texts(range(BUILT)), batch_size=64, show_progress_bar=False)
        plain = time.perf_counter() - started
        small = Corpus(corpus.targets.select(range(BUILT)), cache_dir=folder)
        small.add_split("train", {"q": pairs["anchor"][0]}, {"q": small.ids([0])})
        small.tokenize(model, "", progress=False)
        started = time.perf_counter()
        EmbeddingTeacher.build(model, small, Path(folder) / "built", small.pairs("train"), progress=False)
        built = time.perf_counter() - started
    result = {
        "targets": len(corpus),
        "teacher": f"{DIM} dimensions, float16, on disk",
        "batch": f"{BATCH} questions, {NEGATIVES} negatives each, {TOKENS} tokens",
        "seconds_without": statistics.median(plain_ for (plain_, _), _ in counted),
        "seconds_with": statistics.median(taught for _, (taught, _) in counted),
        "ratio_per_text": statistics.median(ratios),
        "ratios": ratios,
        "build": {"targets": BUILT, "seconds": built, "seconds_of_encode_document": plain, "ratio": built / plain},
        "machine": machine("cpu"),
        "command": f"python benchmarks/teacher_cost.py --dataset {args.dataset}",
    }
    args.results.parent.mkdir(parents=True, exist_ok=True)
    args.results.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({name: value for name, value in result.items() if name != "ratios"}, indent=1))


if __name__ == "__main__":
    main()
