"""The study and its report at smoke size, through the very scripts that make the committed results."""

import importlib
import json
import math
import os
import subprocess
import sys

import pytest
from conftest import ROOT, make_texts

from st_corrector.correctors import CORRECTORS
from st_corrector.selection import NegativeSelector

BENCHMARKS = ROOT / "benchmarks"


def run(script, *arguments):
    command = [sys.executable, str(script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "MPLBACKEND": "Agg"})
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def beir(tmp_path_factory):
    """A BEIR folder of 240 short texts: 160 training and 60 dev queries with an answer each."""
    folder = tmp_path_factory.mktemp("beir")
    (folder / "qrels").mkdir()
    queries, texts = make_texts(240)
    with (folder / "corpus.jsonl").open("w") as file:
        file.writelines(json.dumps({"_id": f"d{n}", "title": "", "text": text}) + "\n" for n, text in enumerate(texts))
    with (folder / "queries.jsonl").open("w") as file:
        for n, text in enumerate(queries):
            file.write(json.dumps({"_id": f"q{n}", "text": text, "answers": [texts[n].split()[0]]}) + "\n")
    for split, numbers in (("train", range(160)), ("dev", range(160, 220))):
        lines = [f"q{n}\td{n}\t1\n" for n in numbers]
        (folder / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(lines))
    return folder


@pytest.mark.timeout(600)
def test_the_smoke_preset_runs_resumes_and_is_reported(beir, minilm_path, tmp_path):
    results = tmp_path / "results"
    study = [BENCHMARKS / "strategies.py", "--preset", "smoke", "--dataset", beir, "--results", results]
    study += ["--outputs", tmp_path / "outputs"]
    out = run(*study)
    runs = {path.stem: json.loads(path.read_text()) for path in (results / "smoke").glob("*.json")}
    names = {"in-batch", "mined-once", "stale-write-back", "mlp-pull-back", "mlp-verify-32", "exhaustive"}
    assert runs.keys() == {f"{name}-seed0" for name in names}
    for name, figures in runs.items():
        assert figures["steps"] == 4 and figures["targets"] == 240, name
        assert figures["after"]["mrr@10"] != figures["before"]["mrr@10"], "it trained"
        assert figures["encoder_flops"] > 0
    reencoded = {name.removesuffix("-seed0"): run["targets_encoded_for_cache"] for name, run in runs.items()}
    assert reencoded == {**dict.fromkeys(names, 0), "exhaustive": 3 * 240}
    assert runs["in-batch-seed0"]["targets_encoded"] == 4 * 8
    assert runs["mined-once-seed0"]["targets_encoded"] == 4 * 8 * 3, "n-tuples of two negatives"
    assert runs["mlp-verify-32-seed0"]["targets_verified"] > 4 * 32
    probes = runs["mlp-pull-back-seed0"]["probes"]
    assert [probe["step"] for probe in probes] == [0, 2] and probes[0]["fidelity"] == 1 > probes[1]["fidelity"] > 0
    assert all(len(run["versions"]["commit"]) == 12 for run in runs.values())
    # Killed after all but one run: only that one is run again.
    (results / "smoke" / "in-batch-seed0.json").unlink()
    before = (results / "smoke" / "exhaustive-seed0.json").stat().st_mtime_ns
    out = run(*study)
    assert "smoke in-batch seed 0" in out and out.count("smoke ") == 1
    assert (results / "smoke" / "exhaustive-seed0.json").stat().st_mtime_ns == before

    readme = (ROOT / "README.md").read_bytes()
    run(BENCHMARKS / "report.py", "--results", results)
    report = (results / "README.md").read_text()
    mrr = 100 * runs["mlp-pull-back-seed0"]["after"]["mrr@10"]
    assert f"| mlp-pull-back | 1 | {mrr:.1f} |" in report and runs["exhaustive-seed0"]["command"] in report
    for plot in ("quality-vs-reencoded", "quality-vs-seconds", "fidelity-over-steps"):
        assert f"({plot}.png)" in report
        assert (results / f"{plot}.png").stat().st_size > 5_000 and "<svg" in (results / f"{plot}.svg").read_text()
    assert (ROOT / "README.md").read_bytes() == readme


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
    assert "# On CUDA\n\nNot run yet: `python benchmarks/selection.py" in page


@pytest.mark.long
def test_the_cost_of_a_step_is_measured_and_reported(beir, tmp_path):
    run(
        *(BENCHMARKS / "step.py", "--dataset", beir, "--encoder", "static", "--steps", 3, "--batch_size", 8),
        *("--results", tmp_path / "results", "--outputs", tmp_path / "outputs"),
    )
    found = json.loads((tmp_path / "results" / "cpu-static-1.json").read_text())
    seconds, counts = found["medians"], (found["medians"]["texts"], found["medians"]["reference_texts"])
    assert 2 * 8 < counts[0] <= counts[1] and len(found["overheads"]) == 3
    parts = [seconds[name] for name in ("encode", "select", "correct", "ours_backward", "ours_optimizer")]
    assert all(part > 0 for part in parts) and sum(parts) < 1.5 * seconds["ours_step"]
    page = (tmp_path / "results" / "README.md").read_text()
    assert f"| {seconds['ours_step']:.3f} |" in page and found["command"] in page


def test_every_strategy_of_every_preset_is_a_command_that_the_recipe_understands(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    strategies, recipe = importlib.import_module("strategies"), importlib.import_module("command_line")
    understood = 0
    for preset in strategies.PRESETS:
        for regime, strategy, seed in strategies.runs(preset):
            script, *options = strategies.command("data", regime, strategy, seed, ROOT / "results.json", ROOT / "out")
            monkeypatch.setattr(sys, "argv", [script, *options])
            given, training = recipe.parse_arguments("train_nq", "", "data")
            assert training.seed == seed and given.results == "results.json"
            if given.strategy == "corrected":
                CORRECTORS[training.corrector](8, **training.corrector_options)
            if recipe.Strategy.parse(given.strategy).chooses:
                names = ("num_negatives", "sampler", "scale", "budget", "candidates", "false_negatives")
                NegativeSelector(**{name: training.loss_settings[name] for name in names})
            understood += 1
    assert understood > 300


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
    distance = study.sliced_wasserstein(one[0], one[0] + shift, directions=20_000)
    assert distance == pytest.approx(2 / study.DIM**0.5, rel=0.03)
