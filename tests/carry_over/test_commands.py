"""The commands for the day after training: adapter, upgrade-index, serve-plan, evaluate."""

import json
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_static_model, make_texts
from sentence_transformers import SentenceTransformer
from support.encoders import moved
from support.layouts import write_beir

from st_corrector import (
    Corpus,
    CorpusRetrievalEvaluator,
    EmbeddingCache,
    upgrade_embeddings,
)
from st_corrector.carry_over.fitting import fit_to_pairs
from st_corrector.cli import main
from st_corrector.data.encoding import DocumentEncoder
from st_corrector.reporting.record import RunRecord
from st_corrector.search.fidelity import overlap_at_k


def all_of(model: SentenceTransformer, corpus: Corpus) -> torch.Tensor:
    return DocumentEncoder(model, corpus, progress=False).encode(model, np.arange(len(corpus)))


@pytest.fixture
def served(tmp_path):
    """A BEIR folder, a new model's folder, and a file of what an old one has said."""
    queries, texts = make_texts(400)
    folder = tmp_path / "data"
    (folder / "qrels").mkdir(parents=True)
    records = [{"_id": str(n), "text": text} for n, text in enumerate(texts)]
    (folder / "corpus.jsonl").write_text("\n".join(map(json.dumps, records)))
    records = [{"_id": f"q{n}", "text": text} for n, text in enumerate(queries)]
    (folder / "queries.jsonl").write_text("\n".join(map(json.dumps, records)))
    (folder / "qrels" / "dev.tsv").write_text("\n".join(f"q{n}\t{n}\t1" for n in range(400)))
    moved().save_pretrained(str(tmp_path / "model"))
    corpus = Corpus.from_beir(folder)
    np.save(tmp_path / "old.npy", all_of(make_static_model(), corpus).numpy())
    return tmp_path


def kept(served, fresh: torch.Tensor, k: int = 10) -> float:
    """The true recall of what is in a file."""
    asked = SentenceTransformer(str(served / "model"), device="cpu").encode_query(
        list(Corpus.from_beir(served / "data").qrels("dev").queries["text"]), convert_to_tensor=True
    )
    carried = F.normalize(torch.from_numpy(np.load(served / "new.npy")), dim=-1)
    return overlap_at_k((asked @ carried.T).topk(k).indices, (asked @ fresh.T).topk(k).indices).mean().item()


