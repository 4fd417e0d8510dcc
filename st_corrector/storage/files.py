"""Files that are complete or absent, even after a kill, a full disk or a power cut."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from ..errors import StorageError

_OS_ERROR = re.compile(r"\(os error (\d+)\)")  # safetensors' error


@contextmanager
def storing(path: Path, advice: str) -> Iterator[None]:
    """Turn the system's errors in this block into one that names ``path`` and says how to continue.

    Args:
        advice: what to do once the cause is fixed.

    Raises:
        StorageError: something cannot be written.
    """
    try:
        yield
    except StorageError:
        raise
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error):  # torch.save's error
            raise
        told = _OS_ERROR.search(str(error))
        number = int(told[1]) if told else getattr(error, "errno", None) or 0
        reason = os.strerror(number) if number else str(error)
        raise StorageError(f"{path} cannot be written: {reason}. {_MEND.get(number, '')}{advice}") from error


@contextmanager
def whole(path: Path, advice: str = "Then repeat the call.") -> Iterator[Path]:
    """Give the block a file to write, which replaces ``path`` once it is complete; until then ``path`` is unchanged.

    Raises:
        StorageError: it cannot be written; partial output is removed.
    """
    # A name unique to this process: two writers of one file must not share it.
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with storing(path, advice):
            yield partial
            with partial.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(partial, path)
            _sync_folder(path.parent)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def make_folder(path: Path, advice: str = "Choose another one.") -> None:
    """Create a folder and its parents, if missing.

    Raises:
        StorageError: it cannot be created.
    """
    with storing(path, advice):
        path.mkdir(parents=True, exist_ok=True)


def require_space(folder: Path, needed: int, what: str) -> None:
    """Refuse to start if the disk is too small.

    Args:
        needed: bytes.
        what: their purpose.

    Raises:
        StorageError: fewer are free; the message has both sizes.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise StorageError(
            f"{what} takes {needed / 1e6:,.1f} MB, and the disk of {folder} has {free / 1e6:,.1f} MB left: make room, "
            "choose another folder, or a smaller dtype."
        )


_MEND = {
    errno.ENOSPC: "Make room. ",
    errno.EDQUOT: "Make room within the quota. ",
    errno.EACCES: "Choose a folder that can be written to. ",
    errno.EPERM: "Choose a folder that can be written to. ",
    errno.EROFS: "Choose a folder that can be written to. ",
}


def _sync_folder(folder: Path) -> None:
    """Sync the names in ``folder`` to disk, if the system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
