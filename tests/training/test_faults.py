"""What can happen to a training run: each fault is the real one."""

import argparse
import gc
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import FORKS, make_static_model, make_texts
from support import training
from support.launching import TRAINING, environment, launch, results
from support.runs import At, Steps, difference, trainer_of
from support.states import same, weights
from transformers import TrainerCallback

from st_corrector import CheckpointError, Corpus, StorageError
from st_corrector.training.checkpoint import fault_of


def train(folder, case, save_every, name, resume, derived, ready):
    torch.set_num_threads(1)
    datasets.config.HF_DATASETS_CACHE = derived
    settings = {"steps": 20, "batch_size": 16, "kill_at": None, "kill_rank": None, "bf16": False}
    ready.set()
    training.run(folder, case, argparse.Namespace(name=name, save_every=save_every, resume=resume, **settings))


def start(folder, case, save_every, name="run", resume=False):
    """A process that trains, and is about to."""
    ready = FORKS.Event()
    derived = folder.parent / "derived"
    process = FORKS.Process(target=train, args=(folder, case, save_every, name, resume, derived, ready))
    folder.mkdir(exist_ok=True)
    process.start()
    assert ready.wait(120)
    return process


def result(folder, name="run"):
    return torch.load(folder / f"results-{name}-0-of-1.pt", weights_only=True)


def whole_run(tmp_path, case, save_every):
    """What a run makes that nothing happens to, and how many seconds it takes from its first checkpoint on."""
    start(tmp_path / "first", case, None).join()  # tokenizes
    process = start(tmp_path / "whole", case, save_every)
    when(tmp_path / "whole" / "step", save_every if save_every and save_every < 20 else 0)
    began = time.monotonic()
    process.join()
    assert process.exitcode == 0
    return result(tmp_path / "whole"), time.monotonic() - began


def killed_runs(tmp_path, case, save_every, kills, seed, within=1.0):
    """Runs that were killed, each then resumed; counts of what came of them."""
    generator = np.random.default_rng(seed)
    expected, duration = whole_run(tmp_path, case, save_every)
    counts = Counter(kills=kills, before_its_end=0, went_on_from_a_checkpoint=0, identical=0)
    for number in range(kills):
        folder = tmp_path / f"killed-{number}"
        process = start(folder, case, save_every)
        when(folder / "step", save_every)  # the first checkpoint is about to be written
        time.sleep(generator.uniform(0, within * duration))
        process.kill()
        process.join()
        counts["before_its_end"] += not (folder / "results-run-0-of-1.pt").exists()
        whole = [path for path in (folder / "out").glob("checkpoint-*") if fault_of(path) is None]
        again = start(folder, case, save_every, "resumed", resume=bool(whole))
        again.join()
        assert again.exitcode == 0
        found = result(folder, "resumed")
        assert found["began_at"] is None or bool(found["began_at"]) == bool(whole)
        counts["went_on_from_a_checkpoint"] += bool(whole)
        if found["began_at"] is None:  # killed behind the last step, whose selections are not made again
            found["selected"] = expected["selected"]
        assert not difference(expected, found)
        counts["identical"] += 1
        shutil.rmtree(folder)
    return counts


def test_a_run_killed_at_any_moment_goes_on_where_it_was(tmp_path):
    counts = killed_runs(tmp_path, "verified, with background and margin", 1, 2, seed=1, within=0.5)
    assert counts["went_on_from_a_checkpoint"] > 0 and counts["before_its_end"] > 0


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_fifty_runs_killed_at_any_moment(tmp_path, report):
    cases = ["mlp", "ridge, gumbel, int8", "accumulated", "shortlist", "verified, with background and margin"]
    counts = Counter()
    for number, case in enumerate(cases):
        (tmp_path / str(number)).mkdir()
        counts += killed_runs(tmp_path / str(number), case, 1 + number, 10, seed=number)
    report("kills of a training run", **counts, cases=cases)
    assert counts["went_on_from_a_checkpoint"] > 20 and counts["before_its_end"] > 25


class Memory(TrainerCallback):
    """Resident memory of this process, in MB, every so many steps."""

    def __init__(self, every):
        self.every, self.measured = every, []

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every == 0:
            gc.collect()
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self.measured.append(pages * os.sysconf("SC_PAGE_SIZE") / 1e6)


