"""Which targets have the same text, by digests of all texts, computed once and kept next to the corpus.

Each target has three digests of 64 bits: one of the joined text unchanged, for the corpus's fingerprint, and one each
of the joined text and the text without title, in the form in which texts are compared
(:func:`~st_corrector.data.text.normalized`).
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, Value

from ..storage.arrow import read_or_write_arrow
from ..storage.fingerprint import digest, digest_json
from .columns import BATCH
from .text import join_title, normalized

Digests = np.ndarray[tuple[int], np.dtype[np.uint64]]
Rows = np.ndarray[tuple[int], np.dtype[np.int64]]
_COLUMNS = ("joined", "same", "same_untitled")
_SCHEMA = pa.schema([(name, pa.uint64()) for name in _COLUMNS])
_SKETCHED = 64  # texts by which parts of one file are told apart, beside the lengths of all
_FEWEST_FOR_A_PROCESS = 100_000  # targets; for fewer, starting processes takes longer than digesting
# Version of the rules behind digests on disk: raise it when normalized() changes. Python brings Unicode's own tables.
_RULES = (1, unicodedata.unidata_version)


class TextDigests:
    """Digests of the targets' texts, and what is derived from them.

    If the targets are on disk, so are the digests, and a second start reads no text. Otherwise each process that needs
    them computes them.

    Args:
        targets: columns ``title`` and ``text``.
        cache_dir: where the digests are stored.
        parts: digests of the targets' parts, where they were put together.
    """

    def __init__(self, targets: Dataset, cache_dir: Path, parts: Sequence[TextDigests] = ()) -> None:
        self._targets, self._cache_dir, self._parts = targets, cache_dir, parts
        self._columns: dict[str, Digests] = {}

    @cached_property
    def _table(self) -> pa.Table:
        if self._parts:
            return pa.concat_tables(part._table for part in self._parts)
        files = [Path(file["filename"]) for file in self._targets.cache_files]
        if not files:
            return pa.concat_tables(list(self._computed()))
        state = [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
        path = self._cache_dir / f"digests-{digest_json([state, self._sketch(), _RULES])}.arrow"
        table: pa.Table = read_or_write_arrow(path, _SCHEMA, self._computed()).data.table
        return table

    def _sketch(self) -> list[str]:
        """Tells parts and columns of one file apart, such as ``targets.select(range(n, 2 * n))``, which Arrow does not
        copy: the lengths of all texts, and some texts whole.
        """
        table, some = self._targets.data, np.linspace(0, len(self._targets) - 1, _SKETCHED).astype(np.int64)
        columns = [table.column(name).cast(pa.string()) for name in ("title", "text")]
        lengths = [pc.fill_null(pc.binary_length(column), -1).to_numpy().tobytes() for column in columns]
        # One by one: taking several joins the chunks, which may be more than Arrow's strings can hold.
        return [digest(*lengths), digest_json([[column[row].as_py() for row in some.tolist()] for column in columns])]

    def _computed(self) -> Iterator[pa.Table]:
        processes = min(os.cpu_count() or 1, len(self._targets) // _FEWEST_FOR_A_PROCESS)
        if processes < 2:
            for batch in self._targets.with_format("arrow").iter(BATCH):
                yield pa.table(_digested(batch.column("title").to_pylist(), batch.column("text").to_pylist()), _SCHEMA)
            return
        self._cache_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self._cache_dir, prefix="digests-") as folder:
            mapped = self._targets.map(
                _digested,
                batched=True,
                batch_size=BATCH,
                input_columns=["title", "text"],
                remove_columns=self._targets.column_names,
                features=Features({name: Value("uint64") for name in _COLUMNS}),
                num_proc=processes,
                cache_file_name=str(Path(folder) / "part.arrow"),
                desc="Comparing texts",
            )
            yield from (batch.cast(_SCHEMA) for batch in mapped.with_format("arrow").iter(BATCH))

    def _column(self, name: str) -> Digests:
        if name not in self._columns:
            self._columns[name] = self._table.column(name).to_numpy()
        return self._columns[name]

    @cached_property
    def fingerprint(self) -> str:
        """A digest of the joined texts in their order."""
        return self.fingerprint_of(len(self._targets))

    def fingerprint_of(self, end: int, first: int = 0) -> str:
        """The same of the texts ``first … end − 1``."""
        return digest(self._column("joined")[first:end].tobytes())

    def of(self, rows: np.ndarray) -> np.ndarray:
        """The digests of the joined texts of ``rows``, as int64."""
        digests: Rows = self._column("joined")[rows].view(np.int64)
        return digests

    @cached_property
    def identity(self) -> str:
        """A digest of titles and texts, wherever the one ends and the other begins."""
        return digest(self._column("joined").tobytes(), self._column("same_untitled").tobytes())

    @cached_property
    def repeated(self) -> dict[int, Rows]:
        """Row → all rows with the same joined text, ascending; it has only rows with a duplicate."""
        digests = self._column("same")
        order = np.argsort(digests, kind="stable")
        digests = digests[order]
        bounds = np.flatnonzero(np.concatenate([[True], digests[1:] != digests[:-1], [True]]))
        repeated: dict[int, Rows] = {}
        for group in np.flatnonzero(np.diff(bounds) > 1):
            rows = np.sort(order[bounds[group] : bounds[group + 1]])
            repeated.update({int(row): rows for row in rows})
        return repeated

    def rows_like(self, texts: Sequence[str]) -> list[Rows]:
        """For each of ``texts``, the rows that have the same text, with their title or without, ascending."""
        digests = np.fromiter((_digest(normalized(text)) for text in texts), np.uint64, len(texts))
        found = self.rows_by(digests)
        return [found.get(each, np.empty(0, dtype=np.int64)) for each in digests.tolist()]

    def rows_by(self, wanted: np.ndarray, key_of: Callable[[Digests], np.ndarray] | None = None) -> dict[int, Rows]:
        """Key → the rows whose text has it, with their title or without, ascending; only keys that are ``wanted`` and
        that a row has.

        Args:
            key_of: from the texts' digests to their keys, ``(N,) → (N,)``; by default they are the keys.
        """
        # Only few targets have a text that is asked for: sort only these.
        columns = [self._column(name) for name in ("same", "same_untitled")]
        keyed = [column if key_of is None else key_of(column) for column in columns]
        found = [np.flatnonzero(np.isin(keys, wanted)) for keys in keyed]
        rows = np.concatenate(found)
        keys = np.concatenate([keys[here] for keys, here in zip(keyed, found, strict=True)])
        order = np.lexsort([rows, keys])
        distinct, starts = np.unique(keys[order], return_index=True)
        parts = np.split(rows[order], starts[1:]) if len(distinct) else []
        return {key: np.unique(part) for key, part in zip(distinct.tolist(), parts, strict=True)}


def digests_of(texts: list[str]) -> Digests:
    """The digests of some texts as they are, by which :meth:`TextDigests.of` knows joined ones: uint64, ``(n,)``."""
    return np.fromiter(map(_digest, texts), np.uint64, len(texts))


def _digested(titles: list[str | None], texts: list[str]) -> dict[str, Digests]:
    """The columns of :data:`_SCHEMA` for some targets."""
    joined = [join_title(title, text) for title, text in zip(titles, texts, strict=True)]
    same = [_digest(normalized(text)) for text in joined]
    untitled = [
        _digest(normalized(text)) if title else of_joined
        for title, text, of_joined in zip(titles, texts, same, strict=True)
    ]
    columns = ([_digest(text) for text in joined], same, untitled)
    return {name: np.array(column, dtype=np.uint64) for name, column in zip(_COLUMNS, columns, strict=True)}


def _digest(text: str) -> int:
    """64 bits of ``text``'s hash."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "little")
