import csv

import numpy as np
import pytest
import pytrec_eval
import torch
from conftest import make_static_model, make_texts
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

from st_corrector import (
    Corpus,
    CorpusError,
    CorpusRetrievalEvaluator,
    CorrectedMultipleNegativesLoss,
    EmbeddingCache,
    InputError,
)
from st_corrector.data.text import contains_answer
from st_corrector.evaluation import ranking_metrics
from st_corrector.search.topk import RunningTopK


@pytest.fixture
def judged() -> Corpus:
    """300 targets; 60 dev queries with one to three relevant targets each."""
    _, texts = make_texts(300)
    corpus = Corpus.from_texts(texts, titles=["word7" if n % 3 else None for n in range(300)])
    rng = np.random.default_rng(0)
    relevant = {str(q): [str(q), *map(str, rng.choice(300, q % 3, replace=False))] for q in range(60)}
    relevant = {q: sorted(set(targets)) for q, targets in relevant.items()}
    corpus.add_split("dev", {str(q): " ".join(texts[q].split()[:3]) for q in range(60)}, relevant)
    return corpus


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_metrics_equal_sentence_transformers_own(judged, similarity):
    model = SentenceTransformer(modules=list(make_static_model())[:-1], device="cpu", similarity_fn_name=similarity)
    qrels = judged.qrels("dev")
    ids = qrels.queries["id"][:]
    theirs = InformationRetrievalEvaluator(
        queries=dict(zip(ids, qrels.queries["text"][:], strict=True)),
        corpus=dict(zip(judged.ids(range(300)), judged.texts(range(300)), strict=True)),
        relevant_docs={id: set(judged.ids(qrels.rows_of(n))) for n, id in enumerate(ids)},
        precision_recall_at_k=[1, 5, 20, 100],
    )(model)
    ours = CorpusRetrievalEvaluator(judged, "dev", chunk_size=64)(model)
    assert 0.05 < ours["ndcg@10"] < 0.95, "neither trivial nor hopeless"
    shared = {name: theirs[f"{similarity}_{name}"] for name in ours}
    assert set(shared) == {"recall@1", "recall@5", "recall@20", "recall@100", "mrr@10", "ndcg@10", "map@100"}
    assert ours == pytest.approx(shared, abs=1e-9)


def test_hand_made_rankings():
    relevant = np.zeros((3, 100), dtype=bool)
    relevant[0, 0] = relevant[1, 3] = relevant[1, 49] = True
    metrics = ranking_metrics(relevant, np.array([1, 4, 2]))
    assert metrics["recall@1"] == pytest.approx(1 / 3) and metrics["recall@100"] == pytest.approx((1 + 2 / 4) / 3)
    assert metrics["mrr@10"] == pytest.approx((1 + 1 / 4) / 3)
    assert metrics["map@100"] == pytest.approx((1 + (1 / 4 + 2 / 50) / 4) / 3)
    ideal = sum(1 / np.log2(rank + 1) for rank in range(1, 5))
    assert metrics["ndcg@10"] == pytest.approx((1 + 1 / np.log2(5) / ideal) / 3)


def test_answers_match_by_whole_tokens():
    assert contains_answer("Elected in 1971, James  Hutton died.", ["james hutton"])
    assert contains_answer("It cost $5.3 million", ["$5.3 Million"])
    assert contains_answer("Café society", ["cafe\u0301"]), "composed and decomposed forms are the same"
    assert not contains_answer("the 19715 case", ["1971"])
    assert not contains_answer("Hutton, James", ["James Hutton"])
    assert not contains_answer("anything", [""]) and not contains_answer("anything", [])
    assert contains_answer("a_b", ["a"]) and contains_answer("well-known", ["well - known"])


def test_answer_recall_counts_the_text_and_not_the_title(static_model):
    texts = ["word1 word2", "word3 word4", "word5 word6"]
    corpus = Corpus.from_texts(texts, titles=["word9", None, None])
    corpus.add_split(
        "dev",
        {"q": "word1 word2", "r": "word3 word4", "s": "word5 word6", "t": "word5"},
        {"q": ["0"], "r": ["1"], "s": ["2"], "t": ["2"]},
        answers={"q": ["word9"], "r": ["WORD4"], "t": ["word"]},
    )
    metrics = CorpusRetrievalEvaluator(corpus, "dev")(static_model)
    assert metrics["answer_recall@100"] == pytest.approx(1 / 3), "of the three queries that have answers"
    assert metrics["answer_recall@1"] == pytest.approx(1 / 3) and metrics["recall@1"] == 1.0


