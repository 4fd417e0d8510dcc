"""A corrector's files, in a separate folder inside a model's folder or repository::

corrector/config.json                which it is, its settings, and between which embeddings it maps
corrector/corrector.safetensors      all that it has learnt
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HFValidationError, RemoteEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ..errors import InputError
from ..storage.files import make_folder, whole
from ..storage.hub import push
from .settings import configured
from .types import Frames

if TYPE_CHECKING:
    from .base import Corrector

FOLDER, CONFIG, STATE = "corrector", "config.json", "corrector.safetensors"
_SCHEMA = 1
_LARGEST_CONFIG = 1 << 20
_LARGEST_DIM = 16_384  # limits what a file can make us allocate


def write(corrector: Corrector, folder: Path) -> None:
    """Write ``folder/corrector``.

    Raises:
        StorageError: it cannot be written.
    """
    folder = folder / FOLDER
    make_folder(folder)
    frames = corrector.frames
    settings = {name: value for name, value in corrector.config.items() if name != "dim"}
    described = {
        "schema": _SCHEMA,
        "corrector": corrector.name,
        "dim": corrector.dim,
        "settings": settings,
        "maps": None if frames is None else frames._asdict(),
    }
    tensors = {name: value.detach().cpu().contiguous() for name, value in corrector.state_dict().items()}
    with whole(folder / STATE) as partial:
        partial.write_bytes(save(tensors))
    with whole(folder / CONFIG) as partial:
        partial.write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")


def load(
    name: str | os.PathLike[str], kind: type[Corrector], kinds: dict[str, type[Corrector]], **options: Any
) -> Corrector:
    """The corrector in a folder, or in a repository on the Hub, of one of the ``kinds`` by name or of ``kind``; see
    :meth:`Corrector.from_pretrained`.
    """
    folder = Path(name)
    if folder.is_dir():
        config, state = folder / FOLDER / CONFIG, folder / FOLDER / STATE
        if not config.is_file() or not state.is_file():
            inner = [str(path.parent.parent) for path in folder.glob(f"*/{FOLDER}/{CONFIG}")]
            meant = f" Did you mean {inner[0]}?" if inner else ""
            raise InputError(
                f"{name} holds no corrector (no {FOLDER}/{CONFIG} and {FOLDER}/{STATE}).{meant} A run saves one beside "
                "its model if it had one: with corrector='mlp', or where 'auto' took it."
            )
        return read(config, state, kind, kinds)
    try:
        config, state = (Path(hf_hub_download(str(name), f"{FOLDER}/{file}", **options)) for file in (CONFIG, STATE))
    except HFValidationError as error:
        raise InputError(f"{name} is neither an existing folder nor the id of a repository ({error}).") from error
    except RemoteEntryNotFoundError as error:
        raise InputError(f"The repository {name} holds no corrector: {error}") from error
    return read(config, state, kind, kinds)


def send(corrector: Corrector, repo_id: str, **options: Any) -> str:
    """Upload it; see :meth:`Corrector.push_to_hub`."""
    card = _CARD.format(repo_id=repo_id, corrector=corrector)
    return push(lambda folder: write(corrector, folder), repo_id, repo_type="model", card=card, **options)


def read(config: Path, state: Path, kind: type[Corrector], kinds: dict[str, type[Corrector]]) -> Corrector:
    """Read what :func:`write` has written.

    Args:
        config, state: the two files; any content gives a corrector or an error.
        kind: the required class; needed for your own class.
        kinds: the classes known by name.

    Raises:
        InputError: they are not a corrector's, damaged, or of another kind.
    """
    found = _parse(config)
    name, dim, settings, maps = (found.get(key) for key in ("corrector", "dim", "settings", "maps"))
    own = getattr(kind, "name", None)
    known = {**kinds, **({own: kind} if isinstance(own, str) else {})}
    if found.get("schema") != _SCHEMA or not isinstance(settings, dict):
        raise InputError(
            f"{config} does not describe a corrector of schema {_SCHEMA}: another version may have saved it."
        )
    if not isinstance(name, str) or name not in known:
        raise InputError(
            f"{config} describes a corrector {name!r:.80}, which is not one of {', '.join(known)}: load it by its "
            "class."
        )
    if not issubclass(known[name], kind):
        raise InputError(f"{config} describes a {known[name].__name__}, not a {kind.__name__}.")
    if type(dim) is not int or not 0 < dim <= _LARGEST_DIM:
        raise InputError(f"{config}: dim must be an integer from 1 to {_LARGEST_DIM}, got {dim!r:.80}.")
    if name in kinds:
        corrector = configured(kinds[name], dim, settings)
    else:
        try:
            corrector = kind(dim, **settings)
        except TypeError as error:
            raise InputError(f"{config} has settings that a {kind.__name__} does not take ({error}).") from error
    corrector.frames = _frames(config, maps)
    try:
        with safe_open(state, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        corrector.load_state_dict(tensors)
    except (SafetensorError, OSError, ValueError, KeyError, IndexError, TypeError, RuntimeError) as error:
        raise InputError(f"{state} is not the state of {corrector!r}, or damaged: {error}") from error
    return corrector


def _parse(config: Path) -> dict[str, Any]:
    try:
        if config.stat().st_size > _LARGEST_CONFIG:
            raise ValueError(f"{config.stat().st_size:,} bytes")
        found = json.loads(config.read_bytes())
        if not isinstance(found, dict):
            raise ValueError(f"a {type(found).__name__}")
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{config} is not readable as a corrector's configuration ({error}).") from error
    return found


def _frames(config: Path, maps: Any) -> Frames | None:
    if maps is None:
        return None
    try:
        frames = Frames(**maps)
        if not isinstance(frames.stale, dict) or not isinstance(frames.fresh, dict) or type(frames.unit) is not bool:
            raise TypeError("stale and fresh must be objects, unit true or false")
    except TypeError as error:
        raise InputError(f"{config}: its frames are not readable ({error}).") from error
    return frames


_CARD = """---
library_name: st_corrector
tags:
- sentence-transformers
- st_corrector
---

# A corrector of stale embeddings

It maps embeddings of an earlier state of a text encoder to those of a later one. What it maps between is in
`corrector/config.json`.

```python
from st_corrector import Corrector

corrector = Corrector.from_pretrained("{repo_id}")
```

`{corrector!r}`
"""
