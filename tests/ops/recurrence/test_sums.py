"""Sums by halves, and broadcasts whose gradient is one, against numpy's and autodiff's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.ops.recurrence.sums import product, spread, total

X = np.random.default_rng(0).normal(size=(3, 7, 8)).astype(np.float32)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_halves_sum_to_the_whole(axis):
    np.testing.assert_allclose(total(jnp.asarray(X), axis), X.sum(axis), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("axis", [0, 2, -1])
def test_a_spread_is_a_broadcast_with_its_gradient(axis):
    weight = np.random.default_rng(1).normal(size=np.expand_dims(X, axis).repeat(5, axis).shape)

    def by_hand(x):
        return jnp.sum(spread(x, axis, 5) * weight), spread(x, axis, 5)

    def plain(x):
        wide = jnp.repeat(jnp.expand_dims(x, axis), 5, axis)
        return jnp.sum(wide * weight), wide

    got, want = (jax.jit(jax.grad(f, has_aux=True))(X) for f in (by_hand, plain))
    np.testing.assert_array_equal(got[1], want[1])
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5, atol=1e-5)


def test_a_product_is_an_einsum_with_its_gradients():
    rng = np.random.default_rng(2)
    x, y = (rng.normal(size=s).astype(np.float32) for s in ((2, 3, 5), (3, 2, 4, 5)))
    weight = rng.normal(size=(4, 3, 2))
    spec = "abk,bamk->mba"
    got, want = (
        jax.jit(jax.grad(lambda x, y, f=f: jnp.sum(f(spec, x, y) * weight), (0, 1)))(x, y)
        for f in (product, jnp.einsum)
    )
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
