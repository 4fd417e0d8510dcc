"""Checks of texts without embedding them: whether two are the same, and whether one contains an answer."""

from __future__ import annotations

import unicodedata
from functools import lru_cache

import regex

# DPR's tokens: a run of letters, digits and marks, or one character that is neither separator nor control.
_TOKEN = regex.compile(r"[\p{L}\p{N}\p{M}]+|[^\p{Z}\p{C}]")


def join_title(title: str | None, text: str) -> str:
    """The text that is encoded for a target: ``"{title} {text}"``, or only the text if there is no title."""
    return f"{title} {text}".strip() if title else text


def normalized(text: str) -> str:
    """``text`` in the form in which texts are compared: only texts that differ just in case, white space or Unicode
    form (NFKC) become equal. Punctuation, operators and the marks of a script are kept.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(unicodedata.normalize("NFKC", folded).split())


def contains_answer(text: str, answers: list[str]) -> bool:
    """Whether ``text`` has one of ``answers`` as consecutive tokens, by the tokens of DPR's scorer (`Karpukhin et al.
    2020 <https://arxiv.org/abs/2004.04906>`_).

    Tokens are runs of letters, digits and marks, and single other characters that are neither separators nor controls;
    they are compared in lower case and decomposed (NFD). An answer without any token is in no text (for DPR, in every
    text).
    """
    spaced = _spaced(text)
    return any(_spaced(answer) in spaced for answer in answers)


@lru_cache(maxsize=2**16)  # the same targets are found for many queries, and again at the next evaluation
def _spaced(text: str) -> str:
    """The text's tokens with a space before, between and after them, so that containment is by whole tokens."""
    return f" {' '.join(_TOKEN.findall(unicodedata.normalize('NFD', text))).lower()} "
