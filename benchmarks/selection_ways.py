"""The ways of selecting that are timed against one another, what bounds them, and how time and memory are measured."""

from __future__ import annotations

import ctypes
import gc
import itertools
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from st_corrector import CorrectedSearch, EmbeddingCache, IdentityCorrector, MLPCorrector, RidgeCorrector
from st_corrector.cache.shard import Shard
from st_corrector.correctors import Corrector
from st_corrector.search.exact import Found

Way = Callable[[], Any]
_AT_ONCE = 65_536  # rows of the naive ways
_COPIED = 1 << 30  # bytes that are copied at once: many times a GPU's cache


# ---------------------------------------------------------------------- time and memory


def clock(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def timed_in_turns(
    ways: dict[str, Way], turns: int, device: str, pause: float = 0.0, within: float = 0.0
) -> dict[str, list[float]]:
    """Seconds of each way in each turn, after one turn to warm up; before each a pause of so many seconds.

    There are more turns than asked for, up to 20, where these take less than ``within`` seconds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for name in ways:
        _timed(ways[name], device, pause)
    started = time.perf_counter()
    for turn in range(20 if within else turns):
        if turn >= turns and time.perf_counter() - started > within:
            break
        for name in ways:
            seconds[name].append(_timed(ways[name], device, pause))
    return seconds


def _timed(way: Way, device: str, pause: float) -> float:
    time.sleep(pause)
    start = clock(device)
    way()
    return clock(device) - start


def ratio(seconds: dict[str, list[float]], way: str, other: str | None) -> float | None:
    """The median over turns of one way's time over the other's."""
    if way not in seconds or other not in seconds:
        return None
    return statistics.median(a / b for a, b in zip(seconds[way], seconds[other], strict=True))


def fastest(seconds: dict[str, list[float]], ways: str) -> str | None:
    """The one of least median among those whose names begin with ``ways``."""
    medians = {name: statistics.median(each) for name, each in seconds.items() if name.startswith(ways)}
    return min(medians, key=medians.__getitem__) if medians else None


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


# ---------------------------------------------------------------------- what bounds a search


class Products(NamedTuple):
    """Shapes of the matrices that each vector is multiplied with.

    Args:
        chain: one after the other.
        beside: others that it is multiplied with itself.
    """

    chain: list[tuple[int, int]]
    beside: list[tuple[int, int]]

    @classmethod
    def of(cls, corrector: Corrector, batch_size: int) -> Products:
        """Those of the form that the search uses."""
        dim = corrector.dim
        if corrector.leaves_corpus(unit=True):
            widths = [dim, batch_size]
        elif isinstance(corrector, RidgeCorrector):
            widths = [dim, dim, batch_size]
        elif isinstance(corrector, MLPCorrector) and corrector.normalize:
            widths = [dim, corrector.hidden, dim, batch_size]
        elif isinstance(corrector, MLPCorrector):
            widths = [dim, corrector.hidden, batch_size]
        else:
            widths = [dim, corrector.config["num_features"], dim, batch_size]
        beside = []
        if not corrector.normalize and not corrector.leaves_corpus(unit=True):
            beside = [(dim, batch_size)]  # ⟨q, z⟩ beside ⟨W₂ᵀq, σ(W₁z)⟩
        if not isinstance(corrector, (IdentityCorrector, RidgeCorrector, MLPCorrector)):
            beside = [(dim, dim)]  # z's own part of [z, φ(z)]W
        return cls(list(itertools.pairwise(widths)), beside)

    def flops(self, rows: int) -> int:
        return 2 * rows * sum(a * b for a, b in (*self.chain, *self.beside))


def products(
    cache: EmbeddingCache, corrector: Corrector, queries: Tensor, chunk: int, dtype: torch.dtype = torch.float32
) -> Way:
    """The matrix products of the form that the search uses, chunk by chunk, and nothing else: the floor."""
    device, dim, shapes = queries.device, cache.dim, Products.of(corrector, len(queries))
    matrices, beside = (
        [torch.randn(shape, device=device).to(dtype) for shape in each] for each in (shapes.chain, shapes.beside)
    )
    chunk = min(chunk, len(cache))
    buffers = [torch.empty(chunk, each.shape[1], device=device, dtype=dtype) for each in (*matrices, *beside)]
    converted = torch.empty(chunk, dim, device=device).normal_().to(dtype)

    def run() -> None:
        for _, stored in cache.chunks(chunk):
            size = len(stored.values)
            # What is stored otherwise has to be converted first, which is no product: a resident chunk stands for it.
            z = stored.values if stored.values.dtype == dtype else converted[:size]
            here = z
            for matrix, buffer in zip(matrices, buffers, strict=False):
                here = torch.mm(here, matrix, out=buffer[:size])
            for matrix, buffer in zip(beside, buffers[len(matrices) :], strict=True):
                torch.mm(z, matrix, out=buffer[:size])

    return run


def whole_product(cache: EmbeddingCache, queries: Tensor) -> Way:
    vectors = next(cache.chunks(len(cache)))[1].values

    def run() -> None:
        torch.mm(queries, vectors.T)

    return run


def copying(cache: EmbeddingCache) -> Way:
    """Copy the cache's vectors, within the memory where they are: each byte is read and written once."""
    rows = max(1, _COPIED // (cache.dim * cache.dtype.itemsize))
    room = next(cache.chunks(rows))[1].map(torch.empty_like)

    def run() -> None:
        for _, chunk in cache.chunks(rows):
            room.at(slice(0, len(chunk.values))).copy_(chunk)

    return run


def sending(cache: EmbeddingCache, device: torch.device) -> Way:
    """Copy as many bytes as the cache has from the CPU's pinned memory to a GPU, and nothing else."""
    rows = max(1, _COPIED // (cache.dim * cache.dtype.itemsize))
    pinned = next(cache.chunks(rows))[1].map(lambda each: torch.empty_like(each, pin_memory=True))
    room = pinned.map(lambda each: torch.empty_like(each, device=device))

    def run() -> None:
        for _, chunk in cache.chunks(rows):
            here = slice(0, len(chunk.values))
            for place, values in zip(room.at(here), pinned.at(here), strict=True):
                if place is not None and values is not None:
                    place.copy_(values, non_blocking=True)

    return run


# ---------------------------------------------------------------------- other ways to the same


def naive(cache: EmbeddingCache, corrector: Corrector, queries: Tensor, k: int) -> Way:
    """Correct everything, multiply, take the top k."""

    def run() -> Any:
        with torch.no_grad():
            vectors = next(cache.chunks(len(cache)))[1].float()
            return (queries @ corrector(vectors).T).topk(k)

    return run


def naive_in_chunks(cache: EmbeddingCache, corrector: Corrector, queries: Tensor, k: int) -> Way:
    """The same where the whole does not fit: ``topk`` of each chunk, and of what these leave."""

    def run() -> Any:
        with torch.no_grad():
            scores, rows = [], []
            for first, chunk in cache.chunks(_AT_ONCE):
                vectors = F.normalize(chunk.map(lambda each: each.to(queries.device)).float(), dim=-1)
                best = (queries @ corrector(vectors).T).topk(min(k, len(vectors)))
                scores.append(best.values)
                rows.append(best.indices + first)
            top = torch.cat(scores, dim=1).topk(k)
            return top.values, torch.cat(rows, dim=1).gather(1, top.indices)

    return run


class CorrectedView:
    """A cache with what has been written back in its place, for the naive way."""

    def __init__(self, search: CorrectedSearch) -> None:
        self._vectors = search.stale(torch.arange(len(search.cache)))

    def __len__(self) -> int:
        return len(self._vectors)

    def chunks(self, size: int) -> Iterator[tuple[int, Shard]]:
        yield 0, Shard(self._vectors)


def faiss_flat(cache: EmbeddingCache, corrector: Corrector, queries: Tensor, k: int) -> Way:
    """FAISS's exact index over corrected vectors; correcting them and handing them over is part of it."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatIP(cache.dim)
    if corrector.leaves_corpus(unit=True):  # its vectors never change: that much is done once
        for _, chunk in cache.chunks(_AT_ONCE):
            index.add(chunk.float().numpy())
        probes = corrector.on_query_side(queries).probes.numpy()
        return lambda: index.search(probes, k)

    def run() -> Any:
        index.reset()
        with torch.no_grad():
            for _, chunk in cache.chunks(_AT_ONCE):
                index.add(corrector(chunk.float()).numpy())
        return index.search(queries.numpy(), k)

    return run


# ---------------------------------------------------------------------- whether they agree


def check(found: Any, expected: Any, tolerance: float) -> float:
    """The share of rows that agree; refuses scores that do not."""
    scores, rows = found[0].cpu(), found[1].cpu()
    values, indices = (torch.as_tensor(each).cpu() for each in expected)
    if not (scores - values).abs().max() <= tolerance:
        raise AssertionError(f"scores differ by {(scores - values).abs().max():.2g}")
    overlap = (rows[:, :, None] == indices[:, None, :]).any(-1).float().mean().item()
    if overlap < 0.995:  # equal scores, up to rounding, may go to either row
        raise AssertionError(f"only {overlap:.4f} of the rows agree")
    return overlap


@torch.no_grad()
def check_in_float64(
    found: Found, cache: EmbeddingCache, corrector: Corrector, queries: Tensor, tolerance: float
) -> dict[str, float]:
    """Whether the rows found for ``queries``, the first of those searched for, are the best there are, by scores of all
    rows in float64: how far theirs were off, and how far the ``i``-th best row scores below the best ``i``-th.

    Raises:
        AssertionError: by more than ``tolerance``, or a row is there twice.
    """
    exact, k = in_float64(corrector, queries.device), found.rows.shape[1]
    probes = queries.double()

    def scores_of(shard: Shard) -> Tensor:
        values = shard.values.to(queries.device).double()
        if shard.scales is not None:
            values *= shard.scales.to(queries.device).double()[:, None]
        return probes @ exact(F.normalize(values, dim=-1)).T

    best = torch.full((len(probes), k), -torch.inf, dtype=torch.float64, device=queries.device)
    own = torch.full_like(best, torch.nan)
    rows = found.rows[: len(probes)]
    for first, chunk in cache.chunks(_AT_ONCE):
        scores = scores_of(chunk)
        here = (rows >= first) & (rows < first + scores.shape[1])
        own = torch.where(here, scores.gather(1, (rows - first).clamp(0, scores.shape[1] - 1)), own)
        best = torch.cat([best, scores], dim=1).topk(k).values
    error = (found.scores[: len(probes)].double() - own).abs().max().item()
    shortfall = (best - own.sort(dim=1, descending=True).values).max().item()
    distinct = all(len(row.unique()) == k for row in rows)
    if not (error <= tolerance and shortfall <= tolerance and distinct):
        raise AssertionError(f"against float64: {error=:.2g}, {shortfall=:.2g}, {distinct=}, {tolerance=:.2g}")
    return {"queries": len(probes), "largest_error": error, "largest_shortfall": shortfall}


def in_float64(corrector: Corrector, device: torch.device) -> Corrector:
    """The same map, computed in float64."""
    exact, state = type(corrector)(**corrector.config).to(device), corrector.state_dict()
    if isinstance(exact, MLPCorrector):
        exact.load_state_dict(state)
        exact.network.double()
    else:
        exact.load_state_dict({name: value.double() for name, value in state.items()})
    return exact


def rounding(dim: int) -> float:
    """How far scores of unit vectors may be off in float32: a sum of ``dim`` products errs, all but certainly, by a few
    ``√dim · 2⁻²⁴`` of the vectors' lengths (`Higham and Mary 2019 <https://doi.org/10.1137/18M1226312>`_). Eight times
    that, for correcting and scoring; products taken in TF32 are further off.
    """
    return 8 * dim**0.5 * 2.0**-24
