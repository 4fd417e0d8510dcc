"""What selection is measured on: real passages' vectors, repeated with noise, and correctors trained on a drift."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from st_corrector import (
    Corpus,
    EmbeddingCache,
    IdentityCorrector,
    KernelRidgeCorrector,
    MLPCorrector,
    RidgeCorrector,
)
from st_corrector.correctors import Corrector

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "recipes"))
from common import default_model, static_encoder  # noqa: E402

PASSAGES, QUESTIONS = 20_000, 256
CORRECTORS: dict[str, Callable[[int], Corrector]] = {
    "identity": lambda d: IdentityCorrector(d),
    "ridge, query side": lambda d: RidgeCorrector(d, normalize=False),
    "ridge": lambda d: RidgeCorrector(d),
    "mlp-128": lambda d: MLPCorrector(d, hidden=128),
    "mlp-512": lambda d: MLPCorrector(d, hidden=512),
    "mlp-128, unnormalised": lambda d: MLPCorrector(d, hidden=128, normalize=False),
    "mlp-512, unnormalised": lambda d: MLPCorrector(d, hidden=512, normalize=False),
    "kernel-ridge": lambda d: KernelRidgeCorrector(d),
}


def passages(dataset: str, outputs: Path, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Unit vectors of passages ``(n, 768)`` and of questions ``(q, 768)``, of which the first 384 are a pretrained
    transformer's and the others the mean of its token vectors; encoded on ``device``, returned on the CPU.
    """
    from sentence_transformers import SentenceTransformer

    corpus = Corpus.from_beir(dataset, max_targets=PASSAGES)
    questions = corpus.qrels("dev").queries["text"][:QUESTIONS]
    transformer = SentenceTransformer(default_model(), device=device)
    transformer.max_seq_length = 32
    halves = []
    for name, model in {"transformer": transformer, "static": static_encoder(default_model(), 0)}.items():
        cache = EmbeddingCache.build(model, corpus, outputs / f"passages-{name}")
        of_questions = model.encode_query(questions, convert_to_tensor=True, show_progress_bar=False).cpu().clone()
        halves.append((F.normalize(cache[range(len(cache))], dim=-1), F.normalize(of_questions, dim=-1)))
    return tuple(torch.cat(parts, dim=1) for parts in zip(*halves, strict=True))  # type: ignore[return-value]


def tiled(vectors: Tensor, rows: int, device: str | torch.device = "cpu") -> Iterator[Tensor]:
    """``rows`` unit vectors in blocks on ``device``: ``vectors`` again and again, each time with other noise.

    The noise is long enough (0.3, of unit vectors) that copies of one vector, rounded to bfloat16 or int8, score
    differently.
    """
    vectors = vectors.to(device)
    generator = torch.Generator(device).manual_seed(0)
    for start in range(0, rows, len(vectors)):
        block = vectors[: rows - start]
        noise = torch.randn(block.shape, generator=generator, device=device) * (0.3 / block.shape[1] ** 0.5)
        yield F.normalize(block + (noise if start else 0), dim=-1)


def trained(name: str, vectors: Tensor) -> Corrector:
    """A corrector that has learnt a drift: everything moves in a common direction, and is rotated a little."""
    dim = vectors.shape[1]
    corrector = CORRECTORS[name](dim).to(vectors.device)
    generator = torch.Generator().manual_seed(1)
    rotation = torch.linalg.qr(torch.eye(dim) + 0.05 * torch.randn(dim, dim, generator=generator))[0]
    rotation = (rotation * rotation.diagonal().sign()).to(vectors.device)
    for _ in range(10):
        stale = vectors[torch.randint(len(vectors), (512,), generator=generator).to(vectors.device)]
        fresh = F.normalize(stale @ rotation + 0.3 * vectors[:1], dim=-1)
        corrector.fit_step(stale, fresh, stale[:32], 20.0)
    return corrector
