"""Retention against plain numpy, at the ends of its range and in bfloat16."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.errors import ConfigError
from effjax.ops.recurrence.retention import parallel_retention, retention, retention_state

B, T, N, H, HV = 2, 13, 3, 4, 5
WHERE = {
    "positions": np.broadcast_to(np.arange(T, dtype=np.int32), (B, T)),
    "segments": np.zeros((B, T), np.int32),
}


def inputs(seed: int = 0) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    shapes = [(B, T, N, H), (B, T, N, H), (B, T, N, HV)]
    return tuple(rng.normal(size=s).astype(np.float32) for s in shapes)


def plain(q, k, v, gamma) -> np.ndarray:
    """S <- gamma S + k v^T, y = q S, head by head in float64."""
    y = np.zeros(v.shape)
    for b in range(B):
        for n in range(N):
            S = np.zeros((H, HV))
            for t in range(T):
                S = gamma[n] * S + np.outer(k[b, t, n], v[b, t, n])
                y[b, t, n] = q[b, t, n] @ S
    return y


run = jax.jit(retention, static_argnames="chunk")
slow = jax.jit(parallel_retention)


@jax.jit
def gradients(q, k, v, log_decay, state):
    where = jax.tree.map(jnp.asarray, WHERE)

    def f(*x):
        y, after = retention(*x[:4], **where, state=state | {"S": x[4]}, chunk=4)
        return jnp.sum(y**2) + jnp.sum(after["S"] ** 2), y

    return jax.grad(f, argnums=(0, 1, 2, 3, 4), has_aux=True)(q, k, v, log_decay, state["S"])


@pytest.mark.parametrize("form", ["chunked", "parallel"])
def test_it_is_the_recurrence_in_numpy(form):
    gamma = np.array([0.999, 0.9, 0.2])
    log_decay = np.log(gamma).astype(np.float32)
    options = {"chunk": 4} if form == "chunked" else {}
    f = run if form == "chunked" else slow
    y, nothing = f(*inputs(), log_decay, **WHERE, **options)
    assert nothing is None
    np.testing.assert_allclose(y, plain(*inputs(), gamma), atol=2e-5)


def test_the_comparison_catches_a_wrong_rate():
    y, _ = run(*inputs(), np.log([0.99, 0.9, 0.2]).astype(np.float32), **WHERE, chunk=4)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(y, plain(*inputs(), [0.999, 0.9, 0.2]), atol=2e-5)


def test_the_ends_of_the_range_are_finite_and_right():
    """No memory at all, a memory that never fades, and one that underflows within a chunk."""
    log_decay = np.array([-np.inf, -1e-7, -60.0], np.float32)
    state = retention_state(B, N, H, HV)
    state |= {"S": state["S"] + 1, "position": state["position"] + 1}
    state |= {"segment": state["segment"] + 1}
    grads, y = gradients(*inputs(), log_decay, state)
    assert all(np.isfinite(g).all() for g in (*grads, y))
    positions = {"positions": WHERE["positions"] + 1, "segments": WHERE["segments"]}
    y, _ = run(*inputs(), log_decay, **positions, chunk=4)
    np.testing.assert_allclose(y, plain(*inputs(), np.exp(log_decay)), atol=2e-5)
    q, k, v = inputs()
    np.testing.assert_allclose(y[:, :, 0], np.sum(q * k, -1)[:, :, 0, None] * v[:, :, 0], atol=1e-5)


def test_one_chunk_is_the_parallel_form():
    log_decay = np.log([0.99, 0.9, 0.5]).astype(np.float32)
    for chunk in (T, 100):
        y, _ = run(*inputs(), log_decay, **WHERE, chunk=chunk)
        np.testing.assert_allclose(y, slow(*inputs(), log_decay, **WHERE)[0], atol=5e-6)


def test_bfloat16_inputs_lose_only_their_own_rounding():
    """L21: at most twice the error of the exact result of the same inputs, rounded."""
    log_decay = np.log([0.99, 0.9, 0.5]).astype(np.float32)
    low = tuple(jnp.asarray(x, jnp.bfloat16) for x in inputs())
    y, _ = run(*low, log_decay, **WHERE, chunk=4)
    assert y.dtype == jnp.bfloat16
    exact = plain(*(np.asarray(x, np.float64) for x in low), np.exp(log_decay))
    rounded = np.abs(np.asarray(jnp.asarray(exact, jnp.bfloat16), np.float64) - exact).max()
    assert np.abs(np.asarray(y, np.float64) - exact).max() <= 2 * rounded


@pytest.mark.parametrize("chunk", [0, -4])
def test_a_chunk_of_nothing_is_refused(chunk):
    with pytest.raises(ConfigError, match=f"chunk must be at least 1, got {chunk}"):
        run(*inputs(), np.zeros(N, np.float32), **WHERE, chunk=chunk)
