import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_bert_model, make_static_model
from sentence_transformers import SentenceTransformer

from st_corrector import CacheError, Corpus, EmbeddingCache, InputError, NonFiniteError
from st_corrector.data.encoding import DocumentEncoder


def test_the_cache_is_what_the_model_says(bert_model, corpus, tmp_path):
    cache = EmbeddingCache.build(bert_model, corpus, tmp_path / "cache", batch_size=7, shard_size=64, progress=False)
    expected = bert_model.encode_document(corpus.texts(range(200)), convert_to_tensor=True)
    assert (len(cache), cache.dim, cache.dtype) == (200, 32, torch.float32)
    torch.testing.assert_close(cache[range(200)], expected, atol=1e-6, rtol=1e-5)
    assert torch.equal(cache[[150, 3, 3]], cache[range(200)][[150, 3, 3]])
    assert not torch.allclose(cache[[0]], cache[[1]]), "different texts have different embeddings"


def test_building_leaves_the_model_in_its_modes(bert_model, corpus, tmp_path):
    bert_model.train()
    bert_model[1].eval()
    EmbeddingCache.build(bert_model, corpus, tmp_path / "cache", progress=False)
    assert bert_model.training and bert_model[0].training and not bert_model[1].training


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_stored_and_read_as_float32(static_model, corpus, tmp_path, dtype):
    exact = EmbeddingCache.build(static_model, corpus, tmp_path / "exact", progress=False)
    cache = EmbeddingCache.build(static_model, corpus, tmp_path / "half", dtype=dtype, progress=False)
    assert cache.dtype == getattr(torch, dtype) and cache[[0]].dtype == torch.float32
    assert torch.equal(cache[range(200)], exact[range(200)].to(cache.dtype).float())


