import math

import numpy as np
import pytest
import torch
from conftest import make_bert_model, make_static_model, make_texts
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.base.modules import Router
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.util import cos_sim, dot_score
from support.batches import batch_of
from support.states import same, weights

from st_corrector import (
    Check,
    Corpus,
    CorrectedMultipleNegativesLoss,
    EmbeddingCache,
    FalseNegativeFilter,
    IdentityCorrector,
    InputError,
    MLPCorrector,
    RefreshCallback,
    RidgeCorrector,
)
from st_corrector.losses import multiple_negatives as corrected

CORRECTORS = ["identity", "mlp", "ridge"]


@pytest.fixture
def cache(static_model, corpus, tmp_path):
    return EmbeddingCache.build(static_model, corpus, tmp_path / "cache", progress=False)


def corrector_state(loss):
    return loss.corrected.corrector.state_dict()


# ---------------------------------------------------------------------- what is computed


def test_the_task_loss_is_the_cross_entropy_over_positives_and_the_union(static_model, corpus, cache):
    loss = CorrectedMultipleNegativesLoss(static_model, corpus, cache, num_negatives=3, corrector="identity", scale=7.0)
    features, labels = batch_of(static_model, corpus, [4, 8, 15, 16])
    value = loss(features, labels)["task_loss"]
    queries = static_model.encode(corpus.pairs("train")[[4, 8, 15, 16]]["anchor"], convert_to_tensor=True)
    fresh = static_model.encode(corpus.texts(range(200)), convert_to_tensor=True)
    scores = queries @ fresh.T
    union = set(labels.tolist())
    for query, label in enumerate(labels.tolist()):
        union |= {row for row in scores[query].argsort(descending=True).tolist() if row != label} and set(
            [row for row in scores[query].argsort(descending=True).tolist() if row != label][:3]
        )
    columns = sorted(union)
    expected = torch.stack(
        [
            -(7 * scores[query, columns]).log_softmax(-1)[columns.index(label)]
            for query, label in enumerate(labels.tolist())
        ]
    ).mean()
    assert len(columns) > 8, "there are negatives beside the batch"
    torch.testing.assert_close(value, expected)
    assert loss.targets_encoded == len(columns)


def test_without_negatives_it_is_sentence_transformers_own_loss(static_model, corpus):
    features, labels = batch_of(static_model, corpus, range(20))
    ours = CorrectedMultipleNegativesLoss(static_model, corpus, num_negatives=0)(features, labels)
    theirs = MultipleNegativesRankingLoss(static_model)(features, None)
    assert ours.keys() == {"task_loss"}
    torch.testing.assert_close(ours["task_loss"], theirs)


def test_dot_product_and_unnormalised_encoders(corpus, tmp_path):
    model = SentenceTransformer(modules=list(make_static_model())[:-1], device="cpu")
    cache = EmbeddingCache.build(model, corpus, tmp_path / "cache", progress=False)
    norms = cache[range(200)].norm(dim=-1)
    assert norms.std() > 0.1, "an encoder whose embeddings have different lengths"
    features, labels = batch_of(model, corpus, [0, 1, 2, 3])
    queries = model(dict(features[0]))["sentence_embedding"].detach()
    exclude = torch.full((4, 1), -1)
    for similarity, normalize in ((dot_score, False), (cos_sim, True)):
        loss = CorrectedMultipleNegativesLoss(
            model, corpus, cache, num_negatives=5, corrector="ridge", similarity_fct=similarity, scale=2.0
        )
        assert loss.corrected.corrector.normalize is normalize
        expected = similarity(queries, cache[range(200)]).topk(5).indices.unique()
        assert torch.equal(loss.select(queries, exclude).rows.unique(), expected)
        columns = torch.cat([labels, loss.select(queries, labels[:, None]).rows.flatten()]).unique()
        logits = 2 * similarity(queries, cache[columns])
        task_loss = torch.nn.functional.cross_entropy(logits, torch.searchsorted(columns, labels))
        torch.testing.assert_close(loss(features, labels)["task_loss"].detach(), task_loss)
    with pytest.raises(InputError, match="make it with normalize=False"):
        CorrectedMultipleNegativesLoss(model, corpus, cache, corrector=RidgeCorrector(24), similarity_fct=dot_score)


def test_in_batch_negatives_can_be_left_out(static_model, corpus, cache):
    features, labels = batch_of(static_model, corpus, range(12))
    alone = CorrectedMultipleNegativesLoss(
        static_model, corpus, cache, num_negatives=1, corrector="identity", in_batch_negatives=False
    )
    queries = static_model(dict(features[0]))["sentence_embedding"]
    selected = alone.select(queries, labels[:, None]).rows.unique()
    columns = torch.cat([labels, selected])
    allowed = torch.isin(columns, selected)[None, :] & (columns[None, :] != labels[:, None])
    allowed[:, :12] &= ~torch.eye(12, dtype=torch.bool)
    seen = set(columns[allowed.any(0)].tolist())
    assert seen == set(selected.tolist()) and len(seen) < 12 * 2
    scores = 20 * queries @ static_model(alone.encoder.features(range(200)))["sentence_embedding"].T
    expected = []
    for query, label in enumerate(labels.tolist()):
        candidates = [label, *[row for row in selected.tolist() if row != label]]
        expected.append(-scores[query, candidates].log_softmax(-1)[0])
    torch.testing.assert_close(alone(features, labels)["task_loss"], torch.stack(expected).mean())


