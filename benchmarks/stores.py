"""Vectors a second: an upgrade in a vector store, beside a plain copy by the store's own client.

    python benchmarks/stores.py

Each store gets 100,000 vectors of 384 dimensions with a payload (Qdrant in its embedded mode, which keeps points in
SQLite and waits for the disk after each: TMPDIR may point into memory). They are copied into a new table or collection
by the store's own client, read and written through it in blocks of the same size; then upgraded into another by a ridge
corrector. The result is checked before a time is written down: every vector, every payload. Ratios are those of one
run, in which both were measured.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lancedb
import numpy as np
import pgserver
import psycopg
import pyarrow as pa
import torch
import torch.nn.functional as F
from pgvector.psycopg import register_vector
from qdrant_client import QdrantClient, models

from st_corrector import RidgeCorrector
from st_corrector.stores.base import AT_ONCE
from st_corrector.stores.lance import LanceVectors
from st_corrector.stores.pgvector import PgVectors
from st_corrector.stores.qdrant import QdrantVectors

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "recipes"))
from common import versions  # noqa: E402

DIM = 384


def stored(count: int) -> np.ndarray:
    return F.normalize(torch.randn(count, DIM, generator=torch.Generator().manual_seed(0)), dim=-1).numpy()


def corrector() -> RidgeCorrector:
    made = RidgeCorrector(DIM)
    made.weight = torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(1)) / 40
    return made


def timed(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


Read = Callable[[str], Iterator[tuple[int, np.ndarray, str]]]


@contextmanager
def postgresql(folder: Path, vectors: np.ndarray) -> Iterator[tuple[Callable, Callable, Read]]:
    server = pgserver.get_server(folder / "postgres")
    with psycopg.connect(server.get_uri(), autocommit=True) as connection:
        connection.execute("CREATE EXTENSION vector")
        register_vector(connection)
        columns = f"(id bigint PRIMARY KEY, title text NOT NULL, embedding vector({DIM}) NOT NULL)"
        connection.execute(f"CREATE TABLE docs {columns}")

        def put(table: str, rows: list[tuple]) -> None:
            with connection.cursor().copy(f"COPY {table} FROM STDIN (FORMAT BINARY)") as copy:
                copy.set_types(["int8", "text", "vector"])
                for row in rows:
                    copy.write_row(row)

        for start in range(0, len(vectors), AT_ONCE):
            rows = range(start, min(start + AT_ONCE, len(vectors)))
            put("docs", [(n, f"title {n}", vectors[n]) for n in rows])

        def plain() -> None:
            connection.execute(f"CREATE TABLE plain {columns}")
            for start in range(0, len(vectors), AT_ONCE):
                keys = list(range(start, min(start + AT_ONCE, len(vectors))))
                query = "SELECT id, title, embedding FROM docs WHERE id = ANY(%s)"
                put("plain", connection.cursor(binary=True).execute(query, (keys,)).fetchall())

        def upgrade() -> None:
            address = f"{server.get_uri()}#docs"
            PgVectors(address).upgrade(corrector(), address.replace("#docs", "#upgraded"), progress=False)

        def read(table: str) -> Iterator[tuple[int, np.ndarray, str]]:
            for key, title, vector in connection.cursor(binary=True).execute(
                f"SELECT id, title, embedding FROM {table}"
            ):
                yield key, vector.to_numpy(), title

        yield plain, upgrade, read
    server.cleanup()


@contextmanager
def lance(folder: Path, vectors: np.ndarray) -> Iterator[tuple[Callable, Callable, Read]]:
    database = lancedb.connect(folder / "lance")
    names = list(range(len(vectors)))
    lists = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), DIM)
    docs = database.create_table(
        "docs", pa.table({"id": names, "title": [f"title {n}" for n in names], "vector": lists})
    )

    def plain() -> None:
        made = database.create_table("plain", schema=docs.schema)
        for start in range(0, len(vectors), AT_ONCE):
            made.add(docs.take_offsets(list(range(start, min(start + AT_ONCE, len(vectors))))).to_arrow())

    def upgrade() -> None:
        address = f"lancedb:{folder / 'lance'}#docs"
        LanceVectors(address).upgrade(corrector(), address.replace("#docs", "#upgraded"), progress=False)

    def read(table: str) -> Iterator[tuple[int, np.ndarray, str]]:
        found = database.open_table(table).to_arrow()
        matrix = found["vector"].combine_chunks().flatten().to_numpy().reshape(-1, DIM)
        yield from zip(found["id"].to_pylist(), matrix, found["title"].to_pylist(), strict=True)

    yield plain, upgrade, read


@contextmanager
def qdrant(folder: Path, vectors: np.ndarray) -> Iterator[tuple[Callable, Callable, Read]]:
    client = QdrantClient(path=str(folder / "qdrant"))
    config = models.VectorParams(size=DIM, distance=models.Distance.COSINE)

    def put(name: str, points: list[models.PointStruct]) -> None:
        for start in range(0, len(points), 1_024):
            client.upsert(name, points[start : start + 1_024], wait=True)

    client.create_collection("docs", config)
    put(
        "docs",
        [models.PointStruct(id=n, vector=v.tolist(), payload={"title": f"title {n}"}) for n, v in enumerate(vectors)],
    )

    def plain() -> None:
        client.create_collection("plain", config)
        offset = None
        while True:
            some, offset = client.scroll("docs", limit=1_024, offset=offset, with_vectors=True)
            put("plain", [models.PointStruct(id=each.id, vector=each.vector, payload=each.payload) for each in some])
            if offset is None:
                return

    def upgrade() -> None:
        address = f"qdrant:{folder / 'qdrant'}#docs"
        QdrantVectors(address, client=client).upgrade(
            corrector(), address.replace("#docs", "#upgraded"), progress=False
        )

    def read(name: str) -> Iterator[tuple[int, np.ndarray, str]]:
        offset = None
        while True:
            some, offset = client.scroll(name, limit=1_024, offset=offset, with_vectors=True)
            yield from ((each.id, np.array(each.vector), each.payload["title"]) for each in some)
            if offset is None:
                return

    yield plain, upgrade, read
    client.close()


def measured(store: Callable, count: int) -> dict[str, Any]:
    vectors = stored(count)
    expected = corrector()(torch.from_numpy(vectors)).numpy()
    with tempfile.TemporaryDirectory() as folder, store(Path(folder), vectors) as (plain, upgrade, read):
        seconds = {"plain": timed(plain), "upgrade": timed(upgrade)}
        for name, wanted in (("plain", vectors), ("upgraded", expected), ("docs", vectors)):
            seen = set()
            for key, vector, title in read(name):
                if key in seen or title != f"title {key}" or np.abs(vector - wanted[key]).max() > 1e-5:
                    raise SystemExit(f"{store.__name__}: row {key} of {name} is wrong")
                seen.add(key)
            if len(seen) != count:
                raise SystemExit(f"{store.__name__}: {name} has {len(seen):,} of {count:,} rows")
    return {
        "count": count,
        "dim": DIM,
        **{f"{name}_vectors_per_second": round(count / value) for name, value in seconds.items()},
        "ratio": round(seconds["upgrade"] / seconds["plain"], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "serving")
    args = parser.parse_args()
    found = {}
    for store in (postgresql, lance, qdrant):
        found[store.__name__] = measured(store, args.count)
        print(store.__name__, found[store.__name__], flush=True)
    told = {"command": shlex.join(["python", *sys.argv]), "versions": versions()}
    args.results.mkdir(parents=True, exist_ok=True)
    (args.results / "stores.json").write_text(json.dumps({"stores": found, **told}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
