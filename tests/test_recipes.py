import argparse
import csv
import gzip
import importlib
import json
import runpy
import shutil
import sys
import time

import pytest
import torch
from conftest import ROOT, make_texts
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import pairwise_cos_sim
from support.layouts import upload, write_repository
from support.runs import arguments
from support.scripts import run
from transformers import TrainerCallback

from st_corrector import Corpus, CorpusError, CorpusRetrievalEvaluator, EmbeddingTeacher, InputError
from st_corrector.data.qrels import Qrels
from st_corrector.training.own_pairs import own_positions

RECIPES = ROOT / "recipes"


ACCELERATE = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1")


@pytest.fixture
def recipe_module(monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES))
    return lambda name: importlib.import_module(name)


@pytest.fixture(scope="module")
def small_nq(nq, tmp_path_factory):
    """Real questions and passages: 80 training and 30 dev questions over 200 passages of Natural Questions."""
    folder = tmp_path_factory.mktemp("nq")
    (folder / "qrels").mkdir()
    wanted, queries = set(), set()
    for split, count in (("train", 80), ("dev", 30)):
        with (nq / "qrels" / f"{split}.tsv").open() as file:
            lines = list(csv.reader(file, delimiter="\t"))[: count + 1]
        (folder / "qrels" / f"{split}.tsv").write_text("".join("\t".join(line) + "\n" for line in lines))
        queries |= {line[0] for line in lines[1:]}
        wanted |= {line[1] for line in lines[1:]}
    others = 200 - len(wanted)
    with gzip.open(nq / "corpus.jsonl.gz", "rt") as source, (folder / "corpus.jsonl").open("w") as target:
        for line in source:
            if json.loads(line)["_id"] in wanted:
                target.write(line)
            elif others > 0:
                others -= 1
                target.write(line)
    with (nq / "queries.jsonl").open() as source, (folder / "queries.jsonl").open("w") as target:
        target.writelines(line for line in source if json.loads(line)["_id"] in queries)
    return folder


METRICS = {"mrr@10", "ndcg@10", "recall@1", "recall@5", "recall@20", "recall@100", "map@100", "answer_recall@20"}


def check_results(path, strategy, steps, metrics=METRICS):
    results = json.loads(path.read_text())
    assert results["strategy"] == strategy and results["steps"] == steps and results["seed"] == 3
    for when in ("before", "after"):
        assert results[when].keys() >= metrics and all(0 <= value <= 1 for value in results[when].values())
    assert results["command"].startswith("python ") and results["args"]["strategy"] == strategy
    assert results["targets"] == 200 and results["versions"]["torch"] and results["seconds"]["train"] > 0
    return results


@pytest.mark.long
def test_train_nq_with_a_real_transformer(small_nq, minilm_path, tmp_path):
    options = ["--max_steps", 4, "--per_device_train_batch_size", 8, "--num_negatives", 2, "--max_seq_length", 32]
    options += ["--caches", tmp_path / "caches", "--output_dir", tmp_path]
    out = run(RECIPES / "train_nq.py", "--dataset", small_nq, "--model", minilm_path, "--seed", 3, *options)
    results = check_results(tmp_path / "results.json", "corrected", 4)
    assert results["before"]["ndcg@10"] > 0.5, "the pretrained model is at work"
    assert 4 * 8 < results["targets_encoded"] <= 4 * 8 * 3 and results["targets_encoded_for_cache"] == 0
    assert "| after (corrected)" in out and "| before" in out
    assert all("correction_loss" in entry for entry in results["log"])
    trained, start = SentenceTransformer(str(tmp_path / "final"), device="cpu"), SentenceTransformer(minilm_path)
    text = ["a question about history"]
    assert abs(trained.encode(text) - start.encode(text)).max() > 1e-5, "the saved model is the trained one"


def test_accelerate_launches_train_nq_with_the_static_encoder_and_refreshes(small_nq, minilm_path, tmp_path):
    options = ["--max_steps", 5, "--per_device_train_batch_size", 8, "--encoder", "static"]
    options += ["--results", tmp_path / "r.json", "--caches", tmp_path / "caches", "--output_dir", tmp_path / "out"]
    run(
        RECIPES / "train_nq.py",
        *("--dataset", small_nq, "--model", minilm_path, "--seed", 3, "--strategy", "refresh:2"),
        *options,
        launcher=ACCELERATE,
    )
    results = check_results(tmp_path / "r.json", "refresh:2", 5)
    assert results["targets_encoded_for_cache"] == 2 * 200, "before steps 3 and 5"
    assert results["before"] != results["after"]
    assert results["corrector"].startswith("IdentityCorrector")


@pytest.mark.long
def test_caches_of_several_dtypes_lie_beside_one_another(small_nq, minilm_path, tmp_path):
    command = [RECIPES / "train_nq.py", "--dataset", small_nq, "--model", minilm_path, "--seed", 3, "--max_steps", 2]
    command += ["--per_device_train_batch_size", 8, "--encoder", "static", "--caches", tmp_path / "caches"]
    for dtype in ("float32", "int8", "float32"):
        run(*command, "--cache_dtype", dtype, "--output_dir", tmp_path / dtype)
        check_results(tmp_path / dtype / "results.json", "corrected", 2)
    folders = sorted(path.name.rpartition("-")[2] for path in (tmp_path / "caches").iterdir() if path.is_dir())
    assert folders == ["float32", "int8"]