@pytest.mark.parametrize("corrector", CORRECTORS)
def test_the_first_step_is_the_stale_baseline_with_any_corrector(static_model, corpus, cache, corrector):
    features, labels = batch_of(static_model, corpus, range(10, 20))
    queries = static_model(dict(features[0]))["sentence_embedding"]
    stale = CorrectedMultipleNegativesLoss(static_model, corpus, cache, num_negatives=4, corrector="identity")
    loss = CorrectedMultipleNegativesLoss(static_model, corpus, cache, num_negatives=4, corrector=corrector)
    assert torch.equal(loss.select(queries, labels[:, None]).rows, stale.select(queries, labels[:, None]).rows)
    assert torch.equal(loss(features, labels)["task_loss"], stale(features, labels)["task_loss"])


# ---------------------------------------------------------------------- two losses, two parameter sets


@pytest.mark.parametrize("corrector", ["mlp", "ridge"])
def test_the_losses_reach_only_their_own_parameters(static_model, corpus, cache, corrector):
    loss = CorrectedMultipleNegativesLoss(static_model, corpus, cache, num_negatives=4, corrector=corrector)
    with torch.no_grad():  # drift, so that there is something to correct
        static_model[1].linear.weight += 0.1 * torch.randn_like(static_model[1].linear.weight)
    features, labels = batch_of(static_model, corpus, range(16))
    encoder, before = weights(static_model), corrector_state(loss)
    parts = loss(features, labels)
    assert not same(corrector_state(loss), before), "the correction loss moved the corrector"
    assert same(weights(static_model), encoder) and all(p.grad is None for p in static_model.parameters())
    assert not parts["correction_loss"].requires_grad and parts["correction_loss"] > 0
    learnt = corrector_state(loss)
    parts["task_loss"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in static_model.parameters())
    assert same(corrector_state(loss), learnt), "the task loss did not"


def test_the_encoders_gradient_is_the_task_losss_alone(static_model, corpus, cache):
    features, labels = batch_of(static_model, corpus, range(16))
    gradients = []
    for corrector in ("identity", "mlp"):
        loss = CorrectedMultipleNegativesLoss(static_model, corpus, cache, num_negatives=4, corrector=corrector)
        sum(loss(features, labels).values()).backward()
        gradients.append({name: p.grad.clone() for name, p in static_model.named_parameters()})
        static_model.zero_grad()
    assert same(*gradients)


@pytest.mark.parametrize("corrector", ["mlp", "ridge"])
def test_the_trainers_optimizer_does_not_know_the_corrector(static_model, corpus, cache, tmp_path, corrector):
    loss = CorrectedMultipleNegativesLoss(static_model, corpus, cache, corrector=corrector)
    assert {id(p) for p in loss.parameters()} == {id(p) for p in static_model.parameters()}
    assert not set(dict(loss.named_buffers())) - {f"model.{name}" for name, _ in static_model.named_buffers()}


def test_the_corrector_learns_from_each_row_s_own_pair(static_model, tmp_path, monkeypatch):
    """Stale and fresh embeddings of the same rows, each row once, and the step's queries."""
    queries, texts = make_texts(60)
    corpus = Corpus.from_texts(texts)
    relevant = {str(q): [str(q)] for q in range(60)} | {"1": ["0"]}  # queries 0 and 1 share target 0
    corpus.add_split("train", {str(q): text for q, text in enumerate(queries)}, relevant)
    cache = EmbeddingCache.build(static_model, corpus, tmp_path / "cache", progress=False)
    loss = CorrectedMultipleNegativesLoss(static_model, corpus, cache, num_negatives=3, corrector="ridge", scale=7.0)
    with torch.no_grad():
        static_model[1].linear.weight += 0.1 * torch.randn_like(static_model[1].linear.weight)
    stale, fresh = cache[range(60)], static_model.encode(texts, convert_to_tensor=True)
    assert not torch.allclose(stale, fresh, atol=0.01)
    seen = {}
    original = loss.corrected.corrector.fit_step
    monkeypatch.setattr(loss.corrected.corrector, "fit_step", lambda *a, **k: seen.update(args=a) or original(*a, **k))
    features, labels = batch_of(static_model, corpus, range(8))
    assert labels.tolist()[:2] == [0, 0]
    loss(features, labels)
    got_stale, got_fresh, got_queries, got_scale = seen["args"]
    rows = (got_stale @ stale.T).argmax(1)
    assert len(set(rows.tolist())) == len(rows) > 7 and set(labels.tolist()) <= set(rows.tolist())
    torch.testing.assert_close(got_stale, stale[rows])
    torch.testing.assert_close(got_fresh, fresh[rows])
    torch.testing.assert_close(got_queries, static_model.encode(queries[:8], convert_to_tensor=True))
    assert got_scale == 7.0 and not got_fresh.requires_grad and not got_queries.requires_grad


