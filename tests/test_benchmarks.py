"""The study and its report at smoke size, through the very scripts that make the committed results."""

import importlib
import json
import math
import os
import signal
import subprocess
import sys

import numpy as np
import psutil
import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from conftest import ROOT, load_bert_model, make_bert_model
from scipy import stats
from support.scripts import run

from st_corrector import (
    Corpus,
    CorrectedMultipleNegativesLoss,
    CorrectedSearch,
    EmbeddingCache,
    InputError,
    RidgeCorrector,
)

BENCHMARKS = ROOT / "benchmarks"


@pytest.mark.long
@pytest.mark.timeout(600)
def test_the_smoke_preset_runs_side_by_side_loses_one_resumes_and_is_reported(beir, minilm_path, tmp_path):
    results, outputs = tmp_path / "results", tmp_path / "outputs"
    study = [BENCHMARKS / "strategies.py", "--preset", "smoke", "--dataset", beir, "--results", results]
    study += ["--outputs", outputs, "--at_once", 2]
    # One cannot write its figures.
    (outputs / "smoke" / "in-batch-seed0" / "results.json" / "in the way").mkdir(parents=True)
    done = subprocess.run([sys.executable, *map(str, study)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and "Failed:\n    smoke in-batch seed 0" in done.stderr
    assert "FAILS (1): smoke in-batch seed 0\n" in done.stdout and "results.json cannot be written" in done.stdout
    assert not (results / "smoke" / "in-batch-seed0.json").exists()
    # What was evaluated of the untrained model is taken from the runs before.
    (metrics,) = (outputs / "caches").glob("*-before-*.json")
    metrics.write_text(json.dumps({**json.loads(metrics.read_text()), "mrr@10": 0.123}))
    (outputs / "smoke" / "in-batch-seed0" / "results.json" / "in the way").rmdir()
    (outputs / "smoke" / "in-batch-seed0" / "results.json").rmdir()
    before = (results / "smoke" / "exhaustive-seed0.json").stat().st_mtime_ns
    out = run(*study)
    assert "begins: smoke in-batch seed 0" in out and out.count("begins: ") == 1, "only that one is run again"
    assert (results / "smoke" / "exhaustive-seed0.json").stat().st_mtime_ns == before

    runs = {path.stem: json.loads(path.read_text()) for path in (results / "smoke").glob("*.json")}
    names = {"in-batch", "mined-once", "stale-write-back", "mlp-pull-back", "mlp-verify-32", "exhaustive"}
    assert runs.keys() == {f"{name}-seed0" for name in names}
    for name, figures in runs.items():
        assert figures["steps"] == 4 and figures["targets"] == 240, name
        assert figures["after"]["mrr@10"] != figures["before"]["mrr@10"], "it trained"
        assert figures["encoder_flops"] > 0 and figures["precision"] == "float32" and figures["device"]["name"]
        seconds = figures["seconds"]
        assert sum(seconds[part] for part in ("before", "prepare", "train", "evaluate")) < seconds["process"]
        assert figures["at_once"] == 2
    assert runs.pop("in-batch-seed0")["before"]["mrr@10"] == 0.123
    assert len({figures["before"]["mrr@10"] for figures in runs.values()} - {0.123}) == 1
    reencoded = {name.removesuffix("-seed0"): run["targets_encoded_for_cache"] for name, run in runs.items()}
    assert reencoded == {**dict.fromkeys(names - {"in-batch"}, 0), "exhaustive": 3 * 240}
    assert runs["mined-once-seed0"]["targets_encoded"] == 4 * 8 * 3, "n-tuples of two negatives"
    assert runs["mlp-verify-32-seed0"]["targets_verified"] > 4 * 32
    probes = runs["mlp-pull-back-seed0"]["probes"]
    assert [probe["step"] for probe in probes] == [0, 2] and probes[0]["fidelity"] == 1 > probes[1]["fidelity"] > 0
    assert all(len(run["versions"]["commit"]) == 12 for run in runs.values())

    readme = (ROOT / "README.md").read_bytes()
    run(BENCHMARKS / "report.py", "--results", results)
    report = (results / "README.md").read_text()
    mrr = 100 * runs["mlp-pull-back-seed0"]["after"]["mrr@10"]
    assert f"| mlp-pull-back | 1 | {mrr:.1f} |" in report and runs["exhaustive-seed0"]["command"] in report
    trained = runs["mlp-pull-back-seed0"]["seconds"]
    assert f"| {trained['train'] - trained['probe']:.0f} (2) |" in report and "side by side" in report
    for plot in ("quality-vs-reencoded", "quality-vs-seconds", "fidelity-over-steps"):
        assert f"({plot}.png)" in report
        assert (results / f"{plot}.png").stat().st_size > 5_000 and "<svg" in (results / f"{plot}.svg").read_text()
    assert (ROOT / "README.md").read_bytes() == readme


@pytest.mark.long
@pytest.mark.timeout(600)
def test_the_study_for_a_gpu_runs_in_bfloat16_and_stops_when_its_time_is_up(beir, minilm_path, tmp_path, monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")  # with which the data loader's processes would hang
    study = [BENCHMARKS / "strategies.py", "--preset", "gpu", "--smoke", "--dataset", beir, "--seeds", 0]
    study += ["--regimes", "minilm-2-layers-low-coverage", "bert-from-scratch-low-coverage", "--at_once", 2]
    study += ["--results", tmp_path / "results", "--outputs", tmp_path / "outputs", "--strategies"]
    # Both begin with the cache, which is the same.
    run(*study, "exhaustive", "mlp-verify-8", "--regimes", "minilm-2-layers-low-coverage")
    run(*study, "refresh-10", "--regimes", "bert-from-scratch-low-coverage")
    # What takes longer than there is time is not begun.
    out = run(*study, "mlp-verify-8", "in-batch", "--minutes", 0.01)
    left = [line.strip() for line in out.partition("Left, 3 runs:\n")[2].splitlines()]
    assert "begins" not in out and left == [
        "minilm-2-layers-low-coverage in-batch seed 0",
        "bert-from-scratch-low-coverage mlp-verify-8 seed 0",
        "bert-from-scratch-low-coverage in-batch seed 0",
    ]
    found = {path.parent.name[:4] + path.stem: path for path in (tmp_path / "results").glob("*/*.json")}
    found = {name: json.loads(path.read_text()) for name, path in found.items()}
    assert found.keys() == {"miniexhaustive-seed0", "minimlp-verify-8-seed0", "bertrefresh-10-seed0"}
    for figures in found.values():
        assert figures["precision"] == "bfloat16" and figures["steps"] == 12
        assert figures["after"]["mrr@10"] > figures["before"]["mrr@10"] + 0.1, "it learns"
        assert figures["command"].startswith("python recipes/train_nq.py") and " --bf16 true " in figures["command"]
    assert found["miniexhaustive-seed0"]["targets_encoded_for_cache"] == 11 * 240
    assert found["bertrefresh-10-seed0"]["targets_encoded_for_cache"] == 240
    assert found["minimlp-verify-8-seed0"]["targets_verified"] > 12 * 8
    assert found["minimlp-verify-8-seed0"]["before"] == found["miniexhaustive-seed0"]["before"]
    for name in ("miniexhaustive-seed0", "bertrefresh-10-seed0"):
        first, second = found[name]["probes"]
        # A GPU rounds differently in batches of another shape.
        same = 1e-4 if "cuda" in found[name]["device"] else 1e-6
        assert first["fidelity_drift"] < same, "the cache is computed as the encoder computes in training"
        assert second["step"] == 7 and (second["fidelity_drift"] < same) == name.startswith("mini")
    run(BENCHMARKS / "report.py", "--results", tmp_path / "results")
    report = (tmp_path / "results" / "README.md").read_text()
    assert "1 negative each" in report and "learning rate 0.0005, bfloat16 on " in report


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_every_run_of_the_study_for_a_gpu_works_at_smoke_size(beir, minilm_path, tmp_path):
    study = [BENCHMARKS / "strategies.py", "--preset", "gpu", "--smoke", "--dataset", beir, "--seeds", 0]
    out = run(*study, "--at_once", 2, "--results", tmp_path / "results", "--outputs", tmp_path / "outputs")
    found = [json.loads(path.read_text()) for path in (tmp_path / "results").glob("*/*.json")]
    assert len(found) == out.count("begins: ") > 60 and "FAILS" not in out and "Left" not in out
    for figures in found:
        assert figures["after"]["mrr@10"] != figures["before"]["mrr@10"] and figures["precision"] == "bfloat16"
    run(BENCHMARKS / "report.py", "--results", tmp_path / "results")


@pytest.mark.long
def test_the_study_gives_up_where_nothing_works_and_takes_its_runs_with_it_when_it_is_told_to_stop(tmp_path):
    study = [sys.executable, str(BENCHMARKS / "strategies.py"), "--preset", "smoke"]
    study += ["--results", str(tmp_path / "results"), "--outputs", str(tmp_path / "outputs"), "--dataset"]
    done = subprocess.run([*study, "/nowhere"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and done.stdout.count("FAILS") == 1 and "Left, 5 runs:" in done.stdout
    assert "--dataset /nowhere: there is no such folder or file" in done.stdout
    stopped = subprocess.Popen([*study, "/nowhere"], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert stopped.stdout.readline() == "begins: smoke in-batch seed 0\n"
    (recipe,) = psutil.Process(stopped.pid).children()
    stopped.terminate()
    assert stopped.wait() == 128 + signal.SIGTERM and not recipe.is_running()


def test_what_a_run_will_take_is_judged_by_those_that_are_done(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    strategies = importlib.import_module("strategies")

    def expected(strategy, regime="one"):
        return strategies.expected_seconds(strategies.Run(regime, strategy, 1), done)

    def figures(**seconds):
        return {"steps": 100, "seconds": {"evaluate": 5.0, **seconds}}

    done = {}
    assert expected("stale") == expected("exhaustive") == 0, "nobody knows"
    done[strategies.Run("one", "stale", 0)] = figures(process=30.0)
    done[strategies.Run("one", "stale", 2)] = figures(process=40.0)
    done[strategies.Run("other", "stale", 0)] = figures(process=90.0)
    assert expected("stale") == 40 and expected("in-batch") == 40 and expected("stale", "third") == 90
    assert expected("refresh-10") == 40 + 10 * 5 and expected("exhaustive") == 40 + 100 * 5
    done[strategies.Run("one", "exhaustive", 0)] = figures(process=300.0)
    assert expected("exhaustive") == 300
    done[strategies.Run("old", "stale", 0)] = figures(prepare=1.0, train=10.0, probe=4.0)
    assert expected("stale", "old") == 16, "parts; what was measured beside is a part of training"


def test_packages_that_say_the_same_are_in_one_group(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    corpora = importlib.import_module("corpora")
    words = [f"word{n}" for n in range(60)]
    story, other = " ".join(words[:40]), " ".join(words[20:60])
    texts = [
        [story],
        ["It is new. " + story],  # 37 sequences of four words, all but three of which are in both
        [story.replace("word20", "else")],  # four of 37 are others: 33 of 41 in both
        [story.replace("word9", "one").replace("word29", "two")],  # eight are others: 29 of 45
        ["A beginning.", other],
        ["a Beginning.", story],
        [other],
        ["two words"],
        ["two words more"],
    ]
    groups = corpora.alike(texts)
    members = [{n for n, each in enumerate(groups) if each == group} for group in dict.fromkeys(groups)]
    # Those with one beginning bring their groups together, and a text that is like another of a group is in it.
    assert members == [{0, 1, 2, 4, 5, 6}, {3}, {7}, {8}]
    monkeypatch.setattr(corpora, "RARE", 1)
    assert corpora.alike(texts[:1] + texts[6:]) == [0, 1, 2, 3], "nothing shared is rare"


def test_the_page_of_results_says_what_the_trainer_takes_by_itself(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    report = importlib.import_module("report")
    for regime, default in (("nq-low-coverage", "mlp-pull-back"), ("nq-high-coverage", "stale-write-back")):
        table = report.short_table(report.load(report.RESULTS / regime))
        (row,) = (line for line in table.splitlines() if "(`auto`)" in line)
        assert row.startswith(f"| {default} (`auto`) |")
        assert row in (ROOT / "docs" / "results.md").read_text(encoding="utf-8")


def test_what_the_evidence_calls_the_default_is_what_the_trainer_takes(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    evidence, report = importlib.import_module("evidence"), importlib.import_module("report")
    found = evidence.read(report.RESULTS / "evidence")
    assert found.keys() >= {"2-layers", "2-layers-all"}
    for encoder, corpora in found.items():
        untaught, *taught = evidence.DEFAULTS[encoder]
        assert all(untaught.strategy.startswith(report.by_default(runs)) for runs in corpora.values())
        assert all(each.strategy.startswith(report.CORRECTED) for each in taught)
        assert all(evidence.TITLES[other] for each in (untaught, *taught) for other in (each.strategy, *each.instead))


def test_the_interval_of_a_difference_is_that_of_students_t(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    evidence = importlib.import_module("evidence")
    metric, interval = evidence.METRICS["recall@20"], evidence.interval

    def of_seeds(values):
        runs = {"one": [figures(n, 0.5 + value / 100) for n, value in enumerate(values)]}
        runs["other"] = [figures(n, 0.5) for n in range(len(values) + 1)]
        return evidence.difference("one", "other", runs, metric)

    def figures(seed, recall, ranks=None):
        return {"seed": seed, "after": {"recall@20": recall}} | ({"ranks": {"after": ranks}} if ranks else {})

    one, other = [0.2, 1.0, 0.9, -0.1], [3.0, 1.0, 2.5, 2.0]
    assert interval([of_seeds(one)]) == pytest.approx(tuple(stats.ttest_1samp(one, 0).confidence_interval(0.95)))
    # Half the difference of two means is a mean of two, of which one has its sign changed.
    welch = stats.ttest_ind(other, [-each for each in one], equal_var=False).confidence_interval(0.95)
    assert interval([of_seeds(one), of_seeds(other)]) == pytest.approx((welch.low / 2, welch.high / 2))
    assert interval([of_seeds(one), of_seeds([1.0])]) is None and interval([]) is None
    assert interval([of_seeds([1.0, 1.0])]) == pytest.approx((1.0, 1.0))
    assert evidence.difference("one", "none", {"one": [figures(0, 0.5)]}, metric) is None
    # Seeds that agree leave the questions, of whose relevant targets 1, 1, 0.5 and 0 are found, instead of 1, 0, 0, 0.
    ours, theirs = "1,20,3 -,21", "1,-,- -,21"
    runs = {"one": [figures(n, 0.625, ours) for n in range(3)], "other": [figures(n, 0.25, theirs) for n in range(3)]}
    found = evidence.difference("one", "other", runs, metric)
    over_questions = tuple(stats.ttest_1samp([0, 100, 50, 0], 0).confidence_interval(0.95))
    assert found.mean == 37.5 and interval([found]) == pytest.approx(over_questions)
    assert evidence.apart("one", "other", [runs], metric) == "+37.5 [{:+.1f}, {:+.1f}] (3)".format(*over_questions)
    runs["one"][1] = figures(1, 0.5)
    assert evidence.apart("one", "other", [runs], metric).endswith("(3s)"), "ranks are not known of all"


def test_test_questions_stay_sealed_until_they_are_opened_once(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    strategies, report = importlib.import_module("strategies"), importlib.import_module("evidence_report")
    study = strategies.Study("data", tmp_path, tmp_path / "outputs", smoke=False, at_once=1, minutes=None)
    twice = "-2-negatives-2-layers"
    for strategy, dev, test in ((f"mlp-pull-back{twice}", 0.5, 0.41), (f"stale-write-back{twice}", 0.4, 0.43)):
        for seed in (0, 1):
            run_of = strategies.Run("code-2-layers", strategy, seed)
            metrics = {"recall@20": 0.6, "recall@100": 0.7}
            figures = {"strategy": strategy, "seed": seed, "command": "python", "versions": {}, "targets": 10}
            figures |= {"after": {**metrics, "mrr@10": dev + seed / 100}, "test": {**metrics, "mrr@10": test}}
            figures |= {"ranks": {"after": "1,-,4 7", "test": "3,1,-"}}
            figures |= {"targets_encoded": 20, "targets_encoded_for_cache": 0, "args": {"strategy": "corrected"}}
            figures |= {"seconds": {"prepare": 1.0, "train": 2.0}, "device": {"name": "x"}, "precision": "float32"}
            folder = run_of.outputs(tmp_path / "outputs")
            folder.mkdir(parents=True)
            (folder / "results.json").write_text(json.dumps(figures))
            study._end(run_of, 0, 3.0)
            kept, sealed = (json.loads(path(tmp_path).read_text()) for path in (run_of.results, run_of.sealed))
            assert "test" not in kept and kept["ranks"] == {"after": "1,-,4 7"} and sealed["ranks"] == "3,1,-"
    found, written = report.read(tmp_path), "| written back, no corrector: **what the trainer takes** |"
    assert f"{written} 40.5 ± 0.7 |" in report.summary(found, report.tested(tmp_path, found))
    page = report.page(tmp_path)
    assert "40.5 ± 0.7" in page and "+10.0" in page and "Test questions" not in page and "43.0" not in page
    report.open_test(tmp_path)
    opened = report.page(tmp_path)
    assert f"{written} 43.0 ± 0.0 |" in report.summary(found, report.tested(tmp_path, found))
    assert "\n# Test questions\n" in opened and "43.0 ± 0.0" in opened and "-2.0" in opened and "40.5 ± 0.7" in opened
    for path in (run_of.results(tmp_path), run_of.sealed(tmp_path)):
        later = json.loads(path.read_text()) | {"seed": 2}
        path.with_name(f"stale-write-back{twice}-seed2.json").write_text(json.dumps(later))
    tested = report.page(tmp_path).partition("\n# Test questions\n")[2]
    assert "-2.0" in tested and "(2)" in tested and "(3)" not in tested, "what was run later has no part in it"
    with pytest.raises(SystemExit, match="opened before"):
        report.open_test(tmp_path)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_the_cost_of_selection_is_measured_resumed_and_reported(beir, tmp_path):
    results = tmp_path / "results" / "cpu.json"
    measure = [BENCHMARKS / "selection.py", "--dataset", beir, "--rows", 1500, "--turns", 1, "--results", results]
    measure += ["--outputs", tmp_path / "outputs"]
    run(*measure, "--only", "base", "large")
    figures = json.loads(results.read_text())
    base = {each["corrector"]: each for each in figures["settings"].values() if each["stored"] == "memory"}
    assert len(base) == 8 and len(figures["settings"]) == 12
    for each in base.values():
        assert each["rows_that_agree"] > 0.995 and 0 < each["extra_bytes"] <= each["planned_bytes"]
        turns = each["all_seconds"]["floors"]
        assert len(turns["search"]) == len(turns[each["floor"]]) in (2, 5)
        assert min(turns["search"]) / max(turns[each["floor"]]) <= each["ratio_to_floor"]
        assert each["ratio_to_floor"] <= max(turns["search"]) / min(turns[each["floor"]])
        assert each["ratio_of_best_to_floor"] == min(turns["search"]) / min(turns[each["floor"]])
    out = run(*measure, "--only", "base", "indices", "recall")
    assert "1500, 384" not in out, "what is there is not measured again"
    figures = json.loads(results.read_text())
    assert figures["recall"]["float16"] > figures["recall"]["int8"] > 0.9 and len(figures["indices"]) == 8
    assert 0.3 < figures["indices"][0]["recall_at_k"] <= figures["indices"][3]["recall_at_k"] <= 1
    run(BENCHMARKS / "selection_report.py", "--results", results.parent)
    page = (results.parent / "README.md").read_text()
    assert f"| mlp-512 | {base['mlp-512']['seconds']['search']:.3f} |" in page
    assert "# On a GPU\n\nNot measured yet: `python benchmarks/selection.py --dataset" in page


@pytest.mark.long
@pytest.mark.timeout(900)
def test_what_is_measured_on_a_gpu_is_tried_out_on_a_cpu(beir, tmp_path, monkeypatch):
    results = tmp_path / "results" / "cuda.json"
    measure = [BENCHMARKS / "selection.py", "--dataset", beir, "--turns", 2, "--seconds", 0, "--results", results]
    measure += ["--outputs", tmp_path / "outputs"]
    run(*measure, "--rows", 3000, "--only", "gpu", "gpu-streamed", "gpu-growth", "gpu-base")
    with_torch = json.loads(results.read_text())["settings"]
    assert len(with_torch) == 8 * 2 + 2, "sizes are one; nothing is streamed to a CPU"
    assert {each["kernel_over_torch"] for each in with_torch.values()} == {None}
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    out = run(*measure, "--rows", 200, "--only", "gpu-base", "tiles")
    assert "3000, " not in out
    figures = json.loads(results.read_text())
    with_kernel = [each for each in figures["settings"].values() if each["kernel_over_torch"]]
    assert len(with_kernel) == 2 and {each["rows"] for each in with_kernel} == {200}
    for each in figures["settings"].values():
        assert each["rows_that_agree"] > 0.995
        assert 0 < each["float64"]["largest_error"] < each["tolerance"] < 2e-5
        turns = each["all_seconds"]
        shares = [2 * one / other for one, other in zip(turns["search"], turns["copying"], strict=True)]
        assert len(shares) == 2 and each["ratio_to_bandwidth"] == pytest.approx(sum(shares) / 2)
    assert {each["dtype"] for each in figures["tiles"]} == {"bfloat16", "int8", "float32"}
    assert all(each["largest_relative_error"] < 1e-6 and each["seconds"] > 0 for each in figures["tiles"])
    run(BENCHMARKS / "selection_report.py", "--results", results.parent)
    page = (results.parent / "README.md").read_text()
    for each in with_torch.values():
        assert f"| {each['corrector']} | {each['seconds']['search']:.4f} | {each['ratio_to_bandwidth']:.2f} (" in page
    assert "(bounds.png)" in page and (results.parent / "bounds.svg").exists() and "## The kernel alone" in page
    assert "--only gpu gpu-streamed gpu-growth gpu-base compile`" in page, "3,000 rows are none of the grid's"


MEASURED_ELSEWHERE = """
import support.second_device
import json, sys, types
from pathlib import Path
import torch
import torch.nn.functional as F
import selection, selection_report
from st_corrector import EmbeddingCache
from st_corrector.cache.shard import DTYPES

folder = Path(sys.argv[1])
vectors = F.normalize(torch.randn(700, 64, generator=torch.Generator().manual_seed(0)), dim=-1)
queries = F.normalize(vectors[:9] + vectors[9:18] / 2, dim=-1)
done = {"settings": {}, "machine": selection.machine("second"), "command": "as the test does"}
kinds = ("mlp-128", "bfloat16"), ("ridge, query side", "int8"), ("ridge", "int8")
for number, (corrector, dtype) in enumerate(kinds):
    setting = selection.Setting(2_000, 64, 8, 5, corrector, dtype)
    blocks = (block.to("second") for block in selection.tiled(vectors, 2_000))
    cache = EmbeddingCache.from_blocks(blocks, DTYPES[dtype], rows=2_000)
    args = types.SimpleNamespace(device="second", turns=3, seconds=0.0)
    done["settings"][str(number)] = selection.measure_for_gpu(setting, cache, vectors, queries, args)
(folder / "cuda.json").write_text(json.dumps(done))
(folder / "page.md").write_text("\\n\\n".join(selection_report.gpu_page(done, folder)))
"""


@pytest.mark.long
def test_a_search_that_cannot_be_measured_costs_no_other(beir, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    selection = importlib.import_module("selection")
    measure, asked = selection.measure_for_gpu, []

    def failing(setting, *others):
        asked.append(setting)
        if len(asked) == 2:
            raise torch.OutOfMemoryError("there is no memory left")
        return measure(setting, *others)

    monkeypatch.setattr(selection, "measure_for_gpu", failing)
    options = ["--dataset", str(beir), "--rows", "1000", "--only", "gpu", "--turns", "1", "--seconds", "0"]
    monkeypatch.setattr(sys, "argv", ["selection.py", *options, "--outputs", str(tmp_path)])
    with pytest.raises(SystemExit, match="Failed, for the reasons above"):
        selection.main()
    kept = json.loads((tmp_path / "cpu.json").read_text())["settings"]
    assert len(asked) == len(selection.GPU_GRID["gpu"]) == len(kept) + 1
    assert "there is no memory left" in capsys.readouterr().err
    selection.main()
    assert len(json.loads((tmp_path / "cpu.json").read_text())["settings"]) == len(asked) - 1 == len(kept) + 1


@pytest.mark.long
def test_measuring_for_a_gpu_mixes_no_devices(tmp_path):
    """On a device that is not the CPU, where tensors of both in one operation are an error."""
    path = os.pathsep.join(map(str, (BENCHMARKS, ROOT / "recipes", ROOT / "tests")))
    command = [sys.executable, "-c", MEASURED_ELSEWHERE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0, done.stderr[-3000:]
    page = (tmp_path / "page.md").read_text()
    figures = json.loads((tmp_path / "cuda.json").read_text())["settings"]
    products = {"mlp-128": 64 * 128 + 128 * 64 + 64 * 8, "ridge, query side": 64 * 8, "ridge": 64 * 64 + 64 * 8}
    for each in figures.values():
        assert each["rows_that_agree"] > 0.995 and each["float64"]["queries"] == 8
        assert each["flops"] == 2 * 2_000 * products[each["corrector"]]
        assert each["cache_bytes"] == 2_000 * (128 if each["dtype"] == "bfloat16" else 64 + 4)
        assert each["bytes_per_second"] == each["cache_bytes"] / each["seconds"]["search"]
        assert f"| {each['corrector']} | {each['seconds']['search']:.4f} |" in page


def test_a_search_that_float64_does_not_confirm_is_refused(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    ways = importlib.import_module("selection_ways")
    generator = torch.Generator().manual_seed(0)
    vectors = F.normalize(torch.randn(3_000, 64, generator=generator), dim=-1)
    queries, corrector = F.normalize(vectors[:5] + 0.1, dim=-1), RidgeCorrector(64)
    corrector.learn(vectors[:500], F.normalize(vectors[:500] + 0.3 * vectors[:1], dim=-1), queries, 20.0)
    cache = EmbeddingCache.from_blocks([vectors], torch.int8)
    found, tolerance = CorrectedSearch(cache, corrector).search(queries, 10), ways.rounding(64)
    assert ways.check_in_float64(found, cache, corrector, queries[:3], tolerance)["queries"] == 3
    eleventh = CorrectedSearch(cache, corrector).search(queries, 11)
    wrong = (
        found._replace(scores=found.scores + 3 * tolerance),
        found._replace(scores=eleventh.scores[:, 1:], rows=eleventh.rows[:, 1:]),  # the best is missing
        found._replace(
            scores=torch.cat([found.scores[:, :1], found.scores[:, :9]], dim=1),
            rows=torch.cat([found.rows[:, :1], found.rows[:, :9]], dim=1),
        ),  # the best is there twice
    )
    for each in wrong:
        with pytest.raises(AssertionError, match="against float64"):
            ways.check_in_float64(each, cache, corrector, queries[:3], tolerance)


@pytest.fixture
def step(monkeypatch, tmp_path):
    """The benchmark of a step, with a tiny transformer instead of the large ones."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("step")
    make_bert_model(tmp_path)
    monkeypatch.setattr(module, "make_encoder", lambda setting: load_bert_model(tmp_path / "bert-right").train())
    AcceleratorState._reset_state(True)  # of tests before, in the same process, which train in another precision
    yield module
    AcceleratorState._reset_state(True)


def tiny(setting):
    shape = {"encoder": "transformer", "targets": 500, "batch_size": 4, "num_negatives": 2, "steps": 1}
    return setting._replace(**shape, torch_compile=False, mini_batch_size=setting.mini_batch_size and 3)


def test_every_setting_of_a_step_is_a_command_line_and_is_measured_at_tiny_size(beir, step, tmp_path, monkeypatch):
    monkeypatch.setattr(step, "WARM_UP", 1)
    for settings in step.PRESETS.values():
        for setting in settings:
            given = vars(step.make_parser().parse_args(["--dataset", "data", *setting.options()]))
            assert step.Setting(**{name: given[name] for name in step.Setting._fields if name in given}) == setting
        assert len({setting.name("cuda", 1) for setting in settings}) == len(settings)
    assert {setting.targets for setting in step.PRESETS["gpu"]} == {1_000_000, 21_000_000}
    results = []
    for setting in dict.fromkeys(map(tiny, step.PRESETS["gpu"])):
        AcceleratorState._reset_state(True)
        path = tmp_path / "results" / f"{setting.name('cpu', 1)}.json"
        step.measure_and_keep(setting, str(beir), tmp_path / "outputs", path)
        results.append(json.loads(path.read_text()))
        turns = results[-1]["turns"]
        assert len(turns["counted"]) == len(turns["to_warm_up"]) == 1
        for turn in (*turns["counted"], *turns["to_warm_up"]):
            assert 2 * 4 < turn["texts"] <= turn["reference_texts"] < turn["texts"] + 4
            parts = ("encode", "exchange", "select", "correct", "ours_backward", "ours_optimizer")
            assert sum(turn[part] for part in parts) < turn["ours_step"] and min(turn[part] for part in parts) > 0
            assert turn["graphs_compiled"] == 0
    assert {result["targets"] for result in results} == {500} and len(results) == 5
    assert {result["cache_bytes"] / 500 for result in results} == {32 * 2, 32 + 4}
    assert sum(result["bf16"] for result in results) == 4
    page = importlib.import_module("step_report").page(tmp_path / "results")
    for result in results:
        assert f"`{result['command']}`" in page and f"| {result['medians']['ours_step']:.3f} |" in page
    for said in (
        "| bfloat16, streamed |",
        "| int8 |",
        "| 4 by 3 |",
        "| bf16 | no |",
        "| float32 | no |",
        "](parts.png)",
    ):
        assert said in page
    assert (tmp_path / "results" / "parts.png").stat().st_size > 5_000


def test_a_trial_of_a_step_is_no_result_and_a_result_is_not_overwritten(step, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(step, "ROOT", tmp_path)
    kept = []
    monkeypatch.setattr(step, "measure_each", lambda settings, dataset, outputs, folder: kept.append(folder))
    monkeypatch.setattr(step, "measure_and_keep", lambda setting, dataset, outputs, path: kept.append(path.parent))

    def main(*options):
        monkeypatch.setattr(sys, "argv", ["step.py", "--dataset", "data", *options])
        step.main()
        return kept.pop()

    results = tmp_path / "benchmarks" / "results" / "step"
    with pytest.raises(SystemExit):
        main("--preset", "gpu")
    assert "torch sees no GPU" in capsys.readouterr().err
    assert main("--preset", "gpu", "--targets", "900") == tmp_path / "outputs" / "step"
    assert main("--preset", "cpu") == main("--encoder", "static") == results
    results.mkdir(parents=True)
    (results / "cpu-static-1.json").touch()
    with pytest.raises(SystemExit):
        main("--encoder", "static")
    assert "is there already" in capsys.readouterr().err
    assert main("--encoder", "static", "--results", str(tmp_path)) == tmp_path


def test_a_tiled_corpus_is_one_of_distinct_targets_with_their_own_tokens(corpus, static_model, bert_model, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    tiling = importlib.import_module("tiled_corpus")
    rows = np.array([0, 7, 199, 200, 207, 599, 600, 1_049])
    for model in (static_model, bert_model):
        words = tiling.single_tokens(model, 6)
        assert len(set(words)) == 6
        tiled = tiling.TiledCorpus(corpus, 1_050, words)
        assert len(tiled) == 1_050 and tiled.splits == ["train"] and len(tiled.pairs("train")) == 200
        assert tiled.texts(rows) == [f"{words[row // 200]} {corpus.texts([row % 200])[0]}" for row in rows]
        assert len({tuple(text.split()) for text in tiled.texts(range(1_050))}) == 1_050
        tokens = tiled.tokenize(model, "")
        expected = model.preprocess(tiled.texts(rows), task="document")
        found = tokens.features(rows)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.equal(found[key], value) if isinstance(value, torch.Tensor) else found[key] == value, key
        ids, lengths = tokens.layout.split(expected)
        assert ids["input_ids"].sum() and np.array_equal(tokens.lengths[rows], lengths) and len(tokens) == 1_050
        assert all(len(tiled.duplicates_of(row)) == 1 for row in rows)
        assert tiled.fingerprint != tiling.TiledCorpus(corpus, 1_051, words).fingerprint
        with pytest.raises(ValueError, match="need 6 words, got 5"):
            tiling.TiledCorpus(corpus, 1_050, words[:5])
    # What has the same text has it again behind every other word.
    twins = tiling.TiledCorpus(Corpus.from_texts(["word1 word2", "word3", "Word1  word2"]), 8, words)
    assert [twins.duplicates_of(row).tolist() for row in (0, 5, 4, 6)] == [[0, 2], [3, 5], [4], [6]]


def test_a_loss_accepts_a_tiled_corpus_and_its_labels_alone(corpus, bert_model, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    tiling = importlib.import_module("tiled_corpus")
    tiled = tiling.TiledCorpus(corpus, 1_050, tiling.single_tokens(bert_model, 6))
    cache = EmbeddingCache.build(bert_model, tiled.passages, tmp_path / "passages")
    cache = EmbeddingCache.from_tensor(cache[np.arange(1_050) % 200])
    loss = CorrectedMultipleNegativesLoss(bert_model, tiled, cache, num_negatives=3)
    # Every row can be a positive, and a text's copies, whose stale embeddings are the same, are negatives of it.
    for rows in ([3, 8], [203, 1_008]):
        features = [bert_model.preprocess(texts) for texts in (corpus.texts([3, 8]), tiled.texts(rows))]
        assert torch.isfinite(loss(features, torch.tensor(rows))["task_loss"])
        selected = loss.select(*(loss.encode_queries(tiled.texts(rows)), torch.tensor(rows)[:, None])).rows
        assert (selected % 200 == torch.tensor([[3], [8]])).all() and not (
            selected == torch.tensor(rows)[:, None]
        ).any()
        with pytest.raises(InputError, match="is not the text of corpus row"):
            loss(features, torch.tensor(rows) % 200 + 400)


def test_turns_that_compile_something_warm_up_until_there_are_too_many_of_them(step):
    turns = [{"graphs_compiled": n in (1, 4, 5), "n": n} for n in range(12)]
    warm_up, counted = step.measured(iter(turns), 4)
    assert [turn["n"] for turn in counted] == [6, 7, 8, 9] and warm_up == turns[:6]
    turns = ({"graphs_compiled": 1, "n": n} for n in range(100))
    warm_up, counted = step.measured(turns, 4)
    assert len(warm_up) == step.MOST_WARM_UP and len(counted) == 4


def test_an_encoder_that_is_made_twice_as_wide_says_the_same(bert_model, corpus, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    step = importlib.import_module("step")
    texts = corpus.texts(range(20))
    narrow = bert_model.encode(texts, convert_to_tensor=True)
    wide = step.as_large_as_bert_base(bert_model)
    encoder = wide[0].auto_model.encoder
    assert wide[0].auto_model.config.hidden_size == 64 and len(encoder.layer) == 4
    assert not torch.equal(wide.encode(texts, convert_to_tensor=True)[:, ::2], narrow / 2**0.5)
    encoder.layer = encoder.layer[::2]  # each stands there twice
    torch.testing.assert_close(wide.encode(texts, convert_to_tensor=True), narrow.repeat_interleave(2, 1) / 2**0.5)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_compiled_step_is_measured_when_nothing_is_left_to_compile(beir, step, tmp_path):
    setting = tiny(step.Setting())._replace(torch_compile=True, bf16=True)
    found = step.measure(setting, str(beir), tmp_path / "outputs")
    graphs = [turn["graphs_compiled"] for turn in found["turns"]["to_warm_up"]]
    assert sum(graphs) > 1 and found["medians"]["graphs_compiled"] == 0
    assert found["seconds_to_compile"] > 20 * found["medians"]["ours_step"]


@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_cost_of_a_step_is_measured_in_processes_of_which_one_may_fail_and_reported(beir, minilm_path, tmp_path):
    measure = [BENCHMARKS / "step.py", "--dataset", beir, "--preset", "gpu", "--encoder", "static", "--targets", 600]
    measure += ["--batch_size", 8, "--num_negatives", 2, "--steps", 3, "--no-torch_compile"]
    measure += ["--results", tmp_path / "results", "--outputs", tmp_path / "outputs"]
    for begun in (5, 1):
        done = subprocess.run([sys.executable, *map(str, measure)], capture_output=True, text=True, cwd=ROOT)
        # A static encoder's texts cannot be cut into mini-batches.
        assert done.returncode == 1 and "Failed:\n    cpu-static-1-" in done.stderr and "mini-batches" in done.stderr
        assert done.stdout.count("begins: ") == begun and done.stdout.count("FAILS: ") == 1
    found = [json.loads(path.read_text()) for path in (tmp_path / "results").glob("*.json")]
    assert len(found) == 4 and all(len(result["overheads"]) == 3 for result in found)
    run(BENCHMARKS / "step_report.py", "--results", tmp_path / "results", tmp_path / "nothing")
    page = (tmp_path / "results" / "README.md").read_text()
    assert all(f"| {result['medians']['ours_step']:.3f} |" in page for result in found)
    assert {result["cache_dtype"] for result in found} == {"bfloat16", "int8"}
    # One of them by itself.
    alone = [each for each in found[0]["command"].split()[1:] if each != "benchmarks/step.py"]
    run(BENCHMARKS / "step.py", *alone, "--results", tmp_path / "alone", "--outputs", tmp_path / "outputs")
    (path,) = (tmp_path / "alone").glob("*.json")
    again = json.loads(path.read_text())
    for name in ("command", "targets", "cache_dtype", "cache_on_device", "bf16", "batch_size"):
        assert again[name] == found[0][name]
    assert (tmp_path / "results" / path.name).exists()


def test_every_strategy_of_every_preset_is_a_command_that_the_recipe_understands(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    strategies, recipe = importlib.import_module("strategies"), importlib.import_module("command_line")
    understood = set()
    for preset in strategies.PRESETS:
        for each in strategies.runs(preset):
            if each[:2] in understood:
                continue  # with another seed
            script, *options = strategies.command("data", each, ROOT / "out")
            monkeypatch.setattr(sys, "argv", [script, *options, "--use_cpu", "true"])
            given, training = recipe.parse_arguments("train_nq", "", "data")
            assert training.seed == each.seed and given.results is None and given.caches == "out/caches"
            assert training.output_dir == f"out/{each.regime}/{each.strategy}-seed{each.seed}"
            if given.strategy == "corrected":
                assert training.corrector != "auto", "a study names what it compares"
                training.correction().make_corrector(8, unit=True)
            understood.add(each[:2])
    assert len(understood) > 400


def test_no_probe_falls_right_after_every_refresh(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    strategies = importlib.import_module("strategies")
    for preset in ("cpu", "gpu"):
        for regime, strategy, _ in strategies.runs(preset):
            if strategy.startswith("refresh-") and regime in strategies.PROBES:
                every = int(strategies.PROBES[regime][strategies.PROBES[regime].index("--probe_every") + 1])
                assert math.gcd(every, int(strategy.removeprefix("refresh-"))) == 1, (regime, strategy)


def test_the_synthetic_study_knows_its_risks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    study = importlib.import_module("synthetic_staleness")
    linear = study.measure(study.Case("linear", 1.0, "ridge", 1024), 0)
    assert (
        linear["true_risk"] < 0.01 < 0.3 < linear["stale_risk"] and linear["fidelity"] > linear["stale_fidelity"] + 0.3
    )
    noise = study.measure(study.Case("noise", 1.0, "ridge", 1024), 0)
    assert noise["true_risk"] > noise["empirical_risk"] and noise["true_risk"] > 0.95 * noise["stale_risk"]
    few, many = (study.measure(study.Case("smooth", 1.0, "ridge", pairs), 0) for pairs in (64, 4096))
    assert few["complexity"] > 4 * many["complexity"] and few["true_risk"] > many["true_risk"]
    one, other = study.drifted("linear", 0.1, 0), study.drifted("linear", 3.0, 0)
    assert (
        study.sliced_wasserstein(*one) < study.sliced_wasserstein(*other)
        and study.sliced_wasserstein(one[0], one[0]) == 0
    )
    shift = study.torch.zeros(study.DIM)
    shift[0] = 2.0
    # A shift by v moves every projection by ⟨v, u⟩, whose mean square over directions is ‖v‖²/d.
    some = one[0][:1_000]
    distance = study.sliced_wasserstein(some, some + shift, directions=20_000)
    assert distance == pytest.approx(2 / study.DIM**0.5, rel=0.03)


@pytest.mark.long
def test_what_start_up_takes_is_measured(nq, tmp_path):
    run(BENCHMARKS / "startup.py", "--dataset", nq, "--targets", 2000, "--repeats", 1, "--results", tmp_path / "s.json")
    found = json.loads((tmp_path / "s.json").read_text())
    assert found["start"]["targets"] == 2000 and found["start"]["later"]["cpu"] < found["start"]["first"]["cpu"]
    assert (
        found["seconds"]["st-corrector --help"]["cpu"] < 0.5 < found["seconds"]["import sentence_transformers"]["cpu"]
    )
