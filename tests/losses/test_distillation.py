"""Soft labels: against sentence-transformers' losses on the same candidates, and how far a teacher is trusted."""

import copy
import logging

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_static_model, make_texts
from sentence_transformers.sentence_transformer.losses import (
    DistillKLDivLoss,
    MarginMSELoss,
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.util import pairwise_cos_sim
from support.batches import batch_of
from support.runs import arguments
from support.states import gradient_difference, gradients, without_dropout

from st_corrector import (
    CachedCorrectedMultipleNegativesLoss,
    Corpus,
    CorrectedMultipleNegativesLoss,
    CorrectorTrainer,
    DistillationSettings,
    EmbeddingCache,
    EmbeddingTeacher,
    FalseNegativeFilter,
    IdentityCorrector,
    InputError,
    NegativeSettings,
    Teacher,
    TeacherCheck,
)
from st_corrector.losses import trust as trust_module
from st_corrector.losses.trust import Judgement, TeacherTrust, likeliest_scale, reciprocal_ranks, weight_by

ALONE = {"share_negatives": False, "in_batch_negatives": False}


@pytest.fixture
def cache(static_model, corpus, tmp_path):
    return EmbeddingCache.build(static_model, corpus, tmp_path / "cache", progress=False)


@pytest.fixture
def teacher(corpus, tmp_path):
    return EmbeddingTeacher.build(
        make_static_model(7), corpus, tmp_path / "teacher", corpus.pairs("train"), dtype="float32", progress=False
    )


def batch(model, corpus, rows):
    """A batch with the labels of corpus.pairs, keys and all."""
    pairs = corpus.pairs("train")[list(rows)]
    return [model.preprocess(pairs["anchor"]), model.preprocess(pairs["positive"])], torch.tensor(pairs["label"])


def taught(model, corpus, cache, teacher, *, kind="kl", weight=1.0, scale=15.0, **negatives):
    return CorrectedMultipleNegativesLoss(
        model,
        corpus,
        cache,
        negatives=NegativeSettings(**{"num_negatives": 4, **negatives}),
        distillation=DistillationSettings(teacher, kind, weight, scale),
    )


def chosen_by(loss, queries, labels):
    return loss.select(queries, labels[:, :1], labels=labels).rows


@pytest.mark.parametrize("kind", ["kl", "margin-mse"])
def test_it_is_sentence_transformers_loss_on_each_querys_own_candidates(static_model, corpus, cache, teacher, kind):
    loss = taught(static_model, corpus, cache, teacher, kind=kind, scale=20.0, **ALONE)
    features, labels = batch(static_model, corpus, range(10))
    queries = static_model(dict(features[0]))["sentence_embedding"].detach()
    rows = torch.cat([labels[:, :1], chosen_by(loss, queries, labels)], dim=1)
    assert (rows >= 0).all() and len(rows[:, 1:].unique()) > 5
    found = loss(features, labels)["distillation_loss"]
    # The library's loss: an n-tuple for each query, scored by the teacher.
    columns = [static_model.preprocess(corpus.texts(column.tolist())) for column in rows.T]
    scores = torch.stack([teacher.scores(labels[n : n + 1, 1], rows[n])[0] for n in range(10)])
    if kind == "kl":
        theirs = DistillKLDivLoss(static_model, similarity_fct=pairwise_cos_sim, temperature=1 / 20)
        expected = theirs([dict(features[0]), *columns], scores) * 20**2  # it divides by the square of its scale
    else:
        theirs = MarginMSELoss(static_model, similarity_fct=pairwise_cos_sim)
        expected = theirs([dict(features[0]), *columns], scores) * 20**2
    torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-5)
    assert found > 0.01


