"""A run that was interrupted and resumed is the run that was not."""

import json
import signal

import numpy as np
import pytest
import torch
from conftest import make_static_model
from support.launching import launch, results
from support.runs import Steps, arguments, difference, trainer_of

from st_corrector import (
    CheckpointError,
    CorrectedMultipleNegativesLoss,
    CorrectorTrainer,
    EmbeddingCache,
    InputError,
)
from st_corrector.training.checkpoint import FOLDER, fault_of, load_losses

# What has something to lose: learnt by moments or by normal equations, drawn by chance, written back, re-embedded.
RESUMED = [
    "mlp",
    "ridge, gumbel, int8",
    "uniform, stale warm-up",
    "in-batch warm-up",
    "shortlist",
    "gradient cache",
    "accumulated",
    "verified, with background and margin",
]


def killed_and_resumed(folder, case, kill_at, save_every, processes=1, resumed_by=None):
    arguments = ["--cases", json.dumps([case]), "--save_every", save_every]
    done = launch(folder, processes, *arguments, "--kill_at", kill_at, check=False)
    assert done.returncode == (-signal.SIGKILL if processes == 1 else 1), done.stderr[-3000:]
    assert "SIGKILL" in done.stderr or processes == 1, done.stderr[-3000:]
    assert not list(folder.rglob("results-*")), "it did not get to its end"
    launch(folder, resumed_by or processes, *arguments, "--name", "resumed", "--resume")
    resumed = results(folder, resumed_by or processes, "resumed")
    for run in resumed:
        assert run["began_at"] == kill_at // save_every * save_every, "it did go on, not start anew"
    return resumed


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_run_killed_at_any_step_goes_on_where_it_was(tmp_path):
    generator, whole = np.random.default_rng(0), {}
    for number in range(20):
        case = RESUMED[number % len(RESUMED)]
        if case not in whole:
            launch(tmp_path / case, 1, "--cases", json.dumps([case]))
            whole[case] = results(tmp_path / case, 1)[0]
        save_every = int(generator.integers(1, 7))
        kill_at = int(generator.integers(save_every, 20))
        (resumed,) = killed_and_resumed(tmp_path / f"killed-{number}", case, kill_at, save_every)
        assert not difference(whole[case], resumed)


@pytest.mark.long
@pytest.mark.parametrize("case", [RESUMED[0], "own pairs, taught", "several data sets"])
def test_two_killed_processes_go_on_where_they_were(tmp_path, case):
    """In the middle of the second epoch."""
    launch(tmp_path / "whole", 2, "--cases", json.dumps([case]))
    whole = results(tmp_path / "whole", 2)
    for one, other in zip(whole, killed_and_resumed(tmp_path / "two", case, 17, 8, processes=2), strict=True):
        assert not difference(one, other)


@pytest.mark.long
def test_one_process_goes_on_where_two_were(tmp_path):
    case = RESUMED[0]
    (alone,) = killed_and_resumed(tmp_path / "one", case, 12, 5, processes=2, resumed_by=1)
    launch(tmp_path / "reference", 1, "--cases", json.dumps([case]))
    reference = results(tmp_path / "reference", 1)[0]
    reference["selected"] = reference["selected"][-len(alone["selected"]) :]
    alone["log"] = [entry for entry in alone["log"] if entry["step"] > 20 - len(alone["selected"])]
    reference["log"] = reference["log"][-len(alone["log"]) :]
    for name, value in reference["model"].items():
        torch.testing.assert_close(alone["model"][name], value, atol=1e-4, rtol=1e-3)
    for ours, theirs in zip(alone["selected"], reference["selected"], strict=True):
        assert torch.equal(ours, theirs)
    assert alone["steps"] == reference["steps"] == 20


