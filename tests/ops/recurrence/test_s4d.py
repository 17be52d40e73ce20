"""The modes and time steps of S4D against the paper's formulas, written out on their own."""

import jax
import numpy as np
import pytest

from effjax.errors import ConfigError
from effjax.ops.recurrence.s4d import log_time_steps, s4d_inv, s4d_legs, s4d_lin


@pytest.mark.parametrize("init", [s4d_lin, s4d_inv, s4d_legs])
def test_every_channel_gets_the_same_decaying_modes(init):
    log_a_real, a_imag = init(3, 8)
    assert log_a_real.shape == a_imag.shape == (3, 8)
    np.testing.assert_allclose(-np.exp(log_a_real), -0.5, rtol=1e-6)
    np.testing.assert_array_equal(a_imag[0], a_imag[2])


def test_lin_is_pi_n():
    np.testing.assert_allclose(s4d_lin(1, 4)[1][0], [0, np.pi, 2 * np.pi, 3 * np.pi], rtol=1e-6)


def test_inv_is_the_formula_at_n_equal_2p():
    wanted = [8 / np.pi * (8 / k - 1) for k in (1, 3, 5, 7)]
    np.testing.assert_allclose(s4d_inv(1, 4)[1][0], wanted, rtol=1e-6)


def test_legs_has_the_eigenvalues_of_hippos_normal_part():
    """The HiPPO-LegS matrix element by element, plus its rank-one term, by a general solver."""
    N = 8
    A, q = np.zeros((N, N)), np.sqrt(np.arange(N) + 0.5)
    for n in range(N):
        for k in range(n):
            A[n, k] = -np.sqrt((2 * n + 1) * (2 * k + 1))
        A[n, n] = -(n + 1)
    modes = np.linalg.eigvals(A + np.outer(q, q))
    np.testing.assert_allclose(modes.real, -0.5, atol=1e-9)
    wanted = np.sort(modes.imag)[::-1][: N // 2]
    np.testing.assert_allclose(s4d_legs(1, N // 2)[1][0], wanted, rtol=1e-5)


def test_legs_tends_to_inv():
    """The largest frequency is N^2 / pi up to a constant, and the first ones are near S4D-Inv's."""
    legs, inv = s4d_legs(1, 64)[1][0], s4d_inv(1, 64)[1][0]
    assert abs(legs[0] - 128**2 / np.pi) < 1
    np.testing.assert_allclose(legs[:2], inv[:2], rtol=0.03)


def test_time_steps_spread_over_their_range():
    log_dt = log_time_steps(jax.random.key(0), 1000)
    assert log_dt.shape == (1000,)
    assert np.log(1e-3) <= log_dt.min() < np.log(1.1e-3)
    assert np.log(0.9e-1) < log_dt.max() <= np.log(1e-1)
    np.testing.assert_allclose(np.median(log_dt), np.log(1e-2), atol=0.2)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-1.0, 1.0), (0.2, 0.1), (np.nan, 1.0)])
def test_a_range_that_is_none_is_refused(low, high):
    with pytest.raises(ConfigError, match="low="):
        log_time_steps(jax.random.key(0), 2, low, high)
