"""What goes to the Hugging Face Hub and comes from it, beside what sentence-transformers sends and loads itself.

Tokens, offline mode, endpoints and download folders are those of :mod:`huggingface_hub`: ``hf auth login``,
``HF_TOKEN``, ``HF_HUB_OFFLINE``, ``HF_ENDPOINT``, ``HF_HOME``.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi


def push(
    write: Callable[[Path], object],
    repo_id: str,
    *,
    repo_type: str,
    card: str,
    commit_message: str,
    private: bool | None,
    token: str | bool | None,
    revision: str | None,
) -> str:
    """Upload what ``write`` puts into an empty folder, as one commit.

    Args:
        repo_id: the repository; made if it is not there.
        repo_type: ``"model"`` or ``"dataset"``.
        card: its README.md, where it has none.
        private: of a repository that is made here; None leaves it to the owner's settings.
        revision: a branch, made if it is not there; None is the main one.

    Returns:
        The commit's address.
    """
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        return push_folder(
            Path(folder),
            repo_id,
            repo_type=repo_type,
            card=card,
            commit_message=commit_message,
            private=private,
            token=token,
            revision=revision,
        )


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
    files: Iterable[str] = ("**/*",),
) -> str:
    """Upload ``folder``; see :func:`push`. Called again after it was cut short, it sends what is not there yet.

    Args:
        files: patterns of the files that are sent.
    """
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True).repo_id
    if revision is not None:
        api.create_branch(repo_id, branch=revision, repo_type=repo_type, exist_ok=True)
    sent = sorted({path for pattern in files for path in folder.glob(pattern) if path.is_file()})
    operations = [CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in sent]
    if not api.file_exists(repo_id, "README.md", repo_type=repo_type, revision=revision):
        operations.append(CommitOperationAdd("README.md", card.encode("utf-8")))
    # Large files are received one by one before the commit: those that were are not sent again.
    return api.create_commit(
        repo_id, operations, commit_message=commit_message, repo_type=repo_type, revision=revision
    ).commit_url
