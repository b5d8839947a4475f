"""Prompts without pictures: where they come from, and how they are dealt out to steps and processes."""

from __future__ import annotations

import time
from collections import Counter

import pytest
import torch

from visiontune.data.base import Config
from visiontune.data.prompts import PromptBatches, check_prompts, read_data_prompts
from visiontune.errors import UserError

WORDS = [f"prompt {i}" for i in range(7)]


def test_a_batch_is_a_pure_function_of_its_number():
    one, other = PromptBatches(WORDS, 4, seed=3), PromptBatches(WORDS, 4, seed=3)
    later = [one.batch(step).prompts for step in (5, 0, 5)]
    assert later[0] == later[2] == other.batch(5).prompts
    assert later[1] == other.batch(0).prompts != PromptBatches(WORDS, 4, seed=4).batch(0).prompts
    for seed in (-1, 2**70):
        assert len(PromptBatches(WORDS, 4, seed=seed).batch(0)) == 4


def test_every_pass_has_each_prompt_once():
    batches = PromptBatches(WORDS, 1)
    stream = [prompt for step in range(14) for prompt in batches.batch(step).prompts]
    assert Counter(stream[:7]) == Counter(stream[7:]) == Counter(WORDS)
    assert stream[:7] != stream[7:]


def test_no_step_has_a_prompt_twice_unless_it_must():
    batches = PromptBatches(WORDS, 3)
    steps = [batches.batch(step).prompts for step in range(40)]
    assert all(len(set(prompts)) == 3 for prompts in steps)
    assert {prompt for prompts in steps for prompt in prompts} == set(WORDS)
    few = [PromptBatches(WORDS, 7 + 2).batch(step).prompts for step in range(7)]
    assert set(Counter(prompt for prompts in few for prompt in prompts).values()) == {9}


def test_a_batch_says_which_rows_and_prompts_it_has():
    batch = PromptBatches(WORDS, 6, group=3, rank=1, world=2).batch(2)
    assert batch.data["row"].tolist() == [6, 7, 8, 9, 10, 11]
    assert [WORDS[i] for i in batch.data["prompt"]] == batch.prompts
    assert batch.ids == [str(int(i)) for i in batch.data["prompt"]]
    assert batch.cond is None
    assert batch.weight.tolist() == [1.0] * 6 and not batch.prior.any()
    part = batch[2:5]
    assert part.prompts == batch.prompts[2:5] and part.data["row"].tolist() == [8, 9, 10]


def test_a_group_is_one_prompt_on_one_rank():
    for rank in (0, 1):
        batch = PromptBatches(WORDS, 6, group=3, rank=rank, world=2).batch(1)
        assert [len(set(batch.prompts[i : i + 3])) for i in (0, 3)] == [1, 1]
        assert len(set(batch.prompts)) == 2


@pytest.mark.parametrize("group", [1, 2])
def test_ranks_together_see_what_one_process_sees(group):
    for step in range(5):
        whole = PromptBatches(WORDS, 8, group, seed=1).batch(step)
        ranks = [PromptBatches(WORDS, 4, group, seed=1, rank=rank, world=2).batch(step) for rank in (0, 1)]
        assert [prompt for batch in ranks for prompt in batch.prompts] == whole.prompts
        for key, value in whole.data.items():
            assert torch.equal(torch.cat([batch.data[key] for batch in ranks]), value)


def test_half_a_group_is_refused():
    with pytest.raises(UserError, match=r"train\.batch_size=6 .*multiple of objective\.group=4"):
        PromptBatches(WORDS, 6, group=4)


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        (["a", " ", "b", ""], r"file has empty prompts \(2, 4\)"),
        (["a", "b", "a"], "file has 'a' more than once"),
        (["b", "a", "b", "a", "a"], "file has 'b' and 1 more more than once"),
        ([], "file has no prompts"),
    ],
)
def test_prompts_that_would_skew_a_comparison_are_refused_in_one_line(prompts, words):
    with pytest.raises(UserError, match=words) as caught:
        check_prompts(prompts, "file")
    assert "\n" not in str(caught.value)


def test_many_prompts_are_checked_in_no_time():
    started = time.perf_counter()
    assert len(check_prompts([f"prompt {i}" for i in range(50_000)], "file")) == 50_000
    assert time.perf_counter() - started < 2


def test_prompts_of_a_file(tmp_path):
    text, lines = tmp_path / "p.txt", tmp_path / "p.jsonl"
    text.write_text("a [trigger] [class]\na dog\n")
    assert read_data_prompts(Config(root=str(text), trigger="sks", class_noun="cat")) == ["a sks cat", "a dog"]
    lines.write_text('{"prompt": "a dog"}\n"a cat"\n')
    assert read_data_prompts(Config(root=str(lines))) == ["a dog", "a cat"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.txt", "a dog\na cat\na dog\n", "'a dog' more than once"),
        ("p.jsonl", '"a"\n{"prompt": ""}\n', r"has empty prompts \(2\)"),
        ("p.txt", "", "is empty"),
        ("p.jsonl", '{"caption": 1}', "line 1 must be"),
        ("p.txt", None, "there is no prompts file"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_in_one_line(tmp_path, name, content, words):
    file = tmp_path / name
    if content is not None:
        file.write_text(content)
    with pytest.raises(UserError, match=words) as caught:
        read_data_prompts(Config(root=str(file)))
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_captions_of_a_dataset_serve_as_prompts_each_once():
    prompts = read_data_prompts(Config(root="pocket/prompts"))
    assert len(prompts) == len(set(prompts)) > 300
