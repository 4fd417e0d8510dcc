"""SQLite, as which Qdrant's embedded mode stores points."""

import sqlite3
from collections.abc import Callable
from typing import Any


def without_waiting(connect: Callable[..., sqlite3.Connection]) -> Callable[..., sqlite3.Connection]:
    """``sqlite3.connect`` whose connections do not wait for the disk after each transaction. A process that is killed
    loses nothing by that.
    """

    def connected(*args: Any, **settings: Any) -> sqlite3.Connection:
        made = connect(*args, **settings)
        made.execute("PRAGMA synchronous=OFF")
        return made

    return connected
