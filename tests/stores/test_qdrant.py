"""A collection of Qdrant is upgraded while it serves: nothing is lost, nothing is done twice, and payloads stay."""

import sqlite3
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("qdrant_client")

from qdrant_client import QdrantClient, models
from support.databases import without_waiting
from support.kills import killed_while_it_writes

from st_corrector import IndexMap, InputError, RidgeCorrector, StorageError
from st_corrector.stores.opening import open_vectors
from st_corrector.stores.qdrant import QdrantVectors

DIM = 16


def vectors(count: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(count, DIM, generator=torch.Generator().manual_seed(seed)), dim=-1)


def params(distance=models.Distance.COSINE, size: int = DIM) -> models.VectorParams:
    return models.VectorParams(size=size, distance=distance, hnsw_config=models.HnswConfigDiff(m=8))


@pytest.fixture
def client(tmp_path, quick_sqlite):
    """The client's embedded mode."""
    made = QdrantClient(path=str(tmp_path / "qdrant"))
    yield made
    made.close()


def filled(client, count: int = 60, name: str | None = None, distance=models.Distance.COSINE) -> torch.Tensor:
    stored = vectors(count)
    config = params(distance) if name is None else {name: params(distance), "other": params(size=3)}
    client.create_collection("docs", vectors_config=config)
    points = [
        models.PointStruct(
            id=n,
            vector=each.tolist() if name is None else {name: each.tolist(), "other": [1.0, 0.0, 0.0]},
            payload={"title": f"title {n}", "tags": [n]},
        )
        for n, each in enumerate(stored)
    ]
    client.upsert("docs", points)
    return stored


def turned(normalize: bool = True, seed: int = 1) -> RidgeCorrector:
    made = RidgeCorrector(DIM, normalize=normalize)
    made.weight = torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(seed)) / 3
    return made


def points(client, collection: str = "docs") -> dict:
    found, offset = {}, None
    while True:
        some, offset = client.scroll(collection, limit=1_000, offset=offset, with_vectors=True)
        found |= {each.id: (each.vector, each.payload) for each in some}
        if offset is None:
            return found


def opened(client, tmp_path, collection: str = "docs", ids=None) -> QdrantVectors:
    return QdrantVectors(f"qdrant:{tmp_path / 'qdrant'}#{collection}", ids, client)


@pytest.mark.parametrize("name", [pytest.param(None, marks=pytest.mark.long), "text"])
@pytest.mark.parametrize("in_place", [False, True])
def test_a_collection_is_upgraded_with_its_payload(client, tmp_path, name, in_place):
    stored, how = filled(client, name=name), turned()
    change = models.CreateAlias(collection_name="docs", alias_name="live")
    client.update_collection_aliases([models.CreateAliasOperation(create_alias=change)])
    before = points(client)
    source = opened(client, tmp_path, ("live" if in_place else "docs") + (f":{name}" if name else ""))
    assert (source.count, source.dim) == (60, DIM)
    torch.testing.assert_close(source.take(np.array([3, 59, 7])), stored[[3, 59, 7]], atol=1e-6, rtol=0)
    output = None if in_place else f"qdrant:{tmp_path / 'qdrant'}#docs_new"
    source.upgrade(how, output, progress=False)
    after, expected = points(client, "live" if in_place else "docs_new"), how(stored)
    assert after.keys() == before.keys()
    for n, (vector, payload) in after.items():
        np.testing.assert_allclose(vector if name is None else vector["text"], expected[n], atol=1e-5)
        assert payload == before[n][1] and (name is None or vector["other"] == before[n][0]["other"])
    assert points(client) == before, "the old collection is as it was"
    made = client.get_collection("live" if in_place else "docs_new").config.params.vectors
    assert (made if name is None else made["text"]) == params()
    if not in_place:
        torch.testing.assert_close(source.at(output).take(np.arange(9)), expected[:9], atol=1e-5, rtol=0)
        with pytest.raises(InputError, match="exists already"):
            source.upgrade(how, output, progress=False)


def test_rows_are_those_of_the_corpus_and_encoded_ones_take_their_places(client, tmp_path):
    stored, order = filled(client), np.random.default_rng(0).permutation(60)
    source = opened(client, tmp_path, ids=[str(n) for n in order])
    torch.testing.assert_close(source.take(np.arange(60)), stored[order], atol=1e-6, rtol=0)
    fresh = vectors(2, seed=5)
    output = f"qdrant:{tmp_path / 'qdrant'}#docs_new"
    source.upgrade(IndexMap(turned(), rows=np.array([4, 9]), fresh=fresh), output, progress=False)
    after = points(client, "docs_new")
    for place, each in zip((4, 9), fresh, strict=True):
        np.testing.assert_allclose(after[int(order[place])][0], each, atol=1e-5)
    with pytest.raises(InputError, match="the ids of the corpus must be the keys"):
        opened(client, tmp_path, ids=["x"])


