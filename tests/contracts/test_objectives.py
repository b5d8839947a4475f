"""What every objective owes, found by its file name and tried on whichever toy model it does not refuse."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from contracts.declared import turn
from tiny import tiny_model
from tiny_rewards import TOWERS
from tiny_training import TinyModel, TinyReward, interrupt
from tiny_video import TinyVideo
from torch import nn
from torch.overrides import TorchFunctionMode

from visiontune import adapters, models, plugin
from visiontune.core import Batch
from visiontune.data.prompts import PromptBatches
from visiontune.errors import UserError
from visiontune.estimate import Kept
from visiontune.objectives.base import generator
from visiontune.training.config import TrainConfig
from visiontune.training.loop import Trainer


def toy_of(kind: type[TinyModel]) -> TinyModel:
    """Its text encoder has a layer to adapt."""
    model = kind()
    model.encoder = nn.Sequential(model.encoder)
    return model


class Scored(TinyReward):
    """No two values of a picture or a clip count alike."""

    clips = True

    def score(self, images, prompts, meta):
        place = torch.linspace(0.5, 1.5, images[0].numel()).view(images.shape[1:]).to(images)
        told = torch.tensor([len(prompt) / 10 for prompt in prompts]).to(images)
        return told * (torch.sin(3 * images) * place).flatten(1).mean(1)


TOYS: dict[str, Callable[[], Any]] = {
    "latents": lambda: toy_of(TinyModel),
    "clips": lambda: toy_of(TinyVideo),
    "tokens": lambda: tiny_model("amused"),
}
# For objectives that reach into the network, which none of the others has parts for.
DEEP: dict[str, Callable[[], Any]] = {
    "attention": lambda: tiny_model("sd"),
    "painting": lambda: tiny_model("sd", edits="inpaint"),
    "clip": lambda: tiny_towers("clip"),
    "siglip": lambda: tiny_towers("siglip"),
}
PROMPTS = ["a red circle", "a blue square", "a green star"]
# Small values for whichever of these options an objective has.
CHEAP = {"group": 2, "updates": 2, "steps": 3}


@dataclasses.dataclass(frozen=True)
class Case:
    """An objective with some of its options, and the toy that it works on."""

    name: str
    options: tuple[tuple[str, object], ...]
    toy: str

    def __str__(self) -> str:
        return "-".join([self.name, *(key for key, _ in self.options), self.toy])

    def objective(self, **changes):
        module = plugin.load("objectives", self.name)
        names = {field.name for field in dataclasses.fields(module.Config)}
        cheap = {key: value for key, value in CHEAP.items() if key in names}
        return module.build(module.Config(**{**cheap, **dict(self.options), **changes}))

    def once(self):
        """The objective, with each rollout used once, as a reduced precision asks for."""
        return self.objective(**({"updates": 1} if self.has("updates") else {}))

    @property
    def needs(self):
        return self.objective().needs

    def has(self, option: str) -> bool:
        return hasattr(self.objective().config, option)


def new(name: str):
    return {**TOYS, **DEEP}[name]()


toy = functools.cache(new)


@functools.cache
def towers_folder(family: str) -> str:
    return str(TOWERS[family](Path(tempfile.mkdtemp()) / family, 16))


def tiny_towers(family: str):
    return models.load(towers_folder(family))


def both(model) -> list[str]:
    """What is trained beside what is trained when nothing is said."""
    return [*list(model.TARGETS)[:1], "text"]


def takes(objective, name: str) -> bool:
    try:
        objective.check(toy(name), Scored())
    except UserError:
        return False
    return True


def compared(name: str) -> list[tuple[tuple[str, object], ...]]:
    """The weights that are 0 unless asked for, and with which alone the untrained model is needed."""
    config = Case(name, (), "").objective().config
    if Case(name, (), "").needs.reference:
        return []
    off = [f.name for f in dataclasses.fields(config) if getattr(config, f.name) == 0 and f.type == "float"]
    found = [((option, 0.1),) for option in off]
    return [options for options in found if Case(name, options, "").needs.reference]


def cases() -> list[Case]:
    every = [(name, options) for name in plugin.names("objectives") for options in [(), *compared(name)]]
    found = []
    for name, options in every:
        objective = Case(name, options, "").objective()
        taken = [place for place in TOYS if takes(objective, place)]
        found += [Case(name, options, place) for place in taken or [one for one in DEEP if takes(objective, one)]]
    return found


CASES = cases()
each = pytest.mark.parametrize("case", CASES, ids=str)


def where(keep: Callable[[Case], bool]):
    """Over the cases of which something is true."""
    return pytest.mark.parametrize("case", [case for case in CASES if keep(case)], ids=str)


with_data = where(lambda case: not case.needs.online)
row_by_row = where(lambda case: not case.needs.online and not case.needs.together)
online = where(lambda case: case.needs.online)
with_base = where(lambda case: case.needs.reference)


# ------------------------------------------------------------------------------------------------------ what is run


class Columns:
    """Rows of one endless list, with every column that an objective may read; batch `k` of `n` is rows `k n ...`."""

    def __init__(self, model, needs, size: int) -> None:
        columns = (*needs.columns, *needs.optional, *(["set"] if needs.sets else []))
        # A toy takes whatever it is shown, a pipeline what it reads.
        blind = hasattr(model, "reads") and not model.reads.pictures
        self.model, self.size = model, size
        # A region is among the channels.
        paints = {"region": "channels"} if getattr(model, "paints", False) else {}
        self.columns = tuple(paints.get(name, name) for name in columns if name != "source" or not blind)

    def close(self) -> None:
        pass

    def batch(self, step: int) -> Batch:
        return Batch.cat([self.row(number) for number in range(step * self.size, (step + 1) * self.size)])

    def row(self, number: int) -> Batch:
        prompt = PROMPTS[number % len(PROMPTS)]
        return Batch(
            prompts=[prompt],
            data={name: self.column(name, number) for name in self.columns},
            cond=None,
            weight=torch.tensor([0.5 + number % 3]),
            prior=torch.zeros(1, dtype=torch.bool),
            ids=[str(number)],
            nouns=[tuple(prompt.split()[1:])] if "segments" in self.columns else None,
        )

    def column(self, name: str, number: int) -> torch.Tensor:
        if name == "set":
            return torch.tensor([number])  # of one row, since rows are cut apart
        rng = generator(name, number)
        if not hasattr(self.model, "latent_shape"):
            return torch.rand(1, 3, self.model.resolution, self.model.resolution, generator=rng)
        shape = self.model.latent_shape()
        if name == "mask":
            return torch.rand(1, 1, *shape[-2:], generator=rng)
        if name == "segments":
            return torch.randint(4, (1, 1, *shape[-2:]), generator=rng, dtype=torch.int32)
        if name == "channels":
            painted = torch.rand(
                1, 1, self.model.downsample * shape[-2], self.model.downsample * shape[-1], generator=rng
            )
            return self.model.channels(torch.randn(1, *shape, generator=rng), (painted > 0.5).float())
        return torch.randn(1, *shape, generator=rng)


class RowByRow(TorchFunctionMode):
    """Random numbers of a batch belong to its rows, so that a batch may be cut without changing them."""

    DRAWS = (torch.rand, torch.randn)

    def __init__(self, ids: list[str]) -> None:
        super().__init__()
        self.ids, self.drawn = ids, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func not in self.DRAWS:
            return func(*args, **kwargs)
        size = torch.Size(args[0] if isinstance(args[0], (tuple, list)) else args)
        assert size[0] == len(self.ids), "drawn for something else than the rows of the batch"
        self.drawn += 1
        own = [{**kwargs, "generator": generator("row", name, self.drawn)} for name in self.ids]
        return torch.cat([func((1, *size[1:]), **options) for options in own])


def by_row(objective):
    """The objective, with noise that belongs to the rows."""
    whole = objective.loss

    def loss(model, batch, tools):
        with RowByRow(batch.ids):
            return whole(model, batch, tools)

    objective.loss = loss
    return objective


class Even(Scored):
    """Scores 0 and 1 in turn: any two pictures in a row have the statistics of all. The gradient is that of `tiny`."""

    def score(self, images, prompts, meta):
        found = super().score(images, prompts, meta)
        return torch.arange(len(found)) % 2 + found - found.detach()


def trainer(
    case: Case, out, *, adapter: bool = True, moved: bool = True, objective=None, reward=None, size: int = 4, **train
) -> Trainer:
    """A run; what it trains is `moved` to where some training may have brought it."""
    model = new(case.toy)
    objective = objective or case.objective()
    torch.manual_seed(0)
    found = None
    if adapter:
        trained = model.names(train.get("parts"))
        found = adapters.attach(
            model.of(*trained), "lora", rank=2, alpha=2.0, targets=["all"], presets=model.presets(trained)
        )
    made = Trainer(
        model=model,
        adapters=found,
        objective=objective,
        rows=PromptBatches(PROMPTS, size, objective.group, 3)
        if objective.needs.online
        else Columns(model, objective.needs, size),
        train=TrainConfig(**{"steps": 4, "batch_size": size, "trackers": [], "device": "cpu", "lr": 1e-2, **train}),
        out=out,
        seed=3,
        reward=(reward or Scored()) if objective.needs.reward else None,
    )
    if moved:
        turn(found if adapter else nn.ParameterList(made.parameters.values()), 0.05)
    return made


def gradients(run: Trainer, batch: Batch | None = None, **lent) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of the first batch, or another, and what it leaves in `.grad`; of a rollout the sum of its steps'."""
    model, objective, tools = run.precise, run.objective, dataclasses.replace(run.lender.tools(0), **lent)
    batch = run.rows.batch(0) if batch is None else batch
    if objective.needs.online:
        with torch.no_grad():
            collected = objective.collect(model, batch, tools)
        total = sum(objective.update(model, collected, part, tools).total for part in range(objective.updates))
    else:
        total = objective.loss(model, batch, tools).total
        total.backward()
    return total.detach(), taken(run)


