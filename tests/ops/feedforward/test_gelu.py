"""The feed-forward network against its formula in numpy, alone and one for each expert."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.ops.feedforward.gelu import gelu_experts, gelu_feedforward
from effjax.weights import Factored, dense

D, F, E = 3, 5, 2


def reference(x, up, down):
    x, up, down = (np.asarray(a, np.float64) for a in (x, up, down))
    h = x @ up
    return (h / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))) @ down


@pytest.fixture
def weights():
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((E, D, F), (E, F, D))]


@pytest.mark.parametrize("rows", [(4,), (2, 4)])
def test_equals_its_formula(weights, rows):
    up, down = (w[0] for w in weights)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(*rows, D)), jnp.float32)
    y = gelu_feedforward(x, up, down)
    np.testing.assert_allclose(y, reference(x, up, down), rtol=1e-5, atol=1e-6)
    half = gelu_feedforward(x.astype(jnp.bfloat16), up, down)
    assert half.dtype == jnp.bfloat16


def test_each_expert_has_its_own_network(weights):
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, E, 4, D)), jnp.float32)
    y = jax.jit(gelu_experts)(x, *weights)
    for e in range(E):
        want = reference(x[:, e], *(w[e] for w in weights))
        np.testing.assert_allclose(y[:, e], want, rtol=1e-5, atol=1e-6)


def test_a_weight_leaf_stands_where_an_array_does(weights):
    a, b = jnp.ones((E, D, 1)), jnp.ones((E, 1, F))
    up = Factored(a, b)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, E, 4, D)), jnp.float32)
    got = gelu_experts(x, up, weights[1])
    np.testing.assert_allclose(got, gelu_experts(x, dense(up), weights[1]), rtol=1e-5, atol=1e-6)