def test_int8_takes_a_quarter_and_stays_within_half_a_step(static_model, corpus, tmp_path):
    exact = EmbeddingCache.build(static_model, corpus, tmp_path / "exact", progress=False)
    cache = EmbeddingCache.build(static_model, corpus, tmp_path / "int8", dtype="int8", progress=False)
    rows = exact[range(200)]
    assert cache.dtype == torch.int8 and cache.nbytes == 200 * (cache.dim + 4) and cache[[0]].dtype == torch.float32
    step = rows.abs().amax(1, keepdim=True) / 127
    assert ((cache[range(200)] - rows).abs() <= 0.501 * step).all()
    assert ((cache[range(200)] - rows).abs() > 0.3 * step).any()
    for _, chunk in cache.chunks(64):
        assert (chunk.values.abs().amax(1) == 127).all(), "each row uses the whole range"
    zeros = EmbeddingCache.from_blocks([torch.zeros(3, 4)], torch.int8)
    assert torch.equal(zeros[[0, 1, 2]], torch.zeros(3, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_a_saved_cache_is_the_cache(tmp_path, dtype):
    vectors = torch.randn(40_000, 8)
    cache = EmbeddingCache.from_blocks(vectors.split(700), dtype)
    saved = cache.save(tmp_path / "cache")
    again = EmbeddingCache.load(tmp_path / "cache")
    assert (again.dtype, len(again), again.dim) == (dtype, 40_000, 8) and again.nbytes == cache.nbytes
    for each in (saved, again):
        assert torch.equal(each[range(40_000)], cache[range(40_000)])
    with pytest.raises(CacheError, match="is not empty"):
        cache.save(tmp_path / "cache")


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_blocks_of_known_rows_become_one_piece(dtype):
    vectors = torch.randn(3_000, 8)
    many = EmbeddingCache.from_blocks(vectors.split(700), dtype, first_row=5, corpus_size=4_000)
    cache = EmbeddingCache.from_blocks(vectors.split(700), dtype, first_row=5, corpus_size=4_000, rows=3_000)
    assert [len(list(each.chunks(3_000))) for each in (many, cache)] == [5, 1]
    assert (cache.first_row, cache.end, cache.corpus_size, cache.nbytes) == (5, 3_005, 4_000, many.nbytes)
    assert torch.equal(cache[range(5, 3_005)], many[range(5, 3_005)])
    for rows, found in ((2_900, "more"), (3_100, "3,000"), (10, "more")):
        with pytest.raises(CacheError, match=f"Expected embeddings of {rows:,} rows, got {found}"):
            EmbeddingCache.from_blocks(vectors.split(700), dtype, rows=rows)
    vectors[1_234, 3] = float("nan")
    with pytest.raises(NonFiniteError, match="row 1239 "):
        EmbeddingCache.from_blocks(vectors.split(700), dtype, first_row=5, corpus_size=4_000, rows=3_000)


def test_a_cache_changes_its_dtype_in_memory(static_model, corpus, tmp_path, monkeypatch):
    exact = EmbeddingCache.build(static_model, corpus, tmp_path / "exact", shard_size=64, progress=False)
    for dtype in (torch.float32, torch.float16, torch.int8):
        cache = exact.to("cpu", dtype)
        assert cache.dtype == dtype and cache.fingerprint == exact.fingerprint
        torch.testing.assert_close(cache[range(200)], exact[range(200)], atol=0.01, rtol=0.01)
    assert torch.equal(exact.to("cpu")[range(200)], exact[range(200)])
    with pytest.raises(NonFiniteError, match=r"row 1 is NaN or infinite in torch\.float16"):
        EmbeddingCache.from_tensor(torch.tensor([[1.0], [1e6]])).to(dtype=torch.float16)
    monkeypatch.setattr("st_corrector.runtime.memory.available_memory", lambda device: 1_000)
    with pytest.raises(InputError, match=r"(?s)does not fit.*embedding cache, 200 × .* in torch.int8.*MB") as error:
        exact.to("cpu", torch.int8)
    assert "dtype=torch.int8" in str(error.value), "what could be done"


def test_chunks_cover_every_row_once(static_model, corpus, tmp_path):
    cache = EmbeddingCache.build(static_model, corpus, tmp_path / "cache", shard_size=64, progress=False)
    starts, chunks = zip(*cache.chunks(50), strict=True)
    assert starts == (0, 50, 64, 114, 128, 178, 192)
    assert torch.equal(torch.cat([chunk.float() for chunk in chunks]), cache[range(200)])
    starts, chunks = zip(*cache.chunks(50, 60, 130), strict=True)
    assert starts == (60, 64, 114, 128) and torch.equal(chunks[-1].float(), cache[[128, 129]])


def test_the_cache_is_memory_mapped(tmp_path):
    model, corpus = make_static_model(dim=256), Corpus.from_texts(f"word{n % 400} word{n % 7}" for n in range(40_000))
    EmbeddingCache.build(model, corpus, tmp_path / "cache", batch_size=1024, progress=False)

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident()
    cache = EmbeddingCache.load(tmp_path / "cache")
    loaded = resident() - before
    for _, chunk in cache.chunks(10_000):
        chunk.values.sum()
    read = resident() - before
    size = 40_000 * 256 * 4
    assert loaded < size / 4 and read > size / 2, "loading reads nothing; reading does"


def test_a_finished_cache_is_not_built_again(static_model, corpus, tmp_path, monkeypatch):
    first = EmbeddingCache.build(static_model, corpus, tmp_path / "cache", progress=False)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    again = EmbeddingCache.build(static_model, corpus, tmp_path / "cache", progress=False)
    assert torch.equal(again[range(200)], first[range(200)])
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}


def test_a_cache_of_something_else_is_refused_by_name(static_model, bert_model, corpus, tmp_path):
    folder = tmp_path / "cache"
    EmbeddingCache.build(static_model, corpus, folder, progress=False)
    files = {path: path.read_bytes() for path in folder.iterdir()}

    def refused(pattern, model=static_model, corpus=corpus, **settings):
        with pytest.raises(CacheError, match=pattern):
            EmbeddingCache.build(model, corpus, folder, progress=False, **settings)

    refused(r"dtype: 'float32' there, 'float16' here", dtype="float16")
    refused(r"weights: ", model=make_static_model(seed=1))
    refused(r"modules, 0 StaticEmbedding: there, and not here\n  modules, 0 Transf", model=bert_model)
    refused(r"rows: 200 there, 1 here", corpus=Corpus.from_texts(["word1"]))
    refused(r"corpus: ", corpus=Corpus.from_texts([*corpus.texts(range(199)), "word1"]))
    refused(
        r"prompt: '' there, 'passage : ' here", corpus=Corpus.from_texts(corpus.texts(range(200)), prompt="passage : ")
    )
    assert files == {path: path.read_bytes() for path in folder.iterdir()}, "a refused build touches nothing"


def test_the_models_own_document_prompt_is_used(corpus, tmp_path):
    model = make_static_model()
    model.prompts = {"document": "passage : "}
    cache = EmbeddingCache.build(model, corpus, tmp_path / "cache", progress=False)
    torch.testing.assert_close(cache[range(5)], model.encode_document(corpus.texts(range(5)), convert_to_tensor=True))
    assert not torch.allclose(cache[range(5)], model.encode(corpus.texts(range(5)), convert_to_tensor=True))


def test_damaged_and_foreign_folders_are_refused(static_model, corpus, tmp_path):
    with pytest.raises(CacheError, match="holds no embedding cache"):
        EmbeddingCache.load(tmp_path / "nothing")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"cat")
    with pytest.raises(CacheError, match="not empty and holds no embedding cache"):
        EmbeddingCache.build(static_model, corpus, tmp_path / "photos", progress=False)
    EmbeddingCache.build(static_model, corpus, tmp_path / "cache", shard_size=64, progress=False)
    shard = tmp_path / "cache" / "embeddings-000001.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CacheError, match=r"embeddings-000001\.safetensors is damaged"):
        EmbeddingCache.load(tmp_path / "cache")
    (tmp_path / "cache" / "manifest.json").write_text("{}")
    with pytest.raises(CacheError, match="does not describe a cache of schema 2"):
        EmbeddingCache.load(tmp_path / "cache")