def test_a_corpus_smaller_than_the_depth(static_model, judged):
    queries, texts = make_texts(4)
    corpus = Corpus.from_texts(texts)
    corpus.add_split("dev", {"q": queries[0]}, {"q": ["0"]})
    evaluator = CorpusRetrievalEvaluator(corpus, "dev")
    rows = evaluator.retrieve(static_model)
    assert sorted(rows[0, :4].tolist()) == [0, 1, 2, 3] and (rows[0, 4:] == -1).all()
    assert evaluator(static_model)["recall@100"] == 1.0


def test_evaluating_changes_nothing(bert_model, judged):
    bert_model.train()
    bert_model[1].eval()
    before = {name: value.clone() for name, value in bert_model.state_dict().items()}
    state = torch.get_rng_state()
    CorpusRetrievalEvaluator(judged, "dev")(bert_model)
    assert torch.equal(torch.get_rng_state(), state)
    assert bert_model.training and bert_model[0].training and not bert_model[1].training
    assert all(torch.equal(value, before[name]) for name, value in bert_model.state_dict().items())


def test_in_the_trainer_with_csv_and_model_card(static_model, judged, tmp_path):
    judged.add_split("train", {"a": "word0"}, {"a": ["3"]})
    evaluator = CorpusRetrievalEvaluator(judged, "dev", name="toy")
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path / "out"),
        max_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_toy_ndcg@10",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = SentenceTransformerTrainer(
        model=static_model,
        args=arguments,
        train_dataset=judged.pairs("dev"),
        loss=CorrectedMultipleNegativesLoss(static_model, judged, num_negatives=0, split="dev"),
        evaluator=evaluator,
    )
    trainer.train()
    assert evaluator.primary_metric == "toy_ndcg@10"
    [path] = (tmp_path / "out" / "eval").glob("*.csv")
    with path.open() as file:
        lines = list(csv.DictReader(file))
    assert [line["steps"] for line in lines] == ["1", "2"] and 0 < float(lines[1]["ndcg@10"]) < 1
    static_model.save_pretrained(str(tmp_path / "saved"))
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "toy_ndcg@10" in card or "ndcg@10" in card
    assert "Corpus Retrieval" in card and "CorrectedMultipleNegativesLoss" in card and "monath2024" in card


def test_what_cannot_be_evaluated_is_refused(judged):
    with pytest.raises(CorpusError, match=r"no judgements for split 'test'; it has \['dev'\]"):
        CorpusRetrievalEvaluator(judged, "test")
    judged.add_split("empty", {}, {})
    with pytest.raises(InputError, match="Split 'empty' has no queries: none"):
        CorpusRetrievalEvaluator(judged, "empty")
    model = SentenceTransformer(modules=list(make_static_model()), device="cpu", similarity_fn_name="euclidean")
    with pytest.raises(InputError, match="compares by 'euclidean'"):
        CorpusRetrievalEvaluator(judged, "dev")(model)


def test_truncated_dimensions_are_compared_at_the_same_width(judged):
    model = SentenceTransformer(modules=list(make_static_model()), device="cpu", truncate_dim=8)
    rows = CorpusRetrievalEvaluator(judged, "dev").retrieve(model)
    queries = model.encode_query(judged.qrels("dev").queries["text"][:], convert_to_tensor=True)
    assert queries.shape[1] == 8
    scores = model.similarity(queries, model.encode_document(judged.texts(range(300)), convert_to_tensor=True))
    torch.testing.assert_close(scores.gather(1, rows), scores.topk(100).values)


def test_ranks_in_float32_under_a_callers_autocast(static_model, judged):
    model = SentenceTransformer(modules=[static_model[0]], device="cpu")  # looked up, and so in float32 under autocast
    evaluator = CorpusRetrievalEvaluator(judged, "dev", write_csv=False)
    expected = evaluator.retrieve(model)
    queries, targets = model.encode_query(judged.qrels("dev").queries["text"][:]), model.encode(judged.texts(range(9)))
    with torch.autocast("cpu", torch.bfloat16):
        coarse = torch.from_numpy(queries) @ torch.from_numpy(targets).T
        assert torch.equal(evaluator.retrieve(model), expected)
    assert coarse.dtype == torch.bfloat16, "a product of one's own is rounded there"


def test_few_scores_are_held_at_once(static_model, judged, monkeypatch):
    expected = CorpusRetrievalEvaluator(judged, "dev").retrieve(static_model)
    widest = []
    update = RunningTopK.update
    monkeypatch.setattr(RunningTopK, "update", lambda self, s, row: widest.append(s.numel()) or update(self, s, row))
    monkeypatch.setattr("st_corrector.evaluation._SCORES_AT_ONCE", 60 * 32)
    assert torch.equal(CorpusRetrievalEvaluator(judged, "dev").retrieve(static_model), expected)
    assert max(widest) <= 60 * 32


