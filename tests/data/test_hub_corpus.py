"""Retrieval data sets as repositories on the Hub: MTEB's, BeIR's, and sentence-transformers' MS MARCO with its ids."""

import json
import os
import time

import pytest
from datasets import Dataset
from huggingface_hub import HfApi
from support.labels import label, rows_in
from support.layouts import QUERIES, TARGETS, upload, write_beir, write_repository

from st_corrector import Corpus, CorpusError

CORPUS = {"_id": ["a", "b", "c", "d"], "title": ["Paris", "", None, "Rome"]}
CORPUS["text"] = ["capital of France", "a river", "Paris capital of France", "capital of Italy"]
QUESTIONS = {"_id": ["q1", "q2", "q3"], "text": ["which city", "what flows", "unused"]}
TRAIN = {"query-id": ["q1", "q1", "q2", "q2"], "corpus-id": ["a", "d", "b", "a"], "score": [1.0, 1.0, 1.0, 0.0]}
DEV = {"query-id": ["q2"], "corpus-id": ["d"], "score": [2.0]}


@pytest.fixture(params=["folder", "download", "stream"])
def load(request, hub):
    """Loads a repository's folder as it is, or from the Hub after it was uploaded there."""

    def load(folder, **options):
        if request.param == "folder":
            return Corpus.from_hub(folder, **options)
        upload(folder, "tester/nq")
        return Corpus.from_hub("tester/nq", streaming=request.param == "stream", **options)

    return load


@pytest.fixture
def mteb(tmp_path):
    configs = {"corpus": {"corpus": CORPUS}, "queries": {"queries": QUESTIONS}, "default": {"train": TRAIN, "dev": DEV}}
    return write_repository(tmp_path / "mteb", configs)


def check(corpus):
    """It is the corpus that ``TARGETS`` and ``QUERIES`` are in BEIR's files, but for the answers."""
    assert sorted(corpus.splits) == ["dev", "train"]
    assert corpus.texts(range(4)) == [
        *("Paris capital of France", "a river", "Paris capital of France", "Rome capital of Italy")
    ]
    assert corpus.ids([3, 0]) == ["d", "a"]
    train = corpus.qrels("train")
    assert train.queries["id"][:] == ["q1", "q2"] and train.queries["text"][:] == ["which city", "what flows"]
    assert train.rows_of(0).tolist() == [0, 3], "several positives"
    assert train.rows_of(1).tolist() == [1], "a judgement of score 0 is not a positive"
    assert corpus.qrels("dev").rows_of(0).tolist() == [3]


@pytest.mark.parametrize(("id", "config"), [("_id", "default"), ("id", "qrels")])
def test_mtebs_repository_is_the_beir_folder(load, tmp_path, id, config):
    configs = {
        "corpus": {"corpus": {id if name == "_id" else name: values for name, values in CORPUS.items()}},
        "queries": {"queries": {id if name == "_id" else name: values for name, values in QUESTIONS.items()}},
        config: {"train": TRAIN, "dev": DEV},
    }
    corpus = load(write_repository(tmp_path / "nq", configs))
    check(corpus)
    assert corpus.name in ("nq", "tester/nq")
    (tmp_path / "beir").mkdir()
    qrels = {"train": [("q1", "a", 1), ("q1", "d", 1), ("q2", "b", 1), ("q2", "a", 0)], "dev": [("q2", "d", 2)]}
    beir = Corpus.from_beir(write_beir(tmp_path / "beir", TARGETS, QUERIES, qrels))
    assert corpus.fingerprint == beir.fingerprint
    assert corpus.pairs("train").to_list() == beir.pairs("train").to_list()


@pytest.mark.parametrize("streaming", [False, True])
def test_beirs_two_repositories_are_loaded_from_the_hub(hub, tmp_path, streaming):
    upload(
        write_repository(tmp_path / "nq", {"corpus": {"corpus": CORPUS}, "queries": {"queries": QUESTIONS}}),
        "tester/nq",
    )
    qrels = tmp_path / "nq-qrels"
    qrels.mkdir()
    for split, columns in (("train", TRAIN), ("dev", DEV)):
        Dataset.from_dict(columns).to_csv(qrels / f"{split}.tsv", sep="\t")
    upload(qrels, "tester/nq-qrels")
    corpus = Corpus.from_hub("tester/nq", qrels="tester/nq-qrels", streaming=streaming)
    assert corpus.name == "tester/nq"
    assert sorted(corpus.splits) == ["train", "validation"], "what datasets makes of dev.tsv"
    assert corpus.qrels("train").rows_of(0).tolist() == [0, 3]
    assert corpus.qrels("validation").rows_of(0).tolist() == [3]