def test_write_back_puts_what_was_encoded_into_the_stale_frame(static_model, corpus, cache):
    def step(loss):
        features, labels = batch_of(static_model, corpus, range(16))
        loss(features, labels)
        return labels

    with torch.no_grad():
        static_model[1].linear.weight += 0.1 * torch.randn_like(static_model[1].linear.weight)
    fresh = static_model.encode(corpus.texts(range(200)), convert_to_tensor=True)
    for corrector in CORRECTORS:
        loss = CorrectedMultipleNegativesLoss(
            static_model, corpus, cache, num_negatives=4, corrector=corrector, write_back=True
        )
        labels = step(loss)
        written = loss.corrected.search.overlay.rows
        assert len(written) == loss.targets_encoded and set(labels.tolist()) <= set(written.tolist()) < set(range(200))
        everything = torch.arange(200)
        corrected = loss.corrected.corrector(loss.corrected.search.stale(everything))
        torch.testing.assert_close(corrected[written], fresh[written], atol=1e-5, rtol=0)
        untouched = torch.tensor(sorted(set(range(200)) - set(written.tolist())))
        torch.testing.assert_close(loss.corrected.search.stale(untouched), cache[untouched])
        # A search sees written rows as they are now, the others as they are corrected.
        queries = torch.nn.functional.normalize(torch.randn(3, 24), dim=-1)
        _, rows, _ = loss.corrected.search.search(queries, 200)
        torch.testing.assert_close(
            (queries @ corrected.T).gather(1, rows), (queries @ corrected.T).sort(descending=True).values
        )
    for settings, written in (({}, True), ({"write_back": False}, False)):
        loss = CorrectedMultipleNegativesLoss(static_model, corpus, cache, num_negatives=4, **settings)
        step(loss)
        assert bool(len(loss.corrected.search.overlay)) is written, "on by default"


def test_gumbel_sampling_draws_anew_at_every_step(static_model, corpus, cache):
    def selected(scale, seed):
        loss = CorrectedMultipleNegativesLoss(
            static_model, corpus, cache, num_negatives=4, corrector="identity", sampler="gumbel", scale=scale
        )
        torch.manual_seed(seed)
        return [loss.select(queries, labels[:, None]).rows.unique() for _ in range(12)]

    features, labels = batch_of(static_model, corpus, range(16))
    queries = static_model(dict(features[0]))["sentence_embedding"]
    flat, peaked = selected(1e-3, 0), selected(1e3, 0)
    assert not torch.equal(flat[0], flat[1]), "two steps draw differently"
    assert all(torch.equal(*pair) for pair in zip(flat, selected(1e-3, 0), strict=True)), "the same seed draws the same"
    assert not torch.equal(flat[0], selected(1e-3, 1)[0])
    hardest = CorrectedMultipleNegativesLoss(static_model, corpus, cache, num_negatives=4, corrector="identity")
    assert torch.equal(peaked[0], hardest.select(queries, labels[:, None]).rows.unique()), (
        "a very high scale leaves no chance"
    )
    assert len(torch.cat(flat).unique()) > 190, "a very low one leaves out nobody"


# ---------------------------------------------------------------------- known positives


class Recorder:
    """Keeps which candidates each query saw, at the point where the cross-entropy is taken."""

    def __init__(self, loss, monkeypatch):
        self.seen = []
        original_candidates, original_loss = corrected.candidates_of, loss.calculate_loss

        def candidates(batch, negatives, *args):
            self.columns = torch.cat([batch.rows, negatives])
            return original_candidates(batch, negatives, *args)

        def calculate_loss(reps, labels, **settings):
            assert sum(len(torch.cat(pieces)) for pieces in reps[1:]) == len(self.columns)
            assert labels.forbidden.shape == (len(torch.cat(reps[0])), len(self.columns))
            for target, row in zip(labels.target, labels.forbidden, strict=True):
                self.seen.append((int(self.columns[target]), self.columns[~row].tolist()))
            return original_loss(reps, labels, **settings)

        monkeypatch.setattr(corrected, "candidates_of", candidates)
        monkeypatch.setattr(loss, "calculate_loss", calculate_loss)


@pytest.mark.parametrize("sampler", ["top_k", "gumbel"])
def test_a_known_positive_or_its_duplicate_is_never_a_negative(static_model, tmp_path, monkeypatch, sampler):
    queries, texts = make_texts(60)
    # Rows 60 … 79 repeat texts 0 … 19; query q is answered by q and q + 1, and queries 0 and 30 share row 31.
    corpus = Corpus.from_texts(texts + texts[:20])
    relevant = {str(q): {q, (q + 1) % 60} for q in range(60)}
    relevant["0"].add(31)
    corpus.add_split(
        "train",
        {str(q): text for q, text in enumerate(queries)},
        {q: sorted(map(str, rows)) for q, rows in relevant.items()},
    )
    cache = EmbeddingCache.build(static_model, corpus, tmp_path / "cache", progress=False)
    loss = CorrectedMultipleNegativesLoss(
        static_model, corpus, cache, num_negatives=30, corrector="mlp", sampler=sampler
    )
    recorder = Recorder(loss, monkeypatch)
    pairs = corpus.pairs("train")
    known = {}
    for pair, (label, _) in enumerate(pairs["label"][:]):
        own = [q for q in range(60) if queries[q] == pairs[pair]["anchor"]]
        rows = set().union(*(relevant[str(q)] for q in own))
        known[pair] = rows | {row + 60 for row in rows if row < 20} | {label}
    order = np.random.default_rng(0).permutation(len(pairs))
    for batch in np.array_split(order, 6):
        features, labels = batch_of(static_model, corpus, batch)
        start = len(recorder.seen)
        loss(features, labels)
        for pair, (label, seen) in zip(batch, recorder.seen[start:], strict=True):
            assert seen[0] == label or label in seen
            assert seen.count(label) == 1
            assert not (set(seen) - {label}) & known[int(pair)]
            assert len(set(seen)) == len(seen), "no candidate counts twice"
            assert len(seen) > 20, "and there are negatives"


