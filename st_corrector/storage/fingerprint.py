"""Short strings that distinguish two things, and the difference between two descriptions in words.

This is no cryptographic protection: a fingerprint distinguishes two honest things.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

_DIGEST = re.compile("[0-9a-f]{32}")


def digest(*parts: bytes | str) -> str:
    """32 hex digits over ``parts``, whose boundaries matter."""
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part.encode("utf-8") if isinstance(part, str) else part
        state.update(len(data).to_bytes(8, "little"))
        state.update(data)
    return state.hexdigest()


def digest_json(value: Any) -> str:
    return digest(json.dumps(value, sort_keys=True, default=str))


def differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """One line for each component that differs, e.g. ``prompt: 'passage: ' there, '' here``; for digests only that they
    differ.

    Args:
        found, expected: by component; nested values are compared part by part.
    """
    if isinstance(found.get("modules"), str) and isinstance(expected.get("modules"), Mapping):
        return ["version: described by an earlier version of st_corrector, in a way that cannot be compared any more"]
    lines = []
    for key in sorted(found.keys() | expected.keys()):
        there, here = found.get(key), expected.get(key)
        if key not in expected or key not in found:
            lines.append(f"{key}: {'there, and not here' if key in found else 'here, and not there'}")
        elif isinstance(there, Mapping) and isinstance(here, Mapping):
            lines += [f"{key}, {line}" for line in differences(there, here)]
        elif there != here:
            lines.append(_difference(key, there, here))
    return lines


def _difference(key: str, there: Any, here: Any) -> str:
    if all(isinstance(value, str) and _DIGEST.fullmatch(value) for value in (there, here)):
        return f"{key}: {_IN_WORDS.get(key, 'not the same')}"
    return f"{key}: {there!r} there, {here!r} here"


# What digests stand for, since they are unreadable.
_IN_WORDS = {
    "corpus": "other texts, or the same in another order",
    "tokenizer": "another vocabulary, other special tokens or rules, or another truncation",
    "weights": "other weights, or the same in another precision",
}
