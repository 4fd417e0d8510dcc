import torch

from st_corrector.search.overlay import Overlay


def test_written_rows_replace_the_caches_and_others_stay():
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(5000, 4, generator=generator)
    cache = truth.clone()
    overlay = Overlay(5000, 4)
    assert overlay.replace(cache, torch.arange(0, 5000)) is cache
    for _ in range(40):
        rows = torch.randperm(5000, generator=generator)[:90]
        vectors = torch.randn(90, 4, generator=generator)
        overlay.write(rows, vectors)
        truth[rows] = vectors
    assert torch.equal(overlay.replace(cache, torch.arange(0, 5000)), truth)
    assert torch.equal(overlay.replace(cache[1000:1300], torch.arange(1000, 1300)), truth[1000:1300])
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
    assert torch.equal(other.replace(probe, torch.arange(0, 10)), overlay.replace(probe, torch.arange(0, 10)))
    assert other.rows.tolist() == [7, 2] and other.written_at(torch.tensor([2, 7])).tolist() == [5, 3]
    assert other.has(torch.tensor([2, 5, 7])).tolist() == [True, False, True]
    overlay.write(torch.tensor([2]), torch.zeros(1, 2))
    assert other.vectors.sum() == 4, "a copy"


def test_a_parts_overlay_keeps_its_own_rows_and_knows_of_no_others():
    whole, part = Overlay(100, 2), Overlay(30, 2, first_row=50)
    rows, vectors = torch.tensor([79, 3, 50, 80, 49]), torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    for overlay in (whole, part):
        overlay.write(rows, vectors, torch.arange(5))
    assert whole.rows.tolist() == rows.tolist() and part.rows.tolist() == [79, 50]
    assert part.has(rows).tolist() == part.holds(rows).tolist() == [True, False, True, False, False]
    assert torch.equal(part.vectors, vectors[[0, 2]]) and part.written_at(part.rows).tolist() == [0, 2]
    places, slots = part.between(50, 80, "cpu")
    found = part.vectors[slots]
    assert places.tolist() == [0, 29] and torch.equal(found, vectors[[2, 0]])
    other = Overlay(30, 2, first_row=50)
    other.load_state_dict(whole.state_dict())
    assert torch.equal(other.rows, part.rows) and torch.equal(other.vectors, part.vectors)
    assert other.unit == part.unit == whole.unit == False, "what the others have written counts"  # noqa: E712