# ---------------------------------------------------------------------- verification and false negatives


def test_verification_keeps_the_hardest_by_fresh_score(static_model, corpus, cache, monkeypatch):
    with torch.no_grad():
        static_model[1].linear.weight += 0.15 * torch.randn_like(static_model[1].linear.weight)
    features, labels = batch_of(static_model, corpus, range(16))
    loss = CorrectedMultipleNegativesLoss(
        static_model, corpus, cache, num_negatives=4, corrector="ridge", candidates=20, write_back=True
    )
    stale = CorrectedMultipleNegativesLoss(static_model, corpus, cache, num_negatives=20, corrector="identity")
    queries = static_model.encode(corpus.pairs("train")[:16]["anchor"], convert_to_tensor=True)
    fresh = static_model.encode(corpus.texts(range(200)), convert_to_tensor=True)
    offered = stale.select(queries, labels[:, None]).rows
    scores = (queries @ fresh.T).gather(1, offered)
    expected = offered.gather(1, scores.topk(4).indices)
    selection = loss.select(queries, labels[:, None])
    assert torch.equal(selection.rows, expected)
    assert not torch.equal(selection.rows, offered[:, :4]), "which are others than the hardest by stale score"
    assert torch.equal(selection.verified_rows, offered.unique())
    torch.testing.assert_close(selection.verified, fresh[offered.unique()])
    loss(features, labels)
    assert loss.targets_verified == 2 * len(offered.unique()), "counted at both calls"
    assert loss.targets_encoded == len(torch.cat([labels, expected.flatten()]).unique())
    written = set(loss.corrected.search.overlay.rows.tolist())
    assert written == set(offered.flatten().tolist()) | set(labels.tolist()), "what was verified is written back too"
    static_model.train()
    loss.select(queries, labels[:, None])
    assert static_model.training


@pytest.mark.parametrize("candidates", [None, 60])
def test_too_similar_targets_are_no_negatives(static_model, corpus, cache, monkeypatch, candidates):
    features, labels = batch_of(static_model, corpus, range(32))
    queries = static_model.encode(corpus.pairs("train")[:32]["anchor"], convert_to_tensor=True)
    fresh = static_model.encode(corpus.texts(range(200)), convert_to_tensor=True)
    scores = queries @ fresh.T
    positive = scores[torch.arange(32), labels]
    rules = FalseNegativeFilter(max_score=0.4, absolute_margin=0.05)
    ceiling = torch.minimum(positive - 0.05, torch.tensor(0.4))
    loss = CorrectedMultipleNegativesLoss(
        static_model, corpus, cache, num_negatives=4, corrector="identity", candidates=candidates, false_negatives=rules
    )
    recorder = Recorder(loss, monkeypatch)
    allowed = scores.clone()
    allowed[torch.arange(32), labels] = -torch.inf
    allowed[allowed > ceiling[:, None]] = -torch.inf
    selection = loss.select(queries, labels[:, None], positive)
    hardest = allowed.topk(4)
    assert torch.equal(selection.rows, hardest.indices.masked_fill(hardest.values == -torch.inf, -1))
    assert (scores.topk(5).values[:, 1:] > ceiling[:, None]).any(), "the rules keep something out"
    loss(features, labels)
    masked = []

    def cross_entropy(logits, target):
        masked.append(logits == -torch.inf)
        return logits.masked_fill(masked[-1], 0.0).sum() * 0

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", cross_entropy)
    loss(features, labels)
    columns = recorder.columns
    too_similar = scores[:, columns] > ceiling[:, None]
    own = torch.eye(32, len(columns), dtype=torch.bool)
    assert torch.equal(masked[0], (too_similar | (columns[None] == labels[:, None])) & ~own)


def test_negatives_can_be_kept_to_the_query_that_took_them(static_model, corpus, cache, monkeypatch):
    features, labels = batch_of(static_model, corpus, range(12))
    queries = static_model.encode(corpus.pairs("train")[:12]["anchor"], convert_to_tensor=True)
    for in_batch in (True, False):
        loss = CorrectedMultipleNegativesLoss(
            static_model, corpus, cache, num_negatives=5, share_negatives=False, in_batch_negatives=in_batch
        )
        recorder = Recorder(loss, monkeypatch)
        own = loss.select(queries, labels[:, None]).rows
        loss(features, labels)
        for query, (label, seen) in enumerate(recorder.seen):
            others = set(labels.tolist()) if in_batch else set()
            assert set(seen) == set(own[query].tolist()) | others | {label}
    assert len(own.unique()) > 5 * 2, "queries take different ones"


