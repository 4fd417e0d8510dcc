"""Negatives that the data brings with it, beside those that a step chooses."""

import pytest
import torch
from conftest import make_bert_model, make_static_model, make_texts
from datasets import Dataset
from sentence_transformers import SentenceTransformerTrainer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from support.batches import batch_of
from support.runs import arguments
from support.states import gradient_difference, gradients, weights, without_dropout

from st_corrector import (
    CachedCorrectedMultipleNegativesLoss,
    Corpus,
    CorpusError,
    CorrectedMultipleNegativesLoss,
    CorrectorTrainer,
    EmbeddingCache,
    FalseNegativeFilter,
    InputError,
    NegativeSettings,
    mine_negatives,
)


@pytest.fixture
def cache(static_model, corpus, tmp_path):
    return EmbeddingCache.build(static_model, corpus, tmp_path / "cache", dtype="float32", progress=False)


NEGATIVES = [[100 + 2 * n, 101 + 2 * n] for n in range(12)]


def labelled(corpus, negatives, rows=range(12)):
    """Features of pairs, and labels that name negatives."""

    def batch(model):
        features, labels = batch_of(model, corpus, rows)
        keys = torch.tensor(corpus.pairs("train")["label"])[list(rows), 1]
        return features, torch.cat([labels[:, None], keys[:, None], torch.tensor(negatives)], dim=1)

    return batch


@pytest.mark.parametrize("make", [CorrectedMultipleNegativesLoss, CachedCorrectedMultipleNegativesLoss])
def test_with_nothing_chosen_it_is_sentence_transformers_loss(corpus, tmp_path, make):
    model = without_dropout(make_bert_model(tmp_path)).train()
    features, labels = labelled(corpus, NEGATIVES)(model)
    make(model, corpus, num_negatives=0)(features, labels)["task_loss"].backward()
    found = gradients(model)
    model.zero_grad()
    columns = [model.preprocess(corpus.texts([each[n] for each in NEGATIVES])) for n in (0, 1)]
    expected = MultipleNegativesRankingLoss(model)([*(dict(each) for each in features), *columns], None)
    expected.backward()
    value = make(model, corpus, num_negatives=0)([dict(each) for each in features], labels)["task_loss"]
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    assert gradient_difference(found, gradients(model)) < 1e-4


def test_texts_say_what_rows_say(static_model, corpus, cache):
    features, labels = labelled(corpus, NEGATIVES)(static_model)
    columns = [static_model.preprocess(corpus.texts([each[n] for each in NEGATIVES])) for n in (0, 1)]
    values = []
    for given in ((features, labels), ([*features, *columns], labels[:, :2]), ([*features, columns[1]], labels[:, :3])):
        loss = CorrectedMultipleNegativesLoss(static_model, corpus, cache, 4, "identity")
        values.append(float(loss([dict(each) for each in given[0]], given[1])["task_loss"]))
    assert values[0] == pytest.approx(values[1]) == pytest.approx(values[2])
    plain = CorrectedMultipleNegativesLoss(static_model, corpus, cache, 4, "identity")(features, labels[:, :2])
    assert float(plain["task_loss"]) < values[0] - 0.01, "they count"


