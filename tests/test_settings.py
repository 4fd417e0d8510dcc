"""Each setting is declared once, and reaches the loss under one name from wherever it is given."""

import importlib
import inspect
from collections import Counter
from dataclasses import fields, replace

import pytest
import torch
from conftest import ROOT, make_static_model
from sentence_transformers import SentenceTransformerTrainingArguments

from st_corrector import (
    CachedCorrectedMultipleNegativesLoss,
    CorrectedMultipleNegativesLoss,
    CorrectionSettings,
    CorrectorTrainer,
    CorrectorTrainingArguments,
    EmbeddingCache,
    EmbeddingTeacher,
    FalseNegativeFilter,
    NegativeSettings,
)
from st_corrector.training.arguments import SETTINGS

NOT_ON_A_COMMAND_LINE = {"false_negatives", "checks", "shortlist", "teacher"}
OTHERS = {  # every setting but the corrector's own, with a value that is not its default
    **{"num_negatives": 5, "sampler": "gumbel", "candidates": 9, "share_negatives": False, "in_batch_negatives": False},
    **{"scale": 7.0, "train_split": None, "max_score": 0.9, "absolute_margin": 0.01, "relative_margin": 0.02},
    **{"range_min": 1, "range_max": 12, "corrector": "ridge", "corrector_settings": '{"forgetting": 0.9}'},
    **{"corrector_warmup_steps": 2, "corrector_warmup_negatives": "in-batch", "corrector_divergence": "warn"},
    **{"write_back": False, "background_targets": 3, "hardness_mode": "all_negatives", "hardness_strength": 5.0},
    **{"distillation_loss": "margin-mse", "teacher_weight": 0.5, "teacher_scale": 12.0},
}


def test_every_argument_has_a_single_source(monkeypatch):
    declared = Counter(each.name for settings in SETTINGS for each in fields(settings))
    assert set(declared.values()) == {1}, declared
    of = {each.name: each for settings in SETTINGS for each in fields(settings)}
    inherited = {each.name for each in fields(SentenceTransformerTrainingArguments)}
    assert not inherited & of.keys(), "an argument of transformers' means something else"
    ours = {each.name: each for each in fields(CorrectorTrainingArguments) if each.name not in inherited}
    for name, each in ours.items():
        assert each.metadata["help"], name
        if name in of:
            assert each.default is of[name].default and each.metadata["help"] is of[name].metadata["help"], (
                f"{name} is declared twice"
            )
    assert of.keys() - ours.keys() == NOT_ON_A_COMMAND_LINE
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    recipe = {each.name for each in fields(importlib.import_module("command_line").RecipeArguments)}
    assert not recipe & (ours.keys() | of.keys())


def test_both_losses_take_the_same():
    plain, cached = (
        inspect.signature(each).parameters
        for each in (CorrectedMultipleNegativesLoss, CachedCorrectedMultipleNegativesLoss)
    )
    assert cached.keys() - plain.keys() == {"mini_batch_size", "show_progress_bar"} and not plain.keys() - cached.keys()
    assert all(cached[name].default == plain[name].default for name in plain)
    assert plain.keys() & {each.name for settings in SETTINGS for each in fields(settings)} == {
        "num_negatives",
        "corrector",
        "teacher",
    }, "short forms of the common ones"


def test_what_the_arguments_say_is_what_the_loss_does(static_model, corpus, tmp_path):
    default = CorrectorTrainingArguments("x", report_to="none", use_cpu=True)
    assert all(getattr(default, name) != value for name, value in OTHERS.items())
    args = CorrectorTrainingArguments(str(tmp_path / "run"), report_to="none", use_cpu=True, **OTHERS)
    targets = torch.nn.functional.normalize(torch.randn(len(corpus), 4), dim=-1)
    keys = corpus.qrels("train").keys
    teacher = EmbeddingTeacher(targets, targets[: len(keys)], keys)
    loss = CorrectorTrainer(static_model, args, corpus=corpus, teacher=teacher).loss
    assert loss.distillation.teacher is teacher
    groups = (loss.negatives, loss.negatives.false_negatives, loss.correction, loss.distillation.settings)
    flat = {name: value for group in groups for name, value in vars(group).items()}
    assert OTHERS.items() <= flat.items() and loss.scale == 7.0
    assert loss.corrected.corrector.forgetting == 0.9 and not loss.corrected.writes_back
    config = loss.get_config_dict()
    assert config.keys() >= {each.name for group in (NegativeSettings, CorrectionSettings) for each in fields(group)}


def test_settings_as_they_were_given_before_go_on_with_a_warning(corpus, tmp_path):
    model = make_static_model()
    cache = EmbeddingCache.build(model, corpus, tmp_path / "cache", progress=False)
    rules = FalseNegativeFilter(max_score=0.9)
    with pytest.warns(DeprecationWarning, match="corrector_warmup_steps, sampler, false_negatives in negatives=Negat"):
        loss = CorrectedMultipleNegativesLoss(
            model, corpus, cache, 4, "ridge", warmup_steps=3, sampler="gumbel", false_negatives=rules
        )
    assert loss.negatives == NegativeSettings(4, "gumbel", false_negatives=rules)
    assert loss.correction == CorrectionSettings("ridge", corrector_warmup_steps=3)
    with pytest.raises(TypeError, match="no setting 'samplers'"), pytest.warns(DeprecationWarning):
        CorrectedMultipleNegativesLoss(model, corpus, cache, samplers="gumbel")


def test_short_forms_are_the_settings_of_their_name(corpus, tmp_path, recwarn):
    model = make_static_model()
    cache = EmbeddingCache.build(model, corpus, tmp_path / "cache", progress=False)
    given = NegativeSettings(sampler="uniform"), CorrectionSettings(write_back=False)
    loss = CorrectedMultipleNegativesLoss(model, corpus, cache, 4, "ridge", negatives=given[0], correction=given[1])
    assert loss.negatives == replace(given[0], num_negatives=4)
    assert loss.correction == replace(given[1], corrector="ridge")
    assert not [each for each in recwarn if "NegativeSettings" in str(each.message)]
