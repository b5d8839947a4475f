"""Several sources in one run: how often each comes, at what noise, and what is refused."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from PIL import Image

from visiontune.data.base import Config, Sample, Source
from visiontune.data.inventory import inventory
from visiontune.data.loader import BatchSampler
from visiontune.data.mix import Part
from visiontune.data.prompts import read_data_prompts
from visiontune.data.readers import read
from visiontune.data.rows import Rows
from visiontune.errors import UserError
from visiontune.objectives._prior import given

LOW, HIGH = (0.0, 0.7), (0.7, 1.0)


def told(*parts: Part, **options) -> Config:
    return Config(root="pocket/bumble", mix=list(parts), **options)


def sample(name: str, part: int = 0, prior: bool = False, size: tuple[int, int] = (32, 32)) -> Sample:
    picture = Source(lambda: Image.new("RGB", size))
    return Sample(id=name, sources={"image": picture}, caption=name, part=part, prior=prior)


@pytest.fixture
def rows(model, tmp_path):
    def build(samples: list[Sample], config: Config) -> Rows:
        return Rows(model, samples, config, tmp_path / "cache")

    return build


@pytest.mark.parametrize(
    ("ranges", "trouble"),
    [
        ([(0.0, 0.6), (0.7, 1.0)], "leave a gap from 0.6 to 0.7"),
        ([(0.0, 0.8), (0.7, 1.0)], "overlap between 0.7 and 0.8"),
        ([(0.1, 0.7), (0.7, 1.0)], "leave a gap from 0 to 0.1"),
        ([(0.0, 0.7), (0.7, 0.9)], "leave a gap from 0.9 to 1"),
        ([(0.0, 1.0), (0.0, 0.7)], "overlap between 0.7 and 1|overlap between 0 and 0.7"),
        ([(0.7, 0.7), (0.7, 1.0)], "low must be below high"),
    ],
)
def test_ranges_tile_the_schedule(ranges, trouble):
    with pytest.raises(ValueError, match=trouble):
        told(Part(root="pocket/domino", timestep_range=ranges[1]), timestep_range=ranges[0])


def test_one_source_has_no_range_or_weight_of_its_own():
    with pytest.raises(ValueError, match=r"objective\.timesteps\.low and high"):
        Config(root="x", timestep_range=LOW)
    with pytest.raises(ValueError, match="leave it out"):
        Config(root="x", weight=2.0)
    with pytest.raises(UserError, match=r"data\.mix are learnt of pictures"):
        read_data_prompts(told(Part(root="pocket/domino")))


def test_sources_are_read_one_after_another_and_told_apart():
    config = told(Part(root="pocket/domino", timestep_range=LOW, weight=3.0), timestep_range=HIGH)
    found = read(config)
    assert [one.part for one in found] == [0] * 5 + [1] * 5
    assert len({one.id for one in found}) == 10 and found[5].id == "mix[0]/pocket/domino/0000"
    own = [read(Config(root=root)) for root in ("pocket/bumble", "pocket/domino")]
    assert [one.caption for one in found] == [one.caption for alone in own for one in alone]
    assert "pocket/domino: 5 pictures, 75% of the rows, noise 0 to 0.7" in inventory(found, config)


def test_pictures_of_what_is_kept_have_no_range(tmp_path):
    (tmp_path / "kept").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "kept" / "a.png")
    (tmp_path / "kept" / "a.txt").write_text("a circle")
    config = Config(root="x", timestep_range=(0.5, 1), mix=[Part(root="y", timestep_range=(0, 0.5))])
    (sample,) = given(str(tmp_path / "kept"), config)
    assert sample.caption == "a circle"


def test_a_source_without_pictures_is_refused(tmp_path, monkeypatch):
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="none"):
        read(told(Part(root=str(tmp_path / "none"))))
    monkeypatch.setattr("visiontune.data.readers._read", lambda config, *columns: [])
    with pytest.raises(UserError, match=r"data\.root \(pocket/bumble\) has no pictures"):
        read(told(Part(root="pocket/domino")))


def test_sources_come_as_often_as_their_weights_say_and_in_passes_of_their_own(rows):
    samples = [sample(f"a{i}") for i in range(40)] + [sample(f"b{i}", 1) for i in range(3)]
    sampler = BatchSampler(rows(samples, told(Part(root="b", weight=3.0))), 8, seed=1)
    stream = [sampler.rows.samples[pick.index].id for step in range(250) for pick in sampler.plan(step)]
    assert Counter(name[0] for name in stream) == {"a": 500, "b": 1500}
    for step in range(0, 40):  # at even distances, so that every batch has its share
        assert Counter(name[0] for name in stream[8 * step : 8 * step + 8])["b"] in (5, 6, 7)
    for kind, count in (("a", 40), ("b", 3)):
        own = [name for name in stream if name[0] == kind]
        assert all(len(set(own[i : i + count])) == count for i in range(0, len(own) - count, count))


def test_ranks_together_see_what_one_process_sees(rows):
    samples = [sample(f"a{i}") for i in range(5)] + [sample(f"b{i}", 1) for i in range(3)]
    made = rows(samples, told(Part(root="b")))
    whole, parts = BatchSampler(made, 6), [BatchSampler(made, 3, rank=rank, world=2) for rank in range(2)]
    for step in (0, 7, 4000):
        assert [pick for part in parts for pick in part.plan(step)] == whole.plan(step)


def test_a_bucket_without_a_source_has_the_others(rows, model):
    model.resolution = 512
    samples = [sample(f"a{i}", size=(60, 40)) for i in range(4)] + [sample(f"b{i}", 1) for i in range(4)]
    sampler = BatchSampler(rows(samples, told(Part(root="b"))), 2)
    batches = [{samples[pick.index].part for pick in sampler.plan(step)} for step in range(8)]
    assert Counter(map(tuple, batches)) == {(0,): 4, (1,): 4}


def test_a_batch_says_at_which_noise_each_row_is_trained(rows):
    samples = [sample("a"), sample("b", 1), sample("p", prior=True)]
    made = rows(samples, told(Part(root="b", timestep_range=LOW), timestep_range=HIGH))
    batch = BatchSampler(made, 2, prior_rows=1).batch(0)
    want = {"a": HIGH, "b": LOW, "p": (0.0, 1.0)}
    torch.testing.assert_close(batch.timestep_range, torch.tensor([want[name] for name in batch.ids]))
    assert batch.to(dtype=torch.bfloat16).timestep_range.dtype == torch.float32
    assert BatchSampler(rows(samples, Config(root="x")), 2).batch(0).timestep_range is None
