"""Short runs of the trainer."""

import torch
from conftest import make_static_model

from st_corrector import CorrectorTrainer, CorrectorTrainingArguments


def arguments(folder, **settings):
    return CorrectorTrainingArguments(
        output_dir=str(folder),
        disable_tqdm=True,
        **{
            "report_to": "none",
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
