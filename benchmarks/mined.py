"""Negatives for another trainer: sentence-transformers' own mining by the untrained encoder, and `mine_negatives` from
a trained run, each trained on by a new encoder in a plain MultipleNegativesRankingLoss.

    python benchmarks/mined.py --dataset data/nq

The trained run is that of the default; its corrected cache is mined from, and nothing is embedded again. Both data sets
are n-tuples of 8 negatives with the margin that sentence-transformers recommends (relative_margin=0.05). One JSON a
seed; seeds whose JSON is there are skipped.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from datasets import Dataset
from pool import COVERAGE, ROOT
from sentence_transformers import SentenceTransformerTrainer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from transformers import set_seed
from untrusted_teachers import arguments

from st_corrector import (
    Corpus,
    CorpusRetrievalEvaluator,
    CorrectorTrainer,
    FalseNegativeFilter,
    NegativeSettings,
    mine_negatives,
)

MARGIN = 0.05
RANGE = 1_000  # among nearer targets alone mining would leave half of the questions out, as they have too few negatives


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, required=True, help="a BEIR folder of Natural Questions")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--outputs", type=Path, default=ROOT / "outputs")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "mined")
    args = parser.parse_args()
    from common import default_model, static_encoder, versions
    from rivals import mine

    corpus = Corpus.from_beir(args.dataset, max_targets=COVERAGE["high"]["max_targets"])
    evaluator = CorpusRetrievalEvaluator(corpus, "dev")
    steps = COVERAGE["high"]["max_steps"]
    for seed in args.seeds:
        path = args.results / f"seed{seed}.json"
        if path.exists():
            continue

        def trained_on(tuples: Dataset, seed: int = seed) -> float:
            set_seed(seed)
            model = static_encoder(default_model(), seed)
            loss = MultipleNegativesRankingLoss(model)
            SentenceTransformerTrainer(model, arguments(args.outputs, seed, max_steps=steps), tuples, loss=loss).train()
            return float(evaluator(model)["mrr@10"])

        settings = arguments(
            args.outputs, seed, max_steps=steps, own_pairs_share=0.0, relative_margin=MARGIN, range_max=RANGE
        )
        started = time.perf_counter()
        by_untrained = mine(static_encoder(default_model(), seed), corpus, corpus.pairs("train"), settings)
        seconds_untrained = time.perf_counter() - started
        set_seed(seed)
        model = static_encoder(default_model(), seed)
        plain = arguments(args.outputs, seed, max_steps=steps, own_pairs_share=0.0)
        trainer = CorrectorTrainer(model, plain, corpus=corpus)
        trainer.train()
        (loss,) = trainer._corrected_losses().values()
        rules = NegativeSettings(8, false_negatives=FalseNegativeFilter(relative_margin=MARGIN))
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            by_trained = mine_negatives(
                model, corpus, loss.corrected, folder, negatives=rules, output_format="n-tuple", progress=False
            )
            seconds_trained = time.perf_counter() - started
            found = {
                "seed": seed,
                "mrr@10": {
                    "the trained run": float(evaluator(model)["mrr@10"]),
                    "mined by the untrained encoder": trained_on(by_untrained),
                    "mined from the trained run": trained_on(by_trained),
                },
                "tuples": {"untrained": len(by_untrained), "trained": len(by_trained)},
                "seconds_of_mining": {"untrained": round(seconds_untrained, 1), "trained": round(seconds_trained, 1)},
                "command": f"python benchmarks/mined.py --dataset {args.dataset} --seeds {seed}",
                "versions": versions(),
            }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=1) + "\n")
        print(found["mrr@10"], found["tuples"], found["seconds_of_mining"], flush=True)


if __name__ == "__main__":
    main()
