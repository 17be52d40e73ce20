"""Rotary positions: the definition, the relative-position law, padding and refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.errors import ConfigError
from effjax.ops.position.rope import rope

H = 16


def complex_rope(x, positions, base=10000.0):
    """The definition in float64: pairs of features as complex numbers, turned."""
    theta = base ** (-np.arange(0, H, 2) / H)
    turn = np.exp(1j * np.asarray(positions, np.float64)[..., None, None] * theta)
    turned = (x[..., : H // 2] + 1j * x[..., H // 2 :]) * turn
    return np.concatenate([turned.real, turned.imag], axis=-1)


@pytest.fixture(scope="module")
def vectors():
    """Unit vectors [1 64 2 H]; those of head 1 live in one pair of features each."""
    x = np.random.default_rng(0).normal(size=(1, 64, 2, H))
    pair = np.arange(64) % (H // 2)
    x[..., 1, :] *= (np.arange(H)[None, :] % (H // 2)) == pair[:, None]
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("base", [10000.0, 500000.0])
def test_rotates_as_the_paper_does(vectors, base):
    positions = np.random.default_rng(1).integers(0, 131072, (1, 64)).astype(np.int32)
    positions[0, :4] = 0, 1, 2, 131071
    y = np.asarray(rope(jnp.asarray(vectors), jnp.asarray(positions), base))
    bound = positions.max() * 2.0**-33 * 2 * np.pi + 1e-6
    assert np.abs(y - complex_rope(vectors, positions, base)).max() < bound
    near = y[0, 1], complex_rope(vectors, positions, base)[0, 1]
    np.testing.assert_allclose(*near, atol=3e-7)


def check_relative(rotate, vectors, tolerance):
    """<rope(q, i), rope(k, j)> is that of (i - j, 0), wherever the pair stands up to 131072."""
    q, k = vectors, vectors[:, ::-1]
    distance = np.random.default_rng(2).integers(0, 4096, (1, 64)).astype(np.int32)
    zero = np.zeros_like(distance)

    def product(i, j):
        left, right = rotate(jnp.asarray(q), jnp.asarray(i)), rotate(jnp.asarray(k), jnp.asarray(j))
        return np.einsum("bthd,bthd->bth", *(np.asarray(x, np.float64) for x in (left, right)))

    wanted = product(distance, zero)
    assert wanted.std() > 1e-3
    for start in (1, 1000, 131072 - 4096):
        assert np.abs(product(distance + start, zero + start) - wanted).max() < tolerance


def test_products_depend_on_the_distance_only(vectors):
    check_relative(jax.jit(rope), vectors, 1e-6)


def test_the_relative_law_catches_float32_angles(vectors):
    def plain(x, positions):
        theta = jnp.asarray(10000.0 ** (-np.arange(0, H, 2) / H), jnp.float32)
        angle = (positions[..., None].astype(jnp.float32) * theta[None, None])[:, :, None]
        a, b = jnp.split(x, 2, axis=-1)
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    with pytest.raises(AssertionError):
        check_relative(plain, vectors, 1e-6)
    check_relative(plain, vectors, 1e-1)


def test_bfloat16_is_rotated_by_the_same_angles(vectors):
    positions = jnp.arange(131008, 131072)[None]
    x = jnp.asarray(vectors, jnp.bfloat16)
    y = rope(x, positions)
    assert y.dtype == jnp.bfloat16
    wanted = complex_rope(np.asarray(x, np.float64), positions)
    assert np.abs(np.asarray(y, np.float64) - wanted).max() < 2**-8


def test_padding_is_finite(vectors):
    y = rope(jnp.asarray(vectors), jnp.full((1, 64), -1))
    assert np.isfinite(y).all()


def test_refuses_what_it_cannot_rotate():
    x, positions = jnp.ones((1, 2, 1, 3)), jnp.zeros((1, 2), jnp.int32)
    with pytest.raises(ConfigError, match="head_dim must be even, got 3"):
        rope(x, positions)
    for base in (0.5, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="base must be finite"):
            rope(x[..., :2], positions, base)
