"""What an embedding depends on in its model, as short strings and plain values to compare and show."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer
from torch import nn
from transformers import PretrainedConfig

from ..errors import InputError
from ..storage.fingerprint import digest_json
from .routing import DOCUMENT

# Entries of a transformer's configuration in addition to its architecture. Embeddings do not depend on them: where, by
# what and in which precision it was loaded; settings of a trainer or a task head; dropout.
_NOT_ARCHITECTURE = re.compile(
    r"_name_or_path|transformers_version|architectures|(torch_)?dtype|_?attn_implementation(_\w+)?|use_cache|"
    r"gradient_checkpointing|return_dict|output_(hidden_states|attentions)|id2label|label2id|problem_type|"
    r"initializer_\w+|\w*(dropout|layerdrop)\w*|"
    # Token ids, which a trainer aligns with the tokenizer's: their effect is in the encoder's inputs.
    r"\w+_token_id"
)
LONGEST = 20_000
"""Words of a text longer than any encoder's maximum."""


def weights_fingerprint(modules: Sequence[nn.Module]) -> str:
    """Digest of every parameter and buffer of ``modules``: name, dtype, shape and bytes."""
    state = hashlib.blake2b(digest_size=16)
    for name, tensor in _tensors(modules):
        state.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        state.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return state.hexdigest()


def _tensors(modules: Sequence[nn.Module]) -> Iterator[tuple[str, torch.Tensor]]:
    for number, module in enumerate(modules):
        for name, value in sorted(module.state_dict().items()):
            if isinstance(value, torch.Tensor):
                yield f"{number}.{name}", value
            # A quantized module packs its weights; no checkpoint of its model holds them in that form.
            elif not isinstance(value, torch.dtype):
                raise InputError(
                    f"{type(module).__name__} holds {name} as a {type(value).__name__}: a quantized model cannot be "
                    "trained, nor can its embeddings be identified. Build the cache and train with the unquantized "
                    "model; EmbeddingCache.build(…, dtype='int8') makes a small cache."
                )


def tokenizer_fingerprint(
    model: SentenceTransformer, modules: Sequence[nn.Module], prompt: str | None = None, task: str = DOCUMENT
) -> str:
    """Digest of the conversion from a text to token ids.

    It covers vocabulary, rules and special tokens of every tokenizer in ``modules``, and the output of ``preprocess``
    for two texts, one longer than any maximum: this shows lengths and sides of truncation that are set elsewhere.
    """
    described: list[Any] = []
    for module in modules:
        if (tokenizer := getattr(module, "tokenizer", None)) is not None:
            described.append(_tokenizer_rules(tokenizer))
    for text in ("Dense retrieval, 1st probe.", " ".join(map(str, range(LONGEST)))):
        features = model.preprocess([text], prompt=prompt, task=task)
        described.append({key: value.tolist() for key, value in features.items() if isinstance(value, torch.Tensor)})
    return digest_json(described)


def _tokenizer_rules(tokenizer: Any) -> Any:
    if isinstance(tokenizer, Tokenizer):
        return json.loads(tokenizer.to_str())
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if isinstance(backend, Tokenizer):
        # Padding and truncation are excluded: each call sets them on the backend, so they only show the last call.
        rules = {k: v for k, v in json.loads(backend.to_str()).items() if k not in ("padding", "truncation")}
        return {**rules, "truncation_side": getattr(tokenizer, "truncation_side", None)}
    vocabulary = getattr(tokenizer, "get_vocab", None)
    return [type(tokenizer).__name__, vocabulary() if callable(vocabulary) else None]


def max_lengths(modules: Sequence[nn.Module]) -> str:
    """The maximum sequence length in tokens; if several modules have one, all of them in order."""
    lengths = [getattr(module, "max_seq_length", None) for module in modules]
    return " / ".join(dict.fromkeys(str(length) for length in lengths if length is not None)) or "None"


def described_modules(modules: Sequence[nn.Module]) -> dict[str, dict[str, Any]]:
    """Modules and their settings (architecture, pooling, normalisation …), by position and name; plain JSON values."""
    return {f"{number} {type(module).__qualname__}": _settings(module) for number, module in enumerate(modules)}


def _settings(module: nn.Module) -> dict[str, Any]:
    get_settings = getattr(module, "get_config_dict", None)
    settings = dict(get_settings()) if callable(get_settings) else {}
    config = getattr(module, "config", None)
    if isinstance(config, PretrainedConfig):
        settings["config"] = _architecture(config.to_dict())
        # RoBERTa and similar models count positions from the padding token's id.
        if starts := {each.padding_idx for each in module.modules() if _counts_from_padding(each)}:
            settings["positions_from"] = sorted(starts)
    plain: dict[str, Any] = json.loads(json.dumps(settings, default=str))
    return plain


def _architecture(config: Mapping[Any, Any]) -> dict[str, Any]:
    return {
        str(key): _architecture(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if not _NOT_ARCHITECTURE.fullmatch(str(key))
    }


def _counts_from_padding(module: nn.Module) -> bool:
    return isinstance(getattr(module, "padding_idx", None), int) and hasattr(module, "position_embeddings")
