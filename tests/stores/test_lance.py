"""A table of LanceDB is upgraded while it serves: nothing is lost, nothing is done twice, and payloads stay."""

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F

lancedb = pytest.importorskip("lancedb")
pytest.importorskip("lancedb.index")

from support.kills import killed_while_it_writes  # noqa: E402

from st_corrector import IndexMap, InputError, NonFiniteError, RidgeCorrector, StorageError  # noqa: E402
from st_corrector.stores.lance import LanceVectors  # noqa: E402
from st_corrector.stores.opening import open_vectors  # noqa: E402

DIM = 16


def vectors(count: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(count, DIM, generator=torch.Generator().manual_seed(seed)), dim=-1)


def columns(names: list, stored: torch.Tensor, key: str = "id") -> pa.Table:
    lists = pa.FixedSizeListArray.from_arrays(pa.array(stored.numpy().ravel()), DIM)
    return pa.table({key: names, "title": [f"title {n}" for n in names], "vector": lists})


def filled(folder: Path, count: int = 500, key: str = "id") -> torch.Tensor:
    stored = vectors(count)
    lancedb.connect(folder).create_table("docs", columns([f"d'{n}" for n in range(count)], stored, key))
    return stored


def turned(normalize: bool = True, seed: int = 1) -> RidgeCorrector:
    made = RidgeCorrector(DIM, normalize=normalize)
    made.weight = torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(seed)) / 3
    return made


def rows(folder: Path, table: str = "docs", key: str = "id", version: int | None = None) -> dict:
    opened = lancedb.connect(folder).open_table(table)
    if version is not None:
        opened.checkout(version)
    found = opened.to_arrow()
    assert set(found.schema.names) == {key, "title", "vector"}
    names, lists, titles = (found[each].to_pylist() for each in (key, "vector", "title"))
    return {
        name: (np.array(vector, np.float32), title) for name, vector, title in zip(names, lists, titles, strict=True)
    }


def index(folder: Path, metric: str) -> None:
    config = lancedb.index.IvfFlat(distance_type=metric, num_partitions=2)
    lancedb.connect(folder).open_table("docs").create_index("vector", config=config)


@pytest.mark.parametrize("key", ["id", "doc"])
@pytest.mark.parametrize("in_place", [False, True])
def test_a_table_is_upgraded_with_its_payload_and_its_index(tmp_path, key, in_place):
    stored, how = filled(tmp_path, key=key), turned()
    index(tmp_path, "cosine")
    before = rows(tmp_path, key=key)
    address = f"lancedb:{tmp_path}#docs" + ("" if key == "id" else ":vector@doc")
    opened = open_vectors(address)
    assert isinstance(opened, LanceVectors) and (opened.count, opened.dim) == (500, DIM)
    some = [opened.keys.index(f"d'{n}") for n in (3, 499, 7)]
    torch.testing.assert_close(opened.take(np.array(some)), stored[[3, 499, 7]])
    version = lancedb.connect(tmp_path).open_table("docs").version
    output = None if in_place else address.replace("#docs", "#docs_new")
    opened.upgrade(how, output, progress=False)
    table, expected = "docs" if in_place else "docs_new", how(stored)
    after = rows(tmp_path, table, key)
    assert after.keys() == before.keys()
    for n in range(500):
        np.testing.assert_allclose(after[f"d'{n}"][0], expected[n], atol=1e-6)
        assert after[f"d'{n}"][1] == before[f"d'{n}"][1]
    was = rows(tmp_path, "docs", key, version)
    assert all(np.array_equal(was[name][0], before[name][0]) for name in before), "the version before is there"
    torch.testing.assert_close(opened.before(output).take(np.array(some)), stored[[3, 499, 7]])
    torch.testing.assert_close(opened.at(output).take(np.array(some)), expected[[3, 499, 7]], atol=1e-6, rtol=0)
    made = lancedb.connect(tmp_path).open_table(table)
    assert [made.index_stats(each.name).distance_type for each in made.list_indices()] == ["cosine"]
    assert set(lancedb.connect(tmp_path).list_tables().tables) == {"docs"} | ({table} - {"docs"})
    if not in_place:
        with pytest.raises(InputError, match="exists already"):
            LanceVectors(address).upgrade(how, output, progress=False)


