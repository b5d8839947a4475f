"""What other tools' files hold comes in exactly, by PEFT's layers and each format's formula; the rest is named."""

from __future__ import annotations

import peft
import pytest
import torch
from contracts.declared import turned
from peft import LoHaConfig, LoKrConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from tiny import tiny_pipe
from torch import nn

from visiontune.adapters import attach
from visiontune.errors import UserError
from visiontune.weights.keys import keys_of
from visiontune.weights.keys.sd import ldm_names
from visiontune.weights.lora_files import read_lora

BLOCK = "mid_block.attentions.0.transformer_blocks.0"
Q, OUT, FF = f"{BLOCK}.attn1.to_q", f"{BLOCK}.attn1.to_out.0", f"{BLOCK}.ff.net.2"


class Net(nn.Module):
    """A linear layer, one without a bias, a 3x3 convolution, one of 1x1, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(12, 8), nn.Linear(8, 8, bias=False)
        self.conv, self.point, self.norm = nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 4, 1), nn.GroupNorm(2, 6)

    def forward(self, x):
        y = self.two(torch.tanh(self.one(x)))
        return self.point(self.norm(self.conv(y.view(-1, 4, 2, 1))))


X = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))
ALL = ["one", "two", "conv", "point"]


def read(tmp_path, tensors, metadata=None, modules=None, family="sd"):
    modules = modules or {"unet": Net()}
    save_file({key: value.clone().contiguous() for key, value in tensors.items()}, tmp_path / "x.safetensors", metadata)
    return read_lora(tmp_path / "x.safetensors", modules, keys_of(family, modules))


def drawn(*shape, seed=3):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


# ----------------------------------------------------------------------------------------------------- names of layers

ALPHA = torch.tensor(1.5)


def spellings():
    """One LoRA of a UNet's layers under every name that tools have for it."""
    pipe = tiny_pipe()
    layers = {name: pipe.unet.get_submodule(name) for name in (Q, OUT, FF)}
    ldm, found = ldm_names(pipe.unet), {}

    def lora(name_of, down, up, alpha=".alpha"):
        tensors = {}
        for name, layer in layers.items():
            out, inputs = layer.weight.shape
            stem = name_of(name)
            tensors |= {stem + down: drawn(3, inputs), stem + up: drawn(out, 3)}
            if alpha:
                tensors[stem + alpha] = ALPHA
        return tensors

    kohya, dotted = (".lora_down.weight", ".lora_up.weight"), (".lora_A.weight", ".lora_B.weight")
    found["kohya"] = lora(lambda n: "lora_unet_" + n.replace(".", "_"), *kohya)
    found["kohya, Stability"] = lora(lambda n: "lora_unet_" + ldm[n].replace(".", "_"), *kohya)
    for prefix in ("lora_unet", "unet", "diffusion_model", "model.diffusion_model"):
        found[f"dots, {prefix}, Stability"] = lora(lambda n, p=prefix: f"{p}.{ldm[n]}", *kohya)
        found[f"dots, {prefix}"] = lora(lambda n, p=prefix: f"{p}.{n}", *kohya)
    found["PEFT"] = lora(lambda n: f"unet.{n}", *dotted)
    found["PEFT, whole names"] = lora(lambda n: f"unet.base_model.model.{n}", *dotted)
    found["PEFT, no component"] = lora(lambda n: f"base_model.model.{n}", *dotted)
    found["PEFT, adapter's name"] = lora(lambda n: f"unet.{n}", ".lora_A.default_0.weight", ".lora_B.default_0.weight")
    found["diffusers, .lora."] = lora(lambda n: f"unet.{n}", ".lora.down.weight", ".lora.up.weight")

    def processor(name):
        return name.removesuffix(".0").replace(".to_", ".processor.to_")

    del layers[FF]
    old = "_lora.down.weight", "_lora.up.weight"
    found["diffusers, processors"] = lora(lambda n: f"unet.{processor(n)}", *old, alpha="_lora.alpha")
    found["diffusers, processors alone"] = lora(processor, *old, alpha="_lora.alpha")
    return found


SPELLINGS = spellings()


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_layers_name_is_known_in_every_spelling(spelling, tmp_path):
    pipe = tiny_pipe()
    adapters = read(tmp_path, SPELLINGS[spelling], modules={"unet": pipe.unet, "text_encoder": pipe.text_encoder})
    expected = [Q, OUT] if "processors" in spelling else [Q, OUT, FF]
    assert sorted(adapters.layers) == sorted(f"unet.{name}" for name in expected)
    for layer in adapters.layers:
        out, inputs = adapters.layer(layer).weight.shape
        torch.testing.assert_close(adapters.change(layer)[0], 0.5 * drawn(out, 3) @ drawn(3, inputs))