@pytest.mark.parametrize("kind", ["kl", "margin-mse"])
@pytest.mark.parametrize("negatives", [{}, ALONE, {"in_batch_negatives": False}])
def test_value_and_gradient_are_those_of_a_naive_computation(static_model, corpus, cache, teacher, kind, negatives):
    weight, scale = 0.7, 11.0
    loss = taught(static_model, corpus, cache, teacher, kind=kind, weight=weight, scale=scale, **negatives)
    alone = CorrectedMultipleNegativesLoss(static_model, corpus, cache, negatives=loss.negatives)
    features, labels = batch(static_model, corpus, range(8))
    queries = static_model(dict(features[0]))["sentence_embedding"].detach()
    chosen = chosen_by(loss, queries, labels)
    union = chosen.unique()
    negative_rows = union[~torch.isin(union, labels[:, 0])]
    columns = torch.cat([labels[:, 0], negative_rows])

    f = F.normalize(static_model(dict(features[0]))["sentence_embedding"], dim=-1)
    g = F.normalize(
        torch.cat(
            [
                static_model(dict(features[1]))["sentence_embedding"],
                static_model(static_model.preprocess(corpus.texts(negative_rows.tolist())))["sentence_embedding"],
            ]
        ),
        dim=-1,
    )
    said = teacher.scores(labels[:, 1], columns)
    terms = []
    for query in range(8):
        counts = [
            place
            for place, row in enumerate(columns.tolist())
            if place == query
            or row in (chosen[query].tolist() if not negatives.get("share_negatives", True) else union.tolist())
            or (place < 8 and negatives.get("in_batch_negatives", True))
        ]
        ours, theirs = 20.0 * (f[query] @ g[counts].T), scale * said[query, counts]
        own = counts.index(query)
        if kind == "kl":
            term = (theirs.softmax(0) * (theirs.log_softmax(0) - ours.log_softmax(0))).sum()
        else:
            others = [place for place in range(len(counts)) if place != own]
            term = ((ours[own] - ours[others]) - (theirs[own] - theirs[others])).square().mean()
        terms.append(weight * term)
    expected = torch.stack(terms).mean()
    static_model.zero_grad()
    expected.backward()
    wanted = gradients(static_model)
    static_model.zero_grad()
    hard = alone([dict(each) for each in features], labels)["task_loss"]
    hard.backward()
    wanted = {name: value + gradients(static_model)[name] for name, value in wanted.items()}
    static_model.zero_grad()
    found = loss([dict(each) for each in features], labels)
    torch.testing.assert_close(found["distillation_loss"], expected.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["task_loss"].detach(), hard.detach(), rtol=1e-5, atol=1e-6)
    sum(found.values()).backward()
    torch.testing.assert_close(gradients(static_model), wanted, rtol=1e-3, atol=1e-4)
    assert expected > 0.01 and max(value.abs().max() for value in wanted.values()) > 0.1


@pytest.mark.parametrize("kind", ["kl", "margin-mse"])
def test_gradient_cached_and_in_matryoshka(bert_model, corpus, teacher, tmp_path, kind):
    without_dropout(bert_model).train()
    cache = EmbeddingCache.build(bert_model, corpus, tmp_path / "bert", progress=False)
    settings = {
        "negatives": NegativeSettings(4),
        "distillation": DistillationSettings(teacher, kind, 0.5, 12.0),
        "corrector": IdentityCorrector(cache.dim),
    }
    found = []
    for make, own in (
        (CorrectedMultipleNegativesLoss, {}),
        (CachedCorrectedMultipleNegativesLoss, {"mini_batch_size": 3}),
    ):
        for wrap in (False, True):
            model = copy.deepcopy(bert_model)
            loss = make(model, corpus, cache, **copy.deepcopy(settings), **own)
            loss = MatryoshkaLoss(model, loss, [32, 8], [1.0, 0.5]) if wrap else loss
            features, labels = batch(model, corpus, range(10))
            values = loss([{**each} for each in features], labels)
            (sum(values.values()) / 2).backward()
            found.append(({name: value.detach() for name, value in values.items()}, gradients(model)))
    for plain, cached in (found[::2], found[1::2]):
        torch.testing.assert_close(plain[0], cached[0])
        assert gradient_difference(cached[1], plain[1]) < 1e-5 and plain[0]["distillation_loss"] > 0.01
    assert found[1][0]["distillation_loss"] > found[0][0]["distillation_loss"], "one for each width"


def test_a_query_that_the_teacher_does_not_know_has_its_hard_label_alone(static_model, corpus, cache, tmp_path):
    some = corpus.pairs("train").select(range(5))
    half = EmbeddingTeacher.build(
        make_static_model(7), corpus, tmp_path / "half", some, dtype="float32", progress=False
    )
    whole = EmbeddingTeacher.build(
        make_static_model(7), corpus, tmp_path / "whole", corpus.pairs("train"), dtype="float32", progress=False
    )
    features, labels = batch(static_model, corpus, range(10))
    found = [
        taught(static_model, corpus, cache, each)([dict(f) for f in features], labels)["distillation_loss"]
        for each in (half, whole)
    ]
    first = taught(static_model, corpus, cache, whole)
    soft = []
    make = first.distillation.labels
    first.distillation.labels = lambda *given: soft.append(make(*given)) or soft[-1]
    first([dict(f) for f in features], labels)
    assert 0 < found[0] < found[1] and (soft[0].weight == 1).all()
    # Labels with rows alone: each of these rows is asked for by one query of the split, which is known by that.
    by_row = taught(static_model, corpus, cache, whole)([dict(f) for f in features], labels[:, 0])
    torch.testing.assert_close(by_row["distillation_loss"], found[1])


