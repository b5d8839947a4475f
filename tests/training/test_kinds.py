"""Runs on models that draw nothing: a CLIP by a contrastive loss, a LLaVA by the next token, with toy rows."""

from __future__ import annotations

import functools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from tiny import save_tiny_llava
from tiny_rewards import smooth, tiny_clip_folder
from tiny_training import interrupt

from visiontune import adapters, models
from visiontune.core import Batch, Loss
from visiontune.errors import UserError
from visiontune.estimate import Kept
from visiontune.objectives import denoising
from visiontune.objectives.base import Supervised
from visiontune.ops.pixels import to_tensor
from visiontune.sampling import pipeline as sampling
from visiontune.training.config import PreviewConfig, TrainConfig
from visiontune.training.loop import Trainer

WORDS = ["a red circle", "a blue square", "the green star", "small"]


class Contrastive(Supervised):
    """Which of the batch's texts belongs to a picture, and the other way round."""

    config = SimpleNamespace()

    def loss(self, model, batch, tools):
        shown = F.normalize(model.image_features(batch.data["image"]).pooled, dim=-1)
        told = F.normalize(model.text_features(batch.prompts).pooled, dim=-1)
        logits = (model.logit_scale * shown @ told.T).float()
        own = torch.arange(len(logits))
        return Loss(total=(F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2)


class NextToken(Supervised):
    """The mean over the tokens of a batch."""

    config = SimpleNamespace()

    def loss(self, model, batch, tools):
        inputs = {name: value for name, value in batch.data.items() if name != "image"}
        logits = model.logits(pixel_values=batch.data["image"], **inputs)
        told = batch.data["input_ids"].masked_fill(batch.data["attention_mask"] == 0, -100)
        return Loss(total=F.cross_entropy(logits[:, :-1].flatten(0, 1), told[:, 1:].flatten()))


class Rows:
    def __init__(self, model) -> None:
        self.model = model

    def close(self) -> None:
        pass

    def batch(self, step: int) -> Batch:
        chosen = [(step + i) % len(WORDS) for i in range(2)]
        prompts, pictures = [WORDS[i] for i in chosen], [smooth(16, 16, i) for i in chosen]
        if self.model.family == "clip":
            data = {"image": to_tensor(np.stack(pictures))}
        else:
            data = self.model.encode([f"<image> {prompt}" for prompt in prompts], pictures)
            data["image"] = data.pop("pixel_values")
        none = torch.zeros(2, dtype=torch.bool)
        return Batch(prompts=prompts, data=data, cond=None, weight=torch.ones(2), prior=none, ids=["a", "b"])


OBJECTIVES = {"clip": Contrastive, "llava": NextToken}
EVERYTHING = {"clip": ["vision", "text", "head"], "llava": ["language", "vision", "projector", "head"]}
TOWERS = {"clip": ["vision", "text"], "llava": ["language", "vision", "projector"]}


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("trained")
    return {
        "clip": str(tiny_clip_folder(root / "clip", image_size=16)),
        "llava": str(save_tiny_llava(root / "llava", vision_feature_layer=-1)),
    }


def trainer(name, folders, out, *, adapter=True, parts=None, preview=None, objective=None, **train) -> Trainer:
    model = models.load(folders[name])
    parts = parts or (TOWERS if adapter else EVERYTHING)[name]
    torch.manual_seed(0)
    found = None
    if adapter:
        trained = model.names(parts)
        found = adapters.attach(model.of(*trained), "lora", targets="all", presets=model.presets(trained), rank=2)
    return Trainer(
        model=model,
        adapters=found,
        objective=objective or OBJECTIVES[name](),
        rows=Rows(model),
        train=TrainConfig(
            **{"steps": 2, "checkpoint_every": 1, "trackers": [], "device": "cpu", "lr": 1e-2, "parts": parts, **train}
        ),
        out=out,
        preview=preview,
        seed=3,
    )


def values(run: Trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in run.parameters.items()}


each = pytest.mark.parametrize("name", OBJECTIVES)


@each
@pytest.mark.parametrize("adapter", [True, False])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_run_trains_is_stopped_and_goes_on_in_the_same_bits(name, adapter, precision, folders, tmp_path):
    made = functools.partial(trainer, name, folders, adapter=adapter, precision=precision)
    start = values(made(tmp_path / "whole"))
    whole = made(tmp_path / "whole")
    result = whole.fit()
    interrupt(made(tmp_path / "broken"), 1)
    resumed = made(tmp_path / "broken", resume=True)
    resumed.fit()
    assert all(torch.equal(resumed.parameters[key], value) for key, value in values(whole).items())
    moved = {
        key.removeprefix("adapters.").partition(".")[0] for key, v in values(whole).items() if v.ne(start[key]).any()
    }
    assert moved == {*whole.model.names((TOWERS if adapter else EVERYTHING)[name])}
    # What was left behind, opened again, is what was trained.
    again = models.load(folders[name] if adapter else str(result))
    if adapter:
        adapters.load(again.networks(), result)
    batch = whole.rows.batch(5)
    ours, theirs = (whole.objective.loss(model, batch, None).total for model in (again, whole.model))
    torch.testing.assert_close(ours, theirs)


@each
def test_the_loss_falls(name, folders, tmp_path):
    run = trainer(name, folders, tmp_path, adapter=False, steps=60, lr=1e-3, log_every=10, checkpoint_every=60)
    run.fit()
    losses = [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0] - 0.1


@each
def test_bfloat16_is_near_and_checkpointing_is_the_same(name, folders, tmp_path):
    def found(**train):
        run = trainer(name, folders, tmp_path, adapter=False, **train)
        loss = run.loss(0).total
        loss.backward()
        return torch.cat([p.grad.flatten() for p in run.parameters.values() if p.grad is not None])

    exact = found()
    assert torch.cosine_similarity(found(precision="bf16"), exact, dim=0) > 0.98
    torch.testing.assert_close(found(gradient_checkpointing=True), exact, rtol=1e-4, atol=1e-6)


@each
def test_gradient_checkpointing_keeps_less(name, folders, tmp_path):
    kept = []
    for on in (False, True):
        run = trainer(name, folders, tmp_path, adapter=False, gradient_checkpointing=on)
        count = Kept([p for network in run.model.networks().values() for p in network.parameters()])
        with count:
            run.objective.probe(run.precise, run.rows.batch(0), run.lender.tools(0))
        kept.append(count.bytes)
    assert kept[1] < 0.8 * kept[0]


@each
def test_the_card_says_what_the_model_does_and_the_file_what_it_holds(name, folders, tmp_path):
    result = trainer(name, folders, tmp_path).fit()
    task = {"clip": "zero-shot-image-classification", "llava": "image-text-to-text"}[name]
    assert f"pipeline_tag: {task}" in (tmp_path / "README.md").read_text()
    with safe_open(result, "pt") as file:
        assert {key.partition(".")[0] for key in file.keys()} <= {*models.load(folders[name]).networks(), "own"}  # noqa: SIM118


@each
def test_one_part_alone_is_trained_through_the_others(name, folders, tmp_path):
    part = {"clip": "logit_scale", "llava": "projector"}[name]
    run = trainer(
        name, folders, tmp_path, adapter=False, parts=[part], part_lr={part: 1e-1}, gradient_checkpointing=True
    )
    before = values(run)
    run.fit()
    assert {key.partition(".")[0] for key in before} == {*run.model.names([part])}
    assert all(not torch.equal(run.parameters[key], value) for key, value in before.items())
    assert run.optimizer.param_groups[0]["lr"] == 1e-1


@each
def test_what_such_a_model_cannot_do_is_refused_in_one_line(name, folders, tmp_path):
    with pytest.raises(UserError, match=r"draws no pictures: set preview.prompts=\[\]"):
        trainer(name, folders, tmp_path, preview=PreviewConfig(prompts=["a"]))
    with pytest.raises(UserError, match="draws no pictures: take one that does"):
        sampling.images(models.load(folders[name]), "a")
    with pytest.raises(UserError, match="is for models of continuous latents"):
        trainer(name, folders, tmp_path, objective=denoising.build(denoising.Config()))
