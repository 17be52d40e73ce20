"""Which rows are compared, which tie, and which stand on a front."""

import dataclasses

import pytest

from effjax.errors import ConfigError
from effjax.evaluate.fronts import (
    baseline,
    comparable,
    fronts,
    marks,
    names,
    seed_spread,
    seeds,
    spread,
    staircase,
)
from effjax.evaluate.record import Bytes, Flops, Quality


def row(record, method, bits, cost=1e6, stored=1000, speed=100.0, seed=0, saving="none", train=10):
    """A record with the figures that the fronts read."""
    return dataclasses.replace(
        record,
        method=method,
        seed=seed,
        quality=Quality("bits_per_byte", bits, seeds=(seed,)),
        bytes=Bytes(stored, saving),
        flops=Flops(train, 1, cost),
        time=dataclasses.replace(record.time, tokens_per_s_generate=speed),
        reasons={"quality": "one batch"},
    )


def optimal(records, key, ties=None):
    (front,) = (f for f in fronts(records, ties) if f.axis.key == key)
    return [records[i].method for i in front.optimal]


def test_rows_on_another_text_or_unfinished_are_not_compared(records, unfinished):
    rows = [unfinished, *records]
    assert baseline(rows) == 1
    home = comparable(rows, 1)
    assert [rows[i].method for i in home] == [r.method for r in records if r.method != "lora"]
    lora = next(i for i, r in enumerate(rows) if r.method == "lora")
    assert comparable(rows, lora) == [lora]
    assert all(lora not in front.rows for front in fronts(rows))


def test_nothing_finished_has_no_fronts(unfinished):
    assert baseline([unfinished]) is None
    assert fronts([unfinished]) == fronts([]) == []
    assert comparable([unfinished], None) == seeds([]) == []
    assert seed_spread([unfinished]) == spread([None]) == 0.0


def test_the_tie_is_the_spread_of_the_baselines_seeds(records):
    assert [records[i].seed for i in seeds(records)] == [0, 1]
    assert seed_spread(records) == pytest.approx(0.015)
    assert seed_spread(records[:-1]) == 0.0


def test_a_second_seed_is_not_beaten_by_the_first_alone(records):
    base = records[0]
    rows = [row(base, "a", 2.21), row(base, "a", 2.22, seed=1), row(base, "b", 2.25)]
    assert optimal(rows, "F") == ["a", "a"]
    assert optimal(rows, "F", ties=0.0) == ["a"]
    assert optimal(rows, "F", ties=1.0) == ["a", "a", "b"]


def test_a_measured_rate_ties_within_the_repeats_own_spread(records):
    base = records[0]
    pair = [row(base, "a", 2.21, speed=100.0), row(base, "a", 2.22, speed=104.0, seed=1)]
    near, far = row(base, "b", 2.21, speed=103.0), row(base, "b", 2.21, speed=105.0)
    assert optimal([*pair, near], "S") == ["a", "a", "b"]
    assert optimal([*pair, far], "S") == ["a", "b"]  # 105 leads 100 by more, 104 by less


def test_simulated_bytes_are_drawn_and_beat_nothing(records):
    base = records[0]
    rows = [
        row(base, "a", 2.2, stored=1000),
        row(base, "mask", 2.1, stored=500, saving="simulated"),
    ]
    front = fronts(rows)[1]
    assert front.axis.key == "B"
    assert len(front.rows) == 2
    assert optimal(rows, "B") == ["a"]
    assert optimal(rows, "F") == ["mask"]


def test_an_unknown_cost_is_left_out_of_its_front_only(records):
    base = records[0]
    blank = dataclasses.replace(
        row(base, "b", 2.1), flops=Flops(10, 1), reasons={"quality": "x", "flops": "unread"}
    )
    rows = [row(base, "a", 2.2), blank]
    assert optimal(rows, "F") == ["a"]
    assert optimal(rows, "B") == ["b"]


def test_equal_training_is_one_budget(records):
    base = records[0]
    rows = [row(base, "a", 2.2, train=1000), row(base, "b", 2.1, train=1009)]
    assert [f.equal for f in fronts(rows)] == [False, False, False, True]
    assert optimal(rows, "T") == ["b"]
    rows[1] = row(base, "b", 2.1, train=1200)
    assert not fronts(rows)[3].equal
    assert optimal(rows, "T") == ["a", "b"]


def test_marks_name_the_axes(records):
    found = fronts(records)
    got = {name: marks(found, i) for i, name in enumerate(names(records))}
    assert got["switch"] == "FBS"
    assert got["state space"] == "S"
    assert got["magnitude 50%"] == got["lora on python topics"] == ""
    assert "T" not in "".join(got.values())


def test_names_tell_rows_apart(records, unfinished):
    got = names([*records, unfinished])
    assert len(set(got)) == len(got)
    assert got[0] == "softmax, seed 0"
    assert got[1] == "int8"
    assert "lora on python topics" in got
    assert got[-1] == "long window"


def test_the_staircase_goes_from_cheap_to_dear(records):
    for front in fronts(records):
        corners = staircase(front, "min")
        costs, qualities = zip(*corners, strict=True)
        assert list(costs) == sorted(costs, reverse=front.axis.direction == "max")
        assert list(qualities) == sorted(qualities, reverse=True)
        points = set(zip(front.costs, front.qualities, strict=True))
        assert set(corners) <= points
        assert corners[-1][1] == min(front.qualities)


def test_a_metric_without_a_direction_is_refused(records):
    odd = dataclasses.replace(records[0], quality=Quality("acuracy", 0.5, 0.4, 0.6))
    with pytest.raises(ConfigError, match="accuracy, got 'acuracy'; did you mean 'accuracy"):
        fronts([odd])


def test_an_accuracy_is_better_higher(records):
    rows = [
        dataclasses.replace(records[0], method=method, quality=Quality("accuracy", value, 0.0, 1.0))
        for method, value in (("a", 0.8), ("b", 0.9))
    ]
    assert optimal(rows, "B") == ["b"]
