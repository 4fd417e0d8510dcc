"""What the plan of a run decides where the arguments leave it open: own pairs, and the corrector."""

import logging

import pytest
from conftest import make_static_model
from datasets import IterableDataset, concatenate_datasets
from support.runs import arguments

from st_corrector import (
    CheckpointError,
    Corpus,
    CorrectorTrainer,
    EmbeddingTeacher,
    IdentityCorrector,
    InputError,
    MLPCorrector,
)
from st_corrector.training.own_pairs import own_positions
from st_corrector.training.plan import coverage, share_for, training_pairs


def test_by_default_own_pairs_come_where_questions_come_again(titled, tmp_path):
    pairs = len(titled.pairs("train"))
    batch = {"per_device_train_batch_size": 16}

    def share(corpus=titled, teacher=None, **settings):
        args = arguments(tmp_path, **batch, **settings)
        given, data = args.own_pairs_share, training_pairs(corpus, args, teacher)
        share = share_for(corpus, args, teacher)
        assert bool(len(own_positions(data))) == bool(share)
        assert args.own_pairs_share is given, "the arguments serve for other runs"
        return share

    assert 60 <= pairs < 100
    assert share(max_steps=pairs // 16) == 0 and share(max_steps=2 + pairs // 16) == 0.36
    assert share(max_steps=-1, num_train_epochs=1) == 0 and share(max_steps=-1, num_train_epochs=2) == 0.36
    assert share(max_steps=50, own_pairs_share=0.0) == 0 and share(max_steps=2, own_pairs_share=0.25) == 0.25
    # Where targets have no questions of their own, or hardly any is left, there are none.
    plain = Corpus.from_texts([f"word{n} word{n + 1}" for n in range(90)])
    plain.add_split("train", {str(n): f"word{n}" for n in range(40)}, {str(n): [str(n)] for n in range(40)})
    assert share(plain, max_steps=50) == 0
    few = Corpus.from_texts(["a", "b", "c", "d"], titles=["A 1", "B 1", "C 1", "D 1"])
    few.add_split("train", {str(n): f"q{n}" for n in range(3)}, {str(n): [str(n)] for n in range(3)})
    assert share(few, max_steps=50) == 0
    # A teacher that does not know them could not label a third of every batch.
    teachers = (
        EmbeddingTeacher.build(make_static_model(3), titled, tmp_path / "teacher", data, progress=False)
        for data in (titled.pairs("train"), [titled.pairs("train"), titled.own_pairs()])
    )
    assert [share(max_steps=50, teacher=teacher) for teacher in teachers] == [0, 0.36]


# ---------------------------------------------------------------------- the corrector

OPEN = {"corrector": "auto", "save_strategy": "no"}


@pytest.mark.parametrize(
    ("settings", "planned"),
    [
        ({"max_steps": 3}, 3 * 16 * 4 / 200),
        ({"max_steps": 3, "gradient_accumulation_steps": 2}, 6 * 16 * 4 / 200),
        ({"max_steps": 3, "num_negatives": 0}, 3 * 16 / 200),
        # 60 pairs are four batches of 16, of which the last is not full.
        ({"max_steps": -1, "num_train_epochs": 1}, 4 * 16 * 4 / 200),
        ({"max_steps": -1, "num_train_epochs": 2.5}, 10 * 16 * 4 / 200),
    ],
)
def test_coverage_is_planned_as_the_run_will_encode(titled, tmp_path, settings, planned):
    args = arguments(tmp_path, own_pairs_share=0.0, **{"num_negatives": 3, **settings})
    assert coverage(args, titled.pairs("train"), len(titled)) == pytest.approx(planned)


def test_own_pairs_do_not_make_a_plan_longer_than_the_run(titled, tmp_path):
    args = arguments(tmp_path, num_negatives=3, max_steps=-1, num_train_epochs=4)
    data = training_pairs(titled, args)
    assert len(own_positions(data)) > 0
    trainer = CorrectorTrainer(make_static_model(), args, train_dataset=data, corpus=titled)
    trainer.train()
    assert coverage(args, data, len(titled)) == trainer.state.global_step * 16 * 4 / 200


def test_pairs_of_several_data_sets_count_together_and_streams_have_steps(titled, tmp_path):
    args = arguments(tmp_path, num_negatives=3, max_steps=-1, num_train_epochs=1)
    pairs = titled.pairs("train")
    both = {"one": pairs, "other": pairs.select(range(20))}
    assert coverage(args, both, 200) == coverage(args, concatenate_datasets([*both.values()]), 200) == 1.6
    stream: IterableDataset = pairs.to_iterable_dataset()
    assert coverage(arguments(tmp_path, num_negatives=3, max_steps=7), stream, 200) == 7 * 16 * 4 / 200


def test_the_corrector_goes_by_coverage_and_teacher(titled, tmp_path, caplog):
    teacher = EmbeddingTeacher.build(
        make_static_model(3), titled, tmp_path / "teacher", titled.pairs("train"), progress=False
    )

    def corrector(teacher=None, **settings):
        args = arguments(tmp_path / "run", **{**OPEN, "num_negatives": 3, "own_pairs_share": 0.0, **settings})
        caplog.clear()
        with caplog.at_level(logging.INFO, "st_corrector.training.plan"):
            trainer = CorrectorTrainer(make_static_model(), args, corpus=titled, teacher=teacher)
        assert args.corrector == settings.get("corrector", "auto"), "the arguments serve for other runs"
        return type(trainer.loss.corrected.corrector)

    # 49 targets, of 200, are below a quarter, 51 are not.
    few, many = (
        {"per_device_train_batch_size": 7, "num_negatives": 6},
        {"per_device_train_batch_size": 17, "num_negatives": 2},
    )
    assert corrector(max_steps=1, **few) is MLPCorrector
    assert "'mlp' here: the run will encode each target 0.24 times, and has no teacher" in caplog.text
    assert corrector(max_steps=1, **many) is IdentityCorrector
    assert "'identity' here: the run will encode each target 0.26 times, and has no teacher" in caplog.text
    assert corrector(teacher, max_steps=1, **many) is MLPCorrector
    assert "and has a teacher" in caplog.text
    assert corrector(max_steps=1, corrector="mlp", **many) is MLPCorrector
    assert corrector(max_steps=1, corrector="identity", **few) is IdentityCorrector and not caplog.records


def test_each_run_of_a_new_model_has_the_corrector_of_its_own_plan(titled, tmp_path):
    args = arguments(tmp_path, **OPEN, num_negatives=3, own_pairs_share=0.0, max_steps=1, report_to="none")
    trainer = CorrectorTrainer(model_init=lambda: make_static_model(), args=args, corpus=titled)
    assert isinstance(trainer.loss.corrected.corrector, IdentityCorrector)
    args.per_device_train_batch_size = 4
    trainer.train()
    assert isinstance(trainer.loss.corrected.corrector, MLPCorrector)


def test_settings_of_a_corrector_that_is_not_named_are_refused(tmp_path):
    with pytest.raises(InputError, match="pass corrector='mlp'"):
        arguments(tmp_path, corrector="auto", corrector_settings={"hidden": 16})
    with pytest.raises(InputError, match="corrector_warmup_steps must not be negative"):
        arguments(tmp_path, corrector="auto", corrector_warmup_steps=-1)


def test_a_longer_plan_does_not_go_on_with_another_corrector(titled, tmp_path):
    """A checkpoint with a corrector is not continued without it, nor the other way round."""
    how = {**OPEN, "save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 7, "num_negatives": 6}
    how |= {"own_pairs_share": 0.0, "cache_path": str(tmp_path / "cache")}
    CorrectorTrainer(make_static_model(), arguments(tmp_path, **how, max_steps=1), corpus=titled).train()
    longer = CorrectorTrainer(make_static_model(), arguments(tmp_path, **how, max_steps=2), corpus=titled)
    with pytest.raises((InputError, CheckpointError), match="Continue with the corrector") as error:
        longer.train(resume_from_checkpoint=True)
    assert "MLPCorrector" in str(error.value) and "IdentityCorrector" in str(error.value)
    named = arguments(tmp_path, **how | {"corrector": "mlp"}, max_steps=2)
    trainer = CorrectorTrainer(make_static_model(), named, corpus=titled)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 2
