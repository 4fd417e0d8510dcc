import functools
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import FORKS
from hypothesis import given, settings
from hypothesis import strategies as st
from support.searches import naive, trained

from st_corrector import (
    CacheError,
    CorrectedSearch,
    EmbeddingCache,
    IdentityCorrector,
    InputError,
    KernelRidgeCorrector,
    MLPCorrector,
    RidgeCorrector,
    RidgeMLPCorrector,
)
from st_corrector.cache.shard import Shard
from st_corrector.search.gumbel import gumbel_noise


@pytest.mark.parametrize(
    "make", [IdentityCorrector, lambda d: MLPCorrector(d, hidden=20, learning_rate=1e-2), RidgeCorrector]
)
@pytest.mark.parametrize(
    ("rows", "dim", "batch", "k", "chunk"),
    [(1, 4, 1, 1, 1), (7, 3, 2, 7, 2), (1000, 16, 5, 10, 64), (1000, 16, 5, 10, 10_000), (513, 8, 33, 100, 50)],
)
def test_selection_equals_naive_top_k(make, rows, dim, batch, k, chunk):
    generator = torch.Generator().manual_seed(rows)
    vectors = F.normalize(torch.randn(rows, dim, generator=generator), dim=-1)
    queries = torch.randn(batch, dim, generator=generator)
    corrector = trained(make(dim), dim)
    if not isinstance(corrector, IdentityCorrector):
        assert not torch.allclose(corrector(vectors), vectors, atol=0.05), "the corrector does something"
    exclude = torch.randint(-1, rows, (batch, min(3, rows - 1)), generator=generator)
    scores, found, _ = CorrectedSearch(EmbeddingCache.from_tensor(vectors), corrector, chunk_size=chunk).search(
        queries, k, exclude=exclude
    )
    expected = queries @ corrector(vectors).T
    for query, excluded in enumerate(exclude):
        expected[query, excluded[excluded >= 0]] = -math.inf
    values, indices = naive(expected, k)
    allowed = values > -math.inf
    torch.testing.assert_close(scores.double()[allowed], values[allowed], atol=1e-6, rtol=1e-5)
    assert (found[~allowed] == -1).all() and (scores[~allowed] == -math.inf).all()
    # Rows may only differ where their scores are equal up to rounding.
    differ = (found != indices) & allowed
    if differ.any():
        at = expected.gather(1, found.clamp(min=0)).double()
        torch.testing.assert_close(at[differ], values[differ], atol=1e-6, rtol=1e-5)
    assert differ.float().mean() < 0.01


CORRECTORS = {
    "identity": lambda d: IdentityCorrector(d),
    "mlp": lambda d: MLPCorrector(d, hidden=20, learning_rate=1e-2),
    "mlp, not normalising": lambda d: MLPCorrector(d, hidden=20, learning_rate=1e-2, normalize=False),
    "ridge": lambda d: RidgeCorrector(d),
    "ridge, on the query side": lambda d: RidgeCorrector(d, normalize=False),
    "ridge and mlp, not normalising": lambda d: RidgeMLPCorrector(d, hidden=20, learning_rate=1e-2, normalize=False),
    "kernel ridge, not normalising": lambda d: KernelRidgeCorrector(d, num_features=30, normalize=False),
}


