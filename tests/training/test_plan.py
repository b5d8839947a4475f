"""Planning before the first step: where its batches sample the schedule."""

from __future__ import annotations

import pytest
import torch

from visiontune.training.plan import stratified


@pytest.mark.parametrize("world", [1, 3])
def test_all_processes_together_sample_the_schedule_evenly(world):
    places = torch.cat([stratified(4, world, rank, seed=5) for rank in range(world)])
    expected = (torch.arange(4 * world) + 0.5) / (4 * world)
    torch.testing.assert_close(places.sort().values, expected)
