"""``st-corrector evaluate``: retrieval from the whole corpus."""

from __future__ import annotations

import argparse
from pathlib import Path

from .arguments import Commands, add_command, add_corpus, add_json, add_model, open_corpus, open_model, show


def add_to(commands: Commands) -> None:
    """Add the command."""
    made = add_command(
        commands,
        "evaluate",
        "evaluate retrieval from the whole corpus: encode it, search it exactly, score the queries of a split",
        _run,
        "With --cache the corpus is not encoded: the result shows how well that cache serves this model's queries.",
    )
    add_model(made, "the model")
    add_corpus(made)
    made.add_argument("--split", default="dev", help="the queries (default: dev)")
    made.add_argument("--cache", type=Path, help="search the embeddings of this cache instead of encoding the corpus")
    made.add_argument(
        "--ignore_identical_ids",
        action="store_true",
        help="leave the target that has a query's id out of its ranking, as BEIR does where queries are targets",
    )
    add_json(made)


def _run(args: argparse.Namespace) -> int:
    from ..cache.embedding_cache import EmbeddingCache
    from ..evaluation import CorpusRetrievalEvaluator

    corpus = open_corpus(args)
    evaluator = CorpusRetrievalEvaluator(
        corpus,
        args.split,
        batch_size=args.batch_size,
        show_progress_bar=True,
        write_csv=False,
        ignore_identical_ids=args.ignore_identical_ids,
    )
    cache = None if args.cache is None else EmbeddingCache.load(args.cache)
    metrics = evaluator.score(evaluator.retrieve(open_model(args), cache))
    if args.json:
        show({"targets": len(corpus), "queries": len(evaluator.qrels), "split": args.split, "metrics": metrics})
        return 0
    print(f"{len(corpus):,} targets, {len(evaluator.qrels):,} queries of {args.split}, in percent:")
    for name, value in metrics.items():
        print(f"{name:20} {100 * value:5.1f}")
    return 0
