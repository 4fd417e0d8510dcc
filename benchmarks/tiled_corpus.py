"""A corpus of any size, made of real passages: no two of its targets are the same, and few of them are stored."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from st_corrector import Corpus
from st_corrector.data.tokens import TokenizedCorpus
from st_corrector.storage.fingerprint import digest


class TiledCorpus(Corpus):
    """Passages again and again, each time behind another word: row ``r`` is passage ``r % n`` of ``n`` behind word
    ``r // n``.

    On disk are the passages once, behind the first word, and so are their token ids: those of the other rows differ in
    the word's id alone. A step gathers them as it does those of any corpus.

    Args:
        passages: its judgements are this corpus's too: they point at the first ``n`` rows.
        rows: how many targets there are.
        words: one for each time; each a single token, wherever it stands first. :func:`single_tokens` finds such.

    Raises:
        ValueError: there are too few words.
    """

    def __init__(self, passages: Corpus, rows: int, words: Sequence[str]) -> None:
        times = -(-rows // len(passages))
        if len(words) < times:
            raise ValueError(
                f"{rows:,} targets of {len(passages):,} passages need {times:,} words, got {len(words):,}."
            )
        self._rows, self._words = rows, list(words[:times])
        texts = passages.texts(range(len(passages)))
        self.passages = Corpus.from_texts((f"{words[0]} {text}" for text in texts), prompt=passages.prompt)
        """The first ``n`` rows, as a corpus of its own."""
        super().__init__(self.passages.targets, {split: passages.qrels(split) for split in passages.splits})
        self.prompt = passages.prompt

    def __len__(self) -> int:
        return self._rows

    def texts(self, rows: Sequence[int] | np.ndarray) -> list[str]:
        time, passage = np.divmod(np.asarray(rows, dtype=np.int64), len(self.passages))
        behind_first = len(self._words[0])
        return [
            self._words[n] + text[behind_first:]
            for n, text in zip(time.tolist(), self.passages.texts(passage), strict=True)
        ]

    @cached_property
    def fingerprint(self) -> str:
        return digest(self.passages.fingerprint, str(self._rows), *self._words)

    def duplicates_of(self, row: int) -> np.ndarray:
        # What is behind another word has other words.
        time, passage = divmod(int(row), len(self.passages))
        found = self.passages.duplicates_of(passage) + time * len(self.passages)
        return found[found < self._rows]

    def tokenize(self, model: SentenceTransformer, prompt: str | None = None, progress: bool = True) -> TokenizedCorpus:
        tokens = self.passages.tokenize(model, prompt, progress)
        if not isinstance(tokens, TokenizedCorpus) or tokens.layout.pad_left:
            raise ValueError("One token can be put in another's place only where texts are not padded on the left.")
        flat, lengths = tokens.layout.split(model.preprocess(self._words, prompt=prompt, task="document"))
        if len(set(lengths)) > 1:
            raise ValueError("A word is more than one token.")
        ids = flat["input_ids"].reshape(len(self._words), -1)
        (place,) = np.flatnonzero((ids != ids[0]).any(0))  # beside what every text has there
        return TiledTokens(tokens, self._rows, ids[:, place], int(place))


class TiledTokens(TokenizedCorpus):
    """Features of a :class:`TiledCorpus`.

    Args:
        passages: tokens of the passages behind the first word.
        rows: how many targets there are.
        words: the token of each word.
        place: where it stands among a text's tokens.
    """

    def __init__(self, passages: TokenizedCorpus, rows: int, words: np.ndarray, place: int) -> None:
        super().__init__(passages._tokens, passages.layout)
        self._passages, self._words, self._place = len(passages), words, place
        self.lengths = np.resize(passages.lengths, rows)

    def __len__(self) -> int:
        return len(self.lengths)

    def features(self, rows: Sequence[int] | np.ndarray) -> dict[str, torch.Tensor]:
        time, passage = np.divmod(np.asarray(rows, dtype=np.int64), self._passages)
        features = super().features(passage)
        ids = features["input_ids"]
        where = (slice(None), self._place) if ids.ndim == 2 else features["offsets"] + self._place
        ids[where] = torch.from_numpy(self._words[time])
        return features


def single_tokens(model: SentenceTransformer, count: int) -> list[str]:
    """Words of the model's vocabulary that are one token each: letters and digits alone, which nothing cuts up."""
    vocabulary = model.tokenizer.get_vocab()
    words = (word for word in sorted(vocabulary, key=vocabulary.get) if word.isascii() and word.isalnum())
    return [word for word in words if word.islower()][:count]
