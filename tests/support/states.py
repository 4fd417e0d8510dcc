"""What a model's parameters are, their gradients, and how far two are apart."""

import math

import torch


def weights(model):
    """Copies of a model's parameters and buffers, by name."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one, other):
    """Whether two states have the same names, and under each the same numbers, bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def gradients(model):
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


def gradient_difference(found, expected):
    """The largest difference, as a part of the largest gradient expected.

    It is infinite where other parameters have gradients, and where there is too little to compare.
    """
    if found.keys() != expected.keys() or len(found) <= 10:
        return math.inf
    scale = max(value.abs().max().item() for value in expected.values())
    largest = max((found[name] - value).abs().max().item() for name, value in expected.items())
    return largest / scale if scale > 1e-3 else math.inf


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model
