"""What searches are compared with."""

import torch
import torch.nn.functional as F


def trained(corrector, dim):
    """A corrector that does something: a few steps on a drift."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        stale = F.normalize(torch.randn(64, dim, generator=generator), dim=-1)
        fresh = F.normalize(stale.roll(1, dims=1) + stale, dim=-1)
        corrector.fit_step(stale, fresh, stale[:5], 20.0)
    return corrector


def naive(scores, k):
    """The k largest of each row, equal ones by column: a full stable sort in float64."""
    order = scores.double().sort(dim=1, descending=True, stable=True)
    return order.values[:, :k], order.indices[:, :k]