@pytest.mark.parametrize("strategy", ["corrected", pytest.param("mined-once", marks=pytest.mark.long)])
def test_a_teacher_and_own_pairs_on_held_out_questions(small_nq, minilm_path, tmp_path, strategy):
    options = ["--max_steps", 6, "--per_device_train_batch_size", 8, "--num_negatives", 4, "--encoder", "static"]
    options += ["--own_pairs_share", 0.25, "--teacher_model", "default", "--teacher_max_seq_length", 16]
    options += ["--hold_out", 20, "--test_split", "dev", "--logging_steps", 2, "--caches", tmp_path / "caches"]
    options += ["--teacher_scale", 10, *(["--teacher_weight", 1] if strategy == "corrected" else [])]
    command = [RECIPES / "train_nq.py", "--dataset", small_nq, "--model", minilm_path, "--seed", 3]
    run(*command, *options, "--strategy", strategy, "--output_dir", tmp_path / "out")
    results = check_results(tmp_path / "out" / "results.json", strategy, 6)
    assert results["before"] != results["after"] and results["args"]["hold_out"] == 20
    corpus, trained = Corpus.from_beir(small_nq), SentenceTransformer(str(tmp_path / "out" / "final"), device="cpu")
    assert results["test"] == pytest.approx(CorpusRetrievalEvaluator(corpus, "dev")(trained)) != results["after"]
    for name, questions in (("after", 20), ("test", len(corpus.qrels("dev")))):
        told = results["ranks"][name].replace("-", "inf").split(",")
        ranks = [[float(rank) for rank in each.split()] for each in told]
        reciprocal = sum(1 / found[0] for found in ranks if found[0] <= 10) / len(ranks)
        assert len(ranks) == questions and reciprocal == pytest.approx(results[name]["mrr@10"])
        recall = sum(sum(rank <= 20 for rank in found) / len(found) for found in ranks) / len(ranks)
        assert recall == pytest.approx(results[name]["recall@20"])
    if strategy == "corrected":
        assert all({"distillation_loss", "task_loss_own_pairs"} <= entry.keys() for entry in results["log"])


def test_negatives_mined_anew_are_those_of_the_model_as_it_is(recipe_module, minilm_path, tmp_path):
    rivals, common = recipe_module("rivals"), recipe_module("common")
    queries, texts = make_texts(120)
    corpus = Corpus.from_texts(texts, cache_dir=tmp_path)
    corpus.add_split("train", {str(n): queries[n] for n in range(40)}, {str(n): [str(n)] for n in range(40)})
    model = common.static_encoder(minilm_path)
    lengths = {"max_steps": -1, "num_train_epochs": 3, "per_device_train_batch_size": 8}
    settings = arguments(tmp_path, num_negatives=2, **lengths)
    trainer = rivals.mined_trainer(model, corpus, settings, corpus.pairs("train"), None, 1, "epoch")
    epochs = [[] for _ in range(3)]

    class Reading(TrainerCallback):
        """Notes the tuples as they are when an epoch begins, after those that came before."""

        def on_epoch_begin(self, args, state, control, **kwargs):
            epoch = round(state.epoch)
            epochs[epoch] = [dict(trainer.train_dataset[n]) for n in range(len(trainer.train_dataset))]
            if epoch:
                mined = rivals.mine(model, corpus, corpus.pairs("train"), settings).to_list()
                by_pair = {(row["anchor"], row["positive"]): row for row in mined}
                assert len(mined) > 30
                for row in epochs[epoch]:
                    assert row == by_pair.get((row["anchor"], row["positive"]), row)

    def noting(features, labels):
        seen.append(features[2]["input_ids"].clone())
        return forward(features, labels)

    trainer.add_callback(Reading())
    seen, forward = [], trainer.loss.forward
    trainer.loss.forward = noting
    trainer.train()
    assert epochs[0] != epochs[1] != epochs[2] and rivals.mined_while_training(trainer) == 2 * 120
    tokens = [torch.cat(seen[5 * n : 5 * n + 5]).sort().values for n in range(3)]
    assert len(seen) == 15 and not torch.equal(tokens[0], tokens[2]), "and they are what is trained on"


@pytest.mark.parametrize("has_own", [False, True])
def test_what_a_teacher_mines_is_what_its_model_would(recipe_module, minilm_path, tmp_path, has_own):
    rivals, common = recipe_module("rivals"), recipe_module("common")
    queries, texts = make_texts(200)
    titles = [f"title of {n}" for n in range(200)] if has_own else None
    corpus = Corpus.from_texts(texts, titles=titles, cache_dir=tmp_path)
    corpus.add_split("train", {str(n): queries[n] for n in range(60)}, {str(n): [str(n)] for n in range(60)})
    pairs = corpus.own_pairs(30) if has_own else corpus.pairs("train")
    model = common.static_encoder(minilm_path)
    teacher = EmbeddingTeacher.build(model, corpus, tmp_path / "teacher", pairs, dtype="float32", progress=False)
    settings = arguments(tmp_path, num_negatives=3, relative_margin=0.01)
    known = rivals.KnownEmbeddings(corpus, teacher)
    found, expected = (rivals.mine(each, corpus, pairs, settings) for each in (known, model))
    assert len(found) == (30 if has_own else 60) and found.to_dict() == expected.to_dict()


