"""What only looks at a run (its record, its probe) does not end it where something has no finite embedding."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import make_static_model, make_texts
from support.runs import trainer_of
from transformers import TrainerCallback

from st_corrector import Corpus, FidelityCallback, NonFiniteError
from st_corrector.reporting.record import FILE, RunRecord

BROKEN = "passage"  # a token of the models' vocabulary that no text of make_texts has
STEPS = 4


@pytest.fixture
def texts():
    return make_texts()


def corpus_of(queries, targets) -> Corpus:
    corpus = Corpus.from_texts(targets)
    ids = [str(n) for n in range(len(targets))]
    corpus.add_split("train", dict(zip(ids, queries, strict=True)), {id: [id] for id in ids})
    return corpus


def examples(size: int = 200) -> list[int]:
    """The queries that a run's record looks at."""
    return sorted(np.random.default_rng(0).permutation(size)[:8].tolist())


class Break(TrainerCallback):
    """Lets a token (or all of them) have no finite embedding from a step on, ``STEPS`` being after the last."""

    def __init__(self, model, step, everything=False):
        self.model, self.step, self.everything = model, step, everything

    def break_at(self, step):
        if step == self.step:
            with torch.no_grad():
                token = self.model.tokenizer.token_to_id(BROKEN)
                self.model[0].embedding.weight[slice(None) if self.everything else token] = math.inf

    def on_train_begin(self, args, state, control, **kwargs):
        self.break_at(0)

    def on_step_end(self, args, state, control, **kwargs):
        self.break_at(state.global_step)


def run(corpus, folder, step, everything=False, **settings):
    model = make_static_model()
    trainer = trainer_of(corpus, folder, model, **{"max_steps": STEPS, "non_finite": "skip", **settings})
    breaks = Break(model, step, everything)
    trainer.callback_handler.callbacks.insert(0, breaks)  # before the recorder looks
    trainer.train()
    assert trainer.state.global_step == STEPS
    json.loads((folder / FILE).read_text(), parse_constant=lambda name: pytest.fail(f"{name} in the record"))
    return trainer, seen_in(folder)


def seen_in(folder) -> dict[str, list[int]]:
    """The record's queries, and at which steps it has looked at them."""
    return {each.query: [one.step for one in each.choices] for each in RunRecord.load(folder).losses[""].examples}


@pytest.mark.parametrize("step", [0, 2, STEPS])
@pytest.mark.parametrize("what", ["query", "positive"])
@pytest.mark.parametrize(
    "settings",
    [{}, *(pytest.param(each, marks=pytest.mark.long) for each in ({"candidates": 8}, {"sampler": "gumbel"}))],
)
def test_an_example_that_cannot_be_embedded_is_left_out_of_the_record(texts, tmp_path, caplog, step, what, settings):
    queries, targets = texts
    broken = examples()[2]
    (queries if what == "query" else targets)[broken] += f" {BROKEN}"
    _, seen = run(corpus_of(queries, targets), tmp_path, step, **settings)
    expected = {queries[n]: [0, STEPS] for n in examples()}
    expected[queries[broken]] = [] if step == 0 else [0]
    for query, steps in expected.items():
        # Of others the broken target may be a negative.
        assert seen.get(query, []) == steps or (what == "positive" and query in seen), query
    assert "of the record's examples are left out" in caplog.text


def test_an_example_whose_negative_cannot_be_embedded_is_left_out_of_the_record(texts, tmp_path):
    queries, targets = texts
    run(corpus_of(queries, targets), tmp_path / "whole", None)
    example = RunRecord.load(tmp_path / "whole").losses[""].examples[0]
    targets[int(example.choices[-1].negatives[0].id)] += f" {BROKEN}"
    _, seen = run(corpus_of(queries, targets), tmp_path / "broken", STEPS)
    assert seen[example.query] == [0] and sum(steps == [0, STEPS] for steps in seen.values()) > 2


