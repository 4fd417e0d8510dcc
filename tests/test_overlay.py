import torch

from st_corrector.overlay import Overlay


def test_written_rows_replace_the_caches_and_others_stay():
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(5000, 4, generator=generator)
    cache = truth.clone()
    overlay = Overlay(5000, 4)
    assert overlay.replace(cache, slice(0, 5000)) is cache
    for _ in range(40):
        rows = torch.randperm(5000, generator=generator)[:90]
        vectors = torch.randn(90, 4, generator=generator)
        overlay.write(rows, vectors)
        truth[rows] = vectors
    assert torch.equal(overlay.replace(cache, slice(0, 5000)), truth)
    assert torch.equal(overlay.replace(cache[1000:1300], slice(1000, 1300)), truth[1000:1300])
    some = torch.tensor([4999, 3, 3, 17])
    assert torch.equal(overlay.replace(cache[some], some), truth[some])
    assert not torch.equal(cache, truth), "the cache itself is as it was"
    changed = (cache != truth).any(1).nonzero().flatten()
    assert sorted(overlay.rows.tolist()) == changed.tolist() and len(overlay) == len(changed)


def test_state_goes_into_another_overlay():
    overlay, other = Overlay(10, 2), Overlay(10, 2)
    overlay.write(torch.tensor([7, 2]), torch.ones(2, 2), 3)
    overlay.write(torch.tensor([2]), torch.ones(1, 2), 5)
    other.write(torch.tensor([5]), torch.ones(1, 2))
    other.load_state_dict(overlay.state_dict())
    probe = torch.zeros(10, 2)
    assert torch.equal(other.replace(probe, slice(0, 10)), overlay.replace(probe, slice(0, 10)))
    assert other.rows.tolist() == [7, 2] and other.written_at(torch.tensor([2, 7])).tolist() == [5, 3]
    assert other.has(torch.tensor([2, 5, 7])).tolist() == [True, False, True]
    overlay.write(torch.tensor([2]), torch.zeros(1, 2))
    assert other.vectors.sum() == 4, "a copy"
