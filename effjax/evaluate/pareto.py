"""Pareto optimality: which rows no other row beats, with honest ties.

A point is a tuple of figures, one an axis; `directions` says for each whether "min" or "max" is
better. `tolerance` is how far two figures of an axis may lie apart and still be a tie: the
difference between two runs of the same method that differ in nothing but the seed.
"""

import math
from collections.abc import Sequence
from typing import Literal

Direction = Literal["min", "max"]
Point = Sequence[float]


def dominates(
    a: Point, b: Point, directions: Sequence[Direction], tolerance: Sequence[float] | None = None
) -> bool:
    """Tells whether `a` is nowhere worse than `b`, and somewhere better by more than a tie.

        a > b  <=>  a_i >= b_i for all i  and  a_i > b_i + tolerance_i for some i   ("max" axes)

    So a lead within the tolerance is no reason to drop a point ("not dominated by quality alone"),
    and a deficit within it is no licence to dominate. With tolerance 0 this is Pareto dominance; a
    larger tolerance only ever keeps more points. It is a strict partial order: if a > b and b > c,
    then a leads c by at least as much on every axis.

    Raises ValueError for points, directions or tolerances that differ in length, for an unknown
    direction, a NaN or infinite figure, or a negative tolerance.
    """
    ties = _ties(directions, tolerance)
    leads = [x - y for x, y in zip(_up(a, directions), _up(b, directions), strict=True)]
    return min(leads) >= 0 and any(lead > tie for lead, tie in zip(leads, ties, strict=True))


def front(
    points: Sequence[Point],
    directions: Sequence[Direction],
    tolerance: Sequence[float] | None = None,
) -> list[int]:
    """Gives the indices of the points that no other point dominates, in their order.

    Equal points stand or fall together. Of a finite set that is not empty, at least one stands.
    """
    return [
        i
        for i, point in enumerate(points)
        if not any(dominates(other, point, directions, tolerance) for other in points)
    ]


def hypervolume(
    points: Sequence[Point], directions: Sequence[Direction], reference: Point
) -> float:
    """Measures the area that a front of two axes covers, seen from a reference point.

        the area of { z : reference <= z <= p for some point p }   ("max" axes)

    A point that is not better than the reference on both axes covers nothing. The figure grows, or
    stays, with every point added; it is comparable only at the same reference and units.

    Raises ValueError as `dominates` does, and unless there are two axes.

    Source: Zitzler & Thiele 1998, "Multiobjective optimization using evolutionary algorithms",
    section 3 (https://doi.org/10.1007/BFb0056872).
    """
    if len(directions) != 2:
        raise ValueError(f"hypervolume takes 2 axes, got {len(directions)}")
    x0, y0 = _up(reference, directions)
    corners = sorted((_up(point, directions) for point in points), reverse=True)
    area, height = 0.0, y0
    for x, y in corners:
        if x > x0 and y > height:
            area += (x - x0) * (y - height)
            height = y
    return area


def _up(point: Point, directions: Sequence[Direction]) -> tuple[float, ...]:
    """The point with every axis turned so that more is better."""
    if len(point) != len(directions):
        raise ValueError(f"a point must have {len(directions)} figures, got {len(point)}")
    for direction in directions:
        if direction not in ("min", "max"):
            raise ValueError(f"a direction must be 'min' or 'max', got {direction!r}")
    if not all(math.isfinite(x) for x in point):
        raise ValueError(f"a point must have finite figures, got {tuple(point)}")
    return tuple(x if d == "max" else -x for x, d in zip(point, directions, strict=True))


def _ties(directions: Sequence[Direction], tolerance: Sequence[float] | None) -> Sequence[float]:
    ties = (0.0,) * len(directions) if tolerance is None else tolerance
    if len(ties) != len(directions) or not all(math.isfinite(t) and t >= 0 for t in ties):
        raise ValueError(f"tolerance must be {len(directions)} numbers, 0 or above, got {ties}")
    return ties
