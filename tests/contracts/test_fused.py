"""What every method for linear layers has to satisfy on the projections of ``nn.MultiheadAttention``.

Torch reads their weights without calling a layer, so each check compares with `F.multi_head_attention_forward`.
"""

from __future__ import annotations

import copy
import pickle
import warnings
from dataclasses import fields

import pytest
import torch
import torch.nn.functional as F
from contracts.declared import declared, turn
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from visiontune import plugin
from visiontune.adapters import AdapterSet, attach, attached, load
from visiontune.adapters._attention import InProj
from visiontune.errors import UserError
from visiontune.weights.export import export
from visiontune.weights.keys import keys_of
from visiontune.weights.lora_files import read_lora

pytestmark = pytest.mark.filterwarnings("ignore:the Neumann series")

METHODS = [name for name in declared() if issubclass(nn.Linear, plugin.load("adapters", name).LAYERS)]
D, HEADS = 8, 2


class Net(nn.Module):
    """One frozen attention module under a name."""

    def __init__(self, batch_first: bool = True, dtype: torch.dtype = torch.float64, **options) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attn = nn.MultiheadAttention(D, HEADS, batch_first=batch_first, **options)
        if self.attn.in_proj_bias is not None:
            nn.init.normal_(self.attn.in_proj_bias, std=0.3)
            nn.init.normal_(self.attn.out_proj.bias, std=0.3)
        # Before and after a set is attached, since torch chooses kernels by whether gradients are wanted.
        self.to(dtype).requires_grad_(False)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return self.attn(x, *(2 * [x] if y is None else [y, y.flip(0)]), need_weights=False)[0]


