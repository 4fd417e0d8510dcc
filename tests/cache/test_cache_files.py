"""What can happen to a cache's files: each fault is the real one."""

import json
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

import st_corrector
from st_corrector import CacheError, Corpus, EmbeddingCache, NonFiniteError, ProcessError, StorageError
from st_corrector.cache.folder import CacheFolder, Description
from st_corrector.cache.shard import Shard
from st_corrector.cli import main
from st_corrector.data.model_fingerprint import weights_fingerprint
from st_corrector.runtime.distributed import Processes


@pytest.fixture
def built(static_model, corpus, tmp_path):
    """A finished cache of four shards."""
    EmbeddingCache.build(static_model, corpus, tmp_path / "cache", shard_size=64, progress=False)
    return tmp_path / "cache"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def build(folder, derived, ready):
    torch.set_num_threads(1)
    datasets.config.HF_DATASETS_CACHE = derived
    model, corpus = make_static_model(), Corpus.from_texts(make_texts(200)[1])
    ready.set()
    EmbeddingCache.build(model, corpus, folder, shard_size=2, progress=False)


def start(folder, tmp_path):
    """A process that builds a cache, and is about to."""
    ready = FORKS.Event()
    process = FORKS.Process(target=build, args=(folder, tmp_path / "derived", ready))
    process.start()
    assert ready.wait(120)
    return process


