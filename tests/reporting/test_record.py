"""The record of a run, and what is made of it: model cards, comparisons, what loggers are told."""

import html
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import make_static_model
from huggingface_hub import ModelCard
from sentence_transformers import SentenceTransformer
from support.labels import rows_in
from support.runs import arguments, trainer_of
from transformers import TrainerCallback

from st_corrector import (
    Corpus,
    CorpusRetrievalEvaluator,
    CorrectorTrainer,
    EmbeddingTeacher,
    InputError,
    RidgeCorrector,
)
from st_corrector.cli import main
from st_corrector.reporting.model_card import negatives_section, update_card
from st_corrector.reporting.record import FILE, RunRecord
from st_corrector.reporting.report import write_report


@pytest.fixture
def judged(corpus: Corpus) -> Corpus:
    """With a split dev, and answers: every query's is a word of its own text."""
    queries = corpus.qrels("train").queries
    texts = dict(zip(queries["id"], queries["text"], strict=True))
    answers = {id: [corpus.texts([int(id)])[0].split()[0]] for id in texts}
    for split in ("train", "dev"):
        corpus.add_split(split, texts, {id: [id] for id in texts}, answers)
    corpus.name = "words | and `words`"
    return corpus


def trained(corpus: Corpus, folder: Path, **settings) -> RunRecord:
    trainer = trainer_of(corpus, folder, max_steps=6, logging_steps=2, learning_rate=1e-2, **settings)
    trainer.train()
    return RunRecord.load(folder)


def test_the_record_says_what_was_done(judged, tmp_path):
    model = make_static_model()
    evaluator = CorpusRetrievalEvaluator(judged, "dev", name="dev")
    before = evaluator(model)
    trainer = trainer_of(
        judged, tmp_path, model, max_steps=6, logging_steps=2, candidates=9, max_score=0.8, probe_every=3
    )
    trainer.train()
    after = evaluator(model)
    trainer.recorder.write(trainer.args, trainer.state)
    record = RunRecord.load(tmp_path)
    (loss,) = trainer._corrected_losses().values()
    told = record.losses[""]
    assert record.steps == 6 and record.processes == 1 and record.seconds > 0
    assert record.evaluations == {"before": before, "after": after} and before != after
    assert told.counts == {
        "targets_encoded": loss.targets_encoded,
        "targets_verified": loss.targets_verified,
        "targets_reencoded": 0,
    }
    assert told.removed == dict(loss.removed) and told.removed["max_score"] > 0
    assert told.corpus["targets"] == 200 and told.corpus["fingerprint"] == judged.fingerprint
    assert (
        told.cache["bytes"] == 200 * 24 * 4
        and told.cache["fingerprint"].keys() == loss.corrected.search.cache.fingerprint.keys()
    )
    assert [entry["step"] for entry in record.series] == [2, 4, 6] and "fidelity" in record.series[0]
    assert record.arguments["candidates"] == 9 and "output_dir" not in record.arguments
    assert str(tmp_path) not in (tmp_path / FILE).read_text()
    assert record.model["parameters"] == sum(each.numel() for each in model.parameters())


def test_the_examples_are_what_is_chosen(judged, tmp_path):
    """Early and late choices equal what the loss itself selects then, for queries of the training split."""
    model = make_static_model()
    trainer = trainer_of(judged, tmp_path, model, max_steps=6, learning_rate=0.05, corrector="ridge")
    (loss,) = trainer._corrected_losses().values()

    def chosen(query: str) -> list[str]:
        row = judged.qrels("train").queries["text"][:].index(query)
        rows = loss.select(loss.encode_queries([query]), torch.tensor([[row]])).rows[0]
        return judged.ids(rows.tolist())

    texts = [judged.qrels("train").queries["text"][n] for n in trainer.recorder._queries[""]]
    early = {text: chosen(text) for text in texts}
    trainer.train()
    late = {text: chosen(text) for text in texts}
    examples = RunRecord.load(tmp_path).losses[""].examples
    assert len(examples) == 8 and [example.query for example in examples] == texts
    assert early != late
    for example in examples:
        first, last = example.choices
        assert (first.step, last.step) == (0, 6)
        assert [each.id for each in first.negatives] == early[example.query]
        assert [each.id for each in last.negatives] == late[example.query]
        for each in first.negatives:
            assert each.corrected_score == pytest.approx(each.score, abs=1e-5), "the cache is fresh before training"
        row = judged.qrels("train").queries["text"][:].index(example.query)
        fresh = loss.similarity.comparable(loss.encoder.encode(model, [row, int(last.negatives[0].id)]))
        scores = (fresh @ loss.encode_queries([example.query])[0]).tolist()
        assert [last.positive_score, last.negatives[0].score] == pytest.approx(scores, abs=1e-5)
        answer = judged.texts([row])[0].split()[0]
        assert [each.has_answer for each in last.negatives] == [answer in each.text.split() for each in last.negatives]
    assert any(abs(each.corrected_score - each.score) > 1e-3 for e in examples for each in e.choices[1].negatives)


