"""Several data sets with several processes: one of them in every step, in all processes."""

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from datasets import Dataset
from sentence_transformers.base.sampler import (
    DefaultBatchSampler,
    ProportionalBatchSampler,
    RoundRobinBatchSampler,
)
from torch.utils.data import ConcatDataset, SequentialSampler

from st_corrector import InputError
from st_corrector.training.several_data_sets import JoinedBatches, SplitBatches


@pytest.mark.parametrize("make", [RoundRobinBatchSampler, ProportionalBatchSampler])
@pytest.mark.parametrize("processes", [2, 3])
def test_all_processes_take_one_data_set_in_every_step(make, processes):
    sizes, batch = [50, 23, 31], 4
    sets = [Dataset.from_dict({"anchor": [str(n) for n in range(size)]}) for size in sizes]
    samplers = [DefaultBatchSampler(SequentialSampler(each), batch, drop_last=False) for each in sets]
    joined = [JoinedBatches(each, processes) for each in samplers]
    multi = make(ConcatDataset(sets), joined, torch.Generator(), 3)
    whole = SplitBatches(multi, processes, batch)
    shards = [list(BatchSamplerShard(whole, processes, rank)) for rank in range(processes)]
    ends = torch.tensor(sizes).cumsum(0)
    steps = list(zip(*shards, strict=True))
    assert len(steps) * processes == len(whole) and len(steps) >= 3
    for step in steps:
        assert len({int(torch.bucketize(torch.tensor(n), ends, right=True)) for each in step for n in each}) == 1
        assert all(len(each) == batch for each in step)
    taken = [n for step in steps for each in step for n in each]
    assert len(set(taken)) == len(taken), "none twice"
    if make is ProportionalBatchSampler:
        assert len(taken) == sum(size // batch // processes * batch * processes for size in sizes)
    whole.set_epoch(1)
    assert multi.epoch == 1 and all(sampler.epoch == 1 for sampler in samplers)


def test_a_data_set_that_is_too_small_for_the_processes_is_refused():
    small = DefaultBatchSampler(SequentialSampler(range(7)), 4, drop_last=False)
    with pytest.raises(InputError, match="has 1 batches of 4 pairs, fewer than the 3 processes"):
        JoinedBatches(small, 3)