def test_the_loss_of_a_teachers_scores_is_the_divergence_itself(recipe_module, minilm_path):
    rivals, common = recipe_module("rivals"), recipe_module("common")
    model = common.static_encoder(minilm_path)
    torch.manual_seed(0)
    embeddings, scores = [torch.randn(4, 8) for _ in range(3)], torch.rand(4, 2)
    similar = {"similarity_fct": pairwise_cos_sim, "temperature": 1 / 20, "teacher_temperature": 1 / 10}
    loss = rivals.UnscaledDistillKLDivLoss(model, **similar).compute_loss_from_embeddings(embeddings, scores)
    ours = torch.stack([pairwise_cos_sim(embeddings[0], each) for each in embeddings[1:]], 1)
    divergence = torch.nn.functional.kl_div((20 * ours).log_softmax(1), (10 * scores).softmax(1), reduction="batchmean")
    torch.testing.assert_close(loss, divergence)


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["gist", "gist-cached", "mined:4", "mined-by-teacher"])
def test_rivals_run(small_nq, minilm_path, tmp_path, strategy):
    options = ["--max_steps", 6, "--per_device_train_batch_size", 8, "--num_negatives", 2, "--max_seq_length", 16]
    options += ["--num_layers", 1, "--caches", tmp_path / "caches", "--output_dir", tmp_path / "out"]
    if strategy == "mined:4":
        options += ["--relative_margin", 0.05, "--own_pairs_share", 0.25, "--range_max", 150]
    else:
        options += ["--teacher_model", "default", *(["--mini_batch_size", 4] if strategy == "gist-cached" else [])]
        strategy = strategy.removesuffix("-cached")
    command = [RECIPES / "train_nq.py", "--dataset", small_nq, "--model", minilm_path, "--seed", 3]
    run(*command, *options, "--strategy", strategy)
    results = check_results(tmp_path / "out" / "results.json", strategy, 6)
    assert results["before"] != results["after"]
    assert results["targets_encoded_for_cache"] == (200 if strategy == "mined:4" else 0), "mined anew once, at step 4"


def test_mining_looks_as_far_as_it_takes_and_leaves_no_question_out(recipe_module, minilm_path, tmp_path, monkeypatch):
    rivals, common = recipe_module("rivals"), recipe_module("common")
    monkeypatch.setattr(rivals, "_NEAR", 20)
    monkeypatch.setattr(rivals, "_AT_ONCE", 7 * 200)
    queries, texts = make_texts(200)
    corpus = Corpus.from_texts(texts, cache_dir=tmp_path)
    # Every other question is answered by a target that the encoder finds less similar than sixty others.
    model = common.static_encoder(minilm_path)
    embeddings = model.encode_document(texts, convert_to_tensor=True)
    similar_to = model.similarity(model.encode_query(queries[:60], convert_to_tensor=True), embeddings)
    nearest = similar_to.argsort(1, descending=True)[:, [0, 60]].tolist()
    answers = {str(n): [str(nearest[n][n % 2])] for n in range(60)}
    corpus.add_split("train", {str(n): queries[n] for n in range(60)}, answers)
    pairs = corpus.pairs("train")

    def mined(**settings):
        return rivals.mine(model, corpus, pairs, arguments(tmp_path, num_negatives=3, relative_margin=0.01, **settings))

    near, tuples = mined(range_max=20), mined()
    assert 0 < len(near) <= 30 and len(tuples) == 60 == len(set(tuples["anchor"]))
    assert {row["anchor"]: row for row in near} == {
        row["anchor"]: row for row in tuples if row["anchor"] in set(near["anchor"])
    }
    for row in tuples:
        similar = dict(zip(texts, similar_to[queries.index(row["anchor"])].tolist(), strict=True))
        allowed = sorted((each for each in similar.values() if each < 0.99 * similar[row["positive"]]), reverse=True)
        assert [similar[row[f"negative_{n}"]] for n in (1, 2, 3)] == pytest.approx(allowed[:3], abs=1e-5)


def test_what_answers_a_question_is_no_negative_of_it_however_far_mining_looks(
    recipe_module, minilm_path, tmp_path, monkeypatch
):
    rivals, common = recipe_module("rivals"), recipe_module("common")
    monkeypatch.setattr(rivals, "_AT_ONCE", 200)
    queries, texts = make_texts(200)
    corpus = Corpus.from_texts(texts, cache_dir=tmp_path)
    model = common.static_encoder(minilm_path)
    similar = model.similarity(
        model.encode_query(queries[:9], convert_to_tensor=True), model.encode_document(texts, convert_to_tensor=True)
    )
    # Each is answered by the most similar target and by one in the middle, whose rows are far from one another.
    ranked = similar.argsort(1, descending=True).tolist()
    answers = {str(n): [str(ranked[n][0]), str(ranked[n][100])] for n in range(9)}
    corpus.add_split("train", {str(n): queries[n] for n in range(9)}, answers)
    pairs = corpus.pairs("train").sort("positive")
    tuples = rivals.mine(model, corpus, pairs, arguments(tmp_path, num_negatives=3, relative_margin=0.01))
    assert len(tuples) == 18
    for row in tuples:
        theirs = {texts[int(each)] for each in answers[str(queries.index(row["anchor"]))]}
        assert row["positive"] in theirs and not theirs & {row[f"negative_{n}"] for n in (1, 2, 3)}


