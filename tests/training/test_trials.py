"""What one run leaves to the next, where a trainer makes its model anew for each: nothing."""

import signal

import pytest
import torch
from conftest import make_static_model
from sentence_transformers.sentence_transformer.losses import CoSENTLoss, MatryoshkaLoss
from support import runs
from transformers import TrainerCallback

from st_corrector import (
    CorpusRetrievalEvaluator,
    CorrectedMultipleNegativesLoss,
    CorrectorTrainer,
    EmbeddingCache,
    InputError,
)


class Seen(TrainerCallback):
    """What each run's loss is when it begins."""

    def __init__(self) -> None:
        self.runs: list[dict] = []
        self.trainer: CorrectorTrainer | None = None

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        (loss,) = self.trainer._corrected_losses().values()
        self.runs.append(
            {
                "loss": loss,
                "num_negatives": loss.negatives.num_negatives,
                "scale": loss.scale,
                "sampler": loss.negatives.sampler,
                "corrector": loss.corrected.corrector.name,
                "candidates": loss.negatives.candidates,
                "steps": loss.corrected.search.steps,
                "written": len(loss.corrected.search.overlay),
                "encoded": loss.targets_encoded,
                "diverged": loss.corrected.diverged,
                "policy": self.trainer.guard.policy,
                "model": loss.model is kwargs["model"],
            }
        )


def arguments(tmp_path, **settings):
    own = {"learning_rate": 0.02, "seed": 1, "save_strategy": "no", "logging_steps": 1, "use_cpu": True}
    return runs.arguments(tmp_path / "out", **{**own, **settings})


FUNCTIONS = ("a function", "a function of a wrapper", "functions by data set")


def model_init(trial=None):
    return make_static_model()


def run(trainer):
    """The weights, the corrector and the log of one run."""
    trainer.train()
    (loss,) = trainer._corrected_losses().values()
    log = [entry["task_loss"] for entry in trainer.state.log_history if "task_loss" in entry]
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}, loss, log


def own_loss(corpus, folder, **settings):
    def make(model):
        cache = EmbeddingCache.build(model, corpus, folder, progress=False)
        return CorrectedMultipleNegativesLoss(model, corpus, cache, num_negatives=4, **settings)

    return make


@pytest.mark.parametrize(
    "kind",
    ["arguments", *(pytest.param(kind, marks=pytest.mark.long) for kind in FUNCTIONS)],
)
def test_a_run_with_a_new_model_is_as_if_it_were_the_first(corpus, tmp_path, kind):
    settings = {"refresh_every": 4, "probe_every": 3} if kind == "arguments" else {}
    make = own_loss(corpus, tmp_path / "cache")
    given = {
        "arguments": {},
        "a function": {"loss": make},
        "a function of a wrapper": {"loss": lambda model: MatryoshkaLoss(model, make(model), [24, 8])},
        "functions by data set": {"loss": {"nq": make}, "train_dataset": {"nq": corpus.pairs("train")}},
    }[kind]
    seen = Seen()
    trainer = CorrectorTrainer(
        None, arguments(tmp_path, **settings), corpus=corpus, model_init=model_init, callbacks=[seen], **given
    )
    seen.trainer = trainer
    first, loss, log = run(trainer)
    assert loss.corrected.search.steps and loss.targets_encoded and len(log) == 6
    record, steps = trainer.recorder.record, loss.corrected.search.steps
    loss.corrected.diverged = True
    loss.corrected.restart(diverged=True)
    trainer.guard.steps_skipped = 3
    second, again, repeated = run(trainer)
    assert all(torch.equal(value, second[name]) for name, value in first.items()) and repeated == log
    assert any(not torch.equal(value, second[name]) for name, value in make_static_model().state_dict().items())
    assert again is not loss and again.corrected.search.steps == steps and trainer.guard.steps_skipped == 0
    recorded = trainer.recorder.record
    assert recorded is not record and not any(each.diverged for each in recorded.losses.values())
    assert trainer.model.model_card_data.record is recorded
    told = [{name: value for name, value in each.items() if name != "loss"} for each in seen.runs]
    assert told[0] == told[1] and told[0]["model"]
    assert (told[1]["steps"], told[1]["written"], told[1]["encoded"], told[1]["diverged"]) == (0, 0, 0, False)
    if kind == "arguments":
        assert loss.corrected.targets_reencoded == again.corrected.targets_reencoded == 200, (
            "refreshed once in each run"
        )
        assert repeated and recorded.log[0]["fidelity"] == record.log[0]["fidelity"]
    # A trainer of its own gets there too.
    alone = CorrectorTrainer(None, arguments(tmp_path, **settings), corpus=corpus, model_init=model_init, **given)
    assert all(torch.equal(value, second[name]) for name, value in run(alone)[0].items())


def test_each_models_cache_is_its_own(corpus, tmp_path):
    seeds = iter([0, 0, 0, 1, 0])
    path = tmp_path / "caches"
    trainer = CorrectorTrainer(
        None,
        arguments(tmp_path, cache_path=str(path)),
        corpus=corpus,
        model_init=lambda: make_static_model(next(seeds)),
    )
    caches = []
    for _ in range(3):
        trainer.train()
        (loss,) = trainer._corrected_losses().values()
        caches.append(loss.corrected.search.cache.path)
        drift = next(entry["drift"] for entry in trainer.state.log_history if "drift" in entry)
        assert abs(drift) < 1e-5, "at its first step the cache is the model's"
    assert caches[0] == caches[2] != caches[1]
    assert len(list(path.iterdir())) == 2


