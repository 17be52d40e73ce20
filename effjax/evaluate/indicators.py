"""Where indicators of cost disagree: fewer parameters is not fewer FLOPs is not less time."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

from effjax.evaluate.record import Record

INDICATORS: dict[str, Callable[[Record], float | None]] = {
    "parameters": lambda r: r.params.total,
    "bytes stored": lambda r: r.bytes.stored,
    "FLOPs per token": lambda r: r.flops.per_token,
    "state": lambda r: r.state_bytes.per_token,
    "time per token": lambda r: _inverse(r.time.tokens_per_s_generate),
    "joules": lambda r: r.energy.joules,
}
"""What a record costs, by each indicator; less is cheaper."""


@dataclass(frozen=True)
class Disagreement:
    """Two indicators over the same rows: of `pairs` of rows that both order, `flips` oppositely.

    `correlation` is Kendall's tau-b: 1 where they agree on every pair, -1 where on none; None where
    one of them does not tell the rows apart. `example` is a flipped pair of rows' indices.
    """

    first: str
    second: str
    correlation: float | None
    pairs: int
    flips: int
    example: tuple[int, int] | None


def disagreements(records: Sequence[Record]) -> list[Disagreement]:
    """Compares every two indicators of cost by the order into which they put the rows.

        tau_b = (agreeing - flipped pairs) / sqrt(pairs that one orders * pairs that the other does)

    A pair of rows of which one indicator is unknown is left out of that comparison.

    Source: Dehghani et al. 2022, "The efficiency misnomer" (https://arxiv.org/abs/2110.12894);
    Kendall 1945, "The treatment of ties in ranking problems", for tau-b.
    """
    figures = {name: [cost(record) for record in records] for name, cost in INDICATORS.items()}
    return [_compare(a, b, figures[a], figures[b]) for a, b in combinations(figures, 2)]


def _compare(
    first: str, second: str, x: Sequence[float | None], y: Sequence[float | None]
) -> Disagreement:
    orders = []
    for i, j in combinations(range(len(x)), 2):
        xi, xj, yi, yj = x[i], x[j], y[i], y[j]
        if xi is not None and xj is not None and yi is not None and yj is not None:
            orders.append(((xi > xj) - (xi < xj), (yi > yj) - (yi < yj), (i, j)))
    products = [a * b for a, b, _ in orders]
    flipped = [pair for a, b, pair in orders if a * b < 0]
    ordered = sum(bool(a) for a, _, _ in orders) * sum(bool(b) for _, b, _ in orders)
    tau = sum(products) / ordered**0.5 if ordered else None
    pairs = sum(bool(product) for product in products)
    return Disagreement(first, second, tau, pairs, len(flipped), flipped[0] if flipped else None)


def _inverse(rate: float | None) -> float | None:
    return None if rate is None else 1 / rate
