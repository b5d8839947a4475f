from __future__ import annotations

import json
import logging
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import apart, ranks
from safetensors.torch import load_file
from tiny import SIZE, tiny_model
from tiny_training import interrupt, tiny_trainer

from visiontune import adapters
from visiontune.core import Loss
from visiontune.data.prompts import PromptBatches, hold_out
from visiontune.errors import Stopped, UserError
from visiontune.objectives import alignprop, denoising
from visiontune.objectives._online import OnlineConfig, Rollouts
from visiontune.objectives.base import Needs
from visiontune.rewards.base import as_reward
from visiontune.schema import from_mapping
from visiontune.training import checkpoint, measures
from visiontune.training.config import GuardsConfig
from visiontune.training.guards import Guard, bounds, check
from visiontune.training.loop import Trainer

HELD = ["a red circle", "a blue square"]
OFF = {
    "reward_drop": None,
    "diversity_min": None,
    "high_frequency_factor": None,
    "blank_max": None,
    "distance_max": None,
    "change_max": None,
}


# ---------------------------------------------------------------------------------------------------- measures


def noise(*shape, seed=0, std=40.0):
    drawn = np.random.default_rng(seed).normal(128, std, shape)
    return drawn.round().clip(0, 255).astype(np.uint8)


def flat(*values):
    """One picture of one grey for each value, as the seeds of one prompt."""
    return np.stack([np.full((8, 8, 3), v, np.uint8) for v in values])[None]


def test_diversity_is_the_mean_distance_of_pairs_within_prompts():
    assert measures.diversity(flat(0, 51)) == pytest.approx(0.2)
    assert measures.diversity(flat(0, 51, 102)) == pytest.approx((0.2 + 0.2 + 0.4) / 3)
    # Prompts may differ as they like: only seeds of one prompt are compared.
    assert measures.diversity(np.concatenate([flat(0, 51), flat(255, 255)])) == pytest.approx(0.1)
    assert measures.diversity(flat(7)) == 0.0
    std = 40.0
    assert measures.diversity(noise(2, 3, 64, 64, 3, std=std)) == pytest.approx(math.sqrt(2) * std / 255, rel=0.02)


def test_distance_is_the_root_mean_square_over_all_pictures():
    assert measures.distance(flat(0, 51), flat(0, 0)) == pytest.approx(0.2 / math.sqrt(2))
    assert measures.distance(flat(255), flat(0)) == 1.0
    uniform = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 32, 32, 3), dtype=np.uint8)
    assert measures.distance(*uniform) == pytest.approx(math.sqrt(1 / 6), rel=0.02)


@pytest.mark.parametrize("cutoff", [0.1, 0.25, 0.4])
def test_white_noise_has_its_energy_spread_over_all_frequencies(cutoff):
    share = measures.high_frequency(noise(1, 2, 128, 128, 3), cutoff)
    assert share == pytest.approx(1 - math.pi * cutoff**2, abs=0.01)


def test_a_wave_has_its_energy_at_its_frequency_whatever_its_direction():
    y, x = np.mgrid[0:64, 0:64]
    for phase in (2 * np.pi * x * 8 / 64, 2 * np.pi * y * 8 / 64, 2 * np.pi * (x * 6 + y * 5) / 64):
        wave = np.repeat((127 + 100 * np.sin(phase))[None, None, :, :, None], 3, 4).round().astype(np.uint8)
        assert measures.high_frequency(wave, 0.10) > 0.999
        assert measures.high_frequency(wave, 0.15) < 0.001
    # Two waves of equal strength, one on each side; the mean colour counts on neither.
    both = 60 + 30 * np.sin(2 * np.pi * x * 4 / 64) + 30 * np.sin(2 * np.pi * x * 20 / 64)
    picture = np.repeat(both[None, None, :, :, None], 3, 4).round().astype(np.uint8)
    assert measures.high_frequency(picture, 0.2) == pytest.approx(0.5, abs=0.01)


