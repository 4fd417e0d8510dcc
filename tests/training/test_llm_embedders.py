"""The whole path of an embedder made of a language model, at tiny size with random weights: instructions, weights in
bfloat16, adapters, gradient checkpointing; cached, trained, resumed, described and pushed.
"""

import pytest
import torch
from datasets import Dataset
from huggingface_hub import HfApi, ModelCard
from sentence_transformers.base.modules import Transformer
from support.encoders import CHECKPOINTS, ENCODERS
from support.runs import arguments, loss_of
from support.states import weights

from st_corrector import CorrectorTrainer, InputError
from st_corrector.data.encoding import DocumentEncoder
from st_corrector.data.tokens import TokenizedCorpus, are_equal

peft = pytest.importorskip("peft", reason="adapters need peft")
KINDS = ("a decoder, last token", "Gemma", "ModernBERT", "T5's encoder")
FLATTENED = ("a decoder, flattened", "RoBERTa, flattened", "ModernBERT, flattened")


def embedder(name, folder, in_float32=True):
    """Frozen weights in bfloat16, as they are published, and adapters in float32 on all linear layers."""
    model = ENCODERS[name].make(folder)
    if not model.prompts.get("query"):
        model.prompts = {"query": "query : ", "document": ""}
    model.to(torch.bfloat16)
    torch.manual_seed(0)
    model.add_adapter(
        peft.LoraConfig(peft_type="LORA", r=8, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear")
    )
    if in_float32:
        for each in model.transformers_model.parameters():
            each.data = each.data.float() if each.requires_grad else each.data
    return model


def trainer_of(name, corpus, folder, at="out", **settings):
    how = {
        "learning_rate": 0.01,
        "gradient_checkpointing": CHECKPOINTS,
        "max_steps": 16,
        "save_steps": 8,
        "logging_steps": 1,
    }
    cache = {"cache_path": str(folder / "cache"), "cache_dtype": "bfloat16"}
    model = embedder(name, folder)
    return CorrectorTrainer(model, arguments(folder / at, **{**how, **cache, **settings}), corpus=corpus)


@pytest.mark.parametrize("name", [*KINDS[:2], *(pytest.param(name, marks=pytest.mark.long) for name in KINDS[2:])])
def test_from_cache_to_a_resumed_run(name, corpus, tmp_path, caplog):
    trainer = trainer_of(name, corpus, tmp_path)
    before, loss = weights(trainer.model), loss_of(trainer)
    assert trainer.data_collator.prompts["anchor"] == trainer.model.prompts["query"]
    transformer = next(module for module in trainer.model.modules() if isinstance(module, Transformer))
    dtypes = {parameter.dtype for parameter in transformer.model.parameters() if not parameter.requires_grad}
    assert dtypes == {torch.bfloat16} and loss.corrected.cache.dtype == torch.bfloat16
    assert {each.dtype for each in transformer.parameters() if each.requires_grad} == {torch.float32}
    behind = [each.dtype for module in trainer.model for each in module.parameters() if module is not transformer]
    assert isinstance(loss.encoder.tokens, TokenizedCorpus) and ("Weights in" in caplog.text) == bool(behind)
    trainer.train()
    assert transformer.model.is_gradient_checkpointing == CHECKPOINTS
    moved = {name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])}
    assert moved and all("lora_" in name or "linear" in name for name in moved)
    log = [entry["task_loss"] for entry in trainer.state.log_history if "task_loss" in entry]
    assert sum(log[-4:]) < sum(log[:4]) - 0.5, log
    assert loss.corrected.targets_reencoded == 0 and len(loss.corrected.search.overlay) > 100
    if name == "T5's encoder" and not CHECKPOINTS:
        return  # a sentence-transformers that old resumes a whole T5 in the place of its encoder
    # Resumed, it is the run that was not interrupted.
    resumed = trainer_of(name, corpus, tmp_path)
    resumed.train(str(tmp_path / "out" / "checkpoint-8"))
    theirs = weights(resumed.model)
    for parameter, value in weights(trainer.model).items():
        torch.testing.assert_close(theirs[parameter], value, atol=1e-6, rtol=1e-5)
    state = loss_of(resumed).corrected.corrector.state_dict()
    for key, value in loss.corrected.corrector.state_dict().items():
        torch.testing.assert_close(state[key], value, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("dtype", "share"), [(torch.bfloat16, 256), (torch.float16, 2048), (torch.float32, None)])
def test_weights_that_training_rounds_away_are_told(dtype, share, corpus, tmp_path, caplog):
    model = ENCODERS["a decoder, last token"].make(tmp_path).to(dtype)
    CorrectorTrainer(model, arguments(tmp_path / "out"), corpus=corpus)
    told = f"Weights in {dtype} are trained, in which most updates smaller than 1/{share} of a weight are lost"
    assert (told in caplog.text) == (share is not None)
    caplog.clear()
    CorrectorTrainer(embedder("ModernBERT", tmp_path, in_float32=False), arguments(tmp_path / "out"), corpus=corpus)
    assert "Weights in torch.bfloat16 are trained" in caplog.text, "adapters are of the weights' dtype"
    one = torch.ones((), dtype=dtype)
    assert share is None or (one + 0.99 / share == one and one + 1.01 / share != one and one - 0.49 / share == one)


