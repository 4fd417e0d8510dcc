"""Files that are there whole or not at all, also after a kill, a full disk or a power cut."""

from __future__ import annotations

import errno
import os
import shutil
from contextlib import suppress
from pathlib import Path

from .errors import CacheError


def write_whole(path: Path, data: bytes) -> None:
    """Write ``data`` so that ``path`` holds all of it, or what it held before.

    Raises:
        CacheError: it cannot be written; nothing of it is left.
    """
    # A name of this process's own: two that write one file must not write into one another's.
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        _sync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise CacheError(f"{path} cannot be written: {error.strerror}. {_mend(error)}") from error


def require_space(folder: Path, needed: int, what: str) -> None:
    """Refuse to begin what does not fit on the disk.

    Args:
        needed: bytes.
        what: what they are needed for.

    Raises:
        CacheError: there are fewer; it has the numbers.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise CacheError(
            f"{what} takes {needed / 1e6:,.0f} MB, and the disk of {folder} has {free / 1e6:,.0f} MB left: make room, "
            "choose another folder, or a smaller dtype."
        )


def _mend(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "Make room: the same call goes on behind what is finished."
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "Choose a folder that can be written to."
    return "The same call goes on behind what is finished."


def _sync_folder(folder: Path) -> None:
    """Have the names in ``folder`` on disk as well, where the system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
