"""Embeddings that people bring in other forms than ours are converted, or refused in words, wherever they come in."""

import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.arrays import CONVERTED, KEPT, REFUSED

from st_corrector import AffineMap, CacheError, EmbeddingCache, InputError, NonFiniteError, upgrade_embeddings
from st_corrector.cache.arrays import as_tensor
from st_corrector.carry_over.fitting import fit_to_pairs
from st_corrector.correctors import Corrector
from st_corrector.stores.opening import open_vectors

ROWS, DIM = 60, 8
FORMS = {**KEPT, **CONVERTED}


@pytest.fixture
def vectors() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((ROWS, DIM)).astype(np.float32)


def turned() -> Corrector:
    """Exchanges the coordinates, exactly."""
    turn = AffineMap(DIM, new_dim=DIM, normalize=False)
    turn.weight = torch.eye(DIM).roll(3, dims=1)
    return turn


@pytest.mark.parametrize("form", FORMS)
def test_a_cache_holds_the_numbers_whatever_their_form(vectors, tmp_path, form):
    given = FORMS[form](vectors)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache = EmbeddingCache.from_tensor(given)
    assert cache.dtype == torch.float32 and np.array_equal(cache[range(ROWS)], vectors)
    saved = cache.save(tmp_path / "cache")
    assert saved.dtype == cache.dtype and np.array_equal(saved[range(ROWS)], vectors)


@pytest.mark.parametrize("form", KEPT)
def test_what_can_be_kept_is_not_copied(vectors, form):
    given = KEPT[form](vectors)
    (_, chunk), *_ = EmbeddingCache.from_tensor(given).chunks(ROWS)
    mine = given.data_ptr() if isinstance(given, torch.Tensor) else given.__array_interface__["data"][0]
    assert chunk.values.data_ptr() == mine


@pytest.mark.parametrize("dtype", ["<f2", ">f2", "float16", "bfloat16"])
def test_half_precision_stays_half(vectors, tmp_path, dtype):
    given = torch.tensor(vectors).to(getattr(torch, dtype)) if "float" in dtype else vectors.astype(dtype)
    cache = EmbeddingCache.from_tensor(given)
    assert cache.dtype == (torch.bfloat16 if dtype == "bfloat16" else torch.float16)
    expected = given.float() if isinstance(given, torch.Tensor) else torch.tensor(given.astype(np.float32))
    assert torch.equal(cache.save(tmp_path / "cache")[range(ROWS)], expected)


def test_memory_mapped_files_are_kept_where_they_are(vectors, tmp_path):
    for order in ("C", "F"):
        np.save(tmp_path / "vectors.npy", np.asarray(vectors, order=order))
        mapped = np.load(tmp_path / "vectors.npy", mmap_mode="r")
        cache = EmbeddingCache.from_tensor(mapped)
        (_, chunk), *_ = cache.chunks(ROWS)
        assert chunk.values.data_ptr() == mapped.__array_interface__["data"][0]
        assert np.array_equal(cache.save(tmp_path / order)[range(ROWS)], vectors)


@pytest.mark.parametrize("form", REFUSED)
def test_what_are_no_embeddings_is_refused_in_words(vectors, form):
    given = REFUSED[form](vectors)
    message = "Expected floating-point embeddings of shape|Expected vectors of equal dimension|are masked"
    with pytest.raises(CacheError, match=message):
        EmbeddingCache.from_tensor(given)
    for call in (upgrade_embeddings, lambda given, _: fit_to_pairs(given, torch.randn(ROWS, DIM))):
        with pytest.raises(InputError, match=message):
            call(given, turned())


@pytest.mark.parametrize("shape", [(0, DIM), (ROWS, 0)])
def test_a_cache_of_nothing_is_refused(shape):
    with pytest.raises(CacheError, match="got none"):
        EmbeddingCache.from_tensor(np.empty(shape, dtype=np.float32))
    assert upgrade_embeddings(np.empty((0, DIM)), turned()).shape == (0, DIM)


