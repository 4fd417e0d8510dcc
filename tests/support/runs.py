"""Short runs of the trainer, what watches them, and in what two of them differ."""

import torch
from conftest import make_static_model
from transformers import TrainerCallback

from st_corrector import CorrectorTrainer, CorrectorTrainingArguments


def arguments(folder, **settings):
    return CorrectorTrainingArguments(
        output_dir=str(folder),
        disable_tqdm=True,
        **{
            "report_to": "none",
            "corrector": "mlp",
            "per_device_train_batch_size": 16,
            "learning_rate": 0.05,
            "max_steps": 6,
            "save_strategy": "steps",
            "save_steps": 2,
            "num_negatives": 4,
            **settings,
        },
    )


def trainer_of(corpus, folder, model=None, **settings):
    model = model or make_static_model()
    torch.manual_seed(0)
    return CorrectorTrainer(model, arguments(folder, **settings), corpus=corpus)


def loss_of(trainer):
    """The one corrected loss of a trainer."""
    (loss,) = trainer._corrected_losses().values()
    return loss


def diverging(corpus, folder, policy, **settings):
    """A trainer whose corrector makes things worse."""
    return trainer_of(
        corpus,
        folder,
        corrector_divergence=policy,
        corrector_settings={"hidden": 16, "learning_rate": 3.0},
        max_steps=110,
        save_steps=105,
        learning_rate=1e-3,
        **settings,
    )


class Steps(TrainerCallback):
    """Which steps were taken."""

    def __init__(self):
        self.taken = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.taken.append(state.global_step)


class At(TrainerCallback):
    """Does something before a step."""

    def __init__(self, step, do):
        self.step, self.do = step, do

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.do()


def difference(one, other):
    """In what the run ``other`` differs from ``one``, bit for bit; None where in nothing.

    A run that was resumed has made the last steps only.
    """
    steps = len(other["selected"])
    if not steps:
        return "nothing was selected"
    for ours, theirs in zip(one["selected"][-steps:], other["selected"], strict=True):
        if not torch.equal(ours, theirs):
            return "selected"
    for part in ("model", "corrector", "overlay"):
        if one[part].keys() != other[part].keys() or not one[part]:
            return f"{part}: {sorted(one[part])}, {sorted(other[part])}"
        for name, value in one[part].items():
            if not torch.equal(value, other[part][name]):
                return f"{part}: {name}"
    for name in ("targets_encoded", "steps"):
        if one[name] != other[name]:
            return f"{name}: {one[name]}, {other[name]}"
    return None
