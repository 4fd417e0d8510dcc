"""A document is encoded by the document's side, everywhere, whatever the model is made of."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_static_model, make_texts
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.losses import gradcache
from sentence_transformers.base.modules import Router
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from support.encoders import ENCODERS, dense, of
from support.runs import arguments

import st_corrector
from st_corrector import (
    CachedCorrectedMultipleNegativesLoss,
    CacheError,
    Corpus,
    CorpusRetrievalEvaluator,
    CorrectedMultipleNegativesLoss,
    CorrectorTrainer,
    EmbeddingCache,
    InputError,
)
from st_corrector.data.encoding import DocumentEncoder
from st_corrector.data.routing import modules_for
from st_corrector.storage.fingerprint import differences

EVERY = pytest.mark.parametrize("name", ENCODERS)
TARGETS = 60
NOT_CUT = ("own module, the task", "own module, a list for each text")


@pytest.fixture
def judged() -> Corpus:
    queries, texts = make_texts(TARGETS)
    corpus = Corpus.from_texts(texts)
    ids = [str(n) for n in range(TARGETS)]
    corpus.add_split("train", dict(zip(ids, queries, strict=True)), {id: [id] for id in ids})
    return corpus


@pytest.fixture
def model(name, tmp_path) -> SentenceTransformer:
    return ENCODERS[name].make(tmp_path)


def step(loss, model, corpus):
    """One step of the loss over the first pairs, as a loop of one's own would make it; the loss, back-propagated."""
    pairs = corpus.pairs("train")[:8]
    features = [
        model.preprocess(pairs[column], prompt=model.prompts.get(task), task=task)
        for column, task in (("anchor", "query"), ("positive", "document"))
    ]
    model.zero_grad()
    losses = loss(features, torch.tensor(pairs["label"]))
    sum(losses.values()).backward()
    return losses["task_loss"].item()


def gradients(model):
    return {name: each.grad for name, each in model.named_parameters() if each.grad is not None}


@EVERY
def test_cache_and_evaluator_encode_a_document_as_the_model_does(model, judged, tmp_path):
    cache = EmbeddingCache.build(model, judged, tmp_path / "cache", progress=False)
    documents = model.encode_document(judged.texts(range(TARGETS)), convert_to_tensor=True).clone()
    assert (cache[range(TARGETS)] - documents).abs().max() < 1e-6
    assert len(documents.unique(dim=0)) > TARGETS - 2, "different texts are told apart"
    qrels = judged.qrels("train")
    theirs = InformationRetrievalEvaluator(
        dict(enumerate(qrels.queries["text"][:])),
        dict(enumerate(judged.texts(range(TARGETS)))),
        {query: {int(row) for row in qrels.rows_of(query)} for query in range(len(qrels))},
        map_at_k=[100],
        write_csv=False,
    )(model)
    ours = CorpusRetrievalEvaluator(judged, "train", write_csv=False)(model)
    name = {"cosine": "cosine", "dot": "dot"}[model.similarity_fn_name]
    for metric in ("ndcg@10", "mrr@10", "map@100"):
        assert ours[metric] == pytest.approx(theirs[f"{name}_{metric}"], abs=1e-6)


