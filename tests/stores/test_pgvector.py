"""A table of PostgreSQL is upgraded while it serves: nothing is lost, nothing is done twice, and payloads stay."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

psycopg = pytest.importorskip("psycopg")

from conftest import make_static_model  # noqa: E402
from pgvector.psycopg import register_vector  # noqa: E402
from support.encoders import moved  # noqa: E402
from support.kills import killed_while_it_writes  # noqa: E402
from support.layouts import write_beir  # noqa: E402

from st_corrector import Corpus, IndexMap, InputError, RidgeCorrector, StorageError  # noqa: E402
from st_corrector.carry_over import certificate  # noqa: E402
from st_corrector.carry_over.fitting import fit_to_pairs  # noqa: E402
from st_corrector.cli import main  # noqa: E402
from st_corrector.data.encoding import DocumentEncoder  # noqa: E402
from st_corrector.search.fidelity import overlap_at_k  # noqa: E402
from st_corrector.stores.pgvector import PgVectors  # noqa: E402

DIM = 16


@pytest.fixture
def database(postgres):
    """A connection to it; tables are dropped afterwards."""
    with psycopg.connect(postgres, autocommit=True) as connection:
        register_vector(connection)
        yield connection
        connection.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public; CREATE EXTENSION IF NOT EXISTS vector")


def vectors(count: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(count, DIM, generator=torch.Generator().manual_seed(seed)), dim=-1)


def filled(database, count: int = 500, key: str = "bigint", metric: str = "cosine") -> torch.Tensor:
    """A table with payload, and an index."""
    stored = vectors(count)
    database.execute(
        f"CREATE TABLE docs (id {key} PRIMARY KEY, title text NOT NULL, tags jsonb, embedding vector({DIM}) NOT NULL)"
    )
    with database.cursor().copy("COPY docs FROM STDIN") as copy:
        for n, each in enumerate(stored.tolist()):
            copy.write_row((n if key == "bigint" else f"d{n:05}", f"title {n}", json.dumps({"n": n}), str(each)))
    database.execute(f"CREATE INDEX docs_hnsw ON docs USING hnsw (embedding vector_{metric}_ops) WITH (m = 8)")
    return stored


def turned(normalize: bool = True, seed: int = 1) -> RidgeCorrector:
    made = RidgeCorrector(DIM, normalize=normalize)
    made.weight = torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(seed)) / 3
    return made


def rows(database, table: str = "docs", column: str = "embedding") -> dict:
    found = database.execute(f"SELECT id, {column}, title, tags FROM {table}").fetchall()
    return {
        key: (np.array(vector.to_list() if hasattr(vector, "to_list") else vector), title, tags)
        for key, vector, title, tags in found
    }


def indices(database, table: str) -> list[str]:
    return [each for (each,) in database.execute("SELECT indexdef FROM pg_indexes WHERE tablename = %s", (table,))]


@pytest.mark.parametrize("key", ["bigint", pytest.param("text", marks=pytest.mark.long), "varchar(9)"])
@pytest.mark.parametrize("in_place", [False, True])
def test_a_table_is_upgraded_with_its_payload_and_its_indices(database, postgres, key, in_place):
    stored = filled(database, key=key)
    before, how = rows(database), turned()
    opened = PgVectors(f"{postgres}#docs")
    assert (opened.count, opened.dim) == (500, DIM)
    torch.testing.assert_close(opened.take(np.array([3, 499, 7])), stored[[3, 499, 7]], atol=1e-6, rtol=0)
    output = None if in_place else f"{postgres}#docs_new"
    opened.upgrade(how, output, progress=False)
    table = "docs" if in_place else "docs_new"
    after = rows(database, table)
    expected = how(stored)
    assert after.keys() == before.keys()
    for n, (name, (vector, *payload)) in enumerate(sorted(after.items())):
        np.testing.assert_allclose(vector, expected[n], atol=2e-6)
        assert payload == list(before[name][1:])
    assert any("USING hnsw (embedding " in each and "m='8'" in each for each in indices(database, table))
    kept = rows(database, "docs", "embedding_before" if in_place else "embedding")
    assert all(np.array_equal(kept[name][0], before[name][0]) for name in before), "what was there is there"
    columns = [
        each
        for (each,) in database.execute(
            "SELECT column_name FROM information_schema.columns WHERE table_name = %s", (table,)
        )
    ]
    assert not [each for each in columns if "upgraded" in each]
    torch.testing.assert_close(opened.at(output).take(np.arange(9)), expected[:9], atol=2e-6, rtol=0)
    with pytest.raises(InputError, match="in place already" if in_place else "exists already"):
        PgVectors(f"{postgres}#docs").upgrade(how, output, progress=False)


def test_rows_are_those_of_the_corpus_and_encoded_ones_take_their_places(database, postgres):
    stored = filled(database)
    order = np.random.default_rng(0).permutation(500)
    opened = PgVectors(f"{postgres}#docs", [str(n) for n in order])
    torch.testing.assert_close(opened.take(np.arange(500)), stored[order])
    fresh = vectors(2, seed=5)
    opened.upgrade(IndexMap(turned(), rows=np.array([4, 9]), fresh=fresh), f"{postgres}#docs_new", progress=False)
    after = rows(database, "docs_new")
    for place, each in zip((4, 9), fresh, strict=True):
        np.testing.assert_allclose(after[order[place]][0], each, atol=1e-6)
    with pytest.raises(InputError, match=r"1 are not there \('x'\): the ids of the corpus must be the keys"):
        PgVectors(f"{postgres}#docs", [*(str(n) for n in range(499)), "x"])
    fewer = PgVectors(f"{postgres}#docs", [str(n) for n in range(499)])
    fewer.upgrade(turned(), progress=False)
    assert fewer.count == 499 and len(rows(database)) == 500, "others are carried over, too, but are no rows"


@pytest.mark.parametrize("in_place", [False, True])
def test_ids_may_be_in_another_column(database, postgres, in_place):
    stored, how = filled(database), turned()
    database.execute("ALTER TABLE docs ADD doc text; UPDATE docs SET doc = 'd' || id WHERE id < 498")
    names = [f"d{n}" for n in reversed(range(498))]
    opened = PgVectors(f"{postgres}#docs:embedding@doc", names)
    torch.testing.assert_close(opened.take(np.arange(498)), stored[:498].flip(0))
    output, fresh = None if in_place else f"{postgres}#docs_new@doc", vectors(1, seed=5)
    opened.upgrade(IndexMap(how, rows=np.array([0]), fresh=fresh), output, progress=False)
    after, expected = rows(database, "docs" if in_place else "docs_new"), how(stored)
    expected[497] = fresh[0]
    np.testing.assert_allclose(np.array([after[n][0] for n in range(500)]), expected, atol=2e-6)
    torch.testing.assert_close(opened.at(output).take(np.arange(498)), expected[:498].flip(0), atol=2e-6, rtol=0)
    with pytest.raises(InputError, match=r"1 are not there \('d498'\): the ids .* must be those of that field"):
        PgVectors(f"{postgres}#docs:embedding@doc", ["d498"])
    with pytest.raises(InputError, match="there is no column page with ids"):
        PgVectors(f"{postgres}#docs:embedding@page", names)
    database.execute("UPDATE docs SET doc = 'd3' WHERE id = 4")
    with pytest.raises(InputError, match="several rows have the id 'd3'"):
        PgVectors(f"{postgres}#docs:embedding@doc", [name for name in names if name != "d4"])


def test_what_was_upgraded_in_place_is_not_mapped_again_by_the_same_corrector(database, postgres):
    stored, how = filled(database), turned()
    database.execute("COMMENT ON COLUMN docs.embedding IS 'by the model of May'")
    late, second = (PgVectors(f"{postgres}#docs") for _ in range(2))
    PgVectors(f"{postgres}#docs").upgrade(how, progress=False)
    database.execute("ALTER TABLE docs DROP COLUMN embedding_before")
    for repeated in (late, PgVectors(f"{postgres}#docs")):
        with pytest.raises(InputError, match="upgraded in place already, by this very corrector"):
            repeated.upgrade(how, progress=False)
    np.testing.assert_allclose(rows(database)[7][0], how(stored)[7], atol=1e-6)
    second.upgrade(turned(seed=2), progress=False)
    np.testing.assert_allclose(rows(database)[7][0], turned(seed=2)(how(stored))[7], atol=1e-6)
    told = database.execute(
        "SELECT col_description('docs'::regclass, attnum) FROM pg_attribute WHERE attrelid = "
        "'docs'::regclass AND attname = 'embedding'"
    ).fetchone()[0]
    assert told.startswith("by the model of May st_corrector: carried over by ") and told.count("st_corrector") == 1


def test_a_table_that_is_being_upgraded_is_no_output_and_none_to_copy(database, postgres, monkeypatch):
    filled(database)
    opened = PgVectors(f"{postgres}#docs")
    monkeypatch.setattr(PgVectors, "finish", lambda self, place: None)
    opened.upgrade(turned(), progress=False)
    monkeypatch.undo()
    with pytest.raises(InputError, match="must be another table"):
        opened.upgrade(turned(), f"{postgres}#public.docs", progress=False)
    with pytest.raises(InputError, match="is being upgraded in place"):
        opened.upgrade(turned(), f"{postgres}#docs_new", progress=False)
    opened.upgrade(turned(), progress=False)
    assert len(rows(database)) == 500


@pytest.mark.parametrize("in_place", [False, True])
def test_rows_without_a_vector_are_refused(database, postgres, in_place):
    filled(database)
    database.execute("ALTER TABLE docs ALTER embedding DROP NOT NULL")
    database.execute("UPDATE docs SET embedding = NULL WHERE id = 3")
    with pytest.raises(InputError, match="row 3 has no vector"):
        PgVectors(f"{postgres}#docs").upgrade(turned(), None if in_place else f"{postgres}#new", progress=False)


def test_one_of_several_columns_is_upgraded_into_a_new_table(database, postgres):
    stored, how = filled(database), turned()
    database.execute(f"ALTER TABLE docs ADD other vector({DIM})")
    opened, output = PgVectors(f"{postgres}#docs:embedding"), f"{postgres}#docs_new"
    opened.require_output(output)
    opened.upgrade(how, output, progress=False)
    torch.testing.assert_close(opened.at(output).take(np.arange(500)), how(stored), atol=1e-6, rtol=0)
    with pytest.raises(InputError, match="exists already"):
        opened.require_output(output)


def test_rows_that_are_written_meanwhile_are_carried_over_too(database, postgres, monkeypatch):
    stored, how = filled(database), turned()
    for output, late in ((f"{postgres}#docs_new", vectors(2, seed=9)), (None, vectors(2, seed=10))):
        opened, carry_over, calls = PgVectors(f"{postgres}#docs"), PgVectors.carry_over, []

        def while_it_runs(self, place, how, keys, carry_over=carry_over, calls=calls, late=late):
            carry_over(self, place, how, keys)
            if not calls:  # changed, new, gone
                database.execute("UPDATE docs SET embedding = %s WHERE id = 0", (late[0].numpy(),))
                database.execute("UPDATE docs SET title = 'changed' WHERE id = 2")
                database.execute("INSERT INTO docs VALUES (900, 'late', NULL, %s)", (late[1].numpy(),))
                database.execute("DELETE FROM docs WHERE id = 1")
            calls.append(keys)

        monkeypatch.setattr(PgVectors, "carry_over", while_it_runs)
        opened.upgrade(how, output, progress=False)
        monkeypatch.undo()
        assert [len(each) for each in calls] == [500, 3 if output else 2], "the rest, once"
        after = rows(database, "docs_new" if output else "docs")
        assert after.keys() == {0, *range(2, 500), 900} and after[900][1] == "late"
        assert after[2][1] == "changed"
        for name, vector in ((0, late[0]), (900, late[1]), (5, stored[5])):
            np.testing.assert_allclose(after[name][0], how(vector[None])[0], atol=1e-6)
        database.execute("DELETE FROM docs WHERE id = 900")
        database.execute("INSERT INTO docs (id, title, embedding) VALUES (1, 'again', %s)", (stored[1].numpy(),))


class Killed(BaseException):
    """As if by a signal."""


def killed(*_) -> None:
    raise Killed


def test_commands_on_a_table_that_a_corpus_knows_by_its_ids(database, postgres, tmp_path, capsys, monkeypatch):
    """Everything at once: the plan, an upgrade in place with some encoded again, and what was certified is true."""
    model, texts = moved(), [f"word{n} word{n + 7} word{2 * n}" for n in range(400)]
    targets = [{"_id": f"t{n}", "text": text} for n, text in enumerate(texts)]
    queries = [{"_id": f"q{n}", "text": f"word{n + 7} word{2 * n}"} for n in range(400)]
    folder = write_beir(tmp_path, targets, queries, {"dev": [(f"q{n}", f"t{n}", 1) for n in range(400)]})
    corpus = Corpus.from_beir(folder)
    rows_of = np.arange(400)
    old, fresh = (
        DocumentEncoder(each, corpus, progress=False).encode(each, rows_of) for each in (make_static_model(), model)
    )
    database.execute("CREATE TABLE texts (id text PRIMARY KEY, embedding vector(24) NOT NULL)")
    for n in np.random.default_rng(0).permutation(400):
        database.execute("INSERT INTO texts VALUES (%s, %s)", (f"t{n}", old[n].numpy()))
    model.save_pretrained(str(tmp_path / "run"))
    fit_to_pairs(old[:60], fresh[:60]).save_pretrained(tmp_path / "run")
    address = f"{postgres}#texts"
    assert main(["serve-plan", str(tmp_path / "run"), "--index", address, "--corpus", str(folder)]) == 0
    assert "Recommended" in capsys.readouterr().out
    command = [
        "upgrade-index",
        address,
        "in-place",
        "--corrector",
        str(tmp_path / "run"),
        "--reencode",
        "20%",
        "--json",
    ]
    command += ["--model", str(tmp_path / "run"), "--corpus", str(folder)]
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(PgVectors, "finish", killed)
        main(command)
    encoder_of = certificate.encoder_of

    def in_other_batches(*args, **settings):
        encode = encoder_of(*args, **settings)
        return lambda rows: encode(rows) * (1 + 1e-7) + 1e-8

    monkeypatch.setattr(certificate, "encoder_of", in_other_batches)
    assert main(command) == 0, capsys.readouterr().err
    recall = json.loads(capsys.readouterr().out)["certificate"]["recall"]
    found = dict(database.execute("SELECT id, embedding FROM texts").fetchall())
    new = torch.from_numpy(np.stack([found[f"t{n}"].to_numpy() for n in range(400)]).astype(np.float32))
    assert ((new - fresh).abs().amax(1) < 1e-5).sum() == 80
    asked = model.encode_query([each["text"] for each in queries], convert_to_tensor=True)
    reference = (asked @ fresh.T).topk(10).indices
    for name, index in (("unchanged", old), ("upgraded", new)):
        truth = overlap_at_k((asked @ index.T).topk(10).indices, reference).mean().item()
        assert recall[name][0] == pytest.approx(truth, abs=0.06), name
    assert recall["upgraded"][1] > recall["unchanged"][2]
    assert main(["upgrade-index", "old.npy", "in-place", "--corrector", "x"]) == 1
    # What cannot be written is refused before anything is encoded; a row that goes meanwhile leaves what was done.
    monkeypatch.setattr(certificate, "encode_queries", killed)
    assert main(command) == 1 and "upgraded in place already" in capsys.readouterr().err
    monkeypatch.undo()
    finish = PgVectors.finish

    def without_one(self, place):
        finish(self, place)
        database.execute("DELETE FROM texts_new WHERE id = 't7'")

    monkeypatch.setattr(PgVectors, "finish", without_one)
    command[2] = f"{postgres}#texts_new:embedding"
    assert main(command) == 0
    said = capsys.readouterr()
    assert "not certified" in said.err and "'t7'" in said.err and json.loads(said.out)["certificate"] is None
    assert len(database.execute("SELECT id FROM texts_new").fetchall()) == 399


def test_two_processes_do_not_write_at_once(database, postgres):
    filled(database)
    one, other = PgVectors(f"{postgres}#docs"), PgVectors(f"{postgres}#docs")
    with one.alone(), pytest.raises(InputError, match="another process is carrying this table over"):
        other.upgrade(turned(), progress=False)
    other.upgrade(turned(), progress=False)


def test_what_was_begun_with_another_corrector_is_not_gone_on_with(database, postgres, monkeypatch):
    filled(database)
    monkeypatch.setattr(PgVectors, "finish", lambda self, place: None)
    PgVectors(f"{postgres}#docs").upgrade(turned(), progress=False)
    monkeypatch.undo()
    with pytest.raises(InputError, match="begun with another corrector"):
        PgVectors(f"{postgres}#docs").upgrade(turned(seed=2), progress=False)
    before = rows(database)
    assert all(np.allclose(before[n][0], vectors(500)[n], atol=1e-6) for n in range(500)), "what serves is as it was"


@pytest.mark.parametrize(
    ("prepare", "address", "message"),
    [
        ("", "#nothing", "there is no table nothing"),
        ("", "", "which table"),
        ("", "#docs:title", "which column holds the embeddings"),
        (
            "ALTER TABLE docs ADD other vector(3)",
            "#docs",
            r"of type vector there are \['embedding', 'other'\]",
        ),
        ("ALTER TABLE docs DROP CONSTRAINT docs_pkey", "#docs", "no primary key of one column"),
        ("DELETE FROM docs", "#docs", "has no rows with a vector"),
    ],
)
def test_what_cannot_be_opened(database, postgres, prepare, address, message):
    filled(database, 20)
    if prepare:
        database.execute(prepare)
    with pytest.raises(InputError, match=message):
        PgVectors(f"{postgres}{address}")


@pytest.mark.parametrize("step", ["_make_index", "_exchange", "todo"])
@pytest.mark.parametrize("in_place", [False, True])
def test_an_end_that_fails_is_made_good_by_the_same_command(database, postgres, monkeypatch, step, in_place):
    stored, how, output = filled(database), turned(), None if in_place else f"{postgres}#docs_new"
    real, calls = getattr(PgVectors, step), []

    def fails(self, *given):
        calls.append(given)
        if step != "todo" or len(calls) == 3:  # the last look
            real(self, *given)
            raise RuntimeError("killed")
        return real(self, *given)

    monkeypatch.setattr(PgVectors, step, fails)
    if step == "_exchange" and not in_place:
        pytest.skip("nothing is exchanged")
    with pytest.raises(RuntimeError, match="killed"):
        PgVectors(f"{postgres}#docs").upgrade(how, output, progress=False)
    monkeypatch.undo()
    assert all(np.allclose(rows(database)[n][0], stored[n], atol=1e-6) for n in range(0, 500, 50)), (
        "it serves as it did"
    )
    PgVectors(f"{postgres}#docs").upgrade(how, output, progress=False)
    table = "docs" if in_place else "docs_new"
    after, expected = rows(database, table), how(stored)
    assert all(np.allclose(after[n][0], expected[n], atol=1e-6) for n in range(500))
    assert sum("USING hnsw (embedding " in each for each in indices(database, table)) == 1


def test_what_a_table_needs_besides(database, postgres):
    """Another schema with the same names, an identity key, a row without a vector, a trigger, an odd index."""
    stored = filled(database)
    database.execute("ALTER TABLE docs ALTER id ADD GENERATED BY DEFAULT AS IDENTITY; CREATE SCHEMA staging")
    PgVectors(f"{postgres}#docs").upgrade(turned(), f"{postgres}#staging.docs", progress=False)
    assert any("docs_hnsw" in each for each in indices(database, "docs")), "the old table has its index"
    found = database.execute("SELECT count(*) FROM pg_indexes WHERE schemaname = 'staging' AND indexdef LIKE '%hnsw%'")
    assert found.fetchone()[0] == 1
    made = database.execute(
        "INSERT INTO staging.docs (title, embedding) VALUES ('new', %s) RETURNING id", (stored[0].numpy(),)
    )
    assert made.fetchone()[0] == 500, "keys go on behind those that were copied"
    database.execute("ALTER TABLE docs ALTER embedding DROP NOT NULL; UPDATE docs SET embedding = NULL WHERE id = 3")
    with pytest.raises(InputError, match="row 3 has no vector"):
        PgVectors(f"{postgres}#docs").upgrade(turned(), f"{postgres}#docs_new", progress=False)
    database.execute("DROP TABLE docs_new; DELETE FROM docs WHERE id = 3")
    database.execute("CREATE INDEX odd ON docs USING hnsw (embedding vector_l2_ops) WHERE embedding IS NOT NULL")
    with pytest.raises(InputError, match="An index like this cannot be made"):
        PgVectors(f"{postgres}#docs").upgrade(turned(), progress=False)
    database.execute("DROP INDEX odd; CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END'")
    database.execute("CREATE TRIGGER t BEFORE UPDATE ON docs FOR EACH ROW EXECUTE FUNCTION f()")
    with pytest.raises(InputError, match="triggers that every UPDATE would fire"):
        PgVectors(f"{postgres}#docs").upgrade(turned(), progress=False)
    PgVectors(f"{postgres}#docs").upgrade(turned(), f"{postgres}#Docs_New", progress=False)
    assert PgVectors(f"{postgres}#Docs_New").count == 499
    database.execute("DROP SCHEMA staging CASCADE; DROP FUNCTION f CASCADE")


def test_a_server_that_is_not_there_and_a_database_without_pgvector(postgres, tmp_path):
    with pytest.raises(StorageError, match="cannot be reached"):
        PgVectors(f"postgresql://postgres@/postgres?host={tmp_path}#docs")
    with psycopg.connect(postgres, autocommit=True) as connection:
        connection.execute("CREATE DATABASE plain")
    with pytest.raises(InputError, match="no pgvector"):
        PgVectors(postgres.replace("@/postgres?", "@/plain?") + "#docs")


def test_what_does_not_fit_leaves_the_table_as_it_was(database, postgres):
    filled(database, metric="l2")
    before, columns = rows(database), "SELECT count(*) FROM information_schema.columns WHERE table_name = 'docs'"
    count = database.execute(columns).fetchone()
    opened = PgVectors(f"{postgres}#docs")
    with pytest.raises(InputError, match="the corrector maps from 24"):
        opened.upgrade(RidgeCorrector(24), progress=False)
    with pytest.raises(InputError, match=r"The index docs_hnsw of .* compares by l2, and the model by dot product"):
        opened.upgrade(turned(normalize=False), progress=False)
    with pytest.raises(InputError, match="must be another table of the database"):
        opened.upgrade(turned(), "postgresql://elsewhere/db#docs_new", progress=False)
    database.execute("CREATE ROLE reader LOGIN; GRANT USAGE ON SCHEMA public TO reader; GRANT SELECT ON docs TO reader")
    reading = PgVectors(postgres.replace("postgres:@", "reader@", 1) + "#docs")
    for output in (None, reading.address.replace("#docs", "#docs_new")):
        with pytest.raises(InputError, match="no right to do this"):
            reading.upgrade(turned(), output, progress=False)
    after = rows(database)
    assert all(np.array_equal(after[n][0], before[n][0]) for n in before)
    assert database.execute(columns).fetchone() == count
    database.execute("DROP OWNED BY reader; DROP ROLE reader")


def _upgrade(address: str, output: str | None) -> None:
    """In a process of its own."""
    torch.set_num_threads(1)
    import st_corrector.stores.base as module

    module.AT_ONCE = 256
    PgVectors(address).upgrade(turned(), output, progress=False)


@pytest.mark.parametrize(("count", "kills"), [(6_000, 2), pytest.param(100_000, 20, marks=pytest.mark.timeout(3_000))])
@pytest.mark.long
@pytest.mark.parametrize("in_place", [False, True])
def test_a_run_that_is_killed_goes_on(database, postgres, in_place, count, kills):
    stored, output = filled(database, count), None if in_place else f"{postgres}#docs_new"
    before, table = rows(database), "docs" if in_place else "docs_new"

    def progress() -> int:
        """How many rows have been written."""
        try:
            return database.execute(f"SELECT count(embedding_upgraded_of) FROM {table}").fetchone()[0]
        except psycopg.errors.UndefinedTable:
            return 0
        except psycopg.errors.UndefinedColumn:
            return 0 if in_place else count

    def check() -> None:
        serving = rows(database)
        assert all(np.array_equal(serving[each][0], before[each][0]) for each in before), "it serves as it did"

    killed_while_it_writes(_upgrade, (f"{postgres}#docs", output), kills, progress, check)
    PgVectors(f"{postgres}#docs").upgrade(turned(), output, progress=False)
    after = rows(database, table)
    assert after.keys() == before.keys() and len(after) == count
    expected = turned()(stored).numpy()
    assert max(np.abs(after[n][0] - expected[n]).max() for n in after) < 1e-6
    assert all(after[n][1:] == before[n][1:] for n in before)


def test_what_a_column_is_ranked_by_is_that_of_its_indices(database, postgres):
    filled(database, metric="ip")
    assert PgVectors(f"{postgres}#docs").metric == "dot"
    database.execute("CREATE INDEX other ON docs USING hnsw (embedding vector_l2_ops)")
    assert PgVectors(f"{postgres}#docs").metric is None, "a search takes either"
    database.execute("DROP INDEX docs_hnsw")
    assert PgVectors(f"{postgres}#docs").metric == "l2"
    database.execute("DROP INDEX other")
    assert PgVectors(f"{postgres}#docs").metric is None