@pytest.mark.parametrize(
    "settings", [{"sampler": "gumbel"}, {"candidates": 8}, {"sampler": "uniform", "max_score": 0.9}]
)
def test_recording_changes_nothing(judged, tmp_path, settings):
    weights = []
    for examples in (0, 8):
        model = make_static_model()
        trainer = trainer_of(judged, tmp_path / str(examples), model, example_queries=examples, **settings)
        trainer.train()
        (loss,) = trainer._corrected_losses().values()
        weights.append({**model.state_dict(), "verified": torch.tensor(loss.targets_verified)})
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 4


def test_a_resumed_run_keeps_what_was_recorded_before(judged, tmp_path):
    whole = trained(judged, tmp_path / "whole", max_score=0.9)
    model = make_static_model()
    before = CorpusRetrievalEvaluator(judged, "dev")(model)
    first = trainer_of(judged, tmp_path / "run", model, max_steps=6, logging_steps=2, learning_rate=1e-2, max_score=0.9)
    first.add_callback(Stop())
    first.train()
    assert RunRecord.load(tmp_path / "run").steps == 4
    second = trainer_of(judged, tmp_path / "run", max_steps=6, logging_steps=2, learning_rate=1e-2, max_score=0.9)
    second.train(resume_from_checkpoint=True)
    record = RunRecord.load(tmp_path / "run")
    for name in ("counts", "removed"):
        assert getattr(record.losses[""], name) == getattr(whole.losses[""], name), name
    assert [entry["step"] for entry in record.series] == [2, 4, 6]
    (early, *between, late) = record.losses[""].examples[0].choices
    assert early == whole.losses[""].examples[0].choices[0] and late == whole.losses[""].examples[0].choices[-1]
    assert not between or [choice.step for choice in between] == [4]
    assert record.seconds > second.recorder._seconds_before > 0
    assert record.evaluations == {"before": before}


def test_steps_after_the_last_log_are_recorded(judged, tmp_path):
    trainer = trainer_of(judged, tmp_path, max_steps=5, logging_steps=3, learning_rate=1e-2)
    trainer.train()
    assert [entry["step"] for entry in RunRecord.load(tmp_path).series] == [3, 5]


def test_a_loss_that_chooses_nothing_is_recorded_as_such(judged, tmp_path):
    record = trained(judged, tmp_path, num_negatives=0)
    assert record.losses[""].cache is None and record.losses[""].examples == []
    assert "none: negatives are the other queries' positives" in negatives_section(record)


def test_of_two_evaluators_one_is_told_of(judged, tmp_path):
    """Figures of two splits do not compare."""
    few = [str(n) for n in range(30)]
    texts = dict(zip(judged.qrels("dev").queries["id"], judged.qrels("dev").queries["text"], strict=True))
    judged.add_split("test", {id: texts[id] for id in few}, {id: [id] for id in few})
    dev, test = CorpusRetrievalEvaluator(judged, "dev"), CorpusRetrievalEvaluator(judged, "test")
    model = make_static_model()
    before = test(model)
    dev(model)
    trainer = trainer_of(judged, tmp_path, model, learning_rate=1e-2)
    trainer.train()
    dev(model)
    after = test(model)
    dev(model)
    assert trainer.recorder.record.evaluations == {"before": before, "after": after}


def test_a_corrector_that_maps_from_what_nobody_has_is_not_kept(judged, tmp_path):
    trainer = trainer_of(judged, tmp_path, corrector="ridge", refresh_every=4, save_strategy="no")
    trainer.train()
    assert trainer.trained_corrector() is None
    RidgeCorrector(24).save_pretrained(tmp_path / "model")  # as from a save before the refresh
    trainer.save_model(str(tmp_path / "model"))
    assert not (tmp_path / "model" / "corrector").exists()
    record = RunRecord.load(tmp_path)
    assert "all targets were re-embedded 1 times" in negatives_section(record)


def test_what_a_teacher_is_compared_by_is_no_refresh(judged, tmp_path):
    model = make_static_model()
    teacher = EmbeddingTeacher.build(model, judged, tmp_path / "teacher", judged.pairs("train"), progress=False)
    settings = arguments(tmp_path, max_steps=41, learning_rate=1e-2, save_strategy="no")
    CorrectorTrainer(model, settings, corpus=judged, teacher=teacher).train()
    record = RunRecord.load(tmp_path)
    assert record.losses[""].counts["targets_reencoded"] > 200 and "never re-embedded" in negatives_section(record)


