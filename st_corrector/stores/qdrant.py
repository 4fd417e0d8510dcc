"""Served embeddings in Qdrant."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..carry_over.mapping import IndexMap
from ..errors import InputError, StorageError
from ..storage.fingerprint import digest_json
from .base import Store

try:
    from qdrant_client import QdrantClient, models
    from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse
except ImportError as error:
    raise InputError("Qdrant needs its client: pip install 'st-corrector[qdrant]'") from error

SCHEME = "qdrant:"
KEY = "QDRANT_API_KEY"
"""The environment variable with a server's key."""
_OF = "_st_corrector_made_of"
_MADE = "_upgraded_"
_MARKED = models.Filter(must_not=[models.IsEmptyCondition(is_empty=models.PayloadField(key=_OF))])
_METRICS = {models.Distance.DOT: "dot", models.Distance.COSINE: "cosine", models.Distance.EUCLID: "l2"}
_AT_ONCE = 1_024  # points of a request
_CLOSE = 1e-5  # what Qdrant rounds where it brings vectors to unit length


class _Place(NamedTuple):
    """A collection of new vectors.

    Args:
        name: of the collection.
        alias: that will stand for it, where it takes another's place.
        digest: of how they are made.
    """

    name: str
    alias: str | None
    digest: str


class QdrantVectors(Store[_Place]):
    """A Qdrant collection: ``qdrant:folder#collection`` in the client's embedded mode, ``qdrant:http://host:6333#…`` on
    a server; ``…#collection:name`` for one of several named vectors, ``…#collection@field`` or
    ``…#collection:name@field`` where the payload has the ids (``@metadata.id`` for a nested field). If a server wants a
    key, the environment variable ``QDRANT_API_KEY`` holds it.

    A point's id, as text, is the target's id in the corpus, unless a field of the payload is named. The collection is
    upgraded while it serves, into a new collection with the same settings and payloads. In place, without an output,
    what is given must be an *alias*: a new collection is made, to which the alias is switched in one operation. The old
    collection stays.

    Each new point has a digest of what it was made of, and of how, in its payload until all are done. So a run that was
    killed goes on, and what another corrector has made is made again. The embedded mode keeps a second process out;
    nothing does on a server: start one command at a time.

    Args:
        address: of the collection or alias.
        ids: of targets, by which rows are ordered; all of them must be there, except for None. Others are
            carried over, but are no rows.

    Raises:
        InputError: there is no such folder or collection, the vector must be named, or some of the ids are not
            there.
        StorageError: the server cannot be reached.
    """

    def __init__(
        self, address: str, ids: Sequence[str | None] | None = None, client: QdrantClient | None = None
    ) -> None:
        super().__init__(address)
        self._where, given, named, field = _parsed(address)
        self._client = client or _connected(self._where, address)
        with _explained(address):
            aliases = {each.alias_name: each.collection_name for each in self._client.get_aliases().aliases}
            self.alias = given if given in aliases else None
            self.name = aliases.get(given, given)
            if not self._client.collection_exists(self.name):
                raise InputError(f"{address}: there is no collection {given} here.")
            self._config = self._client.get_collection(self.name).config
        vectors = self._config.params.vectors
        if isinstance(vectors, models.VectorParams):
            vectors = {"": vectors}
        if not vectors or (named is None and len(vectors) != 1) or (named is not None and named not in vectors):
            raise InputError(
                f"{address}: which vectors? Name them, as in #{given}:name; there are "
                f"{sorted(vectors or {}) or 'none'}."
            )
        self.vector = named if named is not None else next(iter(vectors))
        self._params: models.VectorParams = vectors[self.vector]
        self.dim = self._params.size
        scrolled = self._scrolled(with_payload=[field.partition(".")[0]] if field else False)
        names = {point.id: _nested(point.payload, field) for point in scrolled}
        if not names:
            raise InputError(f"{address}: the collection has no points.")
        self.known_by(list(names), ids, list(names.values()) if field else None)

    def _scrolled(self, name: str | None = None, **wanted: Any) -> Iterator[Any]:
        """All points of a collection, in the order of their ids."""
        offset = None
        while True:
            with _explained(self.address):
                points, offset = self._client.scroll(
                    name or self.name, limit=_AT_ONCE, offset=offset, **{"with_payload": False, **wanted}
                )
            yield from points
            if offset is None:
                return

    def _vector_of(self, point: Any) -> np.ndarray:
        found = point.vector.get(self.vector) if isinstance(point.vector, dict) else point.vector
        if found is None:
            raise InputError(f"{self.address}: point {point.id!r} has no vector: fill or delete it.")
        return np.asarray(found, dtype=np.float32)

    def read(self, keys: list[Any]) -> tuple[dict[Any, np.ndarray], dict[Any, Any]]:
        vectors: dict[Any, np.ndarray] = {}
        digests: dict[Any, str] = {}
        for start in range(0, len(keys), _AT_ONCE):
            with _explained(self.address):
                points = self._client.retrieve(
                    self.name, keys[start : start + _AT_ONCE], with_payload=True, with_vectors=True
                )
            vectors |= {point.id: self._vector_of(point) for point in points}
            digests |= {point.id: _digest(point) for point in points}
        return vectors, digests

    def at(self, path: str | Path | None) -> QdrantVectors:
        """What :meth:`upgrade` has written."""
        where, name, _, _ = _parsed(self.address if path is None else str(path))
        address = f"{SCHEME}{where}#{name}" + (f":{self.vector}" if self.vector else "")
        return QdrantVectors(address, self._names, self._client)

    @property
    def metric(self) -> str:
        return _METRICS.get(self._params.distance, self._params.distance.value)

    def check(self, how: IndexMap) -> None:
        """Refuse a map from other embeddings, or a distance by which its output would be ranked otherwise.

        Raises:
            InputError: the dimension differs, or the collection does not compare as the model does.
        """
        super().check(how)
        if self._params.multivector_config is not None:
            raise InputError(f"{self.address} holds several vectors for a point, of which no corrector knows.")
        self.require_metric(how, self.metric, self.address)

    # ------------------------------------------------------------------ upgrading

    @contextmanager
    def alone(self) -> Iterator[None]:
        """The client keeps others out of a folder; nothing does on a server."""
        yield

    def require_output(self, path: str | Path | None) -> None:
        if path is None:
            if self.alias is None:
                raise InputError(
                    f"{self.address} is a collection, which cannot be exchanged while it serves: let an alias serve, "
                    "which can, or name a new collection."
                )
            if re.search(rf"{_MADE}[0-9a-f]{{8}}$", self.name):
                with _explained(self.address):  # what a run that was killed at the end has left
                    marked = models.FilterSelector(filter=_MARKED)
                    self._client.delete_payload(self.name, [_OF], points=marked, wait=True)
                raise InputError(
                    f"{self.address} was upgraded in place already: it stands for {self.name}. To upgrade it once "
                    "more, name a new collection."
                )
            return
        where, name, named, _ = _parsed(str(path))
        if where != self._where or named not in (None, self.vector) or name in (self.name, self.alias):
            raise InputError(f"{path} must be another collection beside {self.address}.")
        with _explained(self.address):
            there = self._client.collection_exists(name) and self._client.count(name).count
            if there and not self._client.count(name, _MARKED).count:
                raise InputError(f"{path} exists already: choose another name, or delete it.")

    def begun(self, path: str | Path | None, how: IndexMap) -> _Place:
        self.require_output(path)  # again, as it may have been long since
        digest = digest_json([how.digest, self.vector])
        name = f"{self.name}{_MADE}{digest[:8]}" if path is None else _parsed(str(path))[1]
        with _explained(self.address):
            if not self._client.collection_exists(name):
                self._create(name, how)
            vectors = self._client.get_collection(name).config.params.vectors
            made = vectors.get(self.vector) if isinstance(vectors, dict) else vectors
            if made is None or (made.size, made.distance) != (how.new_dim, self._params.distance):
                raise InputError(f"{path} exists already, for other vectors: choose another name, or delete it.")
        return _Place(name, self.alias if path is None else None, digest)

    def _create(self, name: str, how: IndexMap) -> None:
        """A collection like the old one, for vectors of the new width."""
        params = self._config.params
        vectors: Any = self._params.model_copy(update={"size": how.new_dim})
        if isinstance(params.vectors, dict):
            vectors = {**params.vectors, self.vector: vectors}
        alike = {
            field: getattr(params, field)
            for field in ("shard_number", "replication_factor", "write_consistency_factor", "on_disk_payload")
        }
        self._client.create_collection(
            name,
            vectors_config=vectors,
            sparse_vectors_config=params.sparse_vectors,
            hnsw_config=models.HnswConfigDiff(**_given(models.HnswConfigDiff, self._config.hnsw_config)),
            optimizers_config=models.OptimizersConfigDiff(
                **_given(models.OptimizersConfigDiff, self._config.optimizer_config)
            ),
            quantization_config=self._config.quantization_config,
            **alike,
        )

    def todo(self, place: _Place) -> list[Any]:
        with _explained(self.address):
            self._require_serving(place)
        made_of = {point.id: (point.payload or {}).get(_OF) for point in self._scrolled(place.name, with_payload=[_OF])}
        if place.alias is None and made_of and not any(made_of.values()):
            raise InputError(f"Another process has finished {place.name}: there is nothing left to do.")
        missing, there = [], set()
        for point in self._scrolled(with_vectors=True, with_payload=True):
            there.add(point.id)
            if made_of.get(point.id) != _made_of(_digest(point), place):
                missing.append(point.id)
        if gone := [key for key in made_of if key not in there]:
            with _explained(self.address):
                self._client.delete(place.name, models.PointIdsList(points=gone), wait=True)
        return missing

    def put(self, place: _Place, keys: list[Any], vectors: np.ndarray, digests: list[Any]) -> None:
        new = dict(zip(keys, vectors, strict=True))
        of = dict(zip(keys, digests, strict=True))
        for start in range(0, len(keys), _AT_ONCE):
            some = keys[start : start + _AT_ONCE]
            with _explained(self.address):
                self._require_serving(place)
                points = self._client.retrieve(self.name, some, with_payload=True, with_vectors=True)
                written = [
                    models.PointStruct(
                        id=point.id,
                        vector={**point.vector, self.vector: new[point.id].tolist()}
                        if isinstance(point.vector, dict)
                        else new[point.id].tolist(),
                        payload={**(point.payload or {}), _OF: _made_of(of[point.id], place)},
                    )
                    for point in points
                ]
                if not written:
                    continue
                self._client.upsert(place.name, written, wait=True)
                ids = [point.id for point in written]
                there = self._client.retrieve(place.name, ids, with_payload=False, with_vectors=True)
            found = {point.id: self._vector_of(point) for point in there}
            if len(found) != len(ids) or max(np.abs(found[key] - self._stored(new[key])).max() for key in ids) > _CLOSE:
                raise StorageError(f"Vectors of {place.name} are not what was written into it.")

    def _stored(self, vector: np.ndarray) -> np.ndarray:
        """As Qdrant stores a vector: of unit length where it compares by cosine."""
        if self._params.distance != models.Distance.COSINE:
            return vector
        return vector / max(float(np.linalg.norm(vector)), 1e-12)

    def _require_serving(self, place: _Place) -> None:
        """Refuse to write into a collection that serves already.

        Raises:
            InputError: another process has switched the alias.
        """
        aliases = {each.alias_name: each.collection_name for each in self._client.get_aliases().aliases}
        if place.alias is not None and aliases.get(place.alias) != self.name:
            raise InputError(f"{self.address} stands for another collection now: another process has carried it over.")

    def finish(self, place: _Place) -> None:
        with _explained(self.address):
            self._require_serving(place)
            if place.alias is not None:
                self._client.update_collection_aliases(
                    [
                        models.DeleteAliasOperation(delete_alias=models.DeleteAlias(alias_name=place.alias)),
                        models.CreateAliasOperation(
                            create_alias=models.CreateAlias(collection_name=place.name, alias_name=place.alias)
                        ),
                    ]
                )
            self._client.delete_payload(place.name, [_OF], points=models.FilterSelector(filter=_MARKED), wait=True)


