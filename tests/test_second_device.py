"""Trainings on a device that is not the CPU (:mod:`support.second_device`) against the same trainings on the CPU.

The device's arithmetic is the CPU's, so that every number must be the same; what stays on the wrong device is an error.
What the test suite's GPU part does is done there as well.
"""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from support.launching import TESTS, TRAINING, environment, results
from support.training import CASES, TRANSFORMERS


def train(folder, device, *arguments):
    command = [sys.executable, *([str(TESTS / "support" / "second_device.py")] if device == "second" else [])]
    command += [str(TRAINING), str(folder), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(folder), timeout=500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]


def without_seconds(log):
    return [{name: value for name, value in entry.items() if not name.startswith("seconds")} for entry in log]


@pytest.mark.long
def test_every_case_trains_on_another_device_as_on_the_cpu(tmp_path):
    cases = list(CASES)
    for name in ("cpu", "second"):
        train(tmp_path / name, name, "--steps", "8", "--cases", json.dumps(cases))
    for number, case in enumerate(cases):
        (cpu,), (second,) = (results(tmp_path / name, 1, case=number) for name in ("cpu", "second"))
        assert (cpu["device"], second["device"]) == ("cpu", "second"), case
        assert any(not torch.equal(cpu["before"][name], value) for name, value in cpu["model"].items()), "it trained"
        logs = [without_seconds(each["log"]) for each in (second, cpu)]
        if case in TRANSFORMERS:  # attention is put together from other operations, which round otherwise
            assert torch.equal(second["selected"][0], cpu["selected"][0]), case
            torch.testing.assert_close(*(log[0] for log in logs), atol=1e-4, rtol=1e-4)
            continue
        torch.testing.assert_close(*logs, atol=0, rtol=0, equal_nan=True)
        for part in ("selected", "evaluations", "model", "corrector", "overlay", "steps", "skipped"):
            torch.testing.assert_close(second[part], cpu[part], atol=0, rtol=0, equal_nan=True)


@pytest.mark.long
def test_autocast_on_another_device(tmp_path):
    cases = ["mlp", "verified, with background and margin", "two towers, gradient cache", "adapters"]
    train(tmp_path, "second", "--steps", "3", "--bf16", "--cases", json.dumps(cases))
    for number, case in enumerate(cases):
        (found,) = results(tmp_path, 1, case=number)
        assert any(not torch.equal(found["before"][name], value) for name, value in found["model"].items()), case
        assert all(value.dtype != torch.bfloat16 for value in [*found["model"].values(), *found["overlay"].values()])


@pytest.mark.long
def test_a_run_on_another_device_resumes_bit_for_bit(tmp_path):
    arguments = ("second", "--cases", '["uniform, stale warm-up"]', "--save_every", "4")
    train(tmp_path / "whole", *arguments, "--steps", "8")
    train(tmp_path / "cut", *arguments, "--steps", "4")
    train(tmp_path / "cut", *arguments, "--steps", "8", "--resume")
    (whole,), (cut,) = results(tmp_path / "whole", 1), results(tmp_path / "cut", 1)
    assert cut["began_at"] == 4
    for part in ("model", "corrector", "overlay", "steps"):
        torch.testing.assert_close(cut[part], whole[part], atol=0, rtol=0)


@pytest.mark.long
def test_the_gpu_part_of_the_suite_passes_on_another_device(tmp_path):
    """What has nothing of CUDA in it: a tensor on the wrong device is found without a GPU."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "support.second_device",
        "-p",
        "no:cacheprovider",
        "--tb",
        "short",
    ]
    command += ["-m", "not long and not gpu", str(TESTS / "test_gpu.py"), str(TESTS / "test_gpu_training.py")]
    own = {"PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        command, capture_output=True, text=True, env={**environment(tmp_path), **own}, cwd=TESTS.parent, timeout=500
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 40, done.stdout[-2000:]
