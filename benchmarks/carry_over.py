"""What a corrector keeps of an index that is carried over to a newer model, instead of being re-embedded.

    python benchmarks/carry_over.py --dataset data/nq                     # the study: about an hour on two cores
    python benchmarks/carry_over.py --dataset data/nq --pairs static --seeds 1 --samples 250 1000 --max_targets 5000

Each pair of models has one whose embeddings are served and one that is to replace it:

- ``static``: a static encoder, before and after training with corrected negatives;
- ``transformer``: the first two layers of all-MiniLM-L6-v2, before and after;
- ``unrelated``: the untrained static encoder and the trained two layers: two models that share token vectors alone.

For each the corpus is embedded by both, and retrieval by the new model is evaluated over: the new embeddings
(``re-embedded``), the old ones (``unchanged``), the old ones as the corrector of the training run maps them
(``trained``; ``trained-overlay`` with what the run has written back), and as correctors fitted on samples map them.
``before`` is the old model over its own embeddings.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor
from transformers import set_seed

from st_corrector import (
    Corpus,
    CorpusRetrievalEvaluator,
    CorrectorTrainer,
    CorrectorTrainingArguments,
    EmbeddingCache,
    upgrade_embeddings,
)
from st_corrector.carry_over.fitting import FITTED, drawn, fit_to_pairs
from st_corrector.data.encoding import DocumentEncoder
from st_corrector.search.fidelity import overlap_at_k

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "recipes"))
from common import default_model, static_encoder, versions  # noqa: E402

KEPT_AT = (10, 100)
TRAINING = {
    "static": {"learning_rate": 1e-3, "per_device_train_batch_size": 64, "max_steps": 150, "num_negatives": 8},
    "transformer": {"learning_rate": 1e-4, "per_device_train_batch_size": 32, "max_steps": 100, "num_negatives": 8},
}


def two_layers() -> SentenceTransformer:
    model = SentenceTransformer(default_model(), device="cpu")
    transformer = model.transformers_model
    transformer.encoder.layer = transformer.encoder.layer[:2]
    transformer.config.num_hidden_layers = 2
    model.max_seq_length = 128
    return model


def trained(
    kind: str, corpus: Corpus, caches: Path, seed: int
) -> tuple[SentenceTransformer, EmbeddingCache, dict[str, Tensor], float]:
    """The model after training, the cache from before, that cache as the run's corrector maps it, and seconds."""
    set_seed(seed)
    model = static_encoder(default_model(), seed) if kind == "static" else two_layers()
    cache = EmbeddingCache.build(model, corpus, caches / f"{kind}-{len(corpus)}-{seed}", batch_size=256)
    args = CorrectorTrainingArguments(
        str(caches / f"run-{kind}"),
        corrector="mlp",
        cache_path=str(cache.path),
        seed=seed,
        warmup_steps=0.1,
        batch_sampler="no_duplicates",
        report_to="none",
        save_strategy="no",
        logging_steps=10,
        use_cpu=True,
        dataloader_pin_memory=False,
        **TRAINING[kind],
    )
    started = time.perf_counter()
    trainer = CorrectorTrainer(model, args, corpus=corpus)
    trainer.train()
    seconds = time.perf_counter() - started
    corrected = trainer.loss.corrected
    mapped = {
        "trained": upgrade_embeddings(whole(cache), corrected.corrector),
        "trained-overlay": torch.cat([corrected.corrected(rows) for rows in torch.arange(len(corpus)).split(16_384)]),
    }
    return model, cache, mapped, seconds


def whole(cache: EmbeddingCache) -> Tensor:
    return torch.cat([chunk.float() for _, chunk in cache.chunks(16_384)])


def pairs_of_models(args: argparse.Namespace, corpus: Corpus) -> Iterator[dict[str, Any]]:
    """``name``, ``seed``, the new model, old embeddings, what the training run's corrector makes of them."""
    for seed in range(args.seeds):
        of_static: EmbeddingCache | None = None
        for kind in ("static", "transformer"):
            wanted = kind in args.pairs or (kind == "transformer" and "unrelated" in args.pairs)
            if not wanted or (kind == "transformer" and seed):  # one seed of what trains slowly
                continue
            before = static_encoder(default_model(), seed) if kind == "static" else two_layers()
            model, cache, mapped, seconds = trained(kind, corpus, args.caches, seed)
            of_static = cache if kind == "static" else of_static
            if kind in args.pairs:
                yield {
                    "pair": kind,
                    "seed": seed,
                    "before": before,
                    "new": model,
                    "old": cache,
                    "mapped": mapped,
                    "training": {**TRAINING[kind], "seconds": seconds},
                }
            if kind == "transformer" and "unrelated" in args.pairs:
                before = static_encoder(default_model(), seed)
                if of_static is None:
                    path = args.caches / f"static-{len(corpus)}-{seed}"
                    of_static = EmbeddingCache.build(before, corpus, path, batch_size=256)
                yield {
                    "pair": "unrelated",
                    "seed": seed,
                    "before": before,
                    "new": model,
                    "old": of_static,
                    "mapped": {},
                }


