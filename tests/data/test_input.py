"""What people's files and data sets have wrong, and what they are told."""

import gzip
import json
import logging

import pytest
import torch
from conftest import make_static_model
from datasets import Dataset
from support.labels import label
from support.layouts import QRELS_WRITERS, QUERIES, TARGETS, beirs_reader, write_beir, write_by_hand, write_csv

import st_corrector
from st_corrector import (
    CacheError,
    CheckpointError,
    Corpus,
    CorpusError,
    CorrectedMultipleNegativesLoss,
    CorrectorTrainer,
    EmbeddingCache,
    InputError,
    NonFiniteError,
    ProcessError,
    StCorrectorError,
    StorageError,
    TeacherError,
)
from st_corrector.data.beir import LONGEST_LINE, read_jsonl, read_qrels
from st_corrector.runtime.distributed import Processes
from st_corrector.storage.files import whole
from st_corrector.teachers.store import ScoreStore
from st_corrector.training.checkpoint import load_losses

QRELS = {"train": [("q1", "a", 1), ("q2", "b", 1)]}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "beir").mkdir()
    return write_beir(tmp_path / "beir", TARGETS, QUERIES, QRELS)


def derived(tmp_path):
    return [path for path in (tmp_path / "datasets").rglob("*") if path.is_file() and path.suffix != ".lock"]


def test_all_bad_lines_are_counted_and_the_first_are_shown(folder, tmp_path):
    lines = (folder / "corpus.jsonl").read_text().splitlines()
    bad = ['{"_id": "x"', "[1, 2]", '{"_id": "y"}', '{"id": "z", "contents": "t"}', '{"_id": [1], "text": "t"}', "null"]
    bad += ['{"_id": "n", "text": 5}', '{"_id": "", "text": "t"}', '{"_id": "s", "text": "cut \\ud83d"}']
    (folder / "corpus.jsonl").write_text("\n".join([lines[0], *bad, *lines[1:]]) + "\n")
    with pytest.raises(CorpusError) as raised:
        Corpus.from_beir(folder)
    said = str(raised.value)
    assert "corpus.jsonl has 9 malformed lines:" in said and "and 4 more" in said and "Fix or remove" in said
    assert "line 2: not valid JSON" in said and "line 3: a JSON list, expected an object with _id and text" in said
    assert "line 5: has no '_id' and no 'text', only ['contents', 'id']" in said and "line 6: _id is a list" in said
    assert not derived(tmp_path), "nothing partial is left"
    (folder / "corpus.jsonl").write_text("\n".join([*lines, bad[-1]]) + "\n")
    with pytest.raises(CorpusError, match=rf"line {len(lines) + 1}: half of a character \(a lone surrogate, U\+D83D\)"):
        Corpus.from_beir(folder)


def test_a_limited_corpus_is_read_no_further(folder):
    with (folder / "corpus.jsonl").open("a") as file:
        file.write("not JSON\n")
    with (folder / "corpus.jsonl").open("ab") as file:
        file.write(b"\xff\n")
    assert len(Corpus.from_beir(folder, max_targets=2)) == 2
    assert len(Corpus.from_beir(folder, max_targets=4)) == 4
    with pytest.raises(CorpusError, match="not valid JSON"):
        Corpus.from_beir(folder, max_targets=100)


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.9, 0.999])
def test_a_download_that_was_cut_short_is_told_apart(folder, tmp_path, kept):
    text = "".join(json.dumps({"_id": str(n), "text": f"text {n * 7919}"}) + "\n" for n in range(3000))
    data = gzip.compress(text.encode())
    (folder / "corpus.jsonl").unlink()
    (folder / "corpus.jsonl.gz").write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(CorpusError, match=r"cannot be read beyond line \d+ .* Get it again|has no targets"):
        Corpus.from_beir(folder)
    assert not [path for path in derived(tmp_path) if path.stat().st_size > 10_000]
    (folder / "corpus.jsonl.gz").write_text("<html>Not Found</html>")
    with pytest.raises(CorpusError, match=r"cannot be read beyond line 0 \(Not a gzipped file"):
        Corpus.from_beir(folder)


