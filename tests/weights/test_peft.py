"""PEFT folders, in both directions, judged by PEFT itself; and LoRA files of any origin."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from contracts.declared import turned
from peft import BOFTConfig, LoraConfig, OFTConfig, PeftModel, get_peft_model
from peft.tuners.boft.layer import BOFTLayer
from safetensors.torch import load_file, save_file
from tiny import tiny_pipe
from torch import nn

from visiontune.adapters import attach
from visiontune.errors import UserError
from visiontune.weights.export import export
from visiontune.weights.keys import keys_of
from visiontune.weights.lora_files import read_lora
from visiontune.weights.peft_folders import read_peft


class Net(nn.Module):
    """Two linear layers and a 1x1 convolution."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.point = nn.Linear(16, 24), nn.Linear(24, 16), nn.Conv2d(16, 8, 1)

    def forward(self, x):
        y = self.two(torch.tanh(self.one(x)))
        return self.point(y.mT[..., None]).squeeze(-1)


X = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1))
LINEAR = ["one", "two"]
CASES = {
    "lora": ("lora", {"rank": 3, "alpha": 5.0}, ["one", "point"]),
    "dora": ("lora", {"rank": 3, "alpha": 5.0, "dora": True}, ["one", "point"]),
    "oft": ("oft", {"block_size": 8}, LINEAR),
    "oft, series": ("oft", {"block_size": 4, "cayley": "neumann", "terms": 6}, LINEAR),
    "oft, shared": ("oft", {"block_size": 8, "block_share": True}, LINEAR),
    "oft, blocks": ("oft", {"n_blocks": 4}, LINEAR),
    "oft, shared blocks": ("oft", {"n_blocks": 2, "block_share": True}, LINEAR),
    "nlora": ("nlora", {"rank": 3}, LINEAR),
    "oft, 1x1": ("oft", {"block_size": 8}, ["point"]),
    "boft": ("boft", {"block_size": 4, "factors": 1}, LINEAR),
    "boft, rescaled": ("boft", {"block_size": 4, "factors": 1, "rescale": True}, LINEAR),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_peft_loads_what_is_written_and_gives_the_same(case, scale, tmp_path):
    method, options, targets = CASES[case]
    net = Net()
    adapters = turned(attach({"unet": net}, method, targets=targets, **options), 0.1)
    adapters.scale = scale
    export(adapters, tmp_path / "folder", "peft", dtype=torch.float32)
    theirs = PeftModel.from_pretrained(Net(), str(tmp_path / "folder")).eval()
    torch.testing.assert_close(theirs(X), net(X), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(Net()(X), net(X), atol=1e-2)
    back = Net()
    read_peft(tmp_path / "folder", {"unet": back})
    torch.testing.assert_close(back(X), net(X), rtol=1e-4, atol=1e-5)


CONFIGS = {
    "lora": LoraConfig(r=4, lora_alpha=6, target_modules=["one", "point"]),
    "rslora, patterns": LoraConfig(
        r=4, lora_alpha=6, use_rslora=True, rank_pattern={"two": 2}, alpha_pattern={"two": 3}, target_modules=LINEAR
    ),
    "dora": LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=["one", "point"]),
    "oft exact": OFTConfig(r=0, oft_block_size=8, use_cayley_neumann=False, target_modules=LINEAR),
    "oft series": OFTConfig(r=0, oft_block_size=8, num_cayley_neumann_terms=4, target_modules=LINEAR),
    "oft blocks": OFTConfig(r=4, oft_block_size=0, use_cayley_neumann=False, target_modules=["one"]),
    "boft": BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=1, target_modules=LINEAR),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_what_peft_trained_acts_here_as_there(case, tmp_path):
    theirs = turned(get_peft_model(Net(), copy.deepcopy(CONFIGS[case])), 0.1)
    theirs.save_pretrained(str(tmp_path))
    mine = Net()
    read_peft(tmp_path, {"unet": mine})
    torch.testing.assert_close(mine(X), theirs(X), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(Net()(X), mine(X), atol=1e-2)


def test_several_butterfly_factors_are_multiplied_in_pefts_order(tmp_path):
    """PEFT runs more than one factor with a CUDA extension only, so its product is formed from its own parts."""
    net, b, m = Net(), 4, 3
    adapters = turned(attach({"unet": net}, "boft", targets=["one"], block_size=b, factors=m), 0.3)
    export(adapters, tmp_path / "folder", "peft", dtype=torch.float32)
    blocks = load_file(tmp_path / "folder" / "adapter_model.safetensors")["base_model.model.one.boft_R"]
    parts = BOFTLayer(nn.Linear(16, 24))
    product = torch.eye(16)
    for i in range(m):
        p = parts.perm2mat(parts.block_butterfly_perm(16, 4 // 2**i, b // 2, m - 1))
        skewed = (blocks[i] - blocks[i].mT) / 2
        turn = torch.linalg.solve(torch.eye(b) + skewed, torch.eye(b) - skewed, left=False)
        product = p @ torch.block_diag(*turn) @ p.T @ product
    torch.testing.assert_close(adapters.weight("unet.one"), (product @ Net().one.weight.T).T, rtol=1e-4, atol=1e-5)
    back = Net()
    read_peft(tmp_path / "folder", {"unet": back})
    torch.testing.assert_close(back(X), net(X), rtol=1e-5, atol=1e-6)


def test_what_pefts_formats_cannot_hold_is_refused(tmp_path):
    with pytest.raises(UserError, match="no format for 'sara'"):
        export(attach({"unet": Net()}, "sara", targets=LINEAR), tmp_path / "a", "peft", dtype=torch.float32)
    kernel = nn.Sequential(nn.Conv2d(4, 4, 3))
    with pytest.raises(UserError, match="convolution with a kernel"):
        export(
            attach({"unet": kernel}, "oft", targets=["0"], block_size=4), tmp_path / "a", "peft", dtype=torch.float32
        )
    with pytest.raises(UserError, match="one block size"):
        export(
            attach({"unet": Net()}, "oft", targets=LINEAR, block_size=16), tmp_path / "a", "peft", dtype=torch.float32
        )
    groups = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))
    with pytest.raises(UserError, match=r"unet\.0' is a convolution in groups, of which PEFT reads other factors"):
        export(attach({"unet": groups}, "lora", targets=["0"], dora=True), tmp_path / "a", "peft", dtype=torch.float32)
    assert not (tmp_path / "a").exists()


def test_a_rank_makes_a_lora_of_any_method(tmp_path):
    net = Net()
    adapters = turned(attach({"unet": net}, "oft", targets=LINEAR, block_size=8), 0.1)
    done = export(adapters, tmp_path / "folder", "peft", dtype=torch.float32, rank=16)
    theirs = PeftModel.from_pretrained(Net(), str(tmp_path / "folder")).eval()
    torch.testing.assert_close(theirs(X), net(X), rtol=1e-4, atol=1e-5)
    assert done.worst < 1e-5 and set(done.ranks.values()) == {16}


def test_butterflies_that_peft_may_not_load_are_said(tmp_path, monkeypatch):
    """Without its CUDA extension PEFT sets the number of factors to one, whatever the folder has."""
    monkeypatch.setattr("peft.tuners.boft.layer.get_fbd_cuda", lambda: None)
    for factors in (1, 2):
        net, out = Net(), tmp_path / str(factors)
        adapters = turned(attach({"unet": net}, "boft", targets=LINEAR, block_size=4, factors=factors), 0.3)
        done = export(adapters, out, "peft", dtype=torch.float32)
        assert any("CUDA extension" in note for note in done.notes) is (factors == 2)
    PeftModel.from_pretrained(Net(), str(tmp_path / "1"))
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(Net(), str(tmp_path / "2"))


def test_ranks_may_differ_from_layer_to_layer(tmp_path):
    net = Net()
    one = turned(attach({"unet": net}, "lora", targets=["one", "two"], rank=3, alpha=5.0, name="one"), 0.1)
    two = turned(attach({"unet": net}, "lora", targets=["two"], rank=2, name="two"), 0.1)
    two.scale = -0.4
    done = export([one, two], tmp_path / "folder", "peft", dtype=torch.float32)
    assert done.ranks == {"unet.one": 3, "unet.two": 5}
    theirs = PeftModel.from_pretrained(Net(), str(tmp_path / "folder")).eval()
    torch.testing.assert_close(theirs(X), net(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_folders_of_text_encoders_act_whatever_the_version_of_transformers(family, tmp_path):
    """Before 5 CLIP's layers lie a level deeper, under `text_model`; PEFT leaves out what it finds no layer for."""
    for component in ("text_encoder", "text_encoder_2")[: 1 + (family == "sdxl")]:
        pipe, fresh, ids = tiny_pipe(family), tiny_pipe(family), torch.arange(8)[None]
        module = getattr(pipe, component)
        adapters = turned(attach({component: module}, "lora", targets=["q_proj", "fc1"], rank=2))
        out, keys = tmp_path / component, keys_of(family, {component: module})
        export(adapters, out, "peft", dtype=torch.float32, keys=keys)
        now = PeftModel.from_pretrained(getattr(fresh, component), str(out)).eval()
        torch.testing.assert_close(now(ids)[0], module(ids)[0], rtol=1e-4, atol=1e-5)
        deep = Deep(getattr(tiny_pipe(family), component))
        before = PeftModel.from_pretrained(deep, str(out)).eval()
        torch.testing.assert_close(before(ids)[0], module(ids)[0], rtol=1e-4, atol=1e-5)
        plain = getattr(tiny_pipe(family), component)
        assert not torch.allclose(plain(ids)[0], module(ids)[0], atol=1e-2)
        assert set(read_peft(out, {component: plain}).layers) == set(adapters.layers)
        torch.testing.assert_close(plain(ids)[0], module(ids)[0], rtol=1e-4, atol=1e-5)


class Deep(nn.Module):
    """A text encoder as before transformers 5."""

    def __init__(self, encoder):
        super().__init__()
        self.text_model = getattr(encoder, "text_model", encoder)
        self.whole = None if self.text_model is encoder else [encoder]

    def forward(self, ids):
        return (self.whole[0] if self.whole else self.text_model)(ids)


def test_unreadable_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"there is no adapter_config\.json of PEFT's folder"):
        read_peft(tmp_path, {"unet": Net()})
    get_peft_model(Net(), peft.VeraConfig(target_modules=["one"])).save_pretrained(str(tmp_path / "vera"))
    with pytest.raises(UserError, match="holds PEFT's VERA; readable are LORA, OFT, BOFT"):
        read_peft(tmp_path / "vera", {"unet": Net()})


# ---------------------------------------------------------------------------------------------------- LoRA files

TARGETS = ["to_q", "to_out.0", "conv1", "proj_in", "q_proj", "out_proj"]


def parts(pipe):
    return {"unet": pipe.unet, "text_encoder": pipe.text_encoder}


def output(pipe):
    ids = pipe.tokenizer(["a word"], padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
        return pipe.unet(noise, torch.tensor([500]), pipe.text_encoder(ids)[0]).sample


@pytest.mark.parametrize("kind", ["diffusers", "kohya"])
def test_an_exported_file_comes_back(kind, tmp_path):
    pipe, back = tiny_pipe(), tiny_pipe()
    file = tmp_path / "lora.safetensors"
    adapters = turned(attach(parts(pipe), "lora", targets=TARGETS, rank=3, alpha=6.0))
    export(adapters, file, kind, dtype=torch.float32, keys=keys_of("sd", parts(pipe)))
    adapters = read_lora(file, parts(back), keys_of("sd", parts(back)))
    torch.testing.assert_close(output(back), output(pipe), rtol=1e-4, atol=1e-5)
    assert len(adapters.layers) == len(load_file(file)) // (3 if kind == "kohya" else 2)


def test_what_diffusers_saves_keeps_its_alpha(tmp_path):
    pipe, back = tiny_pipe(), tiny_pipe()
    pipe.unet.add_adapter(LoraConfig(r=2, lora_alpha=7, target_modules=["to_q", "conv1"], init_lora_weights=False))
    state = peft.get_peft_model_state_dict(pipe.unet)
    metadata = pipe.unet.peft_config["default"].to_dict()
    pipe.save_lora_weights(str(tmp_path), unet_lora_layers=state, unet_lora_adapter_metadata=metadata)
    read_lora(tmp_path / "pytorch_lora_weights.safetensors", parts(back))
    torch.testing.assert_close(output(back), output(pipe), rtol=1e-4, atol=1e-5)


def test_layers_may_have_ranks_and_alphas_of_their_own(tmp_path):
    rng = torch.Generator().manual_seed(3)
    shapes = {"one": (2, 3.0), "two": (5, 1.0)}
    net, tensors, expected = Net(), {}, Net()
    for layer, (rank, alpha) in shapes.items():
        base = getattr(expected, layer)
        down = torch.randn(rank, base.in_features, generator=rng)
        up = torch.randn(base.out_features, rank, generator=rng)
        stem = f"lora_unet_{layer}"
        tensors |= {
            f"{stem}.lora_down.weight": down,
            f"{stem}.lora_up.weight": up,
            f"{stem}.alpha": torch.tensor(alpha),
        }
        base.weight.data += alpha / rank * up @ down
    save_file(tensors, tmp_path / "mixed.safetensors")
    adapters = read_lora(tmp_path / "mixed.safetensors", {"unet": net}, keys_of("sd", {"unet": net}))
    torch.testing.assert_close(net(X), expected(X), rtol=1e-4, atol=1e-5)
    assert adapters.config.rank == 5


def test_one_unmatched_key_is_an_error_and_leaves_the_model_alone(tmp_path):
    net = Net()
    good = {"unet.one.lora_A.weight": torch.ones(2, 16), "unet.one.lora_B.weight": torch.ones(24, 2)}
    cases = {
        "belong to no layer of this model, such as 'unet.three.lora_A.weight'": {
            **good, "unet.three.lora_A.weight": torch.ones(2, 16)
        },
        "'unet.one' has no up factor": {"unet.one.lora_A.weight": torch.ones(2, 16)},
        r"shape \(2, 12\), the model's weight \(24, 16\)": {**good, "unet.one.lora_A.weight": torch.ones(2, 12)},
    }  # fmt: skip
    for message, tensors in cases.items():
        save_file(tensors, tmp_path / "bad.safetensors")
        with pytest.raises(UserError, match=message):
            read_lora(tmp_path / "bad.safetensors", {"unet": net})
        assert type(net.one) is nn.Linear
    with pytest.raises(UserError, match=r"there is no file '.*absent"):
        read_lora(tmp_path / "absent.safetensors", {"unet": net})
    (tmp_path / "text.safetensors").write_text("no weights")
    with pytest.raises(UserError, match="is no safetensors file"):
        read_lora(tmp_path / "text.safetensors", {"unet": net})
