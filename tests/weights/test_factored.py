"""What is particular to thin factors: the product never forms, the order follows the spec."""

import jax
import jax.numpy as jnp
import pytest

import effjax
from effjax.cost import flops
from effjax.weights import Factored, LowRank


def largest(f, *args):
    """The number of entries of the largest array that a program makes."""
    jaxpr = jax.make_jaxpr(f)(*args).jaxpr
    return max(v.aval.size for e in jaxpr.eqns for v in e.outvars)


@pytest.mark.parametrize(("spec", "x"), [("bd,df->bf", (3, 64)), ("bf,df->bd", (3, 48))])
def test_the_dense_product_never_forms(spec, x):
    """Either way round, as it is used and as its transpose (a tied embedding's logits)."""
    w = Factored(jnp.ones((64, 2)), jnp.ones((2, 48)))
    x = jnp.ones(x)
    assert largest(lambda x, w: effjax.einsum(spec, x, w), x, w) <= 3 * 64
    assert flops.count(lambda x, w: effjax.einsum(spec, x, w), x, w).total == 2 * 3 * 2 * (64 + 48)
    assert largest(lambda x, w: jnp.einsum(spec, x, w.materialize()), x, w) == 64 * 48


def test_another_scale_does_not_compile_again():
    compiled = []

    @jax.jit
    def f(x, w):
        compiled.append(1)
        return effjax.einsum("bd,df->bf", x, w)

    base = jnp.ones((8, 6))
    for scale in (1.0, 2.0, 16.0):
        w = LowRank(base, jnp.ones((8, 2)), jnp.ones((2, 6)), jnp.float32(scale))
        f(jnp.ones((3, 8)), w)
    assert len(compiled) == 1


def test_rows_of_a_half_precision_table_keep_its_dtype():
    base = jnp.ones((5, 4), jnp.bfloat16)
    w = LowRank(base, jnp.ones((5, 2)), jnp.ones((2, 4)), jnp.float32(1))
    assert effjax.take(w, jnp.array([1, 2])).dtype == jnp.bfloat16
