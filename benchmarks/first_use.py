"""The path of somebody who uses the package for the first time, step by step, timed.

    python benchmarks/first_use.py --dataset data/nq

In a clean virtual environment: torch and sentence-transformers are installed, then the wheel of this checkout; a script
for sentence-transformers' own trainer is run as it stands in :data:`STOCK`, and once more with the lines changed that
README shows (:data:`CHANGED`), nothing else. Both train the same encoder on the first questions of the data set, and
say how well it retrieves from its passages before and after. Writes ``benchmarks/results/first-use.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Of a user who has (question, passage) pairs and has never heard of a corpus row.
STOCK = """
import json

from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

model = SentenceTransformer("model")
train_dataset = Dataset.from_json("pairs.jsonl")
arguments = SentenceTransformerTrainingArguments(
    "trained", max_steps=40, per_device_train_batch_size=32, learning_rate=1e-3, report_to="none", save_strategy="no",
    seed=0,
)
trainer = SentenceTransformerTrainer(
    model=model,
    args=arguments,
    train_dataset=train_dataset,
    loss=MultipleNegativesRankingLoss(model),
)
trainer.train()
model.save_pretrained("trained")
"""
# README's change: the corpus of the pairs' passages, its cache, the data set with its rows, the loss.
CHANGED = (
    (
        "from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss\n",
        "from st_corrector import CorrectedMultipleNegativesLoss, Corpus, EmbeddingCache\n",
    ),
    (
        'train_dataset = Dataset.from_json("pairs.jsonl")\n',
        'corpus = Corpus.from_pairs(Dataset.from_json("pairs.jsonl"), query="question", positive="passage")\n'
        'cache = EmbeddingCache.build(model, corpus, "cache")\n',
    ),
    ("train_dataset=train_dataset", 'train_dataset=corpus.pairs("train")'),
    ("loss=MultipleNegativesRankingLoss(model)", "loss=CorrectedMultipleNegativesLoss(model, corpus, cache)"),
)
EVALUATES = """
import json, sys

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

data = json.load(open("dev.json"))
relevant = {query: set(ids) for query, ids in data["relevant"].items()}
evaluator = InformationRetrievalEvaluator(data["queries"], data["corpus"], relevant, ndcg_at_k=[10], batch_size=256)
print(json.dumps({name: evaluator(SentenceTransformer(name))[evaluator.primary_metric] for name in sys.argv[1:]}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="a BEIR folder with the splits train and dev")
    parser.add_argument("--torch", default="torch==2.13.0", help="which torch is installed first")
    parser.add_argument("--max_targets", type=int, default=20_000)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "first-use.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = walk(Path(folder), args)
    args.results.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


def commit() -> dict[str, str]:
    sys.path.insert(0, str(ROOT / "recipes"))
    from common import commit as of_checkout

    return of_checkout()


def walk(folder: Path, args: argparse.Namespace) -> dict:
    """Take all steps in ``folder``; seconds by step, and what the models reach."""
    prepare(folder, args)
    python = folder / "venv" / "bin" / "python"
    changed = STOCK
    for before, after in CHANGED:
        assert changed.count(before) == 1, before
        changed = changed.replace(before, after)
    (folder / "stock.py").write_text(STOCK, encoding="utf-8")
    (folder / "changed.py").write_text(changed.replace('"trained"', '"corrected"'), encoding="utf-8")
    (folder / "evaluate.py").write_text(EVALUATES, encoding="utf-8")
    steps: dict[str, list[object]] = {
        "make a virtual environment": [sys.executable, "-m", "venv", folder / "venv"],
        "install torch and sentence-transformers": [
            *(python, "-m", "pip", "install", "-q", args.torch, "sentence-transformers[train]"),
        ],
        "build the wheel": [sys.executable, "-m", "build", "-w", "-o", folder / "dist", ROOT],
        "install the wheel": [python, "-m", "pip", "install", "-q", "WHEEL"],
        "train with sentence-transformers' own loss": [python, "stock.py"],
        "train with the lines changed": [python, "changed.py"],
    }
    seconds = {}
    for step, command in steps.items():
        said = [str(next((folder / "dist").glob("*.whl"))) if part == "WHEEL" else str(part) for part in command]
        seconds[step] = round(run(said, folder), 1)
        print(f"{step}: {seconds[step]} s", flush=True)
    reached = subprocess.run(
        [python, "evaluate.py", "model", "trained", "corrected"], cwd=folder, env=environment(), capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    installed = subprocess.run(
        [python, "-c", "import st_corrector; print(st_corrector.__file__)"], cwd=folder, capture_output=True, text=True
    ).stdout
    assert str(folder) in installed, f"what was trained with is another package: {installed}"
    return {
        **commit(),
        "lines_changed": [after.strip() for _, after in CHANGED],
        "seconds": seconds,
        "ndcg@10": dict(
            zip(("before", "stock", "changed"), json.loads(reached.stdout.splitlines()[-1]).values(), strict=True)
        ),
        "targets": args.max_targets,
    }


def prepare(folder: Path, args: argparse.Namespace) -> None:
    """The user's own files: pairs, what to evaluate on, a model in a folder."""
    from st_corrector import Corpus

    sys.path.insert(0, str(ROOT / "recipes"))
    from common import default_model, static_encoder

    corpus = Corpus.from_beir(args.dataset, max_targets=args.max_targets)
    with (folder / "pairs.jsonl").open("w", encoding="utf-8") as file:
        for pair in corpus.pairs("train"):
            file.write(json.dumps({"question": pair["anchor"], "passage": pair["positive"]}) + "\n")
    dev = corpus.qrels("dev")
    texts = corpus.texts(range(len(corpus)))
    data = {
        "queries": dict(zip(dev.queries["id"], dev.queries["text"], strict=True)),
        "corpus": {str(row): text for row, text in enumerate(texts)},
        "relevant": {dev.queries["id"][n]: [str(row) for row in dev.rows_of(n)] for n in range(len(dev))},
    }
    (folder / "dev.json").write_text(json.dumps(data), encoding="utf-8")
    static_encoder(default_model()).save_pretrained(str(folder / "model"))


def run(command: list[str], folder: Path) -> float:
    started = time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{command} has failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return time.perf_counter() - started


def environment() -> dict[str, str]:
    """Without what points to this checkout."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}


if __name__ == "__main__":
    main()
