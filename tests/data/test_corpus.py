import os
import tracemalloc
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from conftest import make_bert_model, make_static_model, make_texts
from datasets import ClassLabel, Dataset, Features, IterableDataset, Value, concatenate_datasets, load_dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Router
from support.labels import label, rows_in
from support.layouts import FORMATS, QUERIES, TARGETS, columns_of, mined, shouted, write_beir, write_repository
from tokenizers import Tokenizer, normalizers

from st_corrector import Corpus, CorpusError, InputError
from st_corrector.data.qrels import Qrels
from st_corrector.data.tokens import TextCorpus, TokenizedCorpus
from st_corrector.storage.arrow import write_arrow


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("header", [False, True])
def test_beir_folder_is_read(tmp_path, compress, header):
    qrels = {"train": [("q1", "a", 1), ("q1", "d", 1), ("q2", "b", 1), ("q2", "a", 0)], "dev": [("q2", "d", 2)]}
    corpus = Corpus.from_beir(write_beir(tmp_path, TARGETS, QUERIES, qrels, header, compress))
    assert len(corpus) == 4 and sorted(corpus.splits) == ["dev", "train"]
    assert corpus.texts([3, 1, 0]) == ["Rome capital of Italy", "a river", "Paris capital of France"]
    assert corpus.ids([2, 0]) == ["c", "a"]
    assert corpus.rows_of(["d", "a", "d"]).tolist() == [3, 0, 3]
    train = corpus.qrels("train")
    assert train.queries["id"][:] == ["q1", "q2"] and train.queries["answers"][:] == [["Paris"], []]
    assert train.rows_of(0).tolist() == [0, 3]
    assert train.rows_of(1).tolist() == [1], "a judgement of score 0 is not a positive"
    assert corpus.qrels("dev").rows_of(0).tolist() == [3]


def test_pairs_have_one_row_for_each_judgement(tmp_path):
    corpus = Corpus.from_beir(
        write_beir(tmp_path, TARGETS, QUERIES, {"train": [("q1", "a", 1), ("q2", "b", 1), ("q1", "d", 1)]})
    )
    assert corpus.pairs("train").to_list() == [
        {"anchor": "which city", "positive": "Paris capital of France", "label": label(0, "which city")},
        {"anchor": "which city", "positive": "Rome capital of Italy", "label": label(3, "which city")},
        {"anchor": "what flows", "positive": "a river", "label": label(1, "what flows")},
    ]


def test_exact_duplicates_are_found_by_the_joined_text(tmp_path):
    corpus = Corpus.from_beir(write_beir(tmp_path, TARGETS, QUERIES, {"train": [("q1", "a", 1)]}))
    assert corpus.duplicates_of(0).tolist() == [0, 2] and corpus.duplicates_of(2).tolist() == [0, 2]
    assert corpus.duplicates_of(1).tolist() == [1]
    same = Corpus.from_texts(["x"] * 5)
    assert same.duplicates_of(3).tolist() == [0, 1, 2, 3, 4]


def test_positives_of_queries_that_share_one_are_all_known(tmp_path):
    qrels = {"train": [("q1", "a", 1), ("q1", "d", 1), ("q2", "a", 1), ("q2", "b", 1)]}
    corpus = Corpus.from_beir(write_beir(tmp_path, TARGETS, QUERIES, qrels))
    shared = corpus.qrels("train").co_positives([3, 0, 2], [-1, -1, -1])
    assert [rows.tolist() for rows in shared] == [[0, 3], [0, 1, 3], [2]]


def test_texts_are_on_disk_and_memory_mapped(corpus):
    assert corpus.targets.cache_files and corpus.pairs("train").cache_files
    assert corpus.targets.cache_files[0]["filename"].endswith(".arrow")


def test_from_dataset_takes_named_columns():
    dataset = Dataset.from_dict({"pid": [7, 5], "body": ["one", "two"], "head": ["A", None]})
    corpus = Corpus.from_dataset(dataset, text="body", id="pid", title="head")
    assert corpus.ids([0, 1]) == ["7", "5"] and corpus.texts([0, 1]) == ["A one", "two"]
    assert corpus.targets.cache_files, "written to disk although the dataset was in memory"
    assert Corpus.from_dataset(dataset.select([1]), text="body").texts([0]) == ["two"]
    with pytest.raises(CorpusError, match=r"no column 'text' for text; it has .*body"):
        Corpus.from_dataset(dataset)


def test_from_pairs_makes_distinct_positives_the_corpus():
    train = Dataset.from_dict({"q": ["one", "two", "one"], "a": ["x", "y", "z"]})
    dev = Dataset.from_dict({"q": ["three"], "a": ["y"]})
    corpus = Corpus.from_pairs({"train": train, "dev": dev}, query="q", positive="a")
    assert corpus.texts(range(3)) == ["x", "y", "z"]
    assert rows_in(corpus.pairs("train")) == [0, 2, 1], "sorted by query; 'one' has two positives"
    assert corpus.pairs("dev").to_list() == [{"anchor": "three", "positive": "y", "label": label(1, "three")}]
    assert Corpus.from_pairs(train, query="q", positive="a").splits == ["train"]
    with pytest.raises(CorpusError, match="Split 'train' is a list, expected"):
        Corpus.from_pairs({"train": [("q", "a")]})


@pytest.mark.parametrize(
    "of",
    [
        pytest.param(lambda targets: targets.select(range(100, 200)), id="a slice of the same length"),
        pytest.param(lambda targets: targets.shard(2, 1, contiguous=True), id="a shard"),
        pytest.param(lambda targets: targets.select(range(199, 99, -1)), id="reversed"),
        pytest.param(
            lambda targets: targets.rename_columns({"text": "t", "other": "text"}).select(range(100)), id="a column"
        ),
        pytest.param(
            lambda targets: concatenate_datasets([targets.select(range(50, 100)), targets.select(range(50))]),
            id="put together otherwise",
        ),
    ],
)
def test_parts_of_one_file_are_corpora_of_their_own(of, static_model, tmp_path):
    """Arrow does not copy a slice: the parts' files are the same, and yet their digests and token ids are not."""
    file = tmp_path / "targets.arrow"
    columns = {
        "id": [str(n) for n in range(200)],
        "title": [None] * 200,
        "text": make_texts(200, seed=1)[1],
        "other": make_texts(200, seed=2)[1],
    }
    schema = pa.schema([(name, pa.string()) for name in columns])
    targets = write_arrow(file, schema, [pa.table(columns, schema)])
    first, other = (Corpus(part, cache_dir=tmp_path) for part in (targets.select(range(100)), of(targets)))
    assert first.fingerprint == Corpus.from_texts(first.texts(range(100)), cache_dir=tmp_path / "1").fingerprint
    assert other.fingerprint == Corpus.from_texts(other.texts(range(100)), cache_dir=tmp_path / "2").fingerprint
    tokens = [each.tokenize(static_model, progress=False).features([7])["input_ids"] for each in (first, other)]
    expected = [static_model.preprocess(each.texts([7]))["input_ids"] for each in (first, other)]
    assert all(map(torch.equal, tokens, expected)) and not torch.equal(*tokens)


