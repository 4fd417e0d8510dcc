import csv

import numpy as np
import pytest
import torch
from conftest import make_static_model, make_texts
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

from st_corrector import Corpus, CorpusError, CorpusRetrievalEvaluator, CorrectedMultipleNegativesLoss, InputError
from st_corrector.evaluation import ranking_metrics
from st_corrector.text import contains_answer
from st_corrector.topk import RunningTopK


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


def test_few_scores_are_held_at_once(static_model, judged, monkeypatch):
    expected = CorpusRetrievalEvaluator(judged, "dev").retrieve(static_model)
    widest = []
    update = RunningTopK.update
    monkeypatch.setattr(RunningTopK, "update", lambda self, s, row: widest.append(s.numel()) or update(self, s, row))
    monkeypatch.setattr("st_corrector.evaluation._SCORES_AT_ONCE", 60 * 32)
    assert torch.equal(CorpusRetrievalEvaluator(judged, "dev").retrieve(static_model), expected)
    assert max(widest) <= 60 * 32