@pytest.mark.parametrize("field", ["doc", "metadata.doc"])
def test_ids_may_be_in_the_payload(client, tmp_path, field):
    stored, how = filled(client), turned()

    def told(name):
        return {"doc": name} if field == "doc" else {"metadata": {"doc": name, "page": 3}}

    client.set_payload("docs", told("no target"), points=[59])
    for n in range(58):
        client.set_payload("docs", told(f"d{n}"), points=[n])
    names = [f"d{n}" for n in reversed(range(58))]
    source = opened(client, tmp_path, f"docs@{field}", names)
    torch.testing.assert_close(source.take(np.arange(58)), stored[:58].flip(0), atol=1e-6, rtol=0)
    output, fresh = f"qdrant:{tmp_path / 'qdrant'}#docs_new@{field}", vectors(1, seed=5)
    source.upgrade(IndexMap(how, rows=np.array([0]), fresh=fresh), output, progress=False)
    after, expected = points(client, "docs_new"), how(stored)
    assert len(after) == 60 and told("d3").items() <= after[3][1].items(), "all points, also those that are no targets"
    expected[57] = fresh[0]
    np.testing.assert_allclose(np.array([after[n][0] for n in range(60)]), expected, atol=1e-5)
    torch.testing.assert_close(source.at(output).take(np.arange(58)), expected[:58].flip(0), atol=1e-5, rtol=0)
    with pytest.raises(InputError, match=r"1 are not there \('d58'\): the ids .* must be those of that field"):
        opened(client, tmp_path, f"docs@{field}", ["d58"])
    client.set_payload("docs", told("d3"), points=[58])
    with pytest.raises(InputError, match="several rows have the id 'd3'"):
        opened(client, tmp_path, f"docs@{field}", names)
    assert opened(client, tmp_path, f"docs@{field}", names[:9]).count == 9, (
        "of those that are no targets it does not matter"
    )


def test_a_field_that_no_point_has_is_told(client, tmp_path):
    filled(client)
    with pytest.raises(InputError, match="no row has anything in that field"):
        opened(client, tmp_path, "docs@dok", ["d1"])


def test_what_another_process_has_finished_is_left_as_it_is(client, tmp_path, monkeypatch):
    filled(client)
    output = f"qdrant:{tmp_path / 'qdrant'}#docs_new"

    def meanwhile(self, place, how, keys):
        monkeypatch.undo()
        opened(client, tmp_path).upgrade(turned(), output, progress=False)
        client.upsert("docs_new", [models.PointStruct(id=999, vector=vectors(1)[0].tolist(), payload={"new": 1})])

    monkeypatch.setattr(QdrantVectors, "carry_over", meanwhile)
    with pytest.raises(InputError, match="Another process has finished docs_new"):
        opened(client, tmp_path).upgrade(turned(), output, progress=False)
    assert points(client, "docs_new")[999][1] == {"new": 1}


def test_another_of_the_named_vectors_is_not_taken_for_the_one_that_was_begun(client, tmp_path, monkeypatch):
    stored, how, output = vectors(60), turned(), f"qdrant:{tmp_path / 'qdrant'}#docs_new"
    client.create_collection("docs", vectors_config={"a": params(), "b": params()})
    of = [models.PointStruct(id=n, vector={"a": each.tolist(), "b": each.tolist()}) for n, each in enumerate(stored)]
    client.upsert("docs", of)
    monkeypatch.setattr(QdrantVectors, "finish", lambda self, place: None)
    opened(client, tmp_path, "docs:a").upgrade(how, output, progress=False)
    monkeypatch.undo()
    opened(client, tmp_path, "docs:b").upgrade(how, output, progress=False)
    after, expected = points(client, "docs_new"), how(stored)
    np.testing.assert_allclose([after[n][0]["b"] for n in range(60)], expected, atol=1e-5)
    np.testing.assert_allclose([after[n][0]["a"] for n in range(60)], stored, atol=1e-5)