def test_two_questions_with_one_answer_get_labels_of_their_own(static_model, tmp_path):
    corpus = Corpus.from_texts([f"word{n} word{n + 1} word{n + 2}" for n in range(40)])
    corpus.add_split("train", {"a": "word0 word1", "b": "word2 word9"}, {"a": ["0"], "b": ["0"]})
    cache = EmbeddingCache.build(static_model, corpus, tmp_path / "cache", progress=False)
    pairs = corpus.pairs("train")
    teacher = EmbeddingTeacher.build(make_static_model(7), corpus, tmp_path / "teacher", pairs, progress=False)
    loss = taught(static_model, corpus, cache, teacher)
    seen = []
    make = loss.distillation.labels
    loss.distillation.labels = lambda *given: seen.append(make(*given)) or seen[-1]
    features, labels = batch(static_model, corpus, range(2))
    loss([dict(f) for f in features], labels)
    soft = seen[0]
    assert (soft.weight == 1).all() and labels[0, 0] == labels[1, 0]
    # Each has the shared positive in the column of its own, once.
    assert torch.isfinite(soft.logits[0, 0]) and torch.isfinite(soft.logits[1, 1])
    assert soft.logits[0, 1] == soft.logits[1, 0] == -torch.inf
    assert not torch.allclose(soft.logits[0, 2:], soft.logits[1, 2:])
    loss([dict(f) for f in features], labels[:, 0])
    assert (seen[1].weight == 0).all(), "by the row alone they cannot be told apart"


def test_a_teacher_that_counts_nothing_is_not_asked(static_model, corpus, cache, teacher, monkeypatch):
    settings = DistillationSettings(teacher, teacher_weight=0.0, teacher_scale=1.0)
    loss = CorrectedMultipleNegativesLoss(static_model, corpus, cache, 4, "identity", distillation=settings)
    monkeypatch.setattr(teacher, "scores", lambda *given: pytest.fail("it is asked"))
    terms = loss(*batch(static_model, corpus, range(8)))
    assert float(terms["distillation_loss"]) == 0 and loss.pop_metrics()["taught"] == 0


def test_evaluation_tells_of_both_terms(corpus, teacher, tmp_path):
    data = corpus.pairs("train").select(range(64))
    args = arguments(tmp_path, eval_strategy="steps", eval_steps=3, teacher_weight=0.5, teacher_scale=15.0)
    trainer = CorrectorTrainer(
        make_static_model(),
        args,
        corpus=corpus,
        teacher=teacher,
        eval_dataset=data,
        train_dataset=corpus.pairs("train"),
    )
    trainer.train()
    evaluated = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(evaluated) == 2 and evaluated[1]["eval_distillation_loss"] < evaluated[0]["eval_distillation_loss"]
    for entry in evaluated:
        assert entry["eval_loss"] == pytest.approx(entry["eval_task_loss"] + entry["eval_distillation_loss"], rel=1e-3)


# ---------------------------------------------------------------------- trust


def good_teacher(corpus, noise=0.0, known=None):
    """One that has the labels in it: query and positive have the same vector, up to noise."""
    generator = torch.Generator().manual_seed(1)
    targets = torch.randn(len(corpus), 32, generator=generator)
    qrels = corpus.qrels("train")
    rows = torch.tensor([int(qrels.rows_of(n)[0]) for n in range(len(qrels))])
    queries = targets[rows] + noise * torch.randn(len(rows), 32, generator=generator)
    some = slice(0, known)
    return EmbeddingTeacher(targets, queries[some], qrels.keys[some])


@pytest.fixture
def many():
    """600 targets and as many questions, of which 32 are held out."""
    queries, texts = make_texts(600)
    corpus = Corpus.from_texts(texts)
    ids = [str(n) for n in range(600)]
    corpus.add_split("train", dict(zip(ids, queries, strict=True)), {id: [id] for id in ids})
    return corpus


def trusting(corpus, teacher, folder, **settings):
    args = arguments(folder, **{"learning_rate": 0.05, "max_steps": 45, "save_steps": 20, **settings})
    return CorrectorTrainer(make_static_model(), args, corpus=corpus, teacher=teacher)


def test_a_good_teacher_is_trusted_and_a_random_one_is_not(many, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="st_corrector")
    found = {}
    for name, noise in (("good", 0.2), ("random", 1e4)):
        trainer = trusting(many, good_teacher(many, noise), tmp_path / name, logging_steps=5)
        (loss,) = trainer._corrected_losses().values()
        trainer.train()
        found[name] = loss.distillation.trust.history
        assert [step for step, _ in found[name]] == [0, 20, 40]
        logged = [entry for entry in trainer.state.log_history if "teacher_weight" in entry]
        assert logged[-1]["teacher_weight"] == pytest.approx(loss.distillation.weight, abs=1e-5)
        config = loss.get_config_dict()
        assert config["teacher_mrr"] == found[name][-1][1].teacher_mrr and "teacher" in config
    good, random = (dict(found[name]) for name in ("good", "random"))
    assert good[0].teacher_mrr > 0.99 and good[0].weight == 4 and random[0].teacher_mrr < 0.05
    assert all(each.weight == 0 for each in random.values()) and all(each.scale > 0 for each in good.values())
    assert good[40].encoder_mrr > good[0].encoder_mrr + 0.02, "the encoder has learnt the held-out questions' kind"
    messages = [record for record in caplog.records if ", which are held out, the teacher" in record.getMessage()]
    assert {record.levelno for record in messages} == {logging.INFO, logging.WARNING}
    assert "which is not at all" in next(m for m in messages if m.levelno == logging.WARNING).getMessage()


