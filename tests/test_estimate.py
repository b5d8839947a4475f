from __future__ import annotations

import dataclasses
import math
import weakref
from itertools import pairwise

import allocated
import pytest
import torch
from tiny import save_tiny, tiny_model

from visiontune import config, estimate
from visiontune.assemble.build import build
from visiontune.estimate import Estimate, measure, size
from visiontune.ops.memory import Kept, Peak


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("estimate")
    recipe = {
        "name": "tiny",
        "out": str(folder / "runs"),
        "model": str(save_tiny(folder / "tiny-sd")),
        "adapter": {"name": "lora", "rank": 2},
        "data": {"root": "pocket/bumble", "resolution": 16},
        "train": {"batch_size": 2, "trackers": [], "device": "cpu", "steps": 50},
    }
    return lambda *overrides: config.parse_run(config.apply(recipe, overrides))


def test_counts_are_those_of_the_adapter_and_adamw(tiny_run):
    estimate = measure(tiny_run())
    assert estimate.samples == 5 and estimate.prior_samples == 0
    assert len(estimate.layers) > 0 and all(layer.startswith("unet.") for layer in estimate.layers)
    assert estimate.gradient_bytes == 4 * estimate.trained
    # AdamW keeps two moments of every value, and a step counter of every tensor.
    assert 0 <= estimate.optimizer_bytes - 8 * estimate.trained <= 4 * 4 * len(estimate.layers)
    assert estimate.parameter_bytes >= 4 * estimate.total
    assert estimate.step_seconds > 0 and estimate.steps == 50
    double = measure(tiny_run("adapter.rank=4"))
    assert double.trained == 2 * estimate.trained
    assert double.layers == estimate.layers


def test_an_average_costs_the_weights_once_more(tiny_run):
    plain, averaged = measure(tiny_run()), measure(tiny_run("train.ema=0.9"))
    assert averaged.optimizer_bytes - plain.optimizer_bytes == 4 * plain.trained


def test_activations_grow_with_the_batch_and_shrink_with_checkpointing(tiny_run):
    one, four = (measure(tiny_run(f"train.batch_size={n}")).activation_bytes for n in (1, 4))
    assert 3.5 < four / one < 4.5
    saved = measure(tiny_run("train.batch_size=4", "train.gradient_checkpointing=true")).activation_bytes
    assert saved < 0.7 * four


def test_without_an_adapter_the_base_that_a_prior_compares_with_is_a_copy(tiny_run):
    full = measure(tiny_run("adapter=none", "objective.name=dreambooth", "objective.prior_images=1"))
    assert full.reference_bytes == full.gradient_bytes > 0 and "a copy of the base" in full.text()
    for other in (["objective.name=dreambooth", "objective.prior_images=1"], ["adapter=none"]):
        assert measure(tiny_run(*other)).reference_bytes == 0


def test_prior_rows_are_counted_but_no_prior_image_is_drawn(tiny_run, monkeypatch):
    def never(*_, **__):
        raise AssertionError("drew an image")

    monkeypatch.setattr("visiontune.sampling.pipeline.images", never)
    run = tiny_run(
        "objective.name=dreambooth", "objective.prior_images=3", "objective.prior_own=0", "objective.prior_empty=0"
    )
    estimate = measure(run)
    assert estimate.prior_samples == 3
    assert estimate.activation_bytes > 1.5 * measure(tiny_run()).activation_bytes
    assert not run.folder.exists() and not run.folder.parent.exists()


def test_full_fine_tuning_trains_the_whole_denoiser(tiny_run):
    estimate = measure(tiny_run("adapter=none"))
    assert estimate.layers == [] and 0.2 < estimate.trained / estimate.total < 1
    assert "all weights are trained" in estimate.text()


def test_layers_that_the_targets_name_and_the_adapter_cannot_take_are_told(tiny_run):
    def said(*words):
        return [line for line in measure(tiny_run("adapter.rank=1", *words)).said if "passed over" in line]

    assert said("adapter.targets=all") == []
    group, layer = said("adapter.targets=(.*norm.*|.*to_q)")
    assert group.startswith("passed over: 21 GroupNorm that lora does not adapt: unet.conv_norm_out, ")
    assert layer.startswith("passed over: 12 LayerNorm that lora does not adapt: unet.") and layer.endswith(
        "and 8 more"
    )
    assert said("adapter=none") == []


REWARDED = (
    "objective={name: alignprop, steps: 2, cfg_scale: 1, micro_batch: 2}",
    "reward=redness",
    "data=pocket/prompts",
    "train.batch_size=4",
)


