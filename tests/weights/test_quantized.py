"""What is particular to codes with scales: where scales multiply, how many bits are stored."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from effjax.cost.memory import stored_bytes
from effjax.weights import Axes, Quantized, named


def dots(spec, x, w):
    """(shapes of the operands) of every product in the program."""
    jaxpr = jax.make_jaxpr(lambda x, w: w.contract(spec, x))(x, w).jaxpr
    return [
        [v.aval.shape for v in e.invars] for e in jaxpr.eqns if e.primitive.name == "dot_general"
    ]


@pytest.mark.parametrize(
    ("scale", "muls_of_weights"),
    [((1, 6), 0), ((1, 1), 0), ((2, 6), 1), ((8, 1), 1)],
)
def test_scales_of_output_channels_multiply_after_the_product(scale, muls_of_weights):
    """A scale that no contracted axis carries never touches a weight-sized array."""
    w = Quantized(jnp.ones((8, 6), jnp.int8), jnp.ones(scale))
    x = jnp.ones((2, 8))
    jaxpr = jax.make_jaxpr(lambda x, w: w.contract("bd,df->bf", x))(x, w).jaxpr
    found = [
        e for e in jaxpr.eqns if e.primitive.name == "mul" and e.outvars[0].aval.shape == (8, 6)
    ]
    assert len(found) == muls_of_weights
    assert dots("bd,df->bf", x, w) == [[(2, 8), (8, 6)]]


def test_the_dtype_is_the_bits():
    shape, scale = (128, 64), jnp.ones((2, 64))
    for dtype, size in ((jnp.int8, 128 * 64), (jnp.int4, 128 * 64 // 2)):
        w = Quantized(jnp.ones(shape, dtype), scale)
        assert stored_bytes(w) == size + 2 * 64 * 4
    zeros = Quantized(jnp.ones(shape, jnp.int4), scale, jnp.ones((2, 64), jnp.int4))
    assert stored_bytes(zeros) == 128 * 64 // 2 + 2 * 64 * 4 + 2 * 64 // 2


def test_a_scale_of_one_for_an_axis_is_replicated():
    axes = Axes(("embed",), ("heads", "head"), ("layers",))
    w = Quantized(jnp.ones((2, 8, 4, 6), jnp.int8), jnp.ones((2, 1, 4, 6)))
    assert named(w, axes).scale == PartitionSpec("layers", None, "heads", "head")
    assert named(w, axes).codes == PartitionSpec(*axes.names)


def test_codes_are_exact_in_half_precision():
    """Every int8 code is a bfloat16 number, so a product with a one-hot row is the weight."""
    codes = jnp.arange(-128, 128).astype(jnp.int8).reshape(256, 1)
    w = Quantized(codes, jnp.full((1, 1), 0.5))
    y = w.contract("bd,df->bf", jnp.eye(256, dtype=jnp.bfloat16))
    assert np.array_equal(np.asarray(y, np.float32)[:, 0], 0.5 * np.arange(-128, 128))
