"""Gradient caching, and Matryoshka around either loss."""

import copy

import pytest
import torch
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss
from support.batches import batch_of
from support.states import gradient_difference, gradients, without_dropout

from st_corrector import (
    CachedCorrectedMultipleNegativesLoss,
    CorrectedMultipleNegativesLoss,
    EmbeddingCache,
    InputError,
    MLPCorrector,
    RidgeCorrector,
)


@pytest.fixture
def cache(bert_model, corpus, tmp_path):
    return EmbeddingCache.build(bert_model, corpus, tmp_path / "cache", progress=False)


def losses_of(model, corpus, cache, **settings):
    """The loss and its cached twin over copies of one model and one corrector."""
    made = []
    for kind, own in (
        (CorrectedMultipleNegativesLoss, {}),
        (CachedCorrectedMultipleNegativesLoss, {"mini_batch_size": 3}),
    ):
        # In closed form: Adam's first steps have the size of its rate however small a gradient is, rounding included.
        settings = {"num_negatives": 4, "corrector": RidgeCorrector(cache.dim), **settings}
        made.append(kind(copy.deepcopy(model), corpus, cache, **copy.deepcopy(settings), **own))
    return made


@pytest.mark.parametrize("settings", [{}, {"candidates": 8, "in_batch_negatives": False}, {"num_negatives": 0}])
def test_cached_gradients_are_those_of_the_whole_batch(bert_model, corpus, cache, settings):
    without_dropout(bert_model)
    with torch.no_grad():  # it has moved on since the cache was built
        for parameter in bert_model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    plain, cached = losses_of(bert_model, corpus, cache, **settings)
    for step in range(3):
        features, labels = batch_of(bert_model, corpus, range(10 * step, 10 * step + 10))
        values = []
        for loss in (plain, cached):
            loss.model.train()
            value = loss([{**each} for each in features], labels)
            # As the trainer does: parts are summed up, and divided for accumulation.
            (sum(value.values()) / 4).backward()
            values.append(value)
        assert values[0].keys() == values[1].keys()
        torch.testing.assert_close(values[0], values[1])
        # Gradients of all steps so far are summed up, as under gradient accumulation.
        assert gradient_difference(gradients(cached.model), gradients(plain.model)) <= 1e-5
    if plain.negatives.num_negatives:
        for name, state in plain.corrected.corrector.state_dict().items():
            torch.testing.assert_close(cached.corrected.corrector.state_dict()[name], state, atol=1e-4, rtol=1e-3)
        assert plain.corrected.corrector.weight.abs().max() > 1e-2, "the corrector has learnt"
        assert (
            torch.equal(plain.corrected.search.overlay.rows, cached.corrected.search.overlay.rows)
            and len(cached.corrected.search.overlay) > 20
        )


def test_the_second_pass_draws_the_first_ones_dropout(bert_model, corpus, cache):
    for module in bert_model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    (_, cached) = losses_of(bert_model, corpus, cache)
    cached.model.train()
    seen = []
    cached.model.register_forward_hook(
        lambda module, inputs, output: seen.append(output["sentence_embedding"].detach())
    )
    features, labels = batch_of(bert_model, corpus, range(7))
    value = cached(features, labels)["task_loss"]
    first = len(seen)
    value.backward()
    assert first == len(seen) - first >= 6
    for before, after in zip(seen[:first], seen[first:], strict=True):
        assert torch.equal(before, after)
    assert not torch.equal(seen[0], seen[0][:1].expand_as(seen[0])), "different texts are different"


def test_what_cannot_be_cut_into_mini_batches_is_refused(corpus, static_model, bert_model):
    with pytest.raises(InputError, match="StaticEmbedding cannot be cut"):
        CachedCorrectedMultipleNegativesLoss(static_model, corpus, num_negatives=0)
    with pytest.raises(InputError, match="mini_batch_size must be at least 1"):
        CachedCorrectedMultipleNegativesLoss(bert_model, corpus, num_negatives=0, mini_batch_size=0)


def test_a_cached_loss_evaluates_as_the_plain_one(bert_model, corpus, cache):
    plain, cached = losses_of(bert_model, corpus, cache)
    features, labels = batch_of(bert_model, corpus, range(8))
    for loss in (plain, cached):
        loss.model.eval()
    with torch.no_grad():
        one, other = (loss([{**each} for each in features], labels) for loss in (plain, cached))
    torch.testing.assert_close(one, other)
    assert cached.corrected.search.steps == 0 and len(cached.corrected.search.overlay) == 0


# ---------------------------------------------------------------------- Matryoshka


@pytest.mark.parametrize("kind", [CorrectedMultipleNegativesLoss, CachedCorrectedMultipleNegativesLoss])
def test_matryoshka_chooses_once_a_step_by_whole_embeddings(bert_model, corpus, cache, kind, monkeypatch):
    without_dropout(bert_model).train()
    inner = kind(bert_model, corpus, cache, num_negatives=4, corrector=MLPCorrector(cache.dim, hidden=8))
    loss = MatryoshkaLoss(bert_model, inner, [32, 8], [1.0, 0.5])
    searched = []
    search = inner.corrected.search.search
    monkeypatch.setattr(
        inner.corrected.search,
        "search",
        lambda queries, *args, **kwargs: searched.append(queries) or search(queries, *args, **kwargs),
    )
    features, labels = batch_of(bert_model, corpus, range(9))
    with torch.no_grad():
        queries = inner.similarity.comparable(bert_model({**features[0]})["sentence_embedding"])
    values = loss([{**each} for each in features], labels)
    assert len(searched) == 1 and inner.corrected.search.steps == 1
    torch.testing.assert_close(searched[0], queries)
    values["task_loss"].backward()
    found = gradients(bert_model)

    # By hand: the same candidates, whole and cut to 8 dimensions.
    bert_model.zero_grad()
    selected = torch.cat(
        [labels, inner.corrected.search.overlay.rows[~torch.isin(inner.corrected.search.overlay.rows, labels)]]
    )
    order = selected[len(labels) :].sort().values
    texts = [{**each} for each in features]
    x, y = (bert_model(each)["sentence_embedding"] for each in texts)
    negatives = bert_model(inner.encoder.features(order.numpy()))["sentence_embedding"]
    expected = 0.0
    for dim, weight in ((32, 1.0), (8, 0.5)):
        cut = [torch.nn.functional.normalize(each[:, :dim], dim=-1) for each in (x, torch.cat([y, negatives]))]
        expected = expected + weight * torch.nn.functional.cross_entropy(20 * cut[0] @ cut[1].T, torch.arange(9))
    torch.testing.assert_close(values["task_loss"], expected.detach(), atol=1e-5, rtol=1e-5)
    expected.backward()
    assert gradient_difference(found, gradients(bert_model)) <= 1e-5
