"""``st-corrector``: what can be done with an embedding cache from the shell."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from .errors import CacheError, StCorrectorError


def main(arguments: list[str] | None = None) -> int:
    """Run a command; its exit status: 0, or 1 where it has found damage or failed."""
    args = _parser().parse_args(arguments)
    try:
        return args.run(args)
    except (StCorrectorError, OSError) as error:  # the latter from the Hub, too
        print(f"error: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="st-corrector", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")
    cache = commands.add_parser("cache", help="look into, check and mend an embedding cache")
    actions = cache.add_subparsers(required=True, metavar="action")
    info = actions.add_parser("info", help="what it is: targets, dtype, size, and what its embeddings depend on")
    verify = actions.add_parser("verify", help="read all of it, and name what is not as it was written")
    repair = actions.add_parser("repair", help="encode anew what is damaged or missing")
    for action, run in ((info, _info), (verify, _verify), (repair, _repair)):
        action.add_argument("path", type=Path, help="the cache's folder")
        action.set_defaults(run=run)
    repair.add_argument("--model", required=True, help="the model that the cache was built by: a folder or a Hub id")
    repair.add_argument("--revision", help="commit, branch or tag of a model on the Hub")
    repair.add_argument("--corpus", required=True, help="the corpus that it was built of: a BEIR folder")
    repair.add_argument("--prompt", help="what preceded the targets' texts, if it was not the model's own prompt")
    repair.add_argument("--max_targets", type=int, help="the corpus is the first so many of them")
    repair.add_argument("--batch_size", type=int, default=64, help="targets in one forward pass")
    return parser


def _info(args: argparse.Namespace) -> int:
    from .cache_folder import CacheFolder

    folder = CacheFolder(args.path)
    found = folder.description()
    missing = [] if folder.is_finished else folder.missing(found)
    print(f"{found.rows:,} targets of {found.dim} dimensions in {found.dtype}, {len(found.shards):,} shards")
    print(f"{sum(map(found.bytes_of, found.shards)) / 1e6:,.0f} MB")
    print("finished" if folder.is_finished else f"not finished: {len(missing):,} shards are missing")
    print(json.dumps(found.fingerprint, indent=2, ensure_ascii=False))
    return 0


def _verify(args: argparse.Namespace) -> int:
    from .cache_folder import CacheFolder

    folder = CacheFolder(args.path)
    damaged = folder.damaged()
    if not damaged and not folder.is_finished:
        raise CacheError(f"The cache in {args.path} is undamaged, but not finished: EmbeddingCache.build completes it.")
    for message in damaged.values():
        print(message)
    print(f"{len(damaged):,} of {len(folder.description().shards):,} shards are damaged." if damaged else "Undamaged.")
    return 1 if damaged else 0


def _repair(args: argparse.Namespace) -> int:
    from sentence_transformers import SentenceTransformer

    from .cache import EmbeddingCache
    from .corpus import Corpus

    corpus = Corpus.from_beir(args.corpus, max_targets=args.max_targets, prompt=args.prompt)
    model = SentenceTransformer(args.model, revision=args.revision)
    print(EmbeddingCache.repair(model, corpus, args.path, args.batch_size))
    return 0


if __name__ == "__main__":
    sys.exit(main())