def test_ids_as_labels_are_refused_before_anything_starts(judged, tmp_path):
    trainer = trainer_of(judged, tmp_path)
    (loss,) = trainer._corrected_losses().values()
    data = judged.pairs("train")
    ids = data.remove_columns("label").add_column("label", judged.ids(rows_in(data)))
    with pytest.raises(InputError, match="holds string, expected integers"):
        CorrectorTrainer(make_static_model(), trainer.args, train_dataset=ids, loss=loss)


# ------------------------------------------------------------------ cards


def test_the_card_tells_how_negatives_were_made(judged, tmp_path):
    record = trained(judged, tmp_path, max_score=0.8, eval_strategy="no")
    section = negatives_section(record, tmp_path)
    told = record.losses[""]
    assert "words \\| and 'words', 200 targets" in section and judged.fingerprint in section
    assert f"max_score ({told.removed['max_score']:,} candidates)" in section
    assert f"{told.counts['targets_encoded']:,} targets, positives and negatives" in section
    assert "1,200 targets (6 steps × 200)" in section and "0 targets |" in section
    assert "arxiv.org/abs/2409.01890" in section
    drift = [f"{entry['drift']:.3f}" for entry in record.series]
    record.evaluations = {"before": {"recall@20": 0.25, "answer_recall@20": 0.5}, "3": {"dev_recall@20": 0.75}}
    shown = negatives_section(record).split("Retrieval from the whole corpus")[1]
    assert "| | recall@20 | answer_recall@20 |" in shown
    assert "| before training | 25.0 | 50.0 |" in shown and "| step 3 | 75.0 |  |" in shown
    rows = re.findall(r"^\| (\d+) \| ([\d.]+) \| ([\d.]+) \|", section, flags=re.MULTILINE)
    assert [(step, value) for step, value, _ in rows] == list(zip(["2", "4", "6"], drift, strict=True))
    assert (tmp_path / "assets/staleness.png").read_bytes().startswith(b"\x89PNG")
    for line in section.splitlines():  # every row of a table has as many cells as its head
        assert not line.startswith("|") or line.endswith("|"), line


def test_a_saved_model_has_the_section_and_loads_alone(judged, tmp_path):
    model = make_static_model()
    trainer = trainer_of(judged, tmp_path / "run", model, max_steps=6, logging_steps=2)
    trainer.train()
    model.save_pretrained(str(tmp_path / "model"))
    card = ModelCard.load(tmp_path / "model" / "README.md")
    assert card.content.count("### How the Negatives Were Chosen") == 1
    assert card.content.index("How the Negatives") < card.content.index("### Training Hyperparameters")
    assert "monath2024" in card.content and "loss:CorrectedMultipleNegativesLoss" in card.data.tags
    assert "corpus row of the positive" in card.content and "cache_path" not in card.content
    loaded = SentenceTransformer(str(tmp_path / "model"), device="cpu")
    assert torch.equal(loaded.encode("word1", convert_to_tensor=True), model.encode("word1", convert_to_tensor=True))


def test_a_card_is_brought_up_to_date(judged, tmp_path, capsys):
    model = make_static_model()
    trainer = trainer_of(judged, tmp_path / "run", model, max_steps=6, logging_steps=2)
    trainer.train()
    folder = tmp_path / "model"
    make_static_model().save_pretrained(str(folder))
    card = folder / "README.md"
    card.write_text(card.read_text().replace("## Citation", "My own words.\n\n## Citation"))
    assert main(["card", str(tmp_path / "run"), "--model", str(folder)]) == 0
    once = card.read_text()
    assert once.count("How the Negatives Were Chosen") == 1 and "My own words." in once
    assert once.index("How the Negatives") < once.index("## Citation")
    record = RunRecord.load(tmp_path / "run")
    record.losses[""].corpus["name"] = "another name"
    update_card(folder, record)
    twice = card.read_text()
    assert "another name, 200 targets" in twice and twice.count("How the Negatives Were Chosen") == 1
    assert twice.replace("another name", "words \\| and 'words'") == once
    open_ended = twice.replace("<!-- st_corrector: end -->", "")
    card.write_text(open_ended)
    assert main(["card", str(tmp_path / "run"), "--model", str(folder)]) == 1
    assert "where the section ends is unknown" in capsys.readouterr().err
    assert card.read_text() == open_ended != twice, "nothing of it is lost"
    (folder / "README.md").unlink()
    assert main(["card", str(tmp_path / "run"), "--model", str(folder)]) == 1
    assert "has no README.md" in capsys.readouterr().err


# ------------------------------------------------------------------ commands and loggers