# ---------------------------------------------------------------------- grades, as trec_eval has them


def random_judgements(seed, grades, per_query, found):
    """A corpus with ``per_query`` judgements for each of 12 queries, and what 12 random runs found of it."""
    rng = np.random.default_rng(seed)
    corpus = Corpus.from_texts(f"text {n}" for n in range(300))
    judged = {}
    for query in range(12):
        given = rng.choice(grades, per_query).tolist()
        targets = rng.choice(300, per_query, replace=False)
        judged[f"q{query}"] = {str(target): grade for target, grade in zip(targets, given, strict=True)}
        judged[f"q{query}"][str(targets[0])] = max(grades)  # something is relevant
    corpus.add_split("dev", {id: f"question {id}" for id in judged}, judged)
    rows = torch.full((12, 100), -1)
    for query in range(12):
        sure, *relevant = (int(target) for target, grade in judged[f"q{query}"].items() if grade > 0)
        some, rest = [row for row in relevant if rng.random() < 0.4], rng.permutation(300).tolist()
        order = list(dict.fromkeys([rest[0], sure, *rng.permutation([*some, *rest[:20]]).tolist(), *rest]))
        rows[query, :found] = torch.tensor(order[:found])
    return corpus, judged, rows


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("found", [100, 37, 3])
@pytest.mark.parametrize("per_query", [1, 8, 60, 250])
@pytest.mark.parametrize("grades", [[0, 1], [0, 1, 2], [-2, -1, 0, 1, 2, 3], [1], [4]])
def test_metrics_of_graded_judgements_are_trec_evals(seed, found, per_query, grades):
    corpus, judged, rows = random_judgements(seed, grades, per_query, found)
    run = {
        id: {str(row): float(-rank) for rank, row in enumerate(rows[n].tolist()) if row >= 0}
        for n, id in enumerate(judged)
    }
    measures = {"ndcg_cut.10", "recall.1,5,20,100", "map_cut.100"}
    theirs = pytrec_eval.RelevanceEvaluator(judged, measures).evaluate(run)
    cut = {id: {target: score for target, score in targets.items() if score > -10} for id, targets in run.items()}
    first = pytrec_eval.RelevanceEvaluator(judged, {"recip_rank"}).evaluate(cut)
    expected = {f"recall@{k}": np.mean([theirs[id][f"recall_{k}"] for id in judged]) for k in (1, 5, 20, 100)}
    expected["mrr@10"] = np.mean([first[id]["recip_rank"] for id in judged])
    expected["ndcg@10"] = np.mean([theirs[id]["ndcg_cut_10"] for id in judged])
    relevant = {id: sum(grade > 0 for grade in targets.values()) for id, targets in judged.items()}
    # The one difference that the docstring names: beyond 100 relevant targets it is divided by 100.
    beyond = {id: relevant[id] / min(relevant[id], 100) for id in judged}
    expected["map@100"] = np.mean([theirs[id]["map_cut_100"] * beyond[id] for id in judged])
    ours = CorpusRetrievalEvaluator(corpus, "dev").score(rows)
    assert ours == pytest.approx(expected, abs=1e-9)
    assert ours["ndcg@10"] > 0


def test_figures_of_binary_judgements_are_to_the_bit_what_they_were_without_grades():
    corpus, judged, rows = random_judgements(0, [0, 1], 40, 100)
    metrics = CorpusRetrievalEvaluator(corpus, "dev").score(rows)
    found = zip(judged.values(), rows.tolist(), strict=True)
    relevant = np.array([[targets.get(str(row), 0) > 0 for row in each] for targets, each in found])
    total = np.array([sum(targets.values()) for targets in judged.values()])
    discount = 1 / np.log2(np.arange(2, 12))
    ideal = np.concatenate([[0.0], np.cumsum(discount)])[np.minimum(total, 10)]
    assert metrics["ndcg@10"] == ((relevant[:, :10] * discount).sum(1) / ideal).mean()
    assert ranking_metrics(relevant, total) == metrics


def test_the_order_of_grades_decides_ndcg_and_nothing_else():
    corpus = Corpus.from_texts(["a", "b", "c"])
    corpus.add_split("dev", {"q": "x"}, {"q": {"0": 3, "1": 1, "2": 0}})
    evaluator = CorpusRetrievalEvaluator(corpus, "dev")
    best, worse = (evaluator.score(torch.tensor([[*order, *[-1] * 97]])) for order in ((0, 1, 2), (1, 0, 2)))
    assert best["ndcg@10"] == 1.0
    assert worse["ndcg@10"] == pytest.approx((1 + 3 / np.log2(3)) / (3 + 1 / np.log2(3)))
    assert {name: worse[name] for name in worse if name != "ndcg@10"} == {
        name: best[name] for name in best if name != "ndcg@10"
    }


