"""Examples are rows like a packed text's: loaded once an epoch, resumed, padded, digested."""

import numpy as np
import pytest

from effjax.data.examples import Examples
from effjax.data.loader import ArrayLoader, in_order
from effjax.data.tasks import TASKS, Copying, ListOps, examples
from effjax.errors import ConfigError

MADE = examples(Copying(vocab=6, shortest=1, longest=5), 7, 0)


def test_rows_are_examples_with_padding_that_nothing_reads():
    batch = MADE.rows(np.array([3, -1]))
    live = MADE.tokens[3] >= 0
    assert not live.all()
    np.testing.assert_array_equal(batch.positions[0], np.where(live, np.arange(10), -1))
    np.testing.assert_array_equal(batch.segments[0], np.where(live, 0, -1))
    np.testing.assert_array_equal(batch.tokens[0][live], MADE.tokens[3][live])
    np.testing.assert_array_equal(batch.targets[0], np.where(live, MADE.targets[3], -1))
    assert (batch.positions[1] == -1).all() and (batch.targets[1] == -1).all()  # noqa: PT018
    assert MADE.size == (MADE.tokens >= 0).sum()
    with pytest.raises(IndexError, match="rows 0 to 7, of 7"):
        MADE.rows(np.array([0, 7]))


def test_a_loader_gives_each_example_once_an_epoch_and_resumes():
    loader = ArrayLoader(MADE, 2, 5)
    seen = [next(loader) for _ in range(7)]
    rows = [loader.rows_at(step) for step in range(7)]
    assert np.bincount(np.concatenate(rows)).tolist() == [2] * 7
    other = ArrayLoader(MADE, 2, 5)
    other.restore({**loader.position, "epoch": 0, "index": 6})
    np.testing.assert_array_equal(next(other).tokens, seen[3].tokens)
    assert sum((b.positions[:, 0] == 0).sum() for b in in_order(MADE, 4)) == 7


@pytest.mark.parametrize("name", TASKS)
def test_a_task_is_a_function_of_its_seed_within_its_vocabulary(name):
    small = {"list_ops": {"length": 60, "shortest": 10}, "pathfinder": {"side": 16, "dashes": 3}}
    task = TASKS[name](**small.get(name, {}))
    first, again, other = (examples(task, 5, seed) for seed in (1, 1, 2))
    assert first.digest == again.digest != other.digest
    assert first.tokens.shape == first.targets.shape == (5, task.length)
    assert -1 <= first.tokens.min() <= first.tokens.max() < task.vocab
    assert -1 <= first.targets.min() <= first.targets.max() < task.vocab
    assert (first.targets >= 0).any(axis=1).all()
    assert (first.tokens[first.targets >= 0] >= 0).all()  # asked at live tokens only
    starts = np.diff((first.tokens >= 0).astype(int), axis=1)
    assert (starts <= 0).all()  # padding at the end only
    assert isinstance(first, Examples)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: examples(ListOps(), 0, 0), "count >= 1"),
        (lambda: examples(ListOps(), 1, -1), "seed >= 0"),
        (lambda: ListOps(length=10, shortest=11), "ListOps.length must be at least shortest=11"),
        (lambda: Copying(shortest=3, longest=2), "Copying.longest must be at least shortest=3"),
        (lambda: TASKS["associative_recall"](pairs=20), "length must be at least 4 pairs=80"),
        (lambda: TASKS["associative_recall"](vocab=8), "vocab must be above 9"),
        (lambda: TASKS["selective_copying"](context=3, symbols=4), "fit into context=3, got 4"),
        (lambda: TASKS["selective_copying"](vocab=3), "vocab must be at least 4"),
        (lambda: TASKS["induction_heads"](length=2), "length must be at least 3"),
        (lambda: TASKS["pathfinder"](side=8), "side must leave room for two curves of 14 dashes"),
    ],
)
def test_sizes_that_make_no_example_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