def test_a_search_space_reaches_the_loss(corpus, tmp_path):
    optuna = pytest.importorskip("optuna", reason="a hyperparameter search needs optuna or the like")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    corpus.hold_out(40)
    space = [
        {"num_negatives": 2, "scale": 1.0, "sampler": "uniform", "corrector": "ridge", "candidates": 5},
        {"num_negatives": 12, "scale": 50.0, "sampler": "gumbel", "corrector": "mlp", "candidates": 13},
        {"num_negatives": 2, "scale": 1.0, "sampler": "uniform", "corrector": "ridge", "candidates": 5},
    ]
    policies = ["skip", "stop", "skip"]
    seen, objectives = Seen(), []
    trainer = CorrectorTrainer(
        None,
        arguments(tmp_path, max_steps=3),
        corpus=corpus,
        model_init=model_init,
        evaluator=CorpusRetrievalEvaluator(corpus, "dev"),
        callbacks=[seen],
    )
    seen.trainer = trainer

    def objective(metrics):
        objectives.append(metrics["eval_ndcg@10"])
        return metrics["eval_ndcg@10"]

    # One study cannot change what may be suggested: each trial has its own.
    for number in range(3):
        values = {**space[number], "non_finite": policies[number]}
        trainer.hyperparameter_search(
            hp_space=lambda trial, values=values: {
                name: trial.suggest_categorical(name, [value]) for name, value in values.items()
            },
            n_trials=1,
            compute_objective=objective,
            direction="maximize",
        )
    assert [{name: each[name] for name in space[0]} for each in seen.runs] == space
    assert [each["policy"] for each in seen.runs] == policies
    assert [each["steps"] for each in seen.runs] == [0, 0, 0] and all(each["model"] for each in seen.runs)
    assert objectives[0] == objectives[2], "a trial depends on its own arguments and seed alone"
    assert trainer.recorder.record.losses[""].settings["num_negatives"] == 2


def test_memory_is_planned_for_the_trials_own_arguments(corpus, tmp_path, capsys):
    optuna = pytest.importorskip("optuna", reason="a hyperparameter search needs optuna or the like")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    trainer = CorrectorTrainer(
        None, arguments(tmp_path, max_steps=1), corpus=corpus, model_init=model_init,
        evaluator=CorpusRetrievalEvaluator(corpus, "train"),
    )  # fmt: skip
    trainer.hyperparameter_search(
        hp_space=lambda trial: {"num_negatives": trial.suggest_categorical("num_negatives", [11])},
        n_trials=1,
        direction="maximize",
        compute_objective=lambda metrics: metrics["eval_ndcg@10"],
    )
    assert "top 11 of 16 queries" in capsys.readouterr().out


def test_a_loss_that_was_made_before_is_refused_beside_model_init(corpus, tmp_path):
    model = make_static_model()
    loss = own_loss(corpus, tmp_path / "cache")(model)
    for given in (loss, MatryoshkaLoss(model, loss, [24, 8])):
        with pytest.raises(InputError, match=r"pass loss=lambda model: CorrectedMultipleNegativesLoss\(model, …\)"):
            CorrectorTrainer(None, arguments(tmp_path), corpus=corpus, model_init=model_init, loss=given)
    # Losses that keep nothing may come ready-made.
    CorrectorTrainer(
        None, arguments(tmp_path), model_init=model_init, loss=CoSENTLoss(model), train_dataset=corpus.pairs("train")
    )


class TellToStop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == 2:
            signal.raise_signal(signal.SIGTERM)


def test_a_run_with_a_new_model_answers_sigterm_with_a_checkpoint_and_goes_on_from_it(corpus, tmp_path):
    settings = arguments(tmp_path, save_strategy="steps", save_steps=500)
    trainer = CorrectorTrainer(None, settings, corpus=corpus, model_init=model_init, callbacks=[TellToStop()])
    with pytest.raises(SystemExit) as stopped:
        trainer.train()
    assert stopped.value.code == 128 + signal.SIGTERM and (tmp_path / "out" / "checkpoint-2").is_dir()
    resumed = CorrectorTrainer(None, settings, corpus=corpus, model_init=model_init)
    resumed.train(resume_from_checkpoint=True)
    (loss,) = resumed._corrected_losses().values()
    assert resumed.state.global_step == 6 and loss.corrected.search.steps == 6
    whole = CorrectorTrainer(None, arguments(tmp_path / "whole"), corpus=corpus, model_init=model_init)
    whole.train()
    weights = whole.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in resumed.model.state_dict().items())


def test_without_model_init_a_second_run_goes_on_with_the_same_loss(corpus, tmp_path):
    trainer = CorrectorTrainer(make_static_model(), arguments(tmp_path), corpus=corpus)
    _, loss, _ = run(trainer)
    assert run(trainer)[1] is loss and loss.corrected.search.steps == 12
