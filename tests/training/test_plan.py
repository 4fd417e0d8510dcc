"""What the plan of a run decides where the arguments leave it open: own pairs, and the corrector."""

import logging

import pytest
import torch
from conftest import make_static_model
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss
from support.runs import arguments

from st_corrector import (
    Corpus,
    CorrectedMultipleNegativesLoss,
    Corrector,
    CorrectorTrainer,
    CorrectorTrainingArguments,
    EmbeddingCache,
    EmbeddingTeacher,
    IdentityCorrector,
    InputError,
    MLPCorrector,
    mine_negatives,
)
from st_corrector.training.own_pairs import own_positions
from st_corrector.training.plan import batches, coverage, share_for, training_pairs


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
    # A teacher that does not know them could not label a third of every batch; one that does needs more epochs.
    ignorant, knowing = (
        EmbeddingTeacher.build(make_static_model(3), titled, tmp_path / name, data, progress=False)
        for name, data in {
            "ignorant": titled.pairs("train"),
            "knowing": [titled.pairs("train"), titled.own_pairs()],
        }.items()
    )
    assert share(max_steps=50, teacher=ignorant) == 0 and share(max_steps=50, teacher=knowing) == 0.36
    epochs = {epochs: share(max_steps=-1, num_train_epochs=epochs, teacher=knowing) for epochs in (1, 2, 2.9, 3, 4)}
    assert epochs == {1: 0, 2: 0, 2.9: 0, 3: 0.36, 4: 0.36}
    # The same of one that is yet to be made.
    for epochs in (2, 3):
        args = arguments(tmp_path, **batch, max_steps=-1, num_train_epochs=epochs)
        share = share_for(titled, args, is_taught=True)
        assert share == (0.36 if epochs == 3 else 0)
        assert bool(len(own_positions(training_pairs(titled, args, is_taught=True)))) == bool(share)


# ---------------------------------------------------------------------- the corrector

OPEN = {"corrector": "auto", "save_strategy": "no"}


def pairs_of(corpus, kind):
    pairs = corpus.pairs("train")  # of which there are 60: four batches of 16
    several = {"one": pairs, "other": pairs.select(range(20))}
    return {"one": pairs, "several": several, "stream": pairs.to_iterable_dataset()}[kind]


@pytest.mark.parametrize(
    ("kind", "settings", "taken"),
    [
        ("one", {"max_steps": 3}, 3),
        ("one", {"max_steps": -1, "num_train_epochs": 1}, 4),
        ("one", {"max_steps": -1, "num_train_epochs": 2.5}, 10),
        ("one", {"max_steps": -1, "num_train_epochs": 1, "dataloader_drop_last": True}, 3),
        # The last step of an epoch accumulates what is left of it.
        ("one", {"max_steps": 3, "gradient_accumulation_steps": 3}, 7),
        ("one", {"max_steps": -1, "num_train_epochs": 2, "gradient_accumulation_steps": 3}, 8),
        ("one", {"max_steps": 3, "gradient_accumulation_steps": 10}, 12),
        ("several", {"max_steps": -1, "num_train_epochs": 1}, 6),
        ("several", {"max_steps": -1, "num_train_epochs": 1, "multi_dataset_batch_sampler": "round_robin"}, 4),
        ("stream", {"max_steps": 3, "accelerator_config": {"dispatch_batches": False}}, 3),
    ],
)
def test_a_plan_has_as_many_batches_as_the_run(titled, tmp_path, kind, settings, taken):
    args = arguments(tmp_path, **{"own_pairs_share": 0.0, "save_strategy": "no", "num_negatives": 3, **settings})
    data = pairs_of(titled, kind)
    trainer = CorrectorTrainer(make_static_model(), args, train_dataset=data, corpus=titled)
    seen = []
    forward = trainer.loss.forward
    trainer.loss.forward = lambda features, labels: seen.append(len(labels)) or forward(features, labels)
    trainer.train()
    assert len(seen) == taken
    # An incomplete last batch is planned as a whole one.
    planned = batches(args, data)
    assert planned == taken if not args.dataloader_drop_last else planned == 4
    assert coverage(args, data, titled) == planned * 16 * 4 / 200


