"""Encoders of every kind that people bring, at small size and by name: what concerns a model is tried on all of them.

All share one vocabulary. None drops anything out, so that what a model says of a text is the same in training.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from conftest import WORDS, make_static_model, router_of, word_tokenizer
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize, Router, Transformer
from sentence_transformers.sentence_transformer.modules import BoW, Pooling, WordEmbeddings
from sentence_transformers.sentence_transformer.modules.tokenizer import WhitespaceTokenizer
from tokenizers import processors
from torch import nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModel,
    BertConfig,
    DataCollatorWithFlattening,
    Gemma3TextConfig,
    ModernBertConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    RobertaConfig,
    T5Config,
    T5EncoderModel,
)

WIDTH = 32
CHECKPOINTS = len(inspect.signature(SentenceTransformer.gradient_checkpointing_enable).parameters) > 2
"""Whether this sentence-transformers has gradient checkpointing as this transformers asks for it."""


class Encoder(NamedTuple):
    """How an encoder is made, and what it can do.

    Args:
        make: makes it anew, with the same weights, from what it keeps in a folder.
        is_saved: whether it can be saved and loaded.
        is_static: whether its texts cannot be cut into mini-batches.
    """

    make: Callable[[Path], SentenceTransformer]
    is_saved: bool = True
    is_static: bool = False


def transformer(folder: Path, kind: str = "bert", padding_side: str = "right", **options: Any) -> Transformer:
    """A transformer of two layers."""
    torch.manual_seed(0)
    tokenizer = word_tokenizer()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    if kind == "qwen3":  # as embedders are made of decoders: what ends a text is what is pooled
        tokenizer.post_processor = processors.TemplateProcessing(single="$A [SEP]", special_tokens=[("[SEP]", 3)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=24, padding_side=padding_side, eos_token="[SEP]", **special
    )
    size = {"vocab_size": len(fast), "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2}
    longest = {"intermediate_size": 48, "max_position_embeddings": 64}
    config = {
        "bert": lambda: BertConfig(**size, **longest),
        "roberta": lambda: RobertaConfig(**size, **longest, pad_token_id=0),
        "modernbert": lambda: ModernBertConfig(**size, **longest, pad_token_id=0, cls_token_id=2, sep_token_id=3),
        # Its end-of-text token is another than the tokenizer's, as Qwen3-Embedding has it: trainers align the two.
        "qwen3": lambda: Qwen3Config(**size, **longest, num_key_value_heads=1, head_dim=16, eos_token_id=2),
        # As EmbeddingGemma: every token sees all others, some layers only those near it.
        "gemma3": lambda: Gemma3TextConfig(
            **size,
            **longest,
            **{"num_key_value_heads": 1, "head_dim": 16, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3},
            **{"use_bidirectional_attention": True, "sliding_window": 8, "query_pre_attn_scalar": 16},
        ),
        "t5": lambda: T5Config(
            vocab_size=len(fast),
            d_model=WIDTH,
            d_kv=16,
            d_ff=48,
            num_layers=2,
            num_heads=2,
            pad_token_id=0,
            dropout_rate=0,
        ),
    }[kind]()
    path = folder / f"{kind}-{padding_side}"
    model = T5EncoderModel(config) if kind == "t5" else AutoModel.from_config(config)
    model.save_pretrained(path)
    fast.save_pretrained(path)
    return Transformer(str(path), **options)


def of(*modules: nn.Module, **options: Any) -> SentenceTransformer:
    """A model of these modules that drops nothing out."""
    model = SentenceTransformer(modules=list(modules), device="cpu", **options)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def dense(seed: int, width: int = WIDTH, out: int | None = None) -> Dense:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out or width, width, generator=generator) * width**-0.5
    return Dense(width, out or width, init_weight=weight, init_bias=torch.zeros(out or width))


def varlen(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention within each of the texts that lie one after the other, as FlashAttention's varlen functions have it:
    ``(1, heads, tokens, d) → (1, tokens, heads, d)``.
    """
    assert attention_mask is None and cu_seq_lens_q is not None and len(query) == 1
    ends = cu_seq_lens_q.tolist()
    of_texts = [
        torch.nn.functional.scaled_dot_product_attention(
            *(each[:, :, start:end] for each in (query, key, value)),
            is_causal=bool(getattr(module, "is_causal", False)),
            scale=scaling,
            enable_gqa=key.shape[1] != query.shape[1],
        )
        for start, end in pairwise(ends)
    ]
    return torch.cat(of_texts, dim=2).transpose(1, 2), None


