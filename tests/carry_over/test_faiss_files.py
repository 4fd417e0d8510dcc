"""FAISS indices of every kind are carried over through files, vector by vector, or refused before anything is done."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_static_model, make_texts
from support.indices import CARRIED_OVER, REFUSED, as_kept, faiss_index, odd, on_disk, repeated, shuffled

from st_corrector import AffineMap, Corpus, Corrector, EmbeddingCache, InputError, upgrade_embeddings
from st_corrector.carry_over.fitting import fit_to_pairs
from st_corrector.cli import main
from st_corrector.search.fidelity import overlap_at_k
from st_corrector.stores.opening import open_vectors

faiss = pytest.importorskip("faiss", reason="FAISS is optional: pip install 'st-corrector[faiss-cpu]'")
COUNT = 300
METRICS = ["METRIC_INNER_PRODUCT", "METRIC_L2"]
WITH_IDS = [
    *("IVF4,Flat", "IVF4,SQ8", "IVF4,PQ4x4", "IVF4_HNSW8,Flat", "PCA16,IVF4,Flat", "OPQ4,IVF4,Flat", "OPQ4,IVF4,PQ4x4"),
    *("IDMap,Flat", "IDMap2,Flat", "IDMap2,SQ8", "IDMap2,PQ4x4", "IDMap,HNSW16", "IDMap2,HNSW16", "IDMap,IVF4,Flat"),
    *(
        "IDMap2,IVF4,PQ4x4",
        "IDMap2,PCA16,IVF4,Flat",
        "OPQ4,IDMap2,IVF4,Flat",
        "PCA16,IDMap,Flat",
        "PCA16,IDMap2,HNSW16",
    ),
]


@pytest.fixture(scope="module")
def pair() -> tuple[torch.Tensor, Corrector, torch.Tensor]:
    """Embeddings, a corrector, and what it makes of them."""
    generator = torch.Generator().manual_seed(0)
    old = F.normalize(torch.randn(COUNT, 24, generator=generator), dim=-1)
    fitted = fit_to_pairs(old[:500], F.normalize(old[:500] @ torch.randn(24, 24, generator=generator), dim=-1))
    return old, fitted, upgrade_embeddings(old, fitted)


def vectors_of(count: int = COUNT, dim: int = 16) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((count, dim)).astype(np.float32)


def unchanged(dim: int = 16, unit: bool = False) -> Corrector:
    """Maps every vector to itself."""
    identity = AffineMap(dim, new_dim=dim, normalize=unit)
    identity.weight = torch.eye(dim)
    return identity


def never(*inputs):
    raise AssertionError("something was mapped")


def pairs_in(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Ids and vectors of all that is stored in a file."""
    vectors = open_vectors(path)
    return vectors._ids, vectors.take(np.arange(vectors.count)).numpy()


def sorted_pairs(ids: np.ndarray, vectors: np.ndarray) -> list[tuple[int, tuple[float, ...]]]:
    return sorted((id, tuple(row)) for id, row in zip(ids.tolist(), (vectors.round(1) + 0.0).tolist(), strict=True))


def furthest(ours: tuple[np.ndarray, np.ndarray], theirs: tuple[np.ndarray, np.ndarray]) -> float:
    """How far a pair of ``ours`` is, at most, from the nearest of ``theirs`` with its id."""
    return max(np.linalg.norm(theirs[1][theirs[0] == id] - row, axis=1).min() for id, row in zip(*ours, strict=True))


@pytest.mark.parametrize("ids_of", [repeated, pytest.param(odd, marks=pytest.mark.long)])
@pytest.mark.parametrize("factory", WITH_IDS)
def test_every_vector_is_carried_over_under_its_id(tmp_path, factory, ids_of):
    vectors = vectors_of()
    ids = ids_of(len(vectors))
    kept = as_kept(factory, vectors)
    file = on_disk(faiss_index(factory, vectors, ids), tmp_path / "old.faiss")
    found = pairs_in(file)
    assert np.array_equal(np.sort(ids), found[0])
    assert furthest(found, (ids, kept)) < 1e-4 > furthest((ids, kept), found)
    open_vectors(file).upgrade(unchanged(), tmp_path / "new.faiss", progress=False)
    after = pairs_in(tmp_path / "new.faiss")
    assert np.array_equal(found[0], after[0])
    if "PQ" in factory.replace("OPQ", "") or "SQ" in factory:  # what was compressed is compressed once more
        assert furthest(after, found) < 4.0 > furthest(found, after)
        assert np.linalg.norm(after[1], axis=1).mean() > 0.6 * np.linalg.norm(vectors, axis=1).mean()
    else:
        assert furthest(after, found) < 1e-3 > furthest(found, after)


