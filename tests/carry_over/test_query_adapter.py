"""Queries of a new model search the old model's index, through modules that anybody can load."""

import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_bert_model, make_static_model
from sentence_transformers import SentenceTransformer
from support.encoders import moved

from st_corrector import AffineMap, IdentityCorrector, IndexMap, InputError, MLPCorrector, QueryAdapter, RidgeCorrector
from st_corrector.correctors import Frames
from st_corrector.search.fidelity import overlap_at_k


def unit(*size: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(*size, generator=torch.Generator().manual_seed(seed)), dim=-1)


def turned(kind: type, width: int = 24, normalize: bool = False):
    """An affine corrector that changes a lot."""
    generator = torch.Generator().manual_seed(1)
    made = kind(24, normalize=normalize, **({"new_dim": width} if kind is AffineMap else {}))
    made.weight = torch.randn(24, width, generator=generator) / 5
    made.shift = torch.randn(width, generator=generator) / 5
    return made


@pytest.mark.parametrize("kind", [RidgeCorrector, AffineMap])
def test_an_affine_corrector_without_normalisation_has_an_exact_adapter(kind):
    """So it needs no data; an affine map between widths has one too."""
    width = 24 if kind is RidgeCorrector else 16
    corrector, old, queries = turned(kind, width), unit(900, 24), unit(50, width, seed=7) * 3
    adapter = QueryAdapter.from_corrector(corrector)
    expected, found = queries @ corrector(old).T, adapter(queries) @ old.T
    assert adapter(queries).shape == (50, 24) and not adapter.unit
    torch.testing.assert_close(found, expected - (queries @ corrector.shift)[:, None], atol=1e-4, rtol=1e-4)
    assert overlap_at_k(found.topk(100).indices, expected.topk(100).indices).mean() > 0.999  # but for rounding


def test_a_corrector_that_changes_nothing_needs_an_adapter_that_changes_nothing():
    adapter, queries = QueryAdapter.from_corrector(IdentityCorrector(24)), unit(9, 24)
    torch.testing.assert_close(adapter(queries), queries)


def mlp() -> MLPCorrector:
    """A network that has learnt a change, by which embeddings are compared by cosine."""
    made, old = MLPCorrector(24, hidden=32, learning_rate=1e-2, loss="mse"), unit(4_000, 24)
    change = torch.randn(24, 24, generator=torch.Generator().manual_seed(2)) / 4
    new = F.normalize(old + (old @ change).tanh() + 0.3, dim=-1)
    for rows in torch.arange(4_000).split(200) * 3:
        made.learn(old[rows], new[rows], new[rows[:9]], 20.0)
    return made


@pytest.mark.parametrize("kind", [MLPCorrector, RidgeCorrector, AffineMap])
def test_others_are_fitted_and_search_nearly_as_the_upgraded_index_does(kind):
    corrector = mlp() if kind is MLPCorrector else turned(kind, 16 if kind is AffineMap else 24, normalize=True)
    old = unit(3_000, 24, seed=3)
    carried = corrector(old)
    queries = unit(1_200, carried.shape[1], seed=4) + 0.3 * carried[:1_200]
    teaching, asked = queries[:1_000], queries[1_000:]
    with pytest.raises(InputError, match="pass queries and stale"):
        QueryAdapter.from_corrector(corrector)
    adapter = QueryAdapter.from_corrector(corrector, teaching, old[:2_000])
    reference = (asked @ carried.T).topk(10).indices
    found = overlap_at_k((adapter(asked) @ old.T).topk(10).indices, reference).mean()
    weight = F.normalize(torch.linalg.lstsq(old, carried).solution.T, dim=-1)
    by_least_squares = overlap_at_k((asked @ weight @ old.T).topk(10).indices, reference).mean()
    assert found > max(0.6, by_least_squares), (float(found), float(by_least_squares))
    torch.testing.assert_close(adapter(asked).norm(dim=-1), torch.ones(200))
    again = QueryAdapter.from_corrector(corrector, teaching.numpy(), old[:2_000].numpy())
    assert torch.equal(again.weight, adapter.weight), "the same data gives the same adapter"


@pytest.mark.parametrize(
    ("queries", "stale", "message"),
    [
        (unit(49, 24), unit(60, 24), "49 queries and 60 served embeddings are not enough"),
        (unit(60, 24), unit(49, 24), "not enough"),
        (unit(60, 16), unit(60, 24), "maps from 24 to 24 dimensions; got served embeddings of 24 and queries of 16"),
        (unit(60, 24).int(), unit(60, 24), "floating-point"),
    ],
)
def test_what_an_adapter_cannot_be_fitted_on_is_refused(queries, stale, message):
    with pytest.raises(InputError, match=message):
        QueryAdapter.from_corrector(turned(RidgeCorrector, normalize=True), queries, stale)