def test_rows_are_those_of_the_corpus_and_encoded_ones_take_their_places(tmp_path):
    stored, order = filled(tmp_path), np.random.default_rng(0).permutation(500)
    opened = LanceVectors(f"lancedb:{tmp_path}#docs", [f"d'{n}" for n in order])
    torch.testing.assert_close(opened.take(np.arange(500)), stored[order])
    fresh = vectors(2, seed=5)
    opened.upgrade(IndexMap(turned(), rows=np.array([4, 9]), fresh=fresh), None, progress=False)
    after = rows(tmp_path)
    for place, each in zip((4, 9), fresh, strict=True):
        np.testing.assert_allclose(after[f"d'{order[place]}"][0], each, atol=1e-6)
    with pytest.raises(InputError, match="the ids of the corpus must be the keys"):
        LanceVectors(f"lancedb:{tmp_path}#docs", ["x"])


@pytest.mark.parametrize("in_place", [False, True])
def test_rows_that_are_written_meanwhile_are_carried_over_too(tmp_path, monkeypatch, in_place):
    stored, how, late, calls = filled(tmp_path), turned(), vectors(2, seed=9), []
    opened, carry_over = LanceVectors(f"lancedb:{tmp_path}#docs"), LanceVectors.carry_over

    def while_it_runs(self, place, how, keys):
        carry_over(self, place, how, keys)
        if not calls:  # changed, new, gone
            table = lancedb.connect(tmp_path).open_table("docs")
            table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all().execute(
                columns(["d'0", "late"], late)
            )
            table.delete("id = 'd''1'")
            table.update("id = 'd''2'", {"title": "changed"})
        calls.append(keys)

    monkeypatch.setattr(LanceVectors, "carry_over", while_it_runs)
    opened.upgrade(how, None if in_place else f"lancedb:{tmp_path}#docs_new", progress=False)
    assert [len(each) for each in calls] == [500, 3], "the rest, once"
    after = rows(tmp_path, "docs" if in_place else "docs_new")
    assert after.keys() == {"d'0", "late", *(f"d'{n}" for n in range(2, 500))}
    assert after["d'2"][1] == "changed"
    for name, vector in (("d'0", late[0]), ("late", late[1]), ("d'5", stored[5])):
        np.testing.assert_allclose(after[name][0], how(vector[None])[0], atol=1e-6)


@pytest.mark.parametrize("step", ["overwritten", "dropped", "indexed"])
def test_an_end_that_fails_is_made_good_and_nothing_is_mapped_twice(tmp_path, monkeypatch, step):
    stored, how = filled(tmp_path), turned()
    index(tmp_path, "cosine")
    opened = LanceVectors(f"lancedb:{tmp_path}#docs")
    name = {"overwritten": "create_table", "dropped": "drop_table"}.get(step)
    owner = opened._database if name else LanceVectors
    real = getattr(owner, name or "_index")

    def fails(*given, **named):
        if step == "dropped" or step == "indexed" or given[0] != "docs_upgraded":
            if step == "overwritten":
                real(*given, **named)
            raise RuntimeError("killed")
        return real(*given, **named)

    monkeypatch.setattr(owner, name or "_index", fails)
    with pytest.raises(StorageError, match=r"the upgrade has failed \(killed\)"):
        opened.upgrade(how, None, progress=False)
    monkeypatch.undo()
    for _ in range(2):
        with pytest.raises(InputError, match="upgraded in place already"):
            LanceVectors(f"lancedb:{tmp_path}#docs").upgrade(how, None, progress=False)
    after, expected = rows(tmp_path), how(stored)
    assert all(np.allclose(after[f"d'{n}"][0], expected[n], atol=1e-6) for n in range(500)), "once"
    database = lancedb.connect(tmp_path)
    assert database.list_tables().tables == ["docs"]
    assert [list(each.columns) for each in database.open_table("docs").list_indices()] == [["vector"]]


@pytest.mark.parametrize("step", ["drop_columns", "create_index"])
def test_a_new_table_whose_end_fails_gets_its_index_by_the_same_command(tmp_path, monkeypatch, step):
    stored, how, output = filled(tmp_path), turned(), f"lancedb:{tmp_path}#docs_new"
    index(tmp_path, "cosine")

    def fails(*given, **named):
        raise RuntimeError("killed")

    monkeypatch.setattr(lancedb.table.LanceTable, step, fails)
    with pytest.raises(StorageError, match="killed"):
        LanceVectors(f"lancedb:{tmp_path}#docs").upgrade(how, output, progress=False)
    monkeypatch.undo()
    LanceVectors(f"lancedb:{tmp_path}#docs").upgrade(how, output, progress=False)
    assert [list(each.columns) for each in lancedb.connect(tmp_path).open_table("docs_new").list_indices()] == [
        ["vector"]
    ]
    np.testing.assert_allclose(rows(tmp_path, "docs_new")["d'7"][0], how(stored)[7], atol=1e-6)