def _parsed(address: str) -> tuple[str, str, str | None, str | None]:
    """The folder or server, the collection, the vectors' name and the field with ids, if there are any.

    Raises:
        InputError: no collection is named.
    """
    where, _, named = address.removeprefix(SCHEME).partition("#")
    named, _, field = named.partition("@")
    collection, _, vector = named.partition(":")
    if not collection:
        raise InputError(f"{address}: which collection? Name it, as in {SCHEME}folder#documents.")
    return where, collection, vector or None, field or None


def _nested(payload: Any, field: str | None) -> Any:
    """What a payload has in a field, ``"id"`` or ``"metadata.id"``; None if it has none."""
    for name in (field or "").split("."):
        payload = payload.get(name) if isinstance(payload, dict) else None
    return payload


def _connected(where: str, address: str) -> QdrantClient:
    if where.startswith(("http://", "https://")):
        with _explained(address):
            return QdrantClient(url=where, api_key=os.environ.get(KEY))
    if not Path(where).is_dir():
        raise InputError(f"{address}: there is no folder {where}.")
    try:
        return QdrantClient(path=where)
    except RuntimeError as error:
        raise InputError(f"{address}: another process is at this folder ({error}).") from error
    except OSError as error:
        raise InputError(f"{address}: there is no right to write, which reading needs, too ({error}).") from error


@contextmanager
def _explained(address: str) -> Iterator[None]:
    """Qdrant's errors as this package's."""
    try:
        yield
    except ResponseHandlingException as error:
        raise StorageError(f"{address}: the server cannot be reached, or has failed ({error}).") from error
    except UnexpectedResponse as error:
        refused = InputError if error.status_code in (400, 401, 403, 404) else StorageError
        raise refused(f"{address}: Qdrant refuses ({str(error).splitlines()[0]}).") from error


def _given(kind: Any, config: Any) -> dict[str, Any]:
    """What ``kind`` has of a configuration."""
    found = config.model_dump(exclude_none=True) if config is not None else {}
    return {name: value for name, value in found.items() if name in kind.model_fields}


def _digest(point: Any) -> str:
    """Of a point, with all that belongs to it."""
    told = json.dumps([point.vector, point.payload], sort_keys=True, default=str)
    return hashlib.blake2b(told.encode(), digest_size=8).hexdigest()


def _made_of(digest: Any, place: _Place) -> str:
    return f"{digest}-{place.digest[:16]}"
