from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
import torch
from PIL import Image

from visiontune.data.base import Config, Sample, Source
from visiontune.data.loader import BatchSampler
from visiontune.data.rows import Rows


def sample(name: str, size: tuple[int, int] = (32, 32), prior: bool = False) -> Sample:
    color = (sum(name.encode()) % 256,) * 3
    weight = 0.5 if prior else 1.0
    sources = {"image": Source(lambda: Image.new("RGB", size, color))}
    return Sample(id=name, sources=sources, caption=f"c {name}", prior=prior, weight=weight)


@pytest.fixture
def rows(model, tmp_path):
    def build(samples: list[Sample], **options) -> Rows:
        return Rows(model, samples, Config(root="x", **options), tmp_path / "cache")

    return build


@pytest.fixture
def seven(rows):
    return rows([sample(f"s{i}") for i in range(7)])


def ids(sampler: BatchSampler, steps) -> list[str]:
    return [sampler.rows.samples[p.index].id for step in steps for p in sampler.plan(step)]


def same(a, b) -> bool:
    conditions = torch.equal(a.cond.tokens, b.cond.tokens)
    return a.ids == b.ids and a.prompts == b.prompts and torch.equal(a.data["image"], b.data["image"]) and conditions


# ---------------------------------------------------------------------------------------------------- resuming


def test_a_batch_depends_on_seed_and_step_alone(rows, seven):
    sampler = BatchSampler(seven, 2, seed=3)
    straight = [sampler.batch(step) for step in range(12)]
    resumed = BatchSampler(rows(seven.samples), 2, seed=3)
    assert all(same(resumed.batch(step), straight[step]) for step in (11, 4, 0, 7))
    other = BatchSampler(seven, 2, seed=4)
    assert ids(other, range(12)) != ids(sampler, range(12))
    assert ids(BatchSampler(seven, 2, seed=-3), range(12)) != ids(sampler, range(12))
    assert not {p.seed for p in other.plan(0)} & {p.seed for p in sampler.plan(0)}


# ---------------------------------------------------------------------------------------------------- order


def test_every_pass_shows_each_sample_once_in_a_new_order(seven):
    stream = ids(BatchSampler(seven, 2, seed=0), range(70))
    passes = [tuple(stream[i : i + 7]) for i in range(0, 140, 7)]
    assert all(sorted(p) == [f"s{i}" for i in range(7)] for p in passes)
    assert len(set(passes)) > 15


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_together_see_what_one_process_sees(rows, world):
    samples = [sample(f"s{i}") for i in range(7)] + [sample(f"p{i}", prior=True) for i in range(5)]
    r = rows(samples, flip=True, caption_dropout=0.3)
    whole = BatchSampler(r, 2 * world, seed=1)
    parts = [BatchSampler(r, 2, seed=1, rank=rank, world=world) for rank in range(world)]
    for step in range(9):
        union = whole.plan(step)
        plans = [part.plan(step) for part in parts]
        assert [p for plan in plans for p in plan[:2]] == union[: 2 * world]
        assert [p for plan in plans for p in plan[2:]] == union[2 * world :]


def test_a_set_smaller_than_the_batch_wraps_round(rows):
    stream = ids(BatchSampler(rows([sample("a"), sample("b")]), 5, seed=0), range(4))
    assert Counter(stream) == {"a": 10, "b": 10}


# ---------------------------------------------------------------------------------------------------- buckets


@pytest.fixture
def mixed(rows, model):
    model.resolution = 512
    shapes = {"even": (50, 50), "wide": (60, 40), "tall": (40, 60)}
    counts = {"even": 6, "wide": 3, "tall": 1}
    return rows([sample(f"{n}{i}", shapes[n]) for n, count in counts.items() for i in range(count)])


