"""What selecting negatives costs: the search against its own matrix products, the naive way, and FAISS.

    python benchmarks/selection.py --dataset data/nq                  # hours on two cores
    python benchmarks/selection.py --dataset data/nq --only base      # the one setting: 20 minutes
    python benchmarks/selection.py --dataset data/nq --device cuda    # on a GPU of 80 GB, 21 million rows: 7 minutes

Vectors are real: passages through the pretrained model, repeated with noise until there are enough. Each result is
compared with the naive way's before anything is timed, and on a GPU with float64. All ways of one setting are timed
turn by turn in the same process, and what is reported are medians of seconds and of the ratios within a turn. Memory is
what the process (or the GPU's allocator) had at most beyond what it had before the search. What is measured is written
at once, and not measured again.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import platform
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from selection_vectors import CORRECTORS, ROOT, passages, tiled, trained
from selection_ways import (
    CorrectedView,
    Products,
    Way,
    check,
    check_in_float64,
    copying,
    faiss_flat,
    fastest,
    forget_files,
    naive,
    naive_in_chunks,
    peak_memory,
    products,
    ratio,
    rounding,
    sending,
    timed_in_turns,
    whole_product,
)
from torch import Tensor

from st_corrector import (
    CorrectedSearch,
    EmbeddingCache,
    FaissIndex,
    IdentityCorrector,
    Shortlist,
    ShortlistSearch,
)
from st_corrector.cache.shard import DTYPES
from st_corrector.search.kernels import Tiles, block_maxima, triton, usable
from st_corrector.search.scoring import Scorer
from st_corrector.search.topk import BLOCK
from st_corrector.storage.files import whole

sys.path.insert(0, str(ROOT / "recipes"))
from common import commit, versions

RESULTS = {
    device: ROOT / "benchmarks" / "results" / folder
    for device, folder in (("cpu", "selection"), ("cuda", "gpu/selection"))
}
_IN_FLOAT64 = 8  # queries that are compared with float64
_CUT = (  # queries, rows and coordinates of a tile, warps and stages
    (64, 128, 64, 4, 3),
    (128, 128, 32, 8, 4),
    (128, 128, 64, 8, 2),
    (128, 128, 64, 8, 3),
    (128, 256, 64, 8, 2),
)
_CHECKED_ROWS = 65_536


class Setting(NamedTuple):
    rows: int
    dim: int
    batch: int
    k: int
    corrector: str
    dtype: str = "float32"
    stored: str = "memory"  # or "disk", "disk, cold"; "streamed": in the CPU's memory, searched on a GPU
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
}
# One GPU: Wikipedia's passages, the most telling first.
WIKIPEDIA = Setting(21_000_000, 768, 128, 64, "ridge, query side", "bfloat16")
GPU_GRID = {
    "gpu": [
        WIKIPEDIA._replace(corrector=name, dtype=dtype)
        for dtype in ("bfloat16", "int8")
        for name in (
            "ridge, query side",
            "mlp-128",
            "ridge",
            "mlp-512",
            "mlp-128, unnormalised",
            "mlp-512, unnormalised",
            "kernel-ridge",
            "identity",
        )
    ],
    "gpu-streamed": [
        WIKIPEDIA._replace(rows=2_000_000, corrector=name, dtype=dtype, stored="streamed")
        for name, dtype in (("ridge, query side", "bfloat16"), ("mlp-128", "bfloat16"), ("ridge, query side", "int8"))
    ],
    "gpu-growth": [
        WIKIPEDIA._replace(rows=rows, corrector=name)
        for rows in (100_000, 1_000_000, 5_000_000)
        for name in ("ridge, query side", "mlp-128")
    ],
    # What the CPU was measured on.
    "gpu-base": [BASE._replace(corrector=name) for name in ("ridge, query side", "mlp-128")],
}
PARTS = {
    "cpu": [*GRID, "recall", "compile", "indices", "indices-10M"],
    "cuda": ["gpu", "gpu-streamed", "tiles", "gpu-growth", "gpu-base", "compile"],
}
"""What is measured where nothing is asked for, in this order."""


# ---------------------------------------------------------------------- one setting


def measure(setting: Setting, cache: EmbeddingCache, vectors: Tensor, queries: Tensor, args: Any) -> dict[str, Any]:
    """On a CPU: against the products, the naive way and FAISS."""
    corrector = trained(setting.corrector, vectors)
    queries = queries[: setting.batch]
    search = CorrectedSearch(cache, corrector)
    in_memory = setting.stored == "memory" and setting.dtype == "float32"
    reference = (naive if in_memory else naive_in_chunks)(cache, corrector, queries, setting.k)
    if setting.written:
        rows = torch.randperm(setting.rows)[: int(setting.written * setting.rows)]
        for some in rows.split(65_536):
            search.overlay.write(some, F.normalize(cache[some] + 0.5 * vectors[:1], dim=-1))
        reference = naive(CorrectedView(search), corrector, queries, setting.k)
    agreement = check(search.search(queries, setting.k), reference(), 2e-4)
    with peak_memory(args.device) as memory:  # of a first search: later ones use its memory again
        CorrectedSearch(cache, corrector).search(queries, setting.k)

    ways: dict[str, Way] = {"search": lambda: search.search(queries, setting.k)}
    # The fastest way found of computing the products counts.
    light = corrector.leaves_corpus(unit=True)
    for chunk in (2_048, 4_096, 16_384) if light else (1_024, 2_048, 8_192):
        ways[f"products, {chunk}"] = products(cache, corrector, queries, chunk)
    if in_memory and not setting.written and light:
        ways["products, whole"] = whole_product(cache, queries)
    others = {"search": ways["search"], "naive": reference}
    if in_memory and not setting.written:
        others["faiss"] = faiss_flat(cache, corrector, queries, setting.k)
    if setting.stored == "disk, cold":
        folder = cache_folder(setting, args)
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
    floor = fastest(seconds, "products")
    return {
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


def measure_for_gpu(
    setting: Setting, cache: EmbeddingCache, vectors: Tensor, queries: Tensor, args: Any
) -> dict[str, Any]:
    """On a GPU: against the products in float32 and bfloat16, and against what its memory can read."""
    corrector = trained(setting.corrector, vectors.to(args.device))
    queries = queries[: setting.batch].to(args.device)
    search, plain = CorrectedSearch(cache, corrector), CorrectedSearch(cache, corrector)
    plain.use_kernel = False
    found, tolerance = search.search(queries, setting.k), rounding(setting.dim)
    reference = naive_in_chunks(cache, corrector, queries, setting.k)
    expected = reference()
    agreement = check(found, expected, tolerance)
    in_float64 = check_in_float64(found, cache, corrector, queries[:_IN_FLOAT64], tolerance)
    with peak_memory(args.device) as memory:  # of a first search, which finds the norms out, and of one that has them
        fresh = CorrectedSearch(cache, corrector)
        for _ in range(2):
            fresh.search(queries, setting.k)
    del fresh

    ways: dict[str, Way] = {"search": lambda: search.search(queries, setting.k)}
    if usable(queries.device):
        check(plain.search(queries, setting.k), expected, tolerance)
        ways["without kernel"] = lambda: plain.search(queries, setting.k)
    if setting.stored == "streamed":
        resident = CorrectedSearch(cache.to(args.device), corrector)
        check(resident.search(queries, setting.k), expected, tolerance)
        ways["resident"] = lambda: resident.search(queries, setting.k)
        ways["sending"] = sending(cache, queries.device)
    else:
        # The fastest way found of computing the products counts.
        for dtype, chunk in itertools.product(("float32", "bfloat16"), (131_072, 524_288)):
            ways[f"products in {dtype}, {chunk}"] = products(cache, corrector, queries, chunk, DTYPES[dtype])
        ways["copying"] = copying(cache)
    seconds = timed_in_turns(ways, args.turns, args.device, within=args.seconds)
    against = timed_in_turns({"search": ways["search"], "naive": reference}, 1, args.device)
    medians = {name: statistics.median(each) for name, each in {**against, **seconds}.items()}
    # A search reads what copying reads, and writes nothing like it.
    read_only = {**seconds, "reading": [each / 2 for each in seconds.get("copying", ())]}
    flops = Products.of(corrector, setting.batch).flops(setting.rows)
    return {
        **setting._asdict(),
        "rows_that_agree": agreement,
        "tolerance": tolerance,
        "float64": in_float64,
        "seconds": medians,
        "all_seconds": {**seconds, "naive": against["naive"]},
        "ratio_to_bandwidth": ratio(read_only, "search", "reading") if "copying" in seconds else None,
        "ratio_to_float32": ratio(seconds, "search", fastest(seconds, "products in float32")),
        "ratio_to_bfloat16": ratio(seconds, "search", fastest(seconds, "products in bfloat16")),
        "kernel_over_torch": ratio(seconds, "search", "without kernel"),
        "ratio_to_resident": ratio(seconds, "search", "resident"),
        "ratio_to_sending": ratio(seconds, "search", "sending"),
        "ratio_to_naive": ratio(against, "search", "naive"),
        "bytes_per_second": cache.nbytes / medians["search"],
        "bytes_copied_per_second": 2 * cache.nbytes / medians["copying"] if "copying" in medians else None,
        "bytes_sent_per_second": cache.nbytes / medians["sending"] if "sending" in medians else None,
        "flops": flops,
        "flops_per_second": flops / medians["search"],
        "extra_bytes": memory["bytes"],
        "planned_bytes": sum(search.memory(setting.batch, setting.k, queries.device).values()),
        "cache_bytes": cache.nbytes,
        **({"gpu": torch.cuda.get_device_name()} if args.device == "cuda" else {}),
        **commit(),
    }


# ---------------------------------------------------------------------- what else is compared


def tiles(vectors: Tensor, queries: Tensor, args: Any) -> list[dict[str, Any]]:
    """The kernel alone, as it is launched and cut up in other ways: seconds, and how far it is from float64."""
    rows, results = args.rows or 2_000_000, []
    probes = queries[: WIKIPEDIA.batch].T.contiguous().to(args.device)
    for dtype in ("bfloat16", "int8", "float32"):
        cache = EmbeddingCache.from_blocks(tiled(vectors, rows, args.device), DTYPES[dtype], rows=rows)
        values = next(cache.chunks(rows))[1].values
        left_out = torch.zeros(rows, dtype=torch.bool, device=args.device)
        some = values[:_CHECKED_ROWS].double() @ probes.double()
        exact = F.pad(some, (0, 0, 0, -len(some) % BLOCK), value=-torch.inf).view(-1, BLOCK, probes.shape[1]).amax(1)
        for each in (None, *(Tiles(*numbers) for numbers in _CUT)):
            result: dict[str, Any] = {"dtype": dtype, "rows": rows, "tiles": each and each._asdict()}
            try:
                found = block_maxima(values[:_CHECKED_ROWS], probes, None, left_out[:_CHECKED_ROWS], BLOCK, each)
                result["largest_relative_error"] = ((found - exact).abs().max() / exact.abs().max()).item()
                ways = {"kernel": lambda: block_maxima(values, probes, None, left_out, BLOCK, each)}  # noqa: B023
                seconds = statistics.median(timed_in_turns(ways, args.turns, args.device, within=0.2)["kernel"])
                result |= {"seconds": seconds, "bytes_per_second": values.nbytes / seconds}
            except triton.runtime.OutOfResources as error:
                result["does_not_fit"] = str(error)
            results.append(result)
            print(json.dumps(result), flush=True)
    return results


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


# ---------------------------------------------------------------------- running


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="a BEIR folder")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--only", nargs="+", choices=dict.fromkeys([*PARTS["cpu"], *PARTS["cuda"]]))
    parser.add_argument("--rows", type=int, help="so many rows instead of the grid's: to try it out")
    parser.add_argument("--turns", type=int, default=3, help="on a GPU at least so many")
    parser.add_argument("--seconds", type=float, default=3.0, help="on a GPU: more turns, until so many have passed")
    parser.add_argument("--results", type=Path, help="by default <device>.json in its folder of benchmarks/results")
    parser.add_argument("--outputs", type=Path, default=ROOT / "outputs" / "selection")
    args = parser.parse_args()
    parts = args.only or PARTS[args.device]
    possible = PARTS[args.device] + (PARTS["cuda"] if args.rows else [])
    if others := [part for part in parts if part not in possible]:
        parser.error(f"{', '.join(others)}: not with --device {args.device}; what is for a GPU is tried out by --rows")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU: see nvidia-smi and torch.version.cuda. To try it: --device cpu --rows 3000.")
    require_float32()
    # What is only tried out is no result.
    path = args.results or (args.outputs if args.rows else RESULTS[args.device]) / f"{args.device}.json"
    done = json.loads(path.read_text()) if path.exists() else {"settings": {}}
    vectors, questions = passages(args.dataset, args.outputs, args.device)
    done["machine"] = machine(args.device)
    done["command"] = " ".join(["python", *sys.argv])

    def keep() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as partial:
            partial.write_text(json.dumps(done, indent=1))

    some, queries = (F.normalize(each[:, : BASE.dim], dim=-1) for each in (vectors, questions))
    rest: dict[str, Callable[[], Any]] = {
        "recall": lambda: recall_of_dtypes(base_cache(), queries),
        "compile": lambda: compiled(base_cache(), some.to(args.device), queries, args),
        "indices": lambda: indices(base_cache(), some, queries, args),
        "indices-10M": lambda: indices(base_cache(rows=10_000_000, dtype="int8", stored="disk"), some, queries, args),
        "tiles": lambda: tiles(vectors, questions, args),
    }

    def base_cache(**other: Any) -> EmbeddingCache:
        return make_cache(BASE._replace(**{"rows": args.rows or BASE.rows, **other}), some, args)

    failed: list[str] = []
    for part in parts:
        if part in rest and part not in done:
            with going_on(part, failed):
                done[part] = rest[part]()
                print(part, done[part], flush=True)
                keep()
        for key, result in measured(part, vectors, questions, done["settings"], failed, args):
            done["settings"][key] = result
            keep()
    if failed:
        sys.exit("\n    ".join(["Failed, for the reasons above; the same command tries again:", *failed]))


@contextmanager
def going_on(name: str, failed: list[str]) -> Iterator[None]:
    """Let what fails, for want of memory say, keep nothing else from being measured."""
    try:
        yield
    except Exception:
        traceback.print_exc()
        print("FAILS:", name, flush=True)
        failed.append(name)
    gc.collect()
    torch.cuda.empty_cache()


def measured(
    part: str, vectors: Tensor, questions: Tensor, done: dict[str, Any], failed: list[str], args: Any
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The settings of a part that have not been measured yet, one after the other."""
    measuring = measure_for_gpu if part in GPU_GRID else measure
    made: tuple[Any, EmbeddingCache] | None = None
    for setting in {**GRID, **GPU_GRID}.get(part, []):
        setting = setting._replace(rows=args.rows or setting.rows)
        key = ", ".join(map(str, setting))
        if key in done or (setting.stored == "streamed" and args.device == "cpu"):  # to a CPU nothing is streamed
            continue
        started = time.perf_counter()
        some, queries = (F.normalize(each[:, : setting.dim], dim=-1) for each in (vectors, questions))
        kind = (setting.rows, setting.dim, setting.dtype, setting.stored)
        result: dict[str, Any] = {}
        with going_on(key, failed):
            if made is None or made[0] != kind:
                made = None
                gc.collect()
                made = (kind, make_cache(setting, some, args))
            result = measuring(setting, made[1], some, queries, args)
        if not result:
            continue
        yield key, result
        print(
            key,
            {name: round(value, 4) for name, value in result["seconds"].items()},
            *(f"{name} {value:.3f}" for name, value in result.items() if "ratio_to" in name and value),
            f"extra {result['extra_bytes'] / 1e6:.0f} MB, {time.perf_counter() - started:.0f} s in all",
            flush=True,
        )


