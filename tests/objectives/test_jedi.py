"""JeDi: which pictures of a set are given and learnt, what the network is told of them, and runs with sets."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from accelerate import PartialState
from PIL import Image
from tiny import SIZE, save_tiny, tiny_model

from visiontune import adapters, assemble
from visiontune.config import load_run
from visiontune.core import Batch, Request
from visiontune.data.base import Config as DataConfig
from visiontune.data.inventory import inventory
from visiontune.data.loader import BatchSampler
from visiontune.data.readers import read
from visiontune.data.rows import Rows
from visiontune.errors import UserError
from visiontune.objectives.base import Tools, generator
from visiontune.objectives.jedi import Config, build
from visiontune.sampling.config import SampleConfig
from visiontune.sampling.sources import Bench


@pytest.fixture
def model():
    found = tiny_model("sd", edits="inpaint")
    found.couple()
    return found


def batch_of(model, *sets: int) -> Batch:
    count = len(sets)
    prompts = [["a red circle", "a blue square", "a green star"][i % 3] for i in range(count)]
    return Batch(
        prompts=prompts,
        data={"image": torch.randn(count, *model.latent_shape(), generator=generator("z")), "set": torch.tensor(sets)},
        cond=model.embed(prompts),
        weight=torch.arange(1.0, count + 1),
        prior=torch.zeros(count, dtype=torch.bool),
        ids=[str(i) for i in range(count)],
    )


def seed_with(objective, batch, wanted: list[bool]) -> int:
    """A seed by which just these rows are given."""
    return next(s for s in range(1000) if objective.sets(batch, Tools(rng=generator(s)))[1].tolist() == wanted)


def test_each_number_of_references_comes_as_often_and_one_picture_is_always_learnt(model):
    objective, batch = build(Config(alone=0.2)), batch_of(model, 7, 7, 7, 9, 9)
    counts, alone, draws = Counter(), 0, 3000
    for seed in range(draws):
        sizes, given = objective.sets(batch, Tools(rng=generator(seed)))
        assert sum(sizes) == 5 and not given[0] and not given[3] and given.tolist() == sorted_within(given)
        split = sizes[:3] == [1, 1, 1]
        alone += split
        assert not (split and given[:3].any())
        if not split:
            counts[int(given[:3].sum())] += 1
    assert alone / draws == pytest.approx(0.2, abs=3 * (0.2 * 0.8 / draws) ** 0.5)
    kept = sum(counts.values())
    assert all(counts[k] / kept == pytest.approx(1 / 3, abs=3 * (2 / 9 / kept) ** 0.5) for k in range(3))


def test_sets_have_as_many_references_as_are_asked_for_and_leave_one_picture(model):
    objective, batch = build(Config(alone=0.0, references=2)), batch_of(model, 0, 0, 0, 0, 1, 1)
    found = [objective.sets(batch, Tools(rng=generator(seed)))[1] for seed in range(50)]
    assert {int(given[:4].sum()) for given in found} == {2, 3} and {int(given[4:].sum()) for given in found} == {1}


def sorted_within(given: torch.Tensor) -> list[bool]:
    """References last, in each of the two sets."""
    return [*sorted(given[:3].tolist()), *sorted(given[3:].tolist())]


def test_the_loss_is_of_the_pictures_that_are_not_given(model, monkeypatch):
    """A weighted mean in closed form, with one timestep a set; references get no gradient of their own prediction."""
    objective, batch = build(Config(alone=0.0)), batch_of(model, 0, 0, 0, 1, 1)
    seed = seed_with(objective, batch, [False, False, True, False, True])
    asked, predict = [], model.predict

    def watched(x_t, t, cond):
        asked.append((x_t, t, cond, predict(x_t, t, cond).detach().requires_grad_()))
        return asked[-1][-1]

    monkeypatch.setattr(model, "predict", watched)
    found = objective.loss(model, batch, Tools(rng=generator(seed)))
    found.total.backward()
    ((x_t, t, _, pred),) = asked
    assert t.tolist() == [int(t[0])] * 3 + [int(t[3])] * 2 and t[0] != t[3]
    alpha, sigma = (part[t].view(-1, 1, 1, 1) for part in (model.schedule.alphas, model.schedule.sigmas))
    eps = (x_t - alpha * batch.data["image"]) / sigma
    errors = (pred.detach() - eps).double().square().flatten(1).mean(1)
    learnt = [0, 1, 3]
    assert float(found.total.detach()) == pytest.approx(float((errors * batch.weight)[learnt].mean()), rel=1e-4)
    assert float(found.terms["learnt"]) == pytest.approx(3 / 5)
    assert pred.grad[learnt].flatten(1).any(1).all() and not pred.grad[[2, 4]].any()


def test_references_are_shown_as_where_they_are_drawn(model):
    """As pictures of which nothing is painted, without words; the others grey, painted whole."""
    batch = batch_of(model, 0, 0)
    cond = build(Config()).shown(model, batch, torch.tensor([False, True]))
    grey, picture = Image.new("RGB", (SIZE, SIZE), (128, 128, 128)), Image.new("RGB", (SIZE, SIZE), (200, 30, 90))
    stock = tiny_model("sd", edits="inpaint")
    white, black = (Image.new("L", (SIZE, SIZE), level) for level in (255, 0))
    wanted = stock.read(
        [
            Request(prompt=batch.prompts[0], pictures=(grey,), mask=white),
            Request(prompt="", pictures=(picture,), mask=black),
        ]
    )
    channels = cond.extra["channels"]
    # A grey of 128 is half a level away from 0.
    torch.testing.assert_close(channels[0], wanted.extra["channels"][0], rtol=0, atol=0.02)
    assert torch.equal(channels[1, :1], wanted.extra["channels"][1, :1])
    assert torch.equal(channels[1, 1:], batch.data["image"][1])
    torch.testing.assert_close(cond.tokens, wanted.tokens, rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------ data


@pytest.fixture
def folder(tmp_path):
    """Sets of three, two and four pictures."""
    rng = np.random.default_rng(0)
    for name, count in (("ann", 3), ("bob", 2), ("cid", 4)):
        (tmp_path / "sets" / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 255, (SIZE, SIZE, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "sets" / name / f"{i}.png")
            (tmp_path / "sets" / name / f"{i}.txt").write_text("a photo of a circle")
    return tmp_path / "sets"


def sampler(model, folder, cache, size: int = 3, rows: int = 9, **more) -> BatchSampler:
    config = DataConfig(root=str(folder), set_size=size)
    return BatchSampler(Rows(model, read(config), config, cache), rows, seed=5, **more)


def test_batches_hold_as_many_pictures_of_each_set_as_it_has(model, folder, tmp_path):
    batches = [sampler(model, folder, tmp_path / "cache").batch(step) for step in range(8)]
    seen: dict[str, set] = {}
    for batch in batches:
        sets = batch.data["set"].tolist()
        names = [one.partition("/")[0] for one in batch.ids]
        assert sorted(Counter(names).items()) == [("ann", 3), ("bob", 2), ("cid", 3)]
        assert len({*zip(sets, names, strict=True)}) == 3 and sets == sorted(sets) and len({*batch.ids}) == 8
        for name in {*names}:
            seen.setdefault(name, set()).add(tuple(one for one in batch.ids if one.startswith(name)))
    assert len(seen["ann"]) > 2 and len({one for shown in seen["cid"] for one in shown}) == 4


def test_what_is_left_out_of_a_set_is_named(folder):
    (folder / "ann" / "notes.csv").write_text("")
    with pytest.raises(UserError, match=r"notes\.csv"):
        read(DataConfig(root=str(folder), set_size=2))
    config = DataConfig(root=str(folder), set_size=2, ignore=["notes.csv"])
    assert inventory(read(config), config)[-1] == "ignored: ann/notes.csv"
    assert {one.set for one in read(config)} == {"ann", "bob", "cid"}


def test_two_processes_see_what_one_would(model, folder, tmp_path):
    whole = sampler(model, folder, tmp_path / "cache", size=2, rows=4).plan(3)
    halves = [
        pick for rank in range(2) for pick in sampler(model, folder, tmp_path / "c", 2, 2, rank=rank, world=2).plan(3)
    ]
    assert whole == halves


def test_sets_are_named_by_a_table_or_refused(folder, tmp_path):
    lines = [
        f'{{"file_name": "{name}/{i}.png", "text": "a", "set": "{name[0]}"}}' for name in ("ann", "bob") for i in (0, 1)
    ]
    flat = tmp_path / "flat"
    folder.rename(flat)
    for file in flat.rglob("*.txt"):
        file.unlink()
    (flat / "metadata.jsonl").write_text("\n".join(lines))
    config = DataConfig(root=str(flat), set_size=2, ignore=["cid", "2.png"])
    assert [one.set for one in read(config)] == ["a", "a", "b", "b"]
    (flat / "metadata.jsonl").write_text("\n".join(lines).replace('"set": "a"', '"set": null'))
    with pytest.raises(UserError, match=r"metadata.jsonl line 1: 'set' is no name of a set"):
        read(config)
    with pytest.raises(UserError, match=r"data\.set_size=2: pocket/bumble has no sets"):
        read(DataConfig(root="pocket/bumble", set_size=2))


# ------------------------------------------------------------------------------------------------------------ runs


def run_of(folder, data, out, *options):
    small = ["train.steps=2", "train.batch_size=4", "train.warmup=0", "train.trackers=[]", "train.device=cpu"]
    where = [f"model={folder}", f"out={out}", f"data.root={data}", "data.set_size=2", "adapter={name: lora, rank: 2}"]
    return load_run("compose/jedi", [*where, *small, "train.precision=no", "train.lr=0.01", *options])


def test_an_adapter_of_sets_is_drawn_with_references_and_leaves_the_model_as_it_was(folder, tmp_path):
    saved = save_tiny(tmp_path / "model", edits="inpaint")
    shown = [f"preview.pictures=[{folder}/bob/0.png]", "preview.prompts=[a circle]", "preview.steps=2"]
    file = assemble.assemble(run_of(saved, folder, tmp_path / "runs", *shown)).fit()
    assert adapters.read_header(file)["coupled"] == "true"
    with Bench(PartialState()) as bench:
        model = bench.at(SampleConfig(prompts=["a"], adapter=str(file), device="cpu"))
        assert model.reads.most is None and model.coupling is not None
        plain = bench.at(SampleConfig(prompts=["a"], model=str(saved), device="cpu"))
        assert plain.paints and plain.coupling is None
    wrong = save_tiny(tmp_path / "flux", "flux")
    with Bench(PartialState()) as bench, pytest.raises(UserError, match="trained on sets of pictures"):
        bench.at(SampleConfig(prompts=["a"], model=str(wrong), adapter=str(file), device="cpu"))


@pytest.mark.parametrize(
    "options, line",
    [
        (["data.set_size=1"], "learns pictures of sets"),
        (["train.batch_size=3"], r"set it to 4"),
        (["adapter=none"], "adapter=none writes none"),
        (["objective=denoising"], "learns each picture by itself"),
        (["data.set_size=2", "data.mix=[pocket/scenes]"], "sets of one root"),
    ],
)
def test_what_could_not_be_is_refused_before_the_model_is_opened(options, line, folder, tmp_path):
    with pytest.raises((UserError, ValueError), match=line):
        assemble.assemble(run_of(tmp_path / "none", folder, tmp_path / "runs", *options))


def test_models_that_do_not_paint_are_refused(folder, tmp_path):
    saved = save_tiny(tmp_path / "model")
    with pytest.raises(UserError, match=r"sets of pictures are for models that paint .* `visiontune expand"):
        assemble.assemble(run_of(saved, folder, tmp_path / "runs"))
    fill = tiny_model("flux", edits="fill")
    with pytest.raises(UserError, match="no layers that attend to one picture alone"):
        build(Config()).check(fill, None)