def test_what_is_infinite_in_float32_is_refused(vectors):
    wide = vectors.astype(np.float64)
    wide[7, 3] = 1e300
    for given in (wide, torch.tensor(wide)):
        with pytest.raises(NonFiniteError, match="row 7"):
            EmbeddingCache.from_tensor(given)
        with pytest.raises(NonFiniteError, match="row 7"):
            upgrade_embeddings(given, turned())


@pytest.mark.parametrize("form", FORMS)
def test_carrying_over_takes_the_same_forms(vectors, form):
    given = FORMS[form](vectors)
    expected = np.roll(vectors, 3, axis=1)
    assert sorted(map(tuple, upgrade_embeddings(given, turned()).T.tolist())) == sorted(map(tuple, expected.T.tolist()))
    by_form, by_tensor = fit_to_pairs(given, expected), fit_to_pairs(torch.tensor(vectors), torch.tensor(expected))
    assert torch.equal(by_form.weight, by_tensor.weight)


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", ">f8", "<f2", ">f2", np.longdouble])
@pytest.mark.parametrize("order", ["C", "F"])
def test_numpy_files_keep_their_dtype_and_byte_order(vectors, tmp_path, dtype, order):
    given = np.asarray(vectors.astype(dtype), order=order)
    np.save(tmp_path / "old.npy", given)
    opened = open_vectors(tmp_path / "old.npy")
    assert np.array_equal(opened.take(np.arange(ROWS)), given.astype(np.float32))
    opened.upgrade(turned(), tmp_path / "new.npy", progress=False)
    found = np.load(tmp_path / "new.npy")
    assert found.dtype == np.dtype(dtype)
    assert np.array_equal(found.astype(np.float32), upgrade_embeddings(given, turned()).numpy())


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_safetensors_files_keep_their_dtype(vectors, tmp_path, dtype):
    given = torch.tensor(vectors).to(getattr(torch, dtype))
    save_file({"embeddings": given}, tmp_path / "old.safetensors")
    opened = open_vectors(tmp_path / "old.safetensors")
    assert torch.equal(opened.take(np.arange(ROWS)), given.float())
    some = np.array([5, 2, 50])
    assert torch.equal(opened.take(some), given.float()[some])
    opened.upgrade(turned(), tmp_path / "new.safetensors", progress=False)
    found = load_file(tmp_path / "new.safetensors")["embeddings"]
    assert found.dtype == given.dtype and torch.equal(found.float(), upgrade_embeddings(given.float(), turned()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.int16, torch.float8_e4m3fn])
def test_caches_are_stored_in_what_can_be_saved(vectors, dtype):
    with pytest.raises(CacheError, match="stored in float32, bfloat16, float16, int8, not in"):
        EmbeddingCache.from_tensor(vectors).to(dtype=dtype)
    with pytest.raises(CacheError, match="stored in"):
        EmbeddingCache.from_blocks([torch.tensor(vectors)], dtype)


def test_strided_vectors_are_searched_as_they_are(vectors):
    given = as_tensor(np.asfortranarray(vectors), CacheError)
    assert given.stride() == (1, ROWS) and np.array_equal(given, vectors)


def test_rows_are_numbers_or_a_mask(vectors):
    cache, chosen = EmbeddingCache.from_tensor(vectors), np.arange(ROWS) % 3 == 1
    for mask in (chosen, torch.from_numpy(chosen), chosen.tolist()):
        assert np.array_equal(cache[mask], vectors[chosen])
    assert np.array_equal(cache[np.array([2, 1], dtype=np.uint8)], vectors[[2, 1]]) and len(cache[[]]) == 0
    with pytest.raises(InputError, match=rf"A mask must say of each of {ROWS:,} rows"):
        cache[chosen[:-1]]
    with pytest.raises(InputError, match="Rows must be integers, or a mask of booleans, got float64"):
        cache[np.array([1.9])]


def test_a_data_frames_column_is_one_of_vectors(vectors):
    pandas = pytest.importorskip("pandas")
    assert np.array_equal(EmbeddingCache.from_tensor(pandas.Series(list(vectors)))[range(ROWS)], vectors)
