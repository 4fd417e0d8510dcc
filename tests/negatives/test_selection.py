"""Selection by hand-made vectors: which rows each rule and sampler takes."""

import pytest
import torch
import torch.nn.functional as F

from st_corrector import (
    AnswerCheck,
    Check,
    Corpus,
    CorrectedSearch,
    CrossEncoderCheck,
    EmbeddingCache,
    FalseNegativeFilter,
    IdentityCorrector,
    InputError,
)
from st_corrector.data.query_keys import UNKNOWN, query_keys
from st_corrector.negatives.selector import NegativeSelector
from st_corrector.negatives.settings import NegativeSettings

ROWS = 40
NONE = torch.full((3, 1), -1)
LABELS = torch.tensor([0, 1, 2])


@pytest.fixture
def vectors():
    return F.normalize(torch.randn(ROWS, 8, generator=torch.Generator().manual_seed(0)), dim=-1)


@pytest.fixture
def queries():
    return F.normalize(torch.randn(3, 8, generator=torch.Generator().manual_seed(1)), dim=-1)


def select(vectors, queries, positive_scores=None, exclude=NONE, encode=None, **settings):
    search = CorrectedSearch(EmbeddingCache.from_tensor(vectors), IdentityCorrector(8), chunk_size=7)
    scores = torch.full((3,), 0.5) if positive_scores is None else positive_scores
    scale = settings.pop("scale", 20.0)
    selector = NegativeSelector(NegativeSettings(**settings), scale)
    return selector.select(search, queries, exclude, scores, LABELS, torch.full((3,), -1), encode)


def ranking(vectors, queries):
    return (queries @ vectors.T).argsort(dim=1, descending=True)


class Odd(Check):
    name, everywhere = "odd", False

    def __call__(self, labels, rows, queries):
        return rows % 2 == 1


# ---------------------------------------------------------------------- rules on false negatives


def test_range_min_and_range_max_cut_out_a_window_of_ranks(vectors, queries):
    expected = ranking(vectors, queries)
    rules = FalseNegativeFilter(range_min=2, range_max=8)
    selection = select(vectors, queries, num_negatives=3, false_negatives=rules)
    assert torch.equal(selection.rows, expected[:, 2:5]) and selection.removed == {"range_min": 6}
    drawn = {"uniform": set(), "gumbel": set()}
    for seed in range(60):
        torch.manual_seed(seed)
        for sampler in drawn:
            rows = select(vectors, queries, num_negatives=3, sampler=sampler, scale=5.0, false_negatives=rules).rows
            assert all(len(set(row)) == 3 for row in rows.tolist())
            drawn[sampler] |= {(query, row) for query in range(3) for row in rows[query].tolist()}
    window = {(query, row) for query in range(3) for row in expected[query, 2:8].tolist()}
    assert drawn["uniform"] == window and drawn["gumbel"] == window, "all of the window, and nothing else"


def test_a_window_is_sampled_by_score_or_not(vectors, queries):
    """In a window of 8, Gumbel sampling at a high scale is the top, uniform sampling takes each rank alike."""
    rules, expected = FalseNegativeFilter(range_max=8), ranking(vectors, queries)
    peaked = select(vectors, queries, num_negatives=3, sampler="gumbel", scale=1e5, false_negatives=rules)
    assert torch.equal(peaked.rows, expected[:, :3])
    torch.manual_seed(0)
    ranks = torch.zeros(8)
    for _ in range(400):
        rows = select(vectors, queries, num_negatives=2, sampler="uniform", scale=1e5, false_negatives=rules).rows
        ranks += (rows[:, :, None] == expected[:, None, :8]).sum((0, 1))
    torch.testing.assert_close(ranks / ranks.sum(), torch.full((8,), 1 / 8), atol=0.02, rtol=0)


