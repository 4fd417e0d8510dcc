"""A teacher by embeddings: its scores are what its model says, whatever kind of model it is."""

import numpy as np
import pytest
import torch
from conftest import make_bert_model, make_static_model, router_of
from datasets import concatenate_datasets
from sentence_transformers import SentenceTransformer

from st_corrector import (
    AverageTeacher,
    CacheError,
    Corpus,
    EmbeddingCache,
    EmbeddingTeacher,
    InputError,
)
from st_corrector.data.query_keys import query_keys


def prompted(folder):
    model = make_bert_model(folder)
    model.prompts = {"query": "query : ", "document": "passage : "}
    return model


def by_dot_product(folder):
    model = SentenceTransformer(modules=list(make_static_model(3).children())[:2], device="cpu")
    model.similarity_fn_name = "dot"
    return model


MODELS = {
    "static": lambda folder: make_static_model(3),
    "transformer with prompts": prompted,
    "two towers": lambda folder: router_of(make_static_model(3), make_static_model(4)),
    "dot product": by_dot_product,
    "wider than what is trained": lambda folder: make_static_model(3, dim=48),
}


@pytest.mark.parametrize("kind", MODELS)
def test_scores_are_what_the_model_says(corpus, tmp_path, kind):
    model = MODELS[kind](tmp_path)
    pairs = corpus.pairs("train")
    teacher = EmbeddingTeacher.build(model, corpus, tmp_path / "teacher", pairs, dtype="float32", progress=False)
    keys, rows = torch.tensor(pairs["label"][5:9])[:, 1], torch.tensor([7, 3, 199, 3])
    queries = model.encode_query(pairs["anchor"][5:9], convert_to_tensor=True)
    documents = model.encode_document(corpus.texts(rows.tolist()), convert_to_tensor=True)
    expected = model.similarity(queries, documents)
    torch.testing.assert_close(teacher.scores(keys, rows), expected, atol=1e-5, rtol=1e-5)
    assert expected.std() > 0.01 and teacher.knows(keys).all() and teacher.corpus_size == 200
    # Of half the size on disk, to rounding.
    halves = EmbeddingTeacher.build(model, corpus, tmp_path / "halves", pairs, progress=False)
    torch.testing.assert_close(halves.scores(keys, rows), expected, atol=2e-2, rtol=2e-2)
    assert halves.targets.dtype == torch.float16


def test_of_a_query_that_it_does_not_know_it_says_nothing(corpus, tmp_path):
    some = corpus.pairs("train").select(range(50))
    teacher = EmbeddingTeacher.build(make_static_model(3), corpus, tmp_path / "teacher", some, progress=False)
    keys = torch.tensor(corpus.pairs("train")["label"][48:52])[:, 1]
    assert teacher.knows(keys).tolist() == [True, True, False, False]
    scores = teacher.scores(keys, torch.arange(5))
    assert torch.isfinite(scores[:2]).all() and torch.isnan(scores[2:]).all()
    assert not teacher.knows(torch.tensor([-1])).any()


def test_what_was_built_is_loaded_and_other_queries_are_added(corpus, tmp_path, monkeypatch):
    model, pairs = make_static_model(3), corpus.pairs("train")
    first = EmbeddingTeacher.build(model, corpus, tmp_path / "teacher", pairs.select(range(50)), progress=False)
    encoded = []
    call = type(model).forward
    monkeypatch.setattr(
        type(model),
        "forward",
        lambda self, inputs, **kw: encoded.append(len(inputs["offsets"])) or call(self, inputs, **kw),
    )
    again = EmbeddingTeacher.build(model, corpus, tmp_path / "teacher", pairs.select(range(50)), progress=False)
    assert sum(encoded) == 2, "one text each, to learn the width"
    assert torch.equal(again.targets[np.arange(200)], first.targets[np.arange(200)])
    encoded.clear()
    more = EmbeddingTeacher.build(model, corpus, tmp_path / "teacher", pairs, progress=False)
    assert sum(encoded) == 2 + 200 and len(more.queries) == 200, "the questions alone"
    with pytest.raises(CacheError, match="weights"):
        EmbeddingTeacher.build(make_static_model(4), corpus, tmp_path / "teacher", pairs, progress=False)


