"""Several processes against one with the whole batch, each a real training started by torchrun.

It is what ``accelerate launch`` starts them by, too, where there are GPUs; on CPUs that needs MPI (and without a host
file quietly starts one process).
"""

import json
import os
import subprocess
import sys
from contextlib import suppress

import pytest
import torch
from conftest import FORKS
from sentence_transformers.base.losses import gradcache
from support.launching import TRAINING, environment, launch, results
from support.training import CASES

from st_corrector import EmbeddingCache, ProcessError
from st_corrector.runtime.distributed import Processes, checksum


def gathered(runs):
    """What all processes have written back, by row."""
    overlays = [run["overlay"] for run in runs if run["overlay"]]
    if not overlays:
        return None
    merged = {name: torch.cat([each[name] for each in overlays]) for name in overlays[0]}
    order = merged["rows"].argsort()
    return {name: value[order] for name, value in merged.items()}


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """What one process makes of some cases, each of them trained once."""
    folder, trained = tmp_path_factory.mktemp("one"), {}

    def results_of(cases):
        if missing := [case for case in cases if case not in trained]:
            launch(folder / str(len(trained)), 1, "--cases", json.dumps(missing))
            alone = [results(folder / str(len(trained)), 1, case=number)[0] for number in range(len(missing))]
            trained.update(zip(missing, alone, strict=True))
        return trained

    return results_of


SOME = ("mlp", "ridge, gumbel, int8", "two towers", "own pairs, taught")


def assert_same_training(runs, reference, case):
    """That ``runs``, of all processes, are the ``reference``, of one, up to the order of summation."""
    settings = CASES[case]
    losses = [entry["task_loss"] for entry in reference["log"]]
    assert sum(losses[-5:]) < sum(losses[:5]) - 0.5, f"it learns: {losses}"
    assert any((reference["model"][name] - value).abs().max() > 1e-2 for name, value in reference["before"].items())
    rows = sorted(run["rows"] for run in runs)
    if settings.get("num_negatives", 1):
        assert [end for _, end in rows[:-1]] == [first for first, _ in rows[1:]] and rows[-1][1] == reference["rows"][1]
        in_batch = settings.get("corrector_warmup_steps", 0) * (
            settings.get("corrector_warmup_negatives") == "in-batch"
        )
        chosen = 20 * settings.get("gradient_accumulation_steps", 1) - in_batch - reference["skipped"]
        assert len(reference["selected"]) == chosen
    assert all(run["skipped"] == reference["skipped"] for run in runs)
    assert bool(reference["skipped"]) == ("non_finite" in settings)
    assert len(reference["evaluations"]) == (4 if "eval_steps" in settings else 0)
    for ours, theirs in zip(runs[0]["evaluations"], reference["evaluations"], strict=True):  # the first one evaluates
        assert ours == pytest.approx(theirs, abs=1e-3) and len(theirs) > 3
    for run in runs:
        for ours, theirs in zip(run["selected"], reference["selected"], strict=True):
            if "candidates" in settings:
                # Two rows with the same words, encoded by different processes, may come in either order.
                ours, theirs = ((rows % 203).sort(dim=1).values for rows in (ours, theirs))
            assert torch.equal(ours, theirs)
        for ours, theirs in zip(run["log"], reference["log"], strict=True):
            for name in (
                "task_loss",
                "distillation_loss",
                "teacher_weight",
                "correction_loss",
                "drift",
                "corrected_error",
                "hardness",
                "seen",
                "age",
            ):
                assert (name in ours) == (name in theirs)
                if name in theirs:
                    assert ours[name] == pytest.approx(
                        theirs[name], abs=2e-4, rel=2e-4, nan_ok="non_finite" in settings
                    ), name
        for name, value in reference["model"].items():
            torch.testing.assert_close(
                run["model"][name], value, atol=1e-4, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
            )
        assert run["steps"] == reference["steps"] and run["targets_encoded"] == reference["targets_encoded"]
        assert run["corrector"].keys() == reference["corrector"].keys() == runs[0]["corrector"].keys()
        for name, value in runs[0]["corrector"].items():
            assert torch.equal(run["corrector"][name], value), f"bit for bit on all processes: {name}"
    for name, value in reference["corrector"].items():
        # Adam's first steps have the size of its rate however small a gradient is, rounding included.
        torch.testing.assert_close(runs[0]["corrector"][name].float(), value.float(), atol=5e-3, rtol=2e-2)
    ours, theirs = gathered(runs), gathered([reference])
    if theirs is not None:
        assert torch.equal(ours["rows"], theirs["rows"]) and torch.equal(ours["written_at"], theirs["written_at"])
        torch.testing.assert_close(ours["vectors"], theirs["vectors"], atol=1e-3, rtol=1e-3)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "processes, cases",
    [(2, SOME), *(pytest.param(count, tuple(CASES), marks=pytest.mark.long) for count in (2, 4))],
    ids=lambda value: str(value) if isinstance(value, int) else "some" if value == SOME else "all",
)
def test_several_processes_train_what_one_does(one, tmp_path, processes, cases):
    folder = tmp_path / "run"
    cases = [
        case for case in cases if "mini_batch_size" not in CASES[case] or hasattr(gradcache, "_ddp_replay_context")
    ]
    launch(folder, processes, "--cases", json.dumps(cases))
    references = one(cases)
    for number, case in enumerate(cases):
        try:
            assert_same_training(results(folder, processes, case=number), references[case], case)
        except AssertionError as error:
            raise AssertionError(f"{case}: {error}") from error


