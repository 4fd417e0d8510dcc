"""What the loss, and the trainer that makes it, take for granted of a model, a corpus and a data set, and what they
refuse.
"""

import logging

import pytest
import torch
from conftest import make_bert_model, make_static_model, make_texts
from datasets import ClassLabel, Dataset, Features, Sequence, Value
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers.sentence_transformer.losses import (
    AdaptiveLayerLoss,
    CoSENTLoss,
    Matryoshka2dLoss,
    MatryoshkaLoss,
)
from sentence_transformers.util import cos_sim, dot_score
from support import runs
from support.encoders import ENCODERS

from st_corrector import (
    CachedCorrectedMultipleNegativesLoss,
    Corpus,
    CorpusRetrievalEvaluator,
    CorrectedMultipleNegativesLoss,
    CorrectorTrainer,
    EmbeddingCache,
    InputError,
)
from st_corrector.negatives.filters import known_positives, pad_rows


def arguments(tmp_path, **settings):
    own = {"learning_rate": 5e-5, "max_steps": 2, "save_strategy": "no", "logging_steps": 1, "use_cpu": True}
    return runs.arguments(tmp_path / "out", **{**own, **settings})


def longer(model, similarity):
    """The model without its last module: vectors of different lengths."""
    return SentenceTransformer(modules=list(model)[:-1], device="cpu", similarity_fn_name=similarity)


# ------------------------------------------------------------------ what is compared by


@pytest.mark.parametrize(
    ("similarity", "unit", "function", "scale"),
    [
        ("cosine", True, cos_sim, 20.0),
        ("cosine", False, cos_sim, 20.0),
        ("dot", True, dot_score, 20.0),
        ("dot", False, dot_score, 1.0),
        (None, True, cos_sim, 20.0),
    ],
)
@pytest.mark.parametrize("maker", ["loss", "cached loss", "trainer"])
def test_the_models_own_similarity_is_trained_and_evaluated_by(
    corpus, tmp_path, similarity, unit, function, scale, maker
):
    model = make_bert_model(tmp_path) if maker == "cached loss" else make_static_model()
    model = longer(model, similarity) if not unit else model
    model.similarity_fn_name = similarity
    if maker == "trainer":
        trainer = CorrectorTrainer(model, arguments(tmp_path, learning_rate=0.01), corpus=corpus)
        loss = trainer.loss
    else:
        make = CorrectedMultipleNegativesLoss if maker == "loss" else CachedCorrectedMultipleNegativesLoss
        cache = EmbeddingCache.build(model, corpus, tmp_path / "cache", progress=False)
        loss = make(model, corpus, cache, num_negatives=4)
        trainer = CorrectorTrainer(model, arguments(tmp_path), corpus=corpus, loss=loss)
    assert loss.similarity.function is function and loss.scale == scale
    assert loss.corrected.corrector.normalize == (unit or function is cos_sim)
    assert loss.corrected.search.normalize == (function is cos_sim)
    trainer.train()
    # The negatives that are chosen are those that the evaluator ranks highest.
    with torch.no_grad():
        found = CorpusRetrievalEvaluator(corpus, "train").retrieve(model)[:, :3]
        fresh = loss.similarity.comparable(loss.encoder.encode(model, range(200)))
        scores = loss.encode_queries(corpus.qrels("train").queries["text"][:]) @ fresh.T
    assert (scores.topk(3).indices == found).float().mean() > 0.99


def test_a_similarity_that_no_corpus_is_searched_by_is_refused(corpus, tmp_path):
    model = make_static_model()
    model.similarity_fn_name = "euclidean"
    cache = EmbeddingCache.build(model, corpus, tmp_path / "cache", progress=False)
    with pytest.raises(InputError, match="compares by 'euclidean', by which a corpus cannot be searched"):
        CorrectedMultipleNegativesLoss(model, corpus, cache)
    with pytest.raises(InputError, match="compares by 'euclidean'"):
        CorrectorTrainer(model, arguments(tmp_path), corpus=corpus)
    assert CorrectedMultipleNegativesLoss(model, corpus, cache, similarity_fct=cos_sim).scale == 20.0