def test_a_revision_is_what_is_loaded_and_targets_are_read_once(hub, mteb, tmp_path):
    first = upload(mteb, "tester/nq").oid
    later = {**CORPUS, "text": ["capital of France", "a brook", "Paris capital of France", "capital of Italy"]}
    write_repository(
        mteb,
        {"corpus": {"corpus": later}, "queries": {"queries": QUESTIONS}, "default": {"train": TRAIN, "dev": DEV}},
    )
    HfApi().upload_folder(repo_id="tester/nq", repo_type="dataset", folder_path=mteb)
    assert Corpus.from_hub("tester/nq", streaming=True).texts([1]) == ["a brook"]
    check(Corpus.from_hub("tester/nq", revision=first, streaming=True))
    before = len(hub.requested("corpus-00000"))
    assert before > 0
    check(Corpus.from_hub("tester/nq", revision=first, streaming=True))
    check(Corpus.from_hub("tester/nq", revision=first))
    assert len(hub.requested("corpus-00000")) == before, "nor downloaded"


def test_what_is_not_on_the_hub_is_said(hub, mteb):
    with pytest.raises(CorpusError, match=r"tester/nothing cannot be read: .*doesn't exist"):
        Corpus.from_hub("tester/nothing")
    upload(mteb, "tester/nq")
    with pytest.raises(CorpusError, match="tester/nothing cannot be read"):
        Corpus.from_hub("tester/nq", qrels="tester/nothing")


@pytest.mark.parametrize(
    ("config", "columns"),
    [
        ("triplets", {"query_id": list("7787"), "positive_id": list("0310"), "negative_id": list("2222")}),
        ("triplet-ids", {"query": [7, 7, 8, 7], "positive": [0, 3, 1, 0], "negative": [2, 2, 2, 2]}),
        (
            "labeled-list",
            {"query_id": ["7", "8"], "doc_ids": [["2", "0", "3"], ["1", "2"]], "labels": [[0, 1, 1], [1, 0]]},
        ),
    ],
)
def test_msmarcos_ids_are_judgements_over_the_whole_corpus(load, tmp_path, config, columns):
    passages = ["a capital", "a river", "nobody's", "another capital", "never judged"]
    repository = write_repository(
        tmp_path / "msmarco",
        {
            "corpus": {"train": {"passage_id": list("01234"), "passage": passages}},
            "queries": {"train": {"query_id": ["7", "8", "9"], "query": ["which city", "what flows", "unused"]}},
            config: {"train": columns},
        },
    )
    corpus = load(repository, qrels_config=config)
    assert corpus.texts(range(5)) == passages and corpus.splits == ["train"]
    assert corpus.pairs("train").to_list() == [
        {"anchor": "which city", "positive": "a capital", "label": label(0, "which city")},
        {"anchor": "which city", "positive": "another capital", "label": label(3, "which city")},
        {"anchor": "what flows", "positive": "a river", "label": label(1, "what flows")},
    ]


def of_language(language):
    """Configs' columns in which every text and query says which language it is of."""
    corpus = {"_id": ["a", "b"], "text": [f"{language} a", f"{language} b"]}
    queries = {"_id": ["q", "r"], "text": [f"{language} q", f"{language} r"]}
    return corpus, queries, {"query-id": ["q", "r"], "corpus-id": ["b", "a"], "score": [2, 1]}


def named(languages, names, splits=("test",)):
    """Configs of each language, by their names: those of targets, queries and judgements."""
    return {
        name.format(language): {split: part for split in splits}
        for language in languages
        for name, part in zip(names, of_language(language), strict=True)
    }