def test_each_rule_removes_what_it_says_and_counts_it(vectors, queries):
    scores = queries @ vectors.T
    positive = torch.tensor([0.9, 0.5, 0.2])
    rules = FalseNegativeFilter(max_score=0.6, absolute_margin=0.05, relative_margin=0.5)
    # Strictest for the first query is the relative margin (0.45), for the second it, too (0.25), for the third (0.1).
    selection = select(vectors, queries, positive, num_negatives=40, false_negatives=rules)
    ceiling = torch.tensor([0.45, 0.25, 0.1])
    torch.testing.assert_close(selection.ceiling, ceiling)
    above = (scores > ceiling[:, None]).sum().item()
    assert above > 5 and selection.removed == {"max_score": 0, "absolute_margin": 0, "relative_margin": above}
    for query in range(3):
        allowed = (scores[query] <= ceiling[query]).nonzero().flatten().tolist()
        assert sorted(row for row in selection.rows[query].tolist() if row >= 0) == allowed
    by = select(vectors, queries, positive, num_negatives=5, false_negatives=FalseNegativeFilter(0.3, 0.35)).removed
    assert by == {
        "max_score": int((scores[0] > 0.3).sum()),
        "absolute_margin": int((scores[1] > 0.15).sum() + (scores[2] > -0.15).sum()),
    }


def test_known_positives_are_not_counted_as_removed(vectors, queries):
    scores = queries @ vectors.T
    best = scores.argmax(1, keepdim=True)
    rules = FalseNegativeFilter(max_score=scores.gather(1, best).min().item() - 1e-4)
    count = select(vectors, queries, num_negatives=5, false_negatives=rules).removed["max_score"]
    assert (
        select(vectors, queries, exclude=best, num_negatives=5, false_negatives=rules).removed["max_score"] == count - 3
    )


def test_a_check_leaves_the_hardest_that_pass_it(vectors, queries):
    rules = FalseNegativeFilter(checks=(Odd(),))
    selection = select(vectors, queries, num_negatives=4, false_negatives=rules)
    offered = ranking(vectors, queries)[:, :8]
    for query, row in enumerate(offered.tolist()):
        even = [n for n in row if n % 2 == 0][:4]
        assert selection.rows[query].tolist() == even + [-1] * (4 - len(even))
        assert sorted(n for n in selection.false_negatives[query].tolist() if n >= 0) == sorted(n for n in row if n % 2)
    assert selection.removed == {"odd": int((offered % 2 == 1).sum())}


def test_checks_in_a_window_of_ranks_and_two_of_one_name(vectors, queries):
    rules = FalseNegativeFilter(range_min=1, range_max=6, checks=(Odd(), Odd()))
    selection = select(vectors, queries, num_negatives=4, false_negatives=rules)
    ranks = ranking(vectors, queries)
    for query, row in enumerate(ranks[:, 1:6].tolist()):
        even = [n for n in row if n % 2 == 0][:4]
        assert selection.rows[query].tolist() == even + [-1] * (4 - len(even))
        out = {n for n in selection.false_negatives[query].tolist() if n >= 0}
        assert out == {n for n in row if n % 2} | {ranks[query, 0].item()}
    assert selection.removed == {"range_min": 3, "odd": int((ranks[:, 1:6] % 2 == 1).sum())}


def test_verification_by_fresh_scores_after_checks_and_under_the_ceiling(vectors, queries):
    fresh = F.normalize(vectors + 0.5 * torch.randn(ROWS, 8, generator=torch.Generator().manual_seed(2)), dim=-1)
    encoded = []

    def encode(rows):
        encoded.extend(rows.tolist())
        return fresh[rows]

    positive = torch.tensor([0.5, 0.4, 0.3])
    rules = FalseNegativeFilter(absolute_margin=0.1, checks=(Odd(),))
    selection = select(vectors, queries, positive, encode=encode, num_negatives=3, candidates=12, false_negatives=rules)
    ceiling = positive - 0.1
    scores = queries @ vectors.T
    allowed = scores.masked_fill(scores > ceiling[:, None], -torch.inf)
    expected, verified = [], set()
    for query in range(3):
        offered = [row for row in allowed[query].argsort(descending=True)[:12].tolist() if row % 2 == 0]
        verified |= set(offered)
        now = {row: (queries[query] @ fresh[row]).item() for row in offered}
        kept = sorted((row for row in offered if now[row] <= ceiling[query]), key=lambda row: -now[row])[:3]
        expected.append(kept + [-1] * (3 - len(kept)))
    assert selection.rows.tolist() == expected
    assert sorted(encoded) == sorted(verified) == selection.verified_rows.tolist()
    torch.testing.assert_close(selection.verified, fresh[sorted(verified)])
    before = (scores > ceiling[:, None]).sum()
    assert selection.removed["absolute_margin"] > before, "those that only fresh scores showed count as well"


