"""Rank correlations against the definition, and flips that are known."""

import dataclasses
from itertools import combinations

import numpy as np
import pytest

from effjax.evaluate.indicators import INDICATORS, disagreements
from effjax.evaluate.record import Parameters


def naive(x, y):
    """Kendall's tau-b from sign matrices."""
    a, b = (np.sign(np.subtract.outer(v, v)) for v in (np.asarray(x, float), np.asarray(y, float)))
    return (a * b).sum() / np.sqrt((a**2).sum() * (b**2).sum())


def test_every_pair_of_indicators_is_compared(records):
    found = disagreements(records)
    assert {(d.first, d.second) for d in found} == set(combinations(INDICATORS, 2))
    checked = 0
    for d in found:
        x, y = ([INDICATORS[name](r) for r in records] for name in (d.first, d.second))
        if len(set(x)) > 1 and len(set(y)) > 1:
            assert d.correlation == pytest.approx(naive(x, y))
            flips = sum(
                (x[i] - x[j]) * (y[i] - y[j]) < 0 for i, j in combinations(range(len(x)), 2)
            )
            assert d.flips == flips
            checked += 1
    assert checked >= 6


def test_a_flip_is_found_and_named(records):
    small = dataclasses.replace(records[-2], params=Parameters(100, 100))  # switch: dearest bytes
    (d,) = (
        d
        for d in disagreements([records[0], small])
        if (d.first, d.second) == ("parameters", "bytes stored")
    )
    assert (d.flips, d.pairs, d.correlation, d.example) == (1, 1, -1.0, (0, 1))


def test_unknown_or_equal_figures_are_no_disagreement(records, unfinished):
    for d in disagreements([records[0], unfinished]) + disagreements([]):
        assert (d.flips, d.pairs, d.correlation, d.example) == (0, 0, None, None)
    for d in disagreements([records[0], records[0]]):
        assert (d.flips, d.pairs, d.correlation) == (0, 0, None)
