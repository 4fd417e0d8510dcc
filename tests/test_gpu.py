"""Searching on a GPU: what is found, drawn and streamed, and what it takes in memory.

What a CPU can run as well runs there too, with fewer cases, in the normal suite: only the device is another.
"""

import copy
import math
import os
import random
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from conftest import make_bert_model, make_texts
from support.batches import batch_of, on
from support.drifts import DIM, fit, pairs, unit
from support.gpu import GPU_ALONE, GPU_AND_LONG, all_gpus, chosen_gpus
from support.searches import naive, trained
from support.states import without_dropout

from st_corrector import (
    Corpus,
    CorrectedMultipleNegativesLoss,
    CorrectedSearch,
    Corrector,
    EmbeddingCache,
    IdentityCorrector,
    InputError,
    MLPCorrector,
    RidgeCorrector,
    Shortlist,
    ShortlistSearch,
)
from st_corrector.cache.shard import DTYPES, Shard
from st_corrector.cache.streaming import on_device
from st_corrector.correctors import CORRECTORS, make_corrector
from st_corrector.correctors.state import TensorState
from st_corrector.runtime.memory import available_memory, describe_memory, require_memory
from st_corrector.search.gumbel import _splitmix64, gumbel_noise
from st_corrector.search.kernels import block_maxima, usable

EPSILON = torch.finfo(torch.float32).eps
WIDTHS = {"mlp": {"hidden": 20}, "ridge-mlp": {"hidden": 20}, "kernel-ridge": {"num_features": 30}}
NO_KERNEL = "the kernel runs on GPUs with tensor cores, and elsewhere only with TRITON_INTERPRET=1"


@pytest.fixture(params=["kernel", "torch"])
def path(request, device, monkeypatch):
    """By which of its two ways a search finds the largest scores."""
    if request.param == "torch":
        monkeypatch.setattr("st_corrector.search.exact.usable", lambda device: False)
    elif not usable(device):
        pytest.skip(NO_KERNEL)
    return request.param


@pytest.fixture
def fused(monkeypatch):
    """How often the kernel was asked."""
    calls, update = [], CorrectedSearch._update_fused
    monkeypatch.setattr(CorrectedSearch, "_update_fused", lambda *args: calls.append(1) or update(*args))
    return calls


# ---------------------------------------------------------------------- selection


