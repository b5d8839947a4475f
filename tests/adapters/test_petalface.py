"""PETALface: two LoRAs mixed sample by sample, and where the mixture comes from."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from contracts.declared import Declared, count_lora
from tiny import tiny_model, tiny_pipe
from torch import nn
from torch.utils.checkpoint import checkpoint

from visiontune.adapters import attach, attached, load, petalface
from visiontune.errors import UserError

CONTRACT = {
    "petalface": Declared(
        lambda module, options: 2 * count_lora(module, options),
        {"rank": 2, "alpha": 3.0},
        export_options={"gate": "none"},
    )
}

X = torch.randn(4, 5, 10, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


class Denoiser(nn.Module):
    """A linear layer and a convolution, of tokens [b, n, 10]; what it was called with is checked by nobody."""

    def __init__(self, windows: int = 1, checkpointed: bool | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(10, 8), nn.Conv1d(8, 6, 3, padding=1, groups=2)
        self.windows, self.checkpointed = windows, checkpointed
        self.double()

    def body(self, sample):
        parts = self.first(sample.unflatten(1, (self.windows, -1)).flatten(0, 1))
        return torch.tanh(self.second(torch.tanh(parts.mT)))

    def forward(self, sample, timestep, extra=None):
        if self.checkpointed is None:
            return (self.body(sample),)
        return (checkpoint(self.body, sample, use_reentrant=self.checkpointed),)


def adapted(net=None, targets=("first", "second"), **options):
    net = net or Denoiser()
    adapters = attach({"unet": net}, "petalface", targets=list(targets), rank=2, **options)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in adapters.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=rng))
    return net, adapters


def single(adapters, pair, net=None):
    """The same net with one pair as a LoRA."""
    net = net or Denoiser()
    lora = attach({"unet": net}, "lora", targets=["first", "second"], rank=2)
    for name, adapter in adapters.adapters().items():
        own = lora.adapters()[name]
        down = adapter.down.detach().unflatten(0, (adapter.groups, 2, 2))[:, pair].flatten(0, 1)
        own.load_state_dict({"down": down, "up": adapter.up.detach()[:, 2 * pair : 2 * pair + 2]})
    return net


@pytest.mark.parametrize("pair", [0, 1])
def test_the_ends_are_one_lora_each(pair):
    net, adapters = adapted()
    torch.testing.assert_close(net(X, 1000 * pair)[0], single(adapters, pair)(X, 0)[0])
    with petalface.gated(adapters, 5.0 if pair else -5.0):
        torch.testing.assert_close(net(X, 123)[0], single(adapters, pair)(X, 0)[0])


@pytest.mark.parametrize(
    "call",
    [
        lambda net, t: net(X, t),
        lambda net, t: net(X, timestep=t),
        lambda net, t: net(sample=X, timestep=t),
        lambda net, t: net(timestep=t, sample=X),
    ],
)
def test_the_timestep_is_found_however_it_is_passed(call):
    net, adapters = adapted()
    with petalface.gated(adapters, 0.25):
        expected = net(X, 0)[0]
    for t in (250, torch.tensor(250), torch.full((4,), 250)):
        torch.testing.assert_close(call(net, t)[0], expected)
    assert not torch.allclose(call(net, 251)[0], expected, rtol=1e-6)


def test_samples_do_not_see_each_others_mixture():
    net, _ = adapted()
    t = torch.tensor([0, 300, 700, 1000])
    whole = net(X, t)[0]
    for i in range(4):
        torch.testing.assert_close(whole[i : i + 1], net(X[i : i + 1], t[i])[0])
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(net(X[order], t[order])[0], whole[order])


def test_windows_of_a_sample_share_its_mixture():
    x = torch.randn(3, 8, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    net, _ = adapted(Denoiser(windows=2))
    t = torch.tensor([0, 400, 1000])
    apart = torch.cat([net(x[i : i + 1], t[i])[0] for i in range(3)])
    torch.testing.assert_close(net(x, t)[0], apart)


def test_a_batch_that_guidance_doubled_takes_the_given_mixture_twice():
    net, adapters = adapted()
    given = torch.tensor([0.1, 0.9])
    with petalface.gated(adapters, given):
        doubled = net(torch.cat([X[:2], X[2:]]), 0)[0]
        torch.testing.assert_close(doubled, torch.cat([net(X[:2], 0)[0], net(X[2:], 0)[0]]))
    assert not torch.allclose(doubled, net(X, 0)[0])


def test_the_idle_pair_gets_no_gradient():
    net, adapters = adapted()
    net(X, 1000)[0].sum().backward()
    for adapter in adapters.adapters().values():
        down = adapter.down.grad.unflatten(0, (adapter.groups, 2, 2))
        assert not down[:, 0].any() and down[:, 1].any()
        assert not adapter.up.grad[:, :2].any() and adapter.up.grad[:, 2:].any()


@pytest.mark.parametrize("where", ["inside", "around"])
@pytest.mark.parametrize("given", [False, True])
def test_checkpoints_of_several_passes_are_computed_again_as_they_were(where, given):
    """Another pass, and another mixture, lies between a forward pass and its backward pass."""

    def gradients(checkpointed):
        net, adapters = adapted(Denoiser(checkpointed=False if checkpointed and where == "inside" else None))
        around = checkpointed and where == "around"

        def run(t):
            if around:
                return checkpoint(net, X, t, use_reentrant=False)[0]
            return net(X, t)[0]

        outputs = []
        for t in (torch.tensor([0, 300, 600, 1000]), torch.tensor(900), torch.tensor(50)):
            if given:
                with petalface.gated(adapters, t / 1000):
                    outputs.append(run(0))
            else:
                outputs.append(run(t))
        with torch.no_grad():
            net(X, 500)
        sum(i * y.square().sum() for i, y in enumerate(outputs, 1)).backward()
        # Nothing of the backward pass stays behind.
        torch.testing.assert_close(net(X, 1000)[0], adapted()[0](X, 1000)[0])
        return [p.grad for p in adapters.parameters()]

    for a, b in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(a, b)


def test_reentrant_checkpoints_too():
    def gradients(checkpointed):
        net, adapters = adapted(Denoiser(checkpointed=checkpointed))
        x = X.clone().requires_grad_()
        sum(net(x, t)[0].square().sum() for t in (100, 900)).backward()
        return [p.grad for p in adapters.parameters()]

    for a, b in zip(gradients(True), gradients(None), strict=True):
        torch.testing.assert_close(a, b)


def test_a_copy_has_a_gate_of_its_own():
    net, adapters = adapted()
    expected = net(X, 250)[0]
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        torch.testing.assert_close(twin(X, 250)[0], expected)
        own = attached(twin)["default"]
        with petalface.gated(own, 1.0):
            assert not torch.allclose(twin(X, 250)[0], expected)
            torch.testing.assert_close(net(X, 250)[0], expected)
        # The copy's own hooks set the copy's own gate, and detaching it removes those alone.
        adapters.enabled = False
        torch.testing.assert_close(twin(X, 250)[0], expected)
        adapters.enabled = True
        own.detach()
        assert not twin._forward_pre_hooks and not twin._forward_hooks
        torch.testing.assert_close(net(X, 250)[0], expected)
    adapters.detach()
    assert not net._forward_pre_hooks and not net._forward_hooks and not net._forward_pre_hooks_with_kwargs


def test_a_failed_pass_leaves_no_mixture_behind():
    net, adapters = adapted(gate="none")
    expected = net(X, 0)[0]
    with petalface.gated(adapters, 0.9), pytest.raises(RuntimeError):
        net(X[..., :3], 0)
    torch.testing.assert_close(net(X, 0)[0], expected)
    assert adapters.methods()[0].gate.now() is None


def test_merging_needs_one_mixture():
    net, adapters = adapted()
    for act in (adapters.merge, lambda: adapters.change("unet.first"), lambda: adapters.low_rank("unet.first")):
        with pytest.raises(UserError, match="one weight cannot hold"):
            act()
    with petalface.gated(adapters, torch.tensor([0.1, 0.2])), pytest.raises(UserError, match="one weight cannot hold"):
        adapters.merge()
    with petalface.gated(adapters, 0.3):
        expected = net(X, 0)[0]
        down, up = adapters.low_rank("unet.first")
        torch.testing.assert_close(up @ down, adapters.change("unet.first")[0])
        adapters.merge()
    torch.testing.assert_close(net(X, 999)[0], expected)
    adapters.unmerge()
    assert not torch.allclose(net(X, 999)[0], expected)


def test_without_a_timestep_both_act_by_half():
    net, adapters = adapted(gate="none")
    y = net(X, 999)[0]
    torch.testing.assert_close(y, net(X, 1)[0])
    adapters.merge()
    torch.testing.assert_close(net(X, 1)[0], y)


def test_rows_that_belong_to_no_sample_are_refused():
    net, adapters = adapted()
    with petalface.gated(adapters, torch.tensor([0.1, 0.2, 0.3])), pytest.raises(UserError, match="mixes 3 samples"):
        net(X, 0)


def test_training_and_the_stock_pipeline_are_gated_alike(tmp_path):
    model = tiny_model("sd")
    adapters = attach(
        model.of("denoiser", "text"), "petalface", targets="all", presets=model.presets(model.networks()), rank=2
    )
    with torch.no_grad():
        for p in adapters.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    cond, x = model.embed(["a red circle", "a square"]), torch.randn(2, 4, 8, 8)
    seen = []
    first = next(a for n, a in adapters.adapters().items() if n.startswith("unet."))
    model.pipe.unet.conv_in.register_forward_hook(lambda *_: seen.append(first.gate.now()))
    with torch.no_grad():
        y = model.predict(x, torch.tensor([100, 900]), cond)
        assert seen.pop().tolist() == pytest.approx([0.1, 0.9])
        torch.testing.assert_close(
            torch.cat([model.predict(x[i : i + 1], torch.tensor(t), cond[i]) for i, t in ((0, 100), (1, 900))]), y
        )
        seen.clear()
        model.pipe(["a circle"] * 2, num_inference_steps=3, guidance_scale=3.0, output_type="latent")
        assert [float(m) for m in seen] == pytest.approx([float(t) / 1000 for t in model.pipe.scheduler.timesteps])
    path = adapters.save(tmp_path / "a.safetensors")
    other = tiny_pipe()
    load({"unet": other.unet, "text_encoder": other.text_encoder}, path)
    with torch.no_grad():
        added = {"encoder_hidden_states": cond.tokens}
        assert torch.equal(other.unet(x, torch.tensor([100, 900]), **added).sample, y)


def test_two_loras_fit_what_one_cannot():
    """Samples of two kinds want opposite changes."""
    x = torch.randn(64, 1, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    kind = torch.arange(64) % 2
    matrix = torch.randn(10, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(10, 8, bias=False).double()
            nn.init.zeros_(self.first.weight)

        def forward(self, sample, timestep):
            return self.first(sample)

    def fit(method, rank):
        net = Plain()
        adapters = attach({"unet": net}, method, targets=["first"], rank=rank)
        optimizer = torch.optim.Adam(adapters.parameters(), 2e-2)
        for _ in range(200):
            optimizer.zero_grad()
            loss = (net(x, 1000 * kind) - (2 * kind - 1)[:, None, None] * (x @ matrix)).square().mean()
            loss.backward()
            optimizer.step()
        return float(loss.detach())

    assert fit("petalface", 8) < 0.1 * fit("lora", 16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timesteps": 0}, "timesteps must be a number above 0"),
        ({"dropout": 1.0}, "dropout must be a number of at least 0 and below 1"),
        ({"gate": "quality"}, "gate cannot be 'quality'"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        adapted(**options)