# ------------------------------------------------------------------ wrappers


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("wrapper", [AdaptiveLayerLoss, Matryoshka2dLoss])
@pytest.mark.filterwarnings("ignore:AdaptiveLayerLoss is not compatible")
def test_losses_over_the_encoders_layers_are_refused(corpus, tmp_path, wrapper, cached):
    model = ENCODERS["BERT"].make(tmp_path)
    cache = EmbeddingCache.build(model, corpus, tmp_path / "cache", progress=False)
    make = CachedCorrectedMultipleNegativesLoss if cached else CorrectedMultipleNegativesLoss
    inner = make(model, corpus, cache, num_negatives=4)
    loss = wrapper(model, inner) if wrapper is AdaptiveLayerLoss else wrapper(model, inner, [16, 8])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    said = "ask a loss once for each layer of the encoder"
    for given in (loss, {"nq": loss}):
        data = {"nq": corpus.pairs("train")} if isinstance(given, dict) else None
        with pytest.raises(InputError, match=said):
            CorrectorTrainer(model, arguments(tmp_path), corpus=corpus, loss=given, train_dataset=data)
    plain = SentenceTransformerTrainer(model, arguments(tmp_path), train_dataset=corpus.pairs("train"), loss=loss)
    with pytest.raises(InputError, match=said):
        plain.train()
    assert inner.corrected.search.steps == 0 and all(
        torch.equal(value, before[name]) for name, value in model.state_dict().items()
    )
    # In a wrapper that asks once a step such a loss trains.
    whole = MatryoshkaLoss(model, make(model, corpus, cache, num_negatives=4), [32, 16])
    CorrectorTrainer(model, arguments(tmp_path), corpus=corpus, loss=whole).train()
    assert whole.loss.corrected.search.steps == 2


# ------------------------------------------------------------------ a corpus without judgements


def test_a_corpus_without_judgements_is_warned_of_once(static_model, tmp_path, caplog):
    queries, texts = make_texts(60)
    corpus = Corpus.from_texts([each for text in texts for each in (text, f"{text} word399")])
    cache = EmbeddingCache.build(static_model, corpus, tmp_path / "cache", progress=False)
    with caplog.at_level(logging.WARNING, logger="st_corrector"):
        loss = CorrectedMultipleNegativesLoss(static_model, corpus, cache, num_negatives=1)
        features = [static_model.preprocess(each) for each in (queries[:8], corpus.texts(range(0, 16, 2)))]
        for _ in range(3):
            loss(features, torch.arange(0, 16, 2))
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "its other positives, and a target that is the query itself, may become its negatives" in warning
    assert "corpus.add_split('train', queries, relevant)" in warning and "split=None" in warning
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="st_corrector"):
        CorrectedMultipleNegativesLoss(static_model, corpus, cache, num_negatives=1, split=None)
        CorrectedMultipleNegativesLoss(static_model, corpus, num_negatives=0)
        ids = [str(n) for n in range(60)]
        relevant = {id: [str(2 * n), str(2 * n + 1)] for n, id in enumerate(ids)}
        corpus.add_split("train", dict(zip(ids, queries, strict=True)), relevant)
        judged = CorrectedMultipleNegativesLoss(static_model, corpus, cache, num_negatives=1)
    assert not caplog.records
    asked = static_model.encode(corpus.texts(range(0, 40, 2)), convert_to_tensor=True)
    positives = torch.arange(0, 40, 2)
    for each, taken in ((loss, 20), (judged, 0)):
        known = pad_rows(known_positives(corpus, each._qrels, positives.tolist(), [-1] * len(positives)))
        chosen = each.select(asked, known, torch.zeros(20), positives).rows[:, 0]
        assert (chosen == torch.arange(1, 41, 2)).sum() == taken, "the other positive of the same query"


# ------------------------------------------------------------------ columns

COLUMNS = {
    "a score beside the label": ({"score": Value("float64")}, "column 'score' holds float64, and every column but the"),
    "a number beside the label": ({"rank": Value("int32")}, r"'rank' holds int32, .*dataset\.remove_columns\('rank'\)"),
    "a list of texts": ({"negatives": Sequence(Value("string"))}, "column 'negatives' holds"),
    "a class beside the label": ({"kind": ClassLabel(names=["a", "b"])}, "column 'kind' holds"),
}
VALUES = {"score": 0.5, "rank": 1, "negatives": ["word1"], "kind": 0}


