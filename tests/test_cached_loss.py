"""Gradient caching, and what else stands around the loss: Matryoshka, a frozen tower, LoRA, low precision."""

import copy

import pytest
import torch
from conftest import make_bert_model, make_static_model
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Router
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss
from test_loss import batch_of, same, weights

from st_corrector import (
    CachedCorrectedMultipleNegativesLoss,
    CorrectedMultipleNegativesLoss,
    CorrectorTrainer,
    CorrectorTrainingArguments,
    EmbeddingCache,
    InputError,
    MLPCorrector,
    RidgeCorrector,
)


def gradients(model):
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


def assert_gradients_close(found, expected, tolerance=1e-5):
    assert found.keys() == expected.keys() and len(found) > 10
    scale = max(value.abs().max() for value in expected.values())
    assert scale > 1e-3, "there is something to compare"
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= tolerance * scale, name


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


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


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
        assert_gradients_close(gradients(cached.model), gradients(plain.model))
    if plain.num_negatives:
        for name, state in plain.corrector.state_dict().items():
            torch.testing.assert_close(cached.corrector.state_dict()[name], state, atol=1e-4, rtol=1e-3)
        assert plain.corrector.weight.abs().max() > 1e-2, "the corrector has learnt"
        assert torch.equal(plain.search.overlay.rows, cached.search.overlay.rows) and len(cached.search.overlay) > 20


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
    assert cached.search.steps == 0 and len(cached.search.overlay) == 0


# ---------------------------------------------------------------------- Matryoshka


@pytest.mark.parametrize("kind", [CorrectedMultipleNegativesLoss, CachedCorrectedMultipleNegativesLoss])
def test_matryoshka_chooses_once_a_step_by_whole_embeddings(bert_model, corpus, cache, kind, monkeypatch):
    without_dropout(bert_model).train()
    inner = kind(bert_model, corpus, cache, num_negatives=4, corrector=MLPCorrector(cache.dim, hidden=8))
    loss = MatryoshkaLoss(bert_model, inner, [32, 8], [1.0, 0.5])
    searched = []
    search = inner.search.search
    monkeypatch.setattr(
        inner.search,
        "search",
        lambda queries, *args, **kwargs: searched.append(queries) or search(queries, *args, **kwargs),
    )
    features, labels = batch_of(bert_model, corpus, range(9))
    with torch.no_grad():
        queries = inner.comparable(bert_model({**features[0]})["sentence_embedding"])
    values = loss([{**each} for each in features], labels)
    assert len(searched) == 1 and inner.search.steps == 1
    torch.testing.assert_close(searched[0], queries)
    values["task_loss"].backward()
    found = gradients(bert_model)

    # By hand: the same candidates, whole and cut to 8 dimensions.
    bert_model.zero_grad()
    selected = torch.cat([labels, inner.search.overlay.rows[~torch.isin(inner.search.overlay.rows, labels)]])
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
    assert_gradients_close(found, gradients(bert_model))


# ---------------------------------------------------------------------- encoders


def router_of(query, document):
    return SentenceTransformer(
        modules=[Router.for_query_document(query_modules=list(query), document_modules=list(document))], device="cpu"
    )


def test_a_frozen_document_tower_is_not_corrected(corpus, tmp_path):
    model = router_of(make_static_model(0), make_static_model(0))
    for module in model[0].sub_modules["document"]:
        module.requires_grad_(False)
    cache = EmbeddingCache.build(model, corpus, tmp_path / "cache", progress=False)
    loss = CorrectedMultipleNegativesLoss(model, corpus, cache, num_negatives=4, corrector="mlp")
    assert loss.corrector.name == "identity" and not loss.write_back and loss.search.corrects_queries
    before = weights(model)
    arguments = CorrectorTrainingArguments(
        output_dir=str(tmp_path / "out"),
        router_mapping={"anchor": "query", "positive": "document"},
        per_device_train_batch_size=16,
        max_steps=20,
        learning_rate=0.05,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )
    trainer = CorrectorTrainer(model, arguments, corpus=corpus, loss=loss)
    trainer.train()
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert moved and all("query" in name for name in moved)
    log = [entry for entry in trainer.state.log_history if "task_loss" in entry]
    assert log[-1]["task_loss"] < 0.8 * log[0]["task_loss"] and all(entry["drift"] < 1e-5 for entry in log)
    assert len(loss.search.overlay) == 0
    # A cache of another model is stale, whether or not the tower can be trained.
    other = EmbeddingCache.build(
        router_of(make_static_model(1), make_static_model(1)), corpus, tmp_path / "b", progress=False
    )
    assert CorrectedMultipleNegativesLoss(model, corpus, other, corrector="mlp").corrector.name == "mlp"