def study(args: argparse.Namespace) -> None:
    corpus = Corpus.from_beir(args.dataset, max_targets=args.max_targets)
    evaluator = CorpusRetrievalEvaluator(corpus, "dev")
    args.results.mkdir(parents=True, exist_ok=True)
    for pair in pairs_of_models(args, corpus):
        result = measured(pair, corpus, evaluator, args)
        path = args.results / f"{pair['pair']}-seed{pair['seed']}.json"
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"{path}: {len(result['rows'])} rows", flush=True)


def measured(
    pair: dict[str, Any], corpus: Corpus, evaluator: CorpusRetrievalEvaluator, args: argparse.Namespace
) -> dict[str, Any]:
    """All rows of one pair of models."""
    new, old = pair["new"], whole(pair["old"])
    started = time.perf_counter()
    fresh = DocumentEncoder(new, corpus).encode(new, np.arange(len(corpus)), batch_size=256).cpu()
    seconds_of_encoding = time.perf_counter() - started
    reference = evaluator.retrieve(new, EmbeddingCache.from_tensor(fresh))

    def row(name: str, embeddings: Tensor, model: SentenceTransformer = new, **more: Any) -> dict[str, Any]:
        found = evaluator.retrieve(model, EmbeddingCache.from_tensor(embeddings))
        kept = {f"kept@{k}": overlap_at_k(found[:, :k], reference[:, :k]).mean().item() for k in KEPT_AT}
        cosine = torch.cosine_similarity(embeddings, fresh).mean().item()
        return {"name": name, **more, "metrics": evaluator.score(found), **kept, "cosine": cosine}

    rows = [
        row("re-embedded", fresh, seconds=seconds_of_encoding),
        row("unchanged", old),
        row("before", old, pair["before"]),
        *(row(name, embeddings) for name, embeddings in pair["mapped"].items()),
    ]
    queries = evaluator.qrels.queries["text"][:]
    for seed in range(args.sample_seeds):
        for size in args.samples:
            sample = drawn(len(corpus), size, seed)
            for name in args.correctors:
                started = time.perf_counter()
                corrector = fit_to_pairs(old[sample], fresh[sample], name, seed=seed)
                fitting = time.perf_counter() - started
                started = time.perf_counter()
                carried = upgrade_embeddings(old, corrector)
                mapping = time.perf_counter() - started
                more: dict[str, Any] = {"sample": size, "sample_seed": seed, "corrector": repr(corrector)}
                more |= {"seconds_of_fitting": fitting, "seconds": mapping}
                rows.append(row(name, carried, **more))
                print(pair["pair"], name, size, seed, rows[-1]["metrics"]["ndcg@10"], rows[-1]["kept@100"], flush=True)
    return {
        "pair": pair["pair"],
        "seed": pair["seed"],
        "targets": len(corpus),
        "queries": len(queries),
        "training": pair.get("training"),
        "rows": rows,
        "versions": versions(),
        "command": command(args.dataset),
    }


def command(dataset: str) -> str:
    """What was run; not where its files are."""
    said = " ".join(["python", "benchmarks/carry_over.py", *sys.argv[1:]]).replace(dataset, "<NQ>")
    return re.sub(r" --(caches|results) \S+", "", said)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="a BEIR folder with the splits train and dev")
    parser.add_argument("--max_targets", type=int, help="keep the first so many")
    parser.add_argument("--pairs", nargs="+", default=["static", "transformer", "unrelated"])
    parser.add_argument("--seeds", type=int, default=3, help="of training the static encoder")
    parser.add_argument("--samples", type=int, nargs="+", default=[250, 1000, 4000, 20_000])
    parser.add_argument("--sample_seeds", type=int, default=1)
    parser.add_argument("--correctors", nargs="+", default=[n for n in FITTED if n != "ridge-mlp"])
    parser.add_argument("--caches", type=Path, default=ROOT / "outputs" / "carry-over")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "carry-over")
    study(parser.parse_args())


if __name__ == "__main__":
    main()
