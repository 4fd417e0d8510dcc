import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.batches import batch_of
from support.searches import trained

from st_corrector import (
    CacheError,
    CorrectedMultipleNegativesLoss,
    CorrectedSearch,
    EmbeddingCache,
    FaissIndex,
    InputError,
    MLPCorrector,
    RidgeCorrector,
    Shortlist,
    ShortlistSearch,
)
from st_corrector.search import faiss_index

faiss = pytest.importorskip("faiss", reason="FAISS is optional: pip install 'st-corrector[faiss-cpu]'")
DIM, ROWS = 16, 3_000


@pytest.fixture
def cache():
    """Vectors in clusters, as embeddings are: an index has something to go by."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(40, DIM, generator=generator)
    vectors = centres[torch.randint(0, 40, (ROWS,), generator=generator)]
    return EmbeddingCache.from_tensor(F.normalize(vectors + 0.5 * torch.randn(ROWS, DIM, generator=generator), dim=-1))


def queries(count=12, seed=1):
    return F.normalize(torch.randn(count, DIM, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.fixture
def exclude():
    return torch.randint(-1, ROWS, (12, 30), generator=torch.Generator().manual_seed(2))


def affine():
    return trained(RidgeCorrector(DIM, normalize=False), DIM)


def mlp():
    return trained(MLPCorrector(DIM, hidden=20, learning_rate=1e-2), DIM)


@pytest.mark.parametrize(
    ("corrector", "shortlist"),
    [
        (affine, Shortlist("Flat")),
        (affine, Shortlist("HNSW32", parameters="efSearch=2000")),
        (affine, Shortlist("IVF16,Flat", parameters="nprobe=16")),
        (affine, Shortlist("exact")),
        (mlp, Shortlist("Flat", size=ROWS)),
        (mlp, Shortlist("exact", size=ROWS)),
        (mlp, Shortlist("exact", size=64, every=1)),
        (mlp, Shortlist("Flat", size=64, every=1)),
    ],
)
@pytest.mark.parametrize("with_ceiling", [False, True])
@pytest.mark.parametrize("withdrawn", [[], range(0, ROWS, 3)], ids=["", "withdrawn"])
def test_where_the_shortlist_is_long_enough_it_finds_what_an_exact_search_finds(
    cache, exclude, corrector, shortlist, with_ceiling, withdrawn
):
    corrector = corrector()
    exact = CorrectedSearch(cache, corrector, withdrawn=withdrawn)
    approximate = ShortlistSearch(cache, corrector, shortlist, withdrawn=withdrawn)
    written = torch.randperm(ROWS, generator=torch.Generator().manual_seed(3))[:200]
    for search in (exact, approximate):
        search.overlay.write(written, 2 * queries(200, seed=4))
    # Of the written ones some are excluded, and the best of all are among them.
    exclude[:, :3] = exact.search(queries(), 3).rows
    assert torch.isin(exclude[:, 0], written).any()
    ceiling = exact.search(queries(), 8, exclude).scores[:, 3] - 1e-4 if with_ceiling else None
    expected, found = (search.search(queries(), 10, exclude, ceiling=ceiling) for search in (exact, approximate))
    torch.testing.assert_close(found.scores, expected.scores, atol=1e-4, rtol=1e-4)
    assert (found.rows == expected.rows).float().mean() > 0.98
    assert not torch.isin(found.rows, torch.tensor(withdrawn)).any()
    if with_ceiling:
        assert torch.equal(found.too_similar, expected.too_similar) and (found.too_similar >= 4).all()
    assert approximate.recall is not None and approximate.recall > 0.98


def test_all_rows_excluded_leave_nothing(cache):
    search = ShortlistSearch(cache, affine(), Shortlist("Flat"))
    search.overlay.write(torch.tensor([5]), queries(1))
    found = search.search(queries(2), 4, exclude=torch.arange(ROWS))
    assert (found.rows == -1).all() and (found.scores == -math.inf).all()


def test_the_index_does_not_offer_what_has_been_written_back(cache):
    corrector = affine()
    search = ShortlistSearch(cache, corrector, Shortlist("IVF16,Flat", parameters="nprobe=16"))
    best = search.search(queries(), 5).rows
    rows = best.unique()
    search.overlay.write(rows[:1], -5 * queries(1))
    search.search(queries(), 5)
    search.overlay.write(rows, (-5 * queries(1)).expand(len(rows), -1))  # far from where they were
    after = search.search(queries(), 5)
    assert not torch.isin(after.rows, rows).all() and (after.rows >= 0).all()
    torch.testing.assert_close(after.scores, CorrectedSearch.search(search, queries(), 5).scores, atol=1e-4, rtol=1e-4)


def test_a_copy_is_corrected_anew_when_it_is_due(cache):
    corrector = mlp()
    search = ShortlistSearch(cache, corrector, Shortlist("exact", size=10, every=3, check_every=1, min_recall=0))
    recalls = []
    for _ in range(4):
        search.search(queries(64), 10)
        recalls.append(search.recall)
        trained(corrector, DIM)  # it moves on
        search.steps += 1
    assert recalls[0] > 0.95 > recalls[2] and recalls[3] > 0.95 and recalls[1] >= recalls[2] - 0.02


def test_recall_is_measured_and_what_is_too_low_is_said(cache, caplog):
    search = ShortlistSearch(
        cache, affine(), Shortlist("IVF64,Flat", parameters="nprobe=1", check_every=2, min_recall=0.95)
    )
    assert search.recall is None
    for _ in range(3):
        rows = search.search(queries(8), 20).rows
    expected = CorrectedSearch.search(search, queries(8), 20).rows
    recall = sum(len(set(a.tolist()) & set(b.tolist())) for a, b in zip(rows, expected, strict=True)) / (8 * 20)
    assert search.recall == pytest.approx(recall, abs=1e-6) and recall < 0.95
    assert caplog.text.count("of the 20 targets that an exact search selects") == 2, "at the first and the third"


def test_indices_are_kept_and_told_apart(cache, tmp_path):
    built = FaissIndex.build(cache, "IVF16,Flat", tmp_path / "index", parameters="nprobe=4")
    written = (tmp_path / "index" / "index.faiss").stat().st_mtime_ns
    for again in (
        FaissIndex.build(cache, "IVF16,Flat", tmp_path / "index", parameters="nprobe=4"),
        FaissIndex.load(tmp_path / "index", cache, parameters="nprobe=4"),
    ):
        assert torch.equal(again.search(queries(), 10), built.search(queries(), 10))
    assert (tmp_path / "index" / "index.faiss").stat().st_mtime_ns == written, "not built again"
    narrow = FaissIndex.load(tmp_path / "index", cache, parameters="nprobe=1")
    assert not torch.equal(narrow.search(queries(), 10), built.search(queries(), 10)), "parameters are applied"
    assert sorted(path.name for path in (tmp_path / "index").iterdir()) == ["index.faiss", "index.json"]

    changed = cache[range(ROWS)]
    changed[ROWS // 2 + 1] = changed[0]
    for embeddings in (cache[range(ROWS)].flip(0), changed):
        with pytest.raises(CacheError, match=r"index of something else:\n  embeddings: .* there, .* here"):
            FaissIndex.load(tmp_path / "index", EmbeddingCache.from_tensor(embeddings))
    with pytest.raises(CacheError, match="factory: 'IVF16,Flat' there, 'Flat' here"):
        FaissIndex.build(cache, "Flat", tmp_path / "index")
    with pytest.raises(CacheError, match="normalize: True there, False here"):
        FaissIndex.build(cache, "IVF16,Flat", tmp_path / "index", normalize=False)
    with pytest.raises(CacheError, match="holds no index"):
        FaissIndex.load(tmp_path / "nothing", cache)
    (tmp_path / "index" / "index.faiss").write_bytes(b"nonsense")
    with pytest.raises(CacheError, match="missing or cut short"):
        FaissIndex.load(tmp_path / "index", cache)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"cat")
    with pytest.raises(CacheError, match="not empty and holds no index"):
        FaissIndex.build(cache, "Flat", tmp_path / "photos")


class OnGpu:
    """Stands for a copy of an index on a GPU, as FAISS has it: it excludes no rows, and gives at most 2,048."""

    def __init__(self, index):
        self.index, self.asked = index, []

    def search(self, vectors, k):
        assert 1 <= k <= 2_048, "Error: 'k <= getMaxKSelection()' failed"
        if getattr(self, "nprobe", 0) > 2_048:
            raise RuntimeError("Error: 'nprobe <= getMaxKSelection()' failed")
        self.asked.append(k)
        return self.index.search(vectors, k)


@pytest.fixture
def gpu(monkeypatch):
    """A FAISS that was built for GPUs, as far as that can be had without one; its copies, as they are made."""
    copies = []

    def copy(resources, number, index):
        if type(faiss.downcast_index(index)).__name__.startswith("IndexHNSW"):
            raise RuntimeError("This index type is not implemented on GPU.")
        copies.append(OnGpu(index))
        return copies[-1]

    monkeypatch.setattr(faiss_index, "_gpu_of", lambda device: 0)

    def set_parameters(copy, given):
        name, _, value = given.partition("=")
        setattr(copy, name, int(value))

    space = SimpleNamespace(set_index_parameters=set_parameters)
    monkeypatch.setattr(faiss, "GpuParameterSpace", lambda: space, raising=False)
    monkeypatch.setattr(faiss_index, "_free_on", lambda gpu: 1 << 30)
    monkeypatch.setattr(faiss_index, "_resources_of", lambda gpu: None)
    monkeypatch.setattr(faiss, "index_cpu_to_gpu", copy, raising=False)
    return copies


@pytest.mark.parametrize("factory", ["Flat", "IVF16,Flat"])
@pytest.mark.parametrize("skipped", [0, 1, 700, ROWS - 5, ROWS])
@pytest.mark.parametrize("k", [1, 10, ROWS])
def test_a_copy_on_a_gpu_finds_what_the_index_finds(cache, factory, skipped, k, gpu):
    """Also where so many rows are excluded that it must be asked for more, or for more than it can give."""
    index = FaissIndex.build(cache, factory)
    order = np.random.default_rng(0).permutation(ROWS)[:skipped]
    skip = np.packbits(np.isin(np.arange(ROWS), order), bitorder="little") if skipped else None
    found = index.search(queries(), k, skip)
    expected = index._search_here(queries(), k, skip)
    assert torch.equal(found, expected) and found.shape == (12, k)
    assert not np.isin(found.numpy(), order).any()
    if k == ROWS:
        assert not gpu, "more than a GPU gives is not asked of it"
        return
    assert gpu[0].asked and max(gpu[0].asked) <= min(ROWS, 2_048) and len(gpu) == 1
    if skipped in (0, 1):
        assert len(gpu[0].asked) == 1, "once, unless many are excluded"


def test_lists_that_are_exhausted_are_not_asked_again(cache, gpu):
    """An index that looks into one list of 16 has some 190 rows to give."""
    index = FaissIndex.build(cache, "IVF16,Flat", parameters="nprobe=1")
    gpu_index = index._copy_on(0)
    gpu_index.index = index._index
    found = index.search(queries(), 1_000)
    assert torch.equal(found, index._search_here(queries(), 1_000, None))
    assert (found[:, -1] == -1).all() and gpu_index.asked == [1_000] and gpu_index.nprobe == 1


def test_an_index_that_a_gpu_gives_up_is_searched_here(cache, gpu, monkeypatch, caplog):
    index = FaissIndex.build(cache, "IVF16,Flat", parameters="nprobe=4096")
    for _ in range(2):
        assert torch.equal(index.search(queries(), 5), index._search_here(queries(), 5, None))
    assert caplog.text.count("FAISS cannot search it on GPU 0 (Error: 'nprobe <= getMaxKSelection()' failed)") == 1
    monkeypatch.setattr(faiss_index, "_free_on", lambda gpu: 1_000)
    small = FaissIndex.build(cache, "Flat")
    assert torch.equal(small.search(queries(), 5), small._search_here(queries(), 5, None))
    assert len(gpu) == 1 and "it takes 0.0 GB, and 0.0 GB are free" in caplog.text


def test_an_index_that_no_gpu_has_is_searched_here(cache, gpu, caplog):
    index = FaissIndex.build(cache, "HNSW32")
    for _ in range(2):
        assert torch.equal(index.search(queries(), 5), index._search_here(queries(), 5, None))
    assert not gpu and caplog.text.count("is searched on the CPU: FAISS cannot search it on GPU 0") == 1


def test_no_gpu_is_asked_for_queries_on_the_cpu(cache, monkeypatch):
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1)
    assert faiss_index._gpu_of(torch.device("cpu")) is None and faiss_index._gpu_of(torch.device("cuda:1")) == 1
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 0)
    assert faiss_index._gpu_of(torch.device("cuda:1")) is None


def test_bad_shortlists_are_refused(cache):
    with pytest.raises(InputError, match="does not understand the index factory string 'Nonsense'"):
        ShortlistSearch(cache, affine(), Shortlist("Nonsense"))
    for factory in ("IDMap,Flat", "IVF4096,Flat"):  # ids of its own; more centroids than vectors
        with pytest.raises(InputError, match=f"cannot make an index '{factory}'"):
            ShortlistSearch(cache, affine(), Shortlist(factory))
    with pytest.raises(InputError, match="cannot set 'nprobes=3'"):
        ShortlistSearch(cache, affine(), Shortlist("Flat", parameters="nprobes=3"))
    with pytest.raises(InputError, match="at least 1"):
        Shortlist(size=0)
    with pytest.raises(InputError, match=r"min_recall must lie in \[0, 1\]"):
        Shortlist(min_recall=90)
    index = FaissIndex.build(cache, "Flat")
    with pytest.raises(InputError, match="every builds the index again"):
        Shortlist(index, every=3)
    with pytest.raises(InputError, match="is not an index of EmbeddingCache"):
        ShortlistSearch(cache, affine(), Shortlist(index), normalize=False)
    with pytest.raises(InputError, match="looks at every row"):
        ShortlistSearch(cache, affine(), Shortlist(index)).search(queries(), 3, sampler="gumbel", seed=1)


def test_the_loss_trains_with_a_shortlist_as_without(tmp_path, static_model, corpus):
    """With a shortlist of everything the steps are the same; it outlives a refresh."""
    cache = EmbeddingCache.build(static_model, corpus, tmp_path / "cache", progress=False)
    start = {name: value.clone() for name, value in static_model.state_dict().items()}
    losses = {}
    for name, shortlist in {"exact": None, "Flat": Shortlist("Flat", size=len(corpus))}.items():
        static_model.load_state_dict(start)
        loss = CorrectedMultipleNegativesLoss(static_model, corpus, cache, num_negatives=4, shortlist=shortlist)
        optimizer = torch.optim.Adam(static_model.parameters(), lr=1e-2)
        losses[name] = []
        for step in range(6):
            if step == 4:
                loss.corrected.refresh()
            batch = batch_of(static_model, corpus, range(8 * step, 8 * step + 8))
            total = sum(loss(*batch).values())
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            losses[name].append(total.item())
        metrics = loss.pop_metrics()
        assert ("recall" in metrics) is (shortlist is not None) and metrics.get("recall", 1.0) == 1.0
    assert isinstance(loss.corrected.search, ShortlistSearch)
    assert losses["Flat"] == pytest.approx(losses["exact"], rel=1e-4)
    assert losses["exact"][-1] != losses["exact"][0]