def test_vectors_that_exist_are_a_teacher(corpus, tmp_path):
    generator = torch.Generator().manual_seed(0)
    targets, queries = torch.randn(200, 6, generator=generator), torch.randn(3, 6, generator=generator)
    np.save(tmp_path / "targets.npy", targets.numpy())
    keys = query_keys(["one", "two", "three"])
    teacher = EmbeddingTeacher(np.load(tmp_path / "targets.npy", mmap_mode="r"), queries, keys, "dot")
    asked = torch.from_numpy(keys[[2, 0]])
    torch.testing.assert_close(teacher.scores(asked, torch.tensor([5, 9])), queries[[2, 0]] @ targets[[5, 9]].T)
    # The best of all, but for those that do not count.
    expected = queries[[2, 0]] @ targets.T
    expected[0, 7] = expected[1, 3] = -torch.inf
    best = teacher.best_rows(asked, torch.tensor([[7], [3]]), 10)
    assert torch.equal(best, expected.topk(10).indices)
    cached = EmbeddingTeacher(EmbeddingCache.from_tensor(targets), queries, keys)
    unit = torch.nn.functional.normalize
    torch.testing.assert_close(
        cached.scores(asked, torch.tensor([5, 9])), unit(queries[[2, 0]], dim=-1) @ unit(targets[[5, 9]], dim=-1).T
    )


def test_the_average_of_teachers_is_that_of_their_scores():
    generator = torch.Generator().manual_seed(0)
    keys = query_keys(["one", "two"])
    one, other = (
        EmbeddingTeacher(torch.randn(9, 4, generator=generator), torch.randn(2, 4, generator=generator), keys)
        for _ in range(2)
    )
    asked, rows = torch.from_numpy(keys), torch.arange(9)
    average = AverageTeacher(one, other, weights=(3.0, 1.0))
    expected = 0.75 * one.scores(asked, rows) + 0.25 * other.scores(asked, rows)
    torch.testing.assert_close(average.scores(asked, rows), expected)
    assert average.knows(asked).all() and average.corpus_size == 9
    with pytest.raises(InputError, match="a weight for each"):
        AverageTeacher(one, other, weights=(1.0,))
    with pytest.raises(InputError, match="at least one teacher"):
        AverageTeacher()


def test_what_does_not_fit_is_refused(corpus, tmp_path):
    vectors, keys = torch.randn(4, 3), query_keys(["a", "b", "c", "d"])
    with pytest.raises(InputError, match="each query needs its key"):
        EmbeddingTeacher(vectors, vectors, keys[:2])
    with pytest.raises(InputError, match="of one embedder"):
        EmbeddingTeacher(vectors, torch.randn(4, 2), keys)
    with pytest.raises(InputError, match="must be 'cosine' or 'dot', got 'euclidean'"):
        EmbeddingTeacher(vectors, vectors, keys, "euclidean")
    rows_alone = corpus.pairs("train").remove_columns("label").add_column("label", list(range(200)))
    with pytest.raises(InputError, match=r"must be \[corpus row, key of the query\]"):
        EmbeddingTeacher.build(make_static_model(), corpus, tmp_path / "teacher", rows_alone)


def test_labels_of_data_of_ones_own_are_those_of_the_corpus(corpus, tmp_path):
    pairs = corpus.pairs("train")
    own = pairs.remove_columns("label").rename_columns({"anchor": "question", "positive": "answer"})
    own = own.add_column("label", corpus.labels([str(n) for n in range(200)], own["question"]))
    assert own["label"][:] == pairs["label"][:]
    teacher = EmbeddingTeacher.build(make_static_model(3), corpus, tmp_path / "teacher", own, progress=False)
    assert teacher.knows(torch.tensor(pairs["label"])[:, 1]).all()