def test_an_online_run_is_measured_by_its_prompts_and_one_prediction(tiny_run):
    run = tiny_run(*REWARDED, "guards.holdout=16")
    estimate = measure(run)
    assert (estimate.prompts, estimate.guard_prompts, estimate.samples) == (374, 16, 0)
    assert "374 prompts to train on, and 16 for the guards" in estimate.text() and "image" not in estimate.text()
    assert estimate.step_seconds > 0 and estimate.optimizer_bytes > 0 and not run.folder.exists()
    # The memory is that of a micro-batch, whatever the batch; guidance predicts twice as many rows.
    base = estimate.activation_bytes
    assert measure(tiny_run(*REWARDED, "train.batch_size=8")).activation_bytes == base > 0
    assert 1.8 < measure(tiny_run(*REWARDED, "objective.micro_batch=4")).activation_bytes / base < 2.2
    assert 1.8 < measure(tiny_run(*REWARDED, "objective.cfg_scale=3")).activation_bytes / base < 2.2


def test_a_masked_model_is_measured_by_a_prediction_of_its_tokens(tiny_run, tmp_path):
    tiny_model("amused").pipe.save_pretrained(tmp_path / "amused")
    rewarded = [
        f"model={tmp_path / 'amused'}",
        "reward=redness",
        "data=pocket/prompts",
        "train.batch_size=4",
        "objective={name: unigrpo, steps: 2, group: 2, updates: 1, micro_batch: 2}",
    ]
    base = measure(tiny_run(*rewarded)).activation_bytes
    assert base > 0
    assert 1.8 < measure(tiny_run(*rewarded, "objective.score_cfg_scale=3")).activation_bytes / base < 2.2


def test_a_rollout_is_shared_by_the_steps_that_it_serves(tiny_run, monkeypatch):
    from visiontune.objectives.alignprop import AlignProp

    parts = []
    update = AlignProp.update
    monkeypatch.setattr(AlignProp, "updates", property(lambda self: 2))
    monkeypatch.setattr(AlignProp, "update", lambda self, *args: (parts.append(args[2]), update(self, *args))[1])
    measure(tiny_run(*REWARDED))
    assert parts == [0, 1] * 2  # a rollout to warm up, and the measured one


def test_kept_counts_each_storage_once_and_no_weights():
    weight = torch.randn(64, 64, requires_grad=True)
    x = torch.randn(8, 64)
    kept = Kept([weight])
    with kept:
        hidden = torch.tanh(x @ weight)  # keeps x for the product and its own result for tanh
        result = hidden * hidden  # keeps hidden, which is counted already
    assert kept.bytes == x.nbytes + hidden.nbytes
    result.sum().backward()
    assert weight.grad is not None


def test_what_is_kept_goes_with_the_graph():
    with Kept([]):
        kept = torch.exp(torch.ones(8, requires_grad=True))  # keeps its own result
    watched = weakref.ref(kept.untyped_storage())
    del kept
    assert watched() is None


PARTS = {
    "sd": ["adapter.rank=4"],
    "sd without an adapter": ["adapter=none", "train.ema=0.9"],
    "sd3": ["train.gradient_checkpointing=true"],
    "sdxl": ["adapter={name: oft, block_size: 4}"],
}


@pytest.mark.parametrize("case", PARTS)
def test_the_peak_is_what_all_tensors_of_a_step_hold(tiny_run, tmp_path_factory, monkeypatch, case):
    """By the lives of storages, which know nothing of parts, formulas and the allocator."""
    family, words = case.split()[0], ["data.resolution=32", "train.batch_size=4", *PARTS[case]]
    run = tiny_run(f"model={save_tiny(tmp_path_factory.mktemp(family), family)}", *words)
    steps, found = estimate._steps, []

    def watched(trainer, turn):
        if turn == 0:
            return steps(trainer, turn)
        with allocated.Lives() as lives:
            steps(trainer, turn)
        found.append(lives.bytes)

    monkeypatch.setattr(estimate, "_steps", watched)
    with allocated.fresh():
        measured = measure(run)
    assert measured.memory_bytes == measured.peak_bytes == pytest.approx(found[0], rel=0.15)
    assert measured.activation_bytes < measured.peak_bytes


def test_a_peak_leaves_out_what_is_resident_and_sees_what_goes_at_once():
    with Peak() as peak:
        stays = torch.ones(1000)
        torch.ones(3000).exp()  # twice as much for a moment
        torch.ones(5000)
    assert [peak.beside(tensors) for tensors in ([], [stays])] == [28_000, 24_000]