@pytest.mark.parametrize("set_to", [{"teacher_weight": 1.5}, {"teacher_scale": 12.0}], ids=["weight", "scale"])
def test_what_was_set_is_not_said_to_have_been_found_out(many, tmp_path, caplog, set_to):
    caplog.set_level(logging.INFO, logger="st_corrector")
    trainer = trusting(many, good_teacher(many, 1e4), tmp_path, max_steps=2, **set_to)
    (loss,) = trainer._corrected_losses().values()
    trainer.train()
    said = next(text for each in caplog.records if "labels count with weight" in (text := each.getMessage()))
    told, (named, value) = loss.distillation.describe(), *set_to.items()
    assert told[named] == value and told["found_out"] == [{"teacher_weight": "scale", "teacher_scale": "weight"}[named]]
    (record,) = trainer.recorder.record.losses.values()
    if named == "teacher_weight":
        assert said.endswith("count with weight 1.50, as was set.")
        assert "weight 1.5 and scale" in record.labels and "of which the scale was found out" in record.labels
    else:
        assert said.endswith("count with weight 0.00, which is not at all.")
        assert "of which the weight was found out" in record.labels


def test_labels_that_never_count_are_not_judged(many, tmp_path):
    trainer = trusting(many, good_teacher(many), tmp_path, max_steps=2, teacher_weight=0.0)
    (loss,) = trainer._corrected_losses().values()
    trainer.train()
    assert loss.distillation.trust is None and loss.corrected.targets_reencoded == 0


def test_a_teacher_counts_by_the_lead_that_is_sure():
    noise = torch.tensor([0.3, -0.3]).repeat(50)
    error = noise.std() / 10
    for lead, weight in ((-0.2, 0.0), (0.0, 0.0), (error, 0.0), (error + 0.05, 2.0), (error + 0.1, 4.0), (0.5, 4.0)):
        assert weight_by(noise + lead) == pytest.approx(weight, abs=1e-5)


def test_the_teacher_that_is_the_untrained_encoder_has_nothing_to_teach(many, tmp_path):
    untrained = EmbeddingTeacher.build(
        make_static_model(), many, tmp_path / "teacher", many.pairs("train"), dtype="float32", progress=False
    )
    trainer = trusting(many, untrained, tmp_path)
    (loss,) = trainer._corrected_losses().values()
    trainer.train()
    first, *later = (found for _, found in loss.distillation.trust.history)
    assert first.teacher_mrr == pytest.approx(first.encoder_mrr, abs=1e-6) and first.weight == 0
    assert all(found.weight == 0 for found in later) and later[-1].encoder_mrr > later[-1].teacher_mrr + 0.01


def test_stale_embeddings_make_no_teacher_look_better(many, static_model, tmp_path, monkeypatch):
    cache = EmbeddingCache.build(static_model, many, tmp_path / "cache", progress=False)
    loss = CorrectedMultipleNegativesLoss(static_model, many, cache, 4, "identity", good_teacher(many))
    trust = loss.distillation.trust
    # The encoder seems to get worse where nothing is written back or corrected, and then better.
    found = iter([Judgement(0.5, 0.40, 9.0, 1.0), Judgement(0.5, 0.1, 8.0, 4.0), Judgement(0.5, 0.45, 7.0, 0.25)])
    monkeypatch.setattr(trust, "_compare", lambda *given: next(found))
    for steps, weight, scale in ((0, 1.0, 9.0), (20, 1.0, 8.0), (30, 1.0, 8.0), (40, 0.25, 7.0)):
        loss.corrected.steps = steps
        judged = trust.update(loss.corrected, loss.encode_queries)
        assert (judged.weight, judged.scale) == (weight, scale), steps


def test_what_the_trust_measures_is_the_rank_in_the_whole_corpus(many, static_model, tmp_path):
    cache = EmbeddingCache.build(static_model, many, tmp_path / "cache", progress=False)
    teacher = good_teacher(many, 1.5)
    trust = TeacherTrust(teacher, many, many.qrels("train"))
    loss = CorrectedMultipleNegativesLoss(static_model, many, cache, num_negatives=4)
    found = trust.update(loss.corrected, loss.encode_queries)
    held = trust.held_out
    assert len(held.keys) == len(held.keys.unique()) == 32
    sides = {
        "encoder": (
            static_model.encode_query(held.texts, convert_to_tensor=True),
            static_model.encode_document(many.texts(range(600)), convert_to_tensor=True),
        ),
        "teacher": (teacher.queries[teacher._places(held.keys)[1]], teacher.targets[torch.arange(600)]),
    }
    for name, (queries, targets) in sides.items():
        scores = F.normalize(queries, dim=-1) @ F.normalize(targets, dim=-1).T
        ranks = (scores >= scores.gather(1, held.positives[:, None]) - 1e-6).sum(1)
        expected = torch.where(ranks <= 10, 1 / ranks, 0.0).mean()
        assert found.mrr[name] == pytest.approx(float(expected), abs=1e-3), name
    assert 0.1 < found.teacher_mrr < 0.99