def test_files_from_windows_and_without_header_are_read(folder):
    expected = Corpus.from_beir(folder).pairs("train").to_list()
    for file in (folder / "corpus.jsonl", folder / "queries.jsonl", folder / "qrels" / "train.tsv"):
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
    assert Corpus.from_beir(folder).pairs("train").to_list() == expected
    (folder / "qrels" / "train.tsv").write_text("q1\ta\t1\nq2\tb\t1")
    assert Corpus.from_beir(folder).pairs("train").to_list() == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("q1\ta\tx\n", r"line 1: score 'x' is not a number"),
        ("q1\ta\tnan\n", r"line 1: score 'nan' is not a number"),
        ("q1\t\t1\n", r"line 1: an id is empty"),
        ("q1 0 a 1\nq2 0 b 1\n", r"has 2 malformed lines:\n  line 1: 1 tab-separated columns \(TREC's four: leave out"),
        ("q1\t0\ta\t1\n", r"line 1: 4 tab-separated columns \(TREC's four: leave out the second\), expected three"),
        ("q1,a,1\n", r"line 1: 1 tab-separated columns, expected three: query-id, corpus-id, score"),
        ("q1\ta\t1\nq2", r"line 2: 1 tab-separated columns, expected three"),
    ],
)
def test_judgements_that_are_none_are_named(folder, text, message):
    (folder / "qrels" / "train.tsv").write_text(text)
    with pytest.raises(CorpusError, match=message):
        Corpus.from_beir(folder)


IDS = [
    *("plain", '"Heroes"_(album)', 'The_"X"_files', 'ends"', '"', '""', 'a""b', "it's", "a,b", " spaced ", "007", "#1"),
    *('<dbpedia:"Heroes"_(David_Bowie_album)>', "Zürich", "东京", "a\tb", 'tab\tand "quote"', "back\\slash", "'q'"),
]


@pytest.mark.parametrize("writer", QRELS_WRITERS)
def test_ids_are_read_as_writers_quote_them_and_as_beirs_own_reader_does(tmp_path, writer):
    rows = [(f"q-{id}", id, n % 3) for n, id in enumerate(IDS)]
    file = tmp_path / "train.tsv"
    QRELS_WRITERS[writer](file, rows)
    assert list(read_qrels(file)) == rows
    if "no header" not in writer:
        assert {(query, id, score) for query, ids in beirs_reader(file).items() for id, score in ids.items()} == {*rows}


def test_a_folder_whose_ids_have_quotes_is_read(tmp_path):
    targets = [{"_id": id, "text": f"text {n}"} for n, id in enumerate(IDS)]
    queries = [{"_id": f"q-{id}", "text": f"question {n}"} for n, id in enumerate(IDS)]
    folder = write_beir(tmp_path, targets, queries, {})
    write_csv(folder / "qrels" / "train.tsv", [(f"q-{id}", id, 1) for id in IDS])
    assert Corpus.from_beir(folder).pairs("train").to_list() == [
        {"anchor": f"question {n}", "positive": f"text {n}", "label": label(n, f"question {n}")}
        for n in range(len(IDS))
    ]


HAND_WRITTEN = {
    'q\tThe_"X"\t1': ("q", 'The_"X"', 1),
    'q\tX"\t1': ("q", 'X"', 1),
    'q"\tX\t1': ('q"', "X", 1),
    'q\t a "b"\t1': ("q", ' a "b"', 1),
    'q\t"X"\t1': ("q", "X", 1),
    'q\t"a ""b"" c"\t"1"': ("q", 'a "b" c', 1),
    'q\t"X"_y\t1': None,
    'q\t"X" \t1': None,
    'q\t"X\t1': None,
    '"q\tX\t1': None,
    'q\tX\t"1': None,
    'q\t"\t1': None,
    'q\t"X\\"Y"\t1': None,
}


@pytest.mark.parametrize("line", HAND_WRITTEN)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_quotes_by_hand_are_read_as_beirs_reader_does_or_refused_and_swallow_no_line(tmp_path, line, end):
    file = tmp_path / "train.tsv"
    write_by_hand(file, [("before", "a", 1), (line,), ("behind", "b", 1), ("last", "c", 1)], end=end)
    found, around = read_qrels(file), [("before", "a", 1), ("behind", "b", 1), ("last", "c", 1)]
    if HAND_WRITTEN[line] is None:
        read = []
        with pytest.raises(
            CorpusError, match=r"train\.tsv, line 3: .* must end with one, and quotes within be doubled"
        ):
            for each in found:
                read.append(each)
        assert read == around, "no other line is lost in it"
        return
    assert list(found) == [around[0], HAND_WRITTEN[line], *around[1:]]
    query, target, score = HAND_WRITTEN[line]
    assert beirs_reader(file)[query] == {target: score}


