"""Accuracy counts targets, and only them."""

import jax.numpy as jnp
import numpy as np
import pytest

from effjax.data.examples import Examples
from effjax.data.loader import in_order
from effjax.errors import DataError
from effjax.evaluate.accuracy import accuracy
from effjax.evaluate.bootstrap import ratio_interval

TOKENS = np.random.default_rng(0).integers(0, 5, (40, 6), dtype=np.int32)


def after(params, tokens, *, positions, segments):
    """A model that says token + 1."""
    return 3.0 * jnp.eye(5)[(tokens + 1) % 5], None, None


def test_it_is_the_share_of_targets_that_come_first():
    targets = np.full_like(TOKENS, -1)
    targets[:, 2], targets[:30, 5] = (TOKENS[:, 2] + 1) % 5, (TOKENS[:30, 5] + 2) % 5
    targets[39] = -1  # a row without a target
    got = accuracy(after, {}, in_order(Examples(TOKENS, targets), 16))
    assert (got.value, got.whole) == (39 / 69, 9 / 39)
    assert (got.targets, got.rows) == (69, 39)
    assert got.low < got.value < got.high
    assert got.high - got.low < 0.15


def test_the_interval_covers_what_it_says():
    """Of 200 samples of 100 rows, 95% hold the true share."""
    random, hits = np.random.default_rng(1), 0
    for seed in range(200):
        rows = random.binomial(4, 0.3, 100)
        low, high = ratio_interval(rows, np.full(100, 4), seed=seed)
        hits += low <= 0.3 <= high
    assert 180 <= hits <= 199


def test_no_target_is_refused():
    with pytest.raises(DataError, match="no target to predict in 3 batches"):
        accuracy(after, {}, in_order(Examples(TOKENS, np.full_like(TOKENS, -1)), 16))