def flattening(module: Transformer) -> Transformer:
    """The same, reading texts one after the other without padding, as on a GPU with FlashAttention."""
    AttentionInterface.register("varlen", varlen)
    AttentionMaskInterface.register("varlen", lambda *args, **kwargs: None)
    module.model.config._attn_implementation = "varlen"
    module.data_collator = DataCollatorWithFlattening(
        return_seq_idx=True, return_flash_attn_kwargs=True, return_position_ids=True
    )
    if module.model_forward_params is not None:
        module.model_forward_params |= {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}
    module._flatten_position_offset = module._infer_flatten_position_offset()
    module.can_flatten_inputs = True
    return module


def heads(**options: Any) -> Router:
    """One dense layer for queries, another for documents."""
    return Router({"query": [dense(1)], "document": [dense(2)]}, **options)


def _bert(folder: Path, *last: nn.Module, pooling: str = "mean", **options: Any) -> SentenceTransformer:
    return of(transformer(folder), Pooling(WIDTH, pooling), *last, **options)


def _decoder(folder: Path) -> SentenceTransformer:
    return of(
        transformer(folder, "qwen3", "left"),
        Pooling(WIDTH, "lasttoken"),
        Normalize(),
        prompts={"query": "query : ", "document": "passage : "},
    )


def _gemma(folder: Path) -> SentenceTransformer:
    """Mean pooling, two dense layers without activation, and long prompts, as EmbeddingGemma has them."""
    prompts = {"query": "query : passage : ", "document": "passage : query : "}
    return of(
        transformer(folder, "gemma3"),
        Pooling(WIDTH),
        dense(0, WIDTH, 48),
        dense(1, 48, WIDTH),
        Normalize(),
        prompts=prompts,
    )


def _prompts_left_out(folder: Path) -> SentenceTransformer:
    pooling = Pooling(WIDTH, "mean", include_prompt=False)
    return of(transformer(folder), pooling, Normalize(), prompts={"query": "query : ", "document": "passage : "})


def _in_a_route(folder: Path) -> SentenceTransformer:
    """Inside of either side's route another Router, whose first route is the other side's."""
    inner = [Router({"query": [dense(n)], "document": [dense(n + 1)]}) for n in (1, 3)]
    query, document = (list(make_static_model(seed, WIDTH))[:-1] for seed in (0, 1))
    return of(Router({"query": [*query, inner[0]], "document": [*document, inner[1]]}), Normalize())


def _two_tokenizers(folder: Path) -> SentenceTransformer:
    """A static encoder for queries, a transformer for documents."""
    return router_of(make_static_model(0, WIDTH), _bert(folder, Normalize()))


def _named_otherwise(folder: Path) -> SentenceTransformer:
    question, passage = (list(make_static_model(seed)) for seed in (0, 1))
    mappings = {("query", None): "question", ("document", None): "passage"}
    return of(Router({"question": question, "passage": passage}, route_mappings=mappings))


def _bag_of_words(folder: Path) -> SentenceTransformer:
    return of(BoW(vocab=WORDS, unknown_word_weight=1), dense(0, len(WORDS), 16), Normalize())


def _word_embeddings(folder: Path) -> SentenceTransformer:
    tokenizer = WhitespaceTokenizer(WORDS, stop_words=[], do_lower_case=False)
    vectors = np.random.default_rng(0).standard_normal((len(WORDS), 16)).astype(np.float32)
    return of(WordEmbeddings(tokenizer, vectors, update_embeddings=True), Pooling(16), Normalize())