@pytest.mark.parametrize("shared", [True, False])
def test_each_candidate_counts_once_for_each_query(static_model, corpus, cache, shared):
    settings = NegativeSettings(4, share_negatives=shared, in_batch_negatives=shared)
    features, labels = labelled(corpus, NEGATIVES)(static_model)
    loss = CorrectedMultipleNegativesLoss(static_model, corpus, cache, None, "identity", negatives=settings)
    queries, positives = (static_model(dict(each))["sentence_embedding"].detach() for each in features)
    exclude = torch.tensor([[row] for row in labels[:, 0]])
    chosen = loss.select(queries, exclude, (queries * positives).sum(1), labels[:, :2]).rows
    # Half of what the data names is what a step would choose anyway, and twice.
    labels[:, 2:] = torch.stack([chosen[:, 0], chosen[:, 0]], dim=1)
    labels[6:, 3] = torch.tensor([each[1] for each in NEGATIVES[6:]])
    union = [{*chosen[n].tolist(), *labels[n, 2:].tolist()} for n in range(12)]
    everything = set().union(*union) | set(labels[:, 0].tolist())
    expected = []
    for n in range(12):
        own = int(labels[n, 0])
        columns = sorted((everything if shared else union[n]) - {own} - set(corpus.duplicates_of(own).tolist()))
        targets = torch.cat(
            [positives[n][None], static_model.encode_document(corpus.texts(columns), convert_to_tensor=True)]
        )
        logits = 20 * torch.nn.functional.normalize(targets, dim=1) @ torch.nn.functional.normalize(queries[n], dim=0)
        expected.append(-logits.log_softmax(0)[0])
    found = loss(features, labels)["task_loss"]
    assert float(found) == pytest.approx(float(torch.stack(expected).mean()), rel=1e-4)


def test_no_rule_contradicts_the_data_and_what_is_relevant_is_left_out(static_model, tmp_path):
    queries, texts = make_texts(60)
    corpus = Corpus.from_texts([*texts, texts[3].upper()], cache_dir=tmp_path)
    corpus.add_split("train", {"a": queries[0], "b": queries[1]}, {"a": ["0", "5"], "b": ["1"]})
    cache = EmbeddingCache.build(static_model, corpus, tmp_path / "cache", progress=False)
    features = [static_model.preprocess(queries[:2]), static_model.preprocess(texts[:2])]

    def value(negatives, **rules):
        settings = NegativeSettings(
            2, share_negatives=False, in_batch_negatives=False, false_negatives=FalseNegativeFilter(**rules)
        )
        loss = CorrectedMultipleNegativesLoss(static_model, corpus, cache, None, "identity", negatives=settings)
        labels = torch.tensor(corpus.labels(["0", "1"], queries[:2], negatives))
        return float(loss([dict(each) for each in features], labels)["task_loss"])

    assert value([["30"], ["31"]], max_score=-1.0) > 0.1, "while all that is chosen is too similar"
    assert value([[], []], max_score=-1.0) == pytest.approx(0, abs=1e-6)
    assert value([["5"], []], max_score=-1.0) == pytest.approx(0, abs=1e-6), "relevant to the same query"
    assert value([["30", "30"], ["31"]]) == pytest.approx(value([["30"], ["31"]]))


def test_rules_hold_for_other_negatives_where_nothing_is_chosen(static_model, corpus, cache):
    rules = NegativeSettings(0, false_negatives=FalseNegativeFilter(max_score=-1.0))
    loss = CorrectedMultipleNegativesLoss(static_model, corpus, cache, negatives=rules)
    features, labels = labelled(corpus, [*[[-1]] * 11, [70]])(static_model)
    values = []
    for given in (labels[:, :2], labels):
        values.append(12 * float(loss([dict(each) for each in features], given)["task_loss"]))
    query, positive = (static_model(dict(each))["sentence_embedding"][11] for each in features)
    negative = static_model.encode_document(corpus.texts([70]), convert_to_tensor=True)[0]
    logits = 20 * torch.stack([torch.cosine_similarity(query, each, dim=0) for each in (positive, negative)])
    assert values[0] == pytest.approx(0, abs=1e-5)
    shared = values[1] + float(logits.log_softmax(0)[0])
    assert shared >= -1e-3, "its own query's at least"
    alone = NegativeSettings(0, share_negatives=False, false_negatives=FalseNegativeFilter(max_score=-1.0))
    loss = CorrectedMultipleNegativesLoss(static_model, corpus, cache, negatives=alone)
    value = 12 * float(loss([dict(each) for each in features], labels)["task_loss"])
    assert value == pytest.approx(-float(logits.log_softmax(0)[0]), rel=1e-3)