def test_a_tower_that_can_be_trained_is_corrected(corpus, tmp_path):
    model = router_of(make_static_model(0), make_static_model(0))
    for module in model[0].sub_modules["query"]:
        module.requires_grad_(False)
    cache = EmbeddingCache.build(model, corpus, tmp_path / "cache", progress=False)
    assert CorrectedMultipleNegativesLoss(model, corpus, cache, corrector="mlp").corrector.name == "mlp"


def test_only_adapters_are_trained_with_lora(corpus, tmp_path):
    peft = pytest.importorskip("peft", reason="LoRA needs peft")
    model = make_bert_model(tmp_path)
    model.add_adapter(peft.LoraConfig(task_type=peft.TaskType.FEATURE_EXTRACTION, r=8, lora_alpha=32))
    cache = EmbeddingCache.build(model, corpus, tmp_path / "cache", progress=False)
    loss = CorrectedMultipleNegativesLoss(model, corpus, cache, num_negatives=4, corrector=MLPCorrector(32, hidden=8))
    before = weights(model)
    arguments = CorrectorTrainingArguments(
        output_dir=str(tmp_path / "out"),
        per_device_train_batch_size=16,
        max_steps=30,
        learning_rate=0.02,
        report_to="none",
        save_strategy="steps",
        save_steps=20,
        logging_steps=1,
        disable_tqdm=True,
    )
    trainer = CorrectorTrainer(model, arguments, corpus=corpus, loss=loss)
    trainer.train()
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert moved and all("lora_" in name for name in moved), moved
    log = [entry["task_loss"] for entry in trainer.state.log_history if "task_loss" in entry]
    assert sum(log[-5:]) < 0.95 * sum(log[:5])
    assert loss.corrector.state_dict()["network.2.weight"].abs().max() > 0
    saved = {path.name for path in (tmp_path / "out" / "checkpoint-20").iterdir()}
    assert "adapter_model.safetensors" in saved and "model.safetensors" not in saved
    # Merged into the weights that were frozen, the adapter says the same; without it, something else.
    texts = corpus.texts(range(20))
    adapted = model.encode(texts, convert_to_tensor=True)
    layers = [module for module in model.modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
    for layer in layers:
        layer.merge()
    torch.testing.assert_close(model.encode(texts, convert_to_tensor=True), adapted, atol=1e-4, rtol=1e-4)
    for layer in layers:
        layer.unmerge()
        layer.enable_adapters(False)
    assert (model.encode(texts, convert_to_tensor=True) - adapted).abs().max() > 0.01


def test_bfloat16_training_keeps_the_corrector_in_float32(corpus, tmp_path):
    model = make_bert_model(tmp_path)
    cache = EmbeddingCache.build(model, corpus, tmp_path / "cache", progress=False)
    loss = CorrectedMultipleNegativesLoss(model, corpus, cache, num_negatives=4, corrector="ridge")
    before = weights(model)
    arguments = CorrectorTrainingArguments(
        output_dir=str(tmp_path / "out"),
        per_device_train_batch_size=16,
        max_steps=30,
        learning_rate=1e-3,
        bf16=True,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )
    dtypes = set()
    linear = next(module for module in model.modules() if isinstance(module, torch.nn.Linear))
    linear.register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype))
    trainer = CorrectorTrainer(model, arguments, corpus=corpus, loss=loss)
    trainer.train()
    assert torch.bfloat16 in dtypes, "the encoder did run in bfloat16"
    assert not same(before, weights(model))
    log = [entry["task_loss"] for entry in trainer.state.log_history if "task_loss" in entry]
    assert sum(log[-5:]) < sum(log[:5]) - 1
    assert all(value.dtype == torch.float32 for name, value in loss.corrector.state_dict().items() if "weight" in name)
    assert loss.corrector.weight.abs().max() > 1e-3 and torch.isfinite(loss.corrector.weight).all()
