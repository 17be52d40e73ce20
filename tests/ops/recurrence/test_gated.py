"""The gated recurrence against plain numpy, at the ends of its range, in bfloat16; its FLOPs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.cost.flops import count
from effjax.cost.memory import stored_bytes
from effjax.errors import ConfigError
from effjax.ops.accounting import Flops
from effjax.ops.recurrence import accounting
from effjax.ops.recurrence.gated import gated_recurrence, gated_state

B, T, N, H, HV = 2, 13, 4, 3, 5
WHERE = {
    "positions": np.broadcast_to(np.arange(T, dtype=np.int32), (B, T)),
    "segments": np.zeros((B, T), np.int32),
}
GATES = {"heads": (N,), "channels": (N, H)}
kinds = pytest.mark.parametrize("kind", GATES)


def inputs(kind: str, groups: int = 2) -> list[np.ndarray]:
    """q, k of each group, v of each head, and log gates between -8 and 0."""
    rng = np.random.default_rng(0)
    shapes = [(B, T, groups, H), (B, T, groups, H), (B, T, N, HV)]
    made = [rng.normal(size=s).astype(np.float32) for s in shapes]
    return [*made, -np.exp(2 * rng.normal(size=(B, T, *GATES[kind])) - 2).astype(np.float32)]


def plain(q, k, v, log_gate) -> np.ndarray:
    """S <- diag(gate) S + k v^T, y = q S, head by head in float64."""
    y, share = np.zeros(v.shape), v.shape[2] // q.shape[2]
    gate = np.exp(log_gate.astype(np.float64)).reshape(*v.shape[:3], -1, 1)
    for b in range(B):
        for n in range(N):
            S = np.zeros((H, HV))
            for t in range(v.shape[1]):
                S = gate[b, t, n] * S + np.outer(k[b, t, n // share], v[b, t, n])
                y[b, t, n] = q[b, t, n // share] @ S
    return y


run = jax.jit(gated_recurrence, static_argnames="chunk")


@jax.jit
def gradients(*x):
    where = jax.tree.map(jnp.asarray, WHERE)

    def f(*x):
        y, after = gated_recurrence(*x, **where, state=gated_state(B, N, H, HV), chunk=4)
        return jnp.sum(y**2) + jnp.sum(after["S"] ** 2), y

    return jax.grad(f, argnums=(0, 1, 2, 3), has_aux=True)(*x)


@kinds
def test_it_is_the_recurrence_in_numpy(kind):
    given = inputs(kind)
    y, nothing = run(*given, **WHERE, chunk=4)
    assert nothing is None
    np.testing.assert_allclose(y, plain(*given), atol=2e-5)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(y, plain(*given[:3], 1.01 * given[3]), atol=2e-5)


@kinds
def test_the_ends_of_the_range_are_finite_and_right(kind):
    """Gates of 0, of 1, of 1 - 1e-7, whose product underflows, and weak after strong ones."""
    q, k, v, gate = inputs(kind)
    gate[:, :, 0], gate[:, :, 1], gate[:, :, 2], gate[:, :, 3] = 0, -1e-7, -60, -0.003
    gate[:, 3:5, :2], gate[:, 6, 3], gate[:, 9, 3] = -np.inf, -np.inf, -997.3
    grads, y = gradients(q, k, v, gate)
    assert all(np.isfinite(g).all() for g in (*grads, y))
    np.testing.assert_allclose(y, plain(q, k, v, gate), atol=5e-6)
    nearby = jnp.where(jnp.isinf(gate), -800, gate)  # what passes a shut gate has no slope
    for g, near in zip(grads, gradients(q, k, v, nearby)[0], strict=True):
        np.testing.assert_allclose(g, near, atol=1e-5 * np.abs(near).max())


def test_a_gate_of_one_has_the_slope_of_a_gate_below_it():
    q, k, v, gate = inputs("heads")
    open_, nearly = (gradients(q, k, v, np.full_like(gate, x))[0][3] for x in (0, -1e-6))
    np.testing.assert_allclose(open_, nearly, rtol=1e-3, atol=1e-3)


@kinds
def test_bfloat16_inputs_lose_only_their_own_rounding(kind):
    """L21: at most twice the error of the exact result of the same inputs, rounded."""
    *made, gate = inputs(kind)
    low = [jnp.asarray(x, jnp.bfloat16) for x in made]
    y, _ = run(*low, gate, **WHERE, chunk=4)
    assert y.dtype == jnp.bfloat16
    exact = plain(*(np.asarray(x, np.float64) for x in low), gate)
    rounded = np.abs(np.asarray(jnp.asarray(exact, jnp.bfloat16), np.float64) - exact).max()
    assert np.abs(np.asarray(y, np.float64) - exact).max() <= 2 * rounded


def test_what_does_not_fit_is_refused():
    q, k, v, gate = inputs("heads")
    for chunk in (0, -4):
        with pytest.raises(ConfigError, match=f"chunk must be at least 1, got {chunk}"):
            run(q, k, v, gate, **WHERE, chunk=chunk)
    with pytest.raises(ValueError, match="must divide v's 4, got 3"):
        run(*(jnp.zeros((B, T, 3, H)),) * 2, v, gate, **WHERE)


def counted(kind: str, length: int, chunk: int, groups: int) -> Flops:
    def f(*x):
        at = jnp.zeros((B, length), jnp.int32)
        return gated_recurrence(*x, positions=at, segments=at, chunk=chunk)[0]

    shapes = [(groups, H), (groups, H), (N, HV), GATES[kind]]
    arrays = [jax.ShapeDtypeStruct((B, length, *s), jnp.float32) for s in shapes]
    forward = count(f, *arrays)
    both = count(jax.grad(lambda *x: jnp.sum(f(*x) ** 2), (0, 1, 2, 3)), *arrays)
    assert not both.unknown
    return Flops(forward.total, both.total - forward.total)


@pytest.mark.parametrize(("length", "chunk"), [(40, 8), (19, 7), (5, 64), (1, 8)])
def test_flops_are_counted_as_written(length, chunk):
    sizes = (B, length, N, H, HV, chunk)
    for groups in (1, N):
        got = counted("heads", length, chunk, groups)
        assert got == accounting.gated_flops(*sizes, groups=groups)
    assert counted("channels", length, chunk, N) == accounting.gated_channels_flops(*sizes)
    exact = accounting.exact_gated_flops(*sizes)
    q, k = np.mgrid[:length, :length]
    pairs = ((k <= q) & (q // chunk == k // chunk)).sum()
    assert exact.forward == 2 * B * N * (pairs * (H + HV) + 2 * length * H * HV)


def test_the_state_is_as_large_as_counted():
    assert stored_bytes(gated_state(B, N, H, HV)) == accounting.gated_state_bytes(B, N, H, HV)