def killed_builds(tmp_path, kills, seed):
    """Builds that were killed, each then resumed; counts of what came of them."""
    generator = np.random.default_rng(seed)
    start(tmp_path / "first", tmp_path).join()  # tokenizes
    whole, began = start(tmp_path / "whole", tmp_path), time.monotonic()
    whole.join()
    duration = time.monotonic() - began
    assert whole.exitcode == 0
    expected = contents(tmp_path / "whole")
    counts = Counter(kills=kills, before_its_end=0, same_bytes=0, shards_kept=0, finished_shards_encoded_again=0)
    for number in range(kills):
        folder = tmp_path / f"killed-{number}"
        process = start(folder, tmp_path)
        time.sleep(generator.uniform(0, duration))
        process.kill()
        process.join()
        done = {path: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
        if not CacheFolder(folder).is_finished:
            counts["before_its_end"] += 1
            counts["shards_kept"] += len(done)
            with pytest.raises(CacheError):
                EmbeddingCache.load(folder)
        again = start(folder, tmp_path)
        again.join()
        assert again.exitcode == 0
        counts["same_bytes"] += contents(folder) == expected
        counts["finished_shards_encoded_again"] += sum(
            path.stat().st_mtime_ns != written for path, written in done.items()
        )
        shutil.rmtree(folder)
    return counts


def test_a_build_killed_at_any_moment_is_completed_to_the_same_bytes(tmp_path):
    counts = killed_builds(tmp_path, 3, seed=0)
    assert counts["same_bytes"] == 3 and counts["finished_shards_encoded_again"] == 0 and counts["before_its_end"] > 0


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_a_hundred_builds_killed_at_any_moment(tmp_path, report):
    counts = killed_builds(tmp_path, 100, seed=1)
    report("kills of a cache build", **counts)
    assert counts["same_bytes"] == 100 and counts["finished_shards_encoded_again"] == 0
    assert counts["before_its_end"] > 50 and counts["shards_kept"] > counts["before_its_end"]


@pytest.mark.parametrize("place", ["the embeddings", "the digest", "the header"])
def test_a_flipped_bit_is_found_and_mended(static_model, corpus, built, capsys, place):
    before = contents(built)
    shard = built / "embeddings-000002.safetensors"
    data = bytearray(shard.read_bytes())
    position = {"the embeddings": len(data) - 100, "the digest": data.index(b'"}') - 5, "the header": 9}[place]
    data[position] ^= 1
    shard.write_bytes(data)
    assert main(["cache", "verify", str(built)]) == 1
    said = capsys.readouterr().out
    assert "embeddings-000002.safetensors" in said and "1 of 4 shards are damaged" in said
    with pytest.raises(CacheError, match=r"embeddings-000002\.safetensors is .*\n1 shards in all"):
        EmbeddingCache.load(built, verify=True)
    EmbeddingCache.repair(static_model, corpus, built)
    assert contents(built) == before
    assert main(["cache", "verify", str(built)]) == 0


def test_a_shard_that_was_cut_short_or_is_missing_is_named_and_mended(static_model, corpus, built):
    before = contents(built)
    shard = built / "embeddings-000001.safetensors"
    shard.write_bytes(before[shard.name][:-1])
    with pytest.raises(CacheError, match=r"embeddings-000001\.safetensors is damaged: it has [\d,]+ bytes"):
        EmbeddingCache.load(built)
    EmbeddingCache.repair(static_model, corpus, built)
    assert contents(built) == before
    shard.unlink()
    with pytest.raises(CacheError, match=r"embeddings-000001\.safetensors is missing"):
        EmbeddingCache.load(built)
    EmbeddingCache.repair(static_model, corpus, built)
    assert contents(built) == before


def test_only_what_is_damaged_is_encoded_anew(static_model, corpus, built, monkeypatch):
    shard = built / "embeddings-000003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    encoded = []
    from st_corrector.data.encoding import DocumentEncoder

    encode = DocumentEncoder.encode

    def watched(self, model, rows, **settings):
        encoded.extend(rows)
        return encode(self, model, rows, **settings)

    monkeypatch.setattr(DocumentEncoder, "encode", watched)
    EmbeddingCache.repair(static_model, corpus, built)
    assert set(encoded) == {0, *range(192, 200)}  # row 0 says how wide embeddings are


def test_a_repair_that_is_killed_leaves_nothing_that_looks_whole(static_model, corpus, built, monkeypatch):
    before, unlink = contents(built), Path.unlink
    (built / "embeddings-000001.safetensors").write_bytes(before["embeddings-000001.safetensors"][:-1])
    for stop_at in ("embeddings-000001.safetensors", "manifest.json"):

        def killed(self, *args, name=stop_at, **settings):
            if self.name == name:
                raise KeyboardInterrupt
            unlink(self, *args, **settings)

        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(Path, "unlink", killed)
            EmbeddingCache.repair(static_model, corpus, built)
        with pytest.raises(CacheError, match=r"embeddings-000001\.safetensors is (damaged|missing)"):
            EmbeddingCache.load(built)
    EmbeddingCache.repair(static_model, corpus, built)
    assert contents(built) == before


def test_what_was_damaged_while_a_build_had_stopped_is_mended(static_model, corpus, built):
    before = contents(built)
    (built / "manifest.json").unlink()
    description = {name: value for name, value in json.loads(before["manifest.json"]).items() if name != "shards"}
    (built / "build.json").write_text(json.dumps(description))
    shard = built / "embeddings-000002.safetensors"
    for data in (before[shard.name][:-1], before["embeddings-000001.safetensors"]):
        shard.write_bytes(data)
        with pytest.raises(CacheError, match=r"embeddings-000002\.safetensors is .*EmbeddingCache\.repair"):
            EmbeddingCache.build(static_model, corpus, built, progress=False)
    EmbeddingCache.repair(static_model, corpus, built)
    assert contents(built) == before


def test_a_finished_cache_is_shared_and_need_not_be_writable(static_model, corpus, small_disk):
    EmbeddingCache.build(static_model, corpus, small_disk / "cache", progress=False)
    with CacheFolder(small_disk / "cache").locked():
        assert len(EmbeddingCache.build(static_model, corpus, small_disk / "cache", progress=False)) == 200
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert len(EmbeddingCache.build(static_model, corpus, small_disk / "cache", progress=False)) == 200


def test_a_cache_of_something_else_is_not_repaired_away(corpus, built):
    before = contents(built)
    (built / "embeddings-000003.safetensors").write_bytes(b"")
    damaged = contents(built)
    with pytest.raises(CacheError, match="weights: "):
        EmbeddingCache.repair(make_static_model(1), corpus, built)
    assert contents(built) == damaged != before


def test_what_does_not_fit_on_the_disk_is_refused_before_encoding(small_disk):
    vectors = torch.randn(10_000, 64)
    with pytest.raises(StorageError, match=r"takes 2\.6 MB, and the disk of .* has 0\.3 MB left"):
        EmbeddingCache.from_tensor(vectors).save(small_disk / "cache")
    assert not (small_disk / "cache").exists(), "the same call will do when there is room"


def test_a_disk_that_fills_up_loses_nothing_that_was_finished(static_model, corpus, small_disk, tmp_path):
    EmbeddingCache.build(static_model, corpus, tmp_path / "whole", shard_size=10, progress=False)
    folder = small_disk / "cache"
    write, hog = CacheFolder.write, small_disk / "somebody else's"

    def filling(self, description, number, shard):
        if number == 7:
            free = os.statvfs(small_disk)
            hog.write_bytes(bytes(free.f_bavail * free.f_bsize))
        write(self, description, number, shard)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(CacheFolder, "write", filling)
        with pytest.raises(StorageError, match=r"cannot be written: No space left on device\. Make room"):
            EmbeddingCache.build(static_model, corpus, folder, shard_size=10, progress=False)
    assert sorted(contents(folder)) == ["build.json", *(f"embeddings-{n:06d}.safetensors" for n in range(7))]
    hog.unlink()
    EmbeddingCache.build(static_model, corpus, folder, progress=False)
    assert contents(folder) == contents(tmp_path / "whole")


def test_a_read_only_folder_is_refused(static_model, corpus, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(StorageError, match=r"cannot be written: Read-only file system\. Choose a folder"):
        EmbeddingCache.build(static_model, corpus, small_disk / "cache", progress=False)


def test_a_folder_that_vanishes_is_an_error_and_not_half_a_cache(static_model, corpus, tmp_path, monkeypatch):
    write, folder = CacheFolder.write, tmp_path / "cache"

    def vanishing(self, description, number, shard):
        if number == 2:
            folder.rename(tmp_path / "elsewhere")
        write(self, description, number, shard)

    monkeypatch.setattr(CacheFolder, "write", vanishing)
    with pytest.raises(StorageError, match=r"embeddings-000002\.safetensors cannot be written: No such file"):
        EmbeddingCache.build(static_model, corpus, folder, shard_size=64, progress=False)
    monkeypatch.undo()
    assert len(EmbeddingCache.build(static_model, corpus, tmp_path / "elsewhere", progress=False)) == 200


HOLD = """
import sys, time
from pathlib import Path
from st_corrector.cache.folder import CacheFolder
with CacheFolder(Path(sys.argv[1])).locked():
    print("held", flush=True)
    time.sleep(600)
"""


def test_two_builders_do_not_meet_and_a_dead_one_holds_nothing(static_model, corpus, tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "cache")], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(CacheError, match="Another process is building a cache in"):
        EmbeddingCache.build(static_model, corpus, tmp_path / "cache", progress=False)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert len(EmbeddingCache.build(static_model, corpus, tmp_path / "cache", progress=False)) == 200


def _fail_on_one(rank, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=3)
    processes = Processes.current()
    own = (
        pytest.raises(ValueError, match="rank 1's own")
        if rank == 1
        else pytest.raises(
            ProcessError, match=r"Working has failed in another process:\n  rank 1: ValueError: rank 1's own"
        )
    )
    with own, processes.together("Working"):
        if rank == 1:
            raise ValueError("rank 1's own")
    datasets.config.HF_DATASETS_CACHE = f"{folder}/derived"
    model, corpus = make_static_model(), Corpus.from_texts(make_texts(200)[1])
    fingerprint = weights_fingerprint(model)
    st_corrector.data.encoding.weights_fingerprint = lambda model: fingerprint
    if rank == 1:
        model[0].embedding.weight.data.fill_(torch.nan)
    ours = (
        pytest.raises(NonFiniteError, match="targets are NaN")
        if rank == 1
        else pytest.raises(
            ProcessError,
            match=r"Building the cache has failed in another process:\n  rank 1: NonFiniteError: The embedd",
        )
    )
    with ours:
        EmbeddingCache.build(model, corpus, f"{folder}/cache", shard_size=20, progress=False)
    torch.distributed.destroy_process_group()


def test_what_fails_in_one_process_ends_all_with_its_name(tmp_path):
    torch.multiprocessing.start_processes(_fail_on_one, (str(tmp_path),), nprocs=3, start_method="forkserver")
    assert not CacheFolder(tmp_path / "cache").is_finished


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest.update(rows=10**15),
        lambda manifest: manifest.update(rows=-1),
        lambda manifest: manifest.update(dim="24"),
        lambda manifest: manifest.update(shard_size=0),
        lambda manifest: manifest.update(dtype="pickle"),
        lambda manifest: manifest.update(fingerprint=[]),
        lambda manifest: manifest.update(shards=manifest["shards"][:-1]),
        lambda manifest: manifest["shards"][0].update(bytes="many"),
        lambda manifest: manifest["shards"].__setitem__(0, "../../etc/passwd"),
        lambda manifest: manifest.pop("shards"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(built, change):
    path = built / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(CacheError, match=r"manifest\.json is damaged: it contradicts itself"):
        EmbeddingCache.load(built)


@pytest.mark.parametrize("data", [b"", b"[]", b"\xff", b"[" * 200_000, b'{"schema": 2}', b"1" * 10_000])
def test_a_manifest_that_is_none_is_refused(built, data):
    (built / "manifest.json").write_bytes(data)
    with pytest.raises(CacheError, match=r"not readable|does not describe a cache of schema 2"):
        EmbeddingCache.load(built)


@pytest.mark.parametrize("name", ["embeddings-000001.safetensors", "manifest.json"])
def test_nothing_outside_of_the_folder_is_read(built, tmp_path, name):
    (built / name).rename(tmp_path / "elsewhere")
    (built / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CacheError, match=rf"{name} is a link to .*elsewhere, outside of the cache"):
        EmbeddingCache.load(built)


def test_a_file_larger_than_it_says_or_smaller_is_refused_before_anything_is_allocated(built):
    header = json.dumps({"embeddings": {"dtype": "F32", "shape": [64, 10**12], "data_offsets": [0, 256 * 10**12]}})
    data = len(header).to_bytes(8, "little") + header.encode() + bytes(1000)
    (built / "embeddings-000000.safetensors").write_bytes(data)
    manifest = json.loads((built / "manifest.json").read_text())
    manifest["shards"][0]["bytes"], manifest["dim"] = len(data), 10**12
    (built / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CacheError, match=r"embeddings-000000\.safetensors is damaged"):
        EmbeddingCache.load(built)


def test_a_shard_of_another_cache_is_told_apart(static_model, built, tmp_path):
    other = Corpus.from_texts([f"word{n} word{n + 1}" for n in range(200)])
    EmbeddingCache.build(static_model, other, tmp_path / "other", shard_size=64, progress=False)
    name = "embeddings-000001.safetensors"
    (built / name).write_bytes((tmp_path / "other" / name).read_bytes())
    with pytest.raises(CacheError, match=r"embeddings-000001\.safetensors is not the file that was written"):
        EmbeddingCache.load(built)


def test_the_shell_says_what_a_cache_is(built, tmp_path, capsys):
    assert main(["cache", "info", str(built)]) == 0
    said = capsys.readouterr().out
    assert "200 targets of 24 dimensions in float32, 4 shards" in said and "finished" in said and '"weights"' in said
    folder = CacheFolder(tmp_path / "begun")
    with folder.locked():
        folder.begin(Description(200, 24, "float32", 64, {"corpus": "x"}))
        folder.write(folder.description(), 0, Shard(torch.zeros(64, 24)))
    assert main(["cache", "info", str(tmp_path / "begun")]) == 0
    assert "not finished: 3 shards are missing" in capsys.readouterr().out
    assert main(["cache", "verify", str(tmp_path / "begun")]) == 1
    assert "EmbeddingCache.build completes it" in capsys.readouterr().err
    assert main(["cache", "info", str(tmp_path)]) == 1
    assert "holds no embedding cache" in capsys.readouterr().err