def test_fingerprint_follows_the_texts_and_their_order():
    fingerprint = Corpus.from_texts(["a", "b"]).fingerprint
    assert fingerprint == Corpus.from_texts(["a", "b"], ids=["x", "y"]).fingerprint
    assert fingerprint != Corpus.from_texts(["b", "a"]).fingerprint
    assert fingerprint != Corpus.from_texts(["a", "b "]).fingerprint


# ---------------------------------------------------------------------- tokens


def assert_same_features(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(found[key], value), key
        else:
            assert found[key] == value, key


@pytest.mark.parametrize("prompt", [None, "passage : "])
@pytest.mark.parametrize("kind", ["static", "right", "left", "minilm"])
def test_stored_tokens_are_what_preprocess_gives(kind, prompt, tmp_path, request):
    if kind == "minilm":
        model = SentenceTransformer(request.getfixturevalue("minilm_path"), device="cpu")
    else:
        model = make_static_model() if kind == "static" else make_bert_model(tmp_path, kind)
    texts = make_texts(60)[1] + [" ".join(["word1"] * 400), "word3", "", "日本語 and café"]
    corpus = Corpus.from_texts(texts)
    tokens = corpus.tokenize(model, prompt)
    assert isinstance(tokens, TokenizedCorpus), "not tokenized again at each step"
    distinct = {tuple(tokens.features([row])["input_ids"].flatten().tolist()) for row in range(20)}
    assert len(distinct) == 20, "different texts have different ids"
    for rows in ([5], [0, 60, 3, 3], list(range(63, 40, -1))):
        expected = model.preprocess([texts[row] for row in rows], prompt=prompt, task="document")
        assert_same_features(tokens.features(rows), expected)


def test_tokens_are_prepared_once(static_model, corpus, monkeypatch):
    first = corpus.tokenize(static_model)
    again = corpus.tokenize(static_model)
    assert again._tokens.cache_files == first._tokens.cache_files
    other = corpus.tokenize(static_model, "passage : ")
    assert other._tokens.cache_files != first._tokens.cache_files
    monkeypatch.setattr(static_model, "preprocess", lambda *a, **k: pytest.fail("tokenized again"))
    first.features([1, 2, 3])


def test_models_without_rows_of_tokens_fall_back_to_their_own_preprocess(static_model, corpus, monkeypatch):
    def scrambled(texts, **kwargs):
        return {"pixel_values": torch.tensor([len(text) for text in texts])}

    monkeypatch.setattr(static_model, "preprocess", scrambled)
    tokens = corpus.tokenize(static_model)
    assert isinstance(tokens, TextCorpus)
    assert tokens.features([4])["pixel_values"].tolist() == [len(corpus.texts([4])[0])]


# ---------------------------------------------------------------------- errors


def test_bad_corpora_are_refused_with_what_is_wrong(tmp_path):
    with pytest.raises(CorpusError, match="no targets"):
        Corpus.from_texts([])
    with pytest.raises(CorpusError, match=r"Text 1 is a int"):
        Corpus.from_texts(["a", 3])
    with pytest.raises(CorpusError, match=r"more texts than ids \(1\)"):
        Corpus.from_texts((text for text in ("a", "b")), ids=["x"])
    with pytest.raises(CorpusError, match=r"1 texts but 2 titles"):
        Corpus.from_texts(["a"], titles=["x", "y"])
    with pytest.raises(CorpusError, match=r"1 targets have no id"):
        Corpus.from_dataset(Dataset.from_dict({"text": ["a", "b"], "id": ["x", None]}), id="id")
    with pytest.raises(CorpusError, match=r"Pair 1 of split 'train' is not two strings: 'r' and None"):
        Corpus.from_pairs({"train": Dataset.from_dict({"anchor": ["q", "r"], "positive": ["a", None]})})
    with pytest.raises(CorpusError, match=r"1 target ids occur more than once, e\.g\. \['x'\]"):
        Corpus.from_texts(["a", "b", "c"], ids=["x", "x", "y"])
    with pytest.raises(CorpusError, match=r"1 ids are not in the corpus, e\.g\. \['z'\]"):
        Corpus.from_texts(["a"], ids=["x"]).rows_of(["x", "z"])
    with pytest.raises(CorpusError, match=r"no judgements for split 'dev'; it has none"):
        Corpus.from_texts(["a"]).pairs("dev")
    with pytest.raises(CorpusError, match="not a BEIR folder"):
        Corpus.from_beir(tmp_path)


def test_bad_beir_files_are_named_with_their_line(tmp_path):
    folder = write_beir(tmp_path, TARGETS, QUERIES, {"train": [("q1", "a", 1), ("q1", "nope", 1)]})
    with pytest.raises(
        CorpusError, match=r"train\.tsv judges 1 targets that corpus\.jsonl does not have, e\.g\. \['nope'\]"
    ):
        Corpus.from_beir(folder)
    (folder / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\nq1\ta\n")
    with pytest.raises(CorpusError, match=r"train\.tsv, line 2: 2 tab-separated columns"):
        Corpus.from_beir(folder)
    (folder / "qrels" / "train.tsv").write_text("q1\ta\t1\nq9\ta\t1\n")
    with pytest.raises(CorpusError, match=r"judges 1 queries that queries\.jsonl does not have, e\.g\. \['q9'\]"):
        Corpus.from_beir(folder)
    with (folder / "corpus.jsonl").open("a") as file:
        file.write('{"_id": "e"\n')
    with pytest.raises(CorpusError, match=r"corpus\.jsonl, line 5: not valid JSON"):
        Corpus.from_beir(folder)
    assert not list((tmp_path / "datasets").rglob("*.partial")), "nothing partial is left"


def test_a_limited_corpus_keeps_the_judgements_that_fit(tmp_path):
    folder = write_beir(tmp_path, TARGETS, QUERIES, {"train": [("q1", "a", 1), ("q1", "d", 1), ("q2", "b", 1)]})
    corpus = Corpus.from_beir(folder, max_targets=2)
    assert len(corpus) == 2 and rows_in(corpus.pairs("train")) == [0, 1]
    assert len(Corpus.from_beir(folder)) == 4, "the limited corpus is not mistaken for the whole"
    for none in (0, -3):
        with pytest.raises(InputError, match=f"max_targets is {none}: a corpus has at least one target"):
            Corpus.from_beir(folder, max_targets=none)
        with pytest.raises(InputError, match="at least one target"):
            Corpus.from_hub(folder, max_targets=none)


def test_row_lookup_goes_over_all_chunks():
    ids = [f"id-{n}" for n in range(25_000)]
    corpus = Corpus.from_texts((f"text {n}" for n in range(25_000)), ids=ids)
    assert corpus.targets.data.column("id").num_chunks > 1
    wanted = np.random.default_rng(0).integers(0, 25_000, 500)
    assert corpus.rows_of([ids[n] for n in wanted]).tolist() == wanted.tolist()


def test_a_shuffled_dataset_keeps_rows_and_ids_together():
    dataset = Dataset.from_dict({"id": list("abcd"), "title": [None] * 4, "text": ["1", "2", "3", "4"]})
    corpus = Corpus(dataset.select([3, 1, 0]))
    assert corpus.ids(range(3)) == ["d", "b", "a"] and corpus.rows_of(["a", "b", "d"]).tolist() == [2, 1, 0]
    assert corpus.texts([0, 2]) == ["4", "1"]


def test_a_pair_that_is_judged_twice_is_one_pair():
    pairs = Dataset.from_dict({"anchor": ["q", "q", "q"], "positive": ["a", "b", "a"]})
    corpus = Corpus.from_pairs({"train": pairs})
    assert rows_in(corpus.pairs("train")) == [0, 1] and corpus.qrels("train").rows_of(0).tolist() == [0, 1]


def cased(model, lowercase):
    """The same model with a tokenizer that lower-cases or does not."""
    tokenizer = Tokenizer.from_str(model[0].tokenizer.to_str())
    tokenizer.normalizer = normalizers.Lowercase() if lowercase else normalizers.Replace("Word", "word")
    model[0].tokenizer = tokenizer
    return model


def test_token_files_are_told_apart_by_tokenizer_and_length(tmp_path):
    corpus = Corpus.from_texts(["word1 WORD2 Word3", "word4 " * 30])

    def ids(model, row):
        found = corpus.tokenize(model).features([row])["input_ids"].flatten().tolist()
        assert found == model.preprocess(corpus.texts([row]), task="document")["input_ids"].flatten().tolist()
        return found

    assert ids(cased(make_static_model(), True), 0) != ids(cased(make_static_model(), False), 0)
    bert = make_bert_model(tmp_path)
    long = ids(bert, 1)
    bert.max_seq_length = 8
    assert len(ids(bert, 1)) == 8 < len(long)
    bert.tokenizer.truncation_side = "left"
    assert bert.preprocess(["word1 " + "word2 " * 30 + "word3"])["input_ids"][0, 1] != ids(bert, 0)[1]
    corpus = Corpus.from_texts([" ".join(f"word{n}" for n in range(30))])
    right = make_bert_model(tmp_path)
    right.max_seq_length = 8
    assert ids(bert, 0) != ids(right, 0), "truncated at the other end"


def test_a_router_is_told_by_its_document_tokenizer():
    corpus = Corpus.from_texts(["word1 WORD2"])
    query = make_static_model()
    found = []
    for lowercase in (True, False):
        document = cased(make_static_model(), lowercase)
        model = SentenceTransformer(modules=[Router.for_query_document(list(query), list(document))], device="cpu")
        expected = model.preprocess(["word1 WORD2"], task="document")["input_ids"].tolist()
        found.append(corpus.tokenize(model).features([0])["input_ids"].tolist())
        assert found[-1] == expected
    assert found[0] != found[1]


def test_leftovers_of_killed_writers_are_cleared(static_model, corpus):
    tokens = corpus.tokenize(static_model)
    path = Path(tokens._tokens.cache_files[0]["filename"])
    old, young = (path.with_name(f"{path.name}.{name}.partial") for name in ("old", "young"))
    for leftover in (old, young):
        leftover.write_bytes(b"half")
    os.utime(old, (0, 0))
    path.unlink()
    corpus.tokenize(static_model)
    assert not old.exists() and young.exists() and path.exists()


# ---------------------------------------------------------------------- streams, triplets


def stream(columns, untyped=False):
    """The columns as a stream: with types, as of files that ``load_dataset`` reads, or without, as of a generator."""
    dataset = Dataset.from_dict(columns)
    return IterableDataset.from_generator(lambda: iter(dataset)) if untyped else dataset.to_iterable_dataset()


@pytest.mark.parametrize("untyped", [False, True])
def test_a_stream_is_the_corpus_that_the_same_rows_on_disk_are(tmp_path, untyped):
    count = 12_000  # more than a batch
    columns = {
        "pid": list(range(count)),
        "head": [None if n % 3 else f"title {n % 7}" for n in range(count)],
        "body": [f"text {n % 9_000}" for n in range(count)],
        "question": [f"question {n % 5_000}" for n in range(count)],
    }
    dataset = Dataset.from_dict(columns)
    on_disk = Corpus.from_dataset(dataset, text="body", id="pid", title="head")
    streamed = Corpus.from_dataset(stream(columns, untyped), text="body", id="pid", title="head")
    assert len(streamed) == count and streamed.fingerprint == on_disk.fingerprint
    assert streamed.targets.to_dict() == on_disk.targets.to_dict() and streamed.targets.cache_files
    splits = {"train": dataset, "dev": dataset.select(range(100))}
    streams = {"train": stream(columns, untyped), "dev": stream(columns, untyped).take(100)}
    on_disk, streamed = (Corpus.from_pairs(each, "question", "body") for each in (splits, streams))
    assert len(streamed) == 9_000 and streamed.fingerprint == on_disk.fingerprint
    for split in splits:
        assert streamed.pairs(split).to_dict() == on_disk.pairs(split).to_dict()
    parquet = tmp_path / "rows.parquet"
    dataset.to_parquet(parquet)
    read = load_dataset("parquet", data_files=str(parquet), split="train", streaming=True)
    assert Corpus.from_pairs(read, "question", "body").fingerprint == on_disk.fingerprint


@pytest.mark.parametrize("untyped", [False, True])
def test_what_is_wrong_in_a_stream_is_said_as_of_a_dataset(untyped):
    columns = {"body": ["a", None, "c"], "question": ["q", "r", "s"], "numbers": [[1], [2], [3]]}
    with pytest.raises(CorpusError, match=r"no column 'text' for text; it has \['body', 'question', 'numbers'\]"):
        Corpus.from_dataset(stream(columns, untyped))
    with pytest.raises(CorpusError, match="1 targets near row 0 have no text"):
        Corpus.from_dataset(stream(columns, untyped), text="body")
    with pytest.raises(CorpusError, match="cannot be read as strings"):
        Corpus.from_dataset(stream(columns, untyped), text="numbers")
    with pytest.raises(CorpusError, match="Split 'train' has no column 'anchor'"):
        Corpus.from_pairs(stream(columns, untyped))
    with pytest.raises(CorpusError, match="Pair 1 of split 'train' is not two strings: 'r' and None"):
        Corpus.from_pairs(stream(columns, untyped), "question", "body")


def test_rows_of_a_stream_need_not_have_all_columns():
    rows = [{"text": "a", "title": "T"}, {"text": "b"}, {"title": "U"}]
    streamed = IterableDataset.from_generator(lambda: iter(rows[:2]))
    assert Corpus.from_dataset(streamed, title="title").texts([0, 1]) == ["T a", "b"]
    with pytest.raises(CorpusError, match="1 targets near row 0 have no text"):
        Corpus.from_dataset(IterableDataset.from_generator(lambda: iter(rows)))
    mixed = IterableDataset.from_generator(lambda: iter([{"text": "a"}, {"text": 5}]))
    with pytest.raises(CorpusError, match="cannot be read as strings"):
        Corpus.from_dataset(mixed)
    half = IterableDataset.from_generator(lambda: iter([{"text": "a", "q": "q"}, {"text": "cut \ud83d", "q": "q"}]))
    with pytest.raises(CorpusError, match="half of a character"):
        Corpus.from_dataset(half)
    with pytest.raises(CorpusError, match="half of a character"):
        Corpus.from_pairs(half, "q", "text")
    with pytest.raises(CorpusError, match=r"no column 'text' for text; it has \[\]"):
        Corpus.from_dataset(IterableDataset.from_generator(lambda: iter([])))


def test_a_stream_is_never_held_in_memory():
    """Of what has been read there are digests and rows; texts are there for a batch, however many follow."""
    length = 2_000

    def peak(count):
        def rows():
            for n in range(count):
                yield {"q": f"question {n % 10}", "a": f"{n} ".ljust(length, "x")}

        tracemalloc.start()
        try:
            assert len(Corpus.from_pairs(IterableDataset.from_generator(rows), "q", "a")) == count
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak(30_000) - peak(10_000) < 20_000 * length / 4


def test_negatives_of_triplets_are_targets_and_nothing_else():
    columns = {
        "query": ["one", "two", "one"],
        "positive": ["x", "y", "z"],
        "negative_1": ["n", "x", "m"],
        "negative_2": [["o", "n"], None, []],
    }
    corpus = Corpus.from_pairs(Dataset.from_dict(columns), "query", "positive", negatives=["negative_1", "negative_2"])
    assert corpus.texts(range(len(corpus))) == ["x", "n", "o", "y", "z", "m"]
    assert corpus.pairs("train").to_list() == [
        {"anchor": "one", "positive": "x", "label": label(0, "one")},
        {"anchor": "one", "positive": "z", "label": label(4, "one")},
        {"anchor": "two", "positive": "y", "label": label(3, "two")},
    ]
    again = Corpus.from_pairs(stream(columns), "query", "positive", negatives=["negative_1", "negative_2"])
    assert again.fingerprint == corpus.fingerprint
    with pytest.raises(CorpusError, match="no column 'negative_3'"):
        Corpus.from_pairs(Dataset.from_dict(columns), "query", "positive", negatives=["negative_3"])
    ids = Dataset.from_dict({"query": ["one"], "positive": ["x"], "negative": [7]})
    with pytest.raises(CorpusError, match="Pair 0 of split 'train' is not all strings: 'one' and 'x' and 7"):
        Corpus.from_pairs(ids, "query", "positive", negatives=["negative"])


def test_a_list_of_positives_is_several_positives():
    data = Dataset.from_dict({"anchor": ["q", "r", "q"], "positive": [["x", "y"], ["y"], ["z", "x"]]})
    corpus = Corpus.from_pairs(data)
    assert corpus.texts(range(3)) == ["x", "y", "z"]
    assert corpus.qrels("train").rows_of(0).tolist() == [0, 1, 2] and corpus.qrels("train").rows_of(1).tolist() == [1]
    with pytest.raises(CorpusError, match=r"Pair 1 of split 'train' is not two strings: 'r' and \[\]"):
        Corpus.from_pairs(Dataset.from_dict({"anchor": ["q", "r"], "positive": [["x"], []]}))


def test_fingerprints_and_orders_of_earlier_versions_are_kept():
    """Embedding caches are found by them: what was computed by earlier versions must stay valid."""
    pairs = Dataset.from_dict({"q": ["one", "two", "one"] * 50, "a": [f"x{n % 90}" for n in range(150)]})
    corpus = Corpus.from_pairs({"train": pairs, "dev": pairs.select(range(10))}, "q", "a")
    assert corpus.fingerprint == "fda8613b934ffef81de280d91d69344f"
    assert corpus.ids(range(len(corpus))) == [str(row) for row in range(90)]
    titled = Dataset.from_dict({"text": ["one", "two"], "title": ["A", None]})
    assert Corpus.from_dataset(titled, title="title").fingerprint == "a505bad60f8a3a51f5b94de3c1420c59"


def test_queries_that_are_held_out_are_a_split_of_their_own(tmp_path):
    records = [{"_id": f"q{n}", "text": f"question {n}", "answers": [f"answer {n}"]} for n in range(30)]
    targets = [{"_id": f"d{n}", "text": f"text {n}"} for n in range(40)]
    lines = [(f"q{n}", f"d{n + more}", 1) for n in range(30) for more in (0, 5)]
    folder = write_beir(tmp_path, targets, records, {"train": lines})
    whole, corpus = Corpus.from_beir(folder), Corpus.from_beir(folder)
    corpus.hold_out(8)
    assert corpus.fingerprint == whole.fingerprint, "the targets stay"
    train, dev = corpus.qrels("train"), corpus.qrels("dev")
    assert (
        len(train) == 22
        and len(dev) == 8
        and set(train.queries["id"]) | set(dev.queries["id"]) == set(whole.qrels("train").queries["id"])
    )
    for qrels in (train, dev):
        for position, query in enumerate(qrels.queries):
            number = int(query["id"][1:])
            assert qrels.rows_of(position).tolist() == [number, number + 5]
            assert query["text"] == f"question {number}" and query["answers"] == [f"answer {number}"]
    again = Corpus.from_beir(folder)
    again.hold_out(8)
    assert again.qrels("dev").queries["id"][:] == dev.queries["id"][:], "always the same ones"
    for count in (0, 22):
        with pytest.raises(CorpusError, match=f"{count} queries cannot be held out of the 22 of split 'train'"):
            corpus.hold_out(count, into="test")
    with pytest.raises(CorpusError, match="There is a split 'dev' already"):
        corpus.hold_out(3)


# ---------------------------------------------------------------------- ids and judgements


def judged_by(corpus, split="train"):
    """Query id → {target id: grade} of a split."""
    qrels = corpus.qrels(split)
    return {
        id: dict(zip(corpus.ids(qrels.rows_of(n)), qrels.grades_of(n).tolist(), strict=True))
        for n, id in enumerate(qrels.queries["id"])
    }


RELEVANT = {
    "a list": (["3", "13"], {"3": 1.0, "13": 1.0}),
    "a tuple": (("13",), {"13": 1.0}),
    "a set": ({"13", "3"}, {"3": 1.0, "13": 1.0}),
    "a generator": ((id for id in ("13", "3")), {"3": 1.0, "13": 1.0}),
    "an array": (np.array([13, 3]), {"3": 1.0, "13": 1.0}),
    "a series": (pd.Series(["13", "3"], index=[7, 5]), {"3": 1.0, "13": 1.0}),
    "a column": (Dataset.from_dict({"id": ["13", "3"]})["id"], {"3": 1.0, "13": 1.0}),
    "the same twice": (["13", "13", 13], {"13": 1.0}),
    "one string": ("13", {"13": 1.0}),
    "one integer": (13, {"13": 1.0}),
    "grades": ({"13": 2, "3": 1}, {"3": 1.0, "13": 2.0}),
    "no relevance": ({"13": 1, "3": 0, "4": -1, "5": -0.5}, {"13": 1.0}),
    "fractions": ({"13": 0.5, "3": np.float32(0.25)}, {"3": 0.25, "13": 0.5}),
    "truth values": ({"13": True, "3": False, "4": np.True_}, {"4": 1.0, "13": 1.0}),
    "grades as strings": ({"13": "2", "3": "0"}, {"13": 2.0}),
    "integers of NumPy": ({np.int64(13): np.int8(3), 3: 1}, {"3": 1.0, "13": 3.0}),
    "an unknown target without relevance": ({"13": 1, "unknown": 0}, {"13": 1.0}),
}


@pytest.mark.parametrize("given", RELEVANT)
def test_relevant_targets_are_ids_or_one_id_or_grades(given):
    relevant, expected = RELEVANT[given]
    corpus = Corpus.from_texts(f"text {n}" for n in range(20))
    corpus.add_split("train", {"q": "a question", "unjudged": "another"}, {"q": relevant})
    assert judged_by(corpus) == {"q": expected}


@pytest.mark.parametrize("nothing", [[], {}, {"3": 0}, {"3": -1.0, "4": 0}, np.array([], dtype=int)])
def test_a_query_without_a_relevant_target_is_left_out(nothing):
    corpus = Corpus.from_texts(["a", "b", "c", "d", "e"])
    corpus.add_split("train", {"q": "x", "r": "y"}, {"q": nothing, "r": "3"})
    assert judged_by(corpus) == {"r": {"3": 1.0}}


@pytest.mark.parametrize(
    ("relevant", "message"),
    [
        ({"0": None}, r"The grade of target '0' for query 'q' is None, expected a number"),
        ({"0": "high"}, r"is 'high', expected a number"),
        ({"0": float("nan")}, "is nan, expected a number"),
        ({"0": float("inf")}, "is inf, expected a number"),
        ({"0": -np.inf}, r"expected a number"),
        ({"0": [1]}, r"is \[1\], expected a number"),
        ({0.0: 1}, r"A target of query 'q' is a float, expected a string or an integer: 0\.0"),
        ([None], r"A target of query 'q' is a NoneType, expected a string or an integer"),
        (None, r"A target of query 'q' is a NoneType"),
        ([True], r"A target of query 'q' is a bool"),
        ([np.float64(0)], r"A target of query 'q' is a float64"),
        (b"0", r"A target of query 'q' is a bytes"),
        ([["0"]], r"A target of query 'q' is a list"),
        ([("0", 1)], r"A target of query 'q' is a tuple"),
        (
            ["0", "7", "8"],
            r"Split 'train' judges 2 targets that the corpus does not have, e\.g\. \['7', '8'\]\. .*'drop'",
        ),
    ],
)
def test_judgements_that_are_none_are_refused(relevant, message):
    corpus = Corpus.from_texts(["a", "b"])
    with pytest.raises(CorpusError, match=message):
        corpus.add_split("train", {"q": "x"}, {"q": relevant})
    assert corpus.splits == []


def test_queries_that_cannot_be_told_or_are_no_texts_are_refused():
    corpus = Corpus.from_texts(["a"])
    with pytest.raises(CorpusError, match=r"judges 1 queries that `queries` does not have, e\.g\. \['r'\]"):
        corpus.add_split("train", {"q": "x"}, {"q": ["0"], "r": ["0"]})
    with pytest.raises(CorpusError, match="Two queries share an id, once as an integer and once as a string"):
        corpus.add_split("train", {1: "x", "1": "y"}, {1: "0"})
    with pytest.raises(CorpusError, match=r"The id of a query is a float"):
        corpus.add_split("train", {1.0: "x"}, {1.0: "0"})
    with pytest.raises(CorpusError, match=r"The text of query '1' is a NoneType, expected a string"):
        corpus.add_split("train", {1: None}, {1: "0"})


def test_one_string_is_one_value_and_never_its_characters():
    with pytest.raises(CorpusError, match=r"texts is one string, expected one for each target, as in \['abc'\]"):
        Corpus.from_texts("abc")
    for name in ("ids", "titles"):
        with pytest.raises(CorpusError, match=f"{name} is one string, expected one for each target"):
            Corpus.from_texts(["x", "y", "z"], **{name: "abc"})
    corpus = Corpus.from_texts(["x", "y"], ids=["ab", "a"])
    assert corpus.rows_of("ab").tolist() == [0]
    corpus.add_split("train", {"q": "x"}, {"q": "ab"}, answers={"q": "Rome"})
    assert corpus.qrels("train").queries["answers"][:] == [["Rome"]]
    corpus.add_split("train", {"q": "x"}, {"q": "ab"}, answers={"q": None})
    assert corpus.qrels("train").queries["answers"][:] == [[]]
    triplets = Dataset.from_dict({"anchor": ["q"], "positive": ["p"], "negative": ["n"]})
    assert Corpus.from_pairs(triplets, negatives="negative").texts([0, 1]) == ["p", "n"]


IDS = {
    "integers": [7, 5, 123456789012345678],
    "integers of NumPy": np.array([7, 5, 3], dtype=np.int32),
    "unsigned": np.array([7, 5, 2**64 - 1], dtype=np.uint64),
    "strings of NumPy": np.array(["b", "a", "c"]),
    "a series in another order": pd.Series([7, 5, 3], index=[2, 0, 1]),
    "a series of strings": pd.Series(["b", "a", "c"], index=["x", "y", "z"]),
    "a column": Dataset.from_dict({"id": [7, 5, 3]})["id"],
    "both kinds": ["x", 5, np.int64(3)],
}


@pytest.mark.parametrize("kind", IDS)
def test_ids_are_strings_and_integers_stand_for_their_digits(kind):
    ids = IDS[kind]
    expected = [str(id) for id in ids]
    corpus = Corpus.from_texts(["one", "two", "three"], ids=ids)
    assert corpus.ids([0, 1, 2]) == expected
    assert corpus.rows_of(ids).tolist() == corpus.rows_of(expected).tolist() == [0, 1, 2]
    asked = list(ids)
    corpus.add_split("train", {asked[0]: "x"}, {asked[0]: asked[1:]}, answers={asked[0]: ["y"]})
    assert judged_by(corpus) == {expected[0]: dict.fromkeys(expected[1:], 1.0)}
    assert corpus.qrels("train").queries["answers"][:] == [["y"]]
    graded = Corpus.from_texts(["one", "two", "three"], ids=expected)
    graded.add_split("train", {expected[0]: "x"}, {asked[0]: {asked[2]: 2, asked[1]: 0}})
    assert judged_by(graded) == {expected[0]: {expected[2]: 2.0}}


COLUMNS = {
    "int64": pa.array([7, 5]),
    "uint8": pa.array([7, 5], pa.uint8()),
    "string": pa.array(["7", "5"]),
    "large string": pa.array(["7", "5"], pa.large_string()),
}


@pytest.mark.parametrize("kind", COLUMNS)
@pytest.mark.parametrize("streamed", [False, True])
def test_columns_of_ids_are_read_as_strings(kind, streamed):
    dataset = Dataset(pa.table({"id": COLUMNS[kind], "text": ["one", "two"]}))
    corpus = Corpus.from_dataset(dataset.to_iterable_dataset() if streamed else dataset, id="id")
    assert corpus.ids([0, 1]) == ["7", "5"] and corpus.rows_of([5, "7"]).tolist() == [1, 0]


@pytest.mark.parametrize("id", [1.0, float("nan"), True, None, np.float32(1), np.True_, b"1", ["1"]])
def test_what_is_no_id_is_refused_in_words(id):
    said = f"is a {type(id).__name__}, expected a string or an integer"
    with pytest.raises(CorpusError, match=f"The id of text 1 {said}"):
        Corpus.from_texts(["one", "two"], ids=["0", id])
    corpus = Corpus.from_texts(["one", "two"])
    with pytest.raises(CorpusError, match=f"An id {said}"):
        corpus.rows_of(["0", id])
    with pytest.raises(CorpusError, match=f"A target of query 'q' {said}"):
        corpus.add_split("train", {"q": "x"}, {"q": ["0", id]})
    with pytest.raises(CorpusError, match="half of a character"):
        corpus.rows_of(["\ud83d"])


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(("ids", "type"), [([1.0, 2.0], "double"), ([True, False], "bool"), ([1.5, None], "double")])
def test_columns_that_hold_no_ids_are_refused_in_words(ids, type, streamed):
    dataset = Dataset.from_dict({"id": ids, "text": ["one", "two"]})
    with pytest.raises(CorpusError, match=f"The ids in column 'id' are of type {type}, expected strings or integers"):
        Corpus.from_dataset(dataset.to_iterable_dataset() if streamed else dataset, id="id")


@pytest.mark.parametrize(
    ("change", "type"),
    [
        (lambda each: each.cast_column("id", Value("int64")), "'id': 'int64'"),
        (lambda each: each.cast_column("text", Value("large_string")), "'text': 'large_string'"),
        (lambda each: each.remove_columns("title"), "'id': 'string', 'text': 'string'"),
    ],
)
def test_columns_that_a_corpus_cannot_take_as_they_are_go_through_from_dataset(change, type):
    dataset = change(Dataset.from_dict({"id": ["7", "5"], "title": ["A", None], "text": ["one", "two"]}))
    with pytest.raises(CorpusError, match=f"expects the columns id, title and text, all strings, and got .*{type}"):
        Corpus(dataset)
    assert Corpus.from_dataset(dataset, id="id").ids([0, 1]) == ["7", "5"]


def test_grades_are_kept_by_whatever_a_split_comes_from(tmp_path):
    lines = [("q1", "a", 2), ("q1", "d", 1), ("q1", "b", 0), ("q2", "b", 3), ("q2", "a", -1), ("q3", "c", 0.5)]
    expected = {"q1": {"a": 2.0, "d": 1.0}, "q2": {"b": 3.0}, "q3": {"c": 0.5}}
    corpus = Corpus.from_beir(write_beir(tmp_path, TARGETS, QUERIES, {"train": lines}))
    assert judged_by(corpus) == expected
    configs = {"corpus": {"corpus": columns_of(TARGETS)}, "queries": {"queries": columns_of(QUERIES)}}
    judgements = dict(zip(("query-id", "corpus-id", "score"), map(list, zip(*lines, strict=True)), strict=True))
    judgements["score"] = [float(score) for score in judgements["score"]]
    repository = write_repository(tmp_path / "hub", {**configs, "default": {"train": judgements}})
    assert judged_by(Corpus.from_hub(repository)) == expected
    corpus.hold_out(1)
    assert len(corpus.qrels("dev")) == 1 and judged_by(corpus) | judged_by(corpus, "dev") == expected


def test_of_a_pair_that_is_judged_twice_the_highest_grade_counts(tmp_path):
    lines = [("q1", "a", 1), ("q1", "a", 3), ("q1", "a", 2), ("q1", "d", 1), ("q1", "d", 0)]
    corpus = Corpus.from_beir(write_beir(tmp_path, TARGETS, QUERIES, {"train": lines}))
    assert judged_by(corpus) == {"q1": {"a": 3.0, "d": 1.0}}
    qrels = Qrels(corpus.qrels("train").queries, [0, 0, 0], [3, 1, 3], [1.0, 2.0, 4.0])
    assert qrels.rows_of(0).tolist() == [1, 3] and qrels.grades_of(0).tolist() == [2.0, 4.0]
    assert Qrels(qrels.queries, [0, 0], [3, 1]).grade.tolist() == [1.0, 1.0]


# ---------------------------------------------------------------------- judged targets that are not there


def with_lost_targets(tmp_path, kind):
    """Opens data in which of two queries one loses a judgement of two, and another its only one."""
    lines = [("q1", "a", 1), ("q1", "lost", 2), ("q2", "gone", 1), ("q3", "nothing", 0)]
    if kind == "beir":
        folder = write_beir(tmp_path, TARGETS, QUERIES, {"train": lines})
        return lambda **options: Corpus.from_beir(folder, **options)
    if kind == "hub":
        columns = dict(zip(("query-id", "corpus-id", "score"), map(list, zip(*lines, strict=True)), strict=True))
        configs = {"corpus": {"c": columns_of(TARGETS)}, "queries": {"q": columns_of(QUERIES)}}
        folder = write_repository(tmp_path, {**configs, "default": {"train": columns}})
        return lambda **options: Corpus.from_hub(folder, **options)

    def judged(**options):
        corpus = Corpus.from_texts(["x", "y"], ids=["a", "b"])
        relevant = {}
        for query, target, grade in lines:
            relevant.setdefault(query, {})[target] = grade
        corpus.add_split("train", {query["_id"]: query["text"] for query in QUERIES}, relevant, **options)
        return corpus

    return judged


@pytest.mark.parametrize("kind", ["beir", "hub", "add_split"])
def test_judged_targets_that_are_not_there_are_an_error_or_left_out_and_counted(tmp_path, kind, caplog):
    load = with_lost_targets(tmp_path, kind)
    with pytest.raises(
        CorpusError, match=r"judges 2 targets that .* does not have, e\.g\. \['gone', 'lost'\].*='drop'"
    ):
        load()
    with pytest.raises(InputError, match="missing_targets is 'ignore', expected 'error' or 'drop'"):
        load(missing_targets="ignore")
    caplog.clear()
    corpus = load(missing_targets="drop")
    assert judged_by(corpus) == {"q1": {"a": 1.0}}
    [said] = [each.getMessage() for each in caplog.records if each.levelname == "WARNING"]
    assert "judges 2 targets that" in said
    assert "2 judgements are left out, and with them 1 queries that have no others" in said
    caplog.clear()
    if kind != "add_split":
        assert judged_by(load(max_targets=2)) == {"q1": {"a": 1.0}}, "a limit leaves them out on purpose"
        assert not [each for each in caplog.records if each.levelname == "WARNING"]


# ---------------------------------------------------------------------- transforms and formats

TEXTS = {"anchor": ["one", "two", "three"], "positive": ["x", "y", "z"]}
TRANSFORMS = sorted(shouted(TEXTS))


@pytest.mark.parametrize("how", TRANSFORMS)
def test_what_a_transform_gives_is_what_is_read(how):
    dataset = shouted(TEXTS)[how]
    assert dataset[0] == {"anchor": "ONE", "positive": "X"}
    pairs = Corpus.from_pairs({"train": dataset, "dev": Dataset.from_dict(TEXTS)})
    assert pairs.texts(range(6)) == ["X", "Y", "Z", "x", "y", "z"]
    assert pairs.pairs("train")["anchor"][:] == ["ONE", "TWO", "THREE"]
    assert pairs.pairs("dev")["anchor"][:] == ["one", "two", "three"]
    corpus = Corpus.from_dataset(dataset, text="positive", id="anchor")
    assert corpus.texts(range(3)) == ["X", "Y", "Z"] and corpus.ids(range(3)) == ["ONE", "TWO", "THREE"]
    with pytest.raises(CorpusError, match=r"no column 'raw_positive' for text; it has \['anchor', 'positive'\]"):
        Corpus.from_dataset(dataset, text="raw_positive")


def test_a_transform_that_has_changed_is_read_anew():
    suffix = ["first"]
    dataset = Dataset.from_dict({"text": ["a", "b"]}).with_transform(
        lambda batch: {"text": [f"{text} {suffix[0]}" for text in batch["text"]]}
    )
    assert Corpus.from_dataset(dataset).texts([0, 1]) == ["a first", "b first"]
    suffix[0] = "second"
    assert Corpus.from_dataset(dataset).texts([0, 1]) == ["a second", "b second"]
    plain = Corpus.from_dataset(dataset.with_format(None))
    assert plain.texts([0, 1]) == ["a", "b"]


def test_transforms_that_cannot_be_read_are_refused_in_words():
    dataset = Dataset.from_dict({"id": ["0", "1"], "title": [None, None], "text": ["a", "b"]})
    same = dataset.with_transform(lambda batch: batch)
    with pytest.raises(CorpusError, match=r"The targets have a transform.* Corpus\.from_dataset"):
        Corpus(same)
    assert Corpus(dataset.with_format("numpy"))[1] == {"id": "1", "title": None, "text": "b"}
    longer = dataset.with_transform(lambda batch: {"text": [part for text in batch["text"] for part in (text, text)]})
    with pytest.raises(CorpusError, match=r"transform makes \{'text': 4\} values of 2 rows.* use dataset\.map"):
        Corpus.from_dataset(longer)
    with pytest.raises(CorpusError, match=r"no column 'text' for text; it has \[\]"):
        Corpus.from_dataset(same.select([]))


@pytest.mark.parametrize("format", FORMATS)
def test_a_format_changes_nothing(format):
    columns = {**TEXTS, "pid": [7, 5, 3], "more": [["n", "m"], None, []]}
    dataset = Dataset.from_dict(columns)
    formatted = dataset.with_format(format)
    plain, other = (Corpus.from_pairs(each, negatives=["more"]) for each in (dataset, formatted))
    assert other.fingerprint == plain.fingerprint
    assert other.pairs("train").to_dict() == plain.pairs("train").to_dict()
    other = Corpus.from_dataset(formatted, text="positive", id="pid")
    assert other.ids(range(3)) == ["7", "5", "3"] and other.texts(range(3)) == ["x", "y", "z"]


def test_a_stream_that_is_mapped_is_read_as_mapped():
    stream = Dataset.from_dict(TEXTS).to_iterable_dataset().map(lambda row: {"positive": row["positive"].upper()})
    assert Corpus.from_pairs(stream).texts(range(3)) == ["X", "Y", "Z"]
    assert Corpus.from_dataset(stream, text="positive").texts(range(3)) == ["X", "Y", "Z"]


# ---------------------------------------------------------------------- mined negatives


@pytest.mark.parametrize("scores", [False, True])
@pytest.mark.parametrize("output_format", ["triplet", "n-tuple", "labeled-pair", "labeled-list"])
def test_every_output_of_mine_hard_negatives_is_read_as_what_it_is_or_refused(static_model, output_format, scores):
    queries, texts = make_texts(12)
    pairs = Dataset.from_dict({"anchor": queries, "positive": texts})
    dataset = mined(static_model, pairs, output_format, scores)
    negatives = [name for name in dataset.column_names if name.startswith("negative")]
    if scores and not negatives:
        with pytest.raises(CorpusError, match=r"has a column 'scores?' next to its pairs.*remove_columns\('scores?'\)"):
            Corpus.from_pairs(dataset)
        return
    corpus = Corpus.from_pairs(dataset, negatives=negatives)
    answers = dict(zip(queries, texts, strict=True))
    assert corpus.pairs("train").num_rows == 12
    assert {pair["anchor"]: pair["positive"] for pair in corpus.pairs("train")} == answers
    assert sorted(corpus.texts(range(len(corpus)))) == sorted(texts), "the negatives are targets"
    if negatives:
        assert Corpus.from_pairs(dataset).pairs("train").num_rows == 12, "without them the same"


LABELS = {
    "integers": [1, 0, 1, 0],
    "floats": [1.0, 0.0, 1.0, 0.0],
    "truth values": [True, False, True, False],
    "strings": ["1", "0", "1", "0"],
}


@pytest.mark.parametrize("column", ["label", "labels"])
@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("streamed", [False, True])
def test_labels_say_which_texts_are_relevant(kind, column, streamed, caplog):
    columns = {"anchor": ["q", "q", "r", "s"], "positive": ["x", "n", "x", "m"], column: LABELS[kind]}
    dataset = Dataset.from_dict(columns)
    corpus = Corpus.from_pairs(dataset.to_iterable_dataset() if streamed else dataset)
    assert corpus.texts(range(len(corpus))) == ["x", "n", "m"]
    assert judged_by(corpus) == {"q": {"0": 1.0}, "r": {"0": 1.0}}
    assert "1 queries of split 'train' have no text with label 1 and are left out" in caplog.text
    listed = {"anchor": ["q", "r"], "positive": [["n", "x", "y", None], ["x", "n"]]}
    marks = [LABELS[kind][n] for n in (1, 0, 0, 1)]
    corpus = Corpus.from_pairs(Dataset.from_dict({**listed, column: [marks, marks[1:3]]}))
    assert corpus.texts(range(3)) == ["x", "y", "n"]
    assert judged_by(corpus) == {"q": {"0": 1.0, "1": 1.0}, "r": {"0": 1.0, "2": 1.0}}


def test_what_is_relevant_in_one_row_stays_so_whatever_another_says():
    columns = {"anchor": ["q", "q", "q"], "positive": ["x", "x", "y"], "label": [0, 1, 0]}
    corpus = Corpus.from_pairs(Dataset.from_dict(columns))
    assert judged_by(corpus) == {"q": {"0": 1.0}}


CLASSES = Dataset.from_dict(
    {"anchor": ["q", "r"], "positive": ["x", "y"], "label": [0, 1]},
    features=Features(
        {"anchor": Value("string"), "positive": Value("string"), "label": ClassLabel(names=["entailment", "neutral"])}
    ),
)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"label": [1, 2]}, r"Column 'label' in row 1 of split 'train' is 2, expected 1 .*remove_columns\('label'\)"),
        ({"label": [0.7, 1.0]}, r"row 0 of split 'train' is 0\.7"),
        ({"label": [1, None]}, r"row 1 of split 'train' is None"),
        ({"label": ["1", "yes"]}, r"row 1 of split 'train' is 'yes'"),
        ({"label": [0, 0]}, r"No label in column 'label' of split 'train' is 1, so nothing is relevant"),
        ({"labels": [[1, 0], [1]]}, r"row 0 of split 'train' is \[1, 0\], expected 1 .* of 1 texts"),
        ({"label": [-1, 1]}, "row 0 of split 'train' is -1"),
        ({"score": [0.9, 0.1]}, r"has a column 'score' next to its pairs"),
        ({"scores": [[0.9], [0.1]]}, r"has a column 'scores' next to its pairs"),
    ],
)
@pytest.mark.parametrize("streamed", [False, True])
def test_labels_and_scores_that_do_not_say_what_is_relevant_are_refused(columns, message, streamed):
    dataset = Dataset.from_dict({"anchor": ["q", "r"], "positive": ["x", "y"], **columns})
    with pytest.raises(CorpusError, match=message):
        Corpus.from_pairs(dataset.to_iterable_dataset() if streamed else dataset)
    (name,) = columns
    assert Corpus.from_pairs(dataset.remove_columns(name)).pairs("train").num_rows == 2, "as the message says"


def test_rows_and_classes_in_a_label_column_are_not_taken_for_relevance():
    queries, texts = make_texts(5)
    corpus = Corpus.from_pairs(Dataset.from_dict({"anchor": queries, "positive": texts}))
    with pytest.raises(CorpusError, match=r"is \[0, \d+\], .*such as the labels that Corpus\.pairs gives"):
        Corpus.from_pairs(corpus.pairs("train"))
    again = Corpus.from_pairs(corpus.pairs("train").remove_columns("label"))
    assert again.fingerprint == corpus.fingerprint
    with pytest.raises(CorpusError, match=r"'label' of split 'train' holds the classes \['entailment', 'neutral'\]"):
        Corpus.from_pairs(CLASSES)
    named = Dataset.from_dict({"text": ["a", "b"], "label": ["one", "two"]})
    assert Corpus.from_pairs(named, "text", "label").texts([0, 1]) == ["one", "two"], "the column of positives"
    scored = Dataset.from_dict({"anchor": ["q"], "positive": ["x"], "negative": ["n"], "score": [0.2]})
    assert Corpus.from_pairs(scored).pairs("train").num_rows == 1, "a margin beside triplets"