def test_own_pairs_do_not_make_a_plan_longer_than_the_run(titled, tmp_path):
    args = arguments(tmp_path, num_negatives=3, max_steps=-1, num_train_epochs=4, save_strategy="no")
    data = training_pairs(titled, args)
    assert len(own_positions(data)) > 0
    trainer = CorrectorTrainer(make_static_model(), args, train_dataset=data, corpus=titled)
    trainer.train()
    assert batches(args, data) == trainer.state.global_step == 4 * 6
    # Beside a data set without own pairs each has its own room.
    assert batches(args, {"one": data, "other": titled.pairs("train")}) == 4 * (6 + 4)


def test_several_processes_share_the_pairs_and_take_steps_together(titled, tmp_path, monkeypatch):
    pairs = titled.pairs("train")
    by_epoch, by_steps = ({"max_steps": -1, "num_train_epochs": 1}, {"max_steps": 4})
    monkeypatch.setattr(CorrectorTrainingArguments, "world_size", property(lambda self: 2))
    for settings, taken in ((by_epoch, 2), (by_steps, 4)):
        args = arguments(tmp_path, num_negatives=3, own_pairs_share=0.0, **settings)
        assert batches(args, pairs) == taken and coverage(args, pairs, titled) == taken * 2 * 16 * 4 / 200


def test_negatives_of_ones_own_and_withdrawn_targets_are_planned(titled, tmp_path):
    args = arguments(tmp_path, num_negatives=3, max_steps=1, own_pairs_share=0.0)
    pairs = titled.pairs("train")
    own = pairs.add_column("negative", titled.texts([199] * len(pairs))).add_column("other", titled.texts([198] * 60))
    assert coverage(args, own, titled) == 16 * (1 + 3 + 2) / 200
    labelled = pairs.remove_columns("label").add_column("label", [[*each, 199, 198, 197] for each in pairs["label"]])
    assert coverage(args, labelled, titled) == 16 * (1 + 3 + 3) / 200
    assert coverage(args, {"one": pairs, "other": own}, titled) == 16 * (1 + 3 + 2) / 200
    few = titled.extend(["new"], ["new"], withdrawn=[str(n) for n in range(150, 200)])
    assert coverage(args, pairs, few) == 16 * (1 + 3) / 151


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
    assert corrector(teacher, max_steps=1, teacher_weight=0.0, teacher_scale=1.0, **many) is IdentityCorrector
    # Without writing back the cache would stay as it is.
    assert corrector(max_steps=1, write_back=False, **many) is MLPCorrector
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


def test_a_loss_of_ones_own_does_not_know_the_plan(titled, static_model, tmp_path):
    cache = EmbeddingCache.build(static_model, titled, tmp_path / "cache", progress=False)
    loss = CorrectedMultipleNegativesLoss(static_model, titled, cache)
    args = arguments(tmp_path, **OPEN, own_pairs_share=0.0, max_steps=100)
    for trainer in (SentenceTransformerTrainer, CorrectorTrainer):
        trainer(static_model, args, train_dataset=titled.pairs("train"), loss=loss)
        assert isinstance(loss.corrected.corrector, MLPCorrector)


@pytest.mark.parametrize("first", ["mlp", "identity"])
def test_a_longer_plan_does_not_go_on_with_another_corrector(titled, tmp_path, first):
    how = {**OPEN, "save_strategy": "steps", "save_steps": 1, "own_pairs_share": 0.0}
    how |= {"per_device_train_batch_size": 7, "num_negatives": 6, "cache_path": str(tmp_path / "cache")}
    begun = {**how, "corrector": "auto" if first == "mlp" else "identity"}
    CorrectorTrainer(make_static_model(), arguments(tmp_path, **begun, max_steps=1), corpus=titled).train()
    other = {**how, "corrector": "auto" if first == "mlp" else "mlp"}
    longer = CorrectorTrainer(make_static_model(), arguments(tmp_path, **other, max_steps=2), corpus=titled)
    with pytest.raises(InputError, match=r"Continue with the corrector.* corrector='auto' goes by the plan") as error:
        longer.train(resume_from_checkpoint=True)
    assert "MLPCorrector" in str(error.value) and "IdentityCorrector" in str(error.value)
    named = arguments(tmp_path, **how | {"corrector": first}, max_steps=2)
    trainer = CorrectorTrainer(make_static_model(), named, corpus=titled)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 2


