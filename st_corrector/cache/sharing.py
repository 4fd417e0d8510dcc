"""Embedding caches on the Hub, each in a dataset repository of its own."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..errors import CacheError
from ..storage.arrow import default_cache_dir
from ..storage.fingerprint import digest_json
from ..storage.hub import push_folder
from .folder import FILES, CacheFolder

_CARD = """---
tags:
- sentence-transformers
- st_corrector
- embeddings
---

# An embedding cache

{cache}, row by row the targets of a corpus. The embeddings depend on:

```json
{fingerprint}
```

```python
from st_corrector import EmbeddingCache

cache = EmbeddingCache.from_hub("{repo_id}")
```
"""


def download(repo_id: str, path: str | os.PathLike[str] | None, revision: str | None, token: str | bool | None) -> Path:
    """The folder of a local copy of the cache in a repository; see :meth:`.EmbeddingCache.from_hub`."""
    from huggingface_hub import snapshot_download

    if path is None:
        name = f"{repo_id.replace('/', '--')}-{digest_json([repo_id, revision])[:12]}"
        path = default_cache_dir() / "from-hub" / name
    folder = CacheFolder(Path(path))
    if (folder.is_finished or folder.is_begun) and not (folder.path / ".cache" / "huggingface").is_dir():
        raise CacheError(
            f"{path} holds a cache that was not downloaded from the Hub: choose another folder for the copy."
        )
    # Into a separate folder: the Hub's shared one has links, which a cache's folder must not have.
    snapshot_download(
        repo_id,
        repo_type="dataset",
        revision=revision,
        token=token,
        local_dir=str(path),
        allow_patterns=list(FILES),
    )
    return folder.path


def upload(
    folder: Path,
    described: str,
    fingerprint: dict[str, Any],
    repo_id: str,
    private: bool | None,
    token: str | bool | None,
    revision: str | None,
    commit_message: str,
) -> str:
    """Push a finished cache's folder; the commit's address. See :meth:`.EmbeddingCache.push_to_hub`.

    Raises:
        CacheError: it is being extended.
    """
    if CacheFolder(folder).being_extended() is not None:
        raise CacheError(
            f"{folder} is being extended, and holds embeddings that are not the cache's yet: EmbeddingCache.extend "
            "finishes that. Then push it."
        )
    card = _CARD.format(repo_id=repo_id, cache=described, fingerprint=json.dumps(fingerprint, indent=2))
    return push_folder(
        folder,
        repo_id,
        repo_type="dataset",
        card=card,
        commit_message=commit_message,
        private=private,
        token=token,
        revision=revision,
        instead_of=FILES,
    )
