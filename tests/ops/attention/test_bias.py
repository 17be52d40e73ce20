"""Additive biases: equal to the naive form, with the cotangents of their arrays."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.ops.attention.engine import attention
from effjax.ops.attention.naive import naive_attention
from effjax.ops.attention.patterns import Causal

B, T, N, K, H = 2, 21, 4, 2, 4


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Buckets:
    """A learned number per head and distance, and a slope; `edges` holds integers."""

    table: jax.Array
    slope: jax.Array
    edges: jax.Array

    def __call__(self, q_pos, k_pos, head):
        distance = jnp.abs(q_pos - k_pos)
        bucket = (distance[..., None] >= self.edges.reshape(*[1] * distance.ndim, -1)).sum(-1)
        return self.table[head, bucket] - self.slope[head] * distance


@jax.jit
def both(q, k, v, bias, positions, segments):
    same = {
        "pattern": Causal(),
        "q_positions": positions,
        "k_positions": positions,
        "q_segments": segments,
        "k_segments": segments,
        "ordered": True,
    }

    def loss(form, options, *inputs):
        y = form(*inputs[:3], bias=inputs[3], **same, **options)
        return (y * jnp.sin(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)).sum(), y

    def run(form, **options):
        f = jax.grad(lambda *x: loss(form, options, *x), (0, 1, 2, 3), has_aux=True, allow_int=True)
        return f(q, k, v, bias)

    return run(attention, block=8), run(naive_attention)


@pytest.fixture(scope="module")
def results():
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        q, k, v = (jnp.asarray(rng.normal(size=(B, T, n, H))) for n in (N, K, K))
        edges = jnp.asarray([1, 2, 4, 8])
        bias = Buckets(jnp.asarray(rng.normal(size=(N, 5))), jnp.full(N, 0.1), edges)
        index = np.arange(T)
        packed = np.where(index < 9, index, index - 9)
        padded = np.where(index < 3, -1, index - 3)
        positions = jnp.asarray(np.stack([packed, padded]))
        segments = jnp.asarray(np.stack([index >= 9, index < 0]) * 1)
        return jax.tree.map(np.asarray, both(q, k, v, bias, positions, segments))


def test_equals_the_naive_form(results):
    (_, y), (_, wanted) = results
    np.testing.assert_allclose(y, wanted, atol=1e-13)


def test_gradients_equal_the_naive_form(results):
    (gradients, _), (wanted, _) = results
    for name, x, y in zip("qkv", gradients[:3], wanted[:3], strict=True):
        np.testing.assert_allclose(x, y, atol=1e-12, err_msg=name)
    for name in ("table", "slope"):
        x, y = getattr(gradients[3], name), getattr(wanted[3], name)
        assert np.std(y) > 1e-3
        np.testing.assert_allclose(x, y, atol=1e-12, err_msg=name)
    assert gradients[3].edges.dtype == jax.dtypes.float0


def test_the_comparison_catches_a_bias_without_gradient(results):
    (gradients, _), _ = results
    with pytest.raises(AssertionError):
        test_gradients_equal_the_naive_form(
            (((*gradients[:3], jax.tree.map(np.zeros_like, gradients[3])), None), results[1])
        )