def test_a_check_keeps_its_finds_out_of_the_softmax(static_model, corpus, cache, monkeypatch):
    """Whoever took them: the query's own, those of other queries, and other queries' positives."""

    class Third(Check):
        name = "third"

        def __init__(self, everywhere):
            self.everywhere = everywhere

        def __call__(self, labels, rows, queries):
            return (rows % 3 == 0) & (labels[:, None] % 2 == 0)

    features, labels = batch_of(static_model, corpus, range(10))
    for everywhere in (True, False):
        rules = FalseNegativeFilter(checks=(Third(everywhere),))
        assert "checks=(Third(),)" in repr(rules), "it goes into the model card"
        loss = CorrectedMultipleNegativesLoss(static_model, corpus, cache, num_negatives=6, false_negatives=rules)
        recorder = Recorder(loss, monkeypatch)
        queries = static_model.encode(corpus.pairs("train")[:10]["anchor"], convert_to_tensor=True)
        selection = loss.select(queries, labels[:, None], labels=labels)
        found = [{row for row in rows if row >= 0} for rows in selection.false_negatives.tolist()]
        assert not any(found[query] for query in range(1, 10, 2)) and all(found[query] for query in range(0, 10, 2))
        loss(features, labels)
        met = 0
        for query, (label, seen) in enumerate(recorder.seen):
            thirds = {row for row in seen if row % 3 == 0} - {label}
            if everywhere and label % 2 == 0:
                assert not thirds
            else:
                assert not thirds & found[query]
                met += len(thirds)
        assert met > 5, "they are negatives of the other queries"


def test_evaluation_has_in_batch_negatives_even_where_training_has_none(static_model, corpus, cache):
    features, labels = batch_of(static_model, corpus, range(12))
    loss = CorrectedMultipleNegativesLoss(static_model, corpus, cache, num_negatives=2, in_batch_negatives=False)
    with torch.no_grad():
        value = loss(features, labels)["task_loss"]
        torch.testing.assert_close(value, MultipleNegativesRankingLoss(static_model)(features, None))
    assert value > 0.01


def test_the_hardest_can_be_left_out(static_model, corpus, cache):
    queries = static_model.encode(corpus.pairs("train")[:8]["anchor"], convert_to_tensor=True)
    exclude = torch.full((8, 1), -1)
    rules = FalseNegativeFilter(range_min=3)
    all_rows = (
        CorrectedMultipleNegativesLoss(static_model, corpus, cache, num_negatives=7).select(queries, exclude).rows
    )
    for candidates in (None, 30):
        loss = CorrectedMultipleNegativesLoss(
            static_model, corpus, cache, num_negatives=4, false_negatives=rules, candidates=candidates
        )
        assert torch.equal(loss.select(queries, exclude).rows, all_rows[:, 3:])


def test_what_the_rank_window_leaves_out_does_not_come_back_by_another_query(static_model, corpus, cache, monkeypatch):
    features, labels = batch_of(static_model, corpus, range(32))
    queries = static_model.encode(corpus.pairs("train")[:32]["anchor"], convert_to_tensor=True)
    rules = FalseNegativeFilter(range_min=3)
    loss = CorrectedMultipleNegativesLoss(static_model, corpus, cache, num_negatives=4, false_negatives=rules)
    recorder = Recorder(loss, monkeypatch)
    selection = loss.select(queries, labels[:, None])
    left_out = selection.false_negatives.tolist()
    assert selection.removed == {"range_min": 32 * 3}
    loss(features, labels)
    assert any(set(rows) & set(selection.rows.flatten().tolist()) for rows in left_out), "others have taken them"
    for rows, (label, seen) in zip(left_out, recorder.seen, strict=True):
        assert len(rows) == 3 and not set(rows) & (set(seen) - {label})


def test_rules_hold_among_in_batch_negatives_alone(static_model, corpus):
    features, labels = batch_of(static_model, corpus, range(20))
    plain = CorrectedMultipleNegativesLoss(static_model, corpus, num_negatives=0)(features, labels)["task_loss"]
    rules = FalseNegativeFilter(max_score=-1.0)
    loss = CorrectedMultipleNegativesLoss(static_model, corpus, num_negatives=0, false_negatives=rules)
    assert plain > 0.1 and loss(features, labels)["task_loss"] < 1e-6, "no negative may score above -1"


def test_rules_that_need_the_positives_are_not_guessed(static_model, corpus, cache):
    queries = static_model.encode(corpus.pairs("train")[:2]["anchor"], convert_to_tensor=True)
    exclude = torch.full((2, 1), -1)

    class Never(Check):
        name, everywhere = "never", False

        def __call__(self, labels, rows, queries):
            return rows < -1

    def loss(**settings):
        return CorrectedMultipleNegativesLoss(static_model, corpus, cache, num_negatives=2, **settings)

    with pytest.raises(InputError, match="pass positive_scores"):
        loss(false_negatives=FalseNegativeFilter(absolute_margin=0.1)).select(queries, exclude)
    with pytest.raises(InputError, match="pass labels"):
        loss(false_negatives=FalseNegativeFilter(checks=(Never(),))).select(queries, exclude)
    check = Never()
    check.split = "dev"
    with pytest.raises(InputError, match="knows the queries of split 'dev', the loss is trained on 'train'"):
        loss(false_negatives=FalseNegativeFilter(checks=(check,)))


