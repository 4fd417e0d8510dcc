"""The day after training: what each way to serve the new model gives, and whether certificates tell the truth.

    python benchmarks/serving.py --dataset data/nq                            # the study: about an hour on two cores
    python benchmarks/serving.py --dataset data/nq --pairs static --seeds 0   # one pair of models, some minutes
    python benchmarks/serving.py --dataset data/nq --coverage                 # how often intervals cover the truth

Each pair of models has one whose embeddings are served and one that is to replace it:

- ``static``: a static encoder, before and after training with corrected negatives, over all passages;
- ``transformer``: the first two layers of all-MiniLM-L6-v2, before and after, over 19,400 passages;
- ``unrelated``: latent semantic analysis with 256 dimensions (TF-IDF and a truncated SVD, as a search that was built
  without a neural network has it), then the trained two layers, over the same passages.

The questions of the training split teach the adapter and the order of re-encoding; those of dev are asked. For each way
the whole corpus is really searched, and compared with a re-embedded index: nDCG@10 and recall@100 by judgements, and
the share of a re-embedded index's first 10 and 100 that is kept. Beside it stands what ``serve_plan`` says of it,
having encoded a part. Of an unrelated model there is no corrector: one is fitted on the first targets encoded again.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from carry_over import TRAINING, two_layers, whole
from sentence_transformers import SentenceTransformer
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from torch import Tensor
from transformers import set_seed

from st_corrector import (
    Corpus,
    CorpusRetrievalEvaluator,
    Corrector,
    CorrectorTrainer,
    CorrectorTrainingArguments,
    EmbeddingCache,
    IndexMap,
    QueryAdapter,
    serve_plan,
)
from st_corrector.carry_over.certificate import as_served, encode_queries, interval
from st_corrector.carry_over.fitting import drawn, fit_to_pairs
from st_corrector.carry_over.query_adapter import FITTED_ON
from st_corrector.carry_over.reencoding import encoded_again, reencoding_order, use
from st_corrector.carry_over.sampling import Judged, Recalls
from st_corrector.carry_over.vectors import TensorVectors
from st_corrector.carry_over.ways import Way
from st_corrector.data.encoding import DocumentEncoder
from st_corrector.search.fidelity import overlap_at_k

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "recipes"))
from common import default_model, static_encoder, versions  # noqa: E402

NONE = np.empty(0, dtype=np.int64)
SHARES = (0.01, 0.05, 0.2)
SMALLER = 19_400  # passages, of which a transformer's training encodes more than of all
WIDTH_OF_LSA = 256
DRAWN = 2_000  # queries there are for the coverage; each draw takes JUDGING of them
JUDGING, DRAWS, SAMPLES = 200, 2_000, 6
CONFIDENCE = 0.95


class Pair(NamedTuple):
    """An index, the model that is to search it, and what the training run has left.

    Args:
        before: the old model, where it is one.
        old: served embeddings, ``(N, d)``.
        new: the model.
        corrector: of the training run, if the index is from before it.
        seconds: of training.
    """

    before: SentenceTransformer | None
    old: Tensor
    new: SentenceTransformer
    corrector: Corrector | None
    seconds: float | None


def trained(kind: str, corpus: Corpus, folder: Path, seed: int) -> Pair:
    """A model before and after training with corrected negatives."""
    set_seed(seed)

    def make() -> SentenceTransformer:
        if kind == "static":
            return static_encoder(default_model(), seed)
        model = two_layers()
        model.max_seq_length = 32
        return model

    model = make()
    cache = EmbeddingCache.build(model, corpus, folder / f"serving-{kind}-{len(corpus)}-{seed}", batch_size=256)
    args = CorrectorTrainingArguments(
        str(folder / f"run-{kind}"),
        corrector="mlp",
        cache_path=str(cache.path),
        seed=seed,
        warmup_steps=0.1,
        batch_sampler="no_duplicates",
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=10,
        use_cpu=True,
        dataloader_pin_memory=False,
        own_pairs_share=0.0,
        **TRAINING[kind],
    )
    started = time.perf_counter()
    trainer = CorrectorTrainer(model, args, corpus=corpus)
    trainer.train()
    return Pair(make(), whole(cache), model, trainer.trained_corrector(), time.perf_counter() - started)


def latent_semantic(corpus: Corpus) -> Tensor:
    """TF-IDF of titles and texts, reduced by a truncated SVD: an index that no neural network has made."""
    texts = corpus.texts(np.arange(len(corpus)))
    counted = TfidfVectorizer(sublinear_tf=True, min_df=2, stop_words="english").fit_transform(texts)
    reduced = TruncatedSVD(WIDTH_OF_LSA, random_state=0).fit_transform(counted)
    return F.normalize(torch.from_numpy(reduced).float(), dim=-1)


class Measured:
    """Ways to serve, each over the whole corpus.

    Args:
        encode_seconds: of one target.
    """

    def __init__(self, pair: Pair, corpus: Corpus, seed: int) -> None:
        self.pair, self.corpus, self.seed = pair, corpus, seed
        self.evaluator = CorpusRetrievalEvaluator(corpus, "dev")
        started = time.perf_counter()
        every = np.arange(len(corpus))
        fresh = DocumentEncoder(pair.new, corpus).encode(pair.new, every, batch_size=256).cpu()
        self.encode_seconds = (time.perf_counter() - started) / len(corpus)
        self.fresh, self.vectors = F.normalize(fresh, dim=-1), TensorVectors(pair.old)
        self.teaching = encode_queries(pair.new, list(corpus.qrels("train").queries["text"]), 256)
        self.asked = encode_queries(pair.new, list(corpus.qrels("dev").queries["text"]), 256)
        self.reference = self.found(self.asked, self.fresh)
        self.rows: list[dict[str, Any]] = []

    def found(self, queries: Tensor, embeddings: Tensor) -> Tensor:
        return torch.cat([(each @ embeddings.T).topk(100).indices for each in queries.split(256)])

    def encode(self, rows: np.ndarray) -> Tensor:
        return self.fresh[torch.from_numpy(rows)]

    def add(self, name: str, queries: Tensor, embeddings: Tensor, encoded: int, **more: Any) -> None:
        """A row: what these queries find among these embeddings."""
        found = self.found(queries, F.normalize(embeddings.float(), dim=-1))
        kept = {f"kept@{k}": overlap_at_k(found[:, :k], self.reference[:, :k]).mean().item() for k in (10, 100)}
        self.rows.append({"name": name, "encoded": encoded, "metrics": self.evaluator.score(found), **kept, **more})
        print(
            name,
            encoded,
            f"{100 * self.rows[-1]['metrics']['ndcg@10']:.1f}",
            f"{100 * kept['kept@10']:.1f}",
            flush=True,
        )

    def adapter(self, how: IndexMap) -> tuple[QueryAdapter, float]:
        sample = torch.from_numpy(drawn(len(self.corpus), FITTED_ON, self.seed))
        started = time.perf_counter()
        made = QueryAdapter.from_corrector(IndexMap(*how.correctors), self.teaching, self.pair.old[sample], self.seed)
        return made, time.perf_counter() - started

    def all(self) -> None:
        """All ways."""
        pair, every, count = self.pair, np.arange(len(self.corpus)), len(self.corpus)
        self.add("re-embedded", self.asked, self.fresh, count)
        if pair.before is not None:
            texts = list(self.corpus.qrels("dev").queries["text"])
            self.add("the old model over it", encode_queries(pair.before, texts, 256), pair.old, 0)
        if pair.old.shape[1] == self.fresh.shape[1]:
            self.add("unchanged", self.asked, pair.old, 0)
        generator = np.random.default_rng(self.seed)
        for share in SHARES:
            rows = np.sort(generator.permutation(count)[: round(share * count)])
            if pair.corrector is None:
                fitted = fit_to_pairs(self.vectors.take(rows), self.encode(rows), seed=self.seed)
                base = IndexMap(fitted, rows=rows, fresh=self.encode(rows))
                at_random = base
            else:
                base = IndexMap(pair.corrector)
                at_random = encoded_again(base, self.vectors, rows, self.encode)
            if share == SHARES[0]:
                if pair.corrector is not None:
                    adapter, seconds = self.adapter(base)
                    self.add("query adapter", adapter(self.asked), pair.old, 0, seconds=seconds)
                    self.add("upgraded", self.asked, base(pair.old), 0)
                first = base
                order = reencoding_order(base, self.vectors, self.teaching, NONE, progress=False)
                order = order[~np.isin(order, base.rows)]
            ways = {"in order": self.ordered(first, order, share), "at random": at_random}
            if pair.corrector is not None:
                by_use = use(first, self.vectors, self.teaching, NONE, progress=False).argsort(descending=True).numpy()
                ways["in order, none at random"] = self.ordered(first, by_use, share)
            if pair.corrector is not None and share > SHARES[0]:
                ways["in order, by uncertainty too"] = self.ordered(first, self.uncertain(first, rows), share)
            for name, how in ways.items():
                adapter, seconds = self.adapter(how)
                told = {"share": share, "order": name, "seconds": seconds}
                self.add("query adapter", adapter(self.asked), pair.old, len(how.rows), **told)
                self.add("upgraded", self.asked, how(pair.old, every), len(how.rows), **told)
                # As it was before mixtures were calibrated.
                if pair.corrector is not None and name in ("in order", "at random"):
                    mixed = IndexMap(pair.corrector, rows=how.rows, fresh=how.fresh)
                    self.add("upgraded, not corrected again", self.asked, mixed(pair.old, every), len(how.rows), **told)

    def ordered(self, first: IndexMap, order: np.ndarray, share: float) -> IndexMap:
        """A share of the corpus encoded again, in an order, with what had been before."""
        wanted = round(share * len(self.corpus)) - len(first.rows)
        return encoded_again(first, self.vectors, np.sort(order[:wanted]), self.encode) if wanted else first

    def uncertain(self, how: IndexMap, rows: np.ndarray) -> np.ndarray:
        """The order by use times the expected error, which a regression of random rows' errors on embeddings gives."""
        stale = F.normalize(self.pair.old.float(), dim=-1)
        known = encoded_again(how, self.vectors, rows, self.encode)
        errors = (IndexMap(*known.correctors)(stale[rows]) - self.encode(rows)).norm(dim=-1)
        given = torch.cat([stale, torch.ones(len(stale), 1)], dim=1)
        gram = given[rows].T @ given[rows] + torch.eye(given.shape[1])
        expected = (given @ torch.linalg.solve(gram, given[rows].T @ errors)).clamp_min(1e-3)
        used = use(how, self.vectors, self.teaching, NONE, progress=False)
        return (used * expected).argsort(descending=True).numpy()

    def planned(self) -> dict[str, Any]:
        """What :func:`serve_plan` says, and what it needed."""
        queries = list(self.corpus.qrels("dev").queries["text"])
        started = time.perf_counter()
        plan = serve_plan(
            self.pair.old, self.pair.new, self.corpus, queries, self.pair.corrector, batch_size=256, seed=self.seed
        )
        return plan.as_dict() | {"seconds": time.perf_counter() - started}