@pytest.mark.parametrize("factory", ["IVF4,Flat", "IDMap2,Flat", "IDMap2,HNSW16", "PCA16,IVF4,Flat", "IDMap,IVF4,Flat"])
def test_vectors_of_one_id_stay_apart(tmp_path, factory):
    vectors, ids = np.rint(10 * vectors_of()), np.arange(COUNT) // 100
    file = on_disk(faiss_index(factory, vectors, ids), tmp_path / "old.faiss")
    expected = sorted_pairs(ids, as_kept(factory, vectors))
    assert sorted_pairs(*pairs_in(file)) == expected
    open_vectors(file).upgrade(unchanged(), tmp_path / "new.faiss", progress=False)
    assert len(set(sorted_pairs(*pairs_in(tmp_path / "new.faiss")))) == len(set(expected)) == COUNT


@pytest.mark.parametrize("factory", ["IVF4,Flat", "IDMap,Flat", "IDMap2,Flat", "PCA16,IVF4,Flat"])
@pytest.mark.parametrize("ids_of", [repeated, odd])
def test_what_was_removed_stays_away(tmp_path, factory, ids_of):
    vectors = vectors_of()
    ids = ids_of(COUNT)
    index = faiss_index(factory, vectors, ids)
    gone = np.unique(ids)[::3]
    target = index if not isinstance(index, faiss.IndexPreTransform) else faiss.downcast_index(index.index)
    removed = target.remove_ids(gone.astype(np.int64))
    index.ntotal = target.ntotal
    left = ~np.isin(ids, gone)
    assert removed == (~left).sum() > 0
    file = on_disk(index, tmp_path / "old.faiss")
    expected = (ids[left], as_kept(factory, vectors)[left])
    found = pairs_in(file)
    assert len(found[0]) == left.sum()
    assert furthest(found, expected) < 1e-4 > furthest(expected, found)
    open_vectors(file).upgrade(unchanged(), tmp_path / "new.faiss", progress=False)
    assert furthest(pairs_in(tmp_path / "new.faiss"), expected) < 1e-3


def test_an_idmap_whose_ids_went_astray_is_refused(tmp_path):
    index = faiss_index("IDMap,IVF4,Flat", vectors_of(), shuffled(COUNT))
    index.remove_ids(np.sort(shuffled(COUNT))[:50])
    with pytest.raises(InputError, match="do not belong to what is inside any more"):
        open_vectors(on_disk(index, tmp_path / "old.faiss"))


@pytest.mark.parametrize(
    ("metric", "own_ids"), [(METRICS[0], True), pytest.param(METRICS[1], False, marks=pytest.mark.long)]
)
@pytest.mark.parametrize("factory", CARRIED_OVER)
def test_indices_keep_kind_metric_and_ids(pair, tmp_path, factory, own_ids, metric):
    old, fitted, expected = pair
    ids = shuffled(COUNT) if own_ids else np.arange(COUNT)
    factory, least = f"IDMap2,{factory}" if own_ids else factory, CARRIED_OVER[factory]
    index = faiss_index(factory, old.numpy(), ids if own_ids else None, metric)
    file = on_disk(index, tmp_path / "old.faiss")
    open_vectors(file).upgrade(fitted, tmp_path / "new.faiss", progress=False)
    before, found = (faiss.read_index(str(path)) for path in (file, tmp_path / "new.faiss"))
    assert kinds(found) == kinds(before) and found.ntotal == COUNT and found.metric_type == index.metric_type
    if (ivf := faiss.try_extract_index_ivf(found)) is not None:
        ivf.nprobe = 16
    exact = ids[(expected[:200] @ expected.T).topk(10).indices.numpy()]

    def kept_by(searched) -> float:
        rows = searched.search(expected[:200].numpy(), 10)[1]
        return np.mean([len(set(some) & set(others)) / 10 for some, others in zip(rows, exact, strict=True)])

    assert kept_by(found) >= least
    assert kept_by(index) < 0.2, "the old index is another one"


