"""Batches as the trainer gives them to a loss."""

import torch


def batch_of(model, corpus, rows, split="train"):
    """What the trainer's collator would give the loss for these pairs."""
    pairs = corpus.pairs(split)[list(rows)]
    return [model.preprocess(pairs["anchor"]), model.preprocess(pairs["positive"])], torch.tensor(pairs["label"])[:, 0]


def on(batch, device):
    """What :func:`batch_of` gives, on a device."""
    features, labels = batch
    moved = [{k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in each.items()} for each in features]
    return moved, labels.to(device)
