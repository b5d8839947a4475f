"""An assistant under the trained adapter: in every step, in no picture, and not in the result."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from processes import apart
from safetensors.torch import load_file
from tiny import tiny_model
from tiny_training import TinyRows, interrupt, tiny_trainer
from training import worker

from visiontune import adapters
from visiontune.errors import UserError
from visiontune.objectives import denoising, dreambooth
from visiontune.sampling.pipeline import images
from visiontune.training import preview
from visiontune.training.config import PreviewConfig

TARGETS = {"denoiser": ["to_q", "to_k"], "text": ["q_proj"]}
PARTS = ["denoiser", "text"]


@pytest.fixture
def assistant(tmp_path):
    """A file with LoRAs of both networks that move them much."""
    return saved(tmp_path / "assistant.safetensors")


def saved(path, seed=5):
    made = adapters.attach(tiny_model().of(*PARTS), "lora", targets=["to_k", "to_v", "q_proj", "v_proj"], rank=3)
    with torch.no_grad():
        for i, parameter in enumerate(made.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed + i)) * 0.4)
    return made.save(path)


def plain_with(file):
    """The base, and the assistant on it."""
    model = tiny_model()
    return model, adapters.load(model.networks(), file, name="under").requires_grad_(False)


def merged_with(file):
    """A base whose weights are those that the assistant makes."""
    model, found = plain_with(file)
    with torch.no_grad():
        weights = {layer: found.weight(name) for name, layer in found.base_layers().items()}
        found.detach()
        for layer, weight in weights.items():
            layer.weight.copy_(weight)
    return model


def trainer(out, model, under=None, method="lora", options=None, parts=PARTS, **more):
    torch.manual_seed(0)
    targets = [target for part in parts for target in TARGETS[part]]
    found = adapters.attach(model.of(*parts), method, targets=targets, **options or {})
    train = {"steps": 4, "lr": 0.05, "optimizer": "sgd", "checkpoint_every": 2, "resume": True, "parts": parts}
    rows = TinyRows(model, prior=2, embedded=False)
    given = {"model": model, "rows": rows, "adapters": found, "under": under, **train}
    return tiny_trainer(out, **{"objective": dreambooth.build(dreambooth.Config()), **given, **more})


def gradients(run):
    run.accelerator.backward(run.loss(0).total)
    return {name: parameter.grad.clone() for name, parameter in run.parameters.items()}


METHODS = [("lora", {"rank": 2}), ("lora", {"rank": 2, "dora": True}), ("oft", {"block_size": 4}), ("dense", {})]


@pytest.mark.parametrize("parts", [PARTS, PARTS[:1]], ids=["+".join(PARTS), PARTS[0]])
@pytest.mark.parametrize(("method", "options"), METHODS, ids=str)
def test_a_step_over_it_is_a_step_over_a_base_with_it_merged(method, options, parts, assistant, tmp_path):
    """The prior rows' targets too, which are what the reference predicts."""
    model, under = plain_with(assistant)
    over = trainer(tmp_path / "over", model, under, method, options, parts)
    base = trainer(tmp_path / "base", merged_with(assistant), None, method, options, parts)
    plain = trainer(tmp_path / "plain", tiny_model(), None, method, options, parts)
    found, expected, other = gradients(over), gradients(base), gradients(plain)
    assert found.keys() == expected.keys() and not any("under" in name for name in found)
    size = torch.cat([grad.flatten() for grad in expected.values()]).norm()
    apart = [(found[name] - grad).norm() / size for name, grad in expected.items()]
    assert max(apart) < 1e-5
    assert max((other[name] - grad).norm() / size for name, grad in expected.items()) > 0.01
    for run in (over, base):
        run.optimizer.zero_grad()
    losses = [(over.optimise(step), base.optimise(step)) for step in range(3)]
    for ours, theirs in losses:
        assert ours == pytest.approx(theirs, rel=1e-5)
    assert abs(losses[2][0] - losses[0][0]) > 1e-4