def kinds(index) -> list[str]:
    """The classes of an index and of what is inside."""
    found = []
    while True:
        index = faiss.downcast_index(index)
        found.append(type(index).__name__)
        if isinstance(index, faiss.IndexPreTransform):
            transforms = [faiss.downcast_VectorTransform(index.chain.at(n)) for n in range(index.chain.size())]
            found += [type(each).__name__ for each in transforms]
        if not isinstance(index, (faiss.IndexPreTransform, faiss.IndexIDMap)):
            return found
        index = index.index


def spread(axes: slice) -> torch.Tensor:
    """Vectors of unit length that vary along some of 24 axes, and hardly along the others."""
    width = torch.full((24,), 0.05)
    width[axes] = 1.0
    return F.normalize(torch.randn(1000, 24, generator=torch.Generator().manual_seed(0)) * width, dim=-1)


@pytest.mark.parametrize(
    "factory",
    [
        *("PCA12,Flat", "PCA12,IVF16,Flat", "IVF16,PQ12x4", "SQ8", "PQ12x4"),
        "OPQ4,PQ4x4",
        *(pytest.param(each, marks=pytest.mark.long) for each in ("OPQ4_12,Flat", "OPQ4_12,IVF16,PQ4x4")),
    ],
)
def test_what_an_index_has_learnt_it_learns_anew(tmp_path, factory):
    """The new vectors lie where the old ones did not: what was learnt of these would lose them."""
    old = spread(slice(0, 12))
    swap = AffineMap(24, new_dim=24)
    swap.weight = torch.eye(24).roll(12, dims=1)
    index = faiss.index_factory(24, factory)
    index.train(old.numpy())
    index.add(old.numpy())
    if (ivf := faiss.try_extract_index_ivf(index)) is not None:
        ivf.nprobe = 16
    faiss.write_index(index, str(tmp_path / "old.faiss"))
    vectors = open_vectors(tmp_path / "old.faiss")
    vectors.upgrade(swap, tmp_path / "new.faiss", progress=False)
    new = upgrade_embeddings(vectors.take(np.arange(vectors.count)), swap)  # of what the old index still knows
    anew = faiss.index_factory(24, factory)
    anew.train(new.numpy())
    anew.add(new.numpy())

    def kept(searched) -> float:
        if (ivf := faiss.try_extract_index_ivf(searched)) is not None:
            ivf.nprobe = 16
        exact = torch.cdist(new[:100], new).topk(10, largest=False).indices
        found = torch.from_numpy(searched.search(new[:100].numpy(), 10)[1])
        return float(overlap_at_k(found, exact).mean())

    assert kept(faiss.read_index(str(tmp_path / "new.faiss"))) > kept(anew) - 0.05 > 0.2


@pytest.mark.parametrize("factory", REFUSED)
def test_other_kinds_are_refused_before_anything_is_mapped(tmp_path, factory):
    file = on_disk(faiss_index(factory, spread(slice(0, 12)).numpy(), metric="METRIC_L2"), tmp_path / "old.faiss")
    with pytest.raises(InputError, match=REFUSED[factory]):
        open_vectors(file)
    if REFUSED[factory] != "factory" or factory == "IVF16,FlatDedup":
        with pytest.raises(InputError, match="and build it again"):
            open_vectors(file, factory="Flat")
    else:
        open_vectors(file, factory="Flat").upgrade(unchanged(24, unit=True), tmp_path / "new.faiss", progress=False)
        assert faiss.read_index(str(tmp_path / "new.faiss")).ntotal == 1000