def test_one_answer_to_many_questions_is_scored_for_each(tmp_path):
    """As in a help desk's data, where hundreds of questions share an answer."""
    corpus = Corpus.from_texts(["word1 word3", "word5 word7", "word9"])
    queries = {f"q{n}": f"word{n} word{n + 1}" for n in range(20)}
    corpus.add_split("train", queries, {id: ["1"] for id in queries})
    pairs = corpus.pairs("train")
    model = make_static_model(3)
    teacher = EmbeddingTeacher.build(model, corpus, tmp_path / "teacher", pairs, dtype="float32", progress=False)
    labels = torch.tensor(pairs["label"])
    assert labels[:, 0].unique().tolist() == [1] and len(labels[:, 1].unique()) == 20
    expected = model.similarity(model.encode_query(pairs["anchor"][:]), model.encode_document(corpus.texts(range(3))))
    torch.testing.assert_close(teacher.scores(labels[:, 1], torch.arange(3)), expected, atol=1e-5, rtol=1e-5)
    both = concatenate_datasets([pairs, pairs])
    again = EmbeddingTeacher.build(model, corpus, tmp_path / "teacher", both, dtype="float32", progress=False)
    assert len(again.queries) == 20, "each question is embedded once"


def test_questions_that_differ_in_case_alone_have_one_key_and_vectors_of_their_own(corpus, tmp_path):
    texts = corpus.texts(range(60))
    titled = Corpus.from_texts(texts, titles=[f"word{n} of it" for n in range(60)])
    titled.add_split("train", {"0": "word1 word2"}, {"0": ["0"]})
    model = prompted(tmp_path)
    for question in ("title", lambda target: target["title"].upper(), "title"):
        pairs = titled.own_pairs(20, question)
        teacher = EmbeddingTeacher.build(model, titled, tmp_path / "teacher", [pairs], dtype="float32", progress=False)
        keys = torch.tensor(pairs["label"][:])[:, 1]
        expected = model.similarity(model.encode_query(pairs["anchor"][:]), model.encode_document(titled.texts([1, 2])))
        torch.testing.assert_close(teacher.scores(keys, torch.tensor([1, 2])), expected, atol=1e-5, rtol=1e-5)


def test_own_questions_are_embedded_apart_and_data_sets_need_not_be_alike(corpus, tmp_path, monkeypatch):
    queries, texts = corpus.pairs("train")["anchor"], corpus.texts(range(200))
    titled = Corpus.from_texts(texts, titles=[f"word{n} word{n + 1}" for n in range(200)])
    titled.add_split("train", {str(n): queries[n] for n in range(50)}, {str(n): [str(n)] for n in range(50)})
    model, pairs = make_static_model(3), titled.pairs("train")
    EmbeddingTeacher.build(model, titled, tmp_path / "teacher", [pairs, titled.own_pairs(30)], progress=False)
    others = titled.own_pairs(40, seed=1).add_column("more", ["text"] * 40)
    encoded = []
    call = type(model).forward
    monkeypatch.setattr(
        type(model),
        "forward",
        lambda self, inputs, **kw: encoded.append(len(inputs["offsets"])) or call(self, inputs, **kw),
    )
    teacher = EmbeddingTeacher.build(model, titled, tmp_path / "teacher", [others, pairs], progress=False)
    assert sum(encoded) == 3 + 40, "the new own questions alone, and one text each to learn the width"
    keys = torch.tensor([*pairs["label"][:], *others["label"][:]])[:, 1]
    assert len(teacher.queries) == 90 and teacher.knows(keys).all()
    asked = [*pairs["anchor"][:], *others["anchor"][:]]
    expected = model.similarity(model.encode_query(asked), model.encode_document(titled.texts(range(9))))
    torch.testing.assert_close(teacher.scores(keys, torch.arange(9)), expected, atol=2e-2, rtol=2e-2)
