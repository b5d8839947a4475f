"""Latents with frames: a clip whose frames know nothing of each other goes the ways of its frames."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler
from tiny_rollout import SD, prompts, rolled
from tiny_rollout import TinyModel as Pictures
from tiny_video import FRAMES, Framewise, as_clips, as_pictures

from visiontune.diffusion.dynamics import DYNAMICS
from visiontune.diffusion.pathwise import backpropagate, end_gradient, into_conditions
from visiontune.diffusion.replay import backpropagate_scores, latent, replay
from visiontune.diffusion.schedule import Schedule
from visiontune.diffusion.transition import gaussian_kl
from visiontune.errors import UserError

STEPS = 4


def schedule(prediction: str) -> Schedule:
    kinds = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
    if prediction == "flow":
        return Schedule.flow(shift=2.0)
    return Schedule.from_scheduler(DDIMScheduler(prediction_type=kinds[prediction], **SD))


def suits(kind, prediction: str) -> bool:
    try:
        kind().check(prediction)
    except UserError:
        return False
    return True


def dynamics(kind):
    """With noise, where it can add any."""
    return kind(eta=0.5) if "eta" in kind.__dataclass_fields__ else kind()


PREDICTIONS = ("eps", "v", "x0", "flow")
CASES = [(prediction, name) for prediction in PREDICTIONS for name in DYNAMICS if suits(DYNAMICS[name], prediction)]
NOISY = [case for case in CASES if dynamics(DYNAMICS[case[1]]).stochastic]
walk = pytest.mark.parametrize(("prediction", "name"), CASES)
noisy = pytest.mark.parametrize(("prediction", "name"), NOISY)


def draws(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


START, NOISE = draws(2, 2, FRAMES, 4, 4, seed=1), draws(2, STEPS, 2, FRAMES, 4, 4, seed=2)


def drawn(prediction, name, model=None, clips=True, **options):
    """A rollout of two clips, or of the frames of both."""
    model = model or (Framewise if clips else Pictures)(schedule(prediction))
    text = prompts(2)
    start, noise = START, NOISE
    if not clips:
        text = text.repeat_interleave(FRAMES, 0)
        start, noise = as_pictures(START), NOISE.movedim(3, 1).flatten(0, 1)
    return model, rolled(
        model,
        model.embed(text),
        steps=STEPS,
        dynamics=dynamics(DYNAMICS[name]),
        latents=start,
        noise=noise,
        cfg_scale=2.0,
        **options,
    )


@walk
def test_a_clip_is_drawn_as_its_frames_are(prediction, name):
    clips, frames = (drawn(prediction, name, clips=kind)[1] for kind in (True, False))
    assert clips.final.shape == START.shape
    torch.testing.assert_close(clips.final, as_clips(frames.final))


@noisy
def test_a_log_probability_is_the_mean_over_frames_and_is_met_again(prediction, name):
    model, clips = drawn(prediction, name, log_probs=True)
    frames = drawn(prediction, name, clips=False, log_probs=True)[1]
    torch.testing.assert_close(clips.log_probs, frames.log_probs.unflatten(0, (2, FRAMES)).mean(1))
    assert torch.equal(replay(model, clips), clips.log_probs[:, clips.scored])
    chosen = torch.tensor([1])
    rows = replay(model, clips, rows=chosen)
    torch.testing.assert_close(rows, clips.log_probs[chosen][:, clips.scored])
    each = torch.tensor([0, 1])
    assert torch.equal(latent(clips, each, model.device)[1], clips.latents[1, 1])


@noisy
def test_gradients_of_scores_are_those_of_the_frames(prediction, name):
    found = []
    for kind in (True, False):
        model, trajectory = drawn(prediction, name, clips=kind, log_probs=True)
        steps = int(trajectory.scored.sum())
        weights = torch.arange(2 * steps, dtype=torch.float64).view(2, steps) - 1
        if not kind:
            weights = weights.repeat_interleave(FRAMES, 0) / FRAMES
        backpropagate_scores(model, trajectory, weights, micro_batch=1)
        found.append(torch.cat([p.grad.flatten() for p in model.denoiser()]))
    torch.testing.assert_close(*found)
    assert found[0].any()


@walk
@pytest.mark.parametrize("window", [2, STEPS])
def test_walking_back_is_the_whole_graph(prediction, name, window):
    def loss(x):
        return (torch.sin(x) * torch.linspace(1, 2, x.numel(), dtype=x.dtype).view(x.shape)).sum()

    model, trajectory = drawn(prediction, name, grad_steps=window)
    loss(trajectory.final).backward()
    whole = {name: p.grad for name, p in model.named_parameters()}
    model, trajectory = drawn(prediction, name, grad_steps=window, deferred=True)
    live = model.embed(prompts(2))
    found = backpropagate(model, trajectory, end_gradient(trajectory.final, loss)[1], conditions=True)
    assert found.latents.shape == START.shape
    into_conditions(live, found.cond)
    for key, parameter in model.named_parameters():
        if not key.startswith("text"):  # what is guided away from sends its gradient to the encoder too
            torch.testing.assert_close(parameter.grad, whole[key], rtol=1e-9, atol=1e-12)
    assert whole["first.weight"].any()


def test_a_divergence_is_the_mean_over_frames():
    (one, other), std = (draws(2, 2, FRAMES, 4, 4, seed=seed) for seed in (3, 4)), torch.rand(2, 1, 1, 1, 1) + 0.5
    each = gaussian_kl(as_pictures(one), as_pictures(other), std[:, :, 0].repeat_interleave(FRAMES, 0))
    torch.testing.assert_close(gaussian_kl(one, other, std), each.view(2, FRAMES).mean(1))
