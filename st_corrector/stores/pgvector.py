"""Served embeddings in PostgreSQL with pgvector."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..carry_over.mapping import IndexMap
from ..errors import InputError, StorageError
from .base import Store

try:
    import psycopg
    from pgvector import Vector
    from pgvector.psycopg import register_vector
    from psycopg import sql
except ImportError as error:
    raise InputError("PostgreSQL needs psycopg and pgvector: pip install 'st-corrector[pgvector]'") from error

_TYPE = "vector"  # halfvec, which pgvector has from 0.7 on, is not supported
# Indices that compare otherwise rank otherwise than the model, unless all embeddings are of unit length.
_METRICS = {"vector_ip_ops": "dot", "vector_cosine_ops": "cosine", "vector_l2_ops": "l2"}
_NEW, _OF, _BEFORE = "_upgraded", "_upgraded_of", "_before"
_TOLD = "st_corrector: carried over by "


class _Place(NamedTuple):
    """A column of vectors.

    Args:
        table: as PostgreSQL writes it, with its schema where that is needed.
        column: of vectors.
        of: of the digests of what these were made of.
    """

    table: str
    column: str
    of: str


class PgVectors(Store[_Place]):
    """A column of vectors of a PostgreSQL table: ``postgresql://user@host/database#table``, ``…#table:column`` or
    ``…#table:column@id``.

    Rows are in the order of the primary key, or of ``ids``. The table needs a primary key of one column, a number, text
    or UUID; as text it is the target's id in the corpus, unless another column with ids is named. It is upgraded while
    it serves:

    - into a new table, which gets all columns, constraints and indices of the old one;
    - in place (without an output): into a new column of the same table, with indices like the old one's, which takes
      the old one's name in one short transaction at the end. The old column stays, as ``<column>_before``: dropping it
      is up to you, and until then it can be renamed back.

    Vectors are read, mapped and written in blocks, each in a transaction, and read back. Beside each new vector stands
    a digest of the row that it was made of (in place of the old vector), so that a run that was killed goes on, and
    rows that are added or changed meanwhile are done again. An advisory lock keeps a second process out.

    Args:
        address: of the table.
        ids: of targets, by which rows are ordered; all of them must be there, except for None. Others are
            carried over, but are no rows.

    Raises:
        InputError: there is no such server, table or column, no primary key of one column, or some of the ids are not
            there.
    """

    def __init__(self, address: str, ids: Sequence[str | None] | None = None) -> None:
        super().__init__(address)
        self._in_place = False
        self._dsn, table, column, named = _parsed(address)
        self._connection = _connected(self._dsn, address)
        with _explained(address):
            # As it is written, or else as PostgreSQL reads it, which folds capitals.
            quoted = _name(table, self._connection)
            found = self._row("SELECT coalesce(to_regclass(%s), to_regclass(%s))::text", quoted, table)[0]
            if found is None:
                raise InputError(f"{address}: there is no table {table} in this database.")
            self.table: str = found
            self.column = self._column(column)
            self.key, self._key_type = self._primary_key()
            declared = self._declared()
            vector = self._quoted(self.column)
            first = self._row(f"SELECT vector_dims({vector}) FROM {self.table} WHERE {vector} IS NOT NULL LIMIT 1")
            if first is None:
                raise InputError(f"{address}: the table has no rows with a vector.")
            self.dim = declared or int(first[0])
            if named is not None and not self._has(self.table, named):
                raise InputError(f"{address}: there is no column {named} with ids.")
            wanted = ", ".join(map(self._quoted, [self.key] if named is None else [self.key, named]))
            rows = self._connection.execute(f"SELECT {wanted} FROM {self.table} ORDER BY 1").fetchall()
        self.known_by([row[0] for row in rows], ids, None if named is None else [row[1] for row in rows])

    # ------------------------------------------------------------------ what there is

    @property
    def _digest(self) -> str:
        """Of a row ``o``, as an expression: 64 bits. In place only the vector is written."""
        if self._in_place:
            return f"hashtextextended(encode(vector_send(o.{self._quoted(self.column)}), 'hex'), 0)"
        return "hashtextextended(o::text, 0)"

    def _row(self, query: str, *values: Any) -> Any:
        return self._connection.execute(query, values).fetchone()

    def _quoted(self, name: str) -> str:
        return sql.Identifier(name).as_string(self._connection)

    def _column(self, wanted: str | None) -> str:
        columns = self._connection.execute(
            "SELECT attname FROM pg_attribute JOIN pg_type ON pg_type.oid = atttypid WHERE attrelid = %s::regclass AND "
            "typname = ANY(%s) AND attnum > 0 AND NOT attisdropped ORDER BY attnum",
            (self.table, [_TYPE]),
        ).fetchall()
        if wanted in [name for (name,) in columns]:
            return str(wanted)
        names = [name for (name,) in columns if not name.endswith((_NEW, _BEFORE))]
        if wanted is not None or len(names) != 1:
            raise InputError(
                f"{self.address}: which column holds the embeddings? Name it, as in #{self.table}:embedding; of type "
                f"vector there are {names or 'none'}."
            )
        return str(names[0])

    def _primary_key(self) -> tuple[str, str]:
        found = self._connection.execute(
            "SELECT attname, format_type(atttypid, NULL) FROM pg_index JOIN pg_attribute ON attrelid = indrelid AND "
            "attnum = ANY(indkey) WHERE indrelid = %s::regclass AND indisprimary",
            (self.table,),
        ).fetchall()
        if len(found) != 1:
            raise InputError(
                f"{self.address}: the table has no primary key of one column, by which rows could be told apart."
            )
        return str(found[0][0]), str(found[0][1])

    def _declared(self) -> int | None:
        """The dimension that the column is declared with, if any."""
        query = "SELECT atttypmod FROM pg_attribute WHERE attrelid = %s::regclass AND attname = %s"
        dim = int(self._row(query, self.table, self.column)[0])
        return dim if dim > 0 else None

    def read(self, keys: list[Any]) -> tuple[dict[Any, np.ndarray], dict[Any, Any]]:
        column, key = self._quoted(self.column), self._quoted(self.key)
        query = f"SELECT {key}, {column}, {self._digest} FROM {self.table} o WHERE {key} = ANY(%s)"
        with _explained(self.address):
            got = self._connection.cursor(binary=True).execute(query, (keys,)).fetchall()
        if none := [key for key, vector, _ in got if vector is None]:
            raise InputError(f"{self.address}: row {none[0]!r} has no vector: fill or delete it.")
        vectors = {key: np.asarray(vector.to_numpy(), dtype=np.float32) for key, vector, _ in got}
        return vectors, {key: digest for key, _, digest in got}

    def at(self, path: str | Path | None) -> PgVectors:
        """What :meth:`upgrade` has written."""
        dsn, table, _, _ = _parsed(self.address if path is None else str(path))
        return PgVectors(f"{dsn}#{table}:{self.column}", self._names)

    def before(self, path: str | Path | None) -> PgVectors:
        """What served before: in place it is in another column now."""
        if path is not None:
            return self
        return PgVectors(f"{self._dsn}#{self.table}:{self.column + _BEFORE}", self._names)

    @property
    def metric(self) -> str | None:
        """That of the index on the column; without one a search says by what it ranks."""
        return self._the_only(
            {_METRICS.get(each, each) for *_, classes in self._indices(self.table) for each in classes}
        )

    def check(self, how: IndexMap) -> None:
        """Refuse a map from other embeddings, or indices by which its output would be ranked otherwise.

        Raises:
            InputError: the dimension differs, or an index of the column does not compare as the model does.
        """
        super().check(how)
        for name, definition, classes in self._indices(self.table):
            self._index_like(definition, "", _Place(self.table, self.column, ""))
            for each in classes:
                self.require_metric(how, _METRICS.get(each, each), f"The index {name} of {self.address}")

    def _indices(self, table: str) -> list[tuple[str, str, list[str]]]:
        """Name, definition and operator classes of the indices on a table's column of vectors."""
        found = self._connection.execute(
            "SELECT indexrelid::regclass::text, pg_get_indexdef(indexrelid), ARRAY(SELECT opcname::text FROM "
            "pg_opclass WHERE oid = ANY(indclass)) FROM pg_index JOIN pg_attribute ON attrelid = indrelid AND attnum "
            "= ANY(indkey) WHERE indrelid = %s::regclass AND attname = %s",
            (table, self.column),
        ).fetchall()
        return [(str(name), str(definition), list(classes)) for name, definition, classes in found]

    # ------------------------------------------------------------------ upgrading

    @contextmanager
    def alone(self) -> Iterator[None]:
        """An advisory lock on the table, which goes with the connection."""
        lock = "(hashtextextended('st_corrector', %s::regclass::oid::bigint))"
        with _explained(self.address):
            if not self._row(f"SELECT pg_try_advisory_lock{lock}", self.table)[0]:
                raise InputError(f"{self.address}: another process is carrying this table over.")
            try:
                yield
            finally:
                if not self._connection.closed:
                    self._connection.execute(f"SELECT pg_advisory_unlock{lock}", (self.table,))

    def require_output(self, path: str | Path | None) -> None:
        with _explained(self.address):
            if path is None:
                on_update = "tgrelid = %s::regclass AND NOT tgisinternal AND tgtype & 16 > 0"
                if self._row(f"SELECT count(*) FROM pg_trigger WHERE {on_update}", self.table)[0]:
                    raise InputError(
                        f"{self.address} has triggers that every UPDATE would fire: name a new table instead of in "
                        "place."
                    )
                if self._has(self.table, self.column + _BEFORE):
                    raise InputError(
                        f"{self.address} was upgraded in place already: {self.column + _BEFORE} holds what was there "
                        "before. Drop that column to upgrade again."
                    )
                return
            dsn, _, column, _ = _parsed(str(path))
            place = self._place(path)
            same = self._row("SELECT to_regclass(%s) = %s::regclass", place.table, self.table)[0]
            if dsn != self._dsn or column not in (None, self.column) or same:
                raise InputError(
                    f"{path} must be another table of the database of {self.address}, with the same column."
                )
            if self._has(self.table, place.of):
                raise InputError(
                    f"{self.address} is being upgraded in place: finish that, or drop its columns "
                    f"{self.column + _NEW} and {place.of}."
                )
            if same is not None and not self._has(place.table, place.of):
                raise InputError(f"{path} exists already: choose another name, or drop it.")

    def _place(self, path: str | Path | None) -> _Place:
        if path is None:
            return _Place(self.table, self.column + _NEW, self.column + _OF)
        _, table, _, _ = _parsed(str(path))
        return _Place(_name(table, self._connection), self.column, self.column + _OF)

    def begun(self, path: str | Path | None, how: IndexMap) -> _Place:
        # The first corrector by itself, too: it must not be applied twice, whatever is encoded again.
        first = IndexMap(how.correctors[0]).digest
        kind, told = f"{_TYPE}({how.new_dim})", f"{_TOLD}{first} in {how.digest}"
        self._in_place, place = path is None, self._place(path)
        self.require_output(path)  # again, as it may have been long since
        if path is None and _TOLD + first in (self._comment(self.table, self.column) or ""):
            raise InputError(
                f"{self.address} was upgraded in place already, by this very corrector: a second time would map what "
                "it has made."
            )
        if not self._has(place.table, place.of):
            with self._connection.transaction():
                if path is not None:
                    self._connection.execute(f"CREATE TABLE {place.table} (LIKE {self.table} INCLUDING ALL)")
                    for name, _, _ in self._indices(place.table):
                        self._connection.execute(f"DROP INDEX {name}")
                    self._connection.execute(
                        f"ALTER TABLE {place.table} ALTER COLUMN {self._quoted(place.column)} TYPE {kind}"
                    )
                else:
                    self._connection.execute(f"ALTER TABLE {place.table} ADD {self._quoted(place.column)} {kind}")
                self._connection.execute(f"ALTER TABLE {place.table} ADD {self._quoted(place.of)} bigint")
                self._set_comment(place.table, place.of, told)
        if self._comment(place.table, place.of) != told:
            raise InputError(
                f"{place.table} was begun with another corrector, or with other targets encoded again: go on with "
                f"those, or drop {'the table' if path is not None else f'its columns {place.column} and {place.of}'}."
            )
        return place

    def _comment(self, table: str, column: str) -> str | None:
        query = (
            "SELECT col_description(attrelid, attnum) FROM pg_attribute WHERE attrelid = %s::regclass AND attname = %s"
        )
        found: str | None = self._row(query, table, column)[0]
        return found

    def _set_comment(self, table: str, column: str, text: str) -> None:
        comment = sql.SQL("COMMENT ON COLUMN {}.{} IS {}")
        self._connection.execute(comment.format(sql.SQL(table), sql.Identifier(column), sql.Literal(text)))

    def _has(self, table: str, column: str) -> bool:
        found = self._row(
            "SELECT count(*) FROM pg_attribute WHERE attrelid = to_regclass(%s) AND attname = %s AND NOT attisdropped",
            table,
            column,
        )
        return bool(found[0])

    def todo(self, place: _Place) -> list[Any]:
        key, of = self._quoted(self.key), self._quoted(place.of)
        now = self._digest
        if place.table == self.table:
            none = f"o.{self._quoted(self.column)} IS NULL"  # which reading refuses
            query = f"SELECT o.{key} FROM {self.table} o WHERE o.{of} IS DISTINCT FROM {now} OR {none}"
        else:
            self._connection.execute(
                f"DELETE FROM {place.table} n WHERE NOT EXISTS (SELECT 1 FROM {self.table} o WHERE o.{key} = n.{key})"
            )
            query = (
                f"SELECT o.{key} FROM {self.table} o LEFT JOIN {place.table} n USING ({key}) WHERE n.{of} IS DISTINCT "
                f"FROM {now}"
            )
        return [each for (each,) in self._connection.execute(query + " ORDER BY 1").fetchall()]

    def put(self, place: _Place, keys: list[Any], vectors: np.ndarray, digests: list[Any]) -> None:
        key, of, column = self._quoted(self.key), self._quoted(place.of), self._quoted(place.column)
        with self._connection.transaction():
            self._connection.execute(
                f"CREATE TEMPORARY TABLE carried (key {self._key_type}, vector {_TYPE}, of bigint) ON COMMIT DROP"
            )
            with self._connection.cursor().copy("COPY carried FROM STDIN (FORMAT BINARY)") as copy:
                copy.set_types([self._key_type, _TYPE, "int8"])
                for each, vector, digest in zip(keys, vectors, digests, strict=True):
                    copy.write_row((each, Vector(vector), digest))
            if place.table == self.table:
                self._connection.execute(
                    f"UPDATE {self.table} o SET {column} = c.vector, {of} = c.of FROM carried c WHERE o.{key} = c.key"
                )
            else:
                self._insert(place)
            wrong = self._row(
                f"SELECT count(*) FROM carried c LEFT JOIN {place.table} n ON n.{key} = c.key WHERE n.{column} IS "
                f"DISTINCT FROM c.vector AND EXISTS (SELECT 1 FROM {self.table} o WHERE o.{key} = c.key)"
            )[0]
            if wrong:
                raise StorageError(f"{wrong:,} vectors of {place.table} are not what was written into it.")

    def _insert(self, place: _Place) -> None:
        """The block's rows, with all other columns as they are in the old table."""
        columns = [
            self._quoted(name)
            for (name,) in self._connection.execute(
                "SELECT attname FROM pg_attribute WHERE attrelid = %s::regclass AND attnum > 0 AND NOT attisdropped "
                "AND attgenerated = '' AND attname <> %s ORDER BY attnum",
                (self.table, self.column),
            ).fetchall()
        ]
        key, of, column = self._quoted(self.key), self._quoted(place.of), self._quoted(place.column)
        others = ", ".join(columns)
        self._connection.execute(f"DELETE FROM {place.table} n USING carried c WHERE n.{key} = c.key")
        self._connection.execute(
            f"INSERT INTO {place.table} ({others}, {column}, {of}) OVERRIDING SYSTEM VALUE SELECT "
            f"{', '.join(f'o.{name}' for name in columns)}, c.vector, c.of FROM carried c JOIN {self.table} o "
            f"ON o.{key} = c.key"
        )

    def finish(self, place: _Place) -> None:
        for _, definition, _ in self._indices(self.table):
            self._make_index(definition, place)
        with self._connection.transaction():
            if place.table == self.table:
                # Against writers, while what was written last is looked for; readers wait for the renaming alone.
                self._connection.execute(f"LOCK TABLE {self.table} IN SHARE ROW EXCLUSIVE MODE")
            if self.todo(place):
                raise StorageError(f"{self.address} was written at the last moment: go on by the same command.")
            told = self._comment(place.table, place.of)
            self._connection.execute(f"ALTER TABLE {place.table} DROP COLUMN {self._quoted(place.of)}")
            if place.table == self.table:
                self._exchange(place, told or "")
            else:
                self._go_on_counting(place)

    def _make_index(self, definition: str, place: _Place) -> None:
        """An index like one of the old column, unless it is there already."""
        name = f"carried_{hashlib.blake2b(f'{definition} {place}'.encode(), digest_size=8).hexdigest()}"
        valid = self._row(
            "SELECT indisvalid FROM pg_index JOIN pg_class ON pg_class.oid = indexrelid WHERE indrelid = %s::regclass "
            "AND relname = %s",
            place.table,
            name,
        )
        if valid is not None and valid[0]:
            return
        if valid is not None:  # left by a run that was killed
            namespace, _, _ = place.table.rpartition(".")
            self._connection.execute(f"DROP INDEX {namespace + '.' if namespace else ''}{name}")
        self._connection.execute(self._index_like(definition, f"CONCURRENTLY {name}", place))

    def _index_like(self, definition: str, name: str, place: _Place) -> str:
        """The definition of an index, for the column of new vectors.

        Raises:
            InputError: it names the column more than once.
        """
        old, new = self._row("SELECT quote_ident(%s), quote_ident(%s)", self.column, place.column)
        _, _, how = definition.partition(" USING ")
        named = rf"(?<![\w\"]){re.escape(old)}(?![\w\"])"
        if len(re.findall(named, how)) != 1:
            raise InputError(f"An index like this cannot be made for the new vectors: {definition}. Drop it first.")
        unique = "UNIQUE " if definition.startswith("CREATE UNIQUE") else ""
        return f"CREATE {unique}INDEX {name} ON {place.table} USING {re.sub(named, lambda _: new, how)}"

    def _exchange(self, place: _Place, told: str) -> None:
        """Let the new column have the old one's name, its comment, and a word on how it was made."""
        comment = (self._comment(self.table, self.column) or "").partition(_TOLD)[0].rstrip()
        self._set_comment(self.table, place.column, f"{comment} {told}".strip())
        now, before, new = map(self._quoted, (self.column, self.column + _BEFORE, place.column))
        required = "SELECT attnotnull FROM pg_attribute WHERE attrelid = %s::regclass AND attname = %s"
        if self._row(required, self.table, self.column)[0]:  # of the one that is written from now on
            self._connection.execute(f"ALTER TABLE {self.table} ALTER {now} DROP NOT NULL, ALTER {new} SET NOT NULL")
        self._connection.execute(f"ALTER TABLE {self.table} RENAME COLUMN {now} TO {before}")
        self._connection.execute(f"ALTER TABLE {self.table} RENAME COLUMN {new} TO {now}")

    def _go_on_counting(self, place: _Place) -> None:
        """Let a key that the table itself gives out follow those that were copied."""
        key = self._quoted(self.key)
        sequence = self._row("SELECT pg_get_serial_sequence(%s, %s)", place.table, self.key)[0]
        identity = "SELECT attidentity <> '' FROM pg_attribute WHERE attrelid = %s::regclass AND attname = %s"
        own = self._row(identity, place.table, self.key)[0]  # a serial key shares the old table's
        if sequence is not None and own:
            self._connection.execute(f"SELECT setval('{sequence}', (SELECT max({key}) FROM {place.table}))")


