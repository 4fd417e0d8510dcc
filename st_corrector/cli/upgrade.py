"""``st-corrector upgrade-index``: carry served embeddings over to a newer model."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError
from .arguments import Commands, add_command, add_corpus, add_json, add_model, open_corpus, open_model, show

if TYPE_CHECKING:
    from ..data.corpus import Corpus

_EPILOG = """
INDEX is a .npy or .safetensors file of shape (targets, dimension), the folder of an embedding cache, or (by any other
name) a FAISS index whose vectors can be reconstructed. It is only read.

  st-corrector upgrade-index old.npy new.npy --corrector outputs/nq/final
      with the corrector that was trained together with the new model

  st-corrector upgrade-index old.faiss new.faiss --fit ridge --model outputs/nq/final --corpus data/nq
      with one fitted on 20,000 targets, which the new model encodes: for any two models

With --model and --corpus it estimates what the new index keeps of a re-embedded one, on a sample that the new model
really encodes, for the queries of --split, or of a file with one query per line. Then rows (FAISS: ids in ascending
order, repeated ones as they were added) must be those of the corpus.
"""


def add_to(commands: Commands) -> None:
    """Add the command."""
    made = add_command(
        commands,
        "upgrade-index",
        "carry an index over to a newer model without encoding its texts again, and estimate what that keeps",
        _run,
        _EPILOG,
    )
    made.add_argument("index", type=Path, help="the embeddings that are served now")
    made.add_argument("output", type=Path, help="where the new ones are written, in the same format; it must not exist")
    how = made.add_mutually_exclusive_group(required=True)
    how.add_argument("--corrector", help="a trained corrector: a folder or a Hub id")
    how.add_argument("--fit", metavar="KIND", help="fit a corrector on targets that --model encodes: ridge, mlp, …")
    made.add_argument("--fit_sample", type=int, default=20_000, metavar="N", help="targets to fit it on")
    made.add_argument("--tensor", help="the tensor's name in a safetensors file")
    made.add_argument("--factory", help="make the new FAISS index from this string, instead of one of the same kind")
    add_model(made, "the new model", required=False)
    add_corpus(made, required=False)
    made.add_argument("--split", default="dev", help="the queries of the estimate (default: dev)")
    made.add_argument("--queries", type=Path, help="or a file with one query per line")
    made.add_argument("--sample", type=int, default=5_000, metavar="N", help="targets encoded again for the estimate")
    add_json(made)


def _run(args: argparse.Namespace) -> int:
    import numpy as np

    from ..carry_over.estimate import estimate_carry_over, estimated_depths, sample_rows
    from ..carry_over.fitting import drawn, fit_to_pairs, require_fitted
    from ..carry_over.opening import open_vectors
    from ..correctors import Corrector, Frames
    from ..data.encoding import DocumentEncoder

    if args.fit is not None:
        require_fitted(args.fit)
    if (args.model is None) != (args.corpus is None) or (args.fit and args.model is None):
        raise InputError("--model and --corpus go together, and --fit needs both.")
    vectors = open_vectors(args.index, args.tensor, args.factory)
    if args.output.exists():
        raise InputError(f"{args.output} exists already: choose another name, or move it away.")
    model = corpus = None
    queries: list[str] = []
    if args.model is not None:
        vectors.require_rows()
        corpus, model = open_corpus(args), open_model(args)
        if vectors.count != len(corpus):
            raise InputError(
                f"{args.index} has {vectors.count:,} rows, the corpus {len(corpus):,} targets: --max_targets cuts it."
            )
        queries = _queries(args, corpus)
    fitted_on = drawn(vectors.count, args.fit_sample, seed=0) if args.fit else None
    asked_of = np.empty(0, dtype=np.int64)
    if corpus is not None:
        asked_of = sample_rows(corpus, args.sample, without=fitted_on)
        estimated_depths(len(asked_of), len(corpus))
    if model is None or corpus is None or fitted_on is None:
        corrector = Corrector.from_pretrained(args.corrector)
    else:
        print(f"Encoding {len(fitted_on):,} targets to fit the corrector on.", file=sys.stderr)
        encoder = DocumentEncoder(model, corpus)
        fresh = encoder.encode(model, fitted_on, batch_size=args.batch_size).cpu()
        unit = model.similarity_fn_name == "cosine"
        corrector = fit_to_pairs(vectors.take(fitted_on), fresh, args.fit, unit=unit)
        corrector.frames = Frames(vectors.fingerprint, encoder.fingerprint(model), unit)
    vectors.upgrade(corrector, args.output)
    estimate = None
    if model is None or corpus is None:
        print("What this keeps was not estimated: pass --model and --corpus.", file=sys.stderr)
    else:
        estimate = estimate_carry_over(
            vectors.take(asked_of), asked_of, corrector, model, corpus, queries, batch_size=args.batch_size
        )
    if args.json:
        found = None if estimate is None else asdict(estimate)
        show({"output": str(args.output), "rows": vectors.count, "corrector": repr(corrector), "estimate": found})
        return 0
    print(f"{args.output}: {vectors.count:,} embeddings, carried over by {corrector!r}")
    if estimate is not None:
        print(estimate)
    return 0


def _queries(args: argparse.Namespace, corpus: Corpus) -> list[str]:
    if args.queries is None:
        return list(corpus.qrels(args.split).queries["text"])
    try:
        lines = args.queries.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"{args.queries} is not UTF-8 text ({error}).") from error
    queries = [line.strip() for line in lines if line.strip()]
    if len(queries) < 2:
        raise InputError(f"{args.queries} has {len(queries)} queries: expected at least two, one per line.")
    return queries
