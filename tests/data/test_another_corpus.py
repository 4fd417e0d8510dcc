"""Embeddings of another corpus of the same size are refused wherever embeddings and a corpus meet."""

import argparse
import json

import numpy as np
import pytest
import torch
from conftest import make_static_model, make_texts
from support.encoders import moved

from st_corrector import (
    Corpus,
    CorpusRetrievalEvaluator,
    CorrectedMultipleNegativesLoss,
    EmbeddingCache,
    EmbeddingTeacher,
    InputError,
    certify,
    fit_corrector,
    mine_negatives,
    serve_plan,
)
from st_corrector.carry_over.fitting import fit_to_pairs
from st_corrector.cli import main
from st_corrector.cli.arguments import read_queries
from st_corrector.stores.opening import open_vectors

COUNT = 240


def beir(folder, order):
    """A BEIR folder of the same targets in some order, each of which has a query."""
    queries, texts = make_texts(COUNT)
    (folder / "qrels").mkdir(parents=True)
    for name, lines in (("corpus", [(n, texts[n]) for n in order]), ("queries", enumerate(queries))):
        records = (json.dumps({"_id": str(n), "text": text}) for n, text in lines)
        (folder / f"{name}.jsonl").write_text("\n".join(records))
    for split in ("train", "dev"):
        (folder / "qrels" / f"{split}.tsv").write_text("\n".join(f"{n}\t{n}\t1" for n in range(COUNT)))
    return folder


@pytest.fixture
def there(tmp_path):
    """A cache of one corpus; the folder of the same texts in another order; a model, a corrector and an adapter."""
    first = Corpus.from_beir(beir(tmp_path / "first", range(COUNT)))
    EmbeddingCache.build(make_static_model(), first, tmp_path / "cache", progress=False)
    other = beir(tmp_path / "other", reversed(range(COUNT)))
    moved().save_pretrained(str(tmp_path / "model"))
    old = EmbeddingCache.load(tmp_path / "cache")[np.arange(COUNT)]
    fit_to_pairs(old, old.roll(1, dims=1)).save_pretrained(tmp_path / "model")
    return tmp_path, first, Corpus.from_beir(other)


def _evaluate(folder, corpus):
    CorpusRetrievalEvaluator(corpus, "dev").retrieve(moved(), EmbeddingCache.load(folder / "cache"))


def _fit(folder, corpus):
    fit_corrector(EmbeddingCache.load(folder / "cache"), moved(), corpus, sample=100, progress=False)


def _certify(folder, corpus):
    certify(open_vectors(folder / "cache"), moved(), corpus, [f"word{n} word3" for n in range(40)], progress=False)


def _plan(folder, corpus):
    serve_plan(open_vectors(folder / "cache"), moved(), corpus, [f"word{n} word3" for n in range(150)], progress=False)


def _mine(folder, corpus):
    mine_negatives(make_static_model(), corpus, EmbeddingCache.load(folder / "cache"), folder / "mined")


def _train(folder, corpus):
    CorrectedMultipleNegativesLoss(make_static_model(), corpus, EmbeddingCache.load(folder / "cache"))


def _teach(folder, corpus):
    targets = EmbeddingCache.load(folder / "cache")
    qrels = corpus.qrels("train")
    teacher = EmbeddingTeacher(targets, torch.randn(COUNT, targets.dim), qrels.keys)
    own = EmbeddingCache.build(make_static_model(), corpus, folder / corpus.fingerprint, progress=False)
    CorrectedMultipleNegativesLoss(make_static_model(), corpus, own, teacher=teacher)


WAYS = [_evaluate, _fit, _certify, _plan, _mine, _train, _teach]


@pytest.mark.parametrize("way", WAYS)
def test_embeddings_of_another_corpus_of_the_same_size_are_refused(there, way):
    folder, first, other = there
    way(folder, first)
    with pytest.raises(InputError, match=r"or (of )?the same in another order"):
        way(folder, other)


def test_a_corrector_is_taken_for_a_corpus_that_has_grown_since(tmp_path):
    _, texts = make_texts(COUNT)
    base = Corpus.from_texts(texts[:200], cache_dir=tmp_path / "derived")
    model, cache = make_static_model(), EmbeddingCache.build(make_static_model(), base, tmp_path / "cache")
    corrector = fit_corrector(cache, moved(), base, sample=100, progress=False)
    grown = base.extend(texts[200:])
    EmbeddingCache.extend(model, grown, tmp_path / "cache", progress=False)
    open_vectors(tmp_path / "cache").upgrade(corrector, tmp_path / "new", progress=False)
    carried = EmbeddingCache.load(tmp_path / "new")
    assert len(carried) == COUNT and carried.fingerprint["corpus"] == grown.fingerprint != base.fingerprint
    with pytest.raises(InputError, match="maps from other embeddings"):
        open_vectors(tmp_path / "new").upgrade(corrector, tmp_path / "newer", progress=False)


def test_a_corpus_that_is_there_is_not_written_again(tmp_path):
    _, texts = make_texts(COUNT)
    kept = []
    for _ in range(2):
        corpus = Corpus.from_texts(texts, cache_dir=tmp_path)
        assert corpus.fingerprint
        kept.append({path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()})
    assert kept[0] == kept[1] and any(name.startswith("digests-") for name in kept[0])


def test_queries_of_a_file_are_its_lines(there):
    folder, corpus, _ = there
    (folder / "asked.txt").write_bytes("\ufefffirst query\r\nsecond\u2028query\n\nfirst query\n".encode())
    asked = argparse.Namespace(queries=folder / "asked.txt", split="dev")
    assert read_queries(asked, corpus) == ["first query", "second\u2028query"]


@pytest.mark.parametrize("command", ["upgrade-index", "adapter", "serve-plan", "evaluate"])
def test_commands_refuse_embeddings_of_another_corpus(there, capsys, command):
    folder, _, _ = there
    model, cache = str(folder / "model"), str(folder / "cache")
    common = ["--corpus", str(folder / "other")]
    asked = {
        "upgrade-index": [cache, str(folder / "new"), "--corrector", model, "--model", model],
        "adapter": [cache, str(folder / "new"), "--corrector", model, "--model", model],
        "serve-plan": [model, "--index", cache],
        "evaluate": ["--model", model, "--cache", cache, "--split", "dev"],
    }[command]
    assert main([command, *asked, *common]) == 1
    assert "or of the same in another order" in capsys.readouterr().err and not (folder / "new").exists()