TEXT = {
    "first": ("text_encoder.text_model.encoder.layers.0.self_attn.to_{}_lora.{}.weight", {"q": "q", "out": "out"}),
    "linear layers": (
        "text_encoder.text_model.encoder.layers.0.self_attn.{}_proj.lora_linear_layer.{}.weight",
        {"q": "q", "out": "out"},
    ),
    "transformers 5": (
        "text_encoder.encoder.layers.0.self_attn.{}_proj.lora_{}.weight", {"q": "q", "out": "out"}
    ),
    "ComfyUI": (
        "text_encoders.clip_l.transformer.text_model.encoder.layers.0.self_attn.{}_proj.lora_{}.weight",
        {"q": "q", "out": "out"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("spelling", TEXT)
@pytest.mark.parametrize("level", [False, True])
def test_text_encoders_of_both_versions_of_transformers(spelling, level, tmp_path):
    """Files have the level ``text_model`` or not, and so do models."""
    pattern, words = TEXT[spelling]
    encoder, tensors = tiny_pipe().text_encoder, {}
    width = encoder.config.hidden_size
    for word in words:
        tensors |= {pattern.format(word, "down"): drawn(2, width), pattern.format(word, "up"): drawn(width, 2)}
    inner = nn.Module()
    inner.text_model = encoder
    adapters = read(tmp_path, tensors, modules={"text_encoder": inner if level else encoder})
    ends = {layer.rpartition(".")[2] for layer in adapters.layers}
    assert ends == {"q_proj", "out_proj"}
    for layer in adapters.layers:
        torch.testing.assert_close(adapters.change(layer)[0], drawn(width, 2) @ drawn(2, width))


@pytest.mark.parametrize("level", [False, True])
def test_peft_folders_of_both_versions_of_transformers(level, tmp_path):
    from visiontune.weights.peft_folders import read_peft

    for config in (
        peft.LoraConfig(r=2, lora_alpha=3, alpha_pattern={r"(text_model\.)?encoder.layers.0.*q_proj": 5},
                        target_modules=["q_proj", "fc1"]),
        peft.OFTConfig(r=0, oft_block_size=4, target_modules=["q_proj"], use_cayley_neumann=False),
        peft.BOFTConfig(boft_block_size=4, target_modules=["q_proj"]),
    ):  # fmt: skip
        ids = torch.arange(6)[None]
        written, wrapped, mine = tiny_pipe().text_encoder, nn.Module(), tiny_pipe().text_encoder
        wrapped.text_model = written
        theirs = turned(get_peft_model(wrapped if level else written, config), 0.05).eval()
        theirs.save_pretrained(str(tmp_path))
        expected = written(ids)[0]
        read_peft(tmp_path, {"text_encoder": mine})
        torch.testing.assert_close(mine(ids)[0], expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(tiny_pipe().text_encoder(ids)[0], expected, atol=1e-3)


# --------------------------------------------------------------------------------------------- changes of whole weights

LYCORIS = {
    "loha": LoHaConfig(r=2, alpha=3, target_modules=ALL),
    "loha, tucker": LoHaConfig(r=2, alpha=3, target_modules=ALL, use_effective_conv2d=True),
    "lokr": LoKrConfig(r=1, alpha=3, target_modules=["one", "two", "conv"]),
    "lokr, both": LoKrConfig(r=1, alpha=3, target_modules=["one", "conv"], decompose_both=True, decompose_factor=2),
    "lokr, tucker": LoKrConfig(r=1, alpha=3, target_modules=["conv"], use_effective_conv2d=True, decompose_factor=2),
}


@pytest.mark.parametrize("case", LYCORIS)
def test_loha_and_lokr_act_as_pefts_layers_do(case, tmp_path):
    config = LYCORIS[case]
    theirs = turned(get_peft_model(Net(), config), 0.3).eval()
    tensors = {}
    for key, value in get_peft_model_state_dict(theirs).items():
        layer, _, part = key.removeprefix("base_model.model.").rpartition(".")
        tensors |= {f"lora_unet_{layer}.{part}": value, f"lora_unet_{layer}.alpha": torch.tensor(3.0)}
    mine = Net()
    adapters = read(tmp_path, tensors, modules={"unet": mine})
    assert adapters.method == "dense"
    torch.testing.assert_close(mine(X), theirs(X), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(Net()(X), mine(X), atol=1e-2)
    assert "tucker" not in case or any("_t" in key for key in tensors)


def kron(a, b):
    return torch.cat([torch.cat([a[i, j] * b for j in range(a.shape[1])], 1) for i in range(a.shape[0])], 0)


def test_two_whole_factors_of_lokr_have_no_strength(tmp_path):
    w1, w2 = drawn(2, 3), drawn(4, 4)
    tensors = {"lora_unet_one.lokr_w1": w1, "lora_unet_one.lokr_w2": w2, "lora_unet_one.alpha": torch.tensor(7.0)}
    torch.testing.assert_close(read(tmp_path, tensors).change("unet.one")[0], kron(w1, w2))
    tensors["lora_unet_one.scalar"] = torch.tensor([0.5])
    torch.testing.assert_close(read(tmp_path, tensors).change("unet.one")[0], 0.5 * kron(w1, w2))


def test_a_locon_with_a_core_is_a_lora(tmp_path):
    up, mid, down = drawn(6, 2, 1, 1), drawn(2, 2, 3, 3), drawn(2, 4, 1, 1)
    stem = "lora_unet_conv"
    tensors = {f"{stem}.lora_up.weight": up, f"{stem}.lora_mid.weight": mid, f"{stem}.lora_down.weight": down}
    adapters = read(tmp_path, {**tensors, f"{stem}.alpha": torch.tensor(1.0)})
    assert adapters.method == "lora"
    x = drawn(1, 4, 5, 5)
    expected = nn.functional.conv2d(nn.functional.conv2d(nn.functional.conv2d(x, down), mid, padding=1), up) / 2
    found = nn.functional.conv2d(x, adapters.change("unet.conv")[0], padding=1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("columns", [False, True])
def test_loha_with_lengths(columns, tmp_path):
    tensors = {f"lora_unet_conv.hada_w{i}_a": drawn(6, 2, seed=i) for i in (1, 2)}
    tensors |= {f"lora_unet_conv.hada_w{i}_b": drawn(2, 36, seed=i) for i in (1, 2)}
    lengths = tensors["lora_unet_conv.dora_scale"] = drawn(*((1, 4, 1, 1) if columns else (6, 1, 1, 1))).abs()
    product = (drawn(6, 2, seed=1) @ drawn(2, 36, seed=1)) * (drawn(6, 2, seed=2) @ drawn(2, 36, seed=2))
    v = Net().conv.weight + product.view(6, 4, 3, 3)
    kept = [0, 2, 3] if columns else [1, 2, 3]
    expected = lengths * v / v.square().sum(kept, keepdim=True).sqrt()
    torch.testing.assert_close(read(tmp_path, tensors).weight("unet.conv"), expected, rtol=1e-4, atol=1e-5)


def turns(blocks, bound):
    q = blocks - blocks.mT
    q = q * min(1.0, bound / float(q.norm()))
    one = torch.eye(q.shape[-1])
    return (one + q) @ torch.linalg.inv(one - q)


@pytest.mark.parametrize(
    ("stem", "alpha", "bound"),
    [("oft_unet", 0.01, 0.06), ("oft_unet", 0.0, 0.0), ("oft_unet", 100.0, 1e9), ("lora_unet", 0.0, 1e9),
     ("lora_unet", 0.01, 0.06)],
)  # fmt: skip
@pytest.mark.parametrize("rescaled", [False, True])
def test_oft_of_kohyas_scripts_and_of_lycoris(stem, alpha, bound, rescaled, tmp_path):
    """Blocks of outputs are turned; alpha times the outputs bounds all of Q, but 0 only in kohya's scripts."""
    blocks, rescale = drawn(3, 2, 2), drawn(6, 1, 1, 1) if rescaled else torch.ones(6, 1, 1, 1)
    tensors = {f"{stem}_conv.oft_blocks": blocks, f"{stem}_conv.alpha": torch.tensor(alpha)}
    adapters = read(tmp_path, {**tensors, **({f"{stem}_conv.rescale": rescale} if rescaled else {})})
    w = Net().conv.weight.view(3, 2, -1)
    expected = rescale * torch.einsum("knm,kn...->km...", turns(blocks, bound), w).reshape(6, 4, 3, 3)
    torch.testing.assert_close(adapters.weight("unet.conv"), expected, rtol=1e-4, atol=1e-5)


def test_differences_of_weights_biases_and_norms(tmp_path):
    tensors = {
        "lora_unet_norm.w_norm": drawn(6), "lora_unet_norm.b_norm": drawn(6, seed=9),
        "lora_unet_conv.diff": drawn(6, 4, 3, 3), "lora_unet_point.diff_b": drawn(4),
        "lora_unet_one.lora_down.weight": drawn(2, 12), "lora_unet_one.lora_up.weight": drawn(8, 2),
        "lora_unet_one.diff_b": drawn(8),
    }  # fmt: skip
    mine, expected = Net(), Net()
    read(tmp_path, tensors, modules={"unet": mine})
    with torch.no_grad():
        expected.norm.weight += drawn(6)
        expected.norm.bias += drawn(6, seed=9)
        expected.conv.weight += drawn(6, 4, 3, 3)
        expected.point.bias += drawn(4)
        expected.one.weight += drawn(8, 2) @ drawn(2, 12)
        expected.one.bias += drawn(8)
    torch.testing.assert_close(mine(X), expected(X), rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match=r"'unet\.two' has a change of its bias that the model's layer does not take"):
        read(tmp_path, {"lora_unet_two.diff_b": drawn(8)}, modules={"unet": (fresh := Net())})
    assert type(fresh.two) is nn.Linear


def test_bundled_embeddings_are_set_aside_and_said(tmp_path):
    good = {"lora_unet_one.lora_down.weight": drawn(2, 12), "lora_unet_one.lora_up.weight": drawn(8, 2)}
    emb = {"bundle_emb.sks.string_to_param.*": drawn(1, 8), "bundle_emb.dog.string_to_param.*": drawn(1, 8)}
    with pytest.warns(UserWarning, match="the embeddings bundled with it are left out: dog, sks"):
        adapters = read(tmp_path, good | emb)
    torch.testing.assert_close(adapters.change("unet.one")[0], drawn(8, 2) @ drawn(2, 12))
    with pytest.raises(UserError, match="changes no layer"):
        read(tmp_path, emb)


# ------------------------------------------------------------------------------------------------------ what is refused

DOWN, UP = "lora_unet_one.lora_down.weight", "lora_unet_one.lora_up.weight"
GOOD = {DOWN: drawn(2, 12), UP: drawn(8, 2)}
ONE = "lora_unet_one"
BAD = {
    "PEFT's OFT": ({"unet.one.oft_R.weight": drawn(2, 6)}, "belongs to PEFT's OFT, which is read from the folder"),
    "LyCORIS's first OFT": ({f"{ONE}.oft_diag": drawn(4, 2, 2)}, "belongs to the first OFT of LyCORIS, a format that"),
    "BOFT": ({f"{ONE}.oft_blocks": drawn(2, 2, 2, 2)}, "is BOFT of LyCORIS, a format that is not read"),
    "GLoRA": ({f"{ONE}.a1.weight": drawn(2, 2)}, "GLoRA of LyCORIS, a format that is not read"),
    "IA3": ({f"{ONE}.weight": drawn(8, 1), f"{ONE}.on_input": torch.tensor(0)}, "no key of an adapter|IA3"),
    "embedding": ({"unet.one.lora_embedding_A": drawn(2, 2)}, "LoRA of an embedding"),
    "biases": ({**GOOD, "unet.one.lora_B.bias": drawn(8)}, "PEFT's LoRA with biases"),
    "a whole model": ({"model.diffusion_model.out.0.weight": drawn(3)}, "is no key of an adapter that is read here"),
    "two adapters": (
        {"unet.one.lora_A.a.weight": drawn(2, 12), "unet.one.lora_B.a.weight": drawn(8, 2),
         "unet.one.lora_A.b.weight": drawn(2, 12)}, r"holds several adapters \(a, b\)"),
    "twice": ({**GOOD, "unet.one.lora_A.weight": drawn(2, 12)}, "are the same part of one layer"),
    "visiontune's own": ({"unet.one.down": drawn(2, 12)}, "is an adapter of visiontune already"),
    "NaN": ({**GOOD, UP: drawn(8, 2) * float("nan")}, "has values that are not finite"),
    "infinite alpha": ({**GOOD, f"{ONE}.alpha": torch.tensor(float("inf"))}, "has values that are not finite"),
    "alpha NaN": ({**GOOD, f"{ONE}.alpha": torch.tensor(float("nan"))}, "has values that are not finite"),
    "values too large": ({**GOOD, UP: drawn(8, 2) * 1e30, f"{ONE}.alpha": torch.tensor(1e30)}, "too large for a"),
    "whole numbers": ({**GOOD, UP: drawn(8, 2).long()}, "is of torch.int64, as no part of an adapter is"),
    "complex numbers": ({**GOOD, UP: drawn(8, 2) * 1j}, "is of torch.complex64, as no part of an adapter is"),
    "alpha vector": ({**GOOD, f"{ONE}.alpha": drawn(2)}, "has 2 values of alpha, not one"),
    "empty alpha": ({**GOOD, f"{ONE}.alpha": drawn(0)}, "has 0 values of alpha, not one"),
    "rank 0": ({DOWN: drawn(0, 12), UP: drawn(8, 0)}, "do not fit each other"),
    "scalars": ({DOWN: drawn(), UP: drawn()}, "do not fit each other"),
    "one dimension": ({DOWN: drawn(12), UP: drawn(8)}, "do not fit each other"),
    "mismatch": ({DOWN: drawn(4, 12), UP: drawn(8, 2)}, "do not fit each other"),
    "no down": ({UP: drawn(8, 2)}, "has no down factor"),
    "alpha alone": ({f"{ONE}.alpha": torch.tensor(1.0)}, "has 'alpha', but not what belongs to it"),
    "two kinds": ({**GOOD, f"{ONE}.diff": drawn(8, 12)}, "has 'diff', but not what belongs to it"),
    "half a LoHa": ({f"{ONE}.hada_w1_a": drawn(8, 2), f"{ONE}.hada_w1_b": drawn(2, 12)}, "has no hada_w2_a"),
    "LoHa that fills the memory": (
        {f"{ONE}.hada_w{i}_{half}": torch.zeros((10**6, 1) if half == "a" else (1, 10**6))
         for i in (1, 2) for half in "ab"}, "the model's weight"),
    "LoKr that fills the memory": (
        {f"{ONE}.lokr_w1": torch.zeros(1000, 1000), f"{ONE}.lokr_w2": torch.zeros(1000, 1000)}, "the model's weight"),
    "LoKr of another model": ({f"{ONE}.lokr_w1": drawn(2, 2), f"{ONE}.lokr_w2": drawn(2, 2)}, "the model's weight"),
    "LoKr of no matrices": ({f"{ONE}.lokr_w1": drawn(96), f"{ONE}.lokr_w2": drawn(1)}, "the model's weight"),
    "OFT of another model": ({f"{ONE}.oft_blocks": drawn(3, 2, 2)}, "the model's weight"),
    "OFT without dimensions": ({f"{ONE}.oft_blocks": drawn(8)}, "do not fit each other"),
    "diff of another model": ({f"{ONE}.diff": drawn(8, 13)}, "the model's weight"),
    "transposed diff": ({f"{ONE}.diff": drawn(12, 8)}, "the model's weight"),
    "lengths of another model": ({**GOOD, f"{ONE}.dora_scale": drawn(7, 1)}, "do not fit each other"),
    "nothing": ({}, "holds no tensors"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_file_that_cannot_be_read_is_one_line_that_names_why(case, tmp_path):
    tensors, message = BAD[case]
    net = Net()
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path, tensors, {"visiontune_format": "1"} if "visiontune" in case else None, {"unet": net})
    text = str(caught.value)
    assert "\n" not in text
    assert not ("a format that" in text and "trained on" in text)
    assert [type(layer) for layer in net.children()] == [type(layer) for layer in Net().children()]


def test_kohyas_names_of_a_family_without_them_are_said(tmp_path):
    net = Net()
    with pytest.raises(UserError, match="kohya's names of layers are not known for the family 'amused'"):
        read(tmp_path, GOOD, modules={"transformer": net}, family="amused")


@pytest.mark.timeout(20)
def test_a_pipe_is_not_read_for_ever(tmp_path):
    import os

    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(UserError, match="is a pipe or a device"):
        read_lora(tmp_path / "pipe.safetensors", {"unet": Net()})


# ------------------------------------------------------------------------------------ the names of the joint projection


def test_the_joint_weight_of_an_attention_comes_back(tmp_path):
    from visiontune.weights.export import export

    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

    model, back = Attends(), Attends()
    keys = keys_of("sd", {"unet": model})
    adapters = turned(attach({"unet": model}, "dense", targets=["in_proj", "out_proj"]), 0.1)
    export(adapters, tmp_path / "a.safetensors", "diff", dtype=torch.float32, keys=keys)
    read_lora(tmp_path / "a.safetensors", {"unet": back}, keys)
    x = drawn(2, 3, 8)
    torch.testing.assert_close(back.attn(x, x, x)[0], model.attn(x, x, x)[0])
    assert not torch.allclose(Attends().attn(x, x, x)[0], back.attn(x, x, x)[0], atol=1e-2)