def study(args: argparse.Namespace) -> None:
    everything = Corpus.from_beir(args.dataset, max_targets=args.max_targets)
    smaller = Corpus.from_beir(args.dataset, max_targets=min(SMALLER, args.max_targets or SMALLER))
    for name in args.pairs:
        for seed in args.seeds if name == "static" else args.seeds[:1]:
            path = args.results / f"{name}-seed{seed}.json"
            if path.exists():
                continue
            corpus = everything if name == "static" else smaller
            pair = trained("static" if name == "static" else "transformer", corpus, args.caches, seed)
            if name == "unrelated":
                pair = Pair(None, latent_semantic(corpus), pair.new, None, None)
            measured = Measured(pair, corpus, seed)
            measured.all()
            write(
                path,
                {
                    "pair": name,
                    "seed": seed,
                    "targets": len(corpus),
                    "queries": len(measured.asked),
                    "widths": [pair.old.shape[1], measured.fresh.shape[1]],
                    "corrector": repr(pair.corrector),
                    "training_seconds": pair.seconds,
                    "encode_seconds": measured.encode_seconds,
                    "rows": measured.rows,
                    "plan": measured.planned(),
                },
                args.dataset,
            )


def coverage(args: argparse.Namespace) -> None:
    """Draw certificates again and again where the truth is known: the static encoder, all passages.

    ``DRAWN`` questions are all there are. For each, targets are drawn ``SAMPLES`` times; a draw takes ``JUDGING`` of
    the questions, and one of the samples of each.
    """
    corpus = Corpus.from_beir(args.dataset, max_targets=args.max_targets)
    measured = Measured(trained("static", corpus, args.caches, 0), corpus, 0)
    pair, vectors = measured.pair, measured.vectors
    queries, measured.teaching = measured.teaching[:DRAWN], measured.teaching[DRAWN:]
    base = IndexMap(pair.corrector)
    order = reencoding_order(base, vectors, measured.teaching, NONE, progress=False)
    more = encoded_again(base, vectors, np.sort(order[: round(0.01 * len(corpus))]), measured.encode)
    again = np.zeros(len(corpus), dtype=bool)
    again[order[: round(0.05 * len(corpus))]] = True
    ways = {
        "unchanged": as_served(vectors, queries, pair.new),
        "query adapter": as_served(vectors, measured.adapter(base)[0](queries), pair.new),
        "upgraded": Way(queries, vectors, base),
        "upgraded, 1 % encoded again": Way(queries, vectors, more),
    }
    planned = "upgraded, 5 % encoded again (estimated)"
    generator, found = np.random.default_rng(0), []
    for k in (10, 100):
        reference = torch.cat([(each @ measured.fresh.T).topk(k).indices for each in queries.split(256)])
        recalls: dict[str, list[Recalls]] = {name: [] for name in (*ways, planned)}
        encoded = []
        for seed in range(SAMPLES):
            judged = Judged.draw(ways, list(ways)[-1], queries, measured.encode, k, NONE, seed, progress=False)
            for name in ways:
                recalls[name].append(judged.recalls(name))
            recalls[planned].append(judged.recalls_with(again))
            few = [np.unique(np.concatenate([judged.samples[n].rows for n in some])) for some in _draws(generator, 20)]
            encoded += [len(rows) for rows in few]
        carried = more(pair.old, np.arange(len(corpus)))
        mixed = torch.where(torch.from_numpy(again)[:, None], measured.fresh, carried)
        for name, values in recalls.items():
            way = ways.get(name, Way(queries, TensorVectors(mixed)))
            index = way.take(way.vectors.take(np.arange(len(corpus))), np.arange(len(corpus)))
            own = torch.cat([(each @ index.T).topk(k).indices for each in way.queries.split(256)])
            truth = overlap_at_k(own, reference).numpy()
            drawn_at_once = np.stack([np.stack(each) for each in values])  # (samples, likely and at least, queries)
            intervals = []
            for some in _draws(generator, DRAWS):
                likely, at_least = drawn_at_once[generator.integers(SAMPLES, size=JUDGING), :, some].T
                mean, low, high = interval(Recalls(likely, at_least), k, CONFIDENCE)
                # JUDGING of DRAWN are not drawn from endlessly many: so much less is left to chance.
                less = (1 - JUDGING / DRAWN) ** 0.5
                intervals.append((mean, mean - less * (mean - low), mean + less * (high - mean)))
            means, lows, highs = np.array(intervals).T
            found.append(
                {
                    "k": k,
                    "way": name,
                    "truth": float(truth.mean()),
                    "bias": float(np.mean(means) - truth.mean()),
                    "half_width": float((highs - lows).mean() / 2),
                    "covered": float(((lows <= truth.mean()) & (truth.mean() <= highs)).mean()),
                    "too_high": float((lows > truth.mean()).mean()),
                    "encoded": float(np.mean(encoded)),
                }
            )
            print(found[-1], flush=True)
    told = {"queries": DRAWN, "judging": JUDGING, "draws": DRAWS, "samples": SAMPLES, "confidence": CONFIDENCE}
    write(args.results / "coverage.json", {**told, "targets": len(corpus), "rows": found}, args.dataset)


def _draws(generator: np.random.Generator, count: int) -> list[np.ndarray]:
    return [generator.choice(DRAWN, JUDGING, replace=False) for _ in range(count)]


def write(path: Path, result: dict[str, Any], dataset: str) -> None:
    said = " ".join(["python", "benchmarks/serving.py", *sys.argv[1:]]).replace(dataset, "<NQ>")
    result |= {"versions": versions(), "command": re.sub(r" --(caches|results) \S+", "", said)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(path, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="a BEIR folder with the splits train and dev")
    parser.add_argument("--max_targets", type=int, help="keep the first so many")
    parser.add_argument("--pairs", nargs="+", default=["static", "transformer", "unrelated"])
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the static encoder; of others the first"
    )
    parser.add_argument("--coverage", action="store_true", help="how often intervals cover the truth, instead")
    parser.add_argument("--caches", type=Path, default=ROOT / "outputs" / "caches")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "serving")
    args = parser.parse_args()
    (coverage if args.coverage else study)(args)


if __name__ == "__main__":
    main()
