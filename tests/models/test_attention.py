"""What computes attention: nothing that was not tried forward and backward on the same shape and mask."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from tiny import tiny_model
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from visiontune import config
from visiontune.errors import UserError
from visiontune.models._attention import Choice, Refused, _dispatched, backends, choose, probe, route
from visiontune.models.masked import MaskedModel


def right(q, k, v, mask, causal, scale, gqa):
    """Attention as plain products."""
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1) @ v


class NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise NotImplementedError("no backward kernel")


class HalfBackward(NoBackward):
    @staticmethod
    def backward(ctx, grad):
        return grad / 2


def forward_only(q, *rest):
    return right(NoBackward.apply(q), *rest)


def blind(q, k, v, mask, *how):
    return right(q, k, v, None, *how)


def wrong(*call):
    return 1.02 * right(*call)


def wrong_gradient(q, k, *rest):
    return right(q, HalfBackward.apply(k), *rest)


def slow(*call):
    time.sleep(0.02)
    return right(*call)


HOW = (False, None, False)


def call(masked: bool = True, dtype=torch.float32):
    made = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, 3, n, 8, generator=made).to(dtype) for n in (5, 7, 7))
    mask = (torch.arange(7) < torch.tensor([[4], [7]]))[:, None, None] if masked else None
    return q, k, v, mask, *HOW


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (forward_only, "fails forward or backward .no backward kernel"),
        (blind, "gives another result than torch's own"),
        (wrong, "gives another result than torch's own, 0.02 of its norm"),
        (wrong_gradient, "gives another gradient of k than torch's own"),
    ],
)
def test_a_backend_that_is_not_right_is_refused(bad, why):
    with pytest.raises(Refused, match=why):
        probe(bad, *call())
    with pytest.raises(
        UserError, match=rf"model\.attention=bad {why}.*3 heads of 8, 5 by 7 tokens.*take native or auto"
    ):
        Choice({"bad": bad}).attend(*call())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_backend_that_is_right_is_not(dtype):
    assert probe(right, *call(dtype=dtype)) > 0
    # Of one key there is nothing but rounding in two of the gradients.
    q, k, v, _, *how = call(masked=False, dtype=dtype)
    assert probe(right, q, k[..., :1, :], v[..., :1, :], None, *how) > 0
    # A mask that is never passed need not be heeded.
    assert probe(blind, *call(masked=False, dtype=dtype)) > 0


@pytest.mark.parametrize("masked", [False, True])
def test_the_dispatcher_gets_heads_behind_tokens(masked):
    assert probe(_dispatched("native"), *call(masked)) > 0
    q, k, v, mask, *how = call(masked)
    torch.testing.assert_close(_dispatched("native")(q, k, v, mask, *how), right(q, k, v, mask, *how))


def test_auto_takes_the_fastest_right_one_and_remembers_it():
    tried = []

    def counted(*values):
        tried.append(values[0].shape)
        return right(*values)

    choice = Choice({"slow": slow, "blind": blind, "fast": counted, "forward_only": forward_only})
    q, k, v, mask, *how = call()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = choice.attend(q, k, v, mask, *how)
    assert torch.equal(out, right(q, k, v, mask, *how)) or torch.allclose(out.float(), right(*call()), atol=0.02)
    before = len(tried)
    choice.attend(q, k, v, mask, *how)
    assert len(tried) == before + 1  # computed, and not tried again
    told = choice.told()
    assert told[0] == "attention: fast (1 shape)" and len(told) == 3
    assert "passes over blind gives another result" in told[1] and "no backward kernel" in told[2]
    choice.attend(*call(masked=False))
    assert choice.told()[0] in ("attention: fast (2 shapes)", "attention: fast (1 shape)")
    assert len(choice.made) == 2  # with and without a mask


class Unanswered(TorchFunctionMode):
    """Fails where attention comes through."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        assert func is not F.scaled_dot_product_attention, "passed by"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", ["sd", "sd3", "qwen_image"])
def test_a_choice_answers_all_attention_of_a_denoiser_also_when_it_is_computed_again(family):
    """A UNet and a transformer that call torch, and one behind diffusers' dispatcher, whose prompts have a mask."""
    model, masks = tiny_model(family), []
    cond = model.embed(["a red circle", "a square on the left"])
    x = torch.randn(2, *model.latent_shape(16, 16), generator=torch.Generator().manual_seed(0)).requires_grad_()

    def run():
        pred = model.predict(x, torch.tensor([100.0, 700.0]), cond)
        return pred.detach(), torch.autograd.grad(pred.square().sum(), x)[0]

    def seen(*call):
        masks.append(call[3] is not None)
        return right(*call)

    expected = run()
    model.denoiser.train().enable_gradient_checkpointing()
    with pytest.raises(AssertionError, match="passed by"), Unanswered():
        run()
    choice = choose({"denoiser": model.denoiser}, "native", "tiny")
    choice.candidates = {"seen": seen}
    with Unanswered():
        found = run()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert any(masks) == (family == "qwen_image") and len(masks) > 3 * len(choice.made)


FAMILIES = sorted(file.stem for file in (Path(__file__).parents[1] / "families").glob("*.py"))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_reached(family):
    model, called = tiny_model(family), []

    def seen(*call):
        called.append(call[0].shape)
        return right(*call)

    choice = choose(model.of(*model.names()), "native", family)
    choice.candidates = {"seen": seen}
    with torch.no_grad():
        cond = model.embed(["a red circle"])
        with Unanswered():
            if isinstance(model, MaskedModel):
                model.logits(torch.zeros(1, *model.grid(), dtype=torch.long), cond)
            else:
                model.predict(torch.randn(1, *model.latent_shape(16, 16)), torch.tensor([500.0]), cond)
    assert len(called) > len(choice.made)


def test_a_packages_absence_and_a_network_without_attention_are_one_line():
    assert "native" in backends("auto")
    with pytest.raises(UserError, match=r"model\.attention=sage: Sage Attention backend"):
        backends("sage")
    with pytest.raises(UserError, match=r"the unet of 'x' has no attention of diffusers: take native"):
        choose({"unet": torch.nn.Linear(2, 2)}, "native", "x")
    assert route(torch.nn.Linear(2, 2), Choice({})) == 0
    with pytest.raises(UserError, match=r"model\.compile traces what model\.attention=auto chooses"):
        config.load_run("personalise/lora", ["data.root=x", "model.compile=true", "model.attention=auto"])
