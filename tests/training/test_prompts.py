"""A model's instructions are trained as they are used: before queries and documents, whoever forgets to say so."""

import pytest
import torch
from conftest import ROOT, make_bert_model, make_static_model, make_texts
from datasets import Dataset, DatasetDict
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator
from support.runs import arguments
from support.states import same, weights

from st_corrector import Corpus, CorrectedMultipleNegativesLoss, CorrectorTrainer, EmbeddingCache, InputError

PROMPTS = {"query": "query : ", "document": "passage : "}


def prompted(seed=0):
    model = make_static_model(seed)
    model.prompts = dict(PROMPTS)
    return model


def trained(folder, corpus, model=None, data=None, **settings):
    torch.manual_seed(0)
    model = model or prompted()
    trainer = CorrectorTrainer(
        model, arguments(folder, save_strategy="no", **settings), corpus=corpus, train_dataset=data
    )
    before = weights(model)
    trainer.train()
    assert not same(before, weights(model))
    return weights(model), trainer.data_collator.prompts


def test_the_models_prompts_are_put_before_the_columns(corpus, tmp_path):
    by_default, found = trained(tmp_path / "default", corpus)
    said, _ = trained(tmp_path / "said", corpus, prompts={"anchor": PROMPTS["query"], "positive": PROMPTS["document"]})
    assert found == {"anchor": "query : ", "positive": "passage : "} and same(by_default, said)
    without, found = trained(tmp_path / "without", corpus, make_static_model())
    assert found == {} and not same(by_default, without)


def test_what_the_arguments_say_holds(corpus, tmp_path):
    _, found = trained(tmp_path / "queries", corpus, prompts={"anchor": "other : ", "positive": PROMPTS["document"]})
    assert found["anchor"] == "other : "
    with pytest.raises(InputError, match="is not the text of corpus row"):
        trained(tmp_path / "none", corpus, prompts={})


@pytest.mark.parametrize("own", [{}, PROMPTS], ids=["a model without prompts", "with"])
@pytest.mark.parametrize("said", [None, {"anchor": "other : ", "positive": PROMPTS["document"]}])
def test_queries_outside_of_batches_have_the_prompt_that_is_trained(tmp_path, own, said):
    model, (queries, texts) = make_static_model(), make_texts(60)
    model.prompts = dict(own)
    corpus, ids = Corpus.from_texts(texts, prompt=PROMPTS["document"] if said else None), list(map(str, range(60)))
    corpus.add_split("train", dict(zip(ids, queries, strict=True)), {id: [id] for id in ids})
    trainer = CorrectorTrainer(model, arguments(tmp_path, prompts=said), corpus=corpus)
    (loss,) = trainer._corrected_losses().values()
    put = said["anchor"] if said else own.get("query", "")
    text = corpus.qrels("train").queries["text"][3]
    features = trainer.data_collator([trainer.train_dataset[n] for n in range(2)])
    assert (
        features["anchor_input_ids"].tolist()
        == model.preprocess(trainer.train_dataset[:2]["anchor"], prompt=put)["input_ids"].tolist()
    )
    expected = model.encode([text], prompt=put, convert_to_tensor=True)
    torch.testing.assert_close(loss.encode_queries([text]), torch.nn.functional.normalize(expected, dim=-1))


@pytest.mark.parametrize("prompts", [{"query": "query : "}, {"passage": "passage : "}, {"document": ""}, {}])
def test_models_with_one_prompt_or_none(corpus, tmp_path, prompts):
    model = make_static_model()
    model.prompts = prompts
    _, found = trained(tmp_path / "out", corpus, model)
    expected = {"anchor": prompts.get("query", ""), "positive": prompts.get("passage", "")}
    assert found == (expected if any(expected.values()) else {})


def test_a_corpus_with_a_prompt_of_its_own(tmp_path):
    queries, texts = make_texts(60)
    corpus = Corpus.from_texts(texts, prompt="word1 : ")
    corpus.add_split("train", {str(n): query for n, query in enumerate(queries)}, {str(n): str(n) for n in range(60)})
    _, found = trained(tmp_path / "out", corpus)
    assert found == {"anchor": "query : ", "positive": "word1 : "}


def columns(corpus, names, negatives=False):
    pairs = corpus.pairs("train")
    texts = {names[0]: pairs["anchor"][:], names[1]: pairs["positive"][:]}
    if negatives:
        texts["negative"] = corpus.texts([(row + 7) % len(corpus) for row, _ in pairs["label"]])
    return Dataset.from_dict({**texts, "label": pairs["label"][:]})