@pytest.fixture
def questions():
    corpus = Corpus.from_texts(
        ["Berlin is the capital of Germany.", "The Spree runs through berlin", "Bern is in Switzerland", "Berliner"]
    )
    queries = {"a": "capital of Germany", "b": "same positive", "c": "no answers"}
    relevant, answers = {"a": ["0"], "b": ["0"], "c": ["2"]}, {"a": ["Berlin"], "b": ["Switzerland"]}
    corpus.add_split("train", queries, relevant, answers)
    return corpus


def test_targets_with_an_answer_are_no_negatives(questions):
    check = AnswerCheck(questions)
    rows = torch.tensor([[1, 2, 3, -1], [0, 1, 3, 2]])
    found = check(torch.tensor([0, 2]), rows, torch.tensor([UNKNOWN, UNKNOWN]))
    # Row 0 answers a and b: an answer of either counts. "Berliner" is another word; c has no answers.
    assert found.tolist() == [[True, True, False, False], [False] * 4]
    # Keys tell a from b, though they share their positive, and both from a query of which nothing is known.
    keys = torch.from_numpy(query_keys(["capital of Germany", "same positive", "never asked"]))
    found = check(torch.tensor([0, 0, 0]), rows[[0, 0, 0]], keys)
    assert found.tolist() == [[True, False, False, False], [False, True, False, False], [False] * 4]
    plain = Corpus.from_texts(["x"])
    plain.add_split("train", {"q": "x"}, {"q": ["0"]})
    with pytest.raises(InputError, match="No query of split 'train' has answers"):
        AnswerCheck(plain)


def test_a_cross_encoder_is_asked_about_each_pair_once_and_compared_with_the_positive(questions):
    scores = {
        ("capital of Germany", 0): 3.0,
        ("capital of Germany", 1): 2.9,
        ("capital of Germany", 3): -4.0,
        ("same positive", 0): 1.0,
        ("same positive", 1): 0.0,
        ("same positive", 3): 1.5,
        ("no answers", 2): 0.0,
        ("no answers", 1): -0.3,
        ("no answers", 3): -1.0,
    }
    texts = questions.texts(range(4))
    asked = []

    class CrossEncoder:
        def predict(self, pairs, batch_size, show_progress_bar):
            asked.extend(pairs)
            return torch.tensor([[scores[query, texts.index(text)]] for query, text in pairs])

    labels, rows = torch.tensor([0, 0, 2]), torch.tensor([[1, 3, -1], [1, 3, -1], [1, 3, 3]])
    keys = torch.from_numpy(query_keys(["capital of Germany", "same positive", "no answers"]))
    check = CrossEncoderCheck(questions, CrossEncoder(), margin=0.2)
    expected = [[True, False, False], [False, True, False], [False, False, False]]
    assert check(labels, rows, keys).tolist() == expected
    assert len(asked) == len(set(asked)) == len(scores)
    asked.clear()
    assert check(labels, rows, keys).tolist() == expected
    assert not asked, "what was asked once is remembered, positives and candidates"
    strict = CrossEncoderCheck(questions, CrossEncoder(), margin=0.5)
    assert strict(labels[2:], rows[2:], keys[2:]).tolist() == [[True, False, False]]
    unknown = torch.from_numpy(query_keys(["never asked"]))
    assert not check(labels[:1], rows[:1], unknown).any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_negatives": -1}, "num_negatives must not be negative, got -1"),
        ({"num_negatives": 4, "candidates": 4}, "there must be more, got 4"),
        ({"num_negatives": 4, "sampler": "hard"}, "sampler 'hard' is not one of"),
        (
            {"num_negatives": 4, "sampler": "gumbel", "false_negatives": FalseNegativeFilter(range_min=2)},
            "set range_max as well",
        ),
        (
            {"num_negatives": 4, "false_negatives": FalseNegativeFilter(range_min=2, range_max=5)},
            "there must be room for the 4 negatives of each query",
        ),
        (
            {"num_negatives": 4, "candidates": 9, "false_negatives": FalseNegativeFilter(range_max=8)},
            "there must be room for the 9 candidates",
        ),
        ({"num_negatives": 4, "scale": 0.0}, "scale must be positive"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        NegativeSettings(**settings)