def test_who_opened_the_table_before_another_upgraded_it_maps_nothing_twice(tmp_path):
    stored, how = filled(tmp_path), turned()
    one, other = (LanceVectors(f"lancedb:{tmp_path}#docs") for _ in range(2))
    one.upgrade(how, progress=False)
    with one.alone(), pytest.raises(InputError, match="another process is carrying this table over"):
        other.require_output(None)  # which would make good what the one has not done yet
    with pytest.raises(InputError, match="upgraded in place already"):
        other.require_output(None)
    with pytest.raises(InputError, match="upgraded in place already"):
        other.upgrade(how, progress=False)
    np.testing.assert_allclose(rows(tmp_path)["d'7"][0], how(stored)[7], atol=1e-6)


def test_where_there_is_no_lock_the_second_to_finish_maps_nothing_twice(tmp_path, monkeypatch):
    stored, how, carry_over = filled(tmp_path), turned(), LanceVectors.carry_over
    one, other = (LanceVectors(f"lancedb:{tmp_path}#docs") for _ in range(2))

    def meanwhile(self, place, how, keys):
        monkeypatch.undo()
        one.upgrade(how, progress=False)
        carry_over(self, place, how, keys)

    monkeypatch.setattr(LanceVectors, "alone", lambda self: nullcontext())
    monkeypatch.setattr(LanceVectors, "carry_over", meanwhile)
    with pytest.raises((InputError, ValueError)):
        other.upgrade(how, progress=False)
    np.testing.assert_allclose(rows(tmp_path)["d'7"][0], how(stored)[7], atol=1e-6)


def test_what_was_encoded_again_is_not_put_for_a_row_that_changed_before_the_upgrade_began(tmp_path):
    filled(tmp_path)
    how, late = turned(), vectors(1, seed=9)
    opened = LanceVectors(f"lancedb:{tmp_path}#docs", [f"d'{n}" for n in range(500)])
    opened.take(np.array([3, 4]))  # and encoded, which takes long
    merged = lancedb.connect(tmp_path).open_table("docs").merge_insert("id").when_matched_update_all()
    merged.execute(columns(["d'3"], late))
    opened.upgrade(IndexMap(how, rows=np.array([3, 4]), fresh=vectors(2, seed=5)), progress=False)
    after = rows(tmp_path)
    np.testing.assert_allclose(after["d'3"][0], how(late)[0], atol=1e-6)
    np.testing.assert_allclose(after["d'4"][0], vectors(2, seed=5)[1], atol=1e-6)


def test_a_row_that_is_no_number_is_named_and_the_table_serves_as_it_did(tmp_path, monkeypatch):
    stored, read = filled(tmp_path), LanceVectors.read

    def damaged(self, keys):
        found, digests = read(self, keys)
        return {**found, "d'301": np.full(DIM, np.nan, np.float32)}, digests

    monkeypatch.setattr(LanceVectors, "read", damaged)
    with pytest.raises(NonFiniteError, match="The embedding of row d'301 is, or becomes, NaN"):
        LanceVectors(f"lancedb:{tmp_path}#docs").upgrade(turned(), progress=False)
    assert np.array_equal(rows(tmp_path)["d'7"][0], stored[7])


def test_one_of_several_columns_and_ids_under_any_name(tmp_path):
    stored, how, key = vectors(60), turned(), "doc id"
    made = columns(list(range(60)), stored, key)
    lancedb.connect(tmp_path).create_table("docs", made.append_column("other", made["vector"]))
    opened, output = LanceVectors(f"lancedb:{tmp_path}#docs:vector@{key}"), f"lancedb:{tmp_path}#docs_new"
    opened.require_output(output)
    opened.upgrade(how, output, progress=False)
    torch.testing.assert_close(opened.at(output).take(np.arange(60)), how(stored), atol=1e-6, rtol=0)
    with pytest.raises(InputError, match="exists already"):
        opened.require_output(output)