@pytest.mark.skipif(not CHECKPOINTS, reason="sentence-transformers is too old for this transformers")
@pytest.mark.parametrize("name", KINDS[:1])
def test_checkpointing_changes_no_gradient(name, corpus, tmp_path):
    plain, checkpointed = (
        trainer_of(name, corpus, tmp_path, str(on), gradient_checkpointing=on, save_strategy="no")
        for on in (False, True)
    )
    for trainer in (plain, checkpointed):
        trainer.train()
    theirs = weights(checkpointed.model)
    for parameter, value in weights(plain.model).items():
        torch.testing.assert_close(theirs[parameter], value, atol=1e-3, rtol=1e-2)


def test_adapters_alone_are_pushed_with_the_card(hub, corpus, tmp_path):
    corpus.name = "made-up words"
    trainer = trainer_of(KINDS[0], corpus, tmp_path, hub_model_id="tester/embedder", save_strategy="no")
    trainer.train()
    trainer.push_to_hub()
    files = HfApi().list_repo_files("tester/embedder")
    weights_files = [name for name in files if name.endswith(".safetensors") and "corrector" not in name]
    assert [name.rpartition("/")[2] for name in weights_files] == ["adapter_model.safetensors"], files
    card = str(ModelCard.load("tester/embedder"))
    assert "made-up words" in card and "corrector" in card.lower()


# ---------------------------------------------------------------------- texts one after the other


@pytest.mark.parametrize("name", FLATTENED)
def test_flattened_texts_are_kept_as_token_ids(name, corpus, tmp_path):
    """Their ids are on disk, and what a step makes of them is what the model would make of the texts."""
    model = ENCODERS[name].make(tmp_path)
    encoder = DocumentEncoder(model, corpus)
    assert isinstance(encoder.tokens, TokenizedCorpus) and encoder.tokens.layout.flattener is not None
    for rows in ([5], [3, 100, 7], list(range(40))):
        features = encoder.features(rows)
        expected = model.preprocess(corpus.texts(rows), prompt=encoder.prompt, task="document")
        assert are_equal({key: features[key] for key in expected}, dict(expected)) and "cu_seq_lens_q" in features
    assert len(encoder.encode(model, range(40)).unique(dim=0)) > 38


def test_a_flattened_model_says_what_the_padded_one_says(corpus, tmp_path):
    flattened, padded = (ENCODERS[name].make(tmp_path) for name in ("a decoder, flattened", "a decoder, last token"))
    ours, theirs = (DocumentEncoder(model, corpus).encode(model, range(60)) for model in (flattened, padded))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def of_own_data(name, corpus, folder, mini_batch_size, shift=0):
    """A trainer with a negative of one's own beside each positive, which is ``shift`` rows from where it should be."""
    pairs = corpus.pairs("train")
    positives = pairs["positive"][shift:] + pairs["positive"][:shift]
    negatives = corpus.texts([(row + 40) % len(corpus) for row, _ in pairs["label"]])
    own = {"anchor": pairs["anchor"][:], "positive": positives, "negative": negatives, "label": pairs["label"][:]}
    how = {"save_strategy": "no", "max_steps": 3, "mini_batch_size": mini_batch_size, "logging_steps": 1}
    how["num_negatives"] = 0  # two rows may score the same but for rounding
    how |= {"learning_rate": 0.02, "optim": "sgd", "cache_path": str(folder / name / "cache")}
    settings = arguments(folder / name / "out", **how)
    return CorrectorTrainer(ENCODERS[name].make(folder), settings, corpus=corpus, train_dataset=Dataset.from_dict(own))


@pytest.mark.parametrize("mini_batch_size", [None, 5])
def test_a_flattened_model_is_trained_as_the_padded_one(mini_batch_size, corpus, tmp_path):
    flattened, padded = (
        of_own_data(name, corpus, tmp_path, mini_batch_size)
        for name in ("a decoder, flattened", "a decoder, last token")
    )
    before, losses = weights(flattened.model), []
    for trainer in (flattened, padded):
        trainer.train()
        losses.append([entry["task_loss"] for entry in trainer.state.log_history if "task_loss" in entry])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    theirs = weights(padded.model)
    assert max(float((value - before[name]).abs().max()) for name, value in theirs.items()) > 1e-3
    for name, value in weights(flattened.model).items():
        torch.testing.assert_close(theirs[name], value, atol=2e-5, rtol=1e-4)


def test_flattened_positives_are_compared_with_their_rows(corpus, tmp_path):
    with pytest.raises(InputError, match="is not the text of corpus row"):
        of_own_data("a decoder, flattened", corpus, tmp_path, None, shift=1).train()
