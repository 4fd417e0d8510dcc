"""What a step costs where the document encoder is frozen: targets looked up, and the same step with targets encoded.

    python benchmarks/frozen_documents.py --dataset data/nq

Both towers are all-MiniLM-L6-v2, that of the documents frozen. A step is forward, backward and optimizer; the two ways
take turns. Before anything is timed, their losses and gradients are compared.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Router
from step import default_model, machine
from teacher_cost import BATCH, NEGATIVES, ROOT, TOKENS, step

from st_corrector import Corpus, CorrectedMultipleNegativesLoss, EmbeddingCache, NegativeSettings


def towers() -> SentenceTransformer:
    """One all-MiniLM-L6-v2 for queries, and another for documents that is frozen; without dropout, so that both ways
    compute the same.
    """
    query = SentenceTransformer(default_model(), device="cpu")
    query.max_seq_length = TOKENS
    for module in query.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    document = copy.deepcopy(query).requires_grad_(False)
    router = Router.for_query_document(query_modules=list(query), document_modules=list(document))
    return SentenceTransformer(modules=[router], device="cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="a BEIR folder")
    parser.add_argument("--targets", type=int, default=2_000)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "frozen-documents.json")
    args = parser.parse_args()
    torch.manual_seed(0)
    corpus = Corpus.from_beir(args.dataset, max_targets=args.targets)
    pairs, model = corpus.pairs("train"), towers()
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-5)
    with tempfile.TemporaryDirectory() as folder:
        cache = EmbeddingCache.build(model, corpus, folder)
        looked_up, encoded = (
            CorrectedMultipleNegativesLoss(model, corpus, cache, negatives=NegativeSettings(NEGATIVES))
            for _ in range(2)
        )
        assert looked_up.corrected.is_fixed
        encoded.corrected.is_fixed = False
        model.train()
        turns, compared = [], []
        for turn in range(args.turns + 2):
            batch = pairs[list(range(turn * BATCH, (turn + 1) * BATCH))]
            columns = [
                {**model.preprocess(batch[name], task=task), "task": task}
                for name, task in (("anchor", "query"), ("positive", "document"))
            ]
            labels = torch.tensor(batch["label"])
            if turn == 0:
                for loss in (looked_up, encoded):
                    model.zero_grad()
                    value = loss([dict(each) for each in columns], labels)["task_loss"]
                    value.backward()
                    gradients = [each.grad.flatten() for each in model.parameters() if each.grad is not None]
                    compared.append((float(value), torch.cat(gradients)))
                (one, ours), (other, theirs) = compared
                apart = float((ours - theirs).norm() / theirs.norm())
                assert abs(one - other) < 1e-3 * other and apart < 1e-2, (one, other, apart)
            turns.append([step(loss, optimizer, columns, labels)[0] for loss in (encoded, looked_up)])
    counted = turns[2:]
    result = {
        "targets": len(corpus),
        "batch": f"{BATCH} questions, {NEGATIVES} negatives each, {TOKENS} tokens",
        "seconds_encoded": statistics.median(before for before, _ in counted),
        "seconds_looked_up": statistics.median(after for _, after in counted),
        "ratio": statistics.median(after / before for before, after in counted),
        "turns": counted,
        "gradients_apart": apart,
        "machine": machine("cpu"),
        "command": f"python benchmarks/frozen_documents.py --dataset {args.dataset}",
    }
    args.results.parent.mkdir(parents=True, exist_ok=True)
    args.results.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({name: value for name, value in result.items() if name != "turns"}, indent=1))


if __name__ == "__main__":
    main()
