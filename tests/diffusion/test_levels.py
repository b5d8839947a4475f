"""Noise told as shares of one schedule, on others."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler

from visiontune.diffusion.levels import shares, sigma_of_snr, snr_of_sigma
from visiontune.diffusion.schedule import Schedule

FLOW = Schedule.flow()
SD = Schedule.from_scheduler(DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"))


def test_the_ratio_of_signal_to_noise_survives_the_way_there_and_back():
    kept = torch.linspace(1e-4, 1 - 1e-4, 999, dtype=torch.float64)
    snr = kept / (1 - kept)
    again = snr_of_sigma(sigma_of_snr(snr))
    assert ((again / (1 + again)) - kept).abs().max() < 1e-6


def test_flow_has_the_noise_of_the_same_timestep():
    t = torch.tensor([1, 100, 500, 700, 900, 999])
    found = shares(t / 1000, FLOW)
    torch.testing.assert_close(FLOW.snr(found * 1000), SD.snr(t), rtol=1e-4, atol=0)
    assert float(found[4]) == pytest.approx(0.893, abs=5e-4)


def test_ends_stay_and_levels_keep_their_order():
    found = shares(torch.linspace(0, 1, 2001), FLOW)
    assert found[0] == 0 and found[-1] == 1 and (found.diff() > 0).all()


def test_tables_have_their_own_shares_to_the_bit():
    told = shares(torch.tensor([0.0, 0.1, 0.57, 0.9, 1.0], dtype=torch.float32), SD)
    assert told.tolist() == [0.0, 0.1, 0.57, 0.9, 1.0]
