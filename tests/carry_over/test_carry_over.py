"""Embeddings that are served are carried over to another model, and what that keeps is told truly."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_static_model
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize
from support.encoders import moved

from st_corrector import (
    AffineMap,
    CacheError,
    Corpus,
    CorpusRetrievalEvaluator,
    Corrector,
    EmbeddingCache,
    InputError,
    NonFiniteError,
    RidgeCorrector,
    StorageError,
    fit_corrector,
    upgrade_embeddings,
)
from st_corrector.carry_over.fitting import FITTED, fit_to_pairs
from st_corrector.correctors import Frames
from st_corrector.data.encoding import DocumentEncoder
from st_corrector.stores.opening import open_vectors


def narrower(model: SentenceTransformer, dim: int = 16) -> SentenceTransformer:
    torch.manual_seed(3)
    block = Dense(24, dim, init_weight=torch.randn(dim, 24) / 5)
    return SentenceTransformer(modules=[*list(model.children())[:-1], block, Normalize()], device="cpu")


def all_of(model: SentenceTransformer, corpus: Corpus) -> torch.Tensor:
    return DocumentEncoder(model, corpus, progress=False).encode(model, np.arange(len(corpus)))


@pytest.mark.parametrize("name", FITTED)
def test_a_fitted_corrector_brings_embeddings_nearer(large, name):
    old, new = all_of(make_static_model(), large), all_of(moved(), large)
    fitted = fit_to_pairs(old[:1500], new[:1500], name)
    before = F.cosine_similarity(old, new)[1500:].mean()
    after = F.cosine_similarity(upgrade_embeddings(old, fitted), new)[1500:].mean()
    assert after > before + 0.02, (float(before), float(after))


def test_a_linear_change_is_found_whatever_the_widths(large):
    model = make_static_model()
    fitted = fit_corrector(model, narrower(model), large, sample=500, progress=False)
    assert isinstance(fitted, AffineMap) and (fitted.dim, fitted.new_dim) == (24, 16)
    error = 1 - F.cosine_similarity(upgrade_embeddings(all_of(model, large), fitted), all_of(narrower(model), large))
    # Dense(24 → 16) comes before Normalize in the new model and after it in the map: a text's own length is unknown.
    assert error.mean() < 0.02
    assert fitted.frames.stale["weights"] != fitted.frames.fresh["weights"]


def test_fitting_takes_a_cache_instead_of_the_old_model(large, tmp_path):
    old, new = make_static_model(), moved()
    cache = EmbeddingCache.build(old, large, tmp_path / "cache", progress=False)
    by_cache = fit_corrector(cache, new, large, sample=300, progress=False)
    by_model = fit_corrector(old, new, large, sample=300, progress=False)
    assert torch.equal(by_cache.weight, by_model.weight) and by_cache.frames == by_model.frames
    assert by_cache.frames.stale == cache.fingerprint


def test_more_pairs_fit_better(large):
    old, new = all_of(make_static_model(), large), all_of(moved(), large)

    def error(size: int) -> float:
        return float(1 - F.cosine_similarity(upgrade_embeddings(old, fit_to_pairs(old[:size], new[:size])), new).mean())

    assert error(1500) < error(100) < error(20)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda old, new: fit_to_pairs(old, new, "identity"), "is not one of"),
        (lambda old, new: fit_to_pairs(old, new[:, :8], "mlp"), "cannot map"),
        (lambda old, new: fit_to_pairs(old[:9], new[:9]), "At least 20 pairs"),
        (lambda old, new: upgrade_embeddings(old[:, :8], RidgeCorrector(24)), r"shape \(n, 24\)"),
        (lambda old, new: upgrade_embeddings(old.int(), RidgeCorrector(24)), "floating-point"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(InputError, match=message):
        call(torch.randn(40, 24, generator=generator), torch.randn(40, 24, generator=generator))


def test_a_cache_of_another_corpus_is_refused(large, corpus):
    with pytest.raises(InputError, match="corpus"):
        fit_corrector(EmbeddingCache.from_tensor(torch.randn(9, 24)), moved(), corpus)
    with pytest.raises(InputError, match="sample"):
        fit_corrector(moved(), moved(), corpus, sample=3)


def test_searching_served_embeddings_gives_what_encoding_gives(large):
    model = moved()
    evaluator = CorpusRetrievalEvaluator(large, "dev")
    served = EmbeddingCache.from_tensor(all_of(model, large))
    assert torch.equal(evaluator.retrieve(model, served), evaluator.retrieve(model))
    stale = evaluator.score(evaluator.retrieve(model, EmbeddingCache.from_tensor(all_of(make_static_model(), large))))
    assert stale["ndcg@10"] < evaluator(model)["ndcg@10"]
    with pytest.raises(InputError, match="7 rows, the corpus"):
        evaluator.retrieve(model, EmbeddingCache.from_tensor(torch.randn(7, 24)))


# ------------------------------------------------------------------ files


@pytest.fixture
def pair() -> tuple[torch.Tensor, Corrector, torch.Tensor]:
    """Embeddings, a corrector, and what it makes of them."""
    generator = torch.Generator().manual_seed(0)
    old = F.normalize(torch.randn(3000, 24, generator=generator), dim=-1)
    fitted = fit_to_pairs(old[:500], F.normalize(old[:500] @ torch.randn(24, 24, generator=generator), dim=-1))
    return old, fitted, upgrade_embeddings(old, fitted)


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 0), (np.float16, 2e-3), (np.float64, 1e-7)])
def test_numpy_files(pair, tmp_path, dtype, tolerance):
    old, fitted, expected = pair
    np.save(tmp_path / "old.npy", old.numpy().astype(dtype))
    open_vectors(tmp_path / "old.npy").upgrade(fitted, tmp_path / "new.npy", progress=False)
    found = np.load(tmp_path / "new.npy")
    assert found.dtype == dtype and np.abs(found - expected.numpy()).max() <= tolerance
    assert np.array_equal(np.load(tmp_path / "old.npy"), old.numpy().astype(dtype))


def test_safetensors_files_keep_their_other_tensors(pair, tmp_path):
    old, fitted, expected = pair
    file = {"embeddings": old.bfloat16(), "ids": torch.arange(3000), "bias": torch.ones(24)}
    save_file(file, tmp_path / "old.safetensors", {"model": "a"})
    open_vectors(tmp_path / "old.safetensors").upgrade(fitted, tmp_path / "new.safetensors", progress=False)
    found = load_file(tmp_path / "new.safetensors")
    assert found["embeddings"].dtype == torch.bfloat16 and (found["embeddings"] - expected).abs().max() < 0.02
    assert torch.equal(found["ids"], file["ids"]) and torch.equal(found["bias"], file["bias"])
    vectors = open_vectors(tmp_path / "old.safetensors")
    some = np.array([5, 2, 900])
    assert torch.equal(vectors.take(some), old.bfloat16()[some].float())
    save_file({"a": old, "b": old.clone()}, tmp_path / "two.safetensors")
    with pytest.raises(InputError, match="which are the embeddings"):
        open_vectors(tmp_path / "two.safetensors")
    assert open_vectors(tmp_path / "two.safetensors", tensor="b").count == 3000


def test_caches_know_what_carried_them_over(pair, tmp_path):
    old, fitted, expected = pair
    EmbeddingCache.from_tensor(old).save(tmp_path / "old")
    fitted.frames = Frames({}, {"weights": "new"}, True)
    open_vectors(tmp_path / "old").upgrade(fitted, tmp_path / "new", progress=False)
    found = EmbeddingCache.load(tmp_path / "new", verify=True)
    assert torch.equal(found[np.arange(3000)], expected)
    assert found.fingerprint["weights"] == "new" and found.fingerprint["carried_over_by"]
    cache = EmbeddingCache.load(tmp_path / "old")
    cache.fingerprint["weights"] = "old"
    cache.save(tmp_path / "known")
    fitted.frames = Frames({"weights": "another"}, {}, True)
    with pytest.raises(InputError, match="weights: 'old' there, 'another' here"):
        open_vectors(tmp_path / "known").upgrade(fitted, tmp_path / "never", progress=False)
    assert not (tmp_path / "never").exists()


def test_what_does_not_fit_the_files_dtype_is_refused(tmp_path):
    big = AffineMap(4, new_dim=4, normalize=False)
    big.weight = torch.eye(4) * 1e6
    vectors = torch.ones(50, 4)
    np.save(tmp_path / "old.npy", vectors.half().numpy())
    save_file({"embeddings": vectors.half()}, tmp_path / "old.safetensors")
    EmbeddingCache.from_tensor(vectors.half()).save(tmp_path / "old")
    for name, new in (("old.npy", "new.npy"), ("old.safetensors", "new.safetensors"), ("old", "new")):
        with pytest.raises(NonFiniteError, match="not finite in"):
            open_vectors(tmp_path / name).upgrade(big, tmp_path / new, progress=False)
    assert not list(tmp_path.glob("new*"))


@pytest.mark.parametrize("name", ["mlp", "ridge"])
def test_lengths_count_where_embeddings_are_compared_by_dot_product(name):
    generator = torch.Generator().manual_seed(0)
    old = torch.randn(600, 12, generator=generator)
    new = old * torch.linspace(0.2, 3, 12) + 1.0
    fitted = fit_to_pairs(old[:500], new[:500], name, unit=False)
    error = (upgrade_embeddings(old[500:], fitted) - new[500:]).square().sum(-1).mean()
    assert error < 0.1 * (old[500:] - new[500:]).square().sum(-1).mean()


def test_the_regularization_is_chosen_by_what_is_held_out():
    generator = torch.Generator().manual_seed(0)
    old = torch.randn(60, 24, generator=generator)
    turn = torch.randn(24, 24, generator=generator) / 5
    clean = fit_to_pairs(old, old @ (torch.eye(24) + turn), unit=False)
    noise = fit_to_pairs(old, torch.randn(60, 24, generator=generator), unit=False)
    assert clean.regularization <= 0.1 < 10 <= noise.regularization


def test_nothing_partial_is_left(pair, tmp_path, small_disk):
    old, fitted, _ = pair
    tall = old.repeat(100, 1).numpy()  # 29 MB
    np.save(tmp_path / "old.npy", tall)
    save_file({"embeddings": torch.from_numpy(tall)}, tmp_path / "old.safetensors")
    EmbeddingCache.from_tensor(torch.from_numpy(tall)).save(tmp_path / "cache")
    for name, new in (("old.npy", "new.npy"), ("old.safetensors", "new.safetensors"), ("cache", "new")):
        with pytest.raises(StorageError):
            open_vectors(tmp_path / name).upgrade(fitted, small_disk / new, progress=False)
        assert not list(small_disk.rglob("new*"))
    bad = old.repeat(7, 1)
    bad[17_000, 3] = torch.nan
    np.save(tmp_path / "bad.npy", bad.numpy())
    with pytest.raises(NonFiniteError, match="The embedding of row 17000 is, or becomes, NaN"):
        open_vectors(tmp_path / "bad.npy").upgrade(fitted, tmp_path / "new.npy", progress=False)
    assert not list(tmp_path.glob("new*"))
    np.save(tmp_path / "there.npy", tall[:9])
    with pytest.raises(InputError, match="exists already"):
        open_vectors(tmp_path / "old.npy").upgrade(fitted, tmp_path / "there.npy", progress=False)
    assert np.array_equal(np.load(tmp_path / "there.npy"), tall[:9])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("nothing.npy", None, "does not exist"),
        ("junk.npy", b"junk", "NumPy"),
        ("junk.safetensors", b"junk" * 9, "safetensors"),
        ("junk.faiss", b"junk", "FAISS"),
    ],
)
def test_files_that_hold_no_embeddings(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    if name.endswith("faiss"):
        pytest.importorskip("faiss")
    with pytest.raises(InputError, match=message):
        open_vectors(tmp_path / name)
    (tmp_path / "folder").mkdir()
    with pytest.raises(CacheError):
        open_vectors(tmp_path / "folder")


def test_pickled_arrays_are_not_read(tmp_path):
    np.save(tmp_path / "a.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match="NumPy"):
        open_vectors(tmp_path / "a.npy")