def test_a_low_pass_takes_the_high_frequencies_away():
    picture = noise(1, 1, 64, 64, 3)
    spectrum = np.fft.fft2(picture[0, 0].astype(float), axes=(0, 1))
    kept = np.hypot(np.fft.fftfreq(64)[:, None], np.fft.fftfreq(64)) <= 0.25
    low = np.fft.ifft2(spectrum * kept[..., None], axes=(0, 1)).real.round().clip(0, 255).astype(np.uint8)
    assert measures.high_frequency(low[None, None], 0.25) < 0.01 < measures.high_frequency(picture, 0.25)


def test_a_picture_of_one_colour_has_no_frequencies_and_is_blank():
    assert measures.high_frequency(flat(0, 97, 255), 0.25) == 0.0
    assert measures.blank(flat(0, 97, 255), 0.02) == 1.0
    mixed = np.concatenate([flat(9), noise(1, 1, 8, 8, 3)], 1)
    assert measures.blank(mixed, 0.02) == 0.5
    # One channel that varies is enough for a picture not to be blank.
    one = flat(100)
    one[..., ::2, :, 2] = 200
    assert measures.blank(one, 0.19) == 0.0 and measures.blank(one, 0.2) == 1.0


def test_change_is_the_relative_frobenius_norm_of_what_the_adapter_adds():
    layer = torch.nn.Linear(6, 5)
    other = torch.nn.Linear(3, 2, bias=False)
    model = torch.nn.ModuleDict({"a": layer, "b": other})
    whole = sum(p.detach().double().square().sum() for p in model.parameters()).sqrt()
    found = adapters.attach(model, "lora", targets=["a", "b"])
    assert measures.change(found) == 0.0
    for name, tensor in found.tensors().items():
        if name.endswith("up"):
            torch.nn.init.normal_(tensor)
    moved = sum(found.change(name)[0].detach().double().square().sum() for name in found.layers).sqrt()
    assert measures.change(found) == pytest.approx(float(moved / whole), rel=1e-6)
    assert measures.change(found) > 0.1
    found.scale = 0.5
    assert measures.change(found) == pytest.approx(float(moved / whole) / 2, rel=1e-6)


def test_change_counts_biases():
    layer = torch.nn.Linear(4, 3)
    whole = torch.cat([layer.weight.flatten(), layer.bias]).double().norm()
    found = adapters.attach(torch.nn.ModuleDict({"a": layer}), "bitfit", targets=["a"])
    with torch.no_grad():
        next(found.parameters()).add_(2.0)
    found.refresh()
    assert measures.change(found) == pytest.approx(2 * math.sqrt(3) / float(whole.detach()), rel=1e-6)


# ---------------------------------------------------------------------------------------------------- bounds

START = {
    "reward": 0.5,
    "reward_std": 0.1,
    "diversity": 0.2,
    "high_frequency": 0.1,
    "blank": 0.0,
    "distance": 0.0,
    "change": 0.0,
}


@pytest.mark.parametrize(
    ("measure", "option", "good", "bad"),
    [
        ("reward", {"reward_drop": 0.2}, 0.481, 0.479),
        ("diversity", {"diversity_min": 0.5}, 0.101, 0.099),
        ("high_frequency", {"high_frequency_factor": 2.0}, 0.199, 0.201),
        ("high_frequency", {"high_frequency_factor": 2.0}, 0.051, 0.049),
        ("blank", {"blank_max": 0.1}, 0.1, 0.11),
        ("distance", {"distance_max": 0.4}, 0.4, 0.41),
        ("change", {"change_max": 0.5}, 0.5, 0.51),
        ("kl", {"terms": {"kl": 3.0}}, 3.0, 3.1),
        ("diversity", {"diversity_min": 0.5}, 0.2, math.nan),
    ],
)
def test_each_bound_is_broken_on_its_far_side_alone(measure, option, good, bad):
    config = GuardsConfig(**{**OFF, **option})

    def broken(value):
        return [b for b in bounds(config, START) if b.broken({**START, measure: value})]

    assert broken(good) == []
    (alarm,) = broken(bad)
    words = alarm.words({measure: bad})
    assert words.startswith(f"{measure} is {bad:.4g}, ") and f"guards.{next(iter(option))}" in words
    assert [b for b in bounds(GuardsConfig(**OFF), START) if b.broken({**START, measure: bad})] == []