@pytest.mark.parametrize("metric", ["METRIC_INNER_PRODUCT", "METRIC_L2", "METRIC_L1", "METRIC_Canberra"])
@pytest.mark.parametrize("unit", [True, False])
def test_an_index_that_ranks_otherwise_than_the_model_is_refused(tmp_path, metric, unit):
    file = on_disk(faiss_index("Flat", spread(slice(0, 12)).numpy(), metric=metric), tmp_path / "old.faiss")
    upgrade, alike = open_vectors(file).upgrade, ("METRIC_INNER_PRODUCT", "METRIC_L2")[: 1 + unit]
    if metric in alike:
        upgrade(unchanged(24, unit), tmp_path / "new.faiss", progress=False)
        assert faiss.read_index(str(tmp_path / "new.faiss")).metric_type == getattr(faiss, metric)
    else:
        with pytest.raises(InputError, match=f"and the model by {'cosine' if unit else 'dot product'}: its ranking"):
            upgrade(unchanged(24, unit), tmp_path / "new.faiss", progress=False)
        assert not (tmp_path / "new.faiss").exists()


def test_binary_indices_are_no_embeddings(tmp_path):
    index = faiss.IndexBinaryFlat(64)
    index.add(np.zeros((10, 8), dtype=np.uint8))
    faiss.write_index_binary(index, str(tmp_path / "old.faiss"))
    with pytest.raises(InputError, match="not readable as a FAISS index"):
        open_vectors(tmp_path / "old.faiss")


@pytest.mark.parametrize("factory", ["IVF16,Flat", "OPQ4_8,Flat", "OPQ4,IVF16,PQ4x4"])
def test_an_index_of_too_few_vectors_to_learn_from_is_refused_before_anything_is_mapped(tmp_path, monkeypatch, factory):
    many = vectors_of()
    index = faiss_index(factory, many)
    index.reset()
    index.add(many[:15])
    file = on_disk(index, tmp_path / "old.faiss")
    monkeypatch.setattr("st_corrector.carry_over.mapping.upgrade_embeddings", never)
    with pytest.raises(InputError, match=r"learns from at least (16|256) vectors, and there are 15.*factory"):
        open_vectors(file).upgrade(unchanged(), tmp_path / "new.faiss", progress=False)
    with pytest.raises(InputError, match="learns from at least 64 vectors"):
        open_vectors(file, factory="IVF64,Flat").upgrade(unchanged(), tmp_path / "new.faiss", progress=False)
    monkeypatch.undo()
    open_vectors(file, factory="Flat").upgrade(unchanged(), tmp_path / "new.faiss", progress=False)


def test_what_faiss_refuses_is_refused_in_words_and_leaves_nothing(tmp_path):
    file = on_disk(faiss_index("Flat", vectors_of(100)), tmp_path / "old.faiss")
    with pytest.raises(InputError, match="FAISS cannot make the new index"):
        open_vectors(file, factory="RQ4x8").upgrade(unchanged(), tmp_path / "new.faiss", progress=False)
    assert not (tmp_path / "new.faiss").exists()


@pytest.mark.parametrize("kind", ["Array", "Hashtable"])
def test_a_direct_map_is_kept(tmp_path, kind):
    vectors = vectors_of()
    index = faiss_index("IVF4,Flat", vectors)
    index.set_direct_map_type(getattr(faiss.DirectMap, kind))
    open_vectors(on_disk(index, tmp_path / "old.faiss")).upgrade(unchanged(), tmp_path / "new.faiss", progress=False)
    found = faiss.read_index(str(tmp_path / "new.faiss"))
    assert np.abs(found.reconstruct(7) - vectors[7]).max() < 1e-5


def test_a_faiss_index_of_another_width_needs_to_be_told_how(pair, tmp_path):
    old, _, _ = pair
    index = faiss.index_factory(24, "IDMap,Flat")
    index.add_with_ids(old.numpy(), np.arange(COUNT)[::-1].copy())
    faiss.write_index(index, str(tmp_path / "old.faiss"))
    to_half = fit_to_pairs(old[:500], F.normalize(old[:500, :12], dim=-1))
    with pytest.raises(InputError, match=r"12 dimensions instead of 24.*factory"):
        open_vectors(tmp_path / "old.faiss").upgrade(to_half, tmp_path / "new.faiss", progress=False)
    open_vectors(tmp_path / "old.faiss", factory="HNSW16").upgrade(to_half, tmp_path / "new.faiss", progress=False)
    found = faiss.read_index(str(tmp_path / "new.faiss"))
    nearest = found.search(upgrade_embeddings(old[:50], to_half).numpy(), 1)[1][:, 0]
    assert found.d == 12 and (nearest == COUNT - 1 - np.arange(50)).mean() > 0.9
    with pytest.raises(InputError, match="does not understand"):
        open_vectors(tmp_path / "old.faiss", factory="Nonsense").upgrade(to_half, tmp_path / "x", progress=False)