@pytest.mark.parametrize("policy", ["skip", "stop"])
@pytest.mark.parametrize("part", ["encoder", "corrector"])
def test_weights_that_are_not_finite_after_the_last_step_leave_the_record_of_the_others(
    texts, tmp_path, caplog, policy, part
):
    if part == "encoder":
        _, seen = run(corpus_of(*texts), tmp_path, STEPS, everything=True, non_finite=policy)
    else:
        corpus = corpus_of(*texts)
        trainer = trainer_of(corpus, tmp_path, corrector="ridge", max_steps=STEPS, non_finite=policy)
        (loss,) = trainer._corrected_losses().values()

        class BreakCorrector(Break):
            def break_at(self, step):
                if step == STEPS:
                    loss.corrected.corrector.weight.fill_(math.nan)

        trainer.callback_handler.callbacks.insert(0, BreakCorrector(None, STEPS))
        trainer.train()
        seen = seen_in(tmp_path)
    assert len(seen) == 8 and set(map(tuple, seen.values())) == {(0,)}
    assert "left out" in caplog.text


def test_a_queries_own_example_comes_back_to_its_place(texts, tmp_path):
    """What is left out early and seen late belongs to the same query, and the others to theirs."""
    queries, targets = texts
    broken = examples()[0]
    queries[broken] += f" {BROKEN}"
    model, corpus = make_static_model(), corpus_of(queries, targets)
    token = model.tokenizer.token_to_id(BROKEN)
    whole = model[0].embedding.weight[token].clone()
    trainer = trainer_of(corpus, tmp_path, model, max_steps=STEPS, non_finite="skip")

    class Mend(Break):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == STEPS:
                with torch.no_grad():
                    model[0].embedding.weight[token] = whole

    trainer.callback_handler.callbacks.insert(0, Mend(model, 0))
    trainer.train()
    seen = seen_in(tmp_path)
    assert seen == {queries[n]: [STEPS] if n == broken else [0, STEPS] for n in examples()}


@pytest.mark.parametrize("what", ["query", "target"])
def test_fidelity_is_that_of_what_can_be_embedded(texts, tmp_path, caplog, what):
    queries, targets = texts
    corpus = corpus_of(queries, targets)
    expected = measured(corpus, tmp_path / "whole", 0)
    caplog.clear()
    (queries if what == "query" else targets)[7] += f" {BROKEN}"
    found = measured(corpus_of(queries, targets), tmp_path / "broken", STEPS)
    assert found.keys() == expected.keys() and all(math.isfinite(value) for value in found.values())
    assert found["fidelity"] == pytest.approx(expected["fidelity"], abs=0.02)
    assert f"without {'1 of 200 queries and 0' if what == 'query' else '0 of 200 queries and 1'} of 200" in caplog.text


def measured(corpus, folder, broken_at):
    model = make_static_model()
    trainer = trainer_of(corpus, folder, model, max_steps=1)
    (loss,) = trainer._corrected_losses().values()
    probe = FidelityCallback(loss, every=1, k=4)
    Break(model, broken_at).break_at(broken_at)
    return probe.measure()


def test_where_nothing_can_be_embedded_nothing_is_measured(texts, tmp_path):
    model = make_static_model()
    trainer = trainer_of(corpus_of(*texts), tmp_path, model, max_steps=1)
    (loss,) = trainer._corrected_losses().values()
    probe = FidelityCallback(loss, every=1, k=4)
    Break(model, 0, everything=True).break_at(0)
    probe.on_step_begin(trainer.args, trainer.state, trainer.control)
    assert probe.history == [] and "fidelity" not in loss.pop_metrics()


def test_evaluation_stays_loud(texts, tmp_path):
    queries, targets = texts
    queries[3] += f" {BROKEN}"
    corpus = corpus_of(queries, targets)
    trainer, _ = run(corpus, tmp_path, STEPS)
    with pytest.raises(NonFiniteError, match="queries in this batch"):
        trainer.evaluate(corpus.pairs("train"))
