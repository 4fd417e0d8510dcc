"""What takes files from anywhere: each target takes any bytes, and gives a result or a :class:`StCorrectorError`.

With hypothesis: ``make test`` (some inputs) and ``make test-long`` (10,000 for each). With atheris, where it is
installed, guided by coverage and without an end::

    python tests/fuzz/targets.py jsonl|gzip|qrels|manifest|build|corrector|record [libFuzzer options]
"""

from __future__ import annotations

import gzip
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from st_corrector import EmbeddingCache, StCorrectorError
from st_corrector.cache.folder import CacheFolder
from st_corrector.correctors import make_corrector, read_settings
from st_corrector.data.beir import read_jsonl, read_qrels
from st_corrector.reporting.record import FILE, RunRecord

FOLDER = Path(tempfile.mkdtemp(prefix="fuzz-"))


def read(name: str, data: bytes) -> Path:
    path = FOLDER / name
    path.write_bytes(data)
    return path


def jsonl(data: bytes) -> None:
    """Lines of targets or queries."""
    for record in read_jsonl(read("corpus.jsonl", data)):
        assert all(isinstance(record[name], str) for name in ("_id", "text"))
        json.dumps(record, ensure_ascii=False).encode("utf-8")


def compressed(data: bytes) -> None:
    """The same as they come over the network: whole, cut short, or not gzip at all."""
    cut = data[0] if data else 0
    whole = gzip.compress(data, 1)
    refused = None
    for each in (data, whole[: len(whole) * cut // 255], whole):
        try:
            for _ in read_jsonl(read("corpus.jsonl.gz", each)):
                pass
            refused = None
        except StCorrectorError as error:
            refused = error
    if refused:
        raise refused


def qrels(data: bytes) -> None:
    """Judgements."""
    for query, target, score in read_qrels(read("train.tsv", data)):
        assert query and target and score == score


def cache() -> Path:
    """A cache of three shards."""
    path = FOLDER / "cache"
    if not path.exists():
        EmbeddingCache.from_tensor(torch.randn(40_000, 2)).save(path)
    return path


def manifest(data: bytes) -> None:
    """A finished cache's manifest."""
    (cache() / "manifest.json").write_bytes(data)
    loaded = EmbeddingCache.load(cache())
    loaded[[0, len(loaded) - 1]]
    CacheFolder(cache()).damaged()


def build(data: bytes) -> None:
    """What says that a cache is being built."""
    folder = FOLDER / "begun"
    folder.mkdir(exist_ok=True)
    (folder / "build.json").write_bytes(data)
    description = CacheFolder(folder).description()
    CacheFolder(folder).missing(description)
    CacheFolder(folder).require(CacheFolder(cache()).description() if description.rows % 2 else description)


def corrector(data: bytes) -> None:
    """A corrector's name, and its settings behind the first line's end."""
    name, _, settings = data.decode("utf-8", "surrogateescape").partition("\n")
    make_corrector(name, 4, **read_settings(settings))


def record(data: bytes) -> None:
    """The record of a run: what is read is what is written again."""
    folder = FOLDER / "run"
    folder.mkdir(exist_ok=True)
    (folder / FILE).write_bytes(data)
    found = RunRecord.load(folder)
    found.save(folder)
    assert repr(RunRecord.load(folder)) == repr(found)  # in which NaN is NaN


TARGETS: dict[str, Callable[[bytes], None]] = {
    "jsonl": jsonl,
    "gzip": compressed,
    "qrels": qrels,
    "manifest": manifest,
    "build": build,
    "corrector": corrector,
    "record": record,
}


def escapes_nothing(target: str, data: bytes) -> bool:
    """Whether it gave a result; what is no :class:`StCorrectorError` goes through."""
    try:
        TARGETS[target](data)
    except StCorrectorError as error:
        assert len(str(error)) < 20_000, "a message, not a dump"
        return False
    return True


if __name__ == "__main__":
    import atheris

    chosen = sys.argv.pop(1)
    atheris.Setup(sys.argv, lambda data: escapes_nothing(chosen, data))
    atheris.Fuzz()
