"""What a checkpoint holds in addition to the model: the corrector, what has been written back, the loss's counters.

In a checkpoint it is a folder of its own, which is not pushed to the Hub with the model::

    st_corrector/<loss>-<rank>-of-<processes>.safetensors
    st_corrector/digests.json    size and SHA-256 of every file of the checkpoint, written last

Each process writes what has been written back of its part of the corpus, the first one the corrector as well. The cache
itself stays where it is.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import CheckpointError
from ..losses.multiple_negatives import CorrectedMultipleNegativesLoss
from ..runtime.distributed import Processes
from ..storage.files import make_folder, whole

FOLDER = "st_corrector"
_GO_ON = "Then resume from the last checkpoint that is complete."
_DESCRIBED = {
    *("corrector", "cache", "rows", "steps", "cache_age", "refreshed", "diverged", "removed"),
    *("targets_encoded", "targets_verified", "targets_reencoded"),
}
_DIGESTS = "digests.json"
_PART = re.compile(r"(?P<name>.+)-(?P<rank>\d{5})-of-(?P<size>\d{5})\.safetensors")


def save_losses(losses: Mapping[str, CorrectedMultipleNegativesLoss], checkpoint: str | os.PathLike[str]) -> None:
    """Write the state of ``losses`` into the folder of a checkpoint; every process calls it.

    Args:
        losses: by name.
        checkpoint: the checkpoint's folder.
    """
    folder = Path(checkpoint) / FOLDER
    # Nobody goes on before all are here: the first process says next that all is there, and removes older checkpoints.
    with Processes.current().together("Saving the correctors' state"):
        make_folder(folder, _GO_ON)
        for name, loss in losses.items():
            _save(name, loss, folder)


def _save(name: str, loss: CorrectedMultipleNegativesLoss, folder: Path) -> None:
    processes = loss.processes
    for old in folder.glob("*.safetensors"):  # of as many processes as had begun this checkpoint and were killed
        if (match := _PART.fullmatch(old.name)) and match["name"] == name and int(match["size"]) != processes.size:
            old.unlink(missing_ok=True)
    path = folder / f"{name}-{processes.rank:05}-of-{processes.size:05}.safetensors"
    tensors, description = loss.training_state()
    on_cpu = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    with whole(path, _GO_ON) as partial:
        save_file(on_cpu, partial, {"state": json.dumps(description)})


def load_losses(losses: Mapping[str, CorrectedMultipleNegativesLoss], checkpoint: str | os.PathLike[str]) -> None:
    """Take over what :func:`save_losses` has written, with as many processes or another number of them.

    Where the cache had been refreshed it is refreshed again, by the model as it was saved, and the corrector starts
    again: no checkpoint holds embeddings of the whole corpus.

    Raises:
        CheckpointError: a file is missing or damaged.
        InputError: the checkpoint is of another corrector or another cache.
    """
    for name, loss in losses.items():
        parts = _parts(Path(checkpoint) / FOLDER, name)
        if not parts:
            raise CheckpointError(
                f"{checkpoint} holds no state of the corrector (no {FOLDER}/{name}-*.safetensors): it was saved by "
                "another trainer than CorrectorTrainer, or with save_only_model. Training would go on with a corrector "
                "that has learnt nothing: start a new run from this model, with a cache built by it."
            )
        loss.load_training_state([_read(part) for part in parts])


def seal(checkpoint: str | os.PathLike[str]) -> None:
    """Note what every file of a checkpoint is that has not been noted yet; one of the processes calls it, when all have
    written theirs.

    Raises:
        StorageError: the note cannot be written.
    """
    folder = Path(checkpoint)
    make_folder(folder / FOLDER, _GO_ON)
    for pattern in (".tmp*", "*.partial"):  # left by safetensors and by us, where an earlier attempt was killed
        for leftover in (folder / FOLDER).glob(pattern):
            leftover.unlink(missing_ok=True)
    note = folder / FOLDER / _DIGESTS
    described = json.loads(note.read_text(encoding="utf-8")) if note.exists() else {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_file() and path.suffix not in (".md", ".partial") and path != note and name not in described:
            described[name] = _described(path)
    with whole(folder / FOLDER / _DIGESTS, _GO_ON) as partial:
        partial.write_text(json.dumps(described, indent=2), encoding="utf-8")


def unseal(checkpoint: str | os.PathLike[str]) -> None:
    """Say of a checkpoint that is about to be written once more that it is not complete."""
    for name in ("trainer_state.json", f"{FOLDER}/{_DIGESTS}"):
        (Path(checkpoint) / name).unlink(missing_ok=True)


def fault_of(checkpoint: str | os.PathLike[str]) -> str | None:
    """What is wrong with a checkpoint whose writing was cut short, or that has been damaged since; None if nothing.

    All of it is read, where :func:`seal` has noted what it was.
    """
    folder = Path(checkpoint)
    try:
        json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))  # written last, by the first process
    except (OSError, ValueError):
        return "lacks trainer_state.json"
    if (folder / FOLDER / _DIGESTS).exists():
        try:
            noted = json.loads((folder / FOLDER / _DIGESTS).read_text(encoding="utf-8")).items()
        except (OSError, ValueError, AttributeError):
            return f"has a damaged {FOLDER}/{_DIGESTS}"
        for name, described in noted:
            path = folder / name
            try:
                if not path.resolve().is_relative_to(folder.resolve()):
                    return f"names a file outside of itself, {name}"
                if not path.is_file():
                    return f"lacks {name}"
                if _described(path) != described:
                    return f"has a damaged {name}: it is not what was written"
            except OSError as error:
                return f"has {name}, which cannot be read ({error})"
    for path in (folder / FOLDER).glob("*.safetensors"):
        match = _PART.fullmatch(path.name)
        if match is None:
            continue
        for rank in range(int(match["size"])):
            part = path.with_name(f"{match['name']}-{rank:05}-of-{match['size']}.safetensors")
            if not part.exists():
                return f"lacks {FOLDER}/{part.name}"
    return None


def _described(path: Path) -> dict[str, Any]:
    total = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            total.update(block)
    return {"bytes": path.stat().st_size, "sha256": total.hexdigest()}


def _parts(folder: Path, name: str) -> list[Path]:
    """The files of all processes that have written the checkpoint, in their order."""
    found = sorted(
        path for path in folder.glob("*.safetensors") if (m := _PART.fullmatch(path.name)) and m["name"] == name
    )
    if found and (match := _PART.fullmatch(found[0].name)) and len(found) != int(match["size"]):
        raise CheckpointError(
            f"{folder} holds {len(found)} of the {int(match['size'])} files in which as many processes have saved the "
            "corrector's state: the checkpoint is not complete. Go on from an earlier one."
        )
    return found


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            description = json.loads((file.metadata() or {})["state"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} is damaged ({error}): go on from an earlier checkpoint.") from error
    if not isinstance(description, dict) or not description.keys() >= _DESCRIBED:
        raise CheckpointError(f"{path} was written by another version of st_corrector: go on with that one.")
    return tensors, description
