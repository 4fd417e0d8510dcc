"""A document encoder with nothing to train costs nothing: its embeddings are looked up."""

import copy
import json

import pytest
import torch
from conftest import make_bert_model, make_static_model, router_of
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss
from support.batches import batch_of
from support.launching import launch, results
from support.states import gradient_difference, gradients, without_dropout

from st_corrector import (
    CachedCorrectedMultipleNegativesLoss,
    CorrectedMultipleNegativesLoss,
    CorrectionSettings,
    EmbeddingCache,
    EmbeddingTeacher,
    InputError,
    NegativeSettings,
)
from st_corrector.data.encoding import DocumentEncoder


@pytest.fixture
def towers(tmp_path):
    """Two transformers, of which that for documents is frozen."""
    query, document = (without_dropout(make_bert_model(tmp_path / name)) for name in ("query", "document"))
    model = router_of(query, document)
    model[0].sub_modules["document"].requires_grad_(False)
    return model


def batch(model, corpus, rows):
    features, labels = batch_of(model, corpus, rows)
    return [{**each, "task": task} for each, task in zip(features, ("query", "document"), strict=True)], labels


def step(model, corpus, cache, encodes, make=CorrectedMultipleNegativesLoss, wrap=lambda model, loss: loss, **settings):
    """Terms and gradients of one step, with targets looked up or encoded."""
    model = copy.deepcopy(model).train()
    loss = make(model, corpus, cache, negatives=NegativeSettings(num_negatives=4), **settings)
    assert loss.corrected.is_fixed
    loss.corrected.is_fixed = not encodes
    features, labels = batch(model, corpus, range(12))
    terms = wrap(model, loss)(features, labels)
    sum(terms.values()).backward()
    return {name: float(value) for name, value in terms.items()}, gradients(model), loss


@pytest.mark.parametrize(("dtype", "close"), [("float32", 1e-5), ("bfloat16", 0.05), ("float16", 0.01), ("int8", 0.1)])
@pytest.mark.parametrize("make", [CorrectedMultipleNegativesLoss, CachedCorrectedMultipleNegativesLoss])
def test_a_step_is_that_with_encoded_targets_up_to_the_caches_dtype(towers, corpus, tmp_path, dtype, close, make):
    cache = EmbeddingCache.build(towers, corpus, tmp_path / "cache", dtype=dtype, progress=False)
    terms, found, looking = step(towers, corpus, cache, False, make)
    expected_terms, expected, encoding = step(towers, corpus, cache, True, make)
    assert terms["task_loss"] == pytest.approx(expected_terms["task_loss"], rel=close)
    assert gradient_difference(found, expected) < close and len(found) > 20
    assert all("query" in name for name in found)
    assert looking.targets_encoded == 0 < 12 < encoding.targets_encoded


@pytest.mark.parametrize("added", ["Matryoshka", "a teacher"])
def test_so_it_is_with_what_else_a_loss_may_have(towers, corpus, tmp_path, added):
    cache = EmbeddingCache.build(towers, corpus, tmp_path / "cache", dtype="float32", progress=False)
    how = {}
    if added == "Matryoshka":
        how["wrap"] = lambda model, loss: MatryoshkaLoss(model, loss, [32, 8])
    else:
        how["teacher"] = EmbeddingTeacher.build(
            make_static_model(5), corpus, tmp_path / "teacher", corpus.pairs("train"), progress=False
        )
    terms, found, _ = step(towers, corpus, cache, False, **how)
    expected_terms, expected, _ = step(towers, corpus, cache, True, **how)
    assert terms == pytest.approx(expected_terms, rel=1e-4)
    assert gradient_difference(found, expected) < 1e-4


def test_no_target_goes_through_the_encoder(towers, corpus, tmp_path, monkeypatch):
    cache = EmbeddingCache.build(towers, corpus, tmp_path / "cache", progress=False)
    settings = NegativeSettings(num_negatives=4, candidates=10)
    correction = CorrectionSettings(background_targets=5)
    loss = CorrectedMultipleNegativesLoss(towers, corpus, cache, negatives=settings, correction=correction)
    monkeypatch.setattr(DocumentEncoder, "features", lambda *given: pytest.fail("targets are prepared to be encoded"))
    monkeypatch.setattr(
        towers[0].sub_modules["document"], "forward", lambda *given, **how: pytest.fail("targets are encoded")
    )
    loss.train()
    features, labels = batch(towers, corpus, range(12))
    assert torch.isfinite(loss(features, labels)["task_loss"])
    assert loss.targets_encoded == loss.targets_verified == loss.corrected.targets_reencoded == 0


def test_what_is_no_longer_frozen_is_not_looked_up_in_silence(towers, corpus, tmp_path):
    cache = EmbeddingCache.build(towers, corpus, tmp_path / "cache", progress=False)
    loss = CorrectedMultipleNegativesLoss(towers, corpus, cache, 4)
    features, labels = batch(towers, corpus, range(8))
    loss([dict(each) for each in features], labels)
    towers[0].sub_modules["document"].requires_grad_(True)
    with pytest.raises(InputError, match="was frozen when the loss was made"):
        loss(features, labels)


@pytest.mark.long
def test_two_processes_look_up_what_one_does(tmp_path):
    for processes in (1, 2):
        launch(tmp_path / str(processes), processes, "--cases", json.dumps(["frozen documents"]), "--steps", 6)
    (one,), two = (results(tmp_path / str(processes), processes) for processes in (1, 2))
    assert one["targets_encoded"] == 0 == two[0]["targets_encoded"] and len(one["selected"]) == 6
    for run in two:
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(run["selected"], one["selected"], strict=True))
        for name, value in one["model"].items():
            torch.testing.assert_close(run["model"][name], value, atol=1e-5, rtol=1e-4)
    moved = {name for name, value in one["model"].items() if not torch.equal(value, one["before"][name])}
    assert moved and all("query" in name for name in moved)
