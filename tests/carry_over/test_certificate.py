"""What a certificate says of a re-embedded index is true as often as it claims, though it sees a part of it."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_static_model
from support.encoders import moved

from st_corrector import IndexMap, InputError, QueryAdapter, RidgeCorrector, certify, fit_corrector, serve_plan
from st_corrector.carry_over import plan, sampling
from st_corrector.carry_over.certificate import interval
from st_corrector.carry_over.reencoding import EVERY, encoded_again, reencoding_order, use
from st_corrector.carry_over.sampling import Judged, Recalls, Sample
from st_corrector.carry_over.vectors import TensorVectors
from st_corrector.carry_over.ways import Way, search
from st_corrector.data.encoding import DocumentEncoder
from st_corrector.search.fidelity import overlap_at_k
from st_corrector.stores.opening import open_vectors

NONE = np.empty(0, dtype=np.int64)


class World:
    """An index, what it should be, what a corrector makes of it, and queries."""

    def __init__(self, targets: int, queries: int, noise: float = 0.35, dim: int = 16) -> None:
        generator = torch.Generator().manual_seed(0)

        def unit(count: int) -> torch.Tensor:
            return F.normalize(torch.randn(count, dim, generator=generator), dim=-1)

        self.fresh, self.queries = unit(targets), unit(queries)
        self.old = F.normalize(self.fresh + unit(targets), dim=-1)
        self.carried = F.normalize(self.fresh + noise * unit(targets), dim=-1)

    def encode(self, rows: np.ndarray) -> torch.Tensor:
        return self.fresh[torch.from_numpy(rows)]

    def ways(self, queries: torch.Tensor) -> dict[str, Way]:
        return {"old": Way(queries, TensorVectors(self.old)), "new": Way(queries, TensorVectors(self.carried))}

    def recall(self, embeddings: torch.Tensor, k: int) -> np.ndarray:
        """The truth, for each query."""
        found = [(self.queries @ each.T).topk(k).indices for each in (embeddings, self.fresh)]
        return overlap_at_k(*found).numpy()


@pytest.mark.parametrize(
    ("k", "targets", "draws"),
    [(10, 6_000, 4), *(pytest.param(k, 20_000, 12, marks=pytest.mark.long) for k in (1, 10, 100))],
)
def test_recall_is_right_and_intervals_cover_the_truth_as_often_as_they_claim(k, targets, draws):
    """800 queries are all there are; each draw takes 100 of them, and other targets."""
    world = World(targets, 800)
    found = {"old": [], "new": []}
    for seed in range(draws):
        ways = world.ways(world.queries)
        judged = Judged.draw(ways, "new", world.queries, world.encode, k, NONE, seed, progress=False)
        for name, recalls in found.items():
            recalls.append(judged.recalls(name))
    for name, embeddings in (("old", world.old), ("new", world.carried)):
        truth = world.recall(embeddings, k).mean()
        assert abs(np.mean([each.likely for each in found[name]]) - truth) < 0.015 and 0.05 < truth < 0.9
        assert 0.86 < covered(found[name], k, truth) < 0.95, name


def covered(recalls: list[Recalls], k: int, truth: float) -> float:
    """How often an interval of 90 % that 100 queries give covers the truth."""
    generator, times = np.random.default_rng(0), []
    for _ in range(600):
        chosen, samples = generator.choice(800, 100, replace=False), generator.integers(len(recalls), size=100)
        drawn = [
            np.array([recalls[n][which][query] for n, query in zip(samples, chosen, strict=True)]) for which in (0, 1)
        ]
        mean, low, high = interval(Recalls(*drawn), k, 0.9)
        # Of 800 queries, 100 are an eighth: what is left to chance is so much less.
        less = (7 / 8) ** 0.5
        times.append(mean - less * (mean - low) <= truth <= mean + less * (high - mean))
    return float(np.mean(times))


@pytest.mark.parametrize("noise", [0.7, 1.5])
def test_where_a_corrector_is_bad_the_interval_reaches_down_to_what_is_certain(noise):
    """Then much of what belongs to the first k is far down, where few are drawn."""
    world = World(20_000, 200, noise)
    judged = Judged.draw(world.ways(world.queries), "new", world.queries, world.encode, 10, NONE, 0, progress=False)
    truth = world.recall(world.carried, 10).mean()
    recalls = judged.recalls("new")
    mean, low, high = interval(recalls, 10, 0.95)
    assert truth < 0.2 and low <= truth <= high < truth + 0.1 and 0 <= low <= mean <= high
    assert recalls.at_least.mean() < truth < recalls.likely.mean()


@pytest.mark.parametrize(("recall", "queries"), [(0.99, 200), (0.98, 100), (0.999, 200), (0.9, 30)])
@pytest.mark.parametrize("k", [1, 10])
def test_intervals_cover_the_truth_near_one_too(recall, queries, k):
    generator, times = np.random.default_rng(0), []
    for _ in range(1_000):
        values = generator.binomial(k, recall, queries) / k
        _, low, high = interval(Recalls(values, values), k, 0.95)
        times.append(low <= recall <= high)
    assert np.mean(times) > 0.93, np.mean(times)
    every = interval(Recalls(np.ones(20), np.ones(20)), 10, 0.95)
    assert every.mean == every.high == 1 and 0.95 < every.low < 1, "20 queries are not certain"


def test_where_all_is_encoded_recall_is_exact():
    world = World(120, 40)
    judged = Judged.draw(world.ways(world.queries), "new", world.queries, world.encode, 10, NONE, 0, progress=False)
    assert judged.encoded == 120
    for name, embeddings in (("old", world.old), ("new", world.carried)):
        for each in judged.recalls(name):
            np.testing.assert_allclose(each, world.recall(embeddings, 10), atol=1e-6)
    again = np.zeros(120, dtype=bool)
    again[::3] = True
    mixed = torch.where(torch.from_numpy(again)[:, None], world.fresh, world.carried)
    for each in judged.recalls_with(again):
        np.testing.assert_allclose(each, world.recall(mixed, 10), atol=1e-6)


@pytest.mark.parametrize("noise", [0.35, 1.0])
def test_what_encoding_some_again_will_give_is_foretold(noise):
    world = World(20_000, 400, noise)
    judged = Judged.draw(world.ways(world.queries), "new", world.queries, world.encode, 10, NONE, 0, progress=False)
    again = np.zeros(20_000, dtype=bool)
    again[np.random.default_rng(1).permutation(20_000)[:6_000]] = True
    mixed = torch.where(torch.from_numpy(again)[:, None], world.fresh, world.carried)
    truth = world.recall(mixed, 10).mean()
    found = judged.recalls_with(again)
    # Where a corrector is bad, what comes up from far down is rarely drawn: too low, and never too high.
    assert -(0.02 if noise < 0.5 else 0.1) < found.likely.mean() - truth < 0.02
    assert interval(found, 10, 0.95).low <= truth
    assert abs(truth - world.recall(world.carried, 10).mean()) > 0.04, "it makes a difference"


def test_withdrawn_targets_are_neither_returned_nor_encoded():
    world, withdrawn = World(3_000, 30), np.arange(0, 3_000, 2)
    seen = []

    def encode(rows: np.ndarray) -> torch.Tensor:
        seen.append(rows)
        return world.encode(rows)

    judged = Judged.draw(world.ways(world.queries), "new", world.queries, encode, 10, withdrawn, 0, progress=False)
    assert not np.isin(np.concatenate(seen), withdrawn).any()
    world.fresh, world.carried = world.fresh[1::2], world.carried[1::2]
    assert judged.recalls("new").likely.mean() == pytest.approx(world.recall(world.carried, 10).mean(), abs=0.03)


def test_a_target_from_far_down_pushes_out_as_many_as_it_stands_for():
    fresh, carried = np.array([0.9, 0.8, 0.7, 0.85]), np.array([0.9, 0.8, 0.7, 0.1])
    sample = Sample(np.arange(4), np.array([1.0, 1.0, 1.0, 30.0]), fresh, carried)
    # In all it is the first two; counted near the top alone, 0.8 is pushed out, thirty times.
    assert sample.recall(np.array([1.0, 1.0, 0.0, 0.0]), 2) == pytest.approx((1 / 2, (2 - 30) / 2))
    assert sample.recall(np.array([0.0, 0.0, 1.0, 0.0]), 2) == (0, 0)
    assert sample.recall_with(np.array([False, False, False, True]), 2) == pytest.approx((1.0, 1 / 2))


def test_every_way_is_searched_as_it_would_be_alone():
    world = World(40_000, 9)
    half = Way(world.queries, TensorVectors(world.old), lambda stale, rows: stale * torch.from_numpy(rows % 2)[:, None])
    found = search({**world.ways(world.queries), "half": half}, {"old": 5, "new": 7, "half": 3}, np.array([1]), False)
    for name, embeddings, k in (("old", world.old, 5), ("new", world.carried, 7)):
        scores = world.queries @ embeddings.T
        scores[:, 1] = -torch.inf
        assert torch.equal(found[name].rows, scores.topk(k).indices)
    assert (found["half"].rows % 2 == 1).all()


def test_an_order_begins_with_what_queries_get(large):
    world = World(3_000, 300)
    how, vectors = IndexMap(RidgeCorrector(16)), TensorVectors(world.carried)
    withdrawn = np.array([5, 6])
    order = reencoding_order(how, vectors, world.queries, withdrawn, progress=False)
    assert np.array_equal(np.sort(order), np.setdiff1d(np.arange(3_000), withdrawn))
    used = use(how, vectors, world.queries, withdrawn, progress=False).numpy()
    at_random = np.arange(len(order)) % EVERY == EVERY - 1
    assert (np.diff(used[order[~at_random]]) <= 0).all(), "by use"
    first, few = used[order[:800][~at_random[:800]]], used[order[:800][at_random[:800]]]
    assert few.mean() < first.min(), "every fourth is a random one"
    assert abs(few.mean() - used.mean()) < 3 * used.std() / len(few) ** 0.5, "of all"
    first = (world.queries @ world.carried.T).argmax(1).numpy()
    place = np.empty(3_000)
    place[order] = np.arange(len(order))
    assert place[np.setdiff1d(first, withdrawn)].mean() < 900
    gains = {}
    for name, rows in (("order", order[:600]), ("random", np.random.default_rng(0).permutation(3_000)[:600])):
        again = encoded_again(how, vectors, np.sort(rows), world.encode)
        torch.testing.assert_close(again.fresh, world.fresh[np.sort(rows)])
        assert len(again.correctors) == 2
        gains[name] = world.recall(again(world.carried, np.arange(3_000)), 10).mean()
    assert gains["order"] > gains["random"] + 0.02 and gains["random"] > world.recall(world.carried, 10).mean()
    with pytest.raises(InputError, match="encoded again already"):
        encoded_again(again, vectors, np.sort(rows)[:5], world.encode)


def all_of(model, corpus) -> torch.Tensor:
    return DocumentEncoder(model, corpus, progress=False).encode(model, np.arange(len(corpus)))


@pytest.mark.parametrize(("k", "nearest", "next"), [(10, 40, 25), (100, 150, 60)])
def test_at_greater_depth_more_is_drawn_of_what_is_near(k, nearest, next):
    ranked = np.random.default_rng(0).permutation(50_000)
    rows, weights = sampling._draw(ranked[:k], ranked[: 100 * k], k, 50_000, NONE, np.random.default_rng(1))
    drawn = [np.isin(rows, ranked[start * k : end * k]).sum() for start, end in ((0, 1), (1, 5), (5, 10), (10, 30))]
    assert drawn == [k, nearest, next, 20] and weights.sum() == pytest.approx(50_000)


def test_certify_and_plan_for_models_and_a_corpus(large):
    old, new = make_static_model(), moved()
    embeddings, queries = all_of(old, large), list(large.qrels("dev").queries["text"][:400])
    corrector = fit_corrector(old, new, large, sample=200, progress=False)
    asked = new.encode_query(queries[200:], convert_to_tensor=True)
    adapter = QueryAdapter.from_corrector(corrector, asked, embeddings)
    found = certify(embeddings, new, large, queries[:200], corrector, adapter, progress=False)
    fresh, judging = all_of(new, large), new.encode_query(queries[:200], convert_to_tensor=True)
    reference = (judging @ fresh.T).topk(10).indices
    carried = IndexMap(corrector)(embeddings)
    for name, asking, index in (
        ("unchanged", judging, embeddings),
        ("query adapter", adapter(judging), embeddings),
        ("upgraded", judging, carried),
    ):
        truth = overlap_at_k((asking @ index.T).topk(10).indices, reference).mean().item()
        mean, low, high = found.recall[name]
        assert mean == pytest.approx(truth, abs=0.02) and low < mean < high and name in str(found)
    assert list(found.recall) == ["unchanged", "query adapter", "upgraded"] and found.encoded <= len(large)
    wanted = found.recall["query adapter"].low - 0.1
    plan = serve_plan(embeddings, new, large, queries, corrector, wanted=wanted, progress=False)
    names = [each.name for each in plan.choices]
    assert names[0] == "unchanged" and {"query adapter", "upgraded", "re-embedded"} < set(names)
    assert plan.recommended.name == "query adapter" and "query adapter ←" in str(plan)
    certain = serve_plan(embeddings, new, large, queries, corrector, wanted=1.0, progress=False)
    assert certain.recommended.name == "re-embedded" and certain.recommended.encodings == len(large)
    # Without a corrector one is fitted, and its encodings are counted.
    bare = serve_plan(embeddings, new, large, queries, wanted=0.5, progress=False)
    assert min(each.encodings for each in bare.choices if each.name.startswith("upgraded")) > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"queries": ["word1"] * 19}, "At least 20 queries must judge"),
        ({"k": 0}, "k must be from 1"),
        ({"confidence": 95}, "confidence is a share"),
        ({"index": torch.zeros(9, 24)}, "memory> has 9 rows, the corpus"),
        ({"index": np.zeros((2000, 12), dtype=np.float32)}, "12 dimensions, the model's queries 24: pass a corrector"),
        ({"corrector": RidgeCorrector(12)}, "the corrector maps from 12"),
        ({"index": torch.zeros(2000, 24, dtype=torch.int64)}, "floating-point"),
    ],
)
def test_what_cannot_be_certified_is_refused(large, change, message):
    given = {"index": torch.zeros(len(large), 24), "queries": ["word1 word2"] * 30, "k": 10, "corrector": None}
    given |= {"confidence": 0.95, **change}
    if len(given["index"]) == 2000:
        given["index"] = _tall(given["index"], large)
    with pytest.raises(InputError, match=message):
        certify(
            given["index"], moved(), large, given["queries"], given["corrector"], None, given["k"], given["confidence"]
        )


def _tall(index, large):
    """As many rows as there are targets."""
    repeated = np.resize(np.asarray(index), (len(large), index.shape[1]))
    return torch.from_numpy(repeated) if isinstance(index, torch.Tensor) else repeated


def test_a_query_that_is_asked_again_and_again_counts_once(large):
    with pytest.raises(InputError, match="At least 20 queries must judge how much is kept, got 1"):
        serve_plan(torch.randn(len(large), 24), moved(), large, ["word1", "word2"] * 300, progress=False)


def test_models_that_compare_otherwise_are_refused(large):
    model = moved()
    model.similarity_fn_name = "euclidean"
    with pytest.raises(InputError, match="compares by 'euclidean'"):
        certify(torch.randn(len(large), 24), model, large, ["word1 word2"] * 30, progress=False)


QUERIES = [f"word{n} word{n + 1}" for n in range(300)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"queries": QUERIES[:60]}, "not enough to teach and to judge"),
        ({"k": 100_000}, "k must be from 1"),
        ({"judged": 5}, "At least 20 queries must judge"),
        ({"judged": -5}, "At least 20 queries must judge"),
        ({"wanted": 0.0}, "are shares"),
        ({"confidence": 1.0}, "are shares"),
        ({"index": torch.zeros(3, 24)}, "memory> has 3 rows"),
    ],
)
def test_what_cannot_be_planned_is_refused(large, change, message):
    given = {"index": torch.randn(len(large), 24), "queries": QUERIES, "wanted": 0.9, "confidence": 0.9}
    given |= change
    index, queries = given.pop("index"), given.pop("queries")
    with pytest.raises(InputError, match=message):
        serve_plan(index, moved(), large, queries, progress=False, **given)


@pytest.mark.parametrize("metric", ["METRIC_INNER_PRODUCT", "METRIC_L2"])
def test_an_index_is_certified_as_it_ranks(large, tmp_path, metric):
    """Vectors of other than unit length, of a model that compares by cosine, in an index that does not."""
    faiss = pytest.importorskip("faiss", reason="FAISS is optional")
    model, queries = make_static_model(), sorted({f"word{n % 400} word{n * 7 % 400}" for n in range(150)})
    embeddings = model.encode_document(large.texts(range(len(large))), convert_to_tensor=True).cpu()
    fresh = F.normalize(embeddings, dim=-1)
    lengths = torch.rand(len(large), 1, generator=torch.Generator().manual_seed(0)) * 3 + 0.2
    file = str(tmp_path / "index.faiss")
    index = faiss.IndexFlat(fresh.shape[1], getattr(faiss, metric))
    index.add((lengths * fresh).numpy())
    faiss.write_index(index, file)
    asked = F.normalize(model.encode_query(queries, convert_to_tensor=True).cpu(), dim=-1)
    returned = torch.from_numpy(index.search(asked.numpy(), 10)[1])
    truth = overlap_at_k(returned, (asked @ fresh.T).topk(10).indices).mean()
    assert truth < 0.6
    found = certify(open_vectors(file), model, large, queries, progress=False).recall["unchanged"]
    assert found.low <= truth <= found.high
    # What is known by its numbers alone is compared as the model compares.
    assert certify(lengths * fresh, model, large, queries, progress=False).recall["unchanged"].mean > 0.99


def test_what_an_index_ranks_by_must_be_known(large, tmp_path):
    faiss = pytest.importorskip("faiss", reason="FAISS is optional")
    model = make_static_model()
    index = faiss.IndexFlat(model.get_embedding_dimension(), faiss.METRIC_Canberra)
    index.add(np.random.default_rng(0).standard_normal((len(large), index.d)).astype(np.float32))
    faiss.write_index(index, str(tmp_path / "index.faiss"))
    with pytest.raises(InputError, match=r"compares by FAISS's metric .* only cosine, inner product"):
        certify(open_vectors(tmp_path / "index.faiss"), model, large, [f"word{n}" for n in range(30)], progress=False)


def test_queries_that_judge_have_taught_nothing(large, monkeypatch):
    """Neither which targets are encoded again, nor the adapter."""
    new, queries = moved(), list(large.qrels("dev").queries["text"][:300])
    embeddings, taught, judging = all_of(make_static_model(), large), [], []

    def noting(seen, place, function):
        return lambda *inputs, **settings: seen.append(inputs[place]) or function(*inputs, **settings)

    order, draw, adapt = plan.reencoding_order, plan.Judged.draw, plan.QueryAdapter.from_corrector
    monkeypatch.setattr(plan, "reencoding_order", noting(taught, 2, order))
    monkeypatch.setattr(plan.QueryAdapter, "from_corrector", noting(taught, 1, adapt))
    monkeypatch.setattr(plan.Judged, "draw", noting(judging, 2, draw))
    serve_plan(embeddings, new, large, queries * 2, progress=False)
    assert len(taught) >= 2 and len(judging) == 1
    told = {tuple(each.tolist()) for queries in taught for each in queries}
    judges = {tuple(each.tolist()) for each in judging[0]}
    assert len(judges) >= 100 and len(told) >= 100 and not told & judges