def test_what_is_written_between_the_last_look_and_the_end_is_not_lost(tmp_path, monkeypatch):
    stored, how = filled(tmp_path), turned()
    opened = LanceVectors(f"lancedb:{tmp_path}#docs")
    real = opened._database.create_table

    def late(name, *given, **named):
        if name == "docs":
            lancedb.connect(tmp_path).open_table("docs").add(columns(["late"], vectors(1, seed=9)))
        return real(name, *given, **named)

    monkeypatch.setattr(opened._database, "create_table", late)
    with pytest.raises(StorageError, match="at the last moment"):
        opened.upgrade(how, None, progress=False)
    assert np.array_equal(rows(tmp_path)["late"][0], vectors(1, seed=9)[0]) and len(rows(tmp_path)) == 501
    LanceVectors(f"lancedb:{tmp_path}#docs").upgrade(how, None, progress=False)
    np.testing.assert_allclose(rows(tmp_path)["late"][0], how(vectors(1, seed=9))[0], atol=1e-6)
    np.testing.assert_allclose(rows(tmp_path)["d'5"][0], how(stored[5:6])[0], atol=1e-6)


def test_indices_on_other_columns_are_not_lost(tmp_path):
    filled(tmp_path)
    lancedb.connect(tmp_path).open_table("docs").create_index("id", config=lancedb.index.BTree())
    with pytest.raises(InputError, match=r"indices on other columns \(id_idx\)"):
        LanceVectors(f"lancedb:{tmp_path}#docs").upgrade(turned(), None, progress=False)
    assert lancedb.connect(tmp_path).list_tables().tables == ["docs"]


def test_two_processes_do_not_write_at_once_and_others_correctors_are_refused(tmp_path, monkeypatch):
    filled(tmp_path)
    one, other = (LanceVectors(f"lancedb:{tmp_path}#docs") for _ in range(2))
    with one.alone(), pytest.raises(InputError, match="another process is carrying this table over"):
        other.upgrade(turned(), progress=False)
    monkeypatch.setattr(LanceVectors, "finish", lambda self, place: None)
    other.upgrade(turned(), progress=False)
    monkeypatch.undo()
    with pytest.raises(InputError, match="begun with another corrector"):
        LanceVectors(f"lancedb:{tmp_path}#docs").upgrade(turned(seed=2), progress=False)
    assert all(np.array_equal(rows(tmp_path)[f"d'{n}"][0], vectors(500)[n]) for n in range(9)), "it serves as it did"


def test_what_cannot_be_opened_or_does_not_fit(tmp_path):
    filled(tmp_path, 300)
    database = lancedb.connect(tmp_path)
    database.create_table(
        "two",
        database.open_table("docs").to_arrow().append_column("other", columns(["a"] * 300, vectors(300))["vector"]),
    )
    database.create_table("none", schema=database.open_table("docs").schema)
    database.create_table("twice", columns(["a", "a"], vectors(2)))
    for address, message in (
        ("/nowhere#docs", "there is no folder"),
        (f"{tmp_path}", "which table"),
        (f"{tmp_path}#nothing", "there is no table nothing"),
        (f"{tmp_path}#docs:title", "which column holds the embeddings"),
        (f"{tmp_path}#two", r"of vectors there are \['other', 'vector'\]"),
        (f"{tmp_path}#docs:vector@key", "there is no column key with ids"),
        (f"{tmp_path}#none", "has no rows"),
        (f"{tmp_path}#twice", "some ids are missing or repeat"),
    ):
        with pytest.raises(InputError, match=message):
            LanceVectors(f"lancedb:{address}")
    assert LanceVectors(f"lancedb:{tmp_path}#docs").metric is None
    index(tmp_path, "l2")
    opened, before = LanceVectors(f"lancedb:{tmp_path}#docs"), rows(tmp_path)
    assert opened.metric == "l2"
    with pytest.raises(InputError, match="the corrector maps from 24"):
        opened.upgrade(RidgeCorrector(24), progress=False)
    with pytest.raises(InputError, match="compares by l2, and the model by dot product"):
        opened.upgrade(turned(normalize=False), progress=False)
    names = ("docs", "new:title", "docs_upgraded")
    for output in ("lancedb:/elsewhere#docs_new", *(f"lancedb:{tmp_path}#{name}" for name in names)):
        with pytest.raises(InputError, match="must be another table of the database"):
            opened.upgrade(turned(), output, progress=False)
    assert set(database.list_tables().tables) == {"docs", "two", "none", "twice"}
    assert all(np.array_equal(rows(tmp_path)[name][0], before[name][0]) for name in before)