@pytest.mark.gpu
def test_the_peak_on_a_gpu_is_that_of_a_step_of_the_run(tiny_run, tmp_path):
    run = tiny_run("train.device=auto", "data.resolution=64", "train.batch_size=4")
    told = measure(run).peak_bytes
    trainer = build(run, cache_dir=tmp_path)
    trainer.optimise(0)
    torch.cuda.reset_peak_memory_stats()
    trainer.optimise(1)
    assert told == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.15)


def test_sizes_are_readable():
    assert [size(n) for n in (512, 2048, 3 * 2**20, 5 * 2**30)] == ["512 B", "2.0 KiB", "3.0 MiB", "5.0 GiB"]


def test_text_says_everything_in_words():
    facts = {"samples": 5, "prior_samples": 2, "trained": 10, "total": 1000, "step_seconds": 0.5, "steps": 20000}
    memory = {"parameter_bytes": 1, "gradient_bytes": 2, "optimizer_bytes": 3, "activation_bytes": 4}
    layers = [f"unet.layer{i}" for i in range(20)]
    told = Estimate(device="cuda", layers=layers, peak_bytes=2**20, **facts, **memory)
    text = told.text()
    assert "trainable: 10 of 1,000 parameters (1.00%)" in text
    assert "adapted layers: 20" in text and "unet.layer0" in text and "and 8 more" in text
    assert "0.5 s/step on this cuda, 2.8 h for 20000 steps" in text
    assert "memory: 1.0 MiB at the peak of a step = parameters 1 B + optimiser 3 B + 1024.0 KiB that" in text
    assert "(activations 4 B, gradients 2 B)" in text and "5 images, and 2 of prior preservation" in text
    unknown = dataclasses.replace(told, peak_bytes=None, reference_bytes=5)
    assert unknown.memory_bytes == 15
    assert "memory: 15 B = parameters 1 B + optimiser 3 B + a copy of the base 5 B + activations 4 B" in unknown.text()


def noise_of(estimate):
    """The header of the plot, and the share of each tenth in it."""
    lines = estimate.text().splitlines()
    place = next(i for i, line in enumerate(lines) if line.startswith("noise: "))
    return lines[place], [float(line.split()[1].rstrip("%")) for line in lines[place + 1 : place + 11]]


def test_the_noise_that_is_trained_at_is_plotted(tiny_run):
    plain = measure(tiny_run())
    header, shares = noise_of(plain)
    assert header.startswith("noise: 10,000 timesteps drawn for 16x16, mean 0.") and "1 being pure noise" in header
    assert plain.noise.mean == pytest.approx(0.5, abs=0.01) and shares == pytest.approx([10] * 10, abs=1)
    several = dataclasses.replace(plain, sizes=((16, 16), (24, 8), (8, 24)))
    assert noise_of(several)[0].startswith("noise: 10,000 timesteps drawn for 16x16 and 2 other sizes, mean 0.")
    _, shares = noise_of(measure(tiny_run("objective={name: denoising, timesteps: {shift: 3, low: 0.2}}")))
    # Uniform numbers from 1/13 to 1, which the shift moves to s where they were s / (3 - 2 s).
    places = [max(s, 0.2) / (3 - 2 * max(s, 0.2)) for s in (i / 10 for i in range(11))]
    expected = [100 * (b - a) / (12 / 13) for a, b in pairwise(places)]
    assert shares == pytest.approx(expected, abs=1) and shares[:2] == [0, 0]
    assert measure(tiny_run(*REWARDED)).noise is None


def test_noise_is_plotted_at_the_sizes_of_the_data(tiny_run, tmp_path):
    """A flow whose shift grows with the number of tokens: its mean is that of k s / (1 + (k - 1) s)."""
    flux = save_tiny(tmp_path / "flux", "flux")

    for side in (16, 64):
        words = [f"model={flux}", f"data.resolution={side}", "adapter.targets=[to_q]"]
        found = measure(tiny_run(*words, "objective={name: denoising, timesteps: {shift: model}}"))
        k = math.exp(0.5 + (1.15 - 0.5) / (64 - 4) * ((side // 4) ** 2 - 4))
        expected = k / (k - 1) - k * math.log(k) / (k - 1) ** 2
        assert found.noise.mean == pytest.approx(expected, abs=0.01) and found.sizes == ((side, side),)
