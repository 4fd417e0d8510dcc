"""A drift that correctors learn."""

import torch
import torch.nn.functional as F

DIM = 12


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def pairs(steps, rows=40, dim=DIM):
    """A stream of (stale, fresh, queries) with a drift that is a fixed linear map and a shift."""
    generator = torch.Generator().manual_seed(7)
    drift, shift = 0.3 * torch.randn(dim, dim, generator=generator) / dim**0.5, 0.2 * unit(dim, seed=3)
    for step in range(steps):
        stale = unit(rows, dim, seed=100 + step)
        yield stale, F.normalize(stale + stale @ drift + shift, dim=-1), unit(6, dim, seed=500 + step)


def fit(corrector, steps):
    return [corrector.fit_step(*step, scale=20.0) for step in pairs(steps)]