def test_margins_are_those_of_the_papers():
    positive = torch.tensor([0.8, 0.5, -0.2])
    assert torch.equal(FalseNegativeFilter().ceiling(positive), torch.full((3,), torch.inf))
    torch.testing.assert_close(FalseNegativeFilter(absolute_margin=0.1).ceiling(positive), positive - 0.1)
    relative = FalseNegativeFilter(relative_margin=0.05).ceiling(positive)
    torch.testing.assert_close(relative, torch.tensor([0.76, 0.475, -0.21]))
    both = FalseNegativeFilter(max_score=0.6, relative_margin=0.05).ceiling(positive)
    torch.testing.assert_close(both, torch.tensor([0.6, 0.475, -0.21]))
    with pytest.raises(InputError, match=r"absolute_margin must not be negative, got -0\.1"):
        FalseNegativeFilter(absolute_margin=-0.1)
    with pytest.raises(InputError, match=r"is a share of the positive's score, e\.g\. 0\.05, got 5"):
        FalseNegativeFilter(relative_margin=5)
    with pytest.raises(InputError, match="checks must be a tuple of checks"):
        FalseNegativeFilter(checks="answers")


# ---------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("sampler", ["top_k", "gumbel"])
def test_evaluation_is_in_batch_and_changes_nothing(static_model, corpus, cache, sampler):
    loss = CorrectedMultipleNegativesLoss(static_model, corpus, cache, num_negatives=4, sampler=sampler)
    features, labels = batch_of(static_model, corpus, range(10))
    loss(features, labels)  # so that the corrector has a state
    before = corrector_state(loss), weights(static_model), loss.targets_encoded, torch.get_rng_state()
    with torch.no_grad():
        value = loss(features, labels)
        unlabelled = loss(features, None)
    assert same(corrector_state(loss), before[0]) and same(weights(static_model), before[1])
    assert loss.targets_encoded == before[2] and torch.equal(torch.get_rng_state(), before[3])
    expected = MultipleNegativesRankingLoss(static_model)(features, None)
    assert value.keys() == {"task_loss"} == unlabelled.keys()
    torch.testing.assert_close(value["task_loss"], expected)
    torch.testing.assert_close(unlabelled["task_loss"], expected)


def test_evaluation_masks_shared_positives_and_duplicates_too(static_model, tmp_path):
    queries, texts = make_texts(4)
    corpus = Corpus.from_texts([*texts[:3], texts[0]])
    corpus.add_split(
        "train", {str(q): text for q, text in enumerate(queries)}, {"0": ["0"], "1": ["1"], "2": ["1"], "3": ["3"]}
    )
    loss = CorrectedMultipleNegativesLoss(static_model, corpus, num_negatives=0)
    features, labels = batch_of(static_model, corpus, range(4))
    assert labels.tolist() == [0, 1, 1, 3]
    with torch.no_grad():
        value = loss(features, labels)["task_loss"]
    x = static_model.encode(queries, convert_to_tensor=True)
    scores = 20 * x @ static_model.encode(corpus.texts([0, 1]), convert_to_tensor=True).T
    # Which of the targets 0 (row 3 is its duplicate) and 1 (which two queries share) each query sees, its own first.
    seen = {0: [0, 1], 1: [1, 0, 0], 2: [1, 0, 0], 3: [0, 1]}
    expected = [-scores[query, candidates].log_softmax(-1)[0] for query, candidates in seen.items()]
    torch.testing.assert_close(value, torch.stack(expected).mean())


# ---------------------------------------------------------------------- in the plain trainer