def cache_folder(setting: Setting, args: Any) -> Path:
    folder: Path = args.outputs / f"vectors-{setting.rows}-{setting.dim}-{setting.dtype}"
    return folder


def make_cache(setting: Setting, vectors: Tensor, args: Any) -> EmbeddingCache:
    folder = cache_folder(setting, args)
    if setting.stored.startswith("disk") and (folder / "manifest.json").exists():
        return EmbeddingCache.load(folder)
    # In one piece, made where it is to be: there is not room for two of them.
    blocks = tiled(vectors, setting.rows, args.device)
    cache = EmbeddingCache.from_blocks(blocks, DTYPES[setting.dtype], rows=setting.rows)
    if setting.stored.startswith("disk"):
        return cache.save(folder)
    return cache.to("cpu") if setting.stored == "streamed" else cache


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def require_float32() -> None:
    """Refuse to compare products of float32 numbers that are taken in TF32."""
    override = os.environ.get("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "0")
    if override != "0" or torch.get_float32_matmul_precision() != "highest":
        raise SystemExit(
            f"Products of float32 numbers would be taken in TF32 (the override is {override!r}): unset it."
        )


def machine(device: str) -> dict[str, Any]:
    """What it was measured on."""
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    gpu = {}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        gpu = {
            "gpu": properties.name,
            "gpu_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            "float32_products": torch.backends.cuda.matmul.fp32_precision,
        }
    return {
        "cpu": model,
        "threads": torch.get_num_threads(),
        **gpu,
        "versions": versions(),
    }


if __name__ == "__main__":
    main()
