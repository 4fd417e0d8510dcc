"""``st-corrector serve-plan``: what to do with the index that serves."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..errors import InputError
from .arguments import (
    Commands,
    add_command,
    add_corpus,
    add_json,
    add_judging,
    add_queries,
    at_least_one,
    open_corpus,
    read_queries,
    show,
)

_EPILOG = """
  st-corrector serve-plan outputs/nq --index old.npy --corpus data/nq

measures on real queries what to do with INDEX, which the model from before the run has embedded: leave it, adapt the
new model's queries to it, upgrade it by the run's corrector, upgrade it and encode some targets again, or embed all
again. It prints the recall, the cost and a recommendation, and adds them to the run's record: `st-corrector report`
shows them. Nothing is written into the index. To carry out what is recommended: `adapter` and `upgrade-index`.
"""


def add_to(commands: Commands) -> None:
    """Add the command."""
    made = add_command(
        commands, "serve-plan", "measure what to do with the index that serves, and recommend one thing", _run, _EPILOG
    )
    made.add_argument("run", type=Path, help="the run's folder, or that of its model (RUN/final)")
    made.add_argument("--index", required=True, help="the embeddings that are served now")
    made.add_argument("--tensor", help="the tensor's name in a safetensors file")
    made.add_argument("--recall", type=float, default=0.9, help="the recall that is wanted (default: 0.9)")
    made.add_argument("--batch_size", type=at_least_one, default=64, metavar="N", help="texts in one forward pass")
    add_corpus(made)
    add_queries(made, "real queries")
    add_judging(made)
    add_json(made)


def _run(args: argparse.Namespace) -> int:
    from sentence_transformers import SentenceTransformer

    from ..carry_over.plan import serve_plan
    from ..correctors import Corrector
    from ..reporting.record import FILE, RunRecord, Serving, ServingChoice
    from ..stores.opening import open_vectors

    folder = next((each for each in (args.run / "final", args.run) if (each / "modules.json").exists()), None)
    if folder is None:
        raise InputError(f"There is no model in {args.run} or {args.run / 'final'}: expected a run's folder.")
    run = next((each for each in (args.run, args.run.parent) if (each / FILE).exists()), None)
    record = None if run is None else RunRecord.load(run)
    corpus = open_corpus(args)
    vectors = open_vectors(args.index, args.tensor, ids=corpus.ids(range(len(corpus))))
    vectors.require_rows()
    plan = serve_plan(
        vectors,
        SentenceTransformer(str(folder)),
        corpus,
        read_queries(args, corpus),
        Corrector.from_pretrained(folder) if (folder / "corrector").is_dir() else None,
        k=args.k,
        wanted=args.recall,
        judged=args.judged,
        batch_size=args.batch_size,
    )
    found = plan.as_dict()
    if args.json:
        show(found)
    else:
        print(plan)
    if run is None or record is None:
        print(f"{args.run} has no record of a run: the plan is not kept for a report.", file=sys.stderr)
    else:
        record.serving = Serving(**found | {"choices": [ServingChoice(**each) for each in found["choices"]]})
        record.save(run)
    return 0