def test_a_reward_falls_by_its_spread_whatever_its_size():
    config = GuardsConfig(**{**OFF, "reward_drop": 0.2})
    lows = [bounds(config, {**START, "reward": start})[0].low for start in (0.01, 30.0, -10.0)]
    assert lows == pytest.approx([-0.01, 29.98, -10.02])
    (equal,) = bounds(config, {**START, "reward": -10.0, "reward_std": 0.0})
    assert equal.low == pytest.approx(-12.0)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"every": 0}, "every must be a whole number from 1"),
        ({"seeds": []}, "seeds names none"),
        ({"seeds": [0]}, "diversity is measured between seeds"),
        ({"seeds": [1, 1]}, "differ"),
        ({"lr_factor": 1.0}, "lr_factor must be a number above 0 and below 1"),
        ({"diversity_min": 1.5}, "diversity_min"),
        ({"high_frequency_factor": 0.5}, "high_frequency_factor must be a number above 1"),
        ({"high_frequency_from": 0.5}, "high_frequency_from"),
        ({"blank_max": 0.0}, "blank_max"),
        ({"distance_max": 2.0}, "distance_max"),
        ({"reward_drop": -0.1}, "reward_drop"),
        ({"terms": {"reward": 1.0}}, "an option of its own"),
    ],
)
def test_options_out_of_range_are_refused(options, word):
    with pytest.raises(UserError, match=f"guards.*{word}"):
        from_mapping(GuardsConfig, options, "guards")


def test_held_out_prompts_are_chosen_by_the_seed_and_not_trained_on():
    prompts = [f"prompt {i}" for i in range(40)]
    trained, held = hold_out(prompts, 16, 3)
    assert len(held) == 16 and sorted(trained + held) == sorted(prompts)
    assert (trained, held) == hold_out(prompts, 16, 3) != hold_out(prompts, 16, 4)
    assert held == [p for p in prompts if p in set(held)]
    with pytest.raises(UserError, match=r"guards\.holdout=40 leaves none of 40"):
        hold_out(prompts, 40, 0)


# ---------------------------------------------------------------------------------------------------- in a run


class Drift(Rollouts):
    """Moves every parameter by the learning rate each step, and logs what it is told to."""

    @property
    def needs(self):
        return Needs(online=True)

    def probe(self, model, batch, tools):
        model.embed(batch.prompts)

    def __init__(self, updates=1, logs=None) -> None:
        super().__init__(OnlineConfig(steps=2, cfg_scale=1.0))
        self.updates = updates
        self.logs = logs or (lambda step: {})
        self.step = 0

    def collect(self, model, batch, tools):
        return batch

    def update(self, model, collected, part, tools):
        for parameter in self.parameters:
            parameter.grad = -torch.ones_like(parameter)
        terms = {name: torch.tensor(float(value)) for name, value in self.logs(tools.index).items()}
        return Loss(total=torch.zeros(()), terms=terms)


def drifting(out, *, objective=None, guards=None, reward=None, **train) -> Trainer:
    """A run on the tiny model that drifts away from the base, SGD with lr 0.02 unless asked otherwise."""
    model = tiny_model("sd")
    torch.manual_seed(0)
    found = adapters.attach({"unet": model.denoiser}, "lora", targets=["to_q"])
    objective = objective or Drift()
    objective.parameters = list(found.parameters())
    config = GuardsConfig(**{**OFF, "every": 2, "seeds": [0, 1], **(guards or {})})
    options = {"steps": 8, "optimizer": "sgd", "lr": 0.02, "weight_decay": 0.0, "max_grad_norm": None, "keep": 1}
    return tiny_trainer(
        out,
        objective=objective,
        model=model,
        adapters=found,
        rows=PromptBatches(["a circle", "a square", "a triangle"], 2),
        guard=Guard(config, HELD, steps=2, cfg_scale=1.0, reward=reward),
        **{**options, "checkpoint_every": 1, "resume": True, "log_every": 3, **train},
    )


def rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def guarded(out):
    found = [{k: v for k, v in row.items() if k == "step" or k.startswith("guard/")} for row in rows(out)]
    return [row for row in found if len(row) > 1]


def state(out, step):
    weights, saved = checkpoint.load(checkpoint.folder(out, step))
    del saved["parts"]["meter"]
    return weights, saved


def assert_same(one, other):
    """Tensors bit for bit, and everything else too, in whatever holds them."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for ours, theirs in zip(one, other, strict=True):
            assert_same(ours, theirs)
    else:
        assert one == other


def test_checks_are_logged_and_change_nothing(tmp_path):
    """Drawing and measuring leave no trace in the weights; every measure is in the log at every check."""
    reward = as_reward(lambda images, prompts, meta: images.mean((1, 2, 3)), "mean")
    with_guard = drifting(tmp_path / "with", reward=reward, guards={"every": 3}, steps=4)
    without = drifting(tmp_path / "without", steps=4)
    without.guard = None
    assert_same(load_file(with_guard.fit()), load_file(without.fit()))
    found = guarded(tmp_path / "with")
    assert [row["step"] for row in found] == [0, 3, 4]
    names = {"reward", "reward_std", "diversity", "high_frequency", "blank", "distance", "change", "alarms"}
    assert all(row.keys() == {"step", *(f"guard/{name}" for name in names)} for row in found)
    assert found[0]["guard/distance"] == found[0]["guard/change"] == 0.0
    assert 0 < found[1]["guard/change"] < found[2]["guard/change"] and found[2]["guard/distance"] > 0
    steps = [row["step"] for row in rows(tmp_path / "with")]
    assert steps == [0, 3, 4]  # one row a step: the loss and the guard's measures share it
    assert "loss" in rows(tmp_path / "with")[1] and "loss" not in rows(tmp_path / "with")[0]
    assert sorted(p.name for p in (tmp_path / "with" / "guards").iterdir()) == ["step-000000"]


def test_the_pictures_measured_are_those_of_the_average(tmp_path):
    plain, averaged = (drifting(tmp_path / str(ema), steps=2, ema=ema) for ema in (None, 0.99))
    plain.fit()
    averaged.fit()
    assert guarded(tmp_path / "0.99")[1]["guard/change"] < 0.9 * guarded(tmp_path / "None")[1]["guard/change"]


def changes(out, steps=8):
    """How far the drifting run has gone after each check, without an alarm."""
    drifting(out, steps=steps).fit()
    return {row["step"]: row["guard/change"] for row in guarded(out)}


def test_stop_ends_the_run_with_the_last_good_weights(tmp_path):
    seen = changes(tmp_path / "free")
    bound = (seen[4] + seen[6]) / 2
    out = tmp_path / "run"
    trainer = drifting(out, guards={"change_max": bound}, ema=0.5)
    free = drifting(tmp_path / "ema", ema=0.5)
    # The bound is met by the averaged weights, which lag behind: find the step by the log of the free run.
    free.fit()
    lagging = {row["step"]: row["guard/change"] for row in guarded(tmp_path / "ema")}
    alarm = min(step for step, value in lagging.items() if value > bound)
    good = alarm - 2
    with pytest.raises(Stopped) as caught:
        trainer.fit()
    words = str(caught.value)
    assert caught.value.status == 3 and "\n" not in words
    for part in (
        f"at step {alarm}: change is ",
        f"above {bound:.4g} (guards.change_max)",
        f"step-{good:06d}",
        str(out),
    ):
        assert part in words
    assert checkpoint.steps(out) == [good, alarm]  # keep=1, and the good one besides
    partial = drifting(tmp_path / "good", steps=good, ema=0.5)
    assert_same(load_file(out / "adapter.safetensors"), load_file(partial.fit()))
    ours, theirs = state(out, good), state(tmp_path / "good", good)
    assert_same(ours[0], theirs[0])
    assert f"step {good}, the last good checkpoint" in (out / "README.md").read_text()
    assert (out / "guards" / f"step-{alarm:06d}" / "grid.png").is_file()


def test_a_stopped_run_stays_stopped_until_the_bound_is_loosened(tmp_path):
    seen = changes(tmp_path / "free")
    options = {"change_max": (seen[2] + seen[4]) / 2}
    out = tmp_path / "run"
    with pytest.raises(Stopped) as first:
        drifting(out, guards=options).fit()
    with pytest.raises(Stopped) as again:
        drifting(out, guards=options).fit()
    assert str(first.value) == str(again.value)
    result = drifting(out, guards={"change_max": None}).fit()
    assert_same(load_file(result), load_file(tmp_path / "free" / "adapter.safetensors"))
    assert [row["step"] for row in guarded(out)] == [0, 2, 4, 6, 8]


def test_a_run_killed_before_its_stop_was_written_stops_in_the_same_way(tmp_path, monkeypatch):
    seen = changes(tmp_path / "free")
    options = {"change_max": (seen[4] + seen[6]) / 2}
    with pytest.raises(Stopped):
        drifting(tmp_path / "whole", guards=options).fit()
    broken = drifting(tmp_path / "broken", guards=options)
    monkeypatch.setattr(broken, "_stop_if_alarmed", lambda: _kill() if broken.guard.stops() else None)
    with pytest.raises(KeyboardInterrupt):
        broken.fit()
    assert not (tmp_path / "broken" / "adapter.safetensors").exists()
    with pytest.raises(Stopped, match="step-000004"):
        drifting(tmp_path / "broken", guards=options).fit()
    assert_same(*(load_file(tmp_path / name / "adapter.safetensors") for name in ("whole", "broken")))


def _kill():
    raise KeyboardInterrupt


def test_an_alarm_before_any_good_checkpoint_writes_no_result(tmp_path):
    trainer = drifting(tmp_path, guards={"change_max": 1e-9}, checkpoint_every=4)
    with pytest.raises(Stopped, match=r"at step 2.*no good checkpoint, and no result"):
        trainer.fit()
    assert not (tmp_path / "adapter.safetensors").exists() and checkpoint.steps(tmp_path) == [2]


def test_an_alarm_after_the_last_step_counts(tmp_path):
    seen = changes(tmp_path / "free", steps=5)
    with pytest.raises(Stopped, match="at step 5"):
        drifting(tmp_path / "run", steps=5, guards={"change_max": (seen[4] + seen[5]) / 2}).fit()


def test_warn_says_so_once_for_each_measure_and_goes_on(tmp_path, caplog):
    options = {"on_alarm": "warn", "change_max": 1e-9, "terms": {"kl": 1.0}}
    objective = Drift(logs=lambda step: {"kl": 0.0 if step < 4 else 2.0})
    with caplog.at_level(logging.WARNING, "visiontune.training.guards"):
        result = drifting(tmp_path, objective=objective, guards=options).fit()
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    assert "step 2 change is" in said[0] and "step 6 kl is 2, above 1 (guards.terms.kl)" in said[1]
    assert "change" not in said[1]
    assert result.is_file()
    assert [row["guard/alarms"] for row in guarded(tmp_path)] == [0, 1, 1, 2, 2]


def test_bounds_on_logged_terms_are_on_means_since_the_last_check(tmp_path):
    """The log's own rows (every 3 steps) and the guards' (every 2) do not disturb each other."""
    objective = Drift(logs=lambda step: {"kl": step, "clip_fraction": 0.5})
    guards = {"terms": {"kl": 100.0, "clip_fraction": 0.9}}
    drifting(tmp_path, objective=objective, guards=guards, steps=6).fit()
    assert [row.get("guard/kl") for row in guarded(tmp_path)] == [None, 0.5, 2.5, 4.5]
    assert [row["kl"] for row in rows(tmp_path) if "kl" in row] == [1.0, 4.0]


def test_a_term_that_nobody_logs_is_refused_at_the_first_check(tmp_path):
    objective = Drift(logs=lambda step: {"clip_fraction": 0.0})
    with pytest.raises(UserError, match=r"guards\.terms\.clip_fractoin is not logged.*'clip_fraction'"):
        drifting(tmp_path, objective=objective, guards={"terms": {"clip_fractoin": 0.5}}).fit()


def test_lower_lr_multiplies_the_rate_at_each_check_with_an_alarm(tmp_path, caplog):
    options = {"on_alarm": "lower_lr", "lr_factor": 0.3, "change_max": 1e-9}
    more = {"guards": options, "schedule": "linear", "log_every": 1}
    drifting(tmp_path / "whole", **more).fit()
    rates = {row["step"]: row["lr"] for row in rows(tmp_path / "whole") if "lr" in row}
    # Step s is logged with the rate of the step after it, before the check that follows s.
    expected = {s: 0.02 * (1 - s / 8) * 0.3 ** ((s - 1) // 2) for s in range(1, 8)}
    assert {s: rates[s] for s in expected} == pytest.approx(expected, rel=1e-5)
    assert [r.getMessage().count("the learning rate falls to 0.09 of") for r in caplog.records] == [0, 1, 0, 0]


@pytest.mark.parametrize("at", [3, 4, 5])
def test_a_run_with_guards_goes_on_bit_for_bit(tmp_path, at):
    """Killed between checks, at one, and after one; rates, means and everything remembered are as in a whole run."""
    options = {"on_alarm": "lower_lr", "lr_factor": 0.3, "change_max": 1e-9, "terms": {"kl": 1.5}}
    reward = as_reward(lambda images, prompts, meta: images.mean((1, 2, 3)), "mean")

    def run(name):
        objective = Drift(logs=lambda step: {"kl": math.sin(step)})
        more = {"schedule": "cosine", "ema": 0.8, "reward": reward, "checkpoint_every": 3}
        return drifting(tmp_path / name, objective=objective, guards=options, **more)

    whole = run("whole").fit()
    interrupt(run("broken"), at)
    assert_same(load_file(run("broken").fit()), load_file(whole))
    assert_same(state(tmp_path / "whole", 8), state(tmp_path / "broken", 8))
    for name in ("whole", "broken"):
        pictures = sorted(path.name for path in (tmp_path / name / "guards").iterdir())
        assert pictures == [f"step-{step:06d}" for step in (0, 2, 4, 6, 8)]
    logs = [[row for row in rows(tmp_path / name) if row.pop("seconds", 1)] for name in ("whole", "broken")]
    assert logs[0] == logs[1]


def test_a_run_killed_before_its_first_checkpoint_measures_its_start_anew(tmp_path):
    interrupt(drifting(tmp_path, checkpoint_every=4), 3)
    drifting(tmp_path, checkpoint_every=4).fit()
    assert [row["step"] for row in guarded(tmp_path)] == [0, 2, 4, 6, 8]


def test_a_run_that_began_without_guards_is_not_gone_on_with(tmp_path):
    trainer = drifting(tmp_path, steps=4)
    trainer.guard = None
    del trainer.stateful["guard"]
    trainer.fit()
    with pytest.raises(UserError, match="without guards"):
        drifting(tmp_path).fit()


def test_guards_need_an_online_objective_and_whole_rollouts(tmp_path):
    with pytest.raises(UserError, match=r"guards are for objectives that draw.*guards=none"):
        check(GuardsConfig(), denoising.build(denoising.Config()))
    with pytest.raises(UserError, match=r"guards\.every=2 falls between.*objective\.updates=4"):
        drifting(tmp_path, objective=Drift(updates=4), checkpoint_every=4)


def test_the_reward_sees_all_seeds_of_a_prompt_together(tmp_path):
    calls = []

    def reward(images, prompts, meta):
        assert images.shape[1:] == (3, SIZE, SIZE) and images.min() >= 0 and images.max() <= 1
        calls.append((prompts, [m["prompt_id"] for m in meta]))
        return torch.arange(len(prompts)).float()

    guard = Guard(GuardsConfig(seeds=[0, 1, 2], batch_size=4), HELD, reward=as_reward(reward, "r"))
    values = guard.measure(noise(2, 3, SIZE, SIZE, 3), tmp_path, None, torch.device("cpu"))
    assert calls == [([HELD[0]] * 3, [0] * 3), ([HELD[1]] * 3, [1] * 3)]
    assert values["reward"] == 1.0 and values["reward_std"] == pytest.approx(math.sqrt(2 / 3))


def test_a_hacked_reward_rings_while_it_rises(tmp_path):
    """Flatness is a reward that is raised by emptying the pictures; a reward for contrast falls, as does diversity."""

    def spread(images):
        return images - images.mean((2, 3), keepdim=True)

    def flatness(images, prompts, meta):
        return -spread(images).square().mean((1, 2, 3))

    flatness.differentiable = True
    contrast = as_reward(lambda images, prompts, meta: spread(images).abs().mean((1, 2, 3)), "contrast")
    torch.manual_seed(0)
    trainer = tiny_trainer(
        tmp_path,
        model=tiny_model("sd"),
        objective=alignprop.build(alignprop.Config(steps=2, cfg_scale=1.0, truncation="full")),
        rows=PromptBatches(["a green triangle", "a small circle"], 4),
        reward=as_reward(flatness, "flatness"),
        guard=Guard(
            GuardsConfig(every=5, reward_drop=6.0),
            ["a green triangle", "a small circle"],
            reward=contrast,
            steps=2,
            cfg_scale=1,
        ),
        **{"steps": 30, "lr": 3e-3, "checkpoint_every": 5, "log_every": 5},
    )
    with pytest.raises(Stopped, match=r"reward is .* below .*guards\.reward_drop"):
        trainer.fit()
    trained = [row["reward"] for row in rows(tmp_path) if "reward" in row]
    held = [row["guard/reward"] for row in guarded(tmp_path)]
    assert trained == sorted(trained) and held == sorted(held, reverse=True)
    assert guarded(tmp_path)[-1]["guard/diversity"] < 0.7 * guarded(tmp_path)[0]["guard/diversity"]
    kept, last = checkpoint.steps(tmp_path)[-2:]
    assert last < 30 and kept == last - 5
    weights, _ = checkpoint.load(checkpoint.folder(tmp_path, kept))
    result = load_file(tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors")
    assert_same(result, {name.removeprefix("unet."): value for name, value in weights.items()})


def test_processes_stop_together_with_one_result(tmp_path):
    """Each of two draws half of the prompts; the first looks, both stop, and the result is a checkpoint's."""
    assert apart("training.test_guards:two", tmp_path) == [3, 3]
    good, alarm = checkpoint.steps(tmp_path)
    assert alarm == good + 2
    assert [row["guard/alarms"] for row in guarded(tmp_path)] == [0.0] * (alarm // 2) + [1.0]
    weights, saved = checkpoint.load(checkpoint.folder(tmp_path, good))
    assert saved["settings"]["number of processes"] == 2
    result = load_file(tmp_path / "adapter.safetensors")
    assert sorted(float(v.double().square().sum()) for v in result.values()) == pytest.approx(
        sorted(float(v.double().square().sum()) for v in weights.values())
    )


def two(folder):
    return ranks(2, lambda rank: until_stopped(Path(folder), rank))


def until_stopped(out, rank):
    """The second process logs other numbers than the first, and the bound is on their mean."""
    objective = Drift(logs=lambda step: {"kl": step * 2 * rank})
    try:
        drifting(out, objective=objective, guards={"terms": {"kl": 3.0}}).fit()
    except Stopped as stopped:
        sys.exit(stopped.status)
