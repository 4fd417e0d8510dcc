"""Encoders that are not one plain model: two towers, adapters, low precision; and data that is not one plain table."""

import pytest
import torch
from conftest import make_bert_model, make_static_model
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Router
from test_checkpoint import Steps
from test_loss import same, weights

from st_corrector import (
    CorrectedMultipleNegativesLoss,
    CorrectorTrainer,
    CorrectorTrainingArguments,
    EmbeddingCache,
    InputError,
    MLPCorrector,
)


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
    adapter = peft.LoraConfig(task_type=peft.TaskType.FEATURE_EXTRACTION, r=8, lora_alpha=32)
    model.add_adapter(adapter)
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
    # A new model with the same adapter goes on from there, and gets where this one did.
    other = make_bert_model(tmp_path)
    other.add_adapter(adapter)
    again = CorrectedMultipleNegativesLoss(other, corpus, cache, num_negatives=4, corrector=MLPCorrector(32, hidden=8))
    steps = Steps()
    resumed = CorrectorTrainer(other, arguments, corpus=corpus, loss=again, callbacks=[steps])
    resumed.train(str(tmp_path / "out" / "checkpoint-20"))
    assert steps.taken == list(range(20, 30))
    assert same(weights(other), weights(model)) and same(again.corrector.state_dict(), loss.corrector.state_dict())

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


@pytest.mark.parametrize("kind", ["iterable", "two data sets", "workers"])
def test_data_that_comes_in_other_ways(corpus, tmp_path, kind):
    model = make_static_model()
    cache = EmbeddingCache.build(model, corpus, tmp_path / "cache", progress=False)
    loss = CorrectedMultipleNegativesLoss(model, corpus, cache, num_negatives=4, corrector="ridge")
    pairs = corpus.pairs("train")
    data = {
        "iterable": lambda: pairs.to_iterable_dataset(),
        "two data sets": lambda: {"first": pairs.select(range(100)), "second": pairs.select(range(100, 200))},
        "workers": lambda: pairs,
    }[kind]()
    arguments = CorrectorTrainingArguments(
        output_dir=str(tmp_path / "out"),
        per_device_train_batch_size=16,
        max_steps=20,
        learning_rate=0.05,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        dataloader_num_workers=2 if kind == "workers" else 0,
        accelerator_config={"dispatch_batches": False} if kind == "iterable" else None,
    )
    before = weights(model)
    trainer = CorrectorTrainer(model, arguments, train_dataset=data, loss=loss)
    trainer.train()
    log = [entry["task_loss"] for entry in trainer.state.log_history if "task_loss" in entry]
    assert len(log) == 20 and sum(log[-5:]) < sum(log[:5]) - 1
    assert not any(torch.equal(value, before[name]) for name, value in weights(model).items())
    assert loss.search.steps == 20 and loss.corrector.weight.abs().max() > 1e-3
    if kind == "iterable":
        arguments = CorrectorTrainingArguments(output_dir=str(tmp_path / "out"), max_steps=2, report_to="none")
        with pytest.raises(InputError, match="'dispatch_batches': False"):
            CorrectorTrainer(model, arguments, train_dataset=data, loss=loss)