@pytest.fixture
def parts(tmp_path):
    """600 targets, and as questions the beginnings of them, which an untrained encoder finds often, not always."""
    _, texts = make_texts(600)
    corpus = Corpus.from_texts(texts, cache_dir=tmp_path / "corpus")
    ids = [str(n) for n in range(600)]
    corpus.add_split("train", {id: " ".join(texts[int(id)].split()[:2]) for id in ids}, {id: [id] for id in ids})
    return corpus


def test_the_encoder_is_judged_as_it_is_now(parts, static_model, tmp_path):
    cache = EmbeddingCache.build(static_model, parts, tmp_path / "cache", progress=False)
    loss = CorrectedMultipleNegativesLoss(static_model, parts, cache, 4, "identity", good_teacher(parts, 1.0))
    trust, held = loss.distillation.trust, loss.distillation.trust.held_out
    at_first = trust._compare(loss.corrected, loss.encode_queries(held.texts)).encoder_mrr
    encoded = loss.corrected.targets_reencoded
    assert 0.3 < at_first < 0.95 and 32 < encoded <= 33 * 32
    with torch.no_grad():
        # Another encoder altogether: the cache tells nothing of it.
        static_model[0].embedding.weight.copy_(torch.randn_like(static_model[0].embedding.weight))
    queries = loss.encode_queries(held.texts)
    found = trust._compare(loss.corrected, queries)
    hardest = loss.corrected.hardest(queries, 16, held.exclude).rows
    scores = queries @ loss.corrected.encode(np.arange(600)).T
    everything = scores.scatter(1, held.positives[:, None], -torch.inf)
    others = {
        "all": everything,
        "seemingly hardest": everything.gather(1, hardest),
        "theirs and the teacher's": everything[
            :,
            torch.cat(
                [hardest, trust.teacher.best_rows(held.keys, held.exclude, 16), held.positives[:, None]], 1
            ).unique(),
        ],
    }
    positive = scores.gather(1, held.positives[:, None])[:, 0]
    mrr = {name: float(reciprocal_ranks(positive, each).mean()) for name, each in others.items()}
    assert found.encoder_mrr == pytest.approx(mrr["theirs and the teacher's"], abs=1e-4)
    assert mrr["all"] <= found.encoder_mrr < mrr["all"] + 0.15 < mrr["seemingly hardest"] - 0.2
    stale = loss.corrected.corrected(torch.cat([held.positives[:, None], hardest], 1).flatten()).view(32, 17, -1)
    scores = (queries[:, None] * stale).sum(-1)
    assert (scores[:, 1:] > scores[:, :1]).all(1).float().mean() > 0.5, "by stale embeddings it seems to know nothing"


class Ranking(Teacher):
    """One that can only rank anew: it gives scores, and knows of no best ones."""

    def __init__(self, teacher):
        self.teacher = teacher

    corpus_size = property(lambda self: self.teacher.corpus_size)

    def knows(self, queries):
        return self.teacher.knows(queries)

    def scores(self, queries, rows, wanted=None):
        return self.teacher.scores(queries, rows, wanted)


def test_one_that_can_only_rank_anew_has_missed_what_the_encoder_has_missed(many, static_model, tmp_path):
    cache = EmbeddingCache.build(static_model, many, tmp_path / "cache", progress=False)
    teacher = good_teacher(many)
    loss = CorrectedMultipleNegativesLoss(static_model, many, cache, 4, "identity", Ranking(teacher))
    trust = loss.distillation.trust
    found = trust.update(loss.corrected, loss.encode_queries)
    held = trust.held_out
    scores = loss.encode_queries(held.texts) @ cache[torch.arange(len(many))].T
    missed = (scores > scores.gather(1, held.positives[:, None])).sum(1) >= 16
    assert 0 < missed.sum() < len(missed)
    assert found.teacher_mrr == pytest.approx(1 - float(missed.float().mean()), abs=0.04)
    assert (
        TeacherTrust(teacher, many, many.qrels("train"))
        ._compare(loss.corrected, loss.encode_queries(held.texts))
        .teacher_mrr
        > 0.99
    ), "while one that knows its best ranks all of these first"