def long_vectors() -> SentenceTransformer:
    """It compares by cosine, and has no Normalize: its vectors have lengths."""
    return SentenceTransformer(modules=list(moved().children())[:-1], device="cpu")


@pytest.mark.parametrize("make", [pytest.param(lambda folder: long_vectors(), id="static"), make_bert_model])
def test_a_model_with_an_adapter_is_loaded_without_this_package(make, tmp_path):
    model, texts = make(tmp_path / "start"), ["word1 word2", "word3 word4 word5"]
    model.prompts = {"query": "word9 ", "document": ""}
    width = model.get_embedding_dimension()
    weight = torch.randn(width, 12, generator=torch.Generator().manual_seed(0))
    adapter = QueryAdapter(weight, torch.linspace(-1, 1, 12))
    adapted = adapter.append_to(model)
    # As a certificate asks, which brings queries to unit length where they are compared by cosine.
    expected = adapter(F.normalize(model.encode_query(texts, convert_to_tensor=True), dim=-1))
    torch.testing.assert_close(adapted.encode_query(texts, convert_to_tensor=True), expected)
    for name in ("encode", "encode_document"):
        assert np.array_equal(getattr(adapted, name)(texts), getattr(model, name)(texts)), name
    adapted.save_pretrained(str(tmp_path / "model"))
    script = (
        "import sys, numpy as np\n"
        "from sentence_transformers import SentenceTransformer\n"
        f"model = SentenceTransformer({str(tmp_path / 'model')!r}, device='cpu')\n"
        f"np.save({str(tmp_path / 'found.npy')!r}, model.encode_query({texts!r}))\n"
        "assert not [name for name in sys.modules if name.startswith('st_corrector')]\n"
    )
    if make is not make_bert_model:  # a process takes seconds
        found = SentenceTransformer(str(tmp_path / "model"), device="cpu").encode_query(texts)
        torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-5, rtol=1e-4)
        return
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)
    torch.testing.assert_close(torch.from_numpy(np.load(tmp_path / "found.npy")), expected, atol=1e-5, rtol=1e-4)


def test_a_model_that_an_adapter_does_not_fit_is_refused():
    adapter = QueryAdapter(torch.eye(16), torch.zeros(16))
    with pytest.raises(InputError, match="maps queries of 16 dimensions, the model's have 24"):
        adapter.append_to(moved())
    model = SentenceTransformer(modules=list(make_static_model().children()), truncate_dim=16, device="cpu")
    with pytest.raises(InputError, match="cuts its embeddings to 16"):
        adapter.append_to(model)


def test_maps_in_turn_must_fit_one_another():
    with pytest.raises(InputError, match="maps from 24 dimensions"):
        IndexMap(turned(AffineMap, 16), RidgeCorrector(24))
    with pytest.raises(InputError, match="2 rows of 24 dimensions"):
        IndexMap(RidgeCorrector(24), rows=np.arange(2), fresh=torch.zeros(3, 24))
    fresh = unit(2, 24, seed=5)
    how, old = IndexMap(RidgeCorrector(24), rows=np.array([3, 7]), fresh=fresh), unit(9, 24)
    found = how(old, np.arange(9))
    assert torch.equal(found[[3, 7]], fresh) and torch.equal(found[:3], RidgeCorrector(24)(old[:3]))
    assert torch.equal(how(old[4:], np.arange(4, 9))[3], fresh[1]) and torch.equal(how(old), RidgeCorrector(24)(old))
    assert how.digest != IndexMap(RidgeCorrector(24)).digest
    assert IndexMap(RidgeCorrector(24)).digest != IndexMap(RidgeCorrector(24, normalize=False)).digest


def test_the_model_that_is_given_is_left_as_it_is(tmp_path):
    model = make_bert_model(tmp_path).bfloat16()
    model[0].auto_model.register_buffer("angles", torch.tensor([0.1], dtype=torch.float32))
    texts, modules = ["word1 word2"], len(model)
    before = model.encode_document(texts)
    width = model.get_embedding_dimension()
    adapted = QueryAdapter(torch.eye(width), torch.zeros(width)).append_to(model)
    assert model[0].auto_model.angles.dtype == torch.float32 and len(model) == modules
    assert np.array_equal(model.encode_document(texts), before)
    assert np.array_equal(adapted.encode_document(texts), before) and adapted.encode_query(texts).shape == (1, width)


def test_corrected_embeddings_that_are_compared_by_cosine_are_brought_to_unit_length():
    """A ridge without normalisation, as it is faster in training, of a model that compares by cosine."""
    corrector = turned(RidgeCorrector)
    corrector.frames = Frames({}, {}, True)
    how, old = IndexMap(corrector), unit(60, 24)
    torch.testing.assert_close(how(old).norm(dim=-1), torch.ones(60))
    with pytest.raises(InputError, match="pass queries and stale"):
        QueryAdapter.from_corrector(corrector)
