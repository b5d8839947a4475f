"""Conditions and batches: selecting, moving and joining rows."""

from __future__ import annotations

import pytest
import torch

from visiontune.core import Batch, Condition


def condition(rows=3, **changes) -> Condition:
    count = torch.arange(float(rows))
    parts = {
        "tokens": count.view(-1, 1, 1).expand(-1, 2, 4),
        "mask": torch.arange(rows * 2).view(rows, 2) % 3 == 0,
        "pooled": count.view(-1, 1) * 10,
        "extra": {"time_ids": count.view(-1, 1) * 100},
    }
    return Condition(**{**parts, **changes})


def batch(rows=3, **changes) -> Batch:
    parts = {
        "prompts": [f"prompt {i}" for i in range(rows)],
        "data": {"image": torch.arange(float(rows)).view(-1, 1, 1, 1), "size": torch.arange(rows)},
        "cond": condition(rows),
        "weight": torch.arange(float(rows)),
        "prior": torch.arange(rows) % 2 == 1,
        "ids": [str(i) for i in range(rows)],
    }
    return Batch(**{**parts, **changes})


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (1, [1]),
        (-1, [2]),
        (slice(0, 2), [0, 1]),
        (torch.tensor([2, 0, 2]), [2, 0, 2]),
        (torch.tensor([True, False, True]), [0, 2]),
    ],
)
def test_rows_are_selected_in_every_field(rows, expected):
    chosen = batch()[rows]
    assert len(chosen) == len(expected)
    assert chosen.data["image"].flatten().tolist() == expected
    assert chosen.weight.tolist() == expected
    assert chosen.ids == [str(i) for i in expected]
    assert chosen.prompts == [f"prompt {i}" for i in expected]
    assert chosen.data["size"].tolist() == expected
    assert chosen.prior.tolist() == [i % 2 == 1 for i in expected]
    cond = chosen.cond
    assert cond.tokens[:, 0, 0].tolist() == expected
    assert cond.pooled.flatten().tolist() == [10 * i for i in expected]
    assert cond.extra["time_ids"].flatten().tolist() == [100 * i for i in expected]
    assert torch.equal(cond.mask, condition().mask[expected])


def test_a_row_that_is_not_there_is_an_error():
    for row in (3, -4):
        with pytest.raises(IndexError, match=f"row {row} of a batch of 3"):
            condition()[row]


def test_joining_undoes_selecting():
    whole = batch()
    joined = Batch.cat([whole[0], whole[1:]])
    assert joined.ids == whole.ids
    assert joined.prompts == whole.prompts
    assert torch.equal(joined.data["image"], whole.data["image"])
    for name in ("weight", "prior"):
        assert torch.equal(getattr(joined, name), getattr(whole, name))
    for name in ("tokens", "mask", "pooled"):
        assert torch.equal(getattr(joined.cond, name), getattr(whole.cond, name))
    assert torch.equal(joined.cond.extra["time_ids"], whole.cond.extra["time_ids"])


def test_absent_fields_stay_absent():
    cond = Condition.cat([Condition(tokens=torch.ones(2, 1, 1)), Condition(tokens=torch.zeros(1, 1, 1))])
    assert len(cond) == 3
    assert cond.mask is None
    assert cond.pooled is None
    assert cond[0].pooled is None
    assert Batch.cat([batch(cond=None), batch(cond=None)]).cond is None


def test_shorter_texts_are_padded_and_what_was_added_is_masked():
    short, long = Condition(tokens=torch.ones(1, 2, 3)), Condition(tokens=torch.full((2, 4, 3), 2.0))
    joined = Condition.cat([short, long])
    assert joined.mask.tolist() == [[True, True, False, False], [True] * 4, [True] * 4]
    assert torch.equal(joined.tokens[0, :2], short.tokens[0]) and not joined.tokens[0, 2:].any()
    assert torch.equal(joined.tokens[1:], long.tokens)
    masked = Condition(tokens=torch.ones(1, 2, 3), mask=torch.tensor([[True, False]]))
    assert Condition.cat([long, masked]).mask.tolist() == [[True] * 4, [True] * 4, [True, False, False, False]]
    assert Condition.cat([masked, short]).mask.tolist() == [[True, False], [True, True]]


def test_references_of_any_number_and_size_go_with_their_rows():
    first, second = torch.zeros(4, 2, 3), torch.ones(4, 5, 2)
    shown = condition(references=[(first, second), (), (second,)])
    assert [len(row) for row in shown[torch.tensor([2, 0])].references] == [1, 2]
    assert torch.equal(shown[-1].references[0][0], second) and shown[1].references == [()]
    assert [len(row) for row in Condition.cat([shown[2], shown[:2]]).references] == [1, 2, 0]
    assert [len(row) for row in Condition.cat([condition(1), shown]).references] == [0, 2, 0, 1]
    moved = shown.to("cpu", torch.bfloat16).references
    assert moved[0][1].dtype == torch.bfloat16 and moved[0][1].shape == second.shape and moved[1] == ()


def test_parts_with_different_fields_cannot_be_joined():
    with pytest.raises(ValueError, match="only some have 'pooled'"):
        Condition.cat([condition(), condition(pooled=None)])
    with pytest.raises(ValueError, match="different keys in 'extra'"):
        Condition.cat([condition(), condition(extra={})])


def test_dtype_reaches_floating_point_features_and_never_masks_or_weights():
    moved = batch().to("cpu", torch.bfloat16)
    assert moved.data["image"].dtype == moved.cond.tokens.dtype == moved.cond.pooled.dtype == torch.bfloat16
    assert moved.cond.extra["time_ids"].dtype == torch.bfloat16
    assert moved.cond.mask.dtype == moved.prior.dtype == torch.bool
    assert moved.weight.dtype == torch.float32
    assert moved.data["size"].dtype == torch.int64


def test_an_empty_batch_keeps_its_condition():
    empty = batch()[0:0].to("cpu")
    assert len(empty) == 0
    assert empty.cond is not None


def test_device_reaches_every_tensor():
    moved = batch().to("meta")
    tensors = [moved.data["image"], moved.weight, moved.prior, moved.data["size"], moved.cond.tokens, moved.cond.mask]
    assert all(tensor.is_meta for tensor in [*tensors, moved.cond.pooled, moved.cond.extra["time_ids"]])
    assert moved.ids == ["0", "1", "2"]
