"""Checks of texts without embedding them: whether two are the same, and whether one contains an answer."""

from __future__ import annotations

import unicodedata
from functools import lru_cache

import regex

# Of letters: those of scripts that put no space between words, or write particles behind them.
_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Hangul}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}"
_LETTERS = r"\p{L}\p{N}\p{M}"
# DPR's tokens are runs of letters, digits and marks. Of unspaced scripts a character with its marks is one, as for
# BERT's tokenizers (of Hangul, which NFD takes apart, a syllable).
_WORD = rf"[[{_LETTERS}]--[{_UNSPACED}]]+|(?=[[{_LETTERS}]&&[{_UNSPACED}]])\X"
_WORDS = regex.compile(_WORD, regex.VERSION1)
_TOKEN = regex.compile(rf"{_WORD}|[^\p{{Z}}\p{{C}}]", regex.VERSION1)


def join_title(title: str | None, text: str) -> str:
    """The text that is encoded for a target: ``"{title} {text}"``, or only the text if there is no title."""
    return f"{title} {text}".strip() if title else text


def normalized(text: str) -> str:
    """``text`` in the form in which texts are compared: only texts that differ just in case, white space or Unicode
    form (NFKC) become equal. Punctuation, operators and the marks of a script are kept.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(unicodedata.normalize("NFKC", folded).split())


def words(text: str) -> list[str]:
    """Runs of letters, digits and marks; of scripts without spaces between words, characters."""
    found: list[str] = _WORDS.findall(unicodedata.normalize("NFD", text))
    return found


def contains_answer(text: str, answers: list[str]) -> bool:
    """Whether ``text`` has one of ``answers`` as consecutive tokens, by the tokens of DPR's scorer (`Karpukhin et al.
    2020 <https://arxiv.org/abs/2004.04906>`_).

    Tokens are runs of letters, digits and marks, and single other characters that are neither separators nor controls;
    they are compared in lower case and decomposed (NFD). In scripts without spaces between words, and in Hangul, which
    writes particles behind them, each character is a token (for DPR a whole sentence would be one). An answer without
    any token is in no text (for DPR, in every text).
    """
    spaced = _spaced(text)
    return any(_spaced(answer) in spaced for answer in answers)


@lru_cache(maxsize=2**16)  # the same targets are found for many queries, and again at the next evaluation
def _spaced(text: str) -> str:
    """The text's tokens with a space before, between and after them, so that containment is by whole tokens."""
    return f" {' '.join(_TOKEN.findall(unicodedata.normalize('NFD', text))).lower()} "
