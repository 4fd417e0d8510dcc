"""What selecting negatives costs: the search against its own matrix products, the naive way, and FAISS.

    python benchmarks/selection.py --dataset data/nq                  # hours on two cores
    python benchmarks/selection.py --dataset data/nq --only base      # the one setting: 20 minutes
    python benchmarks/selection.py --dataset data/nq --device cuda    # on a GPU, 21 million rows too

Vectors are real: passages through the pretrained model, repeated with noise until there are enough. Each result is
compared with the naive way's before anything is timed. All ways of one setting are timed turn by turn in the same
process, and what is reported are medians of seconds and of the ratios within a turn. Memory is what the process (or the
GPU's allocator) had at most beyond what it had before the search.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import itertools
import json
import os
import platform
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from st_corrector import (
    Corpus,
    CorrectedSearch,
    EmbeddingCache,
    FaissIndex,
    IdentityCorrector,
    KernelRidgeCorrector,
    MLPCorrector,
    RidgeCorrector,
    Shortlist,
    ShortlistSearch,
)
from st_corrector.correctors import Corrector
from st_corrector.scoring import Scorer
from st_corrector.shard import Shard

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "recipes"))
from common import commit, default_model, static_encoder, versions  # noqa: E402

PASSAGES = 20_000
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
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.int8}


class Setting(NamedTuple):
    rows: int
    dim: int
    batch: int
    k: int
    corrector: str
    dtype: str = "float32"
    stored: str = "memory"  # or "disk", "disk, cold"
    written: float = 0.0  # the share of the rows that has been written back


BASE = Setting(1_000_000, 384, 64, 32, "identity")
GRID = {
    "base": [BASE._replace(corrector=name) for name in CORRECTORS],
    "dtypes": [
        BASE._replace(corrector=name, dtype=dtype)
        for dtype in ("bfloat16", "float16", "int8")
        for name in ("ridge, query side", "mlp-128")
    ],
    "shapes": [
        Setting(rows, dim, batch, k, name)
        for rows, dim in ((100_000, 384), (100_000, 768), (1_000_000, 384), (1_000_000, 768))
        for batch, k in ((32, 16), (32, 64), (128, 16), (128, 64))
        for name in ("ridge, query side", "ridge", "mlp-128", "mlp-512")
        if rows < 1_000_000 or name in ("ridge, query side", "mlp-128")
    ],
    "growth": [
        BASE._replace(rows=rows, corrector=name)
        for rows in (30_000, 100_000, 300_000)
        for name in ("ridge, query side", "ridge", "mlp-128", "mlp-512")
    ],
    # What a long run has written back.
    "written": [
        BASE._replace(corrector=name, written=share)
        for share in (0.01, 0.1, 0.5, 1.0)
        for name in ("ridge, query side", "mlp-128")
    ],
    "large": [
        Setting(10_000_000, 384, 64, 32, name, "int8", stored)
        for stored in ("disk, cold", "disk")
        for name in ("ridge, query side", "mlp-128")
    ],
    # One GPU: Wikipedia's passages.
    "gpu": [
        Setting(21_000_000, 768, 128, 64, name, "bfloat16") for name in ("identity", "ridge", "mlp-128", "mlp-512")
    ],
}


OTHERS = ("recall", "compile", "indices", "indices-10M")


# ---------------------------------------------------------------------- vectors


def passages(dataset: str, outputs: Path) -> tuple[Tensor, Tensor]:
    """Unit vectors of passages ``(n, 768)`` and of questions ``(q, 768)``, of which the first 384 are a pretrained
    transformer's and the others the mean of its token vectors.
    """
    from sentence_transformers import SentenceTransformer

    corpus = Corpus.from_beir(dataset, max_targets=PASSAGES)
    questions = corpus.qrels("dev").queries["text"][:]
    transformer = SentenceTransformer(default_model(), device="cpu")
    transformer.max_seq_length = 32
    halves = []
    for name, model in {"transformer": transformer, "static": static_encoder(default_model(), 0)}.items():
        cache = EmbeddingCache.build(model, corpus, outputs / f"passages-{name}")
        of_questions = model.encode_query(questions, convert_to_tensor=True, show_progress_bar=False).cpu().clone()
        halves.append((F.normalize(cache[range(len(cache))], dim=-1), F.normalize(of_questions, dim=-1)))
    return tuple(torch.cat(parts, dim=1) for parts in zip(*halves, strict=True))  # type: ignore[return-value]


def tiled(vectors: Tensor, rows: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """``rows`` unit vectors in blocks: ``vectors`` again and again, each time with other noise."""
    generator = torch.Generator().manual_seed(0)
    for start in range(0, rows, len(vectors)):
        block = vectors[: rows - start]
        noise = torch.randn(block.shape, generator=generator) * (0.3 / block.shape[1] ** 0.5)
        yield F.normalize(block + (noise if start else 0), dim=-1)


def trained(name: str, vectors: Tensor) -> Corrector:
    """A corrector that has learnt a drift: everything moves in a common direction, and is rotated a little."""
    dim = vectors.shape[1]
    corrector = CORRECTORS[name](dim)
    generator = torch.Generator().manual_seed(1)
    rotation = torch.linalg.qr(torch.eye(dim) + 0.05 * torch.randn(dim, dim, generator=generator))[0]
    rotation = rotation * rotation.diagonal().sign()
    for _ in range(10):
        stale = vectors[torch.randint(len(vectors), (512,), generator=generator)]
        fresh = F.normalize(stale @ rotation + 0.3 * vectors[:1], dim=-1)
        corrector.fit_step(stale, fresh, stale[:32], 20.0)
    return corrector


# ---------------------------------------------------------------------- measuring


def clock(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class CorrectedView:
    """A cache with what has been written back in its place, for the naive way."""

    def __init__(self, search: CorrectedSearch) -> None:
        self._vectors = search.stale(torch.arange(len(search.cache)))

    def __len__(self) -> int:
        return len(self._vectors)

    def chunks(self, size: int) -> Iterator[tuple[int, Shard]]:
        yield 0, Shard(self._vectors)


def timed_in_turns(
    ways: dict[str, Callable[[], Any]], turns: int, device: str, pause: float = 0.0
) -> dict[str, list[float]]:
    """Seconds of each way in each turn, after one turn to warm up; before each a pause of so many seconds."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(turns + 1):
        for name, way in ways.items():
            time.sleep(pause)
            start = clock(device)
            way()
            if turn:
                seconds[name].append(clock(device) - start)
    return seconds