def trainer_with(model, loss, tmp_path, corpus, data, where):
    settings = {"eval_strategy": "steps", "eval_steps": 1} if where == "eval" else {}
    settings["accelerator_config"] = {"dispatch_batches": False}
    given = {"train_dataset": data} if where == "train" else {"eval_dataset": data}
    return CorrectorTrainer(model, arguments(tmp_path, **settings), corpus=corpus, loss=loss, **given)


@pytest.fixture
def loss(static_model, corpus, tmp_path):
    cache = EmbeddingCache.build(static_model, corpus, tmp_path / "cache", progress=False)
    return CorrectedMultipleNegativesLoss(static_model, corpus, cache, num_negatives=4)


@pytest.mark.parametrize("where", ["train", "eval"])
@pytest.mark.parametrize("kind", COLUMNS)
def test_columns_that_are_no_texts_are_named(static_model, loss, corpus, tmp_path, kind, where):
    (((name, feature),), message) = COLUMNS[kind][0].items(), COLUMNS[kind][1]
    pairs = corpus.pairs("train")
    columns = {**pairs.to_dict(), name: [VALUES[name]] * len(pairs)}
    data = Dataset.from_dict(columns, features=Features({**pairs.features, name: feature}))
    for each in (data, data.to_iterable_dataset()):
        with pytest.raises(InputError, match=message):
            trainer_with(static_model, loss, tmp_path, corpus, each, where)


@pytest.mark.parametrize("where", ["train", "eval"])
@pytest.mark.parametrize("name", ["label", "labels", "score"])
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([None, *range(1, 200)], "has 1 nulls, expected the corpus row of every positive"),
        ([float(row) for row in range(200)], "holds float64, expected integers, the corpus rows"),
        ([str(row) for row in range(200)], r"holds string, expected integers.*corpus\.labels\(ids, queries\)"),
        ([row > 3 for row in range(200)], "holds bool, expected integers"),
        ([[row] for row in range(200)], "holds .*expected integers"),
    ],
    ids=["a null", "floats", "strings", "booleans", "lists"],
)
def test_labels_that_are_no_rows_are_named(static_model, loss, corpus, tmp_path, where, name, values, message):
    pairs = corpus.pairs("train").remove_columns("label").add_column(name, values)
    with pytest.raises(InputError, match=f"The column '{name}' {message}"):
        trainer_with(static_model, loss, tmp_path, corpus, pairs, where)


@pytest.mark.parametrize("where", ["train", "eval"])
@pytest.mark.parametrize("values", [[None, *range(1, 200)], [[0, 5, 7], *([n, 5] for n in range(1, 200))]])
def test_rows_with_wrong_labels_may_be_left_out_as_the_message_says(
    static_model, loss, corpus, tmp_path, where, values
):
    pairs = corpus.pairs("train").remove_columns("label").add_column("label", values)
    with pytest.raises(InputError, match="The column 'label'"):
        trainer_with(static_model, loss, tmp_path, corpus, pairs, where)
    right = pairs.filter(
        lambda row: isinstance(row["label"], int) or (row["label"] is not None and len(row["label"]) == 2)
    )
    assert len(right) == 199
    for data in (right, pairs.select([2, 3])):
        trainer_with(static_model, loss, tmp_path, corpus, data, where)


@pytest.mark.parametrize("name", ["label", "labels", "score"])
def test_rows_by_any_of_the_names_that_a_trainer_knows_are_trained_on(static_model, loss, corpus, tmp_path, name):
    pairs = corpus.pairs("train").rename_column("label", name) if name != "label" else corpus.pairs("train")
    trainer_with(static_model, loss, tmp_path, corpus, pairs, "train").train()
    assert loss.corrected.search.steps == 2


def test_data_of_other_losses_has_what_columns_it_likes(static_model, loss, corpus, tmp_path):
    scored = {"first": ["word1 word2"] * 32, "second": ["word3", "word1"] * 16, "score": [0.1, 0.9] * 16}
    trainer = CorrectorTrainer(
        static_model,
        arguments(tmp_path, max_steps=12),
        corpus=corpus,
        loss={"nq": loss, "scored": CoSENTLoss(static_model)},
        train_dataset={"nq": corpus.pairs("train"), "scored": Dataset.from_dict(scored)},
    )
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    told = [entry["task_loss"] for entry in log if "task_loss" in entry]
    assert 0 < len(told) < len(log) == 12, "only where the step was one of this loss"
    assert all(value == value for value in told) and loss.corrected.search.steps == len(told)
