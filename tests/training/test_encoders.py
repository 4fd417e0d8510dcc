"""Encoders that are not one plain model: two towers, adapters, low precision; and data that is not one plain table."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import make_bert_model, make_static_model, router_of
from sentence_transformers import SentenceTransformerTrainer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from support.runs import Steps
from support.states import same, weights

from st_corrector import (
    CorrectedMultipleNegativesLoss,
    CorrectorTrainer,
    CorrectorTrainingArguments,
    EmbeddingCache,
    InputError,
    MLPCorrector,
)


def test_a_frozen_document_tower_is_not_corrected(corpus, tmp_path):
    model = router_of(make_static_model(0), make_static_model(0))
    for module in model[0].sub_modules["document"]:
        module.requires_grad_(False)
    cache = EmbeddingCache.build(model, corpus, tmp_path / "cache", progress=False)
    loss = CorrectedMultipleNegativesLoss(model, corpus, cache, num_negatives=4, corrector="mlp")
    assert (
        loss.corrected.corrector.name == "identity"
        and not loss.corrected.writes_back
        and loss.corrected.search.corrects_queries
    )
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
    assert len(loss.corrected.search.overlay) == 0
    # A cache of another model is stale, whether or not the tower can be trained.
    other = EmbeddingCache.build(
        router_of(make_static_model(1), make_static_model(1)), corpus, tmp_path / "b", progress=False
    )
    assert CorrectedMultipleNegativesLoss(model, corpus, other, corrector="mlp").corrected.corrector.name == "mlp"


def test_a_tower_that_can_be_trained_is_corrected(corpus, tmp_path):
    model = router_of(make_static_model(0), make_static_model(0))
    for module in model[0].sub_modules["query"]:
        module.requires_grad_(False)
    cache = EmbeddingCache.build(model, corpus, tmp_path / "cache", progress=False)
    assert CorrectedMultipleNegativesLoss(model, corpus, cache, corrector="mlp").corrected.corrector.name == "mlp"


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
    assert loss.corrected.corrector.state_dict()["network.2.weight"].abs().max() > 0
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
    assert same(weights(other), weights(model)) and same(
        again.corrected.corrector.state_dict(), loss.corrected.corrector.state_dict()
    )

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
    assert all(
        value.dtype == torch.float32
        for name, value in loss.corrected.corrector.state_dict().items()
        if "weight" in name
    )
    assert loss.corrected.corrector.weight.abs().max() > 1e-3 and torch.isfinite(loss.corrected.corrector.weight).all()


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
    assert loss.corrected.search.steps == 20 and loss.corrected.corrector.weight.abs().max() > 1e-3
    if kind == "iterable":
        arguments = CorrectorTrainingArguments(output_dir=str(tmp_path / "out"), max_steps=2, report_to="none")
        with pytest.raises(InputError, match="'dispatch_batches': False"):
            CorrectorTrainer(model, arguments, train_dataset=data, loss=loss)


@pytest.mark.long
def test_a_compiled_encoder_is_trained_as_a_plain_one(corpus, tmp_path):
    trained = []
    for compiled in (False, True):
        model = make_bert_model(tmp_path)
        before = weights(model)
        cache = EmbeddingCache.build(model, corpus, tmp_path / "cache", progress=False)
        loss = CorrectedMultipleNegativesLoss(model, corpus, cache, num_negatives=4, corrector="ridge", candidates=8)
        arguments = CorrectorTrainingArguments(
            output_dir=str(tmp_path / "out"),
            per_device_train_batch_size=16,
            max_steps=6,
            learning_rate=1e-3,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            example_queries=0,  # which are encoded before the trainer has compiled anything
            torch_compile=compiled,
            torch_compile_backend="eager" if compiled else None,  # what matters here is what is around the model
        )
        kinds = set()
        model.register_forward_hook(lambda *_, loss=loss, kinds=kinds: kinds.add(type(loss.model).__name__))
        CorrectorTrainer(model, arguments, corpus=corpus, loss=loss).train()
        assert kinds == {"OptimizedModule" if compiled else "SentenceTransformer"}
        assert not same(before, weights(model))
        trained.append((weights(model), loss.corrected.corrector.state_dict(), loss.corrected.search.overlay.rows))
    for name, value in trained[0][0].items():
        torch.testing.assert_close(trained[1][0][name], value, atol=1e-5, rtol=1e-4)
    assert torch.equal(trained[0][2], trained[1][2])


def test_what_cannot_work_with_several_processes_is_refused(corpus, tmp_path, monkeypatch):
    model = make_static_model()
    cache = EmbeddingCache.build(model, corpus, tmp_path / "cache", progress=False)
    loss = CorrectedMultipleNegativesLoss(model, corpus, cache, num_negatives=4)
    arguments = CorrectorTrainingArguments(output_dir=str(tmp_path / "out"), max_steps=2, report_to="none")
    with monkeypatch.context() as patched:
        plugin = SimpleNamespace(activation_checkpointing=False, fsdp_version=2)
        patched.setattr(AcceleratorState, "fsdp_plugin", plugin, raising=False)
        with pytest.raises(InputError, match="cut the encoder's weights between processes"):
            CorrectorTrainer(model, arguments, corpus=corpus, loss=loss)
        CorrectorTrainer(
            model, arguments, train_dataset=corpus.pairs("train"), loss=MultipleNegativesRankingLoss(model)
        )


def test_one_process_with_several_gpus_is_refused_whichever_trainer_it_is(corpus, tmp_path, monkeypatch):
    model = make_static_model()
    cache = EmbeddingCache.build(model, corpus, tmp_path / "cache", progress=False)
    loss = CorrectedMultipleNegativesLoss(model, corpus, cache, num_negatives=4)
    arguments = CorrectorTrainingArguments(
        output_dir=str(tmp_path / "out"), max_steps=2, report_to="none", save_strategy="no", disable_tqdm=True
    )
    monkeypatch.setattr(CorrectorTrainingArguments, "n_gpu", property(lambda self: 2))
    with pytest.raises(InputError, match="accelerate launch --num_processes"):
        CorrectorTrainer(model, arguments, corpus=corpus, loss=loss)
    before = weights(model)
    plain = SentenceTransformerTrainer(model, arguments, train_dataset=corpus.pairs("train"), loss=loss)
    with pytest.raises(InputError, match="accelerate launch --num_processes"):
        plain.train()
    assert isinstance(plain.model_wrapped, torch.nn.DataParallel), "as the trainer takes several GPUs"
    assert same(before, weights(model)) and not loss.corrected.search.steps
    # Other losses go on as before, on what DataParallel does without GPUs.
    CorrectorTrainer(
        model, arguments, train_dataset=corpus.pairs("train"), loss=MultipleNegativesRankingLoss(model)
    ).train()
    assert not same(before, weights(model))


def test_queries_and_documents_have_maximum_lengths_of_their_own(corpus, tmp_path):
    query, document = (make_bert_model(tmp_path / name) for name in ("query", "document"))
    query.max_seq_length, document.max_seq_length = 4, 7
    model = router_of(query, document)
    cache = EmbeddingCache.build(model, corpus, tmp_path / "cache", progress=False)
    expected = model.encode_document(corpus.texts(range(200)), convert_to_tensor=True)
    torch.testing.assert_close(cache[range(200)], expected, atol=1e-5, rtol=1e-5)
    loss = CorrectedMultipleNegativesLoss(model, corpus, cache, num_negatives=4, corrector="ridge")
    arguments = CorrectorTrainingArguments(
        output_dir=str(tmp_path / "out"),
        router_mapping={"anchor": "query", "positive": "document"},
        per_device_train_batch_size=16,
        max_steps=5,
        learning_rate=1e-3,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    widths: dict[str, set[int]] = {"query": set(), "document": set()}
    model.register_forward_pre_hook(
        lambda module, inputs: widths[inputs[0]["task"]].add(inputs[0]["input_ids"].shape[1])
    )
    before = weights(model)
    CorrectorTrainer(model, arguments, corpus=corpus, loss=loss).train()
    assert widths == {"query": {4}, "document": {7}}
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert any("query" in name for name in moved) and any("document" in name for name in moved)
    model.max_seq_length = 6
    with pytest.raises(InputError, match="max_seq_length"):
        CorrectedMultipleNegativesLoss(model, corpus, cache, num_negatives=4)
