"""What is asked of texts without embedding them: whether they are texts, and how they compare, case and Unicode form
aside.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

_TOKEN = re.compile(r"[^\W_]+|[^\w\s]|_")
_WORD = re.compile(r"[^\W_]+")


def normalized(text: str) -> str:
    """The words of ``text`` alone, lower-cased and in Unicode's compatibility form: texts that differ only in case,
    spaces or punctuation become equal. A text without any letter or digit stays as it is.
    """
    return " ".join(_WORD.findall(unicodedata.normalize("NFKC", text).casefold())) or text


def contains_answer(text: str, answers: list[str]) -> bool:
    """Whether ``text`` has one of ``answers`` as consecutive tokens, case and Unicode form aside.

    Tokens are runs of letters and digits, and single other characters, as in the scorer of DrQA and DPR
    (`Karpukhin et al. 2020 <https://arxiv.org/abs/2004.04906>`_).
    """
    spaced = _spaced(text)
    return any(_spaced(answer) in spaced for answer in answers)


def half_character(text: str) -> str | None:
    """What is wrong with a string that no file can hold; None if nothing is.

    JSON's ``\\ud83d`` without its other half, or a text cut in between, makes such strings.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        return f"half of a character (a lone surrogate, U+{code:04X}) at position {error.start} of {text!r:.60}"
    return None


@lru_cache(maxsize=2**16)  # the same targets are found for many queries, and again at the next evaluation
def _spaced(text: str) -> str:
    """The text's tokens with a space before, between and behind them, so that containment is by whole tokens."""
    return f" {' '.join(_TOKEN.findall(unicodedata.normalize('NFC', text).lower()))} "
