"""Pareto fronts: equal to a brute force that shares no code, and a strict partial order."""

import itertools

import numpy as np
import pytest

from effjax.evaluate.pareto import dominates, front, hypervolume

DIRECTIONS = {
    1: ("min",),
    2: ("min", "max"),
    3: ("max", "min", "min"),
    4: ("min", "min", "max", "max"),
}


def draws(axes: int, seed: int, count: int = 40) -> np.ndarray:
    """Points on a coarse grid, so that ties and equal points are many."""
    return np.random.default_rng(seed).integers(0, 7, (count, axes)).astype(float)


def brute_front(points: np.ndarray, directions, tolerance) -> list[int]:
    """The definition with nothing but comparisons, axis by axis, written for each direction."""
    kept = []
    for i in range(len(points)):
        beaten = False
        for j in range(len(points)):
            nowhere_worse, somewhere_better = True, False
            for axis, direction in enumerate(directions):
                mine, other = points[i][axis], points[j][axis]
                if direction == "min":
                    nowhere_worse &= bool(other <= mine)
                    somewhere_better |= bool(mine - other > tolerance[axis])
                else:
                    nowhere_worse &= bool(other >= mine)
                    somewhere_better |= bool(other - mine > tolerance[axis])
            beaten |= nowhere_worse and somewhere_better
        if not beaten:
            kept.append(i)
    return kept


@pytest.mark.parametrize("axes", DIRECTIONS)
@pytest.mark.parametrize("tie", [0.0, 1.0, 2.5])
def test_front_equals_brute_force(axes, tie):
    directions, tolerance = DIRECTIONS[axes], (tie,) + (0.0,) * (axes - 1)
    for seed in range(10):
        points = draws(axes, seed)
        got = front(points, directions, tolerance)
        assert got == brute_front(points, directions, tolerance)
        assert got


def test_brute_force_catches_a_front_that_ignores_direction():
    points = draws(2, 0)
    assert front(points, ("min", "min")) != brute_front(points, ("min", "max"), (0, 0))


@pytest.mark.parametrize("tie", [0.0, 1.5])
def test_dominance_is_a_strict_partial_order(tie):
    points, directions, tolerance = draws(3, 1, 20), DIRECTIONS[3], (tie, 0.0, 0.5)
    over = {
        (i, j)
        for i, j in itertools.product(range(len(points)), repeat=2)
        if dominates(points[i], points[j], directions, tolerance)
    }
    assert over
    assert not any(i == j or (j, i) in over for i, j in over)
    assert all((i, n) in over for i, j in over for m, n in over if j == m)


def test_a_new_point_extends_the_front_and_drops_what_it_beats():
    directions = ("min", "max")
    points = draws(2, 2).tolist()
    before = front(points, directions)
    new = [min(p[0] for p in points) - 1, max(p[1] for p in points) - 1]
    after = front([*points, new], directions)
    assert len(points) in after
    dropped = set(before) - set(after)
    assert dropped == {i for i in before if dominates(new, points[i], directions)}
    assert dropped
    assert front([[-1.0, 9.0], *points], directions) == [0]


def test_a_tie_in_quality_alone_does_not_drop_a_point():
    directions, tie = ("min", "min"), (0.02, 0.0)
    assert dominates((2.20, 5.0), (2.23, 5.0), directions, tie)
    assert not dominates((2.20, 5.0), (2.21, 5.0), directions, tie)  # a lead within the tie
    assert dominates((2.20, 4.0), (2.21, 5.0), directions, tie)  # cheaper, and no worse
    assert not dominates((2.21, 4.0), (2.20, 5.0), directions, tie)  # a deficit is a deficit
    assert dominates((2.20, 5.0), (2.21, 5.0), directions)


def test_a_tolerance_only_keeps_more():
    for seed in range(5):
        points = draws(3, seed)
        fronts = [set(front(points, DIRECTIONS[3], (t, 0.0, 0.0))) for t in (0.0, 1.0, 3.0)]
        assert fronts[0] <= fronts[1] <= fronts[2]


def test_equal_points_stand_together():
    assert front([(1, 1), (1, 1), (2, 2)], ("min", "min")) == [0, 1]
    assert front([], ("min", "min")) == []
    assert front([(3.0,)], ("max",)) == [0]


@pytest.mark.parametrize(
    ("points", "directions", "tolerance", "message"),
    [
        ([(1.0,), (1.0,)], ("min", "min"), None, "2 figures, got 1"),
        ([(1.0, float("nan")), (1.0, 1.0)], ("min", "min"), None, "finite"),
        ([(1.0, 1.0)], ("least", "min"), None, "'min' or 'max', got 'least'"),
        ([(1.0, 1.0)], ("min", "min"), (0.0,), "tolerance must be 2 numbers"),
        ([(1.0, 1.0)], ("min", "min"), (-1.0, 0.0), "tolerance must be 2 numbers"),
        ([(1.0, 1.0)], ("min", "min"), (float("nan"), 0.0), "tolerance must be 2 numbers"),
    ],
)
def test_what_is_not_a_point_is_refused(points, directions, tolerance, message):
    with pytest.raises(ValueError, match=message):
        front(points, directions, tolerance)


def brute_area(points: np.ndarray, reference: tuple[float, float]) -> float:
    """Unit cells of an integer grid that some point covers, both axes maximised."""
    cells = set()
    for x, y in points.astype(int):
        cells |= set(itertools.product(range(int(reference[0]), x), range(int(reference[1]), y)))
    return float(len(cells))


def test_hypervolume_equals_the_cells_covered():
    for seed in range(10):
        points = draws(2, seed, 12)
        want = brute_area(points, (2, 1))
        assert hypervolume(points, ("max", "max"), (2, 1)) == pytest.approx(want)
        turned = points * [-1, 1]
        assert hypervolume(turned, ("min", "max"), (-2, 1)) == pytest.approx(want)
        kept = points[front(points, ("max", "max"))]
        assert hypervolume(kept, ("max", "max"), (2, 1)) == pytest.approx(want)
        assert want > 0


def test_hypervolume_of_nothing_is_zero():
    assert hypervolume([], ("max", "max"), (0, 0)) == 0
    assert hypervolume([(-1, 5), (5, 0)], ("max", "max"), (0, 0)) == 0
    with pytest.raises(ValueError, match="2 axes"):
        hypervolume([(1,)], ("max",), (0,))
