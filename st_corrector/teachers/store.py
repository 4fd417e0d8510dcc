"""Scores of (query, target) pairs on disk: what was asked once is not asked again, in any process or run."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Sequence
from contextlib import closing, nullcontext
from pathlib import Path

import numpy as np
from filelock import FileLock

from ..errors import StorageError, TeacherError
from ..storage.files import make_folder

_WAIT = 120.0  # seconds for another process's write
_SCHEMA = """
CREATE TABLE IF NOT EXISTS identity (of TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS scores (
    query INTEGER NOT NULL, target INTEGER NOT NULL, score REAL NOT NULL, PRIMARY KEY (query, target)
) WITHOUT ROWID;
"""


class ScoreStore:
    """Scores by query key and target digest, in an SQLite file.

    Several processes of a machine may read and write it at once. What was added is there after a kill, whole or not at
    all. The file must be on a local disk: on network file systems SQLite's locks cannot be relied on.

    Args:
        path: of the file; None keeps the scores in memory, for this process alone.
        identity: of what gave the scores.

    Raises:
        TeacherError: the file holds scores of something else, or is no such file.
        StorageError: it cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str] | None, identity: str) -> None:
        self.path, self.identity = None if path is None else Path(path), identity
        self._connection: sqlite3.Connection | None = None
        self._process = -1
        if self.path is not None:
            make_folder(self.path.parent, "Choose another path for the scores.")
        self._connected()

    def _connected(self) -> sqlite3.Connection:
        # A connection must not cross a fork.
        if self._connection is None or self._process != os.getpid():
            self._connection, self._process = self._open(), os.getpid()
        return self._connection

    def _open(self) -> sqlite3.Connection:
        try:
            connection = sqlite3.connect(self.path or ":memory:", timeout=_WAIT, isolation_level=None)
            # Changing to WAL does not wait for others: processes that begin a file together take turns.
            with nullcontext() if self.path is None else FileLock(f"{self.path}.lock", timeout=_WAIT):
                found = _begun(connection, self.identity)
        except sqlite3.OperationalError as error:
            raise StorageError(f"{self.path}: the scores cannot be kept there ({error}).") from error
        except sqlite3.DatabaseError as error:
            raise TeacherError(f"{self.path} holds no scores ({error}): choose another path.") from error
        if found != self.identity:
            connection.close()
            raise TeacherError(
                f"{self.path} holds the scores of another model ({found}), expected those of {self.identity}: choose "
                "another path, or delete the file."
            )
        return connection

    def __len__(self) -> int:
        count: int = self._connected().execute("SELECT COUNT(*) FROM scores").fetchone()[0]
        return count

    def find(self, queries: Sequence[int] | np.ndarray, targets: Sequence[int] | np.ndarray) -> np.ndarray:
        """The scores of some pairs: float64, ``(n,)``, NaN for what is not there.

        Args:
            queries: keys, ``(n,)``.
            targets: digests, int64, ``(n,)``.
        """
        found = np.full(len(queries), np.nan)
        with closing(self._connected().cursor()) as cursor:
            for place, pair in enumerate(zip(map(int, queries), map(int, targets), strict=True)):
                row = cursor.execute("SELECT score FROM scores WHERE query = ? AND target = ?", pair).fetchone()
                if row is not None:
                    found[place] = row[0]
        return found

    def add(self, queries: Sequence[int] | np.ndarray, targets: Sequence[int] | np.ndarray, scores: np.ndarray) -> None:
        """Keep the scores of some pairs, all of them or none.

        Raises:
            StorageError: they cannot be written.
        """
        rows = list(zip(map(int, queries), map(int, targets), map(float, scores), strict=True))
        connection = self._connected()
        try:
            connection.execute("BEGIN IMMEDIATE")
            connection.executemany("INSERT OR REPLACE INTO scores VALUES (?, ?, ?)", rows)
            connection.execute("COMMIT")
        except sqlite3.OperationalError as error:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise StorageError(
                f"{self.path}: {len(rows)} scores cannot be written ({error}). Those before are kept."
            ) from error

    def close(self) -> None:
        """Close the file; it is opened again when needed."""
        if self._connection is not None and self._process == os.getpid():
            self._connection.close()
        self._connection = None


def _begun(connection: sqlite3.Connection, identity: str) -> str:
    """Make the tables where there are none; the identity of what gave the scores."""
    try:
        # Readers do not wait for a writer, and after a kill the last whole transaction is what counts.
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute("BEGIN IMMEDIATE")
        for statement in filter(str.strip, _SCHEMA.split(";")):
            connection.execute(statement)
        found = connection.execute("SELECT of FROM identity").fetchone()
        if found is None:
            connection.execute("INSERT INTO identity VALUES (?)", (identity,))
        connection.execute("COMMIT")
    except sqlite3.DatabaseError:
        connection.close()
        raise
    return identity if found is None else str(found[0])
