"""Mined negatives: what a step would choose, in sentence-transformers' formats, for sentence-transformers' trainers."""

import json
import os
import signal
import time

import numpy as np
import pytest
import torch
from conftest import FORKS, make_bert_model, make_static_model, make_texts
from datasets import load_dataset
from sentence_transformers import (
    CrossEncoder,
    CrossEncoderTrainer,
    CrossEncoderTrainingArguments,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.util import mine_hard_negatives
from support.runs import arguments

from st_corrector import (
    Corpus,
    CorrectorTrainer,
    EmbeddingCache,
    FalseNegativeFilter,
    IdentityCorrector,
    InputError,
    NegativeSettings,
    RidgeCorrector,
    TeacherCheck,
    load_mined,
    mine_negatives,
    push_mined,
)
from st_corrector import EmbeddingTeacher as Teacher
from st_corrector.cli import main
from st_corrector.mining import mine as module
from st_corrector.mining.miner import Miner
from st_corrector.runtime.distributed import Processes


@pytest.fixture
def mined(static_model, corpus, tmp_path):
    """Mines with the settings that are given; the cache is the model's own."""
    cache = EmbeddingCache.build(static_model, corpus, tmp_path / "cache", dtype="float32", progress=False)

    def mine(folder="mined", of=corpus, **how):
        settings = NegativeSettings(**how.pop("negatives", {"num_negatives": 4}))
        return mine_negatives(static_model, of, cache, tmp_path / folder, negatives=settings, progress=False, **how)

    return mine


@pytest.mark.parametrize("margins", [{}, {"relative_margin": 0.1}, {"range_min": 2, "max_score": 0.6}])
@pytest.mark.parametrize("form", ["triplet", "n-tuple", "labeled-pair"])
def test_it_is_what_sentence_transformers_mines(static_model, corpus, mined, form, margins):
    negatives = {"num_negatives": 4, "false_negatives": FalseNegativeFilter(**margins)}
    found = mined(negatives=negatives, output_format=form, output_scores=True)
    pairs = corpus.pairs("train").select_columns(["anchor", "positive"])
    expected = mine_hard_negatives(
        pairs,
        static_model,
        corpus=corpus.texts(range(len(corpus))),
        num_negatives=4,
        output_format=form,
        output_scores=True,
        verbose=False,
        range_max=len(corpus),
        **margins,
    )
    assert found.column_names == expected.column_names and len(found) > 100
    texts = [name for name in found.column_names if "score" not in name]
    order = [sorted(json.dumps([row[name] for name in texts]) for row in each) for each in (found, expected)]
    assert order[0] == order[1]
    scores = [np.sort(np.array(each[found.column_names[-1]]), axis=None) for each in (found, expected)]
    np.testing.assert_allclose(*scores, atol=1e-5)


def test_lists_and_ids_say_the_same_as_pairs(corpus, mined):
    pairs, lists, ids = (mined(form, output_format=form) for form in ("labeled-pair", "labeled-list", "ids"))
    flat = [
        (row["anchor"], text, label)
        for row in lists
        for text, label in zip(row["positive"], row["labels"], strict=True)
    ]
    assert flat == [(row["anchor"], row["positive"], row["label"]) for row in pairs]
    text_of = dict(zip(corpus.ids(range(len(corpus))), corpus.texts(range(len(corpus))), strict=True))
    queries = {row["id"]: row["text"] for row in corpus.qrels("train").queries}
    of_ids = [(queries[row["query-id"]], text_of[id], 0) for row in ids for id in row["negative-ids"]]
    assert of_ids == [each for each in flat if not each[2]]
    assert [text_of[row["positive-id"]] for row in ids] == [text for _, text, label in flat if label]


def test_a_query_has_all_its_positives_and_none_of_them_as_a_negative(static_model, tmp_path):
    queries, texts = make_texts(80)
    corpus = Corpus.from_texts([*texts, texts[3].upper()])
    relevant = {"a": ["0", "1", "2"], "b": ["3"], "c": ["3", "7"]}
    corpus.add_split("train", {"a": queries[0], "b": queries[3], "c": texts[9]}, relevant)
    cache = EmbeddingCache.build(static_model, corpus, tmp_path / "cache", progress=False)
    settings = NegativeSettings(num_negatives=200)
    found = mine_negatives(static_model, corpus, cache, tmp_path / "mined", negatives=settings, output_format="ids")
    assert found["query-id"][:] == ["a", "a", "a", "b", "c", "c"] and found["positive-id"][:] == list("012337")
    left_out = {row["query-id"]: {str(n) for n in range(81)} - set(row["negative-ids"]) for row in found}
    shared = {"3", "7", "9", "80"}  # of two queries, with the text of one, with the text of a positive
    assert left_out == {"a": {"0", "1", "2"}, "b": shared, "c": shared}


def test_a_corrector_mines_from_an_old_cache_what_a_new_one_would_give(corpus, tmp_path):
    before, after = make_static_model(0), make_static_model(0)
    turn = torch.linalg.qr(torch.randn(24, 24, generator=torch.Generator().manual_seed(1))).Q
    with torch.no_grad():
        after[0].embedding.weight.copy_(before[0].embedding.weight @ turn.T)
    stale, fresh = (
        EmbeddingCache.build(model, corpus, tmp_path / name, dtype="float32", progress=False)
        for name, model in (("stale", before), ("fresh", after))
    )
    rows = torch.arange(len(corpus))
    corrector = RidgeCorrector(24)
    for _ in range(40):
        corrector.learn(stale[rows], fresh[rows], fresh[rows], 20.0)
    of_fresh = mine_negatives(after, corpus, fresh, tmp_path / "a", output_format="ids", progress=False)
    of_stale = mine_negatives(
        after, corpus, stale, tmp_path / "b", corrector=corrector, output_format="ids", progress=False
    )
    as_it_is = mine_negatives(
        after, corpus, stale, tmp_path / "c", corrector=IdentityCorrector(24), output_format="ids", progress=False
    )
    agree, without = (
        np.mean([len({*one} & {*other}) / 3 for one, other in zip(of_fresh["negative-ids"], ids, strict=True)])
        for ids in (of_stale["negative-ids"], as_it_is["negative-ids"])
    )
    assert agree > 0.8 and without < 0.2
    with pytest.raises(InputError, match=r"than what is mined with:\n  weights: .*\n.*pass the corrector"):
        mine_negatives(after, corpus, stale, tmp_path / "d", progress=False)


def test_a_run_that_is_under_way_is_mined_from_as_it_would_choose(corpus, tmp_path):
    trainer = CorrectorTrainer(make_static_model(), arguments(tmp_path, max_steps=15), corpus=corpus)
    trainer.train()
    (loss,) = trainer._corrected_losses().values()
    found = mine_negatives(
        trainer.model, corpus, loss.corrected, tmp_path / "mined", output_format="ids", progress=False
    )
    texts = corpus.qrels("train").queries["text"][:]
    exclude = torch.tensor([[int(corpus.qrels("train").rows_of(n)[0])] for n in range(len(texts))])
    chosen = loss.corrected.hardest(loss.encode_queries(texts), 8, exclude).rows
    duplicates = [set(corpus.duplicates_of(int(row)).tolist()) for row in exclude[:, 0]]
    for ids, rows, left_out in zip(found["negative-ids"], chosen.tolist(), duplicates, strict=True):
        assert corpus.rows_of(ids).tolist() == [row for row in rows if row not in left_out][:3]
    with pytest.raises(InputError, match="has its own corrector"):
        mine_negatives(trainer.model, corpus, loss.corrected, tmp_path / "x", corrector=RidgeCorrector(24))


def test_a_teacher_and_verification_have_their_say(static_model, corpus, mined, tmp_path):
    other = make_static_model(9)
    teacher = Teacher.build(other, corpus, tmp_path / "teacher", corpus.pairs("train"), progress=False)
    checked = {"num_negatives": 4, "false_negatives": FalseNegativeFilter(checks=(TeacherCheck(teacher),))}
    guided = mined("guided", negatives=checked, output_format="labeled-list")
    for row in guided.select(range(40)):
        scores = other.similarity(other.encode_query(row["anchor"]), other.encode_document(row["positive"]))[0]
        assert (scores[1:] <= scores[0] + 1e-3).all()
    assert guided.to_list() != mined("plain", output_format="labeled-list").to_list()
    verified = mined("verified", negatives={"num_negatives": 4, "candidates": 9}, output_format="labeled-list")
    assert verified.to_list() == mined("plain", output_format="labeled-list").to_list(), "by a fresh cache it is known"


def test_mined_data_trains_a_retriever_and_a_reranker(corpus, mined, tmp_path):
    model = make_static_model(3)
    args = SentenceTransformerTrainingArguments(
        str(tmp_path / "out"), max_steps=30, per_device_train_batch_size=16, learning_rate=0.05, report_to="none",
        logging_steps=5, save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    data = mined("tuples", output_format="n-tuple")
    trainer = SentenceTransformerTrainer(model, args, train_dataset=data, loss=MultipleNegativesRankingLoss(model))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.3
    make_bert_model(tmp_path)
    reranker = CrossEncoder(str(tmp_path / "bert-right"), num_labels=1, device="cpu")
    args = CrossEncoderTrainingArguments(
        str(tmp_path / "out2"), max_steps=30, per_device_train_batch_size=16, learning_rate=1e-2, report_to="none",
        logging_steps=5, save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    data = mined("pairs", output_format="labeled-pair", negatives={"num_negatives": 1})
    assert np.mean(data["label"][:]) == pytest.approx(0.5, abs=0.01)
    trainer = CrossEncoderTrainer(reranker, args, train_dataset=data, loss=BinaryCrossEntropyLoss(reranker))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert min(losses[2:]) < losses[0]


def mine_slowly(folder, began):
    """As :func:`mine_negatives` of this file's corpus, a moment for each part."""
    module._QUERIES = 20
    find = Miner.mine

    def slowly(self, queries):
        began.set()
        time.sleep(0.05)
        yield from find(self, queries)

    Miner.mine = slowly
    mine_all(folder)


def mine_all(folder, **how):
    queries, texts = make_texts(200)
    corpus = Corpus.from_texts(texts, cache_dir=folder / "corpus")
    corpus.add_split("train", {str(n): queries[n] for n in range(200)}, {str(n): [str(n)] for n in range(200)})
    model = make_static_model()
    cache = EmbeddingCache.build(model, corpus, folder / "cache", progress=False)
    settings = NegativeSettings(num_negatives=3, sampler="gumbel")
    return mine_negatives(model, corpus, cache, folder / "mined", negatives=settings, progress=False, **how)


def test_killed_runs_go_on_and_give_what_one_would_have_given(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_QUERIES", 20)
    (tmp_path / "whole").mkdir()
    whole = mine_all(tmp_path / "whole").to_list()
    rng, folder = np.random.default_rng(0), tmp_path / "killed"
    folder.mkdir()
    for _ in range(4):
        began = FORKS.Event()
        process = FORKS.Process(target=mine_slowly, args=(folder, began))
        process.start()
        assert began.wait(60) or not process.is_alive()
        time.sleep(rng.uniform(0, 0.2))
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
        process.join()
    done = {path.name: path.stat().st_mtime_ns for path in (folder / "mined").glob("mined-?????.parquet")}
    assert mine_all(folder).to_list() == whole and len(whole) == 600
    again = {path.name: path.stat().st_mtime_ns for path in (folder / "mined").glob("mined-?????.parquet")}
    assert done.items() <= again.items() and len(again) == 10, "what was there was kept"
    assert mine_all(folder).to_list() == whole
    with pytest.raises(InputError, match=r"holds negatives that were mined otherwise:\n  seed: 0 there, 1 here"):
        mine_all(folder, seed=1)


def test_bad_input_is_refused_and_nothing_is_written(static_model, corpus, mined, tmp_path):
    with pytest.raises(InputError, match="output_format must be one of triplet, n-tuple"):
        mined("a", output_format="pairs")
    with pytest.raises(InputError, match="mines nothing"):
        mined("a", negatives={"num_negatives": 0})
    with pytest.raises(InputError, match="rows, the corpus 5 targets"):
        small = Corpus.from_texts(list("abcde"))
        small.add_split("train", {"q": "a b"}, {"q": ["0"]})
        mined("a", of=small)
    with pytest.raises(InputError, match="holds no mined negatives"):
        load_mined(tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_what_was_mined_otherwise_is_not_taken_for_the_same(static_model, corpus, tmp_path):
    vectors = [torch.randn(len(corpus), 24, generator=torch.Generator().manual_seed(n)) for n in range(2)]
    teachers = [
        Teacher.build(make_static_model(n), corpus, tmp_path / f"teacher{n}", corpus.pairs("train"), progress=False)
        for n in (5, 6)
    ]

    def mine(folder, vectors=vectors[0], teacher=teachers[0]):
        rules = FalseNegativeFilter(checks=(TeacherCheck(teacher),))
        settings = NegativeSettings(3, false_negatives=rules)
        cache = EmbeddingCache.from_tensor(vectors)
        return mine_negatives(static_model, corpus, cache, tmp_path / folder, negatives=settings, progress=False)

    first = mine("a").to_list()
    assert mine("a").to_list() == first
    for change, named in (({"vectors": vectors[1]}, "cache"), ({"teacher": teachers[1]}, "checks")):
        with pytest.raises(InputError, match=f"mined otherwise:\n  {named}"):
            mine("a", **change)
        assert mine(f"another {named}", **change).to_list() != first
    static_model.prompts = {"query": "word7 "}
    with pytest.raises(InputError, match="mined otherwise:\n  prompt"):
        mine("a")


def test_mining_draws_without_touching_the_generators_of_a_training(mined):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    mined(negatives={"num_negatives": 4, "sampler": "gumbel"})
    assert torch.equal(torch.rand(2), expected)


def test_a_model_that_is_cut_and_a_corrector_of_something_else(static_model, corpus, mined, tmp_path, monkeypatch):
    static_model.truncate_dim = 8
    assert mined(output_format="ids").to_list(), "in full width, as in training"
    static_model.truncate_dim = None
    trainer = CorrectorTrainer(make_static_model(), arguments(tmp_path, max_steps=12), corpus=corpus)
    trainer.train()
    corrector = trainer.trained_corrector()
    (loss,) = trainer._corrected_losses().values()
    mine_negatives(trainer.model, corpus, loss.corrected.cache, tmp_path / "right", corrector=corrector, progress=False)
    rebuilt = EmbeddingCache.build(trainer.model, corpus, tmp_path / "rebuilt", progress=False)
    with pytest.raises(InputError, match="The corrector maps of other embeddings than the cache's:\n  weights"):
        mine_negatives(trainer.model, corpus, rebuilt, tmp_path / "wrong", corrector=corrector, progress=False)
    with pytest.raises(InputError, match="The corrector maps to another model:\n  weights"):
        mine_negatives(static_model, corpus, loss.corrected.cache, tmp_path / "wrong", corrector=corrector)
    with monkeypatch.context() as patch, pytest.raises(InputError, match="is spread over 2 processes, and negatives"):
        patch.setattr(loss.corrected, "processes", Processes(0, 2))
        mine_negatives(trainer.model, corpus, loss.corrected, tmp_path / "spread")
    turned = Corpus.from_texts(corpus.texts(range(len(corpus)))[::-1])
    turned.add_split("train", {"a": "word1"}, {"a": ["0"]})
    for model, targets in ((static_model, corpus), (trainer.model, turned)):
        with pytest.raises(InputError, match=r"loss.corrected is of another model or corpus"):
            mine_negatives(model, targets, loss.corrected, tmp_path / "wrong")


def test_an_interrupted_folder_is_not_taken_for_whole(mined, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_QUERIES", 50)
    mined()
    (tmp_path / "mined" / "mined-00002.parquet").unlink()
    with pytest.raises(InputError, match="holds 3 of 4 files"):
        load_mined(tmp_path / "mined")


def test_it_is_pushed_with_a_card_and_loaded_again(mined, hub, tmp_path):
    found = mined(output_format="n-tuple")
    url = push_mined(tmp_path / "mined", "tester/negatives")
    assert "tester/negatives" in url
    files = hub.files("tester/negatives", repo_type="dataset")
    assert {"mined-00000.parquet", "mined.json", "README.md"} <= files.keys()
    card = files["README.md"].decode()
    assert f"{len(found):,} rows" in card and "`n-tuple`" in card and "num_negatives=4" in card
    assert load_dataset("tester/negatives", split="train").to_list() == found.to_list()


def test_the_command_line(corpus, static_model, tmp_path, capsys):
    static_model.save_pretrained(str(tmp_path / "model"))
    folder = tmp_path / "beir"
    (folder / "qrels").mkdir(parents=True)
    texts, qrels = corpus.texts(range(len(corpus))), corpus.qrels("train")
    lines = [json.dumps({"_id": str(n), "text": text}) for n, text in enumerate(texts)]
    (folder / "corpus.jsonl").write_text("\n".join(lines))
    lines = [json.dumps({"_id": row["id"], "text": row["text"]}) for row in qrels.queries]
    (folder / "queries.jsonl").write_text("\n".join(lines))
    ids = qrels.queries["id"][:]
    judged = [f"{ids[query]}\t{row}\t1" for query, row in zip(qrels.query, qrels.row, strict=True)]
    (folder / "qrels" / "train.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *judged]))
    command = ["mine", "--model", tmp_path / "model", "--corpus", folder, "--cache", tmp_path / "cache"]
    command += ["--output", tmp_path / "mined", "--format", "n-tuple", "--num_negatives", 2, "--scores", "--json"]
    assert main([*map(str, command), "--relative_margin", "0.05"]) == 0
    said = json.loads(capsys.readouterr().out)
    found = load_mined(tmp_path / "mined")
    assert said["rows"] == len(found) > 100
    assert said["columns"] == found.column_names == ["anchor", "positive", "negative_1", "negative_2", "scores"]
    assert all(score <= 0.95 * scores[0] + 1e-5 for scores in found["scores"] for score in scores[1:])
    assert main([*map(str, command), "--relative_margin", "0.5"]) == 1
    assert "mined otherwise" in capsys.readouterr().err
    # A cache is taken as it was stored, and a name that the Hub would not have is told before anything is done.
    stored = ["--model", str(tmp_path / "model"), "--corpus", str(folder)]
    assert main(["cache", "build", str(tmp_path / "int8"), *stored, "--dtype", "int8"]) == 0
    command[command.index("--cache") + 1], command[command.index("--output") + 1] = tmp_path / "int8", tmp_path / "8"
    assert main([*map(str, command), "--push_to_hub", "no such/name/at all"]) == 1
    assert "is no name of a repository" in capsys.readouterr().err and not (tmp_path / "8").exists()
    assert main(list(map(str, command))) == 0 and len(load_mined(tmp_path / "8")) > 100


@pytest.mark.parametrize("folder", ["lr[1e-5]", "all*", "what?"])
def test_any_name_of_a_folder_will_do(mined, hub, tmp_path, folder):
    found = mined(folder)
    assert load_mined(tmp_path / folder).to_list() == found.to_list() == mined(folder).to_list()
    push_mined(tmp_path / folder, "tester/negatives")
    assert "mined-00000.parquet" in hub.files("tester/negatives", repo_type="dataset")