@pytest.fixture
def data(tmp_path) -> Path:
    """A BEIR folder of 600 targets."""
    queries, texts = make_texts(600)
    folder = tmp_path / "data"
    (folder / "qrels").mkdir(parents=True)
    for name, lines in (("corpus", texts), ("queries", queries)):
        records = (json.dumps({"_id": str(n), "text": text}) for n, text in enumerate(lines))
        (folder / f"{name}.jsonl").write_text("\n".join(records))
    (folder / "qrels" / "dev.tsv").write_text("\n".join(f"{n}\t{n}\t1" for n in range(600)))
    return folder


@pytest.mark.parametrize("factory", ["IVF4,Flat", "IDMap2,Flat", "IDMap,IVF4,Flat", "IDMap2,HNSW16"])
def test_rows_of_repeated_ids_are_those_of_the_corpus_or_refused(tmp_path, data, capsys, factory):
    """Passages under their document's id, in the corpus' order: an IVF index has lost it, an IDMap has not."""
    model, corpus = make_static_model(), Corpus.from_beir(data)
    model.save_pretrained(str(tmp_path / "model"))
    embeddings = EmbeddingCache.build(model, corpus, tmp_path / "cache", progress=False)[range(600)]
    file = on_disk(faiss_index(factory, embeddings.numpy(), np.arange(600) // 3), tmp_path / "old.faiss")
    common = ["--model", str(tmp_path / "model"), "--corpus", str(data), "--judged", "150", "--fit_sample", "200"]
    status = main(["upgrade-index", str(file), str(tmp_path / "new.faiss"), "--fit", "ridge", *common, "--json"])
    said = capsys.readouterr()
    if factory == "IVF4,Flat":
        assert status == 1 and "ids repeat, and an IVF index does not know" in said.err
        assert not (tmp_path / "new.faiss").exists()
    else:
        assert status == 0 and json.loads(said.out)["certificate"]["recall"]["upgraded"][0] > 0.99


@pytest.mark.parametrize("factory", ["IDMap2,Flat", "IVF4,Flat"])
def test_rows_are_those_of_the_corpus_where_its_ids_are_the_indexs(tmp_path, factory):
    """A corpus of "10", "2", "30", …: its order is not that of the numbers."""
    vectors, ids = vectors_of(), np.arange(COUNT) * 7 + 3
    order = np.random.default_rng(0).permutation(COUNT)
    file = on_disk(faiss_index(factory, vectors, ids), tmp_path / "old.faiss")
    opened = open_vectors(file, ids=[str(each) for each in ids[order]])
    assert np.array_equal(opened.take(np.arange(COUNT)).numpy(), vectors[order])
    opened.upgrade(unchanged(16), tmp_path / "new.faiss", progress=False)
    assert sorted_pairs(*pairs_in(tmp_path / "new.faiss")) == sorted_pairs(*pairs_in(file)), "each keeps its id"
    assert np.array_equal(opened.at(tmp_path / "new.faiss").take(np.arange(COUNT)).numpy(), vectors[order])
    # Other ids say nothing of the index's: rows are in its own order.
    for others in ([f"doc{n}" for n in range(COUNT)], [str(n) for n in range(COUNT)], [str(2**70)] * COUNT):
        assert np.array_equal(open_vectors(file, ids=others).take(np.arange(COUNT)).numpy(), vectors)


def test_ids_that_may_count_rows_or_be_the_corpuss_are_refused(tmp_path):
    vectors, shuffled_ids = vectors_of(), [str(each) for each in np.random.default_rng(0).permutation(COUNT)]
    named = on_disk(faiss_index("IDMap2,Flat", vectors, np.arange(COUNT)), tmp_path / "named.faiss")
    with pytest.raises(InputError, match=r"ids in .* are 0 … 299, and so are the corpus's, in another order"):
        open_vectors(named, ids=shuffled_ids)
    plain = on_disk(faiss_index("Flat", vectors), tmp_path / "plain.faiss")
    assert np.array_equal(open_vectors(plain, ids=shuffled_ids).take(np.arange(COUNT)).numpy(), vectors)