@pytest.mark.parametrize(
    "case", [pytest.param("taught and checked by a cross-encoder", marks=pytest.mark.long), "judged: a cross-encoder"]
)
def test_a_teacher_that_fails_in_one_process_ends_all(case, tmp_path):
    done = launch(tmp_path, 2, "--cases", json.dumps([case]), "--teacher_fails_on", 1, check=False)
    assert done.returncode != 0
    assert "NonFiniteError: The cross-encoder's score is NaN or infinite" in done.stderr
    where = "Judging the teacher" if case.startswith("judged") else ""
    assert f"{where} has failed in another process:\n  rank 1: NonFiniteError" in done.stderr.replace("[rank0]: ", "")


@pytest.fixture
def hosts():
    """Two hosts with addresses of their own, on one wire: network namespaces."""
    names, addresses = (f"stc{os.getpid()}a", f"stc{os.getpid()}b"), ("10.213.7.1", "10.213.7.2")
    commands = [f"ip netns add {name}" for name in names]
    commands.append(f"ip link add name v0 netns {names[0]} type veth peer name v0 netns {names[1]}")
    for name, address in zip(names, addresses, strict=True):
        commands += [f"ip -n {name} addr add {address}/24 dev v0", f"ip -n {name} link set v0 up"]
        commands += [f"ip -n {name} link set lo up"]
    try:
        for command in commands:
            try:
                done = subprocess.run(command.split(), capture_output=True, text=True)
            except FileNotFoundError:
                pytest.skip("network namespaces need the ip command (Debian package iproute2)")
            if done.returncode:
                pytest.skip(f"network namespaces are not permitted here: {command}: {done.stderr.strip()}")
        yield dict(zip(names, addresses, strict=True))
    finally:
        for name in names:
            with suppress(FileNotFoundError):
                subprocess.run(["ip", "netns", "del", name], capture_output=True)


@pytest.mark.long
def test_two_hosts_train_what_one_does(one, tmp_path, hosts):
    cases, folder = list(CASES)[:3], tmp_path / "run"
    (first, master), _ = hosts.items()
    running = []
    for rank, host in enumerate(hosts):
        command = f"ip netns exec {host} {sys.executable} -m torch.distributed.run --nnodes 2 --nproc_per_node 1"
        command += f" --node_rank {rank} --master_addr {master} --master_port 29500 {TRAINING} {folder}"
        settings = environment(folder) | {"GLOO_SOCKET_IFNAME": "v0"}
        running.append(
            subprocess.Popen(
                [*command.split(), "--cases", json.dumps(cases)],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env=settings,
            )
        )
    for process in running:
        output = process.communicate(timeout=300)[0]
        assert process.returncode == 0, output[-4000:]
    for number, case in enumerate(cases):
        assert_same_training(results(folder, 2, case=number), one(cases)[case], case)
    alone = subprocess.run(["ip", "netns", "exec", first, "hostname", "-I"], capture_output=True, text=True)
    assert alone.stdout.split() == [master], "each host has its own address and no other"