@contextmanager
def peak_memory(device: str) -> Iterator[dict[str, int]]:
    """Bytes that the block has allocated at most beyond what there was before."""
    measured: dict[str, int] = {}
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield measured
        measured["bytes"] = torch.cuda.max_memory_allocated() - before
        return
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # or what was freed before would be used again unseen
    samples, done = [_anonymous()], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            samples.append(_anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    yield measured
    done.set()
    watcher.join()
    measured["bytes"] = max(samples) - samples[0]


def _anonymous() -> int:
    """Resident memory of this process that is no mapped file."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no RssAnon in /proc/self/status")


def forget_files(folder: Path) -> None:
    """Make the operating system drop its copies of the files, so that they are read from the disk again."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# ---------------------------------------------------------------------- ways


def products(cache: EmbeddingCache, corrector: Corrector, queries: Tensor, chunk: int) -> Callable[[], None]:
    """The matrix products of the form that the search uses, chunk by chunk, and nothing else: the floor."""
    device, dim = queries.device, cache.dim
    if corrector.leaves_corpus(unit=True):
        widths = [dim, len(queries)]
    elif isinstance(corrector, RidgeCorrector):
        widths = [dim, dim, len(queries)]
    elif isinstance(corrector, MLPCorrector) and corrector.normalize:
        widths = [dim, corrector.hidden, dim, len(queries)]
    elif isinstance(corrector, MLPCorrector):
        widths = [dim, corrector.hidden, len(queries)]
    else:
        widths = [dim, corrector.config["num_features"], dim, len(queries)]
    matrices = [torch.randn(a, b, device=device) for a, b in itertools.pairwise(widths)]
    extra = []
    if not corrector.normalize and not corrector.leaves_corpus(unit=True):
        extra = [torch.randn(dim, len(queries), device=device)]  # ⟨q, z⟩ beside ⟨W₂ᵀq, σ(W₁z)⟩
    if not isinstance(corrector, (IdentityCorrector, RidgeCorrector, MLPCorrector)):
        extra = [torch.randn(dim, dim, device=device)]  # z's own part of [z, φ(z)]W
    buffers = [torch.empty(chunk, m.shape[1], device=device) for m in (*matrices, *extra)]
    converted = torch.empty(chunk, dim, device=device).normal_()

    def run() -> None:
        for _, stored in cache.chunks(chunk):
            size = len(stored.values)
            # What is stored otherwise has to be converted first, which is no product: a resident chunk stands for it.
            z = stored.values if stored.values.dtype == torch.float32 else converted[:size]
            here = z
            for matrix, buffer in zip(matrices, buffers, strict=False):
                here = torch.mm(here, matrix, out=buffer[:size])
            for matrix, buffer in zip(extra, buffers[len(matrices) :], strict=True):
                torch.mm(z, matrix, out=buffer[:size])

    return run


def whole_product(cache: EmbeddingCache, queries: Tensor) -> Callable[[], None]:
    vectors = next(cache.chunks(len(cache)))[1].values

    def run() -> None:
        torch.mm(queries, vectors.T)

    return run


def naive(cache: EmbeddingCache, corrector: Corrector, queries: Tensor, k: int) -> Callable[[], Any]:
    """Correct everything, multiply, take the top k."""

    def run() -> Any:
        with torch.no_grad():
            vectors = next(cache.chunks(len(cache)))[1].float()
            return (queries @ corrector(vectors).T).topk(k)

    return run


def naive_in_chunks(cache: EmbeddingCache, corrector: Corrector, queries: Tensor, k: int) -> Callable[[], Any]:
    """The same where the whole does not fit: ``topk`` of each chunk, and of what these leave."""

    def run() -> Any:
        with torch.no_grad():
            scores, rows = [], []
            for first, chunk in cache.chunks(65_536):
                vectors = F.normalize(chunk.float().to(queries.device), dim=-1)
                best = (queries @ corrector(vectors).T).topk(min(k, len(vectors)))
                scores.append(best.values)
                rows.append(best.indices + first)
            top = torch.cat(scores, dim=1).topk(k)
            return top.values, torch.cat(rows, dim=1).gather(1, top.indices)

    return run


def faiss_flat(cache: EmbeddingCache, corrector: Corrector, queries: Tensor, k: int) -> Callable[[], Any]:
    """FAISS's exact index over corrected vectors; correcting them and handing them over is part of it."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    at_once = 65_536
    index = faiss.IndexFlatIP(cache.dim)
    if corrector.leaves_corpus(unit=True):  # its vectors never change: that much is done once
        for _, chunk in cache.chunks(at_once):
            index.add(chunk.float().numpy())
        probes = corrector.on_query_side(queries).probes.numpy()
        return lambda: index.search(probes, k)

    def run() -> Any:
        index.reset()
        with torch.no_grad():
            for _, chunk in cache.chunks(at_once):
                index.add(corrector(chunk.float()).numpy())
        return index.search(queries.numpy(), k)

    return run


def check(found: Any, expected: Any, tolerance: float) -> float:
    """The share of rows that agree; refuses scores that do not."""
    scores, rows = found[0].cpu(), found[1].cpu()
    values, indices = (torch.as_tensor(each).cpu() for each in expected)
    if (scores - values).abs().max() > tolerance:
        raise AssertionError(f"scores differ by {(scores - values).abs().max():.2g}")
    overlap = (rows[:, :, None] == indices[:, None, :]).any(-1).float().mean().item()
    if overlap < 0.995:  # equal scores, up to rounding, may go to either row
        raise AssertionError(f"only {overlap:.4f} of the rows agree")
    return overlap


# ---------------------------------------------------------------------- running


def measure(setting: Setting, cache: EmbeddingCache, vectors: Tensor, queries: Tensor, args: Any) -> dict[str, Any]:
    corrector = trained(setting.corrector, vectors)
    queries = queries[: setting.batch].to(args.device)
    corrector.to(args.device)
    search = CorrectedSearch(cache, corrector)
    in_memory = setting.stored == "memory" and setting.dtype == "float32" and args.device == "cpu"
    reference = (naive if in_memory else naive_in_chunks)(cache, corrector, queries, setting.k)
    if setting.written:
        rows = torch.randperm(setting.rows)[: int(setting.written * setting.rows)]
        for some in rows.split(65_536):
            search.overlay.write(some, F.normalize(cache[some] + 0.5 * vectors[:1], dim=-1))
        reference = naive(CorrectedView(search), corrector, queries, setting.k)
    agreement = check(search.search(queries, setting.k), reference(), 2e-4)
    with peak_memory(args.device) as memory:  # of a first search: later ones use its memory again
        CorrectedSearch(cache, corrector).search(queries, setting.k)

    ways: dict[str, Callable[[], Any]] = {"search": lambda: search.search(queries, setting.k)}
    # The fastest way found of computing the products counts.
    light = corrector.leaves_corpus(unit=True)
    for chunk in (
        (131_072, 524_288) if args.device == "cuda" else (2_048, 4_096, 16_384) if light else (1_024, 2_048, 8_192)
    ):
        ways[f"products, {chunk}"] = products(cache, corrector, queries, chunk)
    if in_memory and not setting.written and light:
        ways["products, whole"] = whole_product(cache, queries)
    others = {"search": ways["search"], "naive": reference}
    if in_memory and not setting.written:
        others["faiss"] = faiss_flat(cache, corrector, queries, setting.k)
    if setting.stored == "disk, cold":
        folder = args.outputs / f"vectors-{setting.rows}-{setting.dim}-{setting.dtype}"
        warm = ways["search"]

        def cold() -> None:
            forget_files(folder)
            warm()

        ways, others = {"search": cold}, {}
    turns = args.turns if setting.rows < 10_000_000 else 1
    # What takes tenths of a second is easily disturbed; and FAISS and torch have threads of their own, which for a
    # while wait for more work by spinning: so the others are timed apart, with pauses.
    seconds = timed_in_turns(ways, (5 if light else 2) * turns, args.device)
    against = timed_in_turns(others, turns, args.device, pause=0.0 if args.rows else 0.5)
    if "faiss" in others:
        found = others["faiss"]()
        offset = corrector.on_query_side(queries).offset if corrector.leaves_corpus(unit=True) else queries.new_zeros(1)
        scores = torch.as_tensor(found[0]) + (offset[:, None] if len(offset) > 1 else 0)
        check((scores, torch.as_tensor(found[1])), reference(), 2e-4)
    floors = {name: statistics.median(each) for name, each in seconds.items() if name.startswith("products")}
    floor = min(floors, key=floors.get) if floors else None  # type: ignore[arg-type]
    result: dict[str, Any] = {
        **setting._asdict(),
        "rows_that_agree": agreement,
        "seconds": {name: statistics.median(each) for name, each in {**against, **seconds}.items()},
        "all_seconds": {"floors": seconds, "others": against},
        "floor": floor,
        "ratio_to_floor": ratio(seconds, "search", floor),
        "ratio_of_best_to_floor": min(seconds["search"]) / min(seconds[floor]) if floor else None,
        "ratio_to_naive": ratio(against, "search", "naive"),
        "ratio_to_faiss": ratio(against, "search", "faiss"),
        "extra_bytes": memory["bytes"],
        "planned_bytes": sum(search.memory(setting.batch, setting.k, args.device).values()),
        "cache_bytes": cache.nbytes,
        **commit(),
    }
    return result


def ratio(seconds: dict[str, list[float]], way: str, other: str | None) -> float | None:
    """The median over turns of one way's time over the other's."""
    if other not in seconds:
        return None
    return statistics.median(a / b for a, b in zip(seconds[way], seconds[other], strict=True))


def engines(rows: int) -> Iterator[tuple[str, str, str, int | None, int | None]]:
    """What is tried at a size: index, its parameters, corrector, candidates that are rescored, steps between copies."""
    lists, rescored = f"IVF{round(4 * rows**0.5)}", 4 * BASE.k
    if rows >= 10_000_000:  # vectors in 8 bits, as the cache's: in float32 they would not fit into memory beside it
        for probes in (4, 16, 64):
            yield f"{lists},SQ8", f"nprobe={probes}", "ridge, query side", rescored, None
        yield f"{lists},SQ8", "nprobe=64", "mlp-128", None, None
        return
    for probes in (8, 16, 32, 64):
        yield f"{lists},Flat", f"nprobe={probes}", "ridge, query side", None, None
    yield f"{lists},PQ48", "nprobe=32", "ridge, query side", rescored, None
    yield f"{lists},Flat", "nprobe=32", "mlp-128", None, None
    yield "exact", "", "mlp-128", None, 1_000_000
    yield "exact", "", "mlp-128", None, None


def indices(cache: EmbeddingCache, vectors: Tensor, queries: Tensor, args: Any) -> list[dict[str, Any]]:
    """Approximate engines against the exact one, at the base setting: recall and speed."""
    results = []
    for factory, parameters, corrector_name, size, every in engines(len(cache)):
        corrector = trained(corrector_name, vectors)
        index: str | FaissIndex = factory
        slug = f"index-{len(cache)}-{factory.replace(',', '-')}"
        start = time.perf_counter()
        if factory != "exact":
            index = FaissIndex.build(cache, factory, args.outputs / slug, parameters=parameters)
        built = time.perf_counter() - start
        settings = Shortlist(index, size=size, every=every, check_every=10**9, min_recall=0)
        approximate, exact = ShortlistSearch(cache, corrector, settings), CorrectedSearch(cache, corrector)
        found = approximate.search(queries[: BASE.batch], BASE.k)
        expected = exact.search(queries[: BASE.batch], BASE.k)
        recall = (expected.rows[:, :, None] == found.rows[:, None, :]).any(-1).float().mean().item()
        ways = {
            "approximate": lambda approximate=approximate: approximate.search(queries[: BASE.batch], BASE.k),
            "exact": lambda exact=exact: exact.search(queries[: BASE.batch], BASE.k),
        }
        seconds = timed_in_turns(ways, args.turns if len(cache) < 10_000_000 else 1, args.device)
        results.append(
            {
                "engine": " ".join([factory, parameters]).strip(),
                "searched": "stale vectors" if every is None else "a copy corrected at this step",
                "rescored": size or (BASE.k if exact.corrects_queries else 8 * BASE.k),
                "corrector": corrector_name,
                "rows": len(cache),
                "recall_at_k": recall,
                "seconds": {way: statistics.median(each) for way, each in seconds.items()},
                "times_faster_than_exact": ratio(seconds, "exact", "approximate"),
                "seconds_to_build_or_load": built,
                "bytes_of_index": size_of(args.outputs / slug) if factory != "exact" else 0,
            }
        )
        print(json.dumps(results[-1]), flush=True)
    return results


def compiled(cache: EmbeddingCache, vectors: Tensor, queries: Tensor, args: Any) -> dict[str, Any]:
    """The scores of an MLP corrector, block by block, as the search computes them and through ``torch.compile``."""
    corrector = trained("mlp-128", vectors)
    queries = queries[: BASE.batch].to(args.device)
    corrector.to(args.device)
    scorer, probes = Scorer(corrector, queries, corrects_queries=False), queries.T.contiguous()
    block = 1_024 if args.device == "cpu" else 131_072
    out = torch.empty(block, len(queries), device=args.device)
    blocks = [chunk.float() for _, chunk in cache.chunks(block) if len(chunk.values) == block]

    @torch.compile(dynamic=False)
    def compiled_scores(stale: Tensor) -> Tensor:
        corrected = corrector.unnormalized(stale)
        return (corrected @ probes) / torch.linalg.vector_norm(corrected, dim=-1, keepdim=True).clamp_min(1e-12)

    def through(score: Callable[[Tensor], Any]) -> Callable[[], None]:
        def run() -> None:
            with torch.no_grad():
                for each in blocks:
                    score(each)

        return run

    with torch.no_grad():
        start = time.perf_counter()
        torch.testing.assert_close(compiled_scores(blocks[0]), scorer.of(blocks[0]), atol=1e-4, rtol=1e-4)
        seconds_to_compile = time.perf_counter() - start
    ways = {"eager": through(lambda each: scorer.score(each, None, out)), "compiled": through(compiled_scores)}
    seconds = timed_in_turns(ways, args.turns, args.device)
    return {
        "corrector": "mlp-128",
        "rows": len(blocks) * block,
        "seconds": {way: statistics.median(each) for way, each in seconds.items()},
        "compiled_over_eager": ratio(seconds, "compiled", "eager"),
        "seconds_to_compile": seconds_to_compile,
    }


def recall_of_dtypes(cache: EmbeddingCache, queries: Tensor) -> dict[str, float]:
    """The share of the float32 cache's top k that each smaller dtype finds."""
    corrector = IdentityCorrector(cache.dim)
    expected = CorrectedSearch(cache, corrector).search(queries, BASE.k).rows
    recalls = {}
    for name in ("bfloat16", "float16", "int8"):
        found = CorrectedSearch(cache.to(dtype=DTYPES[name]), corrector).search(queries, BASE.k).rows
        recalls[name] = (expected[:, :, None] == found[:, None, :]).any(-1).float().mean().item()
    return recalls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="a BEIR folder")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--only", nargs="+", choices=(*GRID, *OTHERS))
    parser.add_argument("--rows", type=int, help="so many rows instead of the grid's: to try it out")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--results", type=Path, help="by default benchmarks/results/selection/<device>.json")
    parser.add_argument("--outputs", type=Path, default=ROOT / "outputs" / "selection")
    args = parser.parse_args()
    parts = args.only or ([name for name in (*GRID, *OTHERS) if name != "gpu"])
    if args.device == "cuda" and not args.only:
        parts = ["base", "dtypes", "growth", "compile", "gpu"]
    path = args.results or ROOT / "benchmarks" / "results" / "selection" / f"{args.device}.json"
    done = json.loads(path.read_text()) if path.exists() else {"settings": {}}
    vectors, questions = passages(args.dataset, args.outputs)
    done["machine"] = machine(args.device)
    done["command"] = " ".join(["python", *sys.argv])

    def keep() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(done, indent=1))

    settings = [setting for part in parts for setting in GRID.get(part, [])]
    settings = list(dict.fromkeys(s._replace(rows=args.rows or s.rows) for s in settings))
    made: tuple[Any, EmbeddingCache] | None = None
    for setting in settings:
        key = ", ".join(map(str, setting))
        if key in done["settings"]:
            continue
        kind = (setting.rows, setting.dim, setting.dtype, setting.stored)
        some = F.normalize(vectors[:, : setting.dim], dim=-1)
        if made is None or made[0] != kind:
            made = None
            gc.collect()
            made = (kind, make_cache(setting, some, args))
        result = measure(setting, made[1], some, F.normalize(questions[:, : setting.dim], dim=-1), args)
        done["settings"][key] = result
        print(
            key,
            {name: round(value, 4) for name, value in result["seconds"].items()},
            *(
                f"{name} {result[name]:.3f}"
                for name in ("ratio_to_floor", "ratio_to_naive", "ratio_to_faiss")
                if result[name]
            ),
            f"extra {result['extra_bytes'] / 1e6:.0f} MB",
            flush=True,
        )
        keep()
    made = None
    some, queries = (F.normalize(each[:, : BASE.dim], dim=-1) for each in (vectors, questions))
    for part in OTHERS:
        if part not in parts or part in done:
            continue
        setting = BASE._replace(rows=args.rows or BASE.rows)
        if part == "indices-10M":
            setting = BASE._replace(rows=10_000_000, dtype="int8", stored="disk")
        cache = make_cache(setting, some, args)
        if part == "recall":
            done[part] = recall_of_dtypes(cache, queries[:256])
        else:
            done[part] = (compiled if part == "compile" else indices)(cache, some, queries, args)
        print(part, done[part], flush=True)
        keep()


def make_cache(setting: Setting, vectors: Tensor, args: Any) -> EmbeddingCache:
    dtype = DTYPES[setting.dtype]
    folder = args.outputs / f"vectors-{setting.rows}-{setting.dim}-{setting.dtype}"
    if setting.stored != "memory":
        if not (folder / "manifest.json").exists():
            EmbeddingCache.from_blocks(tiled(vectors, setting.rows, dtype), dtype).save(folder)
        return EmbeddingCache.load(folder)
    return EmbeddingCache.from_blocks(tiled(vectors, setting.rows, dtype), dtype).to(args.device)


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def machine(device: str) -> dict[str, Any]:
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    gpu = {"gpu": torch.cuda.get_device_name()} if device == "cuda" else {}
    return {
        "cpu": model,
        "threads": torch.get_num_threads(),
        **gpu,
        "versions": versions(),
    }


if __name__ == "__main__":
    main()