def test_points_that_are_written_meanwhile_are_carried_over_too(client, tmp_path, monkeypatch):
    stored, how, late, calls = filled(client), turned(), vectors(2, seed=9), []
    source, carry_over = opened(client, tmp_path), QdrantVectors.carry_over

    def while_it_runs(self, place, how, keys):
        carry_over(self, place, how, keys)
        if not calls:  # changed, new, gone
            made = [models.PointStruct(id=n, vector=late[i].tolist(), payload={}) for i, n in enumerate((0, 900))]
            client.upsert("docs", made)
            client.delete("docs", models.PointIdsList(points=[1]))
            client.set_payload("docs", {"title": "changed"}, points=[2])
        calls.append(keys)

    monkeypatch.setattr(QdrantVectors, "carry_over", while_it_runs)
    source.upgrade(how, f"qdrant:{tmp_path / 'qdrant'}#docs_new", progress=False)
    assert [len(each) for each in calls] == [60, 3], "the rest, once"
    after = points(client, "docs_new")
    assert after.keys() == {0, *range(2, 60), 900}
    assert after[2][1]["title"] == "changed"
    for name, vector in ((0, late[0]), (900, late[1]), (5, stored[5])):
        np.testing.assert_allclose(after[name][0], how(vector[None])[0], atol=1e-5)


def test_what_another_corrector_has_begun_is_made_again(client, tmp_path, monkeypatch):
    stored, output = filled(client), f"qdrant:{tmp_path / 'qdrant'}#docs_new"
    monkeypatch.setattr(QdrantVectors, "finish", lambda self, place: None)
    opened(client, tmp_path).upgrade(turned(seed=2), output, progress=False)
    monkeypatch.undo()
    opened(client, tmp_path).upgrade(turned(), output, progress=False)
    expected = turned()(stored)
    for n, (vector, payload) in points(client, "docs_new").items():
        np.testing.assert_allclose(vector, expected[n], atol=1e-5)
        assert payload.keys() == {"title", "tags"}


@pytest.mark.parametrize("step", ["update_collection_aliases", "delete_payload"])
def test_an_end_that_fails_is_made_good_and_nothing_is_mapped_twice(client, tmp_path, monkeypatch, step):
    stored, how = filled(client), turned()
    change = models.CreateAlias(collection_name="docs", alias_name="live")
    client.update_collection_aliases([models.CreateAliasOperation(create_alias=change)])

    def fails(*given, **named):
        raise RuntimeError("killed")

    monkeypatch.setattr(client, step, fails)
    with pytest.raises(RuntimeError, match="killed"):
        opened(client, tmp_path, "live").upgrade(how, None, progress=False)
    monkeypatch.undo()
    if step == "update_collection_aliases":
        opened(client, tmp_path, "live").upgrade(how, None, progress=False)
    for _ in range(2):
        with pytest.raises(InputError, match="upgraded in place already"):
            opened(client, tmp_path, "live").upgrade(how, None, progress=False)
    expected = how(stored)
    for n, (vector, payload) in points(client, "live").items():
        np.testing.assert_allclose(vector, expected[n], atol=1e-5)
        assert payload == {"title": f"title {n}", "tags": [n]}


def test_what_cannot_be_opened_or_does_not_fit(client, tmp_path):
    filled(client, 20)
    client.create_collection("two", vectors_config={"a": params(), "b": params()})
    client.create_collection("none", vectors_config=params())
    for name, message in (
        ("nothing", "there is no collection nothing"),
        ("", "which collection"),
        ("two", r"there are \['a', 'b'\]"),
        ("docs:x", "which vectors"),
        ("none", "has no points"),
    ):
        with pytest.raises(InputError, match=message):
            opened(client, tmp_path, name)
    with pytest.raises(InputError, match="there is no folder"):
        open_vectors("qdrant:/nowhere#docs")
    with pytest.raises(InputError, match="another process is at this folder"):
        open_vectors(f"qdrant:{tmp_path / 'qdrant'}#docs")
    with pytest.raises(StorageError, match="cannot be reached"):
        open_vectors("qdrant:http://127.0.0.1:9#docs")
    source, before = opened(client, tmp_path), points(client)
    with pytest.raises(InputError, match="the corrector maps from 24"):
        source.upgrade(RidgeCorrector(24), f"{source.address}_new", progress=False)
    with pytest.raises(InputError, match="compares by cosine, and the model by dot product"):
        source.upgrade(turned(normalize=False), f"{source.address}_new", progress=False)
    client.create_collection("manhattan", params(models.Distance.MANHATTAN))
    client.upsert("manhattan", [models.PointStruct(id=0, vector=vectors(1)[0].tolist())])
    with pytest.raises(InputError, match="compares by Manhattan, and the model by cosine"):
        opened(client, tmp_path, "manhattan").upgrade(turned(), f"{source.address}_new", progress=False)
    client.delete_collection("manhattan")
    with pytest.raises(InputError, match="let an alias serve"):
        source.upgrade(turned(), None, progress=False)
    with pytest.raises(InputError, match="must be another collection beside"):
        source.upgrade(turned(), "qdrant:/elsewhere#docs", progress=False)
    assert points(client) == before and {each.name for each in client.get_collections().collections} == {
        "docs",
        "two",
        "none",
    }