@EVERY
@pytest.mark.parametrize("kind", ["plain", "gradient cache"])
def test_negatives_are_encoded_like_the_cache_and_teach_both_sides(name, kind, model, judged, tmp_path):
    cache = EmbeddingCache.build(model, judged, tmp_path / "cache", progress=False)
    make = {"plain": CorrectedMultipleNegativesLoss, "gradient cache": CachedCorrectedMultipleNegativesLoss}[kind]
    settings = {} if kind == "plain" else {"mini_batch_size": 3}
    if kind == "gradient cache" and (ENCODERS[name].is_static or name in NOT_CUT):
        with pytest.raises(InputError, match=r"mini-batches|takes the task as an argument"):
            step(make(model, judged, cache, num_negatives=3, **settings), model, judged)
        return
    model.train()
    loss = make(model, judged, cache, num_negatives=3, corrector="ridge", **settings)
    task_loss = step(loss, model, judged)
    # The cache is the model's own: whatever the step encodes afresh, positives and negatives, is what is in it.
    metrics = loss.pop_metrics()
    assert abs(metrics["drift"]) < 1e-6 and metrics["targets_encoded"] > 8
    assert torch.isfinite(torch.tensor(task_loss)) and gradients(model)
    if kind == "gradient cache":
        cached = {name: value.clone() for name, value in gradients(model).items()}
        plain = CorrectedMultipleNegativesLoss(model, judged, cache, num_negatives=3, corrector="ridge")
        assert step(plain, model, judged) == pytest.approx(task_loss, abs=1e-5)
        for parameter, value in gradients(model).items():
            torch.testing.assert_close(cached[parameter], value, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", [name for name, encoder in ENCODERS.items() if encoder.is_saved])
def test_a_models_cache_is_that_of_the_model_saved_and_loaded(name, model, judged, tmp_path):
    built = EmbeddingCache.build(model, judged, tmp_path / "cache", progress=False)
    model.save_pretrained(str(tmp_path / "saved"))
    loaded = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    again = EmbeddingCache.build(loaded, judged, tmp_path / "cache", progress=False)
    assert again.fingerprint == built.fingerprint
    other = SentenceTransformer(str(tmp_path / "saved"), device="cpu", model_kwargs={"dtype": "bfloat16"})
    other.bfloat16()
    CorrectedMultipleNegativesLoss(other, judged, again, num_negatives=3)


@pytest.mark.parametrize("name", ["a decoder, last token", "BERT", "two heads", "T5's encoder"])
def test_a_models_cache_is_that_of_what_training_made_of_it(name, model, judged, tmp_path):
    cache = EmbeddingCache.build(model, judged, tmp_path / "cache", progress=False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    chosen = arguments(
        tmp_path / "out",
        router_mapping={"anchor": "query", "positive": "document"} if "heads" in name else {},
        prompts={"anchor": "query : ", "positive": "passage : "} if model.prompts.get("document") else None,
        num_negatives=3,
        max_steps=2,
        learning_rate=1e-3,
        use_cpu=True,
    )
    loss = CorrectedMultipleNegativesLoss(model, judged, cache, num_negatives=3)
    CorrectorTrainer(model, chosen, corpus=judged, loss=loss).train()
    assert any(not torch.equal(value, before[key]) for key, value in model.state_dict().items())
    CorrectedMultipleNegativesLoss(model, judged, cache, num_negatives=3)
    trained = SentenceTransformer(str(tmp_path / "out" / "checkpoint-2"), device="cpu")
    CorrectedMultipleNegativesLoss(trained, judged, EmbeddingCache.load(tmp_path / "cache"), num_negatives=3)


# ------------------------------------------------------------------ routes


@pytest.mark.parametrize("name", ["two towers", "a router in each route"])
def test_columns_that_were_prepared_for_no_side_are_refused(model, judged, tmp_path):
    cache = EmbeddingCache.build(model, judged, tmp_path / "cache", progress=False)
    loss = CorrectedMultipleNegativesLoss(model, judged, cache, num_negatives=3)
    pairs = judged.pairs("train")[:8]
    labels = torch.tensor(pairs["label"])
    query, document = model.preprocess(pairs["anchor"], task="query"), model.preprocess(pairs["positive"])
    with pytest.raises(InputError, match=r"holds targets: pass router_mapping=\{'anchor': 'query', 'positive': 'docu"):
        loss([query, document], labels)
    with pytest.raises(InputError, match="holds queries: pass router_mapping"):
        loss([model.preprocess(pairs["anchor"]), model.preprocess(pairs["positive"], task="document")], labels)
    with pytest.raises(InputError, match="positives go by the route of the task 'query'"):
        loss([query, model.preprocess(pairs["positive"], task="query")], labels)
    assert loss.corrected.search.steps == 0


@pytest.mark.parametrize("name", ["two heads", "two heads, queries' by default", "two heads at the end"])
def test_behind_a_shared_encoder_columns_find_their_side_without_a_mapping(model, judged, tmp_path):
    cache = EmbeddingCache.build(model, judged, tmp_path / "cache", progress=False)
    loss = CorrectedMultipleNegativesLoss(model, judged, cache, num_negatives=3)
    pairs = judged.pairs("train")[:8]
    losses = loss(
        [model.preprocess(pairs["anchor"]), model.preprocess(pairs["positive"])], torch.tensor(pairs["label"])
    )
    assert abs(loss.pop_metrics()["drift"]) < 1e-6
    losses["task_loss"].backward()
    router = next(module for module in model.modules() if isinstance(module, Router))
    for side, head in router.sub_modules.items():
        assert head[0].linear.weight.grad.abs().max() > 0, side
    # With the documents' head frozen too, nothing of the documents' side can be trained.
    model.requires_grad_(False)
    router.sub_modules["query"].requires_grad_(True)
    frozen = CorrectedMultipleNegativesLoss(model, judged, cache, num_negatives=3, corrector="mlp")
    assert frozen.corrected.corrector.name == "identity" and not frozen.corrected.writes_back
    router.sub_modules["document"].requires_grad_(True)
    assert CorrectedMultipleNegativesLoss(model, judged, cache, num_negatives=3).corrected.corrector.name == "mlp"


@pytest.mark.parametrize("place", ["first", "behind an encoder", "in a route"])
def test_routes_that_are_missing_are_named_with_what_to_do(place, judged, tmp_path):
    names = {"question": [dense(1)], "passage": [dense(2)]}
    static = list(make_static_model(0, 32))[:-1]
    modules = {
        "first": [Router({name: [*list(make_static_model(0, 32))[:-1], *head] for name, head in names.items()})],
        "behind an encoder": [*static, Router(names, default_route="passage")],
        "in a route": [Router({"query": [*static, dense(0)], "document": [*static, Router(names)]})],
    }[place]
    model = of(*modules)
    said = r"no route for the task '(query|document)', only \['question', 'passage'\].*route_mappings"
    with pytest.raises(InputError, match=said):
        EmbeddingCache.build(model, judged, tmp_path / "cache", progress=False)
    with pytest.raises(InputError, match=said):
        CorpusRetrievalEvaluator(judged, "train")(model)
    only = of(Router({"document": static}))
    cache = EmbeddingCache.build(only, judged, tmp_path / "only", progress=False)
    with pytest.raises(InputError, match="no route for the task 'query'"):
        CorrectedMultipleNegativesLoss(only, judged, cache)


# ------------------------------------------------------------------ what a cache depends on


@pytest.mark.parametrize("name", ["two towers", "two heads", "a router in each route"])
def test_a_cache_depends_on_the_documents_side_alone(model, judged, tmp_path):
    encoder = DocumentEncoder(model, judged, progress=False)
    before = encoder.fingerprint(model)
    shared = {id(parameter) for module in modules_for(model, "document") for parameter in module.parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            if id(parameter) not in shared:
                parameter.add_(1.0)
    assert encoder.fingerprint(model) == before
    with torch.no_grad():
        next(modules_for(model, "document")[0].parameters()).add_(1)
    assert {key for key, value in encoder.fingerprint(model).items() if value != before[key]} == {"weights"}


def test_a_caches_difference_is_said_in_words(judged, tmp_path):
    model = ENCODERS["BERT"].make(tmp_path)
    cache = EmbeddingCache.build(model, judged, tmp_path / "cache", progress=False)

    def refused(change, expected):
        changed = ENCODERS["BERT"].make(tmp_path)
        change(changed)
        with pytest.raises(InputError) as raised:
            CorrectedMultipleNegativesLoss(changed, judged, cache, num_negatives=3)
        said = str(raised.value)
        assert expected in said and not re.search("[0-9a-f]{32}", said), said

    refused(lambda model: setattr(model[1], "pooling_mode", "cls"), "1 Pooling, pooling_mode: 'mean' there, 'cls' here")
    refused(lambda model: setattr(model[0].config, "layer_norm_eps", 1e-3), "layer_norm_eps: 1e-12 there, 0.001 here")
    refused(lambda model: model.tokenizer.add_tokens(["new"]), "tokenizer: another vocabulary, other special tokens")
    refused(lambda model: model.append(dense(0)), "modules, 3 Dense: here, and not there")
    changed = ENCODERS["BERT"].make(tmp_path)
    with torch.no_grad():
        changed[0].model.embeddings.word_embeddings.weight[9].add_(1.0)
    with pytest.raises(CacheError, match="weights: other weights, or the same in another precision"):
        EmbeddingCache.build(changed, judged, tmp_path / "cache", progress=False)
    cache.fingerprint.update(modules="0123456789abcdef" * 2)
    refused(lambda model: None, "version: described by an earlier version of st_corrector")


def test_what_changes_no_embedding_is_no_difference(judged, tmp_path):
    model = ENCODERS["RoBERTa"].make(tmp_path)
    encoder = DocumentEncoder(model, judged, progress=False)
    before, documents = encoder.fingerprint(model), model.encode_document(judged.texts(range(9)))
    config = model[0].config
    for name, value in {
        "pad_token_id": 5,
        "eos_token_id": [1, 2],
        "use_cache": True,
        "hidden_dropout_prob": 0.9,
        "dtype": "bfloat16",
        "output_attentions": False,
        "id2label": {0: "a"},
        "_name_or_path": "elsewhere",
    }.items():
        setattr(config, name, value)
    assert encoder.fingerprint(model) == before
    assert (model.encode_document(judged.texts(range(9))) == documents).all()
    # The padding token's id counts where an encoder's positions begin behind it.
    model[0].model.embeddings.padding_idx = 3
    assert not (model.encode_document(judged.texts(range(9))) == documents).all()
    assert differences(encoder.fingerprint(model), before) == [
        "modules, 0 Transformer, positions_from: [3] there, [0] here"
    ]


def test_a_quantized_model_is_refused_by_a_cache_and_evaluated(judged, tmp_path):
    model = ENCODERS["BERT"].make(tmp_path)
    quantized = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    with pytest.raises(InputError, match="a quantized model cannot be trained"):
        EmbeddingCache.build(quantized, judged, tmp_path / "cache", progress=False)
    assert not (tmp_path / "cache").exists(), "nothing partial is left"
    assert 0 < CorpusRetrievalEvaluator(judged, "train", write_csv=False)(quantized)["recall@100"] <= 1


@pytest.mark.parametrize("missing", ["CachedLossMixin", "_backward_hook", "_minibatch_ranges", "the module"])
def test_a_sentence_transformers_without_our_gradient_caching_breaks_nothing_else(missing, judged, monkeypatch):
    if missing == "the module":
        monkeypatch.setitem(sys.modules, gradcache.__name__, None)
    else:
        monkeypatch.delattr(gradcache, missing)
    path = Path(st_corrector.losses.__file__).with_name("cached_multiple_negatives.py")
    spec = importlib.util.spec_from_file_location("st_corrector.losses.cached_anew", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    named = "CachedLossMixin" if missing == "the module" else missing
    with pytest.raises(InputError, match=rf"has no base\.losses\.gradcache\.{named}, on which"):
        module.CachedCorrectedMultipleNegativesLoss(make_static_model(), judged, num_negatives=0)
