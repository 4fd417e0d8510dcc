"""The Triton kernel, run by Triton's interpreter on the CPU, against plain torch."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.launching import TESTS

from st_corrector import CorrectedSearch, EmbeddingCache, IdentityCorrector
from st_corrector.search import kernels

SCRIPT = """
import itertools, torch, torch.nn.functional as F
import st_corrector.search.exact as searching
from st_corrector import CorrectedSearch, EmbeddingCache, IdentityCorrector, InputError, MLPCorrector, RidgeCorrector
from st_corrector import Shortlist, ShortlistSearch
from st_corrector.search.kernels import block_maxima
from support.searches import trained

torch.manual_seed(0)
for rows, dim, batch in ((300, 40, 5), (128, 64, 64), (1000, 70, 70)):
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int8):
        values = torch.randn(rows, dim) if dtype != torch.int8 else torch.randint(-127, 128, (rows, dim))
        values, probes, left_out = values.to(dtype), torch.randn(dim, batch), torch.rand(rows) < 0.1
        factors = torch.rand(rows) if dtype == torch.int8 else None
        scores = (values.double() @ probes.double()) * (1 if factors is None else factors[:, None])
        scores[left_out] = -torch.inf
        expected = F.pad(scores, (0, 0, 0, -rows % 64), value=-torch.inf).view(-1, 64, batch).amax(1)
        for stored in (values, values.T.contiguous().T):
            found = block_maxima(stored, probes, factors, left_out, 64).double()
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-6)

fused = 0
update = CorrectedSearch._update_fused
def counting(*args):
    global fused
    fused += 1
    return update(*args)
CorrectedSearch._update_fused = counting
vectors = torch.randn(2_000, 24)
vectors[1500:1600] = vectors[:100]
query_side, mlp = lambda d: RidgeCorrector(d, normalize=False), lambda d: MLPCorrector(d, hidden=8)
makes, dtypes = (IdentityCorrector, RidgeCorrector, query_side, mlp), (torch.float32, torch.bfloat16, torch.int8)
for (n, make), (m, dtype) in itertools.product(enumerate(makes), enumerate(dtypes)):
    normalize = (n + m) % 2 == 0  # both with each corrector and each dtype
    search = CorrectedSearch(
        EmbeddingCache.from_blocks([vectors], dtype), trained(make(24), 24), normalize=normalize, chunk_size=900
    )
    queries, exclude = torch.randn(7, 24), torch.randint(-1, 2_000, (7, 300))
    for k in (1, 40):
        expected = None
        for usable in (False, True):
            searching.usable = lambda device: usable
            found = search.search(queries, k, exclude)
            if expected is not None:
                torch.testing.assert_close(found.scores, expected.scores, atol=1e-4, rtol=1e-4)
                assert (found.rows == expected.rows).float().mean() > 0.99
                assert not (found.rows[:, :, None] == exclude.masked_fill(exclude < 0, -2)[:, None, :]).any()
            expected = found
        search.overlay.write(torch.randperm(2_000)[:300], torch.randn(300, 24))
    assert fused == 6, fused  # two searches of three chunks
    fused = 0

# Once all norms are known and nothing is corrected, chunks are larger; not where the caller has said how large.
searching._SCORES, many = {"cpu": 1}, torch.randn(5_000, 24)
written, others, exclude = torch.randperm(5_000)[:3_000], torch.randn(3_000, 24), torch.randint(-1, 5_000, (7, 300))
for make, chunks in ((query_side, 1), (mlp, 3)):
    searches = [
        CorrectedSearch(EmbeddingCache.from_tensor(many), trained(make(24), 24), normalize=False) for _ in range(2)
    ]
    searches[1].use_kernel = False
    for some in (0, 3_000):
        for search in searches:
            search.overlay.write(written[:some], others[:some])
        for again in range(2):
            fused, (with_kernel, plain) = 0, (search.search(queries, 10, exclude) for search in searches)
            assert fused == (chunks if some or again else 3), (make, some, again, fused)
            torch.testing.assert_close(with_kernel.scores, plain.scores, atol=1e-4, rtol=1e-4)
            assert (with_kernel.rows == plain.rows).float().mean() > 0.99
fused = 0

# Rows that have been withdrawn, some of them after they were written back.
withdrawn = torch.randperm(2_000)[:200].sort().values
for make, dtype in itertools.product((query_side, mlp), (torch.float32, torch.int8)):
    searches = [
        CorrectedSearch(
            EmbeddingCache.from_blocks([vectors], dtype), trained(make(24), 24), chunk_size=900, withdrawn=gone
        )
        for gone in (withdrawn.numpy(), withdrawn.numpy(), ())
    ]
    searches[1].use_kernel = False
    for search in searches:
        search.overlay.write(torch.arange(0, 2_000, 7), others[:286])
    queries = torch.randn(7, 24)
    with_kernel, plain, all_rows = (search.search(queries, 40) for search in searches)
    torch.testing.assert_close(with_kernel.scores, plain.scores, atol=1e-4, rtol=1e-4)
    assert (with_kernel.rows == plain.rows).float().mean() > 0.99
    assert not torch.isin(with_kernel.rows, withdrawn).any() and torch.isin(all_rows.rows, withdrawn).any()
fused = 0

