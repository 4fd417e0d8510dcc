"""Other pools to take negatives from, so that fewer targets are only ever negatives: what was tried, and is not in the
package.

    python benchmarks/pool.py --dataset data/nq --coverage high
    python benchmarks/pool.py --dataset data/nq --coverage low --own_pairs_share 0.36
    python benchmarks/pool.py --dataset data/nq --coverage ten-epochs
    python benchmarks/pool.py --dataset outputs/corpora/packages --coverage two-layers --seeds 0

The first are of a static encoder; the last is of two layers of MiniLM, on questions held out of the training questions.

The hardest targets of a whole corpus are mostly ones that no training question asks for, and a target that is only ever
a negative is pushed away from all questions. The rules:

- **positives-0.5**, **positives-1.0**: this share of each query's negatives are the hardest among the targets that are
  positives of other training questions, the rest as before;
- **limit-4**: a target is no negative while it has been one in more than four times as many steps as it has been a
  positive, plus four;
- **weight-1**: of eight times as many candidates those are taken whose logit is highest less the logarithm of
  (1 + steps in which it has been a negative) / (1 + steps in which it has been a positive).

One JSON a run; runs whose JSON is there are skipped. Without a rule they are corrected negatives, whose runs are those
of `strategies.py --preset labels`.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import set_seed
from untrusted_teachers import arguments

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "recipes"))
from command_line import RecipeArguments, load_model  # noqa: E402
from common import describe_device, versions  # noqa: E402
from data import HELD_OUT  # noqa: E402

from st_corrector import Corpus, CorpusRetrievalEvaluator, CorrectorTrainer  # noqa: E402
from st_corrector.losses.multiple_negatives import CorrectedMultipleNegativesLoss  # noqa: E402
from st_corrector.negatives.filters import is_in  # noqa: E402
from st_corrector.negatives.selector import NegativeSelector, Selection  # noqa: E402
from st_corrector.search.topk import NO_ROW  # noqa: E402

RULES = ("none", "positives-0.5", "positives-1.0", "limit-4", "weight-1")


class Regime(NamedTuple):
    """How much is trained, of what."""

    max_targets: int | None
    training: dict[str, Any]
    model: dict[str, Any]
    hold_out: int = 0


STATIC = {"encoder": "static"}
REGIMES = {
    "high": Regime(30_000, {"max_steps": 300, "per_device_train_batch_size": 64}, STATIC),
    "ten-epochs": Regime(30_000, {"max_steps": 1_120, "per_device_train_batch_size": 64}, STATIC),
    "low": Regime(None, {"max_steps": 60, "per_device_train_batch_size": 32}, STATIC),
    # As the evidence's settings are chosen.
    "two-layers": Regime(
        15_000,
        {"max_steps": 100, "per_device_train_batch_size": 48, "num_negatives": 2, "learning_rate": 5e-4},
        {"num_layers": 2, "max_seq_length": 48},
        hold_out=1_000,
    ),
}
_WIDER = 8  # times the wanted negatives are candidates of "weight"


class FromPositives(NegativeSelector):
    """A share of the negatives from the positives of other training questions."""

    def __init__(self, loss: CorrectedMultipleNegativesLoss, share: float) -> None:
        super().__init__(loss.negatives, loss.scale)
        self.loss, self.count = loss, round(share * loss.negatives.num_negatives)
        self.positives = torch.from_numpy(loss.corpus.qrels("train").row).unique()

    def select(self, search: Any, queries: torch.Tensor, exclude: torch.Tensor, *given: Any) -> Selection:
        vectors = self.loss.corrected.corrected(self.positives, by=self.loss.corrected.choosing_corrector)
        scores = (queries @ vectors.T).masked_fill(is_in(self.positives, exclude), -torch.inf)
        mine = self.positives[scores.topk(self.count).indices]
        chosen = super().select(search, queries, torch.cat([exclude, mine], dim=1), *given)
        others = chosen.rows[:, : self.loss.negatives.num_negatives - self.count]
        return chosen._replace(rows=torch.cat([mine, others], dim=1))


class Balanced(NegativeSelector):
    """Counts how often a target was positive and negative; ``limit`` excludes by it, otherwise it weighs the logits."""

    def __init__(self, loss: CorrectedMultipleNegativesLoss, limit: float | None, weight: float) -> None:
        super().__init__(loss.negatives, loss.scale)
        self.limit, self.weight, self.count = limit, weight, loss.negatives.num_negatives
        self.positive, self.negative = torch.zeros(2, len(loss.corpus)).unbind()

    @property
    def _pool(self) -> int:
        return self.count if self.limit is not None else self.count * _WIDER

    def select(
        self, search: Any, queries: torch.Tensor, exclude: torch.Tensor, positive_scores: torch.Tensor, *given: Any
    ) -> Selection:
        self.positive[given[0].unique()] += 1
        if self.limit is not None:
            worn = (self.negative >= self.limit * (1 + self.positive)).nonzero().flatten()
            exclude = torch.cat([exclude, worn.expand(len(queries), -1)], dim=1)
            chosen = super().select(search, queries, exclude, positive_scores, *given)
        else:
            _, rows, scores = self._candidates(
                search, queries, exclude, positive_scores.new_full((len(queries),), torch.inf)
            )
            odds = ((1 + self.negative) / (1 + self.positive)).log()[rows.clamp(min=0)]
            order = (scores * self.scale - self.weight * odds).masked_fill(rows == NO_ROW, -torch.inf)
            chosen = super().select(search, queries, exclude, positive_scores, *given)
            chosen = chosen._replace(rows=rows.gather(1, order.topk(self.count).indices))
        self.negative[chosen.rows[chosen.rows != NO_ROW].unique()] += 1
        return chosen


def change(loss: CorrectedMultipleNegativesLoss, rule: str) -> None:
    """Let ``loss`` select by ``rule``."""
    name, _, value = rule.partition("-")
    if name == "positives":
        loss.selector = FromPositives(loss, float(value))
    elif name in ("limit", "weight"):
        loss.selector = Balanced(loss, float(value) if name == "limit" else None, float(value))


def run(corpus: Corpus, rule: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    set_seed(seed)
    regime = REGIMES[args.coverage]
    training = arguments(
        args.outputs,
        seed,
        own_pairs_share=args.own_pairs_share,
        cache_path=str(args.outputs / "caches" / f"pool-{args.dataset.name}-{args.coverage}-{seed}"),
        logging_steps=10,
        **regime.training,
    )
    started = time.perf_counter()
    model = load_model(RecipeArguments(**regime.model), seed)
    trainer = CorrectorTrainer(model, training, corpus=corpus)
    (loss,) = trainer._corrected_losses().values()
    change(loss, rule)
    trainer.train()
    seconds = time.perf_counter() - started
    after = CorpusRetrievalEvaluator(corpus, HELD_OUT if regime.hold_out else "dev")(model)
    return {
        "seed": seed,
        "steps": trainer.state.global_step,
        "targets": len(corpus),
        "after": after,
        "seconds": round(seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, required=True, help="a BEIR folder")
    parser.add_argument("--coverage", choices=REGIMES, required=True)
    parser.add_argument("--rules", nargs="+", choices=RULES, default=RULES[1:])
    parser.add_argument("--own_pairs_share", type=float, default=0.0)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--outputs", type=Path, default=ROOT / "outputs", help="where embeddings go")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "labels" / "pool")
    args = parser.parse_args()
    regime = REGIMES[args.coverage]
    corpus = Corpus.from_beir(args.dataset, max_targets=regime.max_targets)
    if regime.hold_out:
        corpus.hold_out(regime.hold_out, into=HELD_OUT)
    own = "-own-pairs" if args.own_pairs_share else ""
    of_corpus = f"-{args.dataset.name}" if args.coverage == "two-layers" else ""
    for seed in args.seeds:
        for rule in args.rules:
            path = args.results / f"{args.coverage}{of_corpus}{own}" / f"{rule}-seed{seed}.json"
            if path.exists():
                continue
            found = run(corpus, rule, seed, args)
            path.parent.mkdir(parents=True, exist_ok=True)
            one = ["--dataset", args.dataset, "--coverage", args.coverage, "--rules", rule, "--seeds", seed]
            one += ["--own_pairs_share", args.own_pairs_share] if args.own_pairs_share else []
            command = shlex.join(["python", "benchmarks/pool.py", *map(str, one)])
            figures = {"rule": rule, "own_pairs_share": args.own_pairs_share, "command": command, **found}
            told = {"versions": versions(), "device": describe_device(torch.device("cpu"))}
            path.write_text(json.dumps(figures | told, indent=1) + "\n")
            print(f"{args.coverage}{own}: {rule}, seed {seed}: MRR@10 {100 * found['after']['mrr@10']:.1f}", flush=True)


if __name__ == "__main__":
    main()
