"""Which rows of a comparison can be compared, which of them tie, and which are Pareto-optimal."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from effjax.errors import ConfigError, near
from effjax.evaluate.pareto import Direction, front
from effjax.evaluate.record import Record

QUALITY: dict[str, Direction] = {"bits_per_byte": "min", "accuracy": "max"}
"""Which way each metric is better."""

EQUAL_TRAINING = 0.01
"""Training FLOPs this close are one budget, met to within a step, and count as equal."""


@dataclass(frozen=True)
class Axis:
    """A cost that quality is set against; `cost` gives a record's figure, None where unknown."""

    key: str
    title: str
    direction: Direction
    cost: Callable[[Record], float | None]


AXES = (
    Axis("F", "FLOPs per generated token", "min", lambda r: r.flops.per_token),
    Axis("B", "bytes stored", "min", lambda r: r.bytes.stored),
    Axis("S", "tokens per second, generating", "max", lambda r: r.time.tokens_per_s_generate),
    Axis("T", "training FLOPs of the model", "min", lambda r: r.flops.train_model),
)
"""The axes of the report; their letters mark the optimal rows in the tables."""


@dataclass(frozen=True)
class Front:
    """Quality against one axis: the rows drawn, their figures, and the optimal ones among them.

    `rows` and `optimal` index the records; `costs` and `qualities` go with `rows`. `equal` says
    that the axis does not tell the rows apart.
    """

    axis: Axis
    rows: tuple[int, ...]
    costs: tuple[float, ...]
    qualities: tuple[float, ...]
    optimal: tuple[int, ...]
    equal: bool


def better(metric: str) -> Direction:
    """Says whether less or more of a metric is better.

    Raises ConfigError for a metric that `QUALITY` does not name.
    """
    if metric not in QUALITY:
        known = ", ".join(QUALITY)
        raise ConfigError(f"quality must be one of {known}, got {metric!r}{near(metric, QUALITY)}")
    return QUALITY[metric]


def baseline(records: Sequence[Record]) -> int | None:
    """Gives the index of the first row that is finished and scored: what others are set against."""
    return next((i for i in range(len(records)) if _scored(records[i])), None)


def comparable(records: Sequence[Record], to: int | None) -> list[int]:
    """Lists the finished rows that share the metric and the text of row `to`."""
    if to is None:
        return []
    want = _yardstick(records[to])
    return [i for i, r in enumerate(records) if _scored(r) and _yardstick(r) == want]


def seeds(records: Sequence[Record]) -> list[int]:
    """Lists the baseline and its repeats: rows that differ from it in nothing but the seed."""
    first = baseline(records)
    if first is None:
        return []
    method, recipe = records[first].method, records[first].recipe
    alike = [r.method == method and r.recipe == recipe for r in records]
    return [i for i in comparable(records, first) if alike[i]]


def spread(values: Sequence[float | None]) -> float:
    """Gives max - min of what is known: how far repeats of one method lie apart."""
    known = [value for value in values if value is not None]
    return max(known) - min(known) if known else 0.0


def seed_spread(records: Sequence[Record]) -> float:
    """Gives the baseline's spread of quality over its seeds, 0 where there is only one.

    With two seeds it is their difference: a sample of the noise, not a bound of it.
    """
    return spread([records[i].quality.value for i in seeds(records)])


def fronts(records: Sequence[Record], ties: float | None = None) -> list[Front]:
    """Sets quality against each axis among the rows that are comparable with the baseline.

    `ties` is the difference in quality that counts as a tie, by default `seed_spread`; a cost ties
    within the spread of the baseline's own repeats (0 for what is counted, not measured). Bytes
    that are only simulated are drawn, but neither stand on that front nor push others off it.
    """
    first = baseline(records)
    if first is None:
        return []
    tie = seed_spread(records) if ties is None else ties
    return [_front(records, axis, comparable(records, first), tie) for axis in AXES]


def marks(found: Sequence[Front], row: int) -> str:
    """Gives the letters of the axes on which a row is optimal; an axis of equals gives none."""
    return "".join(f.axis.key for f in found if row in f.optimal and not f.equal)


def names(records: Sequence[Record]) -> list[str]:
    """Names the rows by method, with the text or the seed where the method alone is not a name."""
    first = baseline(records)
    home = None if first is None else records[first].corpus.digest
    named = [
        r.method if home in (None, r.corpus.digest) else f"{r.method} on {r.corpus.name}"
        for r in records
    ]
    return [
        f"{name}, seed {r.seed}" if named.count(name) > 1 else name
        for name, r in zip(named, records, strict=True)
    ]


def staircase(found: Front, quality: Direction) -> list[tuple[float, float]]:
    """Gives the corners of a front without ties as (cost, quality), from cheap to dear."""
    at = {i: (c, q) for i, c, q in zip(found.rows, found.costs, found.qualities, strict=True)}
    up, dear = (-1 if d == "max" else 1 for d in (quality, found.axis.direction))
    kept: list[tuple[float, float]] = []
    for c, q in sorted((at[i] for i in found.optimal), key=lambda p: (p[0] * dear, p[1] * up)):
        if not kept or q * up < kept[-1][1] * up:
            kept.append((c, q))
    return kept


def _front(records: Sequence[Record], axis: Axis, rows: Sequence[int], tie: float) -> Front:
    known = {i: cost for i in rows if (cost := axis.cost(records[i])) is not None}
    quality = {i: records[i].quality.value or 0.0 for i in known}
    costs = list(known.values())
    equal = axis.key == "T" and spread(costs) <= EQUAL_TRAINING * max(costs, default=0)
    held = [i for i in known if axis.key != "B" or records[i].bytes.saving != "simulated"]
    cost_tie = spread([axis.cost(records[i]) for i in seeds(records)])
    points = [(quality[i], 0.0 if equal else known[i]) for i in held]
    directions = (better(records[rows[0]].quality.name), axis.direction)
    best = front(points, directions, (tie, cost_tie))
    optimal = tuple(held[k] for k in best)
    return Front(axis, tuple(known), tuple(costs), tuple(quality.values()), optimal, equal)


def _scored(record: Record) -> bool:
    return record.status.finished and record.quality.value is not None


def _yardstick(record: Record) -> tuple[str, str]:
    return record.quality.name, record.corpus.digest