def test_ids_over_several_lines_or_without_end_are_refused_in_words(tmp_path):
    file = tmp_path / "train.tsv"
    write_csv(file, [("q", "a\nb", 1), ("r", "c", 1)])
    with pytest.raises(
        CorpusError, match=r"has 2 malformed lines:\n  line 2: .*quotes within be doubled.*\n  line 3: "
    ):
        list(read_qrels(file))
    write_by_hand(file, [("q", "a" * 200_000, 1)])
    with pytest.raises(
        CorpusError, match=r"line 2: 'q.*aaa' are not tab-separated columns \(field larger than field limit"
    ):
        list(read_qrels(file))


def test_other_encodings_are_named_with_line_and_byte(folder):
    (folder / "corpus.jsonl").write_bytes('{"_id": "a", "text": "café"}\n'.encode("latin-1"))
    with pytest.raises(CorpusError, match=r"line 1: not UTF-8 \(byte 26 is 0xe9\)"):
        Corpus.from_beir(folder)


def test_a_line_without_end_does_not_fill_the_memory(tmp_path):
    with (tmp_path / "corpus.jsonl").open("wb") as file:
        file.truncate(1 << 40)  # a terabyte, of which nothing is on the disk
    with pytest.raises(CorpusError, match=f"line 1 is longer than {LONGEST_LINE >> 20} MB"):
        next(read_jsonl(tmp_path / "corpus.jsonl"))
    with pytest.raises(CorpusError, match="longer than"):
        next(read_qrels(tmp_path / "corpus.jsonl"))


def test_a_repeated_query_id_is_refused(folder):
    with (folder / "queries.jsonl").open("a") as file:
        file.write('{"_id": "q1", "text": "another"}\n')
    with pytest.raises(CorpusError, match=r"has 1 query ids more than once, e\.g\. \['q1'\]"):
        Corpus.from_beir(folder)


def test_queries_without_judgements_are_left_out_and_counted(folder, caplog):
    with (folder / "queries.jsonl").open("a") as file:
        file.write('{"_id": "q9", "text": "nobody knows"}\n')
    with caplog.at_level(logging.INFO):
        corpus = Corpus.from_beir(folder)
    assert "2 of 4 queries have no relevant target in any split" in caplog.text
    assert "nobody knows" not in corpus.qrels("train").queries["text"][:]
    (folder / "qrels" / "train.tsv").write_text("q1\ta\t0\n")
    empty = Corpus.from_beir(folder)
    assert len(empty.qrels("train")) == 0 and len(empty.pairs("train")) == 0


def test_texts_of_all_kinds_are_encoded(tmp_path, caplog):
    texts = ["", " ", "word1 " * 200_000, "東京 Zürich مرحبا 😀", "word1\x00word2", "e\u0301"]
    corpus = Corpus.from_texts(texts)
    assert "1 targets have neither text nor title, e.g. rows [0]" in caplog.text
    cache = EmbeddingCache.build(make_static_model(), corpus, tmp_path / "cache", progress=False)
    assert torch.isfinite(cache[range(6)]).all()
    with pytest.raises(CorpusError, match=r"'text' of record 1 has half of a character \(a lone surrogate, U\+DC00\)"):
        Corpus.from_texts(["fine", "cut \udc00"])
    with pytest.raises(CorpusError, match=r"'title' of record 0 has half of a character"):
        Corpus.from_texts(["fine"], titles=["\ud83d"])
    corpus.add_split("train", {"q": "fine"}, {"q": ["0"]})
    with pytest.raises(CorpusError, match=r"'text' of record 0 has half of a character"):
        corpus.add_split("train", {"q": "\ud83d"}, {"q": ["0"]})
    with pytest.raises(CorpusError, match=r"'answers' of record 0 has half of a character"):
        corpus.add_split("train", {"q": "fine"}, {"q": ["0"]}, {"q": ["\ud83d"]})


