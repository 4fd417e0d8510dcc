"""``st-corrector upgrade-index``: carry served embeddings over to a newer model."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError
from .arguments import (
    Commands,
    add_command,
    add_corpus,
    add_json,
    add_judging,
    add_model,
    add_queries,
    amount,
    open_corpus,
    open_model,
    read_queries,
    show,
)

if TYPE_CHECKING:
    from ..carry_over.certificate import Certificate
    from ..carry_over.mapping import IndexMap

IN_PLACE = "in-place"
_EPILOG = """
INDEX is a .npy or .safetensors file of shape (targets, dimension), the folder of an embedding cache, or (by any other
name) a FAISS index whose vectors can be reconstructed. It is only read. Or it is a table, of PostgreSQL with pgvector
(postgresql://user@host/database#table) or of LanceDB (lancedb:folder#table), or a collection of Qdrant
(qdrant:folder#collection, qdrant:http://host:6333#collection): then OUTPUT is another one, or in-place.

  st-corrector upgrade-index old.npy new.npy --corrector outputs/nq/final
      with the corrector that was trained together with the new model

  st-corrector upgrade-index old.npy new.npy --corrector outputs/nq/final --model outputs/nq/final --corpus data/nq \\
      --reencode 5%
      the same, with those targets encoded again whose embeddings matter most, which improves the others, too

  st-corrector upgrade-index old.faiss new.faiss --fit ridge --model outputs/nq/final --corpus data/nq
      with a corrector fitted on 20,000 targets, which the new model encodes: for any two models

With --model and --corpus it certifies how much of a re-embedded index the new one returns, on targets that the new
model really encodes, for queries of --split, or of a file with one query per line. Then rows (FAISS: ids in ascending
order, repeated ones as they were added) must be those of the corpus. With --reencode some of the queries say what to
encode; the others judge.
"""


def add_to(commands: Commands) -> None:
    """Add the command."""
    made = add_command(
        commands,
        "upgrade-index",
        "carry an index over to a newer model without encoding its texts again, and certify what that keeps",
        _run,
        _EPILOG,
    )
    made.add_argument("index", help="the embeddings that are served now")
    made.add_argument(
        "output", help="where the new ones are written, in the same format; it must not exist. Of a table: in-place"
    )
    how = made.add_mutually_exclusive_group(required=True)
    how.add_argument("--corrector", help="a trained corrector: a folder or a Hub id")
    how.add_argument("--fit", metavar="KIND", help="fit a corrector on targets that --model encodes: ridge, mlp, …")
    made.add_argument("--fit_sample", type=int, default=20_000, metavar="N", help="targets to fit it on")
    made.add_argument("--reencode", type=amount, metavar="SHARE", help="targets to encode again: 5%%, or a number")
    made.add_argument("--tensor", help="the tensor's name in a safetensors file")
    made.add_argument("--factory", help="make the new FAISS index from this string, instead of one of the same kind")
    add_model(made, "the new model", required=False)
    add_corpus(made, required=False)
    add_queries(made, "real queries")
    add_judging(made)
    add_json(made)


def _run(args: argparse.Namespace) -> int:
    import numpy as np

    from ..carry_over.certificate import UNCHANGED, UPGRADED, as_served, certificate, encode_queries, encoder_of
    from ..carry_over.fitting import drawn, fit_to_pairs, require_fitted
    from ..carry_over.mapping import IndexMap, by_cosine
    from ..carry_over.reencoding import encoded_again, reencoding_order
    from ..carry_over.sampling import Judged, require
    from ..carry_over.ways import Way
    from ..correctors import Corrector, Frames
    from ..data.encoding import DocumentEncoder, QueryEncoder
    from ..stores.base import Store
    from ..stores.opening import open_vectors

    if args.fit is not None:
        require_fitted(args.fit)
    if (args.model is None) != (args.corpus is None) or ((args.fit or args.reencode) and args.model is None):
        raise InputError("--model and --corpus go together, and --fit and --reencode need both.")
    corpus = None if args.corpus is None else open_corpus(args)
    vectors = open_vectors(
        args.index, args.tensor, args.factory, None if corpus is None else corpus.ids(range(len(corpus)))
    )
    if isinstance(vectors, Store):
        output = None if args.output == IN_PLACE else args.output
        vectors.require_output(output)
    elif args.output == IN_PLACE:
        raise InputError(f"{args.index} is no store, and is never written over: say where the new one is to be.")
    elif Path(args.output).exists():
        raise InputError(f"{args.output} exists already: choose another name, or move it away.")
    else:
        output = args.output
    if corpus is None:
        how = IndexMap(Corrector.from_pretrained(args.corrector))
        vectors.upgrade(how, output)
        print("What this keeps was not certified: pass --model and --corpus.", file=sys.stderr)
        return _said(args, vectors.count, how, None)
    vectors.require_rows()
    model = open_model(args)
    vectors.require_corpus(corpus)
    queries = read_queries(args, corpus)
    judging = min(args.judged, len(queries) // 2 if args.reencode else len(queries))
    require(judging, args.k, len(corpus) - len(corpus.withdrawn))
    asked = encode_queries(
        model, [queries[n] for n in np.random.default_rng(0).permutation(len(queries))], args.batch_size
    )
    encode = encoder_of(model, corpus, args.batch_size, progress=True)
    if args.corrector is not None:
        how = IndexMap(Corrector.from_pretrained(args.corrector))
    else:
        others = np.setdiff1d(np.arange(vectors.count), corpus.withdrawn)
        rows = others[drawn(len(others), args.fit_sample, seed=0)]
        print(f"Encoding {len(rows):,} targets to fit the corrector on.", file=sys.stderr)
        stale = vectors.take(rows)  # before they are encoded: what changes meanwhile is found by it
        fresh, unit = encode(rows), by_cosine(model)
        corrector = fit_to_pairs(stale, fresh, args.fit, unit=unit)
        corrector.frames = Frames(vectors.fingerprint, DocumentEncoder(model, corpus).fingerprint(model), unit)
        how = IndexMap(corrector, rows=rows, fresh=fresh)
    vectors.check(how)
    if args.reencode is not None:
        order = reencoding_order(how, vectors, asked[judging:], corpus.withdrawn)
        order = order[~np.isin(order, how.rows)]
        rows = np.sort(order[: args.reencode.of(vectors.count)])
        print(f"Encoding {len(rows):,} targets again.", file=sys.stderr)
        how = encoded_again(how, vectors, rows, encode) if len(rows) else how
    if len(how.rows):  # a run that was killed may encode them to other last bits
        begun_with = [args.fit, args.fit_sample] if args.corrector is None else IndexMap(how.correctors[0]).digest
        how.made_of = [begun_with, DocumentEncoder(model, corpus).fingerprint(model)]
        if args.reencode is not None:  # which targets, the queries say, as the model asks them
            asking = QueryEncoder(model, corpus).fingerprint(model)
            how.made_of += [queries, judging, args.reencode, asking]
    vectors.upgrade(how, output)

    def certified() -> Certificate:
        try:
            ways = {UPGRADED: as_served(vectors.at(output), asked[:judging], model)}
        except InputError:
            if isinstance(vectors, Store):
                raise
            # A FAISS index that does not give its vectors back.
            ways = {UPGRADED: Way(asked[:judging], vectors, how)}
        if vectors.dim == how.new_dim:
            ways = {UNCHANGED: as_served(vectors.before(output), asked[:judging], model), **ways}
        found = Judged.draw(ways, UPGRADED, asked[:judging], encode, args.k, corpus.withdrawn)
        return certificate(found, confidence=0.95)

    try:
        return _said(args, vectors.count, how, certified())
    except InputError as error:
        if not isinstance(vectors, Store):
            raise
        # Somebody may have deleted rows meanwhile. What was upgraded serves.
        print(f"Upgraded, but what this keeps was not certified: {error}", file=sys.stderr)
        return _said(args, vectors.count, how, None)


def _said(args: argparse.Namespace, rows: int, how: IndexMap, found: Certificate | None) -> int:
    if args.json:
        kept = None if found is None else asdict(found)
        show({"output": str(args.output), "rows": rows, "corrector": repr(how), "certificate": kept})
        return 0
    print(f"{args.output}: {rows:,} embeddings, carried over by {how!r}")
    if found is not None:
        print(found)
    return 0