def predicted(model, seed=3):
    x_t = torch.randn(2, *model.latent_shape(), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return model.predict(x_t, torch.tensor([300, 800]), model.embed(["a red circle", "small"]))


def test_the_result_alone_is_the_trained_adapter_without_it(assistant, tmp_path):
    model, under = plain_with(assistant)
    run = trainer(tmp_path, model, under, optimizer="adamw")
    file = run.fit()
    run.step_module.eval()
    with under.disable():
        expected = predicted(model)
    assert under.enabled and not torch.allclose(predicted(model), expected, atol=1e-3)
    alone = tiny_model()
    before = predicted(alone)
    adapters.load(alone.networks(), file)
    assert torch.equal(predicted(alone), expected) and not torch.allclose(before, expected, atol=1e-3)
    assert adapters.read_header(file)["targets"] == ["to_q", "to_k", "q_proj"]


def test_previews_are_without_it(assistant, tmp_path):
    model, under = plain_with(assistant)
    shown = PreviewConfig(prompts=["a circle"], steps=2, every=4)
    file = trainer(tmp_path, model, under, preview=shown).fit()
    for step in (0, 4):
        alone = tiny_model()
        if step:
            adapters.load(alone.networks(), file)
        expected = images(alone, ["a circle"], [0], steps=2)[0]
        with Image.open(preview.folder(tmp_path, step) / preview.file_name(0, 0)) as drawn:
            assert np.array_equal(np.asarray(drawn), expected)
    assert not np.array_equal(images(model, ["a circle"], [0], steps=2)[0], expected)


def test_a_run_goes_on_over_the_same_file_alone_and_ends_in_the_same_bits(assistant, tmp_path):
    whole = load_file(trainer(tmp_path / "whole", *plain_with(assistant)).fit())
    interrupt(trainer(tmp_path / "broken", *plain_with(assistant)), 2)
    for other in (None, saved(tmp_path / "other.safetensors", seed=6)):
        with pytest.raises(UserError, match=r"with hash of adapter\.under=.*; set it back"):
            trainer(tmp_path / "broken", *(plain_with(other) if other else (tiny_model(),))).fit()
    copy = saved(tmp_path / "copy.safetensors")
    broken = load_file(trainer(tmp_path / "broken", *plain_with(copy)).fit())
    assert whole.keys() == broken.keys()
    assert all(torch.equal(tensor, broken[name]) for name, tensor in whole.items())


def test_a_run_that_had_none_is_not_given_one(assistant, tmp_path):
    interrupt(trainer(tmp_path, tiny_model()), 2)
    with pytest.raises(UserError, match=r"hash of adapter\.under=None, not"):
        trainer(tmp_path, *plain_with(assistant)).fit()


def test_two_processes_train_over_it_like_one_with_both_their_batches(tmp_path):
    assert apart("training.worker:two_over", tmp_path / "two") == [0, 0]
    one = load_file(worker.shared(tmp_path / "one", 4, over=True).fit())
    two = load_file(tmp_path / "two" / "adapter.safetensors")
    plain = load_file(worker.shared(tmp_path / "plain", 4, over=None).fit())
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-5, atol=1e-6)
    assert any(not torch.allclose(plain[name], value, atol=1e-3) for name, value in one.items())


def test_it_is_no_part_of_what_is_trained(assistant, tmp_path):
    model, under = plain_with(assistant)
    before = {name: tensor.clone() for name, tensor in under.tensors().items()}
    run = trainer(tmp_path, model, under, objective=denoising.build(denoising.Config()))
    run.fit()
    assert all(torch.equal(tensor, before[name]) for name, tensor in under.tensors().items())
    assert not under.training and not any(p.requires_grad for p in under.parameters())


def test_its_hash_is_of_all_that_it_does(assistant, tmp_path):
    first, again = (plain_with(assistant)[1] for _ in range(2))
    digest = first.digest()
    assert again.digest() == digest != plain_with(saved(tmp_path / "b.safetensors", seed=6))[1].digest()
    again.scale = 0.5
    assert again.digest() != digest
    with torch.no_grad():
        min(first.tensors().items())[1].view(-1)[-1] += 1e-6
    assert first.digest() != digest
