"""Butterfly factors: transforms that they are exactly, what they cost, and how they are found."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from effjax.cost import flops
from effjax.errors import ConfigError
from effjax.ops.structured.butterfly import (
    bit_reversal,
    butterfly_multiply,
    dft_factors,
    hadamard_factors,
    naive_butterfly,
    project_butterfly,
)
from effjax.transforms.factorize.butterfly import butterfly
from effjax.weights import Axes

# Compiled whole: each operation on its own would be compiled too.
multiply, naive, project = map(jax.jit, (butterfly_multiply, naive_butterfly, project_butterfly))
SQUARE = {"w": Axes(("embed",), ("mlp",))}


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def near(got, wanted, tolerance=1e-5):
    assert np.std(wanted) > 1e-3
    assert np.abs(np.asarray(got) - wanted).max() <= tolerance * np.abs(wanted).max()


def check_hadamard(factors):
    n = factors.shape[1]
    assert np.array_equal(naive(factors), scipy.linalg.hadamard(n))
    x = normal(3, n)
    near(multiply(jnp.asarray(x), factors), x @ scipy.linalg.hadamard(n))


@pytest.mark.parametrize("n", [2, 16])
def test_hadamards_transform_is_a_butterfly(n):
    check_hadamard(hadamard_factors(n))


def check_dft(n, order):
    x = normal(3, n) + 1j * normal(3, n, seed=1)
    near(multiply(jnp.asarray(x[:, order]), dft_factors(n)), np.fft.fft(x))


@pytest.mark.parametrize("n", [2, 16])
def test_fouriers_transform_is_a_butterfly_of_the_reversed_bits(n):
    check_dft(n, bit_reversal(n))


def test_the_laws_of_transforms_catch_wrong_factors_and_a_wrong_order():
    with pytest.raises(AssertionError):
        check_hadamard(hadamard_factors(8)[::-1].at[0].multiply(2))
    with pytest.raises(AssertionError):
        check_dft(8, np.arange(8))


def test_a_product_costs_n_log_n_and_so_does_its_gradient():
    for n in (64, 1024):
        x, factors = jnp.zeros((1, n)), hadamard_factors(n)
        stages = n.bit_length() - 1
        counted = flops.count(butterfly_multiply, x, factors)
        assert (counted.total, counted.elementwise) == (0, 3 * n * stages)
        both = flops.count(
            jax.grad(lambda x, f: butterfly_multiply(x, f).sum(), (0, 1)), x, factors
        )
        assert both.elementwise < 12 * n * stages


@pytest.mark.parametrize("n", [2, 16])
def test_a_true_butterfly_is_recovered(n):
    factors = jnp.asarray(normal(n.bit_length() - 1, n, 2))
    near(naive(project(naive(factors))), naive(factors))
    dft = np.fft.fft(np.eye(n))[:, bit_reversal(n)].astype(np.complex64)
    near(naive(project(jnp.asarray(dft))), dft)
    with pytest.raises(AssertionError):
        near(naive(project(jnp.asarray(normal(16, 16)))), normal(16, 16))


def test_the_verb_recovers_a_grid_of_butterflies():
    blocks = [
        [naive(jnp.asarray(normal(3, 8, 2, seed=2 * i + j))).T for j in range(2)] for i in range(3)
    ]
    w = np.block([[np.asarray(b) for b in row] for row in blocks])
    made = butterfly({"w": jnp.asarray(w)}, SQUARE)["w"]
    near(made.materialize(), w)
    assert made.multiply_adds == 6 * 2 * 8 * 3
    kept = butterfly({"w": jnp.asarray(normal(24, 16))}, SQUARE, keep_norm=True)["w"]
    norms = np.linalg.norm(kept.materialize()), np.linalg.norm(normal(24, 16))
    np.testing.assert_allclose(*norms, rtol=1e-5)


def test_sizes_that_are_no_power_of_two_are_refused():
    for f in (hadamard_factors, dft_factors, bit_reversal):
        for n in (0, 1, 12):
            with pytest.raises(ConfigError, match=f"power of two of at least 2, got {n}"):
                f(n)
    with pytest.raises(ConfigError, match="at least 4 must divide 6 inputs and 16 outputs, got 2"):
        butterfly({"w": jnp.ones((6, 16))}, SQUARE)
