"""Somebody who may only read."""

import os
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from conftest import FORKS

lancedb = pytest.importorskip("lancedb")
pytest.importorskip("lancedb.index")
pytest.importorskip("qdrant_client")

from qdrant_client import QdrantClient, models  # noqa: E402

from st_corrector import RidgeCorrector  # noqa: E402
from st_corrector.stores.opening import open_vectors  # noqa: E402


def _tried(folder: str, told) -> None:
    """In a process of its own, which gives its rights up."""
    folder = Path(folder)
    vectors, corrector = np.eye(16, dtype=np.float32), RidgeCorrector(16)
    lists = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), 16)
    lancedb.connect(folder / "lance").create_table("docs", pa.table({"id": range(16), "vector": lists}))
    client = QdrantClient(path=str(folder / "qdrant"))
    client.create_collection("docs", models.VectorParams(size=16, distance=models.Distance.COSINE))
    client.upload_collection("docs", vectors)
    client.close()
    of_lance, of_qdrant = f"lancedb:{folder / 'lance'}#docs", f"qdrant:{folder / 'qdrant'}#docs"
    for address in (of_lance, of_qdrant):  # loads what somebody without rights may not be able to load
        assert open_vectors(address).count == 16
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    if os.getuid() == 0:
        os.setuid(65534)

    def said(call) -> str:
        try:
            call()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return "nothing"

    told.put(said(lambda: open_vectors(of_lance).upgrade(corrector, None, progress=False)))
    told.put(said(lambda: open_vectors(of_lance).upgrade(corrector, f"{of_lance}_new", progress=False)))
    told.put(said(lambda: open_vectors(of_qdrant)))
    told.put({path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before)


@pytest.mark.skipif(not hasattr(os, "setuid"), reason="rights are those of POSIX")
def test_who_may_not_write_is_told_so_and_everything_is_as_it_was():
    told = FORKS.Queue()
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders are closed to others
        Path(folder).chmod(0o755)
        process = FORKS.Process(target=_tried, args=(folder, told))
        process.start()
        found = [told.get(timeout=120) for _ in range(4)]
        process.join()
        for path in [Path(folder), *Path(folder).rglob("*")]:
            path.chmod(0o755)
    in_place, new, opening, unchanged = found
    assert in_place.startswith("InputError") and "there is no right to write" in in_place
    assert new.startswith("InputError") and "there is no right to write" in new
    assert opening.startswith("InputError") and "there is no right to write" in opening
    assert unchanged
