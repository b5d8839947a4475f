"""SubTuning: which blocks are tried and chosen, the budget, and that everything else stays the base's."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from contracts.declared import Declared
from torch import Tensor, nn

from visiontune.adapters import attach, attached, load
from visiontune.adapters._evidence import Evidence
from visiontune.adapters.subtuning import blocks_of, select
from visiontune.errors import UserError


def _count(module: nn.Module, options: dict) -> int:
    bias = getattr(module, "bias", None) if options.get("biases", True) else None
    return module.weight.numel() + (0 if bias is None else bias.numel())


def _at_most_its_share(adapters, unprepared) -> None:
    assert 0 < adapters.parameter_count <= adapters.config.budget * unprepared.parameter_count


CONTRACT = {
    "subtuning": Declared(
        _count,
        {"budget": 1.0},
        variants=({"budget": 1.0, "biases": False},),
        plan_options={"budget": 0.6, "gain": 0.0, "probe_lr": 0.01},
        plan_variants=({"budget": 0.6, "gain": 0.0, "probe_lr": 0.01, "profile": True, "biases": False},),
        budget=_at_most_its_share,
    )
}

# ---------------------------------------------------------------------------------------------------- blocks

UNET = {
    "conv_in": ["conv_in"],
    "time_embedding": ["time_embedding.linear_1", "time_embedding.linear_2"],
    "down_blocks.0.attentions.1": ["down_blocks.0.attentions.1.norm", "down_blocks.0.attentions.1.proj_in"],
    "down_blocks.0.attentions.1.transformer_blocks.0": [
        f"down_blocks.0.attentions.1.transformer_blocks.0.{name}"
        for name in ("norm1", "attn1.to_q", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2")
    ],
    "down_blocks.0.resnets.0": ["down_blocks.0.resnets.0.conv1", "down_blocks.0.resnets.0.conv2"],
    "down_blocks.1.resnets.0": ["down_blocks.1.resnets.0.conv1", "down_blocks.1.resnets.0.time_emb_proj"],
}
DIT = {
    "pos_embed": ["pos_embed.proj"],
    "transformer_blocks.0": ["transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_out.0"],
    "transformer_blocks.11": ["transformer_blocks.11.ff.net.0.proj", "transformer_blocks.11.ff.net.2"],
    "single_transformer_blocks.0": ["single_transformer_blocks.0.proj_mlp"],
    "proj_out": ["proj_out"],
}
CLIP = {
    "text_model.embeddings": ["text_model.embeddings.token_embedding", "text_model.embeddings.position_embedding"],
    "text_model.encoder.layers.0": ["text_model.encoder.layers.0.mlp.fc1"],
    "text_model.encoder.layers.1": [f"text_model.encoder.layers.1.self_attn.{n}" for n in ("q_proj", "out_proj")],
    "text_model": ["text_model.final_layer_norm"],
}


@pytest.mark.parametrize("expected", [UNET, DIT, CLIP], ids=["unet", "dit", "clip"])
def test_blocks_are_the_innermost_numbered_modules(expected):
    assert blocks_of([name for names in expected.values() for name in names]) == expected


def test_a_level_joins_blocks():
    names = [name for members in UNET.values() for name in members]
    assert {block: len(members) for block, members in blocks_of(names, 1).items()} == {
        "conv_in": 1,
        "time_embedding": 2,
        "down_blocks.0": 9,
        "down_blocks.1": 2,
    }
    assert len(blocks_of(names, 2)["down_blocks.0.attentions.1"]) == 7
    assert blocks_of(names, 3) == blocks_of(names) == blocks_of(names, 9)


def test_numbered_layers_are_no_blocks_of_their_own():
    assert blocks_of(["0", "2"]) == {"0": ["0"], "2": ["2"]}
    assert blocks_of(["mlp.0", "mlp.2", "head"]) == {"mlp": ["mlp.0", "mlp.2"], "head": ["head"]}


# ---------------------------------------------------------------------------------------------------- selection

GAINS = {"a": 1.0, "b": 3.0, "c": 2.5, "d": -1.0, "e": 0.05}
COSTS = {"a": 2, "b": 4, "c": 4, "d": 1, "e": 1}


def _held_out(blocks) -> float:
    """``b`` and ``c`` do the same, so together they are worth little more than ``b``."""
    return 10.0 - sum(GAINS[b] for b in blocks) + (2.4 if {"b", "c"} <= set(blocks) else 0.0)


@pytest.mark.parametrize(
    ("budget", "gain", "profile", "expected"),
    [
        (12, 0.0, False, "bace"),
        (12, 0.004, False, "bace"),
        (12, 0.02, False, "ba"),
        (12, 0.2, False, "b"),
        (12, 0.5, False, ""),
        (7, 0.0, False, "bae"),
        (3, 0.0, False, "ae"),
        (1, 0.006, False, ""),
        (12, 0.0, True, "bcae"),
        (12, 0.02, True, "bca"),
        (8, 0.0, True, "bc"),
        (7, 0.0, True, "bae"),
    ],
)
def test_greedy_selection_and_the_profile(budget, gain, profile, expected):
    assert "".join(select(COSTS, budget, _held_out, gain, profile)) == expected


def test_each_round_lowers_the_loss_by_more_than_the_gain():
    losses = [10.0, *select(COSTS, 12, _held_out, 0.004).values()]
    assert len(losses) == 5
    assert all(before - after > 0.04 for before, after in itertools.pairwise(losses))


def test_the_profile_tries_each_block_once_and_alone():
    tried = []
    select(COSTS, 12, lambda blocks: tried.append(tuple(blocks)) or _held_out(blocks), 0.0, profile=True)
    assert tried == [(), *((block,) for block in COSTS)]


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_a_trial_that_diverged_is_not_chosen(bad):
    assert list(select(COSTS, 12, lambda blocks: bad if "b" in blocks else _held_out(blocks), 0.02)) == ["c", "a"]


def test_a_negative_loss_has_the_same_gain():
    def shifted(blocks):
        return _held_out(blocks) - 20

    assert list(select(COSTS, 12, shifted, 0.02)) == ["b", "a"]


# ---------------------------------------------------------------------------------------------------- on a model


class Block(nn.Module):
    """A norm, a convolution and a feed-forward part beside the input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.LayerNorm(8), nn.Conv1d(8, 8, 1, bias=False)
        self.net = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.net(self.conv(self.norm(x)[..., None])[..., 0])


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inlet, self.blocks = nn.Linear(8, 8), nn.ModuleList(Block() for _ in range(4))
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inlet(x)
        for block in self.blocks:
            x = block(x)
        return x


