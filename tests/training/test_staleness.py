"""What is measured of drift, correction and selection, and how it gets into the trainer's log."""

import time

import pytest
import torch
import torch.nn.functional as F
from conftest import make_static_model
from support import runs
from transformers import TrainerCallback

from st_corrector import (
    CorrectedMultipleNegativesLoss,
    CorrectorTrainer,
    EmbeddingCache,
    FalseNegativeFilter,
    FidelityCallback,
    InputError,
    RefreshCallback,
)
from st_corrector.losses.step_metrics import StepMetrics
from st_corrector.search.fidelity import overlap_at_k, selection_fidelity, staleness


def test_staleness_of_vectors_with_known_angles():
    fresh = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    cached = torch.tensor([[0.0, 3.0], [0.0, 5.0]])  # at 90° and 0°
    corrected = torch.tensor([[1.0, 3.0**0.5], [0.0, 1.0]])  # at 60° and 0°, the first 2 away
    measured = staleness(cached, corrected, fresh)
    expected = {"drift": 0.5, "corrected_error": 0.25, "corrected_mse": (1 + 3) / 4 / 2}
    assert {name: value.item() for name, value in measured.items()} == pytest.approx(expected)


def test_overlap_and_fidelity():
    assert overlap_at_k(torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([[3, 9, 1], [7, 8, 9]])).tolist() == [
        pytest.approx(2 / 3),
        0.0,
    ]
    fresh = torch.eye(4)
    queries = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    assert selection_fidelity(queries, fresh, fresh, 2) == 1
    assert selection_fidelity(queries, fresh.flip(0), fresh, 2) == 0
    assert selection_fidelity(queries, fresh[[0, 3, 2, 1]], fresh, 2) == 0.5
    assert selection_fidelity(queries, fresh.flip(0), fresh, 9) == 1, "no more than there is"


def test_metrics_are_means_over_the_steps_that_have_them():
    metrics = StepMetrics()
    metrics.add(a=torch.tensor(1.0), b=2)
    metrics.add(a=torch.tensor(4.0))
    for _ in range(2):
        with metrics.timed("sleep", torch.device("cpu")):
            time.sleep(0.02)
    popped = metrics.pop()
    assert popped.pop("seconds_sleep") >= 0.04
    assert popped == {"a": 2.5, "b": 2.0} and metrics.pop() == {}


def arguments(folder, **settings):
    own = {"per_device_train_batch_size": 20, "max_steps": 12, "logging_steps": 4, "save_strategy": "no"}
    return runs.arguments(folder, **{**own, **settings})


