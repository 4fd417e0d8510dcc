"""A corrector that warms up: what chooses until then, for how many steps, and what a refresh and a resumption keep."""

import pytest
import torch
from conftest import make_static_model
from support.runs import trainer_of

from st_corrector import CorrectedMultipleNegativesLoss, EmbeddingCache, Shortlist, ShortlistSearch
from st_corrector.reporting.record import RunRecord
from st_corrector.search.exact import CorrectedSearch
from st_corrector.search.topk import NO_ROW
from st_corrector.training.checkpoint import load_losses, save_losses

STEPS, BATCH, WARMUP = 9, 8, 4
SHORTLISTS = {"none": None, "exact": Shortlist(size=40), "copied": Shortlist(size=40, every=2)}


class Run:
    """Steps of a loss by hand: what each has taken from the corpus, and by which scores."""

    def __init__(self, corpus, cache, **settings):
        self.model, self.corpus = make_static_model(), corpus
        self.loss = CorrectedMultipleNegativesLoss(self.model, corpus, cache, num_negatives=3, **settings)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.5)
        self.taken, self.ages = {}, {}

    def go(self, first, last, refresh_every=None):
        for step in range(first, last):
            if refresh_every and step and step % refresh_every == 0:
                self.loss.corrected.refresh()
            self.step(step)
        return self

    def step(self, step):
        taken = []
        select, self.loss.select = self.loss.select, lambda *inputs: taken.append(select(*inputs)) or taken[-1]
        start = BATCH * step % len(self.corpus)
        pairs = self.corpus.pairs("train")[list(range(start, start + BATCH))]
        features = [self.model.preprocess(pairs[column]) for column in ("anchor", "positive")]
        sum(self.loss(features, torch.tensor(pairs["label"])).values()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.loss.select = select
        self.taken[step] = taken[0].rows if taken else None
        self.ages[step] = self.loss.pop_metrics().get("age")


@pytest.fixture
def cache(corpus, tmp_path):
    return EmbeddingCache.build(make_static_model(), corpus, tmp_path / "cache", progress=False)


CASES = [
    *((0, "stale", None), (0, "stale", 3), (WARMUP, "stale", None), (WARMUP, "stale", 3), (WARMUP, "stale", 2)),
    *((WARMUP, "in-batch", None), (WARMUP, "in-batch", 3), (WARMUP, "in-batch", 2)),
]


@pytest.mark.parametrize(
    ("shortlist", "warmup", "negatives", "refresh_every"),
    [
        pytest.param(shortlist, *case, marks=pytest.mark.long if shortlist != "none" and case[2] != 3 else ())
        for shortlist in SHORTLISTS
        for case in CASES
    ],
)
def test_warming_up_ends_once_whatever_is_refreshed_or_resumed(
    corpus, cache, tmp_path, shortlist, warmup, negatives, refresh_every
):
    settings = {"shortlist": SHORTLISTS[shortlist], "warmup_steps": warmup, "warmup_negatives": negatives}
    whole = Run(corpus, cache, **settings).go(0, STEPS, refresh_every)
    for step, rows in whole.taken.items():
        assert (rows is None) == (negatives == "in-batch" and step < warmup), step
        assert rows is None or ((rows != NO_ROW).all() and rows.shape == (BATCH, 3))
    assert whole.loss.corrected.steps == STEPS
    assert whole.loss.corrected.search.steps == (STEPS if refresh_every is None else (STEPS - 1) % refresh_every + 1)
    for step, age in whole.ages.items():
        since = step if refresh_every is None else step % refresh_every
        assert age is None or 0 <= age <= since, "as old as the cache at most"
    for resumed_at in (2, 4, 6) if shortlist == "none" else (4,):
        first = Run(corpus, cache, **settings).go(0, resumed_at, refresh_every)
        save_losses({"loss": first.loss}, tmp_path / str(resumed_at))
        second = Run(corpus, cache, **settings)
        second.model.load_state_dict(first.model.state_dict())
        load_losses({"loss": second.loss}, tmp_path / str(resumed_at))
        assert second.loss.corrected.steps == resumed_at
        # Embeddings that a refresh has made are in no checkpoint: they are made anew, and no older than that.
        refreshed = refresh_every is not None and resumed_at > refresh_every
        assert second.loss.corrected.search.steps == (0 if refreshed else first.loss.corrected.search.steps)
        assert second.loss.corrected.refreshed == refreshed
        if refreshed:
            rows = range(len(corpus))
            now = second.model.encode_document(corpus.texts(rows), convert_to_tensor=True).cpu()
            assert torch.allclose(second.loss.corrected.cache[rows], now, atol=1e-5)
            assert not torch.allclose(now, cache[rows], atol=1e-2)
        second.go(resumed_at, STEPS, refresh_every)
        assert [rows is None for rows in second.taken.values()] == [whole.taken[step] is None for step in second.taken]
        # As is a copy of them that a shortlist has corrected: it may suggest others then.
        if shortlist == "copied" or (refreshed and resumed_at % refresh_every):
            continue
        for step, rows in second.taken.items():
            assert rows is None or torch.equal(rows, whole.taken[step]), (resumed_at, step)
        assert second.loss.targets_encoded == whole.loss.targets_encoded


def test_the_stale_cache_chooses_while_the_corrector_learns(corpus, cache):
    warming, chosen_by = Run(corpus, cache, corrector="ridge", warmup_steps=WARMUP), []
    for step in range(STEPS):
        chosen_by.append(warming.loss.corrected.choosing_corrector.name)
        warming.go(step, step + 1)
    assert chosen_by == ["identity"] * WARMUP + ["ridge"] * (STEPS - WARMUP)
    stale = Run(corpus, cache, corrector="identity").go(0, STEPS)
    at_once = Run(corpus, cache, corrector="ridge").go(0, STEPS)
    # Later ones differ in what was written back, which is kept as what the corrector maps to it.
    assert torch.equal(warming.taken[0], stale.taken[0])
    assert any(not torch.equal(warming.taken[step], at_once.taken[step]) for step in range(1, WARMUP))
    assert warming.loss.corrected.corrector.name == "ridge" and warming.loss.corrected.corrector.weight.abs().max() > 0


@pytest.mark.parametrize("shortlist", SHORTLISTS)
def test_one_search_serves_before_and_after(corpus, cache, monkeypatch, shortlist):
    """What it has found out of the cache, its index and its memory are not made anew at every step."""
    run = Run(corpus, cache, shortlist=SHORTLISTS[shortlist], warmup_steps=WARMUP)
    searched, made = [], []
    monkeypatch.setattr(CorrectedSearch, "choosing_by", _noting(searched, CorrectedSearch.choosing_by), raising=True)
    monkeypatch.setattr(ShortlistSearch, "_make_source", _noting(made, ShortlistSearch._make_source))
    run.go(0, WARMUP + 2)
    assert searched == [run.loss.corrected.search] * (WARMUP + 2)
    # Copies: at steps 0 and 2 of the stale vectors, at 4 by the corrector.
    assert len(made) == (3 if shortlist == "copied" else 0)


def _noting(seen, method):
    def noted(self, *inputs, **settings):
        seen.append(self)
        return method(self, *inputs, **settings)

    return noted


@pytest.mark.parametrize("negatives", ["stale", "in-batch"])
def test_the_record_shows_what_chooses_now(corpus, tmp_path, negatives):
    settings = {"corrector": "ridge", "corrector_warmup_steps": 3, "corrector_warmup_negatives": negatives}
    trainer = trainer_of(corpus, tmp_path, max_steps=6, **settings)
    (loss,) = trainer._corrected_losses().values()
    texts = [corpus.qrels("train").queries["text"][n] for n in trainer.recorder._queries[""]]
    rows = [corpus.qrels("train").queries["text"][:].index(text) for text in texts]
    early = loss.select(loss.encode_queries(texts), torch.tensor(rows)[:, None]).rows
    trainer.train()
    for number, example in enumerate(RunRecord.load(tmp_path).losses[""].examples):
        first, last = example.choices
        taken = [int(each.id) for each in first.negatives]
        assert taken == ([] if negatives == "in-batch" else early[number].tolist())
        assert len(last.negatives) == 4


def test_a_resumed_trainer_goes_on_where_it_was(corpus, tmp_path):
    """Saved while warming up, after it, and right before a refresh."""
    settings = {"max_steps": 8, "corrector_warmup_steps": 3, "corrector_warmup_negatives": "in-batch"}
    settings |= {"refresh_every": 4, "save_steps": 2}
    whole = trainer_of(corpus, tmp_path, **settings)
    whole.train()
    expected = {name: value.clone() for name, value in whole.model.state_dict().items()}
    for step, exact in ((2, True), (4, True), (6, False)):  # after a refresh, what it has made is made anew
        resumed = trainer_of(corpus, tmp_path / str(step), **settings)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        (ours,), (theirs,) = (trainer._corrected_losses().values() for trainer in (whole, resumed))
        assert theirs.corrected.steps == ours.corrected.steps == 8
        assert theirs.corrected.refreshed
        if exact:
            assert all(torch.equal(value, expected[name]) for name, value in resumed.model.state_dict().items())


def test_a_run_that_has_diverged_goes_on_counting(corpus, cache, tmp_path):
    run = Run(corpus, cache, warmup_steps=2).go(0, 3)
    run.loss.corrected.restart(diverged=True)
    run.go(3, 5)
    save_losses({"loss": run.loss}, tmp_path / "checkpoint")
    again = Run(corpus, cache, warmup_steps=2)
    load_losses({"loss": again.loss}, tmp_path / "checkpoint")
    assert again.loss.corrected.diverged and again.loss.corrected.steps == again.loss.corrected.search.steps == 5
    assert all(rows is not None for rows in run.taken.values())