# ---------------------------------------------------------------------- queries that are targets


@pytest.fixture
def duplicates() -> Corpus:
    """150 questions that are all targets, and each one's duplicate; some queries have no target of their id."""
    questions, texts = make_texts(150)
    corpus = Corpus.from_texts([*questions, *texts], ids=[*(f"q{n}" for n in range(150)), *range(150)])
    queries = {f"q{n}": questions[n] for n in range(40)} | {f"other{n}": questions[n] for n in range(40, 50)}
    relevant = {id: [number, (number + 7) % 150] for number, id in enumerate(queries)}
    relevant["q3"] = {"q3": 2, 3: 1}  # judged relevant to itself
    corpus.add_split("dev", queries, relevant)
    return corpus


def test_the_target_with_the_querys_id_leaves_the_ranking_before_it_is_cut(static_model, duplicates):
    plain = CorpusRetrievalEvaluator(duplicates, "dev").retrieve(static_model)
    evaluator = CorpusRetrievalEvaluator(duplicates, "dev", ignore_identical_ids=True)
    rows = evaluator.retrieve(static_model)
    assert rows.shape == (50, 100) and (rows >= 0).all(), "one more is retrieved in its place"
    ids = duplicates.qrels("dev").queries["id"][:]
    for id, with_it, without in zip(ids, plain.tolist(), rows.tolist(), strict=True):
        own = duplicates.rows_of([id], missing=-1)[0]
        assert own not in without
        rest = [row for row in with_it if row != own]
        assert without[: len(rest)] == rest, "the others keep their order"
    assert (plain[:40, 0] == torch.arange(40)).all(), "each question is the first that is found for itself"
    embeddings = torch.from_numpy(static_model.encode_document(duplicates.texts(range(300))))
    cache = EmbeddingCache.from_tensor(embeddings)
    assert torch.equal(evaluator.retrieve(static_model, cache), rows)


def test_without_identical_ids_the_figures_are_beirs(static_model, duplicates):
    evaluator = CorpusRetrievalEvaluator(duplicates, "dev", ignore_identical_ids=True)
    queries = duplicates.qrels("dev").queries
    scores = static_model.similarity(
        static_model.encode_query(queries["text"][:]), static_model.encode_document(duplicates.texts(range(300)))
    )
    ids = duplicates.ids(range(300))
    run = {id: dict(zip(ids, found.tolist(), strict=True)) for id, found in zip(queries["id"], scores, strict=True)}
    qrels = duplicates.qrels("dev")
    judged = {
        id: dict(zip(duplicates.ids(qrels.rows_of(n)), map(int, qrels.grades_of(n)), strict=True))
        for n, id in enumerate(queries["id"])
    }
    assert judged["q3"] == {"q3": 2, "3": 1}, "the judgement stays, though it cannot be found"
    for id, found in run.items():  # as BEIR's EvaluateRetrieval.evaluate does
        found.pop(id, None)
    theirs = pytrec_eval.RelevanceEvaluator(judged, {"ndcg_cut.10", "recall.1,100", "map_cut.100"}).evaluate(run)
    metrics = evaluator(static_model)
    for ours, name in (("ndcg@10", "ndcg_cut_10"), ("recall@1", "recall_1"), ("map@100", "map_cut_100")):
        assert metrics[ours] == pytest.approx(np.mean([each[name] for each in theirs.values()]), abs=1e-6)
    assert metrics["ndcg@10"] > 0 and metrics["recall@100"] < 1
    assert evaluator.get_config_dict()["ignore_identical_ids"]


def test_a_corpus_of_fewer_targets_than_the_depth_loses_the_querys_own_alone(static_model):
    corpus = Corpus.from_texts(["word1 word2", "word3", "word5 word6"], ids=["q", 1, 2])
    corpus.add_split("dev", {"q": "word1 word2", 5: "word3"}, {"q": [1], 5: [1]}, answers={"q": ["word1"]})
    evaluator = CorpusRetrievalEvaluator(corpus, "dev", ignore_identical_ids=True)
    rows = evaluator.retrieve(static_model)
    assert rows.shape == (2, 100)
    assert sorted(rows[0, :2].tolist()) == [1, 2] and (rows[0, 2:] == -1).all()
    assert sorted(rows[1, :3].tolist()) == [0, 1, 2] and (rows[1, 3:] == -1).all()
    assert evaluator(static_model)["answer_recall@100"] == 0.0, "nor is its text looked at"