def _input(seed: int = 1, length: int = 5, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(3, length, D, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _attach(net: nn.Module, method: str, name: str = "default", targets=("in_proj", "out_proj")) -> AdapterSet:
    return attach(net, method, targets=targets, name=name, **declared()[method].options)


def _expected(net: Net, adapters: AdapterSet, x: Tensor, y: Tensor | None = None) -> Tensor:
    """Torch's function on the weights that the set defines."""
    q, k, v = [x] * 3 if y is None else [x, y, y.flip(0)]
    if net.attn.batch_first:
        q, k, v = (t.transpose(0, 1) for t in (q, k, v))
    parts = [f(f"attn.{name}") for name in ("in_proj", "out_proj") for f in (adapters.weight, adapters.bias)]
    result = F.multi_head_attention_forward(
        q, k, v, D, HEADS, *parts[:2], None, None, False, 0.0, *parts[2:], need_weights=False
    )[0]
    return result.transpose(0, 1) if net.attn.batch_first else result


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch", "length"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_identity_at_init_is_bit_exact(method: str, batch_first: bool, bias: bool) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        net, x, y = Net(batch_first, dtype, bias=bias), _input(dtype=dtype), _input(3, 4 if batch_first else 5, dtype)
        if not batch_first:
            y = y[:2].repeat(2, 1, 1)
        for training in (True, False):
            net.train(training)
            # Where a gradient of the weight is wanted torch multiplies otherwise, which moves the last bits.
            for exact in (True, False):
                with torch.set_grad_enabled(not exact):
                    before = net(x), net(x, y)
                    adapters = _attach(net, method)
                    for found, expected in zip((net(x), net(x, y)), before, strict=True):
                        # With a bias that was not there, torch adds the zeros elsewhere.
                        if exact and bias:
                            assert torch.equal(found, expected)
                        torch.testing.assert_close(found, expected, rtol=1e-5, atol=torch.finfo(dtype).eps)
                    adapters.detach()


@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch", "length"])
@pytest.mark.parametrize("method", METHODS)
def test_output_and_gradients_are_those_of_the_adapted_weights(method: str, batch_first: bool, cross: bool) -> None:
    net = Net(batch_first)
    adapters = _attach(net, method)
    assert adapters.layers == ["attn.in_proj", "attn.out_proj"]
    turn(adapters)
    x = _input().requires_grad_()
    y = _input(3).requires_grad_() if cross else None
    for scale in (1.0, 0.4):
        adapters.scale = scale
        wanted = [*adapters.parameters(), x, *([] if y is None else [y])]
        expected = _expected(net, adapters, x, y)
        assert (expected - _plain(net, x, y)).abs().max() > 1e-3
        found = net(x, y)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
        slow = torch.autograd.grad(expected.pow(3).sum(), wanted)
        for a, b in zip(torch.autograd.grad(found.pow(3).sum(), wanted), slow, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
        again = torch.autograd.grad(checkpoint(net, x, y, use_reentrant=False).pow(3).sum(), wanted)
        for a, b in zip(again, slow, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
        net.eval()
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                torch.testing.assert_close(net(x, y), expected, rtol=1e-10, atol=1e-12)
        net.train()


def _plain(net: Net, x: Tensor, y: Tensor | None) -> Tensor:
    fresh = Net(net.attn.batch_first)
    return fresh(x, y)


@pytest.mark.parametrize("method", METHODS)
def test_one_projection_alone(method: str) -> None:
    for target in ("in_proj", "out_proj"):
        net, x = Net(), _input()
        before = net(x)
        adapters = _attach(net, method, targets=target)
        turn(adapters)
        reference = Net()
        weight, bias = adapters.weight(f"attn.{target}"), adapters.bias(f"attn.{target}")
        layer = reference.attn.out_proj if target == "out_proj" else InProj(reference.attn)
        with torch.no_grad():
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)
        torch.testing.assert_close(net(x), reference(x), rtol=1e-10, atol=1e-12)
        adapters.detach()
        assert type(net.attn) is nn.MultiheadAttention
        assert torch.equal(net(x), before)


def test_a_bias_of_the_joint_projection_alone_reaches_the_fused_kernel() -> None:
    net, x = Net(bias=False), _input()
    adapters = attach(net, "bitfit", targets="in_proj", create=True)
    turn(adapters)
    expected = net(x)
    assert not torch.allclose(expected, Net(bias=False)(x))
    with torch.no_grad():
        torch.testing.assert_close(net.eval()(x), expected)


@pytest.mark.parametrize("method", METHODS)
def test_base_is_untouched_and_merging_is_undone(method: str) -> None:
    net, x = Net(), _input()
    keys, names = list(net.state_dict()), [name for name, _ in net.named_modules()]
    state, before, weight = copy.deepcopy(net.state_dict()), net(x), net.attn.in_proj_weight
    adapters = _attach(net, method)
    assert list(net.state_dict()) == keys
    assert [name for name, _ in net.named_modules()] == names
    assert isinstance(net.attn, nn.MultiheadAttention)
    assert not any(p.requires_grad for p in net.parameters())
    turn(adapters)
    adapted = net(x)
    assert not torch.allclose(adapted, before)
    with adapters.disable():
        assert torch.equal(net(x), before)
        assert net.attn.in_proj_weight is weight
    assert isinstance(net.attn.out_proj, nn.Linear)
    adapters.merge()
    assert net.attn.in_proj_weight is not weight
    torch.testing.assert_close(net(x), adapted, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(net.state_dict()["attn.in_proj_weight"], net.attn.in_proj_weight)
    name = "attn.in_proj_bias" if method == "bitfit" else "attn.in_proj_weight"
    assert not torch.equal(net.state_dict()[name], state[name])
    with adapters.disable():
        assert torch.equal(net(x), before)
    adapters.unmerge()
    assert net.attn._parameters["in_proj_weight"] is weight
    assert torch.equal(net(x), adapted)
    adapters.merge()
    adapters.detach()
    assert type(net.attn) is nn.MultiheadAttention
    assert type(net.attn.out_proj) is type(Net().attn.out_proj)
    assert set(net.attn.__dict__) == set(Net().attn.__dict__)
    assert torch.equal(net(x), before)
    assert all(torch.equal(state[k], v) for k, v in net.state_dict().items())


@pytest.mark.parametrize("method", METHODS)
def test_save_load_and_copies(method: str, tmp_path) -> None:
    net, x = Net(dtype=torch.float32), _input(dtype=torch.float32)
    adapters = _attach(net, method)
    turn(adapters)
    expected = net.eval()(x)
    path = adapters.save(tmp_path / "a.safetensors")
    fresh = Net(dtype=torch.float32).eval()
    assert load(fresh, path).layers == adapters.layers
    assert torch.equal(fresh(x), expected)
    other = Net(dtype=torch.float32)
    with torch.no_grad():
        other.attn.in_proj_weight.mul_(1.1)
    with pytest.raises(UserError, match=r"other base weights \(layer 'attn.in_proj'"):
        load(other, path)
    assert type(other.attn) is nn.MultiheadAttention
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(twin(x), expected)
        own = attached(twin)["default"]
        assert own is not adapters
        turn(own, seed=3)
        assert not torch.equal(twin(x), expected)
        own.detach()
        assert type(twin.attn) is nn.MultiheadAttention
        assert torch.equal(net(x), expected)
    # Nothing is there to merge into or to load from but the state dict.
    bare = Net(dtype=torch.float32).eval()
    adapters.merge()
    bare.load_state_dict(net.state_dict(), strict=method not in ("ssf", "bitfit"))
    torch.testing.assert_close(bare(x), expected)


@pytest.mark.parametrize("method", METHODS)
def test_two_sets(method: str) -> None:
    net, x = Net(), _input()
    lower, upper = _attach(net, method), _attach(net, "lora" if method != "lora" else "oft", "upper", "in_proj")
    turn(lower)
    turn(upper)
    with upper.disable():
        alone = net(x)
    torch.testing.assert_close(alone, _expected(net, lower, x), rtol=1e-10, atol=1e-12)
    both = net(x)
    assert not torch.allclose(both, alone)
    lower.merge()
    torch.testing.assert_close(net(x), both, rtol=1e-10, atol=1e-12)
    lower.unmerge()
    lower.detach()
    assert not torch.allclose(net(x), both)
    upper.detach()
    assert type(net.attn) is nn.MultiheadAttention


@pytest.mark.parametrize("method", METHODS)
def test_encoder_layers_fused_kernel_sees_the_adapters(method: str) -> None:
    """In evaluation without gradients `TransformerEncoderLayer` calls nobody and reads every weight itself."""
    for bias in (True, False):
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            stack = nn.TransformerEncoder(
                nn.TransformerEncoderLayer(D, HEADS, 12, 0.0, batch_first=True, bias=bias), 2
            ).double()
        x = _input()
        padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]])
        with torch.no_grad():
            before = stack.eval()(x)
        adapters = _attach(stack, method)
        with torch.no_grad():
            torch.testing.assert_close(stack(x), before, rtol=1e-12, atol=1e-12)
        turn(adapters)
        expected, masked = (stack.train()(x, src_key_padding_mask=mask) for mask in (None, padding))
        stack.eval()
        for mode in (torch.no_grad, torch.inference_mode):
            with mode(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.testing.assert_close(stack(x), expected, rtol=1e-9, atol=1e-11)
                found = stack(x, src_key_padding_mask=padding)
            torch.testing.assert_close(found[~padding], masked[~padding], rtol=1e-9, atol=1e-11)
        assert (expected - before).abs().max() > 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_low_precision(method: str) -> None:
    net = Net(dtype=torch.bfloat16)
    adapters = _attach(net, method)
    assert all(p.dtype == torch.float32 for p in adapters.parameters())
    turn(adapters)
    x = _input(dtype=torch.bfloat16)
    y = net(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in adapters.parameters())
    full = Net(dtype=torch.float32)
    other = _attach(full, method)
    turn(other)
    expected = full(x.float())
    with torch.autocast("cpu", torch.bfloat16):
        found = full(x.float())
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.05)


TARGETS = ["in_proj", "attn.in_proj", "Linear", "attention", "linear", r".*\.in_proj"]


@pytest.mark.parametrize("target", TARGETS)
def test_targets(target: str) -> None:
    assert "unet.attn.in_proj" in attach({"unet": Net()}, "lora", targets=target).layers


def test_an_attention_module_alone() -> None:
    attention = nn.MultiheadAttention(D, HEADS)
    assert attach(attention, "lora", targets="Linear").layers == ["in_proj", "out_proj"]


def test_adapters_follow_the_module() -> None:
    net = Net()
    adapters = attach(net, "lora", targets="in_proj")
    adapters.to_empty(device="meta")
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        net.to("cpu")


def _takes_dropout(method: str) -> bool:
    # ALLoRA has LoRA's options and refuses this one everywhere.
    return method != "allora" and "dropout" in {f.name for f in fields(plugin.load("adapters", method).Config)}


@pytest.mark.parametrize(
    ("method", "options"),
    [
        *((method, {**declared()[method].options, "dropout": 0.1}) for method in METHODS if _takes_dropout(method)),
        ("mosa", {"experts": 2}),
        ("peft", {"method": "Lora", "options": {"r": 2, "lora_dropout": 0.1}}),
    ],
)
def test_chance_in_training_is_refused(method: str, options: dict) -> None:
    net = Net()
    with pytest.raises(UserError, match=r"'attn.in_proj' is read by its attention module.*dropout"):
        attach(net, method, targets="in_proj", **options)
    assert type(net.attn) is nn.MultiheadAttention
    attach(nn.ModuleDict({"layer": nn.Linear(8, 8)}), method, targets="layer", **options)


@pytest.mark.parametrize("target", ["in_proj", "Linear"])
def test_separate_projections_are_refused(target: str) -> None:
    with pytest.raises(UserError, match=r"'attn.in_proj' cannot be adapted: .*kdim"):
        attach(Net(kdim=4, vdim=6), "lora", targets=target)
    assert attach(Net(kdim=4), "lora", targets="out_proj").layers == ["attn.out_proj"]


def test_a_failing_adapter_is_no_base_model() -> None:
    net = Net()
    adapters = attach(net, "lora", targets="in_proj")
    del adapters.adapters()["attn.in_proj"].up
    with pytest.raises(RuntimeError, match="an adapter of 'in_proj' failed"):
        net(_input())


def test_exports(tmp_path) -> None:
    net = Net(dtype=torch.float32)
    adapters = attach({"unet": net}, "lora", targets=["in_proj", "out_proj"], rank=2)
    turn(adapters)
    keys = keys_of("sd", {"unet": net})
    for kind in ("diffusers", "kohya"):
        with pytest.raises(UserError, match=r"'unet\.attn\.in_proj' is the joint weight"):
            export(adapters, tmp_path / "x.safetensors", kind, dtype=torch.float32, keys=keys)
    with pytest.raises(UserError, match="PEFT"):
        export(adapters, tmp_path / "folder", "peft", dtype=torch.float32)
    done = export(adapters, tmp_path / "diff.safetensors", "diff", dtype=torch.float32, keys=keys)
    from safetensors.torch import load_file

    written = load_file(done.path)
    assert set(written) == {"lora_unet_attn_in_proj_weight.diff", "lora_unet_attn_out_proj.diff"}
    expected = adapters.weight("unet.attn.in_proj") - net.attn._parameters["in_proj_weight"]
    torch.testing.assert_close(written["lora_unet_attn_in_proj_weight.diff"], expected)
    dense = attach({"unet": Net(dtype=torch.float32)}, "dense", targets="in_proj")
    turn(dense)
    export(dense, done.path, "diff", dtype=torch.float32, keys=keys)
    assert set(load_file(done.path)) == {"lora_unet_attn_in_proj_weight.diff", "lora_unet_attn_in_proj_bias.diff"}


def test_lora_files_find_it(tmp_path) -> None:
    from safetensors.torch import save_file

    save_file(
        {"unet.attn.in_proj.lora_A.weight": torch.ones(2, D), "unet.attn.in_proj.lora_B.weight": torch.ones(3 * D, 2)},
        tmp_path / "lora.safetensors",
    )
    net = Net(dtype=torch.float32)
    adapters = read_lora(tmp_path / "lora.safetensors", {"unet": net})
    torch.testing.assert_close(adapters.change("unet.attn.in_proj")[0], torch.full((3 * D, D), 2.0))


@pytest.mark.parametrize("tower", ["visual", "text"])
@pytest.mark.parametrize("method", ["lora", "oft"])
def test_open_clip_tower_trains(tower: str, method: str) -> None:
    from open_clip.model import CLIP

    torch.manual_seed(0)
    clip: nn.Module = CLIP(
        16,
        {"image_size": 16, "patch_size": 8, "width": 16, "layers": 2, "head_width": 8},
        {"context_length": 7, "vocab_size": 50, "width": 16, "heads": 2, "layers": 2},
    )
    clip.requires_grad_(False)
    keys = list(clip.state_dict())
    data = torch.randint(1, 50, (4, 7)) if tower == "text" else torch.randn(4, 3, 16, 16)
    encode = clip.encode_text if tower == "text" else clip.encode_image
    target, before = torch.randn(4, 16), encode(data)
    targets = r"visual\..*\.(in|out)_proj" if tower == "visual" else r"transformer\..*\.(in|out)_proj"
    adapters = attach(clip, method, targets=targets, **declared()[method].options)
    assert len(adapters.layers) == 4
    torch.testing.assert_close(encode(data), before)
    optimizer, losses = torch.optim.AdamW(adapters.parameters(), 0.03), []
    for _ in range(8):
        loss = (encode(data) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        adapters.after_step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.98 * losses[0]
    assert list(clip.state_dict()) == keys
    with adapters.disable():
        assert torch.equal(encode(data), before)
    clip.eval()
    with torch.inference_mode():
        assert float((encode(data) - target).square().mean()) < losses[-1] + 1e-3
