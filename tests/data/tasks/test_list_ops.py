"""ListOps against a reader of its own, and the shares that its specification gives."""

import statistics

import numpy as np
import pytest

from effjax.data.tasks import ListOps, examples, list_ops
from effjax.data.tasks.list_ops import CLOSE, LIST
from effjax.errors import ConfigError


def read(tokens: list[int]) -> tuple[int, int, list[int]]:
    """(value, deepest level, arguments of every list) of a written tree, by a stack."""
    stack, deepest, arguments = [[]], 1, []
    for token in tokens:
        if token < 10:
            stack[-1].append(token)
        elif token < CLOSE:
            stack.append([token])
        else:
            operator, *values = stack.pop()
            arguments.append(len(values))
            results = {
                10: min(values),
                11: max(values),
                12: int(statistics.median(values)),
                13: sum(values) % 10,
            }
            stack[-1].append(results[operator])
        deepest = max(deepest, len(stack))
    (outer,) = stack
    (value,) = outer
    return value, deepest, arguments


def test_the_answer_is_what_the_list_stands_for_and_sizes_are_kept():
    task = ListOps(length=120, shortest=20, depth=6, arguments=5)
    made = examples(task, 300, 0)
    every, operators, deepest = [], [], 0
    for tokens, targets in zip(made.tokens, made.targets, strict=True):
        written = tokens[tokens >= 0].tolist()
        assert 20 <= len(written) <= 120
        value, depth, arguments = read(written)
        assert targets[len(written) - 1] == value
        assert (targets >= 0).sum() == 1
        every += arguments
        operators += [token for token in written if 10 <= token < CLOSE]
        deepest = max(deepest, depth)
    assert set(every) == {2, 3, 4, 5}
    assert deepest <= 6
    assert abs(np.bincount(operators, minlength=14)[10:] / len(operators) - 0.25).max() < 0.03
    assert len(np.unique(made.targets[made.targets >= 0])) == 10


def test_a_node_is_a_list_as_often_as_is_said():
    """Of all trees, none thrown away: one that is not a lone digit has a list at its root."""
    task = ListOps(length=10**6, shortest=4, depth=3, arguments=2)
    made, random = 0, np.random.default_rng(0)
    for _ in range(2000):
        written: list[int] = []
        task._node(random, written, 1)
        made += len(written) > 1
    assert abs(made / 2000 - LIST) < 0.03


@pytest.mark.parametrize("sizes", [{"depth": 2}, {"depth": 5, "arguments": 2, "shortest": 47}])
def test_sizes_that_no_tree_has_are_refused(sizes):
    with pytest.raises(ConfigError, match=r"ListOps.shortest must be at most \d+"):
        ListOps(**sizes)
    ListOps(depth=5, arguments=2, shortest=46, length=46)


def test_sizes_that_hardly_a_tree_has_are_given_up(monkeypatch):
    monkeypatch.setattr(list_ops, "PATIENCE", 50)
    rare = ListOps(depth=5, arguments=2, shortest=46, length=46)
    with pytest.raises(ConfigError, match="none of 50 trees"):
        rare.draw(np.random.default_rng(0), 1)
