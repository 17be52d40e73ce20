"""Intervals by drawing rows again: how far a score of held-out rows may be from the truth."""

import numpy as np

RESAMPLES = 1000
CONFIDENCE = 0.95


def ratio_interval(
    sums: np.ndarray, counts: np.ndarray, scale: float = 1.0, seed: int = 0
) -> tuple[float, float]:
    """The 95% percentile bootstrap of scale * sum(sums) / sum(counts) over rows, (low, high).

    Rows are drawn again with replacement, 1000 times. It says nothing of the spread over seeds.

    Source: Efron 1979, "Bootstrap methods", doi:10.1214/aos/1176344552
    """
    random = np.random.default_rng(seed)
    # Multinomial weights are the draws' multiplicities: memory for them, not for every drawn row.
    rows = len(sums)
    weights = random.multinomial(rows, np.full(rows, 1 / rows), RESAMPLES)
    draws = scale * (weights @ sums) / (weights @ counts)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return float(low), float(high)