def test_a_trainer_learns_from_mined_tuples_and_from_ids(corpus, tmp_path):
    model = make_static_model()
    cache = EmbeddingCache.build(model, corpus, tmp_path / "cache", progress=False)
    settings = NegativeSettings(2)
    mined = mine_negatives(model, corpus, cache, tmp_path / "a", negatives=settings, output_format="n-tuple")
    ids = mine_negatives(model, corpus, cache, tmp_path / "b", negatives=settings, output_format="ids")
    labels = corpus.labels(ids["positive-id"][:], mined["anchor"][:])
    by_text = mined.add_column("label", labels)
    pairs = mined.select_columns(["anchor", "positive"])
    by_row = pairs.add_column("label", corpus.labels(ids["positive-id"][:], mined["anchor"][:], ids["negative-ids"][:]))
    trained = []
    for number, data in enumerate((by_text, by_row)):
        model = make_static_model()
        args = arguments(tmp_path / str(number), max_steps=20, learning_rate=0.05, num_negatives=3, logging_steps=1)
        trainer = CorrectorTrainer(model, args, corpus=corpus, train_dataset=data)
        trainer.train()
        log = [entry["task_loss"] for entry in trainer.state.log_history if "task_loss" in entry]
        assert sum(log[-5:]) < sum(log[:5]) - 0.5
        trained.append(weights(model))
    for name, value in trained[0].items():
        torch.testing.assert_close(trained[1][name], value, atol=1e-5, rtol=1e-4)
    model = make_static_model()
    loss = CorrectedMultipleNegativesLoss(model, corpus, num_negatives=0)
    SentenceTransformerTrainer(model, arguments(tmp_path / "plain", max_steps=2), by_text, loss=loss).train()
    assert loss.targets_encoded > 2 * 16, "without a cache, in the plain trainer, they are encoded too"


def test_bad_negatives_are_refused(static_model, corpus, cache, tmp_path):
    loss = CorrectedMultipleNegativesLoss(static_model, corpus, cache, 4, "identity")

    def refused(message, negatives=None, column=None):
        features, labels = labelled(corpus, negatives or NEGATIVES)(static_model)
        columns = [] if column is None else [static_model.preprocess(column)]
        with pytest.raises(InputError, match=message):
            loss([*features, *columns], labels)

    refused(r"The negative 200 \(position 1 in the batch\) is no row of the corpus", [[5], [200], *[[5]] * 10])
    refused(r"The negative -2 \(position 0", [[-2], *[[50]] * 11])
    refused(r"Row 2 is the positive and a negative of the query at position 2", [[50], [50], [2], *[[50]] * 9])
    refused(
        r"The negative at position 3 in the batch is no target of the corpus: 'word1 word2'.*Corpus.from_pairs",
        column=[*corpus.texts(range(50, 53)), "word1 word2", *corpus.texts(range(60, 68))],
    )
    one_each = corpus.labels(["7", "8"], ["q", "r"], ["12", 34])
    assert [row[2:] for row in one_each] == [[12], [34]], "one id is no list of characters"
    with pytest.raises(CorpusError, match=r"1 pairs have their positive among their negatives, e.g. '7' of 'q'"):
        corpus.labels(["7"], ["q"], [["8", "7"]])
    with pytest.raises(CorpusError, match="1 ids, 1 anchors and 2 lists of negatives: give one of each"):
        corpus.labels(["7"], ["q"], [["8"], []])
    assert [row[2:] for row in corpus.labels(["7", "8"], ["q", "r"], [["1", "2"], []])] == [[1, 2], [-1, -1]]
    ragged = Dataset.from_dict({"anchor": ["a", "b"], "positive": corpus.texts([0, 1]), "label": [[0, 1, 5], [1, 2]]})
    with pytest.raises(InputError, match="lists of one length"):
        CorrectorTrainer(make_static_model(), arguments(tmp_path), corpus=corpus, train_dataset=ragged)