class Reporter(TrainerCallback):
    """Sees what an integration such as TensorBoard's sees: it comes before the user's callbacks."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs, **kwargs):
        self.logs.append(dict(logs))


def train(corpus, folder, callbacks=lambda loss: [], trainer=CorrectorTrainer, arguments=arguments, **settings):
    torch.manual_seed(0)
    model = make_static_model()
    cache = EmbeddingCache.build(model, corpus, folder / "cache", progress=False)
    loss = CorrectedMultipleNegativesLoss(model, corpus, cache, num_negatives=4, **settings)
    reporter = Reporter()
    trainer = trainer(
        model=model, args=arguments(folder), train_dataset=corpus.pairs("train"), loss=loss, callbacks=callbacks(loss)
    )
    trainer.callback_handler.callbacks.insert(0, reporter)
    trainer.train()
    return loss, [entry for entry in reporter.logs if "loss" in entry], trainer


def test_the_trainer_logs_what_the_steps_measured(corpus, tmp_path):
    rules = FalseNegativeFilter(relative_margin=0.05)
    loss, logs, trainer = train(
        corpus, tmp_path, corrector="ridge", write_back=True, candidates=8, background_targets=3, false_negatives=rules
    )
    assert [entry["step"] for entry in trainer.state.log_history if "drift" in entry] == [4, 8, 12]
    drift = [entry["drift"] for entry in logs]
    assert 0 < drift[0] < drift[1] < drift[2], "the encoder moves away from the cache"
    for entry in logs:
        assert {"corrected_error", "corrected_mse", "hardness", "harder_than_positive", "age", "seen"} <= entry.keys()
        assert entry["seconds_select"] > 0 and entry["seconds_encode"] > 0 and entry["seconds_correct"] > 0
        assert entry["loss"] == pytest.approx(entry["task_loss"] + entry["correction_loss"], abs=2e-3)
        assert entry["removed_by_relative_margin"] > 0
        assert 0 <= entry["pull_back_residual"] < 1e-4 and entry["pull_back_damped"] == 0
    # At the second log most rows have been encoded before, and are corrected better than those that have not.
    assert logs[1]["corrected_error"] < logs[1]["corrected_error_unseen"] < logs[1]["drift"]
    assert 0 < logs[0]["seen"] < logs[-1]["seen"] <= 1
    assert logs[-1]["targets_encoded"] == loss.targets_encoded > 12 * 20
    assert logs[-1]["targets_verified"] == loss.targets_verified > 0
    assert logs[-1]["targets_reencoded"] == loss.corrected.targets_reencoded == 12 * 3, (
        "background targets are re-encoded"
    )


def test_age_is_counted_from_when_a_row_was_encoded(corpus, tmp_path):
    _, stale, _ = train(corpus, tmp_path / "stale", corrector="identity", write_back=False)
    # Steps 0 … 3 choose by a cache that is 0 … 3 steps old, steps 4 … 7 by one of 4 … 7.
    assert [entry["age"] for entry in stale] == [1.5, 5.5, 9.5] and all(entry["seen"] == 0 for entry in stale)
    _, written, _ = train(corpus, tmp_path / "written", corrector="identity", write_back=True)
    assert all(new["age"] < old["age"] for new, old in zip(written[1:], stale[1:], strict=True))
    # Everything is encoded at every step: at step t all vectors were computed at step t − 1.
    _, everything, _ = train(corpus, tmp_path / "all", corrector="identity", background_targets=4000)
    assert [entry["age"] for entry in everything] == [0.75, 1.0, 1.0]
    _, fresh, _ = train(corpus, tmp_path / "fresh", lambda loss: [RefreshCallback(loss, every=1)], corrector="identity")
    assert all(entry["age"] == 0 and entry["drift"] < 1e-5 for entry in fresh[1:])


def test_probing_costs_what_it_says_and_changes_nothing(corpus, tmp_path):
    def probe(loss):
        return [FidelityCallback(loss, every=2, queries=30, targets=50)]

    plain, logs, _ = train(corpus, tmp_path / "plain", corrector="ridge", sampler="gumbel")
    probed, with_fidelity, trainer = train(corpus, tmp_path / "probed", probe, corrector="ridge", sampler="gumbel")
    assert [entry["loss"] for entry in logs] == [entry["loss"] for entry in with_fidelity]
    for one, other in zip(plain.model.parameters(), probed.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert "fidelity" not in logs[0] and plain.targets_encoded == probed.targets_encoded
    first, *_, last = with_fidelity
    assert first["fidelity"] > 0.5 and last["fidelity_stale"] < last["fidelity"] < 1
    assert last["seconds_fidelity"] > 0
    callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, FidelityCallback))
    assert callback.targets_encoded == 6 * 50
    assert [probe["step"] for probe in callback.history] == [0, 2, 4, 6, 8, 10]
    assert callback.history[0]["fidelity"] == 1 and callback.history[0]["fidelity_drift"] < 1e-6
    assert first["fidelity"] == pytest.approx((1 + callback.history[1]["fidelity"]) / 2, abs=1e-6)


def test_fidelity_before_the_first_step_and_after_a_refresh_is_complete(corpus, tmp_path):
    loss, *_ = train(corpus, tmp_path, corrector="ridge")
    probe = FidelityCallback(loss, every=1, targets=None, k=7)
    measured = probe.measure()
    assert measured["fidelity"] < 1 and probe.targets_encoded == 200
    loss.corrected.refresh()
    assert probe.measure()["fidelity"] == 1
    # By hand: overlap of the top 7 by cache and by fresh embeddings, over all queries and targets.
    model = make_static_model()
    cache = EmbeddingCache.build(model, corpus, tmp_path / "other", progress=False)
    loss = CorrectedMultipleNegativesLoss(model, corpus, cache, corrector="identity")
    with torch.no_grad():
        model[1].linear.weight += 0.3 * torch.randn_like(model[1].linear.weight)
    fresh = model.encode(corpus.texts(range(200)), convert_to_tensor=True)
    queries = model.encode(corpus.qrels("train").queries["text"][:], convert_to_tensor=True)
    expected = [
        len(
            set((query @ cache[range(200)].T).topk(7).indices.tolist())
            & set((query @ fresh.T).topk(7).indices.tolist())
        )
        for query in F.normalize(queries, dim=-1)
    ]
    measured = FidelityCallback(loss, every=1, targets=None, k=7).measure()
    assert measured["fidelity"] == measured["fidelity_stale"] == pytest.approx(sum(expected) / 7 / 200, abs=1e-6)
    assert measured["fidelity"] < 0.95


def test_unfit_probes_are_refused(static_model, corpus, tmp_path):
    cache = EmbeddingCache.build(static_model, corpus, tmp_path / "cache", progress=False)
    loss = CorrectedMultipleNegativesLoss(static_model, corpus, cache)
    with pytest.raises(InputError, match="must be at least 1, got 0, 256, 4096 and 16"):
        FidelityCallback(loss, every=0)
    with pytest.raises(InputError, match="must be at least 1, got 1, 256, 4096 and -1"):
        FidelityCallback(loss, every=1, k=-1)
    with pytest.raises(InputError, match="num_negatives=0 chooses nothing"):
        FidelityCallback(CorrectedMultipleNegativesLoss(static_model, corpus, num_negatives=0), every=1)
    static_model.truncate_dim = 8
    assert FidelityCallback(loss, every=1).measure()["fidelity"] == 1, "training sees the full width"
    with pytest.raises(InputError, match=r"has the splits \['train'\], not 'dev'"):
        FidelityCallback(loss, every=1, split="dev")


def test_several_losses_are_told_apart(corpus, tmp_path):
    model = make_static_model()
    cache = EmbeddingCache.build(model, corpus, tmp_path / "cache", progress=False)
    losses = {name: CorrectedMultipleNegativesLoss(model, corpus, cache, num_negatives=2) for name in ("one", "two")}
    data = {name: corpus.pairs("train") for name in losses}
    trainer = CorrectorTrainer(model=model, args=arguments(tmp_path), train_dataset=data, loss=losses)
    trainer.train()
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert entry["one/targets_encoded"] > 0 and entry["two/drift"] >= 0 and "drift" not in entry


def test_what_does_not_fit_is_refused_before_training(corpus, static_model, tmp_path, monkeypatch, capsys):
    cache = EmbeddingCache.build(static_model, corpus, tmp_path / "cache", progress=False)
    loss = CorrectedMultipleNegativesLoss(static_model, corpus, cache, num_negatives=4)
    before = {name: value.clone() for name, value in static_model.state_dict().items()}
    trainer = CorrectorTrainer(
        model=static_model, args=arguments(tmp_path), train_dataset=corpus.pairs("train"), loss=loss
    )
    with monkeypatch.context() as patch:
        patch.setattr("st_corrector.runtime.memory.available_memory", lambda device: 100_000)
        with pytest.raises(
            InputError, match=r"(?s)does not fit.*scores of 200 rows.*top 4 of .*available .*dtype='int8'"
        ):
            trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in static_model.state_dict().items())
    trainer.train()
    printed = capsys.readouterr().out
    assert "overlay of up to 200 written rows" in printed and "available" in printed