DE = {"corpus_config": "de-corpus", "queries_config": "de-queries", "qrels_config": "de-qrels"}
LAYOUTS = {
    "a language in front": (named(("en", "de"), ("{}-corpus", "{}-queries", "{}-qrels")), DE),
    "a language behind": (
        named(("en", "de"), ("corpus-{}", "queries-{}", "{}")),
        {"corpus_config": "corpus-de", "queries_config": "queries-de", "qrels_config": "de"},
    ),
    "one of several beside others' queries": (
        {**named(("de",), ("{}-corpus", "{}-queries", "{}-qrels")), **named(("en",), ("corpus", "queries", "default"))},
        DE,
    ),
    "splits": (
        {
            name: {"test": part, "train": other}
            for name, part, other in zip(
                ("corpus", "queries", "default"), of_language("de"), of_language("en"), strict=True
            )
        },
        {"split": "test"},
    ),
    "splits of the judgements alone": (
        {
            **{name: {name: part} for name, part in zip(("corpus", "queries"), of_language("de"), strict=False)},
            "qrels": {"train": {**DEV, "query-id": ["unknown"]}, "test": of_language("de")[2]},
        },
        {"split": "test"},
    ),
    "a language and splits": (
        named(("en", "de"), ("{}-corpus", "{}-queries", "{}-qrels"), ("dev", "test")),
        {**DE, "split": "test"},
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_configs_and_splits_are_named_where_there_are_several(load, tmp_path, layout):
    configs, options = LAYOUTS[layout]
    corpus = load(write_repository(tmp_path / "mteb", configs), **options)
    assert corpus.splits == ["test"]
    assert corpus.texts([0, 1]) == ["de a", "de b"]
    assert corpus.pairs("test").to_list() == [
        {"anchor": "de q", "positive": "de b", "label": label(1, "de q")},
        {"anchor": "de r", "positive": "de a", "label": label(0, "de r")},
    ]
    assert corpus.qrels("test").grade.tolist() == [2.0, 1.0]


def test_corpora_of_one_repository_are_not_mistaken_for_one_another(tmp_path):
    repository = write_repository(tmp_path, LAYOUTS["splits"][0])
    assert Corpus.from_hub(repository, split="train").texts([0]) == ["en a"]
    assert Corpus.from_hub(repository, split="test").texts([0]) == ["de a"]
    assert Corpus.from_hub(repository, split="train").texts([0]) == ["en a"]


UNNAMED = {
    "a language in front": (
        {},
        r"has the configs \['en-corpus', .* expected 'corpus' and 'queries'.*corpus_config='…'",
    ),
    "a language behind": ({"qrels_config": "de"}, r"has the configs \['corpus-en', .*queries_config='…'"),
    "one of several beside others' queries": (
        {"corpus_config": "fr-corpus"},
        r"has the configs \['de-corpus', .* expected 'fr-corpus' and 'queries'",
    ),
    "splits": ({}, r"Config 'queries' of .* has the splits \['test', 'train'\], .* Name one with split='…'"),
    "splits of the judgements alone": (
        {"split": "dev"},
        r"Config 'qrels' of .* has the splits \['train', 'test'\], none called 'dev'",
    ),
    "a language and splits": (DE, r"Config 'de-queries' of .* has the splits \['dev', 'test'\], .*split='…'"),
}


@pytest.mark.parametrize("layout", UNNAMED)
def test_what_there_is_and_which_argument_names_it_are_said(tmp_path, layout):
    options, message = UNNAMED[layout]
    with pytest.raises(CorpusError, match=message):
        Corpus.from_hub(write_repository(tmp_path, LAYOUTS[layout][0]), **options)


SCORES = {
    "integers": [2, 1, 0, -1],
    "floats": [2.0, 1.0, 0.0, -1.0],
    "strings": ["2", "1", "0", "-1"],
    "strings of floats": ["2.0", "1.0", "0.0", "-1.0"],
}


@pytest.mark.parametrize("columns", [("query-id", "corpus-id"), ("query_id", "corpus_id")])
@pytest.mark.parametrize("name", ["score", "relevance", "rel", "label", "grade"])
@pytest.mark.parametrize("scores", SCORES)
def test_scores_are_read_by_every_name_and_type(tmp_path, columns, name, scores):
    judged = dict(zip(columns, (["q1", "q1", "q2", "q1"], ["a", "d", "b", "b"]), strict=True)) | {name: SCORES[scores]}
    configs = {"corpus": {"c": CORPUS}, "queries": {"q": QUESTIONS}, "default": {"dev": judged}}
    qrels = Corpus.from_hub(write_repository(tmp_path, configs)).qrels("dev")
    assert qrels.queries["id"][:] == ["q1"] and qrels.rows_of(0).tolist() == [0, 3]
    assert qrels.grades_of(0).tolist() == [2.0, 1.0]


def test_truth_values_are_scores_of_1_and_0(tmp_path):
    judged = {**TRAIN, "score": [True, True, True, False]}
    configs = {"corpus": {"c": CORPUS}, "queries": {"q": QUESTIONS}, "default": {"train": judged}}
    corpus = Corpus.from_hub(write_repository(tmp_path, configs))
    assert rows_in(corpus.pairs("train")) == [0, 3, 1] and set(corpus.qrels("train").grade) == {1.0}


def test_judgements_without_scores_are_all_positives(tmp_path):
    judged = {name: values for name, values in DEV.items() if name != "score"}
    configs = {"corpus": {"train": CORPUS}, "queries": {"train": QUESTIONS}, "qrels": {"train": judged}}
    assert rows_in(Corpus.from_hub(write_repository(tmp_path, configs)).pairs("train")) == [3]


def test_a_limited_repository_keeps_the_judgements_that_fit(load, mteb):
    corpus = load(mteb, max_targets=2)
    assert len(corpus) == 2 and rows_in(corpus.pairs("train")) == [0, 1] and len(corpus.qrels("dev")) == 0
    check(Corpus.from_hub(mteb))


def test_a_folder_whose_files_change_is_read_anew(mteb):
    check(Corpus.from_hub(mteb))
    file = mteb / "corpus" / "corpus-00000-of-00001.parquet"
    Dataset.from_dict({**CORPUS, "text": ["capital of Gaul", *CORPUS["text"][1:]]}).to_parquet(file)
    os.utime(file, (time.time() + 5, time.time() + 5))
    assert Corpus.from_hub(mteb).texts([0]) == ["Paris capital of Gaul"]
    judged = mteb / "default" / "dev-00000-of-00001.parquet"
    Dataset.from_dict({**DEV, "corpus-id": ["b"]}).to_parquet(judged)
    assert Corpus.from_hub(mteb).qrels("dev").rows_of(0).tolist() == [1]


def test_answers_beside_the_queries_are_read(tmp_path):
    questions = {**QUESTIONS, "answers": [["Paris", "Rome"], None, []]}
    configs = {"corpus": {"corpus": CORPUS}, "queries": {"queries": questions}, "default": {"train": TRAIN}}
    corpus = Corpus.from_hub(write_repository(tmp_path, configs))
    assert corpus.qrels("train").queries["answers"][:] == [["Paris", "Rome"], []]


WRONG = {
    "no queries": (
        {"queries": None},
        r"has the configs \['corpus', 'default'\], expected 'corpus' and 'queries'.*pairs",
    ),
    "a config of its own": (
        {"default": None, "triplets": {"train": TRAIN}},
        r"'triplets'\]: which holds .* qrels_config=",
    ),
    "no judgements": ({"default": None}, r"which holds the judgements\? Expected exactly one of 'qrels' and 'default'"),
    "two of judgements": ({"qrels": {"train": TRAIN}}, r"\['corpus', 'queries', 'default', 'qrels'\]: which holds"),
    "two splits": (
        {"corpus": {"one": CORPUS, "two": CORPUS}},
        r"'corpus' of .* has the splits \['one', 'two'\], expected one, or one with the config's name",
    ),
    "no text": (
        {"corpus": {"corpus": {"_id": ["a"], "body": ["x"]}}},
        r"'corpus' of .* has the columns \['_id', 'body'\], expected an id \(_id, id, passage_id\) and a text",
    ),
    "not judgements": (
        {"default": {"train": {"qid": ["q1"], "pid": ["a"]}}},
        r"split 'train' of config 'default' of .* has the columns \['qid', 'pid'\], expected .*: query-id, corpus-id,",
    ),
    "rankings without labels": (
        {"default": {"train": {"query_id": ["q1"], "doc_ids": [["a", "b"]]}}},
        r"has the columns \['query_id', 'doc_ids'\], expected those of a judgement",
    ),
    "a null text": (
        {"corpus": {"corpus": {**CORPUS, "text": ["x", None, "y", "z"]}}},
        r"1 targets near row 0 have no text",
    ),
    "a null query": (
        {"queries": {"queries": {**QUESTIONS, "text": ["x", None, "y"]}}},
        r"Config 'queries' of .*, row 1: has no 'text'",
    ),
    "a repeated query": (
        {"queries": {"queries": {**QUESTIONS, "_id": ["q1", "q2", "q1"]}}},
        r"config 'queries' of .* has 1 query ids more than once, e\.g\. \['q1'\]",
    ),
    "a repeated target": (
        {"corpus": {"corpus": {**CORPUS, "_id": ["a", "b", "a", "d"]}}},
        r"1 target ids occur more than once, e\.g\. \['a'\]",
    ),
    "an unknown query": (
        {"default": {"train": {**DEV, "query-id": ["q9"]}}},
        r"split 'train' of config 'default' of .* judges 1 queries that config 'queries' does not have, .*'q9'",
    ),
    "an unknown target": (
        {"default": {"train": {**DEV, "corpus-id": ["z"]}}},
        r"judges 1 targets that config 'corpus' does not have, e\.g\. \['z'\]",
    ),
    "no score": (
        {"default": {"train": {**DEV, "score": [float("nan")]}}},
        r"row 0: 'q2', \['d'\], \[nan\] are not a query's id, targets' ids, and a number for each",
    ),
    "a null score": (
        {"default": {"train": {**TRAIN, "score": [1.0, None, 1.0, 0.0]}}},
        r"row 1: 'q1', \['d'\], \[None\] are not a query's id, targets' ids, and a number for each",
    ),
    "a score that is none": (
        {"default": {"train": {**TRAIN, "score": ["1", "1", "high", "0"]}}},
        r"row 2: 'q2', \['b'\], \['high'\] are not",
    ),
    "a target id that is a float": (
        {"default": {"train": {**TRAIN, "corpus-id": [0.0, 1.0, 2.0, 3.0]}}},
        r"row 0: 'q1', \[0\.0\], \[1\.0\] are not",
    ),
    "ids that are floats": (
        {"corpus": {"corpus": {**CORPUS, "_id": [0.0, 1.0, 2.0, 3.0]}}},
        r"The ids in column '_id' are of type double, expected strings or integers",
    ),
    "query ids that are floats": (
        {"queries": {"queries": {**QUESTIONS, "_id": [0.0, 1.0, 2.0]}}},
        r"Config 'queries' of .*, row 0: _id is a float, expected a string or an integer",
    ),
    "too few labels": (
        {"default": {"train": {"query_id": ["q1"], "doc_ids": [["a", "b"]], "labels": [[1]]}}},
        r"row 0: 'q1', \['a', 'b'\], \[1\] are not",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_missing_or_cannot_be_told_is_said(tmp_path, wrong):
    changes, message = WRONG[wrong]
    configs = {"corpus": {"corpus": CORPUS}, "queries": {"queries": QUESTIONS}, "default": {"train": TRAIN}} | changes
    repository = write_repository(tmp_path, {name: splits for name, splits in configs.items() if splits is not None})
    with pytest.raises(CorpusError, match=message):
        Corpus.from_hub(repository)


def test_other_configs_folders_and_damaged_files_are_named(mteb, tmp_path):
    with pytest.raises(CorpusError, match=r"no config 'gold' of judgements; it has \['corpus', 'queries', 'default'\]"):
        Corpus.from_hub(mteb, qrels_config="gold")
    with pytest.raises(CorpusError, match="nowhere cannot be read"):
        Corpus.from_hub(tmp_path / "nowhere")
    file = mteb / "corpus" / "corpus-00000-of-00001.parquet"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CorpusError, match=r"Config 'corpus' of .*mteb.* cannot be read"):
        Corpus.from_hub(mteb)
    assert not list((tmp_path / "datasets").rglob("*.partial")), "nothing partial is left"


def test_a_repository_of_json_lines_is_read_too(tmp_path):
    """As MTEB's older repositories have it, some ids being numbers."""
    rows = {
        "corpus.jsonl": [{"_id": 0, "title": "", "text": "a"}, {"_id": 1, "title": "T", "text": "b"}],
        "queries.jsonl": [{"_id": 5, "text": "q"}],
        "qrels/dev.jsonl": [{"query-id": 5, "corpus-id": 1, "score": 1}],
    }
    (tmp_path / "qrels").mkdir()
    for name, records in rows.items():
        (tmp_path / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n"
        "- config_name: default\n  data_files:\n  - split: dev\n    path: qrels/dev.jsonl\n"
        "- config_name: corpus\n  data_files:\n  - split: corpus\n    path: corpus.jsonl\n"
        "- config_name: queries\n  data_files:\n  - split: queries\n    path: queries.jsonl\n---\n"
    )
    corpus = Corpus.from_hub(tmp_path)
    assert corpus.pairs("dev").to_list() == [{"anchor": "q", "positive": "T b", "label": label(1, "q")}]