def test_batches_of_mined_tuples_are_full_though_they_share_negatives(recipe_module, minilm_path, tmp_path):
    rivals, common = recipe_module("rivals"), recipe_module("common")
    questions, texts = make_texts(64)
    columns = {"anchor": [*questions, "one more"], "positive": [*texts, texts[0]], "negative": ["for all"] * 65}
    model = common.static_encoder(minilm_path)
    lengths = {"max_steps": -1, "num_train_epochs": 1, "per_device_train_batch_size": 16}
    settings = arguments(tmp_path, batch_sampler="no_duplicates", **lengths)
    loss = rivals.MultipleNegativesRankingLoss(model)
    trainer = rivals.RivalTrainer(model, settings, train_dataset=Dataset.from_dict(columns), loss=loss)
    batches = list(trainer.get_train_dataloader().batch_sampler)
    assert sorted(row for batch in batches for row in batch) == list(range(65))
    assert [len(batch) for batch in batches] == [16, 16, 16, 16, 1]
    assert not any({0, 64} <= set(batch) for batch in batches), "they have one positive"
    trainer.train()
    assert trainer.targets_encoded == 65 * 2


def test_what_runs_share_is_charged_to_each_whoever_made_it(recipe_module, tmp_path):
    common, made = recipe_module("common"), tmp_path / "cache"
    first, second, third = common.Costs(), common.Costs(), common.Costs()
    with first.of("cache", made):
        made.mkdir()
        time.sleep(0.3)
    with second.of("cache", made):
        pass
    assert first.seconds == second.seconds and first.seconds["cache"] == first.paid >= 0.3 and second.paid == 0
    with third.of("teacher", tmp_path / "nothing"):
        pass
    assert not third.seconds, "nothing was made: an in-batch run has no cache"
    (tmp_path / "cache-seconds.json").unlink()
    with third.of("cache", made):
        pass
    assert third.seconds == {"cache": None}, "the run that made it was interrupted"


def test_own_pairs_have_their_share_of_what_is_mined(recipe_module, tmp_path):
    rivals = recipe_module("rivals")
    queries, texts = make_texts(200)
    corpus = Corpus.from_texts(texts, titles=[f"title {n}" for n in range(200)], cache_dir=tmp_path)
    corpus.add_split("train", {str(n): queries[n] for n in range(60)}, {str(n): [str(n)] for n in range(60)})
    settings = arguments(tmp_path, own_pairs_share=0.4)
    pairs = rivals.pairs_for(corpus, settings)
    assert len(pairs) == 100 and len(own_positions(pairs)) == 40


