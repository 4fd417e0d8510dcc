"""Trainings in processes of their own."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch

TESTS = Path(__file__).resolve().parents[1]
TRAINING = TESTS / "support" / "training.py"


def environment(folder):
    own = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder.parent / "datasets")}
    return {**os.environ, **own, "TOKENIZERS_PARALLELISM": "false"}


def launch(folder, processes, *arguments, check=True):
    """Run ``training.py`` with so many processes; what became of it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", str(port)]
    command += [str(TRAINING), str(folder), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(folder), timeout=500)
    if check:
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return done


def results(folder, processes, name="run", case=0):
    return [
        torch.load(folder / str(case) / f"results-{name}-{rank}-of-{processes}.pt", "cpu", weights_only=True)
        for rank in range(processes)
    ]
