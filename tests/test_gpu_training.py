"""Training on a GPU: steps, precisions, whole runs, resuming, several processes, recipes, and what a model leaves.

As in ``test_gpu.py``, what a CPU can run as well runs there too.
"""

import contextlib
import copy
import json
import math
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, load_bert_model, make_bert_model, make_static_model
from sentence_transformers.base.losses import gradcache
from support.batches import batch_of, on
from support.encoders import moved
from support.gpu import GPU_AND_LONG, all_gpus
from support.launching import TRAINING, environment, results
from support.runs import At, difference, diverging, loss_of, trainer_of
from support.scripts import run
from support.states import gradient_difference, gradients, same, weights, without_dropout
from transformers import TrainerCallback

from st_corrector import (
    CachedCorrectedMultipleNegativesLoss,
    CorpusRetrievalEvaluator,
    CorrectedMultipleNegativesLoss,
    Corrector,
    EmbeddingCache,
    FalseNegativeFilter,
    RidgeCorrector,
    certify,
    fit_corrector,
    upgrade_embeddings,
)
from st_corrector.carry_over.fitting import drawn
from st_corrector.data.encoding import DocumentEncoder

KINDS = {
    "plain": (CorrectedMultipleNegativesLoss, {}),
    "cached": (CachedCorrectedMultipleNegativesLoss, {"mini_batch_size": 3}),
}
NO_FP16 = "accelerate has no fp16 on CPUs"


@pytest.fixture
def drifted(bert_model, corpus, tmp_path):
    """A small transformer without dropout, and the cache of what it was before it moved on."""
    cache = EmbeddingCache.build(bert_model, corpus, tmp_path / "cache", progress=False)
    with torch.no_grad():
        for parameter in without_dropout(bert_model).parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return bert_model.train(), cache


# ---------------------------------------------------------------------- one step


@GPU_AND_LONG
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"candidates": 8, "background_targets": 6, "in_batch_negatives": False},
        {"sampler": "gumbel", "false_negatives": FalseNegativeFilter(relative_margin=0.01)},
    ],
    ids=["top k", "verified", "gumbel"],
)
def test_a_step_is_that_of_the_cpu(device, kind, settings, drifted, corpus):
    (model, cache), (make, own) = drifted, KINDS[kind]
    losses = []
    for where in (torch.device("cpu"), device):
        chosen = {"num_negatives": 4, "corrector": RidgeCorrector(cache.dim), **copy.deepcopy(settings), **own}
        losses.append(make(copy.deepcopy(model).to(where), corpus, cache.to(where), **chosen))
    for step in range(3):
        batch, values = batch_of(model, corpus, range(10 * step, 10 * step + 10)), []
        for loss, where in zip(losses, ("cpu", device), strict=True):
            torch.manual_seed(step)
            loss.model.zero_grad()
            features, labels = on(batch, where)
            values.append(loss([{**each} for each in features], labels))
            sum(values[-1].values()).backward()
        assert values[0].keys() == values[1].keys() == {"task_loss", "correction_loss"}
        for name, value in values[0].items():
            torch.testing.assert_close(values[1][name].cpu(), value, atol=1e-4, rtol=1e-4)
        here, there = (gradients(loss.model) for loss in losses)
        assert gradient_difference({name: value.cpu() for name, value in there.items()}, here) <= 1e-3
        for loss in losses:
            with torch.no_grad():
                for parameter in loss.model.parameters():
                    if parameter.grad is not None:
                        parameter -= 0.05 * parameter.grad
    here, there = (loss.corrected.search for loss in losses)
    assert there.overlay.vectors.device == device and there.steps == 3
    assert torch.equal(there.overlay.rows.cpu(), here.overlay.rows) and len(here.overlay) > 50
    torch.testing.assert_close(there.overlay.vectors.cpu(), here.overlay.vectors, atol=1e-3, rtol=1e-3)
    for name, value in here.corrector.state_dict().items():
        torch.testing.assert_close(there.corrector.state_dict()[name].cpu(), value, atol=2e-3, rtol=2e-2)
    metrics = [loss.pop_metrics() for loss in losses]
    assert metrics[0].keys() == metrics[1].keys() >= {"drift", "seconds_select", "seconds_encode", "age"}
    for name, value in metrics[0].items():
        if not name.startswith("seconds_"):
            assert metrics[1][name] == pytest.approx(value, abs=1e-3, rel=1e-3), name
    assert all(0 < metrics[1][name] < 60 for name in metrics[1] if name.startswith("seconds_"))


