import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from st_corrector import CorpusRetrievalEvaluator, InputError
from st_corrector.search.topk import RunningTopK


def naive(scores, k):
    """The k largest of each row, equal ones by column: a full stable sort in float64."""
    order = scores.double().sort(dim=1, descending=True, stable=True)
    return order.values[:, :k], order.indices[:, :k]


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 60),
    st.integers(1, 5),
    st.integers(1, 70),
    st.integers(1, 20),
    st.integers(1, 4),
    st.integers(0, 2**31),
)
def test_ties_are_ordered_by_row_whatever_the_chunks(rows, batch, k, chunk, levels, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, levels, (batch, rows), generator=generator).float()
    scores[torch.rand(batch, rows, generator=generator) < 0.2] = -math.inf
    best = RunningTopK(batch, k)
    for start in range(0, rows, chunk):
        best.update(scores[:, start : start + chunk].T, start)
    values, indices = naive(scores, k)
    width = values.shape[1]
    indices = indices.masked_fill(values == -math.inf, -1)
    found_scores, found = best.best
    assert torch.equal(found_scores[:, :width].double(), values) and torch.equal(found[:, :width], indices)
    assert (found[:, width:] == -1).all()


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 3_000), st.integers(1, 4), st.integers(1, 90), st.sampled_from([70, 640, 3_000]), st.integers(0, 9)
)
def test_many_rows_in_any_order(rows, batch, k, chunk, kind):
    generator = torch.Generator().manual_seed(rows)
    scores = torch.randn(batch, rows, generator=generator)
    if kind == 0:  # every later block is better than all before: nothing is ever saved
        scores = scores.sort(dim=1).values
    elif kind == 1:
        scores = scores.sort(dim=1, descending=True).values
    elif kind == 2:  # ties on both sides of what is still accepted
        scores = (scores * 2).round()
    elif kind == 3:
        scores[:] = 0.5
    elif kind == 4:  # a score that is larger than all others, as a range that holds the positive would be
        scores[:, rows // 2] = math.inf
    best = RunningTopK(batch, k)
    for start in range(0, rows, chunk):
        best.update(scores[:, start : start + chunk].T, start)
    values, indices = naive(scores, k)
    found_scores, found = best.best
    width = values.shape[1]
    assert torch.equal(found_scores[:, :width].double(), values) and torch.equal(found[:, :width], indices)
    assert (found[:, width:] == -1).all()


def test_what_is_best_can_be_asked_for_at_any_time():
    scores = torch.randn(1_000, 3)
    best = RunningTopK(3, 5)
    for start in range(0, 1_000, 100):
        best.update(scores[start : start + 100], start)
        assert torch.equal(best.best[1].T, scores[: start + 100].topk(5, dim=0).indices)


def test_what_is_not_a_number_is_refused_with_its_row():
    for row in (0, 63, 64, 200, 229):
        scores = torch.randn(230, 3)
        scores[row, 1] = math.nan
        with pytest.raises(InputError, match=f"The score of row {1000 + row} is not a number"):
            RunningTopK(3, 5).update(scores, 1000)


@pytest.mark.parametrize("error", [0.0, 8e-6, -8e-6])
def test_maxima_that_are_rounded_otherwise_than_the_scores_lose_none(error):
    """As a kernel's are, whose sums go in another order: scores here are nearer to one another than that."""
    scores = 1 + 1e-6 * torch.randn(64 * 50, 3, generator=torch.Generator().manual_seed(0))
    blocks = scores.view(-1, 64, 3)
    for chunk in (5, 50):
        best = RunningTopK(3, 4)
        for first in range(0, 50, chunk):
            here = blocks[first : first + chunk]
            rounding = torch.linspace(-abs(error), error, len(here))[:, None]
            best.update_blocks(
                here.amax(1) + rounding, lambda block, query, here=here: here[block, :, query], 64 * first
            )
        expected = naive(scores.T, 4)
        assert torch.equal(best.best[0].double(), expected[0]) and torch.equal(best.best[1], expected[1])


@pytest.mark.parametrize(
    ("queries", "first_row"),
    [(2**15 - 1, 0), (2**15, 0), (2**15 + 1, 0), (70_000, 0), (2**15 + 1, 2**33), (2**15 + 1, 2**47)],
)
def test_neither_many_queries_nor_large_rows_are_mixed_up(queries, first_row):
    scores = torch.randint(0, 40, (66, queries), generator=torch.Generator().manual_seed(0)).float()  # with ties
    best = RunningTopK(queries, 2)
    for start, end in ((0, 64), (64, 65), (65, 66)):
        best.update(scores[start:end], first_row + start)
    expected = naive(scores.T, 2)
    assert torch.equal(best.best[0].double(), expected[0]) and torch.equal(best.best[1], first_row + expected[1])


def test_the_evaluator_ranks_for_more_queries_than_two_bytes_count(corpus, static_model):
    queries = corpus.qrels("train").queries["text"][:]
    ids = [str(n) for n in range(33_000)]
    corpus.add_split("many", {id: queries[int(id) % 200] for id in ids}, {id: [str(int(id) % 200)] for id in ids})
    rows = CorpusRetrievalEvaluator(corpus, "many", batch_size=4096).retrieve(static_model)
    assert torch.equal(rows[:200].repeat(165, 1), rows)
    assert torch.equal(rows[:200], CorpusRetrievalEvaluator(corpus, "train").retrieve(static_model))