def test_compare_shows_what_differs(judged, tmp_path, capsys):
    trained(judged, tmp_path / "a", corrector="ridge", seed=1)
    trained(judged, tmp_path / "b", corrector="ridge", seed=2, num_negatives=6)
    runs = [str(tmp_path / "a"), str(tmp_path / "b")]
    capsys.readouterr()
    assert main(["compare", *runs, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found[runs[0]]["settings"] == {"num_negatives": 4, "seed": 1}
    assert found[runs[1]]["settings"] == {"num_negatives": 6, "seed": 2}
    first, second = (RunRecord.load(Path(run)) for run in runs)
    assert found[runs[0]]["results"]["targets_encoded"] == first.losses[""].counts["targets_encoded"]
    assert found[runs[1]]["results"]["drift"] == second.series[-1]["drift"]
    assert main(["compare", *runs]) == 0
    assert re.search(r"num_negatives +4 +6\n", capsys.readouterr().out)
    assert main(["compare", str(tmp_path)]) == 1 and "no record of a run" in capsys.readouterr().err


def test_report_is_written_beside_the_run(judged, tmp_path, capsys):
    trained(judged, tmp_path / "run")
    capsys.readouterr()
    assert main(["report", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "run" / "report.html")
    assert (tmp_path / "run" / "report.html").read_text().startswith("<!DOCTYPE html>")


def test_help_names_every_command(capsys):
    for given in ([], ["cache"], ["evaluate"], ["upgrade-index"], ["report"], ["card"], ["compare"]):
        with pytest.raises(SystemExit) as ended:
            main([*given, "--help"])
        assert ended.value.code == 0
    with pytest.raises(SystemExit) as ended:
        main(["nonsense"])
    assert ended.value.code == 2
    assert "upgrade-index" in capsys.readouterr().out


def test_tensorboard_gets_every_metric(judged, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "log"))
    settings = {"max_steps": 6, "logging_steps": 2, "max_score": 0.9}
    trainer = trainer_of(judged, tmp_path / "run", report_to="tensorboard", **settings)
    trainer.train()
    (events,) = (tmp_path / "log").rglob("events.out.tfevents.*")
    read = EventAccumulator(str(events))
    read.Reload()
    expected = {"drift", "corrected_error", "hardness", "seen", "age", "removed_by_max_score", "seconds_select"}
    assert {f"train/{name}" for name in expected} <= set(read.Tags()["scalars"])
    logged = [entry["drift"] for entry in RunRecord.load(tmp_path / "run").series]
    assert [event.value for event in read.Scalars("train/drift")] == pytest.approx(logged, abs=1e-6)


def test_a_record_that_is_none(tmp_path, judged):
    with pytest.raises(InputError, match="no record of a run"):
        RunRecord.load(tmp_path)
    trained(judged, tmp_path / "run")
    text = (tmp_path / "run" / FILE).read_text()
    (tmp_path / "copy").mkdir()
    for broken in (
        text[:-20],
        text.replace('"steps": 6', '"steps": "six"'),
        "[]",
        text.replace('"schema": 1', '"schema": 9'),
    ):
        (tmp_path / "copy" / FILE).write_text(broken)
        with pytest.raises(InputError, match="not readable as the record"):
            RunRecord.load(tmp_path / "copy")
    shutil.copy(tmp_path / "run" / FILE, tmp_path / "copy" / FILE)
    assert RunRecord.load(tmp_path / "copy") == RunRecord.load(tmp_path / "run")


# ---------------------------------------------------------------------- labels


@pytest.mark.parametrize("fixed", [{}, {"teacher_weight": 0.5, "teacher_scale": 12.0}])
def test_card_and_report_say_how_far_a_teacher_was_trusted_and_why(judged, tmp_path, fixed):
    pairs = judged.pairs("train")
    teacher = EmbeddingTeacher.build(make_static_model(7), judged, tmp_path / "teacher", pairs, progress=False)
    args = trainer_of(judged, tmp_path / "run", eval_strategy="no", **fixed).args
    trainer = CorrectorTrainer(make_static_model(), args, corpus=judged, teacher=teacher)
    trainer.train()
    record = RunRecord.load(tmp_path / "run")
    (loss,) = record.losses.values()
    card = negatives_section(record)
    page = write_report(record, tmp_path / "report.html").read_text(encoding="utf-8")
    for text in (card, html.unescape(page)):
        assert f"hard ones, and those of {teacher!r}" in text
        if fixed:
            assert "with weight 0.5 and scale 12, as they were set" in text
        else:
            found = trainer._corrected_losses()[""].distillation.trust.judgement
            assert f"held-out training questions: MRR@10 {found.teacher_mrr:.3f}, the encoder's" in text
    assert loss.labels is not None
    plain = trained(judged, tmp_path / "plain", eval_strategy="no")
    assert "| Labels |" not in negatives_section(plain) and "| Labels |" in card