def _upgrade(address: str, output: str | None) -> None:
    """In a process of its own."""
    torch.set_num_threads(1)
    import st_corrector.stores.base as module

    module.AT_ONCE = 256
    LanceVectors(address).upgrade(turned(), output, progress=False)


@pytest.mark.parametrize(("count", "kills"), [(6_000, 2), pytest.param(100_000, 20, marks=pytest.mark.timeout(3_000))])
@pytest.mark.long
@pytest.mark.parametrize("in_place", [False, True])
def test_a_run_that_is_killed_goes_on(tmp_path, in_place, count, kills):
    stored, address = filled(tmp_path, count), f"lancedb:{tmp_path}#docs"
    output, before = None if in_place else f"lancedb:{tmp_path}#docs_new", rows(tmp_path)
    staged = "docs_upgraded" if in_place else "docs_new"

    def progress() -> int:
        """How many rows have been written."""
        database = lancedb.connect(tmp_path)
        return database.open_table(staged).count_rows() if staged in database.list_tables().tables else 0

    def check() -> None:
        serving = rows(tmp_path)
        assert all(np.array_equal(serving[each][0], before[each][0]) for each in before), "it serves as it did"

    killed_while_it_writes(_upgrade, (address, output), kills, progress, check)
    LanceVectors(address).upgrade(turned(), output, progress=False)
    after = rows(tmp_path, "docs" if in_place else "docs_new")
    assert after.keys() == before.keys() and len(after) == count
    expected = turned()(stored).numpy()
    assert max(np.abs(after[f"d'{n}"][0] - expected[n]).max() for n in range(count)) < 1e-6
    assert all(after[name][1] == before[name][1] for name in before)


def test_a_withdrawn_target_need_not_be_there(tmp_path):
    stored = filled(tmp_path)
    ids = [f"d'{n}" for n in range(500)]
    lancedb.connect(tmp_path).open_table("docs").delete("id = 'd''7'")
    with pytest.raises(InputError, match="1 are not there"):
        open_vectors(f"lancedb:{tmp_path}#docs", ids=ids)
    opened = open_vectors(f"lancedb:{tmp_path}#docs", ids=[None if name == "d'7" else name for name in ids])
    expected = stored.clone()
    expected[7] = 0
    assert opened.count == 500 and torch.equal(opened.take(np.arange(500)), expected)
    assert torch.equal(opened.take(np.array([7])), expected[7:8])
    how = IndexMap(turned(), rows=np.array([8]), fresh=vectors(1, seed=5))
    opened.upgrade(how, f"lancedb:{tmp_path}#new", progress=False)
    new = opened.at(f"lancedb:{tmp_path}#new").take(np.arange(500))
    assert torch.equal(new[8], vectors(1, seed=5)[0]) and not new[7].any() and new[9].any()
    assert rows(tmp_path, "new").keys() == set(ids) - {"d'7"}


@pytest.mark.parametrize("in_place", [True, False])
def test_half_precision_stays_half(tmp_path, in_place):
    stored = vectors(50)
    numbers = pa.array(stored.half().numpy().ravel())
    table = pa.table({"id": list(range(50)), "vector": pa.FixedSizeListArray.from_arrays(numbers, DIM)})
    database = lancedb.connect(tmp_path)
    database.create_table("docs", table)
    opened = open_vectors(f"lancedb:{tmp_path}#docs")
    expected = IndexMap(turned())(opened.take(np.arange(50)), np.arange(50)).half()
    opened.upgrade(turned(), None if in_place else f"lancedb:{tmp_path}#new", progress=False)
    name = "docs" if in_place else "new"
    assert database.open_table(name).schema.field("vector").type == pa.list_(pa.float16(), DIM)
    assert torch.equal(open_vectors(f"lancedb:{tmp_path}#{name}").take(np.arange(50)), expected.float())
    far = turned(normalize=False)
    far.weight *= 1e6
    with pytest.raises(NonFiniteError, match="too large for halffloat"):
        open_vectors(f"lancedb:{tmp_path}#{name}").upgrade(far, f"lancedb:{tmp_path}#far", progress=False)


def test_ids_that_cannot_be_asked_for_are_refused(tmp_path):
    lancedb.connect(tmp_path).create_table("docs", columns([b"a", b"b"], vectors(2)))
    with pytest.raises(InputError, match="ids in the column id are of type binary; expected strings or integers"):
        open_vectors(f"lancedb:{tmp_path}#docs")