def taken(run: Trainer) -> dict[str, torch.Tensor]:
    """The gradients, which are gone from the parameters then."""
    found = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in run.parameters.items()}
    for parameter in run.parameters.values():
        parameter.grad = None
    return found


def flat(found: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([value.flatten() for value in found.values()])


def close(ours, theirs) -> None:
    """Equal but for the order of sums, whose rounding preferences multiply by thousands."""
    one, other = flat(ours), flat(theirs)
    torch.testing.assert_close(one, other, rtol=2e-4, atol=2e-4 * float(other.abs().max()))


# -------------------------------------------------------------------------------------------------- loss and gradient


def test_every_objective_works_on_a_toy():
    assert {case.name for case in CASES} == {*plugin.names("objectives")}


@each
def test_the_loss_is_finite_and_the_same_for_the_same_seed(case, tmp_path):
    (loss, found), (again, too) = (gradients(trainer(case, tmp_path)) for _ in range(2))
    assert loss.ndim == 0 and loss.dtype == torch.float32 and loss.isfinite() and flat(found).isfinite().all()
    assert torch.equal(loss, again) and torch.equal(flat(found), flat(too))
    assert flat(found).any()


@each
@pytest.mark.parametrize("adapter", [True, False])
@pytest.mark.parametrize("text", [False, True])
def test_the_gradient_reaches_what_is_trained_and_nothing_else(case, adapter, text, tmp_path):
    parts = both(toy(case.toy)) if text else None
    if parts and not case.needs.text:
        with pytest.raises(UserError, match="take text encoders and trigger out"):
            trainer(case, tmp_path, adapter=adapter, parts=parts)
        return
    run = trainer(case, tmp_path, adapter=adapter, parts=parts)
    found = gradients(run)[1]
    reached = {name.removeprefix("adapters.").partition(".")[0] for name, value in found.items() if value.any()}
    assert reached == {*run.model.names(parts)}
    everything = [p for network in run.model.networks().values() for p in network.parameters()]
    trained = {id(p) for p in run.parameters.values()}
    assert all(p.grad is None and not p.requires_grad for p in everything if id(p) not in trained)


@row_by_row
def test_the_loss_of_a_batch_is_the_mean_over_its_rows(case, tmp_path):
    run = trainer(case, tmp_path, objective=by_row(case.objective()))
    batch = run.rows.batch(0)
    loss, found = gradients(run, batch)
    alone = [gradients(run, batch[i]) for i in range(len(batch))]
    torch.testing.assert_close(loss, torch.stack([one for one, _ in alone]).mean(), rtol=2e-4, atol=1e-6)
    close(found, {name: torch.stack([part[name] for _, part in alone]).mean(0) for name in found})


@online
def test_the_gradient_of_a_rollout_is_the_mean_over_its_groups(case, tmp_path):
    """At the start, where no row differs from the base by more than another."""

    def made():
        return trainer(case, tmp_path, adapter=False, moved=False, reward=Even())

    batch = made().rows.batch(0)
    found = gradients(made(), batch)[1]
    parts = [gradients(made(), batch[start : start + 2])[1] for start in range(0, len(batch), 2)]
    close(found, {name: torch.stack([part[name] for part in parts]).mean(0) for name in found})


@each
def test_bfloat16_stays_finite_and_near(case, tmp_path):
    """At the start and with rewards that do not round: small differences are multiplied by thousands elsewhere."""
    options = {"adapter": False, "moved": False, "reward": Even()}
    exact, rough = (
        trainer(case, tmp_path, objective=case.once(), precision=precision, **options) for precision in ("no", "bf16")
    )
    (loss, found), (other, rounded) = gradients(exact), gradients(rough)
    assert other.isfinite() and other.dtype == torch.float32
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in rounded.values())
    torch.testing.assert_close(other, loss, rtol=0.05, atol=0.05)
    assert torch.cosine_similarity(flat(found), flat(rounded), dim=0) > 0.9


