"""Pairs that are streamed instead of held, for training and for evaluation."""

import pytest
import sentence_transformers
from conftest import make_bert_model, make_static_model
from datasets import IterableDatasetDict
from packaging.version import Version
from support.runs import arguments, trainer_of

from st_corrector import (
    CorrectedMultipleNegativesLoss,
    CorrectorTrainer,
    EmbeddingCache,
    InputError,
)


def in_constructor(streamed, evaluate):
    return evaluate(eval_dataset=streamed)(), "eval_loss"


def in_a_dict(streamed, evaluate):
    return evaluate(eval_dataset={"dev": streamed})(), "eval_dev_loss"


def in_a_dict_of_streams(streamed, evaluate):
    return evaluate(eval_dataset=IterableDatasetDict({"dev": streamed}))(), "eval_dev_loss"


def by_its_name(streamed, evaluate):
    return evaluate(eval_dataset={"dev": streamed})(eval_dataset="dev"), "eval_loss"


def when_asked(streamed, evaluate):
    return evaluate()(eval_dataset=streamed), "eval_loss"


def when_asked_in_a_dict(streamed, evaluate):
    return evaluate()(eval_dataset={"dev": streamed}), "eval_dev_loss"


WAYS = [in_constructor, in_a_dict, in_a_dict_of_streams, by_its_name, when_asked]
if Version(sentence_transformers.__version__) > Version("6.0.1"):  # whose trainer takes no dictionary there
    WAYS.append(when_asked_in_a_dict)


@pytest.mark.parametrize("encoder", ["static", "bert"])
@pytest.mark.parametrize("labels", [True, False])
def test_streamed_evaluation_is_evaluation(corpus, tmp_path, encoder, labels):
    model = make_static_model() if encoder == "static" else make_bert_model(tmp_path)
    cache = EmbeddingCache.build(model, corpus, tmp_path / "cache", progress=False)
    loss = CorrectedMultipleNegativesLoss(model, corpus, cache, num_negatives=4)
    chosen = arguments(tmp_path / "out", per_device_eval_batch_size=200)
    pairs = corpus.pairs("train") if labels else corpus.pairs("train").remove_columns("label")

    def evaluate(**data):
        return CorrectorTrainer(model, chosen, corpus=corpus, loss=loss, **data).evaluate

    expected = evaluate(eval_dataset=pairs)()["eval_loss"]
    for way in WAYS:
        metrics, name = way(pairs.to_iterable_dataset(), evaluate)
        assert metrics[name] == pytest.approx(expected, abs=1e-5), way.__name__


def test_a_run_on_streamed_pairs_is_evaluated_on_streamed_pairs(corpus, tmp_path):
    settings = {"save_strategy": "no", "max_steps": 4, "eval_strategy": "steps", "eval_steps": 2}
    pairs = corpus.pairs("train").to_iterable_dataset()
    data = {"corpus": corpus, "train_dataset": pairs, "eval_dataset": pairs}
    with pytest.raises(InputError, match="'dispatch_batches': False"):
        CorrectorTrainer(make_static_model(), arguments(tmp_path, **settings), **data)
    settings["accelerator_config"] = {"dispatch_batches": False}
    trainer = CorrectorTrainer(make_static_model(), arguments(tmp_path, **settings), **data)
    trainer.train()
    assert sum("eval_loss" in entry for entry in trainer.state.log_history) == 2
    assert trainer.accelerator.dispatch_batches is False


def test_evaluation_leaves_the_setting_as_it_is(corpus, tmp_path):
    trainer = trainer_of(corpus, tmp_path)
    before = trainer.accelerator.dispatch_batches
    trainer.evaluate(corpus.pairs("train").to_iterable_dataset())
    assert trainer.accelerator.dispatch_batches is before
