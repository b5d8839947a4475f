"""Runs of a model of clips: data with masks, previews, guards, rewards, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_training import TinyReward, interrupt, tiny_trainer
from tiny_video import FRAMES, TinyVideo

from visiontune.core import Batch
from visiontune.data import pictures
from visiontune.data.base import Config, Sample, Source
from visiontune.data.loader import BatchSampler
from visiontune.data.prompts import PromptBatches
from visiontune.data.rows import Rows
from visiontune.errors import UserError
from visiontune.objectives import alignprop, denoising, dreambooth
from visiontune.objectives.base import Tools, generator, per_row
from visiontune.rewards.base import as_reward
from visiontune.sampling.grid import grid
from visiontune.sampling.pipeline import images
from visiontune.training import measures, preview
from visiontune.training.config import GuardsConfig, PreviewConfig
from visiontune.training.guards import Guard

PROMPTS = ["a red circle", "a blue square"]


def clips(rows: int = 2, **columns) -> Batch:
    return Batch(
        prompts=PROMPTS[:rows],
        data={"image": torch.randn(rows, 4, FRAMES, 8, 8, generator=generator("clips")), **columns},
        cond=None,
        weight=torch.ones(rows),
        prior=torch.zeros(rows, dtype=torch.bool),
        ids=PROMPTS[:rows],
    )


class ClipRows:
    def batch(self, step: int) -> Batch:
        return clips()

    def close(self) -> None:
        pass


class Moving(TinyReward):
    """How much goes on in a clip."""

    name, clips = "moving", True

    def score(self, images, prompts, meta):
        assert images.shape[1:] == (FRAMES, 3, 16, 16)
        return (images[:, 1:] - images[:, :-1]).square().flatten(1).mean(1)


# ------------------------------------------------------------------------------------------------------------- losses


def test_a_mask_holds_for_all_frames():
    errors = torch.rand(4, 4, 3, 8, 8)
    mask = (torch.rand(4, 1, 8, 8) > 0.5).float()
    each = torch.stack([per_row(errors[:, :, frame], mask) for frame in range(3)])
    torch.testing.assert_close(per_row(errors, mask), each.mean(0))
    first = mask[:, :, None] * torch.tensor([1.0, 0, 0]).view(3, 1, 1)
    torch.testing.assert_close(per_row(errors, first), each[0])


def test_offset_noise_moves_all_frames_of_a_channel_alike():
    objective = denoising.build(denoising.Config(offset_noise=100.0))
    means = objective.noise(torch.zeros(2, 4, FRAMES, 8, 8), generator("offset")).mean((3, 4))
    assert (means.std(2) < 1).all() and means.mean(2).std() > 20


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_the_loss_of_a_clip_is_the_weighted_mean_over_its_values(prediction):
    model, batch = TinyVideo(prediction), clips(mask=torch.rand(2, 1, 8, 8, generator=generator("mask")))
    objective = denoising.build(denoising.Config(snr_gamma=5.0))
    loss = objective.loss(model, batch, Tools(rng=generator("loss"))).total
    rng, x_0 = generator("loss"), batch.data["image"]
    t = (torch.rand(2, generator=rng, dtype=torch.float64) * 1000).long()
    eps = torch.randn(x_0.shape, generator=rng)
    error = model.predict(model.schedule.add_noise(x_0, eps, t), t, model.embed(batch.prompts))
    error = (error - model.schedule.target(x_0, eps, t)).square()
    weight = denoising.min_snr_weight(model.schedule.snr(t), 5.0, prediction)
    mask = batch.data["mask"][:, :, None].expand_as(error)
    torch.testing.assert_close(loss, (weight * (mask * error).flatten(1).sum(1) / mask.flatten(1).sum(1)).mean())


def test_pictures_and_masks_become_latents_with_frames(tmp_path):
    """Through the cache and the loader, by a model that reads a picture as a clip of one frame."""
    samples = []
    for i in range(3):
        files = [tmp_path / f"{i}.png", tmp_path / f"{i}-mask.png"]
        for file in files:
            Image.fromarray(np.random.default_rng(i).integers(0, 256, (20, 16, 3), dtype=np.uint8)).save(file)
        sources = {"image": Source(files[0]), "mask": Source(files[1], "mask")}
        samples.append(Sample(id=str(i), sources=sources, caption="a red circle"))
    model = TinyVideo()
    rows = Rows(model, samples, Config(root=str(tmp_path)), tmp_path / "cache")
    rows.fill()
    batch = BatchSampler(rows, 2, 0, 0, 1).batch(0)
    assert batch.data["image"].shape == (2, 4, 1, 8, 8) and batch.data["mask"].shape == (2, 1, 8, 8)
    loss = denoising.build(denoising.Config()).loss(model, batch, Tools(rng=generator("rows"))).total
    assert loss.isfinite() and loss > 0


# --------------------------------------------------------------------------------------------------------------- runs


def test_previews_are_clips_and_the_run_ends_with_a_sheet(tmp_path):
    config = PreviewConfig(prompts=PROMPTS, seeds=[0, 1], steps=2, every=2, cfg_scale=1.0)

    def run(name, **train):
        options = {"steps": 4, "checkpoint_every": 2, "lr": 1e-2, "trackers": ["tensorboard"], **train}
        return tiny_trainer(tmp_path / name, model=TinyVideo(), rows=ClipRows(), preview=config, **options)

    whole = run("whole")
    whole.fit()
    interrupt(run("broken"), 2)
    run("broken", resume=True).fit()
    pairs = [(i, seed) for i in range(2) for seed in range(2)]
    drawn = images(whole.model, [PROMPTS[i] for i, _ in pairs], [s for _, s in pairs], steps=2, cfg_scale=1.0)
    names = [preview.file_name(*pair) for pair in pairs]
    for step in (0, 2, 4):
        folder, other = (preview.folder(tmp_path / name, step) for name in ("whole", "broken"))
        assert {file.name for file in folder.iterdir()} == {*names, "grid.png"}
        assert all((folder / name).read_bytes() == (other / name).read_bytes() for name in names)
    first, last = ([preview.folder(tmp_path / "whole", step) / name for name in names] for step in (0, 4))
    for file, frames in zip(last, drawn, strict=True):
        np.testing.assert_array_equal(pictures.frames(file), frames)
    sheet = grid(
        [pictures.frames(file)[FRAMES // 2] for i in (0, 2) for file in (*first[i : i + 2], *last[i : i + 2])],
        2,
        row_captions=[f"{prompt} (step {step})" for prompt in PROMPTS for step in (0, 4)],
        column_captions=["seed 0", "seed 1"],
    )
    found = np.asarray(Image.open(tmp_path / "whole" / "samples" / "before_after.png"))
    np.testing.assert_array_equal(found, np.asarray(sheet))
    assert f"samples/step-000004/{names[0]}" in (tmp_path / "whole" / "README.md").read_text()


def test_a_reward_of_clips_rises_under_guards(tmp_path):
    objective = alignprop.build(alignprop.Config(steps=3, cfg_scale=1.0, truncation="full"))
    off = ("reward_drop", "diversity_min", "high_frequency_factor", "blank_max", "distance_max", "change_max")
    config = GuardsConfig(every=10, steps=2, cfg_scale=1.0, **dict.fromkeys(off))
    guard = Guard(config, ["a green star"], reward=Moving())
    rows = PromptBatches(PROMPTS, 4)
    run = tiny_trainer(
        tmp_path, model=TinyVideo(), objective=objective, rows=rows, reward=Moving(), guard=guard, steps=20, lr=1e-2
    )
    run.fit()
    assert guard.latest["reward"] > guard.start["reward"]
    assert guard.latest["distance"] > 0 and math.isfinite(guard.latest["high_frequency"])
    kept = sorted((tmp_path / "guards" / "step-000000").glob("*_seed*.png"))
    assert [pictures.frames(file).shape for file in kept] == [(FRAMES, 16, 16, 3)] * 2


def test_every_frame_of_a_clip_is_measured_as_a_picture():
    drawn = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 8, 6, 3), dtype=np.uint8)
    drawn[0, 0, 1] = 7
    frames = drawn.reshape(2, 12, 8, 6, 3)
    assert measures.blank(drawn, 0.02) == measures.blank(frames, 0.02) == pytest.approx(1 / 24)
    assert measures.high_frequency(drawn, 0.25) == measures.high_frequency(frames, 0.25)
    other = drawn[::-1]
    assert measures.distance(drawn, other) == measures.distance(frames, other.reshape(2, 12, 8, 6, 3))
    # Seeds are compared frame with frame, in their order.
    assert measures.diversity(np.stack([drawn[:, 0], drawn[:, 0]], 1)) == 0
    assert measures.diversity(np.stack([drawn[:, 0], drawn[:, 0, ::-1]], 1)) > 0.1


# ------------------------------------------------------------------------------------------------------------ refused


def test_a_reward_of_pictures_is_refused_before_anything_is_drawn():
    objective = alignprop.build(alignprop.Config(steps=2))
    with pytest.raises(UserError, match=r"reward 'tiny' scores pictures, and 'tiny-video' .* take a reward of clips"):
        objective.check(TinyVideo(), TinyReward())
    objective.check(TinyVideo(), Moving())


def test_rewards_take_clips_where_they_say_so():
    shown = torch.rand(2, FRAMES, 3, 16, 16)
    assert Moving()(shown, PROMPTS).shape == (2,)
    with pytest.raises(UserError, match="takes float images"):
        TinyReward()(shown, PROMPTS)
    with pytest.raises(UserError, match="takes float images"):
        Moving()(shown[:, :, :2], PROMPTS)

    def function(images, prompts, meta):
        return images.flatten(1).mean(1)

    assert not as_reward(function, "f").clips
    function.clips = True
    assert as_reward(function, "f")(shown, PROMPTS).shape == (2,)


def test_class_images_of_a_model_of_clips_are_refused(tmp_path):
    prepare = dreambooth.build(dreambooth.Config()).prepare
    with pytest.raises(UserError, match=r"prior pictures are no clips, .* set objective.prior=none"):
        prepare(TinyVideo(), Config(root="dog", class_noun="dog"), [], tmp_path, Tools())
    assert dreambooth.build(dreambooth.Config(prior_weight=0)).prepare(TinyVideo(), None, [], tmp_path, Tools()) == []
