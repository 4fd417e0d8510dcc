"""Does a teacher that knows nothing do harm? The default with five teachers, beside none, on several corpora.

    python benchmarks/untrusted_teachers.py --dataset data/nq --max_targets 30000 --steps 300
    python benchmarks/untrusted_teachers.py --dataset outputs/corpora/code --other data/nq
    python benchmarks/untrusted_teachers.py --dataset outputs/corpora/packages

A static encoder is trained with a teacher whose weight and scale are found out as the run goes. The teachers: all of
all-MiniLM-L6-v2; vectors that are random for each text; the encoder itself before it was trained; the same encoder
trained on another corpus (on code, and where code is searched on Natural Questions); and trained for ten epochs on the
very questions by which teachers are judged. `corpora.py` makes the folders. One JSON a run; runs whose JSON is there
are skipped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.training_args import BatchSamplers
from torch import nn
from transformers import set_seed

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "recipes"))
from common import default_model, static_encoder, train  # noqa: E402

from st_corrector import Corpus, CorrectorTrainingArguments  # noqa: E402

TEACHERS = ("none", "good", "random", "untrained", "of another domain", "memorised")
TOKENS = 96
CODE = ROOT / "outputs" / "corpora" / "code"


class RandomVectors(nn.Module):
    """A module whose embedding of a text is random, and the same whenever it is asked."""

    dim = 64

    def tokenize(self, texts: list[str], **kwargs: Any) -> dict[str, Any]:
        seeds = [int(hashlib.sha256(text.encode()).hexdigest()[:12], 16) for text in texts]
        return {"seeds": torch.tensor(seeds)}

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        vectors = [torch.randn(self.dim, generator=torch.Generator().manual_seed(int(n))) for n in features["seeds"]]
        return {**features, "sentence_embedding": nn.functional.normalize(torch.stack(vectors), dim=-1)}

    def get_sentence_embedding_dimension(self) -> int:
        return self.dim

    def get_config_dict(self) -> dict[str, Any]:
        return {"dim": self.dim}


def trained(corpus: Corpus, name: str, outputs: Path, **lengths: int) -> SentenceTransformer:
    """A static encoder trained on ``corpus`` by the default, made once."""
    folder = outputs / "teachers" / name
    if not (folder / "modules.json").exists():
        set_seed(0)
        model = static_encoder(default_model(), 0)
        train(model, corpus, arguments(outputs, 0, **lengths), "corrected", outputs / "caches", final=folder)
    return SentenceTransformer(str(folder), device="cpu")


def teacher(name: str, corpus: Corpus, args: argparse.Namespace, seed: int) -> SentenceTransformer | None:
    """One of :data:`TEACHERS`."""
    if name == "good":
        model = SentenceTransformer(default_model(), device="cpu")
        model.max_seq_length = TOKENS
        return model
    if name == "random":
        return SentenceTransformer(modules=[RandomVectors()], device="cpu")
    if name == "untrained":
        return static_encoder(default_model(), seed)
    if name == "of another domain":
        other = CODE if args.dataset.resolve() != CODE.resolve() else args.other
        if other is None:
            sys.exit("Where code is searched, --other says what the teacher of another domain has learnt.")
        return trained(Corpus.from_beir(other, max_targets=30_000), other.name, args.outputs, max_steps=300)
    if name == "memorised":
        return trained(corpus, f"{args.dataset.name}-{len(corpus)}-memorised", args.outputs, num_train_epochs=10)
    return None


def arguments(outputs: Path, seed: int, **others: Any) -> CorrectorTrainingArguments:
    """Those of a static encoder's run without own pairs, as the recipe has them; ``others`` count instead."""
    usual: dict[str, Any] = {
        "output_dir": str(outputs / "untrusted-teachers"),
        "per_device_train_batch_size": 64,
        "num_negatives": 8,
        "corrector": "mlp",
        "corrector_settings": '{"hidden": 128}',
        "own_pairs_share": 0.0,
        "learning_rate": 1e-3,
        "warmup_steps": 0.1,
        "batch_sampler": BatchSamplers.NO_DUPLICATES,
        "logging_steps": 50,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "example_queries": 0,
    }
    return CorrectorTrainingArguments(**(usual | others), seed=seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, required=True, help="a BEIR folder with splits train and dev")
    parser.add_argument("--max_targets", type=int)
    parser.add_argument("--other", type=Path, help="the BEIR folder of another domain, where --dataset is code")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--teachers", nargs="+", choices=TEACHERS, default=TEACHERS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--outputs", type=Path, default=ROOT / "outputs", help="where embeddings go")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "labels" / "untrusted")
    args = parser.parse_args()
    corpus = Corpus.from_beir(args.dataset, max_targets=args.max_targets)
    for seed in args.seeds:
        for name in args.teachers:
            path = args.results / args.dataset.name / f"{name.replace(' ', '-')}-seed{seed}.json"
            if path.exists():
                continue
            print(f"{args.dataset.name}: {name}, seed {seed}", flush=True)
            labels = teacher(name, corpus, args, seed)
            set_seed(seed)
            model = static_encoder(default_model(), seed)
            training = arguments(args.outputs, seed, max_steps=args.steps)
            found = train(model, corpus, training, "corrected", args.outputs / "caches", teacher=labels)
            path.parent.mkdir(parents=True, exist_ok=True)
            kept = ("seed", "steps", "targets", "before", "after", "seconds", "trust", "versions", "device")
            one = ["--dataset", args.dataset, "--steps", args.steps, "--teachers", name, "--seeds", seed]
            one += ["--max_targets", args.max_targets] if args.max_targets else []
            one += ["--other", args.other] if args.other else []
            command = shlex.join(["python", "benchmarks/untrusted_teachers.py", *map(str, one)])
            figures = {
                "dataset": args.dataset.name,
                "teacher": name,
                "command": command,
                **{key: found[key] for key in kept},
            }
            path.write_text(json.dumps(figures, indent=1) + "\n")
            print(f"    MRR@10 {100 * found['after']['mrr@10']:.1f}", flush=True)


if __name__ == "__main__":
    main()