def soak(folder, steps, every, sender):
    torch.set_num_threads(1)
    datasets.config.HF_DATASETS_CACHE = folder / "datasets"
    queries, texts = make_texts(3_000)
    corpus = Corpus.from_texts(texts)
    ids = [str(n) for n in range(len(texts))]
    corpus.add_split("train", dict(zip(ids, queries, strict=True)), {id: [id] for id in ids})
    trainer = trainer_of(
        corpus,
        folder,
        model=make_static_model(dim=256),
        max_steps=steps,
        per_device_train_batch_size=32,
        learning_rate=1e-3,
        num_negatives=8,
        save_steps=500,
        save_total_limit=2,
        logging_steps=50,
    )
    memory = Memory(every)
    trainer.add_callback(memory)
    trainer.train()
    losses = [entry["task_loss"] for entry in trainer.state.log_history if "task_loss" in entry]
    sender.send((memory.measured, losses, trainer._corrected_losses()[""].targets_encoded))


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_memory_is_flat_over_two_thousand_steps(tmp_path, report):
    receiver, sender = FORKS.Pipe(duplex=False)
    process = FORKS.Process(target=soak, args=(tmp_path, 2_000, 50, sender))
    process.start()
    measured, losses, encoded = receiver.recv()
    process.join()
    assert losses[-1] < losses[0] / 2 and encoded > 2_000 * 100
    # 600 steps: every target has been written back by then, and a checkpoint has loaded the code that writes it.
    warm_after = 11
    after_warmup = measured[warm_after:]
    growth = [max(after_warmup) / after_warmup[0] - 1, after_warmup[-1] / after_warmup[0] - 1]
    figures = {"resident_mb": [round(each) for each in measured], "growth": [round(each, 4) for each in growth]}
    report("soak", steps=2_000, warm_after=warm_after, **figures)
    assert max(growth) < 0.02, str(figures)


def when(file, steps):
    """Wait until a run has taken so many steps."""
    deadline = time.monotonic() + 120
    while not (file.exists() and (text := file.read_text()) and int(text) >= steps):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_run_that_is_told_to_stop_saves_a_checkpoint_first(tmp_path):
    expected, _ = whole_run(tmp_path, "mlp", 1000)
    process = start(tmp_path / "told", "mlp", 1000)
    when(tmp_path / "told" / "step", 3)
    process.terminate()
    process.join()
    assert process.exitcode == 128 + signal.SIGTERM
    assert not (tmp_path / "told" / "results-run-0-of-1.pt").exists()
    (checkpoint,) = (tmp_path / "told" / "out").glob("checkpoint-*")
    assert 3 <= int(checkpoint.name.partition("-")[2]) < 20 and fault_of(checkpoint) is None
    start(tmp_path / "told", "mlp", 1000, "resumed", resume=True).join()
    assert not difference(expected, result(tmp_path / "told", "resumed"))


@pytest.mark.long
def test_two_processes_that_are_told_to_stop_save_the_same_step(tmp_path):
    case = ["--cases", json.dumps(["mlp"]), "--save_every", "1000"]
    launch(tmp_path / "whole", 2, *case)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(TRAINING), str(tmp_path / "told"), *case]
    process = subprocess.Popen(command, env=environment(tmp_path / "told"), stderr=subprocess.DEVNULL)
    when(tmp_path / "told" / "0" / "step", 3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) != 0
    (checkpoint,) = (tmp_path / "told" / "0" / "out").glob("checkpoint-*")
    assert fault_of(checkpoint) is None
    launch(tmp_path / "told", 2, *case, "--name", "resumed", "--resume")
    for one, other in zip(results(tmp_path / "whole", 2), results(tmp_path / "told", 2, "resumed"), strict=True):
        assert not difference(one, other)


def test_a_run_that_is_told_to_stop_and_saves_nothing_stops(tmp_path):
    process = start(tmp_path / "told", "mlp", None)
    when(tmp_path / "told" / "step", 3)
    process.terminate()
    process.join()
    assert process.exitcode == -signal.SIGTERM


@pytest.mark.long
def test_a_process_that_dies_ends_the_others_and_is_named(tmp_path):
    case = ["--cases", json.dumps(["mlp"]), "--kill_at", "5", "--kill_rank", "1"]
    began = time.monotonic()
    done = launch(tmp_path / "run", 2, *case, check=False)
    assert done.returncode != 0 and time.monotonic() - began < 120
    assert "rank      : 1" in done.stderr and "Signal 9 (SIGKILL) received by PID" in done.stderr


@pytest.fixture
def expected(corpus, tmp_path):
    """What six steps make of the model that nothing happens to."""
    trainer = trainer_of(corpus, tmp_path / "expected", save_strategy="no")
    before = weights(trainer.model)
    trainer.train()
    assert not same(weights(trainer.model), before)
    return weights(trainer.model)


