"""Closed forms of single primitives against loops that do the sums one by one."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from effjax.cost import primitives
from effjax.cost.flops import count, xla_flops


def matrix(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.parametrize(
    ("spec", "left", "right", "expected"),
    [
        ("ij,jk->ik", (2, 3), (3, 5), 2 * 2 * 3 * 5),
        ("bij,bjk->bik", (7, 2, 3), (7, 3, 5), 2 * 7 * 2 * 3 * 5),
        ("btd,dnh->btnh", (2, 3, 4), (4, 5, 6), 2 * 2 * 3 * 4 * 5 * 6),
        ("ijk,ijk->i", (2, 3, 4), (2, 3, 4), 2 * 2 * 3 * 4),
        ("i,j->ij", (2,), (3,), 2 * 2 * 3),
    ],
)
def test_dot_general(spec, left, right, expected):
    def f(x, y):
        return jnp.einsum(spec, x, y)

    assert count(f, matrix(*left), matrix(*right)).total == expected


def test_a_complex_product_is_four_real_ones():
    x = matrix(3, 3, dtype=jnp.complex64)
    assert count(jnp.matmul, x, x).total == 4 * 2 * 27


def test_ragged_dot_counts_each_row_once_in_all_directions():
    m, k, n, groups = 10, 3, 5, 4
    sizes = matrix(groups, dtype=jnp.int32)
    arguments = matrix(m, k), matrix(groups, k, n), sizes
    assert count(lax.ragged_dot, *arguments).total == 2 * m * k * n

    def loss(x, w, s):
        return (lax.ragged_dot(x, w, s) ** 2).sum()

    assert count(jax.grad(loss, (0, 1)), *arguments).total == 3 * 2 * m * k * n


def pairs_one_by_one(size, taps, outputs, stride, padding, holes, dilation):
    total = 0
    for output, tap in itertools.product(range(outputs), range(taps)):
        place = output * stride + tap * dilation - padding
        total += place % holes == 0 and 0 <= place // holes < size
    return total


GEOMETRIES = [
    dict(zip(("size", "taps", "outputs", "stride", "padding", "holes", "dilation"), g, strict=True))
    for g in [
        (9, 3, 9, 1, 1, 1, 1),
        (9, 3, 5, 2, 1, 1, 1),
        (9, 4, 9, 1, 3, 1, 1),
        (13, 3, 9, 1, 0, 1, 2),
        (5, 3, 9, 1, 1, 2, 1),
        (5, 3, 4, 3, 2, 2, 2),
        (1, 1, 1, 1, 0, 1, 1),
        (7, 5, 12, 1, -1, 3, 2),
    ]
]


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_pairs(geometry):
    assert primitives._pairs(**geometry) == pairs_one_by_one(**geometry)


CONVOLUTIONS = {
    "same": {"window_strides": (1,), "padding": "SAME"},
    "valid": {"window_strides": (1,), "padding": "VALID"},
    "causal": {"window_strides": (1,), "padding": [(2, 0)]},
    "strided": {"window_strides": (2,), "padding": "SAME"},
    "dilated": {"window_strides": (1,), "padding": "SAME", "rhs_dilation": (2,)},
    "transposed": {"window_strides": (1,), "padding": [(1, 1)], "lhs_dilation": (2,)},
}


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_costs_the_same_in_both_directions(name, groups):
    batch, features, outputs, size, taps = 2, 4, 8, 9, 3
    options = CONVOLUTIONS[name]

    def f(x, w):
        return lax.conv_general_dilated(x, w, feature_group_count=groups, **options)

    def loss(x, w):
        return (f(x, w) ** 2).sum()

    arguments = matrix(batch, features, size), matrix(outputs, features // groups, taps)
    out = jax.eval_shape(f, *arguments)
    holes = options.get("lhs_dilation", (1,))[0]
    padding = options["padding"]
    if isinstance(padding, str):
        dilated = (taps - 1) * options.get("rhs_dilation", (1,))[0] + 1
        padding = lax.padtype_to_pads([size], [dilated], options["window_strides"], padding)
    pairs = pairs_one_by_one(
        size, taps, out.shape[2], options["window_strides"][0], padding[0][0], holes,
        options.get("rhs_dilation", (1,))[0],
    )  # fmt: skip
    forward = 2 * batch * outputs * (features // groups) * pairs
    assert count(f, *arguments).total == forward
    assert count(jax.grad(loss, (0, 1)), *arguments).total == 3 * forward


def test_a_convolution_agrees_with_xla():
    def f(x, w):
        return lax.conv_general_dilated(x, w, (2, 1), "SAME", feature_group_count=2)

    arguments = matrix(2, 4, 9, 8), matrix(6, 2, 3, 3)
    program = jax.jit(f).lower(*arguments).compile()
    assert xla_flops(program) == pytest.approx(count(f, *arguments).total, rel=0.01)


def test_fft():
    complex_ = matrix(3, 16, dtype=jnp.complex64)
    assert count(jnp.fft.fft, complex_).total == 3 * 5 * 16 * 4
    assert count(jnp.fft.rfft, matrix(3, 16)).total == 3 * 5 * 16 * 4 // 2
    half = matrix(3, 9, dtype=jnp.complex64)
    assert count(lambda x: jnp.fft.irfft(x, 16), half).total == 3 * 5 * 16 * 4 // 2
    both = matrix(3, 16, 8, dtype=jnp.complex64)
    assert count(jnp.fft.fft2, both).total == 3 * 5 * 128 * 7
    odd = matrix(1, 7, dtype=jnp.complex64)
    assert count(jnp.fft.fft, odd).total == round(5 * 7 * np.log2(7))
    assert count(jnp.fft.fft, matrix(4, 1, dtype=jnp.complex64)).total == 0


def test_factorisations():
    square = matrix(2, 6, 6)
    assert count(lax.linalg.cholesky, square).total == 2 * 6**3 // 3
    assert count(lax.linalg.lu, square).by_primitive["lu"] == round(2 * 2 * 6**3 / 3)
    solve = lax.linalg.triangular_solve
    assert count(lambda a, b: solve(a, b, left_side=True), square, matrix(2, 6, 3)).total == (
        2 * 6 * 6 * 3
    )
    reduction, economy = 2 * 25 * (7 - 5 / 3), 4 * 7 * 25 - 2 * 12 * 25 + 4 * 125 / 3
    assert count(jnp.linalg.qr, matrix(7, 5)).total == round(reduction + economy)
    full = count(lambda a: jnp.linalg.qr(a, mode="complete"), matrix(7, 5)).total
    assert full == round(reduction + 4 * 7 * 7 * 5 - 2 * 14 * 25 + 4 * 125 / 3)


def test_pairs_catches_padding_counted_as_work():
    wrong = [g["outputs"] * g["taps"] for g in GEOMETRIES]
    right = [pairs_one_by_one(**g) for g in GEOMETRIES]
    assert wrong != right
