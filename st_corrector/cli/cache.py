"""``st-corrector cache``: build, extend, inspect, verify, repair and share an embedding cache."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..errors import CacheError
from .arguments import Commands, add_command, add_corpus, add_json, add_model, open_corpus, open_model, show


def add_to(commands: Commands) -> None:
    """Add the command."""
    cache = commands.add_parser("cache", help="build, extend, inspect, verify, repair and share an embedding cache")
    actions = cache.add_subparsers(required=True, metavar="action")
    build = add_command(
        actions,
        "build",
        "encode every target into a folder; if killed, the same command continues after the last finished shard",
        _build,
    )
    extend = add_command(actions, "extend", "encode the targets that a corpus has grown by, and add them", _extend)
    info = add_command(actions, "info", "what a cache is: targets, dtype, size, what its embeddings depend on", _info)
    verify = add_command(actions, "verify", "read all of a cache, and name what differs from what was written", _verify)
    repair = add_command(actions, "repair", "encode again what is damaged or missing in a cache", _repair)
    push = add_command(actions, "push", "upload a cache into a dataset repository on the Hub", _push)
    pull = add_command(actions, "pull", "download a cache from a dataset repository on the Hub", _pull)
    for action in (build, extend, info, verify, repair, push, pull):
        action.add_argument("path", type=Path, help="the cache's folder")
    for action in (push, pull):
        action.add_argument("repository", help="its id on the Hub")
        action.add_argument("--revision", help="branch; to download, also a tag or a commit")
    push.add_argument("--private", action="store_true", help="make a new repository private")
    for action in (info, verify):
        add_json(action)
    built_by = "the model that the cache was built with"
    for action, what in ((build, "the model that encodes"), (extend, built_by), (repair, built_by)):
        add_model(action, what)
        add_corpus(action)
    build.add_argument(
        "--dtype", default="float32", choices=["float32", "bfloat16", "float16", "int8"], help="how they are stored"
    )


def _build(args: argparse.Namespace) -> int:
    from ..cache.embedding_cache import EmbeddingCache

    print(EmbeddingCache.build(open_model(args), open_corpus(args), args.path, args.batch_size, args.dtype))
    return 0


def _extend(args: argparse.Namespace) -> int:
    from ..cache.embedding_cache import EmbeddingCache

    print(EmbeddingCache.extend(open_model(args), open_corpus(args), args.path, args.batch_size))
    return 0


def _info(args: argparse.Namespace) -> int:
    from ..cache.folder import CacheFolder

    folder = CacheFolder(args.path)
    found = folder.description()
    missing = [] if folder.is_finished else folder.missing(found)
    size = sum(map(found.bytes_of, found.shards))
    described = {
        "targets": found.rows,
        "dim": found.dim,
        "dtype": found.dtype,
        "bytes": size,
        "shards": len(found.shards),
        "shards_missing": len(missing),
        "finished": folder.is_finished,
        "extended": [each["rows"] for each in found.earlier],
        "fingerprint": found.fingerprint,
    }
    if args.json:
        show(described)
        return 0
    print(f"{found.rows:,} targets of {found.dim} dimensions in {found.dtype}, {len(found.shards):,} shards")
    print(f"{size / 1e6:,.0f} MB")
    if found.earlier:
        print("extended from", ", ".join(format(each["rows"], ",") for each in found.earlier), "targets")
    print("finished" if folder.is_finished else f"not finished: {len(missing):,} shards are missing")
    show(found.fingerprint)
    return 0


def _verify(args: argparse.Namespace) -> int:
    from ..cache.folder import CacheFolder

    folder = CacheFolder(args.path)
    damaged = folder.damaged()
    if not damaged and not folder.is_finished:
        raise CacheError(f"The cache in {args.path} is undamaged, but not finished: EmbeddingCache.build completes it.")
    if args.json:
        show({"shards": len(folder.description().shards), "damaged": {str(n): why for n, why in damaged.items()}})
        return 1 if damaged else 0
    for message in damaged.values():
        print(message)
    print(f"{len(damaged):,} of {len(folder.description().shards):,} shards are damaged." if damaged else "Undamaged.")
    return 1 if damaged else 0


def _repair(args: argparse.Namespace) -> int:
    from ..cache.embedding_cache import EmbeddingCache

    print(EmbeddingCache.repair(open_model(args), open_corpus(args), args.path, args.batch_size))
    return 0


def _push(args: argparse.Namespace) -> int:
    from ..cache.embedding_cache import EmbeddingCache

    cache = EmbeddingCache.load(args.path, verify=True)
    print(cache.push_to_hub(args.repository, private=True if args.private else None, revision=args.revision))
    return 0


def _pull(args: argparse.Namespace) -> int:
    from ..cache.embedding_cache import EmbeddingCache

    cache = EmbeddingCache.from_hub(args.repository, args.path, revision=args.revision)
    print(cache)
    print(f"in {args.path}, undamaged", file=sys.stderr)
    return 0
