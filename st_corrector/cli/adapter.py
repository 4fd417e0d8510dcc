"""``st-corrector adapter``: the new model's queries search the old index."""

from __future__ import annotations

import argparse
import shutil
from dataclasses import asdict
from pathlib import Path

from ..errors import InputError
from .arguments import (
    Commands,
    add_command,
    add_corpus,
    add_json,
    add_judging,
    add_model,
    add_queries,
    open_corpus,
    open_model,
    read_queries,
    show,
)

_EPILOG = """
  st-corrector adapter old.npy outputs/nq/adapted --corrector outputs/nq/final --model outputs/nq/final --corpus data/nq

Serve OUTPUT instead of the new model: its queries (encode_query) search INDEX, which stays as it is; documents are
embedded as by the new model. It is the new model with one more module, and needs no st-corrector to be loaded.

The adapter is fitted on some of the queries and on served embeddings; nothing is encoded again for it. The other
queries judge it, on targets that the new model really encodes.
"""


def add_to(commands: Commands) -> None:
    """Add the command."""
    made = add_command(
        commands, "adapter", "give a new model's queries an adapter with which they search the old index", _run, _EPILOG
    )
    made.add_argument("index", help="the embeddings that are served now, as for upgrade-index")
    made.add_argument("output", type=Path, help="a folder for the model with its adapter; it must not exist")
    made.add_argument("--corrector", required=True, help="the trained corrector: a folder or a Hub id")
    made.add_argument("--tensor", help="the tensor's name in a safetensors file")
    add_model(made, "the new model")
    add_corpus(made)
    add_queries(made, "real queries")
    add_judging(made)
    add_json(made)


def _run(args: argparse.Namespace) -> int:
    import numpy as np

    from ..carry_over.certificate import certify, encode_queries
    from ..carry_over.fitting import drawn
    from ..carry_over.mapping import IndexMap
    from ..carry_over.query_adapter import FITTED_ON, LEAST_QUERIES, QueryAdapter
    from ..carry_over.sampling import LEAST_QUERIES as LEAST_JUDGING
    from ..carry_over.sampling import require
    from ..correctors import Corrector
    from ..storage.files import make_folder
    from ..stores.opening import open_vectors

    if args.output.exists():
        raise InputError(f"{args.output} exists already: choose another name, or move it away.")
    corpus = open_corpus(args)
    vectors = open_vectors(args.index, args.tensor, ids=corpus.ids(range(len(corpus))))
    vectors.require_rows()
    model = open_model(args)
    vectors.require_corpus(corpus)
    queries = read_queries(args, corpus)
    judging = min(args.judged, len(queries) // 2)
    if judging < LEAST_JUDGING or len(queries) - judging < LEAST_QUERIES:
        raise InputError(
            f"{len(queries):,} queries are too few: {LEAST_QUERIES} are needed to fit an adapter, and {LEAST_JUDGING} "
            "others to judge it."
        )
    require(judging, args.k, len(corpus) - len(corpus.withdrawn))
    corrector = Corrector.from_pretrained(args.corrector)
    vectors.check(IndexMap(corrector))
    shuffled = [queries[n] for n in np.random.default_rng(0).permutation(len(queries))]
    stale = vectors.take(drawn(vectors.count, FITTED_ON, seed=0))
    adapter = QueryAdapter.from_corrector(corrector, encode_queries(model, shuffled[judging:], args.batch_size), stale)
    adapted = adapter.append_to(model)
    found = certify(vectors, model, corpus, shuffled[:judging], corrector, adapter, args.k, batch_size=args.batch_size)
    make_folder(args.output.parent)
    partial = args.output.with_name(f".{args.output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        adapted.save_pretrained(str(partial))
        partial.rename(args.output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    if args.json:
        show({"output": str(args.output), "certificate": asdict(found)})
        return 0
    print(f"{args.output}: a model whose queries search {args.index}")
    print(found)
    return 0
