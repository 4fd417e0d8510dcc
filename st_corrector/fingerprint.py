"""What an embedding depends on, as short strings that can be compared and shown.

Nothing here is cryptographic protection: a fingerprint tells two honest things apart.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer
from transformers import PretrainedConfig

# Where a configuration was loaded from and by what, and what a trainer sets: embeddings do not depend on it.
_NOT_ARCHITECTURE = ("_name_or_path", "transformers_version", "use_cache")


def digest(*parts: bytes | str) -> str:
    """32 hex digits over ``parts``; where one part ends and the next begins matters."""
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part.encode("utf-8") if isinstance(part, str) else part
        state.update(len(data).to_bytes(8, "little"))
        state.update(data)
    return state.hexdigest()


def digest_json(value: Any) -> str:
    return digest(json.dumps(value, sort_keys=True, default=str))


def weights_fingerprint(model: torch.nn.Module) -> str:
    """Digest of every parameter and buffer: name, dtype, shape and bytes."""
    state = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        state.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        state.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return state.hexdigest()


def tokenizer_fingerprint(model: SentenceTransformer, prompt: str | None = None) -> str:
    """Digest of what turns a document's text into token ids.

    It covers the vocabulary, rules and special tokens of every tokenizer in the model (a Router has several), and what
    ``preprocess`` makes of two texts, one of them longer than any maximum: lengths and sides of truncation that are
    set elsewhere show there.
    """
    described: list[Any] = []
    for module in model.modules():
        if module is not model:
            described.append(_tokenizer_rules(getattr(module, "tokenizer", None)))
    for text in ("Dense retrieval, 1st probe.", " ".join(map(str, range(20_000)))):
        features = model.preprocess([text], prompt=prompt, task="document")
        described.append({key: value.tolist() for key, value in features.items() if isinstance(value, torch.Tensor)})
    return digest_json(described)


def _tokenizer_rules(tokenizer: Any) -> Any:
    if isinstance(tokenizer, Tokenizer):
        return json.loads(tokenizer.to_str())
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if isinstance(backend, Tokenizer):
        # Padding and truncation are left out: each call sets them on the backend, so they say which came last.
        rules = {k: v for k, v in json.loads(backend.to_str()).items() if k not in ("padding", "truncation")}
        return {**rules, "truncation_side": getattr(tokenizer, "truncation_side", None)}
    vocabulary = getattr(tokenizer, "get_vocab", None)
    return [type(tokenizer).__name__, vocabulary() if callable(vocabulary) else None]


def max_lengths(model: SentenceTransformer) -> str:
    """The maximum sequence length in tokens; of a Router with several towers those of all, in their order."""
    lengths = [getattr(module, "max_seq_length", None) for module in model.modules() if module is not model]
    return " / ".join(dict.fromkeys(str(length) for length in lengths if length is not None)) or "None"


def modules_fingerprint(model: SentenceTransformer) -> str:
    """Digest of the pipeline's modules and their settings (architecture, pooling, normalisation …)."""
    described: list[Any] = []
    for module in model.modules():
        settings = getattr(module, "get_config_dict", None)
        if callable(settings) and module is not model:
            described.append([type(module).__qualname__, settings()])
        config = getattr(module, "config", None)
        if isinstance(config, PretrainedConfig):
            described.append({k: v for k, v in config.to_dict().items() if k not in _NOT_ARCHITECTURE})
    return digest_json(described)


def differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """One line for each component that differs, e.g. ``prompt: 'passage: ' there, '' here``."""
    return [
        f"{key}: {found.get(key)!r} there, {expected.get(key)!r} here"
        for key in sorted(set(found) | set(expected))
        if found.get(key) != expected.get(key)
    ]