@functools.cache
def trained_once(name, dim):
    return trained(CORRECTORS[name](dim), dim)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_every_search_equals_the_naive_one(data):
    """Shapes, shards, chunks, dtypes, repeated targets, exclusions, ceilings and written rows in any combination."""
    draw = data.draw
    rows, batch, dim = draw(st.integers(1, 300)), draw(st.integers(1, 12)), draw(st.sampled_from([3, 16]))
    k, chunk = draw(st.integers(1, 40)), draw(st.one_of(st.none(), st.integers(1, 310)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    vectors = torch.randn(rows, dim, generator=generator) * draw(st.sampled_from([1.0, 5.0]))
    if draw(st.booleans()):  # so many rows are equal
        vectors = vectors[torch.randint(0, max(1, rows // 50), (rows,), generator=generator)]
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.int8]))
    size = draw(st.integers(1, rows))
    cache = EmbeddingCache.from_blocks(vectors.split(size), dtype)
    corrector = trained_once(draw(st.sampled_from(sorted(CORRECTORS))), dim)
    withdrawn = np.flatnonzero(torch.rand(rows, generator=generator) < draw(st.sampled_from([0.0, 0.02, 0.9])))
    search = CorrectedSearch(cache, corrector, normalize=draw(st.booleans()), chunk_size=chunk, withdrawn=withdrawn)
    queries = torch.randn(batch, dim, generator=generator)
    if draw(st.booleans()):
        written = torch.randperm(rows, generator=generator)[: draw(st.integers(1, rows))]
        search.overlay.write(written, torch.randn(len(written), dim, generator=generator))
    expected = (queries @ corrector(search.stale(torch.arange(rows))).T).double()
    expected[:, withdrawn] = -math.inf
    ceiling, exclude = None, None
    if draw(st.booleans()):
        # Between two scores: which of these rounding takes to its other side is not what is tested here.
        ordered = expected.sort(dim=1).values
        at = draw(st.integers(0, rows))
        ends = torch.full((batch, 1), math.inf, dtype=torch.float64)
        ordered = torch.cat([-ends, ordered, ends], dim=1)
        ceiling = (ordered[:, at] + ordered[:, at + 1]) / 2
        ceiling = torch.where((ordered[:, at + 1] - ordered[:, at]) > 1e-3, ceiling, math.inf).float()
        expected[expected > ceiling[:, None]] = -math.inf
    if draw(st.booleans()):
        exclude = torch.randint(-1, rows, (batch, draw(st.integers(1, 2 * rows))), generator=generator)
        for query, excluded in enumerate(exclude):
            expected[query, excluded[excluded >= 0]] = -math.inf

    for _ in range(2):  # the second pass knows the first one's norms
        scores, found, _ = search.search(queries, k, exclude, ceiling=ceiling)
        assert scores.shape == found.shape == (batch, k)
        values, _ = naive(expected, k)
        width = values.shape[1]
        assert (found[:, width:] == -1).all()
        scores, found = scores[:, :width].double(), found[:, :width]
        none_left = values == -math.inf
        assert torch.equal(found == -1, none_left) and torch.equal(scores == -math.inf, none_left)
        tolerance = 1e-4 * (1 + expected[expected > -math.inf].abs().amax().item() if not none_left.all() else 1)
        assert ((scores - values)[~none_left].abs() <= tolerance).all()
        # The rows are right: distinct, and of the score that they are said to have.
        at = expected.gather(1, found.clamp(min=0))
        assert ((at - values)[~none_left].abs() <= tolerance).all()
        for query in found:
            assert len(set(query[query >= 0].tolist())) == (query >= 0).sum()


def test_equal_targets_are_taken_in_the_order_of_their_rows():
    vectors = F.normalize(torch.randn(1, 16), dim=-1).expand(5_000, -1).contiguous()
    for chunk in (64, 100, 5_000):
        search = CorrectedSearch(EmbeddingCache.from_tensor(vectors), IdentityCorrector(16), chunk_size=chunk)
        rows = search.search(vectors[:3], 100, exclude=torch.tensor([0, 7]))[1]
        assert torch.equal(rows, torch.tensor([row for row in range(102) if row not in (0, 7)]).expand(3, -1))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_a_damaged_cache_is_refused_with_its_rows(wrong, normalize):
    vectors = torch.randn(300, 8)
    cache = EmbeddingCache([Shard(vectors[:200]), Shard(vectors[200:])])
    vectors[[210, 270], 3] = wrong
    search = CorrectedSearch(cache, IdentityCorrector(8), normalize=normalize, chunk_size=64)
    for _ in range(2):
        with pytest.raises(CacheError, match=r"embeddings of 1 rows, e\.g\. \[210\], are NaN or infinite"):
            search.search(torch.randn(2, 8), 3)
    vectors[[210, 270], 3] = 1.0
    assert (search.search(torch.randn(2, 8), 3).rows >= 0).all(), "a refused search leaves nothing behind"


def test_scores_that_are_not_numbers_are_refused():
    search = CorrectedSearch(EmbeddingCache.from_tensor(torch.randn(300, 8)), MLPCorrector(8), chunk_size=100)
    with pytest.raises(InputError, match=r"Queries \[1\] of 3 hold NaN"):
        search.search(torch.tensor([[0.0] * 8, [math.nan] * 8, [1.0] * 8]), 3)
    search.search(torch.randn(2, 8), 3)
    search.overlay.write(torch.tensor([150]), torch.full((1, 8), math.nan))
    with pytest.raises(InputError, match="The score of row 150 is not a number"):
        search.search(torch.randn(2, 8), 3)


def test_shards_and_half_precision_are_searched_as_stored():
    vectors = torch.randn(300, 8).bfloat16()
    cache = EmbeddingCache([Shard(vectors[:100]), Shard(vectors[100:101]), Shard(vectors[101:])])
    queries = torch.randn(4, 8)
    _, rows, _ = CorrectedSearch(cache, IdentityCorrector(8), chunk_size=30).search(queries, 5)
    expected = queries @ F.normalize(vectors.float(), dim=-1).T
    assert torch.equal(rows, naive(expected, 5)[1])
    _, rows, _ = CorrectedSearch(cache, IdentityCorrector(8, normalize=False), normalize=False).search(queries, 5)
    assert torch.equal(rows, naive(queries @ vectors.float().T, 5)[1])


def test_excluding_everything_leaves_nothing():
    search = CorrectedSearch(EmbeddingCache.from_tensor(torch.randn(6, 4)), IdentityCorrector(4), chunk_size=4)
    scores, rows, _ = search.search(torch.randn(2, 4), 3, exclude=torch.arange(6))
    assert (rows == -1).all() and (scores == -math.inf).all()
    _, rows, _ = search.search(torch.randn(2, 4), 3, exclude=torch.arange(6), sampler="gumbel", seed=1)
    assert (rows == -1).all()


# ---------------------------------------------------------------------- Gumbel


def test_gumbel_draws_have_the_softmaxs_frequencies():
    torch.manual_seed(0)
    vectors = F.normalize(torch.randn(6, 4), dim=-1)
    query = F.normalize(torch.randn(1, 4), dim=-1)
    scale, draws = 3.0, 20_000
    search = CorrectedSearch(EmbeddingCache.from_tensor(vectors), IdentityCorrector(4), chunk_size=4)
    # Every query of the batch is the same and draws for itself.
    first, second = torch.zeros(6), torch.zeros(6, 6)
    for seed in range(4):
        _, rows, _ = search.search(query.expand(draws // 4, -1), 2, sampler="gumbel", scale=scale, seed=seed)
        first += rows[:, 0].bincount(minlength=6)
        second += torch.zeros(6, 6).index_put_((rows[:, 0], rows[:, 1]), torch.ones(()), accumulate=True)
        assert (rows[:, 0] != rows[:, 1]).all(), "without replacement"
    p = (scale * query @ vectors.T).softmax(-1)[0]
    sd = (p * (1 - p) / draws).sqrt()
    assert ((first / draws - p).abs() < 4 * sd).all()
    # The second is drawn from what is left: P(j | i first) = p_j / (1 − p_i).
    pair = p[:, None] * p[None, :] / (1 - p[:, None])
    pair.fill_diagonal_(0)
    assert ((second / draws - pair).abs() < 4.5 * (pair * (1 - pair) / draws).sqrt() + 1e-9).all()


def test_gumbel_draws_depend_on_the_seed_alone():
    vectors, queries = torch.randn(500, 8), torch.randn(6, 8)

    def draw(chunk, seed):
        search = CorrectedSearch(EmbeddingCache.from_tensor(vectors), IdentityCorrector(8), chunk_size=chunk)
        return search.search(queries, 20, sampler="gumbel", scale=5.0, seed=seed)[:2]

    scores, rows = draw(500, 3)
    for chunk in (7, 64):
        assert torch.equal(draw(chunk, 3)[1], rows)
    assert not torch.equal(draw(500, 4)[1], rows)
    plain = queries @ F.normalize(vectors, dim=-1).T
    torch.testing.assert_close(scores, plain.gather(1, rows)), "scores are without the noise"


def test_uniform_draws_do_not_look_at_scores():
    vectors = F.normalize(torch.randn(20, 4), dim=-1)
    search = CorrectedSearch(EmbeddingCache.from_tensor(vectors), IdentityCorrector(4))
    queries = vectors[:1].expand(20_000, -1)
    _, rows, _ = search.search(queries, 3, exclude=torch.tensor([7]), sampler="uniform", scale=50.0, seed=3)
    counts = rows.flatten().bincount(minlength=20).double()
    assert counts[7] == 0
    p = 3 / 19
    assert ((counts / 20_000)[torch.arange(20) != 7] - p).abs().max() < 4.5 * (p * (1 - p) / 20_000) ** 0.5


@pytest.mark.parametrize("sampler", ["top_k", "gumbel", "uniform"])
def test_what_has_been_withdrawn_is_drawn_by_no_sampler(sampler):
    """Rows of every place in the chunks, of one that was written back before among them."""
    torch.manual_seed(0)
    withdrawn = np.array([0, 3, 63, 64, 65, 127, 198, 199])
    search = CorrectedSearch(
        EmbeddingCache.from_tensor(torch.randn(200, 4)), IdentityCorrector(4), chunk_size=70, withdrawn=withdrawn
    )
    queries = F.normalize(torch.randn(5, 4), dim=-1)
    search.overlay.write(torch.tensor([64, 100]), queries[:2])  # nothing scores higher
    _, rows, _ = search.search(queries, 200, sampler=sampler, seed=1)
    kept = np.setdiff1d(np.arange(200), withdrawn).tolist()
    assert [sorted(row[row >= 0].tolist()) for row in rows] == [kept] * 5


@pytest.mark.parametrize("normalize", [True, False])
def test_a_ceiling_leaves_out_what_scores_higher(normalize):
    corrector = trained(RidgeCorrector(8, normalize=normalize), 8)
    vectors, queries = F.normalize(torch.randn(300, 8), dim=-1), F.normalize(torch.randn(5, 8), dim=-1)
    search = CorrectedSearch(EmbeddingCache.from_tensor(vectors), corrector, chunk_size=64)
    assert search.corrects_queries is not normalize
    scores = queries @ corrector(vectors).T
    ceiling = scores.quantile(0.8, dim=1)
    expected = naive(scores.masked_fill(scores > ceiling[:, None], -math.inf), 9)
    found_scores, found, _ = search.search(queries, 9, ceiling=ceiling)
    assert torch.equal(found, expected[1])
    torch.testing.assert_close(found_scores.double(), expected[0], atol=1e-6, rtol=1e-5)
    _, drawn, _ = search.search(queries, 9, sampler="gumbel", scale=3.0, seed=1, ceiling=ceiling)
    assert (scores.gather(1, drawn) <= ceiling[:, None] + 1e-6).all()


def test_the_query_side_finds_what_correcting_the_corpus_finds():
    corrector = trained(RidgeCorrector(8, normalize=False), 8)
    vectors, queries = F.normalize(torch.randn(500, 8), dim=-1), torch.randn(6, 8)
    search = CorrectedSearch(EmbeddingCache.from_tensor(vectors), corrector, chunk_size=100)
    written = torch.tensor([3, 77, 450])
    _, before, _ = search.search(queries, 20)
    search.overlay.write(written, 3 * queries[:3])
    expected = queries @ corrector(search.stale(torch.arange(500))).T
    scores, rows, _ = search.search(queries, 20)
    torch.testing.assert_close(scores, expected.topk(20).values, atol=1e-4, rtol=1e-4)
    assert torch.equal(rows, naive(expected, 20)[1])
    assert not torch.equal(rows, before), "written rows are found where they are now"


def test_the_noise_is_standard_gumbel_and_independent():
    noise = gumbel_noise(200, 1_000_000, 5_000, seed=12345).double()
    assert torch.isfinite(noise).all()
    assert abs(noise.mean() - 0.5772) < 0.005 and abs(noise.var() - math.pi**2 / 6) < 0.02
    for quantile in (0.001, 0.1, 0.5, 0.9, 0.999):
        expected = -math.log(-math.log(quantile))
        assert (
            abs((noise < expected).double().mean() - quantile) < 4 * (quantile * (1 - quantile) / noise.numel()) ** 0.5
        )
    flat = (noise - noise.mean()) / noise.std()
    assert abs((flat[:, 1:] * flat[:, :-1]).mean()) < 0.005 and abs((flat[1:] * flat[:-1]).mean()) < 0.005
    assert torch.equal(gumbel_noise(3, 40, 10, 7), gumbel_noise(5, 0, 60, 7)[:3, 40:50])
    other = gumbel_noise(200, 1_000_000, 5_000, seed=12346).double()
    assert abs((flat * (other - other.mean()) / other.std()).mean()) < 0.005


def test_bad_searches_are_refused():
    search = CorrectedSearch(EmbeddingCache.from_tensor(torch.randn(6, 4)), IdentityCorrector(4))
    for message, arguments in {
        r"Expected queries of shape \(B, 4\), got \(2, 5\)": (torch.randn(2, 5), 1),
        "k must be at least 1, got 0": (torch.randn(2, 4), 0),
        "sampler 'random' is not one of top_k, gumbel, uniform": (torch.randn(2, 4), 1, None, "random"),
        "needs a seed": (torch.randn(2, 4), 1, None, "gumbel"),
    }.items():
        with pytest.raises(InputError, match=message):
            search.search(*arguments)
    with pytest.raises(InputError, match="is for dimension 3, the cache has 4"):
        CorrectedSearch(EmbeddingCache.from_tensor(torch.randn(6, 4)), IdentityCorrector(3))


def _search_of_known_peak(make, sender):
    torch.set_num_threads(2)

    def peak():
        # Not ru_maxrss, which a process inherits from the one that started it.
        return int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) * 1024

    def search(rows):
        vectors = torch.empty(rows, 64, dtype=torch.bfloat16)
        for some in vectors.split(16384):  # making it must not take more than searching it
            some.copy_(torch.randn(some.shape))
        searching = CorrectedSearch(EmbeddingCache.from_tensor(vectors), make(64))
        queries = torch.randn(128, 64)
        before = peak()
        searching.search(queries, 10)
        searching.overlay.write(torch.arange(rows // 50), torch.randn(rows // 50, 64))
        searching.search(queries, 10, exclude=torch.arange(20))
        return peak() - before, sum(searching.memory(128, 10, "cpu", rows_written=rows // 50).values())

    search(16384)  # what the libraries need for themselves
    sender.send(search(1_000_000))


@pytest.mark.parametrize(
    "make",
    [
        functools.partial(MLPCorrector, hidden=128),
        *(pytest.param(make, marks=pytest.mark.long) for make in (RidgeCorrector, IdentityCorrector)),
    ],
)
def test_memory_stays_with_the_chunk_and_within_the_plan(make):
    """Peak memory of a search is far below N × B scores, and was foretold."""
    receiver, sender = FORKS.Pipe(duplex=False)
    process = FORKS.Process(target=_search_of_known_peak, args=(make, sender))
    process.start()
    process.join()
    assert process.exitcode == 0
    extra, plan = receiver.recv()
    assert extra <= plan, f"{extra:,} bytes more than before, planned were {plan:,}"
    assert plan < 1_000_000 * 128 * 4 / 2, f"{plan:,} bytes planned: as if all scores were held"
    assert extra > plan / 20, "the plan is no fantasy"
