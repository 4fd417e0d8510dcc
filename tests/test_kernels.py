"""The Triton kernel, run by Triton's interpreter on the CPU, against plain torch."""

import importlib.util
import os
import subprocess
import sys

import pytest

SCRIPT = """
import itertools, torch, torch.nn.functional as F
import st_corrector.search as searching
from st_corrector import CorrectedSearch, EmbeddingCache, IdentityCorrector, InputError, MLPCorrector, RidgeCorrector
from st_corrector import Shortlist, ShortlistSearch
from st_corrector.kernels import block_maxima
from test_search import trained

torch.manual_seed(0)
for rows, dim, batch in ((300, 40, 5), (128, 64, 64), (1000, 70, 70)):
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int8):
        values = torch.randn(rows, dim) if dtype != torch.int8 else torch.randint(-127, 128, (rows, dim))
        values, probes, left_out = values.to(dtype), torch.randn(dim, batch), torch.rand(rows) < 0.1
        factors = torch.rand(rows) if dtype == torch.int8 else None
        scores = (values.double() @ probes.double()) * (1 if factors is None else factors[:, None])
        scores[left_out] = -torch.inf
        expected = F.pad(scores, (0, 0, 0, -rows % 64), value=-torch.inf).view(-1, 64, batch).amax(1)
        found = block_maxima(values, probes, factors, left_out, 64).double()
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
for make, dtype, normalize in itertools.product(
    (IdentityCorrector, RidgeCorrector, query_side, mlp),
    (torch.float32, torch.bfloat16, torch.int8),
    (True, False),
):
    search = CorrectedSearch(
        EmbeddingCache.from_blocks([vectors], dtype), trained(make(24), 24), normalize=normalize, chunk_size=900
    )
    queries, exclude = torch.randn(7, 24), torch.randint(-1, 2_000, (7, 300))
    for k in (1, 10, 40):
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
    assert fused == 9, fused  # three searches of three chunks
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


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is optional: it comes with CUDA builds of torch"
)
def test_the_kernel_selects_what_plain_torch_selects():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.path.dirname(__file__)}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "as plain torch"