def test_a_batch_has_one_size_that_of_its_images(mixed):
    sampler = BatchSampler(mixed, 2, seed=0)
    for step in range(10):
        plan = sampler.plan(step)
        (size,) = {p.size for p in plan}
        assert all(p.index in mixed.buckets[size] for p in plan)
    assert sampler.batch(0).data["image"].shape[2:] == tuple(side // 2 for side in sampler.plan(0)[0].size)


def test_buckets_take_turns_in_proportion_and_each_samples_passes_are_whole(mixed):
    sampler = BatchSampler(mixed, 2, seed=0)
    turns = [sampler.plan(step)[0].size for step in range(40)]
    shares = {size: len(group) for size, group in mixed.buckets.items()}
    assert Counter(turns) == {size: 4 * n for size, n in shares.items()}
    for start in range(0, 40, 10):  # evenly spread: the bucket with three turns of ten never has two in a row
        cycle = [shares[size] for size in turns[start : start + 10]]
        assert (3, 3) not in pairwise(cycle)
    stream = ids(sampler, range(40))
    assert set(Counter(stream).values()) == {8}
    for size, group in mixed.buckets.items():
        names = {mixed.samples[i].id for i in group}
        own = [name for name in stream if name in names]
        chunks = [own[i : i + len(group)] for i in range(0, len(own), len(group))]
        assert all(set(chunk) == names for chunk in chunks), size


# ---------------------------------------------------------------------------------------------------- prior rows


def test_prior_rows_follow_the_instance_rows_with_their_weight(rows):
    r = rows([sample(f"s{i}") for i in range(4)] + [sample(f"p{i}", prior=True) for i in range(6)])
    sampler = BatchSampler(r, 2, seed=0)
    prior: list[str] = []
    for step in range(6):
        batch = sampler.batch(step)
        assert batch.prior.tolist() == [False, False, True, True]
        assert batch.weight.tolist() == [1.0, 1.0, 0.5, 0.5]
        assert [name[0] for name in batch.ids] == ["s", "s", "p", "p"]
        assert batch.prompts == [f"c {name}" for name in batch.ids]
        prior += batch.ids[2:]
    assert sorted(prior[:6]) == sorted(prior[6:]) == [f"p{i}" for i in range(6)]


def test_prior_rows_take_the_size_of_their_batch(rows, model):
    model.resolution = 512
    r = rows([sample("a", (60, 40)), sample("b", (40, 60)), *(sample(f"p{i}", prior=True) for i in range(4))])
    sampler = BatchSampler(r, 1, seed=0)
    batches = [sampler.batch(step) for step in range(4)]
    shapes = {tuple(batch.data["image"].shape) for batch in batches}
    assert len(shapes) == 2 and all(shape[0] == 2 and shape[2] != shape[3] for shape in shapes)
    assert sorted(batch.ids[1] for batch in batches) == ["p0", "p1", "p2", "p3"]


# ---------------------------------------------------------------------------------------------------- chance


def test_flips_and_drops_come_at_their_rates_and_leave_the_order_alone(rows):
    samples = [sample(f"s{i}") for i in range(5)]
    plain = BatchSampler(rows(samples), 8, seed=0)
    chancy = BatchSampler(rows(samples, flip=True, caption_dropout=0.2), 8, seed=0)
    drawn = [p for step in range(250) for p in chancy.plan(step)]
    assert abs(sum(p.flip for p in drawn) / 2000 - 0.5) < 0.04
    assert abs(sum(p.drop for p in drawn) / 2000 - 0.2) < 0.04
    assert abs(sum(p.flip and p.drop for p in drawn) / 2000 - 0.1) < 0.03
    assert len({p.seed for p in drawn}) == 2000
    assert ids(plain, range(20)) == ids(chancy, range(20))
    assert not any(p.flip or p.drop for step in range(20) for p in plain.plan(step))


@pytest.mark.parametrize(("rate", "expected"), [(0.0, 0), (1.0, 80)])
def test_dropout_of_none_or_all_is_exact(rows, rate, expected):
    sampler = BatchSampler(rows([sample("a")], caption_dropout=rate), 8, seed=0)
    assert sum(p.drop for step in range(10) for p in sampler.plan(step)) == expected


@pytest.mark.parametrize(("size", "rank", "world"), [(0, 0, 1), (1, 1, 1), (1, -1, 2)])
def test_impossible_shares_are_refused(seven, size, rank, world):
    with pytest.raises(ValueError, match="no batches"):
        BatchSampler(seven, size, rank=rank, world=world)
