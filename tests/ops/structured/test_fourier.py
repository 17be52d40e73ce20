"""Fourier mixing against matrices and numpy's transforms: any documents, gradients, cost."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.cost import flops
from effjax.ops.structured.fourier import (
    fourier_mixing,
    fourier_mixing_flops,
    naive_fourier_mixing,
)

B, T = 3, 13


def rows(lengths):
    """Positions and segments of rows of documents of these lengths, 0 for one padding token."""
    positions, segments = np.full((2, len(lengths), T), -1, np.int32)
    for b, row in enumerate(lengths):
        at = 0
        for document, n in enumerate(row):
            stretch = slice(at, at + n)
            positions[b, stretch], segments[b, stretch] = np.arange(n), document
            at += max(n, 1)
    return positions, segments


ROWS = rows([[T], [5, 1, 7], [0, 2, 0, 4]])


def inputs(D, dtype=np.float32):
    return np.random.default_rng(0).normal(size=(B, T, D)).astype(dtype)


@cache
def compiled(f, **options):
    return jax.jit(partial(f, **options))


def oracle(x, positions, segments):
    """numpy's transform in two dimensions of each document, found token by token."""
    y = np.zeros(x.shape)
    for b in range(len(x)):
        for document in set(segments[b][positions[b] >= 0]):
            (at,) = np.nonzero((positions[b] >= 0) & (segments[b] == document))
            y[b, at] = np.fft.fft2(x[b, at].astype(np.float64)).real
    return y


def check(f, D, positions, segments, **options):
    x, wanted = inputs(D), oracle(inputs(D), positions, segments)
    x = np.where(positions[..., None] < 0, np.nan, x)
    got = compiled(f, **options)(x, positions=positions, segments=segments)
    assert np.std(wanted) > 1e-3
    assert np.abs(got - wanted).max() < 2e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("D", [1, 6, 7])
def test_documents_are_transformed_by_themselves(D):
    check(fourier_mixing, D, *ROWS)
    check(naive_fourier_mixing, D, *ROWS)


def test_the_law_catches_documents_that_run_together():
    check(fourier_mixing, 6, *rows([[T], [5, 8], [3, 10]]))
    with pytest.raises(AssertionError):
        check(lambda x, positions, segments: fourier_mixing(
            x, positions=positions, segments=0 * segments), 6, *ROWS)  # fmt: skip


def test_aligned_rows_are_one_document_each():
    positions, segments = rows([[T]] * B)
    for D in (6, 7):
        check(fourier_mixing, D, positions, segments, aligned=True)
    check(fourier_mixing, 6, positions, segments)


def test_the_orthonormal_form_divides_by_each_documents_own_size():
    x, (positions, segments) = inputs(6), ROWS
    mixing = compiled(fourier_mixing, orthonormal=True)
    y, wanted = mixing(x, positions=positions, segments=segments), oracle(x, positions, segments)
    np.testing.assert_allclose(y[0], wanted[0] / np.sqrt(6 * T), atol=1e-5)
    np.testing.assert_allclose(y[1, :5], wanted[1, :5] / np.sqrt(6 * 5), atol=1e-5)
    mixing = compiled(fourier_mixing, orthonormal=True, aligned=True)
    twice = mixing(mixing(x, positions=positions, segments=segments), positions=positions,
                   segments=segments)  # fmt: skip
    # Twice is the projection on what stays the same when a row is turned round on both axes.
    even = (x + np.roll(x[:, ::-1, ::-1], (1, 1), (1, 2))) / 2
    np.testing.assert_allclose(twice, even, atol=1e-5)


@pytest.mark.parametrize("aligned", [False, True])
def test_gradients_are_those_of_the_matrices(aligned):
    positions, segments = map(jnp.asarray, rows([[T]] * B) if aligned else ROWS)
    weight = jnp.asarray(inputs(6)[::-1])

    def gradient(f, **options):
        y = partial(f, positions=positions, segments=segments, **options)
        return jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(y(x)) * weight)))(jnp.asarray(inputs(6)))

    wanted = gradient(naive_fourier_mixing)
    got = gradient(fourier_mixing, aligned=aligned)
    assert np.abs(got - wanted).max() < 1e-4 * np.abs(wanted).max()
    assert not np.asarray(got)[np.asarray(positions) < 0].any()


def test_long_rows_lose_no_digits():
    n = 4099  # a prime, whose chirps turn through 8 million radians
    x = np.random.default_rng(0).normal(size=(1, n, 2)).astype(np.float32)
    places = np.arange(n, dtype=np.int32)[None]
    got = compiled(fourier_mixing)(x, positions=places, segments=0 * places)
    wanted = np.fft.fft2(x[0].astype(np.float64)).real
    assert np.abs(got[0] - wanted).max() < 1e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("aligned", [False, True])
def test_the_closed_form_is_the_count(aligned):
    x, mark = jax.ShapeDtypeStruct((B, 40, 6), jnp.float32), jnp.zeros((B, 40), jnp.int32)
    mixing = partial(fourier_mixing, positions=mark, segments=mark, aligned=aligned)
    forward = flops.count(mixing, x)
    assert forward.unknown == ()
    closed = fourier_mixing_flops(B, 40, 6, aligned=aligned)
    assert forward.total == closed.forward
    both = flops.count(lambda x: jax.vjp(mixing, x)[1](x), x)
    assert both.total == closed.backward  # the forward pass is not needed for it


def test_rows_too_long_for_integer_squares_are_refused():
    x, mark = (
        jax.ShapeDtypeStruct((1, 65537, *d), t) for d, t in (((2,), np.float32), ((), np.int32))
    )
    with pytest.raises(ValueError, match="at most 65536 tokens unless aligned, got 65537"):
        jax.eval_shape(lambda x, m: fourier_mixing(x, positions=m, segments=m), x, mark)