def test_a_checkpoint_whose_writing_was_cut_short_is_passed_over(corpus, tmp_path, caplog):
    whole = trainer_of(corpus, tmp_path)
    whole.train()
    expected = {name: value.clone() for name, value in whole.model.state_dict().items()}
    assert [fault_of(tmp_path / f"checkpoint-{step}") for step in (2, 4, 6)] == [None] * 3
    for step in (4, 6):
        (tmp_path / f"checkpoint-{step}" / FOLDER / "digests.json").unlink()  # written after all that is cut here
    state = tmp_path / "checkpoint-6" / "trainer_state.json"
    state.write_text(state.read_text()[:100])
    (tmp_path / "checkpoint-4" / FOLDER / "loss-00000-of-00001.safetensors").rename(
        tmp_path / "checkpoint-4" / FOLDER / "loss-00000-of-00002.safetensors"
    )
    resumed = trainer_of(corpus, tmp_path)
    steps = Steps()
    resumed.add_callback(steps)
    resumed.train(resume_from_checkpoint=True)
    assert "checkpoint-6 lacks trainer_state.json" in caplog.text
    assert "checkpoint-4 lacks st_corrector/loss-00001-of-00002.safetensors" in caplog.text
    assert steps.taken == [2, 3, 4, 5]
    for name, value in expected.items():
        assert torch.equal(resumed.model.state_dict()[name], value)
    for step in (2, 4, 6):
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").unlink()
    with pytest.raises(CheckpointError, match=r"No checkpoint in .* is complete and undamaged: checkpoint-6 lacks "):
        trainer_of(corpus, tmp_path).train(resume_from_checkpoint=True)


def test_a_finished_run_that_is_resumed_stays_as_it_is(corpus, tmp_path):
    whole = trainer_of(corpus, tmp_path, lr_scheduler_type="constant")
    whole.train()
    resumed, steps = trainer_of(corpus, tmp_path, lr_scheduler_type="constant"), Steps()
    resumed.add_callback(steps)
    resumed.train(resume_from_checkpoint=True)
    assert not steps.taken and resumed.state.global_step == 6
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value)
    (ours,), (theirs,) = (trainer._corrected_losses().values() for trainer in (whole, resumed))
    for name, value in ours.corrected.corrector.state_dict().items():
        assert torch.equal(theirs.corrected.corrector.state_dict()[name], value)


def test_the_best_step_brings_its_corrector_back(corpus, tmp_path):
    scores = iter([0.1, 0.9, 0.2])
    settings = {"eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "eval_score"}
    settings |= {"load_best_model_at_end": True, "greater_is_better": True}
    trainer = CorrectorTrainer(
        make_static_model(), arguments(tmp_path, **settings), corpus=corpus, eval_dataset=corpus.pairs("train")
    )
    states = []

    def evaluate(*args, **kwargs):
        metrics = {"eval_score": next(scores)}
        states.append({name: value.clone() for name, value in loss.corrected.corrector.state_dict().items()})
        trainer.callback_handler.on_evaluate(trainer.args, trainer.state, trainer.control, metrics)
        return metrics

    (loss,) = trainer._corrected_losses().values()
    trainer.evaluate = evaluate
    trainer.train()
    assert trainer.state.best_global_step == 4
    state = loss.corrected.corrector.state_dict()
    assert all(torch.equal(value, states[1][name]) for name, value in state.items())
    assert any(not torch.equal(value, states[2][name]) for name, value in state.items())
    assert loss.corrected.search.steps == 4
    # What the run has cost is what all of its steps have.
    last = [entry for entry in trainer.state.log_history if "targets_encoded" in entry][-1]
    (record,) = trainer.recorder.record.losses.values()
    assert loss.targets_encoded == record.counts["targets_encoded"] == last["targets_encoded"] > 0


def test_a_checkpoint_of_something_else_is_refused(corpus, tmp_path):
    trainer_of(corpus, tmp_path).train()
    with pytest.raises(InputError, match=r"corrector: .MLPCorrector.* there, .RidgeCorrector.* here"):
        trainer_of(corpus, tmp_path, corrector="ridge").train(resume_from_checkpoint=True)
    loss = CorrectedMultipleNegativesLoss(
        make_static_model(), corpus, EmbeddingCache.from_tensor(torch.randn(200, 24)), num_negatives=4
    )
    with pytest.raises(InputError, match="cache, weights: there, and not here"):
        load_losses({"loss": loss}, tmp_path / "checkpoint-6")
    with pytest.raises(CheckpointError, match="holds no state of the corrector"):
        load_losses({"other": loss}, tmp_path / "checkpoint-6")
    file = tmp_path / "checkpoint-6" / FOLDER / "loss-00000-of-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"loss-00000-of-00001\.safetensors is damaged"):
        load_losses({"loss": loss}, tmp_path / "checkpoint-6")


def test_the_state_is_not_pushed(corpus, tmp_path):
    trainer = trainer_of(corpus, tmp_path)
    trainer.train()
    checkpoint = tmp_path / "checkpoint-6"
    assert (checkpoint / FOLDER).is_dir() and FOLDER in trainer._checkpoint_push_skip_names(str(checkpoint))