def test_columns_of_any_name_and_several_data_sets(corpus, tmp_path):
    data = columns(corpus, ("question", "answer"), negatives=True)
    _, found = trained(tmp_path / "named", corpus, data=data)
    assert found == {"question": "query : ", "answer": "passage : ", "negative": "passage : "}
    both = DatasetDict({"a": columns(corpus, ("question", "answer")), "b": columns(corpus, ("anchor", "answer"))})
    _, found = trained(tmp_path / "two", corpus, data=both)
    assert found == {"question": "query : ", "answer": "passage : ", "anchor": "query : "}


def test_a_stream(corpus, tmp_path):
    stream = corpus.pairs("train").to_iterable_dataset()
    _, found = trained(tmp_path / "out", corpus, data=stream, accelerator_config={"dispatch_batches": False})
    assert found == {"anchor": "query : ", "positive": "passage : "}


def test_a_column_that_is_both_is_refused_where_it_is_trained_on(corpus, tmp_path):
    one, other = columns(corpus, ("one", "two")), columns(corpus, ("two", "one"))
    both = DatasetDict({"a": one, "b": other})
    with pytest.raises(InputError, match="Column 'two' holds queries in one data set and targets in another"):
        CorrectorTrainer(prompted(), arguments(tmp_path), corpus=corpus, train_dataset=both)
    CorrectorTrainer(make_static_model(), arguments(tmp_path), corpus=corpus, train_dataset=both)
    # What is evaluated on does not decide.
    trainer = CorrectorTrainer(
        prompted(), arguments(tmp_path), corpus=corpus, train_dataset=one, eval_dataset={"b": other}
    )
    assert trainer.data_collator.prompts == {"one": "query : ", "two": "passage : "}


def test_every_trial_has_the_prompts_of_its_model(corpus, tmp_path):
    make = make_static_model
    settings = arguments(tmp_path, save_strategy="no")
    trainer = CorrectorTrainer(model_init=lambda: make(), args=settings, corpus=corpus)
    assert trainer.data_collator.prompts == {}
    make = prompted
    trainer.train()
    assert trainer.data_collator.prompts == {"anchor": "query : ", "positive": "passage : "}


def test_a_collator_of_ones_own_has_them_too(corpus, tmp_path):
    model = prompted()
    own = SentenceTransformerDataCollator(model.preprocess)
    trainer = CorrectorTrainer(model, arguments(tmp_path), corpus=corpus, data_collator=own)
    assert trainer.data_collator.prompts == {"anchor": "query : ", "positive": "passage : "}


@pytest.mark.parametrize("strategy", ["mined-once", "gist"])
def test_rivals_of_the_recipes_are_trained_with_the_same(strategy, corpus, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    from common import Costs, Strategy, trainer_for

    settings = arguments(tmp_path, save_strategy="no", own_pairs_share=0.0, max_steps=1)
    guide = make_bert_model(tmp_path) if strategy == "gist" else None
    model = prompted() if strategy == "mined-once" else make_bert_model(tmp_path)
    model.prompts = dict(PROMPTS)
    trainer = trainer_for(model, corpus, settings, Strategy.parse(strategy), tmp_path / "cache", (), guide, Costs())
    prompts = trainer.data_collator.prompts
    assert [prompts[name] for name in ("anchor", "positive")] == ["query : ", "passage : "]
    assert set(prompts.values()) == set(PROMPTS.values())
    trainer.train()


def test_each_data_set_with_a_loss_of_its_own_has_its_prompts(corpus, tmp_path):
    model = prompted()
    other = Corpus.from_texts(corpus.texts(range(len(corpus))), prompt="word1 : ")
    losses = {
        name: CorrectedMultipleNegativesLoss(
            model, each, EmbeddingCache.build(model, each, tmp_path / name, progress=False), 2
        )
        for name, each in (("a", corpus), ("b", other))
    }
    data = DatasetDict({"a": columns(corpus, ("one", "two")), "b": columns(corpus, ("two", "one"))})
    trainer = CorrectorTrainer(model, arguments(tmp_path / "out", save_strategy="no"), train_dataset=data, loss=losses)
    assert trainer.data_collator.prompts == {
        "a": {"one": "query : ", "two": "passage : "},
        "b": {"two": "query : ", "one": "word1 : "},
    }
    trainer.train()
    assert all(loss.corrected.steps for loss in losses.values())


def test_the_plain_trainer_is_told_by_the_first_batch(corpus, tmp_path):
    model = prompted()
    cache = EmbeddingCache.build(model, corpus, tmp_path / "cache", progress=False)
    loss = CorrectedMultipleNegativesLoss(model, corpus, cache, 2)
    plain = SentenceTransformerTrainingArguments(str(tmp_path / "out"), max_steps=1, report_to="none")
    trainer = SentenceTransformerTrainer(model, plain, train_dataset=corpus.pairs("train"), loss=loss)
    with pytest.raises(InputError, match=r"args\.prompts="):
        trainer.train()