class OwnModule(nn.Module):
    """A module of the user's own, which prepares texts by itself; ``kind`` is what it has beside the token ids."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        special = {"pad_token": "[PAD]", "unk_token": "[UNK]"}
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=word_tokenizer(), model_max_length=24, **special)
        self.kind = kind
        self.embedding = nn.Embedding(len(self.tokenizer), 16)
        self.gain = nn.Embedding(64, 16)

    def tokenize(self, texts: list[str], **kwargs: Any) -> dict[str, Any]:
        features = dict(self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt"))
        words = torch.tensor([len(text.split()) for text in texts])
        ids, mask = features["input_ids"], features["attention_mask"]
        if self.kind == "a number for each text":
            features["words"] = words
        if self.kind == "a list for each text":
            features["words"] = words.tolist()
        if self.kind == "weights of tokens":
            features["weights"] = mask * (0.5 + (ids % 7) / 10)
        if self.kind == "a float for each token":
            features["weights"] = mask.double()
        if self.kind == "a mask of booleans":
            features["attention_mask"] = mask.bool()
        if self.kind == "a number for the batch":
            features["longest"] = int(words.max())
        return features

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        weights = features.get("weights", features["attention_mask"]).float()
        embeddings = (self.embedding(features["input_ids"]) * weights[..., None]).sum(1)
        embeddings = embeddings / weights.sum(1, keepdim=True).clamp(min=1e-6)
        if "words" in features:
            embeddings = embeddings * (1 + self.gain(torch.as_tensor(features["words"])))
        return {**features, "sentence_embedding": embeddings}

    def get_sentence_embedding_dimension(self) -> int:
        return 16

    def get_config_dict(self) -> dict[str, Any]:
        return {"kind": self.kind}

    def save(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError


class ByTask(OwnModule):
    """One that is told the task as an argument, and has a gain for each."""

    forward_kwargs = {"task"}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__("the task")

    def forward(self, features: dict[str, Any], task: str | None = None, **kwargs: Any) -> dict[str, Any]:
        features = super().forward(features)
        side = ["query", "document", None].index(task)
        embeddings = features["sentence_embedding"] * (1 + self.gain.weight[side])
        return {**features, "sentence_embedding": embeddings}


OWN = ("nothing", "a number for each text", "a list for each text", "weights of tokens", "a float for each token")
OWN += ("a mask of booleans", "a number for the batch")

ENCODERS: dict[str, Encoder] = {
    "static": Encoder(lambda folder: make_static_model(), is_static=True),
    "BERT": Encoder(lambda folder: _bert(folder, Normalize())),
    "BERT, by dot product": Encoder(lambda folder: _bert(folder, pooling="cls", similarity_fn_name="dot")),
    "RoBERTa": Encoder(lambda folder: of(transformer(folder, "roberta"), Pooling(WIDTH), Normalize())),
    "ModernBERT": Encoder(lambda folder: of(transformer(folder, "modernbert"), Pooling(WIDTH), Normalize())),
    "T5's encoder": Encoder(lambda folder: of(transformer(folder, "t5"), Pooling(WIDTH), Normalize())),
    "a decoder, last token": Encoder(_decoder),
    "Gemma": Encoder(_gemma),
    "a decoder, flattened": Encoder(
        lambda folder: of(
            flattening(transformer(folder, "qwen3", "left")),
            Pooling(WIDTH, "lasttoken"),
            Normalize(),
            prompts={"query": "query : ", "document": "passage : "},
        ),
        is_saved=False,
    ),
    **{
        f"{name}, flattened": Encoder(
            lambda folder, kind=kind: of(flattening(transformer(folder, kind)), Pooling(WIDTH), Normalize()),
            is_saved=False,
        )
        for name, kind in (("RoBERTa", "roberta"), ("ModernBERT", "modernbert"))
    },
    "prompts left out of pooling": Encoder(_prompts_left_out),
    "two dense layers": Encoder(lambda folder: _bert(folder, dense(0, WIDTH, 48), dense(1, 48, WIDTH), Normalize())),
    "two towers": Encoder(lambda folder: router_of(make_static_model(0), make_static_model(1)), is_static=True),
    "two towers, two tokenizers": Encoder(_two_tokenizers, is_static=True),
    "routes named otherwise": Encoder(_named_otherwise, is_static=True),
    "two heads": Encoder(lambda folder: _bert(folder, heads(), Normalize())),
    "two heads, documents' by default": Encoder(
        lambda folder: _bert(folder, heads(default_route="document"), Normalize())
    ),
    "two heads, queries' by default": Encoder(lambda folder: _bert(folder, heads(default_route="query"), Normalize())),
    "two heads, none by default": Encoder(lambda folder: _bert(folder, heads(allow_empty_key=False), Normalize())),
    "two heads at the end": Encoder(lambda folder: _bert(folder, Normalize(), heads())),
    "a router in each route": Encoder(_in_a_route, is_static=True),
    "bag of words": Encoder(_bag_of_words),
    "word embeddings": Encoder(_word_embeddings),
    **{
        f"own module, {kind}": Encoder(lambda folder, kind=kind: of(OwnModule(kind), Normalize()), is_saved=False)
        for kind in OWN
    },
    "own module, the task": Encoder(lambda folder: of(ByTask(), Normalize()), is_saved=False),
}
"""By name. What is not among them: CNNs, which see how wide a batch is padded, and LSTMs, which sentence-transformers
itself does not give their lengths any more.
"""


def moved() -> SentenceTransformer:
    """The first model after something like training: its dense block is another, its token vectors nearly the same."""
    model = make_static_model()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            change = torch.randn(parameter.shape, generator=generator)
            parameter += change * (0.1 if "embedding" in name else 0.3)
    return model