def test_what_a_teacher_cannot_score_is_no_reason_to_trust_it(parts, static_model, tmp_path):
    class Partly(Ranking):
        """Does not know every other target."""

        def scores(self, queries, rows, wanted=None):
            return super().scores(queries, rows, wanted).masked_fill(rows % 2 == 1, torch.nan)

    cache = EmbeddingCache.build(static_model, parts, tmp_path / "cache", progress=False)
    loss = CorrectedMultipleNegativesLoss(static_model, parts, cache, 4, "identity", good_teacher(parts))
    whole, partly = (
        TeacherTrust(each, parts, parts.qrels("train"))._compare(
            loss.corrected, loss.encode_queries(loss.distillation.trust.held_out.texts)
        )
        for each in (Ranking(good_teacher(parts)), Partly(good_teacher(parts)))
    )
    assert 0 < partly.teacher_mrr < 0.75 * whole.teacher_mrr
    assert 0.3 < partly.scale / whole.scale < 3


def test_held_out_questions_teach_nothing(many, static_model, tmp_path):
    cache = EmbeddingCache.build(static_model, many, tmp_path / "cache", progress=False)
    loss = CorrectedMultipleNegativesLoss(static_model, many, cache, 4, "identity", good_teacher(many))
    held = loss.distillation.trust.held_out
    pairs = many.pairs("train")
    keys = torch.tensor(pairs["label"])[:, 1]
    rows = torch.isin(keys, held.keys).nonzero().flatten().tolist()
    assert len(rows) == 32
    features, labels = batch(static_model, many, rows[:8])
    sum(loss(features, labels).values()).backward()
    assert all(gradient.abs().max() == 0 for gradient in gradients(static_model).values())
    features, labels = batch(static_model, many, [*rows[:4], *[n for n in range(20) if n not in rows][:4]])
    sum(loss(features, labels).values()).backward()
    assert max(gradient.abs().max() for gradient in gradients(static_model).values()) > 0


def test_what_may_be_a_held_out_question_teaches_nothing_either(static_model, tmp_path):
    queries, texts = make_texts(400)
    corpus = Corpus.from_texts(texts)
    ids = [str(n) for n in range(400)]
    relevant = {id: [id] for id in ids} | {"again": ["0"]}
    corpus.add_split("train", dict(zip(ids, queries, strict=True)) | {"again": queries[5].upper()}, relevant)
    cache = EmbeddingCache.build(static_model, corpus, tmp_path / "cache", progress=False)
    loss = CorrectedMultipleNegativesLoss(static_model, corpus, cache, 4, "identity", good_teacher(corpus))
    held = loss.distillation.trust.held_out
    labels = torch.tensor(corpus.pairs("train")["label"])
    chosen = held.includes(labels[:, 1], labels[:, 0])
    assert chosen[5] == chosen[labels[:, 1] == corpus.qrels("train").keys[400]].item(), "one question in capitals"
    # By the row alone a question is known where no other has this positive; where one has, it may be the held-out one.
    unknown = torch.full_like(labels[:, 1], -1)
    maybe = held.includes(unknown, labels[:, 0])
    assert (maybe >= chosen).all() and maybe.sum() <= chosen.sum() + 2
    rows = torch.arange(400)[~torch.isin(torch.arange(400), held.answering)]
    assert len(rows) > 350 and not held.includes(torch.full_like(rows, -1), rows).any()


def test_where_questions_are_few_none_is_kept_out(many, static_model, tmp_path):
    cache = EmbeddingCache.build(static_model, many, tmp_path / "cache", progress=False)
    for known, compared, kept_out in ((191, 191, 0), (192, 32, 32)):
        teacher = good_teacher(many, known=known)
        loss = CorrectedMultipleNegativesLoss(static_model, many, cache, 4, "identity", teacher)
        held = loss.distillation.trust.held_out
        assert (len(held.keys), len(held.kept_out)) == (compared, kept_out)
        loss(*batch(static_model, many, range(20)))
        assert held.includes(held.keys, held.positives).sum() == kept_out
        assert not held.includes(torch.full_like(held.keys, -1), held.positives).any() or kept_out


def test_a_teacher_that_knows_few_of_a_batchs_queries_says_so(many, static_model, tmp_path, caplog):
    cache = EmbeddingCache.build(static_model, many, tmp_path / "cache", progress=False)
    settings = DistillationSettings(good_teacher(many, known=100), teacher_weight=1.0, teacher_scale=10.0)
    for rows, share in ((range(90, 110), 0.5), (range(98, 110), 1 / 6)):
        loss = CorrectedMultipleNegativesLoss(static_model, many, cache, 4, "identity", distillation=settings)
        caplog.clear()
        for _ in range(2):
            loss(*batch(static_model, many, rows))
        assert loss.pop_metrics()["taught"] == pytest.approx(share)
        told = [
            record.getMessage() for record in caplog.records if "labels 17% of the first batch" in record.getMessage()
        ]
        assert len(told) == (share < 0.5), "once, and only where they are few"