def _parsed(address: str) -> tuple[str, str, str | None, str | None]:
    """The database's own address, the table, and the columns of vectors and of ids if they are named.

    Raises:
        InputError: no table is named.
    """
    dsn, mark, named = address.partition("#")
    named, _, key = named.partition("@")
    table, _, column = named.partition(":")
    if not mark or not table:
        raise InputError(f"{address}: which table? Name it, as in {dsn}#documents, or {dsn}#documents:embedding.")
    return dsn, table, column or None, key or None


def _name(table: str, connection: psycopg.Connection[Any]) -> str:
    """A table's name, quoted part by part."""
    return sql.Identifier(*table.split(".")).as_string(connection)


def _connected(dsn: str, address: str) -> psycopg.Connection[Any]:
    with _explained(address):
        connection = psycopg.connect(dsn, autocommit=True)
        try:
            register_vector(connection)
        except psycopg.ProgrammingError as error:
            connection.close()
            raise InputError(f"{address}: this database has no pgvector (CREATE EXTENSION vector).") from error
    return connection


@contextmanager
def _explained(address: str) -> Iterator[None]:
    """PostgreSQL's errors as this package's."""
    try:
        yield
    except psycopg.errors.InsufficientPrivilege as error:
        raise InputError(f"{address}: there is no right to do this ({_said(error)}).") from error
    except psycopg.OperationalError as error:
        raise StorageError(f"{address}: the server cannot be reached, or has failed ({_said(error)}).") from error
    except psycopg.Error as error:
        raise InputError(f"{address}: PostgreSQL refuses ({_said(error)}).") from error


def _said(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
