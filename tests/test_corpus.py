import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_bert_model, make_static_model, make_texts
from datasets import Dataset, IterableDataset, load_dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Router
from support.layouts import QUERIES, TARGETS, write_beir
from tokenizers import Tokenizer, normalizers

from st_corrector import Corpus, CorpusError
from st_corrector.tokens import TextCorpus, TokenizedCorpus


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
        {"anchor": "which city", "positive": "Paris capital of France", "label": 0},
        {"anchor": "which city", "positive": "Rome capital of Italy", "label": 3},
        {"anchor": "what flows", "positive": "a river", "label": 1},
    ]


def test_exact_duplicates_are_found_by_the_joined_text(tmp_path):
    corpus = Corpus.from_beir(write_beir(tmp_path, TARGETS, QUERIES, {"train": [("q1", "a", 1)]}))
    assert corpus.duplicates_of(0).tolist() == [0, 2] and corpus.duplicates_of(2).tolist() == [0, 2]
    assert corpus.duplicates_of(1).tolist() == [1]
    same = Corpus.from_texts(["x"] * 5)
    assert same.duplicates_of(3).tolist() == [0, 1, 2, 3, 4]


def test_case_spaces_punctuation_and_unicode_form_make_no_difference_between_texts():
    texts = [
        "The Spree, a river.",
        "the spree  a River",
        "The Spree a rivers",
        "Cafe\u0301!",
        "café",
        "!?",
        "?!",
        "ﬁn",
        "fin",
    ]
    corpus = Corpus.from_texts(texts)
    groups = [corpus.duplicates_of(row).tolist() for row in range(len(texts))]
    assert groups == [[0, 1], [0, 1], [2], [3, 4], [3, 4], [5], [6], [7, 8], [7, 8]]


def test_positives_of_queries_that_share_one_are_all_known(tmp_path):
    qrels = {"train": [("q1", "a", 1), ("q1", "d", 1), ("q2", "a", 1), ("q2", "b", 1)]}
    corpus = Corpus.from_beir(write_beir(tmp_path, TARGETS, QUERIES, qrels))
    shared = corpus.qrels("train").co_positives([3, 0, 2])
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
    assert corpus.pairs("train")["label"][:] == [0, 2, 1], "sorted by query; 'one' has two positives"
    assert corpus.pairs("dev").to_list() == [{"anchor": "three", "positive": "y", "label": 1}]
    assert Corpus.from_pairs(train, query="q", positive="a").splits == ["train"]
    with pytest.raises(CorpusError, match="Split 'train' is a list, expected"):
        Corpus.from_pairs({"train": [("q", "a")]})


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
    assert len(corpus) == 2 and corpus.pairs("train")["label"][:] == [0, 1]
    assert len(Corpus.from_beir(folder)) == 4, "the limited corpus is not mistaken for the whole"


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
    assert corpus.pairs("train")["label"][:] == [0, 1] and corpus.qrels("train").rows_of(0).tolist() == [0, 1]


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
        {"anchor": "one", "positive": "x", "label": 0},
        {"anchor": "one", "positive": "z", "label": 4},
        {"anchor": "two", "positive": "y", "label": 3},
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