# A shortlist offers no row that has been written back: its own scores of these are −∞, fused or not.
searches = []
for usable in (False, True):
    searching.usable = lambda device: usable
    corrector, shortlist = trained(MLPCorrector(24, hidden=8), 24), Shortlist(size=50)
    search = ShortlistSearch(EmbeddingCache.from_tensor(vectors), corrector, shortlist, chunk_size=900)
    torch.manual_seed(1)
    written = torch.randperm(2_000)[:300]
    search.write_back(written, F.normalize(torch.randn(300, 24), dim=-1))
    offered = search._candidates(queries, 50)
    assert (offered >= 0).all() and not torch.isin(offered, written).any()
    searches.append((offered, search.search(queries, 10).rows))
assert fused == 9, fused  # two shortlists and the exact search that measures recall, of three chunks each
for plain, with_kernel in zip(*searches):
    assert (plain == with_kernel).float().mean() > 0.99

def refuses(search, message):
    try:
        search.search(queries, 3)
    except InputError as error:
        assert message in str(error), error
    else:
        raise SystemExit("scores that are not numbers were not refused")

search = CorrectedSearch(EmbeddingCache.from_tensor(vectors), MLPCorrector(24), chunk_size=900)
search.overlay.write(torch.tensor([1_234]), torch.full((1, 24), torch.nan))
refuses(search, "row 1234 is not a number")
search = CorrectedSearch(EmbeddingCache.from_tensor(vectors), MLPCorrector(24), chunk_size=900)
search.corrector.network[0].weight.data[0] = torch.nan
refuses(search, "not numbers")
print("as plain torch")
"""


needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is optional: it comes with CUDA builds of torch"
)


@needs_triton
def test_the_kernel_selects_what_plain_torch_selects():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(TESTS)}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "as plain torch"


@needs_triton
def test_without_what_the_kernel_needs_searches_go_without_it(monkeypatch, caplog):
    """Here it is a GPU that is missing."""
    if kernels.triton.knobs.runtime.interpret:
        pytest.skip("Triton's interpreter needs nothing")
    monkeypatch.setattr(kernels, "_has_tensor_cores", lambda device: True)
    vectors = torch.nn.functional.normalize(torch.randn(300, 8), dim=-1)
    search = CorrectedSearch(EmbeddingCache.from_tensor(vectors), IdentityCorrector(8))
    kernels.usable.cache_clear()
    try:
        for _ in range(2):
            found = search.search(vectors[:2], 3)
    finally:
        kernels.usable.cache_clear()
    assert torch.equal(found.rows, (vectors[:2] @ vectors.T).topk(3).indices)
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "do not use the Triton kernel" in record.getMessage()


TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int8: "*i8",
    torch.bool: "*i1",
}
SHARED_MEMORY = {80: 163, 89: 99, 90: 227}
"""KB that one program can have, by compute capability."""


@needs_triton
@pytest.mark.parametrize(
    ("capability", "dtype", "batch", "with_factors"),
    [
        (90, torch.float32, 128, True),
        (90, torch.bfloat16, 128, True),
        (90, torch.bfloat16, 1, False),
        (90, torch.float16, 64, False),
        (90, torch.int8, 128, True),
        (89, torch.bfloat16, 200, True),
        (80, torch.float32, 64, True),
    ],
)
def test_the_kernel_compiles_for_gpus_and_fits_into_them(
    capability, dtype, batch, with_factors, monkeypatch, tmp_path, record_property
):
    """What would be launched; Triton needs no GPU to compile it. Numbers stay in registers and in shared memory."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if triton.knobs.runtime.interpret:
        pytest.skip("Triton's interpreter compiles nothing")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel, launched = kernels._block_maxima, {}

    class Recorder:
        def __getitem__(self, grid):
            return lambda *args, **settings: launched.update(args=args, settings=settings)

    monkeypatch.setattr(kernels, "_block_maxima", Recorder())
    values = torch.zeros(1_000, 768, dtype=dtype)
    factors = torch.ones(1_000) if with_factors else None
    kernels.block_maxima(values, torch.zeros(768, batch), factors, torch.zeros(1_000, dtype=torch.bool), 64)

    settings = launched["settings"]
    options = {name: settings.pop(name) for name in ("num_warps", "num_stages")}
    signature, constants, attributes = (
        {},
        {(kernel.arg_names.index(name),): value for name, value in settings.items()},
        {},
    )
    for number, (parameter, value) in enumerate(zip(kernel.params, launched["args"], strict=False)):
        is_number = isinstance(value, int)
        signature[parameter.name] = "i32" if is_number else TYPES[value.dtype]
        if is_number and parameter.do_not_specialize:
            continue
        if is_number and value == 1:
            signature[parameter.name], constants[(number,)] = "constexpr", 1
        elif (value if is_number else value.data_ptr()) % 16 == 0:
            attributes[(number,)] = [["tt.divisibility", 16]]
    signature |= dict.fromkeys(settings, "constexpr")
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert compiled.metadata.shared <= SHARED_MEMORY[capability] * 1024
    record_property("shared memory", compiled.metadata.shared)
    (tmp_path / "kernel.cubin").write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    done = subprocess.run([tool, "-res-usage", tmp_path / "kernel.cubin"], capture_output=True, text=True, check=True)
    assert re.findall(r"STACK:(\d+)", done.stdout + done.stderr) == ["0"]
    code = subprocess.run([tool, "-sass", tmp_path / "kernel.cubin"], capture_output=True, text=True, check=True).stdout
    assert ("HGMMA" if capability == 90 else "HMMA") in code, "on tensor cores"
