"""Questions that targets bring with them: a title, a first sentence, or what the user makes of a target.

Paired with their targets they make training pairs for targets that no training question asks for; see
:meth:`.Corpus.own_pairs`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import regex
from datasets import Dataset
from datasets.fingerprint import Hasher

from ..errors import CorpusError
from ..storage.arrow import read_or_write_arrow
from ..storage.fingerprint import digest_json
from .columns import BATCH
from .duplicates import TextDigests
from .query_keys import UNKNOWN, own_keys, query_keys
from .text import join_title, normalized, words

Question = Literal["title", "first_sentence"] | Sequence[str | None] | Callable[[dict[str, Any]], str | None]
"""What a target's own question is: its title, the first sentence of its text, one string (or None) for each target, or
a function of ``{"id", "title", "text"}`` that returns a string or None.
"""
_SCHEMA = pa.schema([("key", pa.int64())])
_SENTENCE_ENDS = regex.compile(r"(?<=\p{Sentence_Terminal}[\p{Pf}\p{Pe}\"']*)(?:\s+|(?<=[。！？]))|\n+")
# "U.S.", "e.g.", an initial, a title before a name.
_ABBREVIATION = regex.compile(
    r"(?:\b\p{L}|\b(?:Dr|Mr|Mrs|Ms|Prof|St|Gen|Col|Lt|Sgt|Sen|Rep|Rev|Hon|Jr|Sr|vs|cf|ca|Fig|No|Vol|approx))\.$"
)
_FEWEST = 2  # words: one asks for nothing
_NAMED = ("title", "first_sentence")


def first_sentence(text: str) -> str | None:
    """The first sentence of ``text``, up to a full stop (of any script) or the end of a line; None where there is no
    other. No sentence ends at an abbreviation, such as ``Dr.`` or ``U.S.``, or behind its first word, except with its
    line.
    """
    text = text.strip()
    for end in _SENTENCE_ENDS.finditer(text):
        head = text[: end.start()]
        if "\n" in end.group() or not (_ABBREVIATION.search(head) or len(words(head)) < _FEWEST):
            return head.strip() if text[end.end() :] else None
    return None


class OwnQuestions:
    """The own question of each target that has one.

    Args:
        targets: columns ``id``, ``title`` and ``text``.
        question: see :data:`Question`.
        digests: of the targets' texts.
        cache_dir: where the questions' keys are stored.

    Raises:
        CorpusError: ``question`` is something else, gives something else than strings and None, or gives no question.
    """

    def __init__(self, targets: Dataset, question: Question, digests: TextDigests, cache_dir: Path) -> None:
        self._targets, self._question, self._digests = targets.with_format("arrow"), question, digests
        if isinstance(question, str) and question not in _NAMED:
            raise CorpusError(
                f"question {question!r} is not one of {', '.join(_NAMED)}: those are known by name; pass a function of "
                'a target, such as lambda target: target["text"].split("\\n")[0], or one string for each target.'
            )
        if not isinstance(question, str) and not callable(question) and len(question) != len(targets):
            raise CorpusError(f"{len(question)} questions for {len(targets)} targets: give one (or None) for each.")
        named = question if isinstance(question, str) else Hasher.hash(question)
        self.identity = digest_json([digests.identity, named, _SENTENCE_ENDS.pattern, _ABBREVIATION.pattern, _FEWEST])
        """A digest of the targets and the question."""
        self._path = cache_dir / f"own-questions-{self.identity}.arrow"
        if not (self.keys != UNKNOWN).any():
            raise CorpusError(
                f"No target has a question by question={question!r:.60}: pass 'title', 'first_sentence', a function of "
                "a target, or one string for each target."
            )

    @cached_property
    def keys(self) -> np.ndarray:
        """The key of each target's question, which targets with the same question share: int64, ``(N,)``, −1 where
        there is none.
        """

        def tables() -> Iterator[pa.Table]:
            for start in range(0, len(self._targets), BATCH):
                texts = self.texts(np.arange(start, min(start + BATCH, len(self._targets))))
                keys = np.full(len(texts), UNKNOWN)
                asked = [n for n, text in enumerate(texts) if text]
                keys[asked] = query_keys((normalized(texts[n] or "") for n in asked), own=True)
                yield pa.table([keys], schema=_SCHEMA)

        keys: np.ndarray = read_or_write_arrow(self._path, _SCHEMA, tables()).data.column("key").to_numpy()
        return keys

    def texts(self, rows: np.ndarray) -> list[str | None]:
        """The questions of ``rows``."""
        question = self._question
        if isinstance(question, str):  # reading one column of three
            read = self._targets.select_columns("title" if question == "title" else "text")[rows].column(0).to_pylist()
            found = read if question == "title" else [first_sentence(text) for text in read]
        elif callable(question):
            found = [question(target) for target in self._targets[rows].to_pylist()]
        else:
            found = [question[int(row)] for row in rows]
        for row, text in zip(rows, found, strict=True):
            if text is not None and not isinstance(text, str):
                raise CorpusError(
                    f"The own question of row {row} is a {type(text).__name__}, expected a string or None: {text!r:.60}"
                )
        return [text.strip() or None if text else None for text in found]

    def draw(self, answered: np.ndarray, count: int | None, seed: int) -> tuple[np.ndarray, list[str]]:
        """Targets in random order, and their questions: ``(n,)`` rows and as many texts.

        Args:
            answered: rows that are left out, as a question of the split asks for them or they have been withdrawn.
            count: how many at most.
            seed: of the order; the first ones are the same for every ``count``.
        """
        if count == 0:
            return np.empty(0, dtype=np.int64), []
        eligible = np.setdiff1d(np.flatnonzero(self.keys != UNKNOWN), answered)
        rows = np.random.default_rng(seed).permutation(eligible)
        kept: list[int] = []
        questions: list[str] = []
        for start in range(0, len(rows), BATCH):
            batch = rows[start : start + BATCH]
            targets = self._targets[batch].select(["title", "text"]).to_pylist()
            for row, target, text in zip(batch.tolist(), targets, self.texts(batch), strict=True):
                # A target that says nothing but its question teaches nothing.
                if text and normalized(text) not in (
                    normalized(target["text"]),
                    normalized(join_title(target["title"], target["text"])),
                ):
                    kept.append(row)
                    questions.append(text)
                if len(kept) == count:
                    return np.array(kept, dtype=np.int64), questions
        return np.array(kept, dtype=np.int64), questions

    @cached_property
    def _by_key(self) -> tuple[np.ndarray, np.ndarray]:
        order = np.argsort(self.keys, kind="stable")
        return self.keys[order], order

    def rows_of(self, key: int) -> np.ndarray:
        """The targets whose question has this key, ascending."""
        keys, rows = self._by_key
        low, high = np.searchsorted(keys, [key, key + 1])
        found: np.ndarray = rows[low:high]
        return found

    @cached_property
    def _saying(self) -> dict[int, np.ndarray]:
        return self._digests.rows_by(np.unique(self.keys), own_keys)

    def rows_saying(self, key: int) -> np.ndarray:
        """The targets whose text is the question with this key, ascending."""
        return self._saying.get(key, np.empty(0, dtype=np.int64))