class Case(NamedTuple):
    """One search, by chance."""

    seed: int
    rows: int
    dim: int
    batch: int
    k: int
    dtype: str
    corrector: str
    unit: bool
    normalize: bool
    chunk_size: int | None
    shard_size: int
    resident: bool
    distinct: int
    written: int
    excluded: int
    ceiling: bool

    @classmethod
    def drawn(cls, seed: int, small: bool, with_ceilings: bool) -> "Case":
        draw = random.Random(seed)
        rows = draw.choice([1, 5, 63, 64, 65, 200, 777, 1500] if small else [1, 5, 64, 65, 200, 777, 4099, 20_000])
        return cls(
            seed=seed,
            rows=rows,
            dim=draw.choice([16, 70, 128]),
            batch=draw.choice([1, 2, 33, 64, 65, 300]),
            k=draw.choice([1, 7, 64, 100, 203]),
            dtype=draw.choice(list(DTYPES)),
            corrector=draw.choice(list(CORRECTORS)),
            unit=draw.random() < 0.5,
            normalize=draw.random() < 0.5,
            chunk_size=draw.choice([None, 50, 640, 5000] if rows < 5000 else [None, 5000]),
            shard_size=draw.choice([rows, max(1, rows // 2), max(1, rows // 3)]),
            resident=draw.random() < 0.5,
            distinct=draw.choice([rows, max(1, rows // 50)]),
            written=draw.choice([0, rows, (rows + 9) // 10]),
            excluded=draw.choice([0, 1, 40, rows if rows < 1000 else 300]),
            ceiling=with_ceilings and draw.random() < 0.5,
        )


def in_float64(corrector: Corrector) -> Corrector:
    """The same map, computed in float64 on the CPU."""
    exact = copy.deepcopy(corrector).to("cpu")
    for part in (exact, getattr(exact, "ridge", None)):
        if isinstance(part, TensorState):
            part._set({name: value.double() for name, value in part._tensors().items()})
        if isinstance(part, MLPCorrector):
            part.network.double()
    return exact


def assert_best(found, exact, k, tolerance):
    """That ``found`` has the ``k`` best of the scores ``exact`` ``(B, N)``, up to ``tolerance``; the largest error."""
    scores, rows = (each.cpu() for each in found[:2])
    assert scores.shape == rows.shape == (len(exact), k)
    values = naive(exact, k)[0]
    width = values.shape[1]
    assert (rows[:, width:] == -1).all() and (scores[:, width:] == -math.inf).all()
    scores, rows = scores[:, :width].double(), rows[:, :width]
    none_left = values == -math.inf
    assert torch.equal(rows == -1, none_left), "as many as there are"
    assert torch.equal(scores == -math.inf, none_left)
    taken = exact.gather(1, rows.clamp(min=0))
    errors = (scores - taken).abs().masked_fill(none_left, 0)
    assert (errors <= tolerance).all(), f"scores of these rows: {errors.max()} > {tolerance}"
    assert (scores - values).abs().masked_fill(none_left, 0).le(tolerance).all(), "in their order"
    assert all(len(set(row)) == len(row) for row in ([r for r in row if r >= 0] for row in rows.tolist())), "distinct"
    # Queries that found all there is have left nothing.
    full = ~none_left[:, -1]
    outside = exact.scatter(1, rows.clamp(min=0), -math.inf)[full].amax(1)
    assert (outside <= taken[full].amin(1) + tolerance).all(), "no row outside scores higher"
    return errors.max().item()


def check(case: Case, device: torch.device) -> float:
    """That this search finds what one in float64 does; the largest error of a score, in units of what is allowed."""
    generator = torch.Generator().manual_seed(case.seed)
    vectors = torch.randn(case.rows, case.dim, generator=generator)
    vectors = vectors[torch.randint(0, case.distinct, (case.rows,), generator=generator)]
    cache = EmbeddingCache.from_blocks(vectors.split(case.shard_size), DTYPES[case.dtype])
    settings = {"normalize": case.unit, **WIDTHS.get(case.corrector, {})}
    corrector = trained(make_corrector(case.corrector, case.dim, **settings), case.dim)
    queries = torch.randn(case.batch, case.dim, generator=generator)
    written = torch.randperm(case.rows, generator=generator)[: case.written]
    others = torch.randn(case.written, case.dim, generator=generator)

    stored = torch.cat([chunk.map(torch.Tensor.double).values for _, chunk in cache.chunks(case.rows)])
    if cache.dtype == torch.int8:
        stored *= torch.cat([chunk.scales for _, chunk in cache.chunks(case.rows)])[:, None].double()
    stale = F.normalize(stored, dim=-1) if case.normalize else stored
    stale[written] = others.double()
    corrected = in_float64(corrector)(stale)
    exact = queries.double() @ corrected.T
    # What float32 makes of it in yet another order of summation, and a few units in the last place of the products.
    rounding = (queries @ corrector(stale.float()).T - exact).abs().max().item()
    tolerance = 8 * max(rounding, EPSILON * (queries.norm(dim=1).max() * corrected.norm(dim=1).max()).item())

    ceiling, exclude = None, None
    if case.ceiling:
        # In a gap between two scores, so that rounding takes none to its other side.
        ordered = exact.sort(dim=1).values
        at = case.rows // 2
        below, above = ordered[:, max(0, at - 1)], ordered[:, at]
        ceiling = torch.where(above - below > 4 * tolerance, (above + below) / 2, math.inf).float()
        exact = exact.masked_fill(exact > ceiling[:, None], -math.inf)
        ceiling = ceiling.to(device)
    if case.excluded:
        exclude = torch.randint(-1, case.rows, (case.batch, case.excluded), generator=generator)
        for query, rows in enumerate(exclude):
            exact[query, rows[rows >= 0]] = -math.inf

    search = CorrectedSearch(
        cache.to(device) if case.resident else cache, corrector, normalize=case.normalize, chunk_size=case.chunk_size
    )
    search.overlay.write(written.to(device), others.to(device))
    errors = []
    for _ in range(2):  # the second pass knows the first one's norms
        found = search.search(queries.to(device), case.k, exclude, ceiling=ceiling)
        assert found.rows.device == device
        errors.append(assert_best(found, exact, case.k, tolerance))
    return max(errors) / tolerance


@pytest.mark.parametrize("part", range(4))
def test_selection_equals_float64(device, path, fused, part, record_property):
    """Fresh random cases in every run; a failure says by which seed."""
    cases, largest = 12 if device.type == "cuda" else 3, 0.0
    for _ in range(cases):
        seed = random.SystemRandom().getrandbits(32)
        case = Case.drawn(seed, small=device.type == "cpu", with_ceilings=path == "torch")
        try:
            largest = max(largest, check(case, device))
        except Exception as error:
            raise AssertionError(f"{case}: {type(error).__name__}: {error}") from error
    assert bool(fused) == (path == "kernel")
    record_property("cases", cases)
    record_property("largest error of what is allowed", round(largest, 3))


def test_equal_scores_are_taken_in_the_order_of_their_rows(device, path):
    """Of small integers every sum is exact, whatever its order."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randint(-1, 2, (3_000, 24), generator=generator).float()
    vectors[500:600] = vectors[:100]
    queries = torch.randint(-2, 3, (65, 24), generator=generator).float()
    exclude = torch.randint(-1, 3_000, (65, 20), generator=generator)
    exact = queries @ vectors.T
    for query, rows in enumerate(exclude):
        exact[query, rows[rows >= 0]] = -math.inf
    values, expected = naive(exact, 70)
    assert (values[:, :-1] == values[:, 1:]).float().mean() > 0.5, "there are ties"
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for chunk_size in (640, 3_000):
            cache = EmbeddingCache.from_blocks([vectors], dtype).to(device)
            search = CorrectedSearch(
                cache, IdentityCorrector(24, normalize=False), normalize=False, chunk_size=chunk_size
            )
            found = search.search(queries.to(device), 70, exclude)
            assert torch.equal(found.rows.cpu(), expected)
            assert torch.equal(found.scores.cpu().double(), values)


def test_scores_that_are_small_beside_their_terms_are_all_found(device, path):
    """Vectors in a subspace, and queries nearly orthogonal to it: what rounding does to scores is as large as they are.

    As many rows as were asked for are found nevertheless.
    """
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(256, 256, generator=generator)).Q
    vectors = F.normalize(torch.randn(40_000, 128, generator=generator) @ basis[:128], dim=-1)
    queries = F.normalize(torch.randn(3, 128, generator=generator) @ basis[128:], dim=-1)
    exact = queries.double() @ F.normalize(vectors.double(), dim=-1).T
    assert exact.abs().max() < 1e-6
    search = CorrectedSearch(EmbeddingCache.from_tensor(vectors).to(device), IdentityCorrector(256))
    assert_best(search.search(queries.to(device), 40), exact, 40, 16 * EPSILON)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernels_maxima_are_those_of_float64(device, dtype):
    if not usable(device):
        pytest.skip(NO_KERNEL)
    generator = torch.Generator().manual_seed(0)
    for rows, dim, batch in ((300, 40, 5), (128, 64, 64), (1_000, 70, 70), (1, 16, 1)):
        values = torch.randn(rows, dim, generator=generator)
        values, scales = Shard.store(values, DTYPES[dtype])
        probes, left_out = torch.randn(dim, batch, generator=generator), torch.rand(rows, generator=generator) < 0.1
        factors = torch.rand(rows, generator=generator) if scales is None else scales
        for each in (factors, None):
            weights = torch.ones(rows, 1) if each is None else each[:, None]
            scores = (values.double() @ probes.double() * weights.double()).masked_fill(left_out[:, None], -math.inf)
            # Sums of float32 numbers differ by so much of the sum of their absolute values.
            bound = 8 * EPSILON * (values.double().abs() @ probes.double().abs() * weights.double())
            expected, bound = (
                F.pad(value, (0, 0, 0, -rows % 64), value=least).view(-1, 64, batch).amax(1)
                for value, least in ((scores, -math.inf), (bound, 0.0))
            )
            on = [None if some is None else some.to(device) for some in (values, probes, each, left_out)]
            found = block_maxima(*on, 64).cpu().double()
            assert torch.equal(found == -math.inf, expected == -math.inf)
            assert ((found - expected).nan_to_num(0.0).abs() <= bound).all()


@pytest.mark.parametrize("index", ["exact", "Flat"])
def test_a_shortlist_finds_what_an_exact_search_finds(device, index):
    if index != "exact":
        pytest.importorskip("faiss", reason="FAISS is optional: pip install 'st-corrector[faiss-cpu]'")
    generator = torch.Generator().manual_seed(0)
    vectors = F.normalize(torch.randn(3_000, 16, generator=generator), dim=-1)
    queries = F.normalize(torch.randn(9, 16, generator=generator), dim=-1).to(device)
    written, fresh = torch.arange(0, 3_000, 17).to(device), unit(177, 16, seed=5).to(device)
    exclude = torch.randint(-1, 3_000, (9, 30), generator=generator).to(device)
    for corrector in (RidgeCorrector(16, normalize=False), MLPCorrector(16, hidden=20)):
        corrector = trained(corrector, 16)
        searches = [
            CorrectedSearch(EmbeddingCache.from_tensor(vectors).to(device), corrector),
            ShortlistSearch(EmbeddingCache.from_tensor(vectors), corrector, Shortlist(index, size=3_000)),
            ShortlistSearch(EmbeddingCache.from_tensor(vectors), corrector, Shortlist(index, size=100, every=1)),
        ]
        for search in searches:
            search.overlay.write(written, fresh)
        expected, *found = (search.search(queries, 10, exclude) for search in searches)
        for each in found:
            torch.testing.assert_close(each.scores, expected.scores, atol=1e-4, rtol=1e-4)
            assert (each.rows == expected.rows).float().mean() > 0.98
        assert all(search.recall > 0.98 for search in searches[1:])


# ---------------------------------------------------------------------- Gumbel


def test_noise_is_that_of_the_cpu(device):
    for seed, first_row in ((0, 0), (2**62 - 1, 20_999_999), (12345, 2**40)):
        ours, theirs = (gumbel_noise(128, first_row, 3_000, seed, each).cpu() for each in (device, "cpu"))
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
        assert theirs.abs().max() > 5
    counters = torch.randint(-(2**63), 2**63 - 1, (10_000,), generator=torch.Generator().manual_seed(0))
    assert torch.equal(_splitmix64(counters.to(device)).cpu(), _splitmix64(counters)), "the same bits"


@pytest.mark.parametrize("sampler", ["gumbel", "uniform"])
def test_a_seed_draws_the_same_rows_on_every_device(device, sampler):
    """Scores of small integers are exact; where two noisy ones are further apart than noise is rounded, so is the draw.

    Which of two nearly equal ones comes first is left to rounding, and happens to less than one row in a hundred.
    """
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randint(-1, 2, (5_000, 12), generator=generator).float()
    queries = torch.randint(-1, 2, (64, 12), generator=generator).float()
    exclude = torch.randint(-1, 5_000, (64, 9), generator=generator)

    def draw(where, seed, chunk_size, resident=True):
        cache = EmbeddingCache.from_tensor(vectors)
        search = CorrectedSearch(
            cache.to(where) if resident else cache,
            IdentityCorrector(12, normalize=False),
            normalize=False,
            chunk_size=chunk_size,
        )
        return search.search(queries.to(where), 20, exclude, sampler=sampler, scale=0.5, seed=seed).rows.cpu()

    for seed in (1, 2**61 + 7):
        expected = draw("cpu", seed, None)
        found = draw(device, seed, None)
        for chunk_size, resident in ((64, True), (1_000, True), (640, False)):
            assert torch.equal(draw(device, seed, chunk_size, resident), found), "whatever the chunks"
        keys = gumbel_noise(64, 0, 5_000, seed).double()
        if sampler != "uniform":
            keys = keys + 0.5 * (queries @ vectors.T)
        for query, rows in enumerate(exclude):
            keys[query, rows[rows >= 0]] = -math.inf
        ordered = keys.topk(21, dim=1).values
        decided = (ordered[:, :-1] - ordered[:, 1:]) > 1e-5
        decided = decided & F.pad(decided[:, :-1], (1, 0), value=True)  # from the one before and the one behind
        assert decided.float().mean() > 0.99
        assert torch.equal(found[decided], expected[decided])
        assert torch.equal(expected[decided], keys.topk(20, dim=1).indices[decided]), "and that is what is meant"
    assert not torch.equal(draw(device, 3, None), found)


def test_draws_from_a_corrected_corpus_agree_with_the_cpus(device):
    """Rounding of scores takes a draw elsewhere only where two noisy ones nearly tie."""
    generator = torch.Generator().manual_seed(0)
    vectors = F.normalize(torch.randn(4_000, 32, generator=generator), dim=-1)
    queries = F.normalize(torch.randn(100, 32, generator=generator), dim=-1)
    corrector = trained(MLPCorrector(32, hidden=20), 32)
    drawn = []
    for where in (device, "cpu"):
        search = CorrectedSearch(EmbeddingCache.from_tensor(vectors).to(where), copy.deepcopy(corrector))
        drawn.append(search.search(queries.to(where), 16, sampler="gumbel", scale=20.0, seed=5))
    assert (drawn[0].rows.cpu() == drawn[1].rows).float().mean() > 0.99
    agree = drawn[0].rows.cpu() == drawn[1].rows
    torch.testing.assert_close(drawn[0].scores.cpu()[agree], drawn[1].scores[agree], atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------- streaming


@GPU_AND_LONG
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stored", ["memory", "disk"])
def test_a_streamed_cache_is_searched_as_one_on_the_device(device, path, dtype, stored, tmp_path):
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(40_000, 24, generator=generator)
    cache = EmbeddingCache.from_blocks(vectors.split(7_000), DTYPES[dtype])
    if stored == "disk":
        cache = cache.save(tmp_path / "cache")
    # The same shards, so that the same products are computed in the same order: nothing may differ.
    shards = [chunk.map(lambda each: each.to(device)) for _, chunk in cache.chunks(len(cache))]
    resident = EmbeddingCache(shards)
    assert len(shards) == (6 if stored == "memory" else 3) and len({len(each.values) for each in shards}) == 2
    queries = torch.randn(33, 24, generator=generator).to(device)
    exclude = torch.randint(-1, 40_000, (33, 5), generator=generator)
    ceiling = torch.full((33,), 0.6, device=device)
    corrector = trained(MLPCorrector(24, hidden=20), 24)
    for chunk_size in (1_000, None):
        found = []
        for each in (cache, resident):
            search = CorrectedSearch(each, copy.deepcopy(corrector), chunk_size=chunk_size)
            search.overlay.write(torch.arange(0, 40_000, 11).to(device), queries.repeat(111, 1)[:3_637])
            for _ in range(3):
                found.append(search.search(queries, 12, exclude))
            found.append(search.search(queries, 12, exclude, ceiling=ceiling))
            found.append(search.search(queries, 12, exclude, sampler="gumbel", scale=20.0, seed=4))
        half = len(found) // 2
        for ours, theirs in zip(found[:half], found[half:], strict=True):
            for one, other in zip(ours, theirs, strict=True):
                assert torch.equal(one, other)
        assert (found[3].too_similar > 0).any()


def test_chunks_arrive_as_they_left(device):
    """Larger ones behind smaller ones too, each in its turn; and the last one before the consumer asks for it."""
    generator = torch.Generator().manual_seed(0)
    sizes = [5, 1_000, 3, 4_000, 4_000, 17, 1, 6_000, 2]
    shards = [Shard.store(torch.randn(size, 96, generator=generator), torch.int8) for size in sizes]
    read = []

    def chunks():
        for number, shard in enumerate(shards):
            read.append(number)
            yield number, shard

    for number, chunk in on_device(chunks(), device):
        assert chunk.values.device == chunk.scales.device == device
        if device.type == "cuda":
            assert read[-1] == min(number + 1, len(shards) - 1), "one ahead"
        assert torch.equal(chunk.values.cpu(), shards[number].values)
        assert torch.equal(chunk.scales.cpu(), shards[number].scales)
    assert read == list(range(len(shards)))


@pytest.mark.gpu
def test_copying_does_not_wait_for_computing():
    """While the present stream is kept busy for seconds, the next chunks arrive."""
    device = torch.device("cuda", torch.cuda.current_device())
    shards, stream = (
        [Shard(torch.full((2_048, 256), float(number))) for number in range(6)],
        torch.cuda.current_stream(),
    )
    for _ in range(40):  # to have all memory that it takes, on every stream: that may be waited for
        list(on_device(enumerate(shards), device))
    chunks = on_device(enumerate(shards), device)
    held = [next(chunks)[1]]
    stream.synchronize()
    torch.cuda._sleep(5_000_000_000)  # cycles: more than two seconds
    held += [next(chunks)[1] for _ in range(3)]  # which waits for the copies of the first three
    busy = not stream.query()
    held += [chunk for _, chunk in chunks]
    for number, chunk in enumerate(held):
        assert (chunk.values == number).all()
    assert busy, "the consumer's work has not been waited for"


@pytest.mark.gpu
def test_streaming_again_and_again_takes_no_more_memory(record_property):
    device = torch.device("cuda", torch.cuda.current_device())
    search = CorrectedSearch(EmbeddingCache.from_tensor(torch.randn(100_000, 64)), IdentityCorrector(64))
    reserved = []
    for _ in range(20):
        search.search(torch.randn(8, 64, device=device), 4)
        reserved.append(torch.cuda.memory_reserved(device))
    record_property("reserved bytes", reserved[2:])
    assert reserved[-1] - reserved[2] < 100_000 * 64 * 4


# ---------------------------------------------------------------------- memory


@pytest.mark.gpu
def test_what_is_available_on_the_gpu():
    device, size = torch.device("cuda", torch.cuda.current_device()), 4 << 30
    total = torch.cuda.get_device_properties(device).total_memory
    if available_memory(device) < 2 * size:
        pytest.skip("the GPU has no 8 GB to spare")
    slack = 1 << 30  # other processes come and go
    before = available_memory("cuda")
    held = torch.empty(size, dtype=torch.uint8, device=device)
    during = available_memory(device)
    del held
    assert torch.cuda.memory_reserved() >= size, "torch keeps it"
    assert abs(before - during - size) < slack and abs(available_memory(device) - before) < slack
    assert 0 < before < total
    with pytest.raises(InputError, match=r"(?s)does not fit.*Memory on cuda:0"):
        require_memory({"too much": total}, device)
    assert "Memory on cuda:0" in describe_memory({"something": 10}, device)


def peak(device, function):
    """Bytes that ``function()`` has held at once beside what there was before."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    function()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


@GPU_ALONE
@pytest.mark.parametrize(
    ("name", "settings", "dtype", "resident"),
    [
        ("identity", {}, "float32", True),
        ("identity", {}, "bfloat16", False),
        ("mlp", {}, "bfloat16", True),
        ("mlp", {"normalize": False}, "int8", False),
        ("ridge", {}, "int8", True),
        ("ridge", {"normalize": False}, "float16", False),
        ("kernel-ridge", {}, "float32", False),
    ],
)
def test_a_search_stays_within_its_plan(device, path, name, settings, dtype, resident, record_property):
    rows, dim, batch, k = 1_000_000, 64, 128, 16
    vectors = (torch.randn(100_000, dim, device=device).cpu() for _ in range(10))
    cache = EmbeddingCache.from_blocks(vectors, DTYPES[dtype])
    cache = cache.to(device) if resident else cache
    queries = F.normalize(torch.randn(batch, dim, device=device), dim=-1)

    def search(cache, count):
        searching = CorrectedSearch(cache, make_corrector(name, dim, **settings))
        searching.search(queries, k)
        written = torch.arange(count, device=device)
        searching.overlay.write(written, F.normalize(torch.randn(count, dim, device=device), dim=-1))
        searching.search(queries, k, exclude=torch.arange(20))
        return searching

    search(EmbeddingCache.from_tensor(torch.randn(5_000, dim, device=device)), 100)  # what the libraries need
    planned = sum(search(cache, rows // 50).memory(batch, k, device, rows_written=rows // 50).values())
    taken = peak(device, lambda: search(cache, rows // 50))
    record_property("planned bytes", planned)
    record_property("peak bytes", taken)
    assert taken <= planned, f"{taken:,} bytes taken, {planned:,} planned"
    assert taken > planned / 50, "the plan is no fantasy"


@GPU_ALONE
@pytest.mark.parametrize("sampler", ["top_k", "gumbel", "uniform"])
def test_no_search_holds_all_scores(device, path, sampler, record_property):
    rows, batch = 1_000_000, 256
    cache = EmbeddingCache.from_tensor(torch.randn(rows, 16, device=device).bfloat16())
    queries = torch.randn(batch, 16, device=device)
    search = CorrectedSearch(cache, MLPCorrector(16, hidden=16), chunk_size=8_192)
    settings = {"sampler": sampler, "seed": 1, "scale": 20.0, "exclude": torch.arange(30)}
    taken = max(
        peak(device, lambda: search.search(queries, 16, **settings)),
        peak(device, lambda: search.search(queries, 16, **settings, ceiling=torch.full((batch,), 0.7, device=device))),
    )
    record_property("peak bytes", taken)
    assert taken < rows * batch * 4 / 8, f"{taken:,} bytes: all scores would be {rows * batch * 4:,}"


@GPU_ALONE
def test_what_a_training_step_holds_does_not_grow_with_targets_times_queries(device, tmp_path, record_property):
    batch, peaks = 128, {}
    model = without_dropout(make_bert_model(tmp_path)).to(device)
    for targets in (5_000, 45_000):
        queries, texts = make_texts(targets)
        corpus = Corpus.from_texts(texts, cache_dir=tmp_path / str(targets))
        ids = [str(n) for n in range(batch)]
        corpus.add_split("train", dict(zip(ids, queries[:batch], strict=True)), {id: [id] for id in ids})
        cache = EmbeddingCache.from_tensor(unit(targets, 32)).to(device)
        loss = CorrectedMultipleNegativesLoss(model, corpus, cache, num_negatives=4)
        loss.corrected.search.chunk_size = 2_048
        features, labels = on(batch_of(model, corpus, range(batch)), device)

        def step(loss=loss, features=features, labels=labels):
            loss([{**each} for each in features], labels)["task_loss"].backward()
            model.zero_grad()

        step()
        peaks[targets] = peak(device, step)
    grown, scores = peaks[45_000] - peaks[5_000], 40_000 * batch * 4
    record_property("peak bytes by targets", {str(targets): bytes for targets, bytes in peaks.items()})
    assert grown < scores / 2, f"{grown:,} bytes more, all scores are {scores:,}"


# ---------------------------------------------------------------------- caches


def test_a_cache_on_the_device_is_the_cache(device, tmp_path):
    vectors = torch.randn(40_000, 12, generator=torch.Generator().manual_seed(0))
    for dtype in DTYPES.values():
        cache = EmbeddingCache.from_blocks(vectors.split(9_000), dtype)
        moved = cache.to(device)
        rows = torch.tensor([39_999, 3, 3, 12_345], device=device)
        assert moved.device == moved[rows].device == device and moved.dtype == dtype
        assert torch.equal(moved[rows].cpu(), cache[rows]) and torch.equal(moved[[1, 2]].cpu(), cache[[1, 2]])
        part = moved.part(slice(100, 30_000))
        assert part.device == device and torch.equal(part[[100, 29_999]].cpu(), cache[[100, 29_999]])
        assert torch.equal(cache.share(device)[range(50)].cpu(), cache[range(50)])
        saved = moved.save(tmp_path / str(dtype))
        assert saved.device.type == "cpu" and torch.equal(saved[range(40_000)], cache[range(40_000)])
        for other in DTYPES.values():
            there, here = moved.to(dtype=other), cache.to(dtype=other)
            assert there.device == device and torch.equal(there[range(0, 40_000, 7)].cpu(), here[range(0, 40_000, 7)])
        on_the_way = EmbeddingCache.from_tensor(vectors.to(device)).to("cpu", dtype)
        assert on_the_way.device.type == "cpu"
        assert torch.equal(on_the_way[range(0, 40_000, 7)], cache[range(0, 40_000, 7)])
    with pytest.raises(InputError, match="does not fit"):
        require_memory({"too much": 1 << 60}, device)


def test_a_cache_is_built_on_the_device(device, corpus, tmp_path):
    model = make_bert_model(tmp_path)
    here = EmbeddingCache.build(model, corpus, tmp_path / "here", progress=False)
    model.to(device)
    there = EmbeddingCache.build(model, corpus, tmp_path / "there", batch_size=7, shard_size=64, progress=False)
    assert there.fingerprint == here.fingerprint, "the same weights"
    torch.testing.assert_close(there[range(200)], here[range(200)], atol=1e-5, rtol=1e-4)
    with torch.autocast(device.type, torch.bfloat16):
        half = EmbeddingCache.build(model, corpus, tmp_path / "autocast", progress=False)
    assert half.dtype == torch.float32
    error = (half[range(200)] - here[range(200)]).abs().max()
    assert 1e-5 < error < 0.05, "bfloat16 was at work"


def test_a_refresh_stays_on_the_caches_device(device, corpus, tmp_path):
    model = make_bert_model(tmp_path).to(device)
    cache = EmbeddingCache.build(model, corpus, tmp_path / "cache", dtype="bfloat16", progress=False)
    for where in {torch.device("cpu"), device}:
        loss = CorrectedMultipleNegativesLoss(model, corpus, cache.to(where), num_negatives=4)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.02 * torch.randn_like(parameter)
        loss.corrected.refresh()
        assert loss.corrected.search.cache.device == where and loss.corrected.search.cache.dtype == torch.bfloat16
        expected = model.encode_document(corpus.texts(range(200)), convert_to_tensor=True)
        torch.testing.assert_close(loss.corrected.search.cache[range(200)].to(device), expected, atol=0.01, rtol=0.01)
        assert not torch.allclose(expected.cpu(), cache[range(200)], atol=0.02)
        features, labels = on(batch_of(model, corpus, range(10)), device)
        assert torch.isfinite(loss(features, labels)["task_loss"])


# ---------------------------------------------------------------------- correctors


@pytest.mark.parametrize("name", CORRECTORS)
@pytest.mark.parametrize("normalize", [True, False])
def test_a_corrector_learns_on_the_device_what_it_learns_on_the_cpu(device, tmp_path, name, normalize):
    settings = {"normalize": normalize, **WIDTHS.get(name, {})}
    if "mlp" in name:
        # What is added to all targets alike does not change a softmax: without normalisation Eq. 6 leaves the last
        # layer's bias to rounding, of which Adam makes steps of its own rate.
        settings |= {"learning_rate": 1e-2, "loss": "ce" if normalize else "mse"}
    there, here = make_corrector(name, DIM, **settings).to(device), make_corrector(name, DIM, **settings)
    fit(here, 20)
    for step in pairs(20):
        metrics = there.learn(*(each.to(device) for each in step), 20.0)
    assert all(value.device == device for value in metrics.values())
    probe, queries = unit(30, DIM, seed=9), unit(5, DIM, seed=8)
    tolerance = 1e-3 if "mlp" in name else 1e-4
    torch.testing.assert_close(there(probe.to(device)).cpu(), here(probe), atol=tolerance, rtol=0)
    if name != "identity":
        assert (here(probe) - probe).abs().max() > 0.05, "there is something to learn"
    pulled = there.pull_back(probe.to(device))
    torch.testing.assert_close(there(pulled.stale).cpu(), probe, atol=1e-4, rtol=0)
    if (side := there.on_query_side(queries.to(device))) is not None and not normalize:
        scores = side.probes @ probe.to(device).T + side.offset[:, None]
        if side.of_features is not None:
            scores += side.of_features @ there.features(probe.to(device)).T
        torch.testing.assert_close(scores.cpu(), queries @ here(probe).T, atol=2 * tolerance, rtol=0)

    # What it has learnt goes to a file and back, to either device, and from there it goes on.
    there.save_pretrained(tmp_path)
    loaded = Corrector.from_pretrained(tmp_path)
    assert {value.device.type for value in loaded.state_dict().values()} <= {"cpu"}
    torch.testing.assert_close(loaded(probe), there(probe.to(device)).cpu(), atol=1e-5, rtol=0)
    here.save_pretrained(tmp_path / "here")
    moved = Corrector.from_pretrained(tmp_path / "here").to(device)
    torch.testing.assert_close(moved(probe.to(device)).cpu(), here(probe), atol=1e-5, rtol=0)
    restored = make_corrector(name, DIM, **settings).to(device)
    restored.load_state_dict(here.state_dict())
    back = make_corrector(name, DIM, **settings)
    back.load_state_dict(there.state_dict())
    for step in list(pairs(24))[20:]:
        there.learn(*(each.to(device) for each in step), 20.0)
        restored.learn(*(each.to(device) for each in step), 20.0)
        here.learn(*step, 20.0)
        back.learn(*step, 20.0)
    torch.testing.assert_close(restored(probe.to(device)).cpu(), here(probe), atol=tolerance, rtol=0)
    torch.testing.assert_close(back(probe), there(probe.to(device)).cpu(), atol=tolerance, rtol=0)


# ---------------------------------------------------------------------- what a user has, or may have set


@pytest.mark.parametrize(
    ("given", "arguments", "seen"),
    [
        (None, ["-q"], ""),
        (None, ["-q", "-m", "not long"], ""),
        (None, ["-m", "not gpu and not long", "-n", "2"], ""),
        ("3,5", ["tests/test_gpu.py"], ""),
        (None, ["-q", "-m", "gpu", "-n", "4", "--results", "tests.json"], "0"),
        ("3,5", ["-mgpu"], "3"),
        ("", ["-m", "gpu and not long"], ""),
    ],
)
def test_gpus_are_hidden_from_tests_that_do_not_ask_for_one(monkeypatch, given, arguments, seen):
    monkeypatch.setattr(sys, "argv", ["pytest", *arguments])
    monkeypatch.delenv("ALL_CUDA_VISIBLE_DEVICES")
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if given is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    chosen = chosen_gpus()
    assert chosen["CUDA_VISIBLE_DEVICES"] == seen
    assert all_gpus(chosen).get("CUDA_VISIBLE_DEVICES") == given
    for name, value in chosen.items():
        monkeypatch.setenv(name, value)
    assert not chosen_gpus(), "what a test starts sees what it sees"


@pytest.fixture
def tf32():
    """Products of float32 numbers are taken by tensor cores, as ``TrainingArguments(tf32=True)`` has it."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


@GPU_AND_LONG
@pytest.mark.parametrize("name", ["identity", "ridge", "mlp"])
def test_a_search_is_exact_where_the_training_loop_has_tf32(device, path, tf32, name):
    generator = torch.Generator().manual_seed(0)
    vectors = F.normalize(torch.randn(30_000, 128, generator=generator), dim=-1)
    queries = F.normalize(torch.randn(64, 128, generator=generator), dim=-1)
    corrector = trained(make_corrector(name, 128), 128)
    exact = queries.double() @ in_float64(corrector)(vectors.double()).T
    search = CorrectedSearch(EmbeddingCache.from_tensor(vectors).to(device), corrector)
    for _ in range(2):
        assert_best(search.search(queries.to(device), 50), exact, 50, 8 * 128**0.5 * EPSILON)
    assert torch.get_float32_matmul_precision() == "high"


def test_searching_and_learning_leave_tf32_and_come_back_to_it(device, tf32):
    seen = set()

    class Watched(MLPCorrector):
        def unnormalized(self, stale):
            seen.add(torch.backends.cuda.matmul.fp32_precision)
            return super().unnormalized(stale)

    vectors = F.normalize(torch.randn(300, 16), dim=-1).to(device)
    corrector = Watched(16).to(device)
    search = CorrectedSearch(EmbeddingCache.from_tensor(vectors).to(device), corrector)
    search.search(vectors[:5], 3)
    corrector(vectors)
    corrector.learn(vectors[:50], vectors[50:100], vectors[:5], 20.0)
    with pytest.raises(InputError):
        search.search(vectors[:5] * torch.nan, 3)
    search.search(queries=vectors[:5], k=3)
    search.score(queries=vectors[:5], rows=torch.zeros(5, 1, dtype=torch.int64, device=device))
    corrector.pull_back(fresh=corrector(stale=vectors))
    assert seen == {"ieee"} and torch.get_float32_matmul_precision() == "high"


def test_what_is_said_of_tf32_for_everything_stays_inherited(device):
    vectors, before = F.normalize(torch.randn(300, 16), dim=-1).to(device), torch.backends.fp32_precision
    torch.backends.fp32_precision = "tf32"
    try:
        CorrectedSearch(EmbeddingCache.from_tensor(vectors), MLPCorrector(16)).search(vectors[:5], 3)
        torch.backends.fp32_precision = "ieee"
        assert torch.backends.cuda.matmul.fp32_precision == "ieee"
    finally:
        torch.backends.fp32_precision = before


TWO_GPUS = """
import torch, torch.nn.functional as F
from st_corrector import CorrectedSearch, EmbeddingCache, MLPCorrector
if torch.cuda.device_count() < 2:
    raise SystemExit(75)
vectors, queries = F.normalize(torch.randn(20_000, 32), dim=-1), F.normalize(torch.randn(9, 32), dim=-1)
expected = CorrectedSearch(EmbeddingCache.from_tensor(vectors), MLPCorrector(32)).search(queries, 10)
second = torch.device("cuda", 1)  # while the first one is the present device
for cache in (EmbeddingCache.from_tensor(vectors).to(second), EmbeddingCache.from_tensor(vectors)):
    found = CorrectedSearch(cache, MLPCorrector(32), chunk_size=3_000).search(queries.to(second), 10)
    assert found.rows.device == second
    torch.testing.assert_close(found.scores.cpu(), expected.scores, atol=1e-5, rtol=1e-5)
    assert (found.rows.cpu() == expected.rows).float().mean() > 0.99
"""


@pytest.mark.gpu
def test_a_gpu_that_is_not_the_present_one():
    done = subprocess.run([sys.executable, "-c", TWO_GPUS], capture_output=True, text=True, env=all_gpus(os.environ))
    if done.returncode == 75:
        pytest.skip("there is one GPU")
    assert done.returncode == 0, done.stderr[-3000:]
