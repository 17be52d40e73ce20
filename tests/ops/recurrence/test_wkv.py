"""WKV against plain numpy, as a scan without a loop, at the ends of its range, and in bfloat16."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.cost import flops
from effjax.errors import ConfigError
from effjax.ops.recurrence.wkv import wkv, wkv_state
from effjax.ops.recurrence.wkv_naive import parallel_wkv, recurrent_wkv

B, T, D = 2, 13, 5
WHERE = {
    "positions": np.broadcast_to(np.arange(T, dtype=np.int32), (B, T)),
    "segments": np.zeros((B, T), np.int32),
}
DECAY = np.array([0.0, -1e-3, -0.1, -0.7, -3.0], np.float32)
BONUS = np.array([-2.0, -0.5, 0.0, 0.5, 3.0], np.float32)


def inputs(size: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    k, v = np.random.default_rng(0).normal(size=(2, B, T, D)).astype(np.float32)
    return size * k, v


def plain(k, v, log_decay, bonus) -> np.ndarray:
    """Each average on its own, weights of soft-max, in float64."""
    y = np.zeros(v.shape)
    for b, t, d in np.ndindex(*v.shape):
        rate = np.float64(log_decay[d])
        past = [0 if i == t - 1 else rate * (t - 1 - i) for i in range(t)]
        own = bonus[d] if bonus is not None else -rate
        exponents = np.array([*past, own]) + k[b, : t + 1, d]
        weight = np.exp(exponents - exponents.max())
        y[b, t, d] = (weight * v[b, : t + 1, d]).sum() / weight.sum()
    return y


run = jax.jit(wkv, static_argnames="chunk")


@pytest.mark.parametrize("bonus", [BONUS, None], ids=["bonus", "no bonus"])
def test_it_is_the_average_in_numpy(bonus):
    y, nothing = run(*inputs(), DECAY, bonus, **WHERE, chunk=4)
    assert nothing is None
    np.testing.assert_allclose(y, plain(*inputs(), DECAY, bonus), atol=2e-6)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(y, plain(*inputs(), 1.01 * DECAY, bonus), atol=2e-6)


def test_a_chunk_as_long_as_the_row_has_no_loop_and_is_the_serial_scan():
    """SSM-08: what Ding et al. 2023, table 1, call "not parallel" is an associative scan."""

    def loops(form, **options):
        given = jax.tree.map(jnp.asarray, (*inputs(), DECAY, BONUS))
        at = jax.tree.map(jnp.asarray, WHERE)
        jaxpr = jax.make_jaxpr(lambda *x: form(*x, **at, **options)[0])(*given)
        return str(jaxpr).count("scan[") + str(jaxpr).count("while[")

    assert loops(wkv, chunk=T) == 0
    assert loops(wkv, chunk=4) == loops(recurrent_wkv) == 1
    y, _ = run(*inputs(3.0), DECAY, BONUS, **WHERE, chunk=T)
    serial, _ = jax.jit(recurrent_wkv)(*inputs(3.0), DECAY, BONUS, **WHERE)
    np.testing.assert_allclose(y, serial, atol=2e-6)


@jax.jit
def gradients(k, v, log_decay, bonus, state):
    at = jax.tree.map(jnp.asarray, WHERE)

    def f(*x):
        y, after = wkv(*x, **at, state=state, chunk=4)
        return jnp.sum(y**2), (y, after)

    return jax.grad(f, argnums=(0, 1, 2, 3), has_aux=True)(k, v, log_decay, bonus)


def test_the_ends_of_the_range_are_finite_and_right():
    """Decays that forget at once or never, and keys whose exponentials no float32 holds."""
    decay = np.array([-np.inf, 0.0, -1e-7, -60.0, -1e4], np.float32)
    for size in (1.0, 1e3, 1e5):
        for state in (None, wkv_state(B, D)):
            grads, (y, _) = gradients(*inputs(size), decay, BONUS, state)
            assert all(np.isfinite(g).all() for g in (*grads, y))
            want = plain(*inputs(size), np.maximum(decay, -1e8), BONUS)
            np.testing.assert_allclose(y, want, atol=1e-5 if size == 1 else 2e-3)


# Two documents with padding and holes in the positions; padding, then a document with a wide hole.
PACKED = {
    "positions": np.array(
        [
            [0, 1, -1, 2, 5, 0, 1, 2, -1, -1, 3, 9, -1],
            [-1, -1, 4, 5, 6, 40, 41, -1, 42, 43, 0, 1, 2],
        ],
        np.int32,
    ),
    "segments": np.array([[1] * 5 + [2] * 8, [0] * 10 + [3] * 3], np.int32),
}


@pytest.mark.parametrize("chunk", [4, pytest.param(1, marks=pytest.mark.deep)])
def test_the_gradient_by_hand_is_that_of_the_naive_form(chunk):
    """Without a state, where it runs from the last token to the first; in float64."""
    weight = np.random.default_rng(2).normal(size=(B, T, D))

    def gradients(form, at, **options):
        def loss(k, v, log_decay, bonus):
            return (form(k, v, log_decay, bonus, **at, **options)[0] * weight).sum()

        with jax.enable_x64(True):
            at = jax.tree.map(jnp.asarray, at)
            given = (jnp.asarray(x, jnp.float64) for x in (*inputs(3.0), DECAY, BONUS))
            return jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(*given)

    for at in (WHERE, PACKED):
        got, wants = gradients(wkv, at, chunk=chunk), gradients(parallel_wkv, at)
        for mine, want in zip(got, wants, strict=True):
            assert np.abs(want).max() > 1e-2
            np.testing.assert_allclose(mine, want, atol=1e-10 * np.abs(want).max())


def test_the_gradient_by_hand_is_as_exact_as_autodiff_in_float32():
    without, _ = gradients(*inputs(), DECAY, BONUS, None)
    empty, _ = gradients(*inputs(), DECAY, BONUS, wkv_state(B, D))
    for got, want in zip(without, empty, strict=True):
        np.testing.assert_allclose(got, want, atol=3e-6 * np.abs(want).max())


def test_a_state_is_the_running_sums_of_the_paper():
    """In units of the largest exponent so far."""
    _, (_, after) = gradients(*inputs(), DECAY, BONUS, wkv_state(B, D))
    k, v = (x.astype(np.float64) for x in inputs())
    exponents = DECAY * np.arange(T)[::-1, None] + k
    unit = exponents.max(axis=1)
    weight = np.exp(exponents - unit[:, None])
    np.testing.assert_allclose(after["exponent"], unit, atol=1e-5)
    np.testing.assert_allclose(after["denominator"], weight.sum(axis=1), rtol=1e-5)
    np.testing.assert_allclose(after["numerator"], (weight * v).sum(axis=1), atol=1e-5)
    assert after["position"].tolist() == [T - 1] * B


def test_it_does_no_products():
    given = jax.tree.map(jnp.asarray, (*inputs(), DECAY, BONUS))
    at = jax.tree.map(jnp.asarray, WHERE)
    for state in (None, wkv_state(B, D)):
        counted = flops.count(lambda *x, s=state: wkv(*x, **at, state=s), *given)
        assert counted.total == 0


def test_bfloat16_inputs_lose_only_their_own_rounding():
    """L21: at most twice the error of the exact result of the same inputs, rounded."""
    low = tuple(jnp.asarray(x, jnp.bfloat16) for x in inputs())
    y, _ = run(*low, DECAY, BONUS, **WHERE, chunk=4)
    assert y.dtype == jnp.bfloat16
    exact = plain(*(np.asarray(x, np.float64) for x in low), DECAY, BONUS)
    rounded = np.abs(np.asarray(jnp.asarray(exact, jnp.bfloat16), np.float64) - exact).max()
    assert np.abs(np.asarray(y, np.float64) - exact).max() <= 2 * rounded


def test_a_chunk_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="wkv: chunk must be at least 1, got 0"):
        run(*inputs(), DECAY, **WHERE, chunk=0)
