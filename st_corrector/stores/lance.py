"""Served embeddings in LanceDB."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from filelock import FileLock, Timeout

from ..carry_over.mapping import IndexMap
from ..errors import InputError, NonFiniteError, StCorrectorError, StorageError
from .base import Store

try:
    import lancedb
    import lancedb.index
except ImportError as error:
    raise InputError("LanceDB needs its package: pip install 'st-corrector[lancedb]'") from error

SCHEME = "lancedb:"
_OF, _STAGED, _DONE = "_made_of", "_upgraded", b"st_corrector_upgraded"
_AT_ONCE = 8_192  # rows of a batch that is streamed
_KINDS = {
    "IVF_FLAT": lancedb.index.IvfFlat,
    "IVF_PQ": lancedb.index.IvfPq,
    "IVF_SQ": lancedb.index.IvfSq,
    "IVF_RQ": lancedb.index.IvfRq,
    "IVF_HNSW_FLAT": lancedb.index.HnswFlat,
    "IVF_HNSW_PQ": lancedb.index.HnswPq,
    "IVF_HNSW_SQ": lancedb.index.HnswSq,
}


class LanceVectors(Store[Any]):
    """A column of a LanceDB table: ``lancedb:folder#table``, ``…#table:column`` or ``…#table:column@id``.

    The ids are in the column ``id`` unless it is named, and are distinct. The table is upgraded while it serves:

    - into a new table, which gets all columns;
    - in place (without an output): into a table beside it, ``<table>_upgraded``, which at the end becomes the next
      version of the table in one commit. Earlier versions stay, until LanceDB cleans them up: ``table.restore`` goes
      back.

    Indices on the column are made again, of the same kind and metric, with LanceDB's own defaults otherwise. A lock
    file in a local folder keeps a second process out.

    Args:
        address: of the table.
        ids: of targets, by which rows are ordered; all of them must be there, except for None. Others are
            carried over, but are no rows.

    Raises:
        InputError: there is no such folder, table or column, ids are missing or repeat.
    """

    def __init__(self, address: str, ids: Sequence[str | None] | None = None) -> None:
        super().__init__(address)
        self._where, self.name, column, key = _parsed(address)
        self.id = key or "id"
        self._is_alone = False
        if "://" not in self._where and not Path(self._where).is_dir():
            raise InputError(f"{address}: there is no folder {self._where}.")
        self._database = lancedb.connect(self._where)
        try:
            self._table = self._database.open_table(self.name)
        except (ValueError, FileNotFoundError, RuntimeError) as error:
            raise InputError(f"{address}: there is no table {self.name} in this database.") from error
        self._table.checkout(self._table.version)  # so that rows keep their places
        schema = self._table.schema
        widths = {
            field.name: field.type.list_size
            for field in schema
            if pa.types.is_fixed_size_list(field.type) and pa.types.is_floating(field.type.value_type)
        }
        if self.id not in schema.names:
            raise InputError(
                f"{address}: there is no column {self.id} with ids. Name it, as in #{self.name}:vector@key."
            )
        kind = schema.field(self.id).type
        if not (pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise InputError(
                f"{address}: the ids in the column {self.id} are of type {kind}; expected strings or integers."
            )
        if (column is None and len(widths) != 1) or (column is not None and column not in widths):
            raise InputError(
                f"{address}: which column holds the embeddings? Name it, as in #{self.name}:vector; of vectors there "
                f"are {sorted(widths) or 'none'}."
            )
        self.column = column or next(iter(widths))
        self.dim = widths[self.column]
        self._places = self._read_places()
        if not self._places:
            raise InputError(f"{address}: the table has no rows.")
        self.known_by(list(self._places), ids)

    def _read_places(self) -> dict[Any, int]:
        """Where the row of each id is, in the version that is read."""
        found = self._table.search().select([self.id]).limit(self._table.count_rows()).to_arrow()[self.id]
        if found.null_count or len(found.unique()) != len(found):
            raise InputError(f"{self.address}: in the column {self.id} some ids are missing or repeat.")
        return {key: place for place, key in enumerate(found.to_pylist())}

    def _rows(self, keys: list[Any]) -> pa.Table:
        """The rows of those keys that are there."""
        found: pa.Table = self._table.take_offsets(
            [self._places[key] for key in keys if key in self._places]
        ).to_arrow()
        return found

    def read(self, keys: list[Any]) -> tuple[dict[Any, np.ndarray], dict[Any, Any]]:
        found = self._rows(keys)
        vectors = self._matrix(found)
        names = found[self.id].to_pylist()
        return dict(zip(names, vectors, strict=True)), dict(zip(names, self._digests(found), strict=True))

    def _digests(self, found: pa.Table) -> list[int]:
        """Of rows, with all that belongs to them: 64 bits each."""
        others = found.drop_columns([self.column]).to_pylist()
        return [_digest(vector, row) for vector, row in zip(self._matrix(found), others, strict=True)]

    def _matrix(self, found: pa.Table) -> np.ndarray:
        """Vectors, float32, ``(n, d)``.

        Raises:
            InputError: one is missing.
        """
        column = found[self.column].combine_chunks()
        if column.null_count:
            raise InputError(f"{self.address}: {column.null_count:,} rows have no vector: fill or delete them.")
        flat = column.flatten().to_numpy(zero_copy_only=False)
        return np.asarray(flat, dtype=np.float32).reshape(len(found), -1)

    def at(self, path: str | Path | None) -> LanceVectors:
        """What :meth:`upgrade` has written."""
        where, name, _, _ = _parsed(self.address if path is None else str(path))
        return LanceVectors(f"{SCHEME}{where}#{name}:{self.column}@{self.id}", self._names)

    @property
    def metric(self) -> str | None:
        """That of the index on the column; without one a search says by what it ranks."""
        return self._the_only({metric for _, metric in self._indices()})

    def check(self, how: IndexMap) -> None:
        """Refuse a map from other embeddings, or indices by which its output would be ranked otherwise.

        Raises:
            InputError: the dimension differs, or an index of the column does not compare as the model does.
        """
        super().check(how)
        for kind, metric in self._indices():
            if kind not in _KINDS:
                raise InputError(
                    f"{self.address} has an index of the kind {kind}, which is not known here: drop it first."
                )
            self.require_metric(how, metric, f"The index ({kind}) of {self.address}")

    def _indices(self) -> list[tuple[str, str]]:
        """Kind and metric of the indices on the column."""
        found = [each for each in self._table.list_indices() if list(each.columns) == [self.column]]
        stats = [self._table.index_stats(each.name) for each in found]
        return [(str(each.index_type), str(each.distance_type).lower()) for each in stats if each is not None]

    # ------------------------------------------------------------------ upgrading

    @contextmanager
    def alone(self) -> Iterator[None]:
        """A lock file, where the database is a folder."""
        lock = FileLock(Path(self._where) / f".{self.name}.lock") if "://" not in self._where else nullcontext()
        try:
            if isinstance(lock, FileLock):
                lock.acquire(timeout=0)
        except Timeout as error:
            raise InputError(f"{self.address}: another process is carrying this table over.") from error
        except OSError as error:
            raise InputError(f"{self.address}: there is no right to write ({error}).") from error
        self._is_alone = True
        try:
            yield
        except StCorrectorError:
            raise
        except (RuntimeError, ValueError) as error:  # as LanceDB tells of a full disk, or of a bucket
            raise StorageError(f"{self.address}: the upgrade has failed ({error}). What is done is kept.") from error
        finally:
            self._is_alone = False
            if isinstance(lock, FileLock):
                lock.release()

    def require_output(self, path: str | Path | None) -> None:
        if path is None:
            self._refuse_a_second_time()
            if others := [each.name for each in self._table.list_indices() if list(each.columns) != [self.column]]:
                raise InputError(
                    f"{self.address} has indices on other columns ({', '.join(others)}), which its next version would "
                    "not have: name a new table instead of in place."
                )
            return
        where, name, column, key = _parsed(str(path))
        same = column in (None, self.column) and key in (None, self.id)
        if where != self._where or not same or name in (self.name, self.name + _STAGED):
            raise InputError(f"{path} must be another table of the database of {self.address}, with the same columns.")
        there = name in self._database.list_tables().tables
        if there and _OF not in self._database.open_table(name).schema.names:
            raise InputError(f"{path} exists already: choose another name, or drop it.")

    def begun(self, path: str | Path | None, how: IndexMap) -> Any:
        told = f"{self.name}, carried over by {how.digest}".encode()
        self.require_output(path)  # again, as it may have been long since
        name = self.name + _STAGED if path is None else _parsed(str(path))[1]
        if name not in self._database.list_tables().tables:
            number = self._table.schema.field(self.column).type.value_type
            vector = pa.field(self.column, pa.list_(number, how.new_dim))
            fields = [vector if each.name == self.column else each for each in self._table.schema]
            schema = pa.schema([*fields, pa.field(_OF, pa.int64())], {b"st_corrector": told})
            return self._database.create_table(name, schema=schema)
        staged = self._database.open_table(name)
        if (staged.schema.metadata or {}).get(b"st_corrector") != told:
            raise InputError(
                f"The table {name} was begun with another corrector, or with other targets encoded again: go on with "
                "those, or drop it."
            )
        return staged

    def _refuse_a_second_time(self) -> None:
        """In place once: what is there now was made by a corrector, and is not what one maps from.

        Raises:
            InputError: it was upgraded in place. What that run may have left undone, if it was killed, is done first.
        """
        made = self._database.open_table(self.name)  # as it is now: another process may have done it meanwhile
        done = (made.schema.metadata or {}).get(_DONE)
        if done is None:
            return
        with nullcontext() if self._is_alone else self.alone():  # another process may be at this very end
            if self.name + _STAGED in self._database.list_tables().tables:
                self._database.drop_table(self.name + _STAGED)
            self._index(made, json.loads(done))
        raise InputError(
            f"{self.address} was upgraded in place already; earlier versions are in its history (table.restore). To "
            "upgrade it once more, name a new table."
        )

    def _index(self, table: Any, indices: list[list[str]]) -> None:
        """Make indices that are not there yet."""
        there = [list(each.columns) for each in table.list_indices()]
        for kind, metric in indices:
            if [self.column] not in there:
                table.create_index(self.column, config=_KINDS[kind](distance_type=metric))

    def todo(self, place: Any) -> list[Any]:
        if place.name == self.name + _STAGED:
            self._refuse_a_second_time()
        self._table = self._database.open_table(self.name)
        self._table.checkout(self._table.version)
        self._places = self._read_places()
        done = place.search().select([self.id, _OF]).limit(max(1, place.count_rows())).to_arrow()
        made_of = dict(zip(done[self.id].to_pylist(), done[_OF].to_pylist(), strict=True))
        if gone := [each for each in made_of if each not in self._places]:
            for start in range(0, len(gone), 1_000):
                place.delete(f"`{self.id}` IN ({', '.join(map(_literal, gone[start : start + 1_000]))})")
        missing = []
        for batch in self._table.search().limit(self._table.count_rows()).to_batches(_AT_ONCE):
            found = pa.Table.from_batches([batch])
            for key, digest in zip(found[self.id].to_pylist(), self._digests(found), strict=True):
                if made_of.get(key) != digest:
                    missing.append(key)
        return missing

    def put(self, place: Any, keys: list[Any], vectors: np.ndarray, digests: list[Any]) -> None:
        found = self._rows(keys)
        order = {key: n for n, key in enumerate(keys)}
        rows = np.array([order[key] for key in found[self.id].to_pylist()])
        kind = place.schema.field(self.column).type
        with np.errstate(over="ignore"):
            vectors = vectors.astype(kind.value_type.to_pandas_dtype(), copy=False)
        if not np.isfinite(vectors).all():
            raise NonFiniteError(
                f"Some of the new vectors are too large for {kind.value_type}, the type of {place.name}."
            )
        stored = pa.FixedSizeListArray.from_arrays(pa.array(vectors[rows].ravel()), kind.list_size)
        found = found.set_column(found.schema.get_field_index(self.column), place.schema.field(self.column), stored)
        found = found.append_column(_OF, pa.array([digests[n] for n in rows], pa.int64()))
        merged = place.merge_insert(self.id).when_matched_update_all().when_not_matched_insert_all()
        merged.execute(found.cast(place.schema.remove_metadata()))
        some = ", ".join(map(_literal, keys))
        written = (
            place.search()
            .where(f"`{self.id}` IN ({some})")
            .select([self.id, self.column])
            .limit(2 * len(keys))
            .to_arrow()
        )
        there = dict(zip(written[self.id].to_pylist(), self._matrix(written), strict=True))
        if len(written) != len(found) or not all(
            np.array_equal(there[key], vectors[order[key]].astype(np.float32)) for key in there
        ):
            raise StorageError(f"Vectors of {place.name} are not what was written into it.")

    def finish(self, place: Any) -> None:
        indices = [list(each) for each in self._indices()]
        if place.name != self.name + _STAGED:
            self._index(place, indices)  # first: without that column nothing goes on
            place.drop_columns([_OF])
            return
        names = [each for each in place.schema.names if each != _OF]
        told = {**(self._table.schema.metadata or {}), _DONE: json.dumps(indices).encode()}
        schema = pa.schema([place.schema.field(name) for name in names], told)
        batches = place.search().select(names).limit(place.count_rows()).to_batches(_AT_ONCE)
        reader = pa.RecordBatchReader.from_batches(schema, (batch.cast(schema) for batch in batches))
        made = self._database.create_table(self.name, reader, mode="overwrite")
        if made.version != self._table.version + 1:
            made.restore(made.version - 1)  # what somebody has written meanwhile
            raise StorageError(f"{self.address} was written at the last moment: go on by the same command.")
        self._database.drop_table(place.name)
        self._index(made, indices)


def _parsed(address: str) -> tuple[str, str, str | None, str | None]:
    """The database, the table, and the columns of vectors and of ids if they are named.

    Raises:
        InputError: no table is named.
    """
    where, _, named = address.removeprefix(SCHEME).partition("#")
    named, _, key = named.partition("@")
    table, _, column = named.partition(":")
    if not table:
        raise InputError(f"{address}: which table? Name it, as in {SCHEME}folder#documents.")
    return where, table, column or None, key or None


def _digest(vector: np.ndarray, row: dict[str, Any]) -> int:
    """Of a vector and the rest of its row."""
    found = hashlib.blake2b(vector.tobytes() + repr(sorted(row.items())).encode(), digest_size=8).digest()
    return int.from_bytes(found, "little", signed=True)


def _literal(key: Any) -> str:
    """A key in LanceDB's SQL."""
    return str(key) if isinstance(key, int) else "'" + str(key).replace("'", "''") + "'"