@pytest.mark.parametrize("fault", ["No space left on device. Make room", "Read-only file system. Choose a folder"])
def test_a_checkpoint_that_cannot_be_written_leaves_those_before(corpus, expected, small_disk, tmp_path, fault):
    def remount(option):
        subprocess.run(["mount", "-o", f"remount,{option}", str(small_disk)], check=True)

    def break_disk():
        if fault.startswith("Read-only"):
            remount("ro")
        else:
            free = os.statvfs(small_disk)
            (small_disk / "somebody else's").write_bytes(bytes((free.f_bavail - 8) * free.f_bsize))

    remount("size=4m")
    settings = {"cache_path": str(tmp_path / "cache")}
    trainer = trainer_of(corpus, small_disk / "out", **settings)
    trainer.add_callback(At(3, break_disk))
    with pytest.raises(StorageError, match=rf"checkpoint-4.* cannot be written: {fault}.*resume"):
        trainer.train()
    remount("rw,size=8m")
    assert [path.name for path in (small_disk / "out").glob("checkpoint-*")] == ["checkpoint-2"]
    assert fault_of(small_disk / "out" / "checkpoint-2") is None
    again, steps = trainer_of(corpus, small_disk / "out", **settings), Steps()
    again.add_callback(steps)
    again.train(resume_from_checkpoint=True)
    assert steps.taken == [2, 3, 4, 5] and same(weights(again.model), expected)


def test_folders_that_vanish_do_not_stop_a_run(corpus, expected, tmp_path):
    trainer = trainer_of(corpus, tmp_path / "out", cache_path=str(tmp_path / "cache"))
    gone = tmp_path / "gone"
    gone.mkdir()
    trainer.add_callback(At(3, lambda: [(tmp_path / name).rename(gone / name) for name in ("out", "cache")]))
    trainer.train()
    assert same(weights(trainer.model), expected)
    assert [fault_of(tmp_path / "out" / f"checkpoint-{step}") for step in (4, 6)] == [None, None]


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt", "st_corrector/loss-00000-of-00001.safetensors"])
def test_a_bit_flipped_in_a_checkpoint_is_found(corpus, expected, tmp_path, file, caplog):
    trainer_of(corpus, tmp_path).train()
    (damaged,) = [path for path in (tmp_path / "checkpoint-6").rglob("*") if str(path).endswith(file)][:1]
    data = bytearray(damaged.read_bytes())
    data[-20] ^= 4
    damaged.write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"checkpoint-6 has a damaged .*{file}: it is not what was written: go"):
        trainer_of(corpus, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    again, steps = trainer_of(corpus, tmp_path), Steps()
    again.add_callback(steps)
    again.train(resume_from_checkpoint=True)
    assert "Passing over a checkpoint that cannot be trusted: checkpoint-6 has a damaged" in caplog.text
    assert steps.taken == [4, 5] and same(weights(again.model), expected)


def test_a_worker_that_dies_ends_the_run_and_nothing_is_lost(corpus, tmp_path):
    settings = {"dataloader_num_workers": 1, "dataloader_prefetch_factor": 1}
    whole = trainer_of(corpus, tmp_path / "whole", **settings)
    whole.train()
    trainer = trainer_of(corpus, tmp_path / "killed", **settings)
    trainer.add_callback(At(3, lambda: [child.kill() for child in multiprocessing.active_children()]))
    with pytest.raises(RuntimeError, match=r"DataLoader worker .*(killed by signal|exited unexpectedly)"):
        trainer.train()
    again, steps = trainer_of(corpus, tmp_path / "killed", **settings), Steps()
    again.add_callback(steps)
    again.train(resume_from_checkpoint=True)
    assert steps.taken in ([2, 3, 4, 5], [4, 5]), "it is noticed when the batches fetched before are used up"
    assert same(weights(again.model), weights(whole.model))


def test_tokens_are_in_no_file_and_no_message(corpus, tmp_path, capfd, caplog):
    token = "hf_thisIsASecretOfSomebody"
    trainer = trainer_of(corpus, tmp_path, hub_token=token)
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    assert trainer.args.hub_token == token, "it is still there for who pushes"
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name == "training_args.bin" for path in files)
    assert not [path for path in files if token.encode() in path.read_bytes()]
    said = capfd.readouterr()
    assert token not in said.out + said.err + caplog.text + repr(trainer.args)