def test_embeddings_that_are_not_finite_are_refused_with_their_rows(static_model, corpus, tmp_path):
    token = static_model.tokenizer.encode(corpus.texts([42])[0], add_special_tokens=False).ids[0]
    with torch.no_grad():
        static_model[0].embedding.weight[token] = torch.nan
    with pytest.raises(NonFiniteError, match=r"NaN or infinite, e\.g\. rows \["):
        EmbeddingCache.build(static_model, corpus, tmp_path / "cache", progress=False)


def test_from_tensor_wraps_and_checks():
    vectors = torch.randn(5, 3)
    cache = EmbeddingCache.from_tensor(vectors)
    assert torch.equal(cache[[4, 0]], vectors[[4, 0]]) and cache.fingerprint == {}
    assert len(EmbeddingCache.from_tensor(np.zeros((2, 3), dtype=np.float32))) == 2
    for wrong in (torch.randn(5), torch.ones(2, 2, dtype=torch.int64), torch.empty(0, 3)):
        with pytest.raises(CacheError, match="Expected floating-point embeddings of shape"):
            EmbeddingCache.from_tensor(wrong)
    with pytest.raises(IndexError, match=r"0 … 4, got -1 … 2"):
        cache[[2, -1]]

    vectors[3, 1] = torch.inf
    with pytest.raises(NonFiniteError, match="The embedding of row 3 is NaN or infinite"):
        EmbeddingCache.from_tensor(vectors)


def test_what_overflows_the_stored_dtype_is_refused(corpus, tmp_path):
    model = SentenceTransformer(modules=list(make_static_model())[:-1], device="cpu")
    with torch.no_grad():
        model[0].embedding.weight *= 1e5
    with pytest.raises(NonFiniteError, match=r"NaN or infinite, e\.g\. rows \[0, 1, 2\] .* in float16"):
        EmbeddingCache.build(model, corpus, tmp_path / "half", dtype="float16", progress=False)
    assert len(EmbeddingCache.build(model, corpus, tmp_path / "whole", dtype="bfloat16", progress=False)) == 200


def test_each_component_of_the_fingerprint_is_told_apart(corpus, tmp_path):
    """All else equal: only the named component differs, and it alone is reported."""

    def components(change):
        model = make_bert_model(tmp_path)
        before = DocumentEncoder(model, corpus, progress=False).fingerprint(model)
        change(model)
        after = DocumentEncoder(model, corpus, progress=False).fingerprint(model)
        return {name for name in before if before[name] != after[name]}

    def add_token(model):
        model.tokenizer.add_tokens(["extra"])

    def nudge(model):
        with torch.no_grad():
            next(model.parameters()).view(-1)[0] += 1e-3

    assert components(lambda model: None) == set()
    assert components(lambda model: model.preprocess(["word1"] * 3)) == set(), "use alone changes nothing"
    assert components(nudge) == {"weights"}
    assert components(add_token) == {"tokenizer"}
    assert components(lambda model: setattr(model[1], "pooling_mode", "cls")) == {"modules"}
    assert components(lambda model: setattr(model, "max_seq_length", 9)) >= {"max_seq_length"}
    assert components(lambda model: model.prompts.update(document="passage : ")) >= {"prompt"}
