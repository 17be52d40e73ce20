"""Examples that are drawn as they are read: a task's, each once, the same on resuming."""

import itertools

import numpy as np
import pytest

from effjax.data.loader import ArrayLoader
from effjax.data.tasks import Copying, Drawn, ListOps, examples
from effjax.errors import ConfigError

TASK = ListOps(length=40, shortest=4)


def test_a_row_is_a_function_of_task_seed_and_number():
    rows = Drawn(TASK, 30, 5)
    one, some = rows.rows(np.array([7])), rows.rows(np.array([9, -1, 7]))
    for name in ("tokens", "targets", "positions", "segments"):
        np.testing.assert_array_equal(getattr(one, name)[0], getattr(some, name)[2])
    assert (some.positions[1] == -1).all()
    assert (some.targets[1] == -1).all()
    assert one.tokens.shape == (1, rows.length) == (1, 40)
    every = rows.rows(np.arange(30))
    assert len({row.tobytes() for row in every.tokens}) == 30
    assert rows.size == (every.positions >= 0).sum()
    with pytest.raises(IndexError, match="rows 0 to 30, of 30"):
        rows.rows(np.array([0, 30]))


def test_streams_of_other_seeds_and_of_what_is_held_out_are_others():
    read = [Drawn(TASK, 8, seed).rows(np.arange(8)).tokens for seed in (0, 1)]
    at_once = [np.maximum(examples(TASK, 8, seed).tokens, 0) for seed in (0, 2**64 - 1)]
    for a, b in itertools.combinations([*read, *at_once], 2):
        assert not set(map(bytes, a)) & set(map(bytes, b))


def test_the_digest_tells_task_count_seed_and_code(monkeypatch):
    many = [Drawn(TASK, 8, 0), Drawn(TASK, 9, 0), Drawn(TASK, 8, 1), Drawn(ListOps(41, 4), 8, 0)]
    digests = {rows.digest for rows in many}
    assert len(digests) == 4
    assert Drawn(TASK, 8, 0).digest == many[0].digest
    monkeypatch.setattr("effjax.data.tasks.list_ops.LIST", 0.3)
    assert Drawn(TASK, 8, 0).digest not in digests


def test_a_loader_resumes_and_reads_each_example_once():
    loader = ArrayLoader(Drawn(Copying(longest=6), 8, 3), 2, 1)
    seen = [next(loader) for _ in range(4)]
    assert sorted(np.concatenate([loader.rows_at(step) for step in range(4)])) == list(range(8))
    other = ArrayLoader(Drawn(Copying(longest=6), 8, 3), 2, 1)
    other.restore({**loader.position, "epoch": 0, "index": 4})
    np.testing.assert_array_equal(next(other).tokens, seen[2].tokens)


def test_counts_and_seeds_are_refused():
    for count, seed in [(0, 0), (1, -1), (1, 2**64)]:
        with pytest.raises(ConfigError, match="count >= 1 and seed >= 0"):
            Drawn(TASK, count, seed)