def test_upgrade_index_with_a_fitted_corrector_certifies_what_it_keeps(served, capsys):
    common = ["--model", str(served / "model"), "--corpus", str(served / "data")]
    command = [
        "upgrade-index",
        str(served / "old.npy"),
        str(served / "new.npy"),
        "--fit",
        "ridge",
        "--fit_sample",
        "99",
    ]
    assert main([*command, *common, "--judged", "400", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rows"] == 400 and "RidgeCorrector" in found["corrector"]
    certificate = found["certificate"]
    assert certificate["queries"] == certificate["targets"] == 400 and certificate["k"] == 10
    mean, low, high = certificate["recall"]["upgraded"]
    fresh = all_of(moved(), Corpus.from_beir(served / "data"))
    assert mean == pytest.approx(kept(served, fresh), abs=0.02) and low < mean < high < low + 0.1
    assert mean > certificate["recall"]["unchanged"][0] + 0.05
    carried = torch.from_numpy(np.load(served / "new.npy"))
    exact = (carried - fresh).abs().amax(1) < 1e-6
    assert exact.sum() == 99, "what was encoded to fit on is kept"

    assert main([*command, *common]) == 1 and "exists already" in capsys.readouterr().err
    (served / "asked.txt").write_text("\n\n".join(f"word{n} word{n + 2}" for n in range(25)))
    text = [*command[:2], str(served / "other.npy"), *command[3:], *common, "--queries", str(served / "asked.txt")]
    assert main(text) == 0
    assert "for queries like these 25" in (printed := capsys.readouterr().out) and "recall@10" in printed


def test_upgrade_index_encodes_again_what_matters_most(served, capsys):
    corpus = Corpus.from_beir(served / "data")
    fresh, old = all_of(moved(), corpus), np.load(served / "old.npy")
    fit_to_pairs(torch.from_numpy(old[:60]), fresh[:60]).save_pretrained(served / "run")
    recalls = {}
    for amount in ("0.25%", "20%", "200"):
        command = ["upgrade-index", str(served / "old.npy"), str(served / "new.npy")]
        command += ["--corrector", str(served / "run"), "--model", str(served / "model")]
        command += ["--corpus", str(served / "data"), "--reencode", amount, "--judged", "200", "--json"]
        assert main(command) == 0
        found = json.loads(capsys.readouterr().out)
        encoded = {"0.25%": 1, "20%": 80, "200": 200}[amount]
        assert f"{encoded} targets encoded again" in found["corrector"]
        carried = torch.from_numpy(np.load(served / "new.npy"))
        assert ((carried - fresh).abs().amax(1) < 1e-6).sum() == encoded
        recalls[encoded] = found["certificate"]["recall"]["upgraded"][0]
        (served / "new.npy").unlink()
    assert recalls[1] + 0.05 < recalls[80] < recalls[200] <= 1


def test_nothing_is_left_to_encode_again_where_a_corrector_was_fitted_on_all(served, capsys):
    command = ["upgrade-index", str(served / "old.npy"), str(served / "new.npy"), "--fit", "ridge", "--reencode", "5%"]
    assert main([*command, "--model", str(served / "model"), "--corpus", str(served / "data"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["certificate"]["recall"]["upgraded"][0] == 1


def test_upgrade_index_with_a_trained_corrector(served, capsys):
    old = np.load(served / "old.npy")
    fitted = fit_to_pairs(torch.from_numpy(old), all_of(moved(), Corpus.from_beir(served / "data")))
    fitted.save_pretrained(served / "run")
    command = ["upgrade-index", str(served / "old.npy"), str(served / "new.npy"), "--corrector", str(served / "run")]
    assert main(command) == 0
    printed = capsys.readouterr()
    assert "400 embeddings" in printed.out and "not certified" in printed.err
    assert np.array_equal(np.load(served / "new.npy"), upgrade_embeddings(old, fitted).numpy())


def test_fitting_knows_its_kinds(served, capsys):
    assert main(["upgrade-index", str(served / "old.npy"), str(served / "new.npy"), "--fit", "identity"]) == 1
    assert "'identity' is not one of ridge, " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fit", "ridge"], "--fit and --reencode need both"),
        (["--corrector", "DATA", "--reencode", "5%"], "--fit and --reencode need both"),
        (["--corrector", "nowhere/at-all", "--model", "x"], "go together"),
        (["--fit", "ridge", "--model", "MODEL", "--corpus", "DATA", "--max_targets", "50"], "400 rows, the corpus 50"),
        (["--fit", "ridge", "--model", "MODEL", "--corpus", "DATA", "--split", "test"], "no judgements for split"),
        (
            ["--fit", "ridge", "--model", "MODEL", "--corpus", "DATA", "--judged", "19"],
            "At least 20 queries must judge how much is kept, got 19",
        ),
        (["--fit", "ridge", "--model", "MODEL", "--corpus", "DATA", "--k", "401"], "k must be from 1"),
        (["--corrector", "DATA"], "holds no corrector"),
    ],
)
def test_upgrade_index_says_what_is_wrong_before_it_writes(served, capsys, arguments, message):
    where = {"MODEL": str(served / "model"), "DATA": str(served / "data")}
    command = ["upgrade-index", str(served / "old.npy"), str(served / "new.npy")]
    assert main([*command, *(where.get(each, each) for each in arguments)]) == 1
    assert message in capsys.readouterr().err
    assert not (served / "new.npy").exists()


@pytest.mark.parametrize("amount", ["0", "0%", "101%", "many", "-3", "1.5"])
def test_an_amount_that_is_none_is_refused(amount, capsys):
    with pytest.raises(SystemExit):
        main(["upgrade-index", "a.npy", "b.npy", "--corrector", "x", "--reencode", amount])
    assert "neither a share of the targets" in capsys.readouterr().err


def test_too_few_queries_are_refused_and_nothing_is_written(served, capsys):
    (served / "one.txt").write_text("word1 word3\n")
    common = ["--model", str(served / "model"), "--corpus", str(served / "data"), "--queries", str(served / "one.txt")]
    for command in (["upgrade-index", "--fit", "ridge"], ["adapter", "--corrector", "nowhere"]):
        name, *options = command
        assert main([name, str(served / "old.npy"), str(served / "new.npy"), *options, *common]) == 1
        assert "1 queries: expected many" in capsys.readouterr().err and not (served / "new.npy").exists()
    (served / "some.txt").write_text("\n".join(f"word{n} word3" for n in range(60)))
    common[-1] = str(served / "some.txt")
    assert main(["adapter", str(served / "old.npy"), str(served / "new"), "--corrector", "nowhere", *common]) == 1
    assert "60 queries are too few: 50 are needed" in capsys.readouterr().err


@pytest.fixture
def run(served):
    """A run's folder, with its model and a corrector."""
    fresh = all_of(moved(), Corpus.from_beir(served / "data"))
    moved().save_pretrained(str(served / "run" / "final"))
    fit_to_pairs(np.load(served / "old.npy")[:60], fresh[:60], "mlp").save_pretrained(served / "run" / "final")
    return served / "run"


def test_adapter_gives_a_model_whose_queries_search_the_old_index(served, run, capsys):
    command = ["adapter", str(served / "old.npy"), str(served / "adapted"), "--corrector", str(run / "final")]
    command += ["--model", str(run / "final"), "--corpus", str(served / "data")]
    assert main([*command, "--json"]) == 0
    recall = json.loads(capsys.readouterr().out)["certificate"]["recall"]
    assert list(recall) == ["unchanged", "query adapter", "upgraded"]
    assert recall["unchanged"][2] < recall["query adapter"][0] <= recall["upgraded"][2] + 0.05
    adapted, new = (SentenceTransformer(str(each), device="cpu") for each in (served / "adapted", run / "final"))
    texts = list(Corpus.from_beir(served / "data").qrels("dev").queries["text"])
    assert np.array_equal(adapted.encode_document(texts), new.encode_document(texts))
    fresh = all_of(moved(), Corpus.from_beir(served / "data"))
    reference = (torch.from_numpy(new.encode_query(texts)) @ fresh.T).topk(10).indices
    old = torch.from_numpy(np.load(served / "old.npy"))
    found = (torch.from_numpy(adapted.encode_query(texts)) @ old.T).topk(10).indices
    assert overlap_at_k(found, reference).mean().item() == pytest.approx(recall["query adapter"][0], abs=0.1)
    assert main(command) == 1 and "exists already" in capsys.readouterr().err
    command[2] = str(served / "another")
    for wrong, message in ((["--max_targets", "50"], "400 rows, the corpus 50"), (["--k", "999"], "k must be from 1")):
        assert main([*command, *wrong]) == 1 and message in capsys.readouterr().err
    assert not list(served.glob("*another*"))


def test_serve_plan_recommends_the_cheapest_that_is_good_enough_and_says_so_in_the_report(served, run, capsys):
    RunRecord({"name": "a model"}, {}, {}).save(run)
    command = ["serve-plan", str(run), "--index", str(served / "old.npy"), "--corpus", str(served / "data")]
    assert main([*command, "--recall", "0.6", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [each["encodings"] for each in found["choices"]] == sorted(each["encodings"] for each in found["choices"])
    good = [each for each in found["choices"] if each["low"] >= 0.6]
    assert found["recommended"] == good[0]["name"] and found["choices"][-1]["name"] == "re-embedded"
    assert found["choices"][-1]["encodings"] == 400 and found["choices"][-1]["recall"] == 1
    assert all(each["low"] <= each["recall"] <= each["high"] for each in found["choices"])
    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert "The index that serves" in page and f"{found['recommended']} (recommended)" in page
    RunRecord({"name": "another"}, {}, {}).save(run)
    command[1] = str(run / "final")
    assert main([*command, "--recall", "0.9"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"Recommended: .*, the cheapest whose recall@10 is at least 90 %", printed)
    assert RunRecord.load(run).serving.wanted == 0.9
    assert main([*command, "--recall", "1.5"]) == 1 and "are shares" in capsys.readouterr().err
    assert main(["serve-plan", str(served), *command[2:]]) == 1 and "There is no model" in capsys.readouterr().err


def test_evaluate_of_a_model_and_of_what_is_served(served, capsys):
    corpus = Corpus.from_beir(served / "data")
    EmbeddingCache.build(make_static_model(), corpus, served / "cache", progress=False)
    command = ["evaluate", "--model", str(served / "model"), "--corpus", str(served / "data"), "--json"]
    assert main(command) == 0
    fresh = json.loads(capsys.readouterr().out)
    assert main([*command, "--cache", str(served / "cache")]) == 0
    stale = json.loads(capsys.readouterr().out)
    assert fresh["queries"] == stale["queries"] == 400
    assert fresh["metrics"]["ndcg@10"] > stale["metrics"]["ndcg@10"] > 0
    assert fresh["metrics"] == CorpusRetrievalEvaluator(corpus, "dev")(moved())
    assert main(command[:-1]) == 0 and "400 queries of dev" in capsys.readouterr().out


def test_evaluate_leaves_out_identical_ids_and_lost_targets_on_request(tmp_path, capsys):
    make_static_model().save_pretrained(str(tmp_path / "model"))
    texts = [f"word{n} word{n + 1}" for n in range(8)]
    targets = [{"_id": f"q{n}", "text": text} for n, text in enumerate(texts)]
    lines = [(f"q{n}", f"q{(n + 1) % 8}", 1) for n in range(8)] + [("q0", "lost", 1)]
    folder = write_beir(tmp_path, targets, targets, {"dev": lines})
    command = ["evaluate", "--model", str(tmp_path / "model"), "--corpus", str(folder), "--json"]
    assert main(command) == 1 and "missing_targets='drop'" in capsys.readouterr().err
    command += ["--missing_targets", "drop"]
    assert main(command) == 0
    with_them = json.loads(capsys.readouterr().out)["metrics"]
    assert main([*command, "--ignore_identical_ids"]) == 0
    without = json.loads(capsys.readouterr().out)["metrics"]
    assert with_them["recall@1"] == 0 < without["recall@1"] and without["mrr@10"] > with_them["mrr@10"]


@pytest.mark.parametrize("option", ["--batch_size", "--max_targets"])
@pytest.mark.parametrize("count", ["0", "-3", "many"])
def test_counts_of_nothing_are_refused_by_every_command_that_has_them(option, count, capsys):
    with pytest.raises(SystemExit):
        main(["evaluate", "--model", "m", "--corpus", "c", option, count])
    assert f"{option}: {count!r} is no whole number from 1 on" in capsys.readouterr().err


def test_a_folder_that_holds_no_model_is_named(tmp_path, capsys):
    texts = [{"_id": str(row), "text": f"word{row}"} for row in range(2)]
    folder = write_beir(tmp_path, texts, texts, {"dev": [("0", "0", 1)]})
    (tmp_path / "empty").mkdir()
    assert main(["evaluate", "--model", str(tmp_path / "empty"), "--corpus", str(folder)]) == 1
    assert f"{tmp_path / 'empty'} cannot be loaded as a model" in capsys.readouterr().err