def test_what_is_set_holds_on_resume_too(many, static_model, tmp_path):
    cache = EmbeddingCache.build(static_model, many, tmp_path / "cache", progress=False)
    teacher = good_teacher(many)

    def loss(**settings):
        settings = DistillationSettings(teacher, **settings)
        return CorrectedMultipleNegativesLoss(static_model, many, cache, 4, "identity", distillation=settings)

    found = loss()
    found(*batch(static_model, many, range(8)))
    state = found.distillation.state()
    assert state["weight"] == 4 and state["scale"] > 0
    for given in ({}, {"teacher_weight": 1.5}, {"teacher_scale": 7.0}, {"teacher_weight": 1.5, "teacher_scale": 7.0}):
        resumed = loss(**given).distillation
        resumed.load_state(state)
        assert resumed.weight == given.get("teacher_weight", 4)
        assert resumed.scale == given.get("teacher_scale", state["scale"])


def test_another_teachers_comparisons_are_not_taken_over(many, tmp_path, caplog):
    trusting(many, good_teacher(many, 0.5), tmp_path / "whole").train()
    generator = torch.Generator().manual_seed(5)
    vectors = [torch.randn(600, 32, generator=generator) for _ in range(2)]  # of one shape with the first
    other = trusting(many, EmbeddingTeacher(*vectors, many.qrels("train").keys), tmp_path / "whole")
    other.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-20"))
    (loss,) = other._corrected_losses().values()
    assert [step for step, _ in loss.distillation.trust.history] == [20, 40] and loss.distillation.weight == 0
    same, fewer = good_teacher(many, 0.5), good_teacher(many, 0.5, known=300)
    assert same.identity == fewer.identity != EmbeddingTeacher(*vectors, many.qrels("train").keys).identity
    assert "is judged again" in caplog.text


def test_a_resumed_run_trusts_its_teacher_as_before(many, tmp_path):
    whole = trusting(many, good_teacher(many, 0.5), tmp_path / "whole")
    whole.train()
    resumed = trusting(many, good_teacher(many, 0.5), tmp_path / "whole")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-20"))
    (one,), (other,) = whole._corrected_losses().values(), resumed._corrected_losses().values()
    assert one.distillation.trust.history == other.distillation.trust.history
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_a_teacher_that_cannot_be_judged_is_refused(many, static_model, tmp_path):
    cache = EmbeddingCache.build(static_model, many, tmp_path / "cache", progress=False)
    with pytest.raises(InputError, match=r"knows 31 questions .*it takes 32"):
        CorrectedMultipleNegativesLoss(static_model, many, cache, teacher=good_teacher(many, known=31))
    plain = Corpus.from_texts(many.texts(range(600)))
    with pytest.raises(InputError, match="or set teacher_weight and teacher_scale"):
        CorrectedMultipleNegativesLoss(static_model, plain, cache, teacher=good_teacher(many))
    with pytest.raises(InputError, match="distillation_loss must be 'kl' or 'margin-mse', got 'mse'"):
        DistillationSettings(distillation_loss="mse")
    with pytest.raises(InputError, match="teacher_scale must be positive"):
        DistillationSettings(teacher_scale=0.0)
    small = EmbeddingTeacher(torch.randn(5, 4), torch.randn(600, 4), many.qrels("train").keys)
    with pytest.raises(InputError, match="The teacher has 5 rows, the corpus 600 targets"):
        CorrectedMultipleNegativesLoss(static_model, many, cache, teacher=small)
    with pytest.raises(InputError, match="found out by the corrected corpus"):
        CorrectedMultipleNegativesLoss(static_model, many, num_negatives=0, teacher=good_teacher(many))


def test_the_likeliest_scale_is_that_of_the_scores():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(4000, 20, generator=generator) * 0.1
    for scale in (5.0, 40.0):
        positive = torch.distributions.Categorical(logits=scores * scale).sample()
        first = scores.clone()
        first[:, 0], first[torch.arange(4000), positive] = scores[torch.arange(4000), positive], scores[:, 0]
        assert likeliest_scale(first) == pytest.approx(scale, rel=0.2)
    ranks = reciprocal_ranks(torch.tensor([0.5, 0.5, 0.0]), torch.tensor([[0.4] * 10, [0.9] + [0.1] * 9, [0.1] * 10]))
    assert ranks.tolist() == [1.0, 0.5, 0.0]


# ---------------------------------------------------------------------- as a guide, and hardness