TARGETS = ["Linear", "Conv1d", "LayerNorm"]
OPTIONS = {"budget": 0.6, "gain": 1e-3, "probe_lr": 0.01, "probe_steps": 12}


def inputs(seed: int) -> Tensor:
    return torch.randn(24, 8, generator=torch.Generator().manual_seed(seed)).double()


def losses(net: Net, teacher: nn.Module, count: int = 6):
    dtype = net.inlet.weight.dtype
    with torch.no_grad():
        pairs = [(inputs(i), teacher.double()(inputs(i))) for i in range(count)]
    return [lambda x=x, y=y: F.mse_loss(net(x.to(dtype)).double(), y) for x, y in pairs]


def teacher_of(*changed: str) -> Net:
    """A net with other weights in some of its layers."""
    teacher, rng = Net(), torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name in changed:
            weight = teacher.get_submodule(name).weight
            weight += 0.3 * torch.randn(weight.shape, generator=rng)
    return teacher


def prepared(net: Net, given, **options):
    adapters = attach(net, "subtuning", targets=TARGETS, **{**OPTIONS, **options})
    adapters.prepare(given)
    return adapters


def chosen(adapters) -> set[str]:
    return {name for name, slot in adapters.adapters().items() if slot.inner is not None}


@pytest.mark.parametrize("changed", ["inlet", "blocks.0.net.2", "blocks.2.net.0", "blocks.3.conv"])
@pytest.mark.parametrize("profile", [False, True])
def test_a_task_that_one_layer_solves_chooses_its_block(changed, profile):
    net = Net()
    budget = 0.1 if changed == "inlet" else 0.25
    adapters = prepared(net, losses(net, teacher_of(changed)), budget=budget, profile=profile)
    block = changed if changed == "inlet" else changed[:8]
    assert chosen(adapters) == {name for name in adapters.layers if name == block or name.startswith(f"{block}.")}


