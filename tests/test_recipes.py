import argparse
import csv
import gzip
import importlib
import json
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, make_texts
from datasets import Dataset
from sentence_transformers import SentenceTransformer

RECIPES = ROOT / "recipes"


ACCELERATE = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1")


def run(recipe, *arguments, launcher=()):
    command = [sys.executable, *launcher, str(RECIPES / recipe), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


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


def check_results(path, strategy, steps):
    results = json.loads(path.read_text())
    assert results["strategy"] == strategy and results["steps"] == steps and results["seed"] == 3
    for when in ("before", "after"):
        assert results[when].keys() >= METRICS and all(0 <= value <= 1 for value in results[when].values())
    assert results["command"].startswith("python ") and results["args"]["strategy"] == strategy
    assert results["targets"] == 200 and results["versions"]["torch"] and results["seconds"]["train"] > 0
    return results


def test_train_nq_with_a_real_transformer(small_nq, minilm_path, tmp_path):
    options = ["--max_steps", 4, "--per_device_train_batch_size", 8, "--num_negatives", 2, "--max_seq_length", 64]
    out = run(
        "train_nq.py", "--dataset", small_nq, "--model", minilm_path, "--seed", 3, *options, "--output_dir", tmp_path
    )
    results = check_results(tmp_path / "results.json", "corrected", 4)
    assert results["before"]["ndcg@10"] > 0.5, "the pretrained model is at work"
    assert 4 * 8 < results["targets_encoded"] <= 4 * 8 * 3 and results["targets_encoded_for_cache"] == 0
    assert "| after (corrected)" in out and "| before" in out
    assert all("correction_loss" in entry for entry in results["log"])
    trained, start = SentenceTransformer(str(tmp_path / "final"), device="cpu"), SentenceTransformer(minilm_path)
    text = ["a question about history"]
    assert abs(trained.encode(text) - start.encode(text)).max() > 1e-5, "the saved model is the trained one"


def test_accelerate_launches_train_nq_with_the_static_encoder_and_refreshes(small_nq, minilm_path, tmp_path):
    options = [
        "--max_steps",
        5,
        "--per_device_train_batch_size",
        8,
        "--encoder",
        "static",
        "--results",
        tmp_path / "r.json",
    ]
    run(
        *("train_nq.py", "--dataset", small_nq, "--model", minilm_path, "--seed", 3, "--strategy", "refresh:2"),
        *(*options, "--output_dir", tmp_path / "out"),
        launcher=ACCELERATE,
    )
    results = check_results(tmp_path / "r.json", "refresh:2", 5)
    assert results["targets_encoded_for_cache"] == 2 * 200, "before steps 3 and 5"
    assert results["before"] != results["after"]
    assert results["corrector"].startswith("IdentityCorrector")


@pytest.mark.long
def test_a_lora_adapter_is_trained_alone_saved_alone_and_resumed(small_nq, minilm_path, tmp_path):
    pytest.importorskip("peft", reason="LoRA needs peft")
    options = ["--max_steps", 4, "--per_device_train_batch_size", 8, "--num_negatives", 2, "--max_seq_length", 32]
    options += ["--lora_r", 4, "--learning_rate", 1e-3, "--save_strategy", "steps", "--save_steps", 2]
    command = ["train_nq.py", "--dataset", small_nq, "--model", minilm_path, "--seed", 3, *options]
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
            *("train_nq.py", "--dataset", small_nq, "--model", minilm_path, "--seed", 3, "--num_negatives", 2),
            *(*options, "--batch_sampler", "batch_sampler", "--output_dir", tmp_path / f"out-{processes}"),
            *("--dataloader_drop_last", "True", "--caches", tmp_path / "caches", "--use_cpu", "True"),
            launcher=launcher if processes == 2 else (),
        )
        found[processes] = check_results(tmp_path / f"out-{processes}" / "results.json", "corrected", 5)
    assert found[1]["targets_encoded"] == found[2]["targets_encoded"] > 5 * 8
    assert found[1]["after"] == pytest.approx(found[2]["after"], abs=0.02) and found[1]["after"] != found[1]["before"]
    for one, two in zip(found[1]["log"], found[2]["log"], strict=True):
        assert two["task_loss"] == pytest.approx(one["task_loss"], rel=1e-3) and two["bytes_exchanged"] > 0


def test_an_unknown_strategy_is_refused_before_anything_is_loaded(tmp_path):
    done = subprocess.run(
        [sys.executable, str(RECIPES / "train_nq.py"), "--strategy", "refresh:0"], capture_output=True, text=True
    )
    assert done.returncode == 2 and "is not one of in-batch, mined-once, stale, corrected, exhaustive" in done.stderr


def test_options_that_a_strategy_does_not_look_at_are_refused(recipe_module, monkeypatch, capsys):
    recipe = recipe_module("train_nq")
    for strategy in ("in-batch", "mined-once"):
        options = ["--strategy", strategy, "--relative_margin", "0.1", "--budget", "batch", "--probe_every", "5"]
        monkeypatch.setattr(sys, "argv", ["train_nq.py", *options])
        with pytest.raises(SystemExit):
            recipe.parse_arguments()
        assert "leave out --budget, --relative_margin, --probe_every" in capsys.readouterr().err


def test_a_hub_data_set_becomes_corpus_and_splits(recipe_module, monkeypatch):
    queries, texts = make_texts(50)
    train_nq = recipe_module("train_nq")
    pairs = Dataset.from_dict({"query": queries, "answer": texts})
    monkeypatch.setattr(train_nq, "load_dataset", lambda name, split, revision: pairs)
    corpus = train_nq.load_corpus(train_nq.RecipeArguments(eval_queries=10))
    assert len(corpus) == 50 and len(corpus.qrels("dev")) == 10 and len(corpus.qrels("train")) == 40
    for pair in corpus.pairs("train"):
        assert pair["positive"] == texts[queries.index(pair["anchor"])] == corpus.texts([pair["label"]])[0]


def test_strategies_are_parsed(recipe_module):
    parse = recipe_module("common").Strategy.parse
    assert parse("refresh:50") == ("refresh", 50, "step") and parse("exhaustive") == ("exhaustive", 1, "step")
    assert parse("refresh:2-epochs") == ("refresh", 2, "epoch") and parse("stale").every is None
    assert [name for name in ("in-batch", "mined-once", "stale", "corrected") if not parse(name).chooses] == [
        "in-batch",
        "mined-once",
    ]
    for wrong in ("refresh", "refresh:x", "refresh:0", "best", "stale:3", "refresh:5-steps"):
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


def test_quickstart_trains_compares_and_answers():
    arguments = ["--packages", "huggingface_hub", "datasets", "--steps", 12, "--dev", 100, "--num_negatives", 4]
    out = run("quickstart.py", "download a file from the hub", *arguments)
    rows = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in out.splitlines() if line.startswith("| ")}
    before, in_batch, corrected = (
        float(rows[name][0]) for name in ("before", "after, in-batch negatives", "after, corrected negatives")
    )
    assert in_batch > before and corrected > before
    assert "download a file from the hub\n  0." in out and "huggingface_hub." in out.split("download a file")[1]


def test_from_scratch_keeps_the_architecture_and_forgets_the_weights(recipe_module, minilm_path):
    recipe = recipe_module("train_nq")
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
    recipe = recipe_module("train_nq")
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
