"""Bits per byte against closed forms: uniform logits, padding, rows, scales."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.errors import DataError
from effjax.evaluate.bits_per_byte import bits_per_byte

V, B, T = 256, 3, 7


@jax.jit
def rows(batch):
    """Cross-entropy row by row; a target of -1 is padding."""
    logits, targets = batch
    live = targets >= 0
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(targets, 0)[..., None], -1)
    return -(chosen[..., 0] * live).sum(-1), live.sum(-1)


@jax.jit
def whole(batch):
    nats, counts = rows(batch)
    return nats.sum(), counts.sum()


@jax.jit
def counts_padding(batch):
    nats, counts = rows(batch)
    return nats.sum(), counts.size * T


def batch(seed=0, scale=0.0, padded=()):
    random = np.random.default_rng(seed)
    targets = random.integers(0, V, (B, T), dtype=np.int32)
    for place in padded:
        targets[place] = -1
    return (scale * random.standard_normal((B, T, V))).astype(np.float32), targets


@pytest.mark.parametrize("score", [rows, whole], ids=["rows", "whole"])
def test_uniform_logits_over_256_bytes_are_8_bits(score):
    got = bits_per_byte(score, [batch(0), batch(1)])
    assert got.value == pytest.approx(8.0, rel=1e-6)
    assert got.tokens == got.bytes == 2 * B * T
    assert got.nats == pytest.approx(2 * B * T * math.log(V), rel=1e-6)


PADDED = [batch(0, padded=[(0, slice(3, None)), (2, slice(None))]), batch(1, padded=[(1, 0)])]


def check_padding_is_not_counted(score):
    got = bits_per_byte(score, PADDED)
    assert got.tokens == 2 * B * T - 4 - 7 - 1
    assert got.value == pytest.approx(8.0, rel=1e-6)


def test_padding_is_never_counted():
    check_padding_is_not_counted(rows)
    check_padding_is_not_counted(whole)


def test_the_padding_law_catches_a_scorer_that_counts_it():
    with pytest.raises(AssertionError):
        check_padding_is_not_counted(counts_padding)


def test_bytes_are_the_texts_and_not_the_tokens():
    got = bits_per_byte(rows, [batch()], bytes=2 * B * T)
    assert got.value == pytest.approx(4.0, rel=1e-6)
    assert got.low == pytest.approx(4.0, rel=1e-6)


def test_value_equals_the_naive_sum_in_float64():
    data = [batch(s, 2.0) for s in range(4)]
    bits = 0.0
    for logits, targets in data:
        exact = logits.astype(np.float64)
        for row, target in zip(exact.reshape(-1, V), targets.reshape(-1), strict=True):
            bits -= math.log2(np.exp(row[target]) / np.exp(row).sum())
    assert bits_per_byte(rows, data).value == pytest.approx(bits / (4 * B * T), rel=1e-6)


def test_the_interval_covers_the_value_and_narrows_with_rows():
    few = bits_per_byte(rows, [batch(s, 2.0) for s in range(4)])
    many = bits_per_byte(rows, [batch(s % 4, 2.0) for s in range(64)])
    assert few.low < few.value < few.high
    assert many.value == pytest.approx(few.value)
    assert 0.1 < (many.high - many.low) / (few.high - few.low) < 0.5
    assert few == bits_per_byte(rows, [batch(s, 2.0) for s in range(4)])


def test_the_interval_has_its_coverage():
    """Of intervals over draws from one distribution, about 95% cover its mean."""
    random = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        nats = random.gamma(4.0, 1.0, 60).astype(np.float32)
        got = bits_per_byte(lambda b: (b, np.ones_like(b)), [nats], seed=trial)
        covered += got.low <= 4 / math.log(2) <= got.high
    assert 180 <= covered <= 199


def test_without_rows_there_is_no_interval():
    for score, data in ((whole, [batch(), batch(1)]), (lambda b: (b, b), [np.ones(1)])):
        got = bits_per_byte(score, data)
        assert (got.low, got.high) == (None, None)


def test_nothing_to_predict_is_refused():
    for data in ([], [batch(padded=[(slice(None), slice(None))])]):
        with pytest.raises(DataError, match="no target"):
            bits_per_byte(rows, data)
    with pytest.raises(DataError, match="bytes of the held-out text must be above 0, got 0"):
        bits_per_byte(rows, [batch()], bytes=0)


def test_a_loss_that_is_not_finite_is_refused():
    with pytest.raises(FloatingPointError, match="row 1"):
        bits_per_byte(lambda b: (b, np.ones(3)), [np.array([1.0, np.nan, 2.0])])
