"""GPUs in the tests: all but those marked ``gpu`` do without, and what these have come to is written down."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import sys
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

REASON = "there is no GPU that CUDA can use, or it is hidden: `make test-gpu` runs these tests"
GPU = pytest.param("cuda", marks=pytest.mark.gpu)
GPU_ALONE = pytest.mark.parametrize("device", [GPU], indirect=True)
GPU_AND_LONG = pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.long), GPU], indirect=True)
_ALL = "ALL_CUDA_VISIBLE_DEVICES"


def chosen_gpus() -> dict[str, str]:
    """The environment in which all GPUs are hidden, or all but the first if ``-m gpu`` asks for one; to be taken over
    before torch looks for any.

    Models and trainers take a GPU where they see one, several where they see several, and the other tests compare with
    tensors on the CPU. What the tests start sees what they see.
    """
    if _ALL in os.environ:  # a test has started this process, or pytest-xdist
        return {}
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    first = "0" if given is None else given.partition(",")[0]
    return {
        _ALL: "all" if given is None else given,
        "CUDA_VISIBLE_DEVICES": first if _asked_for() else "",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # what torch.use_deterministic_algorithms asks for
    }


def all_gpus(environment: Mapping[str, str]) -> dict[str, str]:
    """The same for a process that is to see every GPU."""
    others = {name: value for name, value in environment.items() if name != "CUDA_VISIBLE_DEVICES"}
    return others if environment[_ALL] == "all" else {**others, "CUDA_VISIBLE_DEVICES": environment[_ALL]}


def _asked_for() -> bool:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-m", default="")
    given = [*shlex.split(os.environ.get("PYTEST_ADDOPTS", "")), *sys.argv[1:]]
    return re.search(r"(?<!not )\bgpu\b", parser.parse_known_args(given)[0].m) is not None


class Results:
    """Writes after every test what all have come to, with device and versions, into a JSON file.

    Args:
        path: the file; what is in it is replaced.
        arguments: pytest's.
    """

    def __init__(self, path: Path, arguments: list[str]) -> None:
        self._path, self._started = path, time.perf_counter()
        self._about = {"command": shlex.join(["python", "-m", "pytest", *arguments]), **_machine()}
        self._tests: dict[str, dict[str, Any]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        found = self._tests.setdefault(report.nodeid, {"outcome": "passed", "seconds": 0.0})
        found["seconds"] = round(found["seconds"] + report.duration, 2)
        found.update(dict(report.user_properties))
        if report.outcome != "passed":
            found["outcome"] = report.outcome
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
            found["reason"] = reason[-2000:]
        if report.when == "teardown":
            self._write()

    def _write(self) -> None:
        outcomes = Counter(each["outcome"] for each in self._tests.values())
        seconds = round(time.perf_counter() - self._started, 1)
        results = {**self._about, "seconds": seconds, "outcomes": outcomes, "tests": self._tests}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        partial = self._path.with_suffix(".partial")
        partial.write_text(json.dumps(results, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        partial.replace(self._path)


def _machine() -> dict[str, Any]:
    import torch

    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "recipes"))
    from common import commit

    from st_corrector.search.kernels import triton
    from st_corrector.training.recorder import versions

    found = {**versions(), **commit(), "cuda": torch.version.cuda, "triton": getattr(triton, "__version__", None)}
    device: dict[str, Any] = {"name": platform.processor() or platform.machine()}
    if torch.cuda.is_available():
        about = torch.cuda.get_device_properties(0)
        device = {"name": about.name, "bytes": about.total_memory, "capability": f"{about.major}.{about.minor}"}
    return {"device": device, "cpus": os.cpu_count(), "versions": found}
