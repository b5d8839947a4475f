from __future__ import annotations

from visiontune.weights.shares import search


def test_the_least_of_a_bowl_is_found_with_what_was_tried_on_the_way():
    asked = []

    def bowl(shares):
        asked.append(shares)
        a, b, c = shares
        return (a - 0.25) ** 2 + 2 * (b - 0.75) ** 2 + (c - 0.5) ** 2 + 0.5 * (a - 0.25) * (b - 0.75)

    best, tried = search(bowl, 3, [0.0, 0.25, 0.5, 0.75, 1.0])
    assert best == (0.25, 0.75, 0.5) and tried[best] == 0
    assert {(0.0, 0.0, 0.0), (1.0, 0.0, 0.0), (0.0, 0.0, 1.0), (1 / 3, 1 / 3, 1 / 3)} <= tried.keys()
    assert len(asked) == len(set(asked)) < 60


def test_where_nothing_helps_the_base_is_kept():
    assert search(sum, 2, [0.0, 0.5])[0] == (0.0, 0.0)