def test_a_run_that_takes_no_corrector_by_itself_is_told_of_as_such(titled, tmp_path):
    """From the loss to the card, and to who asks for its corrector afterwards."""
    args = arguments(tmp_path / "out", **OPEN, own_pairs_share=0.0, num_negatives=3, max_steps=30, logging_steps=5)
    trainer = CorrectorTrainer(make_static_model(), args, corpus=titled)
    trainer.train()
    losses = [each["task_loss"] for each in trainer.state.log_history if "task_loss" in each]
    assert losses[-1] < losses[0] and trainer.trained_corrector() is None
    loss = trainer.loss
    assert isinstance(loss.corrected.corrector, IdentityCorrector) and not loss.corrected.diverged
    assert trainer.state.log_history[-2]["seen"] > 0.5
    trainer.save_model(str(tmp_path / "final"))
    card = (tmp_path / "final" / "README.md").read_text(encoding="utf-8")
    assert "| Corrector | none |" in card and "| written back |" in card
    assert "corrected" not in card.partition("### How the Negatives Were Chosen")[2].partition("###")[0]
    with pytest.raises(InputError, match=r"holds no corrector.*corrector='mlp'"):
        Corrector.from_pretrained(str(tmp_path / "final"))
    with pytest.raises(InputError, match=r"The run had no corrector.*EmbeddingCache.build"):
        mine_negatives(trainer.model, titled, loss.corrected, tmp_path / "mined", progress=False)
    cache = EmbeddingCache.build(trainer.model, titled, tmp_path / "fresh", progress=False)
    assert len(mine_negatives(trainer.model, titled, cache, tmp_path / "mined", progress=False))


def test_embeddings_that_are_written_back_are_not_given_up_as_a_corrector_that_fails(titled, static_model, tmp_path):
    cache = EmbeddingCache.build(static_model, titled, tmp_path / "cache", progress=False)
    loss = CorrectedMultipleNegativesLoss(static_model, titled, cache, corrector="identity")
    corrected, rows = loss.corrected, torch.arange(20)
    # What is written back is of another world each time, so that the cache is nearer to what comes next.
    for step in range(150):
        fresh = corrected.cached(rows) if step % 2 else -corrected.cached(rows)
        corrected.learn(rows, fresh, fresh)
    assert not corrected.diverged and corrected.search.seen(rows).all()


def test_arguments_of_the_plain_trainer_are_refused_and_none_are_the_default_ones(titled, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="args is a SentenceTransformerTrainingArguments, expected CorrectorTraining"):
        CorrectorTrainer(make_static_model(), SentenceTransformerTrainingArguments("out"), corpus=titled)
    without = CorrectorTrainer(make_static_model(), corpus=titled)
    default = CorrectorTrainer(make_static_model(), CorrectorTrainingArguments("tmp_trainer"), corpus=titled)
    assert without.train_dataset.to_list() == default.train_dataset.to_list()
    assert len(own_positions(default.train_dataset)) and without.args.output_dir == "tmp_trainer"


def test_refreshes_and_probes_are_made_of_a_loss_of_ones_own_too(titled, tmp_path):
    model = make_static_model()
    cache = EmbeddingCache.build(model, titled, tmp_path / "cache", progress=False)
    loss = MatryoshkaLoss(model, CorrectedMultipleNegativesLoss(model, titled, cache, num_negatives=2), [24, 12])
    args = arguments(tmp_path / "out", refresh_every=2, probe_every=2, probe_targets=50, save_strategy="no")
    trainer = CorrectorTrainer(model, args, corpus=titled, loss=loss)
    trainer.train()
    (corrected,) = trainer._corrected_losses().values()
    assert corrected.corrected.refreshed and corrected.corrected.targets_reencoded == 2 * len(titled)
    assert [each["step"] for each in trainer.fidelity.history] == [0, 2, 4]