def in_half(model, device, dtype):
    """``model``, whose forward pass runs under autocast, as accelerate has it, and whose embeddings stay as it says."""
    model.forward = torch.autocast(device.type, dtype)(model.forward)
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_in_half_precision_are_nearly_those_in_float32(device, kind, dtype, drifted, corpus):
    (model, cache), (make, own) = drifted, KINDS[kind]
    whole, half = copy.deepcopy(model).to(device), in_half(copy.deepcopy(model).to(device), device, dtype)
    features, labels = on(batch_of(model, corpus, range(12)), device)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    losses = []
    for each in (whole, half):
        losses.append(make(each, corpus, cache, num_negatives=4, corrector="mlp", **own))
        value = losses[-1]([{**each} for each in features], labels)
        assert value["task_loss"].dtype == torch.float32
        (scaler.scale(value["task_loss"]) if each is half else value["task_loss"]).backward()
    optimizer = torch.optim.SGD(half.parameters(), lr=0.1)
    scaler.unscale_(optimizer)
    found, expected = gradients(half), gradients(whole)
    for name in found.keys() - expected.keys():  # of what a module adds under autocast
        del found[name]
    assert gradient_difference(found, expected) <= 0.05
    assert all(value.dtype == torch.float32 for value in found.values())
    assert all(value.dtype == torch.float32 for value in losses[1].corrected.corrector.state_dict().values())
    one, other = (set(loss.corrected.search.overlay.rows.tolist()) for loss in losses)
    assert len(one & other) > 0.8 * len(one)


@pytest.mark.parametrize("corrector", ["mlp", "ridge", "kernel-ridge"])
def test_a_training_loop_may_put_the_whole_loss_under_autocast(device, corrector, drifted, corpus):
    model, cache = drifted
    model.to(device)
    losses = [CorrectedMultipleNegativesLoss(model, corpus, cache, 4, corrector) for _ in range(2)]
    features, labels = on(batch_of(model, corpus, range(12)), device)
    for loss, around in zip(
        losses, (contextlib.nullcontext(), torch.autocast(device.type, torch.bfloat16)), strict=True
    ):
        for _ in range(2):
            with around:
                value = loss([{**each} for each in features], labels)
            assert torch.isfinite(value["task_loss"])
    one, other = (loss.corrected.corrector.state_dict() for loss in losses)
    for name, value in one.items():
        assert other[name].dtype == torch.float32
        if "optimizer" not in name:
            torch.testing.assert_close(other[name], value, atol=0.1, rtol=0.1)


def test_a_step_that_the_scaler_skips_is_learnt_from_all_the_same(device, drifted, corpus):
    """The weights stay; the corrector and what is written back know what the encoder, as it is, says of these targets.

    Gradients overflow by themselves, where the scale is too large for float16.
    """
    model, cache = drifted
    in_half(model.to(device), device, torch.float16)
    loss = CorrectedMultipleNegativesLoss(model, corpus, cache, num_negatives=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10)
    for step in range(5):
        before, skipped = weights(model), step == 2
        if step > 0:
            scaler.update(2.0**60 if skipped else 2.0**10)
        optimizer.zero_grad()
        features, labels = on(batch_of(model, corpus, range(16 * step, 16 * step + 16)), device)
        scaler.scale(loss(features, labels)["task_loss"]).backward()
        scaler.step(optimizer)
        scaler.update()
        assert same(before, weights(model)) == skipped
        search = loss.corrected.search
        rows = search.overlay.rows
        rows = rows[search.overlay.written_at(rows) == step]
        assert search.steps == step + 1 and len(rows) > 16
        assert all(torch.isfinite(value).all() for value in search.corrector.state_dict().values())
        error = (search.corrector(search.stale(rows)) - loss.corrected.encode_together(rows.cpu().numpy())).abs().max()
        assert error < (5e-3 if skipped else 0.5)


# ---------------------------------------------------------------------- whole runs