def test_columns_by_another_name_are_asked_for():
    data = Dataset.from_dict({"question": ["a"], "passage": ["b"]})
    with pytest.raises(CorpusError, match=r"no column 'text' for text; .*\['question', 'passage'\].*from_dataset\("):
        Corpus.from_dataset(data)
    with pytest.raises(CorpusError, match=r"no column 'anchor'; .*query='…', positive='…'"):
        Corpus.from_pairs(data)
    corpus = Corpus.from_pairs(data, query="question", positive="passage")
    assert corpus.pairs("train")[0] == {"anchor": "a", "positive": "b", "label": label(0, "a")}
    with pytest.raises(CorpusError, match="cannot be read as strings"):
        Corpus.from_dataset(Dataset.from_dict({"text": [[1, 2], [3]]}))


def test_a_damaged_derived_file_is_written_anew(folder, tmp_path, caplog):
    expected = Corpus.from_beir(folder).texts(range(4))
    files = [path for path in derived(tmp_path) if path.suffix == ".arrow"]
    assert files
    for file in files:
        file.write_bytes(file.read_bytes()[:20])
    assert Corpus.from_beir(folder).texts(range(4)) == expected
    assert "is damaged" in caplog.text and "written again" in caplog.text


def test_what_fails_in_reading_is_not_called_a_full_disk():
    def texts():
        yield "fine"
        raise ConnectionError("the source is gone")

    with pytest.raises(ConnectionError, match="the source is gone"):
        Corpus.from_texts(texts())


def test_a_full_disk_leaves_no_derived_file(small_disk):
    texts = (f"word{n} " * 50 for n in range(2_000))
    with pytest.raises(StorageError, match=r"cannot be written: No space left on device\. Make room.*cache_dir"):
        Corpus.from_texts(texts, cache_dir=small_disk)
    assert not list(small_disk.glob("*.arrow")) and not list(small_disk.glob("*.partial"))


def provoke_cache(tmp_path):
    EmbeddingCache.load(tmp_path)


def provoke_checkpoint(tmp_path):
    loss = CorrectedMultipleNegativesLoss(
        make_static_model(), Corpus.from_texts(["word1"]), EmbeddingCache.from_tensor(torch.ones(1, 24)), 1
    )
    load_losses({"loss": loss}, tmp_path)


def provoke_storage(tmp_path):
    with whole(tmp_path / "no folder" / "file") as path:
        path.write_bytes(b"")


def provoke_process(tmp_path):
    processes = Processes(0, 2)
    processes.gather = lambda tensor: torch.stack([tensor, tensor + 1]).flatten()
    processes.require_same(torch.zeros(1, dtype=torch.int64), "The corrector")


def provoke_teacher(path):
    ScoreStore(path / "scores.sqlite", "a model").close()
    ScoreStore(path / "scores.sqlite", "another one")


MESSAGES = {
    CorpusError: (lambda path: Corpus.from_texts([]), r"The corpus has no targets"),
    CacheError: (provoke_cache, r"holds no embedding cache: build one with EmbeddingCache\.build"),
    CheckpointError: (provoke_checkpoint, r"holds no state of the corrector .*: start a new run from this model"),
    StorageError: (provoke_storage, r"file cannot be written: No such file or directory\. Then repeat the call"),
    InputError: (lambda path: CorrectorTrainer(make_static_model()), r"Pass a loss, or corpus=…"),
    NonFiniteError: (
        lambda path: EmbeddingCache.from_tensor(torch.tensor([[0.0], [torch.nan]])),
        r"The embedding of row 1 is NaN or infinite in torch\.float32; each target needs a finite one",
    ),
    TeacherError: (provoke_teacher, r"holds the scores of another model .*choose another path, or delete the file"),
    ProcessError: (
        provoke_process,
        r"differs between processes: that of rank \[1\] is not that of rank 0",
    ),
}


@pytest.mark.parametrize("kind", MESSAGES)
def test_every_kind_of_error_says_what_where_and_how_to_mend(kind, tmp_path):
    provoke, message = MESSAGES[kind]
    with pytest.raises(kind, match=message) as raised:
        provoke(tmp_path)
    assert type(raised.value) is kind and isinstance(raised.value, StCorrectorError)


def test_no_kind_of_error_is_left_out():
    def kinds(base):
        return {base}.union(*(kinds(each) for each in base.__subclasses__()))

    assert kinds(StCorrectorError) - {StCorrectorError} == MESSAGES.keys()
    assert all(kind.__name__ in st_corrector.__all__ for kind in kinds(StCorrectorError))
