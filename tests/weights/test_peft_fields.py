"""Every option of the installed PEFT is read, known to be harmless, or refused by name; starts that move the base."""

from __future__ import annotations

import copy
import dataclasses
import json
import time

import pytest
import torch
from contracts.declared import turned
from peft import BOFTConfig, LoraConfig, OFTConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils.other import get_pattern_key
from safetensors.torch import save_file
from torch import nn

from visiontune.errors import UserError
from visiontune.weights import peft_fields
from visiontune.weights.lora_files import read_lora
from visiontune.weights.peft_fields import TABLES, Harmless, Read, Refused, Start
from visiontune.weights.peft_folders import read_peft

CONFIGS = {"LORA": LoraConfig, "OFT": OFTConfig, "BOFT": BOFTConfig}
X = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
LAYERS = ["0", "2"]


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 16)).eval()


def saved(config, folder, by=0.1):
    """A folder of PEFT's with an adapter that has moved."""
    model = turned(get_peft_model(net(), config), by)
    model.save_pretrained(str(folder))
    return model


def changed(folder, **options):
    """The folder with other options in its configuration."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **options}))


@pytest.mark.parametrize("method", CONFIGS)
def test_every_field_of_pefts_dataclass_is_in_the_table(method):
    fields = {field.name for field in dataclasses.fields(CONFIGS[method])}
    assert fields - TABLES[method].keys() == set(), "say in visiontune/weights/peft_fields.py what these mean"


@pytest.mark.parametrize("method", CONFIGS)
def test_what_peft_writes_by_default_is_read(method):
    given = {"OFT": {"r": 0, "oft_block_size": 8}}.get(method, {})
    peft_fields.check(json.loads(json.dumps(CONFIGS[method](**given).to_dict(), default=str)), method, "here")


REFUSED = [(m, name) for m, table in TABLES.items() for name, rule in table.items() if isinstance(rule, Refused)]


@pytest.mark.parametrize(("method", "name"), REFUSED)
def test_what_changes_the_meaning_is_refused_by_name_with_a_mend(method, name):
    for value in ("all", ["x"], {"x": 1}):
        with pytest.raises(
            UserError, match=rf"here: PEFT's option {name}=.* is not read \(.*\): merge the adapter in PEFT"
        ):
            peft_fields.check({name: value}, method, "here")
    for value in (None, False, [], {}):
        peft_fields.check({name: value}, method, "here")


# A value of each harmless option that PEFT itself takes, beside which it computes the same.
OTHER = {
    "LORA": {"lora_dropout": 0.5, "fan_in_fan_out": True, "layers_to_transform": None, "revision": "x", "r": 7,
             "rank_pattern": {}, "exclude_modules": ["no"], "megatron_core": "x", "qalora_group_size": 4},
    "OFT": {"module_dropout": 0.5, "fan_in_fan_out": True, "revision": "x", "exclude_modules": ["no"]},
    "BOFT": {"boft_dropout": 0.5, "fan_in_fan_out": True, "revision": "x", "exclude_modules": ["no"]},
}  # fmt: skip
BASE = {
    "LORA": LoraConfig(r=7, lora_alpha=5, target_modules=LAYERS),
    "OFT": OFTConfig(r=0, oft_block_size=8, use_cayley_neumann=False, target_modules=LAYERS),
    "BOFT": BOFTConfig(boft_block_size=4, target_modules=LAYERS),
}


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("method", OTHER)
def test_harmless_options_change_nothing_in_peft_either(method, tmp_path):
    saved(copy.deepcopy(BASE[method]), tmp_path)
    assert all(isinstance(TABLES[method][name], Harmless) for name in OTHER[method])
    changed(tmp_path, **OTHER[method])
    theirs, mine = PeftModel.from_pretrained(net(), str(tmp_path)).eval(), net()
    read_peft(tmp_path, {"unet": mine})
    torch.testing.assert_close(mine(X), theirs(X), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(net()(X), mine(X), atol=1e-2)


STARTS = {True, False, "gaussian", "eva", "orthogonal", "mica", "pissa", "pissa_niter_4", "olora"}


@pytest.mark.parametrize("start", sorted(STARTS, key=str))
def test_a_start_is_read_exactly_when_it_leaves_the_base_alone(start, tmp_path):
    model = saved(LoraConfig(r=4, target_modules=LAYERS, init_lora_weights=start), tmp_path, 0.05)
    kept = torch.equal(model.base_model.model[0].base_layer.weight, net()[0].weight)
    mine = net()
    if not kept:
        with pytest.raises(
            UserError, match=r"init_lora_weights=.* is not read: .*path_initial_model_for_weight_conversion"
        ):
            read_peft(tmp_path, {"unet": mine})
        torch.testing.assert_close(mine(X), net()(X), rtol=0, atol=0)
        return
    read_peft(tmp_path, {"unet": mine})
    torch.testing.assert_close(mine(X), model.eval()(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("start", ["loftq", "corda", "lora_ga", "of_tomorrow", "", 1])
def test_other_starts_are_refused(start):
    with pytest.raises(UserError, match=f"init_lora_weights={start!r} is not read"):
        peft_fields.check({"init_lora_weights": start}, "LORA", "here")


def test_the_mend_that_is_named_for_a_start_works(tmp_path):
    """PEFT's own conversion of a PiSSA makes a plain LoRA of it, which is read as PEFT computes."""
    model = get_peft_model(net(), LoraConfig(r=4, target_modules=LAYERS, init_lora_weights="pissa"))
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(str(tmp_path / "start"))
    model.peft_config["default"].init_lora_weights = "pissa"
    turned(model, 0.05)
    expected = model.eval()(X)
    model.save_pretrained(str(tmp_path / "plain"), path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    mine = net()
    read_peft(tmp_path / "plain", {"unet": mine})
    torch.testing.assert_close(mine(X), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(net()(X), expected, atol=1e-2)


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("series", [False, True])
def test_coft_turns_no_further_than_pefts_projection_lets_it(share, series, tmp_path):
    config = OFTConfig(
        r=0, oft_block_size=8, target_modules=LAYERS, coft=True, eps=0.2, block_share=share, use_cayley_neumann=series
    )
    saved(config, tmp_path, 0.3)
    theirs, mine = PeftModel.from_pretrained(net(), str(tmp_path)).eval(), net()
    adapters = read_peft(tmp_path, {"unet": mine})
    torch.testing.assert_close(mine(X), theirs(X), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(net()(X), mine(X), atol=1e-3)
    before = {key: value.clone() for key, value in adapters.tensors().items()}
    with torch.no_grad():
        for value in adapters.parameters():
            value.mul_(10)
    adapters.after_step()  # the bound is that of further training too
    for key, value in adapters.tensors().items():
        torch.testing.assert_close(value, before[key])
    changed(tmp_path, coft=False)
    free = net()
    read_peft(tmp_path, {"unet": free})
    assert not torch.allclose(free(X), mine(X), atol=1e-2)


def test_block_sizes_are_pefts_or_refused(tmp_path):
    """r blocks give each layer a size of its own; what PEFT adjusts to the inputs can be one that no option gives."""
    saved(OFTConfig(r=2, oft_block_size=0, use_cayley_neumann=False, target_modules=LAYERS), tmp_path / "a")
    theirs, mine = PeftModel.from_pretrained(net(), str(tmp_path / "a")).eval(), net()
    assert read_peft(tmp_path / "a", {"unet": mine}).config.n_blocks == 2
    torch.testing.assert_close(mine(X), theirs(X), rtol=1e-4, atol=1e-5)
    with pytest.warns(UserWarning, match="Adjusted"):
        saved(OFTConfig(r=0, oft_block_size=7, use_cayley_neumann=False, target_modules=LAYERS), tmp_path / "b")
    mine = net()
    with pytest.raises(UserError, match="have blocks of 6, 8, which neither"):
        read_peft(tmp_path / "b", {"unet": mine})
    changed(tmp_path / "a", coft=True)
    with pytest.raises(UserError, match="blocks of 8, 12 and COFT's bound"):
        read_peft(tmp_path / "a", {"unet": mine})
    changed(tmp_path / "a", coft=True, eps=-1.0)
    with pytest.raises(UserError, match=r"coft and eps=-1\.0 turns nothing"):
        read_peft(tmp_path / "a", {"unet": mine})
    changed(tmp_path / "a", coft=False, use_cayley_neumann=True, num_cayley_neumann_terms=2)
    with pytest.raises(UserError, match="num_cayley_neumann_terms=2 has no counterpart"):
        read_peft(tmp_path / "a", {"unet": mine})
    torch.testing.assert_close(mine(X), net()(X), rtol=0, atol=0)


def test_an_unknown_option_is_refused_where_it_says_something(tmp_path):
    saved(LoraConfig(r=4, target_modules=LAYERS), tmp_path)
    changed(tmp_path, of_tomorrow=None, and_later=False)
    read_peft(tmp_path, {"unet": net()})
    changed(tmp_path, of_tomorrow="twisted")
    with pytest.raises(UserError, match="PEFT's option of_tomorrow='twisted' is not known here"):
        read_peft(tmp_path, {"unet": net()})


READ = [(m, name, rule.kind) for m, table in TABLES.items() for name, rule in table.items() if isinstance(rule, Read)]


@pytest.mark.parametrize(("method", "name", "kind"), READ)
def test_what_is_read_must_be_of_its_kind(method, name, kind):
    wrong = {"text": 3, "numbers by name": 3}.get(kind, "x")
    nothing = [] if kind == "numbers by name" else [None]
    for value in (wrong, [1], *nothing, float("nan"), float("inf"), {"a": "x"}, 10**40):
        with pytest.raises(UserError, match=f"here: PEFT's option {name}=.* should be {kind}"):
            peft_fields.check({name: value}, method, "here")


def test_every_rule_is_of_a_known_kind():
    assert all(isinstance(r, Read | Harmless | Refused | Start) for table in TABLES.values() for r in table.values())


def test_an_alpha_of_zero_is_no_alpha_left_out(tmp_path):
    for alpha in (0, 8):
        saved(LoraConfig(r=4, lora_alpha=8, target_modules=LAYERS), tmp_path)
        changed(tmp_path, lora_alpha=alpha)
        theirs, mine = PeftModel.from_pretrained(net(), str(tmp_path)).eval(), net()
        read_peft(tmp_path, {"unet": mine})
        torch.testing.assert_close(mine(X), theirs(X), rtol=1e-4, atol=1e-5)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    del config["lora_alpha"]  # which is 8 to PEFT
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    other = net()
    read_peft(tmp_path, {"unet": other})
    torch.testing.assert_close(other(X), mine(X), rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------- the header of diffusers' single files


def single(file, config, **more):
    """A file as diffusers writes it, with PEFT's options in the header."""
    model = turned(get_peft_model(net(), config), 0.05)
    tensors = {
        f"unet.{key.removeprefix('base_model.model.')}": value.contiguous()
        for key, value in get_peft_model_state_dict(model).items()
    }
    options = {key: sorted(v) if isinstance(v, set) else v for key, v in config.to_dict().items()}
    header = {f"unet.{key}": value for key, value in {**options, **more}.items()}
    save_file(tensors, file, {"lora_adapter_metadata": json.dumps(header, default=str)})
    return model


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init_lora_weights": "pissa"}, "unet: PEFT's option init_lora_weights='pissa' is not read"),
        ({"lora_bias": True}, "unet: PEFT's option lora_bias=True is not read"),
        ({"lora_alpha": "x"}, "lora_alpha='x' should be number"),
        ({"alpha_pattern": {"(": 3}}, r"pattern '\(' is no regular expression"),
        ({"alpha_pattern": ["a"]}, "alpha_pattern=.* should be numbers by name"),
    ],
)
def test_the_header_is_held_against_the_same_table(options, message, tmp_path):
    single(tmp_path / "a.safetensors", LoraConfig(r=4, target_modules=LAYERS), **options)
    mine = net()
    with pytest.raises(UserError, match=message):
        read_lora(tmp_path / "a.safetensors", {"unet": mine})
    torch.testing.assert_close(mine(X), net()(X), rtol=0, atol=0)


def test_options_of_the_header_are_read(tmp_path):
    config = LoraConfig(r=4, lora_alpha=6, use_rslora=True, alpha_pattern={"2": 3}, target_modules=LAYERS)
    model, mine = single(tmp_path / "a.safetensors", config), net()
    read_lora(tmp_path / "a.safetensors", {"unet": mine})
    torch.testing.assert_close(mine(X), model.eval()(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"unet.r": 4', "is not JSON"),
        ("[1]", "is no mapping of PEFT's options"),
        ("[" * 100_000, "nests too deep|is not JSON"),
        ('{"unet.lora_alpha": ' + "9" * 5000 + "}", "too many digits"),
        ('{"unet.lora_alpha": NaN}', "should be number"),
    ],
)
def test_a_broken_header_is_one_line(text, message, tmp_path):
    tensors = {"unet.0.lora_A.weight": torch.ones(2, 16), "unet.0.lora_B.weight": torch.ones(24, 2)}
    save_file(tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": text})
    with pytest.raises(UserError, match=message) as caught:
        read_lora(tmp_path / "a.safetensors", {"unet": net()})
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (r"(x|x|xx)+(x|xx|x)+(x|xx)+y.*\1", "takes too long to match"),
        ("(" * 40 + "x" + "+)" * 40 + "y", "nests deeper than names do"),
        ("x*" * 1000, "is longer or nests deeper"),
    ],
)
def test_a_pattern_that_does_not_come_to_an_end_is_refused(pattern, message):
    begun = time.monotonic()
    with pytest.raises(UserError, match=message):
        peft_fields.matches(pattern, "x" * 400, "here")
    assert time.monotonic() - begun < 20


@pytest.mark.parametrize(
    "pattern", ["q_proj", r"^model.decoder.layers.0.*q_proj", "layers.0.q_proj", "(q|k)_proj", "k_proj"]
)
def test_patterns_match_as_in_peft(pattern):
    name = "model.decoder.layers.0.encoder_attn.q_proj"
    assert peft_fields.matches(pattern, name, "here") == (get_pattern_key([pattern], name) == pattern)


@pytest.mark.parametrize(
    ("text", "message"),
    [("[]", "no mapping of PEFT's options"), ("{", "is not JSON"), ("[" * 99_999, "nests too deep|is not JSON"),
     ('{"peft_type": ["LORA"]}', "readable are"), ("{}", "holds PEFT's None"),
     ('{"peft_type": "LORA", "lora_alpha": "x"}', "lora_alpha='x' should be number")],
)  # fmt: skip
def test_a_broken_configuration_is_one_line(text, message, tmp_path):
    saved(LoraConfig(r=4, target_modules=LAYERS), tmp_path)
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        read_peft(tmp_path, {"unet": net()})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("method", "key", "shape"),
    [("OFT", "oft_R.weight", (28,)), ("OFT", "oft_R.weight", (0, 28)), ("OFT", "oft_R.weight", (2, 0)),
     ("OFT", "oft_R.weight", (2, 27)), ("OFT", "oft_R.weight", (2, 1)), ("OFT", "oft_R.weight", ()),
     ("BOFT", "boft_R", (4,)), ("BOFT", "boft_R", (1, 4, 4, 3)), ("BOFT", "boft_R", (0, 4, 4, 4)),
     ("BOFT", "boft_R", (1, 4, 3, 3)), ("BOFT", "boft_s", (24, 1)), ("BOFT", "boft_R", (1, 4, 0, 0))],
)  # fmt: skip
def test_rotations_of_other_shapes_are_one_line(method, key, shape, tmp_path):
    saved(copy.deepcopy(BASE[method]), tmp_path)
    save_file({f"base_model.model.0.{key}": torch.zeros(shape)}, tmp_path / "adapter_model.safetensors")
    mine = net()
    with pytest.raises(UserError) as caught:
        read_peft(tmp_path, {"unet": mine})
    assert "\n" not in str(caught.value)
    assert type(mine[0]) is nn.Linear