def train(model, loss, dataset, tmp_path, callbacks=None, **settings):
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path / "out"),
        per_device_train_batch_size=16,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        **{"max_steps": 25, "learning_rate": 0.05, **settings},
    )
    trainer = SentenceTransformerTrainer(
        model=model, args=arguments, train_dataset=dataset, loss=loss, callbacks=callbacks
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("corrector", ["mlp", "ridge"])
def test_the_plain_trainer_trains_encoder_and_corrector(static_model, corpus, cache, tmp_path, corrector):
    ids = {tuple(static_model.preprocess([text])["input_ids"].tolist()) for text in corpus.texts(range(50))}
    assert len(ids) == 50, "different texts have different token ids"
    loss = CorrectedMultipleNegativesLoss(static_model, corpus, cache, num_negatives=4, corrector=corrector)
    encoder, before = weights(static_model), corrector_state(loss)
    trainer = train(static_model, loss, corpus.pairs("train"), tmp_path)
    moved = {name: not torch.equal(value, encoder[name]) for name, value in weights(static_model).items()}
    assert all(moved.values()), moved
    assert not same(corrector_state(loss), before)
    log = [entry for entry in trainer.state.log_history if "task_loss" in entry]
    assert all("correction_loss" in entry for entry in log), "the trainer logs both losses apart"
    first, last = (np.mean([entry["task_loss"] for entry in part]) for part in (log[:5], log[-5:]))
    assert last < 0.7 * first
    assert loss.targets_encoded > 25 * 16 and loss.corrected.targets_reencoded == 0
    # What was learnt is the way from the cache to the encoder as it is now.
    fresh = loss.encoder.encode(static_model, range(200))
    stale = cache[range(200)]
    assert (1 - (loss.corrected.corrector(stale) * fresh).sum(-1)).mean() < (1 - (stale * fresh).sum(-1)).mean()


def test_a_transformer_trains_too(tmp_path, corpus):
    model = make_bert_model(tmp_path)
    cache = EmbeddingCache.build(model, corpus, tmp_path / "cache", progress=False)
    loss = CorrectedMultipleNegativesLoss(model, corpus, cache, num_negatives=2)
    before = weights(model)
    trainer = train(
        model, loss, corpus.pairs("train"), tmp_path, max_steps=12, learning_rate=2e-3, gradient_accumulation_steps=2
    )
    after = weights(model)
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert len(moved) > 0.8 * len(before), "all but the unused pooler"
    losses = [entry["task_loss"] for entry in trainer.state.log_history if "task_loss" in entry]
    assert losses[-1] < losses[0]


def test_a_router_encodes_negatives_as_documents(corpus, tmp_path):
    query, document = make_static_model(seed=0), make_static_model(seed=1)
    model = SentenceTransformer(modules=[Router.for_query_document(list(query), list(document))], device="cpu")
    cache = EmbeddingCache.build(model, corpus, tmp_path / "cache", progress=False)
    expected = document.encode(corpus.texts(range(200)), convert_to_tensor=True)
    torch.testing.assert_close(cache[range(200)], expected)
    loss = CorrectedMultipleNegativesLoss(model, corpus, cache, num_negatives=4)
    before = weights(model)
    mapping = {"anchor": "query", "positive": "document"}
    train(model, loss, corpus.pairs("train"), tmp_path, max_steps=3, router_mapping=mapping)
    assert all(not torch.equal(value, before[name]) for name, value in weights(model).items())


def test_prompts_of_the_trainer_and_of_the_cache_must_agree(tmp_path):
    queries, texts = make_texts(50)
    corpus = Corpus.from_texts(texts, prompt="passage : ")
    ids = [str(n) for n in range(50)]
    corpus.add_split("train", dict(zip(ids, queries, strict=True)), {id: [id] for id in ids})
    model = make_static_model()
    cache = EmbeddingCache.build(model, corpus, tmp_path / "cache", progress=False)
    loss = CorrectedMultipleNegativesLoss(model, corpus, cache, num_negatives=4)
    with pytest.raises(
        InputError, match=r"is not the text of corpus row \d+[\s\S]*the corpus has 'passage : ', which comes from"
    ):
        train(model, loss, corpus.pairs("train"), tmp_path, max_steps=1)
    train(model, loss, corpus.pairs("train"), tmp_path, max_steps=1, prompts={"positive": "passage : "})
    with pytest.raises(InputError, match=r"prompt: 'passage : ' there, '' here"):
        CorrectedMultipleNegativesLoss(model, Corpus.from_texts(texts), cache)


# ---------------------------------------------------------------------- refresh


def test_refreshing_chooses_by_the_model_as_it_is(static_model, corpus, cache, tmp_path):
    loss = CorrectedMultipleNegativesLoss(static_model, corpus, cache, num_negatives=4, corrector="identity")
    train(static_model, loss, corpus.pairs("train"), tmp_path, [RefreshCallback(loss, every=3)], max_steps=10)
    assert loss.corrected.targets_reencoded == 3 * 200, "before steps 4, 7 and 10"
    assert not torch.allclose(loss.corrected.search.cache[range(200)], cache[range(200)], atol=1e-3)
    loss.corrected.refresh()
    fresh = static_model.encode_document(corpus.texts(range(200)), convert_to_tensor=True)
    torch.testing.assert_close(loss.corrected.search.cache[range(200)], fresh)
    assert torch.equal(cache[range(200)], EmbeddingCache.load(tmp_path / "cache")[range(200)]), "the disk is as it was"
    half = EmbeddingCache.build(static_model, corpus, tmp_path / "half", dtype="bfloat16", progress=False)
    loss = CorrectedMultipleNegativesLoss(static_model, corpus, half, num_negatives=4, write_back=True)
    features, labels = batch_of(static_model, corpus, range(16))
    loss(features, labels)
    assert (
        len(loss.corrected.search.overlay) and loss.corrected.corrector.state_dict()["network.2.weight"].abs().sum() > 0
    )
    loss.corrected.refresh()
    assert loss.corrected.search.cache.dtype == torch.bfloat16, "in the old cache's dtype"
    assert (
        len(loss.corrected.search.overlay) == 0
        and loss.corrected.corrector.state_dict()["network.2.weight"].abs().sum() == 0
    )
    with pytest.raises(InputError, match="at least 1, got 0"):
        RefreshCallback(loss, every=0)
    with pytest.raises(InputError, match="unit 'day' is neither"):
        RefreshCallback(loss, every=1, unit="day")


def test_refreshing_by_epochs(static_model, corpus, cache, tmp_path):
    loss = CorrectedMultipleNegativesLoss(static_model, corpus, cache, num_negatives=4, corrector="identity")
    epochs = []
    monitor = RefreshCallback(loss, every=2, unit="epoch")
    original = loss.corrected.refresh
    loss.corrected.refresh = lambda **settings: epochs.append(trainer_state[0].epoch) or original(**settings)
    trainer_state = []
    begin = monitor.on_epoch_begin
    monitor.on_epoch_begin = lambda args, state, control, **kw: (
        trainer_state.append(state) or begin(args, state, control)
    )
    train(static_model, loss, corpus.pairs("train"), tmp_path, [monitor], max_steps=-1, num_train_epochs=5)
    assert epochs == [2, 4] and loss.corrected.targets_reencoded == 2 * 200


# ---------------------------------------------------------------------- errors


def test_unfit_settings_are_refused(static_model, corpus, cache):
    def refused(message, **changed):
        arguments = {"model": static_model, "corpus": corpus, "cache": cache, **changed}
        with pytest.raises(InputError, match=message):
            CorrectedMultipleNegativesLoss(**arguments)

    refused("The cache has 3 rows, the corpus 200 targets", cache=EmbeddingCache.from_tensor(torch.randn(3, 24)))
    refused("pass EmbeddingCache.build", cache=None)
    refused("must be an EmbeddingCache, got a str: EmbeddingCache.load", cache="caches/nq")
    refused("num_negatives must not be negative, got -1", num_negatives=-1)
    refused("sampler 'best' is not one of top_k, gumbel", sampler="best")
    refused("scale must be positive, got 0", scale=0)
    refused("what the 16 negatives are chosen from: there must be more, got 16", candidates=16)
    refused("cos_sim or dot_score", similarity_fct=torch.cdist)
    refused(r"no split 'training', it has \['train'\]", split="training")
    refused("corrector 'gru' is not one of", corrector="gru")
    refused("is for dimension 5, the embeddings have 24", corrector=MLPCorrector(5))
    other = Corpus.from_texts([*corpus.texts(range(199)), "word1"])
    refused(r"something else than what is trained:\n  corpus: ", corpus=other)


def test_a_cache_of_other_weights_is_a_stale_cache(corpus, cache):
    model = make_static_model(seed=5)
    loss = CorrectedMultipleNegativesLoss(model, corpus, cache, num_negatives=2)
    features, labels = batch_of(model, corpus, range(4))
    assert torch.isfinite(loss(features, labels)["task_loss"])


def test_unfit_batches_are_refused(static_model, corpus, cache):
    loss = CorrectedMultipleNegativesLoss(static_model, corpus, cache, num_negatives=2)
    features, labels = batch_of(static_model, corpus, range(4))

    def refused(message, features=features, labels=labels):
        with pytest.raises(InputError, match=message):
            loss(features, labels)

    refused("no 'label' column", labels=None)
    refused(
        r"Label 200 \(position 2 in the batch\) is no row of the corpus, whose rows are 0 … 199",
        labels=torch.tensor([0, 1, 200, 3]),
    )
    refused(r"Label -1 \(position 0", labels=torch.tensor([-1, 1, 2, 3]))
    refused("must be integers: one corpus row for each pair, or .*; got torch.float32", labels=labels.float())
    refused(r"text columns \(anchor, positive\), and negatives after them, got 1", features=features[:1])
    refused(r"position 1 in the batch is not the text of corpus row 7,", labels=torch.tensor([0, 7, 2, 3]))
    with torch.no_grad():
        static_model[0].embedding.weight[features[0]["input_ids"][0]] = math.nan
    refused(r"1 of 4 queries in this batch are NaN or infinite \(positions \[0\]\)")


def test_nan_positives_and_negatives_are_named_by_row(static_model, corpus, cache):
    loss = CorrectedMultipleNegativesLoss(static_model, corpus, cache, num_negatives=30, corrector=RidgeCorrector(24))
    features, labels = batch_of(static_model, corpus, range(4))
    queries = static_model(dict(features[0]))["sentence_embedding"]
    used = set(torch.cat([each["input_ids"] for each in features]).tolist())
    negatives = [row for row in loss.select(queries, labels[:, None]).rows.flatten().tolist() if row > 3]
    for row in negatives:
        tokens = set(loss.encoder.features([row])["input_ids"].tolist()) - used
        if tokens:
            break
    with torch.no_grad():
        static_model[0].embedding.weight[min(tokens)] = math.nan
    before = corrector_state(loss)
    with pytest.raises(InputError, match=r"negatives are NaN or infinite \(corpus rows \["):
        loss(features, labels)
    assert same(corrector_state(loss), before), "the corrector has learnt nothing from it"
    with torch.no_grad():
        static_model[0].embedding.weight[features[1]["input_ids"][0]] = math.nan
    with pytest.raises(InputError, match=r"positives in this batch are NaN or infinite \(corpus rows \[0"):
        loss(features, labels)


# ---------------------------------------------------------------------- what it says of itself


def test_config_and_citation(static_model, corpus, cache):
    loss = CorrectedMultipleNegativesLoss(static_model, corpus, cache, num_negatives=3, corrector=IdentityCorrector(24))
    config = loss.get_config_dict()
    assert config["num_negatives"] == 3 and config["similarity_fct"] == "cos_sim" and config["sampler"] == "top_k"
    assert config["corrector"] == "IdentityCorrector(dim=24, normalize=True)" and "200 targets" in config["corpus"]
    assert "monath2024" in loss.citation and "2409.01890" in loss.citation


def test_labels_of_a_plain_dataset_work_without_judgements(static_model, tmp_path):
    queries, texts = make_texts(40)
    corpus = Corpus.from_texts(texts)
    cache = EmbeddingCache.build(static_model, corpus, tmp_path / "cache", progress=False)
    dataset = Dataset.from_dict({"question": queries, "answer": texts, "label": list(range(40))})
    corpus.add_split("dev", {"q": queries[0]}, {"q": ["0"]})
    loss = CorrectedMultipleNegativesLoss(static_model, corpus, cache, num_negatives=4, split=None)
    trainer = train(static_model, loss, dataset, tmp_path, max_steps=5)
    assert len([entry for entry in trainer.state.log_history if "correction_loss" in entry]) == 5