@pytest.mark.long
def test_a_lora_adapter_is_trained_alone_saved_alone_and_resumed(small_nq, minilm_path, tmp_path):
    pytest.importorskip("peft", reason="LoRA needs peft")
    options = ["--max_steps", 4, "--per_device_train_batch_size", 8, "--num_negatives", 2, "--max_seq_length", 32]
    options += ["--lora_r", 4, "--learning_rate", 1e-3, "--save_strategy", "steps", "--save_steps", 2]
    command = [RECIPES / "train_nq.py", "--dataset", small_nq, "--model", minilm_path, "--seed", 3, *options]
    command += ["--caches", tmp_path / "caches", "--output_dir", tmp_path / "out"]
    run(*command)
    results = check_results(tmp_path / "out" / "results.json", "corrected", 4)
    assert results["before"] != results["after"]
    saved = tmp_path / "out" / "final"
    assert (saved / "adapter_model.safetensors").stat().st_size < 2e6 and not (saved / "model.safetensors").exists()
    whole = (saved / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    shutil.rmtree(saved)
    run(*command, "--resume_from_checkpoint", "True")
    assert (saved / "adapter_model.safetensors").read_bytes() == whole


@pytest.mark.long
def test_two_processes_run_the_recipe_as_one_does(small_nq, minilm_path, tmp_path):
    found = {}
    for processes in (1, 2):
        options = ["--max_steps", 5, "--per_device_train_batch_size", 8 // processes, "--encoder", "static"]
        launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29571")
        run(
            RECIPES / "train_nq.py",
            *("--dataset", small_nq, "--model", minilm_path, "--seed", 3, "--num_negatives", 2),
            *(*options, "--batch_sampler", "batch_sampler", "--output_dir", tmp_path / f"out-{processes}"),
            *("--dataloader_drop_last", "True", "--caches", tmp_path / "caches", "--use_cpu", "True"),
            launcher=launcher if processes == 2 else (),
        )
        found[processes] = check_results(tmp_path / f"out-{processes}" / "results.json", "corrected", 5)
    assert found[1]["targets_encoded"] == found[2]["targets_encoded"] > 5 * 8
    assert found[1]["after"] == pytest.approx(found[2]["after"], abs=0.02) and found[1]["after"] != found[1]["before"]
    for one, two in zip(found[1]["log"], found[2]["log"], strict=True):
        assert two["task_loss"] == pytest.approx(one["task_loss"], rel=1e-3) and two["bytes_exchanged"] > 0


@pytest.fixture
def answer(monkeypatch, capsys):
    """What a recipe answers that ends before it trains: its exit status, and what it prints."""

    def of(recipe, *arguments):
        monkeypatch.syspath_prepend(str(RECIPES))
        monkeypatch.setattr(sys, "argv", [recipe, *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(RECIPES / recipe), run_name="__main__")
        return ended.value.code, "".join(capsys.readouterr())

    return of


def test_an_unknown_strategy_is_refused_before_anything_is_loaded(answer):
    status, said = answer("train_nq.py", "--strategy", "refresh:0")
    assert status == 2 and "is not one of in-batch, gist, mined-once" in said


def test_options_that_a_strategy_does_not_look_at_are_refused(recipe_module, monkeypatch, capsys):
    recipe = recipe_module("command_line")
    for strategy in ("in-batch", "mined-once"):
        options = ["--strategy", strategy, "--sampler", "gumbel", "--candidates", "40", "--probe_every", "5"]
        monkeypatch.setattr(sys, "argv", ["train_nq.py", *options])
        with pytest.raises(SystemExit):
            recipe.parse_arguments("train_nq", "", "data/nq")
        assert "leave out --sampler, --candidates, --probe_every" in capsys.readouterr().err
    for options in (
        ["--strategy", "mined-once", "--range_max", "50"],
        ["--strategy", "gist", "--mini_batch_size", "8"],
    ):
        teacher = ["--teacher_model", "default"] if "gist" in options else []
        monkeypatch.setattr(sys, "argv", ["train_nq.py", *options, *teacher])
        _, training = recipe.parse_arguments("train_nq", "", "data/nq")
        assert getattr(training, options[2].removeprefix("--")) == int(options[3])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--strategy in-batch --teacher_model default", "give --teacher_weight and --teacher_scale: it is found out"),
        ("--strategy in-batch --teacher_model default --teacher_weight 1", "give --teacher_scale"),
        ("--strategy mined-once --teacher_model default", "give --teacher_scale"),
        (
            "--strategy mined-once --teacher_model default --teacher_scale 9 --teacher_weight 1",
            "leave out --teacher_weight: a teacher's scores of mined tuples are learnt by DistillKLDivLoss alone",
        ),
        (
            "--strategy gist --teacher_model default --teacher_scale 9",
            "leave out --teacher_scale: the teacher",
        ),
        ("--strategy gist", "--strategy gist has a teacher: give --teacher_model"),
        ("--strategy mined-by-teacher", "--strategy mined-by-teacher has a teacher: give --teacher_model"),
        ("--distillation_loss margin-mse", "leave out --distillation_loss: there is no --teacher_model"),
    ],
)
def test_what_a_teacher_does_not_hear_or_lacks_is_refused(answer, given, message):
    status, said = answer("train_nq.py", *given.split())
    assert status == 2 and message in said


# ---------------------------------------------------------------------- data


PAIRS = Dataset.from_dict(dict(zip(("question", "reply"), make_texts(50), strict=True)))


def load(recipe_module, dataset, **arguments):
    data = recipe_module("data")
    return data.load_corpus(data.DataArguments(str(dataset), **{"eval_queries": 10, **arguments}))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hub_data_set_of_pairs_becomes_corpus_and_splits(recipe_module, hub, capsys, streaming):
    PAIRS.push_to_hub("tester/pairs", "pair")
    corpus = load(recipe_module, "tester/pairs", streaming=streaming)
    assert "tester/pairs is pairs of 'question' and 'reply'; dev is held out of its training queries." in (
        capsys.readouterr().out
    )
    assert len(corpus) == 50 and corpus.name == "tester/pairs"
    assert len(corpus.qrels("dev")) == 10 and len(corpus.qrels("train")) == 40
    for split in ("train", "dev"):
        for pair in corpus.pairs(split):
            assert pair["positive"] == PAIRS["reply"][PAIRS["question"][:].index(pair["anchor"])]
            assert pair["positive"] == corpus.texts([pair["label"][0]])[0]


@pytest.mark.parametrize("ending", ["parquet", "jsonl", "csv", "jsonl.gz"])
@pytest.mark.parametrize("whole_folder", [False, True])
def test_local_files_of_pairs_are_read(recipe_module, tmp_path, ending, whole_folder):
    file = tmp_path / "mine" / f"train.{ending}"
    file.parent.mkdir()
    if ending.startswith("jsonl"):
        PAIRS.to_json(file, compression="gzip" if ending.endswith("gz") else None)
    else:
        PAIRS.to_csv(file) if ending == "csv" else PAIRS.to_parquet(file)
    corpus = load(recipe_module, file.parent if whole_folder else file)
    assert sorted(corpus.texts(range(50))) == sorted(PAIRS["reply"][:]) and len(corpus.qrels("dev")) == 10


def test_a_dev_split_of_the_datas_own_is_taken(recipe_module, tmp_path, capsys):
    folder = tmp_path / "mine"
    folder.mkdir()
    for split, rows in (("train", range(40)), ("dev", range(40, 50))):
        PAIRS.select(rows).to_parquet(folder / f"{split}.parquet")
    corpus = load(recipe_module, folder, eval_queries=3)
    assert "dev is its split 'validation'." in capsys.readouterr().out
    assert corpus.qrels("validation").queries["text"][:] == PAIRS["question"][40:]
    assert len(corpus.qrels("train")) == 40
    PAIRS.select(range(20)).to_parquet(folder / "train.parquet")
    assert len(load(recipe_module, folder).qrels("train")) == 20, "files that have changed are read anew"


def test_triplets_are_told_by_their_columns(recipe_module, tmp_path, capsys):
    rows = {"negative_1": ["n", "m"], "negative_2": ["o", None], "positive": ["x", "y"], "query": ["one", "two"]}
    file = tmp_path / "triplets.parquet"
    Dataset.from_dict({**rows, "score": [0.5, 0.7]}).to_parquet(file)
    corpus = load(recipe_module, file, eval_queries=1)
    assert "pairs of 'query' and 'positive', negatives ['negative_1', 'negative_2']" in capsys.readouterr().out
    assert sorted(corpus.texts(range(len(corpus)))) == ["m", "n", "o", "x", "y"]
    without = load(recipe_module, file, eval_queries=1, negative_columns="")
    assert sorted(without.texts(range(len(without)))) == ["x", "y"]
    other = load(recipe_module, file, eval_queries=1, positive_column="negative_1", negative_columns="positive")
    assert sorted(other.texts(range(len(other)))) == ["m", "n", "x", "y"]
    assert {pair["positive"] for pair in other.pairs("train")} <= {"m", "n"}


def test_lists_of_positives_and_negatives_are_read(recipe_module, tmp_path):
    rows = [{"query": f"q{n}", "pos": [f"p{n}", f"p{n + 1}"], "neg": [f"n{n}"] * n} for n in range(5)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = load(recipe_module, tmp_path / "rows.jsonl", eval_queries=1)
    assert sorted(corpus.texts(range(len(corpus)))) == [*(f"n{n}" for n in range(1, 5)), *(f"p{n}" for n in range(6))]
    assert len(corpus.pairs("train")) == 8 and len(corpus.pairs("dev")) == 2


def test_a_query_of_several_rows_is_held_out_with_all_of_them(recipe_module, tmp_path):
    rows = {"query": [f"q{n % 12}" for n in range(60)], "answer": [f"a{n}" for n in range(60)]}
    Dataset.from_dict(rows).to_parquet(tmp_path / "rows.parquet")
    corpus = load(recipe_module, tmp_path / "rows.parquet", eval_queries=4)
    train, dev = (set(corpus.pairs(split)["anchor"]) for split in ("train", "dev"))
    assert len(train) == 8 and len(dev) == 4 and not train & dev
    assert all(len(corpus.qrels("dev").rows_of(query)) == 5 for query in range(4))


def test_retrieval_data_sets_are_told_from_pairs(recipe_module, small_nq, hub, tmp_path, capsys):
    """As a folder of BEIR's, as a folder of a repository's files, and from the Hub: the same."""
    folder = nq_repository(small_nq, tmp_path / "repository")
    upload(folder, "tester/nq")
    found = [load(recipe_module, place) for place in (small_nq, folder, "tester/nq")]
    found.append(load(recipe_module, "tester/nq", streaming=True, dataset_config="qrels"))
    said = capsys.readouterr().out.splitlines()
    assert [line.split(" is ")[1].split(";")[0] for line in said] == ["a BEIR folder", *["a retrieval data set"] * 3]
    assert len({corpus.fingerprint for corpus in found}) == 1
    for corpus in found:
        assert sorted(corpus.splits) == ["dev", "train"]
        assert corpus.pairs("dev").to_list() == found[0].pairs("dev").to_list()


def test_a_language_and_judgements_of_targets_that_are_not_there_are_options(recipe_module, tmp_path, capsys):
    corpus, queries = {"_id": ["a", "b"], "text": ["x", "y"]}, {"_id": ["q", "r"], "text": ["u", "v"]}
    judged = {"query-id": ["q", "r", "r"], "corpus-id": ["a", "b", "lost"], "score": [1, 1, 1]}
    parts = {"corpus": corpus, "queries": queries, "qrels": judged}
    folder = write_repository(tmp_path, {f"en-{name}": {"train": part} for name, part in parts.items()})
    named = {"corpus_config": "en-corpus", "queries_config": "en-queries", "dataset_config": "en-qrels"}
    with pytest.raises(CorpusError, match=r"judges 1 targets that config 'en-corpus' does not have.*missing_targets="):
        load(recipe_module, folder, **named)
    found = load(recipe_module, folder, **named, missing_targets="drop", eval_queries=1)
    assert "is a retrieval data set" in capsys.readouterr().out and len(found.qrels("train")) == 1


WRONG = {
    "several configs": ({}, r"has the configs \['one', 'two'\]: name one with --dataset_config"),
    "no such config": ({"dataset_config": "three"}, r"has the configs \['one', 'two'\]"),
    "no such column": ({"dataset_config": "one", "query_column": "q"}, r"has no column 'q'; it has \['a', 'b', 'c'\]"),
    "three columns": ({"dataset_config": "one"}, r"has the columns \['a', 'b', 'c'\]: say which .* --query_column"),
    "max_targets": ({"dataset_config": "one", "max_targets": 3}, "is a data set of pairs: leave out --max_targets"),
    "qrels": ({"dataset_config": "one", "qrels": "x/y"}, "is a data set of pairs: leave out --qrels"),
    "no train": ({"dataset_config": "two"}, r"has the splits \['test'\], expected one named 'train'"),
    "too few": (
        {"dataset_config": "one", "query_column": "a", "positive_column": "c"},
        "--eval_queries: 10 queries cannot be held out of the 2",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_data_that_cannot_be_told_is_refused(recipe_module, tmp_path, wrong):
    arguments, message = WRONG[wrong]
    columns = {"a": ["x", "y"], "b": ["u", "v"], "c": ["r", "s"]}
    write_repository(tmp_path, {"one": {"train": columns}, "two": {"test": columns}})
    with pytest.raises(InputError, match=message):
        load(recipe_module, tmp_path, **arguments)


def test_arguments_for_pairs_are_refused_for_retrieval_data(recipe_module, tmp_path):
    corpus, queries = {"_id": ["a"], "text": ["x"]}, {"_id": ["q"], "text": ["y"]}
    judged = {"query-id": ["q"], "corpus-id": ["a"], "score": [1]}
    write_repository(tmp_path, {"corpus": {"c": corpus}, "queries": {"q": queries}, "default": {"test": judged}})
    with pytest.raises(InputError, match="is a retrieval data set: leave out --query_column"):
        load(recipe_module, tmp_path, query_column="text")
    with pytest.raises(InputError, match=r"has judgements for \['test'\], expected some for 'train'"):
        load(recipe_module, tmp_path)
    with pytest.raises(InputError, match="nowhere"):
        load(recipe_module, tmp_path / "nowhere")


def nq_repository(beir, folder):
    """A folder of BEIR's as a repository of parquet, as MTEB has it."""
    opened = {name: (beir / f"{name}.jsonl").read_text().splitlines() for name in ("corpus", "queries")}
    configs = {}
    for name, lines in opened.items():
        records = [json.loads(line) for line in lines]
        columns = [column for column in ("_id", "title", "text", "answers") if column in records[0]]
        configs[name] = {name: {column: [record[column] for record in records] for column in columns}}
    configs["qrels"] = {}
    for split in ("train", "dev"):
        with (beir / "qrels" / f"{split}.tsv").open() as file:
            lines = list(csv.DictReader(file, delimiter="\t"))
        configs["qrels"][split] = {name: [line[name] for line in lines] for name in ("query-id", "corpus-id")}
        configs["qrels"][split]["score"] = [int(line["score"]) for line in lines]
    return write_repository(folder, configs)


# ---------------------------------------------------------------------- MS MARCO


def ms_marco(beir, folder):
    """Real questions and passages in the layout of sentence-transformers/msmarco, ids and all."""
    texts = {}
    for name in ("corpus", "queries"):
        for line in (beir / f"{name}.jsonl").read_text().splitlines():
            record = json.loads(line)
            texts.setdefault(name, {})[record["_id"]] = record["text"]
    with (beir / "qrels" / "train.tsv").open() as file:
        judged = [(line["query-id"], line["corpus-id"]) for line in csv.DictReader(file, delimiter="\t")]
    passages, queries = list(texts["corpus"]), list(texts["queries"])
    # Each pair with several negatives, as the official triplets have it.
    rows = [(query, target, passages[n]) for n in range(3) for query, target in judged if target != passages[n]]
    names = {id: str(n) for ids in (passages, queries) for n, id in enumerate(ids)}
    triplets = [[names[row[column]] for row in rows] for column in range(3)]
    configs = {
        "corpus": {"train": {"passage_id": [names[id] for id in passages], "passage": [*texts["corpus"].values()]}},
        "queries": {"train": {"query_id": [names[id] for id in queries], "query": [*texts["queries"].values()]}},
        "triplets": {"train": dict(zip(("query_id", "positive_id", "negative_id"), triplets, strict=True))},
    }
    return write_repository(folder, configs)


@pytest.mark.long
def test_train_msmarco_trains_on_ids_of_triplets_from_the_hub(small_nq, hub, minilm_path, tmp_path):
    upload(ms_marco(small_nq, tmp_path / "msmarco"), "tester/msmarco")
    options = ["--max_steps", 5, "--per_device_train_batch_size", 8, "--num_negatives", 2, "--encoder", "static"]
    options += ["--eval_queries", 20, "--seed", 3, "--model", minilm_path, "--caches", tmp_path / "caches"]
    out = run(
        RECIPES / "train_msmarco.py",
        *("--dataset", "tester/msmarco", "--dataset_config", "triplets", "--streaming", "True"),
        *(*options, "--output_dir", tmp_path / "out"),
        environment={**hub.environment(), "HF_DATASETS_CACHE": str(tmp_path / "datasets")},
    )
    assert "is a retrieval data set; dev is held out of its training queries." in out
    assert "Corpus(200 targets; train: 60 queries, dev: 20 queries)" in out
    results = check_results(tmp_path / "out" / "results.json", "corrected", 5, METRICS - {"answer_recall@20"})
    assert results["before"] != results["after"] and results["args"]["cache_dtype"] == "int8"
    assert not list(hub.home.rglob("*.parquet")), "streamed, not downloaded"


def test_train_msmarcos_help_says_what_it_is_trained_on(answer):
    status, said = answer("train_msmarco.py", "--help")
    assert status == 0 and "(default: mteb/msmarco)" in said and "(default: int8)" in said
    assert "--dataset sentence-transformers/msmarco --dataset_config" in said
    assert "natural-questions" in answer("train_nq.py", "--help")[1]


def test_strategies_are_parsed(recipe_module):
    parse = recipe_module("common").Strategy.parse
    assert parse("refresh:50") == ("refresh", 50, "step") and parse("exhaustive") == ("exhaustive", 1, "step")
    assert parse("refresh:2-epochs") == ("refresh", 2, "epoch") and parse("stale").every is None
    assert parse("mined:1-epochs") == ("mined", 1, "epoch") and parse("mined-once") == ("mined", None, "step")
    assert parse("mined:25") == ("mined", 25, "step")
    rivals = ["in-batch", "gist", "mined-once", "mined:3-epochs", "mined-by-teacher"]
    assert [name for name in (*rivals, "stale", "corrected", "refresh:5") if not parse(name).chooses] == rivals
    for wrong in ("refresh", "refresh:x", "refresh:0", "best", "stale:3", "refresh:5-steps", "mined", "mined:0"):
        with pytest.raises(argparse.ArgumentTypeError, match="is not one of"):
            parse(wrong)


def test_the_static_encoder_starts_as_the_mean_of_token_vectors(recipe_module, minilm_path):
    model = recipe_module("common").static_encoder(minilm_path)
    vectors = SentenceTransformer(minilm_path, device="cpu").transformers_model.get_input_embeddings().weight.detach()
    ids = model.preprocess(["dense retrieval"])["input_ids"]
    mean = vectors[ids].mean(0)
    embedding = torch.from_numpy(model.encode("dense retrieval"))
    assert (embedding @ mean / mean.norm()).item() > 0.98 and embedding.norm().item() == pytest.approx(1, abs=1e-5)


# ---------------------------------------------------------------------- quickstart

SOURCE = '''
def area(radius: float) -> float:
    """Compute the area of a circle.

    More about it.
    """
    # the square
    return 3.14 * radius**2


class Shelf:
    """Keeps books in alphabetical order."""

    def add(self, book):
        """Put one more book on it."""
        self.books.append(book)
        self.books.sort()

    def undocumented(self):
        return self.books


def short():
    """Too short."""
    return 1
'''


def test_functions_are_read_without_their_docstrings(recipe_module, tmp_path):
    (tmp_path / "m.py").write_text(SOURCE)
    found = {function.name: function for function in recipe_module("quickstart").functions_of(tmp_path / "m.py", "m")}
    assert set(found) == {"m.area", "m.Shelf", "m.Shelf.add"}
    assert found["m.area"].summary == "Compute the area of a circle."
    assert found["m.area"].code == "def area(radius: float) -> float:\n# the square\nreturn 3.14 * radius**2"
    assert "alphabetical" not in found["m.Shelf"].code and "one more book" not in found["m.Shelf"].code
    assert "self.books.sort()" in found["m.Shelf"].code
    (tmp_path / "broken.py").write_text("def f(:")
    assert recipe_module("quickstart").functions_of(tmp_path / "broken.py", "m") == []


@pytest.mark.long
def test_quickstart_trains_compares_and_answers():
    arguments = ["--packages", "huggingface_hub", "datasets", "--steps", 12, "--train", 600, "--dev", 100]
    arguments += ["--num_negatives", 4]
    out = run(RECIPES / "quickstart.py", "download a file from the hub", *arguments)
    rows = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in out.splitlines() if line.startswith("| ")}
    trained = ("in-batch negatives", "corrected negatives", "corrected, own pairs", "corrected, own pairs, teacher")
    before, *after = (float(rows[name][0]) for name in ("before", *trained))
    assert min(after) > before and len(set(after)) == 4
    assert "download a file from the hub\n  0." in out and "huggingface_hub." in out.split("download a file")[1]


def test_from_scratch_keeps_the_architecture_and_forgets_the_weights(recipe_module, minilm_path):
    recipe = recipe_module("command_line")
    torch.manual_seed(0)
    scratch = recipe.load_model(recipe.RecipeArguments(model=minilm_path, from_scratch=True, max_seq_length=32), 0)
    pretrained = recipe.load_model(recipe.RecipeArguments(model=minilm_path), 0)
    assert scratch.max_seq_length == 32 and pretrained.max_seq_length > 32
    ours, theirs = dict(scratch.named_parameters()), dict(pretrained.named_parameters())
    assert {name: value.shape for name, value in ours.items()} == {name: value.shape for name, value in theirs.items()}
    weights = [name for name, value in ours.items() if value.ndim == 2]
    assert len(weights) > 30 and not any(torch.allclose(ours[name], theirs[name], atol=1e-3) for name in weights)
    one, other = scratch.encode(["a question about rivers", "an answer about money"])
    assert 0.01 < abs(one - other).max() < 1, "texts are still told apart"


def test_the_first_layers_alone_are_the_models_first_layers(recipe_module, minilm_path, tmp_path):
    recipe = recipe_module("command_line")
    whole = recipe.load_model(recipe.RecipeArguments(model=minilm_path), 0)
    short = recipe.load_model(recipe.RecipeArguments(model=minilm_path, num_layers=2), 0)
    features = whole.preprocess(["a question about rivers", "an answer about money"])
    with torch.no_grad():
        states = whole.transformers_model(features["input_ids"], features["attention_mask"], output_hidden_states=True)
        first = short.transformers_model(features["input_ids"], features["attention_mask"])
    torch.testing.assert_close(first.last_hidden_state, states.hidden_states[2])
    short.save(str(tmp_path / "short"))
    again = SentenceTransformer(str(tmp_path / "short"))
    assert len(again.transformers_model.encoder.layer) == 2, "saved and loaded as what it is"


def test_metrics_before_training_are_shared_by_models_that_ask_alike(static_model, corpus, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    common = importlib.import_module("common")
    evaluator = CorpusRetrievalEvaluator(corpus, "train")
    first = common.evaluated_once(static_model, evaluator, tmp_path / "model")
    monkeypatch.setattr(evaluator, "__class__", type("Unasked", (CorpusRetrievalEvaluator,), {"__call__": None}))
    assert common.evaluated_once(static_model, evaluator, tmp_path / "model") == first
    for name, value in (("ignore_identical_ids", True), ("qrels", Qrels(evaluator.qrels.queries, [0], [1], [2.0]))):
        with monkeypatch.context() as changed, pytest.raises(TypeError):  # it is asked
            changed.setattr(evaluator, name, value)
            common.evaluated_once(static_model, evaluator, tmp_path / "model")
    static_model.prompts["query"] = "query: "
    with pytest.raises(TypeError):  # it is asked
        common.evaluated_once(static_model, evaluator, tmp_path / "model")