class Losses(TrainerCallback):
    """The task loss of every step, and whether it moved the weights."""

    def __init__(self):
        self.before, self.moved = None, []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.before = weights(model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.moved.append(not same(self.before, weights(model)))


def learns(trainer):
    losses = [entry["task_loss"] for entry in trainer.state.log_history if "task_loss" in entry]
    return len(losses) == trainer.state.max_steps and sum(losses[-5:]) < sum(losses[:5]) - 1


@GPU_AND_LONG
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("settings", [{"cache_on_device": True}, {"mini_batch_size": 5, "candidates": 8}])
def test_the_trainer_in_half_precision(device, precision, settings, corpus, tmp_path):
    if precision == "fp16" and device.type == "cpu":
        pytest.skip(NO_FP16)
    dtypes, moves = set(), Losses()
    trainer = trainer_of(
        *(corpus, tmp_path, make_bert_model(tmp_path)),
        **{precision: True, **settings, "max_steps": 30, "learning_rate": 1e-3, "logging_steps": 1},
        save_strategy="no",
        use_cpu=device.type == "cpu",
    )
    linear = next(module for module in trainer.model.modules() if isinstance(module, torch.nn.Linear))
    linear.register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype))
    loss = loss_of(trainer)
    trainer.add_callback(moves)
    if precision == "fp16":
        # So large that gradients overflow, and small enough again for the step after the next.
        trainer.add_callback(At(10, lambda: trainer.accelerator.scaler.update(2.0**60)))
        trainer.add_callback(At(12, lambda: trainer.accelerator.scaler.update(2.0**10)))
    trainer.train()
    assert getattr(torch, {"bf16": "bfloat16", "fp16": "float16"}[precision]) in dtypes
    assert learns(trainer) and loss.corrected.search.steps == 30
    assert all(torch.isfinite(value).all() for value in loss.corrected.corrector.state_dict().values())
    assert torch.isfinite(loss.corrected.search.overlay.vectors).all()
    stood_still = [step for step, moved in enumerate(moves.moved) if not moved]
    if precision == "fp16":
        assert {10, 11} <= set(stood_still) and len(stood_still) < 10
    else:
        assert not stood_still


@GPU_AND_LONG
@pytest.mark.timeout(600)
def test_a_compiled_encoder_trains_as_a_plain_one(device, corpus, tmp_path):
    trained = []
    for compiled in (False, True):
        model = without_dropout(make_bert_model(tmp_path))
        trainer = trainer_of(
            *(corpus, tmp_path / str(compiled), model),
            **{"corrector": "ridge", "candidates": 8, "learning_rate": 1e-3, "save_strategy": "no"},
            torch_compile=compiled,
            use_cpu=device.type == "cpu",
            cache_path=str(tmp_path / "cache"),
        )
        before = weights(model)
        trainer.train()
        assert not same(before, weights(model))
        trained.append((weights(model), loss_of(trainer).corrected.search.overlay.rows))
    for name, value in trained[0][0].items():
        torch.testing.assert_close(trained[1][0][name], value, atol=1e-3, rtol=1e-2)
    one, other = (set(rows.tolist()) for _, rows in trained)
    assert len(one & other) > 0.95 * len(one)


RUNS = {
    "stale warm-up, uniform": {"sampler": "uniform", "corrector_warmup_steps": 4, "cache_on_device": True},
    "in-batch warm-up": {
        "corrector_warmup_steps": 4,
        "corrector_warmup_negatives": "in-batch",
    },
    "gumbel, int8": {"sampler": "gumbel", "corrector": "ridge", "cache_dtype": "int8"},
    "verified, margin, accumulated": {
        "candidates": 12,
        "background_targets": 7,
        "relative_margin": 0.02,
        "gradient_accumulation_steps": 2,
    },
    "refreshed, probed": {"refresh_every": 4, "probe_every": 3, "corrector": "ridge"},
}