class Rounded(Scored):
    """All pictures score the same, but for rounding."""

    def score(self, images, prompts, meta):
        return 1e-7 * super().score(images, prompts, meta)


@where(lambda case: case.has("reward_noise"))
def test_rewards_that_differ_by_rounding_alone_move_nothing(case, tmp_path):
    def moves(**options):
        run = trainer(case, tmp_path, adapter=False, moved=False, reward=Rounded(), objective=case.objective(**options))
        return any(value.any() for value in gradients(run)[1].values())

    assert moves(reward_noise=0.0)
    # DiffusionNFT pulls the model towards what it drew, good or not.
    assert case.name == "nft" or not moves()


@where(lambda case: case.has("clip"))
def test_a_rollout_is_used_once_where_rounding_is_more_than_the_clip(case, tmp_path):
    def begin(**options):
        gradients(trainer(case, tmp_path, objective=case.objective(**options), precision="bf16"))

    begin(clip=1e3)
    begin(clip=1e-9, updates=1)
    with pytest.raises(UserError, match=r"rounding moves log-probabilities by .* more than objective.clip=1e-09"):
        begin(clip=1e-9)


@row_by_row
def test_two_halves_accumulate_to_one_batch(case, tmp_path):
    ends = []
    for accumulate in (1, 2):
        options = {"size": 4 // accumulate, "accumulate": accumulate, "optimizer": "sgd", "steps": 2}
        run = trainer(case, tmp_path / str(accumulate), objective=by_row(case.objective()), **options)
        run.fit()
        ends.append({name: p.detach() for name, p in run.parameters.items()})
    close(*ends)


@where(lambda case: case.has("micro_batch"))
def test_a_step_does_not_depend_on_the_micro_batches(case, tmp_path):
    runs = [trainer(case, tmp_path, objective=case.objective(micro_batch=size)) for size in (None, 1)]
    (loss, found), (other, cut) = (gradients(run) for run in runs)
    torch.testing.assert_close(other, loss, rtol=1e-4, atol=1e-5)
    close(cut, found)


# ------------------------------------------------------------------------------------------------------- whole runs


@each
@pytest.mark.parametrize("adapter", [True, False])
def test_a_run_that_was_stopped_ends_in_the_same_bits(case, adapter, tmp_path):
    def run(name, **train):
        return trainer(case, tmp_path / name, adapter=adapter, moved=False, checkpoint_every=2, **train)

    start = {name: p.detach().clone() for name, p in run("whole").parameters.items()}
    whole = run("whole")
    whole.fit()
    interrupt(run("broken"), 2)
    broken = run("broken", resume=True)
    broken.fit()
    for name, parameter in whole.parameters.items():
        assert torch.equal(broken.parameters[name], parameter), name
    assert not torch.equal(flat(start), flat(whole.parameters))


@contextmanager
def standing_in(model, other):
    """The model computes what another one does."""
    networks, others = model.networks(), other.networks()
    for name, network in networks.items():
        network.forward = others[name].forward
    yield
    for network in networks.values():
        del network.forward


@with_base
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_without_an_adapter_the_base_is_the_model_of_the_start(case, precision, tmp_path):
    """Also after a resume, and against a second model that nothing is swapped in."""

    def run(**train):
        options = {"adapter": False, "moved": False, "checkpoint_every": 2, "precision": precision}
        return trainer(case, tmp_path, objective=case.once(), **options, **train)

    start = new(case.toy)
    interrupt(run(), 2)
    found = []
    for own in (True, False):
        resumed = run(resume=True, steps=2)
        resumed.fit()
        assert not torch.equal(next(iter(resumed.parameters.values())), next(start.main.parameters()))
        if not own:
            resumed.lender.reference = functools.partial(standing_in, resumed.model, start)
        resumed._gradients(2)
        found.append(taken(resumed))
    assert torch.equal(flat(found[0]), flat(found[1]))


# ------------------------------------------------------------------------------------------------------- estimates


@each
def test_a_probe_keeps_something_and_trains_nothing(case, tmp_path):
    run = trainer(case, tmp_path)
    before = {name: p.detach().clone() for name, p in run.parameters.items()}
    kept = Kept([*run.parameters.values()])
    with kept:
        run.objective.probe(run.precise, run.rows.batch(0), run.lender.tools(0))
    assert kept.bytes > 0
    assert all(p.grad is None and torch.equal(p, before[name]) for name, p in run.parameters.items())