class Beside(Net):
    """The same parts, each with an output of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.inlet(x), *(block(x) for block in self.blocks)], 1)


@pytest.mark.parametrize("profile", [False, True])
def test_all_blocks_that_are_needed_are_found_and_no_others(profile):
    teacher, net = teacher_of("blocks.0.net.2", "blocks.3.conv"), Beside()
    teacher.__class__ = Beside
    adapters = prepared(net, losses(net, teacher), profile=profile)
    found = blocks_of(adapters.layers)
    assert chosen(adapters) == {*found["blocks.0"], *found["blocks.3"]}


def test_more_training_than_the_candidates_own_is_undone_between_trials():
    """What a trial leaves would make the next one better; so the order of the layers does not matter either."""
    net = Net()
    given = losses(net, teacher_of("blocks.1.net.0"))
    adapters = attach(net, "subtuning", targets=TARGETS, **OPTIONS)
    method, evidence = adapters.methods()[0], Evidence(adapters.base_layers(), given)
    names = blocks_of(adapters.layers)["blocks.1"]
    first, base = method.trial(names, evidence), method.trial([], evidence)
    assert first < base == sum(loss().item() for loss in given[3:])
    assert method.trial(names, evidence) == first


def test_the_first_half_is_trained_on_and_the_second_scores():
    net, calls = Net(), []

    def counted(i, loss):
        def call() -> Tensor:
            calls.append((i, torch.is_grad_enabled()))
            return loss()

        return call

    given = [counted(i, loss) for i, loss in enumerate(losses(net, teacher_of("inlet"), 5))]
    adapters = attach(net, "subtuning", targets=TARGETS, **{**OPTIONS, "probe_steps": 3})
    method, evidence = adapters.methods()[0], Evidence(adapters.base_layers(), given)
    method.trial(["inlet"], evidence)
    assert calls == [(0, True), (1, True), (0, True), (2, False), (3, False), (4, False)]


def test_a_trial_is_full_fine_tuning_of_its_layers():
    net, plain, teacher = Net(), Net(), teacher_of("inlet", "blocks.2.net.0")
    given, own = losses(net, teacher), losses(plain, teacher)
    adapters = attach(net, "subtuning", targets=TARGETS, **OPTIONS)
    method = adapters.methods()[0]
    tried = ["inlet", *blocks_of(adapters.layers)["blocks.2"]]
    score = method.trial(tried, Evidence(adapters.base_layers(), given))
    optimizer = torch.optim.Adam([p for name in tried for p in plain.get_submodule(name).parameters()], 0.01)
    for step in range(12):
        optimizer.zero_grad()
        own[step % 3]().backward()
        optimizer.step()
    assert score == pytest.approx(sum(loss().item() for loss in own[3:]), rel=1e-8)


def test_gradients_and_scores_are_those_of_all_processes():
    net = Net()
    given = losses(net, teacher_of("inlet"))
    adapters = attach(net, "subtuning", targets=TARGETS, **OPTIONS)
    method, layers = adapters.methods()[0], adapters.base_layers()
    alone = method.trial(["inlet"], Evidence(layers, given))
    seen = []
    both = method.trial(["inlet"], Evidence(layers, given, lambda t: seen.append(t.shape) or 2 * t))
    assert both == pytest.approx(2 * alone, rel=1e-5)
    assert set(seen) == {(8, 8), (8,), (3,)}
    # Adam takes steps as long for gradients of any length; one process must not miss the others' direction, though.
    turned = method.trial(["inlet"], Evidence(layers, given, lambda t: -t))
    assert -turned > 1.1 * method.trial([], Evidence(layers, given))


@pytest.mark.parametrize("budget", [0.1, 0.25, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("biases", [True, False])
def test_the_budget_is_met(budget, biases):
    net = Net()
    whole = attach(net, "subtuning", targets=TARGETS, biases=biases).parameter_count
    net = Net()
    given = losses(net, teacher_of("inlet", "blocks.0.conv", "blocks.1.conv", "blocks.2.conv", "blocks.3.conv"))
    adapters = prepared(net, given, budget=budget, biases=biases, gain=0.0)
    assert 0 < adapters.parameter_count <= budget * whole
    block = sum(p.numel() for p in Block().parameters())
    assert adapters.parameter_count > budget * whole - block


def test_what_was_not_chosen_is_the_base_bit_for_bit_after_training():
    net, plain, teacher = Net(), Net(), teacher_of("blocks.1.net.0")
    given = losses(net, teacher)
    adapters = prepared(net, given, budget=0.25)
    optimizer = torch.optim.AdamW(adapters.parameters(), 0.01, weight_decay=0.1)
    before = sum(loss().item() for loss in given)
    for step in range(30):
        optimizer.zero_grad()
        given[step % 6]().backward()
        optimizer.step()
    assert sum(loss().item() for loss in given) < 0.2 * before
    x = inputs(9)
    for name in adapters.layers:
        layer = net.get_submodule(name)
        same = torch.equal(adapters.weight(name), plain.get_submodule(name).weight)
        assert same is not name.startswith("blocks.1.")
        assert same is (adapters.weight(name) is layer.weight)
        assert torch.equal(layer.weight, plain.get_submodule(name).weight)
    assert torch.equal(net.blocks[0](net.inlet(x)), plain.blocks[0](plain.inlet(x)))
    assert not net.blocks[0](net.inlet(x)).requires_grad
    adapters.merge()
    assert torch.equal(net.blocks[2](x), plain.blocks[2](x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("calls", [None, 2, 9, 40])
def test_the_base_is_left_as_it_was_whatever_happens(dtype, calls):
    net, plain, count = Net(dtype), Net(dtype), 0

    def failing(loss):
        def call() -> Tensor:
            nonlocal count
            count += 1
            if count == calls:
                raise RuntimeError("out of memory")
            return loss()

        return call

    given = [failing(loss) for loss in losses(net, teacher_of("inlet"), 2)]
    adapters = attach(net, "subtuning", targets=TARGETS, **OPTIONS)
    everything = adapters.parameter_count
    if calls is None:
        adapters.prepare(given)
        assert adapters.parameter_count < everything
    else:
        with pytest.raises(RuntimeError, match="out of memory"):
            adapters.prepare(given)
        assert adapters.parameter_count == everything
    for p, q in zip(net.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q)
        assert not p.requires_grad
        assert p.grad is None
    x = inputs(3).to(dtype)
    assert torch.equal(net(x), plain(x))
    assert all(not p.any() and p.grad is None for p in adapters.parameters())


def test_other_sets_are_left_alone():
    """As the text encoder's, when the denoiser's blocks are tried."""
    net = Net()
    other = attach(net, "lora", targets=["inlet"], name="other", rank=2)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.1)
    state = copy.deepcopy(other.state_dict())
    prepared(net, losses(net, teacher_of("blocks.0.conv")))
    assert all(torch.equal(state[key], value) for key, value in other.state_dict().items())
    assert all(p.grad is None for p in other.parameters())


def test_the_choice_is_the_same_every_time_and_comes_back_from_a_file(tmp_path):
    plans = []
    for seed in range(2):
        net = Net()
        torch.manual_seed(seed)
        adapters = prepared(net, losses(net, teacher_of("blocks.0.conv", "blocks.2.conv")))
        plans.append(chosen(adapters))
    assert plans[0] == plans[1]
    with torch.no_grad():
        for p in adapters.parameters():
            p.add_(0.1)
    path = adapters.save(tmp_path / "a.safetensors")
    fresh = Net()
    loaded = load(fresh, path)
    assert chosen(loaded) == plans[0]
    assert loaded.parameter_count == adapters.parameter_count
    assert torch.equal(fresh(inputs(4)), net(inputs(4)))


# ---------------------------------------------------------------------------------------------------- refusals


def test_what_cannot_be_chosen_is_refused():
    with pytest.raises(UserError, match=r"pays for 1 parameters, and the smallest block, 'inlet', has 72: raise it"):
        attach(Net(), "subtuning", targets=TARGETS, budget=0.001)
    net = Net()
    with pytest.raises(UserError, match=r"no block lowers the held-out loss by more than adapter\.gain"):
        prepared(net, losses(net, Net()))
    assert len(chosen(next(iter(attached(net).values())))) == 17


def test_a_layer_without_a_part_in_the_loss_is_named():
    net = Net()
    net.spare = nn.ModuleList([Block().double()])
    with pytest.raises(UserError, match=r"'spare\.0\.norm' takes no part in the loss: leave it out"):
        prepared(net, losses(net, teacher_of("inlet")))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0.0}, "budget must be a number above 0"),
        ({"budget": 1.1}, "budget must be a number above 0"),
        ({"gain": -0.1}, "gain"),
        ({"level": -1}, "level"),
        ({"probe_steps": 0}, "probe_steps"),
        ({"probe_lr": 0.0}, "probe_lr"),
        ({"batches": 1}, "batches must be a whole number from 2"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        attach(Net(), "subtuning", targets=TARGETS, **options)