def test_a_teacher_as_a_guide_masks_what_it_finds_more_relevant(static_model, corpus, cache, teacher):
    features, labels = batch(static_model, corpus, range(10))
    rules = FalseNegativeFilter(checks=(TeacherCheck(teacher, margin=0.1),))
    loss = CorrectedMultipleNegativesLoss(
        static_model, corpus, cache, negatives=NegativeSettings(6, false_negatives=rules)
    )
    queries = static_model(dict(features[0]))["sentence_embedding"].detach()
    chosen = chosen_by(loss, queries, labels)
    said = teacher.scores(labels[:, 1], torch.arange(200))
    positive = said.gather(1, labels[:, :1])
    for query in range(10):
        rows = chosen[query][chosen[query] >= 0]
        assert (said[query, rows] <= positive[query] - 0.1).all()
    seen = []
    inner = loss.calculate_loss
    loss.calculate_loss = lambda reps, given, **how: seen.append(given) or inner(reps, given, **how)
    loss(features, labels)
    in_batch = seen[0].forbidden[:, :10]
    expected = said[:, labels[:, 0]] > positive - 0.1
    expected |= torch.stack([labels[:, 0] == label for label in labels[:, 0]])
    expected.fill_diagonal_(False)
    assert torch.equal(in_batch, expected) and 0 < expected.sum() < 80
    assert loss.removed["teacher"] > 0


def test_a_guide_asks_about_every_query_that_a_shared_positive_may_be_of(static_model):
    queries, texts = make_texts(30)
    corpus = Corpus.from_texts(texts)
    corpus.add_split("train", {"a": queries[0], "b": queries[1]}, {"a": ["0"], "b": ["0"]})
    qrels = corpus.qrels("train")
    # One finds row 1 more relevant than the positive, the other row 2.
    targets = torch.eye(4)[[0, 1, 2, *[3] * 27]]
    teacher = EmbeddingTeacher(targets, torch.tensor([[0.5, 1.0, 0, 0], [0.5, 0, 1.0, 0]]), qrels.keys)
    rows, labels = torch.tensor([[1, 2, 3, -1]] * 3), torch.zeros(3, dtype=torch.int64)
    keys = torch.tensor([qrels.keys[0], -1, qrels.keys[1]])
    found = TeacherCheck(teacher, qrels=qrels)(labels, rows, keys)
    assert found.tolist() == [[True, False, False, False], [True, True, False, False], [False, True, False, False]]
    assert not TeacherCheck(teacher)(labels, rows, keys)[1].any(), "without judgements it cannot know them"


@pytest.mark.parametrize("mode", ["in_batch_negatives", "hard_negatives", "all_negatives"])
def test_hardness_counts_as_in_sentence_transformers(static_model, corpus, cache, mode):
    """One hard negative for each query, all different: the same tuples for both."""
    loss = CorrectedMultipleNegativesLoss(
        static_model, corpus, cache, negatives=NegativeSettings(1, hardness_mode=mode, hardness_strength=5.0)
    )
    plain = CorrectedMultipleNegativesLoss(static_model, corpus, cache, num_negatives=1)
    for first in range(0, 190):
        features, labels = batch(static_model, corpus, range(first, first + 4))
        queries = static_model(dict(features[0]))["sentence_embedding"].detach()
        chosen = chosen_by(loss, queries, labels).flatten()
        if len(torch.cat([chosen, labels[:, 0]]).unique()) == 8:
            break
    theirs = MultipleNegativesRankingLoss(static_model, hardness_mode=mode, hardness_strength=5.0)
    columns = [*features, static_model.preprocess(corpus.texts(chosen.tolist()))]
    expected = theirs([dict(each) for each in columns], None)
    found = loss([dict(each) for each in features], labels)["task_loss"]
    torch.testing.assert_close(found.detach(), expected.detach(), rtol=1e-4, atol=1e-5)
    assert not torch.isclose(found, plain([dict(each) for each in features], labels)["task_loss"])
    static_model.zero_grad()
    expected.backward()
    wanted = gradients(static_model)
    static_model.zero_grad()
    found.backward()
    torch.testing.assert_close(gradients(static_model), wanted, rtol=1e-3, atol=1e-5)
    assert max(value.abs().max() for value in wanted.values()) > 0.1
    with pytest.raises(InputError, match="set both"):
        NegativeSettings(hardness_mode=mode)
    with pytest.raises(InputError, match="set both"):
        NegativeSettings(hardness_strength=2.0)


def test_batch_of_is_a_batch_by_rows_alone(static_model, corpus):
    assert batch_of(static_model, corpus, range(3))[1].tolist() == [0, 1, 2]


def test_half_of_the_likeliest_scale_is_taken(parts, static_model, tmp_path, monkeypatch):
    cache = EmbeddingCache.build(static_model, parts, tmp_path / "cache", progress=False)
    loss = CorrectedMultipleNegativesLoss(static_model, parts, cache, 4, "identity", good_teacher(parts))
    trust, asked = TeacherTrust(good_teacher(parts), parts, parts.qrels("train")), []
    monkeypatch.setattr(trust_module, "likeliest_scale", lambda scores: asked.append(scores) or 18.0)
    judged = trust._compare(loss.corrected, loss.encode_queries(trust.held_out.texts))
    assert len(asked) == 1 and judged.scale == 9.0