@pytest.mark.long
def test_processes_that_do_not_know_of_one_another_are_refused(tmp_path):
    script = tmp_path / "script.py"
    lines = [
        "import sys",
        "from accelerate import Accelerator",
        "from st_corrector.runtime.distributed import Processes",
    ]
    lines += ["Accelerator(cpu=True) if sys.argv[1:] else Accelerator()", "print(Processes.current().size)"]
    script.write_text("\n".join(lines))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29611"]
    refused = subprocess.run([*command, script], capture_output=True, text=True, env=environment(tmp_path / "x"))
    if not torch.accelerator.is_available():
        assert refused.returncode and "2 processes have been started, but accelerate treats each" in refused.stderr
    together = subprocess.run(
        [*command, script, "cpu"], capture_output=True, text=True, env=environment(tmp_path / "x")
    )
    assert together.returncode == 0 and "".join(together.stdout.split()) == "22", together.stderr


def test_shares_are_consecutive_and_cover_everything():
    for count in (0, 1, 3, 10, 223):
        shares = Processes(0, 4).shares(count)
        assert [row for share in shares for row in range(count)[share]] == list(range(count))
        sizes = [len(range(count)[share]) for share in shares]
        assert max(sizes) - min(sizes) <= 1


def test_one_process_exchanges_nothing():
    alone, tensor = Processes(), torch.randn(3, 2, requires_grad=True)
    assert torch.equal(alone.gather(tensor), tensor) and alone.gather_with_grad(tensor, [3]) is tensor
    assert alone.sum(tensor) is tensor and alone.broadcast(tensor) is tensor and alone.counts(3, tensor.device) == [3]
    assert alone.bytes_received == 0


def _exchange_ragged(rank, store):
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=3)
    processes, counts = Processes.current(), [2, 0, 3]
    assert (processes.rank, processes.size) == (rank, 3)
    everything = torch.arange(10.0).view(5, 2)
    mine = everything[sum(counts[:rank]) : sum(counts[: rank + 1])].clone().requires_grad_()
    assert processes.counts(len(mine), mine.device) == counts
    assert torch.equal(processes.gather(mine, counts), everything)
    gathered = processes.gather_with_grad(mine, counts)
    assert torch.equal(gathered, everything)
    # Every process weighs every row; what all of them say of a row comes back to the one that sent it.
    (gathered * torch.arange(5.0)[:, None] * (rank + 1)).sum().backward()
    expected = torch.arange(5.0)[sum(counts[:rank]) : sum(counts[: rank + 1]), None].expand(-1, 2) * 6
    assert torch.equal(mine.grad, expected)
    assert int(processes.broadcast(torch.tensor([rank + 7]))) == 7
    assert processes.sum(torch.tensor([rank])).tolist() == [3]
    assert processes.bytes_received > 0
    processes.require_same(torch.tensor([5]), "This")
    with pytest.raises(ProcessError, match=r"That differs between processes: that of rank \[2\]"):
        processes.require_same(torch.tensor([rank // 2]), "That")
    torch.distributed.destroy_process_group()


def test_processes_exchange_what_is_of_unequal_length(tmp_path):
    running = [
        FORKS.Process(target=_exchange_ragged, args=(rank, tmp_path / "store"), daemon=True) for rank in range(3)
    ]
    for process in running:
        process.start()
    for process in running:
        process.join()
    assert [process.exitcode for process in running] == [0, 0, 0]


def test_a_checksum_tells_one_bit():
    tensors = {"a": torch.randn(50), "b": torch.arange(5)}
    other = {name: value.clone() for name, value in tensors.items()}
    assert torch.equal(checksum(tensors), checksum(other))
    other["a"].view(torch.int32)[17] ^= 1
    assert not torch.equal(checksum(tensors), checksum(other))
    swapped = {"a": tensors["a"].flip(0), "b": tensors["b"]}
    assert not torch.equal(checksum(tensors), checksum(swapped))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_a_part_of_a_cache_is_these_rows_of_it(dtype):
    vectors = torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
    cache = EmbeddingCache.from_blocks(vectors.split(30), dtype)
    part = cache.part(slice(25, 70))
    assert len(part) == 45 and part.corpus_size == 100 and (part.first_row, part.end) == (25, 70)
    rows = torch.tensor([69, 25, 40])
    assert torch.equal(part[rows], cache[rows])
    chunks = list(part.chunks(20))
    assert [first for first, _ in chunks] == [25, 30, 50, 60]
    assert torch.equal(torch.cat([chunk.float() for _, chunk in chunks]), cache[range(25, 70)])
    assert torch.equal(part.to(dtype=torch.float32)[rows], cache[rows])
    for wrong in (24, 70):
        with pytest.raises(IndexError, match="25 … 69"):
            part[[wrong]]
