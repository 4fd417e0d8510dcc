"""Uploads to and downloads from the Hugging Face Hub, in addition to sentence-transformers' own.

Tokens, offline mode, endpoints and download folders are those of :mod:`huggingface_hub`: ``hf auth login``,
``HF_TOKEN``, ``HF_HUB_OFFLINE``, ``HF_ENDPOINT``, ``HF_HOME``.
"""

from __future__ import annotations

import fnmatch
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from ..errors import InputError

_MARK = "<!-- written by st_corrector: a card with this line is written again -->"


def require_repo_id(repo_id: str) -> None:
    """Refuse what no repository can be called.

    Raises:
        InputError: the Hub would not have it.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise InputError(f"{repo_id!r} is no name of a repository: {error}") from error


def push(write: Callable[[Path], object], repo_id: str, **options: Any) -> str:
    """Upload what ``write`` puts into an empty folder; ``options`` as in :func:`push_folder`."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        return push_folder(Path(folder), repo_id, **options)


def push_folder(
    folder: Path,
    repo_id: str,
    *,
    repo_type: str,
    card: str,
    commit_message: str,
    private: bool | None,
    token: str | bool | None,
    revision: str | None,
    instead_of: Iterable[str] = (),
) -> str:
    """Upload ``folder`` as one commit. If interrupted, the same call sends only what is missing.

    Args:
        repo_id: the repository; created if missing.
        repo_type: ``"model"`` or ``"dataset"``.
        card: its README.md, if it has none.
        private: for a repository created here; None uses the owner's default.
        revision: a branch, created if missing; None is the main one.
        instead_of: patterns of the only files to send; other files in the repository that match them are deleted, and a
            card written here is written again.

    Returns:
        The commit's address.

    Raises:
        InputError: ``repo_id`` is no name of a repository.
    """
    require_repo_id(repo_id)
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True).repo_id
    if revision is not None:
        api.create_branch(repo_id, branch=revision, repo_type=repo_type, exist_ok=True)
    where: dict[str, Any] = {"repo_type": repo_type, "revision": revision}
    patterns = list(instead_of)
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    sent = [name for name in names if not patterns or _fits(name, patterns)]
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationAdd(name, folder / name) for name in sent
    ]
    there = api.list_repo_files(repo_id, **where)
    operations += [CommitOperationDelete(name) for name in there if _fits(name, patterns) and name not in sent]
    if "README.md" not in there or (patterns and _MARK in _read(api, repo_id, "README.md", where)):
        operations.append(CommitOperationAdd("README.md", f"{card}\n{_MARK}\n".encode()))
    # The Hub receives large files one by one before the commit and does not need them again.
    url: str = api.create_commit(repo_id, operations, commit_message=commit_message, **where).commit_url
    return url


def _fits(name: str, patterns: list[str]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def _read(api: HfApi, repo_id: str, name: str, where: dict[str, Any]) -> str:
    return Path(api.hf_hub_download(repo_id, name, **where)).read_text(encoding="utf-8")