@GPU_AND_LONG
@pytest.mark.parametrize("settings", RUNS.values(), ids=RUNS)
def test_a_run_is_that_of_the_cpu(device, settings, corpus, tmp_path):
    """Static encoder, float32: rounding may take a row here and there for its neighbour, and no more."""
    runs = []
    for where in (torch.device("cpu"), device):
        trainer = trainer_of(
            *(corpus, tmp_path / f"{len(runs)}"),
            **{"max_steps": 12, "learning_rate": 0.02, "logging_steps": 1, "save_strategy": "no", **settings},
            use_cpu=where.type == "cpu",
        )
        chosen = recorded(loss_of(trainer))
        trainer.train()
        assert trainer.model.device.type == where.type
        log = [entry for entry in trainer.state.log_history if "task_loss" in entry]
        runs.append((chosen, log, weights(trainer.model), loss_of(trainer)))
    (here, logged, state, loss), (there, logged_there, state_there, loss_there) = runs
    assert len(here) == len(there) > 0 and len(logged) == len(logged_there) == 12
    agree = [
        (one.cpu().sort(dim=1).values == other.sort(dim=1).values).float().mean().item()
        for one, other in zip(there, here, strict=True)
    ]
    assert np.mean(agree) > 0.98, agree
    for ours, theirs in zip(logged_there, logged, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            if name in ("task_loss", "drift", "corrected_error", "hardness", "fidelity", "seen", "age"):
                assert ours[name] == pytest.approx(value, abs=0.02, rel=0.02), name
    for name, value in state.items():
        torch.testing.assert_close(state_there[name].cpu(), value, atol=0.02, rtol=0.05)
    assert loss_there.targets_encoded == pytest.approx(loss.targets_encoded, rel=0.02)
    assert loss_there.corrected.search.steps == loss.corrected.search.steps > 0 or "refresh_every" in settings


def recorded(loss):
    """The rows that ``loss`` selects from now on."""
    selected, select = [], loss.select

    def recording(*inputs, **settings):
        selection = select(*inputs, **settings)
        selected.append(selection.rows)
        return selection

    loss.select = recording
    return selected


@GPU_AND_LONG
def test_a_corrector_that_makes_things_worse_is_given_up_on_the_device(device, corpus, tmp_path):
    settings = {"use_cpu": device.type == "cpu", "cache_on_device": True}
    trainer = diverging(corpus, tmp_path, "identity", **settings)
    trainer.train()
    loss = loss_of(trainer)
    assert (
        loss.corrected.diverged and loss.corrected.corrector.name == "identity" and loss.corrected.search.steps == 110
    )
    assert loss.corrected.search.overlay.vectors.device == device
    again = diverging(corpus, tmp_path, "identity", **settings)
    again.train(resume_from_checkpoint=True)
    assert loss_of(again).corrected.diverged and loss_of(again).corrected.corrector.name == "identity"
    assert again.state.global_step == 110


# ---------------------------------------------------------------------- resuming


class Interrupted(Exception):
    pass


class Interrupt(TrainerCallback):
    """Ends a run in the middle of a step."""

    def __init__(self, step):
        self.step = step

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Interrupted


@pytest.fixture
def deterministic():
    """No kernel whose sums depend on which thread comes first, where there is another."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


RESUMED = {
    "mlp, on the device": {"cache_on_device": True},
    "ridge, gumbel, int8, streamed": {"corrector": "ridge", "sampler": "gumbel", "cache_dtype": "int8"},
    "gradient cache, accumulated": {"mini_batch_size": 3, "gradient_accumulation_steps": 2, "cache_on_device": True},
    "bf16, verified": {"bf16": True, "candidates": 8, "background_targets": 5, "corrector": "kernel-ridge"},
    "fp16, warm-up": {"fp16": True, "corrector_warmup_steps": 5, "corrector": "ridge", "cache_on_device": True},
}


@GPU_AND_LONG
@pytest.mark.parametrize("settings", RESUMED.values(), ids=RESUMED)
def test_a_resumed_run_is_the_run(device, settings, deterministic, corpus, tmp_path):
    """Bit for bit, with dropout drawn on the device."""
    if settings.get("fp16") and device.type == "cpu":
        pytest.skip(NO_FP16)
    make_bert_model(tmp_path)

    def train(folder, interrupt=None, resume=False):
        trainer = trainer_of(
            *(corpus, tmp_path / folder, load_bert_model(tmp_path / "bert-right")),
            **{"max_steps": 8, "save_steps": 3, "learning_rate": 1e-3, **settings},
            cache_path=str(tmp_path / "cache"),
            use_cpu=device.type == "cpu",
        )
        loss, before = loss_of(trainer), weights(trainer.model)
        selected = recorded(loss)
        if interrupt is not None:
            trainer.add_callback(Interrupt(interrupt))
        with contextlib.suppress(Interrupted):
            trainer.train(resume_from_checkpoint=resume)
        assert trainer.state.global_step == (8 if interrupt is None else interrupt)
        assert not same(before, weights(trainer.model)) and trainer.model.device == device
        search = loss.corrected.search
        return {
            "selected": selected,
            "model": weights(trainer.model),
            "corrector": search.corrector.state_dict(),
            "overlay": search.overlay.state_dict(),
            "steps": search.steps,
            "targets_encoded": loss.targets_encoded,
        }

    whole, again = train("whole"), train("again")
    assert not difference(whole, again)  # else nothing could be said of the resumed one
    assert any(
        isinstance(module, torch.nn.Dropout) and module.p
        for module in load_bert_model(tmp_path / "bert-right").modules()
    )
    train("interrupted", interrupt=5)
    torch.manual_seed(123)  # wherever the generators are, resuming sets them
    resumed = train("interrupted", resume=True)
    assert 0 < len(resumed["selected"]) < len(whole["selected"])
    assert not difference(whole, resumed)


@GPU_AND_LONG
def test_a_run_goes_on_on_another_device(device, corpus, tmp_path):
    """A checkpoint of a GPU is read where there is none, and the other way round."""
    for first, second in ((device, torch.device("cpu")), (torch.device("cpu"), device)):
        folder = tmp_path / f"{first.type}-{second.type}"
        settings = {"learning_rate": 0.02, "corrector": "ridge-mlp"}
        trainer_of(corpus, folder, **settings, max_steps=4, use_cpu=first.type == "cpu").train()
        trainer = trainer_of(corpus, folder, **settings, max_steps=8, use_cpu=second.type == "cpu")
        trainer.train(resume_from_checkpoint=True)
        loss = loss_of(trainer)
        assert loss.corrected.search.steps == 8 and loss.corrected.search.overlay.vectors.device == second
        assert all(torch.isfinite(value).all() for value in loss.corrected.corrector.state_dict().values())
        state = loss.corrected.corrector.state_dict()
        assert {value.device for name, value in state.items() if not name.endswith(".step")} == {second}


# ---------------------------------------------------------------------- processes

CASES = ["mlp", "ridge, gumbel, int8", "uniform, stale warm-up", "verified, with background and margin", "refreshed"]
CASES += ["gradient cache"] * hasattr(gradcache, "_ddp_replay_context")


def assert_nearly_same_training(runs, reference, case):
    """That ``runs``, of all processes, are the ``reference`` of one, but for a row that rounding decides over."""
    for process in runs:
        agree = [
            (ours % 203).sort(dim=1).values == (theirs % 203).sort(dim=1).values  # 20 targets are there twice
            for ours, theirs in zip(process["selected"], reference["selected"], strict=True)
        ]
        assert torch.cat(agree).float().mean() > 0.98, case
        assert process["steps"] == reference["steps"] and len(process["log"]) == len(reference["log"]) == 20
        for ours, theirs in zip(process["log"], reference["log"], strict=True):
            assert ours["task_loss"] == pytest.approx(theirs["task_loss"], abs=0.02, rel=0.02), case
        for name, value in reference["model"].items():
            torch.testing.assert_close(process["model"][name], value, atol=0.02, rtol=0.05)
        for ours, theirs in zip(process["selected"], runs[0]["selected"], strict=True):
            assert torch.equal(ours, theirs), "exactly the same in all processes"
        for name, value in runs[0]["corrector"].items():
            assert torch.equal(process["corrector"][name], value), name
    assert sum(len(run["overlay"]["rows"]) for run in runs) > 20


def start(folder, environment, *launcher):
    command = [sys.executable, *launcher, str(TRAINING), str(folder), "--cases", json.dumps(CASES)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


@pytest.mark.gpu
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("backend", "processes"), [("nccl", 1), ("gloo", 2), ("nccl", 2)])
def test_processes_with_gpus_train_what_one_without_does(tmp_path, backend, processes):
    """NCCL wants a GPU for each process; with gloo several share one."""
    several = {**environment(tmp_path / "run"), "DDP_BACKEND": backend}
    if backend == "nccl" and processes > 1:
        several = all_gpus(several)
        count = "import torch; print(torch.cuda.device_count())"
        found = subprocess.run([sys.executable, "-c", count], capture_output=True, text=True, check=True, env=several)
        if int(found.stdout) < processes:
            pytest.skip(f"there are GPUs for {int(found.stdout)} processes, not for {processes}")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes))
    running = [
        start(tmp_path / "alone", {**environment(tmp_path / "alone"), "CUDA_VISIBLE_DEVICES": ""}),
        start(tmp_path / "run", several, *launcher),
    ]
    for process in running:
        output = process.communicate(timeout=500)[0]
        assert process.returncode == 0, output[-6000:]
    for number, case in enumerate(CASES):
        (alone,), runs = (
            results(tmp_path / folder, size, case=number) for folder, size in (("alone", 1), ("run", processes))
        )
        assert alone["device"] == "cpu" and all(run["device"] == "cuda" for run in runs)
        assert_nearly_same_training(runs, alone, case)


# ---------------------------------------------------------------------- recipes, evaluation, carried-over indices


@GPU_AND_LONG
@pytest.mark.timeout(600)
def test_the_recipe_in_bfloat16_is_resumed(device, beir, tmp_path):
    make_bert_model(tmp_path)
    options = ["--model", tmp_path / "bert-right", "--bf16", "True", "--max_steps", 6, "--learning_rate", 1e-3]
    options += ["--per_device_train_batch_size", 16, "--num_negatives", 4, "--cache_on_device", "True"]
    options += ["--save_strategy", "steps", "--save_steps", 3, "--logging_steps", 1, "--seed", 3]
    options += ["--caches", tmp_path / "caches", "--output_dir", tmp_path / "out", "--dataset", beir]
    options += ["--use_cpu", str(device.type == "cpu")]
    run(ROOT / "recipes" / "train_nq.py", *options)
    whole = json.loads((tmp_path / "out" / "results.json").read_text())
    assert whole["steps"] == 6 and whole["after"] != whole["before"]
    log = [entry["task_loss"] for entry in whole["log"]]
    assert len(log) == 6 and log[-1] < log[0] and all(math.isfinite(value) for value in log)
    shutil.rmtree(tmp_path / "out" / "checkpoint-6")
    shutil.rmtree(tmp_path / "out" / "final")
    run(ROOT / "recipes" / "train_nq.py", *options, "--resume_from_checkpoint", "True")
    resumed = json.loads((tmp_path / "out" / "results.json").read_text())
    assert resumed["steps"] == 6
    for ours, theirs in zip(resumed["log"], whole["log"], strict=True):
        assert ours["task_loss"] == pytest.approx(theirs["task_loss"], abs=1e-3)
    corrector = Corrector.from_pretrained(tmp_path / "out" / "final")
    assert {value.device.type for value in corrector.state_dict().values()} == {"cpu"}


def test_evaluation_is_that_of_the_cpu(device, corpus, tmp_path):
    model = make_bert_model(tmp_path)
    cache = EmbeddingCache.build(model, corpus, tmp_path / "cache", progress=False)
    evaluator = CorpusRetrievalEvaluator(corpus, "train", chunk_size=64)
    expected, rows = evaluator(model), evaluator.retrieve(model)
    model.to(device)
    assert evaluator(model) == pytest.approx(expected, abs=0.02)
    for embeddings in (None, cache, cache.to(device), cache.to(device, torch.bfloat16)):
        found = evaluator.retrieve(model, embeddings)
        assert found.device.type == "cpu"
        agreement = (found[:, :, None] == rows[:, None, :]).any(-1).float().mean()
        assert agreement > (0.9 if embeddings is not None and embeddings.dtype == torch.bfloat16 else 0.99)


def test_an_index_is_carried_over_with_models_on_the_device(device, large, tmp_path):
    old, new = make_static_model(), moved()
    expected = fit_corrector(old, new, large, sample=800, progress=False)
    old.to(device), new.to(device)
    fitted = fit_corrector(old, new, large, sample=800, progress=False)
    rows = drawn(len(large), 500, seed=1)
    served = DocumentEncoder(old, large, progress=False).encode(old, rows)
    assert served.device == device
    there, here = upgrade_embeddings(served, fitted), upgrade_embeddings(served.cpu(), expected)
    assert there.device == device
    torch.testing.assert_close(there.cpu(), here, atol=1e-3, rtol=1e-3)
    for corrector in (fitted, copy.deepcopy(fitted).to(device)):
        for embeddings in (served, served.cpu(), served.cpu().numpy()):
            torch.testing.assert_close(upgrade_embeddings(embeddings, corrector).cpu(), here, atol=1e-3, rtol=1e-3)
        queries = large.qrels("dev").queries["text"][:50]
        whole = DocumentEncoder(old, large, progress=False).encode(old, np.arange(len(large)))
        for embeddings in (whole.cpu(), whole):
            recall = certify(embeddings, new, large, queries, corrector, progress=False).recall
            assert recall["upgraded"].mean > recall["unchanged"].mean + 0.02
    fitted.save_pretrained(tmp_path)
    loaded = Corrector.from_pretrained(tmp_path)
    assert loaded.frames == fitted.frames
    torch.testing.assert_close(upgrade_embeddings(served, loaded).cpu(), here, atol=1e-3, rtol=1e-3)