def test_a_server_gets_the_key_and_what_it_refuses_is_told(monkeypatch):
    keys = []

    class Refusing(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            keys.append(self.headers["api-key"])
            self.send_response(403)
            self.end_headers()
            self.wfile.write(b"Forbidden")

        def log_message(self, *_) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("QDRANT_API_KEY", "a key")
    with pytest.raises(InputError, match=r"Qdrant refuses .*403"):
        open_vectors(f"qdrant:http://127.0.0.1:{server.server_port}#docs")
    assert set(keys) == {"a key"}
    server.shutdown()


def _upgrade(address: str, output: str | None) -> None:
    """As it is done in a process of its own."""
    torch.set_num_threads(1)
    sqlite3.connect = without_waiting(sqlite3.connect)
    open_vectors(address).upgrade(turned(), output, progress=False)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(
    ("count", "kills"),
    [
        pytest.param(10_000, 3, marks=pytest.mark.long),
        pytest.param(100_000, 20, marks=[pytest.mark.long, pytest.mark.timeout(3_600)]),
    ],
)
def test_a_run_that_is_killed_goes_on(client, tmp_path, in_place, count, kills):
    folder, how = tmp_path / "qdrant", turned()
    stored = filled(client, count)
    change = models.CreateAlias(collection_name="docs", alias_name="live")
    client.update_collection_aliases([models.CreateAliasOperation(create_alias=change)])
    client.close()
    client = QdrantClient(path=str(folder))  # which brings vectors to unit length, in other last bits than before
    before = points(client)
    client.close()
    address = f"qdrant:{folder}#{'live' if in_place else 'docs'}"
    output = None if in_place else f"qdrant:{folder}#docs_new"

    def progress() -> int:
        """How many points have been written."""
        name = "docs_upgraded_*" if in_place else "docs_new"
        made = list((folder / "collection").glob(f"{name}/storage.sqlite"))
        if not made:
            return 0
        with closing(sqlite3.connect(made[0], timeout=60)) as stored_in:
            try:
                return stored_in.execute("SELECT count(*) FROM points").fetchone()[0]
            except sqlite3.OperationalError:  # it is being made
                return 0

    def check() -> None:
        reopened = QdrantClient(path=str(folder))
        assert points(reopened, "live") == before, "it serves as it did"
        reopened.close()

    killed_while_it_writes(_upgrade, (address, output), kills, progress, check)
    open_vectors(address).upgrade(how, output, progress=False)
    client = QdrantClient(path=str(folder))
    after, expected = points(client, "live" if in_place else "docs_new"), how(stored).numpy()
    assert after.keys() == before.keys() and len(after) == count
    assert points(client, "docs") == before
    assert max(np.abs(np.array(after[n][0]) - expected[n]).max() for n in after) < 1e-5
    assert all(after[n][1] == before[n][1] for n in before)
    client.close()


def test_a_collection_of_any_name_is_upgraded_and_what_it_ranks_by_is_known(client, tmp_path):
    stored = filled(client, distance=models.Distance.EUCLID)
    config = params(models.Distance.EUCLID)
    client.create_collection("docs_upgraded_2024", vectors_config=config)
    points_there, _ = client.scroll("docs", limit=1_000, with_vectors=True)
    client.upsert("docs_upgraded_2024", [models.PointStruct(id=each.id, vector=each.vector) for each in points_there])
    alias = models.CreateAlias(collection_name="docs_upgraded_2024", alias_name="live")
    client.update_collection_aliases([models.CreateAliasOperation(create_alias=alias)])
    served = opened(client, tmp_path, "live")
    assert served.metric == "l2" and torch.equal(served.take(np.arange(60)), stored)
    served.upgrade(turned(), None, progress=False)
    with pytest.raises(InputError, match="was upgraded in place already"):
        opened(client, tmp_path, "live").upgrade(turned(), None, progress=False)
