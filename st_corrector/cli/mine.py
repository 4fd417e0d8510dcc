"""``st-corrector mine``: hard negatives for other trainers."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .arguments import Commands, add_command, add_corpus, add_json, add_model, open_corpus, open_model, show


def add_to(commands: Commands) -> None:
    """Add the command."""
    made = add_command(
        commands,
        "mine",
        "mine hard negatives from the whole corpus, in the formats of sentence-transformers",
        _run,
        "With --corrector the cache may be that of the model before it was trained: nothing is embedded again. If "
        "interrupted,\nthe same command goes on.",
    )
    add_model(made, "encodes the queries")
    add_corpus(made)
    made.add_argument("--split", default="train", help="the queries (default: train)")
    made.add_argument("--cache", type=Path, required=True, help="embeddings of the targets; built if it is not there")
    made.add_argument("--corrector", help="maps the cache to this model: a folder or a Hub id")
    made.add_argument("--output", type=Path, required=True, help="a folder for the Parquet files")
    made.add_argument(
        "--format",
        choices=("triplet", "n-tuple", "labeled-pair", "labeled-list", "ids"),
        default="triplet",
        help="the columns (default: triplet)",
    )
    made.add_argument("--scores", action="store_true", help="add similarities")
    made.add_argument("--num_negatives", type=int, default=3, metavar="N", help="for each query (default: 3)")
    made.add_argument("--sampler", choices=("top_k", "gumbel", "uniform"), default="top_k", help="(default: top_k)")
    made.add_argument("--relative_margin", type=float, help="negatives score at most (1 - this) times the positive")
    made.add_argument("--absolute_margin", type=float, help="negatives score at least this much less than the positive")
    made.add_argument("--max_score", type=float, help="no negative scores higher")
    made.add_argument("--range_min", type=int, default=0, metavar="N", help="leave out the N hardest")
    made.add_argument("--range_max", type=int, metavar="N", help="take them from the N hardest")
    made.add_argument("--answer_check", action="store_true", help="none contains an answer of the query")
    made.add_argument("--push_to_hub", metavar="REPO", help="upload the files with a card to this repository")
    add_json(made)


def _run(args: argparse.Namespace) -> int:
    from ..cache.embedding_cache import EmbeddingCache
    from ..cache.folder import CacheFolder
    from ..correctors import Corrector
    from ..mining import mine_negatives, push_mined
    from ..negatives.filters import AnswerCheck, FalseNegativeFilter
    from ..negatives.settings import NegativeSettings
    from ..storage.hub import require_repo_id

    if args.push_to_hub:
        require_repo_id(args.push_to_hub)  # before anything is mined
    corpus, model = open_corpus(args), open_model(args)
    rules = ("relative_margin", "absolute_margin", "max_score", "range_min", "range_max")
    filters = FalseNegativeFilter(
        **{name: getattr(args, name) for name in rules},
        checks=(AnswerCheck(corpus, args.split),) if args.answer_check else (),
    )
    negatives = NegativeSettings(
        num_negatives=args.num_negatives, sampler=args.sampler, false_negatives=filters, train_split=args.split
    )
    if args.corrector is None:
        folder = CacheFolder(args.cache)
        # One that is there is taken as it is stored.
        there = folder.description() if folder.is_finished or folder.is_begun else None
        stored: dict[str, Any] = {} if there is None else {"dtype": there.dtype, "shard_size": there.shard_size}
        corrector, cache = None, EmbeddingCache.build(model, corpus, args.cache, args.batch_size, **stored)
    else:
        corrector, cache = Corrector.from_pretrained(args.corrector), EmbeddingCache.load(args.cache)
    found = mine_negatives(
        model,
        corpus,
        cache,
        args.output,
        args.split,
        corrector=corrector,
        negatives=negatives,
        output_format=args.format,
        output_scores=args.scores,
        batch_size=args.batch_size,
    )
    url = push_mined(args.output, args.push_to_hub) if args.push_to_hub else None
    if args.json:
        show({"rows": len(found), "columns": found.column_names, "output": str(args.output), "url": url})
        return 0
    print(
        f"{len(found):,} rows with {', '.join(found.column_names)} in {args.output}"
        + (f", pushed to {url}" if url else "")
    )
    return 0
